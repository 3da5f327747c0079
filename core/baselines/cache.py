"""Keys and values in the quantised cache of transformers, behind the interface of our own.

The library's rule (`QuantizedCache`): what comes first is quantised whole; later keys and values stay in float until there are
`PIECE` of them, then everything is quantised again. So tokens that come `PIECE` at a time after the first see exactly what they
would see one at a time. FP8 has no such rest: one scale per layer, set by what comes first, here `PIECE` tokens of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from core.quant.kv_cache import FloatKVLayer

PIECE = 128
"""The library's default `residual_length`."""


class ForeignKVLayer(FloatKVLayer):
    """Store keys and values of one layer in a layer of transformers' `QuantizedCache`.

    Args: make: makes an empty layer. first: positions that come first and are quantised together.
    """

    def __init__(self, make: Callable[[], object], first: int) -> None:
        super().__init__()
        self.make, self.first, self.layer = make, first, make()

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values [B, Hkv, t, E]; return all stored ones as the library does, [B, Hkv, S, E]."""
        self.length += keys.shape[2]
        return self.layer.update(keys, values)

    def pieces(self, tokens: int) -> list[int]:
        """Return how many of `tokens` positions come at once: the first, then `PIECE` at a time."""
        sizes = [min(self.first, tokens)]
        while (left := tokens - sum(sizes)) > 0:
            sizes.append(min(PIECE, left))
        return sizes

    def select(self, rows: Tensor) -> None:
        """Keep or repeat the given rows of the batch."""
        self.layer.reorder_cache(rows)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor that the library's layer holds."""
        return sum(tensor.nbytes for tensor in _tensors(vars(self.layer)))

    def bytes_per_token(self, heads: int, dim: int, float_bytes: int) -> int:
        """Count the bytes of `PIECE` tokens that were quantised, and divide; tokens that wait in float are left out."""
        trial = ForeignKVLayer(self.make, PIECE)
        states = torch.arange(heads * PIECE * dim, dtype=torch.float32).view(1, heads, PIECE, dim)
        trial.update(states, states.clone())
        return trial.nbytes // PIECE


def _tensors(value: object) -> Iterator[Tensor]:
    """Find the plain tensors in nested containers and in tensors that are made of others."""
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        yield from _tensors([getattr(value, name) for name in names])
    elif isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def quanto_store(bits: int, group: int) -> ForeignKVLayer:
    """Make an empty store that optimum-quanto quantises, groups of `group` numbers with float scale and shift."""
    from transformers import QuantoQuantizedLayer

    return ForeignKVLayer(partial(QuantoQuantizedLayer, nbits=bits, q_group_size=group), 1)


def hqq_store(bits: int, group: int) -> ForeignKVLayer:
    """Make an empty store that HQQ quantises, groups of `group` numbers with float scale and zero point."""
    from transformers import HQQQuantizedLayer

    return ForeignKVLayer(partial(HQQQuantizedLayer, nbits=bits, q_group_size=group, axis_key=1, axis_value=1), 1)


def fp8_store() -> ForeignKVLayer:
    """Make an empty store in FP8 (e4m3)."""
    from transformers import Fp8QuantizedLayer

    return ForeignKVLayer(Fp8QuantizedLayer, PIECE)


STORES = {
    "kv-quanto-4": partial(quanto_store, 4),
    "kv-quanto-2": partial(quanto_store, 2),
    "kv-hqq-8": partial(hqq_store, 8),
    "kv-hqq-4": partial(hqq_store, 4),
    "kv-fp8": fp8_store,
}
"""Function of each baseline of keys and values, which makes the empty store of one layer, where groups are, of a group size."""
