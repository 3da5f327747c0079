"""What the probe plans is what a run plans: same clusters, scales and rounded numbers from the same statistics."""

from __future__ import annotations

import pytest
import torch

from core.calibration.observe import Recorder
from core.errors import InputError
from core.methods import method
from core.methods.base import LayerPlan
from core.methods.sequential import layer_statistics, run_layer, watch_layer
from core.models.tiny import tiny_model
from core.probe.measure import measure
from core.probe.plans import CELLS, Layer, require_cell
from core.probe.probe import build_probe
from core.recipe import INPUT_SITE, SITES, BitNetOptions, Overrides
from tests.core.probe.probe_tools import READ, SEEN, divergence, probed, recipe_of, statistics_of
from tests.core.tools import ARCHITECTURES, block_inputs, quantised

RECIPES = {
    "rptq": {"scheme": "W4A4"},
    "rptq strict": {"variant": "strict"},
    "rptq official": {"variant": "official"},
    "rptq W3A3KV": {"scheme": "W3A3KV"},
    "rptq W4A16": {"scheme": "W4A16"},
    "rptq aligned": {"segments": "aligned"},
    "rptq layers": {"overrides": Overrides.parse("layers.0.k=3,layers.1=8,layers.1.weights.down=3,layers.0.R5=2,layers.0.q=16")},
    "official layers": {"variant": "official", "overrides": Overrides.parse("layers.1.softmax=4,layers.0.weights.o=16")},
    "matched layers": {"method": "rtn", "variant": "matched", "overrides": Overrides.parse("layers.0-1.R1=2,layers.1.v=16")},
    "rptq shared": {"order": "shared"},
    "rptq pow2": {"segments": "pow2", "variant": "strict"},
    "rtn plain": {"method": "rtn"},
    "rptq sorted": {"variant": "sorted"},
    "rtn matched": {"method": "rtn", "variant": "matched"},
    "bitnet": {"method": "bitnet", "bitnet": BitNetOptions("a4.8", kv_bits=3, q_bits=4)},
    "bitnet w1.58a8": {"method": "bitnet", "bitnet": BitNetOptions("w1.58a8")},
}


def equal(one: LayerPlan, other: LayerPlan) -> None:
    """Compare plans number by number."""
    assert one.orders.keys() == other.orders.keys() and all(torch.equal(one.orders[r], other.orders[r]) for r in one.orders)
    assert (one.softmax_bits, one.weight_bits, one.sink_tokens) == (other.softmax_bits, other.weight_bits, other.sink_tokens)
    for a, b in ((one.sites[s], other.sites[s]) for s in SITES):
        assert a.bits == b.bits and torch.equal(a.offsets, b.offsets)
        assert (a.params is None) == (b.params is None)
        if a.params is not None:
            assert torch.equal(a.params.scale, b.params.scale) and torch.equal(a.params.zero_point, b.params.zero_point)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [*(("llama", name) for name in RECIPES if name != "rptq shared"),  # its run has other channels
     *((a, name) for a in ("opt", "qwen3") for name in ("rptq", "official layers", "rtn matched", "bitnet"))],
)  # fmt: skip
def test_plans_are_those_of_a_run(architecture, name):
    """The first layer's from the probe's statistics as they are; the second's where it is shown what the first one puts out."""
    made = quantised(architecture, base=tiny_model(architecture), weights="rtn", **RECIPES[name])
    planner, recipe, spec = method(made.recipe.method), made.recipe, made.base.model.blocks[0].spec
    found, own = statistics_of(made.base.model, recipe), [recipe.for_layer(layer) for layer in (0, 1)]
    first = found.layers[planner.sink_tokens(own[0])][0]
    equal(planner.plan_layer(first, own[0], spec), made.outcomes[0].plan)
    inputs, block = [block_inputs(made.base.model, SEEN)], made.base.model.blocks[1]
    with torch.inference_mode():
        hidden = run_layer(made.blocks[0], [item.hidden for item in inputs], inputs)
        bits = planner.calibration_softmax_bits(own[1])
        recorders = [Recorder(1, len(SEEN), False, planner.sink_tokens(own[1]), recipe.seed) for _ in range(2)]
        watch_layer(block, hidden, inputs, recorders[:1])
        watch_layer(block, hidden, inputs, recorders[1:], softmax_bits=bits)
    stats = layer_statistics(block, recorders[0], recorders[1] if bits < 16 else recorders[0])
    equal(planner.plan_layer(stats, own[1], spec), made.outcomes[1].plan)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [*(("llama", name) for name in RECIPES),
     *((a, name) for a in ARCHITECTURES if a != "llama" for name in ("rptq", "official layers", "rptq shared", "bitnet"))],
)  # fmt: skip
def test_a_measured_pass_is_the_quantised_model(architecture, name):
    """One layer: the packed model in its own channel order diverges as much as the float one with rounded sites and weights."""
    base = tiny_model(architecture, layers=1)
    made = quantised(architecture, base=base, weights="rtn", **RECIPES[name])
    probe = build_probe(base.model, READ, draws=1)
    found = measure(probe, base.model, statistics_of(base.model, made.recipe), made.recipe)
    assert found.kld == pytest.approx(divergence(base.model, made.model, READ), rel=0.02)
    assert found.kld > 1e-5


@pytest.mark.parametrize("name", RECIPES)
def test_all_cells_together_are_the_whole(name):
    """The change of a layer is made of the changes of its cells."""
    loaded, _ = probed("llama")
    recipe = recipe_of(**RECIPES[name])
    layer = Layer.of(loaded.model, 1, statistics_of(loaded.model, recipe), recipe)
    whole, spec = layer.whole_change(), layer.block.spec
    for cell in CELLS:
        part = layer.change(cell)
        assert set(part.sites) <= {cell} and set(part.weights) <= {cell}
        if cell in SITES and cell in part.sites:
            x = torch.randn(2, 9, spec.width(cell))
            assert torch.equal(part.sites[cell](x), whole.sites[cell](x))
        if cell in INPUT_SITE:
            assert (cell in part.weights) == (cell in whole.weights) == (recipe.for_layer(1).tensor_bits.weight(cell) < 16)
            assert all(torch.equal(w, whole.weights[name]) for name, w in part.weights.items())
        assert part.softmax_bits == (whole.softmax_bits if cell == "softmax" else 16)


@pytest.mark.parametrize(("layer", "cell"), [(2, "k"), (-1, "k"), (0, "kv"), (True, "k"), ("0", "k"), (0, "norm1")])
def test_cells_that_do_not_exist_are_refused(layer, cell):
    loaded, _ = probed("llama")
    with pytest.raises(InputError, match="use layers 0 to 1") as caught:
        require_cell(loaded.model, layer, cell)
    assert caught.value.code == "E-PARAM-SITE"
