"""The method "bitnet": what it keeps, what it rounds, what it says about the result, and that skipping is exact."""

from __future__ import annotations

import pytest
import torch

from core.errors import ModelError
from core.evaluation.describe import backend_use, fidelity_of, label_of, report_from_dict
from core.evaluation.memory import kv_bytes_per_token, measured_parts, working_bytes
from core.evaluation.windows import evaluation_windows
from core.models.io.bitnet import save_bitnet
from core.models.io.load import load_model
from core.models.io.quantized import already_quantized, load_quantized, read_description, save_quantized
from core.models.loaded import LoadedModel
from core.models.tiny import tiny_model, tiny_tokenizer, tiny_transformers
from core.options import same_weights
from core.quant.dynamic import MODES, ternary_absmean
from core.quant.kv_cache import FloatKVLayer, QuantizedKVLayer
from core.quant.kv_grid import RowGrid
from core.quant.linear.ternary import TernaryLinear
from core.quant.static import PLAIN
from core.recipe import BITNET_MODES, INPUT_SITE, SITES, BitNetOptions, Calibration, QuantRecipe
from core.stages import evaluate, quantize
from core.workbench import Workbench
from tests.core.tools import ARCHITECTURES, block_inputs, float_blocks, in_steps, quantised, relative, tokens

