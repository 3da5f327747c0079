"""Sparsity: the published accounting, and counts against a recomputation by hooks."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from core.errors import InputError, ModelError
from core.evaluation.sparsity import BINS, account, input_histogram, measure_sparsity, weight_histogram
from core.models.io.bitnet import save_bitnet
from core.models.io.load import load_model
from core.models.loaded import LoadedModel
from core.models.tiny import tiny_model, tiny_tokenizer, tiny_transformers
from core.quant.dynamic import quantize_input
from core.recipe import BitNetOptions
from core.workbench import Workbench
from tests.core.tools import block_inputs, quantised, tokens, watched

WINDOWS = tokens(3, 24, seed=2)
TABLE = [  # hidden, ffn, layers; QKV, Out, Up, Gate, Down; overall; active of a4.8, in billions
    (1536, 4096, 24, (12.1, 50.0, 66.2, 12.1, 80.9), 42.57, 0.390),
    (2048, 5460, 24, (12.0, 50.0, 65.9, 12.1, 81.8), 42.68, 0.69),
    (3200, 8640, 26, (12.1, 50.0, 70.7, 12.1, 85.6), 44.71, 1.78),
    (4096, 11008, 32, (12.1, 50.0, 71.4, 12.0, 84.2), 44.50, 3.59),
]
"""BitNet a4.8, table 2; the paper's 3.4B active parameters at 7B do not follow from its own shares."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("sparsity") / "m"
    card = {"title": "t", "description": "d", "licence": "Apache-2.0"}
    save_bitnet(target, tiny_transformers("bitnet"), tiny_tokenizer(), mode="a4.8", card=card)
    return target


@pytest.fixture(scope="module")
def native(folder) -> LoadedModel:
    return load_model(str(folder))


@pytest.mark.parametrize(("hidden", "ffn", "layers", "shares", "overall", "active"), TABLE, ids=("700M", "1.3B", "3B", "7B"))
def test_the_published_accounting(hidden, ffn, layers, shares, overall, active):
    parameters = {
        "qkv": 3 * hidden**2 * layers,
        "out": hidden**2 * layers,
        **dict.fromkeys(("up", "gate", "down"), hidden * ffn * layers),
    }
    found, alive = account(parameters, {n: s / 100 for n, s in zip(parameters, shares, strict=True)})
    assert 100 * found == pytest.approx(overall, abs=0.005)
    assert alive / 1e9 == pytest.approx(active, abs=0.006)


def test_counts_are_those_of_the_codes(native):
    report = measure_sparsity(native, WINDOWS, "random")
    blocks = native.model.blocks
    inputs = block_inputs(native.model, WINDOWS)
    hidden = inputs.hidden
    for index, block in enumerate(blocks):
        seen: dict[str, torch.Tensor] = {}
        hidden = watched(block, hidden, inputs.rotary, lambda site, x, s=seen: s.update({site: x}))
        zero = {
            site: float((quantize_input(seen[site], kind)[0] == 0).float().mean())
            for site, kind in (("attn_in", "int4"), ("o_in", "topk8"), ("mlp_in", "int4"), ("down_in", "int8"))
        }
        gate = block.mlp.activation(block.mlp.up(seen["mlp_in"])[..., : block.spec.ffn])
        gates = float((gate == 0).float().mean())
        found = report.layers[index]
        assert found.qkv == pytest.approx(zero["attn_in"]) and found.gate == pytest.approx(zero["mlp_in"])
        assert found.out == pytest.approx(zero["o_in"]) and found.out >= 0.5
        assert found.down == pytest.approx(zero["down_in"]) and found.down >= gates
        assert found.gates == pytest.approx(gates) and 0.3 < gates < 0.7
        assert found.up == pytest.approx(1 - (1 - zero["mlp_in"]) * (1 - gates))
    sizes = {"qkv": 128 * 192, "out": 128 * 128, "up": 128 * 96, "gate": 128 * 96, "down": 128 * 96}
    assert report.parameters == 2 * sum(sizes.values())
    assert report.active_parameters == round(sum(account(sizes, vars(layer))[1] for layer in report.layers))
    assert report.total.overall == pytest.approx(1 - report.active_parameters / report.parameters, abs=1e-4)
    assert (report.mode, report.fidelity, report.tokens) == ("a4.8", "trained a4.8", WINDOWS.numel())
    assert json.loads(json.dumps(report.to_dict()))["total"]["out"] == report.total.out


