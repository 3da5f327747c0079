"""Bytes a token reads, counted by hand, and the limit that a measured bandwidth makes of them."""

from __future__ import annotations

import pytest
import torch

from core.evaluation.memory import measured_parts
from core.evaluation.speed import bytes_per_token, copy_bandwidth, speed_limit
from core.models.io.quantized import modules_of, parameters_of
from core.recipe import Clusters
from core.report import SpeedLimit
from kernels import Backend
from tests.core.tools import quantised, tiny


@pytest.mark.parametrize(("architecture", "tied"), [("llama", False), ("smollm", True)])
def test_a_token_reads_every_weight_once_and_one_row_of_a_separate_embedding(architecture, tied):
    loaded = tiny(architecture)
    whole = 4 * parameters_of(loaded.model)
    table = loaded.model.get_input_embeddings().weight.nbytes
    assert bytes_per_token(loaded.model) == whole - (0 if tied else table)


def test_a_working_copy_is_read_instead_of_the_packed_weights():
    made = quantised("smollm", scheme="W4A4")
    linears = modules_of(made.model)
    for linear in linears:
        linear.set_backend(Backend.REFERENCE)
    stored = sum(measured_parts(made.model).values())
    assert bytes_per_token(made.model) == stored
    made.model(torch.zeros(1, 4, dtype=torch.long))
    copies = sum(linear.working_bytes for linear in linears)
    packed = sum(t.nbytes for linear in linears for t in (linear.packed, linear.weight_scale, linear.weight_zero))
    assert copies > 0
    assert bytes_per_token(made.model) == stored + copies - packed


def test_decoding_with_4_bit_products_reads_those_whatever_else_has_run():
    made = quantised("smollm", scheme="W4A16", weights="rtn", clusters=Clusters.uniform(1))
    linears = modules_of(made.model)
    few = [linear for linear in linears if linear.choice.backend is Backend.INT4]
    if not few:
        pytest.skip(linears[0].choice.reason)
    for length in (32, 1):
        made.model(torch.zeros(1, length, dtype=torch.long))
    stored = sum(measured_parts(made.model).values())
    copies = sum(linear.copies.nbytes(linear, "few rows") for linear in few)
    assert sum(linear.working_bytes for linear in few) > 4 * copies, "the prompt's float copies exist"
    copies += sum(linear.working_bytes for linear in linears if linear not in few)
    packed = sum(linear.stored_bytes for linear in linears)
    assert bytes_per_token(made.model) == stored - packed + copies


def test_the_bandwidth_is_measured_once_and_is_one_of_the_model_s_memory(monkeypatch):
    cpu = torch.device("cpu")
    measured = copy_bandwidth(cpu)
    assert 1e8 < measured < 1e13
    assert copy_bandwidth(cpu) == measured
    asked = []
    monkeypatch.setattr("core.evaluation.speed.copy_bandwidth", lambda device: asked.append(device) or 1.0)
    loaded = tiny("llama")
    monkeypatch.setattr(type(loaded.model), "device", torch.device("cuda:1"))
    assert speed_limit(loaded.model, "m").bytes_per_second == 1.0 and asked == [torch.device("cuda:1")]


def test_the_limit_is_bandwidth_over_bytes():
    limit = SpeedLimit("m", 300, 1e6, 1)
    assert limit.tokens_per_second() == pytest.approx(1e6 / 300)
    assert limit.tokens_per_second(kv_bytes=700) == pytest.approx(1000.0)
    loaded = tiny("llama")
    found = speed_limit(loaded.model, "m")
    assert found.weight_bytes == bytes_per_token(loaded.model)
    assert found.bytes_per_second == copy_bandwidth(torch.device("cpu")) and found.to_dict()["threads"] >= 1


def test_a_copy_reads_and_writes_and_the_fastest_counts(monkeypatch):
    """Three copies of 1 MiB in 4, 1 and 2 seconds: two MiB per second."""
    clock = iter([0.0, 4.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr("core.evaluation.speed.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("core.evaluation.speed.COPY_BYTES", {"cpu": 2**20})
    assert copy_bandwidth.__wrapped__(torch.device("cpu")) == 2 * 2**20
