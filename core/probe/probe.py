"""The probe of a model on a short text: logits, activations and gradients at every site.

Labels y are drawn from the model's own softmax at every position; g = d Σ_t log p(y_t) / d site, S draws. With δ = quantised -
float at a site, the divergence that this site alone causes is, to second order, a Fisher form (see `core.probe.predict`).

Everything is kept in float16 behind one scale per tensor, hidden states in float32: they restart exact passes. Shapes: B windows,
T tokens, N = B T, S draws, C channels, D hidden, V vocabulary. Source of the idea: BRECQ (arXiv:2102.05426), section 3.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from core.errors import ResourceError
from core.models.attention import Rotary
from core.models.decoder import CausalModel
from core.probe.layers import OUTPUTS, Change, coarse_products, differentiate, float_twin, run
from core.progress import Progress, silent
from core.recipe import SITES

DRAWS = 4
"""Draws of labels: more cost a backward pass each and lower the scatter of predictions."""
PROBE_BYTES = 3 * 2**29
"""Largest probe: 1.5 GiB. 30 layers of 576 channels, 512 tokens and 4 draws take 0.7 GiB."""
LOGIT_BYTES = 2**27
"""Log-probabilities beyond this are computed again when they are needed."""
HEAD_ROWS = 256
"""Rows of logits in memory at a time."""
CACHED_ROWS = 16
"""Rows of logits that are compared while a core's cache holds them."""


Table = dict[tuple[int, int], float]
"""Predicted KLD of one cell of one layer, nats per token, by (bits, clusters)."""


