"""Tensors of this machine that say they are on a GPU, for tests of what is decided by the device."""

from __future__ import annotations

import torch

SECOND = torch.device("cuda:1")


class OnSecondGpu(torch.Tensor):
    """A CPU tensor whose `device` is `SECOND`."""

    device = property(lambda self: SECOND)
    is_cuda = True


def on_second_gpu(x: torch.Tensor) -> torch.Tensor:
    """x as an `OnSecondGpu`; the memory is shared."""
    return x.as_subclass(OnSecondGpu)
