"""Attention over packed keys and values against float64 on the dequantised ones, and what appending stores."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kernels import Backend, decode_attention, kv_append, packed_width
from kernels.kv import PackedHeads, attention

pytestmark = pytest.mark.gpu


def store(states, bits, *, dynamic, first, room=0, seed=0):
    """Empty slots full of garbage, then the reference's append."""
    g = torch.Generator().manual_seed(seed)
    batch, heads, tokens, dim = states.shape
    slots = tokens - (first if dynamic else 0)
    packed = torch.randint(0, 256, (batch, heads, slots + room, packed_width(dim, bits)), generator=g).to(torch.uint8)
    held = states[:, :, :first].clone() if first else None
    if dynamic:
        scale = torch.full((batch, heads, slots + room, 1), float("nan"), dtype=torch.float16)
        heads = PackedHeads(packed, bits, dim, row_scale=scale, first=held)
    else:
        low, high = states.amin((0, 2)), states.amax((0, 2))
        scale = ((high - low) / (2**bits - 1)).clamp(min=1e-3)
        heads = PackedHeads(packed, bits, dim, scale=scale, zero_point=(-low / scale).round(), first=held)
    kv_append(states[:, :, first:] if dynamic else states, heads, 0, backend=Backend.REFERENCE)
    return heads, slots


def to(heads, device):
    moved = {f.name: getattr(heads, f.name) for f in dataclasses.fields(heads)}
    return PackedHeads(**{n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in moved.items()})


def exact(q, keys, values, slots, scaling):
    k, v = keys.states(slots).double(), values.states(slots).double()
    q = q.double().unflatten(1, (k.shape[1], -1))
    return (torch.softmax(q @ k.transpose(2, 3) * scaling, dim=-1) @ v).flatten(1, 2)


