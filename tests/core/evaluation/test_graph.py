"""Why a decoding step is captured or not, and that a failed capture leaves the cache as any other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from core.evaluation import graph
from core.evaluation.generate import generate
from core.evaluation.graph import DecodeStep, captured_step, unsupported_reason
from core.quant.kv_cache import FloatKVLayer, KVCache
from core.recipe import BitNetOptions, Clusters
from kernels import Backend
from tests.core.tools import quantised, relative, tokens


def prompted(scheme="W4A4KV", *, prompt=6, **options):
    """(model, adapter, cache that holds a prompt) of a quantised model."""
    if scheme == "bitnet":
        made = quantised("bitnet", layers=1, method="bitnet", bitnet=BitNetOptions(kv_bits=3))
    else:
        made = quantised("llama", scheme=scheme, weights="rtn", layers=1, clusters=Clusters.uniform(1), **options)
    cache = made.model.decoder.new_cache()
    made.model(tokens(1, prompt), cache=cache)
    return made, cache


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Nothing is known against the device."""
    pytest.importorskip("triton")
    monkeypatch.setattr(graph, "triton_unsupported_reason", lambda device: None)


@pytest.mark.parametrize("scheme", ["W4A4KV", "W4A4", "W4A8", "bitnet"])
def test_every_packed_cache_can_be_captured(scheme, on_a_gpu):
    made, cache = prompted(scheme)
    assert unsupported_reason(made.model, cache, 32) is None


def test_the_reason_is_named(on_a_gpu):
    made, cache = prompted()
    assert "15 new tokens" in unsupported_reason(made.model, cache, 15)
    assert "not packed" in unsupported_reason(made.model, KVCache([FloatKVLayer()]), 32)
    made.blocks[0].attention.sink_tokens = 7
    assert "stay in float" in unsupported_reason(made.model, cache, 32)
    made.blocks[0].attention.sink_tokens = 1
    made.blocks[0].attention.window = 30
    assert "38 tokens leave the window of 30" in unsupported_reason(made.model, cache, 32)
    made.blocks[0].attention.window = None
    made.blocks[0].attention.qkv.set_backend(Backend.REFERENCE)
    assert "by name" in unsupported_reason(made.model, cache, 32)


def test_a_cache_that_kernels_cannot_take_is_named(on_a_gpu):
    made, cache = prompted()
    for states in (cache.layers[0].key_states, cache.layers[0].value_states):
        states._heads = replace(states.heads(), dim=320)
    assert "heads of 320 channels" in unsupported_reason(made.model, cache, 32)
    made, cache = prompted("bitnet")
    made.blocks[0].attention.softmax_bits = 8
    assert "softmax" in unsupported_reason(made.model, cache, 32)


def test_without_a_gpu_nothing_is_captured():
    made, cache = prompted()
    assert unsupported_reason(made.model, cache, 32) == "kernels run on cuda, not on cpu"
    assert captured_step(made.model, cache, 32) == (None, "")


@pytest.mark.parametrize("error", ["out of resource", "out of memory"])
def test_whatever_a_capture_raises_the_cache_goes_on(error, on_a_gpu, monkeypatch):
    """Triton's errors are no RuntimeErrors."""
    from triton.runtime.errors import OutOfResources

    def fail(step):
        assert step.cache.layers[0].pinned
        raise OutOfResources(237568, 232448, "shared memory") if error == "out of resource" else torch.OutOfMemoryError(error)

    monkeypatch.setattr(DecodeStep, "capture", fail)
    made, cache = prompted()
    _, plain = prompted()
    with monkeypatch.context() as patch:
        patch.setattr(type(made.model), "device", torch.device("cuda"))
        patch.setattr(
            DecodeStep, "__init__", lambda step, model, cache, room: (setattr(step, "cache", cache), cache.pin(room))[0]
        )
        step, how = captured_step(made.model, cache, 32)
    assert step is None and how.startswith("one by one: the capture failed: ") and error in how
    assert not cache.layers[0].pinned
    after = [made.model(tokens(1, 1), cache=c).logits for c in (cache, plain)]
    assert relative(*after) < 1e-6


def test_generating_says_how_kernels_were_launched(monkeypatch):
    made, _ = prompted()
    arguments = (made.model, made.loaded.tokenizer, "a b")
    assert generate(*arguments, max_new_tokens=3).decoding == ""
    monkeypatch.setattr("core.evaluation.generate.captured_step", lambda *_: (None, "one by one: a reason"))
    assert generate(*arguments, max_new_tokens=3).decoding == "one by one: a reason"


def test_a_step_beyond_its_room_is_refused(monkeypatch):
    made, cache = prompted()
    step = DecodeStep(made.model, cache, 2)
    monkeypatch.setattr(DecodeStep, "_forward", lambda self: torch.zeros(1, 1, 4))
    for left in (1, 0):
        step(5)
        assert step.left == left
    with pytest.raises(IndexError, match="full with 8 tokens"):
        step(5)
