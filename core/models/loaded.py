"""A model in memory with all that is needed to run it, and what its configuration says about texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from core.errors import ModelError
from core.models.adapter import ModelAdapter
from core.models.decoder import CausalModel
from core.models.io.origin import Origin


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be observed and run.

    Attributes:
        model: in eval mode, no parameter requires a gradient.
        adapter: its entry in the table of architectures.
        name, revision: what `core.models.io.catalog.resolve` needs to find the same weights again.
        source: a sentence for reports on where the weights came from.
        path: the folder it was loaded from; None for a model made in memory.
        label: for a model quantised here, its recipe in one line for tables; None for every other model.
        origin: where the float weights come from and how precise they were; None for a model made in memory.
    """

    model: CausalModel
    tokenizer: PreTrainedTokenizerBase
    adapter: ModelAdapter
    name: str
    revision: str | None
    source: str
    path: Path | None
    label: str | None = None
    origin: Origin | None = None

    def require_dense(self, done: str) -> None:
        """Check that no layer is a mixture of experts. Raises: ModelError E-MODEL-ARCH; `done`: what is not done to one."""
        if self.adapter.experts is not None:
            raise ModelError(
                f"Mixtures of experts are not {done}: quantise this one with rptq or rtn, and measure it.", code="E-MODEL-ARCH"
            )


def context_of(model: CausalModel) -> int | None:
    """Return the largest number of tokens that a model's context holds; None where its configuration does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def prefix_ids(loaded: LoadedModel) -> tuple[int, ...]:
    """Return the token ids that every window and prompt of this model starts with (`prefix_token_ids` of its configuration)."""
    for source in (loaded.model.generation_config, loaded.model.config):
        ids = getattr(source, "prefix_token_ids", None)
        if ids:
            return tuple(int(i) for i in ids)
    return ()
