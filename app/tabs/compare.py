"""The tab Compare: texts side by side, numbers with protocol, bytes by part, memory at any size."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace

import gradio as gr

from app import engine
from app.context import LIGHT, Context, Updates
from app.session import MAX_RUNS, Protocol, Run, Session
from app.tabs.baselines import Baselines
from app.tabs.keep import Keep
from app.tabs.measured import MEASURED_TEXT, WINDOW, bytes_parts, numbers_table, window_of
from app.tabs.memory import Memory
from app.tabs.pareto import Pareto
from app.tabs.tokens import Tokens
from app.view import cards, plots_runs, tables, texts
from app.view import texts_divergence as words
from app.view.chart import Chart, Table
from app.view.figure import number
from app.worker.job import JobView, Step
from core.checks import require_choice, require_float, require_int
from core.errors import InputError, QuantscopeError
from core.folders import state_of
from core.privacy import PASTED

MAX_SHOWN = 4
MAX_EVAL_TOKENS = 65_536
MAX_TEMPERATURE = 2.0
OWN_TEXT = "own"
MAX_NEW_TOKENS = 256
MAX_PROMPT = 4000


class Compare:
    """The tab: its widgets, their contents for a session, and the handlers of their events."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        with gr.Tab(texts.COMPARE, id="compare") as self.tab:
            with gr.Row(elem_classes="qs-controls qs-card", equal_height=True):
                self.runs = gr.CheckboxGroup([], label=texts.RUNS, elem_id="runs", scale=8, min_width=280)
                self.eval_text = gr.Dropdown(
                    [*((label, name) for name, label in texts.TEXT_NAMES.items()), (texts.EVAL_TEXT_OWN, OWN_TEXT)],
                    value=MEASURED_TEXT,
                    label=texts.EVAL_TEXT,
                    min_width=210,
                    filterable=False,
                    elem_id="eval-text",
                )
                self.eval_tokens = gr.Dropdown(
                    [2048, 8192, 32768],
                    value=2048,
                    label=texts.EVAL_TOKENS,
                    min_width=110,
                    filterable=False,
                    elem_id="eval-tokens",
                )
                with gr.Column(scale=1, min_width=120, elem_classes="qs-tight"):
                    self.measure = gr.Button(texts.MEASURE_NOW, elem_id="measure-now")
            self.baselines = Baselines()
            with gr.Row(elem_classes="qs-controls qs-card", equal_height=True):
                self.prompt = gr.Textbox(
                    prompt_for(ctx.settings.model),
                    label=texts.PROMPT,
                    scale=5,
                    min_width=260,
                    lines=2,
                    max_lines=6,
                    max_length=MAX_PROMPT,
                    elem_id="prompt",
                )
                self.new_tokens = gr.Slider(
                    8,
                    MAX_NEW_TOKENS,
                    48,
                    step=8,
                    label=texts.NEW_TOKENS,
                    scale=2,
                    min_width=190,
                    elem_id="new-tokens",
                    buttons=[],
                )
                self.temperature = gr.Slider(
                    0.0, 1.5, 0.0, step=0.1, label=texts.TEMPERATURE, scale=2, min_width=190, elem_id="temperature", buttons=[]
                )
                self.seed = gr.Number(0, label=texts.SEED, precision=0, min_width=80, elem_id="sampling-seed")
                with gr.Column(scale=1, min_width=130, elem_classes="qs-tight"):
                    self.chat = gr.Checkbox(False, label=texts.CHAT, container=False, elem_id="chat")
                    self.write = gr.Button(texts.GENERATE, variant="primary", elem_id="write")
            self.streams = gr.HTML(cards.hint(texts.TEXTS_EMPTY), elem_id="streams", apply_default_css=False)
            self.speed = gr.HTML("", elem_id="speed", elem_classes="qs-card", apply_default_css=False, visible=False)
            self.numbers = Table(cards.hint(texts.NO_RUNS), label=texts.NUMBERS, elem_id="numbers", elem_classes="qs-card")
            self.pareto = Pareto(ctx)
            self.bars = Chart(None, label=texts.BYTES_LABEL, height=380, elem_id="bars", visible=False)
            self.tokens = Tokens(ctx)
            self.keep = Keep(ctx)
            self.memory = Memory(ctx)
            with gr.Accordion(texts.LEARN_COMPARE_TITLE, open=False):
                gr.Markdown(texts.LEARN_COMPARE)

    def choices(self, session: Session, ticked: list[str] | None = None) -> Updates:
        """List the runs to tick. Ticked are `ticked`, else the first model, the current one and the newest quantised runs."""
        pairs = [(session.title(run), run.key) for run in session.runs]
        bases = [run.key for run in session.runs if run.is_base]
        current = [key for key in bases[1:] if session.info is not None and key == session.info.name]
        quantized = [run.key for run in session.runs if not run.is_base]
        usual = [*bases[:1], *current, *quantized[-(MAX_SHOWN - 1 - len(current)) :]]
        return {self.runs: gr.update(choices=pairs, value=usual if ticked is None else ticked)}

    def listed(self, session: Session) -> Updates:
        """Show everything on this tab that lists the runs."""
        return {**self.choices(session), **self.tokens.render(session), **self.render(session)}

    def render(self, session: Session, keys: list[str] | None = None) -> Updates:
        """Show numbers and bars of the chosen runs."""
        runs = [r for r in session.runs if keys is None or r.key in keys]
        bars = plots_runs.bytes_bars(bytes_parts(session, runs))
        return {
            self.numbers: numbers_table(session, runs) or cards.hint(texts.NUMBERS_EMPTY if session.runs else texts.NO_RUNS),
            self.bars: gr.update(value=bars, visible=any(run.evaluation for run in runs)),
            **self.pareto.render(session),
        }

    @property
    def results(self) -> list:
        """Components that a measurement changes."""
        return [self.numbers, self.bars, *self.pareto.outputs]

    def wire(self) -> None:
        """Connect the tab's events."""
        guard, on, key, status = self.ctx.guard, self.ctx.on, self.ctx.key, [self.ctx.status, self.ctx.stop]
        lists = [*self.keep.outputs, *self.tokens.outputs, self.runs]
        shown = [*lists, self.prompt, *self.results, *self.memory.outputs]
        self.tab.select(guard(self.opened), {*self.memory.inputs, self.prompt}, [*shown, *status], **LIGHT)
        self.runs.input(guard(self.ticked), {key, self.runs}, [*self.results, *status], **LIGHT)
        chosen = self.baselines.choice
        chosen.input(guard(self.added), {key, self.runs, chosen}, [*lists, *self.results, *status], **LIGHT)
        wishes = {key, self.runs, self.prompt, self.new_tokens, self.temperature, self.seed, self.chat}
        for event in (self.write.click, self.prompt.submit):
            on(event, self.generate, wishes, [self.streams, self.speed, *status])
        protocol = {key, self.runs, self.eval_text, self.eval_tokens}
        on(self.measure.click, self.evaluate, protocol, [self.runs, *self.results, *status])
        self.tokens.wire()
        self.pareto.wire()
        self.memory.wire()
        self.keep.wire(self.listed, [self.runs, *self.tokens.outputs, *self.results])

    def opened(self, values: Updates) -> Updates:
        """Show the current runs; a prompt that was not edited follows the model."""
        session = self.ctx.session(values)
        untouched = values[self.prompt] in (texts.PROMPT_DEFAULT, texts.PROMPT_STORY) and session.info is not None
        prompt = {self.prompt: prompt_for(session.info.name)} if untouched else {}
        projected: Updates = {}
        with contextlib.suppress(QuantscopeError):  # a size that cannot be read, said when it was typed, does not hide the runs
            projected = self.memory.project(values)
        return {**self.listed(session), **self.keep.render(session), **projected, **prompt}

    def ticked(self, values: Updates) -> Updates:
        """Show the numbers of the ticked runs."""
        return self.render(self.ctx.session(values), values[self.runs])

    def added(self, values: Updates) -> Updates:
        """Add the chosen baselines to the runs, and tick them."""
        session = self.ctx.session(values)
        keys = self.baselines.add(session, values[self.baselines.choice] or [])
        ticked = list(dict.fromkeys([*(values[self.runs] or []), *keys]))
        return {**self.keep.render(session), **self.listed(session), **self.choices(session, ticked)}

    async def generate(self, values: Updates) -> AsyncIterator[Updates]:
        """Let the ticked runs continue the prompt, one after the other, streaming."""
        session = self.ctx.session(values)
        runs, prompt = chosen_runs(session, values[self.runs], MAX_SHOWN), str(values[self.prompt] or "")
        if not prompt.strip():
            raise InputError("The prompt is empty: write a few words to continue.", code="E-PARAM-PROMPT")
        if len(prompt) > MAX_PROMPT:
            raise InputError(f"The prompt has {len(prompt):,} characters; the limit is {MAX_PROMPT:,}.", code="E-PARAM-PROMPT")
        count = require_int("new tokens", values[self.new_tokens], 1, MAX_NEW_TOKENS, f"use 1 to {MAX_NEW_TOKENS}")
        temperature = require_float(
            "temperature", values[self.temperature], 0.0, MAX_TEMPERATURE, f"use 0 to {MAX_TEMPERATURE:g}"
        )
        seed = require_int("seed", values[self.seed], 0, 2**31 - 1, "use 0 to 2147483647")
        wishes = {"max_new_tokens": count, "temperature": temperature, "seed": seed, "chat": bool(values[self.chat])}
        steps = [Step("generate", {"key": run.key, "prompt": prompt, **wishes}, f"{session.title(run)} writes") for run in runs]
        steps += [Step("speed_limit", {"key": run.key}, "Measuring the memory's speed", 0.1) for run in runs]
        job = None
        try:
            async for job in self.ctx.follow(session, "generate", steps):
                yield {self.streams: panels(session, runs, prompt, job), **self.ctx.busy(job, "Writing")}
        except QuantscopeError:
            if job is not None:
                yield {self.streams: panels(session, runs, prompt, replace(job, state="cancelled"))}
            raise
        yield {self.speed: gr.update(value=speeds(session, runs, job), visible=True), **self.ctx.rest(session)}

    async def evaluate(self, values: Updates) -> AsyncIterator[Updates]:
        """Measure the ticked runs, and the models they were made from, by one protocol; each row appears when it is done."""
        session = self.ctx.session(values)
        ticked = chosen_runs(session, values[self.runs], MAX_RUNS)
        tokens = require_int("tokens", values[self.eval_tokens], WINDOW, MAX_EVAL_TOKENS, f"use {WINDOW} to {MAX_EVAL_TOKENS}")
        text = self.chosen_text(session, values)
        protocol = Protocol(text, tokens, min(window_of(session.models.get(run.model)) for run in ticked))
        bases = [session.base_run(run.model, state_of(run.model)) for run in ticked if not run.is_base]
        runs = list({run.key: run for run in (*bases, *ticked)}.values())
        steps = [
            Step(
                "evaluate",
                {"key": run.key, **origin_of(session, run), **vars(protocol)},
                f"Measuring {session.title(run)}",
            )
            for run in runs
        ]
        shown, seen = [run.key for run in runs], 0
        async for job in self.ctx.follow(session, "evaluate", steps):
            while seen < len(job.results):
                session.protocol = protocol
                runs[seen].measure(protocol, job.results[seen])
                seen += 1
            yield {**self.render(session, shown), **self.ctx.busy(job, "Measuring")}
        yield {**self.choices(session, shown), **self.ctx.rest(session)}

    def chosen_text(self, session: Session, values: Updates) -> str:
        """Return the text to measure on. Raises: InputError for one that is not offered, or a pasted one that is missing."""
        text = require_choice("evaluation text", values[self.eval_text], (*texts.TEXT_NAMES, OWN_TEXT))
        if text != OWN_TEXT:
            return text
        if session.calibration is None or not session.calibration.text.startswith(PASTED):
            raise InputError(texts.EVAL_TEXT_NONE, code="E-TEXT-NOTFOUND")
        return session.calibration.text


