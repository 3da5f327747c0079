"""The doctor: installed versions against the ranges of requirements.txt, and backends as the selection code chooses them."""

from __future__ import annotations

import importlib.metadata

import pytest
from packaging.requirements import Requirement

from app.cli import __main__ as cli
from core import doctor
from core.errors import ResourceError


def test_this_environment_is_inside_the_tested_ranges():
    """The suite runs on what the requirement files allow: anything else is a hand-made environment."""
    assert [doctor.untested(p) for p in doctor.packages() if not p.ok] == []


def test_every_package_of_the_requirements_is_checked():
    lines = [line.partition("#")[0].strip() for line in doctor.REQUIREMENTS.read_text().splitlines()]
    names = {Requirement(line).name for line in lines if line}
    assert {p.name for p in doctor.packages()} == {"python", *names}


def test_what_the_results_depend_on_has_an_upper_bound():
    bounded = {p.name for p in doctor.packages() if "<" in p.tested or "==" in p.tested}
    assert bounded == {p.name for p in doctor.packages()}


VERSIONS = [("5.13.9", False), ("5.14.0", True), ("5.24.3", True), ("5.25.0", False), (None, False)]


@pytest.mark.parametrize(("version", "ok"), VERSIONS)
def test_a_version_outside_its_range_is_named(monkeypatch, version, ok):
    real = importlib.metadata.version

    def installed(name):
        if name != "transformers":
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    found = next(p for p in doctor.packages() if p.name == "transformers")
    assert found.ok is ok and (version or "is not installed") in doctor.untested(found)
    assert ("not tested: transformers" in doctor.summary()) is not ok


def test_a_local_build_counts_as_its_version(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text(f"torch=={importlib.metadata.version('torch').partition('+')[0]}\n# a remark\n\n")
    assert [p.ok for p in doctor.packages(file)] == [True, True]


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(ResourceError, match="complete checkout"):
        doctor.packages(tmp_path / "none.txt")


def test_backends_are_those_of_the_selection_code():
    found = {b.name: b for b in doctor.backends()}
    assert found["reference"].runs and found["int8, 4-bit weights"].runs
    assert all(b.reason for b in found.values())
    assert not found["triton"].runs or "CUDA" in found["triton"].reason


def test_the_verb_prints_everything_and_ends_well(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "transformers" in out and "triton" in out and "tested" in out


def test_the_verb_ends_with_2_on_an_untested_version(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PYTHON", ">=3.99")
    assert cli.main(["doctor"]) == 2
    printed = capsys.readouterr()
    assert "NOT TESTED" in printed.out and "E-DOCTOR" in printed.err and "pip install -r requirements.txt" in printed.err
