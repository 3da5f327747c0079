"""The `config.json` of a folder that Quantscope saves: its own type around the decoder's configuration.

    model_type            "quantscope", which no other program knows: it ends with an error that names this type
    text_config           the decoder's configuration, where transformers and others look for that of a larger model's decoder
    quantization_config   method "quantscope", for programs that read this field alone

Folders of format 1 have the decoder's fields at the top; they are read too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from core.models.io.preflight.config import check_config
from core.models.io.preflight.other_tools import METHOD
from core.models.io.write import config_facts

FORMAT = 2
"""Format of the folders that are written."""


class QuantscopeConfig(PreTrainedConfig):
    """The configuration of a saved folder, as `AutoConfig` gives it after `import core.hf`.

    Attributes: text_config: of the decoder.
    """

    model_type = METHOD
    text_config: PreTrainedConfig | dict[str, Any] | None = None

    def __post_init__(self, quantization_config: object = None, **fields: object) -> None:
        # `quantization_config` is left out: it is for programs without `core.hf`, and transformers would look for its quantiser
        if isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**self.text_config)
        super().__post_init__(**fields)


def saved_config(decoder: PreTrainedConfig) -> dict[str, Any]:
    """Return the content of `config.json` for a decoder's configuration."""
    stated = {"quant_method": METHOD, "format": FORMAT}
    return {"model_type": METHOD, "text_config": config_facts(decoder), "quantization_config": stated}


def decoder_config(stored: Mapping[str, Any]) -> PreTrainedConfig:
    """Build the decoder's configuration from the content of `config.json`.

    Raises: ModelError as `check_config`, which looks at the fields before transformers does; ValueError for an unknown type.
    """
    fields = stored.get("text_config", stored)
    check_config(fields)
    return AutoConfig.for_model(**{name: value for name, value in fields.items() if name != "quantization_config"})
