"""Chinese for `app.view.texts_baselines`."""

from __future__ import annotations

KEPT = ("NONE_OPEN",)

PANEL = "其他库的基线"
CHOICE = "加入比较"
INFO = "每个基线都由该库自己从打开的模型制作。测量后与您的运行并列：同样的文本，同样的字节算法。"
MISSING = "此处未安装：{names}。运行 {command} 即可加入。"
