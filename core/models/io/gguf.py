"""Convert a GGUF file once into safetensors, configuration and tokenizer, for fast loading later.

A file is refused if one of its tensors or header keys is not used (`gguf_config.py`), and the message names it. Blocks are
unpacked by the `gguf` package to float32: the values of a Q4_1 file stay Q4_1 values. For the architecture llama, llama.cpp
stores the rows of Wq and Wk (and their biases) with the two halves of each head interleaved; here they are separated again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from core.errors import ModelError
from core.models.io.limits import check_disk, check_memory
from core.models.io.origin import SOURCE_FILE, packed_precision
from core.models.io.preflight.folder import check_folder
from core.models.io.preflight.gguf import GgufHeader, GgufTensor, read_gguf_header
from core.progress import Progress
from core.storage import atomic_dir

CONVERTER = 2
"""Version of this conversion, part of a converted folder's name in the cache: version 1 dropped biases and rope scaling."""

_FLOATS = {0: "<f4", 1: "<f2"}

_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_BIASED = {
    "llama": {**_ATTENTION, **_MLP},
    "qwen2": {k: v for k, v in _ATTENTION.items() if k != "attn_output"},
    "qwen3": _ATTENTION,
}
"""Linear layers that may have a bias in the transformers model of an architecture."""

_FACTORS = "rope_freqs.weight"
_STORED = {part: stored for table in (_NORMS, _HEAD_NORMS, _ATTENTION, _MLP) for stored, part in table.items()}
_IN_LAYER = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")


def convert_gguf(path: Path, target: Path, *, source: dict[str, str], progress: Progress) -> None:
    """Convert the GGUF file `path` into the model folder `target`, all or nothing.

    Args:
        source: written as `source.json`: where the weights came from, a sentence for reports.
        progress: called with a stage's text and, where known, a fraction.
    Raises: ModelError as `read_gguf_header` and `fields_of`; E-MODEL-ARCH for a tensor that is not read, E-MODEL-MISSING without
        one that is needed, E-MODEL-TOKENIZER; E-MODEL-SIZE, ResourceError E-DISK when it does not fit.
    """
    header = read_gguf_header(path)
    check_memory(header.parameters)
    check_disk(4 * header.parameters, target)
    with atomic_dir(target, replace=True) as stage:
        progress("Unpacking the GGUF file (once)", None)
        _save(path, stage, header, lambda part: progress("Unpacking the GGUF file (once)", part))
        progress("Checking the converted model", 0.9)
        write_source(stage, source | _precision(header))
        check_folder(stage)


def write_source(folder: Path, source: dict[str, Any]) -> None:
    """Write `source.json`: {"source": sentence, "revision": …, "precision": …} as given."""
    (folder / SOURCE_FILE).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")


def _precision(header: GgufHeader) -> dict[str, Any]:
    """Describe the types of the stored matrices for `source.json`; vectors (norms, biases) are float32 in every file."""
    from gguf import GGMLQuantizationType

    elements: dict[str, int] = {}
    matrices = [tensor for tensor in header.tensors.values() if len(tensor.shape) > 1]
    for tensor in matrices:
        kind = GGMLQuantizationType(tensor.kind).name
        elements[kind] = elements.get(kind, 0) + prod(tensor.shape)
    return packed_precision(elements, sum(tensor.nbytes for tensor in matrices))


def _save(path: Path, stage: Path, header: GgufHeader, progress: Callable[[float], None]) -> None:
    """Write configuration, tokenizer and weights of the model in `path` into the folder `stage`."""
    import torch  # imported here: the page lists model names without loading torch and transformers
    from safetensors.torch import save_file
    from transformers import AutoConfig, GenerationConfig

    from core.models.io.foreign import library_errors
    from core.models.io.gguf_config import fields_of, rope_with_factors, stop_ids
    from core.models.io.gguf_tokenizer import tokenizer_of
    from core.models.io.skeleton import check_tensors

    # everything that the header alone decides comes first: a file that is refused costs no unpacking and no disk
    fields, tokenizer, names = fields_of(header), tokenizer_of(header), _names(header)
    if names.pop(_FACTORS, None):
        values = _values(path, header, header.tensors[_FACTORS])
        rope, context = fields["rope_parameters"], fields["max_position_embeddings"]
        fields["rope_parameters"] = rope_with_factors(rope, values, fields["head_dim"], context, header.file)
    shapes = {name: header.tensors[stored].shape[::-1] for stored, name in names.items()}
    switches, biases = _missing_biases(header.architecture, fields, shapes)
    fields |= switches
    stops = stop_ids(header)
    with library_errors("This GGUF header describes no model that transformers can build. Choose another file."):
        config = AutoConfig.for_model(**fields, dtype=torch.float32)
        config.save_pretrained(stage)
        GenerationConfig(
            bos_token_id=fields["bos_token_id"],
            pad_token_id=fields["pad_token_id"],
            eos_token_id=stops if len(stops) > 1 else fields["eos_token_id"],
        ).save_pretrained(stage)
    check_tensors(config, shapes | {name: (rows,) for name, rows in biases.items()})
    tokenizer.save_pretrained(stage)
    tensors = {name: torch.zeros(rows) for name, rows in biases.items()}
    for index, (stored, name) in enumerate(names.items()):
        values = _values(path, header, header.tensors[stored])
        heads = {"q_proj": fields["num_attention_heads"], "k_proj": fields["num_key_value_heads"]}.get(name.split(".")[-2])
        if heads and header.architecture == "llama":
            values = _halves(values, heads, header.file)
        tensors[name] = torch.from_numpy(values)
        progress(0.9 * index / len(names))
    save_file(tensors, stage / "model.safetensors", metadata={"format": "pt"})


