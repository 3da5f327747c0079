"""Measure from how many columns per cluster INT8 is faster than REFERENCE on this processor."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from kernels.linear.int8 import ROWS_TO_SHARE, TILE, Int8Operands
from kernels.linear.operands import ReferenceOperands

COLUMNS = (512, 384, 256, 192, 128, 96, 64, 48)
"""Columns per cluster that are tried, from the widest."""

NEVER = 2**31
"""Result where INT8 is slower at all of them."""

CLUSTERS, ROUNDS = 4, 5


def measure_least_columns(faster: Callable[[int], bool] | None = None) -> int:
    """Find the fewest columns per cluster of `COLUMNS` from which INT8 is faster than REFERENCE.

    Args: faster: decides for a number of columns; None times both, in a quarter of a second about.
    Returns: the last of `COLUMNS` before the first at which INT8 is slower; `NEVER` if that is the first one.
    """
    least = NEVER
    for columns in COLUMNS:
        if not (faster or int8_is_faster)(columns):
            break
        least = columns
    return least


@torch.inference_mode()
def int8_is_faster(columns: int) -> bool:
    """Time both backends alternately on one layer with `CLUSTERS` clusters of this many columns, as prefill calls it.

    The shortest time of each counts: the answer is kept for long, and a moment in which other programs run says little.
    """
    rows, outputs, width = 2 * ROWS_TO_SHARE, TILE[1], CLUSTERS * columns
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (outputs, width), generator=generator, dtype=torch.int8)
    x = torch.randint(-128, 128, (rows, width), generator=generator, dtype=torch.int8)
    int8 = Int8Operands(codes, torch.ones(CLUSTERS, outputs), None, None, tuple(range(0, width + 1, columns)))
    calls = ((int8.product, x), (ReferenceOperands(codes.float()).product, x.float()))
    times: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for (product, values), seconds in zip(calls, times, strict=True):
            start = time.perf_counter()
            product(values)
            seconds.append(time.perf_counter() - start)
    return min(times[0]) < min(times[1])
