"""Continue a prompt, greedily or by sampling, streamed piece by piece, with the packed cache if any."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from core.calibration.data import encode, require_embedded
from core.checks import require_int
from core.errors import Cancelled, InputError, NumericError
from core.evaluation.graph import captured_step
from core.models.decoder import CausalModel
from core.models.io.chat import render_chat
from core.models.loaded import context_of
from core.report import GenerationReport

MAX_NEW_TOKENS = 512
MAX_PROMPT_CHARACTERS = 20_000


@torch.inference_mode()
def generate(
    model: CausalModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    on_text: Callable[[str], None] | None = None,
    prefix: tuple[int, ...] = (),
    key: str = "",
) -> GenerationReport:
    """Continue `prompt` token by token.

    Args:
        temperature: 0 picks the most likely token; above it samples with `seed`, 0 to 2**31 - 1.
        chat: wrap the prompt in the tokenizer's chat template as one user message, when it has one; a template writes its own
            special tokens.
        on_text: is given each new piece of text; raising Cancelled in it stops and keeps what was generated.
        prefix: token ids put before the prompt. Without any, and without a template, the special tokens of the tokenizer's own
            rule are added, such as <s> of OPT, Llama 2 and Mistral: what calling the tokenizer gives.
        key: name of the model in the report.
    Raises: InputError for an empty or too long prompt, a chat template that refuses it, or parameters out of range; TextError
        for a prompt that the tokenizer or the model does not know; NumericError if the scores are not finite.
    """
    if not isinstance(temperature, (int, float)) or isinstance(temperature, bool) or not 0 <= temperature <= 5:
        raise InputError(f"temperature is {str(temperature)[:20]}: use 0 (greedy) to 5.", code="E-PARAM-TEMPERATURE")
    seed = require_int("seed", seed, 0, 2**31 - 1, "use 0 to 2147483647")
    max_new_tokens, room = _room(model, max_new_tokens)
    ids = _encode(model, tokenizer, prompt, chat, prefix, room)
    decoder, cache = model.decoder, model.decoder.new_cache()
    generator, stop_ids = torch.Generator().manual_seed(seed), _stop_ids(model, tokenizer)
    produced, pieces, text, stopped, decoding = list[int](), list[str](), "", "length", ""
    start = first = time.perf_counter()
    step, token, captured = ids[None], 0, None
    for _ in range(max_new_tokens):
        if len(produced) == 1:
            captured, decoding = captured_step(model, cache, max_new_tokens - 1)
        logits = captured(token) if captured else decoder.head(decoder(step, cache)[0, -1])
        token = _pick(logits.float().cpu(), temperature, generator)
        if not produced:
            first = time.perf_counter()
        if token in stop_ids:
            stopped = "eos"
            break
        produced.append(token)
        step = torch.tensor([[token]])
        now = tokenizer.decode(produced, skip_special_tokens=True)
        pieces.append("" if now.endswith("\ufffd") else now[len(text) :])  # half a character waits for its other half
        text += pieces[-1]
        if _stops(on_text, pieces[-1]):
            stopped = "cancelled"
            break
    end = time.perf_counter()
    plain = _float_bytes(model, cache.get_seq_length())
    whole = tokenizer.decode(produced, skip_special_tokens=True)
    if half := whole[len(text) :]:
        pieces[-1] += half
        if stopped != "cancelled":
            _stops(on_text, half)  # all tokens are made, so a wish to stop changes nothing
    speed = max(0, len(produced) - 1) / (end - first) if end > first else 0.0
    told = (end - start, speed, stopped, cache.nbytes, plain, decoding)
    return GenerationReport(key, whole, len(ids), len(produced), *told, pieces=tuple(pieces))


def _stops(on_text: Callable[[str], None] | None, piece: str) -> bool:
    """Give a piece of text to `on_text`; return whether it asks to stop."""
    try:
        if on_text is not None and piece:
            on_text(piece)
    except Cancelled:
        return True
    return False


def _float_bytes(model: CausalModel, length: int) -> int:
    """Compute the bytes of keys and values of `length` positions in the model's float type."""
    spec = model.blocks[0].spec
    return 2 * len(model.blocks) * length * spec.kv_heads * spec.head_dim * model.dtype.itemsize


def _room(model: CausalModel, max_new_tokens: int) -> tuple[int, int]:
    """Return (new tokens, checked; tokens that are left for the prompt)."""
    new = require_int("new tokens", max_new_tokens, 1, MAX_NEW_TOKENS, f"use 1 to {MAX_NEW_TOKENS}")
    context = context_of(model) or 2048
    if new >= context:
        raise InputError(
            f"{new} new tokens do not fit this model's context of {context}: ask for fewer.", code="E-PARAM-NEW-TOKENS"
        )
    return new, context - new


def _encode(
    model: CausalModel, tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool, prefix: tuple[int, ...], limit: int
) -> Tensor:
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError("The prompt is empty: write a few words to continue.", code="E-PARAM-PROMPT")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise InputError(f"The prompt has {len(prompt)} characters: use at most {MAX_PROMPT_CHARACTERS}.", code="E-PARAM-PROMPT")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InputError("The prompt is not valid Unicode: remove broken characters.", code="E-PARAM-PROMPT") from error
    templated = chat and bool(getattr(tokenizer, "chat_template", None))
    if templated:
        prompt = render_chat(tokenizer, prompt)
    ids = encode(prompt, tokenizer, special=not templated and not prefix)
    ids = torch.cat([torch.tensor(prefix, dtype=torch.int64), ids])
    if not 1 <= len(ids) <= limit:
        rule = "write a few words to continue" if len(ids) == 0 else "shorten the prompt, or ask for fewer new tokens"
        raise InputError(
            f"The prompt has {len(ids)} tokens; beside the new ones this model takes 1 to {limit}: {rule}.", code="E-PARAM-PROMPT"
        )
    require_embedded(ids, model, tokenizer)
    return ids


def _pick(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if not bool(torch.isfinite(logits).all()):
        raise NumericError("The model's next-token scores are not finite: use more bits or more clusters.", code="E-NUM-NAN")
    if temperature == 0:
        return int(logits.argmax())
    scaled = (logits - logits.max()) / max(temperature, torch.finfo(torch.float32).tiny)  # at most 0: nothing overflows
    return int(torch.multinomial(torch.softmax(scaled, -1), 1, generator=generator))


def _stop_ids(model: CausalModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    eos = getattr(model.generation_config, "eos_token_id", None)
    ids = eos if isinstance(eos, list) else [eos]
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}

