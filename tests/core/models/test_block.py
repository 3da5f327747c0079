"""The float DecoderBlock computes what transformers' layer computes, for every architecture, with and without a cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from core.models.block import DecoderBlock, ReorderNorm
from core.models.io.load import LoadedModel
from core.models.shell import block_inputs, final_hidden, quantized_blocks, with_layers
from core.models.tiny import tiny_model
from core.quant.affine import QParams
from core.quant.static import ActivationQuantizer
from tests.core.tools import ARCHITECTURES, float_blocks, in_steps, quantised, relative, spec_of, tokens

BOUND = 1e-5
"""Float32 sums in another order; measured: at most 1.3e-6."""


def with_blocks(loaded: LoadedModel) -> nn.Module:
    return with_layers(loaded.model, loaded.adapter, float_blocks(loaded))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prefill(architecture):
    loaded = tiny_model(architecture, layers=3)
    ids = tokens(2, 33)
    assert relative(with_blocks(loaded)(ids).logits, loaded.model(ids).logits) < BOUND


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_layer_alone(architecture):
    """Errors cannot cancel between layers: same input, every layer compared by itself."""
    loaded = tiny_model(architecture, layers=3)
    inputs = block_inputs(loaded.model, loaded.adapter, tokens(2, 17))
    for index, (layer, block) in enumerate(zip(loaded.adapter.decoder_layers(loaded.model), float_blocks(loaded), strict=True)):
        expected = layer(inputs.hidden, **inputs.kwargs[index])
        expected = expected[0] if isinstance(expected, tuple) else expected
        update = block(inputs.hidden, **inputs.kwargs[index]) - inputs.hidden
        assert relative(update, expected - inputs.hidden) < BOUND


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("steps", [(1,), (7, 3), (19,)], ids=str)
def test_incremental_decode(architecture, steps):
    loaded = tiny_model(architecture)
    ids = tokens(2, 20, seed=1)
    found = in_steps(with_blocks(loaded), ids, steps=steps)
    assert relative(found, loaded.model(ids).logits) < BOUND
    assert relative(found, in_steps(loaded.model, ids, steps=steps)) < BOUND


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("side", ("left", "right"))
def test_padded_batches(architecture, side):
    loaded = tiny_model(architecture)
    ids, mask = tokens(3, 18, seed=2), torch.ones(3, 18, dtype=torch.int64)
    real = slice(6, None) if side == "left" else slice(None, 12)
    mask[1] = 0
    mask[1, real] = 1
    expected = loaded.model(ids, attention_mask=mask).logits
    found = with_blocks(loaded)(ids, attention_mask=mask).logits
    assert torch.isfinite(found).all()
    assert relative(found[mask.bool()], expected[mask.bool()]) < BOUND
    if side == "right":
        assert relative(found[1, :12], loaded.model(ids[1:2, :12]).logits[0]) < BOUND


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_is_unchanged(architecture):
    loaded = tiny_model(architecture)
    ids = tokens(2, 9, seed=3)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 257}
    assert with_blocks(loaded).generate(ids, **options).tolist() == loaded.model.generate(ids, **options).tolist()


def test_a_sliding_window_is_kept():
    loaded = tiny_model("mistral", sliding_window=8)
    ids = tokens(1, 30)
    expected = loaded.model(ids).logits
    assert relative(expected, tiny_model("mistral").model(ids).logits) > 0.01, "the window acts"
    assert relative(with_blocks(loaded)(ids).logits, expected) < BOUND
    assert relative(in_steps(with_blocks(loaded), ids), expected) < BOUND


@pytest.mark.parametrize(
    "architecture, options",
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("qwen3", {"attention_bias": True}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"num_key_value_heads": 8}),
        ("llama", {"num_key_value_heads": 1}),
        ("llama", {"head_dim": 32}),
        ("qwen3", {"head_dim": 32}),
        ("llama", {"rms_norm_eps": 0.1}),
        ("opt", {"activation_function": "gelu"}),
        ("opt", {"enable_bias": False}),
        ("opt", {"layer_norm_elementwise_affine": False}),
        ("opt", {"word_embed_proj_dim": 32}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 10000.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
    ],
    ids=lambda v: (
        v if isinstance(v, str) else ",".join(f"{k}={x if not isinstance(x, dict) else x['rope_type']}" for k, x in v.items())
    ),
)
def test_every_option_of_an_architecture(architecture, options):
    loaded = tiny_model(architecture, **options)
    ids = tokens(2, 20)
    expected = loaded.model(ids).logits
    assert relative(with_blocks(loaded)(ids).logits, expected) < BOUND
    assert relative(in_steps(with_blocks(loaded), ids), expected) < BOUND


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_is_not_touched(architecture):
    loaded = tiny_model(architecture)
    before = {k: v.clone() for k, v in loaded.model.state_dict().items()}
    layers = list(loaded.adapter.decoder_layers(loaded.model))
    other = with_blocks(loaded)
    for block in loaded.adapter.decoder_layers(other):
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.zero_()  # a copy: the source must not notice
    assert all(torch.equal(v, loaded.model.state_dict()[k]) for k, v in before.items())
    assert all(a is b for a, b in zip(loaded.adapter.decoder_layers(loaded.model), layers, strict=True))
    assert other.get_input_embeddings() is loaded.model.get_input_embeddings(), "the shell is shared, not copied"
    assert quantized_blocks(loaded.model, loaded.adapter) == [] and len(quantized_blocks(other, loaded.adapter)) == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_inputs_of_the_block_are_not_touched(architecture):
    loaded = tiny_model(architecture)
    inputs = block_inputs(loaded.model, loaded.adapter, tokens(2, 9))
    kept = inputs.hidden.clone()
    seen = {}
    block = float_blocks(loaded)[0]
    block(inputs.hidden, **inputs.kwargs[0], observe=lambda site, x: seen.update({site: (x, x.clone())}))
    assert torch.equal(inputs.hidden, kept)
    for site in ("attn_in", "q", "k", "v", "o_in", "mlp_in"):
        assert torch.equal(*seen[site]), f"{site} was changed in place after it was observed"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_observed_sites_are_what_they_say(architecture):
    """Against hooks on the transformers layer: inputs of its linears; q and k recomputed from their outputs."""
    loaded = tiny_model(architecture)
    layer, spec, adapter = loaded.adapter.decoder_layers(loaded.model)[0], spec_of(loaded), loaded.adapter
    hooked: dict[str, Tensor] = {}

    def keep(name: str, output: bool):
        return lambda module, args, out: hooked.update({name: out if output else args[0]})

    paths = {"attn_in": adapter.q, "o_in": adapter.o, "mlp_in": adapter.mlp_in[0], "down_in": adapter.down}
    handles = [layer.get_submodule(p).register_forward_hook(keep(site, False)) for site, p in paths.items()]
    handles += [
        layer.get_submodule(p).register_forward_hook(keep(n, True))
        for n, p in zip("qkv", (adapter.q, adapter.k, adapter.v), strict=True)
    ]
    inputs = block_inputs(loaded.model, adapter, tokens(2, 14))
    layer(inputs.hidden, **inputs.kwargs[0])
    for handle in handles:
        handle.remove()
    seen: dict[str, Tensor] = {}
    float_blocks(loaded)[0](inputs.hidden, **inputs.kwargs[0], observe=lambda site, x: seen.update({site: x.clone()}))
    assert list(seen) == ["attn_in", "q", "k", "v", "o_in", "mlp_in", "down_in"]
    expected = {site: hooked[site].reshape(seen[site].shape) for site in (*paths, "v")}
    for name in "qk":
        heads = hooked[name].reshape(2, 14, -1, spec.head_dim).transpose(1, 2)
        if spec.qk_norm:
            heads = layer.get_submodule(adapter.q_norm if name == "q" else adapter.k_norm)(heads)
        if spec.rope:
            cos, sin = (t.unsqueeze(1) for t in inputs.kwargs[0]["position_embeddings"])
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
    norm.reorder(order)
    assert relative(norm(x), plain[:, order]) < 1e-6 and torch.equal(x, kept)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sink_tokens_stay_in_float_wherever_they_are(architecture):
    """The first position of a sequence is keep_float at every site; with a cache, later pieces have none."""
    q = quantised(architecture, scheme="W4A4")
    block, inputs = q.blocks[0], block_inputs(q.model, q.loaded.adapter, tokens(2, 6))
    calls = []
    for name in ("qkv", "o", "up", "down"):
        linear = getattr(block, name)
        def parts(x, sizes, keep_float=None, old=linear.parts, **own):
            calls.append(keep_float)
            return old(x, sizes, keep_float, **own)

        linear.parts = parts
    block(inputs.hidden, **inputs.kwargs[0])
    assert calls == [1, 1, 1, 1]  # the first token of every sequence
    calls.clear()
    cache = DynamicCache(config=q.model.config)
    q.model(tokens(2, 6), past_key_values=cache, use_cache=True)
    q.model(tokens(2, 1), past_key_values=cache, use_cache=True)
    assert len(calls) == 8 and all(c is None for c in calls[4:])


def test_left_padding_is_exact_without_sink_tokens():
    q, ids = quantised("llama", scheme="W4A4KV", variant="official"), tokens(2, 14, seed=4)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    found = q.model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    assert relative(found[0, 5:], q.model(ids[:1, 5:]).logits[0]) < BOUND


def test_hidden_states_before_the_head_are_the_last_layers():
    loaded, ids = tiny_model("llama"), tokens(2, 11)
    hidden = final_hidden(loaded.model, ids)
    assert relative(loaded.model.get_output_embeddings()(hidden), loaded.model(ids).logits) < 1e-6


def test_a_quantiser_of_the_head_layout_reaches_the_right_channels():
    """One channel of one kv head gets a coarse grid: only it changes."""
    loaded = tiny_model("llama")
    block = float_blocks(loaded)[0]
    scale = torch.full((32,), 1e-4)
    scale[19] = 1e6  # head 1, channel 3: everything rounds to zero
    block.v_quantizer = ActivationQuantizer(8, QParams(scale, torch.zeros(32)), torch.arange(33))
    block.v_quantizer.lower.fill_(-1e9)
    block.v_quantizer.upper.fill_(1e9)
    inputs = block_inputs(loaded.model, loaded.adapter, tokens(1, 8))
    seen: dict[str, Tensor] = {}
    for name, b in (("changed", block), ("plain", float_blocks(loaded)[0])):
        b(inputs.hidden, **inputs.kwargs[0], observe=lambda site, x, n=name: seen.update({n: x}) if site == "o_in" else None)
    changed = ((seen["changed"] - seen["plain"]).abs().amax((0, 1)) > 1e-2).nonzero().flatten().tolist()
    assert changed == [h * 16 + 3 for h in (4, 5, 6, 7)], "the four query heads of kv head 1"


def test_blocks_are_plain_modules():
    block: DecoderBlock = float_blocks(tiny_model("qwen3"))[1]
    assert not block.training and not any(p.requires_grad for p in block.parameters())
    assert set(block.linears()) == {"qkv", "o", "up", "down"} and block.layer_index == 1
