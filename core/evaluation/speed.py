"""Compute how fast decoding can be: each new token reads all weights and the whole KV cache from memory.

    limit = bandwidth / (weight bytes + cache bytes)        tokens per second, one sequence

The bandwidth is that of the memory that holds the model, measured by copying a buffer, bytes read and written both counted. A
model that fits into the processor's cache may exceed the limit where that cache is smaller than `COPY_BYTES`; a slow backend
stays far below it.
"""

from __future__ import annotations

import time
from functools import cache

import torch

from core.evaluation.memory import measured_parts
from core.models.decoder import CausalModel
from core.models.io.quantized import modules_of
from core.report import SpeedLimit

COPY_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}
"""Bytes of the copied buffer by device type: more than the caches of a processor or GPU hold."""
REPEATS = 3


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Measure the bytes read and written per second by the fastest of `REPEATS` copies in a device's memory; once per process
    (about 0.1 s when idle)."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = source.clone()  # a copy touches every page before the clock starts
    seconds = []
    for _ in range(REPEATS):
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(seconds)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bytes_per_token(model: CausalModel) -> int:
    """Count the bytes of weights that one token reads: `decode_bytes` of the low-bit layers, all other tensors as stored.

    An embedding table that is not also the head is left out, as a token reads one row of it.
    """
    total = sum(measured_parts(model).values())
    for linear in modules_of(model):
        total += linear.decode_bytes - linear.stored_bytes
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return total - (0 if table.data_ptr() == head.data_ptr() else table.numel() * table.element_size())


def speed_limit(model: CausalModel, key: str) -> SpeedLimit:
    """Measure the limit of a model as it runs now; call it after the model has run, when its working copies exist."""
    return SpeedLimit(key, bytes_per_token(model), copy_bandwidth(model.device), torch.get_num_threads())
