"""Chinese for `app.view.texts_memory`."""

from __future__ import annotations

KEPT = ("UNITS", "GPU")

MEMORY = "推算任意规模的内存"
MEMORY_INFO = (
    "按公式计算，不加载任何东西：这些是估计值。选择一个规模，或输入 Hub 上的模型 owner/name（只取其 config.json）、一个文件夹，"
    "或数字如 layers=32,hidden=4096,heads=32。"
)
SIZE = "模型或规模"
SCHEME = "方案"
BATCH = "批大小"
SEQUENCE = "序列"
UNIT = "单位"
THIS_MODEL = "此模型"
NO_MODEL = "还没有加载模型：请等待，或选择一个规模。"
BARS_LABEL = "各方案的推算内存"
BARS_CAPTION = "按公式的内存，非测得"
MAP_LABEL = "推算内存随批大小和序列长度变化的热图"
MAP_CAPTION = "{scheme}：内存随批大小和序列长度的变化，{unit}；方框是所选之处"
GRID = "以表格显示各方案在常见之处"
GRID_CAPTION = "总计 {unit}，按公式；列：批大小 × 序列长度"
FITS = "放得下的地方"
FIT_HEADERS = ["GPU", "内存", "单卡", "单卡最大批"]
FITS_CAPTION = "{scheme}，批 {batch}，{sequence:,} 个词元：{total}，对单卡内存，其 GB 按 10⁹ 字节计"
FITS_YES = "放得下，占 {share}"
FITS_NO = "需要 {cards} 张卡"
ROOF = "什么限制速度：屋顶线"
ROOF_LABEL = "屋顶线：算子的算术强度与可达速率"
ROOF_CAPTION = "{scheme} 在一张 {gpu} 上：解码 ○ 与预填充 ◇；屋顶拐点左侧受内存限制，右侧受算术限制"
ROOF_HEADERS = ["算子", "FLOPs", "字节", "FLOPs / 字节", "最短时间", "受限于"]
PHASES = {"decode": "解码：一个新词元", "prefill": "预填充：整个提示词"}
ROOF_ALL = "全部"
DECODE_SPEED = "至少 {seconds}，因此总共每秒最多 {rate} 个词元"
PREFILL_SPEED = "至少 {seconds}，因此每秒最多 {rate} 个词元"
ROOF_NOTE = (
    "按公式，用制造商的非稀疏峰值速率（{source}）：真实内核只达到其中一部分。注意力按融合计，计入全部得分；"
    "不计归一化、激活函数、尺度和启动。"
)
CLAIM = (
    "RPTQ 的“{said}”（{model}，批 {batch}，{sequence:,} 个词元，{before} → {after}）：权重与缓存从 {old} 降到 {new}，"
    "减少 {saved}（{saved_gib}），{share} %；加上一层的激活，减少 {whole}（{whole_gib}），{whole_share} %。"
)
