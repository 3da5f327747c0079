"""BitNet checkpoints: every stored format gives the model that transformers computes from the same weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.integrations import bitnet as published

from core.calibration.observe import observe_layers
from core.errors import ModelError
from core.models.io.bitnet import SHARD_BYTES, pack_rows, save_bitnet, unpack_rows
from core.models.io.load import load_model
from core.models.loaded import LoadedModel
from core.quant.dynamic import MODES, ternary_absmean
from core.quant.linear.ternary import TernaryLinear
from core.recipe import SITES, Bits
from core.storage import verify
from tests.core.models.io.bitnet_tools import CARD, IDS, write
from tests.core.tools import quantised, relative, tiny_source, tokens
from training.bitlinear import convert_to_bitlinear

FORMATS = ("saved", "quantscope masters", "online", "bitlinear", "bfloat16")

pytestmark = pytest.mark.usefixtures("no_compiler")


def as_transformers_computes(loaded: LoadedModel) -> nn.Module:
    """The same masters behind transformers' own layers, rounding online in float32."""
    model = tiny_source("bitnet").model
    model.load_state_dict(loaded.model.state_dict())
    for layer in model.model.layers:
        for name, linear in list(layer.named_modules()):
            if isinstance(linear, nn.Linear):
                made = published.AutoBitLinear(linear.in_features, linear.out_features, bias=False, online_quant=True)
                made.weight = linear.weight
                layer.set_submodule(name, made)
    return model.eval()


# the published layout


def test_rows_are_packed_as_published():
    assert unpack_rows(torch.tensor([[0b10100001]], dtype=torch.uint8)).flatten().tolist() == [0, -1, 1, 1]
    codes = torch.randint(-1, 2, (24, 10), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    packed = pack_rows(codes)
    assert packed.shape == (6, 10) and torch.equal(unpack_rows(packed), codes)
    assert torch.equal(packed, published.pack_weights(codes.clone()))
    assert torch.equal(published.unpack_weights(packed, torch.float32), codes.float())
    with pytest.raises(ValueError, match="10 rows"):
        pack_rows(codes[:10])
    with pytest.raises(ValueError, match="code 3"):
        unpack_rows(torch.tensor([[0b00110000]], dtype=torch.uint8))


# reading


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_agrees_with_transformers(tmp_path, form):
    loaded = tiny_source("bitnet")
    if form == "bfloat16":
        loaded.model.to(torch.bfloat16).to(torch.float32)
    expected = as_transformers_computes(loaded)(IDS).logits
    native = load_model(str(write(tmp_path / "m", form, loaded)))
    assert relative(native.model(IDS).logits, expected) <= 1e-3  # measured: at most 3e-6
    assert native.model.config.model_type == "bitnet"
    assert len(native.model.blocks) == 2
    assert relative(loaded.model(IDS).logits, expected) > 0.1, "without rounding it is another function"


@pytest.mark.parametrize("packed", ["autobitlinear", "bitlinear"])
def test_packed_weights_agree_with_transformers_own_packed_layer(tmp_path, packed):
    """transformers' offline layer on the very tensors of the folder: which of the two divides by weight_scale."""
    folder = write(tmp_path / "m", "saved" if packed == "autobitlinear" else "bitlinear", tiny_source("bitnet"))
    state = load_file(folder / "model.safetensors")
    block = load_model(str(folder)).model.blocks[0]
    name = "model.layers.0.self_attn.o_proj"
    weight, scale = state[f"{name}.weight"], state[f"{name}.weight_scale"]
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1))
    if packed == "autobitlinear":
        theirs = published.AutoBitLinear(weight.shape[1], weight.shape[0] * 4, bias=False)
        theirs.weight.data = published.unpack_weights(weight, torch.float32)
    else:
        theirs = published.BitLinear(weight.shape[1], weight.shape[0] * 4, bias=False, dtype=torch.float32)
        theirs.weight = weight
    theirs.weight_scale = scale
    assert relative(block.attention.o(x), theirs(x).detach()) < 1e-5


