"""Everything of a causal model around its decoder layers, and ways to run with other layers in their place.

A quantised model is the same transformers model object graph with another list of layers; embeddings, final norm and
head are shared with the model it came from, never copied and never changed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from core.models.adapter import ModelAdapter
from core.models.block import DecoderBlock
from core.quant.kv_cache import QuantizedKVCache
from core.quant.kv_cache_dynamic import DynamicKVCache


def with_layers(model: PreTrainedModel, adapter: ModelAdapter, layers: Iterable[nn.Module]) -> PreTrainedModel:
    """A model that shares everything with `model` but its decoder layers. `model` is not changed."""
    *parents, last = adapter.layers.split(".")
    clone = shallow_copy(model)
    node = clone
    for name in parents:
        child = shallow_copy(node._modules[name])
        node._modules[name] = child
        node = child
    node._modules[last] = nn.ModuleList(layers)
    return clone


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module with tables of its own, which hold the same children, parameters and buffers."""
    clone = copy.copy(module)
    for table in ("_modules", "_parameters", "_buffers"):
        clone.__dict__[table] = dict(module.__dict__[table])
    return clone


@dataclass(frozen=True)
class BlockInputs:
    """What enters the first decoder layer for one batch, and the keyword arguments of every layer.

    Attributes:
        hidden: [B, T, D].
        kwargs: per layer, transformers' keyword arguments (mask, positions, rotary tables).
    """

    hidden: Tensor
    kwargs: tuple[dict[str, Any], ...]


class _Catcher(nn.Module):
    """Stands in for a decoder layer: notes what it is called with and passes the hidden states on."""

    def __init__(self, calls: list[tuple[Tensor, dict[str, Any]]]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """[B, T, D] -> the same tensor."""
        self.calls.append((hidden_states, kwargs))
        return hidden_states


@torch.inference_mode()
def block_inputs(model: PreTrainedModel, adapter: ModelAdapter, input_ids: Tensor) -> BlockInputs:
    """Run everything before the first decoder layer on input_ids [B, T] of any device."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []
    count = len(adapter.decoder_layers(model))
    probe = with_layers(model, adapter, [_Catcher(calls) for _ in range(count)])
    probe.base_model(input_ids=input_ids.to(model.device), use_cache=False)
    keep = ("attention_mask", "position_ids", "position_embeddings")
    return BlockInputs(calls[0][0].clone(), tuple({k: call[1][k] for k in keep if k in call[1]} for call in calls))


@torch.inference_mode()
def final_hidden(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Hidden states that the head reads: input_ids [B, T] of any device -> [B, T, D] on the model's."""
    return model.base_model(input_ids=input_ids.to(model.device), use_cache=False).last_hidden_state


def quantized_blocks(model: PreTrainedModel, adapter: ModelAdapter) -> list[DecoderBlock]:
    """The blocks of a quantised model; empty for a float transformers model."""
    return [layer for layer in adapter.decoder_layers(model) if isinstance(layer, DecoderBlock)]


def new_cache(model: PreTrainedModel, adapter: ModelAdapter) -> QuantizedKVCache | None:
    """An empty packed cache for a model with quantised keys and values, None when transformers' own cache fits."""
    blocks = quantized_blocks(model, adapter)
    if blocks and all(b.rules is not None and b.rules.attention.packs for b in blocks):
        return DynamicKVCache([b.rules.attention for b in blocks])
    if not any(b.k_quantizer is not None and b.v_quantizer is not None for b in blocks):
        return None
    return QuantizedKVCache([(b.k_quantizer, b.v_quantizer) for b in blocks], blocks[0].sink_tokens)
