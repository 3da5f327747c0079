"""Keys and values per token and head: codes, bytes, and a cache that never touches what it has stored."""

from __future__ import annotations

import pytest
import torch

from core.models.bitnet import AttentionBits, BitNetRules
from core.models.tiny import tiny_model
from core.quant.affine import Grid, choose_qparams
from core.quant.kv_cache import FloatKVLayer, KVCache, PackedStates, QuantizedKVLayer
from core.quant.kv_grid import RowGrid, StaticGrid, fake_per_row
from core.quant.static import ActivationQuantizer
from kernels import quantize_rows
from tests.core.tools import gaussian, in_steps, relative, tokens

_SIZES = torch.tensor([1.0, 2.0, 3.0, 4.0])
STATIC = StaticGrid(
    ActivationQuantizer(4, choose_qparams(-_SIZES, _SIZES, bits=4, grid=Grid.EXACT), torch.tensor([0, 7, 20, 40, 48])), 2
)
"""Four clusters of 3 · 16 channels; two first tokens stay in float."""


def model_with(bits: AttentionBits | None):
    """A tiny float BitNet whose attention runs at these bits; weights stay in float."""
    loaded = tiny_model("bitnet")
    rules = None if bits is None else BitNetRules("w1.58a8", attention=bits)
    return loaded.model.with_blocks([block.with_parts(rules=rules) for block in loaded.model.blocks])


def test_codes_by_hand():
    codes, scale = quantize_rows(torch.tensor([[0.7, -0.7, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]]), 4)
    assert codes.tolist() == [[15, 1, 9, 8], [8, 8, 8, 8]]
    assert scale.dtype == torch.float16 and scale[0].item() == pytest.approx(0.1, rel=1e-3)
    codes, _ = quantize_rows(torch.tensor([[0.7, -0.7, 0.1, 0.0]]), 3)
    assert codes.tolist() == [[7, 1, 4, 4]]


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_codes_stay_in_range_and_zero_never_occurs(bits):
    codes, scale = quantize_rows(gaussian(200, 3, 64) * torch.logspace(-6, 5, 200)[:, None, None], bits)
    assert codes.min() == 1 and codes.max() == 2**bits - 1
    assert bool(torch.isfinite(scale).all()) and bool((scale > 0).all())


@pytest.mark.parametrize(("bits", "decibels"), [(4, 19.25), (3, 11.92)])
def test_noise_on_gaussian_heads(bits, decibels):
    x = gaussian(4000, 64)
    noise = (x - fake_per_row(x, bits)).square().sum()
    assert float(10 * torch.log10(x.square().sum() / noise)) == pytest.approx(decibels, abs=0.15)


@pytest.mark.parametrize("grid", [RowGrid(3, 4), RowGrid(4, 4), RowGrid(8, 4), RowGrid(3, 16)], ids=str)
def test_appending_never_changes_what_is_stored(grid):
    states = gaussian(2, 3, 20, 16)
    whole, steps = PackedStates(grid), PackedStates(grid)
    expected = whole.append(states)
    assert torch.equal(expected, grid.fake(states, 0)) and torch.equal(whole.read(), expected)
    seen: list[torch.Tensor] = []
    start = 0
    for size in (1, 4, 1, 7, 7):
        found = steps.append(states[:, :, start : start + size])
        start += size
        assert torch.equal(found, expected[:, :, :start])
        stored = steps.packed[:, :, : start - 1].clone()
        assert all(torch.equal(old, stored[:, :, : old.shape[2]]) for old in seen)
        seen.append(stored)
    assert steps.nbytes == whole.nbytes


@pytest.mark.parametrize("grid", [RowGrid(3, 4), RowGrid(4, 16), STATIC], ids=("4 bits", "float", "static"))
def test_a_later_part_of_a_sequence_is_quantised_as_in_the_whole(grid):
    states = gaussian(2, 3, 9, 16)
    whole = grid.fake(states, 0)
    parts = [grid.fake(states[:, :, start:stop], start) for start, stop in ((0, 1), (1, 3), (3, 9))]
    assert torch.equal(torch.cat(parts, dim=2), whole)


def test_the_first_token_has_bits_of_its_own():
    states = gaussian(1, 2, 5, 16)
    found = PackedStates(RowGrid(3, 4)).append(states)
    assert torch.equal(found[:, :, :1], fake_per_row(states[:, :, :1], 4))
    assert torch.equal(found[:, :, 1:], fake_per_row(states[:, :, 1:], 3))
    found = PackedStates(RowGrid(3, 16)).append(states)
    assert torch.equal(found[:, :, :1], states[:, :, :1])


@pytest.mark.parametrize(("bits", "bos", "token", "first"), [(3, 4, 8, 10), (4, 4, 10, 10), (3, 16, 8, 64), (8, 8, 18, 18)])
def test_bytes_are_counted(bits, bos, token, first):
    grid = RowGrid(bits, bos)
    cache = KVCache([QuantizedKVLayer(grid, grid) for _ in range(2)])
    for layer in cache.layers:
        layer.update(gaussian(1, 3, 9, 16), gaussian(1, 3, 9, 16))
    assert cache.nbytes == 2 * 2 * 3 * (first + 8 * token)
    assert grid.bytes_per_token(3, 16) == 3 * token and cache.layers[0].bytes_per_token(3, 16, 4) == 2 * 3 * token
    assert RowGrid(4, 4).bytes_per_token(5, 128) == 5 * (64 + 2), "3.9 times less than 16 bits"
    assert RowGrid(3, 4).bytes_per_token(5, 128) == 5 * (48 + 2)


def test_rows_of_the_batch_are_selected_and_repeated():
    grid, states = RowGrid(3, 4), gaussian(3, 2, 9, 16)
    cache = KVCache([QuantizedKVLayer(grid, grid)])
    keys, _ = cache.layers[0].update(states, states)
    cache.reorder_cache(torch.tensor([2, 0]))
    assert torch.equal(cache.layers[0].key_states.read(), keys[[2, 0]])
    cache.reorder_cache(torch.tensor([0, 0, 1, 1]))
    assert torch.equal(cache.layers[0].key_states.read(), keys[[2, 2, 0, 0]])


@pytest.mark.parametrize("bits", [AttentionBits(3), AttentionBits(4, q=4), AttentionBits(8), AttentionBits(3, bos=16)], ids=str)
def test_decoding_with_the_cache_equals_prefill(bits):
    model = model_with(bits)
    ids = tokens(2, 20, seed=3)
    expected = model(ids).logits
    cache = model.decoder.new_cache()
    assert all(isinstance(layer, QuantizedKVLayer) for layer in cache.layers)
    assert relative(in_steps(model, ids, cache), expected) < 1e-5
    plain = model_with(None)
    assert relative(plain(ids).logits, expected) > 1e-3, "the bits act"


def test_sixteen_bits_are_the_unquantised_model():
    model = model_with(AttentionBits())
    plain = model_with(None)
    ids = tokens(2, 20)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert all(isinstance(layer, FloatKVLayer) for layer in model.decoder.new_cache().layers)
