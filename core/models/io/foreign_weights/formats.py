"""Know the formats in which other tools store quantised weights.

    format                      weight of a linear [N, K], g = group of k   stored
    GPTQ (2, 3, 4, 8 bits)      scales[g, n] (code - zero[g, n])            qweight: words along K; qzeros: words along N, in
                                                                            version 1 as zero - 1
    AWQ (4 bits, "gemm")        scales[g, n] (code - zero[g, n])            words along N, columns in the order AWQ_ORDER
    compressed-tensors          weight_scale (code - weight_zero_point)     pack-quantized: words along K, zero points along
                                                                            N, both plus 2**(b - 1); int-, float- and
                                                                            naive-quantized: codes as they are
    FP8, FBGEMM FP8             weight times its scale                      float8; a scale per block, row or tensor
    MLX (affine)                scales code + biases                        words along K
    bitsandbytes, 8 bits        SCB code / 127                              int8, one SCB per row
    bitsandbytes, NF4 and FP4   quant_map[code] times absmax of a block     two codes in a byte, the first in the high bits;
                                                                            blocks of the flat weight

Codes of b bits lie in a stream of 32-bit words, the first one in the lowest bits; codes of 3, 5 and 6 bits cross words. Products
are made in float32 and not rounded to the type of the scales. Scales of activations and of the cache say nothing about weights
and are left out. Sources: AutoGPTQ and GPTQModel (`checkpoint_format`), AutoAWQ, compressed-tensors 0.20, transformers 5.24
(finegrained_fp8, fbgemm_fp8, bitsandbytes), MLX (`mlx.core.quantize`), bitsandbytes (`QuantState`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from core.errors import ModelError
from core.models.io.foreign_weights.layout import Layout, Parts, Shape, affine, scaled, unpack_words
from core.models.io.preflight.folder import strict_json
from core.models.io.preflight.other_tools import FLOAT_TYPES, checkpoint_of

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column that the i-th code of a word belongs to, among the word's eight columns."""
_STATE_BYTES = 4096
"""Largest JSON that is read from a tensor."""
_INTS, _FP8 = ("I32", "U32"), ("F8_E4M3", "F8_E5M2")


