"""A GGUF file gives exactly the model it was written from, or is refused in a sentence that names the key or the tensor."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.errors import ModelError, QuantscopeError
from core.models.io.gguf import convert_gguf
from core.models.io.gguf_config import rope_with_factors
from core.models.io.load import load_model
from core.models.loaded import LoadedModel
from tests.core.models.io.gguf_files import REMOVE, add_key, write_gguf
from tests.core.tools import tiny_source

pytestmark = pytest.mark.usefixtures("own_cache")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500000.0,
}
IDS = torch.randint(0, 256, (2, 200), generator=torch.Generator().manual_seed(2))


def divergence(found: LoadedModel, made: LoadedModel) -> float:
    """Largest KLD over 400 positions, nats."""
    with torch.inference_mode():
        p, q = (m.model(IDS).logits.double().log_softmax(-1) for m in (made, found))
    return float((p.exp() * (p - q)).sum(-1).max())


def llama3_factors(rope: dict, head_dim: int) -> np.ndarray:
    """What llama.cpp's converter writes as rope_freqs.weight for a Llama 3 configuration."""
    low, high = (rope["original_max_position_embeddings"] / rope[f"{end}_freq_factor"] for end in ("low", "high"))
    factors = []
    for exponent in range(0, head_dim, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (exponent / head_dim)
        share = (low / wave - 1) / (low / high - 1)
        factors.append(1.0 if wave < high else rope["factor"] if wave > low else 1 / ((1 - share) / rope["factor"] + share))
    return np.asarray(factors, np.float32)


def scaling(architecture: str, kind: str, **more: object) -> dict[str, object]:
    """Keys of a rope scaling by factor 4."""
    names = {"context": "original_context_length"}
    return {f"{architecture}.rope.scaling.type": kind, f"{architecture}.rope.scaling.factor": 4.0} | {
        f"{architecture}.rope.scaling.{names.get(name, name)}": value for name, value in more.items()
    }


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


REFUSED = {
    "rope.scaling.type": ("llama", scaling("llama", "longrope"), {}),
    "expert_count": ("llama", {"llama.expert_count": 8}, {}),
    "logit_scale": ("llama", {"llama.logit_scale": 0.0625}, {}),
    "embedding_scale": ("llama", {"llama.embedding_scale": 12.0}, {}),
    "residual_scale": ("llama", {"llama.residual_scale": 0.22}, {}),
    "attention.scale": ("llama", {"llama.attention.scale": 0.5}, {}),
    "attention.causal": ("llama", {"llama.attention.causal": False}, {}),
    "attention.clamp_kqv": ("llama", {"llama.attention.clamp_kqv": 8.0}, {}),
    "final_logit_softcapping": ("llama", {"llama.final_logit_softcapping": 30.0}, {}),
    "attention.sliding_window": ("llama", {"llama.attention.sliding_window": 512}, {}),
    "rope.dimension_count": ("llama", {"llama.rope.dimension_count": 8}, {}),
    "attention.value_length": ("llama", {"llama.attention.value_length": 8}, {}),
    "attention.key_length": ("qwen2", {"qwen2.attention.key_length": 32, "qwen2.attention.value_length": 32}, {}),
    "attention.head_count_kv": ("llama", {"llama.attention.head_count_kv": [2, 4]}, {}),
    "feed_forward_length": ("llama", {"llama.feed_forward_length": [96, 64]}, {}),
    "rope.scaling.yarn_ext_factor": ("llama", scaling("llama", "yarn", context=64, yarn_ext_factor=0.5), {}),
    "rope.scaling.yarn_log_multiplier": ("llama", scaling("llama", "yarn", context=64, yarn_log_multiplier=0.1), {}),
    "some.new_key": ("llama", {"llama.some.new_key": 1}, {}),
    "another.namespace": ("llama", {"another.namespace": "x"}, {}),
    "tokenizer.ggml.precompiled_charsmap": ("llama", {"tokenizer.ggml.precompiled_charsmap": [1, 2]}, {}),
    "tokenizer.ggml.remove_extra_whitespaces": ("llama", {"tokenizer.ggml.remove_extra_whitespaces": True}, {}),
    "general.quantization_version": ("llama", {"general.quantization_version": 1}, {}),
    "general.type": ("llama", {"general.type": "adapter"}, {}),
    "attention.layer_norm_rms_epsilon": ("llama", {"llama.attention.layer_norm_rms_epsilon": REMOVE}, {}),
    "context_length": ("llama", {"llama.context_length": REMOVE}, {}),
    "vocab_size": ("llama", {"llama.vocab_size": 300}, {}),
    "output.bias": ("llama", {}, {"output.bias": np.zeros(259, np.float32)}),
    "blk.0.attn_q_norm.weight": ("llama", {}, {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}),
    "blk.0.attn_output.bias": ("qwen2", {}, {"blk.0.attn_output.bias": np.zeros(128, np.float32)}),
    "blk.1.ffn_up.bias": ("qwen3", {}, {"blk.1.ffn_up.bias": np.zeros(96, np.float32)}),
    "blk.1.ffn_gate_exps.weight": ("llama", {}, {"blk.1.ffn_gate_exps.weight": np.zeros((2, 4, 4), np.float32)}),
    "blk.0.attn_q.scale": ("llama", {}, {"blk.0.attn_q.scale": np.ones(1, np.float32)}),
    "rope_factors_long.weight": ("llama", {}, {"rope_factors_long.weight": np.ones(8, np.float32)}),
    "blk.1.ffn_up.weight": ("llama", {}, {"blk.1.ffn_up.weight": REMOVE}),
    "output_norm.weight": ("llama", {}, {"output_norm.weight": REMOVE}),
    "model.layers.1.mlp.up_proj.weight": ("llama", {}, {"blk.1.ffn_up.weight": np.ones((64, 64), np.float32)}),
    "model.layers.0.self_attn.v_proj.bias": ("qwen2", {}, {"blk.0.attn_v.bias": np.ones(3, np.float32)}),
    "blk.1.ffn_down.weight": ("llama", {}, {"blk.1.ffn_down.weight": np.ones((64, 96), np.int8)}),
    "rope_freqs.weight": ("llama", {}, {"rope_freqs.weight": np.zeros(8, np.float32)}),
    "beside rope.scaling.type": ("llama", scaling("llama", "linear"), {"rope_freqs.weight": np.full(8, 2, np.float32)}),
    "tokenizer.ggml.pre": ("llama", {"tokenizer.ggml.pre": "a-rule-of-2031"}, {}),
    "how text is cut": ("llama", {"tokenizer.ggml.pre": REMOVE}, {}),
    "tokenizer.ggml.model": ("llama", {"tokenizer.ggml.model": "t5"}, {}),
    "tokenizer.ggml.eos_token_id": ("llama", {"tokenizer.ggml.eos_token_id": 4000}, {}),
    "tokenizer.ggml.merges": ("llama", {"tokenizer.ggml.token_type": [1] * 259}, {}),
    "tokenizer.ggml.scores": ("llama", {"tokenizer.ggml.model": "llama"}, {}),
    "tokenizer.ggml.tokens": ("llama", {"tokenizer.ggml.tokens": ["a", "b"]}, {}),
    "architecture 'gemma3'": ("gemma3", {}, {}),
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_is_not_read_is_named(named, tmp_path):
    architecture, keys, tensors = REFUSED[named]
    made = tiny_source("llama" if architecture == "gemma3" else architecture, seed=3)
    path = write_gguf(tmp_path / "tiny.gguf", made, architecture=architecture, keys=keys, tensors=tensors)
    with pytest.raises(ModelError) as caught:
        load_model(str(path))
    sentence = str(caught.value)
    assert named in sentence and len(sentence) <= 240 and sentence.count(". ") <= 1 and str(tmp_path) not in sentence
    assert caught.value.code in ("E-MODEL-ARCH", "E-MODEL-BAD", "E-MODEL-MISSING", "E-MODEL-TOKENIZER")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


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


def test_texts_are_cut_as_the_name_says(tmp_path):
    made = tiny_source("llama", seed=3)
    letters = [made.tokenizer.convert_ids_to_tokens(index) for index in range(256)]
    words = ["12", "123", "'s", "'S", "ab", "Ġab"]
    tokens = [*letters, "<s>", "</s>", "<unk>", *words]
    merges = ["1 2", "12 3", "' s", "' S", "a b", "Ġ ab"]
    expected = {
        "gpt-2": (["123", "Ġab", "'s"], "123 ab's"),
        "smollm": (["1", "2", "3", "Ġab"], "123 ab"),
        "llama-bpe": (["123", "4", "'S"], "1234'S"),
        "qwen2": (["1", "2", "'s"], "12's"),
        "tekken": (["1", "2", "ab"], "12ab"),
    }
    keys = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.token_type": [1] * 256 + [3] * 3 + [1] * len(words),
    }
    table = {"token_embd.weight": np.ones((len(tokens), 64), np.float32), "output.weight": np.ones((len(tokens), 64), np.float32)}
    for rule, (pieces, text) in expected.items():
        path = write_gguf(tmp_path / f"{rule}.gguf", made, keys=keys | {"tokenizer.ggml.pre": rule}, tensors=table)
        tokenizer = load_model(str(path)).tokenizer
        assert tokenizer.tokenize(text) == pieces, rule
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
        starts = tokenizer("a").input_ids[0] == 256
        assert starts == (rule in ("llama-bpe", "tekken"))


def test_added_tokens_ends_and_template_are_kept(tmp_path):
    made = tiny_source("llama", seed=3)
    tokens = [made.tokenizer.convert_ids_to_tokens(index) for index in range(256)] + ["<|start|>", "<|end|>", "<think>"]
    keys = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 256 + [3, 3, 4],
        "tokenizer.ggml.eot_token_id": 256,
        "tokenizer.ggml.unknown_token_id": REMOVE,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}<|end|>",
    }
    found = load_model(str(write_gguf(tmp_path / "x.gguf", made, keys=keys)))
    ids = found.tokenizer("a<think>b<|end|>").input_ids
    assert (ids[0], ids[-1]) == (256, 257) and 258 in ids and ids[-2] == 257
    assert found.tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b"
    assert found.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x<|end|>"
    assert set(found.model.generation_config.eos_token_id) == {256, 257}
    assert (found.tokenizer.eos_token, found.tokenizer.bos_token) == ("<|end|>", "<|start|>")


