"""Chinese for `app.view.texts`."""

from __future__ import annotations

KEPT = ("TITLE", "LINKS", "PROMPT_DEFAULT", "PROMPT_STORY", "SPARSITY_PAPER")
"""Names whose texts stay as they are: proper names, and prompts for models that read English."""

TAGLINE = "看清激活值为何难以量化，以及每个选择的代价。"
SITE_LABELS = {
    "attn_in": "注意力输入",
    "q": "查询",
    "k": "键",
    "v": "值",
    "o_in": "注意力输出",
    "mlp_in": "MLP 输入",
    "down_in": "MLP 隐层",
}
SITE_HELP = {
    "attn_in": "注意力之前归一化的输出，即 q、k、v 投影的输入",
    "q": "位置编码之后的查询",
    "k": "KV 缓存中保存的键",
    "v": "KV 缓存中保存的值",
    "o_in": "注意力的输出，即其输出投影的输入",
    "mlp_in": "MLP 之前归一化的输出",
    "down_in": "MLP 内部，即 down 投影的输入",
}

# sidebar
MODEL = "模型"
MODEL_INFO = "列表中的名称、Hub 标识（owner/name）、本地文件夹或 .gguf 文件。只读 safetensors，不运行任何代码。"
MODEL_INFO_SPACE = "列表中的名称或 Hub 标识（owner/name）。只读 safetensors，绝不运行模型自带的代码。"
TEXT = "校准文本"
TEXT_PASTE = "粘贴我自己的…"
TEXT_NAMES = {"sotu": "国情咨文", "wikitext2": "WikiText-2"}
YOUR_TEXT = "您的文本“{}…”"
PRIVATE_TEXT = "一段私有文本"
PASTE_LABEL = "您的文本"
PASTE_INFO = "只用于您这次访问，不会保存或共享。至少 512 个词元，约 2,500 个字符。"
TOKENS = "观察的词元数"
OBSERVE = "观察取值范围"
METHOD = "方法"
METHODS = {
    "rptq": "RPTQ：通道分组",
    "rotation": "Rotation：缩放并旋转通道",
    "rtn": "RTN：直接舍入，作为基线",
    "bitnet": "BitNet a4.8：三值模型",
}
SCHEME = "比特"
SCHEME_INFO = "W 权重，A 激活，KV 只量化缓存。W4A4 中归一化输出和 softmax 保留 8 比特。"
SCHEME_CUSTOM = "自定义：见第 3 页"
CLUSTERS = "簇数 g"
OWN_CLUSTERS = "各自的簇数，见第 3 页"
BITNET_MODE = "投影的输入"
BITNET_MODE_INFO = "权重是三值，占 2 比特；这里决定它们与什么相乘。"
BITNET_MODES = {
    "w1.58a8": "b1.58：8 比特输入",
    "a4.8": "a4.8：4 比特，稀疏处 8 比特",
    "a4.8-fp4": "a4.8 FP4：4 比特浮点",
    "int4": "全部 INT4", "fp4": "全部 FP4",
    "v2-a8": "v2，8 比特：Out 和 Down 之前作哈达玛变换", "v2": "v2：4 比特，Out 和 Down 之前作哈达玛变换",
}
QUANTIZE = "量化"
STOP = "停止"
LINK = "复制链接"
SAVE = "分享与保存"
LINK_COPIED = "已复制。"
LINK_NOT_COPIED = "请从上面的框中复制。"
LINK_PASTED = "链接不含您粘贴的文本：打开它的人也须粘贴该文本，或另选一个。"
LINK_FOREIGN = "此链接指定的校准文本不在这里：作者粘贴了它，或它是一个文件。请在侧栏粘贴，或另选一个。现在的范围来自{}。"
LINK_RUN = "链接中的结果 {} 不在这里：请设好它的配方并按“量化”。链接的其余部分都已显示。"
PROGRAMS = "在程序中使用本页"
OPEN_RECIPE = "打开配方（JSON）"
RECIPE_TITLE = "配方已打开"
RECIPE_OPENED = "各栏已按配方填好：按“量化”运行，或按“观察取值范围”查看其模型。"
RECIPE_PASTED = "各栏已按配方填好。文件中没有它的校准文本：请在侧栏粘贴，或另选一个。"
PAPERS = "论文："
LINK_LABEL = "此视图的链接"
SAVE_RECIPE = "配方（JSON）"
SAVE_RANGES = "取值范围（CSV）"
SAVE_REPORT = "报告（JSON）"

