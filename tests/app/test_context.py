"""Handlers never raise, follow jobs to their end without holding an event, and share only public results."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from types import SimpleNamespace

import pytest

from app.context import REST_SECONDS, UNCHANGED, observe_steps, ranges_key
from app.session import Protocol
from app.worker.job import JobView, Step
from app.worker.line import PUBLIC
from core.errors import Cancelled, InputError, QuantscopeError
from core.folders import state_of
from core.recipe import Calibration, QuantRecipe

PUBLIC_TEXT, PRIVATE_TEXT = Calibration("sotu", 1024), Calibration("text:" + "my diary " * 200, 1024)


async def collect(stream):
    return [item async for item in stream]


def jobs(ctx, session, model="fake", calibration=PUBLIC_TEXT, kind="observe"):
    """A visitor's wish for the ranges of a model."""
    key = ranges_key(model, None, calibration)
    return ctx.follow(session, kind, observe_steps(model, None, calibration), key=key)


async def shown(ctx, session, model="fake-endless"):
    """A handler that shows the states of a job."""
    async for job in jobs(ctx, session, model):
        yield {"status": job.stage, "chart": job.state}


def event(ctx, session, outputs, handler):
    """Fire the event that `Context.on` connects to a handler: its answer."""
    connected = []
    ctx.on(lambda fn, inputs, targets, **options: connected.append((fn, targets, options)), handler, {"key"}, outputs)
    ((start, targets, options),) = connected
    assert targets == ["timer", "status", "stop"] and options["queue"] is False
    return start({"key": session.key})


@pytest.mark.parametrize(
    "fault", [ZeroDivisionError("secret"), SystemExit(1), KeyboardInterrupt(), RecursionError(), MemoryError()]
)
def test_a_handler_never_raises(ctx, fault, caplog):
    def handler():
        raise fault

    async def stream():
        yield {"chart": 1}
        raise fault

    async def followed():
        session = ctx.sessions.open("page")
        await ctx.start(session, stream())
        return await session.page("page").take(0)

    with caplog.at_level(logging.CRITICAL):
        card = ctx.guard(handler)()["status"]
        updates = asyncio.run(followed())
    assert "E-BUG" in card and "secret" not in card
    assert updates["chart"] == 1 and "E-BUG" in updates["status"] and "secret" not in updates["status"]


def test_expected_errors_show_their_sentence(ctx):
    def handler():
        raise InputError("g is 0: use 1 or more.", code="E-PARAM-G")

    async def awaited():
        raise InputError("g is 0: use 1 or more.", code="E-PARAM-G")

    for card in (ctx.guard(handler)()["status"], asyncio.run(ctx.guard(awaited)())["status"]):
        assert "g is 0: use 1 or more." in card and "E-PARAM-G" in card


def test_a_session_that_has_ended_says_so_everywhere_and_an_early_event_says_nothing(ctx):
    def handler(values):
        return {"chart": ctx.session(values).tab}

    async def stream(values):
        yield {"chart": ctx.session(values).tab}

    async def asked(key):
        connected = []
        ctx.on(lambda fn, *_, **__: connected.append(fn), stream, {"key"}, ["chart"])
        return ctx.guard(handler)({"key": key}), await connected[0]({"key": key}), await ctx.news(key, "page")

    plain, started, fetched = asyncio.run(asked("x" * 43))
    for card in (plain, started, fetched):
        assert "data-restart" in card["status"] and "E-SESSION" in card["status"]
    assert fetched["timer"]["active"] is False, "the page asks no more"
    assert asyncio.run(asked(None))[:2] == asyncio.run(asked(""))[:2] == ({"status": UNCHANGED},) * 2
    assert len(ctx.sessions) == 0


def test_no_update_is_said_so(ctx):
    async def nothing():
        return {}

    assert ctx.guard(dict)() == asyncio.run(ctx.guard(nothing)()) == {"status": UNCHANGED}, "Gradio would clear every output"


def test_after_a_stop_the_line_says_which_model_is_there(ctx, bench, ranges):
    session = ctx.sessions.open()
    assert ctx.failed(Cancelled(), session)["status"].count("Stopped") == 1
    session.info, session.ranges = bench.load("fake", progress=lambda *_: None), ranges
    line = ctx.failed(Cancelled(), session)["status"]
    assert "Stopped" in line and "fake · llama · 6 layers" in line


def test_an_event_ends_at_once_and_its_updates_come_by_the_timer(ctx):
    async def scenario():
        session = ctx.sessions.open("page")
        answer = await event(ctx, session, ["status", "chart"], lambda values: shown(ctx, session, "fake-slow"))
        assert answer == {"timer": UNCHANGED | {"active": True}}
        assert session.handlers and not session.page("page").updates, "it has answered before the job has begun"
        assert ctx.followed == ["status", "chart", "timer"]
        seen = []
        while session.handlers:
            seen.append(await ctx.news(session.key, "page"))
        seen.append(await ctx.news(session.key, "page"))
        assert len(seen) > 3 and any("Layer" in str(updates.get("status")) for updates in seen)
        assert {updates.get("chart") for updates in seen} >= {"running", "done"}

    asyncio.run(scenario())