def test_the_four_formats_are_one_model(tmp_path):
    loaded = tiny_source("bitnet")
    logits = [load_model(str(write(tmp_path / form, form, loaded))).model(IDS).logits for form in FORMATS[:3]]
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_code_that_the_published_repositories_name_is_not_looked_for(tmp_path):
    """Their config.json has an auto_map of classes that transformers has; nothing of it is loaded, and no other is let pass."""
    folder = write(tmp_path / "m", "online", tiny_source("bitnet"))
    expected = load_model(str(folder)).model(IDS).logits
    config = json.loads((folder / "config.json").read_text())
    named = {"AutoConfig": "configuration_bitnet.BitNetConfig", "AutoModelForCausalLM": "modeling_bitnet.BitNetForCausalLM"}
    for file in ("configuration_bitnet.py", "modeling_bitnet.py"):
        (folder / file).write_text("raise SystemExit('code of a model was run')")
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": named}))
    assert torch.equal(load_model(str(folder)).model(IDS).logits, expected)
    (folder / "config.json").write_text(json.dumps(config | {"trust_remote_code": True}))
    with pytest.raises(ModelError, match="never runs"):
        load_model(str(folder))


def test_llama_with_divided_scales_is_read(tmp_path):
    """The first published BitNet conversions are Llama models with BitLinear layers and no sub-norms."""
    loaded = tiny_source("llama")
    native = load_model(str(write(tmp_path / "m", "bitlinear", loaded)))
    assert native.model.config.model_type == "llama" and native.adapter.name == "Llama"
    for layer in loaded.model.model.layers:
        for linear in (m for m in layer.modules() if isinstance(m, nn.Linear)):
            codes, scale = ternary_absmean(linear.weight)
            linear.weight.data = codes * scale
            linear.register_forward_pre_hook(lambda module, args: (published.ActQuant.apply(args[0]),))
    assert relative(native.model(IDS).logits, loaded.model(IDS).logits) < 1e-3


@pytest.mark.parametrize("mode", sorted(set(MODES) - {"fp"}))
def test_the_mode_of_the_training_decides_the_quantisers(tmp_path, mode):
    loaded = tiny_source("bitnet")
    save_bitnet(tmp_path / "m", loaded.model, loaded.tokenizer, mode=mode, keep=0.25, card=CARD)
    block = load_model(str(tmp_path / "m")).model.blocks[0]
    kinds = {site: linear.kind for site, linear in zip(MODES[mode], block.linears().values(), strict=True)}
    assert kinds == MODES[mode] and block.rules.trained == block.rules.mode == mode
    assert all(linear.keep == 0.25 for linear in block.linears().values())


def test_float_mode_is_a_plain_model(tmp_path):
    loaded = tiny_source("bitnet")
    save_bitnet(tmp_path / "m", loaded.model, loaded.tokenizer, mode="fp", card=CARD)
    plain = load_model(str(tmp_path / "m"))
    assert all(block.is_float for block in plain.model.blocks)
    assert relative(plain.model(IDS).logits, loaded.model(IDS).logits) < 1e-5


def test_a_tied_head_is_stored_once(tmp_path):
    loaded = tiny_source("bitnet", tie_word_embeddings=True)
    save_bitnet(tmp_path / "m", loaded.model, loaded.tokenizer, mode="a4.8", card=CARD)
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")
    native = load_model(str(tmp_path / "m"))
    assert native.model.decoder.head.weight is native.model.get_input_embeddings().weight


# writing


def test_a_round_trip_is_bit_identical(tmp_path):
    loaded = tiny_source("bitnet")
    before = {n: t.clone() for n, t in loaded.model.state_dict().items()}
    save_bitnet(tmp_path / "m", loaded.model, loaded.tokenizer, mode="a4.8", card=CARD)
    assert all(torch.equal(t, loaded.model.state_dict()[n]) for n, t in before.items()), "the masters are not touched"
    verify(tmp_path / "m", checksums=True)
    native = load_model(str(tmp_path / "m"))
    for index, block in enumerate(native.model.blocks):
        prefix = f"model.layers.{index}."
        parts = dict(zip(("q_proj", "k_proj", "v_proj"), block.attention.qkv.projections(), strict=True))
        for name, (codes, scale) in parts.items():
            expected, alpha = ternary_absmean(before[f"{prefix}self_attn.{name}.weight"])
            assert torch.equal(codes, expected) and torch.equal(scale, alpha)
        assert torch.equal(block.mlp.ffn_sub_norm.weight, before[f"{prefix}mlp.ffn_sub_norm.weight"])
    assert torch.equal(native.model.decoder.head.weight, before["lm_head.weight"])
    card = json.loads((tmp_path / "m" / "card.json").read_text())
    assert card == CARD


