"""Keep the page and its static files ready to send: Gradio renders and compresses them for every visitor.

Rendering the page and compressing its scripts takes most of the time in which a visitor waits for the page to open, and is the
same for everybody.
"""

from __future__ import annotations

import asyncio
import gzip
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from app.door.headers import Headers, page_policy, with_security

STATIC = re.compile(r"/(assets|static)/.*|/theme\.css|/favicon\.ico|/gradio_api/file=.*/plotly\.min\.js")
PAGES = 16
"""Pages that are kept, one for each name and encoding under which the page is asked for; rendering one takes half a second."""
KEPT_BYTES = 48 * 1024**2
YEAR = b"public, max-age=31536000, immutable"
DAY = b"public, max-age=86400"
Send = Callable[[dict[str, Any]], Awaitable[None]]
App = Callable[[Any, Any, Send], Awaitable[None]]


@dataclass
class Answer:
    """A whole answer."""

    status: int
    headers: Headers
    body: bytes

    async def send(self, send: Send, extra: Headers, *, head: bool) -> None:
        """Send the answer, with more headers, and without its body for a HEAD request."""
        headers = [*self.headers, (b"content-length", str(len(self.body)).encode()), *extra]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if head else self.body})


class Pages:
    """Answers of `app` that are the same for everybody."""

    def __init__(self, app: App, *, frames: str) -> None:
        """Store the application, and the sources that may show the page in a frame (`page_policy`)."""
        self.app, self.frames = app, frames
        self.files: dict[tuple[str, str], Answer] = {}
        self.pages: OrderedDict[tuple[str, ...], Answer] = OrderedDict()
        self.bytes = 0
        self._rendering = asyncio.Lock()

    async def static(self, scope: Any, encoding: str) -> Answer | None:
        """Return the answer to a GET of a static file, None if it is not kept, as one that does not exist."""
        coding = "br" if "br" in encoding else "gzip" if "gzip" in encoding else ""
        key = (scope["path"], coding)
        if key in self.files:
            return self.files[key]
        wanted = {b"accept-encoding": coding.encode()}
        answer = await self._ask({**scope, "method": "GET", "query_string": b""}, wanted)
        if answer.status != 200 or self.bytes + len(answer.body) > KEPT_BYTES:
            return None
        age = YEAR if scope["path"].startswith("/assets/") else DAY  # names of assets hold a hash of their content
        answer.headers = with_security([*_without(answer.headers, b"cache-control", b"content-length"), (b"cache-control", age)])
        self.bytes += len(answer.body)
        self.files[key] = answer
        return answer

    async def page(self, scope: Any, place: tuple[str, ...], encoding: str) -> Answer:
        """Return the page.

        Args:
            place: the headers that decide how the page calls its own address.
        """
        coding = "gzip" if "gzip" in encoding else ""
        key = (*place, coding)
        async with self._rendering:  # many who come at once wait for one rendering
            answer = self.pages.pop(key, None) or await self._render(scope, coding)
            if answer.status == 200:
                self.pages[key] = answer
                if len(self.pages) > PAGES:
                    self.pages.popitem(last=False)
            return answer

    async def _render(self, scope: Any, coding: str) -> Answer:
        answer = await self._ask({**scope, "method": "GET", "query_string": b""}, {})
        policy = page_policy(answer.body, frames=self.frames)
        headers = _without(answer.headers, b"content-length", b"vary", b"cache-control")
        headers += [(b"cache-control", b"no-cache"), (b"vary", b"Accept-Encoding")]
        if coding:
            answer.body = gzip.compress(answer.body, 6)
            headers.append((b"content-encoding", b"gzip"))
        answer.headers = with_security(headers, policy)
        return answer

    async def _ask(self, scope: Any, headers: dict[bytes, bytes]) -> Answer:
        """Ask the application; of the request's own headers, those that name its place are kept."""
        place = [(n, v) for n, v in scope["headers"] if n in (b"host", b"x-forwarded-host", b"x-forwarded-proto")]
        answer = Answer(500, [], b"")
        parts: list[bytes] = []
        asked = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> dict[str, Any]:
            return asked.pop() if asked else await asyncio.Event().wait()  # this sender never goes away

        async def take(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                answer.status, answer.headers = message["status"], list(message["headers"])
            else:
                parts.append(message.get("body", b""))

        await self.app({**scope, "headers": [*place, *headers.items()]}, receive, take)
        answer.body = b"".join(parts)
        return answer


def _without(headers: Headers, *names: bytes) -> Headers:
    return [(name, value) for name, value in headers if name.lower() not in names]
