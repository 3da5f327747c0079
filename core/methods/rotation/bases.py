"""Observe a float model in the bases of the method rotation, and the tokens that stay large.

    original   x        scaled   x / s        rotated   (x / s) R, of keys without their mean      s, R of `site_basis`

What the method folds into weights is done here to the values of a site, with the same factors. They are chosen on statistics
without the first tokens, as in a run; the first tokens are observed all the same, as in `core.calibration.observe`. R spreads
a large channel of a token over all its channels, but keeps the token's length: a massive token stays massive.
Source: massive activations, Sun et al. (arXiv:2402.17762).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from core.calibration.channel import Change, token_at
from core.calibration.observe import BlockInputs, Recorder, embed
from core.calibration.report import TokenPeaks
from core.checks import require_choice
from core.methods.base import FLOAT_FIRST_TOKENS
from core.methods.rotation.fold import Basis
from core.methods.rotation.method import site_basis
from core.methods.sequential import layer_statistics, watch_layer
from core.models.block import DecoderBlock
from core.models.decoder import CausalModel
from core.models.loaded import LoadedModel
from core.options import BASES, MASSIVE
from core.progress import Progress, silent
from core.recipe import SITES

LARGEST = 5
"""Tokens that are described for each site."""

BasisByName = dict[str, dict[str, Basis]]
"""Bases of the sites of one layer, by the name of the basis and by site."""


@dataclass
class BasisRecorder:
    """Statistics of one layer in one basis.

    Args: recorder: of the channels. bases: by site.
    Attributes: peaks, powers: largest absolute value and mean square of each token by site, [B, T] for each batch.
    """

    recorder: Recorder
    bases: dict[str, Basis]
    peaks: dict[str, list[Tensor]] = field(default_factory=dict)
    powers: dict[str, list[Tensor]] = field(default_factory=dict)

    def __call__(self, site: str, x: Tensor) -> None:
        """Observe x [B, T, C], in the original basis, of one batch of windows."""
        y = self.bases[site].to(x)
        self.recorder(site, y)
        self.peaks.setdefault(site, []).append(y.abs().amax(-1))
        self.powers.setdefault(site, []).append(y.square().mean(-1))


def layer_bases(block: DecoderBlock, hidden: list[Tensor], inputs: list[BlockInputs]) -> tuple[BasisByName, list[Tensor]]:
    """Choose the bases of a float layer on the hidden states [B, T, D] that enter it. Returns: (bases, the layer's outputs)."""
    recorder = Recorder(block.layer_index, sum(map(len, hidden)), hessians_wanted=False, skip_first=FLOAT_FIRST_TOKENS)
    outputs = watch_layer(block, hidden, inputs, [recorder])
    stats = layer_statistics(block, recorder, recorder)
    chosen = {name: {site: site_basis(stats, site, own, block.spec) for site in SITES} for name, own in BASES.items()}
    return chosen, outputs


@torch.inference_mode()
def observe_bases(model: CausalModel, windows: Tensor, *, progress: Progress = silent) -> Iterator[dict[str, BasisRecorder]]:
    """Yield what each layer of a float model has in every basis on windows [S, T] int64; each layer runs twice.

    Raises: NumericError naming the first site with NaN or infinity.
    """
    inputs = embed(model, windows)
    hidden = [item.hidden for item in inputs]
    for index, block in enumerate(model.blocks):
        progress(f"Observing layer {index + 1} of {len(model.blocks)}", index / len(model.blocks))
        bases, outputs = layer_bases(block, hidden, inputs)
        found = {
            name: BasisRecorder(Recorder(index, len(windows), hessians_wanted=False), own) for name, own in bases.items()
        }
        watch_layer(block, hidden, inputs, list(found.values()))
        hidden = outputs
        yield found


def token_peaks(loaded: LoadedModel, windows: Tensor, seen: BasisRecorder, site: str) -> TokenPeaks:
    """Describe the tokens of windows [S, T] that are largest at a site that was observed on all of them."""
    sizes, powers = (torch.cat(parts[site]).flatten().cpu() for parts in (seen.peaks, seen.powers))
    order, median = sizes.argsort(descending=True)[:LARGEST].tolist(), float(sizes.median())
    largest = [token_at(loaded, windows, index, float(sizes[index])) for index in order]
    return TokenPeaks(len(sizes), median, float(powers.median()), int((sizes > MASSIVE * median).sum()), largest)


def basis_change(name: str) -> Change | None:
    """Return what `channel_detail` needs to read channels in the basis of a name in `BASES`; None for the original one.

    Raises: InputError for another name.
    """
    require_choice("basis", name, tuple(BASES))

    def change(block: DecoderBlock, hidden: list[Tensor], inputs: list[BlockInputs], site: str) -> Callable[[Tensor], Tensor]:
        return layer_bases(block, hidden, inputs)[0][name][site].to

    return None if name == "original" else change
