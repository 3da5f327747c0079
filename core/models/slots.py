"""The seven sites of a decoder block, and slots for functions that stand there while it runs.

    attn_in [D]   q [H E]   k, v [Hkv E]   o_in [H E]        mlp_in [D]   down_in [F]        each a tensor [B, T, C]

A mixture of experts has down_in.0, down_in.1, … in place of down_in, and a slot ROUTES for the choice of experts.

Calibration records what passes a site; an experiment changes it, or takes gradients there. The quantisers of a quantised model
stand behind the slots, in the linear layers and in the attention: a slot sees a tensor before it is quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from torch import Tensor

from core.recipe import SITES

ROUTES = "routes"
"""Slot of a mixture of experts: which of them each token is sent to, [B, T, k] int64."""
Slot = Callable[[Tensor], Tensor | None]
"""Is given the tensor of its site [B, T, C]; returns the tensor to go on with, of the same shape, or None to leave x alone."""


class Slots:
    """Hold at most one function for each site of a block, for the time of a `with`.

    While any slot is filled, the block runs plain operations in floating point: no kernel that skips a site, and nothing that
    overwrites a tensor which a slot was given. So a function may keep its tensor, and autograd may run through a float block.
    While all are empty, the block's parts do not ask them (`InputUse.owned`).

    Args: sites: of the block (`BlockSpec.sites`); where they are those of experts, there is a slot ROUTES too.
    """

    def __init__(self, sites: tuple[str, ...] = SITES) -> None:
        self._sites = sites if sites == SITES else (*sites, ROUTES)
        self._filled: dict[str, Slot] = {}

    def __bool__(self) -> bool:
        return bool(self._filled)

    def __contains__(self, site: str) -> bool:
        return site in self._filled

    def __call__(self, site: str, x: Tensor) -> Tensor:
        """Return what goes on from a site: x [B, T, C], or what the function there makes of it."""
        if site not in self._filled:
            return x
        found = self._filled[site](x)
        return x if found is None else found

    @contextmanager
    def fill(self, functions: Mapping[str, Slot]) -> Iterator[None]:
        """Put functions into the slots of their sites, in place of what is there, until the `with` ends.

        Raises: ValueError for a name that is none of the block's sites.
        """
        if not functions.keys() <= set(self._sites):
            raise ValueError(f"sites {sorted(functions)} are not all known: use {', '.join(self._sites)}")
        before, self._filled = self._filled, {**self._filled, **functions}
        try:
            yield
        finally:
            self._filled = before

    def watch(self, see: Callable[[str, Tensor], Tensor | None]) -> AbstractContextManager[None]:
        """Fill all slots with one function, which is given the site's name and its tensor."""
        return self.fill({site: partial(see, site) for site in self._sites})
