"""Quantise new keys or values and store them in their slots, in one pass: the op `kv_append`."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels._triton import rows_strided
from kernels.backend import Backend, use_triton
from kernels.codes import quantize, quantize_rows
from kernels.kv.heads import PackedHeads
from kernels.packing import pack
from kernels.packing.kernel import launch_pack


def kv_append(states: Tensor, heads: PackedHeads, position: int | Tensor, *, backend: Backend = Backend.AUTO) -> None:
    """Quantise new keys or values and store them in their slots.

    Args:
        states: [B, Hkv, t, E] floating.
        heads: the store; `packed` and `row_scale` are written.
        position: first slot, or a [1] int32 tensor with it (for captured graphs; Triton only).
    Raises: ValueError if TRITON is asked for where it cannot run.
    """
    if use_triton(backend, states):
        slot = position if isinstance(position, Tensor) else None
        start = 0 if slot is not None else position
        scale = None if heads.row_scale is None else heads.row_scale[:, :, start:]
        launch_pack(
            rows_strided(states), heads.packed[:, :, start:], bits=heads.bits, scale=heads.scale, zero_point=heads.zero_point,
            row_scale=scale, slot=slot,
        )  # fmt: skip
        return
    slots = slice(int(position), int(position) + states.shape[2])
    if heads.row_scale is None:
        codes = quantize(states.to(torch.float32), heads.scale[:, None], heads.zero_point[:, None], 0, 2**heads.bits - 1)
        codes = codes.to(torch.uint8)
    else:
        codes, heads.row_scale[:, :, slots] = quantize_rows(states, heads.bits)
    heads.packed[:, :, slots] = pack(codes, heads.bits)
