"""Handlers never raise, follow jobs to their end without holding an event, and share only public results."""

from __future__ import annotations

import asyncio
import logging
import time
from types import SimpleNamespace

import pytest

from app.context import UNCHANGED, observe_steps
from app.worker.job import Step
from core.errors import Cancelled, InputError, QuantscopeError
from core.recipe import Calibration, QuantRecipe
from tests.app.context_tools import PRIVATE_TEXT, PUBLIC_TEXT, event, jobs, shown
from tests.app.tools import collect, quiet


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
    session.info, session.ranges = bench.load("fake", progress=quiet), ranges
    line = ctx.failed(Cancelled(), session)["status"]
    assert "Stopped" in line and "fake · llama · 6 layers" in line


def test_an_event_that_began_before_an_error_leaves_its_sentence(ctx):
    session = ctx.sessions.open()

    def slow(values):
        ctx.failed(InputError("A rule is broken."), session)  # another event fails in the meantime
        return {"status": "Loaded", "chart": "new"}

    values = {"key": session.key}
    assert ctx.guard(slow)(values) == {"chart": "new"} and session.failed
    later = ctx.guard(lambda values: {"chart": "newer"})(values)
    assert later["chart"] == "newer" and "status" in later and not session.failed, "a success that began after the error ends it"


def test_an_event_leaves_the_line_to_its_handler(ctx):
    """Else the event's own answer, which may come behind the handler's error, would take that error away."""

    async def refused(values):
        raise InputError("Channel 99999 is not there.")
        yield

    async def known(values):
        return
        yield

    async def scenario():
        session = ctx.sessions.open("page")
        ctx.failed(InputError("An earlier rule is broken."), session)
        assert await event(ctx, session, ["status"], refused) == {"timer": UNCHANGED | {"active": True}}
        assert "99999" in (await ctx.news(session.key, "page"))["status"]
        assert await event(ctx, session, ["status"], known) == {"timer": UNCHANGED | {"active": True}}
        assert "status" in await ctx.news(session.key, "page") and not session.failed, "a success without an update ends it too"

    asyncio.run(scenario())


def test_an_event_ends_at_once_and_its_updates_come_by_the_timer(ctx, monkeypatch):
    monkeypatch.setattr("app.context.NEWS_SECONDS", 0.5)  # for the request that waits while the handler ends

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


def test_the_timer_rests_when_its_session_does(ctx, monkeypatch):
    monkeypatch.setattr("app.context.REST_SECONDS", 0.5)

    async def scenario():
        session = ctx.sessions.open("page")
        start = time.monotonic()
        assert await ctx.news(session.key, "page") == {"timer": UNCHANGED | {"active": False}}
        assert time.monotonic() - start >= 0.5
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
