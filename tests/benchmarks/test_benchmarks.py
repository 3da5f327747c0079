"""The benchmarks' command line: the form of its JSON, the names it takes, and the GPU script's rehearsal without a GPU."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import JOBS
from benchmarks.common import Result, absent, as_json, interleave

ROOT = Path(__file__).parents[2]
FIELDS = {"job", "ratio", "peer", "limit_fraction", "hardware", "versions", "commit", "seconds", "peak_bytes"}


def run(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_job_writes_its_results_as_json(tmp_path):
    done = run("benchmarks", "slider", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert len(results) == 3 and "limits: copy" in done.stdout
    for line in results:
        assert set(line) >= FIELDS and line["seconds"] > 0 and line["versions"]["torch"] and line["commit"]


def test_unknown_jobs_are_refused_with_the_known_ones():
    done = run("benchmarks", "C9")
    assert done.returncode == 2 and "unknown job 'C9'" in done.stderr and "reorder" in done.stderr


@pytest.mark.parametrize("name", JOBS)
def test_every_job_is_a_module_with_a_run(name):
    module = importlib.import_module(f"benchmarks.bench_{name}")
    assert callable(module.run) and module.__doc__


def test_every_job_named_in_the_documents_exists():
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "kernels").glob("*.py")):
        for names in re.findall(r"python -m benchmarks ([a-zA-Z0-9 ]+)", path.read_text()):
            for name in names.split():
                assert name in JOBS or any(name in number.split(", ") for number in JOBS.values()), f"{path.name}: {name}"


def test_peers_that_are_missing_are_lines_of_the_report():
    assert [r.peer for r in absent("job", "torch", "no_such_package")] == ["no_such_package"]
    line = as_json([Result("job", 2.0, "peer", limit_fraction=0.5)])["results"][0]
    assert line["ratio"] == 2.0 and line["limit_fraction"] == 0.5


def test_functions_take_turns():
    calls = []
    times = interleave(lambda: calls.append("a"), lambda: calls.append("b"), rounds=2)
    assert calls == ["a", "b"] * 3 and len(times) == 2


def test_the_gpu_script_rehearses_without_a_gpu(tmp_path):
    """Every kernel once in Triton's interpreter, checked against float64, and nothing claimed as measured."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the script would measure")
    done = run("benchmarks.gpu", "--json", str(tmp_path / "out.json"), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert {line["job"][:2] for line in results} == {f"G{i}" for i in range(1, 10)}
    for line in results:
        assert line["ratio"] is None and line["seconds"] is None and "not measured" in line["note"]
        for error in re.findall(r"error (\S+)", line["note"]):
            assert float(error) < 1e-5, line
