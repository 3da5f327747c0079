"""Jobs end well however the worker ends, belong to whoever runs them, and light ones never wait behind a long one."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from app.worker.job import Job, Step
from app.worker.line import PER_ADDRESS
from app.worker.wire import Malformed
from core.errors import Cancelled, QuantscopeError, ResourceError
from core.progress import Pace
from tests.app.job_tools import RECORDED, end_of, follow, leave, load, next_job_works, observe, started, use
from tests.app.tools import collect


def test_results_and_progress_arrive_step_by_step():
    async def scenario(worker):
        views = await collect(worker.run("a", observe("fake-slow")))
        assert all(0 <= view.fraction <= 1 for view in views if view.fraction is not None)
        assert views[-1].state == "done" and views[-1].fraction == 1.0 and views[-1].finished
        assert [type(r).__name__ for r in views[-1].results] == ["ModelInfo", "RangesReport"]
        assert ("Layer 3 of 6: observing", 1) in {(view.stage, len(view.results)) for view in views}

    use(scenario)


def test_generated_text_streams():
    async def scenario(worker):
        views = await collect(worker.run("a", [Step("generate", {"key": "fake", "prompt": "x", "max_new_tokens": 40})]))
        assert len({len(view.texts[0]) for view in views}) > 3
        assert views[-1].texts[0] == views[-1].results[0].text

    use(scenario)


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [
        ("fake-exit", "E-BUG", "Something broke on our side"),
        ("fake-bug", "E-BUG", "Something broke on our side"),
        ("fake-memory", "E-MEM", "Ran out of memory"),
        ("fake-killed", "E-MEM", "Ran out of memory"),
        ("no such model", "E-MODEL-NAME", "No model is called"),
    ],
)
def test_every_fault_is_one_sentence_and_the_next_job_works(model, code, words):
    async def scenario(worker):
        error = await end_of(worker.run("a", load(model)))
        assert error.code == code and words in str(error) and len(str(error)) <= 240 and "secret" not in str(error)
        await next_job_works(worker)

    use(scenario)


def test_closing_the_generator_ends_the_job():
    async def scenario(worker):
        views = worker.run("a", load("fake-endless"))
        await anext(views)
        await anext(views)
        await views.aclose()
        assert not worker.line
        await next_job_works(worker)

    use(scenario)


def test_waiting_jobs_know_their_place_and_leave_at_once():
    async def scenario(worker):
        first = follow(worker.run("a", load("fake-endless")))
        await started(worker)
        second, third = worker.run("b", load("fake")), worker.run("c", load("fake"))
        assert [(await anext(second)).ahead, (await anext(third)).ahead] == [1, 2]
        await second.aclose()
        assert (await anext(third)).ahead == 1
        await leave(first)
        assert (await end_of(third)).state == "done"

    use(scenario)


def test_one_running_and_one_waiting_per_session():
    async def scenario(worker):
        jobs = [follow(worker.run("a", load(model))) for model in ("fake-endless", "fake")]
        await started(worker)
        assert (await end_of(worker.run("a", load("fake")))).code == "E-BUSY"
        other = follow(worker.run("b", load("fake")))
        for job in jobs:
            await leave(job)
        assert (await other).state == "done"

    use(scenario)


def test_a_full_line_says_so():
    async def scenario(worker):
        jobs = [follow(worker.run(f"visitor {n}", load("fake-endless" if n == 0 else "fake"))) for n in range(PER_ADDRESS)]
        await started(worker)
        error = await end_of(worker.run("one more", load("fake")))
        assert error.code == "E-BUSY" and f"{PER_ADDRESS} jobs" in str(error)
        await leave(jobs[0])
        assert {view.state for view in await asyncio.gather(*jobs[1:])} == {"done"}

    use(scenario)


def test_a_job_over_its_time_is_ended():
    async def scenario(worker):
        error = await end_of(worker.run("a", load("fake-endless")))
        assert error.code == "E-TIME" and not worker.process.alive
        worker.settings = replace(worker.settings, job_seconds=60)
        await next_job_works(worker)

    use(scenario, job_seconds=2)


def test_a_step_without_progress_is_ended():
    async def scenario(worker):
        await next_job_works(worker)
        worker.settings = replace(worker.settings, step_seconds=1)
        error = await end_of(worker.run("a", load("fake-endless")))
        assert error.code == "E-TIME" and "“Loading”" in str(error)
        worker.settings = replace(worker.settings, step_seconds=60)
        await next_job_works(worker)

    use(scenario)


@pytest.mark.parametrize("said", ["no pickle", "negative size", "endless size", "no tuple", "a call", "nothing", "no job"])
def test_what_cannot_be_read_ends_the_job_with_a_sentence(said):
    async def scenario(worker):
        async with asyncio.timeout(20):
            error = await end_of(worker.run("a", load(f"fake-says {said}")))
        assert isinstance(error, ResourceError) and error.code == "E-WORKER" and "stopped unexpectedly" in str(error)
        await next_job_works(worker)

    use(scenario)


@pytest.mark.parametrize(
    "rest",
    [
        ("progress",),
        ("progress", 2, "stage", 0.5),
        ("progress", 0, "stage", "half"),
        ("progress", 0, b"stage", 0.5),
        ("text", 5, "x"),
        ("result", -1, None),
        ("result", 1, None),
        ("done",),
        ("failed", "E-BUG"),
        ("failed", None, None),
        ("exec", "rm"),
    ],
)
def test_messages_of_no_known_form_are_refused(rest):
    job = Job("a", observe("fake"))
    with pytest.raises(Malformed):
        job.take((rest[0], job.name, *rest[1:]))
    assert not job.take((rest[0], "another job", *rest[1:])), "they may belong to a job that was stopped"


def test_a_job_takes_the_messages_of_its_worker():
    job = Job("a", observe("fake"))
    assert not job.take(("ready",))
    job.start()
    assert job.take(("progress", job.name, 0, "Reading", None)) and job.view().stage == "Reading" and job.view().fraction == 0
    job.take(("progress", job.name, 0, "Reading", 0.5))
    job.take(("progress", job.name, 0, "Checking", None))
    assert job.view().fraction == 0.125, "a stage without a share takes nothing back"
    job.take(("result", job.name, 0, "info"))
    assert (job.view().fraction, job.view().stage) == (0.25, "Observing ranges")
    job.take(("text", job.name, 1, "a"))
    job.take(("text", job.name, 1, "b"))
    job.take(("result", job.name, 1, "ranges"))
    job.take(("done", job.name))
    view = job.view()
    assert (view.state, view.fraction, view.results, view.texts) == ("done", 1.0, ("info", "ranges"), ("", "ab"))


METHODS = ("load", "quantize", "evaluate", "evaluate")


@pytest.mark.parametrize("recording", RECORDED)
def test_the_remaining_time_of_recorded_runs_is_right_within_a_factor_of_two(recording):
    assert_right(RECORDED[recording], (1.0, 8.0, 4.0, 1.5))


def made_up(draw: random.Random) -> tuple[list[list[float]], list[float]]:
    """Progress of a run whose layers take from once to twice as long, at random, growing or shrinking, and whose stages take
    longer or shorter than their shares say; and the seconds of quantising and of both measurements."""
    layers, quantize = draw.choice((6, 12, 30)), draw.choice((6.0, 30.0, 120.0)) * draw.uniform(0.5, 2)
    compare = quantize * draw.uniform(0.15, 1.2)
    original, reference = compare * draw.uniform(0.3, 0.8), draw.uniform(0.2, 0.45)
    costs = [1 + draw.random() for _ in range(layers)]
    costs = draw.choice((costs, sorted(costs), sorted(costs)[::-1]))
    cuts = [0.0, *sorted(draw.uniform(share - 0.2, share + 0.2) for share in (0.4, 0.5, 0.7))]
    now, reports = 1.0, [[0.0, 0, 0.0], [1.0, 1, 0.0]]
    for layer, cost in enumerate(costs):
        seconds = quantize * cost / sum(costs)
        stages = zip(cuts, (0.0, 0.4, 0.5, 0.7), strict=True)
        reports += [[now + cut * seconds, 1, (layer + share) / layers] for cut, share in stages]
        now += seconds
    windows = [i / 4 for i in range(4)]
    reports += [[now + compare * reference * w, 2, 0.3 * w] for w in windows]
    reports += [[now + compare * (reference + (1 - reference) * w), 2, 0.3 + 0.7 * w] for w in windows]
    reports += [[now + compare + original * w, 3, w] for w in windows]
    return [*reports, [now + compare + original, 3, 0.0]], [quantize, compare, original]


@pytest.mark.parametrize("seed", range(60))
def test_the_remaining_time_is_right_for_layers_and_stages_of_unequal_length_where_the_run_was_estimated(seed):
    """Steps weigh what was estimated for them, each up to 25 % off."""
    draw = random.Random(seed)
    recording, seconds = made_up(draw)
    assert_right(recording, (0.1, *(each * draw.uniform(0.75, 1.25) for each in seconds)), timed=True)


def assert_right(recording: list[list[float]], weights: tuple[float, ...], *, timed: bool = False) -> None:
    """Replay a run on a clock of its own: every remaining time that is shown is right within a factor of two."""
    *reports, (end, _, _) = recording
    now, shown = 0.0, []
    steps = [Step(method, {}, weight=weight, timed=timed) for method, weight in zip(METHODS, weights, strict=True)]
    job = Job("a", steps, clock=lambda: now)
    job.start()
    while now < end:
        while reports and reports[0][0] <= now:
            _, step, share = reports.pop(0)
            while len(job.results) < step:
                job.take(("result", job.name, len(job.results), None))
            job.take(("progress", job.name, step, "", share))
        remaining, left = job.view().remaining_s, end - now
        if remaining is not None and left > max(2.0, 0.03 * end):
            shown.append(now)
            assert left / 2 <= remaining <= 2 * left, (now, remaining, left)
        now += 0.25
    assert shown[0] <= (3.0 if timed else end / 2), "it is known for half of the time, and at once where it was estimated"


def test_the_remaining_time_is_unknown_at_first_and_never_nothing_while_work_stands_still():
    pace = Pace()
    assert pace.remaining(100.0) is None
    pace.report(0.0, 0.0)
    pace.report(20.0, 0.0)
    pace.report(21.0, 0.05)
    assert pace.remaining(30.0) is None, "a twentieth tells nothing"
    pace.report(22.0, 0.1)
    assert pace.remaining(22.5) is None, "two seconds neither"
    assert pace.remaining(23.0) == pytest.approx(17.0), "the clock started at 20 s"
    assert pace.remaining(26.0) == pytest.approx(27.0)
    assert pace.remaining(42.0) == pytest.approx(0.9 * 22 / 0.1 / 2)


def test_an_expected_time_is_shown_at_once_and_gives_way_to_the_pace():
    pace = Pace(100.0)
    assert pace.remaining(5.0) is None, "nothing has begun"
    pace.report(10.0, 0.0)
    assert pace.remaining(10.0) == 100.0 and pace.remaining(30.0) == 80.0 and pace.remaining(90.0) == 50.0
    pace.report(20.0, 0.05)
    assert pace.remaining(20.0) == 95.0
    pace.report(110.0, 0.5)
    assert pace.remaining(110.0) == pytest.approx(0.5 * 100 + 0.5 * 50), "half of it by the pace, twice as slow"


def test_loading_a_model_says_nothing_about_the_remaining_time():
    now = 0.0
    job = Job("a", observe("fake"), clock=lambda: now)
    job.start()
    for now in (1.0, 50.0, 100.0):
        job.take(("progress", job.name, 0, "Downloading", now / 100))
        assert job.view().remaining_s is None


@pytest.mark.parametrize(("code", "kind"), [("E-CANCEL", Cancelled), ("E-TEXT-SHORT", QuantscopeError)])
def test_a_failed_job_raises_its_error(code, kind):
    job = Job("a", load("fake"))
    with pytest.raises(kind) as caught:
        job.take(("failed", job.name, code, "Too short."))
    assert caught.value.code == code