def test_a_sentencepiece_vocabulary_merges_by_score(tmp_path):
    made = tiny_source("llama", seed=3)
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(230)], "▁", "a", "b", "c", "ab", "bc", "▁a", "▁ab"]
    pieces += [f"<pad{index}>" for index in range(259 - len(pieces))]
    scores = {"bc": -1.0, "ab": -2.0, "▁a": -3.0, "▁ab": -4.0}
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [scores.get(piece, -100.0) for piece in pieces],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 230 + [1] * 26,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": REMOVE,
    }
    tokenizer = load_model(str(write_gguf(tmp_path / "x.gguf", made, keys=keys))).tokenizer
    assert tokenizer.tokenize("abc ab") == ["▁a", "bc", "▁ab"]
    assert (
        tokenizer("ab").input_ids[0] == 1
        and tokenizer.decode(tokenizer("ab é c").input_ids, skip_special_tokens=True) == "ab é c"
    )


def test_what_was_converted_opens_in_plain_transformers(tmp_path):
    made = tiny_source("llama", seed=3, rope_parameters=LLAMA3)
    path = write_gguf(tmp_path / "x.gguf", made, tensors={"rope_freqs.weight": llama3_factors(LLAMA3, 16)})
    convert_gguf(path, tmp_path / "out", source={"source": "x", "revision": "y"}, progress=lambda text, part: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(model(IDS).logits, made.model(IDS).logits, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Numbers: 1998").input_ids == made.tokenizer("Numbers: 1998").input_ids


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_a_header_is_read_or_refused_in_words(tmp_path, data):
    made = tiny_source("llama", seed=3, layers=1)
    path = tmp_path / "fuzz.gguf"
    if not path.exists():
        write_gguf(path, made, keys=scaling("llama", "yarn", context=64), tensors={"rope_freqs.weight": np.ones(8, np.float32)})
    raw = bytearray(path.read_bytes())
    keys_end = raw.index(b"tokenizer.ggml.tokens")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(24, keys_end - 1) | st.integers(24, 12_000))] = data.draw(st.integers(0, 255))
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(raw)
    try:
        convert_gguf(changed, tmp_path / "out", source={"source": "x", "revision": "y"}, progress=lambda text, part: None)
    except QuantscopeError as error:
        assert error.code.startswith("E-") and error.code != "E-BUG" and len(str(error)) <= 240
