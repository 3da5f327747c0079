"""One decoding step captured as a CUDA graph: the host launches it as a whole instead of some twenty kernels per layer.

Its inputs (token, position, place in the cache) are tensors on the device that change between replays; nothing in it waits for
the device; the cache has all its room before; and what is built on first use (working copies, compiled kernels, cuBLAS handles)
is built by warm-up runs on a side stream, which write the slot that the first replay writes again.

Not yet run on a GPU: the step with static inputs is tested without its capture.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from core.models.adapter import ModelAdapter
from core.models.shell import quantized_blocks
from core.quant.kv_cache import QuantizedKVCache, QuantizedKVLayer
from kernels.backend import triton_runs_on

logger = logging.getLogger(__name__)

WARM_UPS = 3
FEWEST_TOKENS = 16
"""Fewer new tokens do not pay for the warm-ups and the capture."""


class DecodeStep:
    """A decoding step with static inputs, for one sequence whose prompt `cache` holds; captured by `capture`.

    Args:
        room: tokens that will be decoded at most.
    """

    def __init__(self, model: PreTrainedModel, cache: QuantizedKVCache, room: int) -> None:
        self.model, self.cache, self.device = model, cache, model.device
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self.position = torch.full((1, 1), cache.get_seq_length(), dtype=torch.int64, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        cache.pin(room)

    @torch.inference_mode()
    def capture(self) -> None:
        """Record the step. Raises: RuntimeError of CUDA if something in it cannot be captured."""
        current, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._forward()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph):
            self.logits = self._forward()
        self.graph = graph

    @torch.inference_mode()
    def __call__(self, token: int) -> Tensor:
        """Store one token and return the next one's scores [V], overwritten by the next call."""
        self.token.fill_(token)
        if self.graph is None:
            self.logits = self._forward()
        else:
            self.graph.replay()
        self.position += 1
        self.cache.advance()
        return self.logits[0, -1]

    def _forward(self) -> Tensor:
        out = self.model(input_ids=self.token, position_ids=self.position, past_key_values=self.cache, use_cache=True)
        return out.logits


def obstacle(model: PreTrainedModel, adapter: ModelAdapter, cache: Cache, room: int) -> str | None:
    """Why a model's step cannot be captured, None if nothing is known against it."""
    if model.device.type != "cuda":
        return f"the model is on {model.device.type}"
    if not triton_runs_on("cuda"):
        return "Triton is not installed"
    if room < FEWEST_TOKENS:
        return f"{room} new tokens do not pay for it"
    if not isinstance(cache, QuantizedKVCache) or not all(isinstance(layer, QuantizedKVLayer) for layer in cache.layers):
        return "the cache grows, because keys and values are not packed"
    blocks, length = quantized_blocks(model, adapter), cache.get_seq_length()
    if any(block.softmax_bits < 16 for block in blocks):
        return "the softmax is quantised, which no kernel does"
    if any(length < block.sink_tokens for block in blocks):
        return "the prompt ends among the tokens that stay in float"
    window = getattr(model.config, "sliding_window", None)
    if window is not None and length + room >= window:
        return f"{length + room} tokens leave the window of {window}"
    return None


def captured_step(model: PreTrainedModel, adapter: ModelAdapter, cache: Cache, room: int) -> DecodeStep | None:
    """The captured decoding step, or None, and the reason in the log.

    Args:
        cache: filled by the prompt's pass, one sequence. It stays pinned to the step: see `QuantizedKVCache.pin`.
        room: tokens that will be decoded at most.
    """
    reason = obstacle(model, adapter, cache, room)
    if reason is None:
        step = DecodeStep(model, cache, room)
        try:
            step.capture()
            return step
        except RuntimeError as error:
            cache.unpin()
            reason = f"the capture failed: {str(error).splitlines()[0][:200]}"
    logger.info("Decoding launches its kernels one by one: %s.", reason)
    return None
