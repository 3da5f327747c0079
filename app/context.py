"""What every tab shares: the job table, the sessions, the status line; and how handlers fail and follow jobs."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from app.session import Session, SessionStore, SharedReports
from app.settings import Settings
from app.view import cards, texts
from app.worker.jobs import PUBLIC, JobRunner, JobView, Step
from core.errors import Cancelled, QuantscopeError
from core.folders import state_of
from core.privacy import is_public_text
from core.recipe import Calibration

Updates = dict[Any, Any]
POLL_SECONDS = 0.15
UNCHANGED = {"__type__": "update"}
"""Gradio's update that changes nothing, written out so that this module loads without Gradio."""
LIGHT = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Of events that only redraw."""
HEAVY = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None, "trigger_mode": "multiple"}
"""Of events that follow a job."""
log = logging.getLogger("quantscope.page")


class Superseded(Exception):
    """The visitor has asked for something newer: this handler has nothing more to say."""


@dataclass
class Context:
    """Shared by all handlers. `key`, `status` and `stop` are components, set while the page is built."""

    settings: Settings
    runner: JobRunner
    sessions: SessionStore
    shared: SharedReports = field(default_factory=SharedReports)
    prefetch: str | None = None
    key: Any = None
    status: Any = None
    stop: Any = None

    def session(self, values: Updates) -> Session:
        """The session of an event, from its inputs."""
        return self.sessions.get(values[self.key])

    @property
    def first(self) -> tuple[str, str | None, Calibration]:
        """Model, revision and calibration the page opens on."""
        return self.settings.model, None, Calibration(self.settings.text, self.settings.first_tokens)

    def start_prefetch(self) -> None:
        """Load the first model and observe its ranges before any visitor has come."""
        self.prefetch = self.runner.submit(
            PUBLIC, observe_steps(*self.first), on_done=lambda results: self.share_ranges(*self.first, results)
        )

    def prefetching(self, model: str, revision: str | None, calibration: Calibration) -> bool:
        """Whether these ranges are being made for everyone right now."""
        if self.prefetch is None or (model, revision, calibration) != self.first:
            return False
        return not self.runner.view(PUBLIC, self.prefetch).finished

    def guard(self, handler: Callable) -> Callable:
        """The same handler, except that it never raises: errors become the status line's card.

        Generators (queued, they follow jobs) stay generators; other handlers stay plain functions.
        """
        if inspect.isasyncgenfunction(handler):

            @functools.wraps(handler)
            async def streaming(*arguments: Any, **named: Any) -> AsyncIterator[Updates]:
                silent = True
                try:
                    async for updates in handler(*arguments, **named):
                        if updates:  # Gradio takes an empty dict for a value
                            silent = False
                            yield updates
                except (GeneratorExit, asyncio.CancelledError):
                    return
                except Superseded:
                    pass
                except BaseException as error:  # noqa: BLE001 - handler boundary: the server must outlive every fault
                    silent = False
                    yield self.failed(error, *arguments[:1])
                if silent:  # Gradio clears every output of a generator that never yields
                    yield {self.status: UNCHANGED}

            return streaming

        @functools.wraps(handler)
        def plain(*arguments: Any, **named: Any) -> Updates:
            try:
                return handler(*arguments, **named) or {self.status: UNCHANGED}
            except BaseException as error:  # noqa: BLE001 - handler boundary: the server must outlive every fault
                return self.failed(error, *arguments[:1])

        return plain

    def failed(self, error: BaseException, values: object = None) -> Updates:
        """The status line's card for an error; an unexpected one is logged and named by an id.

        Args:
            values: inputs of the failed event: after a Stop, the line says which model is still there.
        """
        if isinstance(error, Cancelled) and isinstance(values, dict) and values.get(self.key):
            session = self.session(values)
            return {self.status: cards.stopped(session.info, session.ranges), self.stop: hidden()}
        known = error if isinstance(error, QuantscopeError) else self.bug(error)
        return {self.status: cards.error_card(known), self.stop: hidden()}

    def bug(self, error: BaseException) -> QuantscopeError:
        """Log an unexpected fault and return the sentence for it."""
        name = uuid.uuid4().hex[:6]
        log.error("fault %s in a handler", name, exc_info=error)
        return QuantscopeError(texts.BUG.format(name))

    async def follow(self, session: Session, kind: str, steps: Sequence[Step]) -> AsyncIterator[JobView]:
        """Run a job and yield how it stands until it is done; an older job of the same kind is stopped.

        Every step is told its owner, the session's key: what is made from a private text is then the session's own.
        Raises: the job's error; Superseded when a newer job of this kind has taken its place.
        """
        if older := session.jobs.pop(kind, None):
            self.runner.cancel(session.key, older)
        steps = [replace(step, arguments={**step.arguments, "owner": session.key}) for step in steps]
        token = self.runner.submit(session.key, steps)
        session.jobs[kind] = token
        async for view in self.watch(session, kind, token):
            yield view

    async def watch(self, session: Session, kind: str, token: str) -> AsyncIterator[JobView]:
        """Yield a job's view whenever it changed, as `follow` does."""
        session.jobs[kind] = token
        last = None
        while True:
            view = self.runner.view(session.key, token)
            if session.jobs.get(kind) != token:
                raise Superseded
            if view.finished:
                del session.jobs[kind]
                if view.error:
                    raise view.error
                yield view
                return
            shown = (view.state, view.stage, view.fraction, view.ahead, len(view.results), view.texts, int(view.elapsed_s))
            if shown != last:
                last = shown
                yield view
            await asyncio.sleep(POLL_SECONDS)

    def busy(self, view: JobView, what: str, *, stoppable: bool = True) -> Updates:
        """The status line while a job runs, with its Stop button if the job is the visitor's own."""
        return {self.status: cards.progress(view, what), self.stop: hidden(view.finished or not stoppable)}

    def rest(self, session: Session) -> Updates:
        """The status line when nothing runs."""
        return {self.status: cards.idle(session.info, session.ranges), self.stop: hidden()}

    def known_ranges(self, model: str, revision: str | None, calibration: Calibration) -> Any:
        """(ModelInfo, RangesReport) made earlier for anyone, or None."""
        return self.shared.get(ranges_key(model, revision, calibration)) if is_public_text(calibration.text) else None

    def share_ranges(self, model: str, revision: str | None, calibration: Calibration, results: tuple[Any, ...]) -> None:
        """Keep a public text's ranges for the next visitor."""
        if is_public_text(calibration.text):
            self.shared.put(ranges_key(model, revision, calibration), results)


def hidden(away: bool = True) -> dict[str, Any]:
    """Gradio's update that hides or shows a component."""
    return UNCHANGED | {"visible": not away}


def start(settings: Settings) -> Context:
    """The shared context, its worker already loading the first model."""
    sessions = SessionStore(seconds=settings.session_seconds, capacity=settings.max_sessions)
    ctx = Context(settings, JobRunner(settings), sessions)
    ctx.start_prefetch()
    return ctx


def ranges_key(model: str, revision: str | None, calibration: Calibration) -> tuple:
    """What ranges are decided by."""
    return ("ranges", model, revision, state_of(model), calibration)


def observe_steps(model: str, revision: str | None, calibration: Calibration) -> list[Step]:
    """The job that loads a model and observes its ranges."""
    return [
        Step("load", {"model": model, "revision": revision}, "Loading the model", 1.0),
        Step("observe", {"model": model, "calibration": calibration, "revision": revision}, "Observing ranges", 3.0),
    ]
