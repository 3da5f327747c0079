"""Measure one channel closely: histogram over the calibration tokens, tokens at extreme values."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

import torch
from torch import Tensor

from core.calibration.observe import BlockInputs, embed
from core.calibration.report import ChannelDetail, TokenExtreme
from core.calibration.states import KeptStates, Pass
from core.errors import InputError
from core.models.block import DecoderBlock
from core.models.loaded import LoadedModel
from core.progress import Progress, silent
from core.recipe import SITES

Change = Callable[[DecoderBlock, list[Tensor], list[BlockInputs], str], Callable[[Tensor], Tensor]]
"""Is given a block, the hidden states that enter it, and one of its sites; returns a change of basis of that site."""

EXTREMES = 5
CONTEXT = 12
BINS = 60


class _Found(Exception):
    """Ends a forward pass once the wanted site was seen."""


@torch.inference_mode()
def channel_detail(
    loaded: LoadedModel,
    windows: Tensor,
    site: str,
    channel: int,
    *,
    change: Change | None = None,
    states: KeptStates | None = None,
    progress: Progress = silent,
) -> ChannelDetail:
    """Measure one channel on windows [S, T] of a float model.

    Args:
        site: "layers.<i>.<kind>".
        channel: index in the original order.
        change: makes the function from the site's values [B, T, C] to those in the basis that the channel is one of.
        states: hidden states of earlier passes, from which this one starts where it can; those computed here are added. The
            result is the same, bit for bit.
    Raises: InputError for a site or channel that does not exist.
    """
    layer, kind = _parse(loaded, site, channel)
    passed = (states or KeptStates(1)).of(loaded.model, windows, len(loaded.model.blocks))
    values = _values(loaded, windows, passed, layer, kind, channel, change, progress)  # [S, T]
    flat = values.flatten()
    counts, edges = torch.histogram(flat, bins=BINS)
    order = flat.argsort()
    picked = [*order[:EXTREMES].tolist(), *reversed(order[-EXTREMES:].tolist())]
    return ChannelDetail(
        site,
        channel,
        float(flat.min()),
        float(flat.max()),
        float(flat.mean()),
        float(flat.std()),
        float(flat.abs().mean()),
        [int(c) for c in counts],
        [float(e) for e in edges],
        [token_at(loaded, windows, index, float(flat[index])) for index in picked],
    )


def _parse(loaded: LoadedModel, site: str, channel: int) -> tuple[int, str]:
    match = re.fullmatch(r"layers\.(\d{1,4})\.([a-z_]+)", str(site), re.ASCII)
    count = len(loaded.model.blocks)
    if match is None or match[2] not in SITES or int(match[1]) >= count:
        raise InputError(
            f"Site {str(site)[:40]!r} does not exist: use layers.0.attn_in to layers.{count - 1}.down_in.", code="E-PARAM-SITE"
        )
    spec = loaded.model.blocks[int(match[1])].spec
    if match[2] not in spec.sites:
        rule = f"{site} is inside of experts, whose channels have no histogram: choose another site."
        raise InputError(rule, code="E-PARAM-SITE")
    width = spec.width(match[2])
    if isinstance(channel, bool) or not isinstance(channel, int) or not 0 <= channel < width:
        raise InputError(f"Channel {str(channel)[:20]} does not exist in {site}: use 0 to {width - 1}.", code="E-PARAM-CHANNEL")
    return int(match[1]), match[2]


def _values(
    loaded: LoadedModel,
    windows: Tensor,
    passed: Pass,
    layer: int,
    kind: str,
    channel: int,
    change: Change | None,
    progress: Progress,
) -> Tensor:
    """Return the channel's values [S, T] on the CPU, where histograms are made."""
    blocks, inputs = loaded.model.blocks, embed(loaded.model, windows)
    first, hidden = passed.nearest(layer) or (0, [item.hidden for item in inputs])
    for index in range(first, layer):
        progress(f"Looking at layer {layer + 1}", (index - first) / (layer - first))
        hidden = [blocks[index](h, item.rotary) for h, item in zip(hidden, inputs, strict=True)]
        passed.keep(index + 1, hidden)
    seen: list[Tensor] = []
    changed = None if change is None else change(blocks[layer], hidden, inputs, kind)

    def look(x: Tensor) -> None:
        seen.append((x if changed is None else changed(x))[..., channel].clone())
        raise _Found

    for h, item in zip(hidden, inputs, strict=True):
        with contextlib.suppress(_Found), blocks[layer].slots.fill({kind: look}):
            blocks[layer](h, item.rotary)
    return torch.cat(seen).cpu()


def token_at(loaded: LoadedModel, windows: Tensor, index: int, value: float) -> TokenExtreme:
    """Describe the token at place `index` of windows [S, T], counted through all of them, with a value that it has."""
    row, position = divmod(index, windows.shape[1])
    ids = windows[row].tolist()
    decode = loaded.tokenizer.decode
    return TokenExtreme(
        value,
        decode(ids[position : position + 1]),
        decode(ids[max(0, position - CONTEXT) : position]),
        decode(ids[position + 1 : position + 1 + CONTEXT]),
        position,
    )
