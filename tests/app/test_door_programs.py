"""Calls of programs at the door: bounded results, cookies that keep them apart, cancelling, and what is no call."""

from __future__ import annotations

import asyncio
import json

import pytest

from app.door import programs
from app.door.programs import UNREAD_OF_ADDRESS, UNREAD_SECONDS, Endpoint, Programs
from app.door.rules import CANCEL, JOIN, READ, Refusal
from core.errors import InputError

INFO = {"parameters": [{"parameter_name": "words", "parameter_has_default": False, "type": {"type": "string"}}]}


async def shout(words: str, seconds: float = 0.0) -> dict:
    """Write words in capitals."""
    await asyncio.sleep(seconds)
    if not words:
        raise InputError("There are no words: give some.", code="E-PARAM-WORDS")
    return {"loud": words.upper()}


def made() -> Programs:
    return Programs({7: Endpoint("shout", shout, INFO)})


def join(calls: Programs, name: str, *data: object, cookie: str = "mine") -> str:
    return calls.take(JOIN, {"data": list(data), "fn_index": 7, "session_hash": name}, cookie)["event_id"]


async def read(calls: Programs, name: str, cookie: str = "mine", path: str = READ) -> list[str]:
    return [line.decode() async for line in calls.read(path, f"session_hash={name}", cookie)]


def test_results_are_read_once_and_by_their_own_cookie():
    async def scenario() -> None:
        calls = made()
        events = [join(calls, "a", "one"), join(calls, "a", "")]
        for other in ("yours", ""):
            with pytest.raises(Refusal):
                await read(calls, "a", other)
        lines = [json.loads(line.removeprefix("data: ")) for line in await read(calls, "a")]
        assert [line["msg"] for line in lines] == ["process_completed", "process_completed", "close_stream"]
        done, failed = (next(line for line in lines if line.get("event_id") == event) for event in events)
        assert done["output"]["data"] == [{"loud": "ONE"}]
        assert not failed["success"] and failed["output"]["error"] == "There are no words: give some. (E-PARAM-WORDS)"
        with pytest.raises(Refusal):
            await read(calls, "a")

    asyncio.run(scenario())


def test_unread_results_are_few_and_forgotten_in_time():
    async def scenario() -> None:
        calls = made()
        for index in range(UNREAD_OF_ADDRESS):
            join(calls, f"client-{index}", "x")
        with pytest.raises(Refusal, match="wait to be read"):
            join(calls, "another", "x")
        many = made()
        for _ in range(UNREAD_OF_ADDRESS):
            join(many, "one", "x")
        with pytest.raises(Refusal, match="wait to be read"):
            join(many, "one", "x")
        await asyncio.sleep(0.1)
        for letters in calls._letters.values():
            letters.touched_at -= UNREAD_SECONDS + 1
        join(calls, "another", "x")
        assert len(calls._letters) == 1

    asyncio.run(scenario())


def test_a_result_for_which_there_is_no_room_is_told_so(monkeypatch):
    async def scenario() -> None:
        calls = made()
        join(calls, "a", "x" * 1000)
        assert "Too many results" in (await read(calls, "a"))[0]

    monkeypatch.setattr(programs, "UNREAD_BYTES", 500)
    asyncio.run(scenario())


def test_a_call_is_cancelled_by_its_own_cookie_alone():
    async def scenario() -> None:
        calls = made()
        event = join(calls, "a", "x", 60.0)
        stop = {"session_hash": "a", "event_id": event, "fn_index": 7}
        assert calls.take(CANCEL, stop, "yours") == {"success": False}
        assert calls.take(CANCEL, stop, "mine") == {"success": True}
        assert '"output": {}' in (await read(calls, "a"))[0]

    asyncio.run(scenario())


def test_a_reader_who_leaves_ends_the_calls():
    async def scenario() -> None:
        calls = made()
        join(calls, "a", "x", 60.0)
        (letters,) = calls._letters.values()
        (task,) = letters.running.values()
        lines = calls.read(READ, "session_hash=a", "mine")
        waiting = asyncio.ensure_future(anext(lines))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await lines.aclose()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled() and not calls._letters

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "body",
    [{"fn_index": 0}, {"fn_index": True}, {"fn_index": "7"}, {"session_hash": "../x"}, {"session_hash": None}, {"data": None},
     {"data": {}}, {"data": []}, {"data": ["a", 1, 2]}, {"session_hash": "a" * 41}],
    ids=str,
)  # fmt: skip
def test_what_is_no_call_is_refused_in_a_sentence(body):
    with pytest.raises(Refusal) as refused:
        made().take(JOIN, {"data": ["x"], "fn_index": 7, "session_hash": "a"} | body, "mine")
    assert refused.value.status in (400, 404) and refused.value.sentence.endswith(".")
