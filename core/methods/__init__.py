"""Quantisation methods: each module named in `core.recipe.METHODS` has the method's object `METHOD`."""

from __future__ import annotations

import importlib

from core.checks import require_choice
from core.methods.base import Method
from core.recipe import METHODS


def method(name: str) -> Method:
    """Look up the method called `name`. Raises: InputError E-PARAM-METHOD for an unknown name."""
    return importlib.import_module(METHODS[require_choice("method", name, tuple(METHODS))]).METHOD
