"""Load the page's server as many strangers do: `python -m benchmarks.soak [--json FILE]`.

Visitors speak the page's own protocol over loopback, each with a cookie and an address of its own (`X-Forwarded-For`, which the
server believes from this machine only). Reported, each over the whole run:

    errors               answers other than 200, error cards, broken connections
    light_p95_s          95th percentile of a light event, dragging g, while a quantisation runs
    open_p95_s           the same of opening the page: its HTML and its first event
    job_ratio            seconds of that quantisation over its seconds alone
    leaks                foreign canary words seen in answers or in the log, and stolen session keys that opened something
    server_growth_bytes  resident memory of the server after abandoned visits, over before
    worker_growth_bytes  the same of the worker processes, over cycles of observing and quantising
    drag_cpu_ms          processor time of the server per drag of g, each to another place, while nobody else is there
    open_cpu_ms          the same per page opened, with all events that follow
    worker_processes     worker processes that were started
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.visitors import CANARY, Report, Visitor, served

THINK_SECONDS = 2.0
ALONE = 20
"""Drags and visits whose processor time is measured while nobody else is there."""
SESSION_MINUTES = 0.25
SWEEP_SECONDS = 60.0
REST_SECONDS = 130.0
"""Seconds after which a worker without a job has given its memory back."""


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
        used = _processor_ms(server)
        light_alone = [await worker.drag() for _ in range(ALONE)]
        drag_ms, used = (_processor_ms(server) - used) / ALONE, _processor_ms(server)
        for n in range(ALONE):
            async with Visitor(address, 500 + n, report) as other:
                await other.open()
                await other.settle()
        open_ms = (_processor_ms(server) - used) / ALONE
        report.opened.clear()
        stop = asyncio.Event()
        others = asyncio.create_task(crowd(address, options.visitors, report, stop, first=10))
        while len(report.opened) < options.visitors:
            await asyncio.sleep(0.2)
        report.light.clear()
        start, crowded = time.perf_counter(), []
        while not crowded or time.perf_counter() - start < options.seconds:
            crowded.append(await worker.follow("quantize", _another(worker, 2 + len(crowded))))
            report.workers |= {child.pid for child in _workers(server)}
        stop.set()
        await others
        await asyncio.sleep(REST_SECONDS)
        before = _worker_bytes(server)
        for turn in range(options.cycles):
            await worker.follow("observe" if turn % 2 else "quantize", None if turn % 2 else _another(worker, 100 + turn))
        await asyncio.sleep(REST_SECONDS)
        worker_growth = _worker_bytes(server) - before
        report.workers |= {child.pid for child in _workers(server)}
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
        "drag_cpu_ms": drag_ms, "open_cpu_ms": open_ms, "worker_processes": len(report.workers), "worker_bytes": before,
        "light_alone_p95_s": _p95(light_alone), "job_alone_s": alone, "light_events": len(report.light),
        "server_bytes": resident, "visitors": options.visitors, "visits": options.visits, "cycles": options.cycles,
        "first_errors": report.errors[:5],
    }  # fmt: skip


def _another(visitor: Visitor, number: int) -> dict[int, Any]:
    """Return changed fields that make a run which is not kept from before: another seed where there is one."""
    return {visitor.named["seed"]: number}


def _workers(server: psutil.Process) -> list[psutil.Process]:
    """List the server's worker processes."""
    return [child for child in server.children() if "app.worker.server" in child.cmdline()]


def _worker_bytes(server: psutil.Process) -> int:
    """Return the resident bytes of the server's worker processes."""
    return sum(child.memory_info().rss for child in _workers(server))


def _processor_ms(server: psutil.Process) -> float:
    """Return the processor time that the server itself has taken, in milliseconds."""
    taken = server.cpu_times()
    return 1000 * (taken.user + taken.system)


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
    model = ["--model", options.model] if options.model else []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        with served(log, *model, QUANTSCOPE_SESSION_MINUTES=str(SESSION_MINUTES)) as (address, server):
            found = asyncio.run(soak(address, server, options))
        found["leaks"] += len(CANARY.findall(log.read_text()))
        found["log_lines"] = log.read_text().count("\n")
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
