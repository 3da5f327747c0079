"""Visitors are kept apart, forgotten in time, and share only what is public."""

from __future__ import annotations

import pytest

from app.session import MAX_RUNS, Run, SessionStore, SharedReports
from core.privacy import is_public_text
from core.recipe import QuantRecipe


def test_keys_are_long_random_and_separate():
    store = SessionStore(seconds=60, capacity=10)
    a, b = store.open("tab-a"), store.open("tab-b")
    assert a.key != b.key and len(a.key) >= 43
    a.add_run(Run("secret", "secret"))
    assert store.get(b.key).runs == [] and store.get(a.key) is a
    assert store.of_tab("tab-a") is a and store.of_tab("unknown") is None


def test_a_reloaded_tab_finds_its_session_and_nobody_chooses_a_key():
    store = SessionStore(seconds=60, capacity=10)
    first = store.open("tab-a")
    first.add_run(Run("m", "m"))
    assert store.open("tab-a-reloaded", first.key) is first
    assert store.of_tab("tab-a-reloaded") is first
    for unknown in ("x" * 43, "", None, 7, ["a"]):
        other = store.open("tab-b", unknown)
        assert other is not first and other.key != unknown and other.runs == []


def test_a_reload_after_the_sessions_lifetime_starts_a_new_one():
    store = SessionStore(seconds=0, capacity=10)
    first = store.open()
    store.open()
    assert store.open("tab", first.key).key != first.key


def test_the_oldest_goes_beyond_the_cap_and_comes_back_empty():
    store = SessionStore(seconds=60, capacity=3)
    first = store.open()
    first.add_run(Run("m", "m"))
    for _ in range(3):
        store.open()
    assert len(store) == 3
    again = store.get(first.key)
    assert again.key == first.key and again.runs == []


def test_idle_sessions_are_forgotten():
    store = SessionStore(seconds=0, capacity=10)
    first = store.open()
    store.open()
    assert store.get(first.key) is not first


def test_thousands_of_visitors_stay_within_the_cap():
    store = SessionStore(seconds=60, capacity=20)
    for i in range(5000):
        store.open(f"tab-{i}")
    assert len(store) == 20 and len(store._tabs) <= 41


def test_a_run_is_kept_once_and_base_models_outlive_old_runs():
    session = SessionStore(seconds=60, capacity=1).open()
    session.add_run(Run("base", "base"))
    for seed in range(MAX_RUNS + 5):
        recipe = QuantRecipe("base", seed=seed)
        session.add_run(Run(recipe.hash, f"run {seed}", recipe))
        session.add_run(Run(recipe.hash, "again", recipe))
    assert len(session.runs) == MAX_RUNS
    assert session.runs[0].is_base
    assert session.runs[-1].label == f"run {MAX_RUNS + 4}"


@pytest.mark.parametrize(
    ("text", "public"), [("sotu", True), ("wikitext2", True), ("text:my diary", False), ("/etc/passwd", False)]
)
def test_only_named_texts_are_public(text, public):
    assert is_public_text(text) is public


def test_shared_reports_drop_the_least_used():
    shared = SharedReports(2)
    shared.put("a", 1)
    shared.put("b", 2)
    assert shared.get("a") == 1
    shared.put("c", 3)
    assert (shared.get("a"), shared.get("b"), shared.get("c")) == (1, None, 3)


def test_a_page_without_ranges_says_whether_they_come():
    from app.tabs.explore import no_ranges
    from app.view import texts

    session = SessionStore(seconds=60, capacity=1).open()
    assert no_ranges(session)["layout"]["annotations"][0]["text"] == texts.NO_RANGES
    session.jobs["observe"] = "token"
    assert no_ranges(session)["layout"]["annotations"][0]["text"] == texts.STARTING
