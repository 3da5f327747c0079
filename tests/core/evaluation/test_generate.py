"""Generation: the pieces are the text, stopping keeps it, a seed repeats it, and the cache is the one that is billed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tokenizers import processors

from core.calibration.data import calibration_tokens
from core.errors import Cancelled, InputError, NumericError, TextError
from core.evaluation.generate import MAX_NEW_TOKENS, generate
from core.evaluation.windows import evaluation_windows
from core.models.tiny import tiny_model, tiny_tokenizer
from core.recipe import Calibration
from core.report import GenerationReport
from kernels import packed_width
from tests.core.tools import ARCHITECTURES, Quantised, quantised, spec_of, tiny

PROMPT = "The quick brown fox"


def run(loaded, prompt: str = PROMPT, **options) -> tuple[GenerationReport, list[str]]:
    pieces: list[str] = []
    return generate(loaded.model, loaded.tokenizer, prompt, on_text=pieces.append, **options), pieces


def greedy(loaded, count: int) -> list[int]:
    """Without a cache, the whole prefix every time."""
    ids = loaded.tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False).input_ids
    made: list[int] = []
    for _ in range(count):
        made.append(int(loaded.model(ids).logits[0, -1].argmax()))
        ids = torch.cat([ids, torch.tensor([[made[-1]]])], dim=1)
    return made


def only(loaded, allowed: str):
    """Bias the model's head to the bytes of some letters, so that the text is readable."""
    base = loaded.model
    ids = loaded.tokenizer(allowed, add_special_tokens=False).input_ids
    mask = torch.full((259,), -1e4)
    mask[ids] = 0
    base.decoder.head.register_forward_hook(lambda module, args, out: out + mask)
    return loaded


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_is_the_most_likely_token_each_time(architecture):
    loaded = tiny(architecture)
    expected = greedy(loaded, 20)
    stop = next((i for i, t in enumerate(expected) if t == 257), None)
    found, _ = run(loaded, max_new_tokens=20)
    assert found.new_tokens == (20 if stop is None else stop) and found.stopped == ("length" if stop is None else "eos")
    assert found.text == loaded.tokenizer.decode(expected[: found.new_tokens], skip_special_tokens=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", (0.0, 1.5))
@pytest.mark.parametrize("seed", range(2))
def test_pieces_are_the_text(architecture, temperature, seed):
    """Random bytes are rarely whole letters: what cannot be shown yet must come later, at the end at the latest."""
    found, pieces = run(tiny(architecture), max_new_tokens=30, temperature=temperature, seed=seed)
    assert "".join(pieces) == found.text and all(pieces)


def test_letters_of_several_bytes_are_shown_whole():
    loaded = only(tiny_model("llama", seed=3), "é€😀")
    found, pieces = run(loaded, max_new_tokens=60, temperature=2.0, seed=1)
    assert "".join(pieces) == found.text
    assert "".join(found.pieces) == found.text and len(found.pieces) == found.new_tokens
    held = [p for p in pieces[:-1] if p.endswith("\ufffd")]
    assert not held, "half a letter is never shown, but for the end of the text"


@pytest.mark.parametrize("after", (1, 3, 10))
@pytest.mark.parametrize("quantise", (False, True), ids=("float", "quantised"))
def test_cancelling_keeps_the_text(after, quantise):
    loaded = only(quantised("llama", scheme="W4A4KV").loaded if quantise else tiny_model("llama"), "abcdefghij klmn")
    full, pieces = run(loaded, max_new_tokens=20)
    seen: list[str] = []

    def stop(piece: str) -> None:
        seen.append(piece)
        if len(seen) == after:
            raise Cancelled

    found = generate(loaded.model, loaded.tokenizer, PROMPT, max_new_tokens=20, on_text=stop)
    assert found.stopped == "cancelled" and found.text == "".join(seen) == "".join(pieces[:after])
    assert found.new_tokens == after and full.text.startswith(found.text) and found.kv_bytes > 0


def test_seeds_and_temperatures():
    loaded = tiny("llama")
    texts = {(t, s): run(loaded, temperature=t, seed=s, max_new_tokens=16)[0].text for t in (0.0, 1.0, 4.0) for s in (0, 1)}
    assert texts == {(t, s): run(loaded, temperature=t, seed=s, max_new_tokens=16)[0].text for t, s in texts}
    assert texts[0.0, 0] == texts[0.0, 1], "greedy ignores the seed"
    assert texts[1.0, 0] != texts[1.0, 1] != texts[4.0, 1] != texts[4.0, 0]
    assert run(loaded, temperature=1e-6, seed=5, max_new_tokens=16)[0].text == texts[0.0, 0]


def test_sampling_follows_the_softmax():
    """1000 first tokens at temperature 2 against their probabilities."""
    from core.evaluation.generate import _pick

    logits = torch.tensor([2.0, 1.0, 0.0, -30.0])
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([_pick(logits, 2.0, generator) for _ in range(4000)]), minlength=4) / 4000
    assert torch.allclose(counts, torch.softmax(logits / 2, 0), atol=0.03)


