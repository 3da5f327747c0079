"""The list of mutants fits the files as they are; running it is not part of the suite (`python -m tests.mutants`)."""

from __future__ import annotations

import pytest

from tests.mutants import ROOT, Mutant, read


@pytest.mark.parametrize("mutant", read(), ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place_and_its_tests_exist(mutant: Mutant):
    assert mutant.text() != (ROOT / mutant.file).read_text(encoding="utf-8")
    assert all((ROOT / path).exists() for path in mutant.tests.split())


def test_there_are_enough_and_each_is_another():
    mutants = read()
    assert len({m.name for m in mutants}) == len({(m.file, m.old, m.new) for m in mutants}) == len(mutants) >= 40
