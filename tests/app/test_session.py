"""Visitors are kept apart, forgotten in time, and share only what is public."""

from __future__ import annotations

import asyncio

import pytest

from app.session import MAX_RUNS, Run, SessionStore
from core.privacy import is_public_text
from core.recipe import QuantRecipe


def test_keys_are_long_random_and_separate():
    store = SessionStore(seconds=60, capacity=10)
    a, b = store.open("page-a"), store.open("page-b")
    assert a.key != b.key and len(a.key) == 43
    a.add_run(Run("secret", "secret"))
    assert store.get(b.key).runs == [] and store.get(a.key) is a


def test_a_reloaded_page_finds_its_session_and_nobody_chooses_a_key():
    store = SessionStore(seconds=60, capacity=10)
    first = store.open("page")
    first.add_run(Run("m", "m"))
    assert store.open("reloaded", first.key) is first
    assert store.close("page") is None, "another page shows it"
    assert store.close("reloaded") is first and store.close("unknown") is None
    for unknown in ("x" * 43, "", None, 7, ["a"]):
        other = store.open("other", unknown)
        assert other is not first and other.key != unknown and other.runs == []


def test_a_reload_after_the_sessions_lifetime_starts_a_new_one():
    store = SessionStore(seconds=0, capacity=10)
    first = store.open()
    store.open()
    assert store.open("page", first.key).key != first.key


def test_the_oldest_goes_beyond_the_cap_and_comes_back_empty():
    store = SessionStore(seconds=60, capacity=3)
    first = store.open()
    first.add_run(Run("m", "m"))
    for _ in range(3):
        store.open()
    assert len(store) == 3
    again = store.get(first.key)
    assert again.key == first.key and again.runs == []


@pytest.mark.parametrize("key", [None, "", "short", "x" * 5000, 7, "ö" * 43])
def test_a_key_of_another_form_is_not_kept(key):
    store = SessionStore(seconds=60, capacity=3)
    assert store.get(key).key != key and len(store.get(key).key) == 43


def test_sessions_at_work_or_on_a_page_go_last():
    store = SessionStore(seconds=60, capacity=3)
    at_work, on_page = store.open(), store.open("page")
    at_work.handlers.add("task")
    for _ in range(5):
        store.open()
    assert store.get(at_work.key) is at_work and store.get(on_page.key) is on_page and len(store) == 3


def test_only_idle_sessions_without_a_page_are_forgotten_with_time():
    store = SessionStore(seconds=0, capacity=10)
    alone, on_page = store.open(), store.open("page")
    store.open()
    assert store.get(alone.key) is not alone and store.get(on_page.key) is on_page


def test_thousands_of_visitors_stay_within_the_cap():
    store = SessionStore(seconds=60, capacity=20)
    for i in range(2000):
        store.open(f"page-{i}")
    assert len(store) == 20


def test_what_is_posted_without_a_page_waits_for_one():
    session = SessionStore(seconds=60, capacity=1).open()
    session.post({"chart": 1, "status": "old"})
    session.post({"status": "new"})
    assert asyncio.run(session.page("page").take(0)) == {"chart": 1, "status": "new"}
    session.post({"chart": 2})
    assert asyncio.run(session.page("page").take(0)) == {"chart": 2}
    assert asyncio.run(session.page("page").take(0)) == {}


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


def test_a_page_without_ranges_says_whether_they_come():
    from app.tabs.explore import no_ranges
    from app.view import texts

    session = SessionStore(seconds=60, capacity=1).open()
    assert no_ranges(session)["layout"]["annotations"][0]["text"] == texts.NO_RANGES
    session.jobs["observe"] = "task"
    assert no_ranges(session)["layout"]["annotations"][0]["text"] == texts.STARTING
