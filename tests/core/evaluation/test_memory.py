"""Oracle 11: the published sizes by formula, to the printed digit, and measured bytes against a count by hand."""

from __future__ import annotations

import pytest
import torch

from core.errors import InputError
from core.evaluation.memory import (
    CLAIMS,
    PROJECTED,
    estimate,
    kv_bytes_per_token,
    largest_batch,
    measured_parts,
    memory_grid,
    working_bytes,
)
from core.evaluation.shapes import SHAPES, find_shape, shape_of
from core.models.io.quantized import parameters_of
from core.models.tiny import tiny_model
from core.recipe import SCHEMES, Bits
from kernels import Backend, packed_width
from tests.core.tools import ARCHITECTURES, quantised, spec_of, tiny, tokens

PLACES = [(b, s) for b in (1, 8, 64) for s in (2048, 4096, 8192)]

GRID = """
13b W16A16 27.4 29.1 32.4 39.1 52.6 79.4 133.1 240.5 455.2
13b W4A16 8.1 9.8 13.1 19.8 33.3 60.1 113.8 221.2 435.9
13b W4A8 7.3 8.1 9.8 13.1 19.8 33.3 60.1 113.8 221.2
13b W4A4 6.8 7.3 8.1 9.8 13.1 19.8 33.3 60.1 113.8
13b W4A4KV 6.8 7.3 8.1 9.8 13.1 19.8 33.3 60.1 113.8
13b W4A3KV 6.7 7.1 7.7 8.9 11.5 16.5 26.6 46.7 87.0
13b W3A3KV 5.1 5.4 6.1 7.3 9.9 14.9 25.0 45.1 85.4
30b W16A16 62.8 65.6 71.2 82.5 105.0 150.1 240.3 420.7 781.5
30b W4A16 17.8 20.6 26.3 37.5 60.1 105.2 195.4 375.8 736.5
30b W4A8 16.4 17.8 20.6 26.3 37.5 60.1 105.2 195.4 375.8
30b W4A4 15.7 16.4 17.8 20.6 26.3 37.5 60.1 105.2 195.4
30b W4A4KV 15.7 16.4 17.8 20.6 26.3 37.5 60.1 105.2 195.4
30b W4A3KV 15.5 16.0 17.1 19.2 23.4 31.9 48.8 82.6 150.3
30b W3A3KV 11.8 12.3 13.4 15.5 19.7 28.2 45.1 78.9 146.5
66b W16A16 136.3 141.1 150.8 170.1 208.7 286.1 440.7 749.9 1368.4
66b W4A16 37.7 42.5 52.2 71.5 110.2 187.5 342.1 651.3 1269.8
66b W4A8 35.3 37.7 42.5 52.2 71.5 110.2 187.5 342.1 651.3
66b W4A4 34.1 35.3 37.7 42.5 52.2 71.5 110.2 187.5 342.1
66b W4A4KV 34.1 35.3 37.7 42.5 52.2 71.5 110.2 187.5 342.1
66b W4A3KV 33.8 34.7 36.5 40.1 47.4 61.9 90.8 148.8 264.8
66b W3A3KV 25.6 26.5 28.3 31.9 39.1 53.6 82.6 140.6 256.6
175b W16A16 358.9 368.5 387.9 426.5 503.8 658.4 967.7 1586.2 2823.1
175b W4A16 97.0 106.6 126.0 164.6 241.9 396.5 705.8 1324.3 2561.2
175b W4A8 92.1 97.0 106.6 126.0 164.6 241.9 396.5 705.8 1324.3
175b W4A4 89.7 92.1 97.0 106.6 126.0 164.6 241.9 396.5 705.8
175b W4A4KV 89.7 92.1 97.0 106.6 126.0 164.6 241.9 396.5 705.8
175b W4A3KV 89.1 90.9 94.5 101.8 116.3 145.3 203.3 319.2 551.2
175b W3A3KV 67.3 69.1 72.7 80.0 94.5 123.5 181.4 297.4 529.3
"""
"""The published accounting: weights and cache in GB = 10^9 bytes; columns (batch 1; 2k, 4k, 8k), (8; ...), (64; ...)."""

ROWS = [line.split() for line in GRID.strip().splitlines()]


def gigabytes(size: str, scheme: str, batch: int, sequence: int) -> float:
    (made,) = memory_grid(SHAPES[f"opt-{size}"], (scheme,), (batch,), (sequence,))
    return (made.weights + made.kv_cache) / 1e9


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r[0]} {r[1]}")
def test_every_cell_of_the_grid(row):
    size, scheme, *cells = row
    for (batch, sequence), cell in zip(PLACES, cells, strict=True):
        assert abs(gigabytes(size, scheme, batch, sequence) - float(cell)) <= 0.05 + 1e-6, (batch, sequence)


