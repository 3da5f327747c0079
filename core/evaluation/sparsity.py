"""Measure the sparsity of a BitNet model: zero codes at each projection's input, and active parameters.

    s(QKV), s(Out), s(Gate), s(Down)    share of zero codes of the projection's input
    s(Up) = 1 - (1 - s(mlp_in)) (1 - g)   g = share of gates that are zero: those rows of up need not be computed
    overall = Σ parameters · s / Σ parameters      active = Σ parameters · (1 - s)

Source: BitNet a4.8 (arXiv:2411.04965), table 2. Zero codes alone save no work: those at QKV and Gate come from rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from core.calibration.observe import embed
from core.errors import InputError, ModelError
from core.models.block import DecoderBlock
from core.models.loaded import LoadedModel
from core.progress import Progress, silent
from core.quant.linear.ternary import TernaryLinear
from core.recipe import INPUT_SITE, SITES
from core.report import InputHistogram, Sparsity, SparsityReport, TernaryShares, WeightHistogram

BINS = 101
TAIL = 0.999
"""Share of |x| that histograms span; larger values are counted in their first and last bin."""


def account(parameters: Mapping[str, int], sparsity: Mapping[str, float]) -> tuple[float, float]:
    """Compute (overall sparsity, active parameters) of projections given by name, with shares from 0 to 1."""
    total = sum(parameters.values())
    active = sum(count * (1 - sparsity[name]) for name, count in parameters.items())
    return 1 - active / total, active


@torch.inference_mode()
def measure_sparsity(loaded: LoadedModel, windows: Tensor, text_name: str, *, progress: Progress = silent) -> SparsityReport:
    """Count zero codes on windows [S, T]. Raises: ModelError E-MODEL-ARCH for a model without ternary weights."""
    blocks = _ternary_blocks(loaded)
    counts: list[dict[str, float]] = []
    for block, run in _layers(loaded, windows, progress):
        counter = _Counter(block)
        hook = block.mlp.activation.register_forward_hook(counter.gate)
        try:
            with block.slots.watch(counter):
                run()
        finally:
            hook.remove()
        counts.append(counter.shares())
    sizes = _sizes(blocks[0])
    layers = [_summary(sizes, c) for c in counts]
    total = _summary(sizes, {name: sum(c[name] for c in counts) / len(counts) for name in counts[0]})
    parameters = sum(sizes.values()) * len(blocks)
    active = round(sum(account(sizes, vars(layer))[1] for layer in layers))
    rules = blocks[0].rules
    return SparsityReport(loaded.name, rules.mode, rules.fidelity, text_name, windows.numel(), parameters, active, total, layers)


def weight_histogram(loaded: LoadedModel) -> WeightHistogram:
    """Count the shares of the three weight values. Raises: ModelError E-MODEL-ARCH for a model without ternary weights."""
    layers = []
    for block in _ternary_blocks(loaded):
        names = {"qkv": ("q", "k", "v"), "o": ("o",), "up": ("gate", "up") if block.spec.gated else ("up",), "down": ("down",)}
        table = {}
        for fused, linear in block.linears().items():
            for name, (codes, scale) in zip(names[fused], linear.projections(), strict=True):
                minus, zero, plus = (float((codes == value).float().mean()) for value in (-1, 0, 1))
                table[name] = TernaryShares(minus, zero, plus, float(scale))
        layers.append(table)
    return WeightHistogram(loaded.name, layers)


@torch.inference_mode()
def input_histogram(
    loaded: LoadedModel, windows: Tensor, text_name: str, site: str, layer: int, *, progress: Progress = silent
) -> InputHistogram:
    """Measure the distribution of a site on windows [S, T] of any model, float or low-bit.

    Raises: InputError E-PARAM-SITE, E-PARAM-LAYER.
    """
    depth = len(loaded.model.blocks)
    if site not in SITES:
        raise InputError(f"site is {str(site)[:30]!r}: use one of {', '.join(SITES)}.", code="E-PARAM-SITE")
    if not isinstance(layer, int) or not 0 <= layer < depth:
        raise InputError(f"layer is {str(layer)[:30]!r}: this model has layers 0 to {depth - 1}.", code="E-PARAM-LAYER")
    if site not in loaded.model.blocks[layer].spec.sites:
        raise InputError(f"{site} of layer {layer} is inside of experts: choose another site.", code="E-PARAM-SITE")
    seen: list[Tensor] = []
    for block, run in _layers(loaded, windows, progress):
        if block.layer_index == layer:
            with block.slots.fill({site: lambda x: seen.append(x.flatten(0, 1))}):
                run()
            break
        run()
    x = torch.cat(seen)
    values = x.flatten().float().cpu()
    edge = float(values.abs().kthvalue(max(1, int(TAIL * len(values)))).values) or 1.0
    edges = torch.linspace(-edge, edge, BINS + 1)
    counts = torch.bincount(torch.bucketize(values.clamp(-edge, edge), edges[1:-1]), minlength=BINS)
    linear = _reader(loaded, site, layer)
    codes = torch.empty(0, dtype=torch.int8) if linear is None else linear.quantize(x).codes
    code_values, code_counts = codes.unique(return_counts=True)
    return InputHistogram(
        loaded.name,
        site,
        layer,
        "fp" if linear is None else linear.kind,
        text_name,
        windows.numel(),
        edges.tolist(),
        counts.tolist(),
        code_values.tolist(),
        code_counts.tolist(),
    )


def _layers(loaded: LoadedModel, windows: Tensor, progress: Progress) -> Iterator[tuple[DecoderBlock, Callable[[], None]]]:
    """Yield each block with a function to call once: it runs the block on all windows and carries the hidden states on."""
    blocks, inputs = loaded.model.blocks, embed(loaded.model, windows)
    hidden = [item.hidden for item in inputs]

    def run(block: DecoderBlock) -> None:
        progress(f"Layer {block.layer_index + 1} of {len(blocks)}", block.layer_index / len(blocks))
        for i, item in enumerate(inputs):
            hidden[i] = block(hidden[i], item.rotary)

    for block in blocks:
        yield block, partial(run, block)


class _Counter:
    """Counts of zeros and of all values, per site of one block."""

    def __init__(self, block: DecoderBlock) -> None:
        self.linears = {INPUT_SITE[name]: linear for name, linear in block.linears().items()}
        self.zeros: dict[str, int] = {}
        self.values: dict[str, int] = {}

    def __call__(self, site: str, x: Tensor) -> None:
        if site in self.linears:
            linear = self.linears[site]
            self._add(site, x if linear.kind == "fp" else linear.quantize(x).codes)

    def gate(self, module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._add("gates", output)

    def _add(self, name: str, x: Tensor) -> None:
        self.zeros[name] = self.zeros.get(name, 0) + int((x == 0).sum())
        self.values[name] = self.values.get(name, 0) + x.numel()

    def shares(self) -> dict[str, float]:
        return {name: self.zeros[name] / self.values[name] for name in self.zeros}


def _summary(sizes: dict[str, int], shares: dict[str, float]) -> Sparsity:
    gated, read = "gate" in sizes, shares["mlp_in"]
    found = {
        "qkv": shares["attn_in"],
        "out": shares["o_in"],
        "up": 1 - (1 - read) * (1 - shares["gates"]) if gated else read,
        "gate": read,
        "down": shares["down_in"],
    }
    return Sparsity(**found, gates=shares["gates"], overall=account(sizes, found)[0])


def _sizes(block: DecoderBlock) -> dict[str, int]:
    """Count the weights of each projection of one layer."""
    s, linears = block.spec, block.linears()
    sizes = {
        name: linears[fused].packed.shape[0] * linears[fused].in_features
        for name, fused in (("qkv", "qkv"), ("out", "o"), ("down", "down"))
    }
    return sizes | dict.fromkeys(("up", "gate") if s.gated else ("up",), s.hidden * s.ffn)


def _ternary_blocks(loaded: LoadedModel) -> list[DecoderBlock]:
    blocks = list(loaded.model.blocks)
    if any(b.rules is None for b in blocks):
        raise ModelError(
            "This model has no ternary weights: choose a BitNet model, or quantise with the method bitnet.", code="E-MODEL-ARCH"
        )
    return blocks


def _reader(loaded: LoadedModel, site: str, layer: int) -> TernaryLinear | None:
    """Return the ternary layer that quantises this site, or None."""
    linears = loaded.model.blocks[layer].linears()
    found = next((linear for name, linear in linears.items() if INPUT_SITE[name] == site), None)
    return found if isinstance(found, TernaryLinear) and found.kind != "fp" else None
