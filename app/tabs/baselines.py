"""The fold on the tab Compare that adds baselines of other libraries to the runs."""

from __future__ import annotations

import gradio as gr

from app.session import Run, Session
from app.view import cards
from app.view import texts_baselines as words
from core.baselines.registry import BASELINES, baseline_key, find_baseline
from core.errors import InputError


class Baselines:
    """The fold. Attributes: choice: names of the baselines to add; those that can run here are offered."""

    def __init__(self) -> None:
        found = BASELINES.values()
        missing = [made for made in found if made.missing is not None]
        with gr.Accordion(words.PANEL, open=False, elem_id="baselines-fold"):
            self.choice = gr.Dropdown(
                [(made.label, made.name) for made in found if made.missing is None],
                value=[],
                multiselect=True,
                label=words.CHOICE,
                info=words.INFO,
                elem_id="baselines",
            )
            if missing:
                packages = " ".join(dict.fromkeys(f"'{text}'" for made in missing for text in made.packages))
                names = ", ".join(made.name for made in missing)
                gr.HTML(cards.hint(words.MISSING.format(names=names, command=f"pip install {packages}")), apply_default_css=False)

    def add(self, session: Session, names: list[str]) -> list[str]:
        """Add baselines of the opened model to the session's runs, and return their keys.

        Raises: InputError where no model is open; as `find_baseline`.
        """
        if session.info is None:
            raise InputError(words.NONE_OPEN, code="E-PARAM-RUNS")
        runs = [Run(baseline_key(session.info.name, name), find_baseline(name).label) for name in names]
        return [session.add_run(run).key for run in runs]
