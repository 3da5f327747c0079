"""A GGUF file gives exactly the model it was written from, or is refused in a sentence that names the key or the tensor."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.models.io.gguf import convert_gguf
from core.models.io.gguf_config import rope_with_factors
from core.models.io.load import load_model
from core.models.loaded import LoadedModel
from tests.core.models.io.gguf_files import LLAMA3, REMOVE, add_key, llama3_factors, scaling, write_gguf
from tests.core.tools import tiny_source

pytestmark = pytest.mark.usefixtures("own_cache")
IDS = torch.randint(0, 256, (2, 200), generator=torch.Generator().manual_seed(2))


def divergence(found: LoadedModel, made: LoadedModel) -> float:
    """Largest KLD over 400 positions, nats."""
    with torch.inference_mode():
        p, q = (m.model(IDS).logits.double().log_softmax(-1) for m in (made, found))
    return float((p.exp() * (p - q)).sum(-1).max())


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1000000.0}
EXACT = {
    "plain": ("llama", {}, {}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}, {}),
    "qwen2": ("qwen2", {}, {}, {}),
    "qwen3": ("qwen3", {}, {}, {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}, {}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}, {}, {}),
    "no kv count": ("llama", {"num_key_value_heads": 8}, {"llama.attention.head_count_kv": REMOVE}, {}),
    "counts per layer": ("llama", {}, {"llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [96, 96]}, {}),
    "no head size": (
        "llama",
        {"head_dim": 8},
        {"llama.attention.key_length": REMOVE, "llama.attention.value_length": REMOVE},
        {},
    ),
    "linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        scaling("llama", "linear"),
        {},
    ),
    "factor alone": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {"llama.rope.scaling.factor": 4.0},
        {},
    ),
    "old linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        {"llama.rope.scale_linear": 2.0},
        {},
    ),
    "switched off": ("llama", {}, scaling("llama", "none"), {}),
    "yarn": ("qwen2", {"rope_parameters": YARN}, scaling("qwen2", "yarn", context=64), {}),
    "yarn, all keys": (
        "qwen2",
        {"rope_parameters": YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.5 * (0.1 * math.log(4) + 1)}},
        scaling("qwen2", "yarn", context=64, yarn_beta_fast=16.0, yarn_beta_slow=2.0, attn_factor=0.5, yarn_ext_factor=1.0),
        {},
    ),
    "llama3": ("llama", {"rope_parameters": LLAMA3}, {}, {"rope_freqs.weight": llama3_factors(LLAMA3, 16)}),
    "factors of one": ("llama", {}, {}, {"rope_freqs.weight": np.ones(8, np.float32)}),
    "window of the context": ("llama", {}, {"llama.attention.sliding_window": 1024}, {}),
    "neutral keys": (
        "llama",
        {},
        {
            "llama.expert_count": 0,
            "llama.logit_scale": 0.0,
            "llama.attention.causal": True,
            "general.quantization_version": 2,
            "general.type": "model",
            "quantize.imatrix.file": "x",
            "split.count": 1,
            "tokenizer.ggml.fim_pre_token_id": 3,
        },
        {},
    ),
}


@pytest.mark.parametrize("case", EXACT)
def test_the_file_is_the_model(case, tmp_path):
    architecture, overrides, keys, tensors = EXACT[case]
    made = tiny_source(architecture, seed=3, **overrides)
    path = write_gguf(tmp_path / "tiny.gguf", made, architecture=architecture, keys=keys, tensors=tensors)
    found = load_model(str(path))
    assert divergence(found, made) <= 1e-6  # measured: 0, and 1e-12 with rebuilt Llama 3 parameters
    assert found.model.config.num_key_value_heads == made.model.config.num_key_value_heads


def test_each_of_these_parts_changes_the_model():
    """Otherwise the test above could not see that one is dropped."""
    plain = tiny_source("llama", seed=3)
    for overrides in (EXACT["linear"][1], EXACT["llama3"][1]):
        assert divergence(tiny_source("llama", seed=3, **overrides), plain) > 1e-3
    biased = tiny_source("llama", seed=3, attention_bias=True, mlp_bias=True)
    for name, parameter in biased.model.named_parameters():
        if name.endswith("bias"):
            kept = parameter.clone()
            parameter.zero_()
            changed = divergence(biased, tiny_source("llama", seed=3, attention_bias=True, mlp_bias=True))
            parameter.copy_(kept)
            assert changed > 1e-9 or "k_proj" in name, name  # softmax does not see what is added to every key alike


def test_a_missing_bias_is_zero(tmp_path):
    """Llama files with biases of q, k and v only: transformers has one switch for all four."""
    made = tiny_source("llama", seed=3, attention_bias=True)
    for name, parameter in made.model.named_parameters():
        if name.endswith("o_proj.bias"):
            parameter.zero_()
    gone = {f"blk.{index}.attn_output.bias": REMOVE for index in range(2)}
    assert divergence(load_model(str(write_gguf(tmp_path / "x.gguf", made, tensors=gone))), made) < 1e-8


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q6_K", "Q4_K"])
def test_blocks_are_unpacked_to_the_values_of_the_package(kind, tmp_path):
    made = tiny_source("llama", seed=3, hidden_size=256, head_dim=32, intermediate_size=256)
    qtype, weight = gguf.GGMLQuantizationType[kind], made.model.model.layers[1].mlp.up_proj.weight
    try:
        packed = gguf.quantize(weight.numpy(), qtype)
    except NotImplementedError:  # the package unpacks K-blocks and does not make them
        _, block_bytes = gguf.GGML_QUANT_SIZES[qtype]
        packed = np.random.default_rng(0).integers(0, 60, (256, block_bytes), dtype=np.uint8)
    path = tmp_path / "x.gguf"
    writer_tensors = {"blk.1.ffn_up.weight": REMOVE}
    write_gguf(path, made, tensors=writer_tensors)
    raw_writer(path, made, packed, qtype)
    with torch.no_grad():
        weight.copy_(torch.from_numpy(gguf.dequantize(packed, qtype)))
    found = load_model(str(path)).model.blocks[1].mlp.up.weight[256:]  # behind the gate
    assert torch.equal(found, weight)


def raw_writer(path, made, packed, qtype) -> None:
    """The same file with one tensor in a block type."""
    from tests.core.models.io import gguf_files

    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in gguf_files.header_of(made, "llama").items():
        add_key(writer, key, value)
    for name, tensor in made.model.state_dict().items():
        if name == "model.layers.1.mlp.up_proj.weight":
            writer.add_tensor("blk.1.ffn_up.weight", packed, raw_dtype=qtype)
        else:
            writer.add_tensor(gguf_files.stored_name(name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rebuilt(factors: np.ndarray, theta: float = 500000.0) -> tuple[dict, np.ndarray]:
    """The parameters for some factors, and the divisors that transformers then applies."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    plain = {"rope_type": "default", "rope_theta": theta}
    rope = rope_with_factors(plain, factors, 2 * len(factors), 4096, "x.gguf")
    base, scaled = (
        LlamaRotaryEmbedding(LlamaConfig(head_dim=2 * len(factors), max_position_embeddings=4096, rope_parameters=parameters))
        for parameters in (plain, rope)
    )
    assert scaled.attention_scaling == 1.0
    return rope, (base.inv_freq / scaled.inv_freq).numpy()


