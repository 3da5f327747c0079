"""Weights written in the formats of other tools by plain loops, beside the values that they stand for.

Each writer takes the size of a linear [n, k] and a source of random numbers, and returns the stored parts by name and the weight
as Python computes it. Codes are written into one large integer, `bits` after `bits`, and that is cut into words.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.models.tiny import save_tiny

Parts = dict[str, Tensor]
Writer = Callable[[int, int, Random], tuple[Parts, Tensor]]
LAYERS = tuple(f"self_attn.{x}_proj" for x in "qkvo") + tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down"))


def stream(rows: list[list[int]], bits: int) -> np.ndarray:
    """Codes [R][C] as words [R, ceil(C bits / 32)], the first code in the lowest bits."""
    found = []
    for row in rows:
        whole = 0
        for place, code in enumerate(row):
            whole |= code << (place * bits)
        found.append([(whole >> 32 * word) & 0xFFFFFFFF for word in range(-(-len(row) * bits // 32))])
    return np.array(found, dtype=np.uint32)


def words(rows: list[list[int]], bits: int) -> Tensor:
    return torch.from_numpy(stream(rows, bits).view(np.int32))


def turned(rows: list[list[Any]]) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)]


def codes(rows: int, columns: int, low: int, high: int, random: Random) -> list[list[int]]:
    return [[random.randint(low, high) for _ in range(columns)] for _ in range(rows)]


def scales(rows: int, columns: int, random: Random, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.tensor([[random.uniform(0.001, 0.02) for _ in range(columns)] for _ in range(rows)], dtype=dtype)


def weight(n: int, k: int, value: Callable[[int, int], float]) -> Tensor:
    """The values of a weight; each is computed in float64 from numbers of at most 24 bits, and rounded once to float32."""
    return torch.tensor([[value(row, column) for column in range(k)] for row in range(n)], dtype=torch.float64).float()


def gptq(bits: int, group: int, version: int = 1, order: bool = False) -> Writer:
    def write(n: int, k: int, random: Random) -> tuple[Parts, Tensor]:
        groups = -(-k // group)
        stored, zero = codes(k, n, 0, 2**bits - 1, random), codes(groups, n, 0, 2**bits - 1, random)
        scale = scales(groups, n, random)
        index = [column // group for column in range(k)]
        if order:
            random.shuffle(index)
        kept = [[(z - 1) % 2**bits for z in row] for row in zero] if version == 1 else zero
        parts = {"qweight": words(turned(stored), bits).t().contiguous(), "qzeros": words(kept, bits), "scales": scale}
        if order or bits == 8:
            parts["g_idx"] = torch.tensor(index, dtype=torch.int32)
        steps = scale.tolist()
        return parts, weight(n, k, lambda r, c: steps[index[c]][r] * (stored[c][r] - zero[index[c]][r]))

    return write


def awq(group: int) -> Writer:
    def write(n: int, k: int, random: Random) -> tuple[Parts, Tensor]:
        stored, zero, scale = codes(k, n, 0, 15, random), codes(k // group, n, 0, 15, random), scales(k // group, n, random)

        def mixed(rows: list[list[int]]) -> Tensor:  # of eight columns, the even ones come first
            return words([[row[start + i] for start in range(0, n, 8) for i in (0, 2, 4, 6, 1, 3, 5, 7)] for row in rows], 4)

        steps = scale.tolist()
        parts = {"qweight": mixed(stored), "qzeros": mixed(zero), "scales": scale}
        return parts, weight(n, k, lambda r, c: steps[c // group][r] * (stored[c][r] - zero[c // group][r]))

    return write


def fp8(name: str, rows: int | None, columns: int | None, shape: tuple[int, ...] | None = None) -> Writer:
    """Blocks of rows × columns, None for all of them. shape: of the stored scale where it is not [blocks, blocks]."""
    def write(n: int, k: int, random: Random) -> tuple[Parts, Tensor]:
        high, wide = rows or n, columns or k
        stored = torch.tensor([[random.gauss(0, 100) for _ in range(k)] for _ in range(n)]).to(torch.float8_e4m3fn)
        scale = scales(-(-n // high), -(-k // wide), random, torch.float32)
        values, steps = stored.to(torch.float64).tolist(), scale.tolist()
        parts = {"weight": stored, name: scale if shape is None else scale.reshape(shape)}
        return parts | {"input_scale": torch.ones(1)}, weight(n, k, lambda r, c: steps[r // high][c // wide] * values[r][c])

    return write


def mlx(bits: int, group: int) -> Writer:
    def write(n: int, k: int, random: Random) -> tuple[Parts, Tensor]:
        stored, scale, bias = codes(n, k, 0, 2**bits - 1, random), scales(n, k // group, random), scales(n, k // group, random)
        steps, starts = scale.tolist(), bias.tolist()
        parts = {"weight": torch.from_numpy(stream(stored, bits)), "scales": scale, "biases": bias}
        return parts, weight(n, k, lambda r, c: steps[r][c // group] * stored[r][c] + starts[r][c // group])

    return write


def int8_rows(n: int, k: int, random: Random) -> tuple[Parts, Tensor]:
    """bitsandbytes' LLM.int8()."""
    stored, largest = codes(n, k, -127, 127, random), [random.uniform(0.1, 2.0) for _ in range(n)]
    scb = torch.tensor(largest)
    largest = scb.tolist()
    parts = {"weight": torch.tensor(stored, dtype=torch.int8), "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, weight(n, k, lambda r, c: stored[r][c] * largest[r] / 127)


def four_bits(kind: str, block: int, nested: bool) -> Writer:
    """bitsandbytes' blocks of 4-bit codes; nested: their largest values are codes of a table of 256 values themselves."""
    def write(n: int, k: int, random: Random) -> tuple[Parts, Tensor]:
        stored, blocks = codes(1, n * k, 0, 15, random)[0], -(-n * k // block)
        table = torch.tensor(sorted(random.uniform(-1, 1) for _ in range(16)))
        facts = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [n, k]}
        packed = [stored[i] << 4 | stored[i + 1] for i in range(0, n * k, 2)]
        parts = {"weight": torch.tensor(packed, dtype=torch.uint8)[:, None], "weight.quant_map": table}
        if nested:
            second, indices = torch.tensor([random.uniform(-1, 1) for _ in range(256)]), codes(1, blocks, 0, 255, random)[0]
            tops = torch.tensor([random.uniform(0.1, 1.0) for _ in range(-(-blocks // 16))])
            parts |= {"weight.absmax": torch.tensor(indices, dtype=torch.uint8), "weight.nested_absmax": tops,
                      "weight.nested_quant_map": second}
            facts |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": 0.25}
            largest = torch.stack([second[index] * tops[place // 16] + 0.25 for place, index in enumerate(indices)])
        else:
            largest = torch.tensor([random.uniform(0.1, 2.0) for _ in range(blocks)])
            parts["weight.absmax"] = largest
        state = json.dumps(facts).encode()
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(state), dtype=torch.uint8)
        steps, values = largest.tolist(), table.tolist()
        return parts, weight(n, k, lambda r, c: values[stored[r * k + c]] * steps[(r * k + c) // block])

    return write


def write_packed(folder: Path, writer: Writer, config: dict[str, Any], *,
                 change: Callable[[dict[str, Tensor]], None] | None = None, embedding: bool = False,
                 equal: bool = False, architecture: str = "llama") -> tuple[Path, Path]:
    """A tiny model whose linear layers are stored as `writer` does, and the same model in float: (folder, folder).

    embedding: the embedding is stored so too. change: of the stored tensors, before they are written. equal: layers of one size
    hold the same values, which is faster.
    """
    random, plain = Random(7), save_tiny(folder / "float", architecture, seed=3)
    state = load_file(plain / "model.safetensors")
    packed, names = dict(state), [f"model.layers.{i}.{name}" for i in range(2) for name in LAYERS]
    made: dict[tuple[int, ...], tuple[Parts, Tensor]] = {}
    for name in names + (["model.embed_tokens"] if embedding else []):
        size = tuple(state[f"{name}.weight"].shape)
        parts, values = made[size] if equal and size in made else writer(*size, random)
        made[size] = parts, values
        state[f"{name}.weight"] = values.clone()
        del packed[f"{name}.weight"]
        packed |= {f"{name}.{part}": tensor.clone() for part, tensor in parts.items()}
    if change:
        change(packed)
    other = folder / "packed"
    other.mkdir()
    for path in plain.iterdir():
        if path.name != "manifest.json":
            (other / path.name).write_bytes(path.read_bytes())
    (plain / "manifest.json").unlink()
    save_file(state, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(packed, other / "model.safetensors", metadata={"format": "pt"})
    stated = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(stated | config))
    return other, plain
