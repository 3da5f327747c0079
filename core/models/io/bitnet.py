"""Read the published formats of BitNet checkpoints and our own; write our own, which transformers reads.

    quantization_config                      weights of a decoder linear             weight_scale
    bitnet, autobitlinear, online            floating masters [N, K]                 –          rounded to ternary here
    bitnet, autobitlinear, offline           uint8 [N / 4, K]                        α          value = t · weight_scale
    bitnet, bitlinear                        uint8 [N / 4, K]                        1 / α      value = t / weight_scale
    bitnet, h-bitlinear, offline             uint8 [N / 4, K]                        α          as the first, o and down rotated
    none, but "quantscope": {"mode": …}      floating masters [N, K]                 –          rounded to ternary here

A packed byte of row r holds rows r, r + N/4, r + 2N/4, r + 3N/4 in bits 0-1, 2-3, 4-5, 6-7 as t + 1: packed along the rows,
where our own layout packs along the columns. "quantscope" in config.json names the mode the model was trained for ("w1.58a8"
when absent), TopK's share, and with "trained": false that it runs by this mode without having been trained for it. The names
`BitLinear` and `AutoBitLinear` are transformers'; its code tells which of them divides. It refuses "h-bitlinear", since it
cannot rotate an input and would compute something else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from core.errors import InputError, ModelError
from core.models.adapter import ModelAdapter
from core.models.architectures import adapter_for
from core.models.bitnet import BitNetRules
from core.models.block import DecoderBlock
from core.models.decoder import CausalModel
from core.models.io.foreign import library_errors
from core.models.io.preflight.config import ONLINE_MASTERS, ROTATED, bitnet_format
from core.models.io.preflight.folder import FolderReport, TensorInfo
from core.models.io.write import config_facts, write_model
from core.models.norm import ReorderNorm
from core.options import ROTATED_MODES
from core.quant.dynamic import MODES, quantize_weight
from core.quant.linear.ternary import TernaryLinear
from core.storage import check_target

SHARD_BYTES = 8_500_000
"""Largest file of a trained model: small ones are part of the installation."""
PACKED = {
    "quant_method": "bitnet",
    "linear_class": "autobitlinear",
    "quantization_mode": "offline",
    "modules_to_not_convert": ["lm_head"],
}
"""`quantization_config` of the packed format that is written."""
_CARD_KEYS = ("title", "description", "licence")


def pack_rows(ternary: Tensor) -> Tensor:
    """Pack t [N, K] int8 in the published layout, [N / 4, K] uint8. Raises: ValueError unless 4 divides N."""
    if len(ternary) % 4:
        raise ValueError(f"{len(ternary)} rows cannot be packed by four")
    parts = (ternary + 1).to(torch.uint8).unflatten(0, (4, -1))
    return parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6


def unpack_rows(packed: Tensor) -> Tensor:
    """Undo `pack_rows`. Raises: ValueError for a code that is no ternary value."""
    codes = torch.cat([(packed >> 2 * i) & 3 for i in range(4)]).to(torch.int8).sub_(1)
    if bool((codes > 1).any()):
        raise ValueError("a packed weight holds the code 3")
    return codes


# reading


class _Folder:
    """Tensors of a checked model folder, read one at a time, each from the file it was checked in; a tensor is read once."""

    def __init__(self, folder: Path, tensors: dict[str, TensorInfo]) -> None:
        handles = {file: safe_open(folder / file, framework="pt") for file in {info.file for info in tensors.values()}}
        self._owner = {name: handles[info.file] for name, info in tensors.items()}

    def take(self, name: str) -> Tensor:
        """Read the tensor called `name`. Raises: ModelError E-MODEL-MISSING."""
        handle = self._owner.pop(name, None)
        if handle is None:
            raise ModelError(f"{name[:80]} is missing from the weights. Download the model again.", code="E-MODEL-MISSING")
        tensor = handle.get_tensor(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{name[:80]} holds NaN or infinity. Download the model again.", code="E-NUM-NAN")
        return tensor

    def __contains__(self, name: str) -> bool:
        return name in self._owner

    def rest(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors that were not read yet, as float32."""
        for name in list(self._owner):
            yield name, self.take(name).to(torch.float32)