@dataclass(frozen=True)
class Half:
    """A tensor kept as float16 values times a power of two."""

    values: Tensor
    scale: float

    @classmethod
    def of(cls, tensor: Tensor) -> Half:
        """Round a tensor so that its largest magnitude lies below 2**15."""
        largest = float(tensor.abs().amax())
        scale = 2.0 ** (torch.tensor(max(largest, 1e-30)).log2().ceil().item() - 15)
        return cls((tensor / scale).to(torch.float16), scale)

    def get(self) -> Tensor:
        """Return the tensor in float32."""
        return self.values.to(torch.float32).mul_(self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.values.nbytes


@dataclass(frozen=True)
class LayerProbe:
    """One layer: what its sites hold [B, T, C], and gradients [S, B, T, C] at sites and at the outputs of o and down."""

    values: dict[str, Half]
    gradients: dict[str, Half]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(half.nbytes for part in (self.values, self.gradients) for half in part.values())


@dataclass(frozen=True)
class Probe:
    """Everything that predictions and measurements on one text start from. It holds no weights: calls name the model.

    Attributes:
        ids: [B, T] int64. rotary: of the T positions.
        hidden: [B, T, D] float32 that enter each layer, and what leaves the last.
        log_p: [N, V] float32, the model's own log-probabilities; None where they are too large to keep.
        layers: one per decoder layer.
        noise_floor: KLD of the model in bfloat16 against float32, nats per token.
        cells: predictions that `core.probe.predict` has computed so far: by all else that they depend on, then by layer.
        took: seconds that the last cell of each name took, in any layer.
    """

    ids: Tensor
    rotary: Rotary
    hidden: list[Tensor]
    log_p: Tensor | None
    layers: list[LayerProbe]
    draws: int
    noise_floor: float = 0.0
    seconds: float = 0.0
    cells: dict[Hashable, dict[int, Table]] = field(default_factory=dict)
    took: dict[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """N, the number of positions."""
        return self.ids.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        own = 0 if self.log_p is None else self.log_p.nbytes
        return own + sum(h.nbytes for h in self.hidden) + sum(layer.nbytes for layer in self.layers)


@torch.no_grad()
def build_probe(model: CausalModel, windows: Tensor, *, draws: int = DRAWS, seed: int = 0, progress: Progress = silent) -> Probe:
    """Run a float or ternary model on windows [B, T] int64, and gradients back.

    Args:
        draws: labels per position; fewer where the probe would not fit in `PROBE_BYTES`.
        seed: of the labels.
    Raises: ResourceError E-RES-PROBE if one draw does not fit either.
    """
    start = time.perf_counter()
    draws = _affordable(model, windows.numel(), draws)
    count, ids = len(model.blocks), windows.to(model.device)
    h, rotary = model.decoder.enter(ids, torch.arange(ids.shape[1], device=model.device)[None])
    hidden = [h]
    for index, block in enumerate(model.blocks):
        progress(f"Probe: layer {index + 1} of {count}", 0.15 * index / count)
        twin, own = float_twin(block)
        hidden.append(run(twin, hidden[-1], rotary, own))
    progress("Probe: logits", 0.15)
    log_p, gradients = _labels(model, hidden[-1], draws, seed)
    layers: list[LayerProbe] = []
    for index in reversed(range(count)):
        progress(f"Probe: gradients of layer {index + 1}", 0.9 - 0.7 * index / count)
        twin, own = float_twin(model.blocks[index])
        values, found = differentiate(twin, hidden[index], rotary, own, gradients)
        kept = {name: Half.of(g) for part in (found.sites, found.outputs) for name, g in part.items()}
        layers.append(LayerProbe({site: Half.of(x) for site, x in values.items()}, kept))
        gradients = found.inputs
    progress("Probe: noise floor", 0.9)
    probe = Probe(ids, rotary, hidden, log_p, layers[::-1], draws)
    floor = float(compare(model, probe, _in_bfloat16(model, probe))[0].mean())
    return replace(probe, noise_floor=floor, seconds=time.perf_counter() - start)


def compare(model: CausalModel, probe: Probe, logits: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Compare other logits, parts [n, V] of the N rows, with the model's own.

    Returns: KLD(own || other) of every position, [B, T] float64; whether both find the same token likeliest, [B, T] bool.
    """
    divergences, same, row, hidden = [], [], 0, probe.hidden[-1].flatten(0, 1)
    for part in logits:
        rows = slice(row, row + len(part))
        own = next(head_logits(model, hidden[rows])).log_softmax(-1) if probe.log_p is None else probe.log_p[rows]
        for log_p, logits in zip(own.split(CACHED_ROWS), part.split(CACHED_ROWS), strict=True):
            divergences.append((log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1, dtype=torch.float64))
            same.append(log_p.argmax(-1) == logits.argmax(-1))
        row += len(part)
    return torch.cat(divergences).view(probe.ids.shape), torch.cat(same).view(probe.ids.shape)


def head_logits(model: CausalModel, h: Tensor) -> Iterator[Tensor]:
    """Yield the float32 logits [n, V] of hidden states [N, D] that leave the last block, `HEAD_ROWS` rows at a time."""
    for rows in h.split(HEAD_ROWS):
        yield model.decoder.head(model.decoder.leave(rows[None]))[0].float()


def _labels(model: CausalModel, h: Tensor, draws: int, seed: int) -> tuple[Tensor | None, Tensor]:
    """Draw labels from the softmax of hidden states [B, T, D] that leave the last block.

    With z the logits, d log p(y) / d z = onehot(y) - p; so the gradient at the head's input is W[y] - pᵀ W, both terms times
    the slope of capped logits.
    Returns: (log p [N, V] or None where it is too large, gradients [S, B, T, D] at `h`).
    """
    generator, head = torch.Generator().manual_seed(seed), model.decoder.head
    kept, gradients = [], []
    for z in head_logits(model, h.flatten(0, 1)):
        log_p = z.log_softmax(-1)
        p = log_p.exp()
        labels = torch.multinomial(p.cpu(), draws, replacement=True, generator=generator).to(p.device)  # [n, S]
        slope = head.slope(z)
        with coarse_products():
            gradients.append(head.weight[labels.t()] * slope.gather(1, labels).t().unsqueeze(-1) - (p * slope) @ head.weight)
        kept.append(log_p)
    read = torch.cat(gradients, dim=1).unflatten(1, h.shape[:2])
    with torch.enable_grad():
        x = h.detach().requires_grad_()
        y = model.decoder.leave(x)
    found = torch.stack([torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in read])
    small = len(kept[0][0]) * h.shape[0] * h.shape[1] * 4 <= LOGIT_BYTES
    return torch.cat(kept) if small else None, found


def _in_bfloat16(model: CausalModel, probe: Probe) -> Iterator[Tensor]:
    """Yield the logits of the model in bfloat16; norms outside the layers and the softmax are in float32, as usual."""
    dtype = torch.bfloat16
    rotary = None if probe.rotary is None else tuple(t.to(dtype) for t in probe.rotary)
    h = probe.hidden[0].to(dtype)
    for block in model.blocks:
        twin, own = float_twin(block)
        narrow = {site: (lambda x, fake=fake: fake(x.float()).to(dtype)) for site, fake in own.sites.items()}
        h = run(copy.deepcopy(twin).to(dtype), h, rotary, Change(narrow))
    head = model.decoder.head
    weight = head.weight.to(dtype)
    for rows in h.flatten(0, 1).split(HEAD_ROWS):
        z = torch.nn.functional.linear(model.decoder.leave(rows[None].float())[0].to(dtype), weight)
        yield head.capped(z.float())


def _affordable(model: CausalModel, tokens: int, draws: int) -> int:
    """Reduce the number of draws until the probe fits."""
    spec, count = model.blocks[0].spec, len(model.blocks)
    sites = sum(spec.width(site) for site in SITES)
    logits = model.decoder.head.weight.shape[0] * 4

    def needed(labels: int) -> int:
        per_layer = 2 * (sites + labels * (sites + len(OUTPUTS) * spec.hidden)) + 4 * spec.hidden
        return tokens * (count * per_layer + (logits if logits * tokens <= LOGIT_BYTES else 0))

    fitting = [n for n in range(1, draws + 1) if needed(n) <= PROBE_BYTES]
    if not fitting:
        size = f"{needed(1) / 2**30:.1f} GiB, above the limit of {PROBE_BYTES / 2**30:.1f}"
        raise ResourceError(f"A probe of {tokens:,} tokens of this model takes {size}: use fewer tokens.", code="E-RES-PROBE")
    return fitting[-1]
