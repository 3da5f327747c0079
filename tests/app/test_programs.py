"""Programs call the page's endpoints by Gradio's client, by plain requests and as tools, within the page's limits."""

from __future__ import annotations

import concurrent.futures
import json

import gradio_client
import httpx
import pytest

from benchmarks.visitors import served
from tests.app.tools import FAKE

RECIPE = {"model": "fake", "scheme": "W4A8", "clusters": {"R1": 8, "R2": 2, "R3": 2, "R4": 8, "R5": 8}}
PRIVATE = {**RECIPE, "calibration": {"text": "text:" + "my diary of secret words " * 60, "tokens": 512}}
ENDPOINTS = {"inspect", "predict", "quantize", "compare"}


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Address of a server with the fake workbench."""
    folder = tmp_path_factory.mktemp("programs")
    environment = {"QUANTSCOPE_WORKBENCH": FAKE, "QUANTSCOPE_CACHE": str(folder / "cache")}
    with served(folder / "log.txt", "--model", "fake", **environment) as (place, _):
        yield place


@pytest.fixture(scope="module")
def client(address):
    """Gradio's client; closing one takes a second."""
    made = gradio_client.Client(address, verbose=False, analytics_enabled=False)
    yield made
    made.close()


def test_exactly_the_four_endpoints_are_described(client):
    told = client.view_api(return_format="dict", print_info=False)
    assert {name.strip("/") for name in told["named_endpoints"]} == ENDPOINTS and not told["unnamed_endpoints"]
    for endpoint in told["named_endpoints"].values():
        assert len(endpoint["description"]) > 40 and endpoint["parameters"] and endpoint["returns"]
    recipe = told["named_endpoints"]["/quantize"]["parameters"][0]
    assert recipe["parameter_name"] == "recipe" and not recipe["parameter_has_default"]
    assert {"model", "scheme", "clusters", "overrides", "calibration"} <= set(recipe["type"]["properties"])


def test_each_endpoint_answers_gradios_client(client):
    seen = client.predict("fake", widest=3, api_name="/inspect")
    assert seen["model"]["name"] == "fake" and len(seen["widest"]) == 3 and seen["tokens"] == 2048 and "sites" not in seen
    sites = client.predict("fake", channels=True, api_name="/inspect")["sites"]
    assert len(sites["layers.0.attn_in"]["min"]) == 576
    cost = client.predict(RECIPE, api_name="/predict")
    assert cost["measured"]["kld"] == pytest.approx(2 * cost["predicted"]["total"]) and cost["weight_bytes"] > 0
    made = client.predict(RECIPE, api_name="/quantize")
    assert made["hash"] == cost["hash"] == made["report"]["key"] and "folder" not in made["report"]
    assert "--scheme W4A8" in made["command"] and "R5=8" in made["command"]
    both = client.predict([RECIPE, {**made["recipe"], "scheme": "W3A3KV"}], api_name="/compare")["models"]
    assert [entry["model"] for entry in both] == ["fake"] * 3 and [both[0].get("hash"), both[1]["hash"]] == [None, made["hash"]]
    base, four, three = (entry["report"]["kld_mean"] for entry in both)
    assert base is None and four < three


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [("inspect", ["nothing-like-it"], "No model is called"), ("inspect", ["fake", "/etc/passwd"], "text is '/etc/passwd'"),
     ("inspect", ["fake", "sotu", 10**9], "tokens"), ("inspect", [3], "No model was named"),
     ("inspect", ["fake", "text: "], "No text was pasted"), ("inspect", ["fake-bug"], "Something broke"),
     ("predict", [{"scheme": "W4A4"}], "names no model"), ("predict", [{**RECIPE, "bits": 4}], "bits"),
     ("quantize", [{**RECIPE, "speed": 1}], "speed"), ("quantize", [[]], "recipe"),
     ("quantize", [{**RECIPE, "calibration": {"text": "/etc/passwd"}}], "text is"),
     ("compare", [[]], "1 to 12 recipes"), ("compare", [[RECIPE] * 13], "1 to 12 recipes"), ("compare", [[3]], "recipe")],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_told_in_a_sentence(client, name, arguments, words):
    with pytest.raises(gradio_client.exceptions.AppError, match=words) as refused:
        client.predict(*arguments, api_name=f"/{name}")
    assert "E-" in str(refused.value) and "Traceback" not in str(refused.value) and "secret" not in str(refused.value)


def test_a_call_by_plain_requests(address):
    """As the API page's lines for a shell: no cookie, so that the call's name alone reads it."""
    started = httpx.post(f"{address}/gradio_api/call/v2/inspect", json={"model": "fake", "widest": 2}).json()["event_id"]
    told = httpx.get(f"{address}/gradio_api/call/inspect/{started}", timeout=120).text
    assert told.splitlines()[-3] == "event: complete" or "event: complete" in told
    (seen,) = json.loads(told.split("event: complete\ndata: ")[1])
    assert len(seen["widest"]) == 2
    assert httpx.get(f"{address}/gradio_api/call/inspect/{started}").status_code == 404, "it is read once"
    failed = httpx.post(f"{address}/gradio_api/call/inspect", json={"data": ["none"]}).json()["event_id"]
    assert "event: error" in httpx.get(f"{address}/gradio_api/call/inspect/{failed}", timeout=120).text
    for path, body in (("call/inspect", {}), ("call/inspect", {"data": [1] * 6}), ("call/v2/inspect", {"name": "fake"}),
                       ("queue/join", {"data": [], "fn_index": 0, "session_hash": "a"})):  # fmt: skip
        refused = httpx.post(f"{address}/gradio_api/{path}", json=body)
        assert 400 <= refused.status_code < 404 and refused.json()["detail"].endswith("."), path
    assert httpx.post(f"{address}/gradio_api/call/stop", json={"data": []}).status_code == 404


