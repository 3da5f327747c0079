"""Run a function on many items at once, one item a thread, for operations too small to share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield function(item) in the order of the items; inside, each operation of torch runs on its own thread alone.

    The function must not touch what another item's call changes, nor torch's global settings. It runs in inference mode where
    the caller does.
    """
    items, threads = list(items), torch.get_num_threads()
    if len(items) < 2 or threads < 2:
        yield from map(function, items)
        return
    mode = torch.is_inference_mode_enabled()  # torch keeps it per thread

    def call(item: Item) -> Result:
        with torch.inference_mode(mode):
            return function(item)

    pool = ThreadPoolExecutor(min(threads, len(items)), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(call, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
