"""What each visitor has on the server: reports and choices, never models.

A session is found by a random 256-bit key that its page holds. It keeps plain reports, and is forgotten half an hour after
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
"""What a session's key looks like: 256 random bits as text."""
STOP = "stop"
"""What a task is told when its visitor stops it; a task cancelled without it is silent, for something newer takes its place."""
MAX_RUNS = 12
MAX_RANGES = 4


@dataclass
class TernaryReports:
    """What was read of a ternary model. `inputs`: reports of the four projection inputs by layer."""

    tokens: int = 0
    weights: Any = None
    sparsity: Any = None
    inputs: dict[int, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Protocol:
    """How a model is measured: `text` as `resolve_text` takes it, `tokens` of it in windows of `window`."""

    text: str
    tokens: int
    window: int


@dataclass
class Run:
    """A model that can be compared: an unquantised one, or a quantised one.

    Attributes:
        key: what the workbench knows it by: a model name, or the hash of its recipe.
        label: the name in full. name: what the visitor calls it, empty for the page's own short name.
        measured: measurements (EvalReport) by how they were made, the newest last.
        ternary: what the BitNet tab has read of it. state: of a local model's files, see `core.folders.state_of`.
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
        """Name of the model it is, or was made from."""
        return self.recipe.model if self.recipe else self.key

    @property
    def evaluation(self) -> Any:
        """The newest measurement, None before the first."""
        return next(reversed(self.measured.values()), None)

    def measure(self, protocol: Protocol, report: Any) -> None:
        """Keep a measurement as the newest."""
        self.measured.pop(protocol, None)
        self.measured[protocol] = report

    @property
    def is_base(self) -> bool:
        """Whether this is an unquantised model."""
        return self.recipe is None


@dataclass
class Selection:
    """Where in the model the visitor looks, shared by the Explore and Reorder tabs."""

    layer: int = 0
    kind: str = "down_in"
    channel: int | None = None
    clusters: Clusters = field(default_factory=lambda: Clusters.uniform(32))
    bits: int = 4
    linear: bool = False
    same_axes: bool = False
    averaged: bool = False


class Inbox:
    """Updates that one page has not fetched yet: of each component only the newest."""

    def __init__(self) -> None:
        self.updates: dict[Any, Any] = {}
        self.arrived = asyncio.Event()

    def put(self, updates: dict[Any, Any]) -> None:
        """Add updates and wake who waits for them."""
        self.updates.update(updates)
        if self.updates:
            self.arrived.set()

    async def take(self, seconds: float) -> dict[Any, Any]:
        """Take everything out, waiting up to `seconds` for the first update."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.arrived.wait()
        taken, self.updates = self.updates, {}
        self.arrived.clear()
        return taken


@dataclass
class Session:
    """One visitor.

    Attributes:
        models: facts of every model opened or quantised, by name; `info` are those of the one at hand.
        jobs: the task that follows the running job of each kind.
        handlers: tasks of this session that still have something to show; those of `jobs` are among them.
        pages: the pages that show this session, by Gradio's name for them (`request.session_hash`); under "" what waits for
            a page while there is none.
        protocol: how the newest measurements were made, None before the first. recipe: what was quantised last.
        tab: the tab that is open. preset: whether the page chose the method, to fit a BitNet model.
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
        """Keep a run, or return the one with the same key. The oldest quantised run goes when there are too many."""
        for known in self.runs:
            if known.key == run.key:
                return known
        self.runs.append(run)
        if len(self.runs) > MAX_RUNS:
            self.runs.remove(next((r for r in self.runs if not r.is_base), self.runs[0]))
        return run

    def base_run(self, model: str, state: str | None) -> Run:
        """The run of an unquantised model; what was measured before its files changed is forgotten."""
        run = self.add_run(Run(model, model, state=state))
        if run.state != state:
            run.state, run.measured, run.ternary = state, {}, TernaryReports()
        return run

    def run(self, key: object) -> Run | None:
        """The run of that key, if this session has it."""
        return next((r for r in self.runs if r.key == key), None)

    def title(self, run: Run) -> str:
        """A run's short name: what differs from the other runs, and what the rules of a BitNet model are worth."""
        name = names_of(self.runs)[self.runs.index(run)] if run in self.runs else run.label
        return " · ".join(filter(None, (name, None if run.name else self.fidelity(run))))

    def fidelity(self, run: Run) -> str | None:
        """The fidelity of a base model that is a BitNet model itself."""
        return getattr(self.models.get(run.key), "fidelity", None) if run.is_base else None

    def post(self, updates: dict[Any, Any]) -> None:
        """Show updates on every page of this session; without one, on the page that comes next."""
        for inbox in self.pages.values() or [self.page("")]:
            inbox.put(updates)

    def page(self, name: str) -> Inbox:
        """The inbox of a page. A page new to this session gets what was posted when there was none."""
        if name not in self.pages:
            self.pages[name] = self.pages.pop("", None) or Inbox()
        return self.pages[name]

    @property
    def shown(self) -> bool:
        """Whether a page shows this session."""
        return any(self.pages)

    def stop(self) -> int:
        """Stop every job, as its visitor asked; returns how many there were."""
        for task in self.jobs.values():
            task.cancel(STOP)
        return len(self.jobs)

    @property
    def opening(self) -> bool:
        """Whether ranges are on their way."""
        return "observe" in self.jobs

    @property
    def ternary_runs(self) -> list[Run]:
        """Runs with ternary weights, the newest first."""
        return [r for r in reversed(self.runs) if self.fidelity(r) or (r.recipe is not None and r.recipe.method == "bitnet")]


class SessionStore:
    """Sessions by key.

    A reload keeps the session: the page stores its key in the browser's `sessionStorage`, which survives a reload and
    belongs to one browser tab, and hands it to `open` when it loads. A key is only honoured while its session lives; any
    other text gives a new session with a new key, so nobody can choose a key.
    """

    def __init__(self, *, seconds: float, capacity: int) -> None:
        """`seconds`: how long a session is kept without a page; `capacity`: how many are kept."""
        self.seconds = seconds
        self.capacity = capacity
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, page: str | None = None, key: object = None) -> Session:
        """The living session of `key`, which a reloaded page remembers, else a new and empty one.

        Args:
            page: Gradio's name for the page that shows it (`request.session_hash`).
            key: what the page had stored; anything but the key of a living session is ignored.
        """
        with self._lock:
            session = self._sessions.get(key) if isinstance(key, str) else None
            session = self._use(session or Session())
            if page:
                session.page(page)
            return session

    def get(self, key: object) -> Session:
        """The session of a key. One forgotten meanwhile comes back empty under the same key."""
        with self._lock:
            key = key if isinstance(key, str) and KEY.fullmatch(key) else Session().key
            return self._use(self._sessions.get(key) or Session(key))

    def close(self, page: str) -> Session | None:
        """Note that a page is gone. Returns its session if no other page shows it."""
        with self._lock:
            session = next((s for s in self._sessions.values() if page in s.pages), None)
            if session is not None:
                del session.pages[page]
            return session if session is not None and not session.shown else None

    def __len__(self) -> int:
        return len(self._sessions)

    def _use(self, session: Session) -> Session:
        """Make a session the newest, and forget those too old or too many: sessions at work go last, then those on a page."""
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
