"""What a visitor types is seen by that visitor alone: not in other pages, not in the log, not in any file."""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks.visitors import CANARY, Report, Visitor, served

VISITORS = 3
WORDS = "the river ran past seven quiet houses while children counted boats in the rain and "


def test_what_visitors_type_is_seen_by_nobody_else(tmp_path):
    """Pasted texts, observed and quantised on, names of models, and keys of others that a visitor tries."""
    log, report = tmp_path / "log.txt", Report()
    files = {name: str(tmp_path / name) for name in ("cache", "tmp", "home")}
    for folder in files.values():
        Path(folder).mkdir()

    async def live(address: str, number: int, visitors: list[Visitor]) -> None:
        visitor = visitors[number]
        await visitor.open()
        text = f"{visitor.canary} " + "".join(WORDS + f"{visitor.canary} {n}. " for n in range(60))
        pasted = {visitor.named["text"]: "paste", visitor.named["pasted"]: text}
        await visitor.follow("observe", {**pasted, visitor.named["observe-tokens"]: 512})
        await visitor.send(visitor.events["save-recipe", "click"], pasted)
        if number == 0:
            recipe = {visitor.named["method"]: "rtn", visitor.named["weights"]: "rtn", visitor.named["measure"]: False}
            await visitor.follow("quantize", {**pasted, **recipe})
        await visitor.name_canary()
        stolen = visitors[number - 1].key
        if stolen:
            answer = await visitor.send(visitor.events["g", "input"], key=stolen)
            report.leaks += "E-SESSION" not in str(answer)
        await visitor.send(visitor.events["save-ranges", "click"])
        await visitor.drag()

    async def everyone(address: str) -> None:
        visitors = [Visitor(address, n, report) for n in range(VISITORS)]
        try:
            await asyncio.gather(*(live(address, n, visitors) for n in range(VISITORS)))
        finally:
            for visitor in visitors:
                await visitor.__aexit__()

    environment = {"QUANTSCOPE_CACHE": files["cache"], "TMPDIR": files["tmp"], "HOME": files["home"]}
    with served(log, **environment) as (address, _):
        asyncio.run(everyone(address))
        found = [path for folder in files.values() for path in Path(folder).rglob("*") if path.is_file()]
        told = [path for path in found if CANARY.search(path.read_bytes().decode("latin-1"))]
    assert report.leaks == 0 and not report.errors and not told and not CANARY.search(log.read_text()), report.errors[:3]
    assert any("quantized" in str(path) for path in found), "a model was saved"
    assert report.own >= 2 * VISITORS, "their own words come back to them"
