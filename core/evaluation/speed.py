"""How fast decoding can be at most: each new token reads all weights and the whole cache, so memory bandwidth is a limit.

    limit = bandwidth / (weight bytes + cache bytes)        tokens per second, one sequence

The bandwidth is measured by copying a buffer, bytes read and written both counted. A model that fits into the processor's
cache may exceed the limit of a machine whose cache is smaller than `COPY_BYTES`; a slow backend stays far below it.
"""

from __future__ import annotations

import time
from functools import cache

import torch
from transformers import PreTrainedModel

from core.evaluation.memory import measured_parts
from core.evaluation.report import SpeedLimit
from core.models.adapter import ModelAdapter
from core.models.quantized import modules_of

COPY_BYTES = 64 * 2**20
REPEATS = 3


@cache
def copy_bandwidth(nbytes: int = COPY_BYTES) -> float:
    """Bytes read and written per second by the fastest of `REPEATS` copies; measured once per process (about 0.1 s when idle)."""
    source = torch.ones(nbytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    target.copy_(source)  # maps the pages
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return 2 * nbytes / min(seconds)


def bytes_per_token(model: PreTrainedModel, adapter: ModelAdapter) -> int:
    """Bytes of weights that one token reads: a working copy instead of the packed weights where a backend keeps one.

    Of an embedding table that is not the head as well, a token reads one row: it is left out.
    """
    total = sum(measured_parts(model, adapter).values())
    for linear in modules_of(model):
        if linear.working_bytes:
            total += linear.working_bytes - round(linear.effective_bits * linear.in_features * linear.out_features / 8)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return total - (0 if table.data_ptr() == head.data_ptr() else table.numel() * table.element_size())


def speed_limit(model: PreTrainedModel, adapter: ModelAdapter, key: str) -> SpeedLimit:
    """The limit of a model as it runs now; call it after the model has run, when working copies exist."""
    return SpeedLimit(key, bytes_per_token(model, adapter), copy_bandwidth(), torch.get_num_threads())
