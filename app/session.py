"""What each visitor has on the server: reports and choices, never models.

A session is found by a random 256-bit key that lives in the page's `gr.State`, which Gradio keeps on the server. It
holds plain reports, is forgotten after half an hour without use, and the oldest goes first beyond the cap. Reports
of public texts are the same for everyone and shared through `SharedReports`; those of pasted texts stay in their session.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from core.recipe import Calibration, QuantRecipe

MAX_RUNS = 12
MAX_RANGES = 4


@dataclass
class TernaryReports:
    """What was read of a ternary model. `inputs`: reports of the four projection inputs by layer."""

    tokens: int = 0
    weights: Any = None
    sparsity: Any = None
    inputs: dict[int, list[Any]] = field(default_factory=dict)


@dataclass
class Run:
    """A model that can be compared: the base one or a quantised one.

    Attributes:
        key: what the workbench knows it by: a model name, or the hash of its recipe.
        evaluation: None until measured. ternary: what the BitNet tab has read of it.
        state: of a local model's files, see `core.folders.state_of`.
    """

    key: str
    label: str
    recipe: QuantRecipe | None = None
    quantize: Any = None
    evaluation: Any = None
    ternary: TernaryReports = field(default_factory=TernaryReports)
    state: str | None = None

    @property
    def model(self) -> str:
        """Name of the model it is, or was made from."""
        return self.recipe.model if self.recipe else self.key

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
    clusters: int = 32
    linear: bool = False
    same_axes: bool = False
    averaged: bool = False


@dataclass
class Session:
    """One visitor. `models`: facts of every model opened or quantised, by name; `info` are those of the one at hand."""

    key: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    touched_at: float = field(default_factory=time.monotonic)
    info: Any = None
    models: dict[str, Any] = field(default_factory=dict)
    ranges: Any = None
    calibration: Calibration | None = None
    channel: Any = None
    selection: Selection = field(default_factory=Selection)
    runs: list[Run] = field(default_factory=list)
    jobs: dict[str, str] = field(default_factory=dict)

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
            run.state, run.evaluation, run.ternary = state, None, TernaryReports()
        return run

    def run(self, key: object) -> Run | None:
        """The run of that key, if this session has it."""
        return next((r for r in self.runs if r.key == key), None)

    def title(self, run: Run) -> str:
        """A run's name in tables: its model where the session has several, and what a BitNet model's rules are worth."""
        if run.is_base:
            return " · ".join(filter(None, (run.label, self.fidelity(run))))
        return f"{run.model} · {run.label}" if len({r.model for r in self.runs}) > 1 else run.label

    def fidelity(self, run: Run) -> str | None:
        """The fidelity of a base model that is a BitNet model itself."""
        return getattr(self.models.get(run.key), "fidelity", None) if run.is_base else None

    @property
    def opening(self) -> bool:
        """Whether ranges are on their way."""
        return "observe" in self.jobs

    @property
    def ternary_runs(self) -> list[Run]:
        """Runs with ternary weights, the newest first."""
        return [r for r in reversed(self.runs) if self.fidelity(r) or (r.recipe is not None and r.recipe.method == "bitnet")]


class SessionStore:
    """Sessions by key, and by the browser tab that shows them.

    A reload keeps the session: the page stores its key in the browser's `sessionStorage`, which survives a reload and
    belongs to one browser tab, and hands it to `open` when it loads:

        stored = gr.Textbox(visible=False)
        demo.load(opened, stored, [ctx.key, stored, …], js="() => sessionStorage.getItem('quantscope')")
        stored.change(None, stored, None, js="(key) => sessionStorage.setItem('quantscope', key)")

    where `opened(key, request)` calls `open(request.session_hash, key)`, returns the session's key for `ctx.key` and
    `stored`, and draws what the session holds (`session.ranges is None` for a new one). A key is only honoured while its
    session lives; any other text gives a new session with a new key, so nobody can choose a key.
    """

    def __init__(self, *, seconds: float, capacity: int) -> None:
        self.seconds = seconds
        self.capacity = capacity
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._tabs: dict[str, str] = {}
        self._lock = threading.Lock()

    def open(self, tab: str | None = None, key: object = None) -> Session:
        """The living session of `key`, which a reloaded page remembers, else a new and empty one.

        Args:
            tab: the browser tab's own name (`request.session_hash`), for `of_tab`.
            key: what the page had stored; anything but the key of a living session is ignored.
        """
        with self._lock:
            session = self._sessions.get(key) if isinstance(key, str) else None
            session = session or Session()
            session.touched_at = time.monotonic()
            self._sessions[session.key] = session
            self._sessions.move_to_end(session.key)
            if tab:
                self._tabs[tab] = session.key
            self._sweep()
            return session

    def get(self, key: str | None) -> Session:
        """The session of a key. One forgotten meanwhile comes back empty under the same key."""
        with self._lock:
            session = self._sessions.get(key or "")
            if session is None:
                session = Session(key) if key else Session()
                self._sessions[session.key] = session
            session.touched_at = time.monotonic()
            self._sessions.move_to_end(session.key)
            self._sweep()
            return session

    def of_tab(self, tab: str) -> Session | None:
        """The session opened in that tab, if it is still known."""
        with self._lock:
            return self._sessions.get(self._tabs.get(tab, ""))

    def __len__(self) -> int:
        return len(self._sessions)

    def _sweep(self) -> None:
        limit = time.monotonic() - self.seconds
        while self._sessions:
            oldest = next(iter(self._sessions.values()))
            if len(self._sessions) <= self.capacity and oldest.touched_at >= limit:
                break
            del self._sessions[oldest.key]
        if len(self._tabs) > 2 * self.capacity:
            self._tabs = {tab: key for tab, key in self._tabs.items() if key in self._sessions}


class SharedReports:
    """Reports that are the same for everyone, by what they were made from; the least used go first."""

    def __init__(self, capacity: int = 24) -> None:
        self.capacity = capacity
        self._reports: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Any:
        """The report of that key, or None."""
        with self._lock:
            if key in self._reports:
                self._reports.move_to_end(key)
            return self._reports.get(key)

    def put(self, key: Hashable, report: Any) -> None:
        """Keep a report for everyone. The caller has checked that it holds nothing private."""
        with self._lock:
            self._reports[key] = report
            self._reports.move_to_end(key)
            while len(self._reports) > self.capacity:
                self._reports.popitem(last=False)
