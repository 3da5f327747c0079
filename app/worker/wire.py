"""Messages between the page and its worker process.

    page → worker   ("job", id, steps)   ("cancel", id)
    worker → page   ("ready",)  ("beat",)  ("progress", id, step, stage, fraction)  ("text", id, step, chunk)
                    ("result", id, step, report)  ("done", id)  ("failed", id, code, sentence)

Messages are pickled, but the page's reader only builds plain values, numpy arrays, dataclasses and errors of `core`: a worker
that a hostile model file has taken over cannot make the page run code.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import io
import pickle
import struct
from multiprocessing.connection import Connection
from typing import Any

from core.errors import QuantscopeError

MAX_BYTES = 512 * 1024**2
INLINE_BYTES = 100_000
"""Bytes above which a message is unpickled in a thread: a report of a large model takes tens of milliseconds."""
_NUMPY = {"_reconstruct", "_frombuffer", "scalar", "ndarray", "dtype"}
_PLAIN = {
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("collections", "OrderedDict"),
    ("builtins", "frozenset"),
    ("builtins", "set"),
    ("_codecs", "encode"),
}


class Malformed(Exception):
    """Raised for a message of the worker that has none of the forms above."""


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        package = module.partition(".")[0]
        if (module, name) in _PLAIN or (package == "numpy" and name in _NUMPY):
            return super().find_class(module, name)
        if package == "core":
            found = getattr(importlib.import_module(module), name, None)
            expected = isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, QuantscopeError))
            if expected or (module, name) == ("core.errors", "_rebuild"):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} may not cross the pipe")


def loads(data: bytes) -> Any:
    """Unpickle a message. Raises: UnpicklingError if it holds anything but data."""
    return _Reader(io.BytesIO(data)).load()


def frame(message: tuple) -> bytes:
    """Pickle a message with its length in front, as `multiprocessing.Connection` does."""
    data = pickle.dumps(message, protocol=5)
    return struct.pack("!i", len(data)) + data


async def read(stream: asyncio.StreamReader) -> tuple:
    """Read one message of the worker, on the page's side.

    Raises: EOFError or OSError when the worker is gone; Malformed for bytes that are not a message.
    """
    (size,) = struct.unpack("!i", await stream.readexactly(4))
    if not 0 <= size <= MAX_BYTES:
        raise Malformed(f"a message of {size} bytes")
    data = await stream.readexactly(size)
    try:
        message = await asyncio.to_thread(loads, data) if size > INLINE_BYTES else loads(data)
    except Exception as error:  # noqa: BLE001 - process boundary: unpickling arbitrary bytes can raise anything
        raise Malformed(repr(error)) from error
    if not isinstance(message, tuple):
        raise Malformed(f"a message of type {type(message).__name__}")
    return message


def send(connection: Connection, message: tuple) -> None:
    """Send one message, on the worker's side."""
    connection.send_bytes(pickle.dumps(message, protocol=5))


def receive(connection: Connection) -> tuple:
    """Wait for one message and return it, on the worker's side. Raises: EOFError when the page is gone."""
    return loads(connection.recv_bytes(MAX_BYTES))
