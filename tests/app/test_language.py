"""The Chinese texts: one for every English text, of its shape and with its placeholders, and none without an English one."""

from __future__ import annotations

import ast
import importlib
import re
from collections import Counter
from pathlib import Path

import pytest

from app.view import language
from app.view.zh import inline

VIEW = Path(language.__file__).parent
WORD = r"[A-Za-z]+"
NAMES = sorted(path.stem for path in VIEW.glob("texts*.py"))


def shape(value):
    """A value with its texts replaced by their placeholders and joints."""
    if isinstance(value, str):
        names = Counter(place[0] for place in language.PLACE.finditer(language.numbered(value)))
        return names, value.count("\n\n"), value.count(" · ")
    if isinstance(value, dict):
        return {key: shape(entry) for key, entry in value.items()}
    return [shape(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def texts_of(value):
    if isinstance(value, str):
        return [value]
    return [text for entry in (value.values() if isinstance(value, dict) else value) for text in texts_of(entry)]


def test_every_module_of_texts_has_a_chinese_one():
    assert [english.__name__.rpartition(".")[2] for english, _ in language.MODULES] == NAMES
    assert all(chinese.__name__ == f"app.view.zh.{name}" for name, (_, chinese) in zip(NAMES, language.MODULES, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_every_text_has_a_chinese_one_of_its_shape(name):
    english = language.shared(importlib.import_module(f"app.view.{name}"))
    chinese = importlib.import_module(f"app.view.zh.{name}")
    own = set(language.shared(chinese)) - {"KEPT"}
    assert set(english) - own == set(chinese.KEPT) and own <= set(english)
    for key in own:
        assert shape(getattr(chinese, key)) == shape(english[key]), key
        words = [text for text in texts_of(english[key]) if re.search(r"[a-z]{3} [a-z]{2}", text)]
        assert not words or any("\u4e00" <= letter <= "\u9fff" for letter in "".join(texts_of(getattr(chinese, key)))), key


def test_words_beside_numbers_are_words_of_the_code():
    """Each word of a key stands in a text of the code; the translation repeats every placeholder."""
    said = set(re.findall(WORD, (VIEW / "chart.js").read_text()))
    for path in (*VIEW.parent.rglob("*.py"), *(VIEW.parents[1] / "core").rglob("*.py")):
        texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        said |= {word for text in texts if isinstance(text, str) and "zh" not in path.parts for word in re.findall(WORD, text)}
    words = {word for key in inline.INLINE for word in re.findall(WORD, key)}
    assert words - said <= {"heads", "jobs", "threads", "flips", "layers", "channels"}, "a count has its plural made"
    for key, chinese in inline.INLINE.items():
        numbers = set(re.findall(r"\{(\d+)[#@]?\}", language.numbered(key)))
        assert set(re.findall(r"\{(\d+)\}", language.numbered(chinese))) == numbers, key


def test_placeholders_are_named_or_numbered():
    assert language.numbered("{} of {size[0]:,}, {#} and {@}") == "{0} of {size0}, {1#} and {2@}"


def test_markup_becomes_paragraphs_by_their_plain_text():
    found = language.paragraphs()
    key = next(text for text in found if text.startswith("The idea of RPTQ (arXiv 2304.01089). Channels with"))
    assert "\n" not in key and "*" not in key
    assert found[key].startswith('<strong>RPTQ 的思路</strong>（<a href="https://arxiv.org/abs/2304.01089"')
    assert not any("**" in html or "](" in html for html in found.values())
    assert not any(language._MARKUP.search(text) for text in language.phrases())


def test_the_script_holds_all_texts_and_no_placeholder_of_its_own():
    script = language.script()
    assert "__WORDS__" not in script and "取值范围" in script and '"Observe ranges"' in script
