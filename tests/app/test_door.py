"""The door: what is refused before Gradio sees it, and that what the page sends passes."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
import uvicorn
from hypothesis import given, settings, strategies

from app.door import connections, install
from app.door.bodies import EVENT_BYTES, FILE, MANY, ONE, Budget, Events
from app.door.connections import Connections
from app.door.files import UPLOADS, Files
from app.door.gate import Gate, Limits
from app.door.log import MOST_LINES, LineLimit, Tally
from app.door.rules import RUN, UPLOAD, Names, Refusal
from app.door.visitor import address_of, browser_of, network_of, new_cookie, visitor

EVENT = {"data": ["k", 3], "fn_index": 1, "session_hash": "abc", "trigger_id": None, "event_data": None}
LIMITS = Limits(Names.of("page.example"), upload_bytes=1000, events=Events({1: [ONE, ONE], 2: [FILE], 3: [MANY]}))
UPLOADED = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.zip"\r\n\r\nPK\r\n--b--\r\n'
JSON_TYPE = {"content-type": "application/json"}
COOKIE = {"cookie": "quantscope=" + "c" * 43}
FORM = {"content-type": "multipart/form-data; boundary=b", **COOKIE}


async def echo(scope, receive, send):
    """Answer with the body's length, the sender, and a header that lets every page read it."""
    if scope["path"] == "/theme.css":
        raise ValueError("secret words")
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    headers = [(b"access-control-allow-origin", b"*"), (b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": f"{len(body)} {visitor().address}".encode()})


def ask(method: str, path: str, *, gate: Gate | None = None, **options) -> httpx.Response:
    """Send one request through a gate, without a server."""

    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(gate or Gate(echo, LIMITS))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:7860") as client:
            return await client.request(method, path, **options)

    return asyncio.run(asked())


def post(body: object, **headers: str) -> httpx.Response:
    """Send one event through the gate."""
    return ask("POST", RUN, content=json.dumps(body), headers=headers)


def test_what_the_page_sends_passes_and_no_page_elsewhere_may_read_it():
    answer = post(EVENT, origin="http://127.0.0.1:7860")
    assert answer.status_code == 200 and answer.text.split()[0] == str(len(json.dumps(EVENT)))
    assert "access-control-allow-origin" not in answer.headers
    assert ask("GET", "/").status_code == ask("HEAD", "/").status_code == 200
    assert ask("POST", UPLOAD, content=UPLOADED, headers=FORM).status_code == 200
    assert ask("POST", UPLOAD, content=UPLOADED, headers={**FORM, "cookie": "quantscope=invented"}).status_code == 403


@pytest.mark.parametrize(
    "path", ["/config", "/gradio_api/info", "/gradio_api/queue/data", "/monitoring", "/gradio_api/deep_link", "/pwa_icon/8000",
             "/gradio_api/proxy=http://127.0.0.1", "/gradio_api/openapi.json", "/login", "/gradio_api/heartbeat/../x", "/x"]
)  # fmt: skip
def test_routes_that_the_page_does_not_use_are_closed(path):
    assert ask("GET", path).status_code == 404
    assert ask("POST", path, content=b"{}").status_code == 404
    assert ask("DELETE", "/").status_code == ask("OPTIONS", RUN).status_code == 404


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
        await echo(scope, receive, send)

    async def many() -> list[int]:
        transport = httpx.ASGITransport(Gate(slow, limits))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            ask = [client.get("/", headers={"x-forwarded-for": f"6.6.6.6, {who}"}) for who in ("8.8.8.8",) * 4 + ("9.9.9.9",)]
            tasks = [asyncio.create_task(one) for one in ask]
            while len(arrived) < 3:
                await asyncio.sleep(0.01)
            leave.set()
            return [answer.status_code for answer in await asyncio.gather(*tasks)]

    assert asyncio.run(many()) == [200, 200, 429, 429, 200] and arrived == ["8.8.8.8", "8.8.8.8", "9.9.9.9"]


def test_a_fault_is_one_line_without_its_words(caplog):
    answer = ask("GET", "/theme.css")
    assert answer.status_code == 500 and "secret" not in answer.text + caplog.text and "ValueError" in caplog.text


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


# -- connections


@pytest.fixture
def served(monkeypatch) -> Iterator[tuple[int, Connections]]:
    """Port and connections of a server with six places, four for one address, and short times."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(connections, "REST_SECONDS", 0.7)
    table = Connections(most=6, most_per_address=4, is_proxy=lambda peer: peer == "127.0.0.1")
    config = uvicorn.Config(Gate(echo, LIMITS), port=0, log_level="error", lifespan="off")
    config.load()
    config.http_protocol_class = table.guarded(config.http_protocol_class)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1], table
    server.should_exit = True
    thread.join(10)


def connect(port: int, start: bytes = b"", source: str = "127.0.0.1") -> socket.socket:
    """Open a connection and send the start of a request."""
    opened = socket.create_connection(("127.0.0.1", port), 5, source_address=(source, 0))
    opened.sendall(start)
    return opened


HALF = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"


def answer_of(connection: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""
    data = b""
    try:
        while part := connection.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def test_a_head_that_does_not_come_is_given_up(served):
    port, table = served
    for start in (b"", HALF, HALF + b"\r\n" + b"GET"):
        answer = answer_of(connect(port, start))
        assert b"408" in answer, start
    assert not table.all and not table.waiting and not table.resting and not table.per_address


def test_a_head_without_end_is_refused(served):
    assert b"431" in answer_of(connect(served[0], HALF + b"x: " + b"a" * 40_000))


def test_half_open_connections_give_way_to_requests(served):
    port, table = served
    slow = [connect(port, HALF) for _ in range(30)]
    with httpx.Client() as client:
        assert client.get(f"http://127.0.0.1:{port}/").text == "0 127.0.0.1"
        assert len(table.all) <= 6
        assert client.get(f"http://127.0.0.1:{port}/").status_code == 200, "on the same connection"
    for one in slow:
        one.close()


def test_one_address_has_so_many_connections(served):
    port, table = served
    first = [connect(port, HALF, "127.0.0.2") for _ in range(4)]
    assert answer_of(connect(port, b"", "127.0.0.2")) == b"", "closed at once"
    assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
    assert table.per_address["127.0.0.2"] == 4
    for one in first:
        one.close()


def test_a_large_body_is_refused_without_being_read(served):
    opened = connect(served[0], f"POST {RUN} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {EVENT_BYTES + 1}\r\n\r\n".encode())
    assert answer_of(opened).startswith(b"HTTP/1.1 413")


def test_a_file_that_is_too_long_is_refused_while_it_arrives(served):
    body = UPLOADED.replace(b"PK", b"PK" * 50_000)
    answer = httpx.post(f"http://127.0.0.1:{served[0]}{UPLOAD}", content=iter([body[:70], body[70:]]), headers=FORM)
    assert answer.status_code == 413 and "MB" in answer.json()["detail"]


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


# -- Gradio behind it


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Iterator[Gate]:
    """The gate around the real page, with fake workers that are never started."""
    from app.context import Context
    from app.page import build_app
    from app.session import SessionStore
    from app.settings import Settings
    from app.worker.client import Workers

    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
    patch.setattr("app.context.REST_SECONDS", 0.01)
    patch.setattr("app.context.NEWS_SECONDS", 0.01)
    patch.setattr("app.page.FIRST_SECONDS", 0.01)
    chosen = Settings(model="fake", workbench="tests.app.fake_workbench:FakeWorkbench", hosts=("page.example",))
    ctx = Context(chosen, Workers(chosen), SessionStore(seconds=60, capacity=10))
    demo = build_app(ctx)
    demo.queue(max_size=512, api_open=False)
    demo.launch(prevent_thread_lock=True, quiet=True, share=False, run_history=False, server_name="127.0.0.1")
    yield Gate(demo.app, install.limits(chosen, "127.0.0.1", demo, ctx.heartbeats))
    demo.close(verbose=False)
    ctx.workers.close()
    patch.undo()


def test_no_malformed_event_reaches_a_traceback(page, capfd):
    """Every event of the page with values of every kind: answered, without a fault, a traceback, or the file it names."""
    values = [None, -1, 1e308, "x", "", [], [1], True, "\ud800", "a" * 3000]
    statuses = set()
    with httpx.Client(transport=_Threaded(page), base_url="http://127.0.0.1") as client:
        for index, inputs in page.limits.events.inputs.items():
            for place, value in enumerate(values):
                data = [values[(place + i) % len(values)] if i else value for i in range(len(inputs))]
                event = {**EVENT, "fn_index": index, "data": data, "event_data": value}
                statuses.add(client.post(RUN, content=json.dumps(event), headers={**JSON_TYPE, **COOKIE}).status_code)
    said = capfd.readouterr()
    assert statuses == {200, 400} and "Traceback" not in said.out + said.err


def test_the_page_allows_its_own_scripts_only(page):
    with httpx.Client(transport=_Threaded(page), base_url="http://127.0.0.1") as client:
        first, second = client.get("/"), client.get("/?model=x", headers={"accept-encoding": "identity"})
        policy = first.headers["content-security-policy"]
        inline = re.findall(r"<script(?![^>]* src=)[^>]*>(.*?)</script>", second.text, re.DOTALL)
        assert len(inline) >= 4 and first.text == second.text and policy == second.headers["content-security-policy"]
        for script in inline:
            assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
        directives = dict(part.split(" ", 1) for part in policy.split("; "))
        assert directives["default-src"] == directives["frame-ancestors"] == "'none'"
        assert "unsafe-inline" not in directives["script-src"]
        assert set(" ".join(directives.values()).split()) <= {
            "'none'", "'self'", "data:", "blob:", "'unsafe-eval'", "'unsafe-inline'", *directives["script-src"].split()
        }, "nothing of other servers"  # fmt: skip
        style = client.get("/theme.css")
        for answer in (first, style, client.get("/x"), client.get("/gradio_api/file=/etc/passwd")):
            assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["referrer-policy"] == "same-origin"
        assert "sandbox" in style.headers["content-security-policy"] and client.get("/gradio_api/file=/etc/passwd").is_error


def test_a_space_may_be_shown_by_hugging_face_and_by_nobody_else(page):
    gate = Gate(page.app, replace(page.limits, behind_proxy=True, frames=install.FRAMES))
    answer = ask("GET", "/", gate=gate)
    assert answer.headers["content-security-policy"].endswith("frame-ancestors 'self' https://huggingface.co")
    assert "SameSite=None; Secure; Partitioned" in answer.headers["set-cookie"] and "x-frame-options" not in answer.headers


def test_opening_the_page_gives_a_cookie_once(page):
    first = ask("GET", "/", gate=page)
    value = browser_of(first.headers["set-cookie"].partition(";")[0])
    again = ask("GET", "/", gate=page, headers={"cookie": f"quantscope={value}"})
    assert len(value) == 43 and "set-cookie" not in again.headers and browser_of(ask("GET", "/").headers["set-cookie"]) != value


def test_static_files_are_kept_once_and_are_gradios_own(page):
    plain = httpx.ASGITransport(page.app)

    async def direct(path: str) -> bytes:
        async with httpx.AsyncClient(transport=plain, base_url="http://127.0.0.1") as client:
            return (await client.get(path)).content

    script = re.search(r"assets/index-[\w-]+\.js", ask("GET", "/", gate=page).text)[0]
    for path in ("/theme.css", f"/{script}"):
        for coding in ("br", "gzip", "identity"):
            answer = ask("GET", path, gate=page, headers={"accept-encoding": coding})
            assert answer.content == asyncio.run(direct(path)) and "max-age" in answer.headers["cache-control"]
            assert ask("HEAD", path, gate=page, headers={"accept-encoding": coding}).headers == answer.headers
    kept = len(page.pages.kept)
    assert ask("GET", "/assets/none.js", gate=page).status_code == 404
    assert ask("GET", "/theme.css?x=1", gate=page).status_code == 200 and len(page.pages.kept) == kept


def test_a_name_that_the_page_would_call_itself_is_checked(page):
    assert ask("GET", "/", gate=page, headers={"x-forwarded-host": "evil.example"}).status_code == 421
    answer = ask("GET", "/", gate=page, headers={"host": "page.example", "x-forwarded-proto": "https"})
    assert "https://page.example" in answer.text


class _Threaded(httpx.BaseTransport):
    """Requests of a plain client, answered on one event loop."""

    def __init__(self, app: Gate) -> None:
        self.inner, self.loop = httpx.ASGITransport(app), asyncio.Runner()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        async def answered() -> httpx.Response:
            sent = httpx.Request(request.method, request.url, headers=request.headers, content=request.read())
            answer = await self.inner.handle_async_request(sent)
            headers = {n: v for n, v in answer.headers.items() if n != "content-encoding"}
            return httpx.Response(answer.status_code, headers=headers, content=await answer.aread())

        return self.loop.run(answered())

    def close(self) -> None:
        self.loop.close()
