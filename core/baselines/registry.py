"""The baselines by name: their libraries, the versions that are installed here, or why one cannot run.

A baseline of a model is a model too. Its key is the model's key, `::` and the baseline's name, as in `smollm2-135m::bnb-nf4`;
every place that takes a model's key takes it. Nothing here imports a library.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

from packaging.requirements import Requirement

from core.checks import require_choice
from core.errors import ResourceError

SEPARATOR = "::"


def installed_version(name: str) -> str | None:
    """Return the installed version of a package, None where it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Baseline:
    """What another library makes of a float model.

    Attributes:
        name: in keys and on the command line. title: for people.
        packages: what must be installed, as pip writes requirements; the first one quantises.
        bits: of a code. keys_values: whether it quantises keys and values; else the weights of the decoder's linear layers.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    bits: int
    keys_values: bool = False

    @property
    def missing(self) -> str | None:
        """The sentence that says why it cannot run here and how to install it; None where it can run."""
        for text in self.packages:
            needed = Requirement(text)
            found = installed_version(needed.name)
            if found is None or not needed.specifier.contains(found, prereleases=True):
                state = "is not installed" if found is None else f"is installed as {found}"
                return f"{self.name} needs {text}, which {state}: run `pip install '{text}'`."
        return None

    @property
    def label(self) -> str:
        """The title with the installed version of each library."""
        names = [Requirement(text).name for text in self.packages]
        return f"{self.title}, {', '.join(f'{name} {installed_version(name)}' for name in names)}"


_GGUF, _BNB, _AO = ("gguf>=0.19",), ("bitsandbytes>=0.50",), ("torchao>=0.18",)
_QUANTO, _HQQ = ("optimum-quanto>=0.2.7", "transformers>=5.14"), ("hqq>=0.2.8", "transformers>=5.14")

BASELINES = {
    made.name: made
    for made in (
        Baseline("gguf-q8_0", "llama.cpp's Q8_0", _GGUF, 8),
        Baseline("gguf-q5_1", "llama.cpp's Q5_1", _GGUF, 5),
        Baseline("gguf-q5_0", "llama.cpp's Q5_0", _GGUF, 5),
        Baseline("gguf-q4_1", "llama.cpp's Q4_1", _GGUF, 4),
        Baseline("gguf-q4_0", "llama.cpp's Q4_0", _GGUF, 4),
        Baseline("bnb-int8", "LLM.int8()", _BNB, 8),
        Baseline("bnb-nf4", "NF4", _BNB, 4),
        Baseline("bnb-nf4-double", "NF4 with double quantisation", _BNB, 4),
        Baseline("torchao-int8", "int8 weight-only", _AO, 8),
        Baseline("torchao-int4", "int4 weight-only, groups of 32", _AO, 4),
        Baseline("llmc-gptq", "GPTQ, int4 in groups of 32", ("llmcompressor>=0.14",), 4),
        Baseline("kv-quanto-4", "QuantizedCache, 4 bits", _QUANTO, 4, keys_values=True),
        Baseline("kv-quanto-2", "QuantizedCache, 2 bits", _QUANTO, 2, keys_values=True),
        Baseline("kv-hqq-8", "QuantizedCache, 8 bits", _HQQ, 8, keys_values=True),
        Baseline("kv-hqq-4", "QuantizedCache, 4 bits", _HQQ, 4, keys_values=True),
        Baseline("kv-fp8", "QuantizedCache, FP8", ("transformers>=5.24",), 8, keys_values=True),
    )
}


def find_baseline(name: str) -> Baseline:
    """Look up a baseline that can run here.

    Raises: InputError E-PARAM-BASELINE for an unknown name; ResourceError E-EXTRA for one whose library is missing.
    """
    found = BASELINES[require_choice("baseline", name, tuple(BASELINES))]
    if found.missing is not None:
        raise ResourceError(found.missing, code="E-EXTRA")
    return found


def baseline_key(model: str, name: str) -> str:
    """Return the key of a model's baseline."""
    return f"{model}{SEPARATOR}{name}"


def split_key(key: str) -> tuple[str, str | None]:
    """Split a key into the model's own key and the name of its baseline, None where it has none."""
    model, separator, name = key.rpartition(SEPARATOR)
    return (model, name) if separator and model else (key, None)