def load_bitnet(folder: Path, report: FolderReport, config: PreTrainedConfig) -> CausalModel:
    """Load the native model of a checked folder: decoder layers with packed ternary weights, everything else in float32.

    Args:
        report: of `check_folder`; its configuration says the format (`bitnet_format`).
        config: the folder's configuration; the loaded model's has no `quantization_config`, as the layers hold these facts.
    Raises: ModelError E-MODEL-ARCH (tensors of this architecture are folded), E-MODEL-MISSING (a tensor is missing or left over),
        E-MODEL-BAD (an impossible shape, code or scale, or a weight that is all zeros, as in a damaged upload), E-NUM-NAN.
    """
    stated = report.config.get("quantscope") or {}
    mode, keep = stated.get("mode", "w1.58a8"), float(stated.get("keep", 0.5))
    rules = BitNetRules(mode, keep, trained=mode if stated.get("trained", True) else None, trained_keep=keep)
    fmt, adapter = bitnet_format(report.config), adapter_for(config)
    if not adapter.keeps_tensors(config):
        raise ModelError(f"Ternary weights of {adapter.name} are not read: use a model of BitNet or Llama.", code="E-MODEL-ARCH")
    for name in ("quantization_config", "quantscope"):
        if hasattr(config, name):
            delattr(config, name)
    with library_errors("The weights do not fit config.json. Download the model again."):
        source = _Folder(folder, report.tensors)
        blocks = [_block(source, adapter, config, index, fmt, rules) for index in range(config.num_hidden_layers)]
        model = CausalModel(config, adapter, blocks, dict(source.rest()))
        return model.requires_grad_(False)


def _block(
    source: _Folder, adapter: ModelAdapter, config: PreTrainedConfig, index: int, fmt: str, rules: BitNetRules
) -> DecoderBlock:
    spec, prefix = adapter.spec(config, index), f"{adapter.layers}.{index}."

    def norm(path: str, width: int) -> ReorderNorm:
        weight = source.take(f"{prefix}{path}.weight").to(torch.float32)
        _require(weight.shape == (width,), f"{prefix}{path}.weight has another size than config.json says")
        return ReorderNorm(spec.norm, weight, None, spec.eps)

    def linear(site: str, sizes: tuple[tuple[str, int], ...]) -> TernaryLinear:
        width = spec.width(site)
        parts = [_projection(source, prefix + path, rows, width, fmt, rules.kind(site)) for path, rows in sizes]
        return TernaryLinear.from_codes(parts, kind=rules.kind(site), keep=rules.keep)

    return DecoderBlock(
        spec,
        index,
        adapter.windows(config)[index],
        norm1=norm(adapter.norm1, spec.hidden),
        norm2=norm(adapter.norm2, spec.hidden),
        attn_sub_norm=norm(adapter.attn_sub_norm, spec.width("o_in")) if spec.sub_norms else None,
        ffn_sub_norm=norm(adapter.ffn_sub_norm, spec.ffn) if spec.sub_norms else None,
        qkv=linear("attn_in", tuple(zip(adapter.qkv, map(spec.width, ("q", "k", "v")), strict=True))),
        o=linear("o_in", ((adapter.o, spec.hidden),)),
        up=linear("mlp_in", tuple((path, spec.ffn) for path in adapter.mlp_in)),
        down=linear("down_in", ((adapter.down, spec.hidden),)),
        rules=rules,
    )


