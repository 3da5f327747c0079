"""The door: what is refused before Gradio sees it, and that what the page sends passes."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time

import httpx
import pytest
from hypothesis import given, settings, strategies

from app.door.bodies import FILE, Budget, Events
from app.door.files import UPLOADS, Files
from app.door.gate import Gate, Limits
from app.door.log import MOST_LINES, LineLimit, Tally
from app.door.rules import JOIN, READ, RUN, UPLOAD, Names, Refusal
from app.door.visitor import address_of, browser_of, network_of, new_cookie, visitor
from tests.app.door_tools import COOKIE, EVENT, FORM, LIMITS, UPLOADED, ask, echo, post


def test_what_the_page_sends_passes_and_no_page_elsewhere_may_read_it():
    answer = post(EVENT, origin="http://127.0.0.1:7860")
    assert answer.status_code == 200 and answer.json() == {"data": ["127.0.0.1"], "is_generating": False}
    assert "access-control-allow-origin" not in answer.headers
    assert ask("GET", "/").status_code == ask("HEAD", "/").status_code == 200
    assert ask("POST", UPLOAD, content=UPLOADED, headers=FORM).status_code == 200
    assert ask("POST", UPLOAD, content=UPLOADED, headers={**FORM, "cookie": "quantscope=invented"}).status_code == 403


@pytest.mark.parametrize(
    "path", ["/gradio_api/queue/status", "/gradio_api/call/", "/gradio_api/reset", "/gradio_api/mcp/sse",
             "/monitoring", "/gradio_api/deep_link", "/pwa_icon/8000",
             "/gradio_api/proxy=http://127.0.0.1", "/gradio_api/openapi.json", "/login", "/gradio_api/heartbeat/../x", "/x"]
)  # fmt: skip
def test_routes_that_the_page_does_not_use_are_closed(path):
    assert ask("GET", path).status_code == 404
    assert ask("POST", path, content=b"{}").status_code == 404
    assert ask("DELETE", "/").status_code == ask("OPTIONS", RUN).status_code == 404
    assert (
        ask("POST", "/config", content=b"{}").status_code == ask("GET", JOIN).status_code == ask("POST", READ).status_code == 404
    )


@pytest.mark.parametrize("body", ["[" * 100_000, "", "null", "[]", "{}", "{", "1" * 5000, '"\\ud800"', b"\xff\xfe"])
def test_a_body_that_is_no_event_is_refused_in_a_sentence(body):
    answer = ask("POST", RUN, content=body)
    assert answer.status_code == 400 and answer.json()["detail"].endswith((".", "it."))


@pytest.mark.parametrize(
    "change",
    [{"fn_index": 9}, {"fn_index": None}, {"fn_index": True}, {"fn_index": 1.0}, {"data": None}, {"data": ["k"]}, {"data": {}},
     {"session_hash": None}, {"session_hash": "../x"}, {"session_hash": "a" * 41}, {"batched": True}, {"simple_format": True},
     {"trigger_id": "x"}, {"event_id": "e"}, {"more": 1}, {"data": ["k", {"path": "/etc/passwd"}]}, {"data": ["k", [1]]},
     {"fn_index": 3, "data": [[[1]]]}],
    ids=str,
)  # fmt: skip
def test_an_event_of_another_form_is_refused(change):
    assert post({**EVENT, **change}).status_code == 400


def test_only_an_uploaded_file_may_be_named(tmp_path):
    file, other = tmp_path / "up" / "a.zip", tmp_path / "b.zip"
    file.parent.mkdir()
    file.write_bytes(b"PK")
    other.write_bytes(b"PK")
    events, meta = Events({2: [FILE]}, tmp_path / "up"), {"_type": "gradio.FileData"}
    upload = {**EVENT, "fn_index": 2, "data": [{"path": str(file), "meta": meta, "size": 2, "orig_name": "a.zip"}]}
    asyncio.run(events.check(json.dumps(upload).encode()))
    for bad in (
        {"path": str(other), "meta": meta},
        {"path": str(file.parent / ".." / "b.zip"), "meta": meta},
        {"path": str(file.parent / "none"), "meta": meta},
        {"path": str(file) + "\0", "meta": meta},
        {"path": str(file)},
        {"path": str(file), "meta": meta, "size": "x"},
        {"path": str(file), "meta": meta, "url": 3},
        {"path": 7, "meta": meta},
        "text",
        [],
    ):
        with pytest.raises(Refusal):
            asyncio.run(events.check(json.dumps({**upload, "data": [bad]}).encode()))


JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(),
    lambda inner: strategies.lists(inner, max_size=4) | strategies.dictionaries(strategies.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(strategies.dictionaries(strategies.sampled_from(sorted(EVENT)), JSON), JSON)
def test_no_event_is_a_fault(change, value):
    """Refused or taken, never another exception; taken ones hold plain values only."""
    for event in ({**EVENT, **change}, {**EVENT, "data": ["k", value]}, value):
        try:
            asyncio.run(LIMITS.events.check(json.dumps(event).encode()))
        except Refusal as refusal:
            assert refusal.status == 400
        else:
            assert not any(isinstance(v, dict) for v in event["data"])


def test_long_bodies_are_refused_by_their_length_and_while_they_arrive():
    async def parts():
        for _ in range(12):
            yield b"x" * 10**6

    assert ask("POST", RUN, content=b"{}", headers={"content-length": str(10**12)}).status_code == 413
    assert ask("POST", RUN, content=b"{}", headers={"content-length": "-1"}).status_code == 400
    assert ask("POST", RUN, content=parts()).status_code == 413
    assert ask("GET", "/", content=b"x").status_code == 413
    assert ask("POST", UPLOAD, content=UPLOADED, headers={**FORM, "content-length": str(10**12)}).status_code == 413
    assert ask("POST", UPLOAD, content=parts(), headers=FORM).status_code in (400, 413)


@pytest.mark.parametrize(
    "body",
    [b"", b"x", UPLOADED.replace(b'; filename="a.zip"', b""), UPLOADED.replace(b"--b--", UPLOADED), b"--b" + UPLOADED],
    ids=["empty", "text", "field", "two", "no header"],
)
def test_an_upload_is_one_file(body):
    answer = ask("POST", UPLOAD, content=body, headers=FORM)
    assert answer.status_code == (200 if body == b"" else 400)
    assert ask("POST", UPLOAD, content=UPLOADED, headers=COOKIE).status_code == 400, "no form"


def test_the_memory_for_bodies_that_arrive_is_bounded_and_given_back():
    gate = Gate(echo, LIMITS)
    gate.budget = Budget(1000)
    assert ask("POST", RUN, gate=gate, content=b"x" * 2000).status_code == 503
    assert ask("POST", RUN, gate=gate, content=b"x" * 900).status_code == 400
    assert gate.budget.used == 0 and ask("POST", RUN, gate=gate, content=json.dumps(EVENT)).status_code == 200


def test_long_headers_are_refused():
    assert ask("GET", "/", headers={"x": "a" * 33_000}).status_code == 431
    assert ask("GET", "/", headers={f"x{i}": "a" for i in range(120)}).status_code == 431


def test_one_address_has_so_many_requests_at_once_and_takes_none_from_others():
    limits = Limits(Names.of(), behind_proxy=True, requests_per_address=2)
    arrived, leave = [], asyncio.Event()

    async def slow(scope, receive, send):
        arrived.append(visitor().address)
        await leave.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def many() -> list[int]:
        transport = httpx.ASGITransport(Gate(slow, limits))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            senders = [{"x-forwarded-for": f"6.6.6.6, {who}"} for who in ("8.8.8.8",) * 4 + ("9.9.9.9",)]
            part = {"range": "bytes=0-"}  # which the gate does not answer from what it keeps
            tasks = [asyncio.create_task(client.get("/theme.css", headers=part | sender)) for sender in senders]
            while len(arrived) < 3:
                await asyncio.sleep(0.01)
            leave.set()
            return [answer.status_code for answer in await asyncio.gather(*tasks)]

    assert asyncio.run(many()) == [200, 200, 429, 429, 200] and arrived == ["8.8.8.8", "8.8.8.8", "9.9.9.9"]


def test_a_fault_is_one_line_without_its_words(caplog):
    answer = ask("GET", "/theme.css")
    assert answer.status_code == 500 and "secret" not in answer.text + caplog.text
    line = echo.__code__.co_firstlineno + 3
    assert f"ValueError in echo, line {line} of door_tools.py" in caplog.text


# -- who asks


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost", "[::1]:7860", "192.168.1.20:7860", "PAGE.example:443"])
def test_own_names_and_numbers_are_allowed(host):
    Names.of("page.example").check_host(host)


@pytest.mark.parametrize("host", ["evil.example", "", "[", "127.0.0.1.evil.example", "localhost.evil.example"])
def test_other_names_are_refused(host):
    with pytest.raises(Refusal) as refusal:
        Names.of("page.example").check_host(host)
    assert refusal.value.status == 421


def test_other_pages_are_refused():
    own, other = "http://127.0.0.1:7860", "http://evil.example"
    assert post(EVENT, origin=own).status_code == post(EVENT, origin="https://page.example").status_code == 200
    for origin in (other, "null", "", "http://127.0.0.1:3000", "https://127.0.0.1.evil.example", "file://", "http://["):
        assert post(EVENT, origin=origin).status_code == 403, origin
    assert post(EVENT, **{"sec-fetch-site": "cross-site"}).status_code == 403
    assert ask("GET", "/assets/x.js", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert ask("GET", "/", headers={"sec-fetch-site": "cross-site"}).status_code == 200, "a link to the page"


def test_addresses_behind_a_proxy_are_those_that_it_saw():
    assert address_of("10.0.0.1", "6.6.6.6, 8.8.8.8, 10.0.0.7", behind_proxy=True) == "8.8.8.8"
    assert address_of("10.0.0.1", "nonsense", behind_proxy=True) == "10.0.0.1"
    assert address_of("127.0.0.1", "8.8.8.8", behind_proxy=False) == "127.0.0.1"
    assert network_of("2001:db8:1:2:3::4") == network_of("2001:db8:1:2:ffff::1") != network_of("2001:db8:1:3::1")
    assert network_of("::ffff:8.8.8.8") == "8.8.8.8"


def test_the_cookie_is_random_hidden_from_scripts_and_read_back():
    first, second = new_cookie(embedded=False), new_cookie(embedded=True)
    value = browser_of(first.partition(";")[0])
    assert len(value) == 43 and value != browser_of(second.partition(";")[0])
    assert "HttpOnly; SameSite=Lax" in first and "HttpOnly; SameSite=None; Secure; Partitioned" in second
    assert browser_of("quantscope=short") == browser_of("a=\x01") == browser_of("") == ""


# -- files


def test_files_that_nobody_fetched_are_removed_and_there_is_room_for_a_few(tmp_path):
    own = tmp_path / "own" / "font.woff"
    own.parent.mkdir()
    own.write_bytes(b"x" * 1000)
    os.utime(own, (1, 1))
    files = Files(tmp_path)
    for n in range(UPLOADS - 1):
        (tmp_path / f"up{n}").mkdir()
        (tmp_path / f"up{n}" / "a.zip").write_bytes(b"x" * 100)
        files.check_room(100)
    (tmp_path / "up0" / "b.zip").write_bytes(b"x")
    with pytest.raises(Refusal) as full:
        files.check_room(100)
    assert full.value.status == 503 and files.tidy() == 100 * (UPLOADS - 1) + 1
    files.started_at -= 10_000
    os.utime(tmp_path / "up1" / "a.zip", (time.time() - 2000,) * 2)
    assert files.tidy() == 100 * (UPLOADS - 2) + 1 and not (tmp_path / "up1").exists() and own.exists()
    files.check_room(100)


# -- the log


def test_refusals_are_told_in_one_line_per_minute(caplog):
    tally = Tally()
    for _ in range(5000):
        tally.add("requests refused")
    assert len(caplog.records) == 1
    tally.logged_at -= 61
    tally.add("requests refused")
    assert caplog.records[1].getMessage() == "5000 requests refused"


def test_repeated_lines_stop():
    limit = LineLimit()
    record = logging.makeLogRecord
    passed = [limit.filter(record({"name": "uvicorn.error", "msg": "Invalid HTTP request received."})) for _ in range(9000)]
    assert sum(passed) == MOST_LINES and limit.filter(record({"name": "other", "msg": "text"}))
