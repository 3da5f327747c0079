"""The gate: an ASGI layer around Gradio's whole application, which refuses what the page does not send."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import traceback
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.door import bodies, rules
from app.door.calls import Call
from app.door.connections import CONNECTION
from app.door.files import Files
from app.door.headers import Headers, with_security
from app.door.log import told
from app.door.pages import STATIC, Pages
from app.door.programs import Endpoint, Programs
from app.door.rules import Names, Refusal
from app.door.visitor import VISITOR, Heartbeats, Visitor, address_of, browser_of, new_cookie, visitor

Scope = MutableMapping[str, Any]
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Scope, bodies.Receive, Send], Awaitable[None]]
ANSWER_SECONDS = 600.0
"""Longest time of an answer, so that a reader who takes nothing loses its place; a heartbeat may last as long as its page."""
BEAT_SECONDS = 15.0
MULTIPART_BYTES = 64 * 1024
"""Bytes of an upload around the file itself."""
log = logging.getLogger("quantscope.door")


@dataclass(frozen=True)
class Limits:
    """What the gate allows.

    Attributes:
        names: the host names of the page. behind_proxy: whether addresses come from `X-Forwarded-For`, as on a Space.
        frames: sources that may show the page in a frame. upload_bytes: longest file.
        requests: requests in progress, in all and per address; a page has two or three.
        events: what the page's events may bring. calls: what answers them, by Gradio's index. endpoints: what programs may call.
        heartbeats: told of the pages that are open.
    """

    names: Names
    behind_proxy: bool = False
    frames: str = "'none'"
    upload_bytes: int = 10 * 10**6
    requests: int = 1500
    requests_per_address: int = 200
    events: bodies.Events = field(default_factory=bodies.Events)
    calls: Mapping[int, Call] = field(default_factory=dict)
    endpoints: Mapping[int, Endpoint] = field(default_factory=dict)
    heartbeats: Heartbeats = field(default_factory=Heartbeats)


class Gate:
    """The gate around `app`."""

    def __init__(self, app: App, limits: Limits, *, stopping: asyncio.Event | None = None) -> None:
        """Store the application, the limits, and an event that is set when the server stops."""
        self.app, self.limits, self.stopping = app, limits, stopping or asyncio.Event()
        self.pages, self.programs = Pages(app, frames=limits.frames), Programs(limits.endpoints)
        self.budget = bodies.Budget()
        self.files = Files(limits.events.uploads)
        self.running: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: bodies.Receive, send: Send) -> None:
        """Answer one request, or let Gradio do so."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        connection = CONNECTION.get()
        reply = _Reply(send)
        try:
            with self._visit(scope, reply):
                receive, event = await self._admit(scope, receive, connection.complete if connection else _nothing)
                if scope["path"].startswith(rules.HEARTBEAT):
                    return await self._beat(scope, receive, reply)
                if rules.is_call(scope["path"]):
                    return await self._serve(event, scope, receive, reply)
                async with asyncio.timeout(ANSWER_SECONDS):
                    if event is not None:
                        return await self._call(event, scope, reply)
                    await self._answer(scope, reply.noting(receive), reply)
        except Refusal as refusal:
            told(f"requests refused with status {refusal.status}")
            await reply.refuse(refusal)
        except (ConnectionError, TimeoutError):
            told("requests ended before their answer did")
        except Exception as error:  # noqa: BLE001 - the server's boundary: a fault becomes one line and one sentence
            name, at = uuid.uuid4().hex[:6], traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__} in {at.name}, line {at.lineno} of {Path(at.filename).name}"
            log.error("fault %s in a request: %s", name, place)  # not what the error says: it may hold a visitor's words
            await reply.refuse(Refusal(500, f"Something broke on our side (id {name}): reload the page."))
        finally:
            if connection is not None:
                connection.answered()

    async def _answer(self, scope: Scope, receive: bodies.Receive, reply: _Reply) -> None:
        headers, path, get = _headers(scope), scope["path"], scope["method"] in ("GET", "HEAD")
        encoding, head = headers.get("accept-encoding", ""), scope["method"] == "HEAD"
        if get and path in ("/", rules.CONFIG, rules.INFO):
            place = tuple(headers.get(name, "") for name in ("host", "x-forwarded-host", "x-forwarded-proto"))
            page = await self.pages.page(scope, (path, *place), encoding)
            return await page.send(reply.send, reply.cookie, head=head)
        if get and STATIC.fullmatch(path) and not {"range", "if-none-match", "if-modified-since"} & set(headers):
            file = await self.pages.static(scope, encoding)
            if file is not None:
                return await file.send(reply.send, [], head=head)
        try:
            await self.app(scope, receive, reply)
        except Exception:  # noqa: BLE001 - whatever Gradio raises after a refused body
            if reply.refusal is None:
                raise
        if reply.refusal is not None:
            raise reply.refusal

    async def _call(self, event: Mapping[str, Any], scope: Scope, reply: _Reply) -> None:
        """Answer an event."""
        packed = "gzip" in _headers(scope).get("accept-encoding", "")
        body = await self.limits.calls[event["fn_index"]].answer(event, scope, packed=packed)
        packing = [] if body.startswith(b"{") else [(b"content-encoding", b"gzip"), (b"vary", b"Accept-Encoding")]
        await reply.json(200, body, *packing)

    async def _serve(self, message: Mapping[str, Any] | None, scope: Scope, receive: bodies.Receive, reply: _Reply) -> None:
        """Answer a request of a program, for as long as its calls last; if the program goes away, they end."""
        path, cookie = scope["path"], browser_of(_headers(scope).get("cookie", ""))
        if message is None:
            lines = self.programs.read(path, scope["query_string"].decode("latin-1"), cookie)
            work = self._stream(lines, reply)
        elif rules.MCP.fullmatch(path):
            work = self._speak(message, reply)
        else:
            return await reply.json(200, json.dumps(self.programs.take(path, message, cookie)).encode(), *reply.cookie)
        task = asyncio.create_task(work)
        ends = [task, asyncio.create_task(_gone(receive)), asyncio.create_task(self.stopping.wait())]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            done = task.done()
            for end in ends:
                end.cancel()
        if done:
            await task

    async def _stream(self, lines: AsyncIterator[bytes], reply: _Reply) -> None:
        """Send the messages of a program as they come."""
        async with contextlib.aclosing(lines):
            async for line in lines:
                if not reply.begun:
                    headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-store")]
                    await reply({"type": "http.response.start", "status": 200, "headers": headers})
                await reply({"type": "http.response.body", "body": line, "more_body": True})
        await reply({"type": "http.response.body", "body": b""})

    async def _speak(self, message: Mapping[str, Any], reply: _Reply) -> None:
        """Answer a message of MCP; a notification has an empty answer."""
        answer = await self.programs.speak(message)
        body = b"" if answer is None else json.dumps(answer, allow_nan=False).encode()
        await reply.json(202 if answer is None else 200, body, *reply.cookie)

    async def _beat(self, scope: Scope, receive: bodies.Receive, reply: _Reply) -> None:
        """Answer a page's heartbeat for as long as the page is open, then tell the page's handlers that it was closed."""
        page = scope["path"].removeprefix(rules.HEARTBEAT)
        ends = [asyncio.create_task(_gone(receive)), asyncio.create_task(self.stopping.wait())]
        await reply({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        try:
            with self.limits.heartbeats.beat(page):
                while not any(end.done() for end in ends):
                    await reply({"type": "http.response.body", "body": b"data: ALIVE\n\n", "more_body": True})
                    await asyncio.wait(ends, timeout=BEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
            for call in (call for call in self.limits.calls.values() if call.closes):
                await call.answer({"data": [], "session_hash": page}, scope)

    @contextlib.contextmanager
    def _visit(self, scope: Scope, reply: _Reply) -> Iterator[None]:
        """Count the request and say whose it is while it is answered; who has no cookie yet gets one with a page or a call."""
        headers = _headers(scope)
        peer = str((scope.get("client") or ("local",))[0])
        address = address_of(peer, headers.get("x-forwarded-for", ""), behind_proxy=self.limits.behind_proxy)
        if self.running[address] >= self.limits.requests_per_address:
            raise Refusal(429, "Too many requests from your address at once: wait a moment.")
        if self.running.total() >= self.limits.requests:
            raise Refusal(503, "The server is full: try again in a minute.")
        self.running[address] += 1
        browser = browser_of(headers.get("cookie", ""))
        if not browser:
            new = new_cookie(embedded=self.limits.behind_proxy)
            reply.cookie = [(b"set-cookie", new.encode())]
            browser = browser_of(new.partition(";")[0]) if rules.is_call(scope["path"]) else ""
        token = VISITOR.set(Visitor(browser, address))
        try:
            yield
        finally:
            VISITOR.reset(token)
            self.running[address] -= 1
            if not self.running[address]:
                del self.running[address]

    async def _admit(
        self, scope: Scope, receive: bodies.Receive, complete: Callable[[], None]
    ) -> tuple[bodies.Receive, dict[str, Any] | None]:
        """Check a request. Returns: how its body is received, and the event that it brings, if it does. Raises: Refusal."""
        headers, path, names = _headers(scope), scope["path"], self.limits.names
        rules.check_headers(scope["headers"])
        names.check_host(headers.get("host", ""))
        if "x-forwarded-host" in headers:
            names.check_host(headers["x-forwarded-host"])
        names.check_origin(headers.get("host", ""), headers.get("origin"), headers.get("sec-fetch-site"), is_page=path == "/")
        rules.check_route(scope["method"], path)
        length = headers.get("content-length")
        if scope["method"] != "POST":
            bodies.limit_of(length, 0)
            complete()
            return receive, None
        if not visitor().browser and path == rules.UPLOAD:  # an event is answered in the page's own words
            raise Refusal(403, "This browser sends no cookie: allow cookies, or open the page in its own tab.")
        if path == rules.UPLOAD:
            await asyncio.to_thread(self.files.check_room, self.limits.upload_bytes)
            return bodies.limited(receive, headers, self.limits.upload_bytes + MULTIPART_BYTES, complete), None
        body = await bodies.read(receive, length, bodies.EVENT_BYTES, self.budget)
        complete()
        try:
            return receive, await (bodies.parse(body) if rules.is_call(path) else self.limits.events.check(body))
        finally:
            self.budget.used -= len(body)


class _Reply:
    """The answer to one request: passes messages on, and knows whether the answer has begun."""

    def __init__(self, send: Send) -> None:
        self.send, self.begun = send, False
        self.refusal: Refusal | None = None
        self.cookie: Headers = []

    async def __call__(self, message: dict[str, Any]) -> None:
        if self.refusal is not None:
            return  # Gradio's own answer to a body that was refused
        self.begun = True
        if message["type"] == "http.response.start":
            message = {**message, "headers": with_security(message["headers"])}
        await self.send(message)

    async def json(self, status: int, body: bytes, *more: tuple[bytes, bytes]) -> None:
        """Send a whole answer: a JSON body, or an empty one."""
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more]
        await self({"type": "http.response.start", "status": status, "headers": headers})
        await self({"type": "http.response.body", "body": body})

    def noting(self, receive: bodies.Receive) -> bodies.Receive:
        """Wrap `receive`, so that a refusal that it raises is answered, whatever Gradio makes of it."""

        async def noted() -> dict[str, Any]:
            try:
                return await receive()
            except Refusal as refusal:
                self.refusal = refusal
                raise

        return noted

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with a refusal and close the connection, as its body may not have been read; too late, end it unanswered."""
        if self.begun:
            raise ConnectionError  # uvicorn closes a connection whose answer is incomplete
        self.refusal, self.begun = None, True
        body = json.dumps({"detail": refusal.sentence}).encode()
        await self.json(refusal.status, body, (b"connection", b"close"))


def _headers(scope: Scope) -> dict[str, str]:
    """Return the headers as text; of a repeated one, the values joined by commas."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        found[key] = f"{found[key]}, {text}" if key in found else text
    return found


async def _gone(receive: bodies.Receive) -> None:
    """Wait until the sender of a request has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _nothing() -> None:
    """Do nothing: there is no connection to tell, as in tests."""
