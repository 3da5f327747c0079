"""One decoding step captured as a CUDA graph: the host launches it as a whole instead of some twenty kernels per layer.

Its inputs (token, position, place in the cache) are tensors on the device that change between replays; nothing in it waits for
the device; the cache has all its room before; and what is built on first use (working copies, compiled kernels, cuBLAS handles)
is built by warm-up runs on a side stream, which write the slot that the first replay writes again.

A pinned cache belongs to one sequence without padding: the mask handed in, a single value, keeps transformers from computing one
that depends on the length (versions below 5.19 make one whenever they are captured), and the blocks do not look at it.

Not yet run on a GPU: the step with static inputs is tested without its capture.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from core.models.adapter import ModelAdapter
from core.models.shell import quantized_blocks
from core.quant.kv_cache import QuantizedKVCache, QuantizedKVLayer
from kernels import Backend
from kernels.backend import triton_unsupported_reason

WARM_UPS = 3
FEWEST_TOKENS = 16
"""Fewer new tokens do not pay for the warm-ups and the capture."""


class DecodeStep:
    """A decoding step with static inputs, for one sequence whose prompt `cache` holds; captured by `capture`.

    Args:
        room: tokens that will be decoded at most.
    Attributes:
        left: how many of them may still come.
    """

    def __init__(self, model: PreTrainedModel, cache: QuantizedKVCache, room: int) -> None:
        self.model, self.cache, self.device, self.left = model, cache, model.device, room
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self.position = torch.full((1, 1), cache.get_seq_length(), dtype=torch.int64, device=self.device)
        self.mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None
        cache.pin(room)

    @torch.inference_mode()
    def capture(self) -> None:
        """Record the step. Raises: one of `kernels._triton.ERRORS` if something in it cannot be compiled or captured."""
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
        """Store one token and return the next one's scores [V], overwritten by the next call.

        Raises: IndexError if the cache has no room for it.
        """
        if self.left == 0:
            raise IndexError(f"the cache is full with {self.cache.get_seq_length()} tokens: make a step with more room")
        self.left -= 1
        self.token.fill_(token)
        if self.graph is None:
            self.logits = self._forward()
        else:
            self.graph.replay()
        self.position += 1
        self.cache.advance()
        return self.logits[0, -1]

    def _forward(self) -> Tensor:
        inputs = {"input_ids": self.token, "position_ids": self.position, "attention_mask": self.mask}
        return self.model(**inputs, past_key_values=self.cache, use_cache=True).logits


def unsupported_reason(model: PreTrainedModel, adapter: ModelAdapter, cache: Cache, room: int) -> str | None:
    """Why a model's step cannot be captured, None if nothing is known against it."""
    reason = triton_unsupported_reason(model.device)
    if reason is not None:
        return reason
    if room < FEWEST_TOKENS:
        return f"{room} new tokens do not pay for it"
    if not isinstance(cache, QuantizedKVCache) or not all(isinstance(layer, QuantizedKVLayer) for layer in cache.layers):
        return "the cache grows, because keys and values are not packed"
    blocks, length = quantized_blocks(model, adapter), cache.get_seq_length()
    if any(length < block.sink_tokens for block in blocks):
        return "the prompt ends among the tokens that stay in float"
    window = getattr(model.config, "sliding_window", None)
    if window is not None and length + room >= window:
        return f"{length + room} tokens leave the window of {window}"
    if any(block.qkv.requested is Backend.REFERENCE for block in blocks):
        return "the reference was asked for by name"
    reasons = (layer.unsupported_reason(block.softmax_bits) for layer, block in zip(cache.layers, blocks, strict=True))
    return next(filter(None, reasons), None)


def captured_step(model: PreTrainedModel, adapter: ModelAdapter, cache: Cache, room: int) -> tuple[DecodeStep | None, str]:
    """The captured decoding step or None, and how kernels are launched: "a graph per token", or "one by one" and why; nothing
    on a CPU.

    Args:
        cache: filled by the prompt's pass, one sequence. It stays pinned to the step: see `QuantizedKVCache.pin`.
        room: tokens that will be decoded at most.
    """
    if model.device.type == "cpu":
        return None, ""
    reason = unsupported_reason(model, adapter, cache, room)
    if reason is not None:
        return None, f"one by one: {reason}"
    from kernels._triton import ERRORS

    try:
        step = DecodeStep(model, cache, room)
        step.capture()
    except ERRORS as error:
        cache.unpin()
        return None, f"one by one: the capture failed: {' '.join(str(error).split())[:200] or type(error).__name__}"
    return step, "a graph per token"
