"""What tests of changed bases share: a model in the bases that the method rotation plans, without quantisers."""

from __future__ import annotations

import dataclasses

import torch

from core.calibration.observe import Recorder
from core.methods import method
from core.methods.rotation.method import change_bases, with_quantizers
from core.methods.sequential import layer_statistics, watch_layer
from core.models.loaded import LoadedModel
from core.recipe import Bits, QuantRecipe, RotationOptions
from tests.core.tools import block_inputs, float_blocks, tokens

W4A4 = Bits(**dict.fromkeys((entry.name for entry in dataclasses.fields(Bits)), 4))


def rotated(loaded: LoadedModel, options: RotationOptions) -> torch.nn.Module:
    """The model in the bases that the method plans at 4 bits everywhere, with all quantisers off."""
    planner, blocks = method("rotation"), []
    recipe = QuantRecipe("tiny", method="rotation", scheme="custom", bits=W4A4, rotation=options)
    item = block_inputs(loaded.model, tokens(4, 32, seed=3))
    hidden = [item.hidden]
    for block in float_blocks(loaded):
        recorder = Recorder(block.layer_index, 4, hessians_wanted=False)
        hidden = watch_layer(block, hidden, [item], [recorder])
        plan = planner.plan_layer(layer_statistics(block, recorder, recorder), recipe, block.spec)
        off = {site: dataclasses.replace(own, bits=16, params=None) for site, own in plan.sites.items()}
        plan = dataclasses.replace(plan, sites=off, softmax_bits=16, sink_tokens=0)
        blocks.append(with_quantizers(change_bases(block, plan), plan))
    return loaded.model.with_blocks(blocks)
