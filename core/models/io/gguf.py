"""A GGUF file, unpacked once into safetensors and a tokenizer, so that later loads take a second.

transformers reads the blocks (`GgufConfig(dequantize=True)`) and rebuilds configuration and tokenizer from the header;
the result is float32. Quantised blocks stay what they are: the values of a Q4_1 file are Q4_1 values.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path

from core.errors import ModelError
from core.models.io.limits import check_disk, check_memory
from core.models.io.preflight.folder import check_folder
from core.models.io.preflight.gguf import check_gguf
from core.progress import Progress
from core.storage import atomic_dir

logger = logging.getLogger(__name__)

SOURCE_FILE = "source.json"


def convert_gguf(path: Path, target: Path, *, source: dict[str, str], progress: Progress) -> None:
    """Convert the GGUF file `path` into the model folder `target`, all or nothing.

    Args:
        source: written as `source.json`: where the weights came from, a sentence for reports.
        progress: called with a stage's text and, where known, a fraction.
    Raises: ModelError (refused by `check_gguf`, or an architecture transformers cannot read: E-MODEL-ARCH);
        E-MODEL-SIZE, ResourceError E-DISK when it does not fit.
    """
    report = check_gguf(path)
    check_memory(report.parameters)
    check_disk(4 * report.parameters, target)
    with atomic_dir(target, replace=True) as stage:
        progress("Unpacking the GGUF file (once)", None)
        _save(path, stage, report.pre_tokenizer)
        progress("Checking the converted model", 0.9)
        write_source(stage, source)
        check_folder(stage)


def write_source(folder: Path, source: dict[str, str]) -> None:
    """Write `source.json`: {"source": sentence, "revision": …} as given."""
    (folder / SOURCE_FILE).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")


def _save(path: Path, stage: Path, pre_tokenizer: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from core.models.io.foreign import library_errors, quiet, tokenizer_errors  # here: a page lists names without them

    with tempfile.TemporaryDirectory(prefix="quantscope-") as alone, quiet():
        # alone in its folder: transformers would also follow an adapter_config.json beside the file
        os.symlink(path.absolute(), Path(alone) / "model.gguf")
        given = {"gguf_file": "model.gguf", "local_files_only": True, "trust_remote_code": False}
        with library_errors("This GGUF file holds an architecture or a block type that transformers cannot read. "
                            "Choose a llama, mistral, qwen2 or qwen3 file.", code="E-MODEL-ARCH"):
            model, info = AutoModelForCausalLM.from_pretrained(
                alone, dtype=torch.float32, output_loading_info=True, **_dequantize(), **given)
        with tokenizer_errors("The tokenizer in this GGUF file cannot be rebuilt. Choose another file."):
            tokenizer = AutoTokenizer.from_pretrained(alone, **given)
            _split_digits(tokenizer, pre_tokenizer)
        if info["missing_keys"] or info["mismatched_keys"]:
            raise ModelError("Tensors are missing from this GGUF file. Download it again.", code="E-MODEL-MISSING")
        if hasattr(model.config, "quantization_config"):  # save_pretrained refuses while it looks quantised
            del model.config.quantization_config
        model.hf_quantizer = None
        model.config.dtype = torch.float32
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)


def _dequantize() -> dict[str, object]:
    """The option that makes transformers unpack the blocks; versions without it always do."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _split_digits(tokenizer: object, pre_tokenizer: str) -> None:
    """SmolLM splits numbers into digits before byte-level BPE; transformers' GGUF reader does not know that rule."""
    if pre_tokenizer != "smollm":
        return
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if "Digits" not in str(backend.pre_tokenizer):
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer])