CARD = {"title": "Tiny", "description": "Random weights.", "licence": "Apache-2.0"}
IDS = tokens(2, 20, seed=3)
TEXT = "text:" + "A short text about nothing in particular, repeated. " * 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model that says it was trained for W1.58A8."""
    return trained(tmp_path_factory.mktemp("b158") / "m", "w1.58a8")


def trained(target, mode: str, **options):
    save_bitnet(target, tiny_transformers("bitnet"), tiny_tokenizer(), mode=mode, card=CARD, **options)
    return target


def apply(base: LoadedModel, **options):
    return quantised(base.adapter.model_types[0], base=base, method="bitnet", bitnet=BitNetOptions(**options))


# what is done


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float_models_are_rounded_projection_by_projection(architecture):
    made = apply(tiny_model(architecture))
    before = float_blocks(made.base)
    for block, old in zip(made.blocks, before, strict=True):
        spec = block.spec
        rows = [spec.width(s) for s in "qkv"]
        for (codes, scale), weight in zip(block.attention.qkv.projections(), old.attention.qkv.weight.split(rows), strict=True):
            expected, alpha = ternary_absmean(weight)
            assert torch.equal(codes, expected) and torch.equal(scale, alpha)
        assert len(block.mlp.up.projections()) == (2 if spec.gated else 1) and len(block.mlp.down.projections()) == 1
        assert (block.mlp.up.bias is None) == (old.mlp.up.bias is None)
        assert {INPUT_SITE[n]: x.kind for n, x in block.linears().items()} == MODES["a4.8"]
    assert "simulated" in fidelity_of(made.model)
    expected, found = made.model(IDS).logits, in_steps(made.model, IDS)
    assert float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median()) < 1e-5


@pytest.mark.parametrize("mode", [mode for mode in BITNET_MODES if same_weights(mode, "w1.58a8")])
def test_another_mode_changes_no_weight(folder, mode):
    base = load_model(str(folder))
    made = apply(base, mode=mode, keep=0.25)
    for block, old in zip(made.blocks, base.model.blocks, strict=True):
        mine, theirs = block.state_dict(), old.state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
        assert block.attention.qkv.packed is old.attention.qkv.packed, "shared, not copied"
        assert {INPUT_SITE[n]: x.kind for n, x in block.linears().items()} == MODES[mode]
        assert (old.rules.mode, old.attention.qkv.kind) == ("w1.58a8", "int8"), "the base is left alone"
    different = relative(made.model(IDS).logits, base.model(IDS).logits)
    assert different == 0 if mode == "w1.58a8" else different > 1e-3


@pytest.mark.parametrize(("trained_by", "mode"), [("w1.58a8", "v2"), ("v2", "a4.8"), ("v2-a8", "w1.58a8")])
def test_weights_behind_other_rotations_are_rounded_again(tmp_path, trained_by, mode):
    """Only those of o and down; the result is simulated, and stays so when the first mode comes back."""
    base = load_model(str(trained(tmp_path / "m", trained_by)))
    made = apply(base, mode=mode)
    for block, old in zip(made.blocks, base.model.blocks, strict=True):
        assert block.attention.qkv.packed is old.attention.qkv.packed and block.mlp.up.packed is old.mlp.up.packed
        expected = TernaryLinear.from_weights([old.mlp.down.dequantized_weight()], kind=MODES[mode]["down_in"])
        assert torch.equal(block.mlp.down.packed, expected.packed) and block.rules.trained is None
        assert {INPUT_SITE[n]: x.kind for n, x in block.linears().items()} == MODES[mode]
    back = apply(made.loaded, mode=trained_by)
    assert "expect noise" in fidelity_of(made.model) and "expect noise" in fidelity_of(back.model)


def test_native_four_bits_are_what_was_trained(tmp_path):
    v2 = load_model(str(trained(tmp_path / "m", "v2")))
    assert fidelity_of(v2.model) == "trained v2" and apply(v2, mode="v2").model.blocks[0].rules == v2.model.blocks[0].rules
    assert fidelity_of(apply(v2, mode="v2-a8").model) == "v2-a8 rules applied training-free to a v2 model: approximate"
    assert v2.model.blocks[0].mlp.down.quantize(torch.randn(3, 64)).codes.abs().max() <= 8


def test_the_claim_follows_the_training(folder, tmp_path):
    b158, a48 = load_model(str(folder)), load_model(str(trained(tmp_path / "a48", "a4.8")))

    def fidelity(base, **options):
        made = apply(base, **options)
        return fidelity_of(made.model)

    assert fidelity(a48) == "trained a4.8" and fidelity(b158, mode="w1.58a8") == "trained w1.58a8"
    assert fidelity(b158) == "a4.8 rules applied training-free to a w1.58a8 model: approximate"
    assert fidelity(apply(b158).loaded) == fidelity(b158), "twice is no more"
    assert "expect noise" in fidelity(tiny_model("llama")) and "expect noise" in fidelity(tiny_model("bitnet"))
    assert fidelity_of(tiny_model("llama").model) is None


@pytest.mark.parametrize(
    ("trained_by", "options", "expected"),
    [
        (("a4.8", 0.5), {"keep": 0.1}, "keep 0.1 instead of 0.5 applied training-free to a a4.8 model: approximate"),
        (("a4.8", 0.25), {"keep": 0.25}, "trained a4.8"),
        (("a4.8", 0.25), {}, "keep 0.5 instead of 0.25 applied training-free to a a4.8 model: approximate"),
        (("a4.8", 0.5), {"kv_bits": 3}, "KV 3 bits applied training-free to a a4.8 model: approximate"),
        (("a4.8", 0.5), {"kv_bits": 3, "q_bits": 4}, "KV 3 bits, Q 4 bits applied training-free to a a4.8 model: approximate"),
        (("a4.8", 0.5), {"bos_bits": 8}, "trained a4.8"),
        (("w1.58a8", 0.5), {"mode": "w1.58a8", "keep": 0.1}, "trained w1.58a8"),
        (("w1.58a8", 0.5), {"q_bits": 8}, "a4.8 rules, Q 8 bits applied training-free to a w1.58a8 model: approximate"),
    ],
    ids=str,
)
def test_whatever_differs_from_the_training_is_named(tmp_path, trained_by, options, expected):
    """TopK's share counts where there is TopK; bits of the cache and of queries never were part of a training."""
    mode, keep = trained_by
    base = load_model(str(trained(tmp_path / "m", mode, keep=keep)))
    assert fidelity_of(base.model) == f"trained {mode}"
    made = apply(base, **options)
    assert fidelity_of(made.model) == expected
    back = apply(made.loaded, mode=mode, keep=keep)
    assert fidelity_of(back.model) == f"trained {mode}", "what it was trained for is not forgotten"


def test_the_outcome_is_plain_numbers(folder):
    made = apply(load_model(str(folder)), kv_bits=3, q_bits=4)
    for outcome in made.outcomes:
        assert set(outcome.plan.sites) == set(SITES) and outcome.plan.orders == {}
        noise = {site: plan.sqnr_db for site, plan in outcome.plan.sites.items()}
        assert noise["down_in"] > 30 and 5 < noise["k"] < 20 and 10 < noise["q"] < 25 and noise["attn_in"] < 20
        assert {n.method for n in outcome.weights.values()} == {"ternary"}
        assert all(note.sqnr_db == float("inf") and 2 < note.effective_bits < 2.2 for note in outcome.weights.values())
    float_attention = apply(load_model(str(folder))).outcomes[0].plan.sites
    assert [float_attention[s].sqnr_db for s in "qkv"] == [None] * 3


