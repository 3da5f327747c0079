"""Keys and tensors of a GGUF file that are not read are named, and any change of a header is read or refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import ModelError, QuantscopeError
from core.models.io.gguf import convert_gguf
from core.models.io.gguf_config import ARCHITECTURES
from core.models.io.load import load_model
from tests.core.models.io.gguf_files import REMOVE, scaling, write_gguf
from tests.core.tools import tiny_source

pytestmark = pytest.mark.usefixtures("own_cache")

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
    "a LoRA adapter": ("llama", {"general.type": "adapter"}, {}),
    "LoRA adapter, not": ("llama", {"adapter.type": "lora"}, {}),
    "image or sound encoder": ("clip", {"general.type": "mmproj"}, {}),
    "encoder beside": ("clip", {}, {}),
    "importance matrix": ("llama", {"general.type": "imatrix", "general.architecture": REMOVE}, {}),
    "quantising, not a model": ("llama", {"imatrix.datasets": ["a.txt"], "general.architecture": REMOVE}, {}),
    "vocabulary without weights": ("llama", {"general.type": "vocab"}, {}),
    "'qwen3moe'": ("qwen3moe", {"qwen3moe.expert_count": 8}, {}),
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
    made = tiny_source(architecture if architecture in ARCHITECTURES else "llama", seed=3)
    path = write_gguf(tmp_path / "tiny.gguf", made, architecture=architecture, keys=keys, tensors=tensors)
    with pytest.raises(ModelError) as caught:
        load_model(str(path))
    sentence = str(caught.value)
    assert named in sentence and len(sentence) <= 240 and sentence.count(". ") <= 1 and str(tmp_path) not in sentence
    assert caught.value.code in ("E-MODEL-ARCH", "E-MODEL-BAD", "E-MODEL-MISSING", "E-MODEL-TOKENIZER")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


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
