"""The results of each visitor on the server: reports and choices, never models.

A session is found by a random 256-bit key that its page holds, and only for the browser whose cookie it was made with: a key that
somebody else sees opens nothing. It keeps plain reports, and is dropped half an hour after its page was closed. Reports of public
texts are the same for everyone and kept in `app.shared`; those of pasted texts stay in their session.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from typing import Any

from app.door.visitor import visitor
from app.inbox import Inbox
from app.runs import Protocol, Run, TernaryReports
from app.view import texts
from app.view.names import names_of
from core.errors import ResourceError
from core.recipe import Calibration, Clusters, QuantRecipe

LOST = "E-SESSION"
"""Code of the error for a session that has ended: the page shows it and starts anew."""
STOP = "stop"
"""Argument with which a visitor's Stop cancels a task; without it the task ends silently, as a newer one replaces it."""
MAX_RUNS = 12
MAX_PAGES = 16
"""Pages of one session: a reload makes a new one before the old one is closed."""
OPENING_SECONDS = 60.0
"""Time in which a page must have opened its heartbeat; without one, nobody looks at it."""
FEW = 4
"""Sessions that an address keeps whatever others do."""
PRIVATE_BYTES = 512 * 1024**2
"""Bytes of observed ranges that all sessions may keep; beyond it the largest sessions are dropped."""


@dataclass
class Selection:
    """The place in the model that the visitor looks at, shared by the Explore and Reorder tabs; `everywhere`: in all layers;
    `basis`: a name of `app.view.texts_bases.VIEWS`."""

    layer: int = 0
    kind: str = "down_in"
    channel: int | None = None
    clusters: Clusters = field(default_factory=lambda: Clusters.uniform(32))
    bits: int = 4
    linear: bool = False
    same_axes: bool = False
    averaged: bool = False
    basis: str = "original"
    everywhere: bool = False

    @property
    def key(self) -> tuple:
        """All choices, as a key of what is drawn by them."""
        return astuple(self)


@dataclass
class Costs:
    """What is known of the cost of one recipe.

    Attributes:
        probe: facts of the probe. predicted: the prediction. measured: of all parts at once. swaps: of parts alone, by name.
        control: the largest divergence measured with nothing swapped, nats; 0 unless something is wrong.
        estimate: what a run will take.
    """

    recipe: QuantRecipe | None = None
    probe: Any = None
    predicted: Any = None
    measured: Any = None
    swaps: dict[str, Any] = field(default_factory=dict)
    control: float = 0.0
    estimate: Any = None


