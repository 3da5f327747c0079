"""Events are answered as Gradio's page expects, by handlers alone; open pages are known, and closed ones told."""

from __future__ import annotations

import asyncio
import gzip
import json
from types import SimpleNamespace

import gradio as gr
import pytest

from app.door.calls import PACKED_BYTES, calls_of
from app.door.gate import Gate, Limits
from app.door.rules import Names
from app.door.visitor import Heartbeats
from app.view.chart import Chart
from app.view.figure import note

PAGE = {"type": "http", "method": "POST", "path": "/", "query_string": b"model=fake", "headers": []}


def answer(event: SimpleNamespace, data: list, *, packed: bool = False, **more: object) -> bytes:
    """Answer an event of a Blocks."""
    (call,) = calls_of({0: event}).values()
    return asyncio.run(call.answer({"data": data, "session_hash": "abc", **more}, PAGE, packed=packed))


@pytest.fixture(scope="module")
def fields() -> tuple[gr.Blocks, dict[str, object]]:
    """A component of every kind that the page changes, and a button."""
    with gr.Blocks() as demo:
        made = {
            "slider": gr.Slider(1, 64, 32),
            "dropdown": gr.Dropdown(["a", "b"]),
            "radio": gr.Radio([("one", 1), ("two", 2)], value=1),
            "many": gr.CheckboxGroup(["a", "b"]),
            "checkbox": gr.Checkbox(),
            "number": gr.Number(precision=0),
            "text": gr.Textbox(),
            "html": gr.HTML(),
            "json": gr.JSON(),
            "button": gr.Button(),
            "column": gr.Column(),
            "timer": gr.Timer(active=False),
            "chart": Chart(label="points"),
            "chart2": Chart(label="more points"),
        }
    return demo, made


UPDATES = {
    "slider": gr.update(value=7, maximum=99, label="layer"),
    "dropdown": gr.update(choices=["a", ("long", "l")], value="l"),
    "radio": gr.update(choices=[("three", 3)], value=3),
    "many": ["b"],
    "checkbox": True,
    "number": gr.update(value=None, label="channel"),
    "text": gr.update(value="x", visible=False),
    "html": "<b>x</b>",
    "json": {"name": "a.json", "text": "{}"},
    "button": gr.update(visible=True),
    "column": gr.update(visible=False),
    "timer": gr.update(active=True),
    "chart": note("hello"),
    "chart2": gr.update(value=note("hello"), visible=True),
}


@pytest.mark.parametrize("left", [(), ("slider", "html", "chart")])
def test_answers_are_gradios_own(fields, left):
    demo, made = fields
    updates = {made[name]: update for name, update in UPDATES.items() if name not in left}
    event = SimpleNamespace(fn=lambda: updates, inputs=[], inputs_as_dict=False, outputs=list(made.values()), queue=False,
                            targets=[], postprocess=True, batch=False, is_validator_function=False, name="")  # fmt: skip
    ours = json.loads(answer(event, []))
    gradios = asyncio.run(demo.postprocess_data(event, updates, None))  # it changes the updates
    plain = json.loads(json.dumps(gradios, default=lambda value: value.root))
    for update in plain:  # Gradio also lists the type of an update among the properties of HTML
        if isinstance(update, dict) and update.get("props") == {"__type__": "update"}:
            del update["props"]
    assert ours["data"] == plain and not ours["is_generating"]


def test_handlers_get_what_they_ask_for():
    seen = []
    with gr.Blocks() as demo:
        text, button, shown = gr.Textbox(), gr.Button(), gr.HTML()

        async def named(values: dict, data: gr.EventData, request: gr.Request) -> dict:
            seen.append((values, data._data, request.session_hash, request.query_params["model"]))
            return {shown: "x" * 2 * PACKED_BYTES}

        button.click(named, {text}, [text, shown], queue=False)
        button.click(lambda value: value.upper(), text, shown, queue=False)
        button.click(lambda value: {button: value}, text, shown, queue=False)
    first, second, wrong = demo.fns.values()
    packed = answer(first, ["hello"], packed=True, event_data={"index": 3})
    assert seen == [({text: "hello"}, {"index": 3}, "abc", "fake")]
    assert json.loads(gzip.decompress(packed))["data"] == [{"__type__": "update"}, "x" * 2 * PACKED_BYTES]
    assert json.loads(answer(second, ["hello"], packed=True))["data"] == ["HELLO"], "short answers are sent as they are"
    with pytest.raises(ValueError, match="not among its event's outputs"):
        answer(wrong, ["hello"])


def test_files_come_as_paths_and_go_as_links(tmp_path):
    file = tmp_path / "a.zip"
    file.write_bytes(b"PK")
    with gr.Blocks() as demo:
        taken, given = gr.UploadButton(), gr.DownloadButton()
        taken.upload(lambda path: {given: gr.update(value=path, visible=True)}, taken, given, queue=False)
    (event,) = demo.fns.values()
    (made,) = json.loads(answer(event, [{"path": str(file), "meta": {"_type": "gradio.FileData"}}]))["data"]
    assert made["visible"] and made["value"]["url"] == f"/gradio_api/file={file}" and made["value"]["orig_name"] == "a.zip"
    (gradios,) = asyncio.run(demo.postprocess_data(event, {given: gr.update(value=str(file), visible=True)}, None))
    assert set(gradios["value"]) == set(made["value"]) and gradios["value"]["meta"] == made["value"]["meta"]


@pytest.mark.parametrize("stops", [False, True])
def test_a_heartbeat_lasts_as_long_as_its_page_and_tells_its_end(stops):
    closed, sent, open_pages = [], [], Heartbeats()
    with gr.Blocks() as demo:

        async def gone(request: gr.Request) -> None:
            closed.append(request.session_hash)

        demo.unload(gone)
    calls = calls_of(demo.fns)

    async def scenario() -> None:
        leave, stopping = asyncio.Event(), asyncio.Event()
        arriving = [{"type": "http.request", "body": b""}]

        async def receive() -> dict:
            if arriving:
                return arriving.pop()
            await leave.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            sent.append(message)

        gate = Gate(None, Limits(Names.of(), calls=calls, heartbeats=open_pages), stopping=stopping)
        scope = {**PAGE, "method": "GET", "path": "/gradio_api/heartbeat/abc", "headers": [(b"host", b"localhost")]}
        task = asyncio.create_task(gate(scope, receive, send))
        while len(sent) < 2:
            await asyncio.sleep(0)
        assert open_pages.open("", "abc") and not closed
        (stopping if stops else leave).set()
        await asyncio.wait_for(task, 5)

    asyncio.run(scenario())
    assert closed == ["abc"] and not open_pages.open("", "abc") and sent[1]["body"] == b"data: ALIVE\n\n"