# what this is
INTRO_TITLE = "在真实模型上看：四比特为何困难"
INTRO = (
    "下图每个点是某层输入的一个通道。少数通道比其余的宽得多，而十六个台阶也必须够到它们：四比特模型因此变差。"
    "<b>RPTQ</b> 把范围相近的通道分为一组；<b>BitNet</b> 训练只需要三种权重的模型。"
)
INTRO_TOY = "此模型是本页自带的：{size} M 参数，供快速浏览。真实模型只差一次选择：选 {other}，或在侧栏输入 Hub 标识。"
FOOTER = "每个版本及其测试范围，每个后端及其原因"
FOOTER_COMMAND = "不用浏览器查看同样内容："
BACKENDS = "这里可用的后端：{}"
NO_BACKENDS = "。这里没有：{}"
PACKAGE_HEADERS = ["软件包", "已安装", "测试范围", ""]
BACKEND_HEADERS = ["后端", "此处", "原因"]
PACKAGE_STATES = {True: "已测试", False: "未测试"}
BACKEND_STATES = {True: "可运行", False: "不可运行"}
OPEN_TERNARY = "打开 {}（BitNet a4.8，本页自带）"
SIDE = "模型与配方"

# explore
EXPLORE = "1 · 探索"
LAYER = "层"
SITE = "位置"
LINEAR = "线性坐标"
SAME_AXES = "各层同一坐标"
AVERAGED = "滑动平均"
AVERAGE_RANGE = "平均范围"
POINTS = "一个点是一个通道：其最小值与最大值"
POINTS_AVERAGED = "一个点是一个通道：每个窗口内的最小值与最大值，对窗口取平均"
POINTS_CLUSTERED = "按簇着色的通道"
SCATTER_LABEL = "通道散点图：最小值对最大值。用下面的通道号可以用键盘选择同样的点。"
HEATMAP_LABEL = "各层各通道最大绝对值的热图"
HISTOGRAM_LABEL = "所选通道取值的直方图"
CHANNEL = "通道"
CHANNEL_EMPTY = "点击图中一点：这里显示该通道的范围、直方图，以及极端值背后的词元。"
CHANNEL_JOB = "正在读取通道"
CHANNEL_LATER = "松开滑块，或在上面的框中按回车，以读取此通道的取值和词元。"
CHANNEL_WAIT = "正在寻找极端值背后的词元…"
OUTLIERS = "整个模型中相对其位置最宽的通道。点击一行即可前往。"
OUTLIER_HEADERS = ["层", "位置", "通道", "最小", "最大", "中位数的倍数"]
TO_REORDER = "下一步：给这些通道分组 →"
LEARN_EXPLORE_TITLE = "学习：这些图表示什么"
LEARN_EXPLORE = """
**一个点是什么。** 一层的输入是向量：每个词元在每个*通道*上有一个数。在校准文本上，每个通道有最小值和最大值：这就是它的点。靠近原点的圆点是安静的通道；远处的是响亮的通道。

**为何重要。** 四比特只有十六个台阶。整个张量共用一个尺度时，它必须够到最宽的通道，台阶就和离群值要求的一样宽，安静的通道只落在一两个台阶里。所以激活值比权重更难量化。

**如何读坐标。** 坐标在零的两侧都是对数的（零附近是线性的），因为范围跨越几个数量级。切换到线性可以看到离群值究竟有多远。*滑动平均*显示 RPTQ 公开代码校准所用的界：对窗口取平均，使单个响亮的词元影响很小。
"""

# reorder
REORDER = "2 · 重排"
STRIPS_LABEL = "通道范围的两条带，重排之前与之后"
CURVE_LABEL = "预测误差随簇数的变化"
CLUSTER_SCATTER_LABEL = "按簇着色的通道散点图"
CLUSTER_TABLE = "以表格显示各簇"
CLUSTER_HEADERS = ["簇", "通道数", "下界", "上界", "尺度", "零点"]
BITS_PREVIEW = "比特"
TO_QUANTIZE = "下一步：按此量化 →"
LEARN_REORDER_TITLE = "学习：簇与重排"
LEARN_REORDER = """
**RPTQ 的思路**（[arXiv 2304.01089](https://arxiv.org/abs/2304.01089)）。范围相近的通道被分入 g 个簇（对最小值和最大值做 k-means）。每个簇有自己的尺度和零点，于是安静的通道得到细的台阶，响亮的得到粗的台阶。

**重排。** 同一簇的通道被移到一起，使矩阵乘法把每个簇当作一块来读。移动被并入前后的权重：不量化时，模型的输出不变。

**要多少簇？** 点图下面的曲线先快速下降，然后变平：过了拐点，更多的簇只增加参数而收益很小。查询、键和值在每个注意力头内分组，每头为 g 的八分之一。
"""

