"""Whole models through the Triton ops, prefill and decoding: the logits of their CPU paths, and proof that the ops ran."""

from __future__ import annotations

import importlib
from collections import Counter

import pytest

from core.evaluation.graph import DecodeStep, unsupported_reason
from core.recipe import BitNetOptions, Clusters
from kernels import Backend
from tests.core.tools import in_steps, quantised, relative, tokens

pytestmark = pytest.mark.gpu

PROMPT, NEW = 6, 2
BOUND = 1e-5
"""Float32 sums in another order; measured in the interpreter: at most 1.5e-6."""
TIES = 0.05
"""On a GPU an activation within rounding of a tie may take the neighbouring code, which moves logits further."""
LAUNCHES = {  # what each op does when its kernel runs
    "attention": ("kv.attention", "launch"),
    "append": ("kv.append", "launch_pack"),
    "norm": ("norm_quant", "_launch"),
    "rope": ("rope", "_launch"),
    "topk": ("topk", "launch"),
    "compact": ("ternary.sparse", "compact"),
    "codes": ("linear.cluster", "launch"),
    "floats": ("linear.weight_only", "launch"),
    "ternary": ("ternary.linear", "launch"),
}


@pytest.fixture
def count(monkeypatch):
    """How often each op has launched its kernel."""
    seen = Counter()
    for name, (module, function) in LAUNCHES.items():
        original = getattr(importlib.import_module(f"kernels.{module}"), function)

        def counted(*args, name=name, original=original, **options):
            seen[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(f"kernels.{module}.{function}", counted)
    return seen


def logits(made, device, *, rows=2):
    """[rows, PROMPT + NEW, V]: a prompt, then one token at a time, with the cache of the model."""
    model = made.model.to(device)
    for block in made.blocks:
        for linear in block.linears().values():
            linear.set_backend(linear.requested)  # chosen anew, as a move to another device does
    cache = model.decoder.new_cache()
    ids = tokens(rows, PROMPT + NEW).to(device)
    return in_steps(model, ids, cache, steps=(PROMPT,)).cpu(), cache


def rptq(architecture, scheme, *, clusters, **options):
    return quantised(architecture, scheme=scheme, weights="rtn", layers=1, clusters=Clusters.uniform(clusters), **options)


@pytest.mark.parametrize(("architecture", "scheme"), [("llama", "W4A4KV"), ("qwen3", "W4A3KV"), ("opt", "W4A4KV")])
def test_a_packed_cache(architecture, scheme, request, count):
    made = rptq(architecture, scheme, clusters=4)
    expected, plain = logits(made, "cpu")
    assert not count
    found, cache = logits(made, request.getfixturevalue("triton_everywhere"))
    assert count["attention"] == NEW and count["append"] == 2 * (NEW + 1)
    assert count["rope"] == (0 if architecture == "opt" else 2 * (NEW + 1)) and count["floats"] == 4 * (NEW + 1)
    assert cache.get_seq_length() == PROMPT + NEW and cache.nbytes == plain.nbytes
    assert relative(found, expected) < BOUND


@pytest.mark.parametrize(("variant", "in_prefill"), [("official", True), ("", False)], ids=["no sinks", "a sink"])
@pytest.mark.parametrize("architecture", ["llama", "opt"])
def test_integer_inputs_come_from_the_norm(architecture, variant, in_prefill, request, count):
    """With a sink the prompt's pass keeps float rows, and with them the separate steps."""
    made = rptq(architecture, "W4A4", clusters=1, **({"variant": variant} if variant else {}))
    expected, _ = logits(made, "cpu")
    found_on = request.getfixturevalue("triton_everywhere")
    found, _ = logits(made, found_on)
    assert count["norm"] == 2 * (NEW + in_prefill) and count["codes"] == 2 * (NEW + 1), "qkv and up"
    assert count["attention"] == 0, "a quantised softmax is not the kernel's"
    assert relative(found, expected) < (BOUND if found_on == "cpu" else TIES)


@pytest.mark.parametrize(("gate_first", "q_bits"), [("always", 4), ("auto", 16)])
def test_bitnet(gate_first, q_bits, request, count):
    made = quantised("bitnet", layers=1, method="bitnet", bitnet=BitNetOptions(kv_bits=3, q_bits=q_bits))
    for block in made.blocks:
        block.mlp.gate_first = gate_first
    expected, plain = logits(made, "cpu")
    assert not count
    found_on = request.getfixturevalue("triton_everywhere")
    found, cache = logits(made, found_on)
    passes = NEW + 1
    assert count["attention"] == NEW and count["append"] == 2 * passes and count["rope"] == 2 * passes
    assert count["norm"] == 3 * passes and count["topk"] == passes
    assert count["compact"] == (2 * NEW if gate_first == "always" else 0)
    assert cache.nbytes == plain.nbytes
    assert relative(found, expected) < (BOUND if found_on == "cpu" else TIES)


@pytest.mark.parametrize("method", ["rptq", "bitnet"])
def test_the_reference_by_name_runs_no_kernel_of_the_block(method, request, count):
    if method == "rptq":
        made = rptq("llama", "W4A4KV", clusters=1)
    else:
        made = quantised("bitnet", layers=1, method="bitnet", bitnet=BitNetOptions(kv_bits=3))
    for block in made.blocks:
        block.mlp.gate_first = "always"
        for linear in block.linears().values():
            linear.set_backend(Backend.REFERENCE)
    expected, _ = logits(made, "cpu")
    found, _ = logits(made, request.getfixturevalue("triton_everywhere"))
    assert set(count) <= {"append"}, "storing is packing, not computing"
    assert relative(found, expected) < BOUND


@pytest.mark.parametrize("method", ["W4A4KV", "W4A4", "bitnet"])
def test_a_step_with_static_inputs(method, request):
    """What a CUDA graph captures, run without one: place and position come from tensors, warm-ups leave no trace. W4A4
    quantises the softmax."""
    if method != "bitnet":
        made = rptq("llama", method, clusters=1)
    else:
        made = quantised("bitnet", layers=1, method="bitnet", bitnet=BitNetOptions(kv_bits=3))
    device = request.getfixturevalue("triton_everywhere")
    expected, plain = logits(made, device, rows=1)
    cache, ids = made.model.decoder.new_cache(), tokens(1, PROMPT + NEW).to(device)
    in_steps(made.model, ids[:, :PROMPT], cache, steps=(PROMPT,))
    reason = unsupported_reason(made.model, cache, 32)
    assert reason == (None if device == "cuda" else "kernels run on cuda, not on cpu")
    step = DecodeStep(made.model, cache, NEW)
    if device == "cuda":
        step.capture()
    else:
        step._forward()
    for index in range(PROMPT, PROMPT + NEW):
        assert relative(step(int(ids[0, index])).cpu(), expected[0, index]) < BOUND
    assert cache.get_seq_length() == PROMPT + NEW and cache.nbytes == plain.nbytes
    for one, other in zip(cache.layers, plain.layers, strict=True):
        assert relative(one.key_states.read().cpu(), other.key_states.read().cpu()) < BOUND
    with pytest.raises(RuntimeError, match="unpin"):
        made.model(ids[:, :2], cache=cache)
    cache.unpin()
    after = [made.model(ids[:, :1], cache=c).logits for c in (cache, plain)]
    assert relative(*(x.cpu() for x in after)) < BOUND, "and goes on as any cache"