def test_file_bytes_are_a_quarter_per_ternary_weight_and_the_rest(tmp_path):
    loaded = tiny_source("bitnet")
    save_bitnet(tmp_path / "m", loaded.model, loaded.tokenizer, mode="a4.8", card=CARD)
    state = load_file(tmp_path / "m" / "model.safetensors")
    linears = [m.weight.numel() for layer in loaded.model.model.layers for m in layer.modules() if isinstance(m, nn.Linear)]
    everything = sum(p.numel() for p in loaded.model.parameters())
    expected = sum(linears) // 4 + 4 * (everything - sum(linears)) + 4 * len(linears)
    assert sum(t.numel() * t.element_size() for t in state.values()) == expected


def test_large_models_are_split_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr("core.models.io.bitnet.SHARD_BYTES", 50_000)
    loaded = tiny_source("bitnet")
    save_bitnet(tmp_path / "m", loaded.model, loaded.tokenizer, mode="w1.58a8", card=CARD)
    files = sorted((tmp_path / "m").glob("model-*.safetensors"))
    assert len(files) > 2 and SHARD_BYTES < 9_000_000
    single = max(t.numel() * t.element_size() for f in files for t in load_file(f).values())
    assert all(f.stat().st_size < max(50_000, single) + 5_000 for f in files)
    monkeypatch.undo()
    save_bitnet(tmp_path / "one", loaded.model, loaded.tokenizer, mode="w1.58a8", card=CARD)
    found = [load_model(str(tmp_path / name)).model(IDS).logits for name in ("m", "one")]
    assert torch.equal(*found)


# as a model like any other


def test_a_native_model_can_be_observed(tmp_path):
    loaded = load_model(str(write(tmp_path / "m", "saved", tiny_source("bitnet"))))
    found = list(observe_layers(loaded.model, tokens(2, 16)))
    assert len(found) == 2 and all(set(layer) == set(SITES) for layer in found)


@pytest.mark.parametrize("method", ["rptq", "rtn"])
def test_a_native_model_is_a_base_for_the_other_methods(tmp_path, method):
    base = load_model(str(write(tmp_path / "m", "saved", tiny_source("bitnet"))))
    made = quantised("bitnet", base=base, method=method, scheme="custom", bits=Bits())
    assert not any(isinstance(m, TernaryLinear) for m in made.model.modules())
    blocks = base.model.blocks
    assert isinstance(blocks[0].attention.qkv, TernaryLinear), "the base is left alone"
    floats = [b.with_parts(**{n: x.with_input("fp", 0.5) for n, x in b.linears().items()}) for b in blocks]
    expected = base.model.with_blocks(floats)(IDS).logits
    assert relative(made.model(IDS).logits, expected) < 1e-5, "the weights are α t, the inputs float"


def test_load_bitnet_leaves_no_trace_in_the_configuration(tmp_path):
    loaded = load_model(str(write(tmp_path / "m", "saved", tiny_source("bitnet"))))
    assert not hasattr(loaded.model.config, "quantization_config") and not hasattr(loaded.model.config, "quantscope")


@pytest.mark.parametrize("mode", sorted(MODES))
def test_the_native_model_is_the_trained_one(tmp_path, mode):
    """Fake quantisation while training and integer products afterwards are one function."""
    loaded = tiny_source("bitnet")
    model = convert_to_bitlinear(loaded.model, mode)
    save_bitnet(tmp_path / "m", model, loaded.tokenizer, mode=mode, card=CARD)
    with torch.inference_mode():
        expected, found = model(IDS).logits, load_model(str(tmp_path / "m")).model(IDS).logits
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors.median()) < 1e-6 and relative(found, expected) < 1e-2, "a rounding on the edge may fall either way"