def test_the_smallest_temperature_is_greedy():
    """Scores divided by it would overflow."""
    expected = run(tiny("llama"), max_new_tokens=16)[0].text
    assert {run(tiny("llama"), max_new_tokens=16, temperature=t, seed=3)[0].text for t in (1e-40, 5e-324)} == {expected}


def test_the_global_generator_is_left_alone():
    torch.manual_seed(9)
    before = torch.get_rng_state()
    run(tiny("llama"), temperature=1.0, max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("architecture", ("llama", "opt"))
def test_cache_bytes_are_measured(architecture):
    q: Quantised = quantised(architecture, scheme="W4A4KV")
    loaded, spec = only(q.loaded, "abcdefgh"), spec_of(q.base)
    found, _ = run(loaded, max_new_tokens=9)
    stored = found.prompt_tokens + found.new_tokens - 1  # the last token was never fed back
    per_token = 2 * 2 * spec.kv_heads * packed_width(spec.head_dim, 4)
    assert found.kv_bytes == stored * per_token + 2 * 2 * spec.kv_heads * spec.head_dim * 4  # one float sink
    assert found.kv_bytes_float == stored * 2 * 2 * spec.kv_heads * spec.head_dim * 4
    plain, _ = run(tiny(architecture), max_new_tokens=9)
    assert plain.kv_bytes == plain.kv_bytes_float


def test_end_tokens_stop_and_are_not_shown():
    loaded = only(tiny_model("llama"), "a")
    loaded.model.generation_config.eos_token_id = [257, loaded.tokenizer("a").input_ids[0]]
    found, pieces = run(loaded)
    assert (found.stopped, found.text, found.new_tokens, pieces) == ("eos", "", 0, [])
    assert found.tokens_per_second == 0


def test_prefix_tokens_come_first():
    loaded = tiny("llama")
    plain, _ = run(loaded, max_new_tokens=8)
    found, _ = run(loaded, max_new_tokens=8, prefix=(256, 70))
    assert found.prompt_tokens == plain.prompt_tokens + 2 and found.text != plain.text


def test_a_chat_template_wraps_the_prompt():
    loaded = tiny_model("llama")
    loaded.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
    )
    with_chat, _ = run(loaded, "hi", chat=True, max_new_tokens=2)
    without, _ = run(loaded, "hi", max_new_tokens=2)
    assert with_chat.prompt_tokens == len("[user]hi[a]") and without.prompt_tokens == 2
    assert run(tiny("llama"), "hi", chat=True, max_new_tokens=2)[0].prompt_tokens == 2, "no template, no wrapping"


def test_a_template_that_refuses_is_one_sentence():
    loaded = tiny_model("llama")
    loaded.tokenizer.chat_template = "{{ raise_exception('Conversation roles must alternate') }}"
    with pytest.raises(InputError, match="without the template") as caught:
        run(loaded, chat=True)
    assert caught.value.code == "E-PARAM-CHAT"


def test_the_tokenizers_own_rule_starts_a_prompt():
    """Tokenizers such as OPT's and Llama 2's put <s> first; prefix ids or a template take the place of that rule."""
    loaded = tiny_model("llama")
    loaded.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    seen: list[list[int]] = []
    loaded.model.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0][0].tolist()))
    body = loaded.tokenizer(PROMPT, add_special_tokens=False).input_ids
    run(loaded, max_new_tokens=1)
    run(loaded, max_new_tokens=1, prefix=(257, 70))
    assert seen == [loaded.tokenizer(PROMPT).input_ids, [257, 70, *body]] and seen[0] == [256, *body]
    loaded.tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    run(loaded, chat=True, max_new_tokens=1)
    assert seen[2] == [256, *body], "the template has written it: not twice"


