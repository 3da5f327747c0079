"""Bytes a token reads, counted by hand, and the limit that a measured bandwidth makes of them."""

from __future__ import annotations

import pytest
import torch

from core.evaluation.memory import measured_parts
from core.evaluation.report import SpeedLimit
from core.evaluation.speed import bytes_per_token, copy_bandwidth, speed_limit
from core.models.quantized import modules_of
from kernels import Backend
from tests.core.tools import quantised, tiny


@pytest.mark.parametrize(("architecture", "tied"), [("llama", False), ("smollm", True)])
def test_a_token_reads_every_weight_once_and_one_row_of_a_separate_embedding(architecture, tied):
    loaded = tiny(architecture)
    whole = sum(t.numel() * t.element_size() for t in loaded.model.parameters())
    table = loaded.model.get_input_embeddings().weight.nbytes
    assert bytes_per_token(loaded.model, loaded.adapter) == whole - (0 if tied else table)


def test_a_working_copy_is_read_instead_of_the_packed_weights():
    made = quantised("smollm", scheme="W4A4")
    linears = modules_of(made.model)
    for linear in linears:
        linear.set_backend(Backend.REFERENCE)
    stored = sum(measured_parts(made.model, made.loaded.adapter).values())
    assert bytes_per_token(made.model, made.loaded.adapter) == stored
    made.model(torch.zeros(1, 4, dtype=torch.long))
    copies = sum(linear.working_bytes for linear in linears)
    packed = sum(t.nbytes for linear in linears for t in (linear.packed, linear.weight_scale, linear.weight_zero))
    assert copies > 0
    assert bytes_per_token(made.model, made.loaded.adapter) == stored + copies - packed


def test_the_bandwidth_is_measured_once_and_is_one_of_a_memory():
    measured = copy_bandwidth(2**22)
    assert 1e8 < measured < 1e13
    assert copy_bandwidth(2**22) == measured


def test_the_limit_is_bandwidth_over_bytes():
    limit = SpeedLimit("m", 300, 1e6, 1)
    assert limit.tokens_per_second() == pytest.approx(1e6 / 300)
    assert limit.tokens_per_second(kv_bytes=700) == pytest.approx(1000.0)
    loaded = tiny("llama")
    found = speed_limit(loaded.model, loaded.adapter, "m")
    assert found.weight_bytes == bytes_per_token(loaded.model, loaded.adapter)
    assert found.bytes_per_second == copy_bandwidth() and found.to_dict()["threads"] >= 1