def test_nine_hundred_gigabytes():
    """OPT-66b, batch 64, 8192 tokens: 927.7 GB decimal, 864.0 GiB, without any activation."""
    saved = gigabytes("66b", "W4A16", 64, 8192) - gigabytes("66b", "W4A4", 64, 8192)
    assert saved == pytest.approx(927.7, abs=0.05) and saved * 1e9 / 2**30 == pytest.approx(864.0, abs=0.05)


@pytest.mark.parametrize("scheme, percent", [("W4A4", 75.0), ("W4A4KV", 75.0), ("W4A3KV", 80.5), ("W3A3KV", 81.3)])
def test_reductions_for_175b(scheme, percent):
    full, low = gigabytes("175b", "W16A16", 64, 8192), gigabytes("175b", scheme, 64, 8192)
    assert 100 * (1 - low / full) == pytest.approx(percent, abs=0.05)


@pytest.mark.parametrize(
    "size, billions, megabytes", [("13b", 12.85, 0.819), ("30b", 29.97, 1.376), ("66b", 65.72, 2.359), ("175b", 174.60, 4.719)]
)
def test_parameters_and_cache_per_token(size, billions, megabytes):
    shape = SHAPES[f"opt-{size}"]
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=0.005)
    d, layers = shape.hidden, shape.layers
    assert shape.parameters == layers * (12 * d * d + 13 * d) + 50272 * d + 2050 * d + 2 * d
    assert estimate(shape, Bits(), batch=1, sequence=1).kv_cache / 1e6 == pytest.approx(megabytes, abs=5e-4)


def test_the_input_of_the_output_projection_is_as_wide_as_the_heads():
    """Qwen3's heads are wider together than its hidden states."""
    loaded = tiny("qwen3")
    spec = spec_of(loaded)
    made = estimate(shape_of(spec, 2, 259, tied=False), SCHEMES["W4A4"], batch=3, sequence=5)
    assert spec.width("o_in") == 2 * spec.hidden and made.activations == 15 * (spec.ffn + spec.width("o_in")) // 2


def test_activations_are_one_layers_widest_tensors():
    shape = find_shape("opt-13b")
    assert estimate(shape, Bits(), batch=2, sequence=10).activations == 20 * (4 + 1) * 5120 * 2
    made = estimate(shape, SCHEMES["W4A4"], batch=2, sequence=10)
    assert made.activations == 20 * (4 + 1) * 5120 // 2 and made.total == made.weights + made.kv_cache + made.activations
    mixed = estimate(shape, Bits(k=3, v=8, o_in=4), batch=2, sequence=10)
    assert mixed.kv_cache == 40 * 20 * 5120 * 11 // 8 and mixed.activations == 20 * 5120 * (4 * 16 + 4) // 8
    assert made.to_dict() == {
        **{"scheme": "custom", "batch": 2, "sequence": 10, "weights": made.weights, "kv_cache": made.kv_cache},
        **{"activations": made.activations, "total": made.total},
    }


def test_the_published_claims_hold_without_and_with_activations():
    """GB are decimal: 900 GiB would need activations too. 80 % holds for weights and cache, not for one layer's activations."""
    saved, share = (claim.check() for claim in CLAIMS)
    gone = sum(getattr(saved[0], part) - getattr(saved[1], part) for part in ("weights", "kv_cache"))
    assert gone / 1e9 == pytest.approx(927.7, abs=0.05) and saved[0].total - saved[1].total > gone
    low, full = ((cell.weights + cell.kv_cache) for cell in reversed(share))
    assert 1 - low / full == pytest.approx(0.805, abs=5e-4)
    assert 1 - share[1].total / share[0].total == pytest.approx(0.787, abs=5e-4)


def test_a_grid_has_every_place_once_and_the_largest_batch_just_fits():
    shape, schemes, batches, sequences = SHAPES["opt-13b"], ("W16A16", "W4A4"), (1, 3), (5, 7, 9)
    cells = memory_grid(shape, schemes, batches, sequences)
    assert [(c.scheme, c.batch, c.sequence) for c in cells] == [(a, b, s) for a in schemes for b in batches for s in sequences]
    assert all(c == estimate(shape, PROJECTED[c.scheme], batch=c.batch, sequence=c.sequence, scheme=c.scheme) for c in cells)
    most = largest_batch(shape, "W4A4", sequence=4096, memory=24 * 10**9)
    one, more = memory_grid(shape, ("W4A4",), (most, most + 1), (4096,))
    assert one.total <= 24 * 10**9 < more.total and largest_batch(shape, "W16A16", sequence=1, memory=10**9) == 0


@pytest.mark.parametrize("name", ("batch", "sequence"))
@pytest.mark.parametrize("value", (0, -1, 10**8, 1.5, "3", True, None, float("nan")))
def test_batches_and_sequences_out_of_range_are_refused(name, value):
    with pytest.raises(InputError) as caught:
        estimate(find_shape("opt-13b"), Bits(), **({"batch": 1, "sequence": 1} | {name: value}))
    assert caught.value.code == f"E-PARAM-{name.upper()}"