@pytest.mark.parametrize("call", ("generate", "evaluate", "calibrate"))
def test_a_token_that_the_model_does_not_embed_is_named(call):
    """Added tokens may lie beyond the table: 259 rows, "[PAD]" is number 259."""
    loaded = replace(tiny("llama"), tokenizer=tiny_tokenizer())
    loaded.tokenizer.add_tokens(["[PAD]"])
    text = "text:" + "hello [PAD] there " * 100
    with pytest.raises(TextError, match=r"'\[PAD\]', number 259; .* 259 tokens: remove it") as caught:
        if call == "generate":
            run(loaded, "hello [PAD] x", max_new_tokens=2)
        elif call == "evaluate":
            evaluation_windows(loaded, text, tokens=256, window=64)
        else:
            calibration_tokens(loaded, Calibration(text, 256, 64), 0, True)
    assert caught.value.code == "E-TEXT-TOKEN"
    assert run(loaded, "hello x", max_new_tokens=2)[0].prompt_tokens == 7


def test_a_prompt_that_breaks_the_tokenizer_is_one_sentence():
    loaded = replace(tiny("llama"), tokenizer=tiny_tokenizer())
    loaded.tokenizer._encode_plus = None  # as a hostile file makes it fail: with anything
    with pytest.raises(TextError, match="tokenizer cannot read this text"):
        run(loaded)


@pytest.mark.parametrize(
    "options, code",
    [
        ({"prompt": ""}, "E-PARAM-PROMPT"),
        ({"prompt": "  \n"}, "E-PARAM-PROMPT"),
        ({"prompt": None}, "E-PARAM-PROMPT"),
        ({"prompt": 3}, "E-PARAM-PROMPT"),
        ({"prompt": "x" * 20_001}, "E-PARAM-PROMPT"),
        ({"prompt": "x" * 1100}, "E-PARAM-PROMPT"),
        ({"prompt": "\ud800"}, "E-PARAM-PROMPT"),
        ({"max_new_tokens": 0}, "E-PARAM-NEW-TOKENS"),
        ({"max_new_tokens": MAX_NEW_TOKENS + 1}, "E-PARAM-NEW-TOKENS"),
        ({"max_new_tokens": True}, "E-PARAM-NEW-TOKENS"),
        ({"max_new_tokens": "5"}, "E-PARAM-NEW-TOKENS"),
        ({"temperature": -0.1}, "E-PARAM-TEMPERATURE"),
        ({"temperature": math.nan}, "E-PARAM-TEMPERATURE"),
        ({"temperature": math.inf}, "E-PARAM-TEMPERATURE"),
        ({"temperature": "hot"}, "E-PARAM-TEMPERATURE"),
        ({"temperature": True}, "E-PARAM-TEMPERATURE"),
        ({"temperature": 5.1}, "E-PARAM-TEMPERATURE"),
        ({"seed": 2**70}, "E-PARAM-SEED"),
        ({"seed": -1}, "E-PARAM-SEED"),
        ({"seed": "x"}, "E-PARAM-SEED"),
    ],
    ids=lambda v: str(v)[:30] if isinstance(v, dict) else v,
)
def test_bad_input_is_one_sentence(options, code):
    with pytest.raises(InputError) as caught:
        run(tiny("llama"), **options)
    assert caught.value.code == code and 20 < len(str(caught.value)) <= 240 and "\n" not in str(caught.value)


def test_whole_numbers_from_a_page_are_taken():
    """A slider sends 8.0."""
    assert run(tiny("llama"), max_new_tokens=8.0)[0].new_tokens <= 8


def test_scores_that_are_not_finite_are_an_error():
    loaded = tiny_model("llama")
    loaded.model.decoder.head.weight.data[3] = math.nan
    with pytest.raises(NumericError):
        run(loaded)


def test_more_new_tokens_than_the_context_are_refused():
    with pytest.raises(InputError, match="context of 32") as caught:
        run(tiny_model("llama", max_position_embeddings=32), "hi", max_new_tokens=40)
    assert caught.value.code == "E-PARAM-NEW-TOKENS"


@pytest.mark.parametrize(("count", "speed"), [(5, 1.0), (2, 0.25), (1, 0.0)])
def test_decoding_speed_leaves_the_prompt_and_its_token_out(count, speed, monkeypatch):
    """Ten seconds for the prompt, which yields the first token, and four for the others."""
    clock = iter([100.0, 110.0, 114.0])
    monkeypatch.setattr("core.evaluation.generate.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("core.evaluation.generate._stop_ids", lambda model, tokenizer: set())
    found, _ = run(tiny("llama"), max_new_tokens=count)
    assert (found.new_tokens, found.seconds, found.tokens_per_second) == (count, 14.0, speed)
