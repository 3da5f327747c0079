"""Few-segments modes: boundaries against exhaustive search, shared steps by definition, whole models run in integers."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from core.errors import InputError
from core.methods.rptq.segments import ALIGN, best_runs, power_of_two
from core.quant.affine import Grid, choose_qparams
from core.quant.observer import SitePlan
from core.quant.ranges import ChannelRanges
from core.quant.segments import segment_max, segment_min, segment_sum
from core.quant.static import ActivationQuantizer
from core.recipe import QuantRecipe
from kernels import Backend
from tests.core.tools import quantised


def ranges(width: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    high = torch.exp(torch.randn(width, generator=g) + torch.linspace(-2, 2, width))
    return -high * torch.rand(width, generator=g), high, torch.rand(width, generator=g) + 0.1


def cost(offsets: torch.Tensor, low: torch.Tensor, high: torch.Tensor, importance: torch.Tensor) -> float:
    width = segment_max(high, offsets) - segment_min(low, offsets)
    return float((segment_sum(importance, offsets) * width**2).sum())


@pytest.mark.parametrize("limit", (1, 2, 4))
@pytest.mark.parametrize("width", (20, 64, 250, 256))
@pytest.mark.parametrize("weighted", (True, False))
def test_boundaries_are_the_best_of_all(width, limit, weighted):
    low, high, importance = ranges(width, seed=width)
    importance = importance if weighted else torch.ones(width)
    inner = range(ALIGN, width, ALIGN)
    every = [torch.tensor([0, *cuts, width]) for n in range(limit) for cuts in combinations(inner, n)]
    best = min(cost(o, low, high, importance) for o in every)
    found = best_runs(low, high, importance if weighted else None, limit=limit)
    assert found[0] == 0 and found[-1] == width and len(found) <= limit + 1 and not bool((found[:-1] % ALIGN).any())
    assert cost(found, low, high, importance) == pytest.approx(best, rel=1e-6)


def test_the_square_of_a_range_counts():
    """Widths 1, 6 and 10 in two runs: 2 · 6² + 10² is less than 1 + 2 · 10², though 2 · 6 + 10 is more than 1 + 2 · 10."""
    high = torch.tensor([1.0, 6.0, 10.0]).repeat_interleave(ALIGN)
    assert best_runs(torch.zeros_like(high), high, None, limit=2).tolist() == [0, 2 * ALIGN, 3 * ALIGN]


@pytest.mark.parametrize("bits", (2, 4, 7))
def test_shared_steps_are_no_smaller_and_at_most_double_inside_reach(bits):
    g = torch.Generator().manual_seed(bits)
    offsets = torch.tensor([0, 10, 20, 45, 64])
    rows = torch.randn(50, 64, generator=g) * torch.repeat_interleave(torch.tensor([0.01, 0.3, 1.0, 5.0]), offsets.diff())
    high, low = rows.amax(0), rows.amin(0)
    params = choose_qparams(segment_min(low, offsets), segment_max(high, offsets), bits=bits, grid=Grid.EXACT)
    site = power_of_two(SitePlan(bits, offsets, params, 0.0), ChannelRanges(low, high, None, None, rows))
    assert site.weight_offsets.tolist() == [0, 64]
    ratio = site.params.scale / params.scale
    reach = params.scale.max() / params.scale < 2 ** (8 - bits)
    assert bool((ratio >= 1).all()) and bool((ratio[reach] < 2).all())
    quantizer = ActivationQuantizer(bits, site.params, offsets)
    step, factor = quantizer.common_step()
    assert torch.equal(step * factor, quantizer.channel_scale)
    assert float((quantizer.fake(rows) - rows).abs().max() / quantizer.channel_scale.max()) <= 1.01  # nothing is clipped


@pytest.mark.parametrize(("segments", "variant"), [("aligned", "default"), ("pow2", "strict"), ("pow2", "default")])
def test_models_with_few_segments_run_in_integers(segments, variant):
    """On every backend the same numbers; inputs of 8 bits are aligned under pow2 too."""
    q = quantised("llama", scheme="W4A4", variant=variant, segments=segments)
    ids = torch.arange(2, 26).view(2, 12)
    found = {}
    for backend in (Backend.REFERENCE, Backend.INT8):
        for block in q.blocks:
            for linear in block.linears().values():
                linear.set_backend(backend)
                assert len(linear.offsets) <= 5
        found[backend] = q.model(ids).logits
    difference = (found[Backend.INT8] - found[Backend.REFERENCE]).norm() / found[Backend.REFERENCE].norm()
    assert float(difference) < 0.05  # float noise moves values across rounding boundaries of 4 bits


def test_exact_recipes_keep_their_hashes_and_other_methods_their_segments():
    plain, aligned = QuantRecipe(model="m"), QuantRecipe(model="m", segments="aligned")
    assert "segments" not in plain.to_dict() and plain.hash != aligned.hash and "aligned" in aligned.label()
    assert QuantRecipe.from_dict(aligned.to_dict()) == aligned
    assert QuantRecipe.from_query(aligned.to_query(), default=plain) == aligned
    assert QuantRecipe.from_query(plain.to_query(), default=aligned) == plain
    for wrong in ({"segments": "few"}, {"segments": "aligned", "method": "rtn"}):
        with pytest.raises(InputError, match="segments is"):
            QuantRecipe(model="m", **wrong)
