"""The slots of a block: what a function there sees and changes, and that gradients pass through them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from core.models.tiny import tiny_model
from core.recipe import INPUT_SITE, SITES
from tests.core.tools import ARCHITECTURES, block_inputs, float_blocks, quantised, relative, spec_of, tokens


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("site", SITES)
def test_what_a_slot_returns_goes_on(architecture, site):
    """Twice the values at one site, half the weights behind it: the same output."""
    loaded = tiny_model(architecture)
    spec, inputs = spec_of(loaded), block_inputs(loaded.model, tokens(2, 9))
    block, changed = float_blocks(loaded)[0], float_blocks(loaded)[0]
    linears = changed.linears()
    reader = next((linears[name] for name, read in INPUT_SITE.items() if read == site), None)
    if reader is not None:
        reader.weight.data /= 2
    elif site == "v" and spec.sub_norms:  # x / rms(x) forgets the factor, all but its eps
        changed.attention.attn_sub_norm.eps *= 4
    elif site == "v":
        linears["o"].weight.data /= 2
    factor = {"q": 2, "k": 0.5}
    expected = block(inputs.hidden, inputs.rotary)
    filled = {site: lambda x: x * factor.get(site, 2)}
    if site in factor:
        filled |= {other: lambda x, f=f: x / f for other, f in (("k", 2), ("q", 0.5)) if other != site}
    with changed.slots.fill(filled):
        found = changed(inputs.hidden, inputs.rotary)
    assert relative(found, expected) < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_functions_that_return_nothing_change_nothing(architecture):
    loaded = tiny_model(architecture)
    block, inputs, seen = loaded.model.blocks[0], block_inputs(loaded.model, tokens(2, 9)), []
    expected = block(inputs.hidden, inputs.rotary)
    with block.slots.watch(lambda site, x: seen.append((site, x.shape))):
        found = block(inputs.hidden, inputs.rotary)
    spec = spec_of(loaded)
    assert torch.equal(found, expected) and seen == [(site, (2, 9, spec.width(site))) for site in SITES]


def test_slots_are_empty_again_whatever_happens():
    block = tiny_model("llama").model.blocks[0]
    inputs = block_inputs(tiny_model("llama").model, tokens(1, 4))
    with pytest.raises(ZeroDivisionError), block.slots.fill({"q": lambda x: 1 / 0}):
        block(inputs.hidden, inputs.rotary)
    assert not block.slots
    with block.slots.fill({"q": lambda x: x}):
        with block.slots.fill({"k": lambda x: x}):
            assert "q" in block.slots and "k" in block.slots
        assert "q" in block.slots and "k" not in block.slots
    with pytest.raises(ValueError, match="attn_out"), block.slots.fill({"attn_out": lambda x: x}):
        pass


def test_a_copy_of_a_block_has_slots_of_its_own():
    block = tiny_model("llama").model.blocks[0]
    other = copy.deepcopy(block)
    with block.slots.fill({"q": lambda x: x}):
        assert block.attention.slots and block.mlp.slots and not other.slots and not other.attention.slots


def gradients(block, inputs, *, hooked: bool) -> tuple[dict[str, Tensor], Tensor]:
    """∂ Σ y² / ∂ of every site and of the outputs of the linear layers, and of the block's input."""
    kept: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        x.retain_grad()
        kept[name] = x

    hooks = [layer.register_forward_hook(lambda _, args, y, n=name: keep(n, y)) for name, layer in block.linears().items()]
    x = inputs.hidden.clone().requires_grad_()
    with torch.enable_grad(), block.slots.watch(keep if hooked else lambda site, x: None):
        block(x, inputs.rotary).square().sum().backward()
    for hook in hooks:
        hook.remove()
    return {name: t.grad for name, t in kept.items()}, x.grad


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_sites_and_linear_layers_are_finite_differences(architecture):
    loaded = tiny_model(architecture)
    block = float_blocks(loaded)[0].double()
    inputs = block_inputs(loaded.model, tokens(1, 6))
    inputs = type(inputs)(inputs.hidden.double(), None if inputs.rotary is None else tuple(t.double() for t in inputs.rotary))
    found, _ = gradients(block, inputs, hooked=True)
    assert set(found) == {*SITES, "qkv", "o", "up", "down"}
    for site in SITES:
        direction = torch.randn(found[site].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        sums = []
        for step in (1e-5, -1e-5):
            with block.slots.fill({site: lambda x, s=step, d=direction: x + s * d}):
                sums.append(float(block(inputs.hidden, inputs.rotary).square().sum()))
        slope = (sums[0] - sums[1]) / 2e-5
        assert slope == pytest.approx(float((found[site] * direction).sum()), rel=1e-5, abs=1e-7), site
    assert all(float(found[name].norm()) > 0 for name in ("qkv", "o", "up", "down"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_need_no_slot(architecture):
    """A float block whose input requires a gradient runs nothing that autograd refuses."""
    loaded = tiny_model(architecture)
    block, inputs = float_blocks(loaded)[0], block_inputs(loaded.model, tokens(1, 6))
    x = inputs.hidden.clone().requires_grad_()
    block(x, inputs.rotary).square().sum().backward()
    _, expected = gradients(block, inputs, hooked=False)
    assert torch.equal(x.grad, expected)


def test_a_slot_of_a_quantised_block_sees_floats_before_they_are_quantised():
    q = quantised("llama", scheme="W4A4")
    block, inputs, seen = q.blocks[0], block_inputs(q.model, tokens(1, 6)), {}
    with block.slots.watch(lambda site, x: seen.update({site: x})):
        found = block(inputs.hidden, inputs.rotary)
    assert torch.equal(found, block(inputs.hidden, inputs.rotary))
    quantizer = block.attention.k_quantizer
    assert not torch.equal(seen["k"], quantizer.fake(seen["k"])) and len(seen) == 7
