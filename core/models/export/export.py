"""Write a quantised model as a folder in the format of another program, or refuse it first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from core.errors import InputError
from core.models.decoder import CausalModel
from core.models.export.card import model_card
from core.models.export.compressed import compressed_tensors
from core.models.export.fit import loads_in, require_fit
from core.models.export.gguf import write_gguf
from core.models.export.unfold import other_tensors, projections
from core.models.io.bitnet import PACKED, pack_rows
from core.models.io.quantized import QUANTSCOPE_FILE, read_description
from core.models.io.write import config_facts, write_model
from core.models.loaded import LoadedModel
from core.report import Report
from core.storage import atomic_dir, check_target

CARD = "README.md"


@dataclass(frozen=True)
class ExportReport(Report):
    """What was exported.

    Attributes:
        differences: between the exported model and the one in Quantscope.
        loads: of `core.models.export.fit.loads_in`.
        nbytes: of the files.
    """

    folder: str
    format: str
    label: str
    differences: list[str]
    loads: dict[str, str]
    files: list[str]
    nbytes: int


def check_empty(folder: Path | str) -> None:
    """Refuse a folder that an export may not take. Raises: InputError E-PARAM-OUT, ResourceError E-DISK."""
    check_target(folder)
    if Path(folder).is_dir() and any(Path(folder).iterdir()):
        raise InputError(f"The folder {Path(folder).name[:60]!r} is not empty: choose a new or empty one.", code="E-PARAM-OUT")


def export_model(
    folder: Path | str, loaded: LoadedModel, fmt: str, *, numbers: Mapping[str, Any] | None = None
) -> ExportReport:
    """Write a model into a new or empty folder in one of `FORMATS`, with its card.

    Args: numbers: of `read_numbers`, for the card.
    Raises: InputError E-PARAM-FORMAT with the reason where the format cannot hold the model, E-PARAM-OUT; ResourceError E-DISK.
    """
    check_empty(folder)
    differences, model = require_fit(loaded, fmt), loaded.model
    own = loaded.path is not None and (loaded.path / QUANTSCOPE_FILE).is_file()
    loads, facts = loads_in(loaded), read_description(loaded.path) if own else {}
    card = model_card(loaded, fmt, facts=facts, differences=differences, loads=loads, numbers=numbers)
    if fmt == "gguf":
        with atomic_dir(folder) as stage:
            write_gguf(stage / "model.gguf", loaded)
            (stage / CARD).write_text(card, encoding="utf-8")
    else:
        tensors, stated = _WRITERS[fmt](model)
        config = config_facts(model.config) | {
            "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model.config.model_type]],
            "dtype": "float32",
            **stated,
        }
        write_model(folder, tensors, config, model.generation_config, loaded.tokenizer, files={CARD: card})
    paths = [path for path in Path(folder).iterdir() if path.is_file()]
    sizes = sum(path.stat().st_size for path in paths)
    label = loaded.label or loaded.name
    return ExportReport(str(folder), fmt, label, differences, loads, sorted(path.name for path in paths), sizes)


def _compressed(model: CausalModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, stated = compressed_tensors(model)
    return tensors, {"quantization_config": stated}


def _floats(model: CausalModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return every tensor in float32."""
    tensors = other_tensors(model)
    for projection in projections(model, floats=True):
        tensors[f"{projection.name}.weight"] = projection.weight.float()
        if projection.bias is not None:
            tensors[f"{projection.name}.bias"] = projection.bias
    return tensors, {}


def _bitnet(model: CausalModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return packed ternary weights with their scales, the rest in float32, and the rules that the model runs by."""
    tensors, rules = other_tensors(model), model.blocks[0].rules
    for projection in projections(model):
        tensors[f"{projection.name}.weight"] = pack_rows(projection.weight.codes)
        tensors[f"{projection.name}.weight_scale"] = projection.weight.scale.reshape(1)
    own = {"mode": rules.mode, "keep": rules.keep, "trained": rules.trained is not None}
    return tensors, {"quantization_config": PACKED, "quantscope": own}


_WRITERS = {"compressed-tensors": _compressed, "bitnet": _bitnet, "transformers": _floats}