def _projection(source: _Folder, name: str, rows: int, width: int, fmt: str, kind: str) -> tuple[Tensor, Tensor]:
    """Return (codes [rows, width] int8, α) of one projection."""
    weight = source.take(f"{name}.weight")
    if fmt == ONLINE_MASTERS:
        _require(weight.is_floating_point() and weight.shape == (rows, width), f"{name}.weight has another shape or type")
        codes, scale = quantize_weight(weight, kind)
    else:
        _require(weight.dtype == torch.uint8 and weight.shape == (rows // 4, width), f"{name}.weight has another shape or type")
        stored = source.take(f"{name}.weight_scale").to(torch.float32)
        _require(stored.numel() == 1 and float(stored) > 0, f"{name}.weight_scale is not one positive number")
        try:
            codes = unpack_rows(weight)
        except ValueError as error:
            raise ModelError(f"{name[:80]}: {error}. Download the model again.", code="E-MODEL-BAD") from error
        scale = 1 / stored.reshape(()) if fmt == "bitlinear" else stored.reshape(())
    if not bool(codes.any()):
        raise ModelError(
            f"{name[:80]} holds only zeros: this upload of the weights is damaged. Name an earlier one as owner/name@commit.",
            code="E-MODEL-BAD",
        )
    return codes, scale


def _require(fits: bool, fault: str) -> None:
    if not fits:
        raise ModelError(f"{fault[:160]}. Download the model again.", code="E-MODEL-BAD")


# writing


def check_model_folder(folder: Path | str) -> None:
    """Refuse a folder that a trained model may not take: call it before long work.

    Raises: InputError E-PARAM-OUT if it holds anything but an earlier trained model; ResourceError E-DISK.
    """
    check_target(folder)
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "card.json").is_file():
        raise InputError(
            f"The folder {folder.name[:60]!r} holds something else than a trained model: choose a new or empty folder.",
            code="E-PARAM-OUT",
        )


def save_bitnet(
    folder: Path | str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    mode: str,
    keep: float = 0.5,
    card: dict[str, Any],
    readme: str | None = None,
) -> None:
    """Write a trained model as a folder that `load_model` and transformers read; an earlier model is replaced in one step.

    Decoder linears are packed from their masters (`quantize_weight`); everything else is stored in float32, since transformers
    keeps stored types and cannot multiply two different ones. With mode "fp" nothing is packed. Inputs of 4 bits exist in
    Quantscope alone: transformers runs every packed model with 8-bit inputs, and refuses one whose inputs are rotated.

    Args:
        model: a transformers causal model whose decoder linears hold floating masters in `weight` and have no bias.
        mode: what the model was trained for, a key of `MODES`; keep: TopK's share.
        card: for the catalogue: title, description, licence, and other facts to keep. readme: text of README.md.
    Raises: InputError E-PARAM-MODE, E-PARAM-CARD; E-PARAM-MODEL if four does not divide a projection's rows; E-PARAM-OUT and
        ResourceError as `check_model_folder`.
    """
    check_model_folder(folder)
    if mode not in MODES:
        raise InputError(f"mode is {str(mode)[:20]!r}: use one of {', '.join(MODES)}.", code="E-PARAM-MODE")
    if not all(isinstance(card.get(key), str) and card[key] for key in _CARD_KEYS):
        raise InputError(f"The card needs a text for each of {', '.join(_CARD_KEYS)}.", code="E-PARAM-CARD")
    adapter = adapter_for(model.config)
    tensors = dict(_stored(model, adapter, mode))
    own = {"architectures": [type(model).__name__], "dtype": "float32", "quantscope": {"mode": mode, "keep": keep}}
    packed = PACKED | {"linear_class": ROTATED} if mode in ROTATED_MODES else PACKED
    config = config_facts(model.config) | own | ({"quantization_config": packed} if mode != "fp" else {})
    files = {"card.json": json.dumps(card, indent=1, ensure_ascii=False)}
    files |= {} if readme is None else {"README.md": readme}
    write_model(folder, tensors, config, model.generation_config, tokenizer, files=files, shard_bytes=SHARD_BYTES)


def _stored(model: PreTrainedModel, adapter: ModelAdapter, mode: str) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor as stored, packed uint8 or float32, each storage once (a tied head is left out)."""
    sites = {"attn_in": adapter.qkv, "o_in": (adapter.o,), "mlp_in": adapter.mlp_in, "down_in": (adapter.down,)}
    kinds = {f"{path}.weight": MODES[mode][site] for site, paths in sites.items() for path in paths}
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        layer, _, path = name.removeprefix(adapter.layers + ".").partition(".")
        if mode == "fp" or not layer.isdigit() or path not in kinds:
            yield name, tensor.detach().to(torch.float32).contiguous()
            continue
        codes, scale = quantize_weight(tensor.detach(), kinds[path])
        if len(codes) % 4:
            raise InputError(f"{name} has {len(codes)} rows: choose sizes that four divides.", code="E-PARAM-MODEL")
        yield name, pack_rows(codes)
        yield f"{name}_scale", scale.reshape(1)
