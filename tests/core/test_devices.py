"""From loading to a continuation on a device that is not the CPU: nothing stays behind, and the numbers are the CPU's."""

from __future__ import annotations

import pytest
import torch

from core.calibration.channel import channel_detail
from core.calibration.data import calibration_tokens
from core.evaluation.generate import generate
from core.evaluation.perplexity import Reference, hidden_windows
from core.evaluation.sparsity import input_histogram
from core.evaluation.windows import evaluation_windows
from core.models.io.load import load_model
from core.models.io.quantized import save_quantized
from core.models.tiny import save_tiny
from core.recipe import Bits, Calibration, QuantRecipe
from core.stages import evaluate, observe, quantize
from tests.core.elsewhere import AWAY, elsewhere

TEXT = "text:" + " ".join(f"number {i} comes after number {i - 1}." for i in range(1, 200))
CALIBRATION = Calibration(TEXT, 128, 32)
RECIPES = {
    "llama": {},
    "opt": {"scheme": "W4A4KV", "weights": "rtn", "variant": "official"},
    "qwen3": {"scheme": "custom", "bits": Bits(q=4, k=3, v=2, down_in=8), "segments": "aligned"},
    "mistral": {"method": "rtn", "scheme": "W4A8"},
    "bitnet": {"method": "bitnet"},
}


@pytest.fixture
def anywhere(monkeypatch):
    """`load_model` takes the pretended device."""
    monkeypatch.setattr("core.models.io.load.check_device", lambda device, dtype: None)


def everything(folder: str, recipe: QuantRecipe, out, device: str) -> dict[str, object]:
    """Whatever the pipeline reports of a model on a device, and of the model quantised there."""
    base = load_model(folder, device=device)
    ranges = observe(base, recipe.calibration)
    made, report = quantize(base, recipe)
    save_quantized(out, made, {"report": report.to_dict()})
    back = load_model(str(out), device=device)
    parts, source = evaluation_windows(back, TEXT, tokens=64, window=32)
    reference = Reference("base", base.model.get_output_embeddings(), hidden_windows(base.model, parts))
    scores = [evaluate(model, parts, source, reference=reference) for model in (made, back)]
    assert {str(t.device) for m in (base, made, back) for t in m.model.state_dict().values()} == {device}
    assert {ranges.device, *(s.device for s in scores)} == {device} and all(f"on {device}," in s.protocol for s in scores)
    windows, _ = calibration_tokens(base, recipe.calibration, 0, True)
    return {
        "ranges": {name: entry.to_dict() for name, entry in ranges.sites.items()},
        "layers": report.layers,
        "scores": [(s.nll, s.kld_mean, s.same_top_token) for s in scores],
        "texts": [generate(m.model, m.tokenizer, "number", max_new_tokens=4).text for m in (base, back)],
        "channel": channel_detail(base, windows, "layers.1.down_in", 3),
        "histogram": input_histogram(back, parts, "t", "attn_in", 1).counts,
    }


@pytest.mark.parametrize("architecture", RECIPES)
def test_another_device_gives_the_same_numbers(architecture, tmp_path, anywhere):
    folder = str(save_tiny(tmp_path / "m", architecture, seed=1))
    recipe = QuantRecipe(folder, calibration=CALIBRATION, **RECIPES[architecture])
    here = everything(folder, recipe, tmp_path / "here", "cpu")
    with elsewhere():
        there = everything(folder, recipe, tmp_path / "there", str(AWAY))
    assert there == here


def test_the_pretended_device_is_strict():
    with elsewhere() as device:
        away = torch.arange(3, device=device)
        assert away.device == device and away.cpu().tolist() == [0, 1, 2] and (away + 1).device == device
        for mix in (lambda: away + torch.ones(3), lambda: torch.ones(4)[away], lambda: torch.cat([away, torch.ones(2)])):
            with pytest.raises(RuntimeError, match="same device"):
                mix()
        assert (away * torch.tensor(2)).cpu().tolist() == [0, 2, 4] and away[torch.tensor([2, 0])].cpu().tolist() == [2, 0]
