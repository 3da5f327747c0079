"""Reports of public models and texts: made once for everybody, kept within limits, and never of a private text."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from types import SimpleNamespace

import pytest

from app.context import ranges_key
from app.session import Protocol
from app.worker.job import JobView, Step
from app.worker.line import PUBLIC
from core.errors import InputError, QuantscopeError
from core.folders import state_of
from core.recipe import Calibration
from tests.app.context_tools import PRIVATE_TEXT, PUBLIC_TEXT, jobs, shown
from tests.app.tools import collect


def test_the_first_model_is_prepared_for_everyone(ctx):
    async def scenario():
        async with ctx.serving():
            visitors = [ctx.sessions.open(str(n)) for n in range(3)]
            ends = await asyncio.gather(*(collect(jobs(ctx, visitor)) for visitor in visitors))
            assert len({id(views[-1].results) for views in ends}) == 1, "one task made them for all"
            assert ctx.shared.get(ranges_key(*[*first(ctx)]))[0].name == "fake"

    asyncio.run(scenario())


def first(ctx):
    """Model, revision and calibration that the page opens on."""
    return ctx.settings.model, None, Calibration(ctx.settings.text, ctx.settings.first_tokens)


def test_a_shared_job_ends_with_its_last_follower(ctx):
    async def scenario():
        sessions = [ctx.sessions.open(str(n)) for n in range(2)]
        tasks = [ctx.start(session, shown(ctx, session)) for session in sessions]
        for session in sessions:
            await ctx.news(session.key, list(session.pages)[0])
        sessions[0].stop()
        await tasks[0]
        assert len(ctx.workers.main.line) == 1 and not tasks[1].done()
        sessions[1].stop()
        await tasks[1]
        while ctx.workers.main.line:
            await asyncio.sleep(0.01)
        assert (await collect(jobs(ctx, sessions[0])))[-1].finished

    asyncio.run(scenario())


def test_a_shared_job_that_fails_tells_everyone_and_can_be_tried_again(ctx):
    calls = []

    async def make():
        calls.append(1)
        yield JobView("running")
        await asyncio.sleep(0.05)
        if len(calls) == 1:
            raise InputError("No.", code="E-NO")
        yield JobView("done", results=("report",))

    async def scenario():
        async def wish():
            return (await collect(ctx.shared.follow(("ranges", "m"), make)))[-1].results

        failed = await asyncio.gather(wish(), wish(), return_exceptions=True)
        assert [error.code for error in failed] == ["E-NO", "E-NO"] and len(calls) == 1
        assert await wish() == ("report",) and await wish() == ("report",) and len(calls) == 2

    asyncio.run(scenario())


def test_shared_reports_drop_the_least_used_of_their_kind(ctx):
    shared = ctx.shared
    shared.put(("ranges", "first"), 1)
    for n in range(600):
        shared.put(("channel", n), n)
        assert shared.get(("ranges", "first")) == 1
    assert shared.get(("channel", 0)) is None and shared.get(("channel", 599)) == 599
    for n in range(30):
        shared.put(("ranges", n), n)
    assert shared.get(("ranges", "first")) is None and shared.get(("ranges", 29)) == 29


def test_the_page_opens_after_hours_of_clicks_and_killed_workers(ctx, monkeypatch):
    now = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: now() + later)
    later = 0.0

    async def click(session, channel):
        arguments = {"model": "fake", "calibration": PUBLIC_TEXT, "site": "layers.0.down_in", "channel": channel}
        ranges = ranges_key("fake", None, PUBLIC_TEXT)
        key = ("channel", ranges, "layers.0.down_in", channel)
        return (await collect(ctx.follow(session, "channel", [Step("channel", arguments)], key=key)))[-1]

    async def scenario():
        nonlocal later
        async with ctx.serving():
            reader = ctx.sessions.open("reader")
            for channel in range(200):
                assert (await click(reader, channel)).finished
                if channel % 10 == 9:
                    worker = ctx.workers.main.process.process
                    os.kill(worker.pid, signal.SIGKILL)
                    worker.wait()
                    later += 90.0
            assert later == 1800
            visitor = ctx.sessions.open("new visitor")
            assert (await collect(jobs(ctx, visitor)))[-1].finished, "known ranges"
            assert (await collect(jobs(ctx, visitor, "fake-wide")))[-1].finished, "ranges of a model nobody has opened"
            assert (await click(visitor, 300)).finished

    asyncio.run(scenario())


def test_a_page_opens_though_the_first_ranges_failed_or_are_forgotten(ctx):
    ctx.settings = SimpleNamespace(**{**vars(ctx.settings), "model": "no such model"})

    async def scenario():
        async with ctx.serving():
            with pytest.raises(QuantscopeError, match="No model is called"):
                await collect(jobs(ctx, ctx.sessions.open(), "no such model"))
            assert (await collect(jobs(ctx, ctx.sessions.open())))[-1].finished
            for n in range(40):
                ctx.shared.put(("ranges", n), n)
            assert (await collect(jobs(ctx, ctx.sessions.open())))[-1].finished

    asyncio.run(scenario())


def test_ranges_of_a_pasted_text_are_not_shared(ctx):
    assert ranges_key("fake", None, PRIVATE_TEXT) is None and ranges_key("fake", None, PUBLIC_TEXT) is not None


def test_a_sessions_own_steps_are_told_their_owner_and_shared_ones_are_not(ctx, monkeypatch):
    seen = []

    async def run(owner, steps, *, light):
        seen.append((owner, [step.arguments.get("owner") for step in steps]))
        yield JobView("done", results=("info", "ranges"))

    monkeypatch.setattr(ctx.workers, "run", run)
    session = ctx.sessions.open()
    for calibration in (PRIVATE_TEXT, PUBLIC_TEXT):
        asyncio.run(collect(jobs(ctx, session, calibration=calibration)))
    assert seen == [(session.key, [session.key] * 2), (PUBLIC, [None, None])]


def test_a_folder_written_anew_is_another_model(ctx, tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    session, name = ctx.sessions.open(), str(folder)
    before = ranges_key(name, None, PUBLIC_TEXT)
    session.base_run(name, state_of(name)).measure(Protocol("sotu", 2048, 512), "measured")
    assert session.base_run(name, state_of(name)).evaluation == "measured"
    os.utime(folder / "config.json", (2e9, 2e9))
    assert ranges_key(name, None, PUBLIC_TEXT) != before
    assert session.base_run(name, state_of(name)).evaluation is None
    assert [state_of(name) for name in ("owner/name", "x" * 5000, "a\0b")] == [None] * 3
