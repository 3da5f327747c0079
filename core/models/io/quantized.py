"""Save and load a quantised model: one folder with everything, readable without the float model.

    quantscope.json         format, recipe, report, and the structure of every layer (bits, clusters, shapes)
    quantscope.safetensors  tensors outside the blocks as shell.<transformers name>, of blocks as blocks.<layer>.<path>;
                            of a model quantised layer by layer in several files with an index (`shards.py`)
    config.json, generation_config.json, tokenizer files, manifest.json (sizes and checksums)

Tensor names are looked up in the structure, never used as attribute paths; every file is compared with its checksum. Other
programs must not take such a folder for float weights and fill what they miss at random: `config.json` names a type that they
do not know (`own_config.py`), and the weights do not have the name that transformers opens (`model.safetensors` in earlier
versions). `core.hf` makes the type known.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

from core.bits import kind_of
from core.checks import FLOAT_BITS
from core.errors import ArtifactError, InputError, ModelError
from core.models.adapter import ModelAdapter
from core.models.architectures import adapter_for
from core.models.attention import Attention
from core.models.bitnet import AttentionBits, BitNetRules
from core.models.block import DecoderBlock, gathered
from core.models.decoder import CausalModel
from core.models.io.foreign import LIBRARY_ERRORS, load_tokenizer
from core.models.io.limits import check_memory
from core.models.io.origin import Origin
from core.models.io.own_config import FORMAT, decoder_config, saved_config
from core.models.io.preflight.folder import SAVED_WEIGHTS, check_files
from core.models.io.shards import read_tensors
from core.models.loaded import LoadedModel
from core.models.moe import MoE
from core.models.norm import ReorderNorm
from core.progress import Progress, silent
from core.quant.affine import QParams
from core.quant.linear.base import FloatLinear, LinearLayer
from core.quant.linear.quant import QuantLinear
from core.quant.linear.ternary import TernaryLinear
from core.quant.rotated import TokenQuantizer
from core.quant.static import ActivationQuantizer
from core.storage import atomic_dir, check_target, verify

QUANTSCOPE_FILE = "quantscope.json"
"""File that only folders saved by Quantscope have."""
_SITES = ("q", "k", "v")
_COUNTED = {ReorderNorm: ("weight", "bias"), Attention: ("q_norm", "k_norm"), MoE: ("router",)}
"""Parameters that modules hold as buffers."""
_QUANTIZER = ("scale", "zero_point", "offsets")
_GENERATION = "generation_config.json"


def check_output(folder: Path | str) -> None:
    """Refuse a folder that a quantised model may not take: call it before quantising.

    Raises: InputError E-PARAM-OUT if it holds anything but an earlier quantised model; ResourceError E-DISK.
    """
    check_target(folder)
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / QUANTSCOPE_FILE).is_file():
        raise InputError(
            f"The folder {folder.name[:60]!r} holds a model that was not quantised here: choose a new or empty folder.",
            code="E-PARAM-OUT",
        )


def save_quantized(
    folder: Path | str, loaded: LoadedModel, description: dict[str, Any], *, replace: bool = False, private: bool = False
) -> None:
    """Write a quantised model.

    Args:
        folder: created in one step, replacing an earlier quantised model; never half-written.
        description: JSON-able facts to keep (recipe, report).
        replace: replace whatever is there; for folders inside the cache only.
        private: nobody but this user may read the folder.
    Raises: ArtifactError if the model has no quantised blocks; InputError as `check_output`; ResourceError if the disk refuses.
    """
    if not replace:
        check_output(folder)
    blocks = loaded.model.blocks
    if any(block.is_float for block in blocks):
        raise ArtifactError("This model is not quantised: run quantize first.", code="E-CKPT-KIND")
    tensors, structure = shell_tensors(loaded), []
    for block in blocks:
        own, facts = block_entry(block)
        tensors |= own
        structure.append(facts)
    with atomic_dir(folder, replace=replace, private=private) as stage:
        save_tensors(stage / SAVED_WEIGHTS, tensors)
        write_description(stage, loaded, description, structure)


def shell_tensors(loaded: LoadedModel) -> dict[str, Tensor]:
    """Return the tensors outside the blocks by their names in a saved folder."""
    return {f"shell.{name}": tensor for name, tensor in loaded.model.decoder.outside().items()}


def block_entry(block: DecoderBlock) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what a saved folder keeps of a block: its tensors by their names there, and its structure as JSON types."""
    return {f"blocks.{block.layer_index}.{name}": t for name, t in block_tensors(block).items()}, block_facts(block)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any layout and device to a safetensors file."""
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)


def write_description(
    stage: Path, loaded: LoadedModel, description: dict[str, Any], structure: list[dict[str, Any]]
) -> None:
    """Write all files of a saved folder but its tensors.

    Args:
        loaded: the quantised model, or the float one it was made from; its blocks are not read.
        description: as in `save_quantized`. structure: of every layer, from `block_entry`.
    """
    facts = {
        **description,
        "format": FORMAT,
        "base": {"name": loaded.name, "revision": loaded.revision, "source": loaded.source},
        "origin": None if loaded.origin is None else asdict(loaded.origin),
        "layers": structure,
    }
    (stage / "config.json").write_text(json.dumps(saved_config(loaded.model.config), indent=1))
    (stage / _GENERATION).write_text(loaded.model.generation_config.to_json_string())
    loaded.tokenizer.save_pretrained(stage)
    (stage / QUANTSCOPE_FILE).write_text(json.dumps(facts, allow_nan=False))


def read_description(folder: Path | str) -> dict[str, Any]:
    """Read the JSON facts of a saved folder. Raises: ArtifactError if they are unreadable or of another format."""
    try:
        facts = json.loads((Path(folder) / QUANTSCOPE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{QUANTSCOPE_FILE} cannot be read: quantise the model again.", code="E-CKPT-BAD") from error
    if not isinstance(facts, dict) or facts.get("format") not in (1, FORMAT):
        raise ArtifactError(
            f"The folder has format {str(facts.get('format') if isinstance(facts, dict) else None)[:20]}, this "
            f"version reads {FORMAT}: quantise the model again.",
            code="E-CKPT-MISMATCH",
        )
    return facts


class SavedReader:
    """A folder written by `save_quantized`, whose layers are read one at a time.

    Attributes:
        shell: the model without blocks. count: number of its layers. nbytes: of all tensors.
    Raises: ArtifactError if anything is missing, damaged or does not fit.
    """

    def __init__(self, path: Path | str, progress: Progress = silent, device: str = "cpu") -> None:
        path = Path(path)
        progress("Loading the quantised model", None)
        verify(path, checksums=True)
        facts = read_description(path)
        with _fitting():
            report = check_files(path)
            self._path, self._device, self.nbytes = path, device, report.nbytes
            self._files = {name: info.file for name, info in report.tensors.items()}
            config = decoder_config(report.config)
            self._layers, self.count, adapter = facts["layers"], config.num_hidden_layers, adapter_for(config)
            names = {f"blocks.{i}.{name}" for i, layer in enumerate(self._layers) for name in layer["tensors"]}
            if len(self._layers) != self.count or names != {n for n in self._files if not n.startswith("shell.")}:
                raise ValueError("layers or tensors are missing or left over")
            outside = {name.removeprefix("shell."): tensor for name, tensor in self._read("shell.").items()}
            model = CausalModel(config, adapter, (), outside).requires_grad_(False).to(device)
            model.generation_config = GenerationConfig.from_pretrained(path, _GENERATION, local_files_only=True)
            tokenizer = load_tokenizer(path, config)
            source, label = str(facts["base"]["source"]), facts.get("report", {}).get("label")
            origin = Origin(**facts["origin"]) if facts.get("origin") else None  # earlier versions kept none
        label = None if label is None else str(label)
        self.shell = LoadedModel(model, tokenizer, adapter, str(path), None, source, path, label, origin)

    def block(self, index: int) -> DecoderBlock:
        """Read the block of layer `index`."""
        model = self.shell.model
        with _fitting():
            block = block_from(model.config, self.shell.adapter, index, self._layers[index], self._read(f"blocks.{index}."))
        return block.requires_grad_(False).to(self._device)

    def _read(self, prefix: str) -> dict[str, Tensor]:
        tensors = dict(read_tensors(self._path, {name: file for name, file in self._files.items() if name.startswith(prefix)}))
        if not all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point()):
            raise ValueError("a tensor holds NaN or infinity")
        return tensors


@contextmanager
def _fitting() -> Iterator[None]:
    """Turn whatever a reader of files raises into one sentence, but for a size that is refused."""
    try:
        yield
    except (ModelError, *LIBRARY_ERRORS) as error:
        if isinstance(error, ModelError) and error.code == "E-MODEL-SIZE":
            raise
        raise ArtifactError(
            "The quantised model's files do not fit each other: quantise the model again.", code="E-CKPT-BAD"
        ) from error


def load_quantized(path: Path | str, *, progress: Progress = silent) -> LoadedModel:
    """Load a folder written by `save_quantized`.

    Raises: ArtifactError if anything is missing, damaged or does not fit; ModelError E-MODEL-SIZE if the memory is too small.
    """
    reader = SavedReader(path, progress)
    check_memory(reader.nbytes, bytes_per_parameter=1)
    shell = reader.shell
    return replace(shell, model=shell.model.with_blocks(map(reader.block, range(reader.count))).requires_grad_(False))


def block_tensors(block: DecoderBlock) -> dict[str, Tensor]:
    """Collect the tensors of a block by their names in a saved folder, where attention and MLP are no level of their own."""
    own = {f"{site}_quantizer": getattr(block.attention, f"{site}_quantizer") for site in _SITES}
    named = block.parts() | own | {"key_mean": block.attention.key_mean}
    found: dict[str, Tensor] = {}
    for name, part in named.items():
        if isinstance(part, nn.Module):
            found |= {f"{name}.{own}": tensor for own, tensor in part.state_dict().items()}
        elif part is not None:
            found[name] = part
    return found


def block_facts(block: DecoderBlock) -> dict[str, Any]:
    """Describe how a quantised block is built, beside its tensors, as JSON types: `block_from` is the inverse."""
    quantizers = {site: getattr(block.attention, f"{site}_quantizer") for site in _SITES}
    return {
        "linears": {name: _linear_facts(layer) for name, layer in block.linears().items()},
        "sites": {site: _quantizer_facts(q) for site, q in quantizers.items()},
        "softmax_bits": block.attention.softmax_bits,
        "rotates_heads": block.attention.rotates_heads,
        "sink_tokens": block.attention.sink_tokens,
        "bitnet": None if block.rules is None else asdict(block.rules),
        "tensors": sorted(block_tensors(block)),
    }


def _linear_facts(layer: QuantLinear | TernaryLinear) -> dict[str, Any]:
    if isinstance(layer, TernaryLinear):
        return {"in_features": layer.in_features, "kind": layer.kind, "keep": layer.keep}
    return {"bits": layer.bits, "in_features": layer.in_features, "input_bits": _quantizer_facts(layer.quantizer)}


def _quantizer_facts(quantizer: ActivationQuantizer | TokenQuantizer | None) -> int | dict[str, Any] | None:
    """Return what a quantiser is made from beside its tensors: bits of a static one, all arguments of one by token."""
    if quantizer is None:
        return None
    return quantizer.facts() if isinstance(quantizer, TokenQuantizer) else quantizer.bits


def block_from(
    config: PreTrainedConfig, adapter: ModelAdapter, index: int, facts: dict[str, Any], tensors: dict[str, Tensor]
) -> DecoderBlock:
    """Build block `index` of `block_facts` and of tensors under `blocks.<index>.`. Raises: ValueError where they do not fit."""
    spec, prefix = adapter.spec(config, index), f"blocks.{index}."

    def get(name: str) -> Tensor | None:
        return tensors.get(prefix + name)

    def norm(name: str) -> ReorderNorm:
        kind = spec.norm if spec.pre_norms or name not in ("norm1", "norm2") else "none"
        made = ReorderNorm(kind, get(f"{name}.weight"), get(f"{name}.bias"), spec.eps)
        made.order = get(f"{name}.order")
        return made

    rules, norms = facts.get("bitnet"), ("norm1", "norm2", *(("attn_sub_norm", "ffn_sub_norm") if spec.sub_norms else ()))
    norms += ("post_norm1", "post_norm2") if spec.post_norms else ()
    linears = {name: _linear(facts["linears"][name], f"{prefix}{name}.", tensors) for name in spec.linears}
    block = DecoderBlock(
        spec,
        index,
        adapter.windows(config)[index],
        **{name: norm(name) for name in norms},
        **{name: get(name) for name in ("q_norm", "k_norm", "rope_order", "router")},
        **gathered(linears, spec.experts),
        rules=None if rules is None else BitNetRules(**{**rules, "attention": AttentionBits(**rules["attention"])}),
    )
    attention = block.attention
    for site in _SITES:
        setattr(attention, f"{site}_quantizer", _quantizer(facts["sites"][site], f"{prefix}{site}_quantizer.", tensors))
    attention.softmax_bits, attention.sink_tokens = int(facts["softmax_bits"]), int(facts["sink_tokens"])
    attention.rotates_heads, attention.key_mean = bool(facts.get("rotates_heads")), get("key_mean")  # earlier versions had none
    if sorted(block_tensors(block)) != facts["tensors"]:
        raise ValueError("the structure of a layer and its tensors differ")
    _check(block)
    return block


def _linear(entry: dict[str, Any], prefix: str, tensors: dict[str, Tensor]) -> QuantLinear | TernaryLinear:
    bias = tensors.get(f"{prefix}bias")
    if "kind" in entry:
        own = {n: tensors[prefix + n] for n in ("packed", "weight_scale", "bounds")}
        return TernaryLinear(own, in_features=entry["in_features"], bias=bias, kind=entry["kind"], keep=entry["keep"])
    quantizer = _quantizer(entry["input_bits"], f"{prefix}quantizer.", tensors)
    own = ("weight", "offsets") if entry["bits"] >= 16 else ("packed", "weight_scale", "weight_zero", "offsets")
    own = {n: tensors[prefix + n] for n in own}
    return QuantLinear(own, bits=entry["bits"], in_features=entry["in_features"], bias=bias, quantizer=quantizer)


def _check(block: DecoderBlock) -> None:
    """Raise ValueError unless every tensor of a loaded block has its layer's size and every order is a permutation."""
    s, attention = block.spec, block.attention
    sizes = {
        "qkv": (s.hidden, s.width("q") + s.width("k") + s.width("v")),
        "o": (s.width("o_in"), s.hidden),
        "up": (s.hidden, s.ffn * (2 if s.gated else 1)),
        "down": (s.ffn, s.hidden),
    }
    fits = [(x.in_features, x.out_features) == sizes[kind_of(name)] for name, x in block.linears().items()]
    vectors = [(x.bias, x.out_features) for x in block.linears().values()]
    norms = filter(None, (block.norm1, block.norm2, block.post_norm1, block.post_norm2))
    vectors += [(t, s.hidden) for norm in norms for t in (norm.weight, norm.bias)]
    if s.sub_norms:
        vectors += [(attention.attn_sub_norm.weight, s.width("o_in")), (block.mlp.ffn_sub_norm.weight, s.ffn)]
    widths = (s.width("q"), s.width("k")) if s.wide_qk_norm else (s.head_dim, s.head_dim)
    vectors += zip((attention.q_norm, attention.k_norm), widths, strict=True)
    fits += [t is None or t.shape == (width,) for t, width in vectors]
    fits += [block.router is None or block.router.shape == (s.experts, s.hidden)]
    fits += [(t is not None) == s.qk_norm for t in (attention.q_norm, attention.k_norm)]
    orders = [(norm.order[None], (1, s.hidden)) for norm in (block.norm1, block.norm2) if norm.order is not None]
    if attention.rope_order is not None:
        orders.append((attention.rope_order, (s.kv_heads, s.head_dim)))
    fits += [t.shape == shape and bool((t.sort(-1).values == torch.arange(shape[1])).all()) for t, shape in orders]
    quantizers = {site: getattr(attention, f"{site}_quantizer") for site in _SITES}
    fits += [not isinstance(q, ActivationQuantizer) or q.width == s.width(site) for site, q in quantizers.items()]
    fits += [attention.key_mean is None or attention.key_mean.shape == (s.kv_heads, s.head_dim)]
    if not all(fits) or attention.softmax_bits not in (*range(2, 9), FLOAT_BITS) or attention.sink_tokens < 0:
        raise ValueError("a tensor does not have the size of its layer")


