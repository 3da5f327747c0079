"""Read a float model layer by layer: one layer and the tensors outside the layers are in memory.

The model is built on torch's device "meta"; a layer gets its stored tensors, is copied into a `DecoderBlock`, and returns to
"meta". Blocks and other tensors are those of `load_model`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GenerationConfig

from core.errors import ModelError
from core.models.adapter import HEAD
from core.models.block import DecoderBlock
from core.models.convert import outside_tensors
from core.models.decoder import CausalModel
from core.models.io.catalog import ResolvedModel
from core.models.io.foreign import library_errors, quiet
from core.models.io.load import check_model, require_finite
from core.models.io.quantized import QUANTSCOPE_FILE
from core.models.io.shards import read_tensors
from core.models.io.skeleton import fused_experts, skeleton
from core.progress import Progress


class LayerReader:
    """A float model of which one layer at a time is in memory.

    Args:
        resolved: its folder, which is read as long as the reader is used. device: where blocks are put.
    Attributes:
        shell: the model without blocks. count: number of its layers.
    Raises: as `load_model`; ModelError E-MODEL-STREAM for ternary or packed weights, E-MODEL-QUANTIZED for a quantised model.
    """

    def __init__(self, resolved: ResolvedModel, dtype: torch.dtype, device: str, progress: Progress) -> None:
        if (resolved.path / QUANTSCOPE_FILE).exists():
            raise ModelError("This model is already quantised: quantise the float model it came from.", code="E-MODEL-QUANTIZED")
        checked = check_model(resolved, progress, itemsize=None)
        if checked.ternary or checked.weights is not None:
            kind = "Ternary weights" if checked.ternary else "Weights that another tool has packed"
            raise ModelError(
                f"{kind} are not read layer by layer: they are small, so quantise this model in memory.", code="E-MODEL-STREAM"
            )
        self._checked, self._dtype, self.device = checked, dtype, device
        self.adapter, self.count = checked.adapter, checked.config.num_hidden_layers
        self._source = skeleton(checked.config).requires_grad_(False)
        self._source.config.dtype = dtype
        with library_errors("generation_config.json cannot be read. Download the model again."), quiet():
            if (resolved.path / "generation_config.json").exists():
                self._source.generation_config = GenerationConfig.from_pretrained(resolved.path, local_files_only=True)
        progress("Loading the embeddings", 0.2)
        outside = self._read(lambda name: not name.startswith(f"{self.adapter.layers}."))
        self.shell = checked.loaded(self._without_layers(outside).to(device))

    def block(self, index: int) -> DecoderBlock:
        """Read the float block of layer `index`. Raises: NumericError E-NUM-NAN for a tensor with NaN or infinity."""
        prefix, layer = f"{self.adapter.layers}.{index}.", self.adapter.decoder_layers(self._source)[index]
        tensors = self._read(lambda name: name.startswith(prefix))
        tensors = fused_experts(tensors)
        layer.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, assign=True)
        made = DecoderBlock.from_layer(self._source, self.adapter, index)
        layer.to("meta")
        return made.to(self.device)

    def _read(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Read the tensors whose name in transformers' model is wanted, as copies of the files."""
        report, folder = self._checked.report, self._checked.resolved.path
        infos = {own: report.tensors[name] for own, name in self._checked.names.items() if wanted(own)}
        stored, files = {info.name: own for own, info in infos.items()}, {info.name: info.file for info in infos.values()}
        with library_errors("The weights cannot be read. Download the model again."):
            found = {stored[name]: tensor.to(self._dtype, copy=True) for name, tensor in read_tensors(folder, files)}
        require_finite(found.items())
        return found

    def _without_layers(self, tensors: dict[str, Tensor]) -> CausalModel:
        """Make the model without blocks; a stored head that equals a tied embedding is the embedding, as in transformers."""
        config = self._source.config
        embedding = tensors[f"{self.adapter.layers.rpartition('.')[0]}.{self.adapter.embed}.weight"]
        if config.tie_word_embeddings and HEAD in tensors and torch.equal(tensors[HEAD], embedding):
            del tensors[HEAD]
        made = CausalModel(config, self.adapter, (), outside_tensors(tensors, self.adapter, config)).requires_grad_(False)
        made.generation_config = self._source.generation_config
        return made
