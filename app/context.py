"""The state and functions that all tabs share: workers, sessions, status line, handlers and their jobs.

A handler that follows a job is an async generator of updates. `Context.on` connects it to an event of the page: the event
only starts the handler as a task and ends; the updates wait in the session until the page's timer fetches them. So an event
does not last as long as its job, takes no place in Gradio's queue, and a reloaded page continues where the earlier one was.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from app import engine
from app.door.files import Files
from app.door.visitor import Heartbeats
from app.session import STOP, Session, SessionStore
from app.settings import Settings
from app.shared import Shared
from app.view import cards, texts
from app.worker.client import Workers
from app.worker.job import JobView, Step
from app.worker.line import PUBLIC
from core.errors import Cancelled, QuantscopeError
from core.folders import state_of
from core.memory import give_back
from core.privacy import is_public_text
from core.recipe import Calibration

Updates = dict[Any, Any]
FETCH_SECONDS = 0.1
"""Pause of the page's timer between an answer and the next request."""
NEWS_SECONDS = 15.0
"""Longest time that a request of the page waits for updates."""
REST_SECONDS = 2.0
"""Longest time that such a request waits without any handler, before the page stops its timer."""
RELOAD_SECONDS = 10.0
"""Time for which jobs of a closed page go on, as a reload may take them over."""
SWEEP_SECONDS = 60.0
"""Seconds between two looks for sessions that have ended."""
UNCHANGED = {"__type__": "update"}
"""Gradio's update that changes nothing, written out so that this module loads without Gradio."""
LIGHT = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Options of events that only redraw or start a job, so that none of them waits for a job."""
LIGHT_METHODS = {"load", "observe", "channel", "probe", "predict", "measure", "swap"}
LIGHT_METHODS |= {"allocate", "smallest_g", "curve", "calibrations", "estimate", "bases"}
log = logging.getLogger("quantscope.page")


@dataclass
class Context:
    """Everything that handlers share. `key`, `status`, `stop` and `timer` are components, set while the page is built."""

    settings: Settings
    workers: Workers
    sessions: SessionStore
    heartbeats: Heartbeats = field(default_factory=Heartbeats)
    shared: Shared = field(default_factory=Shared)
    key: Any = None
    status: Any = None
    stop: Any = None
    timer: Any = None
    forgetting: asyncio.Task | None = None
    _targets: dict[Any, None] = field(default_factory=dict)
    _ended: set[str] = field(default_factory=set)

    def session(self, values: Updates) -> Session:
        """Return the session of an event, from its inputs."""
        return self.sessions.get(values[self.key])

    # -- events

    def on(self, trigger: Callable, handler: Callable, inputs: set, outputs: Sequence) -> Any:
        """Connect an event to a handler that follows jobs.

        Args:
            trigger: a component's event, as `button.click`.
            handler: an async generator function; called with the inputs' values and, if it asks for one, the event's data.
            outputs: the components that its updates may hold.
        Returns: Gradio's dependency. It ends when the handler has started, not when the handler has ended.
        """
        self._targets.update(dict.fromkeys(outputs))

        @functools.wraps(handler)
        async def start(values: Updates, *data: Any) -> Updates:
            session = self.session(values)
            self.start(session, handler(values, *data))
            return self.listening

        # The event ends before its handler has succeeded. If the event's answer removed the card of an earlier error, it could
        # also remove the handler's own error: that one comes by the timer, which may be faster than the answer.
        own = [self.timer, self.status, self.stop]
        return trigger(self.guard(start, calm=False), inputs, own, **LIGHT, trigger_mode="multiple")

    @property
    def followed(self) -> list:
        """Every component that handlers connected by `on` may update, and the timer."""
        return [*self._targets, self.timer]

    @property
    def listening(self) -> Updates:
        """The update that makes the page fetch the handlers' updates."""
        return {self.timer: UNCHANGED | {"active": True}}

    def start(self, session: Session, updates: AsyncIterator[Updates]) -> asyncio.Task:
        """Run a handler as a task: its updates go to the pages of the session, its error to their status line."""
        task = asyncio.create_task(self._deliver(session, updates))
        session.handlers.add(task)
        task.add_done_callback(session.handlers.discard)
        return task

    async def _deliver(self, session: Session, updates: AsyncIterator[Updates]) -> None:
        begun = time.monotonic()
        try:
            async with contextlib.aclosing(updates):
                async for update in updates:
                    session.post(self.calmed(update, session, begun))
            if rest := self.calmed({}, session, begun):  # a handler may succeed without an update
                session.post(rest)
        except asyncio.CancelledError as error:
            if STOP in error.args:
                session.post(self.failed(Cancelled(), session))
        except BaseException as error:  # noqa: BLE001 - handler boundary: no fault may end the server
            session.post(self.failed(error, session))

    async def news(self, key: object, page: str) -> Updates:
        """Return the new updates for a page, for its timer; wait for some. With neither updates nor handlers, stop it."""
        try:
            session = self.sessions.get(key)
        except QuantscopeError as error:
            return self.failed(error) | {self.timer: UNCHANGED | {"active": False}}
        updates = await session.page(page).take(NEWS_SECONDS if session.handlers else REST_SECONDS)
        rest = not updates and not session.handlers
        return updates or {self.timer: UNCHANGED | ({"active": False} if rest else {})}

    def closed(self, page: str) -> None:
        """Handle the closing of a page. Unless it is opened again soon, the jobs of its session are stopped."""
        session = self.sessions.close(page)
        if session is not None:
            asyncio.get_running_loop().call_later(RELOAD_SECONDS, lambda: session.shown or session.stop())

    def guard(self, handler: Callable, calm: bool = True) -> Callable:
        """Wrap a handler, plain or `async def`, so that it never raises: errors become the status line's card.

        Args: calm: whether its success takes an earlier error's card away.
        """
        if inspect.iscoroutinefunction(handler):

            @functools.wraps(handler)
            async def awaited(*arguments: Any) -> Updates:
                if self._is_early(arguments):
                    return {self.status: UNCHANGED}
                begun = time.monotonic()
                try:
                    done = await handler(*arguments) or {self.status: UNCHANGED}  # Gradio takes an empty dict for a value
                    return self.calmed(done, self._session(arguments), begun) if calm else done
                except Exception as error:  # noqa: BLE001 - handler boundary: no fault may end the server
                    return self.failed(error, self._session(arguments))

            return awaited

        @functools.wraps(handler)
        def plain(*arguments: Any) -> Updates:
            if self._is_early(arguments):
                return {self.status: UNCHANGED}
            begun = time.monotonic()
            try:
                done = handler(*arguments) or {self.status: UNCHANGED}
                return self.calmed(done, self._session(arguments), begun) if calm else done
            except BaseException as error:  # noqa: BLE001 - handler boundary: no fault may end the server
                return self.failed(error, self._session(arguments))

        return plain

    def _is_early(self, arguments: tuple) -> bool:
        """Say whether an event came before its page had a session, as the choice of the first tab does."""
        values = arguments[0] if arguments else None
        return isinstance(values, dict) and self.key in values and not values[self.key]

    def _session(self, arguments: tuple) -> Session | None:
        """Return the session of a handler's arguments, or None if its inputs hold no session's key."""
        values = arguments[0] if arguments else None
        if not isinstance(values, dict) or self.key not in values:
            return None
        with contextlib.suppress(QuantscopeError):  # its own event has said that the session has ended
            return self.session(values)

    def calmed(self, updates: Updates, session: Session | None, begun: float) -> Updates:
        """Return the updates of a successful event, without the card of an earlier error; a running job keeps its status line.

        Args: begun: when the event began, by `time.monotonic`. One that began before the error says nothing about it.
        """
        told = updates.get(self.status, UNCHANGED) != UNCHANGED
        if session is None or not session.failed:
            return updates
        if begun < session.failed and not session.jobs:
            return {part: value for part, value in updates.items() if part is not self.status}
        if begun < session.failed or (session.held and not told):
            return updates
        session.failed, session.held = 0.0, False
        return updates if session.jobs or told else {**updates, **self.rest(session)}

    def failed(self, error: BaseException, session: Session | None = None) -> Updates:
        """Return the status line's card for an error; an unexpected one is logged and named by an id.

        Args:
            session: after a Stop, the line names the model that the session still has. An error stays until the next success.
        """
        if isinstance(error, Cancelled) and session is not None:
            return {self.status: cards.stopped(session.info, session.ranges), self.stop: hidden()}
        known = error if isinstance(error, QuantscopeError) else self.bug(error)
        if session is not None:
            session.failed = time.monotonic()
        return {self.status: cards.error_card(known), self.stop: hidden()}

    def bug(self, error: BaseException) -> QuantscopeError:
        """Log an unexpected fault and return the sentence for it."""
        name = uuid.uuid4().hex[:6]
        log.error("fault %s in a handler", name, exc_info=error)
        return QuantscopeError(texts.BUG.format(name))

    # -- jobs

    async def follow(
        self, session: Session, kind: str, steps: Sequence[Step], *, key: tuple | None = None
    ) -> AsyncIterator[JobView]:
        """Run a job and yield its state until it is done; an older job of the same kind is ended first.

        Every step of a session's own job is given its owner, so that models made from a private text belong to the session.

        Args:
            kind: the job's purpose in its session, such as "observe" or "quantize".
            key: of a result that is the same for everyone: a known one is yielded at once, one in the making is awaited.
        Raises: the job's error; Cancelled after Stop.
        """
        task, older = asyncio.current_task(), session.jobs.get(kind)
        session.jobs[kind] = task
        try:
            if older is not None:
                older.cancel()
                await asyncio.wait([older])
            light = self.is_light(session, steps)
            if key is None:
                session.owner = True
                steps = [replace(step, arguments={**step.arguments, "owner": session.key}) for step in steps]
            make = functools.partial(self.workers.run, PUBLIC if key else session.key, steps, light=light)
            async with contextlib.aclosing(self.shared.follow(key, make) if key else make()) as views:
                async for view in views:
                    yield view
        except asyncio.CancelledError as error:
            if STOP in error.args:
                task.uncancel()
                raise Cancelled from None
            raise
        finally:
            if session.jobs.get(kind) is task:
                del session.jobs[kind]

    def is_light(self, session: Session, steps: Sequence[Step]) -> bool:
        """Decide whether a job is for the light worker: it takes a second or two and only observes a small model.

        Observing a whole model counts as light only for embedded models: any other may have to be downloaded.
        """
        if not {step.method for step in steps} <= LIGHT_METHODS:
            return False
        models = {step.arguments["model"] if "model" in step.arguments else step.arguments["recipe"].model for step in steps}
        if all(engine.is_embedded(model) for model in models):
            return True
        known = [session.models.get(model) for model in models]
        small = all(info is not None and info.weight_bytes <= self.settings.light_weights for info in known)
        return small and {step.method for step in steps} == {"channel"}

    async def sweep(self) -> None:
        """End sessions whose time is over: stop their jobs, and have the workers drop what they made for them alone."""
        for session in self.sessions.sweep():
            session.stop()
            if session.owner:
                self._ended.add(session.key)
        if self._ended and (self.forgetting is None or self.forgetting.done()):
            self.forgetting = asyncio.create_task(self._forget())

    async def _forget(self) -> None:
        """Have the workers drop what they made for sessions that have ended, between two of their jobs."""
        while self._ended:
            owners, self._ended = sorted(self._ended), set()
            try:
                await self.workers.forget(owners)
            except QuantscopeError as error:
                log.warning("what %d sessions owned is still there: %s", len(owners), error)
                self._ended.update(owners)  # the next sweep tries again
                return

    async def sweep_often(self) -> None:
        """Run `sweep` every `SWEEP_SECONDS`, without end; delete old files, and return freed memory to the system."""
        files = Files(Path(os.environ.get("GRADIO_TEMP_DIR") or "/nonexistent"))
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            await self.sweep()
            await asyncio.to_thread(files.tidy)
            await asyncio.to_thread(give_back)

    async def prepare(self) -> None:
        """Observe the first model's ranges before any visitor comes; then load what light jobs need."""
        model, calibration = self.settings.model, Calibration(self.settings.text, self.settings.first_tokens)
        make = functools.partial(self.workers.run, PUBLIC, observe_steps(model, None, calibration))
        try:
            async for _ in self.shared.follow(ranges_key(model, None, calibration), make):
                pass
        except QuantscopeError as error:
            log.warning("the first model is not ready: %s", error)  # the first visitor tries again and sees the error
        self.workers.light.start()
        await asyncio.to_thread(engine.warm)

    @contextlib.asynccontextmanager
    async def serving(self, *_: object) -> AsyncIterator[None]:
        """Prepare the first model while the server runs, and end the workers with it."""
        tasks = [asyncio.create_task(self.prepare()), asyncio.create_task(self.sweep_often())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            self.workers.close()

    # -- status line

    def busy(self, view: JobView, what: str) -> Updates:
        """Return the status line of a running job, with its Stop button."""
        return {self.status: cards.progress(view, what), self.stop: hidden(view.finished)}

    def rest(self, session: Session) -> Updates:
        """Return the status line when nothing runs."""
        return {self.status: cards.idle(session.info, session.ranges), self.stop: hidden()}


def hidden(away: bool = True) -> dict[str, Any]:
    """Return Gradio's update that hides or shows a component."""
    return UNCHANGED | {"visible": not away}


def start(settings: Settings) -> Context:
    """Make the shared context; its main worker starts at once and loads its libraries while the page is being built."""
    heartbeats = Heartbeats()
    sessions = SessionStore(seconds=settings.session_seconds, capacity=settings.max_sessions, is_open=heartbeats.open)
    ctx = Context(settings, Workers(settings), sessions, heartbeats)
    ctx.workers.main.start()
    return ctx


def ranges_key(model: str, revision: str | None, calibration: Calibration) -> tuple | None:
    """Return the key under which everyone finds the ranges of a model; None if the text is a visitor's own."""
    return ("ranges", model, revision, state_of(model), calibration) if is_public_text(calibration.text) else None


def observe_steps(model: str, revision: str | None, calibration: Calibration) -> list[Step]:
    """Return the steps of the job that loads a model and observes its ranges."""
    return [
        Step("load", {"model": model, "revision": revision}, "Loading the model", 1.0),
        Step("observe", {"model": model, "calibration": calibration, "revision": revision}, "Observing ranges", 3.0),
    ]
