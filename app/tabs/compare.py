"""Compare: texts side by side, numbers with their protocol, bytes by part, and memory projected to any size."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import gradio as gr

from app import engine
from app.context import HEAVY, LIGHT, Context, Updates
from app.session import Run, Session
from app.tabs.measured import estimated_bytes, numbers_table
from app.tabs.quantize import WINDOW
from app.view import cards, plots_runs, tables, texts
from app.view.chart import Chart
from app.view.figure import axis_name, number
from app.worker.jobs import JobView, Step
from core.errors import InputError, QuantscopeError
from core.recipe import require_choice, require_int

MAX_SHOWN = 4
MAX_NEW_TOKENS = 256
MAX_PROMPT = 4000
THIS_MODEL = "this model"
SHAPES_OFFERED = ("opt-125m", "opt-1.3b", "opt-6.7b", "opt-13b", "opt-30b", "opt-66b", "opt-175b", "llama-3-8b")


@dataclass
class Compare:
    """The tab's widgets."""

    tab: gr.Tab
    runs: gr.CheckboxGroup
    prompt: gr.Textbox
    new_tokens: gr.Slider
    temperature: gr.Slider
    chat: gr.Checkbox
    write: gr.Button
    streams: gr.HTML
    speed: gr.HTML
    eval_tokens: gr.Dropdown
    measure: gr.Button
    numbers: gr.HTML
    bars: Chart
    shape: gr.Dropdown
    batch: gr.Slider
    sequence: gr.Slider
    memory: Chart
    memory_note: gr.HTML

    def choices(self, session: Session) -> Updates:
        """The runs to tick. Ticked are the first model, the one at hand and the newest quantised runs, `MAX_SHOWN` at most."""
        pairs = [(session.title(run), run.key) for run in session.runs]
        bases = [run.key for run in session.runs if run.is_base]
        current = [key for key in bases[1:] if session.info is not None and key == session.info.name]
        quantized = [run.key for run in session.runs if not run.is_base]
        ticked = [*bases[:1], *current, *quantized[-(MAX_SHOWN - 1 - len(current)) :]]
        return {self.runs: gr.update(choices=pairs, value=ticked)}

    def render(self, session: Session, keys: list[str] | None = None) -> Updates:
        """Numbers and bars of the chosen runs."""
        runs = [r for r in session.runs if keys is None or r.key in keys]
        measured = [r for r in runs if r.evaluation is not None]
        bars = plots_runs.bytes_bars(
            [(axis_name(session.title(r)), dict(r.evaluation.weight_parts), estimated_bytes(session, r)) for r in measured]
        )
        return {
            self.numbers: numbers_table(session, runs) or cards.hint(texts.NUMBERS_EMPTY if session.runs else texts.NO_RUNS),
            self.bars: gr.update(value=bars, visible=bool(measured)),
        }


def chosen_runs(session: Session, keys: object) -> list[Run]:
    """The ticked runs of this session, in order. Raises InputError if none, or too many to show."""
    runs = [r for r in session.runs if isinstance(keys, list) and r.key in keys]
    if not runs:
        raise InputError("No run is ticked: tick at least one, two to compare.", code="E-PARAM-RUNS")
    if len(runs) > MAX_SHOWN:
        raise InputError(f"{len(runs)} runs are ticked: untick some, {MAX_SHOWN} fit side by side.", code="E-PARAM-RUNS")
    return runs


def prompt_for(model: str) -> str:
    """What a model is first asked to continue."""
    return texts.PROMPT_STORY if engine.is_embedded(model) else texts.PROMPT_DEFAULT


