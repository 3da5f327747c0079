"""The results of each visitor on the server: reports and choices, never models.

A session is found by a random 256-bit key that its page holds. It keeps plain reports, and is dropped half an hour after
its page was closed, or when there are too many. Reports of public texts are the same for everyone and kept in `app.shared`;
those of pasted texts stay in their session.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from app.view.names import names_of
from core.recipe import Calibration, Clusters, QuantRecipe

KEY = re.compile(r"[\w-]{43}", re.ASCII)
"""Pattern of a session's key: 256 random bits as text."""
STOP = "stop"
"""Argument with which a visitor's Stop cancels a task; without it the task ends silently, as a newer one replaces it."""
MAX_RUNS = 12
MAX_RANGES = 4


@dataclass
class TernaryReports:
    """Reports of a ternary model. `inputs`: reports of the four projection inputs by layer."""

    tokens: int = 0
    weights: Any = None
    sparsity: Any = None
    inputs: dict[int, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """The protocol of a measurement: `text` as `resolve_text` takes it, `tokens` of it in windows of `window`."""

    text: str
    tokens: int
    window: int


@dataclass
class Run:
    """A model that can be compared: an unquantised one, or a quantised one.

    Attributes:
        key: the workbench's key: a model name, or the hash of its recipe.
        label: the full name. name: the visitor's own name for it, empty for the page's short name.
        measured: measurements (EvalReport) by how they were made, the newest last.
        ternary: its reports for the BitNet tab. state: of a local model's files, see `core.folders.state_of`.
    """

    key: str
    label: str
    recipe: QuantRecipe | None = None
    quantize: Any = None
    measured: dict[Protocol, Any] = field(default_factory=dict)
    ternary: TernaryReports = field(default_factory=TernaryReports)
    state: str | None = None
    name: str = ""

    @property
    def model(self) -> str:
        """Name of the model that was loaded, or that was quantised."""
        return self.recipe.model if self.recipe else self.key

    @property
    def evaluation(self) -> Any:
        """The newest measurement, None before the first."""
        return next(reversed(self.measured.values()), None)

    def measure(self, protocol: Protocol, report: Any) -> None:
        """Add a measurement as the newest."""
        self.measured.pop(protocol, None)
        self.measured[protocol] = report

    @property
    def is_base(self) -> bool:
        """Whether this is an unquantised model."""
        return self.recipe is None


@dataclass
class Selection:
    """The place in the model that the visitor looks at, shared by the Explore and Reorder tabs."""

    layer: int = 0
    kind: str = "down_in"
    channel: int | None = None
    clusters: Clusters = field(default_factory=lambda: Clusters.uniform(32))
    bits: int = 4
    linear: bool = False
    same_axes: bool = False
    averaged: bool = False


class Inbox:
    """Updates that one page has not fetched yet; for each component only the newest is kept."""

    def __init__(self) -> None:
        self.updates: dict[Any, Any] = {}
        self.arrived = asyncio.Event()

    def put(self, updates: dict[Any, Any]) -> None:
        """Add updates and wake the page's request."""
        self.updates.update(updates)
        if self.updates:
            self.arrived.set()

    async def take(self, seconds: float) -> dict[Any, Any]:
        """Return and remove all updates, waiting up to `seconds` for the first."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.arrived.wait()
        taken, self.updates = self.updates, {}
        self.arrived.clear()
        return taken


@dataclass
class Session:
    """One visitor's results, choices, and running tasks.

    Attributes:
        models: facts of every model opened or quantised, by name; `info` are those of the current one.
        jobs: the task that follows the running job of each kind.
        handlers: tasks of this session that may still post updates; those of `jobs` are among them.
        pages: the pages that show this session, by Gradio's name for them (`request.session_hash`); under "" updates wait
            while there is no page.
        protocol: of the newest measurements, None before the first. recipe: quantised last.
        tab: the open tab. preset: whether the page chose the method, to fit a BitNet model.
        failed: whether the status line shows an error.
    """

    key: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    touched_at: float = field(default_factory=time.monotonic)
    info: Any = None
    models: dict[str, Any] = field(default_factory=dict)
    ranges: Any = None
    calibration: Calibration | None = None
    channel: Any = None
    selection: Selection = field(default_factory=Selection)
    runs: list[Run] = field(default_factory=list)
    jobs: dict[str, asyncio.Task] = field(default_factory=dict)
    handlers: set[asyncio.Task] = field(default_factory=set)
    pages: dict[str, Inbox] = field(default_factory=dict)
    protocol: Protocol | None = None
    recipe: QuantRecipe | None = None
    tab: str = "explore"
    preset: bool = False
    failed: bool = False

    def add_run(self, run: Run) -> Run:
        """Add a run, or return the one with the same key. The oldest quantised run is dropped when there are too many."""
        for known in self.runs:
            if known.key == run.key:
                return known
        self.runs.append(run)
        if len(self.runs) > MAX_RUNS:
            self.runs.remove(next((r for r in self.runs if not r.is_base), self.runs[0]))
        return run

    def base_run(self, model: str, state: str | None) -> Run:
        """Return the run of an unquantised model; measurements from before its files changed are dropped."""
        run = self.add_run(Run(model, model, state=state))
        if run.state != state:
            run.state, run.measured, run.ternary = state, {}, TernaryReports()
        return run

    def run(self, key: object) -> Run | None:
        """Return the run of that key, or None if this session does not have it."""
        return next((r for r in self.runs if r.key == key), None)

    def title(self, run: Run) -> str:
        """Return a run's short name: what differs from other runs, and how close a BitNet model's rules are to its training."""
        name = names_of(self.runs)[self.runs.index(run)] if run in self.runs else run.label
        return " · ".join(filter(None, (name, None if run.name else self.fidelity(run))))

    def fidelity(self, run: Run) -> str | None:
        """Return the fidelity of a base model that is a BitNet model itself, else None."""
        return getattr(self.models.get(run.key), "fidelity", None) if run.is_base else None

    def post(self, updates: dict[Any, Any]) -> None:
        """Send updates to every page of this session; without one, to the page that comes next."""
        for inbox in self.pages.values() or [self.page("")]:
            inbox.put(updates)

    def page(self, name: str) -> Inbox:
        """Return the inbox of a page. A page new to this session gets what was posted when there was none."""
        if name not in self.pages:
            self.pages[name] = self.pages.pop("", None) or Inbox()
        return self.pages[name]

    @property
    def shown(self) -> bool:
        """Whether a page shows this session."""
        return any(self.pages)

    def stop(self) -> int:
        """Stop every job, at its visitor's request; return how many there were."""
        for task in self.jobs.values():
            task.cancel(STOP)
        return len(self.jobs)

    @property
    def opening(self) -> bool:
        """Whether ranges are being observed."""
        return "observe" in self.jobs

    @property
    def ternary_runs(self) -> list[Run]:
        """Runs with ternary weights, the newest first."""
        return [r for r in reversed(self.runs) if self.fidelity(r) or (r.recipe is not None and r.recipe.method == "bitnet")]


class SessionStore:
    """Sessions by key.

    A reload keeps the session: the page stores its key in the browser's `sessionStorage`, which survives a reload and
    belongs to one browser tab, and sends it to `open` when it loads. A key is only accepted while its session lives; any
    other text gives a new session with a new key, so nobody can choose a key.
    """

    def __init__(self, *, seconds: float, capacity: int) -> None:
        """Keep at most `capacity` sessions, each for `seconds` without a page."""
        self.seconds = seconds
        self.capacity = capacity
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, page: str | None = None, key: object = None) -> Session:
        """Return the living session of `key`, which a reloaded page sends, else a new and empty one.

        Args:
            page: Gradio's name for the page that shows it (`request.session_hash`).
            key: the page's stored key; anything but the key of a living session is ignored.
        """
        with self._lock:
            session = self._sessions.get(key) if isinstance(key, str) else None
            session = self._use(session or Session())
            if page:
                session.page(page)
            return session

    def get(self, key: object) -> Session:
        """Return the session of a key; one that was dropped is replaced by an empty one under the same key."""
        with self._lock:
            key = key if isinstance(key, str) and KEY.fullmatch(key) else Session().key
            return self._use(self._sessions.get(key) or Session(key))

    def close(self, page: str) -> Session | None:
        """Remove a page from its session. Returns: the session if no other page shows it."""
        with self._lock:
            session = next((s for s in self._sessions.values() if page in s.pages), None)
            if session is not None:
                del session.pages[page]
            return session if session is not None and not session.shown else None

    def __len__(self) -> int:
        return len(self._sessions)

    def _use(self, session: Session) -> Session:
        """Make a session the newest, and drop those too old or too many: working ones last, those with a page before them."""
        session.touched_at = time.monotonic()
        self._sessions[session.key] = session
        self._sessions.move_to_end(session.key)
        others = sorted(list(self._sessions.values())[:-1], key=lambda s: (bool(s.handlers), s.shown))
        excess = len(self._sessions) - self.capacity
        for place, other in enumerate(others):
            old = session.touched_at - other.touched_at > self.seconds and not (other.handlers or other.shown)
            if old or place < excess:
                del self._sessions[other.key]
        return session
