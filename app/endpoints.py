"""Endpoints that programs may call: typed, described by Gradio, and under the page's own limits.

Types are written out, not postponed: Gradio reads them from the signatures. Every call is a job in the page's line, and belongs
to the session of the program's cookie, so that what is made from a private text is found by that program alone.
"""

import asyncio
import functools
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypedDict, get_type_hints

import gradio as gr

from app import engine
from app.cli.recipe import command_of
from app.context import Context, observe_steps, ranges_key
from app.session import MAX_RUNS
from app.tabs.sidebar import MAX_TOKENS, parse_model, require_pasted
from app.view import texts
from app.worker.job import Step
from core.checks import require_choice, require_int
from core.errors import InputError, QuantscopeError
from core.privacy import PASTED
from core.recipe import Calibration, QuantRecipe
from core.report import QuantizeReport, jsonable

Recipe = TypedDict("Recipe", get_type_hints(QuantRecipe) | {"overrides": dict[str, int]}, total=False)
"""A recipe as JSON, as `QuantRecipe.from_dict` reads it; what is left out but the model has its default."""
MOST_WIDEST = 1000


class Endpoints:
    """The endpoints. Making an object adds them to the page that is being built."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        for endpoint in (self.inspect, self.predict, self.quantize, self.compare):
            gr.api(self._guarded(endpoint), api_name=endpoint.__name__)

    async def inspect(
        self, model: str, text: str = "sotu", tokens: int = 2048, widest: int = 20, channels: bool = False
    ) -> dict[str, Any]:
        """Observe the range of every channel of every activation of a model on a text, and list the widest channels.

        Args:
            model: a name of the catalogue, or a Hub id owner/name[@revision].
            text: sotu, wikitext2, or "text:" followed by your own text, which is kept for your session only.
            tokens: tokens to observe, 512 to 65536.
            widest: channels to list, 1 to 1000, by their width over the median width of their site.
            channels: whether the smallest and largest value of every channel are returned as well, under "sites".
        Returns: model (facts, bytes, origin of the weights), text, tokens, window, seconds, device, widest; sites if asked for.
        """
        name, revision = parse_model(model)
        calibration = checked(Calibration(text, tokens))
        count = require_int("widest", widest, 1, MOST_WIDEST, f"use 1 to {MOST_WIDEST}")
        steps, key = observe_steps(name, revision, calibration), ranges_key(name, revision, calibration)
        info, ranges = await self._results(steps, key)
        observed = await asyncio.to_thread(ranges.to_dict)
        found = {"model": info.to_dict(), "widest": [vars(outlier) for outlier in ranges.outliers(count)]}
        shown = ("text", "tokens", "window", "seconds", "device", *(("sites",) if channels else ()))
        return found | {name: observed[name] for name in shown}

    async def predict(self, recipe: Recipe) -> dict[str, Any]:
        """Predict what a recipe costs, in nats per token and bytes, and measure it on a short text without quantising the model.

        Args:
            recipe: the recipe as JSON, as the page saves it: {"model": …, "method": "rptq", "scheme": "W4A4", …}; everything but
                the model has a default.
        Returns: recipe, hash, label, bytes by formula, and the reports predicted, measured and probe.
        """
        asked = recipe_of(recipe)
        calls = ("probe", "predict", "measure")
        steps = [load_step(asked), *(Step(call, {"recipe": asked}, "Predicting the cost") for call in calls)]
        info, probe, predicted, measured = await self._results(steps)
        weights, cache = engine.recipe_bytes(info, asked)
        reports = {"predicted": predicted, "measured": measured, "probe": probe}
        sizes = {"weight_bytes": weights, "kv_bytes_per_token": cache}
        return named(asked) | sizes | {name: report.to_dict() for name, report in reports.items()}

    async def quantize(self, recipe: Recipe) -> dict[str, Any]:
        """Quantise a model by a recipe, and report bits, bytes and errors of every layer.

        Args:
            recipe: the recipe as JSON, as for /predict.
        Returns: recipe, hash, label, report, and the command that repeats the run.
        """
        asked = recipe_of(recipe)
        _, report = await self._results(quantize_steps(asked))
        return named(asked) | {"report": public(report), "command": command_of(asked)}

    async def compare(self, recipes: list[Recipe], text: str = "sotu", tokens: int = 2048) -> dict[str, Any]:
        """Measure quantised models beside the models they are made from: perplexity, divergence, bytes and speed.

        A recipe that was quantised before is not quantised again.

        Args:
            recipes: 1 to 12 recipes as JSON, as for /predict.
            text: the text to measure on: sotu, wikitext2, or "text:" followed by your own text.
            tokens: tokens to measure on, 512 to 65536.
        Returns: models, a list: first every original, then each recipe with its hash, label, and report of the measurement.
        """
        if not isinstance(recipes, list) or not 1 <= len(recipes) <= MAX_RUNS:
            raise InputError(f"recipes is no list of 1 to {MAX_RUNS} recipes: give one or more.", code="E-PARAM-RECIPE")
        asked = list(map(recipe_of, recipes))
        measured_on = checked(Calibration(text, tokens))
        protocol = {"text": measured_on.text, "tokens": measured_on.tokens}
        bases = list(dict.fromkeys((recipe.model, recipe.revision) for recipe in asked))
        steps = [Step("evaluate", {"key": model, "revision": revision, **protocol}, texts.MEASURE) for model, revision in bases]
        for recipe in asked:
            against = {"reference": recipe.model, "reference_revision": recipe.revision}
            steps += [*quantize_steps(recipe), Step("evaluate", {"key": recipe.hash, **against, **protocol}, texts.MEASURE, 4.0)]
        results = await self._results(steps)
        originals = [{"model": model, "report": report.to_dict()} for (model, _), report in zip(bases, results, strict=False)]
        reports = results[len(bases) :][2::3]
        return {
            "models": [*originals, *(named(r) | {"report": found.to_dict()} for r, found in zip(asked, reports, strict=True))]
        }

    async def _results(self, steps: Sequence[Step], key: tuple | None = None) -> tuple[Any, ...]:
        """Run a job of the program's session, and return the results of its steps. `key`: as `Context.follow` takes it."""
        session, task = self.ctx.sessions.of_programs(), asyncio.current_task()
        session.handlers.add(task)  # a session with handlers does not end
        try:
            async for job in self.ctx.follow(session, f"call {secrets.token_hex(8)}", steps, key=key):
                results = job.results
            return results
        finally:
            session.handlers.discard(task)

    def _guarded(self, endpoint: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """Wrap an endpoint, so that an unexpected fault is logged, and told in a sentence without anything of the call."""

        @functools.wraps(endpoint)
        async def called(*values: Any, **given: Any) -> Any:
            try:
                return await asyncio.to_thread(jsonable, await endpoint(*values, **given))
            except (QuantscopeError, asyncio.CancelledError):
                raise
            except Exception as error:  # noqa: BLE001 - handler boundary: no fault may end the server
                raise self.ctx.bug(error) from None

        return called


def checked(calibration: Calibration) -> Calibration:
    """Check that a text and its tokens are within the page's limits: no file of this machine. Raises: InputError, TextError."""
    text = calibration.text
    if text.startswith(PASTED):
        require_pasted(text.removeprefix(PASTED))
    else:
        require_choice("text", text, (*texts.TEXT_NAMES, f"{PASTED}… with your own"))
    require_int("tokens", calibration.tokens, 512, MAX_TOKENS, f"use 512 to {MAX_TOKENS}")
    return calibration


def recipe_of(data: Recipe) -> QuantRecipe:
    """Read a recipe within the page's limits. Raises: InputError."""
    recipe = QuantRecipe.from_dict(data)
    parse_model(recipe.model)
    checked(recipe.calibration)
    return recipe


def named(recipe: QuantRecipe) -> dict[str, Any]:
    """Return a recipe with its names; a pasted text is named by its SHA-256."""
    return {"recipe": recipe.to_record(), "hash": recipe.hash, "label": recipe.label(), "model": recipe.model}


def load_step(recipe: QuantRecipe) -> Step:
    """Return the step that loads a recipe's model."""
    return Step("load", {"model": recipe.model, "revision": recipe.revision}, "Loading the model", 1.0)


def quantize_steps(recipe: QuantRecipe) -> list[Step]:
    """Return the steps that quantise by a recipe."""
    return [load_step(recipe), Step("quantize", {"recipe": recipe}, "Quantising", 8.0)]


def public(report: QuantizeReport) -> dict[str, Any]:
    """Return a report without its recipe, which is told beside it, and the server's folder in which the model is kept."""
    return {name: value for name, value in report.to_dict().items() if name not in ("recipe", "folder")}
