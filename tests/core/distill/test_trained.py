"""The two blocks of a distillation: equal to the quantised block at the start, equal to each other after any change."""

from __future__ import annotations

import pytest
import torch

from core.distill.trained import TrainedBlock
from core.models.block import DecoderBlock
from core.models.tiny import tiny_model
from core.quant.kv_grid import fake_per_row
from core.recipe import Bits, RotationOptions
from kernels import fake_quantize, straight_through
from tests.core.tools import ARCHITECTURES, Quantised, gaussian, quantised, tokens

IDS = tokens(2, 24)
RECIPES = {
    "rotation": {"method": "rotation", "variant": "strict"},
    "rotation, range per token": {"method": "rotation", "scheme": "W4A4KV", "rotation": RotationOptions(kv="token")},
    "rotation, one range": {"method": "rotation", "rotation": RotationOptions(dynamic=False, group=0)},
    "float weights": {"method": "rotation", "scheme": "custom", "bits": Bits(down_in=4, v=4)},
    "rptq": {"method": "rptq"},
    "rptq official": {"method": "rptq", "variant": "official"},
    "rptq, one step": {"method": "rptq", "segments": "pow2"},
    "rtn": {"method": "rtn", "weights": "rtn", "scheme": "W4A8"},
}


def run(done: Quantised, blocks: list) -> torch.Tensor:
    """Logits [B, T, V] of these blocks; a hidden state that needs a gradient enters."""
    decoder = done.model.decoder
    x, rotary = decoder.enter(IDS, torch.arange(IDS.shape[1])[None])
    x = x.detach().requires_grad_(not isinstance(blocks[0], DecoderBlock))
    for block in blocks:
        x = block(x, rotary)
    return decoder.head(decoder.leave(x))


def moved(blocks: list[TrainedBlock]) -> list[TrainedBlock]:
    """Change every trained tensor by its gradient's sign, far enough that codes, scales and zero points become others."""
    with torch.no_grad():
        for block in blocks:
            for name, tensor in block.own.items():
                size = {"zero": 0.7, "weight": 0.3 * float(tensor.abs().mean())}.get(name.rpartition(".")[2], 0.05)
                tensor.sub_(size * tensor.grad.sign())
    return blocks


@pytest.mark.parametrize("recipe", RECIPES)
def test_both_blocks_compute_the_same_before_and_after_a_change(recipe):
    done = quantised("llama", **RECIPES[recipe])
    start = run(done, list(done.blocks)).detach()
    blocks = [TrainedBlock(block) for block in done.blocks]
    logits = run(done, blocks)
    assert torch.equal(logits, start), "the trained block begins as the quantised one"
    logits.square().mean().backward()
    packed = [block.packed() for block in blocks]
    assert torch.equal(run(done, packed), start)
    after = run(done, moved(blocks)).detach()
    assert torch.equal(run(done, packed), start), "what was packed keeps its numbers"
    assert not torch.equal(after, start)
    packed = [block.packed() for block in blocks]
    assert torch.allclose(run(done, packed), after, rtol=1e-4, atol=1e-5)
    for new, old in zip(packed, done.blocks, strict=True):
        for name, layer in new.linears().items():
            before = old.linears()[name]
            assert [t.dtype for t in layer.stored_tensors()] == [t.dtype for t in before.stored_tensors()]
            assert layer.stored_bytes == before.stored_bytes and str(layer.choice) == str(before.choice)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_everything_that_is_stored_is_trained(architecture):
    done = quantised(architecture, method="rotation", variant="strict")
    blocks = [TrainedBlock(block) for block in done.blocks]
    run(done, blocks).square().mean().backward()
    spec = done.blocks[0].spec
    for block in blocks:
        still = {name for name, tensor in block.own.items() if tensor.grad is None or not bool(tensor.grad.any())}
        zeros = {f"{name}.zero" for name in block.block.linears()}
        assert still <= zeros, "at first no weight lies outside of its grid, so no zero point matters"
        names = {"k.scale", "v.scale", "q.clip", "qkv.input.clip", "norm1.gain"}
        assert names | {f"{n}.{p}" for n in block.block.linears() for p in ("weight", "scale")} <= block.own.keys()
        assert ("q_norm" in block.own) == spec.qk_norm and ("attn_sub_norm.gain" in block.own) == spec.sub_norms
        assert ("norm1.bias" in block.own) == (spec.norm == "layer")


def test_a_sliding_window_with_a_float_softmax_can_be_trained():
    base = tiny_model("mistral", layers=1, sliding_window=8)
    done = quantised("mistral", base=base, method="rotation", scheme="W4A4KV")
    run(done, [TrainedBlock(block) for block in done.blocks]).sum().backward()


def test_rounding_is_straight_through():
    x = gaussian(3, 8).requires_grad_()
    scale = torch.tensor([0.25] * 8, requires_grad=True)
    lower, upper = torch.tensor(-3.0), torch.tensor(2.0)
    found = fake_quantize(x, scale, lower, upper)
    assert torch.equal(found, fake_quantize(x.detach(), scale.detach(), lower, upper))
    found.sum().backward()
    codes = (x / scale).detach()
    inside = (codes.round() >= -3) & (codes.round() <= 2)
    assert torch.equal(x.grad, inside.float()), "clipped numbers get no gradient"
    wanted = torch.where(inside, codes.round() - codes, codes.round().clamp(-3, 2)).sum(0)
    assert torch.allclose(scale.grad, wanted, atol=1e-5), "the gradient of a learned step size"
    x.grad = None
    fake_per_row(x, 4).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 8))
    fixed = gaussian(2)
    assert straight_through(fixed, fixed) is fixed
