"""Chinese for `app.view.texts_distill`."""

from __future__ import annotations

KEPT = ()

PANEL = "蒸馏"
ON = "训练量化模型，使其接近原模型"
INFO = "需要几分钟。停止时保留目前最好的结果；以相同设置再次量化会从那里继续。"
NUMBERS = {"steps": "步数", "tokens": "每步词元数", "lr": "步长"}
TEXTS_LABEL = "训练用的文本"
TEXTS_INFO = "用未参与训练的部分来评判。旁边还会测量另一类文本。"
TEXTS = {"calibration": "校准文本", "sotu": "国情咨文", "wikitext2": "WikiText-2"}
TABLE = ("困惑度（文本）", "原模型", "之前", "之后", "之前的散度", "之后")
CAPTION = "蒸馏改变了什么"
HELD_OUT = "{names}，未参与训练的部分"
