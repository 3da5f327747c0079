"""Find the sites and channels that moved most, at one position of a text, in a quantised run.

Inside its layers a quantised run has channels in other orders, scaled or rotated; between them, the residual stream is the
original's (recipes with one order for all layers: up to that order). So with B the original's layer, s one of its sites,
and h, h' what enters that layer in the original and in the quantised run:

    came in   |s(B, h') - s(B, h)|² / |s(B, h)|²     what the stream brings, read by the original's layer
    rounded   |ŷ - y|² / |y|²                        y, ŷ: the site in the quantised layer, before and behind its quantiser
    moved     |P ŷ - s(B, h)|² / |s(B, h)|²          all together, and what rounded weights did; P: back to the model's order

Sums run over the channels of the last position of a prefix. A site is compared as its layer goes on with it: behind the
quantisers that a ternary original has itself. "Moved" needs the order of the quantised layer's channels. Norms and the rotation
by position store theirs; those of v, o_in and down_in lie in the rows of weights, and are found by matching each rounded row
with the nearest one of the original. Where that is not one to one, and in the method rotation, which mixes channels, there is
no P.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from core.errors import InputError, NumericError
from core.methods.bitnet import fake_dynamic
from core.methods.rptq.reorder import head_channels, query_channels
from core.models.attention import Rotary
from core.models.block import DecoderBlock
from core.models.decoder import RESIDUAL_AXIS, CausalModel
from core.probe.report import SiteMove
from core.progress import Progress, silent
from core.quant.rotated import TokenQuantizer
from core.quant.static import InputUse
from core.recipe import INPUT_SITE, SITES

CHANNELS = 5
"""Channels that are listed of each site."""
SKETCH = 64
"""Random directions that rows of weights are compared in: distances keep to within about a tenth."""
ROWS = 1024
"""Rows that are compared at a time, and rows of an embedding from which an order is read."""
_READER = {site: name for name, site in INPUT_SITE.items()}

_Values = dict[str, tuple[Tensor, Tensor]]
"""Of each site [C] at the last position: before and behind the quantiser."""


@torch.inference_mode()
def moved_sites(
    model: CausalModel, reference: CausalModel, ids: Tensor, method: str, *, progress: Progress = silent
) -> list[SiteMove]:
    """Compare every site of every layer at the last of the tokens `ids` [T] int64; three passes over one layer at a time.

    Args: model, method: a model that was quantised, and the name of its method. reference: the model that it was made from.
    Returns: sites, the ones that moved most first.
    Raises: InputError E-PARAM-REFERENCE if the two do not belong together, NumericError if values are not finite.
    """
    order, count = residual_order(model, reference), len(model.blocks)
    back = None if order is None else order.argsort()
    places, found = torch.arange(len(ids), device=reference.device)[None], []
    (h, rotary), (run, _) = (m.decoder.enter(ids[None].to(m.device), places) for m in (reference, model))
    for index, (own, block) in enumerate(zip(reference.blocks, model.blocks, strict=True)):
        progress(f"Layer {index + 1} of {count}", index / count)
        before, h = _values(own, h, rotary)
        came, _ = _values(own, run if back is None else run[..., back], rotary)
        after, run = _values(block, run, rotary)
        orders = dict.fromkeys(SITES) if method == "rotation" else site_orders(block, own, order, reorders=method == "rptq")
        found += [_move(index, site, before[site][1], came[site][1], after[site], orders[site]) for site in SITES]
    if not all(math.isfinite(move.size) for move in found):
        raise NumericError("Activations of this text are NaN or infinite: try another text or more bits.", code="E-NUM-NAN")
    return sorted(found, key=lambda move: -move.size)


def residual_order(model: CausalModel, reference: CausalModel) -> Tensor | None:
    """Find the order [D] int64 of a quantised model's residual stream, new = old[order]; None for that of `reference`.

    Raises: InputError E-PARAM-REFERENCE if there is none: the model was made from another one.
    """
    own, old = _entries(model), _entries(reference)
    if len(model.blocks) == len(reference.blocks) and own.shape == old.shape:
        if torch.equal(own, old):
            return None
        # the same columns sorted the same way: ties are equal columns, which may change places
        order = torch.empty(own.shape[1], dtype=torch.int64, device=own.device)
        order[_sorted(own)] = _sorted(old)
        if all(torch.equal(a, b[:, order]) for a, b in zip(own.split(ROWS), old.split(ROWS), strict=True)):
            return order
    raise InputError("This run was not made from that model: compare it with the one it names.", code="E-PARAM-REFERENCE")


def _entries(model: CausalModel) -> Tensor:
    """Return what writes the residual stream first, [N, D]: the embedding, or the projection behind it."""
    decoder = model.decoder
    part = "embed" if decoder.project_in is None else "project_in"
    weight = getattr(decoder, part).weight
    return weight if RESIDUAL_AXIS[part] else weight.t()


def _sorted(entries: Tensor) -> Tensor:
    """Sort the columns of [N, D] by their first `ROWS` values: [D] int64."""
    places = torch.arange(entries.shape[1], device=entries.device)
    for row in entries[:ROWS].flip(0):
        places = places[row[places].argsort(stable=True)]
    return places


def site_orders(
    block: DecoderBlock, original: DecoderBlock, residual: Tensor | None, *, reorders: bool
) -> dict[str, Tensor | None]:
    """Find the order [C] int64 of each site's channels in a quantised block, new = old[order]; None where it is not found.

    Args: residual: order of the residual stream, None for the original's. reorders: whether heads and the MLP may be reordered.
    """
    spec, found = block.spec, {}
    for site, norm in (("attn_in", block.norm1), ("mlp_in", block.norm2)):
        plain = torch.arange(spec.hidden) if residual is None else residual.cpu()
        found[site] = plain if norm.order is None else plain[norm.order.cpu().long()]
    key = value = torch.arange(spec.width("k"))
    hidden = torch.arange(spec.ffn)
    if reorders:
        width, stored = spec.width("k"), block.attention.rope_order
        qkv, up = ([b.linears()[name].dequantized_weight() for b in (block, original)] for name in ("qkv", "up"))
        if stored is not None:
            key = head_channels(stored.cpu().long())
        elif not spec.rope:
            key = _matched(*(rows[-2 * width : -width] for rows in qkv), found["attn_in"])
        value = _matched(*(rows[-width:] for rows in qkv), found["attn_in"])
        hidden = _matched(*(rows[-spec.ffn :] for rows in up), found["mlp_in"])
    for site, shared, order in (("k", "q", key), ("v", "o_in", value)):
        local = None if order is None else order.view(spec.kv_heads, -1) % spec.head_dim
        found |= {site: order, shared: None if local is None else query_channels(local, spec.groups)}
    return found | {"down_in": hidden}


def _matched(rounded: Tensor, rows: Tensor, columns: Tensor) -> Tensor | None:
    """Find for each rounded row [N, K], its columns in the order `columns`, the nearest of the original's rows [N, K].

    Returns: [N] int64; None where two rows have the same nearest one.
    """
    directions = torch.randn(len(columns), SKETCH, generator=torch.Generator().manual_seed(0)).to(rows.device)
    sketch, known = rounded @ directions, rows.float()[:, columns.to(rows.device)] @ directions
    nearest = torch.cat([torch.cdist(part, known).argmin(1) for part in sketch.split(ROWS)]).cpu()
    return nearest if len(nearest.unique()) == len(nearest) else None


def _values(block: DecoderBlock, h: Tensor, rotary: Rotary) -> tuple[_Values, Tensor]:
    """Run a block on h [1, T, D]. Returns: its sites' values, its output [1, T, D]."""
    seen: _Values = {}

    def see(site: str, x: Tensor) -> None:
        seen[site] = tuple(tensor[0, -1].double().cpu() for tensor in _rounded(block, site, x))

    with block.slots.watch(see):
        return seen, block(h, rotary)