def test_unknown_schemes_are_refused():
    with pytest.raises(InputError, match="W16A16") as caught:
        memory_grid(SHAPES["opt-13b"], ("W4A4", "W5A5"), (1,), (1,))
    assert caught.value.code == "E-PARAM-SCHEME"


# Measured.


def distinct(model) -> int:
    """Bytes of every saved tensor of a model, shared storages once."""
    seen = {t.data_ptr(): t.numel() * t.element_size() for t in model.state_dict(keep_vars=True).values()}
    return sum(seen.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_float_model_weighs_its_parameters(architecture):
    loaded = tiny(architecture)
    parts = measured_parts(loaded.model)
    assert sum(parts.values()) == distinct(loaded.model) == 4 * parameters_of(loaded.model)
    assert "packed weights" not in parts and "scales and zero points" not in parts
    layer = loaded.model.blocks[0]
    assert parts["decoder weights (float)"] == 2 * 4 * sum(p.numel() for p in layer.parameters() if p.dim() == 2)


@pytest.mark.parametrize(
    "recipe",
    (
        {},
        {"variant": "official"},
        {"scheme": "W4A4KV"},
        {"method": "rtn"},
        {"scheme": "custom", "bits": Bits(k=4, v=4)},
        {"scheme": "custom", "bits": Bits(weights=8)},
    ),
    ids=("default", "official", "kv", "rtn", "float weights", "w8"),
)
@pytest.mark.parametrize("architecture", ("llama", "opt"))
def test_a_quantised_model_weighs_its_tensors(architecture, recipe):
    q = quantised(architecture, layers=1, **recipe)
    parts = measured_parts(q.model)
    assert sum(parts.values()) == distinct(q.model)
    spec, block, bits = spec_of(q.base), q.blocks[0], q.recipe.tensor_bits.weights
    sizes = {
        "qkv": (spec.width("q") + 2 * spec.width("k"), spec.hidden),
        "o": (spec.hidden, spec.width("o_in")),
        "up": ((2 if spec.gated else 1) * spec.ffn, spec.hidden),
        "down": (spec.hidden, spec.ffn),
    }
    if bits == 16:
        assert parts["decoder weights (float)"] == 4 * sum(n * k for n, k in sizes.values()) and "packed weights" not in parts
    else:
        assert parts["packed weights"] == sum(n * packed_width(k, bits) for n, k in sizes.values())
        assert "decoder weights (float)" not in parts
        scale_bytes, groups = (
            (4 if recipe.get("variant") == "official" else 2),
            {n: x.weight_scale.shape[1] for n, x in block.linears().items()},
        )
        zeros = sum(t.numel() * t.element_size() for t in (x.weight_zero for x in block.linears().values()))
        quantizers = [x.quantizer for x in block.linears().values()]
        quantizers += [getattr(block.attention, f"{site}_quantizer") for site in "qkv"]
        activations = sum(8 * len(x.scale) for x in quantizers if x is not None)
        assert (
            parts["scales and zero points"] == sum(sizes[n][0] * g * scale_bytes for n, g in groups.items()) + zeros + activations
        )


def test_running_does_not_change_what_a_model_weighs():
    q = quantised("llama", layers=1)
    before = measured_parts(q.model)
    assert working_bytes(q.model) == 0
    q.model(tokens(1, 8))
    spec = spec_of(q.base)
    weights = spec.hidden * (2 * spec.width("q") + 2 * spec.width("k")) + 3 * spec.hidden * spec.ffn
    assert measured_parts(q.model) == before and working_bytes(q.model) == 4 * weights
    for linear in q.blocks[0].linears().values():
        assert linear.choice.backend is Backend.REFERENCE
        linear.release()
    assert working_bytes(q.model) == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cache_bytes_of_a_float_model(architecture):
    loaded = tiny(architecture)
    spec = spec_of(loaded)
    assert kv_bytes_per_token(loaded.model) == 2 * 2 * spec.kv_heads * spec.head_dim * 4
    half = tiny_model(architecture)
    half.model.to(torch.bfloat16)
    assert kv_bytes_per_token(half.model) == 2 * 2 * spec.kv_heads * spec.head_dim * 2


@pytest.mark.parametrize("scheme, expected", [("W4A16", 512), ("W4A8", 128), ("W4A4", 64), ("W4A3KV", 48)])
def test_cache_bytes_of_a_quantised_model_are_the_formula(scheme, expected):
    """Two layers, two kv heads of 16, keys and values: 128 numbers per token. What is not quantised is float32 here."""
    q = quantised("llama", scheme=scheme)
    assert kv_bytes_per_token(q.model) == expected
    if scheme != "W4A16":
        shape = shape_of(spec_of(q.base), 2, 259, tied=False)
        assert expected == estimate(shape, q.recipe.tensor_bits, batch=1, sequence=1).kv_cache