def _names(header: GgufHeader) -> dict[str, str]:
    """Map the stored name to transformers' name, for every tensor of the file.

    Raises: ModelError E-MODEL-ARCH naming a tensor that this architecture does not have; E-MODEL-MISSING naming an absent one.
    """
    names: dict[str, str] = {}
    weights = {**_NORMS, **(_HEAD_NORMS if header.architecture == "qwen3" else {}), **_ATTENTION, **_MLP}
    for stored in header.tensors:
        match = _IN_LAYER.fullmatch(stored)
        parts = weights if match and match[3] == "weight" else _BIASED.get(header.architecture, {})
        if stored in _OUTSIDE:
            names[stored] = _OUTSIDE[stored]
        elif match and match[2] in parts:
            names[stored] = f"model.layers.{match[1]}.{parts[match[2]]}.{match[3]}"
        elif stored == _FACTORS:
            names[stored] = _FACTORS
        else:
            raise ModelError(
                f"{header.file} holds the tensor {stored[:60]}, which {header.architecture} models do not have: "
                "leaving it out would change the model. Choose another file, or the safetensors folder.",
                code="E-MODEL-ARCH",
            )
    needed = {f"blk.{index}.{part}.weight" for index in range(header.layers) for part in weights}
    absent = sorted((needed | set(_OUTSIDE) - {"output.weight"}) - set(names))
    if absent:
        raise ModelError(
            f"{len(absent)} tensors are missing from {header.file}: {', '.join(name[:40] for name in absent[:3])}. "
            "Download the file again.",
            code="E-MODEL-MISSING",
        )
    return names


def stored_name(name: str) -> str:
    """Return the name in a GGUF file of a tensor that transformers calls `name`, a weight or a bias."""
    outside = next((stored for stored, known in _OUTSIDE.items() if known == name), None)
    if outside is not None:
        return outside
    index, _, part = name.removeprefix("model.layers.").partition(".")
    module, _, leaf = part.rpartition(".")
    return f"blk.{index}.{_STORED[module]}.{leaf}"


def _values(path: Path, header: GgufHeader, tensor: GgufTensor) -> Any:
    """Read the values of one tensor, float32, in torch's order of dimensions: (K, N) of the file becomes [N, K]."""
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize

    shape = tensor.shape[::-1]
    raw = np.fromfile(path, np.uint8, tensor.nbytes, offset=tensor.offset)
    if tensor.kind in _FLOATS:
        return raw.view(_FLOATS[tensor.kind]).astype(np.float32).reshape(shape)
    rows = raw.reshape(*shape[:-1], -1)
    return np.ascontiguousarray(dequantize(rows, GGMLQuantizationType(tensor.kind)), dtype=np.float32).reshape(shape)


def _halves(values: Any, heads: int, file: str) -> Any:
    """Reorder [heads * E, …] from halves of each head interleaved row by row to one half after the other."""
    import numpy as np

    if len(values) % (2 * heads):
        raise ModelError(
            f"{file} states {heads} heads for {len(values)} rows: they must divide evenly. Download the file again.",
            code="E-MODEL-BAD",
        )
    return np.ascontiguousarray(values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2)).reshape(values.shape)


def _missing_biases(
    architecture: str, fields: dict[str, Any], shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, bool], dict[str, int]]:
    """Find the biases that transformers expects beside stored ones: the fields that switch them on, and the rows of each."""
    switches = {"attention_bias": _ATTENTION, "mlp_bias": _MLP}
    if architecture == "qwen2":  # its configuration has no switch: q, k and v always have a bias
        switches = {"": _BIASED["qwen2"]}
    found, rows = {}, {}
    for switch, parts in switches.items():
        wanted = [f"model.layers.{index}.{part}" for index in range(fields["num_hidden_layers"]) for part in parts.values()]
        if switch == "" or any(f"{name}.bias" in shapes for name in wanted):
            found[switch] = True
            rows |= {f"{name}.bias": shapes[f"{name}.weight"][0] for name in wanted if f"{name}.bias" not in shapes}
    return {switch: True for switch in found if switch}, rows
