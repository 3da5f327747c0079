"""Load the page's server as many strangers do: `python -m benchmarks.soak [--json FILE]`.

Visitors speak the page's own protocol over loopback, each with a cookie and an address of its own (`X-Forwarded-For`, which the
server believes from this machine only). Reported, each over the whole run:

    errors               answers other than 200, error cards, broken connections
    light_p95_s          95th percentile of a light event, dragging g, while a quantisation runs
    open_p95_s           the same of opening the page: its HTML and its first event
    job_ratio            seconds of that quantisation over its seconds alone
    leaks                foreign canary words seen in answers or in the log, and stolen session keys that opened something
    server_growth_bytes  resident memory of the server after abandoned visits, over before
    worker_growth_bytes  the same of the worker processes, over cycles of observing
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[1]
RUN = "/gradio_api/run/predict"
THINK_SECONDS = 2.0
SESSION_MINUTES = 0.25
SWEEP_SECONDS = 60.0
CANARY = re.compile(r"canary-[0-9a-f]{16}")


class Report:
    """What is measured."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.leaks = 0
        self.light: list[float] = []
        self.opened: list[float] = []


class Visitor:
    """One stranger: a browser of its own at an address of its own."""

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
        html = (await self.client.get("/")).text
        self.config = json.loads(re.search(r"window\.gradio_config = (\{.*?\});?\s*</script>", html, re.DOTALL)[1])
        self.fields = {c["id"]: c["props"] for c in self.config["components"]}
        called = [d for d in self.config["dependencies"] if d.get("backend_fn")]
        self.events = {(self.fields.get(t, {}).get("elem_id"), e): d for d in called for t, e in d["targets"]}
        opening = next(d for d in called if "sessionStorage" in str(d.get("js")))
        self.key_field = opening["inputs"][0]
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
        self.report.leaks += len(set(CANARY.findall(text)) - {self.canary})
        if key is None and (answer.status_code != 200 or "qs-error" in text) and self.canary not in text:
            self.report.errors.append(f"{answer.status_code} {re.sub('<[^>]*>', ' ', text)[:160]}")
        return answer.json() if answer.status_code == 200 else {}

    async def drag(self) -> float:
        """Send one drag of g. Returns: seconds."""
        event = self.events["g", "input"]
        slider = next(i for i in event["inputs"] if i != self.key_field)
        start = time.perf_counter()
        await self.send(event, {slider: 2 + secrets.randbelow(30)})
        return time.perf_counter() - start

    async def follow(self, name: str, changed: dict[int, Any] | None = None) -> float:
        """Run the job of a button and wait for its end. Returns: seconds."""
        start = time.perf_counter()
        await self.send(self.events[name, "click"], changed)
        tick = next(event for (_, what), event in self.events.items() if what == "tick")
        while "false" not in re.findall(r'"active":\s*(true|false)', json.dumps(await self.send(tick))):
            await asyncio.sleep(0.1)
        return time.perf_counter() - start

    async def name_canary(self) -> None:
        """Send the own canary as the name of a model, which the answer repeats."""
        event = self.events["save-recipe", "click"]
        model = next(i for i in event["inputs"] if self.fields[i].get("elem_id") == "model")
        await self.send(event, {model: self.canary})


async def crowd(address: str, count: int, report: Report, stop: asyncio.Event, first: int) -> None:
    """Let `count` visitors drag, name their canary, and try each other's keys, until `stop` is set."""
    visitors = [Visitor(address, first + n, report) for n in range(count)]

    async def live(place: int) -> None:
        async with visitors[place] as visitor:
            await asyncio.sleep(place * THINK_SECONDS / count)
            await visitor.open()
            while not stop.is_set():
                report.light.append(await visitor.drag())
                await visitor.name_canary()
                other = visitors[(place + 1) % count].key
                if other and other != visitor.key:
                    stolen = await visitor.send(visitor.events["g", "input"], key=other)
                    report.leaks += "E-SESSION" not in json.dumps(stolen)
                await asyncio.sleep(THINK_SECONDS * (0.5 + secrets.randbelow(1000) / 1000))

    await asyncio.gather(*(live(place) for place in range(count)))