CASES = {  # batch, kv heads, group, tokens, dim, key bits, value bits, first tokens, free slots
    "one token": (1, 1, 1, 2, 16, 4, 4, 0, 0),
    "grouped heads": (2, 2, 3, 70, 32, 4, 4, 0, 5),
    "three bits": (1, 2, 4, 65, 64, 3, 3, 1, 9),
    "odd head": (1, 3, 1, 40, 20, 3, 4, 2, 0),
    "many splits": (1, 1, 2, 700, 16, 4, 3, 1, 30),
    "eight bits": (1, 2, 2, 40, 16, 8, 8, 1, 3),
    "planes of every width": (1, 1, 1, 35, 24, 7, 5, 0, 0),
    "more first tokens than one tile": (1, 2, 2, 60, 16, 4, 6, 37, 2),
    "more queries than one tile": (1, 2, 19, 33, 16, 4, 4, 1, 0),
    "wide heads": (1, 1, 2, 40, 160, 4, 3, 1, 0),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", CASES)
def test_attention_equals_float64_on_the_stored_values(case, dynamic, device):
    batch, kv_heads, group, tokens, dim, key_bits, value_bits, first, room = CASES[case]
    g = torch.Generator().manual_seed(0)
    k, v = (torch.randn(batch, kv_heads, tokens, dim, generator=g) + torch.randn(dim, generator=g) * 3 for _ in range(2))
    k[0, 0, 1], v[0, 0, 1] = 0.0, 0.0
    keys, slots = store(k, key_bits, dynamic=dynamic, first=first, room=room)
    values, _ = store(v, value_bits, dynamic=dynamic, first=first, room=room, seed=1)
    q = torch.randn(batch, kv_heads * group, dim, generator=g)
    expected = exact(q, keys, values, slots, dim**-0.5)
    for filled in (slots, torch.tensor([slots], dtype=torch.int32, device=device)):
        y = decode_attention(
            q.to(device), to(keys, device), to(values, device), filled, scaling=dim**-0.5, backend=Backend.TRITON
        )
        assert y.shape == q.shape and (y.cpu() - expected).abs().max() < 2e-5 * expected.abs().max()  # measured 4e-6
    y = decode_attention(q, keys, values, slots, scaling=dim**-0.5)
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("bits", [(4, 3), (8, 4), (3, 8), (7, 8)], ids=str)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_bfloat16_queries_take_the_shifted_codes(dynamic, bits, device):
    g = torch.Generator().manual_seed(1)
    k, v = (torch.randn(1, 2, 130, 32, generator=g) for _ in range(2))
    keys, slots = store(k, bits[0], dynamic=dynamic, first=1)
    values, _ = store(v, bits[1], dynamic=dynamic, first=1)
    q = torch.randn(1, 4, 32, generator=g).to(torch.bfloat16)
    y = decode_attention(q.to(device), to(keys, device), to(values, device), slots, scaling=0.2, backend=Backend.TRITON)
    expected = exact(q, keys, values, slots, 0.2)
    assert y.dtype is torch.bfloat16 and (y.cpu() - expected).abs().max() < 1e-2 * expected.abs().max()


@pytest.mark.parametrize("bits", [3, 4, 7, 8])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_appending_stores_the_reference_s_bytes(dynamic, bits, device):
    g = torch.Generator().manual_seed(2)
    states = torch.randn(2, 6, 3, 20, generator=g).transpose(1, 2)  # [B, Hkv, t, E], not contiguous
    one, _ = store(states.contiguous(), bits, dynamic=dynamic, first=0, room=4)
    other = to(one, device)
    more = torch.randn(2, 3, 2, 20, generator=g)
    before = one.packed.clone()
    kv_append(more, one, 6, backend=Backend.REFERENCE)
    for position in (6, torch.tensor([6], dtype=torch.int32, device=device)):
        other.packed[:, :, 6:8] = 0xEE
        kv_append(more.to(device), other, position, backend=Backend.TRITON)
        assert torch.equal(other.packed.cpu(), one.packed)
        assert torch.equal(one.packed[:, :, :6], before[:, :, :6]) and torch.equal(one.packed[:, :, 8:], before[:, :, 8:])
    if dynamic:
        assert torch.equal(other.row_scale[:, :, 6:8].cpu(), one.row_scale[:, :, 6:8])


def test_float16_queries_are_multiplied_in_float32(device):
    g = torch.Generator().manual_seed(4)
    keys, slots = store(torch.randn(1, 2, 40, 32, generator=g), 4, dynamic=False, first=1)
    q = torch.randn(1, 4, 32, generator=g).to(torch.float16)
    y = decode_attention(q.to(device), to(keys, device), to(keys, device), slots, scaling=0.2, backend=Backend.TRITON)
    expected = exact(q, keys, keys, slots, 0.2)
    assert y.dtype is torch.float16 and (y.cpu() - expected).abs().max() < 1e-3 * expected.abs().max()
    assert attention._tile(128, torch.float16, (4, 4)) == attention._tile(128, torch.float32, (4, 4))


def test_growing_by_a_token_compiles_nothing(monkeypatch, device):
    """Triton compiles a kernel for every set of constants; numbers of tokens and of shares are none."""
    seen = {"_attend_kernel": set(), "_merge_kernel": set()}
    for name, constants in seen.items():
        kernel = getattr(attention, name)  # interpreted or compiled
        plain = kernel.kwargs["do_not_specialize"] if hasattr(kernel, "kwargs") else kernel.do_not_specialize
        assert "SPLITS" in plain and ("SLOTS" in plain or name == "_merge_kernel")

        class Noted:
            def __getitem__(self, grid, constants=constants):
                return lambda *arguments, **options: constants.add(tuple(options.items()))

        monkeypatch.setattr(attention, name, Noted())
    monkeypatch.setattr(attention, "multiprocessors", lambda device: 132)
    q = torch.zeros(1, 8, 16, device=device)
    store = torch.zeros(1, 2, 4096, 8, dtype=torch.uint8, device=device)
    heads = PackedHeads(store, 4, 16, *(torch.ones(2, 16, device=device) for _ in range(2)))
    for slots in range(100, 4096, 50):
        attention.launch(q, heads, heads, slots, 1.0)
    assert [len(constants) for constants in seen.values()] == [1, 1]


def test_what_does_not_fit_is_said():
    states = torch.randn(1, 1, 4, 16)
    keys, slots = store(states, 8, dynamic=True, first=0)
    wide, _ = store(torch.randn(1, 1, 4, 300), 4, dynamic=False, first=0)
    with pytest.raises(ValueError, match="heads of 300 channels.* takes up to 256"):
        decode_attention(torch.zeros(1, 1, 300), wide, wide, slots, scaling=1.0, backend=Backend.TRITON)
    with pytest.raises(ValueError, match="different ways"):
        decode_attention(torch.zeros(1, 1, 16), keys, store(states, 8, dynamic=False, first=0)[0], slots, scaling=1.0)
    with pytest.raises(ValueError, match="do not fit"):
        decode_attention(torch.zeros(1, 1, 8), keys, keys, slots, scaling=1.0)