def _quantizer(
    bits: int | dict[str, Any] | None, prefix: str, tensors: dict[str, Tensor]
) -> ActivationQuantizer | TokenQuantizer | None:
    if bits is None:
        return None
    if isinstance(bits, dict):
        return TokenQuantizer(**bits)
    scale, zero, offsets = (tensors[prefix + name] for name in _QUANTIZER)
    return ActivationQuantizer(bits, QParams(scale, zero), offsets)


def already_quantized(model: CausalModel) -> bool:
    """Say whether a model was quantised here. A BitNet model trained with ternary weights was not."""
    return any(not block.is_float and (block.rules is None or block.rules.trained is None) for block in model.blocks)


def weights_id(loaded: LoadedModel) -> str:
    """Compute a fingerprint of every tensor and of where they were read from; it differs between checkpoints of one name."""
    digest = hashlib.sha256(f"{loaded.source} {loaded.revision}".encode())
    for name, tensor in _all_tensors(loaded.model):
        digest.update(f"{name} {tuple(tensor.shape)} {float(tensor.sum(dtype=torch.float64)):.12e}".encode())
    return digest.hexdigest()[:8]


def _all_tensors(model: CausalModel) -> Iterator[tuple[str, Tensor]]:
    for name, part in model.decoder.named_children():
        owners = [(str(i), block_tensors(b)) for i, b in enumerate(part)] if name == "blocks" else [("", part.state_dict())]
        for index, tensors in owners:
            yield from ((".".join(filter(None, ("decoder", name, index, own))), tensor) for own, tensor in tensors.items())


def modules_of(model: nn.Module) -> list[LinearLayer]:
    """List every low-bit linear layer of a model."""
    return [m for m in model.modules() if isinstance(m, LinearLayer) and not isinstance(m, FloatLinear)]


def parameters_of(model: CausalModel) -> int:
    """Count the parameters of a model, tied ones once. Quantising changes their bits, not their number."""
    floats, packed = {id(p): p for p in model.parameters()}, 0
    for module in model.modules():
        if isinstance(module, LinearLayer) and not isinstance(module, FloatLinear):
            packed += module.in_features * module.out_features + (0 if module.bias is None else module.out_features)
        elif names := _COUNTED.get(type(module)):
            floats |= {id(t): t for t in (getattr(module, name) for name in names) if t is not None}
    return packed + sum(p.numel() for p in floats.values())
