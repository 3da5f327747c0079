"""Pair the English texts of the page with the Chinese ones, for the script that translates it.

A placeholder is written by its name, or by its number where it has none: "{size:,}" as "{size}", "{}" as "{0}".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from app.view import (
    texts,
    texts_baselines,
    texts_bases,
    texts_distill,
    texts_divergence,
    texts_groups,
    texts_guide,
    texts_layers,
    texts_memory,
    texts_plus,
    texts_report,
    texts_rotation,
)
from app.view.zh import inline
from app.view.zh import texts as zh_texts
from app.view.zh import texts_baselines as zh_baselines
from app.view.zh import texts_bases as zh_bases
from app.view.zh import texts_distill as zh_distill
from app.view.zh import texts_divergence as zh_divergence
from app.view.zh import texts_groups as zh_groups
from app.view.zh import texts_guide as zh_guide
from app.view.zh import texts_layers as zh_layers
from app.view.zh import texts_memory as zh_memory
from app.view.zh import texts_plus as zh_plus
from app.view.zh import texts_report as zh_report
from app.view.zh import texts_rotation as zh_rotation

MODULES = (
    (texts, zh_texts),
    (texts_baselines, zh_baselines),
    (texts_bases, zh_bases),
    (texts_distill, zh_distill),
    (texts_divergence, zh_divergence),
    (texts_groups, zh_groups),
    (texts_guide, zh_guide),
    (texts_layers, zh_layers),
    (texts_memory, zh_memory),
    (texts_plus, zh_plus),
    (texts_report, zh_report),
    (texts_rotation, zh_rotation),
)
PLACE = re.compile(r"\{([\w\[\]]*)([#@]?)(?::[^}]*)?\}")
_LINK = re.compile(r"\[([^\]]+)\]\(([^)]+)\)")
_MARKUP = re.compile(r"\*\*|<b>|\n\n|\]\(")


def script() -> str:
    """Return the script that translates the page, with all texts."""
    words = json.dumps({"phrases": phrases(), "paragraphs": paragraphs()}, ensure_ascii=False)
    return (Path(__file__).parent / "language.js").read_text(encoding="utf-8").replace("__WORDS__", words)


def phrases() -> dict[str, str]:
    """Return the Chinese of every English text without markup; a key's "{0#}" stands for numbers only, "{0@}" for words only.

    Parts that " · " separates are phrases of their own too, as the page joins and cuts lines there.
    """
    found: dict[str, str] = {}
    for english, chinese in (*_pairs(), *inline.INLINE.items()):
        if _MARKUP.search(english):
            continue
        english, chinese = numbered(english), numbered(chinese)
        found[english] = chinese
        parts = english.split(" · "), chinese.split(" · ")
        if len(parts[0]) == len(parts[1]) > 1:
            found |= {a.strip(): b.strip() for a, b in zip(*parts, strict=True) if a.strip()}
    return found


def paragraphs() -> dict[str, str]:
    """Return the Chinese of every paragraph with markup as HTML, by the plain text of the English one."""
    found = {}
    for english, chinese in _pairs():
        if _MARKUP.search(english):
            found |= dict(zip(map(_plain, _split(english)), map(_html, _split(chinese)), strict=True))
    return found


def numbered(text: str) -> str:
    """Write placeholders by their names, and those without one by their numbers."""
    numbers = count()

    def name(place: re.Match[str]) -> str:
        return f"{{{re.sub('[^a-z0-9_]', '', place[1], flags=re.I) or next(numbers)}{place[2]}}}"

    return PLACE.sub(name, text)


def shared(english: object) -> dict[str, object]:
    """Return the texts of a module by their names: constants that hold texts."""
    kinds = (str, dict, tuple, list)
    return {name: value for name, value in vars(english).items() if name.isupper() and isinstance(value, kinds)}


def _pairs() -> Iterator[tuple[str, str]]:
    for english, chinese in MODULES:
        for name, value in shared(english).items():
            if name not in chinese.KEPT:
                yield from _texts(value, getattr(chinese, name))


def _texts(english: object, chinese: object) -> Iterator[tuple[str, str]]:
    """Yield the texts of two values of the same shape."""
    if isinstance(english, str):
        yield english, chinese
    elif isinstance(english, dict):
        for key, value in english.items():
            yield from _texts(value, chinese[key])
    elif isinstance(english, (list, tuple)):
        for a, b in zip(english, chinese, strict=True):
            yield from _texts(a, b)


def _split(text: str) -> list[str]:
    return text.strip().split("\n\n")


def _plain(text: str) -> str:
    """Remove Markdown and tags, and join lines, as a browser shows the text."""
    return " ".join(re.sub(r"\*+|<[^>]+>", "", _LINK.sub(r"\1", text)).split())


def _html(text: str) -> str:
    """Write a paragraph of Markdown as HTML; Chinese lines are joined without a blank."""
    text = _LINK.sub(r'<a href="\2" target="_blank" rel="noopener noreferrer">\1</a>', text.replace("\n", ""))
    return re.sub(r"\*([^*]+)\*", r"<em>\1</em>", re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text))
