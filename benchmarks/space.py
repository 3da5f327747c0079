"""Start the page as a Space does and check what must hold: `python -m benchmarks.space [--json FILE]`.

    python app/main.py    with the platform's variables, on two processors, where only the temporary folder can be written to

Printed: each check with what was found. The exit code is 1 if one does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import httpx
import psutil

from benchmarks.visitors import Report, Visitor, served

HOST = "owner-quantscope.hf.space"
SPACE = {"SPACE_ID": "owner/quantscope", "SPACE_HOST": HOST, "SYSTEM": "spaces", "CPU_CORES": "2", "MEMORY": "16Gi"}
HOME = "/proc"
"""A home in which nobody can write, not even root."""
START_SECONDS, STOP_SECONDS, MEMORY_BYTES, DISK_BYTES = 60.0, 10.0, 4 * 2**30, 2**30
"""Time to the page and to the end; memory of all processes and disk after one run (a Space has 16 and 50 GB in all)."""
RELOADING = "Exception in thread.*?`spaces` package is required to run hot-reloading in Spaces"
"""Gradio's thread that reloads changed sources ends so where the platform's own package is not installed."""
Check = tuple[str, bool, str]


def foreign(processes: Iterable[psutil.Process]) -> list[str]:
    """List the connections of processes to other machines."""
    ends = [c.raddr for process in processes for c in process.net_connections("inet") if c.raddr]
    return [f"{end.ip}:{end.port}" for end in ends if not end.ip.startswith("127.") and end.ip != "::1"]


def check_door(address: str) -> list[Check]:
    """Check who may ask, and what a browser is told, through the platform's proxy."""
    proxy = {"host": HOST, "x-forwarded-proto": "https", "x-forwarded-for": "8.8.8.8"}
    page = httpx.get(address, headers=proxy, timeout=60)
    cookie, policy = page.headers.get("set-cookie", ""), page.headers.get("content-security-policy", "")
    frames = re.search("frame-ancestors ([^;]*)", policy)
    root = re.search(r'"root":\s*"([^"]*)"', page.text)
    other = httpx.get(address, headers={**proxy, "host": "evil.example"}, timeout=60).status_code
    return [
        ("the page has the Space's name", page.status_code == 200 and root and root[1] == f"https://{HOST}", root and root[1]),
        ("another name is refused", other == 421, f"status {other}"),
        ("the cookie works inside a frame", "SameSite=None; Secure; Partitioned" in cookie, cookie.partition("; ")[2]),
        ("huggingface.co may frame the page", frames and frames[1] == "'self' https://huggingface.co", frames and frames[1]),
    ]


async def check_visit(address: str, server: psutil.Process) -> list[Check]:
    """Check that a visitor can explore and quantise, reaches no folder of the machine, and that the machine stays small."""
    report, strange = Report(), Report()
    async with Visitor(address, 0, report) as visitor:
        await visitor.open()
        await visitor.settle()
        await visitor.drag()
        seconds = await visitor.follow("quantize", {visitor.named["weights"]: "rtn"})
        numbers = await visitor.send(visitor.events["keep-run", "input"])
        command = "app.cli quantize" in json.dumps(numbers)
    async with Visitor(address, 1, strange) as visitor:
        await visitor.open()
        await visitor.settle()
        await visitor.send(visitor.events["observe", "click"], {visitor.named["model"]: "/etc"})
        refused = re.search(r"E-MODEL[A-Z-]*", await visitor.settle())
    processes = [server, *server.children(recursive=True)]
    memory = sum(process.memory_info().rss for process in processes)
    reached = foreign(processes)
    return [
        ("a visitor explores and quantises", command and not report.errors, f"{seconds:.1f} s {report.errors[:1] or ''}"),
        ("folders of the machine are refused", refused, refused[0] if refused else "taken"),
        ("memory", memory < MEMORY_BYTES, f"{memory / 1e6:.0f} MB in {len(processes)} processes"),
        ("no other machine is reached", not reached, ", ".join(reached) or "none"),
    ]


def check_space(folder: Path) -> list[Check]:
    """Start the page in a folder of its own, and check everything."""
    temporary, log = folder / "tmp", folder / "log.txt"
    temporary.mkdir()
    begin = time.perf_counter()
    with served(log, start=("app/main.py",), HOME=HOME, TMPDIR=str(temporary), **SPACE) as (address, server):
        started = time.perf_counter() - begin
        port = int(address.rpartition(":")[2])
        ends = {c.laddr.ip for c in server.net_connections("inet") if c.status == psutil.CONN_LISTEN and c.laddr.port == port}
        checks = [("starts", started < START_SECONDS, f"{started:.1f} s"), ("listens everywhere", ends == {"0.0.0.0"}, str(ends))]  # noqa: S104
        checks += [*check_door(address), *asyncio.run(check_visit(address, server))]
        disk = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
        checks.append(("disk", disk < DISK_BYTES, f"{disk / 1e6:.1f} MB"))
        workers, begin = server.children(recursive=True), time.perf_counter()
    stopped = time.perf_counter() - begin
    alive = psutil.wait_procs(workers, timeout=2)[1]
    checks.append(("stops", stopped < STOP_SECONDS and not alive, f"{stopped:.1f} s, {len(alive)} processes left"))
    said = re.sub(RELOADING, "", log.read_text(), flags=re.DOTALL)
    fault = re.search(r"(Traceback|fault ).*", said, re.DOTALL)
    return [*checks, ("the log names no fault", fault is None, fault[0][-600:] if fault else "none")]


def main() -> int:
    """Check, print, and write the results where asked. Returns: the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.space", description=(__doc__ or "").partition(":")[0] + ".")
    parser.add_argument("--json", type=Path, default=None, help="also write the results here")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    with tempfile.TemporaryDirectory() as folder:
        checks = check_space(Path(folder))
    for name, holds, found in checks:
        sys.stdout.write(f"{'holds' if holds else 'FAILS'}  {name}: {found}\n")
    if options.json:
        options.json.write_text(json.dumps([{"check": n, "holds": bool(h), "found": f} for n, h, f in checks], indent=1) + "\n")
    return int(not all(holds for _, holds, _ in checks))


if __name__ == "__main__":
    raise SystemExit(main())