# skipping


@pytest.mark.parametrize("mode", ("a4.8", "w1.58a8"))
def test_looking_at_the_gate_first_is_exact(folder, mode):
    """Every choice gives the same bits, for one token and for many."""
    made = apply(load_model(str(folder)), mode=mode)
    for rows, length in ((1, 1), (2, 9)):
        inputs = block_inputs(made.model, tokens(rows, length))
        for block in made.blocks:
            outputs = []
            for gate_first in ("never", "always", "auto"):
                block.mlp.gate_first = gate_first
                outputs.append(block(inputs.hidden, inputs.rotary))
            assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def before_sub_norm(block, x):
    """What the norm before down is given for tokens x."""
    seen = []
    hook = block.mlp.ffn_sub_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block.mlp(x, PLAIN)
    hook.remove()
    return seen[0]


def test_the_gate_really_skips(folder, monkeypatch):
    """With a forced gate, up multiplies fewer rows; "auto" does so for one token of a large layer with few live gates."""
    block = load_model(str(folder)).model.blocks[0]
    asked: list[int] = []
    original = TernaryLinear.product

    def product(self, x, rows=slice(None)):
        y = original(self, x, rows)
        if self is block.mlp.up:
            asked.append(y.shape[1])
        return y

    monkeypatch.setattr(TernaryLinear, "product", product)
    x = torch.randn(1, 1, 128, generator=torch.Generator().manual_seed(0))
    before_sub_norm(block, x)
    assert asked == [192], "a small layer is computed in one product"
    asked.clear()
    block.mlp.gate_first = "always"
    out = before_sub_norm(block, x)
    live = int((out != 0).sum())
    assert asked[0] == 96 and live <= asked[1] < 70
    asked.clear()
    block.mlp.gate_first = "auto"
    monkeypatch.setattr("core.models.mlp.GATE_FIRST_WEIGHTS", 1)
    assert torch.equal(before_sub_norm(block, x), out) and asked == [96, 96], "half of the gates are alive: dense is cheaper"
    asked.clear()
    monkeypatch.setattr("core.models.mlp.ROW_DENSITY", 0.9)
    assert torch.equal(before_sub_norm(block, x), out) and asked[1] < 70
    asked.clear()
    before_sub_norm(block, x.expand(1, 3, 128))
    assert asked == [192], "several tokens share no gates"


def test_zeros_survive_the_sub_norm(folder):
    block = load_model(str(folder)).model.blocks[0]
    x = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(1))
    h = before_sub_norm(block, x)
    assert 0.3 < float((h == 0).float().mean()) < 0.7
    assert torch.equal(block.mlp.ffn_sub_norm(h) == 0, h == 0)
    codes = block.mlp.down.quantize(block.mlp.ffn_sub_norm(h)).codes
    assert bool((codes.view(h.shape)[h == 0] == 0).all())


# attention