# quantise
QUANTIZE_TAB = "3 · 量化"
VARIANT = "变体"
VARIANTS = {
    "default": "默认：更好的规则",
    "official": "官方：与公开代码一致",
    "strict": "严格：归一化输出也用低比特",
    "matched": "对等：同 RPTQ，但不重排",
    "sorted": "排序：大小相同的组",
}
RTN_PLAIN = "普通：每个张量一个范围"
WEIGHTS = "权重"
WEIGHT_METHODS = {"gptq": "GPTQ：二阶，更好", "rtn": "就近舍入：立即完成"}
CALIBRATION_TOKENS = "校准词元数"
TOPK = "TopK 保留"
KV_BITS = "KV 缓存"
BOS_BITS = "首个词元的 KV"
Q_BITS = "查询的比特"
NOT_QUANTISED = "16：不量化"
MEASURE = "随后测量"
BITS_PANEL = "每个张量的比特"
BITS_INFO = "2 到 8，或 16 表示不量化。改动任何一个，方案就成为您自己的。"
BIT_LABELS = {"weights": "权重", **SITE_LABELS, "softmax": "softmax"}
CLUSTER_PANEL = "每个重排的簇数"
CLUSTER_LABELS = {
    "R1": "R1 注意力输入",
    "R2": "R2 查询、键（每头）",
    "R3": "R3 值（每头）",
    "R4": "R4 MLP 输入",
    "R5": "R5 MLP 隐层",
}
ORDER_LABEL = "层间数据流的顺序"
ORDERS = {"layer": "每层各自的：R1 和 R4", "shared": "所有层共用一个"}
ORDER_INFO = "共用的顺序并入权重，归一化不必重排。困惑度会变差：两者都测量并比较。"
SEGMENTS_LABEL = "整数累加器"
SEGMENTS = {
    "exact": "精确：每个簇一个",
    "aligned": "对齐：合并为最多 4 个簇",
    "pow2": "二的幂：一个，尺度向上取整",
}
SEGMENTS_INFO = "越少越快，但困惑度变差：两者都测量并比较。"
EXACT = "每一层的输出与原模型完全相同：没有曲线可画。"
SQNR_LABEL = "每层输出的信噪比"
SITES_LABEL = "按层和位置的信噪比"
RUN_EMPTY = "还没有运行。按“量化”：逐层校准、重排、舍入，然后与原模型并排测量。"
TO_COMPARE = "下一步：看看它写什么 →"
DETAILS = "上次运行的阶段、回退与内核"
LEARN_QUANTIZE_TITLE = "学习：量化做了什么"
LEARN_QUANTIZE = """
**过程。** 逐层进行：校准文本通过已量化的各层，观察范围，通道分组并重排，权重舍入（GPTQ 用后面的列修正每一列的误差）并打包。原模型从不改变。

**SQNR** 是信号与舍入噪声之比，单位分贝：20 dB 是十分之一的误差，40 dB 是百分之一。它逐层下降，因为误差会累积。

**BitNet** 的权重是 -1、0 和 1，不需要校准：每个词元有自己的尺度。它适用于*这样训练*的模型。结果值多少总写在旁边：全精度训练的模型舍入到三个值后只会写出噪声，这是预期的结果。

**回退。** 如果某层的统计量不能用于 GPTQ，就改为就近舍入；这里会列出它，图中也会标出。
"""

