"""Requests to the door, for its tests: an application behind it that says what it got, and events as the page sends them."""

from __future__ import annotations

import asyncio
import json

import httpx

from app.door.bodies import FILE, MANY, ONE, Events
from app.door.calls import Call
from app.door.gate import Gate, Limits
from app.door.rules import RUN, Names
from app.door.visitor import visitor

EVENT = {"data": ["k", 3], "fn_index": 1, "session_hash": "abc", "trigger_id": None, "event_data": None}
INPUTS = {1: [ONE, ONE], 2: [FILE], 3: [MANY]}
CALLS = {index: Call(lambda *values: visitor().address, kinds, ["shown"], False, ()) for index, kinds in INPUTS.items()}
LIMITS = Limits(Names.of("page.example"), upload_bytes=1000, events=Events(INPUTS), calls=CALLS)
UPLOADED = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.zip"\r\n\r\nPK\r\n--b--\r\n'
JSON_TYPE = {"content-type": "application/json"}
COOKIE = {"cookie": "quantscope=" + "c" * 43}
FORM = {"content-type": "multipart/form-data; boundary=b", **COOKIE}


async def echo(scope, receive, send):
    """Answer with the body's length, the sender, and a header that lets every page read it."""
    if scope["path"] == "/theme.css":
        raise ValueError("secret words")
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    headers = [(b"access-control-allow-origin", b"*"), (b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": f"{len(body)} {visitor().address}".encode()})


def ask(method: str, path: str, *, gate: Gate | None = None, **options) -> httpx.Response:
    """Send one request through a gate, without a server."""

    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(gate or Gate(echo, LIMITS))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:7860") as client:
            return await client.request(method, path, **options)

    return asyncio.run(asked())


def post(body: object, **headers: str) -> httpx.Response:
    """Send one event through the gate."""
    return ask("POST", RUN, content=json.dumps(body), headers=headers)
