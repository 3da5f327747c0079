"""FLOPs against torch's own counter, bytes against packed tensors and caches, and what a GPU's numbers make of them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from core.evaluation.memory import PROJECTED, kv_bytes_per_token, measured_parts, memory_grid
from core.evaluation.roofline import GPUS, OUTPUT_BITS, PHASES, cards_needed, least_seconds, operators
from core.evaluation.shapes import SHAPES, shape_of
from core.models.decoder import CausalModel
from core.recipe import Bits
from tests.core.tools import quantised, spec_of, tiny, tokens

BATCH, LENGTH = 3, 32


def counted(model: CausalModel, phase: str) -> int:
    """FLOPs of a pass by torch's counter; attention is written out as products, so that all its scores are counted."""
    ids, cache = tokens(BATCH, LENGTH), model.decoder.new_cache()
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        if phase == "decode":
            model(ids[:, :-1], past_key_values=cache)
            ids = ids[:, -1:]
        with counter:
            model(ids, past_key_values=cache, logits_to_keep=1)
    return counter.get_total_flops()


def shape_and_model(architecture: str) -> tuple:
    loaded = tiny(architecture)
    config, spec = loaded.model.config, spec_of(loaded)
    positions = 0 if spec.rope else config.max_position_embeddings + 2
    return shape_of(spec, 2, config.vocab_size, tied=bool(config.tie_word_embeddings), positions=positions), loaded.model


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "opt"])
def test_flops_are_those_that_torch_counts(architecture, phase):
    shape, model = shape_and_model(architecture)
    found = operators(shape, Bits(), batch=BATCH, sequence=LENGTH, phase=phase)
    assert sum(op.flops for op in found) == counted(model, phase)


@pytest.mark.parametrize("scheme", ["W4A4", "W3A3KV"])
def test_bytes_are_those_of_packed_weights_and_of_the_cache(scheme):
    """One sequence and one token: what is left beside weights and cache are its own small inputs and outputs."""
    q = quantised("llama", scheme=scheme)
    shape, bits = shape_of(spec_of(q.base), 2, 259, tied=False), PROJECTED[scheme]
    found = {op.name: op for op in operators(shape, bits, batch=1, sequence=LENGTH, phase="decode")}
    linear = sum(found[name].bytes for name in ("qkv", "o", "up", "down"))
    site = {"qkv": bits.attn_in, "o": bits.o_in, "up": bits.mlp_in, "down": bits.down_in}
    sizes = {name: (x.out_features, x.in_features) for name, x in q.blocks[0].linears().items()}
    own = 2 * sum((k * site[name] + n * OUTPUT_BITS) // 8 for name, (n, k) in sizes.items())
    assert linear - own == pytest.approx(measured_parts(q.model)["packed weights"], rel=0.01)
    queries = shape.heads * shape.head_dim
    cache = found["q kᵀ"].bytes + found["p v"].bytes - 2 * queries * (bits.q + OUTPUT_BITS) // 8
    assert cache == LENGTH * kv_bytes_per_token(q.model)


def test_decoding_is_bound_by_memory_and_a_prompt_by_arithmetic():
    shape, gpu = SHAPES["llama-3-8b"], GPUS["H100"]
    decode, prefill = (operators(shape, Bits(), batch=1, sequence=4096, phase=phase) for phase in PHASES)
    assert {op.bound(gpu) for op in decode} == {"memory"}
    assert [op.name for op in prefill if op.bound(gpu) == "memory"] == ["head"]
    weights, cache = shape.decoder_weights * 2 + shape.vocab * shape.hidden * 2, 4096 * 32 * 8 * 128 * 2 * 2
    assert least_seconds(decode, gpu) == pytest.approx((weights + cache) / gpu.bandwidth, rel=0.01)
    flops = 2 * 4096 * shape.decoder_weights
    assert flops / gpu.float16 < least_seconds(prefill, gpu) < 1.3 * flops / gpu.float16
    for op in (*decode, *prefill):
        assert op.seconds(gpu) == max(op.flops / gpu.float16, op.bytes / gpu.bandwidth)
        assert op.to_dict(gpu)["intensity"] == op.flops / op.bytes


def test_rates_follow_the_wider_operand():
    gpu, hopper = GPUS["A100 80 GB"], GPUS["H100"]
    assert (gpu.rate(16), gpu.rate(8), gpu.rate(5), gpu.rate(4)) == (312e12, 624e12, 624e12, 1248e12)
    assert hopper.rate(4) == hopper.rate(8) == hopper.int8, "no rate of its own for 4 bits"
    bits = {op.name: op.bits for op in operators(SHAPES["opt-13b"], PROJECTED["W4A4"], batch=1, sequence=8, phase="prefill")}
    assert bits == {"qkv": 8, "q kᵀ": 4, "p v": 8, "o": 4, "up": 8, "down": 4, "head": 16}
    only = operators(SHAPES["opt-13b"], PROJECTED["W4A16"], batch=1, sequence=8, phase="decode")
    assert {op.bits for op in only} == {16}, "packed weights are multiplied as floats where inputs are floats"


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_plausible_numbers_and_a_source(name):
    gpu = GPUS[name]
    assert gpu.name == name and len(gpu.source) > 10
    assert 10 < gpu.float16 / gpu.bandwidth < 1000 and 1.9 < gpu.int8 / gpu.float16 < 4.1
    assert gpu.int4 in (0, gpu.int8, 2 * gpu.int8)
    assert (cards_needed(gpu.memory, gpu), cards_needed(gpu.memory + 1, gpu)) == (1, 2)


def test_the_paper_s_place_needs_many_cards_before_and_few_after():
    before, after = memory_grid(SHAPES["opt-66b"], ("W4A16", "W4A4"), (64,), (8192,))
    assert [cards_needed(cell.total, GPUS["A100 80 GB"]) for cell in (before, after)] == [17, 5]