# compare
COMPARE = "4 · 比较"
RUNS = "比较对象"
PROMPT = "提示词"
GENERATE = "续写"
NEW_TOKENS = "新词元数"
TEMPERATURE = "温度"
CHAT = "对话格式"
NO_CHAT = " · 此模型没有对话格式：提示词按普通文本续写"
WHOLE_WINDOWS = "（要求 {asked:,}，取整窗口，每窗 {window}）"
MEASURE_NOW = "测量"
EVAL_TOKENS = "词元数"
EVAL_TEXT = "测量文本"
EVAL_TEXT_OWN = "我的校准文本"
EVAL_TEXT_NONE = "当前范围不是来自粘贴的文本：请在侧栏粘贴并按“观察取值范围”，或在给定文本上测量。"
SEED = "随机种子"
KEEP = "命名、移除、下载或打开运行结果"
KEEP_RUN = "运行结果"
KEEP_NAME = "名称（留空：由页面命名）"
KEEP_RENAME = "重命名"
KEEP_REMOVE = "移除"
KEEP_PACK = "制作 zip 文件"
KEEP_PACKING = "正在写 zip 文件"
KEEP_FILE = "下载"
KEEP_NO_FOLDER = "此结果没有保存的文件夹：未量化的模型不复制，磁盘放不下的只在内存里。下面的命令会写出文件夹。"
KEEP_COMMAND = "重复此运行的命令："
LOADS = "能加载它的其他程序（用命令行的 export 导出）："
OPEN_PATH = "本机上的量化文件夹"
OPEN_SAVED = "打开文件夹"
OPEN_ZIP = "打开 zip 文件（最大 {}）"
OPENING = "正在打开保存的模型"
RUN_OPENED = "此模型已经量化：它是“{1}”页中的结果“{0}”。图表显示它的来源 {2}。"
BYTES_LABEL = "按部分测量的字节数"
TEXTS_EMPTY = "按“续写”：每个模型依次续写同一提示词。"
NUMBERS = "已测量结果的数字"
NUMBERS_EMPTY = "按“测量”，在同一文本上比较困惑度、散度、字节数和速度。"
NO_RUNS = "还没有可比较的：模型加载后出现基础模型，量化后出现量化模型。"
SPEED_HEADERS = ["运行结果", "测得", "内存速度上限", "达到", "每词元读取", "内存速度，测得"]
SPEED_CAPTION = "逐个词元写一段文本"
SPEED_NOTE = (
    "每个词元要读一遍全部权重和 KV 缓存；上限是 {threads} 上复制 64 MiB 的速度除以这些字节。"
    "比处理器缓存还小的模型可以更快。读取的字节按这里运行的内核计：没有打包权重的内核时，量化模型按浮点副本读取，比特少只省内存，不省时间。"
)
EMBEDDINGS_PART = "词嵌入与输出头（浮点）"
FORMULA_NOTE = "按公式：各层权重按其比特数，不含尺度；词嵌入与输出头按原样以浮点计。测得：所有张量，含尺度和归一化。"
CAUTION = "注意：{}"
WEIGHTS_FROM = "权重来自 {}。"
NOT_TOLD_APART = "此文本看不出损失："
PAIRED_NOTE = (
    "与浮点相比：相同窗口上困惑度之比，其对数 ± 对窗口的标准误差。"
    "对一个模型难的窗口对另一个也难，所以这个误差比各自困惑度的误差小得多。Δp：正确词元概率变化的均方根。指针停在数字上可看结论与百分位。"
)
MIXED_PROTOCOLS = "† 在另一文本、词元数或窗口上测得：其困惑度不能与其他行比较。勾选它并按“测量”，用同一方式测量全部。"
SEVERAL_MODELS = "多个模型的结果：KLD 和首选词元一致率只与各自的浮点模型比较，从不跨模型。"
SAME_VOCABULARY = "它们的词表大小同为 {size:,}，若分词器相同，困惑度可以比较。"
OTHER_VOCABULARY = "它们的词表不同（{sizes}）：困惑度按词元计，因此不能相互比较。"
LEARN_COMPARE_TITLE = "学习：这些数字的含义"
LEARN_COMPARE = """
**困惑度**是模型平均在多少个词元之间犹豫：越低越好。**KLD** 是量化模型的下一词元分布与原模型相差多远，单位奈特：0 表示相同。**首选词元一致率**是两者选出同一个下一词元的比例。

**± 是标准误差。** 困惑度的标准误差是对文本的窗口计算的：它说明换一段文本会使数字变化多少。在*相同*窗口上测量的两个结果共享这一偶然性，所以逐窗比较：与未量化模型之比有小得多的自身误差。

**多个模型。** 在侧栏打开另一个模型：先前的结果仍在，可以并排勾选。困惑度只在分词器相同的模型之间可比；KLD 总是与该结果自己的未量化模型比较。

**内存速度上限。** 写一个词元要把每个权重读一遍，所以字节数除以内存速度限制了每秒词元数。有内核直接读打包权重时，比特越少上限越高；表中的字节数说明是否如此。

**测得与估计。** 正体的字节数是在内存中的张量上数出来的。带 ≈ 的斜体数字来自公式。
"""