def _rounded(block: DecoderBlock, site: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Round a site [1, T, C] as the block does. Returns: what is rounded, rotated where the quantiser rotates; the result."""
    attention = block.attention
    if block.rules is not None:
        fake = fake_dynamic(site, block.rules, block.spec)
        return x, x if fake is None else fake(x)
    use = InputUse(min(attention.sink_tokens, x.shape[1]))
    if site in _READER:
        quantizer = block.linears()[_READER[site]].quantizer
        given = quantizer.rotate(x) if isinstance(quantizer, TokenQuantizer) else x
        return given, x if quantizer is None else quantizer.fake(x, use)
    heads = x.unflatten(-1, (-1, block.spec.head_dim)).transpose(1, 2)
    if site == "q":
        kept = heads if attention.q_quantizer is None else attention.q_quantizer.fake_heads(heads, use)
    else:
        grid = attention.grids()[site == "v"]
        kept = heads if grid is None else grid.fake(heads, 0)
    return x, kept.transpose(1, 2).flatten(2)


def _move(
    layer: int, site: str, before: Tensor, came: Tensor, after: tuple[Tensor, Tensor], order: Tensor | None
) -> SiteMove:
    """Compare one site's values [C]: of the original, of it on the run's stream, and of the run around its quantiser."""
    (given, kept), shown = after, came
    if order is not None:
        shown = torch.empty_like(kept)
        shown[order] = kept
    largest = (shown - before).abs().topk(min(CHANNELS, len(before))).indices.tolist()
    channels = tuple((channel, float(before[channel]), float(shown[channel])) for channel in largest)
    moved = None if order is None else _relative(shown, before)
    return SiteMove(layer, site, moved, _relative(came, before), _relative(kept, given), channels)


def _relative(values: Tensor, of: Tensor) -> float:
    """Compute |values - of|² / |of|²."""
    return float((values - of).square().sum() / of.square().sum().clamp_min(1e-24))
