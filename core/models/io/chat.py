"""Render a model's chat template within limits: a template is a program that came with the model.

Transformers runs templates in Jinja's sandbox, which denies files and attributes but does not limit time. Here every executed
line of the template counts as a step, and steps and memory are limited. A multiplication or a power can take any time and memory
within one step, so a template that has one is refused before it runs.
"""

from __future__ import annotations

import resource
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from jinja2 import Environment, TemplateError
from transformers import PreTrainedTokenizerBase

from core.errors import InputError
from core.models.io.foreign import tokenizer_errors

MAX_STEPS = 200_000
"""Lines of a template that may run for one prompt; published templates run a few hundred."""
MAX_BYTES = 2**30
"""Memory that the process may gain while a template runs."""
_CODE_NAME = "<template>"
_REMEDY = "continue the prompt without the template"


class _Exceeded(Exception):
    """Raised when a template exceeds its limits."""


def render_chat(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Render the prompt as one user message in the tokenizer's chat format, ready for the answer.

    Raises: InputError E-PARAM-CHAT naming the template's file when it runs too long, needs too much memory, or fails.
    """
    file = _file(tokenizer)
    if _multiplies(tokenizer.chat_template):
        raise InputError(f"The chat template in {file} multiplies, which can take any time: {_REMEDY}.", code="E-PARAM-CHAT")
    before = sys.gettrace()
    try:
        sentence = f"The chat template in {file} refuses this prompt: {_REMEDY}."
        with tokenizer_errors(sentence, code="E-PARAM-CHAT", kind=InputError):
            sys.settrace(_tracer())
            try:
                return tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
            except (_Exceeded, MemoryError):
                raise InputError(f"The chat template in {file} takes more than {MAX_STEPS:,} steps or {MAX_BYTES / 1e9:.0f} GB: "
                                 f"{_REMEDY}.", code="E-PARAM-CHAT") from None
    finally:
        sys.settrace(before)


def _tracer() -> Any:
    """Make a trace function that counts template lines run in this thread and raises _Exceeded beyond the limits."""
    steps, start, thread = 0, _peak(), threading.get_ident()

    def line(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal steps
        steps += 1
        if steps > MAX_STEPS or _peak() - start > MAX_BYTES:
            raise _Exceeded
        return line

    def call(frame: FrameType, event: str, argument: object) -> Any:
        return line if frame.f_code.co_filename == _CODE_NAME and threading.get_ident() == thread else None

    return call


def _peak() -> int:
    """Return the largest memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _multiplies(template: object) -> bool:
    """Say whether a template has the operators * or **; one that cannot be tokenised is left to the renderer's own error."""
    try:
        return any(kind == "operator" and value in ("*", "**") for _, kind, value in Environment().lex(str(template)))
    except TemplateError:
        return False


def _file(tokenizer: PreTrainedTokenizerBase) -> str:
    """Name the file that a template comes from: transformers prefers the first where both are there."""
    folder = Path(str(getattr(tokenizer, "name_or_path", "") or "."))
    return "chat_template.jinja" if (folder / "chat_template.jinja").is_file() else "tokenizer_config.json"
