"""Chat templates: rendered as transformers renders them, and stopped when they run for ever or eat the memory."""

from __future__ import annotations

import json
import sys

import pytest

from core.errors import InputError
from core.models.io import chat
from core.models.io.chat import render_chat
from core.models.io.load import load_model
from core.models.tiny import save_tiny, tiny_tokenizer

PLAIN = ("{%- for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"
         "{% if add_generation_prompt %}[assistant]{% endif %}")


def tokenizer_with(template: str):
    made = tiny_tokenizer()
    made.chat_template = template
    return made


@pytest.mark.parametrize("template", [
    PLAIN, "{% macro say(m) %}<{{ m.content }}>{% endmacro %}{{ say(messages[-1]) }}",
    "{% set ns = namespace(n=0) %}{% for i in range(50) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
    "{{ messages | tojson }}"])
def test_a_template_gives_what_transformers_gives(template):
    tokenizer, before = tokenizer_with(template), sys.gettrace()
    message = [{"role": "user", "content": " hi "}]
    expected = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert render_chat(tokenizer, " hi ") == expected
    assert sys.gettrace() is before


ENDLESS = {
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}x",
    "loops over the prompt": "{% for a in messages[0].content %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro f(n) %}{% for i in range(9) %}{{ f(n) }}{% endfor %}{% endmacro %}{{ f(1) }}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a wide text": "{{ 'x' | center(100000000000000000) }}",
    "power": "{{ 9 ** 9 ** 9 ** 9 }}",
    "a product of texts": "{{ 'x' * 100000000000 }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("case", ENDLESS)
def test_an_endless_template_is_one_sentence(case, monkeypatch):
    """Without its limits it would run into the suite's own limit of minutes."""
    monkeypatch.setattr(chat, "MAX_BYTES", 2**27)
    before = sys.gettrace()
    with pytest.raises(InputError, match="without the template") as caught:
        render_chat(tokenizer_with(ENDLESS[case]), "hello")
    assert sys.gettrace() is before
    assert caught.value.code == "E-PARAM-CHAT" and "tokenizer_config.json" in str(caught.value)


def test_the_file_of_the_template_is_named(tmp_path):
    folder = save_tiny(tmp_path / "m", "llama", seed=3)
    (folder / "chat_template.jinja").write_text(ENDLESS["loops"])
    with pytest.raises(InputError, match="chat_template.jinja takes more than 200,000 steps"):
        render_chat(load_model(str(folder)).tokenizer, "hello")
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ raise_exception('no') }}"}))
    with pytest.raises(InputError, match="tokenizer_config.json refuses"):
        render_chat(load_model(str(folder)).tokenizer, "hello")
