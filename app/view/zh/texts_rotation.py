"""Chinese for `app.view.texts_rotation`."""

from __future__ import annotations

KEPT = ()

PANEL = "缩放与旋转"
INFO = "每个部分都可以关闭，以测量它的价值。"
SWITCHES = {
    "scale": "缩放通道",
    "rotate": "旋转通道",
    "key_mean": "减去键的均值",
    "dynamic": "每个词元一个范围",
    "clip": "搜索截断的范围",
    "halfway": "折中目标",
}
BLOCK = "一起旋转的通道数"
GROUP = "每个权重尺度的列数"
KV = "键和值的范围"
KV_RANGES = {"static": "每通道，事先已知", "token": "每词元，随其保存"}
ALL_CHANNELS = "全部"
