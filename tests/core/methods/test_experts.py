"""Mixtures of experts: what each expert is planned on, experts without tokens, files, reports, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file

import core
from core.calibration.observe import Recorder
from core.errors import ModelError, QuantscopeError
from core.evaluation.describe import LayerRecord, model_info, report_from_dict
from core.evaluation.memory import measured_parts, recipe_bytes
from core.evaluation.roofline import operators
from core.evaluation.shapes import shape_of_loaded
from core.methods.rptq.explore import recluster
from core.methods.sequential import watch_layer
from core.models.export.fit import loads_in
from core.models.io.load import load_model
from core.models.io.quantized import load_quantized, parameters_of, save_quantized
from core.models.io.skeleton import fused_experts
from core.models.tiny import save_tiny, tiny_model, tiny_transformers
from core.options import PlusOptions
from core.quant.static import InputUse
from core.recipe import Bits, Calibration, Clusters, DistillOptions, QuantRecipe
from tests.core.stream.stream_tools import recipe_of, tensors_of
from tests.core.tools import block_inputs, gaussian, quantised, relative, tokens

SEEN = tokens(6, 24, seed=4)
MIXTURES = ("mixtral", "qwen3_moe", "olmoe")
SPARSE = {"num_local_experts": 24, "num_experts_per_tok": 1, "intermediate_size": 16}
"""With 20 tokens, at least four of these experts get none."""


def hidden_of(block, x):
    """Which experts get each of the tokens x [M, D], [M, k], and what all experts make of all tokens before down, [N, M, F]."""
    chosen = torch.softmax(x @ block.router.t(), -1).topk(block.spec.top_k).indices
    made = []
    for expert in block.experts:
        gate, up = (x @ expert.up.weight.t()).chunk(2, -1)
        made.append(torch.nn.functional.silu(gate) * up)
    return chosen, torch.stack(made)


def mlp_inputs(block, item):
    """What the float block's experts read, [B, T, D]."""
    seen = {}
    with block.slots.watch(lambda site, x: seen.update({site: x})):
        block(item.hidden, item.rotary)
    return seen["mlp_in"]