def build(model: str) -> Compare:
    """The tab's widgets, in place; `model` is the one the page opens on."""
    with gr.Tab(texts.COMPARE, id="compare") as tab:
        with gr.Row(elem_classes="qs-controls qs-card", equal_height=True):
            runs = gr.CheckboxGroup([], label=texts.RUNS, elem_id="runs", scale=8, min_width=280)
            eval_tokens = gr.Dropdown(
                [2048, 8192, 32768], value=2048, label=texts.EVAL_TOKENS, min_width=110, filterable=False, elem_id="eval-tokens"
            )
            with gr.Column(scale=1, min_width=120, elem_classes="qs-tight"):
                measure = gr.Button(texts.MEASURE_NOW, elem_id="measure-now")
        with gr.Row(elem_classes="qs-controls qs-card", equal_height=True):
            prompt = gr.Textbox(
                prompt_for(model),
                label=texts.PROMPT,
                scale=6,
                min_width=260,
                lines=2,
                max_lines=6,
                max_length=MAX_PROMPT,
                elem_id="prompt",
            )
            new_tokens = gr.Slider(
                8, MAX_NEW_TOKENS, 48, step=8, label=texts.NEW_TOKENS, scale=2, min_width=150, elem_id="new-tokens", buttons=[]
            )
            temperature = gr.Slider(
                0.0, 1.5, 0.0, step=0.1, label=texts.TEMPERATURE, scale=2, min_width=150, elem_id="temperature", buttons=[]
            )
            with gr.Column(scale=1, min_width=130, elem_classes="qs-tight"):
                chat = gr.Checkbox(False, label=texts.CHAT, container=False, elem_id="chat")
                write = gr.Button(texts.GENERATE, variant="primary", elem_id="write")
        streams = gr.HTML(cards.hint(texts.TEXTS_EMPTY), elem_id="streams", apply_default_css=False)
        speed = gr.HTML("", elem_id="speed", elem_classes="qs-card", apply_default_css=False, visible=False)
        numbers = gr.HTML(cards.hint(texts.NO_RUNS), elem_id="numbers", elem_classes="qs-card", apply_default_css=False)
        bars = Chart(None, label=texts.BYTES_LABEL, height=380, elem_id="bars", visible=False)
        with gr.Accordion(texts.MEMORY, open=False, elem_id="memory-panel"):
            gr.Markdown(texts.MEMORY_INFO, elem_classes="qs-caption")
            with gr.Row(elem_classes="qs-controls qs-card"):
                shape = gr.Dropdown(
                    [THIS_MODEL, *SHAPES_OFFERED],
                    value="opt-13b",
                    label=texts.SHAPE,
                    elem_id="shape",
                    filterable=False,
                    min_width=120,
                )
                batch = gr.Slider(1, 128, 8, step=1, label=texts.BATCH, elem_id="batch", buttons=[], min_width=160)
                sequence = gr.Slider(
                    256, 32768, 2048, step=256, label=texts.SEQUENCE, elem_id="sequence", buttons=[], min_width=160
                )
            memory = Chart(None, label=texts.MEMORY_LABEL, height=320, elem_id="memory")
            memory_note = gr.HTML("", apply_default_css=False)
        with gr.Accordion(texts.LEARN_COMPARE_TITLE, open=False):
            gr.Markdown(texts.LEARN_COMPARE)
    return Compare(
        tab=tab,
        runs=runs,
        prompt=prompt,
        new_tokens=new_tokens,
        temperature=temperature,
        chat=chat,
        write=write,
        streams=streams,
        speed=speed,
        eval_tokens=eval_tokens,
        measure=measure,
        numbers=numbers,
        bars=bars,
        shape=shape,
        batch=batch,
        sequence=sequence,
        memory=memory,
        memory_note=memory_note,
    )


def wire(ctx: Context, view: Compare) -> None:
    """Connect the tab's events."""

    def opened(values: dict) -> Updates:
        session = ctx.session(values)
        untouched = values[view.prompt] in (texts.PROMPT_DEFAULT, texts.PROMPT_STORY) and session.info is not None
        prompt = {view.prompt: prompt_for(session.info.name)} if untouched else {}
        return {**view.choices(session), **view.render(session), **memory(ctx, view, values), **prompt}

    def ticked(values: dict) -> Updates:
        return view.render(ctx.session(values), values[view.runs])

    def projected(values: dict) -> Updates:
        return memory(ctx, view, values)

    async def write(values: dict) -> AsyncIterator[Updates]:
        async for updates in generate(ctx, view, ctx.session(values), values):
            yield updates

    async def measure(values: dict) -> AsyncIterator[Updates]:
        async for updates in evaluate(ctx, view, ctx.session(values), values):
            yield updates

    status = [ctx.status, ctx.stop]
    sizes = {ctx.key, view.shape, view.batch, view.sequence}
    shown = [view.runs, view.prompt, view.numbers, view.bars, view.memory, view.memory_note]
    view.tab.select(ctx.guard(opened), {*sizes, view.prompt}, [*shown, *status], **LIGHT)
    view.runs.input(ctx.guard(ticked), {ctx.key, view.runs}, [view.numbers, view.bars, *status], **LIGHT)
    for control in (view.shape, view.batch, view.sequence):
        control.input(ctx.guard(projected), sizes, [view.memory, view.memory_note, *status], trigger_mode="always_last", **LIGHT)
    wishes = {ctx.key, view.runs, view.prompt, view.new_tokens, view.temperature, view.chat}
    for event in (view.write.click, view.prompt.submit):
        event(ctx.guard(write), wishes, [view.streams, view.speed, *status], **HEAVY)
    view.measure.click(ctx.guard(measure), {ctx.key, view.runs, view.eval_tokens}, [view.numbers, view.bars, *status], **HEAVY)


