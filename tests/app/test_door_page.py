"""The door before Gradio's real page: every event, the policy for scripts, cookies, static files."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest

from app.door import install
from app.door.gate import Gate
from app.door.rules import RUN
from app.door.visitor import browser_of
from tests.app.door_tools import COOKIE, EVENT, JSON_TYPE, ask
from tests.app.tools import FAKE


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
    chosen = Settings(model="fake", workbench=FAKE, hosts=("page.example",))
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
        assert len(page.pages.pages) == 2, "one for each encoding"
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
    kept = len(page.pages.files)
    assert ask("GET", "/assets/none.js", gate=page).status_code == 404
    assert ask("GET", "/theme.css?x=1", gate=page).status_code == 200 and len(page.pages.files) == kept


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
