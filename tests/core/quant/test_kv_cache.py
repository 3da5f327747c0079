"""The packed cache stores what static quantisation says, to the byte, and decoding with it is prefill (oracle 13)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from core.evaluation.memory import kv_bytes_per_token
from core.models.tiny import tiny_model
from core.quant.affine import Grid, choose_qparams
from core.quant.kv_cache import FloatKVLayer, KVCache, PackedStates, QuantizedKVLayer
from core.quant.kv_grid import StaticGrid
from core.quant.static import ActivationQuantizer
from core.recipe import Bits
from kernels import packed_width
from tests.core.tools import ARCHITECTURES, Quantised, in_steps, poisoned_memory, quantised, relative, spec_of, tokens

HEADS, DIM = 2, 12


def states(length: int, *, batch: int = 2, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    size = torch.rand(HEADS, 1, DIM, generator=g) * 5 + 0.1
    return torch.randn(batch, HEADS, length, DIM, generator=g) * size + torch.randn(HEADS, 1, DIM, generator=g)


def quantizer(bits: int = 4, clusters: tuple[int, ...] = (0, 5, 12, 20, 24)) -> ActivationQuantizer:
    x = states(200).transpose(1, 2).flatten(2)
    runs = list(zip(clusters[:-1], clusters[1:], strict=True))
    low, high = (torch.stack([getattr(x[..., a:b], f)() for a, b in runs]) for f in ("min", "max"))
    return ActivationQuantizer(bits, choose_qparams(low, high, bits=bits, grid=Grid.EXACT), torch.tensor(clusters))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sink", (0, 1, 5))
@pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (4, 1, 3, 1), (2, 7)], ids=str)
def test_what_is_stored_is_what_static_quantisation_says(pieces, sink, bits):
    q, x = quantizer(bits), states(9)
    store, start = PackedStates(StaticGrid(q, sink)), 0
    expected = q.fake_heads(x)
    expected[:, :, :sink] = x[:, :, :sink]
    for size in pieces:
        seen = store.append(x[:, :, start : start + size])
        start += size
        assert torch.equal(seen, expected[:, :, :start])
    assert torch.equal(store.read(), expected) and store.length == 9
    assert store.nbytes == 2 * HEADS * (9 * packed_width(DIM, bits) + min(sink, 9) * DIM * 4)


@pytest.mark.parametrize("sink", (0, 2))
def test_growth_keeps_everything(sink):
    """Slots double on the way to 70; nothing stored earlier may change."""
    q, x = quantizer(3), states(70)
    store = PackedStates(StaticGrid(q, sink))
    for i in range(70):
        store.append(x[:, :, i : i + 1])
    expected = q.fake_heads(x)
    expected[:, :, :sink] = x[:, :, :sink]
    assert torch.equal(store.read(), expected) and 70 <= store.packed.shape[2] < 140


def test_poisoned_memory_changes_nothing():
    q, x = quantizer(4), states(20)
    with poisoned_memory():
        store = PackedStates(StaticGrid(q, 1))
        parts = [store.append(x[:, :, i : i + 2]) for i in range(0, 20, 2)]
    expected = q.fake_heads(x)
    expected[:, :, :1] = x[:, :, :1]
    assert torch.equal(parts[-1], expected)


def test_the_caller_may_reuse_its_tensors():
    q, x = quantizer(4), states(6)
    store = PackedStates(StaticGrid(q, 2))
    kept = x.clone()
    seen = store.append(x)
    assert torch.equal(x, kept)
    x.zero_()
    before = store.read()
    assert torch.equal(seen, before)
    seen.zero_()
    assert torch.equal(store.read(), before)


@pytest.mark.parametrize("sink", (0, 3, None), ids=("packed", "packed behind sinks", "float"))
def test_rows_of_the_batch_are_selected_repeated_and_reordered(sink):
    x = states(6, batch=3)
    for rows in ([2, 0, 0], [1], [0, 0, 1, 1, 2, 2]):
        layer = FloatKVLayer() if sink is None else QuantizedKVLayer(StaticGrid(quantizer(), sink), StaticGrid(quantizer(), sink))
        cache = KVCache([layer])
        before = layer.update(x, x)[0].clone()
        cache.reorder_cache(torch.tensor(rows))
        more = states(1, batch=len(rows), seed=2)
        found = layer.update(more, more)[0]
        assert torch.equal(found[:, :, :6], before[rows]) and cache.get_seq_length() == 7


def test_before_the_first_token():
    for layer in (QuantizedKVLayer(StaticGrid(quantizer(), 1), StaticGrid(quantizer(), 1)), FloatKVLayer()):
        cache = KVCache([layer])
        cache.reorder_cache(torch.tensor([0]))
        assert cache.get_seq_length() == 0 and cache.nbytes == 0


def test_a_float_layer_keeps_what_it_is_given():
    x, layer, start = states(20), FloatKVLayer(), 0
    for size in (3, 1, 1, 8, 7):
        keys, values = layer.update(x[:, :, start : start + size], 2 * x[:, :, start : start + size])
        start += size
        assert torch.equal(keys, x[:, :, :start]) and torch.equal(values, 2 * x[:, :, :start])
        assert layer.length == start and layer.nbytes == 2 * x[:, :, :start].numel() * 4


@pytest.mark.parametrize("bits", (2, 3, 4, 5, 8))
def test_bytes_per_token(bits):
    grid = StaticGrid(quantizer(bits), 1)
    assert grid.bytes_per_token(3, 64) == 3 * 64 * bits / 8
    assert QuantizedKVLayer(grid, grid).bytes_per_token(3, 64, 4) == 2 * 3 * 64 * bits / 8
    assert FloatKVLayer().bytes_per_token(3, 64, 2) == FloatKVLayer(grid).bytes_per_token(3, 64, 2) == 2 * 3 * 64 * 2
    assert StaticGrid(quantizer(3), 1).bytes_per_token(2, 5) == 2 * (2 + 1), "odd head sizes pad each plane to a byte"


# Whole models.


@pytest.fixture(scope="module")
def kv_only() -> dict[str, Quantised]:
    return {a: quantised(a, scheme="W4A4KV") for a in ARCHITECTURES}


def cache_of(q: Quantised) -> KVCache:
    return q.model.decoder.new_cache()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoding_equals_prefill(kv_only, architecture):
    """Oracle 13, on a scheme without other quantisers: nothing but float32 sums can differ."""
    q, ids = kv_only[architecture], tokens(2, 24, seed=5)
    whole = q.model(ids).logits
    packed = q.model(ids, cache=cache_of(q)).logits
    assert torch.equal(packed, whole), "prefill through the packed cache is prefill"
    for steps in ((1,), (7, 3), (23,)):
        assert relative(in_steps(q.model, ids, cache_of(q), steps), whole) < 1e-5  # measured: 1.1e-6
    assert relative(whole, q.base.model(ids).logits) > 0.01, "the cache is quantised at all"


@pytest.mark.parametrize(
    "architecture, variant", [*((a, "default") for a in ARCHITECTURES), ("qwen3", "official"), ("opt", "official")]
)
def test_decoding_equals_prefill_with_every_site_quantised(architecture, variant):
    """Float32 sums may move a value across a rounding boundary here: most positions agree, none drifts."""
    q, ids = quantised(architecture, scheme="W4A4", variant=variant), tokens(2, 24, seed=5)
    whole = q.model(ids).logits
    found = in_steps(q.model, ids, cache_of(q))
    per_token = (found - whole).norm(dim=-1) / whole.norm(dim=-1)
    assert float((per_token < 1e-4).float().mean()) > 0.6 and relative(found, whole) < 0.1
    assert relative(whole, q.base.model(ids).logits) > 0.2


@pytest.mark.parametrize("architecture", ("llama", "opt"))
@pytest.mark.parametrize("bits", range(2, 9))
def test_measured_bytes_are_the_formula(architecture, bits):
    q = quantised(architecture, scheme="custom", bits=Bits(k=bits, v=bits), layers=1)
    spec, cache = spec_of(q.base), cache_of(q)
    q.model(tokens(2, 19), cache=cache)
    sink = q.blocks[0].attention.sink_tokens
    per_token = 2 * spec.kv_heads * packed_width(spec.head_dim, bits)
    assert kv_bytes_per_token(q.model) == per_token
    assert sink == 1 and cache.nbytes == 2 * (19 * per_token + sink * 2 * spec.kv_heads * spec.head_dim * 4)


@pytest.mark.parametrize("bits", (Bits(k=4, v=2), Bits(k=3, v=8), Bits(k=4, v=4, q=4)), ids=("k4 v2", "k3 v8", "k4 v4 q4"))
def test_keys_and_values_of_different_bits(bits):
    q, ids = quantised("qwen3", scheme="custom", bits=bits), tokens(1, 20, seed=2)
    whole = q.model(ids).logits
    found = in_steps(q.model, ids, cache_of(q))
    assert relative(found, whole) < (1e-5 if bits.q == 16 else 0.05)
    assert kv_bytes_per_token(q.model) == 2 * 2 * 16 * (bits.k + bits.v) // 8


@pytest.mark.parametrize("bits", (Bits(k=4), Bits(v=4)), ids=("keys only", "values only"))
def test_half_a_pair_stays_in_a_float_cache(bits):
    q, ids = quantised("llama", scheme="custom", bits=bits), tokens(1, 20, seed=2)
    assert all(isinstance(layer, FloatKVLayer) for layer in cache_of(q).layers)
    assert relative(in_steps(q.model, ids), q.model(ids).logits) < 1e-5
    assert kv_bytes_per_token(q.model) == 2 * 2 * 2 * 16 * 4


def test_right_padding_does_not_reach_real_tokens(kv_only):
    q, ids = kv_only["llama"], tokens(2, 12, seed=9)
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    padded = q.model(ids, attention_mask=mask, cache=cache_of(q)).logits
    alone = q.model(ids[:1, :8], cache=cache_of(q)).logits
    assert relative(padded[:1, :8], alone) < 1e-5


def test_a_sliding_window_decodes_as_it_prefills():
    base = tiny_model("mistral", sliding_window=9)
    q, ids = quantised("mistral", base=base, scheme="W4A4KV"), tokens(1, 30, seed=3)
    whole = q.model(ids).logits
    assert relative(whole, quantised("mistral", scheme="W4A4KV").model(ids).logits) > 0.01, "the window acts"
    assert relative(in_steps(q.model, ids, cache_of(q)), whole) < 1e-5


def test_one_sequence_does_not_see_another(kv_only):
    q, ids = kv_only["qwen2"], tokens(3, 15, seed=4)
    together = in_steps(q.model, ids, cache_of(q))
    for row in range(3):
        assert relative(in_steps(q.model, ids[row : row + 1], cache_of(q)), together[row : row + 1]) < 1e-5