def _gptq(settings: Mapping[str, Any], base: str, shape: Shape) -> Iterator[Layout]:
    version = str(settings.get("checkpoint_format") or settings.get("format") or "gptq")
    if version not in ("gptq", "gptq_v2") or settings.get("is_marlin_format") or settings.get("dynamic"):
        found = "settings of single layers" if settings.get("dynamic") else f"the format {version[:20]}"
        raise _unread("gptq", found, "the formats gptq and gptq_v2 with one setting for all layers")
    (n, k), bits = shape, _bits(settings, "gptq", ("bits",), (2, 3, 4, 8))
    group = _group(settings, "gptq", ("group_size",), k)
    groups = -(-k // group)
    parts = {"qweight": (_INTS, (_words(k, bits), n)), "qzeros": (_INTS, (groups, _words(n, bits))),
             "scales": (FLOAT_TYPES, (groups, n)), "g_idx": (_INTS, (k,))}

    def unpack(found: Parts) -> Tensor:
        codes, zeros = unpack_words(found["qweight"].t(), bits, k), unpack_words(found["qzeros"], bits, n)
        if version == "gptq":  # zero - 1 is stored; adding one wraps, as in AutoGPTQ
            zeros = (zeros + 1) & (2**bits - 1)
        order = found["g_idx"].long() if "g_idx" in found else None
        return affine(codes, found["scales"].t(), zeros.t(), (1, group), order)

    yield Layout(f"{bits}-bit GPTQ", parts, unpack, frozenset(() if settings.get("desc_act") else ("g_idx",)))


def _awq(settings: Mapping[str, Any], base: str, shape: Shape) -> Iterator[Layout]:
    version = str(settings.get("version") or settings.get("checkpoint_format") or settings.get("format") or "gemm").lower()
    if version != "gemm":
        raise _unread("awq", f"version {version[:20]}", "version gemm")
    (n, k), bits = shape, _bits(settings, "awq", ("bits", "w_bit"), (4,))
    group = _group(settings, "awq", ("group_size", "q_group_size"), k)
    groups = -(-k // group)
    parts = {"qweight": (_INTS, (k, _words(n, bits))), "qzeros": (_INTS, (groups, _words(n, bits))),
             "scales": (FLOAT_TYPES, (groups, n))}
    places = torch.tensor(AWQ_ORDER).argsort()

    def columns(words: Tensor) -> Tensor:
        return unpack_words(words, bits, 8 * words.shape[1]).unflatten(1, (-1, 8))[..., places].flatten(1)[:, :n]

    def unpack(found: Parts) -> Tensor:
        return affine(columns(found["qweight"]).t(), found["scales"].t(), columns(found["qzeros"]).t(), (1, group))

    yield Layout("4-bit AWQ", parts, unpack)


def _fp8(settings: Mapping[str, Any], base: str, shape: Shape) -> Iterator[Layout]:
    (n, k), stated = shape, settings.get("weight_block_size")
    block = _pair(stated)
    if stated is not None and block is None:
        raise _unread("fp8", f"weight_block_size {str(stated)[:30]}", "two whole numbers above 0")
    for grid in [block] if block else [(n, k), (1, k)]:
        for name in ("weight_scale_inv", "weight_scale"):
            parts = {"weight": (_FP8, shape), name: (FLOAT_TYPES, (-(-n // grid[0]), -(-k // grid[1])))}
            yield Layout("FP8", parts, partial(scaled, name, None, grid))


def _compressed(settings: Mapping[str, Any], base: str, shape: Shape) -> Iterator[Layout]:
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise _unread("compressed-tensors", "no config_groups", "those that name a scheme")
    if settings.get("sparsity_config"):
        raise _unread("compressed-tensors", "a sparsity_config", "dense weights")
    for group in groups.values():  # which layers a group is for is told by the sizes of their parts: names may be patterns
        stated = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(stated, Mapping):
            yield _compressed_layout(str(group.get("format") or settings.get("format")), stated, shape)


def _compressed_layout(form: str, stated: Mapping[str, Any], shape: Shape) -> Layout:
    """Make the layout of a weight by the scheme of its group."""
    (n, k), method, strategy = shape, "compressed-tensors", stated.get("strategy")
    if form not in ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"):
        raise _unread(method, f"format {form[:30]}", "pack-quantized, int-quantized, float-quantized and naive-quantized")
    is_float = stated.get("type") == "float"
    bits = _bits(stated, method, ("num_bits",), (8,) if is_float else tuple(range(2, 9)))
    block = {"tensor": (n, k), "channel": (1, k), "group": (1, _group(stated, method, ("group_size",), k)),
             "block": _pair(stated.get("block_structure"))}.get(str(strategy))
    if block is None:
        raise _unread(method, f"strategy {str(strategy)[:30]}", "tensor, channel, group and block")
    grid, symmetric = (-(-n // block[0]), -(-k // block[1])), stated.get("symmetric", True)
    zeros = {} if symmetric else {"weight_zero_point": (("I8",), grid)}
    scales = {"weight_scale": (FLOAT_TYPES, grid)}
    name = "FP8 compressed-tensors" if is_float else f"{bits}-bit compressed-tensors"
    if form != "pack-quantized":
        types = _FP8 if is_float else ("I8",)
        unpack = partial(scaled, "weight_scale", None if symmetric else "weight_zero_point", block)
        return Layout(name, {"weight": (types, shape), **scales, **zeros}, unpack)
    along = strategy in ("channel", "group")  # zero points of these are packed
    if zeros and along:
        zeros = {"weight_zero_point": (_INTS, (_words(n, bits), grid[1]))}
    parts = {"weight_packed": (_INTS, (n, _words(k, bits))), **scales, **zeros, "weight_shape": (("I64", "I32"), (2,)),
             "weight_g_idx": (_INTS, (k,))}

    def unpack_all(found: Parts) -> Tensor:
        if found["weight_shape"].tolist() != [n, k]:
            raise ValueError(f"weight_shape is {found['weight_shape'].tolist()}, config.json says {[n, k]}")
        codes, zero = unpack_words(found["weight_packed"], bits, k).short(), found.get("weight_zero_point")
        if zero is not None:
            zero = unpack_words(zero.t(), bits, n).t().short() - 2 ** (bits - 1) if along else zero
        order = found["weight_g_idx"].long() if "weight_g_idx" in found else None
        return affine(codes - 2 ** (bits - 1), found["weight_scale"], zero, block, order)

    return Layout(name, parts, unpack_all, frozenset(() if stated.get("actorder") == "group" else ("weight_g_idx",)))


def _mlx(settings: Mapping[str, Any], base: str, shape: Shape) -> Iterator[Layout]:
    own = settings.get(base)
    stated = {**settings, **own} if isinstance(own, Mapping) else settings
    if stated.get("mode", "affine") != "affine":
        raise _unread("mlx", f"mode {str(stated['mode'])[:20]}", "the mode affine")
    (n, k), bits = shape, _bits(stated, "mlx", ("bits",), (2, 3, 4, 5, 6, 8))
    group = _group(stated, "mlx", ("group_size",), k)
    grid = (FLOAT_TYPES, (n, -(-k // group)))
    parts = {"weight": (_INTS, (n, _words(k, bits))), "scales": grid, "biases": grid}

    def unpack(found: Parts) -> Tensor:
        return affine(unpack_words(found["weight"], bits, k), found["scales"], None, (1, group), bias=found["biases"])

    yield Layout(f"{bits}-bit MLX", parts, unpack)


def _bitsandbytes(settings: Mapping[str, Any], base: str, shape: Shape) -> Iterator[Layout]:
    (n, k), floats = shape, ("F32",)

    def unpack_rows(found: Parts) -> Tensor:
        if int(found.get("weight_format", 0)) != 0:
            raise ValueError("weight_format is not 0, codes row by row")
        return (found["weight"].double() * found["SCB"].double() / 127).float()

    yield Layout("8-bit bitsandbytes", {"weight": (("I8",), shape), "SCB": (floats, (n, 1)), "weight_format": (("U8",), (1,))},
                 unpack_rows, frozenset(("weight_format",)))
    for kind in ("nf4", "fp4"):
        state = f"weight.quant_state.bitsandbytes__{kind}"
        parts = {"weight": (("U8",), (-(-n * k // 2), 1)), "weight.quant_map": (floats, (16,)), state: (("U8",), (None,))}
        nested = {"weight.nested_absmax": (floats, (None,)), "weight.nested_quant_map": (floats, (256,))}
        for own in ({"weight.absmax": (floats, (None,))}, {"weight.absmax": (("U8",), (None,)), **nested}):
            yield Layout(f"{kind.upper()} bitsandbytes", parts | own, partial(_blocks, state, shape))


def _blocks(state: str, shape: Shape, found: Parts) -> Tensor:
    """Compute a weight [N, K] of 4-bit codes with a largest value for each block, itself in codes where it is nested."""
    facts, count = strict_json(found[state].numpy().tobytes()[:_STATE_BYTES], "quant_state"), shape[0] * shape[1]
    stated = list(facts.get("shape") or ()) if isinstance(facts, Mapping) else None
    if stated != list(shape):
        raise ValueError(f"its quant_state names the shape {str(stated)[:30]}, config.json says {list(shape)}")
    absmax = found["weight.absmax"]
    if "weight.nested_absmax" in found:
        largest = _spread(found["weight.nested_absmax"], facts.get("nested_blocksize"), len(absmax))
        absmax = found["weight.nested_quant_map"][absmax.long()] * largest + float(facts.get("nested_offset", 0.0))
    packed = found["weight"].flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).flatten()[:count]
    return (found["weight.quant_map"][codes.long()] * _spread(absmax, facts.get("blocksize"), count)).reshape(shape)


def _spread(values: Tensor, size: Any, count: int) -> Tensor:
    """Repeat the value of each block of `size` for its members. Raises: ValueError unless the blocks are as many as needed."""
    if type(size) is not int or size < 1 or len(values) != -(-count // size):
        raise ValueError(f"{len(values)} blocks of {str(size)[:20]} cannot hold {count} values")
    return values.repeat_interleave(size)[:count]


LAYOUTS: dict[str, Callable[[Mapping[str, Any], str, Shape], Iterator[Layout]]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
    "fbgemm_fp8": _fp8,
    "mlx": _mlx,
    "bitsandbytes": _bitsandbytes,
}
"""`quant_method` → settings, name of the layer and shape of its weight → the layouts that its parts may have."""


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _bits(settings: Mapping[str, Any], method: str, names: tuple[str, ...], known: tuple[int, ...]) -> int:
    value = next((settings[name] for name in names if name in settings), None)
    if type(value) is not int or value not in known:
        raise _unread(method, f"{names[0]} = {str(value)[:20]}", ", ".join(map(str, known)))
    return value


def _group(settings: Mapping[str, Any], method: str, names: tuple[str, ...], columns: int) -> int:
    """Return the size of a group: -1 stands for a whole row."""
    value = next((settings[name] for name in names if settings.get(name) is not None), -1)
    if type(value) is not int or value == 0 or value < -1:
        raise _unread(method, f"{names[0]} = {str(value)[:20]}", "-1 and whole numbers above 0")
    return columns if value == -1 else value


def _pair(value: Any) -> tuple[int, int] | None:
    """Return two whole numbers above zero, None for anything else."""
    fits = isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value)
    return tuple(value) if fits else None


def _unread(method: str, found: str, known: str) -> ModelError:
    sentence = f"{checkpoint_of(method)} with {found}: read are {known}. Use the original float model."
    return ModelError(sentence, code="E-MODEL-BAD")
