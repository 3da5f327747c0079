"""Compare stored tensors with those that a configuration describes, before anything is allocated.

transformers allocates what `config.json` asks for, fills a missing tensor with random numbers and mentions it only in a log. Here
the model is built on torch's device "meta", which has shapes and no memory, and compared with the headers of the weight files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from core.errors import ModelError
from core.models.io.foreign import library_errors, quiet

HARMLESS = re.compile(r"rotary_emb\.inv_freq$|\.(?:attn|attention)\.(?:masked_)?bias$")
"""Buffers that old checkpoints store and current code computes itself."""
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_MIXTRAL = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}
"""Names in published checkpoints of Mixtral, and in all others with experts."""
OLD_NAMES = {"embed_out.weight": "lm_head.weight"}
"""Names of published checkpoints (GPT-NeoX) that transformers renames while it loads them."""


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model that `config` describes on torch's device "meta". Raises: ModelError E-MODEL-BAD if transformers cannot."""
    sentence = "config.json is not valid for its architecture. Download the model again."
    with quiet(), library_errors(sentence), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def check_tensors(
    config: PreTrainedConfig, stored: Mapping[str, tuple[int, ...]], *, inside: str | None = None
) -> dict[str, str]:
    """Check that the stored tensors are the ones that `config` describes, before anything is allocated.

    Args:
        stored: name → shape, from the weight files; names with or without the base model's prefix. A tied output weight may
            be stored or not.
        inside: prefix of names that are not compared, as tensors there are stored in another form.
    Returns: for every tensor of the model that is stored, and compared, its name in the model → its name in the files.
    Raises: ModelError E-MODEL-MISSING naming up to three tensors that are missing, of another shape, or left over; E-MODEL-BAD
        for a configuration that transformers cannot build.
    """
    expected, prefix = _shapes(config, stored)
    found, names = {}, {}
    for name, shape in stored.items():
        if not HARMLESS.search(name) and not (inside and name.startswith(inside)):
            spelled = _spelled(name, expected, prefix) or name
            found[spelled], names[spelled] = shape, name
    wanted = {name for name in expected if not (inside and name.startswith(inside))}
    if getattr(config, "tie_word_embeddings", False):
        wanted.discard("lm_head.weight")
    refuse_tensors(wanted - set(found), "are missing from the weights", len(expected))
    refuse_tensors((n for n in wanted if found[n] != expected[n]), "have another shape than config.json says", len(expected))
    refuse_tensors(set(found) - set(expected), "do not belong to this architecture", len(stored))
    return names


def shapes_of(config: PreTrainedConfig, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes that stored tensors have in the model that `config` describes, by their names in the file; tensors that
    it does not have are left out. Raises: as `check_tensors` for a configuration."""
    names = tuple(names)
    expected, prefix = _shapes(config, names)
    return {name: expected[spelled] for name in names if (spelled := _spelled(name, expected, prefix))}


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of the model that `config` describes. Raises: as `check_tensors` for a configuration."""
    return type(skeleton(config))


def fused_experts(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors by their names in a checkpoint, with those of single experts joined as transformers' layers hold them.

    Returns: `experts.gate_up_proj` [N, 2 F, D] and `experts.down_proj` [N, D, F] in place of `experts.<i>.gate_proj.weight`, ….
    """
    found, single = {}, {}
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            single.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
        else:
            found[name] = tensor
    for path, own in single.items():
        count = 1 + max(index for index, _ in own)
        found[f"{path}.gate_up_proj"] = torch.stack([torch.cat([own[i, "gate"], own[i, "up"]]) for i in range(count)])
        found[f"{path}.down_proj"] = torch.stack([own[i, "down"] for i in range(count)])
    return found


def _shapes(config: PreTrainedConfig, stored: Iterable[str]) -> tuple[dict[str, tuple[int, ...]], str]:
    """Return the shape of each tensor of the model by its name, and the base model's prefix.

    Where the names that are stored are of single experts, as in every published checkpoint, so are those returned.
    """
    model, found = skeleton(config), {}
    alone = any(_EXPERT.fullmatch(_published(name)) for name in stored)
    for name, tensor in model.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if not (alone and path.endswith(".experts")):
            found[name] = tuple(tensor.shape)
            continue
        count, rows, columns = tensor.shape
        parts, rows = (("gate", "up"), rows // 2) if leaf == "gate_up_proj" else (("down",), rows)
        found |= {f"{path}.{i}.{part}_proj.weight": (rows, columns) for i in range(count) for part in parts}
    return found, f"{model.base_model_prefix}."


def _published(name: str) -> str:
    """Return the name of a stored tensor with experts named as in most architectures."""
    if ".block_sparse_moe." in name:
        for old, new in _MIXTRAL.items():
            name = name.replace(old, new)
    return name


def _spelled(name: str, expected: Mapping[str, tuple[int, ...]], prefix: str) -> str | None:
    """Return transformers' name of a stored tensor; None if the model has none."""
    old, name = OLD_NAMES.get(name), _published(name)
    return next((n for n in (name, prefix + name, name.removeprefix(prefix), old) if n in expected), None)


def refuse_tensors(names: Iterable[str], fault: str, total: int) -> None:
    """Raise ModelError E-MODEL-MISSING naming up to three of `names`, if there are any. total: number of all tensors."""
    found = sorted(names)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ModelError(
            f"{len(found)} of {total} tensors {fault}; download the model again: "
            f"{', '.join(name[:50] for name in found[:3])}{more}.",
            code="E-MODEL-MISSING",
        )
