"""What tests of changed bases share: a model in the bases that the method rotation plans, without quantisers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from core.calibration.observe import Recorder
from core.evaluation.memory import measured_parts
from core.methods import method
from core.methods.base import LayerPlan
from core.methods.rotation.method import change_bases, with_quantizers
from core.methods.sequential import layer_statistics, watch_layer
from core.models.block import DecoderBlock
from core.models.decoder import CausalModel
from core.models.io.quantized import load_quantized, save_quantized
from core.models.loaded import LoadedModel
from core.recipe import Bits, QuantRecipe, RotationOptions
from tests.core.methods.reorder_tools import IDS
from tests.core.tools import Quantised, block_inputs, float_blocks, in_steps, relative, tokens

W4A4 = Bits(**dict.fromkeys((entry.name for entry in dataclasses.fields(Bits)), 4))


def rotated(loaded: LoadedModel, options: RotationOptions) -> torch.nn.Module:
    """The model in the bases that the method plans at 4 bits everywhere, with all quantisers off."""
    return folded(loaded, QuantRecipe("tiny", method="rotation", scheme="custom", bits=W4A4, rotation=options), change_bases)


def folded(
    loaded: LoadedModel, recipe: QuantRecipe, fold: Callable[[DecoderBlock, LayerPlan], DecoderBlock]
) -> torch.nn.Module:
    """The model with what `fold` takes of each layer's plan, and all quantisers off."""
    planner, blocks = method(recipe.method), []
    item = block_inputs(loaded.model, tokens(4, 32, seed=3))
    hidden = [item.hidden]
    for block in float_blocks(loaded):
        recorder = Recorder(block.layer_index, 4, hessians_wanted=False)
        hidden = watch_layer(block, hidden, [item], [recorder])
        plan = planner.plan_layer(layer_statistics(block, recorder, recorder), recipe, block.spec)
        off = {site: dataclasses.replace(own, bits=16, params=None) for site, own in plan.sites.items()}
        plan = dataclasses.replace(plan, sites=off, softmax_bits=16, sink_tokens=0)
        blocks.append(with_quantizers(fold(block, plan), plan))
    return loaded.model.with_blocks(blocks)


def assert_same_after_saving(done: Quantised, folder: Path) -> CausalModel:
    """Assert that a cache and a saved folder give the model's logits, and the same bytes; return the loaded model."""
    expected = done.model(IDS).logits
    assert relative(in_steps(done.model, IDS), expected) < 1e-4
    save_quantized(folder, done.loaded, {"recipe": done.recipe.to_record()})
    again = load_quantized(folder).model
    assert torch.equal(again(IDS).logits, expected)
    assert measured_parts(again) == measured_parts(done.model)
    return again
