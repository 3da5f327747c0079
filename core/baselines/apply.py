"""Make a model's baseline: the same decoder, with weights or a KV cache of another library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from core.baselines.cache import STORES
from core.baselines.registry import Baseline, baseline_key, find_baseline
from core.baselines.weights import CALIBRATED, GROUP, GROUPED, QUANTIZERS
from core.calibration.data import calibration_tokens
from core.calibration.observe import Recorder, embed
from core.errors import InputError, ModelError
from core.methods.sequential import run_layer, watch_layer
from core.models.block import DecoderBlock
from core.models.io.foreign import quiet
from core.models.loaded import LoadedModel
from core.progress import Progress, silent
from core.quant.linear.foreign import ForeignLinear
from core.recipe import INPUT_SITE, Calibration

CACHE_GROUPS = (64, 32, 16)
"""Numbers of a group of transformers' quantised cache: 64 is its default, a smaller one is for keys that 64 does not fit."""


@torch.inference_mode()
def with_baseline(base: LoadedModel, name: str, *, progress: Progress = silent) -> LoadedModel:
    """Make the baseline `name` of a float model, which is not changed and shares what is not quantised.

    Raises: as `find_baseline`; ModelError E-MODEL-QUANTIZED where weights are not float; InputError E-PARAM-BASELINE where the
        model's sizes do not fit the library's groups.
    """
    chosen = find_baseline(name)
    if not all(block.is_float for block in base.model.blocks):
        raise ModelError(f"This model is already quantised or ternary: apply {name} to a float model.", code="E-MODEL-QUANTIZED")
    blocks, made = base.model.blocks, []
    moments = _Moments(base) if name in CALIBRATED else None
    for index, block in enumerate(blocks):
        progress(f"Layer {index + 1} of {len(blocks)}: {chosen.title}", index / len(blocks))
        with quiet():
            if chosen.keys_values:
                made.append(_with_store(block, chosen))
            else:
                made.append(_with_weights(block, chosen, {} if moments is None else moments.of(block)))
        if moments is not None:
            moments.advance(made[-1])
    return replace(
        base,
        model=base.model.with_blocks(made),
        name=baseline_key(base.name, name),
        source=f"Quantised by {chosen.label} from {base.name}. {base.source}",
        path=None,
        label=f"{base.name} · {chosen.label}",
    )


class _Moments:
    """What enters the linear layers on the calibration text, behind the layers that are quantised already."""

    def __init__(self, base: LoadedModel) -> None:
        self.windows, _ = calibration_tokens(base, Calibration(), 0, True)
        self.inputs = embed(base.model, self.windows)
        self.hidden = [item.hidden for item in self.inputs]

    def of(self, block: DecoderBlock) -> dict[str, Tensor]:
        """Compute the mean of x xᵀ [K, K] at every site that a linear layer of the next block reads."""
        recorder = Recorder(block.layer_index, len(self.windows), hessians_wanted=True)
        watch_layer(block, self.hidden, self.inputs, [recorder])
        return {site: total / self.windows.numel() for site, total in recorder.hessians.items()}

    def advance(self, made: DecoderBlock) -> None:
        """Pass the hidden states through the block that was made."""
        self.hidden = run_layer(made, self.hidden, self.inputs)


def _with_weights(block: DecoderBlock, chosen: Baseline, moments: Mapping[str, Tensor]) -> DecoderBlock:
    """Replace the four linear layers of a block. Args: moments: of their inputs, by site, where the library needs them."""
    layers = {}
    for part, linear in block.linears().items():
        columns = linear.in_features
        if chosen.name in GROUPED and columns % GROUP:
            raise InputError(
                f"{chosen.name} quantises groups of {GROUP} columns, and {part} has {columns}: choose another baseline.",
                code="E-PARAM-BASELINE",
            )
        own = linear.weight.detach().float()
        calibrated = chosen.name in CALIBRATED
        weight = CALIBRATED[chosen.name](own, moments[INPUT_SITE[part]]) if calibrated else QUANTIZERS[chosen.name](own)
        how = "multiplied by the library" if weight.product else "dequantised by the library, multiplied in float"
        shape, bias = (linear.out_features, columns), None if linear.bias is None else linear.bias.detach()
        layers[part] = ForeignLinear(weight, shape, bias, bits=chosen.bits, reason=f"{chosen.label}: {how}")
    return block.with_parts(**layers)


def _with_store(block: DecoderBlock, chosen: Baseline) -> DecoderBlock:
    """Copy a block, with another store of its keys and values."""
    spec, made = block.spec, block.with_parts()
    if block.attention.window is not None:
        raise InputError(f"{chosen.name} takes no sliding window: choose another baseline.", code="E-PARAM-BASELINE")
    made.attention.store = STORES[chosen.name]
    if len(chosen.packages) > 1:  # groups; HQQ puts codes of two groups into a byte and fails where a token ends inside one
        numbers = spec.kv_heads * spec.head_dim
        unit = 8 // chosen.bits if chosen.name.startswith("kv-hqq") else 1
        fits = [group for group in CACHE_GROUPS if numbers % (group * unit) == 0]
        if not fits:
            raise InputError(
                f"{chosen.name} quantises groups of 64, 32 or 16 numbers, and a token's keys have {numbers}: choose another "
                "baseline.",
                code="E-PARAM-BASELINE",
            )
        made.attention.store = partial(STORES[chosen.name], fits[0])
    return made