def memory(ctx: Context, view: Compare, values: dict) -> Updates:
    """The projection panel for the chosen size."""
    session = ctx.session(values)
    shape = require_choice("size", values[view.shape], (THIS_MODEL, *SHAPES_OFFERED))
    if shape == THIS_MODEL and session.info is None:
        raise InputError("No model is loaded yet: wait for it, or choose one of the sizes.", code="E-PARAM-SIZE")
    batch = require_int("batch", values[view.batch], 1, 1024, "use 1 to 1024")
    sequence = require_int("sequence length", values[view.sequence], 1, 1_048_576, "use 1 to 1048576")
    sizes = {"batch": batch, "sequence": sequence}
    estimates = [
        (
            name,
            engine.project_model(session.info, bits, **sizes)
            if shape == THIS_MODEL
            else engine.project_named(shape, bits, **sizes),
        )
        for name, bits in engine.projected_schemes().items()
    ]
    return {view.memory: plots_runs.memory_bars(estimates), view.memory_note: cards.caution(estimates[0][1].assumptions)}


async def generate(ctx: Context, view: Compare, session: Session, values: dict) -> AsyncIterator[Updates]:
    """Let the ticked runs continue the prompt, one after the other, streaming."""
    runs, prompt = chosen_runs(session, values[view.runs]), str(values[view.prompt] or "")
    if not prompt.strip():
        raise InputError("The prompt is empty: write a few words to continue.", code="E-PARAM-PROMPT")
    if len(prompt) > MAX_PROMPT:
        raise InputError(f"The prompt has {len(prompt):,} characters; the limit is {MAX_PROMPT:,}.", code="E-PARAM-PROMPT")
    count = require_int("new tokens", values[view.new_tokens], 1, MAX_NEW_TOKENS, f"use 1 to {MAX_NEW_TOKENS}")
    temperature = values[view.temperature]
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature <= 2:
        raise InputError("The temperature is out of range: use 0 to 2.", code="E-PARAM-TEMPERATURE")
    steps = [
        Step(
            "generate",
            {
                "key": run.key,
                "prompt": prompt,
                "max_new_tokens": count,
                "temperature": float(temperature),
                "chat": bool(values[view.chat]),
            },
            f"{session.title(run)} writes",
        )
        for run in runs
    ]
    steps += [Step("speed_limit", {"key": run.key}, "Measuring the memory's speed", 0.1) for run in runs]
    job = None
    try:
        async for job in ctx.follow(session, "generate", steps):
            yield {view.streams: panels(session, runs, prompt, job), **ctx.busy(job, "Writing")}
    except QuantscopeError:
        if job is not None:
            yield {view.streams: panels(session, runs, prompt, replace(job, state="cancelled"))}
        raise
    yield {view.speed: gr.update(value=speeds(session, runs, job), visible=True), **ctx.rest(session)}


def speeds(session: Session, runs: list[Run], job: JobView) -> str:
    """How fast each run wrote, beside what the memory allows."""
    limits = job.results[len(runs) :]
    rows = tables.speed_rows([(session.title(r), made, m) for r, made, m in zip(runs, job.results, limits, strict=False)])
    table = cards.table(texts.SPEED_HEADERS, rows, colours=[session.runs.index(run) for run in runs], caption=texts.SPEED_CAPTION)
    return table + cards.protocol(texts.SPEED_NOTE.format(threads=cards.counted(limits[0].threads, "thread")))


def panels(session: Session, runs: list[Run], prompt: str, job: JobView) -> str:
    """The texts so far, one panel per run."""
    shown = []
    for index, run in enumerate(runs):
        footer = "not finished" if job.finished else "waiting…"
        if index < len(job.results):
            done = job.results[index]
            footer = (
                f"{done.new_tokens} tokens in {cards.seconds_text(done.seconds)}, {number(done.tokens_per_second)} tokens/s · "
                f"KV cache {number(done.kv_bytes / 1e3)} kB measured"
            )
        elif index == len(job.results) and job.state == "running":
            footer = "writing…"
        shown.append((session.runs.index(run), session.title(run), prompt, job.texts[index], footer))
    return cards.streams(shown)


async def evaluate(ctx: Context, view: Compare, session: Session, values: dict) -> AsyncIterator[Updates]:
    """Measure the ticked runs on the same tokens; each row appears when it is there."""
    runs = chosen_runs(session, values[view.runs])
    tokens = require_int("tokens", values[view.eval_tokens], WINDOW, 65_536, f"use {WINDOW} to 65536")
    contexts = [
        info.context for info in map(session.models.get, {run.model for run in runs}) if info is not None and info.context
    ]
    window = min([WINDOW, *contexts])
    steps = [
        Step(
            "evaluate",
            {"key": run.key, "tokens": tokens, "window": window, "reference": run.recipe.model if run.recipe else None},
            f"Measuring {session.title(run)}",
        )
        for run in runs
    ]
    seen = 0
    async for job in ctx.follow(session, "evaluate", steps):
        while seen < len(job.results):
            runs[seen].evaluation, seen = job.results[seen], seen + 1
        yield {**view.render(session, values[view.runs]), **ctx.busy(job, "Measuring")}
    yield ctx.rest(session)
