"""The line of jobs: whoever asks for much waits behind those who ask for little, and places are told truly."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings, strategies

from app.door.visitor import VISITOR, Visitor
from app.settings import Settings
from app.worker.client import Worker
from app.worker.job import Job, Step
from app.worker.line import MAX_WAITING, PER_ADDRESS, PUBLIC, Line
from core.errors import ResourceError
from tests.app.tools import FAKE

STEPS = [Step("load", {"model": "fake"})]


def job(owner: str, address: str) -> Job:
    """A job that does nothing."""
    return Job(owner, STEPS, address)


def filled(*jobs: Job) -> Line:
    """A line in which the first job runs."""
    line = Line()
    for one in jobs:
        line.add(one)
        line[0].state = "running"
    return line


def owners(line: Line) -> list[str]:
    """Owners in the order in which they are served."""
    return [one.owner for one in line.jobs]


def test_a_newcomer_comes_before_the_second_job_of_anybody():
    line = filled(*(job(f"many{n}", "6.6.6.6") for n in range(8)))
    line.add(job("honest", "8.8.8.8"))
    line.add(job("other", "9.9.9.9"))
    assert owners(line) == ["many0", "honest", "other", *(f"many{n}" for n in range(1, 8))]


def test_visitors_of_one_address_take_turns():
    line = filled(job("a", "x"), job("a", "x"), job("b", "x"), job("b", "x"), job("c", "x"))
    assert owners(line) == ["a", "b", "c", "a", "b"]


def test_jobs_for_everybody_count_for_the_address_that_asked():
    line = filled(*(job(PUBLIC, "6.6.6.6") for _ in range(4)), job(PUBLIC, "8.8.8.8"))
    assert [one.address for one in line.jobs] == ["6.6.6.6", "8.8.8.8", *["6.6.6.6"] * 3]


def test_who_finds_no_room_is_told_when_to_come_back():
    line = filled(*(job(f"{n}", "6.6.6.6") for n in range(PER_ADDRESS)))
    with pytest.raises(ResourceError, match=r"From your network 16 jobs .* about 16 minutes"):
        line.add(job("more", "6.6.6.6"))
    for n in range(MAX_WAITING + 1 - PER_ADDRESS):
        line.add(job(f"o{n}", f"a{n}"))
    line.seconds.extend([6.0] * 20)
    with pytest.raises(ResourceError, match=r"^201 jobs run or wait already.* about 20 minutes") as busy:
        line.add(job("late", "8.8.8.8"))
    assert busy.value.code == "E-BUSY" and len(line) == MAX_WAITING + 1


@settings(derandomize=True, max_examples=200, deadline=None)
@given(strategies.lists(strategies.tuples(*map(strategies.sampled_from, ("abcd", "wxyz", (True, False))))))
def test_everybody_is_served_and_nobody_twice_before_another_once(events):
    """Random arrivals and departures: the running job stays first, nobody is lost, and addresses are served in turn."""
    line = Line()
    for owner, address, leaves in events:
        if leaves and len(line):
            running = line[0]
            line.remove(running)
        elif sum(one.owner == owner for one in line.jobs) < 2:
            line.add(job(owner, address))
        if len(line):
            line[0].state = "running"
        waiting = [one for one in line.jobs if one.state == "waiting"]
        assert line.jobs[1:] == waiting
        had = [line[0].address] if len(line) else []
        for one in waiting:
            least = min(had.count(other.address) for other in waiting[waiting.index(one) :])
            assert had.count(one.address) == least, "somebody with fewer before waits behind"
            had.append(one.address)


def test_places_are_told_again_when_somebody_comes_before():
    worker = Worker(Settings(model="fake", workbench=FAKE))

    async def told() -> list[int]:
        seen: list[int] = []

        async def wait(owner: str, address: str, into: list[int]) -> None:
            VISITOR.set(Visitor(owner, address))
            async for view in worker.run(owner, [Step("observe", {"model": "fake-endless", "calibration": None})]):
                if view.state == "waiting":
                    into.append(view.ahead)

        tasks = [asyncio.create_task(wait("a", "x", []))]
        await asyncio.sleep(0.05)
        tasks += [asyncio.create_task(wait("b", "x", seen))]
        await asyncio.sleep(0.05)
        tasks += [asyncio.create_task(wait("c", "y", []))]
        await asyncio.sleep(0.05)
        tasks[2].cancel()
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return seen

    assert asyncio.run(told()) == [1, 2, 1] and not len(worker.line)
    worker.close()