def chosen_runs(session: Session, keys: object, most: int) -> list[Run]:
    """Return the ticked runs of this session, in order. Raises: InputError if none is ticked, or more than `most`."""
    runs = [r for r in session.runs if isinstance(keys, list) and r.key in keys]
    if not runs:
        raise InputError("No run is ticked: tick at least one, two to compare.", code="E-PARAM-RUNS")
    if len(runs) > most:
        raise InputError(f"{len(runs)} runs are ticked: untick some, {most} fit side by side.", code="E-PARAM-RUNS")
    return runs


def origin_of(session: Session, run: Run) -> dict[str, str | None]:
    """Return the arguments for a run's comparison: its reference, and the revision of a model that the key names."""
    if run.recipe is not None:
        return {"reference": run.recipe.model, "reference_revision": run.recipe.revision}
    revision = getattr(session.models.get(run.model), "revision", None)
    return {"revision": revision} | ({} if run.is_base else {"reference": run.model, "reference_revision": revision})


def prompt_for(model: str) -> str:
    """Return the first prompt for a model."""
    return texts.PROMPT_STORY if engine.is_embedded(model) else texts.PROMPT_DEFAULT


def speeds(session: Session, runs: list[Run], job: JobView) -> str:
    """Write a table of how fast each run wrote, and of how fast memory would let it."""
    limits = job.results[len(runs) :]
    rows = tables.speed_rows([(session.title(r), made, m) for r, made, m in zip(runs, job.results, limits, strict=False)])
    table = cards.table(texts.SPEED_HEADERS, rows, colours=[session.runs.index(run) for run in runs], caption=texts.SPEED_CAPTION)
    return table + cards.protocol(texts.SPEED_NOTE.format(threads=cards.counted(limits[0].threads, "thread")))


