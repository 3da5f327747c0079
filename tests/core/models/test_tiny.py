"""Tiny models must be skewed, biased, grouped and repeatable: what they do not have, no test can find."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InputError
from core.models.tiny import VOCAB_SIZE, save_tiny, tiny_architectures, tiny_model, tiny_tokenizer
from core.storage import verify
from tests.core.tools import block_inputs, watched


def gains(loaded, *, last: bool = False) -> list[torch.Tensor]:
    """Gains of the norms over the hidden width; the last norm only on request."""
    norms = [loaded.model.decoder.norm] if last else [n for block in loaded.model.blocks for n in (block.norm1, block.norm2)]
    return [norm.weight for norm in norms]


@pytest.mark.parametrize("architecture", tiny_architectures())
def test_outputs_are_finite_and_of_order_one(architecture):
    loaded = tiny_model(architecture)
    ids = torch.randint(0, 256, (2, 100), generator=torch.Generator().manual_seed(0))
    logits = loaded.model(ids).logits
    assert logits.shape == (2, 100, VOCAB_SIZE) and 0.3 < logits.std() < 3 and logits.abs().max() < 30
    assert loaded.model.blocks[1] is not None and loaded.path is None


@pytest.mark.parametrize("architecture", [a for a in tiny_architectures() if "olmo" not in a])  # no norm before attention
def test_norm_gains_have_outliers_and_activations_follow(architecture):
    loaded = tiny_model(architecture)
    for gain in gains(loaded):
        ratio = gain.abs() / gain.abs().median()
        assert (ratio > 5).sum() == 3 and gain.std() > 0
    assert all(gain.abs().max() < 2 for gain in gains(loaded, last=True))
    seen = []
    inputs = block_inputs(loaded.model, torch.arange(200)[None])
    watched(loaded.model.blocks[0], inputs.hidden, inputs.rotary, lambda site, x: seen.append(x) if site == "attn_in" else None)
    ranges = (seen[0].amax((0, 1)) - seen[0].amin((0, 1))).sort().values
    assert ranges[-1] > 5 * ranges[len(ranges) // 2]


@pytest.mark.parametrize("architecture", tiny_architectures())
def test_shapes_and_biases_are_those_of_the_architecture(architecture):
    loaded = tiny_model(architecture, layers=3)
    spec = loaded.adapter.spec(loaded.model.config)
    biases = [t for name, t in loaded.model.state_dict().items() if name.endswith("bias")]
    assert len(loaded.model.blocks) == 3 and spec.head_dim == 16
    heads = {"falcon": (4, 1)} | dict.fromkeys(("opt", "gpt2", "gpt_neox"), (4, 4))
    assert (spec.heads, spec.kv_heads) == heads.get(architecture, (8, 2))
    assert bool(biases) == (architecture in ("opt", "gpt2", "gpt_neox", "stablelm", "qwen2", "falcon"))
    assert all(bias.abs().min() > 0 for bias in biases)
    tied = loaded.model.decoder.head.weight is loaded.model.get_input_embeddings().weight
    assert tied == (architecture in ("opt", "smollm", "smollm3", "gpt2", "gemma", "gemma2", "gemma3_text", "falcon"))
    assert spec.qk_norm == (architecture in ("qwen3", "qwen3_moe", "gemma3_text", "olmo2", "olmo3", "olmoe"))


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (tiny_model("llama", seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_overrides_reach_the_configuration():
    config = tiny_model("qwen3", hidden_size=32, num_key_value_heads=8).model.config
    assert (config.hidden_size, config.num_key_value_heads) == (32, 8)
    with pytest.raises(InputError, match="llama"):
        tiny_model("gpt5")


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_the_tokenizer_keeps_every_text(text):
    tokenizer = tokenizer_once()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    if not any(special in text for special in ("<s>", "</s>", "<unk>")):
        assert len(ids) == len(text.encode()) and all(0 <= n < 256 for n in ids)


def tokenizer_once(store: list = []):  # noqa: B006  (one tokenizer for all examples)
    if not store:
        store.append(tiny_tokenizer())
    return store[0]


def test_a_saved_folder_is_whole(tmp_path):
    folder = save_tiny(tmp_path / "m", "opt", layers=1)
    verify(folder, checksums=True)
    assert (folder / "model.safetensors").exists() and not list(folder.glob("*.bin"))
