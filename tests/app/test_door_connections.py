"""The limits on connections, in front of a running server."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn

from app.door import connections
from app.door.bodies import EVENT_BYTES
from app.door.connections import Connections
from app.door.gate import Gate
from app.door.rules import RUN, UPLOAD
from tests.app.door_tools import FORM, LIMITS, UPLOADED, echo


@pytest.fixture
def served(monkeypatch) -> Iterator[tuple[int, Connections]]:
    """Port and connections of a server with six places, four for one address, and short times."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(connections, "REST_SECONDS", 0.7)
    table = Connections(most=6, most_per_address=4, is_proxy=lambda peer: peer == "127.0.0.1")
    config = uvicorn.Config(Gate(echo, LIMITS), port=0, log_level="error", lifespan="off")
    config.load()
    config.http_protocol_class = table.guarded(config.http_protocol_class)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1], table
    server.should_exit = True
    thread.join(10)


def connect(port: int, start: bytes = b"", source: str = "127.0.0.1") -> socket.socket:
    """Open a connection and send the start of a request."""
    opened = socket.create_connection(("127.0.0.1", port), 5, source_address=(source, 0))
    opened.sendall(start)
    return opened


HALF = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"


def answer_of(connection: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""
    data = b""
    try:
        while part := connection.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def test_a_head_that_does_not_come_is_given_up(served):
    port, table = served
    for start in (b"", HALF, HALF + b"\r\n" + b"GET"):
        answer = answer_of(connect(port, start))
        assert b"408" in answer, start
    assert not table.all and not table.waiting and not table.resting and not table.per_address


def test_a_head_without_end_is_refused(served):
    assert b"431" in answer_of(connect(served[0], HALF + b"x: " + b"a" * 40_000))


def test_half_open_connections_give_way_to_requests(served):
    port, table = served
    slow = [connect(port, HALF) for _ in range(30)]
    with httpx.Client() as client:
        assert client.get(f"http://127.0.0.1:{port}/").text == "0 127.0.0.1"
        assert len(table.all) <= 6
        assert client.get(f"http://127.0.0.1:{port}/").status_code == 200, "on the same connection"
    for one in slow:
        one.close()


def test_one_address_has_so_many_connections(served):
    port, table = served
    first = [connect(port, HALF, "127.0.0.2") for _ in range(4)]
    assert answer_of(connect(port, b"", "127.0.0.2")) == b"", "closed at once"
    assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
    assert table.per_address["127.0.0.2"] == 4
    for one in first:
        one.close()


def test_a_large_body_is_refused_without_being_read(served):
    opened = connect(served[0], f"POST {RUN} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {EVENT_BYTES + 1}\r\n\r\n".encode())
    assert answer_of(opened).startswith(b"HTTP/1.1 413")


def test_a_file_that_is_too_long_is_refused_while_it_arrives(served):
    body = UPLOADED.replace(b"PK", b"PK" * 50_000)
    answer = httpx.post(f"http://127.0.0.1:{served[0]}{UPLOAD}", content=iter([body[:70], body[70:]]), headers=FORM)
    assert answer.status_code == 413 and "MB" in answer.json()["detail"]
