"""The panel of runs: name one, download it, repeat its command, and open saved ones."""

from __future__ import annotations

import asyncio
import os
import shlex
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import gradio as gr

from app.cli.recipe import command_of
from app.context import LIGHT, Context, Updates
from app.session import Run, Session
from app.view import cards, texts
from app.view.figure import bytes_text
from app.worker.job import Step
from core.errors import InputError
from core.recipe import QuantRecipe

MAX_NAME = 40


class Keep:
    """The panel: its widgets, and the handlers of their events."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx
        with gr.Accordion(texts.KEEP, open=False, elem_id="keep"):
            with gr.Row(elem_classes="qs-controls qs-card", equal_height=True):
                self.run = gr.Dropdown(
                    [], label=texts.KEEP_RUN, elem_id="keep-run", filterable=False, scale=4, min_width=240, interactive=True
                )
                self.name = gr.Textbox(
                    "", label=texts.KEEP_NAME, max_length=MAX_NAME, scale=3, min_width=180, elem_id="run-name"
                )
                with gr.Column(scale=1, min_width=110, elem_classes="qs-tight"):
                    self.rename = gr.Button(texts.KEEP_RENAME, size="sm", elem_id="rename-run")
                    self.remove = gr.Button(texts.KEEP_REMOVE, size="sm", elem_id="remove-run")
                with gr.Column(scale=1, min_width=150, elem_classes="qs-tight"):
                    self.pack = gr.Button(texts.KEEP_PACK, size="sm", elem_id="pack-run")
                    self.file = gr.DownloadButton(texts.KEEP_FILE, size="sm", visible=False, elem_id="run-file")
            self.command = gr.HTML("", elem_id="run-command", apply_default_css=False)
            with gr.Row(elem_classes="qs-controls qs-card", equal_height=True):
                local = not ctx.settings.on_space
                self.path = gr.Textbox("", label=texts.OPEN_PATH, scale=6, min_width=240, visible=local, elem_id="open-path")
                with gr.Column(scale=1, min_width=150, elem_classes="qs-tight"):
                    self.open = gr.Button(texts.OPEN_SAVED, size="sm", visible=local, elem_id="open-saved")
                    self.upload = gr.UploadButton(
                        texts.OPEN_ZIP.format(bytes_text(ctx.settings.file_bytes)),
                        file_types=[".zip"],
                        size="sm",
                        elem_id="upload-saved",
                        type="filepath",
                    )

    def wire(self, shown: Callable[[Session], Updates], targets: list) -> None:
        """Connect the events. `shown(session)`: updates of `targets`, everything else that lists the runs."""
        guard, on, key, self.shown = self.ctx.guard, self.ctx.on, self.ctx.key, shown
        everything = [*self.outputs, *targets, self.ctx.status, self.ctx.stop]
        inputs = {key, self.run, self.name}
        self.run.input(guard(self.chosen), inputs, everything, **LIGHT)
        self.rename.click(guard(self.renamed), inputs, everything, **LIGHT)
        self.name.submit(guard(self.renamed), inputs, everything, **LIGHT)
        self.remove.click(guard(self.removed), inputs, everything, **LIGHT)
        on(self.pack.click, self.packed, inputs, everything)
        on(self.open.click, self.opened, {key, self.path}, everything)
        on(self.upload.upload, self.uploaded, {key, self.upload}, everything)

    @property
    def outputs(self) -> list:
        """Components that a chosen run changes."""
        return [self.run, self.name, self.command, self.file]

    def render(self, session: Session, chosen: object = None) -> Updates:
        """List the runs to choose from; `chosen` if it is one of them, else the newest, with its name and command."""
        runs = session.runs[::-1]
        run = next((r for r in runs if r.key == chosen), runs[0] if runs else None)
        return {
            self.run: gr.update(choices=[(session.title(r), r.key) for r in runs], value=run.key if run else None),
            self.name: run.name if run else "",
            self.command: _told(run) if run is not None else "",
            self.file: gr.update(visible=False),
        }

    def _run(self, session: Session, values: Updates) -> Run:
        """Return the chosen run. Raises: InputError if there is none."""
        run = session.run(values[self.run])
        if run is None:
            raise InputError("No run is chosen: choose one of the list.", code="E-PARAM-RUNS")
        return run

    def chosen(self, values: Updates) -> Updates:
        """Show the chosen run's name and command."""
        return self.render(self.ctx.session(values), values[self.run])

    def renamed(self, values: Updates) -> Updates:
        """Rename the chosen run to the visitor's own name; an empty one restores the page's name."""
        session = self.ctx.session(values)
        run, name = self._run(session, values), " ".join(str(values[self.name] or "").split())
        if len(name) > MAX_NAME:
            raise InputError(f"The name has {len(name)} characters: use at most {MAX_NAME}.", code="E-PARAM-NAME")
        if name and any(other is not run and session.title(other) == name for other in session.runs):
            raise InputError(f"Another run is called {name!r}: choose a name of its own.", code="E-PARAM-NAME")
        run.name = name
        return {**self.render(session, run.key), **self.shown(session)}

    def removed(self, values: Updates) -> Updates:
        """Remove the chosen run from the lists."""
        session = self.ctx.session(values)
        session.runs.remove(self._run(session, values))
        return {**self.render(session), **self.shown(session)}

    async def packed(self, values: Updates) -> AsyncIterator[Updates]:
        """Write the chosen run's saved folder into a zip file to download."""
        session = self.ctx.session(values)
        run = self._run(session, values)
        folder = getattr(run.quantize, "folder", "")
        if not folder:
            raise InputError(texts.KEEP_NO_FOLDER, code="E-PARAM-RUNS")
        yield {self.ctx.status: cards.working(texts.KEEP_PACKING)}
        name, limit = f"quantscope-{run.recipe.hash}.zip", self.ctx.settings.file_bytes
        path, count = await asyncio.to_thread(packed_file, folder, name, limit)
        label = f"{texts.KEEP_FILE} ({bytes_text(count)})"
        yield {self.file: gr.update(value=str(path), label=label, visible=True), **self.ctx.rest(session)}

    async def opened(self, values: Updates) -> AsyncIterator[Updates]:
        """Open a quantised folder of this machine as a run."""
        path = values[self.path]
        if self.ctx.settings.on_space or not isinstance(path, str) or not path.strip():
            raise InputError("No folder was named: give one that Quantise or the command line saved.", code="E-PARAM-MODEL")
        async for updates in self.follow(self.ctx.session(values), {"folder": path.strip()}):
            yield updates

    async def uploaded(self, values: Updates) -> AsyncIterator[Updates]:
        """Open a zip file that a download made as a run of this session."""
        place = values[self.upload]
        if not isinstance(place, str) or not place:
            raise InputError("No file came: choose a zip file that the page's download made.", code="E-CKPT-BAD")
        try:
            # Gradio's paths are a type of their own, which the worker would not read.
            async for updates in self.follow(self.ctx.session(values), {"archive": str(place)}):
                yield updates
        finally:
            Path(place).unlink(missing_ok=True)

    async def follow(self, session: Session, where: dict[str, str]) -> AsyncIterator[Updates]:
        """Follow the job that opens a saved model, and add the model to the runs."""
        async for job in self.ctx.follow(session, "open", [Step("open_saved", where, texts.OPENING)]):
            yield self.ctx.busy(job, texts.OPENING)
        report = job.results[0]
        run = session.add_run(Run(report.key, report.label, QuantRecipe.from_dict(report.recipe), report))
        yield {**self.render(session, run.key), **self.shown(session), **self.ctx.rest(session)}


def _told(run: Run) -> str:
    """Write the command that repeats a run, and the programs that load it."""
    compared = ["python", "-m", "app.cli", "compare", "--models", run.model, "--baseline", run.baseline or ""]
    line = shlex.join(compared) if run.baseline else ""
    line = line if run.recipe is None else command_of(run.recipe)
    return (cards.command(line) if line else "") + (cards.loads(run.quantize.loads) if run.quantize is not None else "")


def packed_file(folder: str, name: str, limit: int) -> tuple[Path, int]:
    """Zip a saved folder into Gradio's folder of files, which it deletes later; return the file and its number of bytes.

    Raises: ResourceError if it would have more bytes than `limit`, so that the page takes back what it hands out.
    """
    from core.models.io.bundle import pack

    path = Path(tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR"))) / name
    return path, pack(folder, path, limit=limit)
