"""Make transformers open the folders that Quantscope saves: `import core.hf`, then `AutoModelForCausalLM`.

    import core.hf
    model = AutoModelForCausalLM.from_pretrained(FOLDER)

`AutoConfig`, `AutoTokenizer`, pipelines and lm-eval's `HFLM` take the folder then, too. It is read by the reader that
Quantscope itself uses, checksums included; without this import transformers refuses its `model_type`.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from core.cache import in_use
from core.errors import InputError
from core.models.decoder import CausalModel
from core.models.io.load import check_device
from core.models.io.own_config import QuantscopeConfig
from core.models.io.quantized import load_quantized

WITHOUT_EFFECT = (
    "cache_dir", "force_download", "local_files_only", "low_cpu_mem_usage", "proxies", "revision", "token", "trust_remote_code",
    "use_safetensors", "weights_only", "_from_auto", "_from_pipeline", "_commit_hash",
)
"""Options that change nothing about a local folder without code, whatever their value."""


class QuantscopeForCausalLM(CausalModel):
    """A saved model as `AutoModelForCausalLM` gives it; its `config` is the decoder's."""

    config_class = QuantscopeConfig

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        config: PreTrainedConfig | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        device_map: str | int | torch.device | dict[str, str | int | torch.device] | None = None,
        **options: object,
    ) -> QuantscopeForCausalLM:
        """Load a folder that Quantscope saved.

        Args:
            config: what `AutoConfig` read of the folder; only the stored one is accepted.
            dtype, torch_dtype: "auto" or float32, the type of what is not stored in codes.
            device_map: one device for the whole model; "auto" takes a CUDA device where there is one.
            options: those of `WITHOUT_EFFECT`, and others without a value.
        Raises: InputError E-PARAM-OPTION naming an option that is not honoured, E-PARAM-DTYPE, E-PARAM-DEVICE; BackendError;
            as `load_quantized`.
        """
        path = Path(folder).absolute()
        if not path.is_dir():
            fault = f"{str(folder)[:60]!r} is no folder: download the repository, and name its folder."
            raise InputError(fault, code="E-PARAM-FOLDER")
        refused = [n for n, value in options.items() if n not in WITHOUT_EFFECT and value is not None and value != ""]
        if config is not None:
            stored, given = (c.to_dict() for c in (AutoConfig.from_pretrained(folder, local_files_only=True), config))
            refused += [name for name in given if name != "dtype" and given[name] != stored.get(name)]
        if refused:
            raise InputError(
                f"The option {refused[0][:40]} is not honoured for folders of Quantscope: leave it out.", code="E-PARAM-OPTION"
            )
        for asked in (dtype, torch_dtype):
            if asked not in (None, "auto", "float32", torch.float32):
                raise InputError(
                    f"dtype is {str(asked)[:30]}: what a folder of Quantscope does not store in codes is float32; leave it out.",
                    code="E-PARAM-DTYPE",
                )
        device = _device(device_map)
        check_device(device, torch.float32)
        with in_use(path):
            loaded = load_quantized(path)
        model = loaded.model
        made = cls(model.config, loaded.adapter, model.blocks, model.decoder.outside())
        made.generation_config = model.generation_config
        return made.requires_grad_(False).to(device)


def _device(device_map: object) -> str:
    """Return the device that `device_map` names for the whole model."""
    whole = device_map[""] if isinstance(device_map, dict) and set(device_map) == {""} else device_map
    if whole == "auto":
        whole = "cuda" if torch.cuda.is_available() else None
    return "cpu" if whole is None else f"cuda:{whole}" if isinstance(whole, int) else str(whole)


AutoConfig.register(QuantscopeConfig.model_type, QuantscopeConfig)
AutoModelForCausalLM.register(QuantscopeConfig, QuantscopeForCausalLM)
