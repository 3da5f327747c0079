"""Load a checked model by name: resolve, preflight, compare files and configuration, load.

A model with a tensor that is missing, left over or of another shape is refused before anything is allocated (`skeleton.py`), and
one with NaN afterwards.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
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
from core.models.io.foreign_weights.plan import plan_weights, read_weights
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
    _check_device(device, dtype)
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
    progress("Checking the model's files", None)
    check_contents(resolved.path)
    report = check_folder(resolved.path)
    check_architecture(report.config)
    outside = sum(tensor.count for name, tensor in report.tensors.items() if ".layers." not in name)
    needed = weight_bytes(report.config, report.parameters, outside, itemsize=dtype.itemsize)
    check_memory(needed, bytes_per_parameter=1)
    config, adapter = _configuration(resolved.path, report)
    packed = None if bitnet_format(report.config) is None else f"{adapter.layers}."
    stored, weights = report, None
    if report.quantised:
        report, weights = plan_weights(stored, partial(shapes_of, config))
        check_memory(report.parameters, bytes_per_parameter=dtype.itemsize)
    check_tensors(config, {name: tensor.shape for name, tensor in report.tensors.items()}, inside=packed)
    progress("Loading the tokenizer", 0.1)
    tokenizer = load_tokenizer(resolved.path)
    progress("Loading the weights", 0.2)
    if packed is None:
        values = weights and {n: t.to(dtype) for n, t in read_weights(resolved.path, stored, report, weights)}
        source = _load_weights(resolved.path, dtype, report.wrapper, config, values)
        require_finite(source.state_dict().items())
        model = CausalModel.from_transformers(source, adapter, consume=True).requires_grad_(False)
    else:
        model = load_bitnet(resolved.path, report, config)
    _check_vocabulary(model, tokenizer)
    facts = (resolved.name, resolved.revision, resolved.source)
    packed_bytes = None if weights is None else stored.nbytes
    origin = origin_of(resolved.path, *facts, report.tensors, ternary=packed is not None, packed_bytes=packed_bytes)
    return LoadedModel(model.to(device), tokenizer, adapter, *facts, resolved.path, origin=origin)


def require_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Check every floating-point tensor of (name, tensor) pairs.

    Raises: NumericError E-NUM-NAN naming the first tensor with NaN or infinity and how many values it holds.
    """
    for name, tensor in tensors:
        if not tensor.is_floating_point():
            continue
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise NumericError(f"{name} has {bad:,} NaN or infinite values: the weights are damaged, or too large for "
                               f"{str(tensor.dtype).removeprefix('torch.')}. Download the model again.",
                               code="E-NUM-NAN")


def _configuration(folder: Path, report: FolderReport) -> tuple[PreTrainedConfig, ModelAdapter]:
    """Read the folder's configuration, checked with transformers' defaults filled in, and find its adapter."""
    with quiet(), library_errors("config.json is not valid for its architecture. Download the model again."):
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


def _load_weights(folder: Path, dtype: torch.dtype, wrapper: str, config: PreTrainedConfig,
                  values: Mapping[str, torch.Tensor] | None) -> PreTrainedModel:
    """Load the float model of a folder whose tensors, without `wrapper`, `check_tensors` has compared with its configuration.

    Args: values: the tensors, where the folder stores them in the format of another tool; they are not copied.
    """
    unwrap = {f"^{re.escape(wrapper)}": ""} if wrapper else None
    options = {"dtype": dtype, "attn_implementation": "eager", "output_loading_info": True}  # their attention never runs
    with quiet(), library_errors("The weights do not fit config.json. Download the model again."):
        if values is None:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=False, local_files_only=True, key_mapping=unwrap, **options)
        else:
            model, info = model_class(config).from_pretrained(None, config=config, state_dict=values, **options)
            if (folder / "generation_config.json").exists():
                model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    for key, fault in (("missing_keys", "were not found by transformers"), ("unexpected_keys", "were not used by transformers"),
                       ("mismatched_keys", "were not accepted by transformers")):
        names = (entry if isinstance(entry, str) else str(entry[0]) for entry in info.get(key) or ())
        refuse_tensors((name for name in names if not HARMLESS.search(name) and name != "lm_head.weight"), fault,
                       len(model.state_dict()))
    return model


def _check_vocabulary(model: CausalModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the embedding has a row for every token; else the first forward pass would end with an index error."""
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows:
        raise ModelError(f"The tokenizer has {tokenizer.vocab_size:,} tokens, the model embeds {rows:,}: they do not "
                         "belong together. Download the model again.", code="E-MODEL-TOKENIZER")


def _check_device(device: str, dtype: torch.dtype) -> None:
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
