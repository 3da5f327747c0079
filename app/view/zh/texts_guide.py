"""Chinese for `app.view.texts_guide`."""

from __future__ import annotations

KEPT = ()

# grids over a channel
GRID = "通道上的网格"
GRIDS = {"none": "无", "tensor": "INT4，整个张量", "cluster": "INT4，所在簇", "fp4": "FP4", "ternary": "三值"}
GRID_INFO = {
    "tensor": "{count} 个台阶中有 {used} 个用得上：一个尺度要覆盖此输入的所有通道",
    "cluster": "{count} 个台阶中有 {used} 个用得上：尺度只覆盖此簇的通道",
    "fp4": "{count} 个台阶中有 {used} 个用得上：步长随大小增加，最后一个是该通道的最大值",
    "ternary": "{count} 个台阶中有 {used} 个用得上：0 和 ± 该通道取值的平均大小",
}

# the reorderings of a layer
FUSED = "此层的五个重排"
FUSED_LABEL = "一层及其重排的示意图；每处的按钮在上面的图中显示其通道"
FUSED_SAID = "{model} 的第 {layer} 层，{recipe}：5 个重排中 {count} 个开启。点击一个，在上面查看它的通道。"
FUSED_NOTE = "没有一个重排是单独的步骤：每个都并入写出通道的运算和读取通道的权重，层与层之间的数据流保持原来的顺序。"
FUSED_SHARED_NOTE = (
    "没有一个重排是单独的步骤：每个都并入写出通道的运算和读取通道的权重。层与层之间的数据流有一个所有层共用的顺序，"
    "嵌入、归一化、权重和输出头都按此排列。"
)
FUSED_SHARED = "通道按所有层共用的顺序到来；簇是其中连续的段。上面的图显示此层使用自己的顺序时的簇。"
FUSED_FLOW = (
    ("归一化", ("attn_in",), "q、k、v 权重", ("q", "k", "v"), "注意力", ("o_in",), "输出权重", "回到数据流"),
    ("归一化", ("mlp_in",), "gate、up 权重", ("down_in",), "down 权重", "回到数据流"),
)
FUSED_WHERE = {
    "R1": "注意力之前的归一化按新顺序写出通道；q、k、v 权重的列随之改变。",
    "R2": "在每个头内，查询和键用同一顺序：它们的乘积不变。由位置编码的旋转写出；没有旋转的模型则在权重的行中。",
    "R3": "在每个头内：v 权重的行和输出权重的列。",
    "R4": "MLP 之前的归一化按新顺序写出通道；gate 和 up 权重的列随之改变。",
    "R5": "gate 和 up 权重的行，以及 down 权重的列。",
}
FUSED_CLUSTERS = "{} 个簇"
FUSED_PER_HEAD = "每头 {} 个簇"
FUSED_WIDTH = "{channels:,} 个通道，{bits} 比特"
FUSED_HEADS = "{heads} 个头，每头 {channels} 个通道，{bits} 比特"
OFF = "关闭"
OFF_METHOD = "关闭：方法 {} 不重排。"
OFF_ONE = "关闭：只有一个簇，没有可重排的。"
OFF_FLOAT = "关闭：此配方不量化查询和键。"

# the guide
GUIDE = "导览：五步了解本页"
GUIDE_OFFER = "第一次来？五个短步骤用此模型展示本页的功能。"
GUIDE_START = "开始导览"
GUIDE_LATER = "以后再说"
GUIDE_AGAIN = "五步导览"
GUIDE_BACK = "上一步"
GUIDE_NEXT = "下一步"
GUIDE_GO = "前往控件"
GUIDE_END = "结束导览"
GUIDE_STEP = "第 {number} 步，共 {count} 步：{title}"
GUIDE_DO = "操作："
GUIDE_SEE = "观察："
GUIDE_STEPS = {
    "scatter": (
        "找到一个响亮的通道",
        "点击一个远离其他点的点。用键盘时，方向键在点之间移动，回车选择。",
        "通道面板说明它是中位通道的多少倍宽，以及文本的哪些词造成它的极端值。其图中的线是四比特能表示的台阶。",
    ),
    "clusters": (
        "给通道分组",
        "把滑块 g 移到 1，再移回去。",
        "只有一个簇时，所有通道共用一个尺度。簇更多时，只有范围相近的通道共用：两条带按簇排序显示它们，大号数字说明舍入误差减少多少。",
    ),
    "quantize": (
        "量化模型",
        "按“量化”，等进度条结束。",
        "一句话说明困惑度上升多少，一张表说明还剩多少字节。上面的图显示代价来自哪些层。",
    ),
    "write": (
        "读两个模型写的文字",
        "按“续写”。",
        "原模型和量化模型并排续写同一提示词。下面是测得的数字。",
    ),
    "real": (
        "换一个真实模型",
        "用页签上方的按钮打开更大的模型，或在侧栏输入 Hub 上任何受支持的模型。",
        "同样的图，换成那个模型：它的离群值远得多。侧栏最后一栏可把您看到的做成链接。",
    ),
}

# models that are one click away
OPEN_LARGER = "打开 {name}：真实模型，需下载一次 {size}"

LANGUAGE = "语言"
