"""A tiny BitNet model in each of the stored formats."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from core.models.io.bitnet import save_bitnet
from core.models.loaded import LoadedModel
from tests.core.tools import tokens

CARD = {"title": "Tiny", "description": "Random weights.", "licence": "Apache-2.0", "steps": 0}
IDS = tokens(2, 24, seed=5)


def write(folder: Path, form: str, loaded: LoadedModel, **quantization) -> Path:
    """The model in one of the formats."""
    save_bitnet(folder, loaded.model, loaded.tokenizer, mode="w1.58a8", card=CARD)
    if form == "saved":
        return folder
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    if form == "bitlinear":
        state = {n: 1 / t if n.endswith("_scale") else t for n, t in state.items()}
        config["quantization_config"] = {"quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline"}
        del config["quantscope"]
    else:
        dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
        state = {n: loaded.model.state_dict()[n].to(dtype).contiguous() for n in state if not n.endswith("_scale")}
        if form == "quantscope masters":
            del config["quantization_config"]
        else:
            config["quantization_config"]["quantization_mode"] = "online"
            del config["quantscope"]
    if quantization:
        config["quantization_config"] |= quantization
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder
