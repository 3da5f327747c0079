"""Load a checked model by name: resolve, preflight, compare files and configuration, load.

A model with a tensor that is missing, left over or of another shape is refused before anything is allocated (`skeleton.py`), and
one with NaN afterwards.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN

from core.cache import in_use
from core.errors import BackendError, InputError, ModelError, NumericError
from core.models.adapter import ModelAdapter
from core.models.architectures import adapter_for
from core.models.decoder import CausalModel
from core.models.io.bitnet import load_bitnet
from core.models.io.catalog import ResolvedModel, resolve
from core.models.io.foreign import library_errors, load_tokenizer, quiet
from core.models.io.foreign_weights.plan import PackedWeight, plan_weights, read_weights
from core.models.io.integrity import check_contents
from core.models.io.limits import check_memory
from core.models.io.origin import origin_of
from core.models.io.preflight.config import bitnet_format, check_architecture, check_config, check_layers, weight_bytes
from core.models.io.preflight.folder import FolderReport, check_folder
from core.models.io.quantized import QUANTSCOPE_FILE, load_quantized
from core.models.io.skeleton import HARMLESS, check_tensors, model_class, refuse_tensors, shapes_of
from core.models.loaded import LoadedModel
from core.progress import Progress, silent
from core.storage import verify

logger = logging.getLogger(__name__)

_SETTINGS = ("quantization_config", "compression_config", "quantization")


def load_model(name: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu",
               progress: Progress = silent, allow_local: bool = True) -> LoadedModel:
    """Load the model called `name` (see `catalog.resolve`), whatever its stored type, as `dtype` on `device`.

    Args:
        dtype: a floating-point type; float32 on a CPU. Ternary models and folders quantised by Quantscope keep stored codes, with
            float32 for their other tensors.
        progress: called with a stage's text and a fraction (None: unknown).
    Raises:
        ModelError: cannot be found or is refused; E-MODEL-ARCH for an architecture without adapter, E-MODEL-MISSING
            naming up to three tensors, E-MODEL-TOKENIZER; E-NUM-NAN naming a tensor with NaN or infinity in a ternary model.
        NumericError E-NUM-NAN: the same in a float model. ArtifactError: a damaged folder of the cache, or a damaged embedded
            or quantised model; NaN in a quantised one.
        InputError, BackendError: `device` is unknown or not there.
    """
    check_device(device, dtype)
    resolved = resolve(name, revision=revision, progress=progress, allow_local=allow_local)
    with in_use(resolved.path):
        return _load(resolved, dtype, device, progress)


def _load(resolved: ResolvedModel, dtype: torch.dtype, device: str, progress: Progress) -> LoadedModel:
    """Load the checked folder that a name stands for."""
    if (resolved.path / QUANTSCOPE_FILE).exists():
        verify(resolved.path)
        loaded = load_quantized(resolved.path, progress=progress)
        loaded.model.to(device)
        return loaded
    checked = check_model(resolved, progress, itemsize=dtype.itemsize)
    progress("Loading the weights", 0.2)
    if checked.ternary:
        model = load_bitnet(resolved.path, checked.report, checked.config)
    else:
        source = _load_weights(checked, dtype)
        require_finite(source.state_dict().items())
        model = CausalModel.from_transformers(source, checked.adapter, consume=True).requires_grad_(False)
    return checked.loaded(model.to(device))


@dataclass(frozen=True)
class CheckedFolder:
    """A folder of float or ternary weights that has passed every check that needs no weight.

    Attributes:
        report: of its tensors; names: name of a tensor in transformers' model → its name there, of ternary models outside the
            layers only.
        ternary: whether the layers hold ternary weights, or masters of them.
        stored, weights: what `plan_weights` took and returned for weights in the format of another tool; weights is None else.
    """

    resolved: ResolvedModel
    report: FolderReport
    config: PreTrainedConfig
    adapter: ModelAdapter
    tokenizer: PreTrainedTokenizerBase
    names: dict[str, str]
    ternary: bool
    stored: FolderReport
    weights: Mapping[str, PackedWeight] | None

    def loaded(self, model: CausalModel) -> LoadedModel:
        """Put a model of these weights together with its tokenizer and origin.

        Raises: ModelError E-MODEL-TOKENIZER if the embedding lacks a row for a token: a pass would end with an index error.
        """
        rows, known = model.get_input_embeddings().weight.shape[0], self.tokenizer.vocab_size
        if known > rows:
            raise ModelError(f"The tokenizer has {known:,} tokens, the model embeds {rows:,}: they do not belong together. "
                             "Download the model again.", code="E-MODEL-TOKENIZER")
        source = self.resolved.source + ("; only its text model is read" if self.report.images else "")
        path, facts = self.resolved.path, (self.resolved.name, self.resolved.revision, source)
        packed = None if self.weights is None else self.stored.nbytes
        origin = origin_of(path, *facts, self.report.tensors, ternary=self.ternary, packed_bytes=packed)
        return LoadedModel(model, self.tokenizer, self.adapter, *facts, path, origin=origin)


def check_model(resolved: ResolvedModel, progress: Progress, *, itemsize: int | None) -> CheckedFolder:
    """Check files, configuration, tensors and tokenizer of a folder that was not quantised here; no weight is read.

    Args: itemsize: bytes of a weight in memory, where all of them must fit; None where they are read in parts.
    Raises: ModelError, as `load_model`.
    """
    progress("Checking the model's files", None)
    check_contents(resolved.path)
    report = check_folder(resolved.path)
    check_architecture(report.config)
    if itemsize is not None:
        outside = sum(tensor.count for name, tensor in report.tensors.items() if ".layers." not in name)
        check_memory(weight_bytes(report.config, report.parameters, outside, itemsize=itemsize), bytes_per_parameter=1)
    config, adapter = _configuration(resolved.path, report)
    ternary, stored, weights = bitnet_format(report.config) is not None, report, None
    if report.quantised:
        report, weights = plan_weights(stored, partial(shapes_of, config))
        if itemsize is not None:
            check_memory(report.parameters, bytes_per_parameter=itemsize)
    shapes = {name: tensor.shape for name, tensor in report.tensors.items()}
    names = check_tensors(config, shapes, inside=f"{adapter.layers}." if ternary else None)
    progress("Loading the tokenizer", 0.1)
    return CheckedFolder(resolved, report, config, adapter, load_tokenizer(resolved.path), names, ternary, stored, weights)


def require_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Check every floating-point tensor of (name, tensor) pairs.

    Raises: NumericError E-NUM-NAN naming the first tensor with NaN or infinity and how many values it holds.
    """
    for name, tensor in tensors:
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum())):  # else each value is tested, which takes copies
            continue
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:  # not where only the sum is too large
            raise NumericError(f"{name} has {bad:,} NaN or infinite values: the weights are damaged, or too large for "
                               f"{str(tensor.dtype).removeprefix('torch.')}. Download the model again.",
                               code="E-NUM-NAN")


