"""Read a body within limits of size, time and memory, and check an event before Gradio takes it.

Gradio answers most malformed events with status 500 and writes a traceback to the log; here they get a sentence.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.door.rules import Refusal

EVENT_BYTES = 9 * 10**6
"""Longest event: a pasted text of two million characters, of up to four bytes each, and the other fields."""
MEMORY_BYTES = 64 * 10**6
"""Bytes of events that are being read at one time, in all."""
SLOW_BYTES = 50_000
"""Bytes per second that a body must bring at least, after its first `BODY_SECONDS`."""
BODY_SECONDS = 20.0
INLINE_BYTES = 100_000
"""Bytes above which a body is parsed in a thread."""
HASH = re.compile(r"[a-z0-9]{1,40}")
FIELDS = {"data", "event_data", "fn_index", "trigger_id", "session_hash", "event_id", "batched", "simple_format"}
ONE, MANY, FILE = "one", "many", "file"
FILE_FIELDS = {"path", "url", "orig_name", "size", "mime_type", "is_stream", "meta"}
FORM = re.compile(r"multipart/form-data; *boundary=\"?([\w'()+,./:=?-]{1,70})\"?", re.ASCII)
FILE_HEAD = re.compile(rb"\r\nContent-Disposition: form-data; name=\"[^\"\r\n]*\"; filename=\"", re.IGNORECASE)
Receive = Callable[[], Awaitable[dict[str, Any]]]


def limit_of(length: str | None, most: int) -> float:
    """Return the seconds that a body may take. Raises: Refusal if the Content-Length is no number or above `most`."""
    if length is None:
        return BODY_SECONDS + most / SLOW_BYTES
    if not (length.isascii() and length.isdigit()) or len(length) > 15:
        raise Refusal(400, "The Content-Length is not a number.")
    if int(length) > most:
        raise too_long(most)
    return BODY_SECONDS + int(length) / SLOW_BYTES


def too_long(most: int) -> Refusal:
    """Return the refusal of a body that is too long."""
    return Refusal(413, f"The request is longer than {most / 1e6:.0f} MB, which is the limit here: send less.")


class Budget:
    """Bytes of events in memory."""

    def __init__(self, most: int = MEMORY_BYTES) -> None:
        self.most, self.used = most, 0

    def take(self, count: int) -> None:
        """Count bytes. Raises: Refusal if there are too many."""
        if self.used + count > self.most:
            raise Refusal(503, "Too many large requests arrive at once: try again in a minute.")
        self.used += count


async def read(receive: Receive, length: str | None, most: int, budget: Budget) -> bytes:
    """Read a whole body. What it counts in `budget` is for the caller to give back: the length of the result, or of what failed.

    Raises: Refusal; ConnectionError if the sender went away.
    """
    seconds, parts, count = limit_of(length, most), [], 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ConnectionError
                part = message.get("body", b"")
                if count + len(part) > most:
                    raise too_long(most)
                budget.take(len(part))
                parts.append(part)
                count += len(part)
                if not message.get("more_body"):
                    return b"".join(parts)
    except BaseException as error:
        budget.used -= count
        if isinstance(error, TimeoutError):
            raise Refusal(408, "The request did not arrive in time: try again.") from None
        raise


def limited(receive: Receive, headers: Mapping[str, str], most: int, done: Callable[[], None]) -> Receive:
    """Wrap `receive` for an upload of one file, which Gradio stores as it arrives.

    A form's other fields would be kept in memory, so there may be none.

    Args:
        done: called when the whole body has arrived.
    Raises: Refusal, also from the wrapped function.
    """
    length, form = headers.get("content-length"), FORM.fullmatch(headers.get("content-type", ""))
    if form is None:
        raise Refusal(400, "An upload is a form with one file.")
    deadline, count = asyncio.get_running_loop().time() + limit_of(length, most), 0
    begin, tail = b"--" + form[1].encode(), b""

    async def receive_part() -> dict[str, Any]:
        nonlocal count, tail
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            raise Refusal(408, "The file did not arrive in time: try again.") from None
        part = message.get("body", b"")
        if count + len(part) > most:
            raise too_long(most)
        seen = tail + part
        if not count and part and not FILE_HEAD.match(part, len(begin)):
            raise Refusal(400, "An upload is a form with one file.")
        if b"\r\n" + begin + b"\r\n" in seen:
            raise Refusal(400, "Send one file at a time.")
        count, tail = count + len(part), seen[-len(begin) - 4 :]
        if not message.get("more_body"):
            done()
        return message

    return receive_part


async def parse(body: bytes) -> dict[str, Any]:
    """Read the JSON object in a body. Raises: Refusal if there is none."""
    found = await asyncio.to_thread(_parsed, body) if len(body) > INLINE_BYTES else _parsed(body)
    if not isinstance(found, dict):
        raise Refusal(400, "The request is no JSON object.")
    return found


def _parsed(body: bytes) -> Any:
    try:
        found = json.loads(body.decode("utf-8"))
        if b"\\ud" in body.lower():
            json.dumps(found, ensure_ascii=False).encode("utf-8")  # half of a pair is no character
    except (ValueError, RecursionError):
        raise Refusal(400, "The request is not JSON.") from None
    return found


@dataclass(frozen=True)
class Events:
    """What the page's events may bring.

    Attributes:
        inputs: of each event, by Gradio's index, the kind of each input: ONE value, MANY values, or a FILE.
        uploads: the folder of uploaded files.
    """

    inputs: Mapping[int, Sequence[str]] = field(default_factory=dict)
    uploads: Path = Path("/nonexistent")

    async def check(self, body: bytes) -> dict[str, Any]:
        """Check an event's body and return the event. Raises: Refusal."""
        event = await parse(body)
        if not set(event) <= FIELDS or not _is_whole(event.get("fn_index")):
            raise _foreign()
        data, inputs = event.get("data"), self.inputs.get(event["fn_index"])
        session, page = event.get("session_hash"), event.get("trigger_id")
        named = isinstance(session, str) and HASH.fullmatch(session) is not None
        plain = not event.get("batched") and not event.get("simple_format") and event.get("event_id") is None
        if inputs is None or not (named and plain and (page is None or _is_whole(page))):
            raise _foreign()
        if not isinstance(data, list) or len(data) != len(inputs):
            raise _foreign()
        for value, kind in zip(data, inputs, strict=True):
            if not (value is None or (self._is_upload(value) if kind == FILE else _is_plain(value, kind))):
                raise _foreign()
        return event

    def _is_upload(self, value: object) -> bool:
        """Say whether a value names a file that was uploaded before."""
        if not isinstance(value, dict) or not set(value) <= FILE_FIELDS or not isinstance(value.get("path"), str):
            return False
        texts = all(isinstance(value.get(name), str | None) for name in ("url", "orig_name", "mime_type"))
        sized = value.get("size") is None or _is_whole(value["size"])
        if not (texts and sized) or value.get("is_stream") or value.get("meta") != {"_type": "gradio.FileData"}:
            return False
        path = os.path.normpath(value["path"])
        return "\0" not in path and Path(path).is_relative_to(self.uploads) and os.path.isfile(path)


def _foreign() -> Refusal:
    return Refusal(400, "This is not an event of the page: reload it.")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_plain(value: object, kind: str) -> bool:
    single = str | int | float | None
    return isinstance(value, single) or (kind == MANY and isinstance(value, list) and all(isinstance(v, single) for v in value))
