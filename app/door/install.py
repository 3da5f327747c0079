"""Put the door in front of Gradio's server, by the public settings of Starlette and uvicorn."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradio import CheckboxGroup, UploadButton

from app.door.bodies import FILE, MANY, ONE, Events
from app.door.calls import calls_of
from app.door.connections import Connections
from app.door.gate import Gate, Limits
from app.door.log import limit_lines
from app.door.programs import endpoints_of
from app.door.rules import Names
from app.door.visitor import Heartbeats, is_private

if TYPE_CHECKING:
    from app.settings import Settings

FRAMES = "'self' https://huggingface.co"
"""Sources that may show a Space in a frame."""
CONNECTIONS, PER_ADDRESS = 1000, 200
Lifespan = Callable[[Any], Any]


def limits(settings: Settings, host: str, demo: Any, heartbeats: Heartbeats) -> Limits:
    """Return what the gate allows for the page `demo` on the address `host`."""
    calls = calls_of(demo.fns)
    inputs = {index: [_kind(block) for block in call.inputs] for index, call in calls.items() if not call.closes}
    events = Events(inputs, Path(os.environ["GRADIO_TEMP_DIR"]).resolve())
    names = Names.of(host, *settings.hosts)
    frames = FRAMES if settings.on_space else "'none'"
    named = {"calls": calls, "endpoints": endpoints_of(demo), "heartbeats": heartbeats}
    return Limits(names, settings.on_space, frames, settings.file_bytes, events=events, **named)


def _kind(block: Any) -> str:
    if isinstance(block, UploadButton):
        return FILE
    return MANY if isinstance(block, CheckboxGroup) or getattr(block, "multiselect", False) else ONE


def gated(allowed: Limits, inner: Lifespan) -> Lifespan:
    """Make the server's lifespan: `inner`, with the gate around the application before its first request."""

    @contextlib.asynccontextmanager
    async def serving(app: Any) -> AsyncIterator[None]:
        app.middleware_stack = Gate(app.middleware_stack, allowed, stopping=app.stop_event)
        async with inner(app):
            yield

    return serving


def guard(server: Any, settings: Settings) -> Connections:
    """Limit the connections that a running uvicorn server accepts from now on, and the lines of its log."""
    table = Connections(
        most=CONNECTIONS,
        most_per_address=PER_ADDRESS,
        is_proxy=is_private if settings.on_space else lambda peer: peer.startswith("127.") or peer == "::1",
    )
    config = server.config  # read by uvicorn for each new connection
    config.http_protocol_class = table.guarded(config.http_protocol_class)
    config.ws_protocol_class = None
    limit_lines()
    return table
