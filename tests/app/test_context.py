"""Handlers never raise, follow jobs to their end, and share only public results."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os

import pytest

from app.context import UNCHANGED, Context, Superseded, observe_steps
from app.session import SessionStore
from app.settings import Settings
from app.worker.jobs import Step
from core.errors import Cancelled, InputError, QuantscopeError
from core.folders import state_of
from core.recipe import Calibration


@pytest.fixture
def ctx(runner):
    context = Context(Settings(model="fake"), runner, SessionStore(seconds=60, capacity=10))
    context.status, context.stop = "status", "stop"
    return context


async def collect(stream):
    return [item async for item in stream]


@pytest.mark.parametrize(
    "fault", [ZeroDivisionError("secret"), SystemExit(1), KeyboardInterrupt(), RecursionError(), MemoryError()]
)
def test_a_handler_never_raises(ctx, fault, caplog):
    def handler():
        raise fault

    async def stream():
        yield {"chart": 1}
        raise fault

    with caplog.at_level(logging.CRITICAL):
        card = ctx.guard(handler)()["status"]
        streamed = asyncio.run(collect(ctx.guard(stream)()))
    assert "E-BUG" in card and "secret" not in card
    assert streamed[0] == {"chart": 1} and "E-BUG" in streamed[1]["status"]


def test_expected_errors_show_their_sentence(ctx):
    def handler():
        raise InputError("g is 0: use 1 or more.", code="E-PARAM-G")

    card = ctx.guard(handler)()["status"]
    assert "g is 0: use 1 or more." in card and "E-PARAM-G" in card


def test_after_a_stop_the_line_says_which_model_is_there(ctx, bench, ranges):
    def handler(values):
        raise Cancelled

    session = ctx.sessions.open()
    ctx.key = "key"
    assert ctx.guard(handler)({"key": session.key})["status"].count("Stopped") == 1
    session.info, session.ranges = bench.load("fake", progress=lambda *_: None), ranges
    line = ctx.guard(handler)({"key": session.key})["status"]
    assert "Stopped" in line and "fake · llama · 6 layers" in line


def test_a_folder_written_anew_is_another_model(ctx, tmp_path):
    calibration, folder = Calibration("sotu", 1024), tmp_path / "made"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    ctx.share_ranges(str(folder), None, calibration, ("info", "ranges"))
    session = ctx.sessions.open()
    session.base_run(str(folder), state_of(str(folder))).evaluation = "measured"
    assert ctx.known_ranges(str(folder), None, calibration) == ("info", "ranges")
    assert session.base_run(str(folder), state_of(str(folder))).evaluation == "measured"
    os.utime(folder / "config.json", (2e9, 2e9))
    assert ctx.known_ranges(str(folder), None, calibration) is None
    assert session.base_run(str(folder), state_of(str(folder))).evaluation is None
    assert [state_of(name) for name in ("owner/name", "x" * 5000, "a\0b")] == [None] * 3


def test_every_step_is_told_its_owner(ctx, monkeypatch):
    seen = []
    monkeypatch.setattr(ctx.runner, "submit", lambda owner, steps: seen.append((owner, steps)) or "token")
    session = ctx.sessions.open()

    async def follow():
        stream = ctx.follow(session, "observe", observe_steps("fake", None, Calibration("sotu", 1024)))
        await asyncio.wait_for(anext(stream, None), 5)

    with contextlib.suppress(QuantscopeError, KeyError):
        asyncio.run(follow())
    ((owner, steps),) = seen
    assert owner == session.key and [step.arguments["owner"] for step in steps] == [session.key] * 2


def test_no_update_is_said_so(ctx):
    async def stream():
        yield {}
        yield {"chart": 1}

    async def nothing():
        return
        yield

    async def superseded():
        raise Superseded
        yield

    assert ctx.guard(dict)() == {"status": UNCHANGED}
    assert asyncio.run(collect(ctx.guard(nothing)())) == [{"status": UNCHANGED}], "Gradio would clear every output"
    assert asyncio.run(collect(ctx.guard(superseded)())) == [{"status": UNCHANGED}]
    assert asyncio.run(collect(ctx.guard(stream)())) == [{"chart": 1}]


def test_following_a_job_shows_its_stages_and_ends_with_its_results(ctx):
    session = ctx.sessions.open()
    views = asyncio.run(collect(ctx.follow(session, "observe", observe_steps("fake-slow", None, Calibration("sotu", 1024)))))
    assert any(v.stage.startswith("Layer") for v in views)
    assert views[-1].finished and len(views[-1].results) == 2
    assert session.jobs == {}


def test_a_newer_job_takes_the_older_ones_place(ctx):
    session = ctx.sessions.open()

    async def both():
        older = ctx.follow(session, "observe", [Step("load", {"model": "fake-endless"})])
        await anext(older)
        token = session.jobs["observe"]
        newer = await collect(ctx.follow(session, "observe", [Step("load", {"model": "fake"})]))
        return token, newer

    token, newer = asyncio.run(both())
    assert newer[-1].state == "done"
    assert isinstance(ctx.runner.view(session.key, token).error, Cancelled)


def test_the_first_model_is_prepared_for_everyone(ctx):
    ctx.start_prefetch()
    assert ctx.prefetching(*ctx.first)
    views = asyncio.run(collect(ctx.watch(ctx.sessions.open(), "observe", ctx.prefetch)))
    assert views[-1].state == "done"
    for _ in range(100):
        if ctx.known_ranges(*ctx.first):
            break
        asyncio.run(asyncio.sleep(0.02))
    assert ctx.known_ranges(*ctx.first)[0].name == "fake"
    assert not ctx.prefetching(*ctx.first)


def test_ranges_of_a_pasted_text_are_not_shared(ctx):
    private = Calibration("text:my diary", 1024)
    ctx.share_ranges("fake", None, private, ("info", "ranges"))
    assert ctx.known_ranges("fake", None, private) is None
    public = Calibration("sotu", 1024)
    ctx.share_ranges("fake", None, public, ("info", "ranges"))
    assert ctx.known_ranges("fake", None, public) == ("info", "ranges")
