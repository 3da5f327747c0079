"""A device that is not the CPU, for machines without one: tensors that say they are elsewhere, compute on the CPU, and refuse to
meet a tensor of the CPU, as a GPU's would.

Torch calls that name the device make such tensors (`elsewhere` is a mode), `.cpu()` and `.to("cpu")` bring them back. As on a GPU
a tensor of the CPU may index and a single number of the CPU may be an operand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

AWAY = torch.device("xpu")
_MOVES = (torch.ops.aten.to, torch.ops.aten._to_copy, torch.ops.aten.copy_)
_INDEXED = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


class Away(Tensor):
    """A tensor of the pretended device; `here` holds its values."""

    @staticmethod
    def __new__(cls, here: Tensor) -> Away:
        return Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device="meta"
        )

    def __init__(self, here: Tensor) -> None:
        self.here = here

    @property
    def device(self) -> torch.device:
        return AWAY

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    def tolist(self) -> Any:
        return self.here.tolist()

    def numpy(self) -> None:
        raise TypeError("can't convert a tensor of another device to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        moves, kwargs = func.overloadpacket in _MOVES, kwargs or {}
        named = [v for v in tree_iter((args, kwargs)) if isinstance(v, torch.device)]
        operands = tree_iter((args[:1] if func.overloadpacket in _INDEXED else args, kwargs))
        if not moves and any(isinstance(t, Tensor) and not isinstance(t, Away) and t.dim() > 0 for t in operands):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
        known = {id(t.here): t for t in tree_iter((args, kwargs)) if isinstance(t, Away)}
        found = func(*tree_map(_here, args), **tree_map(_here, kwargs))
        if moves and named and named[0].type == "cpu":
            return found.clone() if id(found) in known else found
        return tree_map(lambda t: known[id(t)] if id(t) in known else Away(t) if isinstance(t, Tensor) else t, found)


def _here(value: Any) -> Any:
    if isinstance(value, Away):
        return value.here
    return torch.device("cpu") if isinstance(value, torch.device) else value


class _Mode(TorchFunctionMode):
    """Takes calls that name the pretended device before torch looks for its driver."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention and isinstance(args[0], Away):  # makes its causal mask in C++
            assert all(isinstance(t, Away) for t in tree_iter((args, kwargs)) if isinstance(t, Tensor))
            return Away(func(*tree_map(_here, args), **tree_map(_here, kwargs)))
        asked = [v for v in (*args[1:], *(kwargs or {}).values()) if isinstance(v, (torch.device, str)) and str(v) == str(AWAY)]
        if not asked:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(lambda v: torch.device("cpu") if any(v is a for a in asked) else v, (args, kwargs or {}))
        first = args[0] if args else None
        found = func(*(first.here if isinstance(first, Away) else first, *args[1:]), **kwargs) if args else func(**kwargs)
        if isinstance(first, Away) and found is first.here:
            return first
        return Away(found.clone() if found is first else found)


@contextlib.contextmanager
def elsewhere() -> Iterator[torch.device]:
    """The pretended device, while the mode is on; inference mode, which takes no tensors of own kinds, is `no_grad` meanwhile."""
    with mock.patch.object(torch._C, "_InferenceMode", lambda mode: torch.no_grad()), _Mode():
        yield AWAY
