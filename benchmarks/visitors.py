"""Visitors of the page without a browser, who send what its script would send, and a server for them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[1]
RUN = "/gradio_api/run/predict"
CANARY = re.compile(r"canary-[0-9a-f]{16}")
START_SECONDS = 240.0


@contextlib.contextmanager
def served(
    log: Path, *arguments: str, start: tuple[str, ...] = ("-m", "app"), **environment: str
) -> Iterator[tuple[str, psutil.Process]]:
    """Start the page on a free port, wait until it listens, yield its address and process, and end it.

    Args:
        log: file for what the server says. arguments: of its command line. start: how Python starts it.
        environment: variables beside those of this process.
    Raises: RuntimeError with the last words of a server that does not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, *start, *arguments]
    variables = {**os.environ, "GRADIO_SERVER_PORT": str(port), **environment}
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=out, stderr=subprocess.STDOUT)
    try:
        limit = time.monotonic() + START_SECONDS
        while "Quantscope is at" not in log.read_text():
            if server.poll() is not None or time.monotonic() > limit:
                raise RuntimeError(log.read_text()[-2000:])
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", psutil.Process(server.pid)
    finally:
        server.terminate()
        server.wait(60)


@functools.lru_cache(maxsize=2)
def read_config(html: str) -> dict[str, Any]:
    """Read Gradio's description of the page; all visitors get the same page, and each browser has a processor of its own."""
    return json.loads(re.search(r"window\.gradio_config = (\{.*?\});?\s*</script>", html, re.DOTALL)[1])


class Report:
    """What is measured. `leaks`, `own`: answers that held the words of others, and the visitor's own."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.leaks = self.own = 0
        self.light: list[float] = []
        self.opened: list[float] = []
        self.workers: set[int] = set()


class Visitor:
    """One stranger: a browser of its own at an address of its own, which the server believes from this machine only."""

    def __init__(self, address: str, number: int, report: Report) -> None:
        headers = {"x-forwarded-for": f"8.{number // 250 % 250}.{number % 250}.{1 + number // 62_500}"}
        self.client = httpx.AsyncClient(base_url=address, headers=headers, timeout=120.0)
        self.report, self.page = report, secrets.token_hex(6)
        self.canary, self.key = f"canary-{secrets.token_hex(8)}", ""
        self.heart: asyncio.Task | None = None

    async def __aenter__(self) -> Visitor:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.heart is not None:
            self.heart.cancel()
            await asyncio.gather(self.heart, return_exceptions=True)
        await self.client.aclose()

    async def open(self) -> None:
        """Open the page: its HTML, its heartbeat, and the event that makes a session."""
        start = time.perf_counter()
        answer = await self.client.get("/")
        html, cookie = answer.text, answer.headers.get("set-cookie", "")
        if cookie:
            self.client.headers["cookie"] = cookie.partition(";")[0]  # on a Space it is for https alone
        self.config = read_config(html)
        self.fields = {c["id"]: c["props"] for c in self.config["components"]}
        called = [d for d in self.config["dependencies"] if d.get("backend_fn")]
        self.events = {(self.fields.get(t, {}).get("elem_id"), e): d for d in called for t, e in d["targets"]}
        opening = next(d for d in called if "sessionStorage" in str(d.get("js")))
        self.key_field = opening["inputs"][0]
        self.named = {props["elem_id"]: i for i, props in self.fields.items() if props.get("elem_id")}
        self.heart = asyncio.create_task(self._beat())
        answer = await self.send(opening)
        found = [value for value in answer.get("data", ()) if isinstance(value, str) and re.fullmatch(r"[\w-]{43}", value)]
        self.key = found[0] if found else ""
        if not self.key:
            self.report.errors.append("no session")
        self.report.opened.append(time.perf_counter() - start)

    async def _beat(self) -> None:
        async with self.client.stream("GET", f"/gradio_api/heartbeat/{self.page}", timeout=None) as beats:  # noqa: S113
            async for _ in beats.aiter_bytes():
                pass

    async def send(self, event: dict[str, Any], changed: dict[int, Any] | None = None, key: str | None = None) -> dict[str, Any]:
        """Send an event with the fields' first values, except those that are `changed`; check the answer."""
        values = {i: self.fields[i].get("value") for i in event["inputs"]} | (changed or {})
        if self.key_field in values:
            values[self.key_field] = self.key if key is None else key
        body = {"data": list(values.values()), "fn_index": event["id"], "session_hash": self.page, "trigger_id": None,
                "event_data": None}  # fmt: skip
        try:
            answer = await self.client.post(RUN, json=body)
        except httpx.HTTPError as error:
            self.report.errors.append(repr(error)[:80])
            return {}
        text = answer.text
        seen = set(CANARY.findall(text))
        self.report.leaks += len(seen - {self.canary})
        self.report.own += self.canary in seen
        if key is None and (answer.status_code != 200 or "qs-error" in text) and self.canary not in text:
            self.report.errors.append(f"{answer.status_code} {re.sub('<[^>]*>', ' ', text)[:160]}")
        return answer.json() if answer.status_code == 200 else {}

    async def drag(self) -> float:
        """Send one drag of g. Returns: seconds."""
        event = self.events["g", "input"]
        start = time.perf_counter()
        await self.send(event, {self.named["g"]: 2 + secrets.randbelow(30)})
        return time.perf_counter() - start

    async def follow(self, name: str, changed: dict[int, Any] | None = None) -> float:
        """Run the job of a button and wait for its end. Returns: seconds."""
        start = time.perf_counter()
        await self.send(self.events[name, "click"], changed)
        await self.settle()
        return time.perf_counter() - start

    async def settle(self) -> str:
        """Fetch the updates of the page's handlers until none is left, as its timer does. Returns: all of them as text."""
        tick, said = next(event for (_, what), event in self.events.items() if what == "tick"), [""]
        while not re.search(r'"active":\s*false', said[-1]):
            await asyncio.sleep(0.1)
            said.append(json.dumps(await self.send(tick)))
        return "".join(said)

    async def name_canary(self) -> None:
        """Send the own canary as the name of a model, which the answer repeats."""
        event = self.events["save-recipe", "click"]
        await self.send(event, {self.named["model"]: self.canary})