def test_the_timer_rests_when_its_session_does(ctx):
    async def scenario():
        session = ctx.sessions.open("page")
        start = time.monotonic()
        assert await ctx.news(session.key, "page") == {"timer": UNCHANGED | {"active": False}}
        assert time.monotonic() - start >= REST_SECONDS
        task = ctx.start(session, shown(ctx, session))
        assert "timer" not in await ctx.news(session.key, "page")
        task.cancel()

    asyncio.run(scenario())


def test_a_reloaded_page_goes_on_where_the_earlier_one_was(ctx):
    async def scenario():
        session = ctx.sessions.open("page")
        ctx.start(session, shown(ctx, session))
        await ctx.news(session.key, "page")
        assert ctx.sessions.open("reloaded", session.key) is session
        ctx.closed("page")
        updates = await ctx.news(session.key, "reloaded")
        assert updates["chart"] == "running" and session.opening
        assert list(session.pages) == ["reloaded"]
        session.stop()

    asyncio.run(scenario())


def test_jobs_of_a_page_that_stays_closed_are_stopped(ctx, monkeypatch):
    monkeypatch.setattr("app.context.RELOAD_SECONDS", 0.2)

    async def scenario():
        session = ctx.sessions.open("page")
        task = ctx.start(session, shown(ctx, session))
        await ctx.news(session.key, "page")
        ctx.closed("page")
        await task
        assert not session.jobs and not session.shown
        while ctx.workers.main.line:
            await asyncio.sleep(0.01)

    asyncio.run(scenario())


def test_a_session_that_ends_leaves_the_memory_of_the_workers(ctx, wait):
    async def made(session, text):
        recipe = QuantRecipe("fake", method="bitnet", calibration=Calibration(text, 512))
        steps = [Step("quantize", {"recipe": recipe})]
        assert [view.state for view in await collect(ctx.follow(session, "quantize", steps))][-1] == "done"
        return recipe.hash

    async def known(key):
        try:
            return bool(await collect(ctx.follow(ctx.sessions.open(), "bitnet", [Step("weight_histogram", {"key": key})])))
        except QuantscopeError:
            return False

    async def scenario():
        first, second = ctx.sessions.open(), ctx.sessions.open("page")
        made_by = [(first, "text:" + 200 * "mine "), (second, "text:" + 200 * "yours "), (first, "sotu")]
        keys = [await made(*whose) for whose in made_by]
        assert [await known(key) for key in keys] == [True, True, True]
        first.touched_at -= 100
        await ctx.sweep()
        await ctx.forgetting
        assert [await known(key) for key in keys] == [False, True, True]
        assert ctx.sessions.get(second.key) is second

    wait(scenario())


def test_following_a_job_shows_its_stages_and_ends_with_its_results(ctx):
    session = ctx.sessions.open()
    views = asyncio.run(collect(jobs(ctx, session, "fake-slow")))
    assert any(view.stage.startswith("Layer") for view in views)
    assert views[-1].finished and len(views[-1].results) == 2
    assert session.jobs == {}


def test_a_newer_job_takes_the_older_ones_place(ctx):
    async def scenario():
        session = ctx.sessions.open("page")
        older = ctx.start(session, shown(ctx, session))
        await ctx.news(session.key, "page")
        newest = [ctx.start(session, shown(ctx, session, "fake")) for _ in range(4)]
        await asyncio.wait([older, *newest])
        updates = await ctx.news(session.key, "page")
        assert updates["chart"] == "done" and "Stopped" not in updates["status"], "the older ones say nothing"
        assert not session.jobs and not ctx.workers.main.line

    asyncio.run(scenario())


@pytest.mark.parametrize("calibration", [PUBLIC_TEXT, PRIVATE_TEXT])
def test_stop_ends_a_job_and_says_so(ctx, calibration):
    async def scenario():
        session = ctx.sessions.open("page")

        async def handler():
            async for _ in jobs(ctx, session, "fake-endless", calibration):
                yield {}

        task = ctx.start(session, handler())
        while not session.opening:
            await asyncio.sleep(0.01)
        assert session.stop() == 1
        await task
        assert "Stopped" in (await ctx.news(session.key, "page"))["status"]
        assert session.stop() == 0

    asyncio.run(scenario())


def test_a_handler_may_show_a_last_word_after_stop(ctx):
    async def scenario():
        session = ctx.sessions.open("page")

        async def handler():
            try:
                async for _ in jobs(ctx, session, "fake-endless"):
                    session.stop()
                    yield {}
            except QuantscopeError:
                yield {"chart": "not finished"}
                raise

        await ctx.start(session, handler())
        updates = await ctx.news(session.key, "page")
        assert updates["chart"] == "not finished" and "Stopped" in updates["status"]

    asyncio.run(scenario())


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


@pytest.mark.parametrize(
    ("steps", "bytes_", "light"),
    [
        ([Step("channel", {"model": "m"})], 2**29, True),
        ([Step("channel", {"model": "m"})], 2**33, False),
        ([Step("channel", {"model": "unknown"})], 2**20, False),
        (observe_steps("m", None, PUBLIC_TEXT), 2**20, False),
        (observe_steps("quantscope-llama-6m", None, PUBLIC_TEXT), 2**20, True),
        ([Step("evaluate", {"key": "quantscope-llama-6m"})], 2**20, False),
    ],
)
def test_which_jobs_are_light(ctx, steps, bytes_, light):
    session = ctx.sessions.open()
    session.models["m"] = SimpleNamespace(weight_bytes=bytes_)
    assert ctx.is_light(session, steps) is light
