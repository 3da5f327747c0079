"""Call transformers and tokenizers on untrusted files: without output, and with errors of our own types."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import struct
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from core.errors import ModelError, QuantscopeError, ResourceError

logger = logging.getLogger(__name__)

LIBRARY_ERRORS = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ImportError,
                  AssertionError, ArithmeticError, struct.error, SafetensorError, StrictDataclassError)
"""Exceptions of transformers, safetensors and gguf for a file they cannot use."""
_TOKENIZERS = ("tokenizer.", "vocab.", "spiece.", "sentencepiece.")
"""What the names of files with a vocabulary begin with."""


@contextlib.contextmanager
def library_errors(sentence: str, *, code: str = "E-MODEL-BAD") -> Iterator[None]:
    """Turn a library's error into ModelError(`sentence`, `code`); the details go to the log.

    Raises: ModelError; ResourceError E-MEM for a MemoryError. Quantscope's own errors pass unchanged.
    """
    try:
        yield
    except QuantscopeError:
        raise
    except MemoryError as error:
        raise ResourceError("The memory ran out while the model was loading. Choose a smaller model.") from error
    except LIBRARY_ERRORS as error:
        logger.warning("%s", sentence, exc_info=logger.isEnabledFor(logging.DEBUG))
        raise ModelError(sentence, code=code) from error


@contextlib.contextmanager
def tokenizer_errors(sentence: str, *, code: str = "E-MODEL-TOKENIZER", kind: type[QuantscopeError] = ModelError
                     ) -> Iterator[None]:
    """Turn an error of the tokenizers library into `kind`(`sentence`, `code`).

    The library raises bare Exception and, on a hostile file, a Rust panic: a BaseException that would end the process."""
    try:
        yield
    except (QuantscopeError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # noqa: BLE001  (pyo3's PanicException derives from BaseException, see above)
        raise kind(sentence, code=code) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide progress bars and warnings of transformers: its logger is lowered, and text for Python's `sys.stderr` is dropped
    (the bar of its GGUF reader has no switch). Both are restored afterwards."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _require_readers(folder: Path) -> None:
    """Check that there is a tokenizer, and that a `tokenizer.model` without a `tokenizer.json` can be read here: SentencePiece's
    format, or tiktoken's lines."""
    only = folder / "tokenizer.model"
    if not any(path.name.startswith(_TOKENIZERS) for path in folder.iterdir()):
        raise ModelError("The folder has no tokenizer: add the tokenizer.json of its model. Mistral's tekken.json is not read.",
                         code="E-MODEL-TOKENIZER")
    if (folder / "tokenizer.json").exists() or not only.exists():
        return
    with open(only, "rb") as file:  # the first field of a SentencePiece message is its list of pieces: tag 1, type 2
        needed = ("sentencepiece", "google.protobuf") if file.read(1) == b"\n" else ("tiktoken",)
    if missing := [name for name in needed if not _is_installed(name)]:
        packages = " ".join(name.removeprefix("google.") for name in missing)
        raise ModelError(f"The folder has a tokenizer.model and no tokenizer.json, and reading it needs more packages: run "
                         f"`pip install {packages}`, or add the tokenizer.json of the model.", code="E-MODEL-TOKENIZER")


def _is_installed(module: str) -> bool:
    """Say whether a module can be found; a missing parent package counts as not."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def load_tokenizer(folder: Path, config: PreTrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of a checked model folder.

    Args: config: of the model, where the folder's `config.json` is not transformers' own.
    Raises: ModelError E-MODEL-TOKENIZER; it names the packages if there is only a `tokenizer.model`, which needs more of them.
    """
    _require_readers(folder)
    with quiet(), tokenizer_errors("The model's tokenizer files are missing or damaged. Download the model again."):
        return AutoTokenizer.from_pretrained(
            folder, config=config, use_fast=True, trust_remote_code=False, local_files_only=True)