@pytest.mark.parametrize(("head_dim", "factor", "context"), [(64, 32.0, 8192), (128, 8.0, 8192), (16, 8.0, 64), (8, 4.0, 40)])
def test_published_factors_become_llama_3s_rule(head_dim, factor, context):
    stated = LLAMA3 | {"factor": factor, "original_max_position_embeddings": context}
    factors = llama3_factors(stated, head_dim)
    rope, applied = rebuilt(factors)
    assert rope["rope_type"] == "llama3" and np.abs(applied / factors - 1).max() < 3e-6
    if head_dim >= 64:
        assert rope == stated


@settings(max_examples=40, deadline=None)
@given(factors=st.lists(st.floats(0.25, 64, width=32), min_size=4, max_size=16))
def test_any_factors_are_applied_exactly(factors):
    found = np.asarray(factors, np.float32)
    assert np.abs(rebuilt(found)[1] / found - 1).max() < 3e-6


def test_what_was_converted_opens_in_plain_transformers(tmp_path):
    made = tiny_source("llama", seed=3, rope_parameters=LLAMA3)
    path = write_gguf(tmp_path / "x.gguf", made, tensors={"rope_freqs.weight": llama3_factors(LLAMA3, 16)})
    convert_gguf(path, tmp_path / "out", source={"source": "x", "revision": "y"}, progress=lambda text, part: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(model(IDS).logits, made.model(IDS).logits, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Numbers: 1998").input_ids == made.tokenizer("Numbers: 1998").input_ids
