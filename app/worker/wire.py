"""Messages between the page and its worker process.

    page → worker   ("job", id, steps)   ("cancel", id)
    worker → page   ("ready",)  ("progress", id, step, stage, fraction)  ("text", id, step, chunk)
                    ("result", id, step, report)  ("done", id)  ("failed", id, code, sentence)

Pickled, but read back by a reader that only builds plain values, numpy arrays, dataclasses and errors of `core`: a
worker taken over by a hostile model file gains nothing from writing to the pipe.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import pickle
from multiprocessing.connection import Connection
from typing import Any

from core.errors import QuantscopeError

MAX_BYTES = 512 * 1024**2
_NUMPY = {"_reconstruct", "_frombuffer", "scalar", "ndarray", "dtype"}
_PLAIN = {
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("collections", "OrderedDict"),
    ("builtins", "frozenset"),
    ("builtins", "set"),
    ("_codecs", "encode"),
}


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
    """A message from its bytes. Raises UnpicklingError if it holds anything but data."""
    return _Reader(io.BytesIO(data)).load()


def send(connection: Connection, message: tuple) -> None:
    """Write one message."""
    connection.send_bytes(pickle.dumps(message, protocol=5))


def receive(connection: Connection) -> tuple:
    """Read one message, waiting for it. Raises EOFError when the other side is gone."""
    return loads(connection.recv_bytes(MAX_BYTES))
