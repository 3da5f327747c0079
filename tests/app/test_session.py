"""Visitors are kept apart, forgotten in time, and share only what is public."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from app.door.visitor import VISITOR, Heartbeats, Visitor
from app.session import MAX_PAGES, MAX_RUNS, Run, Session, SessionStore
from core.errors import ResourceError
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


@contextlib.contextmanager
def asked_by(browser: str, address: str = "8.8.8.8"):
    """A request of a browser at an address."""
    token = VISITOR.set(Visitor(browser, address))
    yield
    VISITOR.reset(token)


def aged(store: SessionStore, session: Session, seconds: float) -> Session:
    """Let time pass for a session and its pages."""
    session.touched_at -= seconds
    for inbox in session.pages.values():
        inbox.made_at -= seconds
    return session


def test_a_reload_after_the_sessions_lifetime_starts_a_new_one():
    store = SessionStore(seconds=60, capacity=10)
    first = aged(store, store.open(), 61)
    assert store.sweep() == [first] and store.sweep() == []
    assert store.open("page", first.key).key != first.key


@pytest.mark.parametrize("key", [None, "", "short", "x" * 43, "x" * 5000, 7, "ö" * 43, ["a"], {}])
def test_only_opening_the_page_makes_a_session(key):
    store = SessionStore(seconds=60, capacity=3)
    with pytest.raises(ResourceError) as lost:
        store.get(key)
    assert lost.value.code == "E-SESSION" and len(store) == 0


def test_a_key_opens_nothing_for_another_browser():
    store = SessionStore(seconds=60, capacity=10)
    with asked_by("a" * 43):
        mine = store.open("page")
    for thief in ("b" * 43, ""):
        with asked_by(thief):
            with pytest.raises(ResourceError):
                store.get(mine.key)
            assert store.close("page") is None and mine.shown, "its jobs go on"
    with asked_by("b" * 43):
        assert store.open("page", mine.key) is not mine
    with asked_by("a" * 43, address="9.9.9.9"):
        assert store.get(mine.key) is mine, "a telephone changes its network"
    with asked_by(""), pytest.raises(ResourceError, match="cookie"):
        store.open("page")


def test_a_stranger_ends_nobodys_session():
    store = SessionStore(seconds=60, capacity=50, per_address=20)
    with asked_by("a" * 43):
        mine, also = store.open("page"), store.open()
    for n in range(2000):
        with asked_by(f"{n:043}", "6.6.6.6"):
            store.open()
    for n in range(2000):
        with asked_by(f"{n:043}", f"6.6.7.{n % 250}"), contextlib.suppress(ResourceError):
            store.open(f"page-{n}")
    assert len(store) == 50
    with asked_by("a" * 43):
        assert store.get(mine.key) is mine and store.get(also.key) is also


def test_who_finds_no_room_is_told_when_to_come_back():
    store = SessionStore(seconds=1800, capacity=10, per_address=3)
    with asked_by("a" * 43):
        kept = [store.open("p"), store.open("q"), store.open()]
        fourth = store.open("r")
        assert len(store) == 3 and fourth.key not in [s.key for s in kept], "the one without a page gave way"
        with pytest.raises(ResourceError, match="30 minutes"):
            store.open("s")
        assert store.get(kept[0].key) is kept[0] and store.get(kept[1].key) is kept[1]
    assert store.sweep() == [kept[2]]


def test_a_page_without_a_heartbeat_keeps_no_session():
    beats = Heartbeats()
    store = SessionStore(seconds=60, capacity=10, is_open=beats.open)
    looked_at, script = store.open("page"), store.open("other")
    with beats.beat("page"):
        for session in (looked_at, script):
            aged(store, session, 100)
        assert store.sweep() == [script] and looked_at.shown
    aged(store, looked_at, 1)
    assert store.sweep() == [looked_at]


def test_sessions_at_work_are_not_too_old():
    store = SessionStore(seconds=0, capacity=10)
    at_work = aged(store, store.open(), 100)
    at_work.handlers.add("task")
    assert store.sweep() == [] and store.get(at_work.key) is at_work


def test_the_largest_go_when_all_together_are_too_large(ranges, wide_ranges, monkeypatch):
    store = SessionStore(seconds=60, capacity=10)
    sessions = [store.open(), store.open(), store.open()]
    for session, shown in zip(sessions, (ranges, wide_ranges, ranges), strict=True):
        session.ranges = shown
    small, large = sessions[0].bytes, sessions[1].bytes
    assert 0 < small < large
    monkeypatch.setattr("app.session.PRIVATE_BYTES", small + large)
    assert store.sweep() == [], "what two sessions share counts once"
    monkeypatch.setattr("app.session.PRIVATE_BYTES", small)
    assert store.sweep() == [sessions[1]]


def test_pages_of_a_session_are_bounded():
    session = SessionStore(seconds=60, capacity=10).open()
    for n in range(500):
        session.page(str(n))
    assert len(session.pages) == MAX_PAGES and "499" in session.pages


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


def test_the_programs_of_a_browser_share_one_session_and_no_page_has_it():
    store = SessionStore(seconds=60, capacity=10)
    with asked_by("a" * 43):
        page, mine = store.open("page"), store.of_programs()
        assert store.of_programs() is mine is not page and mine.programs and not mine.shown
    with asked_by("b" * 43):
        assert store.of_programs() is not mine
    task = object()
    mine.handlers.add(task)
    aged(store, mine, 61)
    assert mine not in store.sweep(), "a call runs"
    mine.handlers.discard(task)
    assert mine in store.sweep()
