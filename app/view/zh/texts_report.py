"""Chinese for `app.view.texts_report`."""

from __future__ import annotations

KEPT = ("TITLE", "MODELS", "FALLBACKS")
"""Names whose texts stand in the file, which is English."""

SAVE = "报告（HTML）"
OWN_TEXT = "把我粘贴的文本放进 HTML 报告"
EMPTY = "没有可报告的结果：请先打开模型或量化一个。"
