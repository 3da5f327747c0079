"""Ends of other kinds: interruptions, faults, closed pipes, and the command line as a process of its own."""

from __future__ import annotations

import importlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from app.cli import __main__ as cli
from app.cli import output as cli_output
from tests.app.cli_tools import CALIBRATION, refused
from tests.app.job_tools import RECORDED

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (KeyboardInterrupt, 130),
        (cli.Terminated, 143),
        (MemoryError, 2),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2),
        (OSError(28, "No space left on device"), 2),
        (ZeroDivisionError("secret"), 1),
    ],
)
def test_an_interrupted_save_leaves_nothing(call, place, monkeypatch, fault, status):
    module = importlib.import_module("core.models.io.quantized")

    def torn(tensors, path):
        Path(path).write_bytes(b"half")
        raise fault

    monkeypatch.setattr(module, "save_file", torn)
    before = sorted(p.name for p in place.iterdir())
    code, out, err = call("quantize", "--model", "base", *CALIBRATION, "--out", "new", "--json", "new.json")
    kept = "Not saved" if isinstance(fault, OSError) else ""  # what a finished run has found is shown all the same
    assert code == status and kept in out and ("recipe" in out) == bool(kept)
    assert err.count("\n") == 1 and "Traceback" not in err and "secret" not in err
    assert sorted(p.name for p in place.iterdir()) == before


def test_an_interrupted_replacement_keeps_the_old_model(call, place, monkeypatch):
    module = importlib.import_module("core.models.io.quantized")
    old = (place / "made" / "quantscope.safetensors").read_bytes()

    def torn(tensors, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_file", torn)
    assert call("quantize", "--model", "base", *CALIBRATION, "--out", "made")[0] == 130
    assert (place / "made" / "quantscope.safetensors").read_bytes() == old


def test_a_fault_of_ours_is_named_by_an_id(call, monkeypatch):
    monkeypatch.setattr("core.evaluation.memory.estimate", lambda *a, **k: 1 / 0)
    argv = ["memory", "--model", "opt-13b", "--scheme", "W4A4", "--batch", "1", "--seq", "1"]
    one, two = call(*argv), call(*argv)
    assert one == two and one[0] == 1 and one[1] == "" and one[2].count("\n") == 1
    assert re.search(r"^error E-BUG: .*ZeroDivisionError.* [0-9a-f]{8} ", one[2])
    code, _, err = call(*argv, "--debug")
    assert code == 1 and "Traceback" in err and err.splitlines()[-1] == one[2].strip()


def test_json_is_whole_or_absent(call, monkeypatch):
    argv = ["memory", "--model", "opt-13b", "--scheme", "W4A4", "--batch", "1", "--seq", "1", "--json", "kept.json"]
    assert call(*argv)[0] == 0
    old = Path("kept.json").read_text()
    monkeypatch.setattr(cli_output.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "full")))
    before = sorted(os.listdir())
    code, out, err = call(*argv)
    refused((code, "", err), "E-DISK")
    assert "weights" in out, "the table is shown all the same"
    assert Path("kept.json").read_text() == old and sorted(os.listdir()) == before


def test_json_may_go_to_a_device(call):
    assert call("models", "--json", "/dev/null")[0] == 0
    assert not Path("/dev/null").is_file()


def test_help_is_on_stdout(call):
    for argv in (["--help"], ["quantize", "--help"]):
        code, out, err = call(*argv)
        assert code == 0 and err == "" and out.startswith("usage: python -m app.cli")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(terminal, monkeypatch):
    class Stream(io.StringIO):
        def isatty(self):
            return terminal

    monkeypatch.setenv("TERM", "xterm")
    now = 0.0
    stream = Stream()
    bar = cli_output.Progress(stream, clock=lambda: now)
    for step in range(41):
        now = float(step)
        bar("Layer 1 of 2: observing\x1b[2J", step / 40)
        bar("Layer 1 of 2: weights", None)
    bar.close()
    text = stream.getvalue()
    assert "\x1b[2J" not in text and "left" in text
    if terminal:
        assert text.count("\n") == 0 and text.endswith("\r\x1b[K") and "100%" in text
    else:
        assert 2 <= text.count("\n") <= 4 and "\r" not in text


@pytest.mark.parametrize("recording", RECORDED)
def test_the_command_s_remaining_time_is_right_within_a_factor_of_two(recording, monkeypatch):
    """Of quantising, the first step that is not loading, as recorded on two busy cores."""
    *reports, _ = [(at, share) for at, step, share in RECORDED[recording] if step == 1]  # saving has no share
    end = next(at for at, step, _ in RECORDED[recording] if step == 2)
    now, stream, shown = 0.0, io.StringIO(), 0
    bar = cli_output.Progress(stream, clock=lambda: now)
    monkeypatch.setattr(cli_output, "NEXT_LINE_S", 0.0)
    bar("Loading the weights", 0.2)
    for now, share in reports:
        before = len(stream.getvalue())
        bar("Layer: observing", share)
        said = re.search(r"about (\d+):(\d\d) left", stream.getvalue()[before:])
        if said and end - now > max(2.0, 0.03 * end):
            remaining, shown = 60 * int(said[1]) + int(said[2]), shown + 1
            assert (end - now) / 2 - 1 <= remaining <= 2 * (end - now) + 1
    assert shown > 10


def test_tables_align_and_defuse_control_characters():
    text = cli_output.table(["name", "size"], [["a\x1b[31m", "1"], ["bb", "1,000"]])
    lines = text.splitlines()
    assert "\x1b" not in text and lines[3].startswith("bb") and len(lines[3]) == len(lines[2]) == len(lines[1])


# as a process of its own


def spawn(*argv: str, **options) -> subprocess.Popen:
    """The command line as a user starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "app.cli", *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def test_a_reader_that_leaves_is_no_error():
    process = spawn("memory", "--model", "opt-13b", "--scheme", "W4A4", "--batch", "1", "--seq", "1")
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == cli.CLOSED_PIPE and error == b""


def test_refusal_of_a_process_and_any_locale():
    done = spawn("memory", "--model", "ßé", "--scheme", "W4A4", "--batch", "1", "--seq", "1")
    out, err = done.communicate(timeout=60)
    assert done.returncode == 2 and out == b"" and err.count(b"\n") == 1
    ascii_only = subprocess.run(
        [sys.executable, "-m", "app.cli", "memory", "--model", "opt-13b", "--scheme", "W4A4", "--batch", "1", "--seq", "1"],
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        timeout=60,
        check=False,
    )
    assert ascii_only.returncode == 0 and ascii_only.stderr == b""


def test_light_verbs_load_no_heavy_library():
    code = (
        "import sys; from app.cli import __main__ as cli; cli.main(['memory', '--model', 'opt-13b', '--scheme', 'W4A4', "
        "'--batch', '1', '--seq', '1']); sys.exit(bool({'torch', 'transformers', 'gradio', 'plotly'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=False).returncode == 0