# bitnet
BITNET = "5 · BitNet"
TERNARY_RUN = "三值模型"
TERNARY_EMPTY = "还没有三值模型。在侧栏选择方法 BitNet 并按“量化”，或打开一个 BitNet 模型：这里显示它的零、权重和输入。"
TERNARY_READ = "读取模型"
TERNARY_JOB = "正在读取三值模型"
TERNARY_WAIT = "按“读取模型”：在侧栏的文本上统计零并采样输入。"
TERNARY_TOKENS = "词元数"
PROJECTION_LABELS = {"qkv": "QKV", "out": "Out", "up": "Up", "gate": "Gate", "down": "Down"}
PROJECTION_INPUTS = {"attn_in": "QKV", "o_in": "Out", "mlp_in": "Up 与 Gate", "down_in": "Down"}
INPUT_KINDS = {
    "fp": "未量化",
    "int8": "INT8，步长 最大值 / 127", "int4": "INT4，步长 均值 / √7",
    "int4x2": "INT4，步长 2 · 均值 / √7",
    "fp4": "FP4，步长 最大值 / 12",
    "topk8": "TopK，然后 INT8",
    "h-int8": "哈达玛变换，然后 INT8，步长 最大值 / 127", "h-int4": "哈达玛变换，然后 INT4，步长 均值 / √7",
}
SPARSITY_HEADERS = ["输入中的零", "QKV", "Out", "Up", "Gate", "Down", "总计", "活跃参数"]
SPARSITY_LAYER_HEADERS = ["层", "QKV", "Out", "Up", "Gate", "Down", "总计"]
SPARSITY_CAPTION = "各投影零编码的比例（BitNet a4.8 表 2）"
SPARSITY_LABEL = "按层和投影的零编码比例"
SPARSITY_TABLE = "以表格显示每层的零"
SPARSITY_PROTOCOL = "在{text}的 {tokens:,} 个词元上的零编码，窗口 256；活跃参数 = Σ 参数 · (1 − 零)"
WEIGHTS_LABEL = "各投影权重 −1、0 和 1 的比例"
INPUT_LABEL = "{} 的输入及其编码的分布"
CURVES_LABEL = "自带模型的训练损失"
ABLATION_LABELS = {"figure4": "按数字格式的训练损失", "figure5": "按 down 投影输入的训练损失"}
DOWN_INPUTS = {"": "ReLU²，INT8", "silu": "Swish，INT8", "fp4": "ReLU²，FP4", "int4x2": "ReLU²，INT4"}
CURVES_TITLE = "这类模型如何训练"
CURVES_EMPTY = "此安装不含训练好的模型，因此没有训练曲线可显示。"
LEARN_BITNET_TITLE = "学习：三值权重与稀疏输入"
LEARN_BITNET = """
**三种权重。** BitNet（[arXiv 2411.04965](https://arxiv.org/abs/2411.04965)）只用 -1、0 和 1，每个矩阵一个尺度：乘法变成加法。条形图显示每个投影的权重如何分布；大约三分之一是零。

**两类输入。** QKV、Up 和 Gate 的输入呈钟形：以*平均*大小为步长的四比特适合它们，少数更大的被截断。Out 和 Down 的输入有长尾，截断会有害：它们保留八比特，但只留较大的一半（Out），或平方 ReLU 留下的（Down）。

**零就是省下的工作。** 零编码不增加任何东西，所以不必读它的权重。*活跃参数*统计剩下的。QKV 和 Gate 的零只是舍入所致，分散各处：这里没有内核跳过它们。关闭的门会关闭 Up 的一整行。

**忠实度的含义。** *训练所得*：模型学习时的规则。*免训练：近似*：三值模型，但规则或比特与训练时不同。*模拟*：全精度模型舍入到三个值；预期是噪声。
"""

# states
STARTING = "正在启动：首次加载并观察模型。"
STOPPED = "先前的结果仍在。"
NO_RANGES = "还没有范围。在侧栏选择模型和文本，然后按“观察取值范围”。"
BUG = "我们这边出了故障；您的输入已保留。请重试，或报告编号 {}。"
LOST = "这次访问已结束：长时间没有操作，或服务器已重启。页面现在重新开始。"
FULL = "来自您的网络或全部的访问过多。请关闭本页的一个标签，或 {} 分钟后再来。"
NO_COOKIE = "此浏览器不发送 cookie，因此无法区分您的结果。请允许 cookie，或在单独的标签中打开本页。"
