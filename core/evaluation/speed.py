"""How fast decoding can be at most: each new token reads all weights and the whole cache, so memory bandwidth is a limit.

    limit = bandwidth / (weight bytes + cache bytes)        tokens per second, one sequence

The bandwidth is that of the memory where the model is, measured by copying a buffer, bytes read and written both counted. A model
that fits into the cache may exceed the limit of a machine whose cache is smaller than `COPY_BYTES`; a slow backend stays far
below it.
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
"""More than the caches hold: of the processor, of the GPU."""
REPEATS = 3


@cache
def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by the fastest of `REPEATS` copies in the memory of a device; measured once per process
    (about 0.1 s when idle)."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = source.clone()  # maps the pages
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
    """Bytes of weights that one token reads: `decode_bytes` of the low-bit layers, everything else as it is stored.

    Of an embedding table that is not the head as well, a token reads one row: it is left out.
    """
    total = sum(measured_parts(model).values())
    for linear in modules_of(model):
        total += linear.decode_bytes - linear.stored_bytes
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return total - (0 if table.data_ptr() == head.data_ptr() else table.numel() * table.element_size())


def speed_limit(model: CausalModel, key: str) -> SpeedLimit:
    """The limit of a model as it runs now; call it after the model has run, when working copies exist."""
    return SpeedLimit(key, bytes_per_token(model), copy_bandwidth(model.device), torch.get_num_threads())