@pytest.mark.parametrize("skip", (0, 1))
@pytest.mark.parametrize("architecture", MIXTURES)
@torch.inference_mode()
def test_ranges_of_an_expert_are_those_of_the_tokens_sent_to_it(architecture, skip):
    block, item = tiny_model(architecture).model.blocks[0], block_inputs(tiny_model(architecture).model, SEEN)
    recorder = Recorder(0, len(SEEN), hessians_wanted=True, skip_first=skip)
    watch_layer(block, [item.hidden], [item], [recorder])
    ranges, x = recorder.ranges(), mlp_inputs(block, item)
    chosen, made = hidden_of(block, x.flatten(0, 1))
    counted = torch.arange(SEEN.numel()) % SEEN.shape[1] >= skip
    total = 0
    for index in range(block.spec.experts):
        site, sent = f"down_in.{index}", (chosen == index).any(-1)
        own = made[index][sent & counted]
        total += len(own)
        assert recorder.routed[site] == len(own) > 0
        torch.testing.assert_close(ranges[site].low, own.amin(0))
        torch.testing.assert_close(ranges[site].high, own.amax(0))
        torch.testing.assert_close(recorder.hessians[site], made[index][sent].t() @ made[index][sent])
        windows = [own[(torch.arange(SEEN.numel()) // SEEN.shape[1])[sent & counted] == w] for w in range(len(SEEN))]
        torch.testing.assert_close(ranges[site].sample_high, torch.stack([w.amax(0) for w in windows if len(w)]))
        assert ((ranges[site].rows[:, None] - own).abs().amax(-1).amin(-1) < 1e-4).all(), "rows of other tokens were sampled"
    assert total == block.spec.top_k * int(counted.sum())


@pytest.mark.parametrize("weights", ("gptq", "rtn"))
@torch.inference_mode()
def test_an_expert_without_tokens_has_the_ranges_of_all(weights):
    base, few = tiny_model("mixtral", **SPARSE), tokens(1, 20, seed=1)
    options = {"scheme": "custom", "bits": Bits(4, down_in=8), "clusters": Clusters.uniform(1)}
    made = quantised("mixtral", base=base, windows=few, method="rtn", weights=weights, **options)
    block, outcome = base.model.blocks[0], made.outcomes[0]
    _, hidden = hidden_of(block, mlp_inputs(block, block_inputs(base.model, few)).flatten(0, 1))
    assert sum(outcome.routed) == 20 and outcome.routed.count(0) >= 4
    for index in (i for i, count in enumerate(outcome.routed) if not count):
        step = float(outcome.plan.sites[f"down_in.{index}"].params.scale[0])
        assert step == pytest.approx(float(hidden[index].max().clamp(min=0) - hidden[index].min().clamp(max=0)) / 255, rel=0.01)
    report = LayerRecord.of(0, made.blocks[0], outcome).report
    assert report.routed == list(outcome.routed)
    lines = {name: why for name, why in report.fallbacks.items() if name.startswith("expert")}
    assert set(lines) == {f"expert {i}" for i, count in enumerate(outcome.routed) if not count}
    assert set(lines.values()) == {"no token was sent to it: ranges of all"}


@pytest.mark.parametrize("architecture", MIXTURES)
@torch.inference_mode()
def test_first_tokens_stay_in_float_inside_of_experts(architecture):
    """Experts get the tokens of several sequences together: as if each token came alone, quantised or in float."""
    block = quantised(architecture, scheme="W4A4").blocks[0]
    x = gaussian(3, 5, block.spec.hidden, seed=2)
    found = block.mlp(x, InputUse(2))
    alone = [[block.mlp(x[b : b + 1, t : t + 1], InputUse(int(t < 2))) for t in range(5)] for b in range(3)]
    assert relative(found, torch.cat([torch.cat(row, 1) for row in alone])) < 1e-6
    assert relative(found, block.mlp(x, InputUse(0))) > 1e-3


@pytest.mark.parametrize("segments", ("exact", "pow2"))
@pytest.mark.parametrize("order", ("layer", "shared"))
@torch.inference_mode()
def test_each_expert_has_clusters_of_its_own(order, segments):
    made = quantised("qwen3_moe", scheme="W4A4", order=order, segments=segments, clusters=Clusters.uniform(4))
    orders = [made.outcomes[0].plan.sites[f"down_in.{i}"].order for i in range(6)]
    assert len({tuple(o.tolist()) for o in orders}) == 6 and all(o.sort().values.equal(torch.arange(48)) for o in orders)
    float_like = quantised("qwen3_moe", scheme="W4A16", order=order, segments=segments)
    assert relative(float_like.model(SEEN).logits, float_like.base.model(SEEN).logits) < 0.8  # measured: at most 0.51
    assert all(outcome.output_sqnr_db > 6 for outcome in float_like.outcomes)


@pytest.mark.parametrize(("architecture", "fields"), [("mixtral", {}), ("qwen3_moe", {"mlp_only_layers": [1]}), ("olmoe", {})])
def test_a_streamed_run_and_its_text_are_those_in_memory(tmp_path, architecture, fields):
    folder = save_tiny(tmp_path / "m", architecture, layers=3, **fields)
    recipe = recipe_of(folder, scheme="W4A8")
    made, report = core.quantize(load_model(str(folder)), recipe)
    save_quantized(tmp_path / "whole", made, {"recipe": recipe.to_record(), "report": report.to_dict()})
    streamed = core.quantize_streamed(recipe, tmp_path / "streamed")
    first, second = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "streamed")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert [layer.routed for layer in streamed.layers] == [layer.routed for layer in report.layers]
    assert report_from_dict(report.to_dict()).layers[0].routed == report.layers[0].routed != []
    back, ids = load_quantized(tmp_path / "whole"), tokens(1, 6)
    texts = [m.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None) for m in (made.model, back.model)]
    assert texts[0].tolist() == texts[1].tolist()


@pytest.mark.parametrize("architecture", MIXTURES)
@torch.inference_mode()
def test_published_and_fused_names_are_read(tmp_path, architecture):
    folder = save_tiny(tmp_path / "m", architecture, seed=3)
    source, stored = tiny_transformers(architecture, seed=3), load_file(folder / "model.safetensors")
    name = "block_sparse_moe.experts.1.w1" if architecture == "mixtral" else "mlp.experts.1.gate_proj"
    assert f"model.layers.0.{name}.weight" in stored, "transformers writes what is published"
    expected = source(SEEN).logits
    assert relative(load_model(str(folder)).model(SEEN).logits, expected) < 1e-5
    missing = {n: t for n, t in stored.items() if n != f"model.layers.0.{name}.weight"}
    save_file(missing, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 of \d+ tensors are missing .*mlp\.experts\.1\.gate_proj"):
        load_model(str(folder))
    fused = {n: t.contiguous() for n, t in source.state_dict().items()}
    save_file(fused, folder / "model.safetensors", metadata={"format": "pt"})
    assert relative(load_model(str(folder)).model(SEEN).logits, expected) < 1e-5


def test_experts_are_joined_by_number():
    parts = {f"m.experts.{i}.{n}_proj.weight": gaussian(*s, seed=i) for i in range(11) for n, s in
             (("gate", (3, 2)), ("up", (3, 2)), ("down", (2, 3)))}
    found = fused_experts({**parts, "m.gate.weight": gaussian(11, 2)})
    assert set(found) == {"m.experts.gate_up_proj", "m.experts.down_proj", "m.gate.weight"}
    assert found["m.experts.gate_up_proj"][10, 3:].equal(parts["m.experts.10.up_proj.weight"])
    assert found["m.experts.down_proj"][2].equal(parts["m.experts.2.down_proj.weight"])


@pytest.mark.parametrize("scheme", ("W4A16", "W4A4"))
@pytest.mark.parametrize("architecture", MIXTURES)
def test_bytes_are_counted_for_all_experts(architecture, scheme):
    made = quantised(architecture, scheme=scheme, method="rtn", variant="matched", clusters=Clusters.uniform(8))
    info = model_info(made.base, 0.0)
    shape, source = shape_of_loaded(info), tiny_transformers(architecture)
    assert info.parameters == parameters_of(made.model) == sum(p.numel() for p in source.parameters())
    stored = sum(measured_parts(made.model).values())
    assert 0.99 * stored <= recipe_bytes(shape, made.recipe)[0] <= 1.02 * stored  # norms of q and k are not in the formula
    one, many = (operators(shape, Bits(), batch=b, sequence=8, phase="decode") for b in (1, 1000))
    size = shape.ffn * shape.hidden * 2
    down = [next(o for o in found if o.name == "down") for found in (one, many)]
    assert down[0].flops == 2 * 2 * shape.top_k * shape.ffn * shape.hidden and down[0].bytes > 2 * size * shape.top_k
    assert down[1].bytes > 2 * size * shape.experts


def test_observed_ranges_have_the_experts_side_by_side():
    loaded = tiny_model("qwen3_moe", mlp_only_layers=[0])
    report = core.observe(loaded, Calibration(tokens=512, window=64))
    dense, mixed = report.sites["layers.0.down_in"], report.sites["layers.1.down_in"]
    assert (len(dense.low), dense.block, len(mixed.low), mixed.block) == (96, 96, 6 * 48, 48)
    view = recluster(report, "layers.1.down_in", Clusters.uniform(4))
    assert all(len({c // 48 for c in view.order[a:b].tolist()}) == 1 for a, b in pairwise(view.offsets))
    assert view.labels.max() == 3 and sorted(view.order.tolist()) == list(range(6 * 48))


REFUSED = {
    "rotation": lambda bench, r: bench.quantize(replace(r, method="rotation")),
    "additions": lambda bench, r: bench.quantize(replace(r, plus=PlusOptions())),
    "bitnet": lambda bench, r: bench.quantize(replace(r, method="bitnet")),
    "distillation": lambda bench, r: bench.quantize(replace(r, distill=DistillOptions(steps=1))),
    "estimate": lambda bench, r: bench.estimate(replace(r, method="rotation")),
    "prediction": lambda bench, r: bench.predict(r),
    "curve": lambda bench, r: bench.curve(r, "down_in"),
    "calibrations": lambda bench, r: bench.calibrations(r, Calibration()),
    "bases": lambda bench, r: bench.bases(r.model, r.calibration),
    "channel": lambda bench, r: bench.channel(r.model, r.calibration, "layers.0.down_in", 3),
    "inputs": lambda bench, r: bench.input_histogram(r.model, "down_in", 0),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_meaning_for_experts_is_refused_in_a_sentence(tmp_path, what):
    recipe = recipe_of(save_tiny(tmp_path / "m", "mixtral"))
    with pytest.raises(QuantscopeError, match="experts") as error:
        REFUSED[what](core.Workbench(), recipe)
    assert ": " in str(error.value) and str(error.value).endswith(".")


def test_an_export_and_impossible_counts_are_refused():
    said = loads_in(quantised("mixtral", scheme="W4A16", method="rtn").loaded)
    assert said["vLLM"] == said["llama.cpp"] == "no, because experts of a mixture are not written in it"
    assert said["transformers"].startswith("yes, as the folder that quantize writes")
    with pytest.raises(ModelError, match="9 of 5 experts"):
        tiny_model("mixtral", num_experts_per_tok=9)


def test_a_run_is_estimated_with_all_experts():
    loaded, recipe = tiny_model("mixtral"), QuantRecipe("tiny", calibration=Calibration(tokens=512, window=64))
    found = core.estimate(loaded, recipe, tokens=128, window=64)
    made, report = core.quantize(loaded, recipe)
    assert sum(measured_parts(made.model).values()) <= found.model_bytes <= 1.02 * sum(measured_parts(made.model).values())
    assert report.weight_bytes == pytest.approx(found.model_bytes, rel=0.02)
