"""Write a quantised model as a GGUF file for llama.cpp, without rounding a weight again.

    Q4_0     d (c - 8)            where every code minus zero point fits -8 … 7: 2 and 3 bits, and ternary weights
    Q4_1     d c + m              4 bits, where scale times zero point is a float16 number
    Q8_0     d c                  every other weight of at most 7 bits
    TQ2_0    d (c - 1)            ternary weights whose columns are a multiple of 256
    F32                           everything else

d and m are float16 numbers of a block of 32 columns, 256 in TQ2_0. Rows lie as in `core.models.io.gguf`, which reads the file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, RopeScalingType
from gguf.quants import quantize
from torch import Tensor

from core.models.export.fit import GGUF_ARCHITECTURES, GGUF_BLOCK
from core.models.export.gguf_tokenizer import add_tokenizer
from core.models.export.unfold import TernaryWeight, other_tensors, projections
from core.models.io.gguf import stored_name
from core.models.loaded import LoadedModel
from core.quant.linear.quant import QuantizedWeight
from kernels import code_offset

TERNARY_BLOCK = 256


def write_gguf(path: Path, loaded: LoadedModel) -> None:
    """Write a model that fits into the file `path`."""
    model, config = loaded.model, loaded.model.config
    spec, architecture = loaded.adapter.spec(config), GGUF_ARCHITECTURES[config.model_type]
    writer = GGUFWriter(str(path), architecture)
    writer.add_name(Path(loaded.name).name)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for add, value in (
        (writer.add_block_count, config.num_hidden_layers),
        (writer.add_context_length, config.max_position_embeddings),
        (writer.add_embedding_length, spec.hidden),
        (writer.add_feed_forward_length, spec.ffn),
        (writer.add_head_count, spec.heads),
        (writer.add_head_count_kv, spec.kv_heads),
        (writer.add_key_length, spec.head_dim),
        (writer.add_value_length, spec.head_dim),
        (writer.add_rope_dimension_count, spec.head_dim),
        (writer.add_layer_norm_rms_eps, float(spec.eps)),
        (writer.add_rope_freq_base, float(config.rope_parameters["rope_theta"])),
        (writer.add_vocab_size, config.vocab_size),
    ):
        add(value)
    _add_rope(writer, loaded)
    add_tokenizer(writer, loaded.tokenizer, config.vocab_size, model.generation_config.eos_token_id)
    heads = {"q_proj": spec.heads, "k_proj": spec.kv_heads} if architecture == "llama" else {}
    for name, tensor in other_tensors(model).items():
        writer.add_tensor(stored_name(name), tensor.float().numpy())
    for projection in projections(model):
        rows = heads.get(projection.name.rpartition(".")[2])
        values, kind = _blocks(projection.weight)
        writer.add_tensor(stored_name(f"{projection.name}.weight"), _interleaved(values, rows), raw_dtype=kind)
        if projection.bias is not None:
            writer.add_tensor(stored_name(f"{projection.name}.bias"), _interleaved(projection.bias.float().numpy(), rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_rope(writer: GGUFWriter, loaded: LoadedModel) -> None:
    """Add how rotary positions are scaled: a key for the linear rule, a tensor for Llama 3's."""
    rotary, rope = loaded.model.decoder.rotaries[0], loaded.model.config.rope_parameters
    if rotary.rope_type == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif rotary.rope_type == "llama3":
        width = loaded.adapter.spec(loaded.model.config).head_dim
        plain = rope["rope_theta"] ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        writer.add_tensor("rope_freqs.weight", (plain / rotary.inv_freq.double().numpy()).astype(np.float32))


def _interleaved(values: np.ndarray, heads: int | None) -> np.ndarray:
    """Reorder rows [heads * E, …] as llama.cpp has them for the architecture llama: halves of each head alternate."""
    if heads is None:
        return values
    return np.ascontiguousarray(values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape))


def _blocks(weight: QuantizedWeight | TernaryWeight | Tensor) -> tuple[np.ndarray, GGMLQuantizationType]:
    """Return a weight as rows of blocks, uint8, or of floats, with its type."""
    if isinstance(weight, Tensor):
        return weight.float().numpy(), GGMLQuantizationType.F32
    if isinstance(weight, TernaryWeight):
        scale = weight.scale.half()
        codes = weight.codes.numpy()
        if codes.shape[1] % TERNARY_BLOCK == 0:
            kind = GGMLQuantizationType.TQ2_0
            return quantize(codes.astype(np.float32) * scale.float().numpy(), kind), kind
        return _q4(codes + 8, scale.expand(len(codes), codes.shape[1] // GGUF_BLOCK).numpy()), GGMLQuantizationType.Q4_0
    repeats = weight.offsets.diff() // GGUF_BLOCK
    scale, zero = (t.float().repeat_interleave(repeats, dim=1).numpy() for t in (weight.scale, weight.zero_point))
    half, zero = scale.astype(np.float16), zero.astype(np.int16) + code_offset(weight.bits)
    codes = weight.codes.numpy()
    shifted = codes.astype(np.int16) - zero.repeat(GGUF_BLOCK, axis=1)
    if shifted.min() >= -8 and shifted.max() <= 7:
        return _q4(shifted + 8, half), GGMLQuantizationType.Q4_0
    least = -scale * zero
    if weight.bits <= 4 and np.array_equal(least.astype(np.float16).astype(np.float32), least):
        return _q4(codes, half, least.astype(np.float16)), GGMLQuantizationType.Q4_1
    rows = shifted.astype(np.int8).reshape(len(codes), -1, GGUF_BLOCK).view(np.uint8)
    return _joined(half, rows), GGMLQuantizationType.Q8_0


def _q4(codes: np.ndarray, *numbers: np.ndarray) -> np.ndarray:
    """Pack codes 0 … 15 [n, K] behind the float16 numbers [n, K / 32] of their blocks; columns j and j + 16 share a byte."""
    halves = codes.astype(np.uint8).reshape(len(codes), -1, 2, GGUF_BLOCK // 2)
    return _joined(*numbers, halves[:, :, 0] | halves[:, :, 1] << 4)


def _joined(*parts: np.ndarray) -> np.ndarray:
    """Join the parts of every block: float16 numbers [n, blocks] before its bytes [n, blocks, …]."""
    *numbers, packed = parts
    heads = [np.ascontiguousarray(number)[..., None].view(np.uint8) for number in numbers]
    return np.concatenate([*heads, packed], axis=2).reshape(len(packed), -1)
