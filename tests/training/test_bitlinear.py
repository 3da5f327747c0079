"""BitLinear: its output against the integer product, its gradients against the closed form, and what a mode changes."""

from __future__ import annotations

import pytest
import torch
from transformers import BitNetConfig, BitNetForCausalLM, OPTConfig, OPTForCausalLM

from core.errors import InputError
from core.quant.dynamic import INPUT_KINDS, MODES, quantize_input, quantize_weight, rotates, topk_mask
from kernels import hadamard
from training.bitlinear import BitLinear, convert_to_bitlinear, set_mode


@pytest.fixture
def layer():
    """A BitLinear 24 → 12 whose weights are of order one."""
    torch.manual_seed(0)
    made = BitLinear(24, 12)
    torch.nn.init.normal_(made.weight)
    return made


def tiny(seed: int = 0, **fields) -> BitNetForCausalLM:
    """A random BitNet of two layers."""
    torch.manual_seed(seed)
    config = BitNetConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=300,
                          num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, **fields)
    return BitNetForCausalLM(config)


@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_the_output_is_the_integer_product(layer, kind):
    layer.kind = kind
    x = torch.randn(3, 5, 24)
    codes, scale = quantize_input(x, kind)
    ternary, alpha = quantize_weight(layer.weight.detach(), kind)
    whole = (codes.reshape(15, 24).to(torch.int64) @ ternary.to(torch.int64).T).reshape(3, 5, 12)
    assert torch.allclose(layer(x), (whole.double() * (scale.double() * alpha.double())).float(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_gradients_use_the_quantised_operands_at_every_position(layer, kind):
    """dx = dy (α t) [R], dW = dyᵀ (c s) [R]: also at positions that TopK sets to zero or that a clip changes."""
    layer.kind = kind
    x = torch.randn(7, 24, requires_grad=True)
    upstream = torch.randn(7, 12)
    layer(x).backward(upstream)
    codes, scale = quantize_input(x.detach(), kind)
    ternary, alpha = quantize_weight(layer.weight.detach(), kind)
    basis = hadamard(torch.eye(24)) if rotates(kind) else torch.eye(24)
    assert torch.allclose(x.grad, upstream @ (alpha * ternary) @ basis, rtol=1e-5, atol=2e-6)
    assert torch.allclose(layer.weight.grad, upstream.T @ (codes * scale) @ basis, rtol=1e-5, atol=1e-5)
    if kind == "topk8":
        masked = ~topk_mask(x.detach())
        assert masked.any() and (x.grad[masked] != 0).all()


def test_gradients_have_the_shape_of_batched_inputs(layer):
    x = torch.randn(2, 3, 24, requires_grad=True)
    layer(x).sum().backward()
    flat = x.detach().reshape(6, 24).requires_grad_()
    first = layer.weight.grad.clone()
    layer.weight.grad = None
    layer(flat).sum().backward()
    assert torch.equal(x.grad.reshape(6, 24), flat.grad) and torch.allclose(first, layer.weight.grad, rtol=1e-5, atol=1e-5)


def test_fp_is_an_ordinary_linear_layer(layer):
    layer.kind = "fp"
    x = torch.randn(4, 24)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight))


def test_autocast_computes_in_bfloat16_with_float32_master_gradients(layer):
    x = torch.randn(64, 24)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    low.float().sum().backward()
    assert low.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    error = ((low.float() - exact).abs().max() / exact.abs().max()).item()
    assert error < 2**-7  # two roundings to 8 significant bits; the products themselves are exact


def test_conversion_keeps_parameters_and_names():
    model = tiny()
    before = dict(model.named_parameters())
    convert_to_bitlinear(model, "w1.58a8")
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    layers = [m for m in model.modules() if isinstance(m, BitLinear)]
    assert len(layers) == 14 and not isinstance(model.lm_head, BitLinear)


@pytest.mark.parametrize("mode", MODES)
def test_every_projection_takes_its_sites_quantiser(mode):
    model = convert_to_bitlinear(tiny(), mode)
    block, kinds = model.model.layers[1], MODES[mode]
    assert {block.self_attn.q_proj.kind, block.self_attn.k_proj.kind, block.self_attn.v_proj.kind} == {kinds["attn_in"]}
    assert block.self_attn.o_proj.kind == kinds["o_in"] and block.mlp.down_proj.kind == kinds["down_in"]
    assert {block.mlp.gate_proj.kind, block.mlp.up_proj.kind} == {kinds["mlp_in"]}


def test_a_mode_changes_the_output_and_nothing_that_is_stored():
    """The stage switch: same parameters, same optimizer state, another function."""
    model = convert_to_bitlinear(tiny(), "w1.58a8")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    rows = torch.randint(300, (2, 16))
    for _ in range(2):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in model.named_parameters()}
    stage1 = model(input_ids=rows).logits
    set_mode(model, "a4.8")
    stage2 = model(input_ids=rows).logits
    assert not torch.equal(stage1, stage2)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert all(torch.equal(optimizer.state[parameter][k], v) for k, v in moments[name].items())
    set_mode(model, "w1.58a8")
    assert torch.equal(model(input_ids=rows).logits, stage1)


def test_single_inputs_can_differ_from_the_mode():
    model = convert_to_bitlinear(tiny(), "w1.58a8", inputs={"down_in": "fp4"})
    block = model.model.layers[0]
    assert block.mlp.down_proj.kind == "fp4" and block.mlp.up_proj.kind == "int8"


@pytest.mark.parametrize(("mode", "inputs", "word"), [
    ("a5", None, "a5"), ("w1.58a8", {"down": "int8"}, "down_in"), ("a4.8", {"down_in": "int2"}, "int2"),
    ("fp", {"down_in": "int8"}, "ternary"),
])
def test_unknown_modes_are_refused(mode, inputs, word):
    with pytest.raises(InputError, match=word):
        convert_to_bitlinear(tiny(), mode, inputs=inputs)


def test_a_model_of_another_shape_is_refused():
    config = OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=300)
    model = OPTForCausalLM(config)
    model.model.layers = model.model.decoder.layers
    with pytest.raises(InputError, match="cannot become ternary"):
        convert_to_bitlinear(model, "w1.58a8")
