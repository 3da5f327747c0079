"""Limit connections: how many there are, and how long a request's head and body may take to arrive.

uvicorn accepts any number of connections and waits for ever for a request's head. `Connections.guarded` makes a subclass of its
protocol that does not: when all places are taken, the connection that has waited longest for the rest of its first request
gives up its place (`waiting`), else the one idle longest between requests (`resting`), so a newcomer is served.
"""

from __future__ import annotations

import asyncio
import resource
from collections import Counter, OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from app.door.log import told
from app.door.visitor import network_of

HEAD_BYTES = 32 * 1024
HEAD_SECONDS = 10.0
REST_SECONDS = 15.0
"""Seconds from an answer to the end of the next request's head; uvicorn itself closes an idle connection after five."""
SPARE_FILES = 256
"""File descriptors left for everything but connections."""
BACKLOG = 2048
"""Connections that uvicorn may accept at one time, before any of them can be closed."""
CONNECTION: ContextVar[Connection | None] = ContextVar("connection", default=None)


def room(most: int) -> int:
    """Return how many connections fit: `most`, or what the limit of open files, raised as far as is allowed, leaves."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + SPARE_FILES + BACKLOG
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return most if soft == resource.RLIM_INFINITY else min(most, max(16, soft - SPARE_FILES))


class Connection:
    """One connection. It is waiting until the request that it sends is complete."""

    def __init__(self, table: Connections, transport: Any, peer: str) -> None:
        self.table, self.transport, self.peer = table, transport, peer
        self._head = b""
        self._bytes = 0
        self.served = False
        self._timer: asyncio.TimerHandle | None = None
        self.wait(HEAD_SECONDS)

    def wait(self, seconds: float) -> None:
        """Wait for a request's head, for at most `seconds`."""
        self._head, self._bytes = b"", 0
        (self.table.resting if self.served else self.table.waiting)[self] = None
        self._set(seconds)

    def arrive(self, data: bytes) -> bool:
        """Accept a part of a head. Returns: False if the head is too long, and the connection was closed."""
        if self._timer is None:
            return True
        seen, self._bytes = self._head + data, self._bytes + len(data)
        if b"\n\r\n" in seen or b"\n\n" in seen:
            self._set(None)
        elif self._bytes > HEAD_BYTES:
            self.refuse(b"431 Request Header Fields Too Large")
            return False
        self._head = seen[-3:]
        return True

    def complete(self) -> None:
        """Mark the request as complete."""
        self._set(None)
        self.served = True
        self.table.waiting.pop(self, None)
        self.table.resting.pop(self, None)

    def answered(self) -> None:
        """Wait for the next request."""
        if not self.transport.is_closing():
            self.wait(REST_SECONDS)

    def refuse(self, status: bytes = b"408 Request Timeout") -> None:
        """End the connection with a status line."""
        told("connections closed: " + status.decode())
        self.lost()
        self.transport.write(b"HTTP/1.1 " + status + b"\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        self.transport.close()
        asyncio.get_running_loop().call_later(1.0, self.transport.abort)  # for a peer that reads nothing

    def lost(self) -> None:
        """Remove the connection and its timer."""
        self._set(None)
        self.table.drop(self)

    def _set(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, self.refuse)


class Connections:
    """All connections of the server."""

    def __init__(self, *, most: int, most_per_address: int, is_proxy: Callable[[str], bool]) -> None:
        """Allow `most` connections, and `most_per_address` from an address unless `is_proxy` says that many share it."""
        self.most, self.most_per_address, self.is_proxy = room(most), most_per_address, is_proxy
        self.all: set[Connection] = set()
        self.waiting: OrderedDict[Connection, None] = OrderedDict()
        self.resting: OrderedDict[Connection, None] = OrderedDict()
        self.per_address: Counter[str] = Counter()

    def admit(self, transport: Any) -> Connection | None:
        """Accept a new connection, or close it and return None."""
        peer = str((transport.get_extra_info("peername") or ("local",))[0])
        address = network_of(peer)
        if self.per_address[address] >= self.most_per_address and not self.is_proxy(peer):
            told("connections refused: too many from one address")
            transport.abort()
            return None
        if len(self.all) >= self.most:
            if not self.waiting and not self.resting:
                told("connections refused: too many in all")
                transport.abort()
                return None
            told("connections closed: their place was needed")
            oldest = next(iter(self.waiting or self.resting))
            oldest.lost()
            oldest.transport.abort()
        connection = Connection(self, transport, address)
        self.all.add(connection)
        self.per_address[address] += 1
        return connection

    def drop(self, connection: Connection) -> None:
        """Remove a connection."""
        if connection in self.all:
            self.all.discard(connection)
            self.per_address[connection.peer] -= 1
            if not self.per_address[connection.peer]:
                del self.per_address[connection.peer]
        self.waiting.pop(connection, None)
        self.resting.pop(connection, None)

    def guarded(self, protocol: type[asyncio.Protocol]) -> type[asyncio.Protocol]:
        """Make a subclass of uvicorn's protocol that keeps these limits."""
        table = self

        class Guarded(protocol):
            place: Connection | None = None

            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                self.place = table.admit(transport)
                if self.place is not None:
                    super().connection_made(transport)

            def data_received(self, data: bytes) -> None:
                if self.place is None or not self.place.arrive(data):
                    return
                token = CONNECTION.set(self.place)  # the task that answers the request inherits it
                try:
                    super().data_received(data)
                finally:
                    CONNECTION.reset(token)

            def connection_lost(self, exc: Exception | None) -> None:
                if self.place is not None:
                    self.place.lost()
                    super().connection_lost(exc)

        return Guarded