def test_the_pages_limits_hold_for_programs(address):
    client = gradio_client.Client(address, verbose=False, analytics_enabled=False)
    long = {"data": ["fake", "text:" + "x" * 10**7]}
    assert httpx.post(f"{address}/gradio_api/call/inspect", json=long).status_code == 413
    elsewhere = {"origin": "http://elsewhere.example"}
    assert httpx.post(f"{address}/gradio_api/call/inspect", json={"data": ["fake"]}, headers=elsewhere).status_code == 403
    calls = [client.submit({**RECIPE, "model": "fake-endless", "seed": seed}, api_name="/quantize") for seed in range(4)]
    try:
        ended = concurrent.futures.wait(calls, 60, return_when=concurrent.futures.FIRST_COMPLETED).done
        with pytest.raises(gradio_client.exceptions.AppError, match="one job running and one waiting"):
            next(iter(ended)).result()
    finally:
        for call in calls:
            call.cancel()
        client.close()


def test_strangers_do_not_read_each_others_calls(address, client):
    other = gradio_client.Client(address, verbose=False, analytics_enabled=False)
    assert client.cookies["quantscope"] != other.cookies["quantscope"]
    mine = client.predict(PRIVATE, api_name="/quantize")
    assert "diary" not in json.dumps(mine) and mine["recipe"]["calibration"]["text"].startswith("pasted:sha256=")
    with pytest.raises(gradio_client.exceptions.AppError, match="text is"):
        other.predict([mine["recipe"]], api_name="/compare")  # its name does not open it
    fields = {"fn_index": next(i for i, e in client.endpoints.items() if e.api_name == "/inspect"), "session_hash": "shared-name"}
    join = {"data": ["fake", "sotu", 512, 1, False], **fields}
    cookie = {"cookie": f"quantscope={client.cookies['quantscope']}"}
    stolen = {"cookie": f"quantscope={other.cookies['quantscope']}"}
    assert httpx.post(f"{address}/gradio_api/queue/join", json=join, headers=cookie).status_code == 200
    place = f"{address}/gradio_api/queue/data?session_hash=shared-name"
    assert httpx.get(place, headers=stolen).status_code == httpx.get(place).status_code == 404
    assert '"success": true' in httpx.get(place, headers=cookie, timeout=60).text


def test_a_program_that_goes_away_ends_its_calls(address, client):
    """The endless job of a reader who left is stopped, so the next call of the line gets its turn."""
    started = httpx.post(f"{address}/gradio_api/call/predict", json={"data": [{"model": "fake-endless"}]}).json()["event_id"]
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{address}/gradio_api/call/predict/{started}", timeout=3)
    assert client.predict(RECIPE, api_name="/predict")["hash"]


def speak(address: str, method: str, **params: object) -> dict:
    message = {"jsonrpc": "2.0", "id": 7, "method": method, "params": params}
    answer = httpx.post(f"{address}/gradio_api/mcp", json=message, timeout=120)
    assert answer.status_code == 200 and answer.json()["id"] == 7
    return answer.json()


def test_the_endpoints_are_tools_of_mcp(address):
    begun = speak(address, "initialize", protocolVersion="2025-06-18", capabilities={}, clientInfo={"name": "t", "version": "1"})
    assert begun["result"]["protocolVersion"] == "2025-06-18" and "tools" in begun["result"]["capabilities"]
    note = httpx.post(f"{address}/gradio_api/mcp", json={"jsonrpc": "2.0", "method": "notifications/initialized"})
    assert note.status_code == 202 and not note.content and httpx.get(f"{address}/gradio_api/mcp").status_code == 405
    tools = {tool["name"]: tool for tool in speak(address, "tools/list")["result"]["tools"]}
    assert set(tools) == ENDPOINTS and tools["predict"]["inputSchema"]["required"] == ["recipe"]
    assert "Args:" in tools["inspect"]["description"]
    done = speak(address, "tools/call", name="inspect", arguments={"model": "fake", "widest": 1})["result"]
    assert not done["isError"] and json.loads(done["content"][0]["text"]) == done["structuredContent"]
    failed = speak(address, "tools/call", name="inspect", arguments={"model": "none"})["result"]
    assert failed["isError"] and "No model is called" in failed["content"][0]["text"]
    assert speak(address, "tools/call", name="rm", arguments={})["error"]["code"] == -32602
    assert speak(address, "tools/call", name="inspect", arguments={"path": "x"})["result"]["isError"]
    assert speak(address, "resources/list")["error"]["code"] == -32601 and speak(address, "ping")["result"] == {}
