"""Chinese for `app.view.texts_plus`."""

from __future__ import annotations

KEPT = ("PANEL",)

ON = "加入对 RPTQ 有益的部分"
INFO = "旋转方法中可与分组并用的部分。每个部分都可以关闭，以测量它的价值。"
SWITCHES_LABEL = "部分"
SWITCHES = {
    "scale": "缩放通道",
    "key_mean": "减去键的均值",
    "clip": "搜索截断的权重范围",
    "halfway": "折中目标",
}
GROUP = "每个权重尺度的列数"
CLUSTERS = "输入的分组"
ROTATE = "旋转，每个词元一个范围，代替分组"
DYNAMIC = "不旋转，每个词元一个范围，代替分组"
