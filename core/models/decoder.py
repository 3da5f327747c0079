"""The causal model as a loop over our own blocks; transformers gives tensors, config, tokenizer.

    h = c embed(ids) [+ positions]        for block in blocks: h = block(h)        logits = head(norm(h))

Float, ternary and quantised models are the same `Decoder` with other linear layers in its blocks. `run` starts at any block with
given hidden states: calibration uses it to go layer by layer. `CausalModel` is the decoder as a transformers model, for programs
that need one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import fields

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from core.errors import InputError, ModelError
from core.models.adapter import HEAD, ModelAdapter
from core.models.attention import Rotary
from core.models.block import DecoderBlock
from core.models.convert import outside_tensors, whole_rotation
from core.models.norm import ReorderNorm
from core.quant.kv_cache import KVCache

RESIDUAL_AXIS = {"embed": 1, "positions": 1, "project_in": 0, "project_out": 1, "norm": 0, "head": 1}
"""Axis of the residual stream in the tensors outside the blocks, by their part of the decoder. Where there is a `project_in`,
embedding and head do not touch that stream."""


class Head(nn.Linear):
    """The output layer [D] to [V], without bias; its weight is shared. Logits: c tanh(z / c), or z without a softcap c."""

    def __init__(self, weight: Tensor, softcap: float | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight, self.softcap = nn.Parameter(weight.detach(), requires_grad=False), softcap

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits [..., V] of x [..., D]."""
        return self.capped(super().forward(x))

    def capped(self, z: Tensor) -> Tensor:
        """Compute logits of z [..., V] = x Wᵀ."""
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap

    def slope(self, logits: Tensor) -> Tensor:
        """Compute d logits / d z where the logits [..., V] are known."""
        return torch.ones_like(logits) if self.softcap is None else 1 - (logits / self.softcap).square()


