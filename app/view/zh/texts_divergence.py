"""Chinese for `app.view.texts_divergence`."""

from __future__ import annotations

from app.view.zh.texts import BIT_LABELS

KEPT = ()

TOKENS = "它们在哪里不同？逐个词元看文本"
TOKENS_RUN = "量化结果"
TOKENS_COUNT = "词元数"
TOKENS_READ = "用两个模型读文本"
TOKENS_NONE = "还没有量化结果：先按“量化”，然后用它和它的未量化模型读一段文本。"
TOKENS_READY = "按下按钮：量化结果与其原模型读这段文本，每个词元显示两者相差多远。"
TOKENS_NOTE = (
    "颜色：此词元处预测的 KLD，单位奈特；下划线：两者认为最可能的词元不同（翻转）。"
    "指针停在词元上，或用 Tab 键到达，可看两者各自最可能的五个。"
    "点击词元，或在其上按回车，可看哪些激活在那里变动最大。"
)
TOKENS_FIRST = "首个词元不作预测"
TOKENS_LEGEND = ("低于 0.01", "0.01", "0.05", "0.2", "0.5", "1 奈特及以上")
CONFIDENCE_HEADERS = ["参考模型的最大概率", "词元数", "平均 KLD，奈特", "翻转"]
CONFIDENCE_CAPTION = "按未量化模型的置信度"
MOVED_JOB = "正在查看此词元处的内部"
MOVED_AT = "被预测的词元："
MOVED_AFTER = "其前一个："
MOVED_MOST = "变动最大：第 {layer} 层的{site}，为其平方的 {share} %。通道 {channel}：{before} 变为 {after}。"
MOVED_ROUNDED = "舍入最大：第 {layer} 层的{site}，{share} %。"
MOVED_NOTHING = "没有变动：此结果的计算与原模型相同。"
MOVED_TABLE = "变动最大的十个位置"
MOVED_HEADERS = ["层", "位置", "变动，%", "传入，%", "此处舍入，%", "通道：原模型 → 量化结果"]
MOVED_FIGURES = {"moved": "全部变动", "came": "传入", "rounded": "此处舍入"}
MOVED_CAPTION = "与原模型之差的平方，占原模型平方的 %，按位置和层"
MOVED_LABEL = "在所选词元处变动最大的位置的图，按层"
MOVED_JSON = "所有位置（JSON）"
MOVED_NONE = "没有选择词元：请先点击着色文本中的一个。"
MOVED_NOTE = (
    "每个数是一层一个位置的所有通道之和，取自所选词元的前一个词元，预测在那里作出。"
    "传入：原模型的层读取量化结果中进入此层的内容。此处舍入：舍入此位置所增加的。"
    "变动：全部合计，也包括此层舍入的权重；通道编号与“探索”页相同。"
)
MOVED_MIXED = "“变动”为横线处，量化结果在层内缩放或旋转通道，或其顺序未知：它们在原模型中没有对应，所列通道显示传入的值。"
FIRST_DIFFERENCE = "第 {} 个词元首次与原模型的文本不同"
SAME_TEXT = "与原模型的文本相同"
TEXT_END = "∎"
HALF_CHARACTER = "�"

# bytes against divergence
PARETO_LABEL = "与最新结果以同样方式测量的所有结果的字节数对散度图，最好的以线相连"
PARETO_CAPTION = "与最新结果同样测量：散度 ± 标准误差对字节数；没有结果位于线下"
PARETO_SIZE = "字节计自"
PARETO_SIZES = {"weight_bytes": "权重", "kv_bytes_per_token": "每词元 KV 缓存"}
SAVE_CSV = "数字（CSV）"
SAVE_JSON = "数字（JSON）"

# what a recipe costs
COST = "此配方的代价"
COST_WAIT = "模型打开后立即预测代价：改变比特、簇数或方法并观察它。"
COST_READING = "模型把一段短文本向前和向后各读一次"
COST_LINE = "等待中"
COST_MEASURING = "正在测量…"
COST_ROWS = {
    "predicted": ("预测", "由探针上的梯度得出，不运行量化模型"),
    "measured": ("探针上测得", "所有张量舍入后运行一次，权重就近舍入"),
    "verified": ("已验证", "已完成运行的打包模型"),
}
COST_FLOOR = "噪声下限：模型自身用 bfloat16 计算"
COST_SATURATED = "超过 0.5 奈特时，预测只说明代价很大；请相信测量。"
COST_ESTIMATED = "{all} 个部分中有 {count} 个取自相邻选择，直到滑块停下。"
COST_OFF = "预测是测量值的 {ratio} 倍：这就是它在此处的误差。"
COST_NOTHING = "此配方不量化任何东西：没有代价。"
BEFORE = "开始之前"
BEFORE_WAIT = "模型打开后立即估计一次运行需要什么：给它的一层计时。"
BEFORE_TIME = "量化，用 {tokens:,} 个校准词元"
BEFORE_MEASURE = "在 {tokens:,} 个词元上测量它和原模型"
BEFORE_PEAK = "内存峰值，不测量时 {alone}"
BEFORE_BYTES = "保存的模型；其中打包权重 {packed}"
BEFORE_NOTE = "由形状和一层的计时估计，在本机上用了 {seconds}。"
BEFORE_SAVED = "此运行以前做过：只需加载，立即完成。"
BEFORE_SHORT = "还缺 {lacking} 内存：请用更少的校准词元或更小的模型。"
WHERE = "哪里受损"
WHERE_LABEL = "每层每个部分造成的散度热图：预测值，已测量处为测量值"
WHERE_CAPTION = "每个部分单独造成的 KLD，每词元奈特（对数刻度）；点击一格查看其通道"
WHERE_ROWS = {name: label for name, label in BIT_LABELS.items() if name != "weights"} | {
    "qkv": "q、k、v 权重",
    "o": "注意力输出权重",
    "up": "gate、up 权重",
    "down": "down 权重",
}
SWAPS = "单独测量每个部分"
SWAPS_NOTE = (
    "{all} 个部分中 {count} 个已单独测量：预测 / 测得的中位数为 {ratio}。"
    "对照（不替换任何部分）：{control} 奈特。"
    "各部分之和与同时全部之比：{additive}。"
)
WHERE_HEADERS = ["层", "部分", "预测，奈特", "单独测得，奈特", "份额"]
WHERE_TABLE = "代价最大的十个部分"
WHERE_PICK = "点击一行，或在其上按回车，可在“探索”页看它的通道。权重显示它们读取的位置。"
WHERE_NONE = "此部分没有通道可显示：请点击某个位置或权重的格子。"
WHERE_OTHER = "观察到的范围不属于此配方的模型：请先按“观察取值范围”。"
LEARN_COST_TITLE = "学习：如何预测代价"
LEARN_COST = """
**KLD**（Kullback–Leibler 散度）说明量化模型对下一词元的预测与原模型相差多远，单位为每词元奈特；0 表示同一模型。“比较”页按它给文本逐词元着色。

**预测。** 模型把一段短文本向前和向后各读一次。每个部分（一层的某个激活，或一个权重矩阵）处的梯度说明*那里*的误差使预测移动多少。把该部分舍入到所选比特和簇得到它的误差；两者合起来就是它的代价，无需运行量化模型。代价较小时，各部分的代价可以相加。

**探针上测得。** 同一文本，在全部舍入的情况下读一次。您停止改动时它自动开始。

**已验证。** 如果您运行过此配方：*量化*用打包模型在自己的文本上测得的值。

**噪声下限**是仅仅用 bfloat16 计算的代价：低于它的选择没有值得注意的代价。
"""