@pytest.mark.parametrize("options", [{"kv_bits": 3}, {"kv_bits": 4, "q_bits": 4}, {"kv_bits": 8}], ids=str)
def test_decoding_with_a_packed_cache_equals_prefill(folder, options):
    made = apply(load_model(str(folder)), **options)
    cache = made.model.decoder.new_cache()
    rule = RowGrid(options["kv_bits"], 4)
    assert all(isinstance(layer, QuantizedKVLayer) and layer.key_states.grid == rule for layer in cache.layers)
    expected, found = made.model(IDS).logits, in_steps(made.model, IDS, cache)
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors.median()) < 1e-5 and float(errors.max()) < 0.2, "a sum in another order may move a value to the next code"
    spec = made.blocks[0].spec
    assert kv_bytes_per_token(made.model) == 2 * 2 * spec.kv_heads * (16 * rule.bits // 8 + 2)
    stored = kv_bytes_per_token(made.model) * 2 * (IDS.shape[1] - 1)
    first = 2 * 2 * 2 * spec.kv_heads * (16 * rule.first_bits // 8 + 2)
    assert cache.nbytes == stored + first


def test_sixteen_bit_attention_has_no_packed_cache(folder):
    made = apply(load_model(str(folder)))
    assert all(isinstance(layer, FloatKVLayer) for layer in made.model.decoder.new_cache().layers)
    assert kv_bytes_per_token(made.model) == 2 * 2 * 2 * 16 * 4


# saving, measuring


@pytest.mark.parametrize("architecture", ("bitnet", "qwen2", "opt", "qwen3"))
def test_a_round_trip_is_bit_identical(tmp_path, architecture):
    made = apply(tiny_model(architecture), kv_bits=3, q_bits=4, keep=0.25)
    save_quantized(tmp_path / "q", made.loaded, {"report": {"label": made.recipe.label()}})
    again = load_quantized(tmp_path / "q")
    assert torch.equal(again.model(IDS).logits, made.model(IDS).logits)
    for old, new in zip(made.blocks, again.model.blocks, strict=True):
        assert old.rules == new.rules and old.attention.o.keep == new.attention.o.keep == 0.25
    assert label_of(again) == "BITNET · a4.8 (keeps 0.25) · KV 3 bits, first token 4 · Q 4 bits"
    assert torch.equal(load_model(str(tmp_path / "q")).model(IDS).logits, again.model(IDS).logits)


def test_bytes_are_measured(folder):
    base = load_model(str(folder))
    parts = measured_parts(base.model)
    linears = [x for b in base.model.blocks for x in b.linears().values()]
    weights = sum(x.in_features * x.out_features for x in linears)
    assert parts["packed weights"] == weights // 4
    assert parts["scales and zero points"] == 2 * 4 * (7 + 7 + 4), "7 scales, 7 + 4 row bounds per layer"
    assert parts["norms, biases and orders"] >= 2 * 4 * (128 * 3 + 96) and "decoder weights (float)" not in parts
    assert working_bytes(base.model) == 0
    base.model(IDS)
    assert working_bytes(base.model) == weights + sum(4 * x.out_features for x in linears), "and the scale of every row"
    assert {u.backend for u in backend_use(base)} == {"int8"} and sum(u.layers for u in backend_use(base)) == 8


def test_the_whole_way(folder, tmp_path):
    base = load_model(str(folder))
    recipe = QuantRecipe(str(folder), method="bitnet", calibration=Calibration(TEXT, 256, 64), bitnet=BitNetOptions(kv_bits=4))
    made, report = quantize(base, recipe)
    assert report.label == (
        "BITNET · a4.8 · KV 4 bits · a4.8 rules, KV 4 bits applied training-free to a w1.58a8 model: approximate"
    )
    assert 2 < report.effective_weight_bits < 2.2 and "ternary weights" not in report.stages and len(report.layers) == 2
    assert report_from_dict(report.to_dict()).label == report.label
    save_quantized(tmp_path / "q", made, {"recipe": recipe.to_dict(), "report": report.to_dict()})
    assert read_description(tmp_path / "q")["layers"][0]["bitnet"]["trained"] == "w1.58a8"
    again = load_model(str(tmp_path / "q"))
    parts, source = evaluation_windows(again, TEXT, tokens=64, window=64)
    scored = evaluate(again, parts, source)
    assert scored.label == report.label and scored.backend.startswith("int8 × 8")
    assert scored.kv_bytes_per_token == 2 * 2 * 2 * (8 + 2)
    native = evaluate(base, parts, source)
    assert native.label == f"{folder} · trained w1.58a8"
    for backend in ("reference", "int8"):
        assert evaluate(again, parts, source, backend=backend).nll == scored.nll


def test_what_counts_as_quantised(folder):
    native = load_model(str(folder))
    assert not already_quantized(native.model)
    assert not already_quantized(apply(native).model), "its weights are still the trained ones"
    simulated = apply(tiny_model("llama")).loaded
    assert already_quantized(simulated.model)
    with pytest.raises(ModelError, match="already quantised"):
        quantize(simulated, QuantRecipe("m", calibration=Calibration(TEXT, 256, 64)))


def test_the_workbench_serves_a_native_model(folder):
    bench = Workbench()
    key = str(folder)
    info = bench.load(key)
    assert info.architecture == "bitnet" and info.layers == 2
    ranges = bench.observe(key, Calibration(TEXT, 128, 64))
    assert len(ranges.sites) == 14
    detail = bench.channel(key, Calibration(TEXT, 128, 64), "layers.0.down_in", 3)
    assert detail.low <= detail.high
    made = bench.generate(key, "Once upon", max_new_tokens=4)
    assert made.new_tokens <= 4 and made.kv_bytes > 0