class Decoder(nn.Module):
    """Embeddings, decoder blocks, last norm and head of one model.

    Args:
        config: the model's configuration.
        blocks: one per decoder layer; shared, not copied.
        tensors: what is outside the blocks, by its name in a checkpoint (`ModelAdapter.outside`); shared, not copied. A model
            with tied embeddings may leave its head out; a head that is there is used.
    Raises: ModelError E-MODEL-MISSING naming tensors that are missing or belong to no part of the model, E-MODEL-BAD naming one
        that has another shape than `config` says.
    """

    def __init__(
        self, config: PreTrainedConfig, adapter: ModelAdapter, blocks: Iterable[DecoderBlock], tensors: Mapping[str, Tensor]
    ) -> None:
        super().__init__()
        self.adapter, self._names = adapter, {place: name for place, (name, _) in adapter.outside(config).items()}
        parts = _sorted_out(config, adapter, tensors)
        self.embed = nn.Embedding.from_pretrained(parts["embed.weight"])
        self.positions = nn.Embedding.from_pretrained(parts["positions.weight"]) if "positions.weight" in parts else None
        # one class serves every supported architecture with rotary positions: their transformers code is the same or does less
        self.rotaries = nn.ModuleList(map(Phi3RotaryEmbedding, adapter.rotations(config)))
        spec, factors = adapter.spec(config), adapter.factors_of(config)
        self.head_dim, self.query_growth = spec.head_dim, spec.query_growth
        self.embed_scale, self._switch = factors.embed, _switch_of(config)
        self.project_in, self.project_out = (_linear(parts.get(f"project_{side}.weight")) for side in ("in", "out"))
        self.blocks = nn.ModuleList(blocks)
        self.norm: ReorderNorm | None = None
        if adapter.has_final_norm(config):
            self.norm = ReorderNorm(adapter.norm, parts.get("norm.weight"), parts.get("norm.bias"), spec.eps)
        self.head = Head(parts.get("head.weight", parts["embed.weight"]), factors.logit_softcap)
        if self.head.weight.data_ptr() == self.embed.weight.data_ptr():
            self.head.weight = self.embed.weight

    def outside(self, order: Tensor | None = None) -> dict[str, Tensor]:
        """Return the tensors outside the blocks by their names in a checkpoint; a head that is the embedding is left out.

        Args: order: [D] int64, for a residual stream whose channels lie in it (`DecoderBlock.in_order`); None: the model's own.
        """
        own, apart = self.state_dict(), () if self.project_in is None else ("embed", "head")
        tied = self.head.weight is self.embed.weight
        found = {}
        for place, name in self._names.items():
            if not (tied and name == HEAD):
                part, tensor = place.partition(".")[0], own[place]
                keeps = order is None or part in apart
                found[name] = tensor if keeps else tensor.index_select(RESIDUAL_AXIS[part], order)
        return found

    def new_cache(self) -> KVCache:
        """Make an empty cache: packed where a block quantises its keys and values, in float where it does not."""
        return KVCache([block.attention.new_cache() for block in self.blocks])

    def enter(self, ids: Tensor, places: Tensor) -> tuple[Tensor, Rotary]:
        """Compute the input of the first block, and the rotation of every block.

        Args:
            ids: [B, T] int64. places: their positions, [1, T] int64. Both on the model's device.
        Returns: hidden states [B, T, D]; what `Rotary` says.
        """
        h = self.embed(ids) if self.embed_scale == 1.0 else self.embed(ids) * self.embed_scale
        if self.project_in is not None:
            h = self.project_in(h)
        if self.positions is None:
            turns = tuple(t for rotary in self.rotaries for t in whole_rotation(*rotary(h, places), self.head_dim))
            if self.query_growth is None:
                return h, turns
            beta, length = self.query_growth
            return h, (*turns, (1 + beta * torch.log1p(places // length)).to(h.dtype)[..., None])
        return h + self.positions(places + self.adapter.position_offset), None

    def run(self, h: Tensor, rotary: Rotary, cache: KVCache | None = None, *, first: int = 0, last: int | None = None) -> Tensor:
        """Run blocks `first` to `last` - 1 (None: all that remain) on hidden states [B, T, D], the input of block `first`."""
        for index in range(first, len(self.blocks) if last is None else last):
            h = self.blocks[index](h, rotary, None if cache is None else cache.layers[index])
        return h

    def forward(self, ids: Tensor, cache: KVCache | None = None, places: Tensor | None = None) -> Tensor:
        """Compute the hidden states [B, T, D] before the head.

        Args:
            ids: [B, T] int64, on any device: sequences without padding on their left.
            cache: of `new_cache`; the tokens follow those that it holds and are stored in it.
            places: positions of the tokens, [1, T] int64 on the model's device; None: those after the tokens in the cache.
        Returns: [B, T, D]; `head` turns them into logits [B, T, V].
        Raises: InputError E-PARAM-INPUT where the rotation of the tokens in the cache would have to change (longrope).
        """
        device, past = self.embed.weight.device, 0 if cache is None else cache.get_seq_length()
        if self._switch and 0 < past <= self._switch < past + ids.shape[1]:
            raise InputError(
                f"This model rotates otherwise beyond {self._switch:,} positions, and its cache holds {past:,}: ask for fewer "
                "new tokens, or begin with the whole text.",
                code="E-PARAM-INPUT",
            )
        if places is None:
            places = torch.arange(past, past + ids.shape[1], device=device)[None]
        return self.leave(self.run(*self.enter(ids.to(device), places), cache))

    def leave(self, h: Tensor) -> Tensor:
        """Compute what the head reads, [B, T, D], of hidden states [B, T, D] that leave the last block."""
        h = h if self.norm is None else self.norm(h)
        return h if self.project_out is None else self.project_out(h)


def _sorted_out(config: PreTrainedConfig, adapter: ModelAdapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by their place in `Decoder`, after checking that none is missing, left over, or of another shape."""
    places = adapter.outside(config)
    optional = {HEAD} if getattr(config, "tie_word_embeddings", False) else set()
    names = {name for name, _ in places.values()}
    for found, fault in (
        (names - optional - set(tensors), "are missing from the weights"),
        (set(tensors) - names, "do not belong to this architecture"),
    ):
        if found:
            listed = ", ".join(name[:60] for name in sorted(found)[:3])
            raise ModelError(f"{len(found)} tensors {fault}: {listed}.", code="E-MODEL-MISSING")
    for name, shape in places.values():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise ModelError(
                f"{name[:80]} has the shape {tuple(tensors[name].shape)}, config.json says {shape}. Download the model again.",
                code="E-MODEL-BAD",
            )
    return {place: tensors[name] for place, (name, _) in places.items() if name in tensors}


def _switch_of(config: PreTrainedConfig) -> int | None:
    """Return the position beyond which the rotation "longrope" takes its other factors; None without such a place."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope" or rope["short_factor"] == rope["long_factor"]:
        return None
    return rope["original_max_position_embeddings"]


def _linear(weight: Tensor | None) -> nn.Linear | None:
    """Make a linear layer without bias that shares `weight` [N, K]."""
    if weight is None:
        return None
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return made


CACHE_FIELD = "cache" if any(f.name == "cache" for f in fields(CausalLMOutputWithPast)) else "past_key_values"
"""Name of the cache's field in the installed version of transformers."""


class CausalModel(PreTrainedModel, GenerationMixin):
    """A decoder as a transformers model: `generate`, lm-eval and other programs that take one can run it.

    It takes sequences of one length, or padded on the right. Arguments are those of `Decoder`.
    """

    config_class = PreTrainedConfig
    base_model_prefix = "decoder"
    _supports_sdpa = True  # accepts a configuration that asks for it; attention is our own

    def __init__(
        self, config: PreTrainedConfig, adapter: ModelAdapter, blocks: Iterable[DecoderBlock], tensors: Mapping[str, Tensor]
    ) -> None:
        super().__init__(config)
        self.decoder = Decoder(config, adapter, blocks, tensors)
        self.eval()

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Accept a configuration that asks for any way to run experts: they are our own."""
        return "eager"

    @classmethod
    def from_transformers(cls, source: PreTrainedModel, adapter: ModelAdapter, *, consume: bool = False) -> CausalModel:
        """Copy a float model of transformers: the result computes the same.

        Args:
            consume: drop each layer of `source` once it is copied, so that no weight is in memory twice; it cannot run then.
        """
        layers, blocks = adapter.decoder_layers(source), []
        for index in range(len(layers)):
            blocks.append(DecoderBlock.from_layer(source, adapter, index))
            if consume:
                layers[index] = nn.Identity()
        made = cls(source.config, adapter, blocks, outside_tensors(source.state_dict(), adapter, source.config))
        made.generation_config = source.generation_config
        return made

    def with_blocks(self, blocks: Iterable[DecoderBlock], order: Tensor | None = None) -> CausalModel:
        """Make a model that shares everything with this one except its blocks.

        Args: order: [D] int64, of the residual stream in these blocks: what is outside is copied in it; None: the model's own.
        """
        made = CausalModel(self.config, self.decoder.adapter, blocks, self.decoder.outside(order))
        made.generation_config = self.generation_config
        return made

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks in order."""
        return self.decoder.blocks

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: object) -> None:
        """Refuse to write: transformers would store packed tensors under a float model's configuration.

        Raises: InputError E-PARAM-OUT, always.
        """
        asked = ", ".join([repr(str(save_directory)[:60]), *options])
        raise InputError(
            f"A model of Quantscope is not written by transformers ({asked[:100]}): copy the folder that `quantize` wrote, or "
            "use the verb `export`.",
            code="E-PARAM-OUT",
        )

    push_to_hub = save_pretrained

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the token embedding, weight [V, D]."""
        return self.decoder.embed

    def get_output_embeddings(self) -> nn.Linear:
        """Return the head, weight [V, D]."""
        return self.decoder.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: object | None = None,
        cache: object | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast:
        """Compute logits by transformers' convention.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, S]; zeros may only stand on the right, where they change no other token's result.
            position_ids: [B, T]; only the positions that follow from the cache are accepted.
            past_key_values, cache: the cache, by its older and its newer name. An empty cache of transformers is replaced by an
                empty one of ours.
            logits_to_keep: last positions to compute; 0 computes all.
            return_dict: only True.
        Raises: InputError E-PARAM-INPUT for padding on the left, other positions, a filled foreign cache or tuples as output.
        """
        given = past_key_values if cache is None else cache
        known = given if isinstance(given, KVCache) else None
        if known is None and given is not None and given.get_seq_length() > 0:
            raise InputError("The cache was filled by another model: begin with an empty one.", code="E-PARAM-INPUT")
        if known is None and (given is not None or use_cache):
            known = self.decoder.new_cache()
        _require_plain(input_ids, attention_mask, position_ids, 0 if known is None else known.get_seq_length())
        if not return_dict:
            raise InputError("Outputs as tuples are not supported: leave return_dict at True.", code="E-PARAM-INPUT")
        hidden = self.decoder(input_ids, known)
        logits = self.decoder.head(hidden[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, **{CACHE_FIELD: known})


def _require_plain(ids: Tensor, mask: Tensor | None, positions: Tensor | None, past: int) -> None:
    """Refuse a mask or positions that place the tokens anywhere but directly after the `past` ones of the cache."""
    padded = mask is not None and bool((mask.diff(dim=-1) > 0).any())
    moved = positions is not None and bool((positions != torch.arange(past, past + ids.shape[1], device=positions.device)).any())
    if padded or moved:
        raise InputError(
            "Padding on the left and other positions are not supported: give sequences of one length, or pad on the right.",
            code="E-PARAM-INPUT",
        )
