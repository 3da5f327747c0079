"""unpack(pack(codes)) is codes for every width of code and row, in exactly `bits` bits per code, laid out as documented."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import pack, packed_width, unpack

WIDTHS = (1, 2, 7, 8, 9, 63, 64, 100, 257)
PLANES = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}
"""Written again, by hand: the storage format that saved models rely on."""


def codes_of(bits: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def packed_by_hand(row: list[int], bits: int) -> list[int]:
    """The documented layout, one integer at a time."""
    result, shift = [], 0
    for plane in PLANES[bits]:
        per_byte = 8 // plane
        size = (len(row) + per_byte - 1) // per_byte
        parts = [(code >> shift) % 2**plane for code in row] + [0] * (size * per_byte - len(row))
        result += [sum(parts[j + i * size] << (plane * i) for i in range(per_byte)) for j in range(size)]
        shift += plane
    return result


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("width", WIDTHS)
def test_round_trip_and_width(bits, width):
    codes = codes_of(bits, 5, width)
    packed = pack(codes, bits)
    expected = sum((width * plane + 7) // 8 for plane in PLANES[bits])
    assert packed.shape == (5, expected) == (5, packed_width(width, bits))
    assert packed.dtype == torch.uint8 and packed.is_contiguous()
    assert torch.equal(unpack(packed, bits, width), codes)
    if width % 8 == 0:
        assert expected * 8 == width * bits, "no padding where planes divide the row"


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("width", (1, 6, 7, 13, 63))
def test_layout_is_the_documented_one(bits, width):
    codes = codes_of(bits, width, seed=width)
    assert pack(codes, bits).tolist() == packed_by_hand(codes.tolist(), bits)


def test_worked_example():
    assert pack(torch.arange(1, 7, dtype=torch.uint8), 4).tolist() == [4 << 4 | 1, 5 << 4 | 2, 6 << 4 | 3]


@pytest.mark.parametrize("bits", range(1, 9))
def test_extreme_codes_do_not_leak_into_neighbours(bits):
    high = 2**bits - 1
    for pattern in ([high, 0], [0, high], [high, high], [0, 0]):
        codes = torch.tensor(pattern * 9 + [high], dtype=torch.uint8)
        assert torch.equal(unpack(pack(codes, bits), bits, 19), codes)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), bits=st.integers(1, 8), rows=st.lists(st.integers(1, 3), max_size=3), width=st.integers(1, 130))
def test_round_trip_of_any_shape(data, bits, rows, width):
    codes = codes_of(bits, *rows, width, seed=data.draw(st.integers(0, 2**31)))
    before = codes.clone()
    packed = pack(codes, bits)
    assert packed.shape == (*rows, packed_width(width, bits))
    assert torch.equal(unpack(packed, bits, width), codes) and torch.equal(codes, before)


@pytest.mark.parametrize("bits", (3, 4, 7))
def test_strided_codes_and_strided_bytes(bits):
    codes = codes_of(bits, 40, 2, 11)
    view = codes.transpose(0, 1)[:, ::3]
    assert torch.equal(unpack(pack(view, bits), bits, 11), view)
    slots = torch.zeros(2, 30, packed_width(11, bits), dtype=torch.uint8)
    slots[:, 5:19] = pack(view, bits)
    assert torch.equal(unpack(slots[:, 5:19], bits, 11), view)


def test_empty_rows_stay_empty():
    assert unpack(pack(torch.zeros(0, 10, dtype=torch.uint8), 3), 3, 10).shape == (0, 10)


@pytest.mark.parametrize("bits", (0, 9, 16, -1))
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match="1 to 8"):
        pack(torch.zeros(4, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match="1 to 8"):
        packed_width(4, bits)


@pytest.mark.parametrize("dtype", (torch.int8, torch.int32, torch.float32))
def test_other_types_are_refused(dtype):
    with pytest.raises(ValueError, match="uint8"):
        pack(torch.zeros(4, dtype=dtype), 4)


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="takes 4 bytes, not 5"):
        unpack(torch.zeros(5, dtype=torch.uint8), 4, 8)
