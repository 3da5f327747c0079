"""What visitors ask for, for tests of the state that all tabs share."""

from __future__ import annotations

from app.context import observe_steps, ranges_key
from core.recipe import Calibration

PUBLIC_TEXT, PRIVATE_TEXT = Calibration("sotu", 1024), Calibration("text:" + "my diary " * 200, 1024)


def jobs(ctx, session, model="fake", calibration=PUBLIC_TEXT, kind="observe"):
    """A visitor's wish for the ranges of a model."""
    key = ranges_key(model, None, calibration)
    return ctx.follow(session, kind, observe_steps(model, None, calibration), key=key)


async def shown(ctx, session, model="fake-endless"):
    """A handler that shows the states of a job."""
    async for job in jobs(ctx, session, model):
        yield {"status": job.stage, "chart": job.state}


def event(ctx, session, outputs, handler):
    """Fire the event that `Context.on` connects to a handler: its answer."""
    connected = []
    ctx.on(lambda fn, inputs, targets, **options: connected.append((fn, targets, options)), handler, {"key"}, outputs)
    ((start, targets, options),) = connected
    assert targets == ["timer", "status", "stop"] and options["queue"] is False
    return start({"key": session.key})