def panels(session: Session, runs: list[Run], prompt: str, job: JobView) -> str:
    """Write the texts so far, one panel per run; the first token that differs from the original's text is marked."""
    shown = []
    written = dict(zip((run.key for run in runs), job.results, strict=False))
    for index, run in enumerate(runs):
        footer, text = "not finished" if job.finished else "waiting…", (job.texts[index], "", "")
        if index < len(job.results):
            done, original = job.results[index], written.get(run.model)
            footer = (
                f"{done.new_tokens} tokens in {cards.seconds_text(done.seconds)}, {number(done.tokens_per_second)} tokens/s · "
                f"KV cache {number(done.kv_bytes / 1e3)} kB measured{texts.NO_CHAT if done.unformatted else ''}"
            )
            if original is not None and original is not done:
                place = first_difference(done.pieces, original.pieces)
                footer += f" · {words.SAME_TEXT if place is None else words.FIRST_DIFFERENCE.format(place + 1)}"
                text = text if place is None else marked(done.pieces, place)
        elif index == len(job.results) and job.state == "running":
            footer = "writing…"
        shown.append((session.runs.index(run), session.title(run), prompt, text, footer))
    return cards.streams(shown)


def first_difference(one: tuple[str, ...], other: tuple[str, ...]) -> int | None:
    """Return the place of the first token at which two texts differ, from 0; None where they are the same."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return None if one == other else same


def marked(pieces: tuple[str, ...], place: int) -> tuple[str, str, str]:
    """Cut a text at one of its tokens: what stands before it, the token, and what follows; the end is shown as a sign."""
    return "".join(pieces[:place]), (*pieces, words.TEXT_END)[place] or words.HALF_CHARACTER, "".join(pieces[place + 1 :])
