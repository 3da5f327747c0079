"""Observe a float model layer by layer, with one block and the activations of all windows in memory.

Sites are named attn_in (R1), q, k (R2, after the rotation, q scaled by E**-0.5), v, o_in (R3), mlp_in (R4), down_in (R5).
No hook and no state is left after a pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.bits import kind_of
from core.calibration.states import KeptStates
from core.errors import NumericError
from core.models.attention import Rotary
from core.models.decoder import CausalModel
from core.models.slots import ROUTES
from core.progress import Progress, silent
from core.quant.ranges import ChannelRanges
from core.recipe import SITES

BATCH_TOKENS = 2048
SAMPLED_ROWS = 512
LINEAR_SITES = ("attn_in", "o_in", "mlp_in", "down_in")


@dataclass
class Recorder:
    """Statistics of one layer, collected over several batches; call `ranges` and read `hessians` afterwards.

    Args:
        layer: its index, for error messages.
        windows: total number of calibration windows (for sampling rows).
        hessians_wanted: accumulate Xᵀ X of the inputs of linear layers.
        skip_first: positions at the start of every window left out of the ranges (sink tokens).
        seed: of the row sample.
    Attributes:
        routed: tokens that each site of an expert has seen, without those left out of the ranges.
    """

    layer: int
    windows: int
    hessians_wanted: bool
    skip_first: int = 0
    seed: int = 0
    hessians: dict[str, Tensor] = field(default_factory=dict)
    routed: dict[str, int] = field(default_factory=dict)
    _routes: Tensor | None = None
    _low: dict[str, list[Tensor]] = field(default_factory=dict)
    _high: dict[str, list[Tensor]] = field(default_factory=dict)
    _rows: dict[str, list[Tensor]] = field(default_factory=dict)

    def __call__(self, site: str, x: Tensor) -> None:
        """Observe x [B, T, C] of one batch of windows; of an expert, the tokens [1, n, C] that ROUTES said before."""
        if site == ROUTES:
            self._routes = x
            return
        expert = site.partition(".")[2]
        if expert:
            places = (self._routes == int(expert)).any(-1).nonzero()  # window and position of each of its tokens
            places = places[later := places[:, 1] >= self.skip_first]
            kept = x[:, later]
            self.routed[site] = self.routed.get(site, 0) + len(places)
            if not len(places):
                return
            windows = [part for part in kept[0].split(places[:, 0].bincount().tolist()) if len(part)]
            low, high = (torch.stack([edge(part, dim=0) for part in windows]) for edge in (torch.amin, torch.amax))
        else:
            kept = x[:, self.skip_first :]
            low, high = kept.amin(dim=1), kept.amax(dim=1)  # [B, C]
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            bad = int((~torch.isfinite(x)).sum())
            raise NumericError(
                f"layers.{self.layer}.{site} has {bad} NaN or infinite activations on this text: check the "
                "model's weights or try another calibration text.",
                code="E-NUM-NAN",
            )
        self._low.setdefault(site, []).append(low)
        self._high.setdefault(site, []).append(high)
        per_window = max(1, -(-SAMPLED_ROWS // self.windows))
        generator = torch.Generator().manual_seed(self.seed + len(self._low[site]))
        if expert:
            picked = torch.randperm(kept.shape[1], generator=generator)[: per_window * len(windows)]
        else:
            picked = torch.randint(kept.shape[1], (per_window,), generator=generator)
        self._rows.setdefault(site, []).append(kept[:, picked].flatten(0, 1).clone())
        if self.hessians_wanted and kind_of(site) in LINEAR_SITES:
            rows = x.flatten(0, 1)
            if site in self.hessians:
                self.hessians[site].addmm_(rows.t(), rows)
            else:
                self.hessians[site] = rows.t() @ rows

    def ranges(self) -> dict[str, ChannelRanges]:
        """Return the ranges of every observed site, in the order of `SITES`; on the CPU, where plans are made.

        Those of an expert have the windows in `sample_low` and `sample_high` that it had tokens of.
        """
        result = {}
        for site in sorted(self._low, key=lambda name: (SITES.index(kind_of(name)), int(name.partition(".")[2] or 0))):
            low, high, rows = (torch.cat(seen[site]).to("cpu", torch.float32) for seen in (self._low, self._high, self._rows))
            result[site] = ChannelRanges(low.amin(0), high.amax(0), low, high, rows)
        return result


def batches(windows: Tensor) -> list[Tensor]:
    """Split windows [S, T] into batches of about BATCH_TOKENS tokens."""
    return list(windows.split(max(1, BATCH_TOKENS // windows.shape[1])))


@dataclass(frozen=True)
class BlockInputs:
    """Input of the first decoder block for one batch: hidden states [B, T, D], and the rotation of all blocks."""

    hidden: Tensor
    rotary: Rotary


@torch.inference_mode()
def embed(model: CausalModel, windows: Tensor) -> list[BlockInputs]:
    """Compute the inputs of the first decoder block for every batch of windows [S, T] int64."""
    places = torch.arange(windows.shape[1], device=model.device)[None]
    return [BlockInputs(*model.decoder.enter(part.to(model.device), places)) for part in batches(windows)]


@torch.inference_mode()
def observe_layers(
    model: CausalModel,
    windows: Tensor,
    *,
    skip_first: int = 0,
    states: KeptStates | None = None,
    progress: Progress = silent,
) -> Iterator[dict[str, ChannelRanges]]:
    """Yield the seven sites' ranges of each layer of a float model on windows [S, T] int64.

    Args:
        skip_first: positions at the start of every window left out of the ranges.
        states: where the hidden states that enter the layers are kept, for `channel_detail`.
    Raises: NumericError naming the first site with NaN or infinity.
    """
    inputs = embed(model, windows)
    hidden = [item.hidden for item in inputs]
    kept = None if states is None else states.of(model, windows, len(model.blocks))
    for index, block in enumerate(model.blocks):
        if kept is not None:
            kept.keep(index, hidden)
        recorder = Recorder(index, len(windows), hessians_wanted=False, skip_first=skip_first)
        for i, item in enumerate(inputs):
            progress(f"Observing layer {index + 1} of {len(model.blocks)}", (index + i / len(inputs)) / len(model.blocks))
            with block.slots.watch(recorder):
                hidden[i] = block(hidden[i], item.rotary)
        yield recorder.ranges()
