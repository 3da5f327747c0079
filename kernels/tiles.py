"""Choose the tiles of Triton kernels per call; nothing is tuned at import, and no device is needed.

The numbers follow offline sm_90 compiles (warp-group matrix instructions where they apply; registers, spills and shared memory
are checked by tests/kernels/test_compile_sm90.py) and the rule of one to two waves over the GPU's multiprocessors; they are
not tuned by timing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from kernels._triton import interpreting

DECODE_ROWS = 16
"""Rows up to which a product is bound by reading the weight: one narrow tile holds all of them."""


@dataclass(frozen=True)
class Tile:
    """The part of a product W x that one program computes: `rows` of W, `columns` tokens, `block` packed bytes per step.

    `split` programs share the reduction of one tile; `warps` and `stages` are Triton's launch options.
    """

    rows: int
    columns: int
    block: int
    warps: int
    stages: int
    split: int = 1


def decode_tile(rows: int, steps_of: int, *, block: int, device: torch.device) -> Tile:
    """Choose the tile of a product with at most DECODE_ROWS tokens.

    Args:
        rows: N, rows of the weight.
        steps_of: bytes (or columns) that one row is reduced over.
        block: bytes of a row per step.
        device: decides how many programs fill it.
    """
    tiles, steps = -(-rows // 64), -(-steps_of // block)
    split = max(1, min(steps // 2, 2 * multiprocessors(device) // tiles, 16))
    return Tile(rows=64, columns=DECODE_ROWS, block=block, warps=4, stages=4, split=split)


def row_warps(block: int) -> int:
    """Choose the warps of a program that holds a row of `block` float32 entries in registers.

    A thread holds at most 32 entries for blocks of up to 32,768.
    """
    return next((warps for most, warps in ((2048, 4), (8192, 8), (16384, 16)) if block <= most), 32)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Count the multiprocessors of a CUDA device; for any other, return 4, for the interpreter."""
    if interpreting() or device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
