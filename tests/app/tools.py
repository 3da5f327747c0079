"""Shared by the tests of the app: a stream as a list, a progress that is not shown, figures that plotly accepts."""

from __future__ import annotations

import json
from collections.abc import AsyncIterable

import plotly.graph_objects as go

from app.view.figure import THEMES

FAKE = "tests.app.fake_workbench:FakeWorkbench"
"""The workbench of the tests' workers, as the settings name it."""


async def collect(stream: AsyncIterable) -> list:
    """All items of a stream."""
    return [item async for item in stream]


def quiet(*_: object) -> None:
    """No progress."""


def resolve(value, theme):
    """Colour tokens as the browser replaces them."""
    if isinstance(value, dict):
        return {k: resolve(v, theme) for k, v in value.items()}
    if isinstance(value, list):
        return [resolve(v, theme) for v in value]
    if isinstance(value, str) and value.startswith("@ordered:"):
        assert 0 <= float(value[9:]) <= 1
        return theme["ordered"][0][1]
    return theme[value[1:]] if isinstance(value, str) and value.startswith("@") else value


def valid(figure):
    """Check a figure against plotly's schema, in both themes, and return it as it travels."""
    text = json.dumps(figure, allow_nan=False)
    for theme in THEMES.values():
        go.Figure(resolve(json.loads(text), theme))
    return json.loads(text)