def test_measuring_leaves_no_hook_behind(native):
    measure_sparsity(native, WINDOWS, "random")
    assert all(not b.mlp.activation._forward_hooks for b in native.model.blocks)


@pytest.mark.parametrize("architecture", ("llama", "opt"))
def test_simulated_models_are_counted_too(architecture):
    made = quantised(architecture, method="bitnet", bitnet=BitNetOptions())
    report = measure_sparsity(made.loaded, WINDOWS, "random")
    assert "simulated" in report.fidelity and report.total.out >= 0.5
    if architecture == "llama":
        assert report.total.gates < 0.05, "SiLU is zero only where the integer product is"
    else:
        assert report.total.gate == report.total.up and report.total.gates > 0.3, "ReLU is, but there is no gate"
        assert report.parameters == 2 * (4 * 64 * 64 + 2 * 64 * 96)


def test_weights_are_shares_of_three_values(native):
    report = weight_histogram(native)
    assert len(report.layers) == 2
    for table, block in zip(report.layers, native.model.blocks, strict=True):
        assert list(table) == ["q", "k", "v", "o", "gate", "up", "down"]
        assert all(abs(s.minus + s.zero + s.plus - 1) < 1e-6 and 0.25 < s.zero < 0.37 for s in table.values())
        codes, scale = block.attention.qkv.projections()[1]
        assert table["k"].plus == pytest.approx(float((codes == 1).float().mean())) and table["k"].scale == float(scale)


@pytest.mark.parametrize(("site", "kind"), [("attn_in", "int4"), ("o_in", "topk8"), ("down_in", "int8"), ("k", "fp")])
def test_input_distributions(native, site, kind):
    report = input_histogram(native, WINDOWS, "random", site, 1)
    width = native.adapter.spec(native.model.config).width(site)
    assert report.kind == kind and sum(report.counts) == WINDOWS.numel() * width and len(report.counts) == BINS
    assert len(report.edges) == BINS + 1 and report.edges == sorted(report.edges)
    if kind == "fp":
        assert report.code_counts == []
    else:
        assert sum(report.code_counts) == sum(report.counts)
        zero = report.code_counts[report.code_values.index(0)] / sum(report.code_counts)
        layer = measure_sparsity(native, WINDOWS, "random").layers[1]
        assert zero == pytest.approx({"attn_in": layer.qkv, "o_in": layer.out, "down_in": layer.down}[site])


def test_the_middle_bin_of_a_sparse_input_is_the_highest(native):
    counts = input_histogram(native, WINDOWS, "random", "down_in", 0).counts
    assert counts.index(max(counts)) == BINS // 2


def test_float_models_have_distributions_but_no_ternary_weights():
    loaded = tiny_model("llama")
    assert input_histogram(loaded, WINDOWS, "random", "mlp_in", 0).kind == "fp"
    for measure in (lambda: measure_sparsity(loaded, WINDOWS, "random"), lambda: weight_histogram(loaded)):
        with pytest.raises(ModelError, match="no ternary weights"):
            measure()


@pytest.mark.parametrize(("site", "layer", "code"), [("x", 0, "E-PARAM-SITE"), ("k", 2, "E-PARAM-LAYER")])
def test_what_does_not_exist_is_named(native, site, layer, code):
    with pytest.raises(InputError) as caught:
        input_histogram(native, WINDOWS, "random", site, layer)
    assert caught.value.code == code


def test_the_workbench_offers_all_three(folder):
    bench, text = Workbench(), "text:" + "Nothing happens here, again and again. " * 30
    key = str(folder)
    report = bench.sparsity(key, text=text, tokens=128)
    assert report.tokens == 128 and report.total.out >= 0.5
    assert len(bench.weight_histogram(key).layers) == 2
    assert bench.input_histogram(key, "o_in", 0, text=text, tokens=64).kind == "topk8"


def test_a_short_context_gets_short_windows(folder, tmp_path):
    """Windows of 256 tokens are this page's choice, not the user's: a context of 128 must not be refused for it."""
    shutil.copytree(folder, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    bench, text = Workbench(), "text:" + "a few words " * 100
    assert bench.sparsity(str(tmp_path / "m"), text=text, tokens=512).tokens == 512
    assert bench.input_histogram(str(tmp_path / "m"), "attn_in", 0, text=text, tokens=64).tokens == 64
    for tokens_asked in (4, -1, "many"):
        with pytest.raises(InputError, match="use 8 to") as caught:
            bench.sparsity(str(folder), text=text, tokens=tokens_asked)
        assert caught.value.code == "E-PARAM-TOKENS"