async def soak(address: str, server: psutil.Process, options: argparse.Namespace) -> dict[str, Any]:
    """Run all parts. Returns: the numbers of this file's first lines."""
    report = Report()
    async with Visitor(address, 0, report) as worker:
        await worker.open()
        await worker.follow("observe")
        await worker.follow("quantize")  # the first one loads the model
        alone = await worker.follow("quantize", _another(worker, 1))
        light_alone = sorted([await worker.drag() for _ in range(20)])
        report.opened.clear()
        stop = asyncio.Event()
        others = asyncio.create_task(crowd(address, options.visitors, report, stop, first=10))
        while len(report.opened) < options.visitors:
            await asyncio.sleep(0.2)
        report.light.clear()
        start, crowded = time.perf_counter(), []
        while not crowded or time.perf_counter() - start < options.seconds:
            crowded.append(await worker.follow("quantize", _another(worker, 2 + len(crowded))))
        stop.set()
        await others
        before = _worker_bytes(server)
        for turn in range(options.cycles):
            await worker.follow("observe" if turn % 2 else "quantize", None if turn % 2 else _another(worker, 100 + turn))
        worker_growth = _worker_bytes(server) - before
    await asyncio.sleep(SWEEP_SECONDS + 60 * SESSION_MINUTES + 5)
    resident = server.memory_info().rss
    for n in range(0, options.visits, 10):
        batch = [Visitor(address, 1000 + n + i, Report()) for i in range(10)]
        await asyncio.gather(*(visitor.open() for visitor in batch))
        for visitor in batch:
            report.errors += visitor.report.errors
            await visitor.__aexit__()
    await asyncio.sleep(2 * SWEEP_SECONDS + 60 * SESSION_MINUTES)
    return {
        "errors": len(report.errors), "light_p95_s": _p95(report.light), "open_p95_s": _p95(report.opened),
        "job_ratio": sum(crowded) / len(crowded) / alone, "leaks": report.leaks,
        "server_growth_bytes": server.memory_info().rss - resident, "worker_growth_bytes": worker_growth,
        "light_alone_p95_s": _p95(light_alone), "job_alone_s": alone, "light_events": len(report.light),
        "server_bytes": resident, "visitors": options.visitors, "visits": options.visits, "cycles": options.cycles,
        "first_errors": report.errors[:5],
    }  # fmt: skip


def _another(visitor: Visitor, number: int) -> dict[int, Any]:
    """Return changed fields that make a run which is not kept from before: another seed where there is one."""
    inputs = visitor.events["quantize", "click"]["inputs"]
    seed = next((i for i in inputs if visitor.fields[i].get("elem_id") == "seed"), None)
    return {} if seed is None else {seed: number}


def _worker_bytes(server: psutil.Process) -> int:
    """Return the resident bytes of the server's worker processes."""
    return sum(child.memory_info().rss for child in server.children() if "app.worker.server" in child.cmdline())


def _p95(seconds: list[float]) -> float | None:
    found = sorted(seconds)
    return found[int(0.95 * (len(found) - 1))] if found else None


def main() -> int:
    """Start a server, run the parts, print the numbers and write them where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--visitors", type=int, default=50, help="visitors at one time (default 50)")
    parser.add_argument("--visits", type=int, default=1000, help="visits that are opened and abandoned (default 1000)")
    parser.add_argument("--cycles", type=int, default=100, help="jobs in a row, for the worker's memory (default 100)")
    parser.add_argument("--seconds", type=float, default=60.0, help="least time under load (default 60)")
    parser.add_argument("--model", default=None, help="model of the page (default: the page's own)")
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers here")
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    model = ["--model", options.model] if options.model else []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        environment = {**os.environ, "QUANTSCOPE_SESSION_MINUTES": str(SESSION_MINUTES)}
        with log.open("w") as out:
            server = subprocess.Popen([sys.executable, "-m", "app", "--port", str(port), *model], cwd=ROOT, env=environment,
                                      stdout=out, stderr=subprocess.STDOUT)  # fmt: skip
        try:
            while "Quantscope is at" not in log.read_text():
                if server.poll() is not None:
                    raise SystemExit(log.read_text()[-2000:])
                time.sleep(0.2)
            found = asyncio.run(soak(f"http://127.0.0.1:{port}", psutil.Process(server.pid), options))
        finally:
            server.terminate()
            server.wait(60)
        found["leaks"] += len(CANARY.findall(log.read_text()))
        found["log_lines"] = log.read_text().count("\n")
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
