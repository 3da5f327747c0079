"""Failing disks for tests: any file operation of Python below a folder, or a Rust library's write, raises a chosen errno."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch

_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.chmod"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_state: dict[str, object] = {"root": None, "left": -1, "errno": 0, "count": 0}


def _hook(event: str, arguments: tuple) -> None:
    root = _state["root"]
    if root is None or event not in _OPERATIONS or not isinstance(arguments[0], (str, os.PathLike)):
        return
    if event == "open" and not (arguments[2] & _WRITING):
        return
    if not os.path.abspath(os.fspath(arguments[0])).startswith(str(root)):
        return
    _state["count"] += 1
    if _state["left"] >= 0 and _state["count"] > _state["left"]:
        raise OSError(_state["errno"], os.strerror(_state["errno"]), os.fspath(arguments[0]))


sys.addaudithook(_hook)  # an audit hook cannot be removed: it does nothing while there is no root


@contextlib.contextmanager
def failing(root: Path, number: int = 0, after: int = -1) -> Iterator[dict[str, object]]:
    """Let file operations below `root` fail with errno `number` once `after` of them went well; -1: only count them."""
    _state.update(root=root, errno=number, left=after, count=0)
    try:
        yield _state
    finally:
        _state["root"] = None


class RustError(Exception):
    """What a library in Rust raises."""


@contextlib.contextmanager
def failing_rust(number: int) -> Iterator[None]:
    """Let safetensors' writing of a file fail as its Rust part does."""
    real = safetensors.torch.serialize_file

    def fail(*arguments: object, **options: object) -> None:
        raise RustError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

    safetensors.torch.serialize_file = fail
    try:
        yield
    finally:
        safetensors.torch.serialize_file = real
