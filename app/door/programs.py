"""Answer programs: calls by Gradio's clients, and as tools of the Model Context Protocol (MCP).

Gradio's clients start a call with one request and read with another how it ends. Gradio's own queue hands results to whoever
knows the name of a client, and keeps facts of every call; here a result belongs to the sender's cookie, and waits for a limited
time. A call that came without a cookie, as curl sends it, is read by its name alone: 128 random bits.

MCP: JSON-RPC over HTTP without a stream of its own, https://modelcontextprotocol.io/specification/2025-06-18/basic/transports
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import secrets
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from app.door.rules import CALL, CANCEL, CLIENT, CONFIG, INFO, Refusal
from app.door.visitor import visitor
from core.errors import QuantscopeError

UNREAD, UNREAD_OF_ADDRESS = 200, 16
"""Calls that run, and clients whose results wait, in all and of one address."""
UNREAD_BYTES = 64 * 10**6
UNREAD_SECONDS = 600.0
BEAT_SECONDS = 15.0
PROTOCOLS = ("2025-06-18", "2025-03-26", "2024-11-05")
"""Versions of MCP that are spoken, the newest first: they differ in nothing that is used here."""
METHOD_MISSING, BAD_ARGUMENTS = -32601, -32602
"""Codes of JSON-RPC."""


@dataclass(frozen=True)
class Endpoint:
    """A typed function that programs may call. `info`: Gradio's description of it."""

    name: str
    handler: Callable[..., Awaitable[Any]]
    info: Mapping[str, Any]

    def bind(self, *values: Any, **named: Any) -> inspect.BoundArguments:
        """Check arguments against the parameters, and bind them. Raises: Refusal if they do not fit."""
        try:
            return inspect.signature(self.handler).bind(*values, **named)
        except TypeError as error:
            raise Refusal(400, f"/{self.name} was called with other arguments than it has ({error}): see {INFO}.") from None

    def tool(self) -> dict[str, Any]:
        """Describe the endpoint as a tool of MCP."""
        parameters = self.info["parameters"]
        schema = {
            "type": "object",
            "properties": {p["parameter_name"]: p["type"] for p in parameters},
            "required": [p["parameter_name"] for p in parameters if not p["parameter_has_default"]],
        }
        return {"name": self.name, "description": inspect.getdoc(self.handler), "inputSchema": schema}


def endpoints_of(demo: Any) -> dict[int, Endpoint]:
    """Return the public endpoints of a page by Gradio's index: what `gr.api` made."""
    info = demo.get_api_info()["named_endpoints"]
    public = {index: fn for index, fn in demo.fns.items() if f"/{fn.api_name}" in info and fn.api_visibility == "public"}
    return {index: Endpoint(fn.api_name, fn.fn, info[f"/{fn.api_name}"]) for index, fn in public.items()}


@dataclass
class Letters:
    """What one client has not read yet: messages, its calls that run, and an event that tells of news."""

    address: str
    unread: deque[bytes] = field(default_factory=deque)
    running: dict[str, asyncio.Task] = field(default_factory=dict)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    touched_at: float = field(default_factory=time.monotonic)

    def end(self, event: str, task: asyncio.Task[bytes]) -> None:
        """Add the last message of a call whose task is done; a cancelled call has no result."""
        del self.running[event]
        self.unread.append(_completed(event, {}) if task.cancelled() else task.result())
        self.touched_at = time.monotonic()
        self.news.set()