def _configuration(folder: Path, report: FolderReport) -> tuple[PreTrainedConfig, ModelAdapter]:
    """Read the folder's configuration, checked with transformers' defaults filled in, and find its adapter."""
    with quiet(), library_errors("config.json is not valid for its architecture. Download the model again."):
        if report.images:
            config = AutoConfig.for_model(**report.config)
        else:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        for name in _SETTINGS if report.quantised else ():  # the weights are float once they are read
            if hasattr(config, name):
                delattr(config, name)
        complete = json.loads(config.to_json_string(use_diff=False))
        check_config(complete)
        check_layers(complete, report.tensors)
    adapter = adapter_for(config)
    activation = adapter.spec(config).activation
    if activation not in ACT2FN:
        raise ModelError(f"config.json names the unknown activation {str(activation)[:40]!r}: use a model with one that "
                         "transformers has, such as silu.", code="E-MODEL-BAD")
    return config, adapter


def _load_weights(checked: CheckedFolder, dtype: torch.dtype) -> PreTrainedModel:
    """Load the float model of a folder. Transformers reads the files itself if they hold its tensors under its names."""
    folder, config, report = checked.resolved.path, checked.config, checked.report
    plain = checked.weights is None and not report.images and all(name == info.name for name, info in report.tensors.items())
    options = {"dtype": dtype, "attn_implementation": "eager", "output_loading_info": True}  # their attention never runs
    with quiet(), library_errors("The weights do not fit config.json. Download the model again."):
        if plain:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, local_files_only=True, **options)
        else:
            read = read_weights(folder, checked.stored, report, checked.weights or {})
            values = {name: tensor.to(dtype) for name, tensor in read}
            model, info = model_class(config).from_pretrained(None, config=config, state_dict=values, **options)
            if (folder / "generation_config.json").exists():
                model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    for key, fault in (("missing_keys", "were not found by transformers"), ("unexpected_keys", "were not used by transformers"),
                       ("mismatched_keys", "were not accepted by transformers")):
        names = (entry if isinstance(entry, str) else str(entry[0]) for entry in info.get(key) or ())
        refuse_tensors((name for name in names if not HARMLESS.search(name) and name != "lm_head.weight"), fault,
                       len(model.state_dict()))
    return model


def check_device(device: str, dtype: torch.dtype) -> None:
    """Check that a device is there and a type is a float. Raises: InputError E-PARAM-DEVICE, -DTYPE; BackendError."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"The type {str(dtype)[:30]} is not a floating-point type: use float32.", code="E-PARAM-DTYPE")
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError):
        raise InputError(f"Device {str(device)[:30]!r} is unknown: use cpu or cuda.", code="E-PARAM-DEVICE") from None
    if kind not in ("cpu", "cuda"):
        raise InputError(f"Device {kind!r} is not supported: use cpu or cuda.", code="E-PARAM-DEVICE")
    if kind == "cuda" and not torch.cuda.is_available():
        raise BackendError("No CUDA device is available here: use the device cpu.")
