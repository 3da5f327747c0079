"""Capture one decoding step as a CUDA graph: one launch instead of some twenty kernels per layer.

Capturing has four conditions, which are met here: inputs (token, position, place in the cache) are tensors on the device that
change between replays; nothing waits for the device; the cache is allocated in full before; and what is built on first use
(working copies, compiled kernels, cuBLAS handles) is built by warm-up runs on a side stream, which write the slot that the
first replay writes again.
Not yet run on a GPU: the step with static inputs is tested without its capture.
"""

from __future__ import annotations

import torch
from torch import Tensor

from core.models.decoder import CausalModel
from core.quant.kv_cache import KVCache
from kernels import Backend
from kernels.backend import triton_unsupported_reason

WARM_UPS = 3
FEWEST_TOKENS = 16
"""Least number of new tokens for which warm-ups and capture pay."""


class DecodeStep:
    """One token's decoding with static inputs, for one sequence whose prompt is in `cache`; `capture` records it as a graph.

    Args:
        room: tokens that will be decoded at most.
    Attributes:
        left: how many of `room` may still come.
    """

    def __init__(self, model: CausalModel, cache: KVCache, room: int) -> None:
        self.model, self.cache, self.device, self.left = model, cache, model.device, room
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self.position = torch.full((1, 1), cache.get_seq_length(), dtype=torch.int64, device=self.device)
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
        """Decode one token and return the next one's scores [V]; the next call overwrites them.

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
        decoder = self.model.decoder
        return decoder.head(decoder(self.token, self.cache, self.position))


def unsupported_reason(model: CausalModel, cache: KVCache, room: int) -> str | None:
    """Say why a model's step cannot be captured; None if no reason is known."""
    reason = triton_unsupported_reason(model.device)
    if reason is not None:
        return reason
    if room < FEWEST_TOKENS:
        return f"{room} new tokens do not pay for it"
    if not all(layer.packed for layer in cache.layers):
        return "the cache grows, because keys and values are not packed"
    blocks, length = model.blocks, cache.get_seq_length()
    if any(length < block.attention.sink_tokens for block in blocks):
        return "the prompt ends among the tokens that stay in float"
    window = min((w for block in blocks if (w := block.attention.window) is not None), default=None)
    if window is not None and length + room >= window:
        return f"{length + room} tokens leave the window of {window}"
    if any(block.spec.softcap is not None for block in blocks):
        return "attention scores are capped"
    if any(block.experts for block in blocks):
        return "which experts run depends on the token"
    if any(block.attention.qkv.requested is Backend.REFERENCE for block in blocks):
        return "the reference was asked for by name"
    reasons = (layer.unsupported_reason(block.attention.softmax_bits) for layer, block in zip(cache.layers, blocks, strict=True))
    return next(filter(None, reasons), None)


def captured_step(model: CausalModel, cache: KVCache, room: int) -> tuple[DecodeStep | None, str]:
    """Capture a decoding step where that is possible.

    Returns: the step or None, and how kernels are launched: "a graph per token", or "one by one" and why; "" on a CPU.

    Args:
        cache: filled by the prompt's pass, one sequence. It stays pinned to the step: see `KVCache.pin`.
        room: tokens that will be decoded at most.
    """
    if model.device.type == "cpu":
        return None, ""
    reason = unsupported_reason(model, cache, room)
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