class Programs:
    """The calls of all programs."""

    def __init__(self, endpoints: Mapping[int, Endpoint]) -> None:
        self.endpoints, self.by_name = endpoints, {endpoint.name: endpoint for endpoint in endpoints.values()}
        self._letters: dict[tuple[str, str], Letters] = {}

    def take(self, path: str, body: Mapping[str, Any], cookie: str) -> dict[str, Any]:
        """Start or cancel a call, and return what its POST is answered. `cookie`: that came with it. Raises: Refusal."""
        if path == CANCEL:
            letters = self._letters.get((cookie, str(body.get("session_hash"))))
            task = letters.running.get(str(body.get("event_id"))) if letters else None
            return {"success": task is not None and task.cancel()}
        found = CALL.fullmatch(path)
        if found is None:
            if not cookie:
                raise Refusal(403, f"The client sends no cookie: send the one that {CONFIG} gives, as Gradio's clients do.")
            endpoint, name, data = self.endpoints.get(_index(body.get("fn_index"))), body.get("session_hash"), body.get("data")
        else:
            endpoint, name, data = self.by_name.get(found[1]), secrets.token_hex(16), body.get("data")
        if endpoint is None:
            raise Refusal(404, f"There is no such endpoint: see {INFO}.")
        if not isinstance(name, str) or not CLIENT.fullmatch(name):
            raise Refusal(400, "The client has no name: give a session_hash of up to 40 letters and digits.")
        if found is not None and path.startswith("/gradio_api/call/v2/"):
            bound = endpoint.bind(**body)
        elif isinstance(data, list):
            bound = endpoint.bind(*data)
        else:
            raise Refusal(400, f"The arguments are missing: give them as a list under data, as {INFO} says.")
        event = name if found is not None else secrets.token_hex(16)
        letters = self._open((cookie, name))
        task = letters.running[event] = asyncio.create_task(self._run(endpoint, bound, event))
        task.add_done_callback(lambda done: letters.end(event, done))
        return {"event_id": event}

    def _open(self, key: tuple[str, str]) -> Letters:
        """Return a client's letters, new ones if it has none. Raises: Refusal if too many calls run or wait to be read."""
        now = time.monotonic()
        for old, letters in list(self._letters.items()):
            if not letters.running and now - letters.touched_at > UNREAD_SECONDS:
                del self._letters[old]
        address, counts = visitor().address, Counter[str]()
        for letters in self._letters.values():
            counts[letters.address] += max(1, len(letters.running))
        if counts[address] >= UNREAD_OF_ADDRESS or counts.total() >= UNREAD:
            raise Refusal(503, "The results of too many calls wait to be read: read yours, or try again in ten minutes.")
        return self._letters.setdefault(key, Letters(address))

    async def _run(self, endpoint: Endpoint, bound: inspect.BoundArguments, event: str) -> bytes:
        """Return the last message of a call."""
        try:
            result = await endpoint.handler(*bound.args, **bound.kwargs)
            made = await asyncio.to_thread(_completed, event, {"data": [result], "is_generating": False})
            if len(made) > UNREAD_BYTES - sum(len(m) for kept in self._letters.values() for m in kept.unread):
                made = _completed(event, {"error": "Too many results wait to be read: read yours, and call again."})
        except QuantscopeError as error:
            made = _completed(event, {"error": f"{error} ({error.code})"})
        return made

    async def read(self, path: str, query: str, cookie: str) -> AsyncIterator[bytes]:
        """Yield the messages of one client as they come, until none of its calls runs; leaving early cancels its calls.

        Raises: Refusal if this sender has no such client.
        """
        found = CALL.fullmatch(path)
        key = (cookie, (found[2] or "") if found else parse_qs(query).get("session_hash", [""])[0])
        letters = self._letters.get(key)
        if letters is None:
            raise Refusal(404, "There is no call of yours under this name: start one, and send the same cookie.")
        try:
            while letters.unread or letters.running:
                letters.news.clear()
                while letters.unread:
                    made = letters.unread.popleft()
                    yield _event(made) if found else b"data: " + made + b"\n\n"
                if letters.running:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(letters.news.wait(), BEAT_SECONDS)
                    if not letters.unread:
                        yield b"event: heartbeat\ndata: null\n\n" if found else b'data: {"msg":"heartbeat"}\n\n'
            if not found:
                yield b'data: {"msg":"close_stream"}\n\n'
        finally:
            for task in letters.running.values():
                task.cancel()
            if self._letters.get(key) is letters:
                del self._letters[key]

    async def speak(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        """Handle a message of MCP, and return the answer; None for a notification, which has none."""
        method, asked = message.get("method"), message.get("params")
        asked = asked if isinstance(asked, dict) else {}
        if "id" not in message:
            return None
        head = {"jsonrpc": "2.0", "id": message["id"]}
        if method == "initialize":
            version = asked.get("protocolVersion")
            server = {"name": "quantscope", "title": "Quantscope", "version": "1"}
            spoken = version if version in PROTOCOLS else PROTOCOLS[0]
            return head | {"result": {"protocolVersion": spoken, "capabilities": {"tools": {}}, "serverInfo": server}}
        if method == "ping":
            return head | {"result": {}}
        if method == "tools/list":
            return head | {"result": {"tools": [endpoint.tool() for endpoint in self.by_name.values()]}}
        endpoint, arguments = self.by_name.get(str(asked.get("name"))), asked.get("arguments", {})
        if method != "tools/call":
            return head | {"error": {"code": METHOD_MISSING, "message": "There is no such method: use tools/list or tools/call."}}
        if endpoint is None or not isinstance(arguments, dict):
            return head | {"error": {"code": BAD_ARGUMENTS, "message": f"There is no such tool: use {', '.join(self.by_name)}."}}
        try:
            bound = endpoint.bind(**arguments)
            result = await endpoint.handler(*bound.args, **bound.kwargs)
        except (QuantscopeError, Refusal) as error:
            return head | {"result": {"content": [{"type": "text", "text": str(error)}], "isError": True}}
        words = [{"type": "text", "text": json.dumps(result, allow_nan=False)}]
        return head | {"result": {"content": words, "structuredContent": result, "isError": False}}


def _index(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else -1


def _completed(event: str, output: dict[str, Any]) -> bytes:
    """Write the protocol's last message of a call."""
    message = {"msg": "process_completed", "event_id": event, "success": "error" not in output, "output": output}
    return json.dumps(message, allow_nan=False).encode()


def _event(made: bytes) -> bytes:
    """Write a completed call as an event of `/call/…`: its data, or its error."""
    message = json.loads(made)
    data = message["output"].get("data") if message["success"] else message["output"]
    return f"event: {'complete' if message['success'] else 'error'}\ndata: {json.dumps(data)}\n\n".encode()
