"""Chinese for `app.view.texts_layers`."""

from __future__ import annotations

KEPT = ("EXAMPLE",)

PANEL = "单个层或位置"
LABEL = "单个层的比特或簇数"
INFO = (
    "各部分以逗号分隔。k：一个张量（attn_in、q、k、v、softmax、o_in、mlp_in、down_in）；weights，或某个矩阵的 weights.down"
    "（qkv、o、up、down）；R1 到 R5：簇数。16 比特：不量化；layers.7=16 使整层保持原样。"
)
MEANS = "已设定 {count} 个部分，涉及 {layers} 层。它们取代对所有层的选择。"

# the autopilot
AUTOPILOT = "花费预算"
AUTOPILOT_INFO = (
    "给每层的权重、键和值各自的比特数，使给定字节数下的预测代价最小：字节包括保存的模型和所给词元数的缓存。"
    "激活值不占保存的字节：它们保持自己的比特，或相互分配。"
)
BY_LABEL = "预算是"
BY = {"bytes": "字节", "kld": "散度"}
BYTES_LABEL = "预算，MB"
MARKS_LABEL = "与某个统一方案同样多"
KLD_LABEL = "最大散度，每词元奈特"
CONTEXT_LABEL = "缓存中的词元数"
SPREAD = "激活值的比特也在各层之间分配，每词元总数不变"
SPEND = "花费"
USE = "采用此配方"
USED = "配方已填入各栏：“量化”会制作打包模型并加以验证。"
SPEND_FIRST = "还没有分配：请先花费预算。"
OPEN_FIRST = "模型还没有打开：请等第一张图。"
SPENT_TITLE = "预算花在哪里"
SPENT = "{bytes}，含 {context:,} 个词元的键和值（{limit}） · 预测 {predicted} 奈特"
SPENT_MEASURED = " · 探针上测得 {} 奈特，权重就近舍入"
WITHIN_BYTES = "允许 {}"
WITHIN_KLD = "允许 {} 奈特"
NO_RIVAL = "没有所有层比特相同、激活值相同的配方符合此预算。"
RIVAL_WEIGHTS = "{} 比特权重"
RIVAL_CACHE = "{} 比特键和值"
BY_PREDICTION = "预测"
BY_MEASUREMENT = "探针上测得"
BETTER = "比处处{rival}（{bytes}）散度少 {less} %：{own} 对 {other} 奈特，{how}。"
UNIFORM_BETTER = "这里处处{rival}（{bytes}）更好：{other} 对 {own} 奈特，{how}。请保留统一配方。"
SMALLER = "比处处{rival}（{bytes}）少 {less} % 字节：{own} 对 {other} 奈特，{how}。"
RANK = "由一次运行验证：{own} 奈特，在此运行与同一文本上的统一运行中，{count} 个里排第 {place}。在 {bytes} 以内，{best}。"
RANK_BEST = "没有统一运行更好"
RANK_BEATEN = "统一运行 {rival} 更好：{kld} 奈特"
WITHIN = "最多高于每通道一簇的百分比"
SMALLEST = "寻找最小的 g"
SMALLEST_FOUND = (
    "g = {g} 是与每通道一簇相差 {within} % 以内的最小值：{own} 对 {other} 奈特，为此配方预测。请在侧栏设定。"
)
MAP_LABEL = "每层每个部分的比特"
MAP_CAPTION = "每个部分的比特，逐层"
LAYER = "层"
