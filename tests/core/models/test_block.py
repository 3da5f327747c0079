"""One decoder block: what its sites and its parts are. Whole models are compared with transformers in test_decoder.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from core.models.architectures import adapter_for
from core.models.block import DecoderBlock
from core.models.norm import ReorderNorm
from core.models.tiny import tiny_model, tiny_transformers
from core.quant.affine import QParams
from core.quant.static import ActivationQuantizer
from tests.core.tools import ARCHITECTURES, block_inputs, float_blocks, quantised, relative, spec_of, tokens, watched

BOUND = 1e-5
"""Float32 sums in another order; measured: at most 1.3e-6."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_inputs_of_the_block_are_not_touched(architecture):
    loaded = tiny_model(architecture)
    inputs = block_inputs(loaded.model, tokens(2, 9))
    kept = inputs.hidden.clone()
    seen = {}
    block = float_blocks(loaded)[0]
    watched(block, inputs.hidden, inputs.rotary, lambda site, x: seen.update({site: (x, x.clone())}))
    assert torch.equal(inputs.hidden, kept)
    for site in ("attn_in", "q", "k", "v", "o_in", "mlp_in"):
        assert torch.equal(*seen[site]), f"{site} was changed in place after it was observed"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_observed_sites_are_what_they_say(architecture):
    """Against hooks on the transformers layer: inputs of its linears; q and k recomputed from their outputs."""
    loaded, source = tiny_model(architecture), tiny_transformers(architecture)
    adapter = adapter_for(source.config)
    layer, spec = adapter.decoder_layers(source)[0], spec_of(loaded)
    hooked: dict[str, Tensor] = {}

    def keep(name: str, output: bool):
        return lambda module, args, out: hooked.update({name: out if output else args[0]})

    paths = {"attn_in": adapter.qkv[0], "o_in": adapter.o, "mlp_in": adapter.mlp_in[0], "down_in": adapter.down}
    handles = [layer.get_submodule(p).register_forward_hook(keep(site, False)) for site, p in paths.items()]
    handles += [
        layer.get_submodule(p).register_forward_hook(keep(n, True))
        for n, p in zip("qkv", adapter.qkv, strict=True)
    ]
    inputs = block_inputs(loaded.model, tokens(2, 14))
    source(tokens(2, 14))
    for handle in handles:
        handle.remove()
    seen: dict[str, Tensor] = {}
    watched(float_blocks(loaded)[0], inputs.hidden, inputs.rotary, lambda site, x: seen.update({site: x.clone()}))
    assert list(seen) == ["attn_in", "q", "k", "v", "o_in", "mlp_in", "down_in"]
    expected = {site: hooked[site].reshape(seen[site].shape) for site in (*paths, "v")}
    for name in "qk":
        heads = hooked[name].reshape(2, 14, -1, spec.head_dim).transpose(1, 2)
        if spec.qk_norm:
            heads = layer.get_submodule(adapter.q_norm if name == "q" else adapter.k_norm)(heads)
        if spec.rope:
            cos, sin = (t.unsqueeze(1) for t in inputs.rotary)
            half = spec.head_dim // 2
            heads = heads * cos + torch.cat((-heads[..., half:], heads[..., :half]), -1) * sin
        heads = heads * spec.head_dim**-0.5 if name == "q" else heads
        expected[name] = heads.transpose(1, 2).flatten(2)
    for site, x in seen.items():
        assert x.shape[-1] == spec.width(site) and relative(x, expected[site]) < BOUND, site


@pytest.mark.parametrize("kind", ("rms", "layer"))
@pytest.mark.parametrize("affine", (True, False), ids=("affine", "plain"))
def test_norm_stores_in_any_order(kind, affine):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(30, generator=g) if affine else None
    bias = torch.randn(30, generator=g) if affine and kind == "layer" else None
    norm, x, order = (
        ReorderNorm(kind, weight, bias, 1e-5),
        torch.randn(4, 30, generator=g) * 3 + 1,
        torch.randperm(30, generator=g),
    )
    plain = norm(x)
    expected = (
        nn.functional.layer_norm(x, (30,), weight, bias) if kind == "layer" else nn.functional.rms_norm(x, (30,), weight, 1e-5)
    )
    assert relative(plain, expected) < 1e-6
    kept = x.clone()
    assert relative(norm.reordered(order)(x), plain[:, order]) < 1e-6 and torch.equal(x, kept)
    assert torch.equal(norm(x), plain), "the norm itself keeps its order"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sink_tokens_stay_in_float_wherever_they_are(architecture):
    """The first position of a sequence stays in float at every site; with a cache, later pieces have none."""
    q = quantised(architecture, scheme="W4A4")
    block, inputs = q.blocks[0], block_inputs(q.model, tokens(2, 6))
    calls = []
    for linear in block.linears().values():
        def parts(x, sizes, use, old=linear.parts):
            calls.append(use.float_tokens)
            return old(x, sizes, use)

        linear.parts = parts
    block(inputs.hidden, inputs.rotary)
    assert calls == [1, 1, 1, 1]  # the first token of every sequence
    calls.clear()
    cache = q.model.decoder.new_cache()
    q.model(tokens(2, 6), cache=cache)
    q.model(tokens(2, 1), cache=cache)
    assert len(calls) == 8 and not any(calls[4:])


def test_a_quantiser_of_the_head_layout_reaches_the_right_channels():
    """One channel of one kv head gets a coarse grid: only it changes."""
    loaded = tiny_model("llama")
    block = float_blocks(loaded)[0]
    scale = torch.full((32,), 1e-4)
    scale[19] = 1e6  # head 1, channel 3: everything rounds to zero
    block.attention.v_quantizer = ActivationQuantizer(8, QParams(scale, torch.zeros(32)), torch.arange(33))
    block.attention.v_quantizer.lower.fill_(-1e9)
    block.attention.v_quantizer.upper.fill_(1e9)
    inputs = block_inputs(loaded.model, tokens(1, 8))
    seen: dict[str, Tensor] = {}
    for name, b in (("changed", block), ("plain", float_blocks(loaded)[0])):
        watched(b, inputs.hidden, inputs.rotary, lambda site, x, n=name: seen.update({n: x}) if site == "o_in" else None)
    changed = ((seen["changed"] - seen["plain"]).abs().amax((0, 1)) > 1e-2).nonzero().flatten().tolist()
    assert changed == [h * 16 + 3 for h in (4, 5, 6, 7)], "the four query heads of kv head 1"


def test_blocks_are_plain_modules():
    block: DecoderBlock = float_blocks(tiny_model("qwen3"))[1]
    assert not block.training and not any(p.requires_grad for p in block.parameters())
    assert set(block.linears()) == {"qkv", "o", "up", "down"} and block.layer_index == 1