@dataclass
class Session:
    """One visitor's results, choices, and running tasks.

    Attributes:
        browser, address: whose session it is, see `app.door.visitor`.
        models: facts of every model opened or quantised, by name; `info` are those of the current one.
        bases: `ranges` in every basis (RangesReport by name), None until a visitor asks for them.
        jobs: the task that follows the running job of each kind.
        handlers: tasks of this session that may still post updates; those of `jobs` are among them.
        pages: the pages that show this session, by Gradio's name for them (`request.session_hash`); under "" updates wait
            while there is no page.
        protocol: of the newest measurements, None before the first. recipe: quantised last.
        tab: the open tab. grid: drawn over the chosen channel. preset: whether the page chose the method, to fit a BitNet model.
        curve, compared, spent, reading: the last results of `app.tabs.reorder`, `.calibrations`, `.autopilot` and `.tokens`.
        size: bytes that the Pareto chart compares, a field of EvalReport.
        link: what the address of its page says, as keys and values. programs: whether it belongs to programs, and has no page.
        failed: time of the error on the status line, else 0. held: whether it stays, as a link's, until another tab is chosen.
        owner: whether a worker did a job for it alone, and may keep its models.
    """

    key: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    browser: str = field(default_factory=lambda: visitor().browser)
    address: str = field(default_factory=lambda: visitor().address)
    touched_at: float = field(default_factory=time.monotonic)
    info: Any = None
    models: dict[str, Any] = field(default_factory=dict)
    ranges: Any = None
    bases: Any = None
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
    grid: str = "tensor"
    costs: Costs = field(default_factory=Costs)
    curve: tuple[Any, Any] = (None, None)
    compared: Any = None
    spent: Any = None
    reading: Any = None
    size: str = "weight_bytes"
    preset: bool = False
    link: dict[str, str] = field(default_factory=dict)
    programs: bool = False
    failed: float = 0.0
    held: bool = False
    owner: bool = False

    def add_run(self, run: Run) -> Run:
        """Add a run, or return the one with the same key. The oldest quantised run is dropped when there are too many."""
        if (known := self.run(run.key)) is not None:
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
            if len(self.pages) > MAX_PAGES:
                del self.pages[next(iter(self.pages))]
        return self.pages[name]

    @property
    def bytes(self) -> int:
        """Bytes of the session's observed ranges, which are nearly all that it keeps."""
        reports = (self.ranges, *(self.bases or {}).values())
        sites = [site for report in reports for site in getattr(report, "sites", {}).values()]
        return sum(getattr(value, "nbytes", 0) for site in sites for value in vars(site).values())

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

    Only opening the page makes a session. A reload keeps it: the page stores its key in the browser's `sessionStorage`, which
    survives a reload and belongs to one browser tab, and sends it to `open` when it loads. A key is only accepted while its
    session lives and from the browser that it was made for; any other gives a new session with a new key.

    A session ends when it was idle too long without a page, or is the largest when all together are too large. When an address
    has too many, its own oldest one without a page gives way, so that nobody loses a session by what strangers do.
    """

    def __init__(
        self,
        *,
        seconds: float,
        capacity: int,
        per_address: int = 40,
        is_open: Callable[[str, str], bool] = lambda browser, page: True,
    ) -> None:
        """Keep at most `capacity` sessions, `per_address` of them for one address, each for `seconds` without a page.

        Args:
            is_open: tells whether a browser has a page open: called with its cookie and Gradio's name for the page.
        """
        self.seconds, self.capacity, self.per_address, self.is_open = seconds, capacity, per_address, is_open
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._dropped: list[Session] = []
        self._lock = threading.Lock()

    def open(self, page: str | None = None, key: object = None) -> Session:
        """Return the living session of `key`, which a reloaded page sends, else a new and empty one.

        Args:
            page: Gradio's name for the page that shows it (`request.session_hash`).
            key: the page's stored key; anything but the key of a living session of this browser is ignored.
        Raises: ResourceError E-SESSION-COOKIE if the browser sends no cookie, E-BUSY if there is no room for a new session.
        """
        if not visitor().browser:
            raise ResourceError(texts.NO_COOKIE, code="E-SESSION-COOKIE")
        with self._lock:
            session = self._find(key)
            if session is None:
                session = self._new()
            self._touch(session)
            if page:
                session.page(page)
            return session

    def of_programs(self) -> Session:
        """Return the session that the calls of this browser's programs share, a new one if there is none. Raises: as `open`."""
        with self._lock:
            own = visitor().browser
            found = (s for s in self._sessions.values() if s.programs and secrets.compare_digest(s.browser, own))
            session = next(found, None) or self._new()
            session.programs = True
            return self._touch(session)

    def _new(self) -> Session:
        self._drop_old()
        self._make_room()
        session = Session()
        self._sessions[session.key] = session
        return session

    def get(self, key: object) -> Session:
        """Return the living session of a key. Raises: ResourceError E-SESSION if this browser has none of that key."""
        with self._lock:
            session = self._find(key)
            if session is None:
                raise ResourceError(texts.LOST, code=LOST)
            return self._touch(session)

    def close(self, page: str) -> Session | None:
        """Remove a page from its session. Returns: the session if no other page shows it."""
        with self._lock:
            browser = visitor().browser
            session = next((s for s in self._sessions.values() if s.browser == browser and page in s.pages), None)
            if session is not None:
                del session.pages[page]
            return session if session is not None and not session.shown else None

    def sweep(self) -> list[Session]:
        """Drop the sessions that are too old or too large. Returns: all that were dropped since the last call."""
        with self._lock:
            self._drop_old()
            sizes = {id(s.ranges): s.bytes for s in self._sessions.values()}  # ranges of a public text are shared
            for session in sorted(self._sessions.values(), key=lambda s: (bool(s.handlers), s.shown, -s.bytes)):
                if sum(sizes.values()) <= PRIVATE_BYTES:
                    break
                sizes.pop(id(session.ranges), None)
                self._drop(session)
            dropped, self._dropped = self._dropped, []
            return dropped

    def __len__(self) -> int:
        return len(self._sessions)

    def _find(self, key: object) -> Session | None:
        """Return the session of a key, if it is the browser's own."""
        session = self._sessions.get(key) if isinstance(key, str) else None
        return session if session is not None and secrets.compare_digest(session.browser, visitor().browser) else None

    def _touch(self, session: Session) -> Session:
        session.touched_at = time.monotonic()
        self._sessions.move_to_end(session.key)
        return session

    def _drop_old(self) -> None:
        """Drop pages that nobody looks at, and sessions that had no page for too long."""
        now = time.monotonic()
        for session in list(self._sessions.values()):
            for name, inbox in list(session.pages.items()):
                if name and now - inbox.made_at > OPENING_SECONDS and not self.is_open(session.browser, name):
                    del session.pages[name]
            if now - session.touched_at > self.seconds and not (session.handlers or session.shown):
                self._drop(session)

    def _make_room(self) -> None:
        """Make room for one more session. Raises: ResourceError E-BUSY if there is none."""
        counts, address = Counter(s.address for s in self._sessions.values()), visitor().address
        if counts[address] >= self.per_address:
            giving = address
        elif len(self._sessions) >= self.capacity:
            giving, most = counts.most_common(1)[0]
            giving = giving if most > max(FEW, counts[address]) else None
        else:
            return
        idle = (s for s in self._sessions.values() if s.address == giving and not (s.handlers or s.shown))
        oldest = next(idle, None)
        if oldest is None:
            raise ResourceError(texts.FULL.format(round(self.seconds / 60)), code="E-BUSY")
        self._drop(oldest)

    def _drop(self, session: Session) -> None:
        self._dropped.append(self._sessions.pop(session.key))
