"""Chinese for `app.view.texts_groups`."""

from __future__ import annotations

KEPT = ("KMEANS",)

# the curve in nats
NATS_LABEL = "此位置的预测散度随簇数的变化"
NATS_CAPTION = "仅此位置的预测 KLD，每词元奈特"
NATS_WAIT = "控件停下后预测以奈特计的代价。"
NATS_JOB = "预测此位置的代价"
EVERYWHERE = "每层用同样的 g"
CURVE_CAPTION = "平方误差随簇数的变化"
EQUAL = "等大分组"
PER_CHANNEL = "每个通道一个网格"
PER_TENSOR = "整个张量一个网格"
KNEE = "拐点，g = {}"
HERE = "现在，g = {}"
CURVE_HEADERS = ["g", "误差，KMeans", "误差，等大分组", "奈特，KMeans", "奈特，等大分组"]
CURVE_TABLE = "平方误差（整个张量一个网格 = 1）和预测 KLD，按簇数"
WHOLE = "一个网格"
CHANNEL = "每通道"
KNEE_ERROR = "平方误差：拐点在 g = {g}，节省了簇所能节省的 {share} %。"
KNEE_NATS = "预测散度：拐点在 g = {g}，{cost} 奈特。"
NO_KNEE_ERROR = "平方误差：曲线没有拐点。"
NO_KNEE_NATS = "预测散度：曲线没有拐点。"
LEVELS = "整个张量一个网格代价 {tensor} 奈特，每个通道一个网格 {channel}。"
EQUAL_NEEDS = "等大分组要 g = {g} 才不更贵。"
EQUAL_NEVER = "等大分组直到 g = {g} 都更贵。"
BELOW_FLOOR = "全部低于噪声下限 {floor} 奈特。"
CURVE_NOTE = (
    "以奈特计：簇和网格与实际运行相同，首个词元保持浮点，梯度来自一段短文本。平方误差：来自所示的范围。等大分组：通道按范围排序，"
    "切成 g 个大小相同的组。对查询、键、值和注意力输出，g 是每个头的簇数。"
)

# two calibrations
PAIR = "比较两个校准文本"
PAIR_INFO = (
    "A 是此配方的校准：侧栏的文本及其词元数。B 在这里选择。两者都给出范围、簇和代价。代价在一段文本上读取，A 和 B 都没有用它校准。"
)
PAIR_TEXT = "文本 B"
PAIR_TOKENS = "B 的词元数"
PAIR_JUDGE = "评判文本"
PAIR_START = "比较 A 和 B"
PAIR_WIDER = "用 B 时，{wider} % 的通道范围宽出十分之一以上，{narrower} % 更窄；{moved} % 的通道换了簇。"
PAIR_COST = "{recipe} 用 A 代价 {a} 奈特，用 B 代价 {b} 奈特，在 {judge} 的 {tokens:,} 个词元上测得。"
PAIR_BARS = {"predicted": "{}，预测", "measured": "{}，探针上测得"}
PAIR_TOLD = "A：{texts[0]} 的 {tokens[0]:,} 个词元 · B：{texts[1]} 的 {tokens[1]:,} 个词元"
PAIR_MAP_LABEL = "换簇通道所占比例的热图，按层和位置"
PAIR_MAP = "换簇的通道，%；点击格子查看其通道"
PAIR_SCATTER_LABEL = "通道散点图：用 A 的范围宽度对用 B 的宽度"
PAIR_SCATTER = "第 {layer} 层，{site}：每个通道的范围宽度"
PAIR_SAME = "两者同宽"
PAIR_HEADERS = ["层", "位置", "换簇", "调整兰德指数", "用 B 更宽", "用 B 更窄"]
PAIR_TABLE = "差别最大的十个位置。点击一行，或在其上按 Enter，查看其通道。"
PAIR_NONE = "还没有比较：请按上面的按钮。"
PAIR_SITE = "此位置不存在：请点击一个格子或一行。"
