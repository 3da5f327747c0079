"""Which backend a linear layer takes: AUTO's reasons, and backends by name that never fall back."""

from __future__ import annotations

import pytest
import torch

from kernels import Backend, Choice, select_linear_backend

SELECT = {"weight_bits": 4, "activation_bits": 8, "offsets": (0, 256), "rows": 48, "device": torch.device("cpu")}
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    "change, backend, words",
    [
        ({}, Backend.INT8, "1 cluster of about 256 columns"),
        ({"offsets": (0, 192, 384)}, Backend.INT8, "2 clusters of about 192"),
        ({"offsets": (0, 100, 382)}, Backend.REFERENCE, "2 clusters of about 191 columns"),
        ({"offsets": tuple(range(257))}, Backend.REFERENCE, "256 clusters"),
        ({"activation_bits": 16, "offsets": (0, 100, 256)}, Backend.REFERENCE, "not multiples of 32"),
        ({"activation_bits": 16, "weight_bits": 5}, Backend.REFERENCE, "5-bit weights do not fit"),
        ({"activation_bits": 16, "rows": 20}, Backend.REFERENCE, "20 output channels"),
        ({"activation_bits": 16, "weight_bits": 16}, Backend.REFERENCE, "activations stay in float"),
        ({"weight_bits": 16}, Backend.REFERENCE, "weights stay in float"),
        ({"device": torch.device("mps")}, Backend.REFERENCE, "mps"),
        ({"device": CUDA}, Backend.TRITON, "packed weights and integer codes on the GPU"),
        ({"device": CUDA, "offsets": (0, 100, 256)}, Backend.TRITON, "more than 256 rows are float products"),
        ({"device": CUDA, "activation_bits": 16}, Backend.TRITON, "more than 256 rows are float products"),
        ({"device": CUDA, "weight_bits": 5}, Backend.REFERENCE, "5-bit weights have no kernel"),
        ({"device": CUDA, "weight_bits": 16}, Backend.REFERENCE, "weights stay in float"),
        ({"activation_bits": 2}, Backend.INT8, "fill"),
    ],
    ids=(
        "wide",
        "just wide enough",
        "just too narrow",
        "per channel",
        "float input, odd clusters",
        "float input, 5 bits",
        "float input, odd rows",
        "float input and weight",
        "float weight",
        "other device",
        "cuda",
        "cuda, odd clusters",
        "cuda, float input",
        "cuda, 5 bits",
        "cuda, float weight",
        "2 bits",
    ),
)
def test_auto_chooses_and_says_why(change, backend, words, capability):
    choice = select_linear_backend(Backend.AUTO, **(SELECT | change))
    assert choice.backend is backend and words in choice.reason and len(choice.reason) < 160


@pytest.mark.parametrize(
    "change",
    ({"activation_bits": 16}, {"weight_bits": 16}, {"device": CUDA}),
    ids=("float input", "float weight", "other device"),
)
def test_int8_by_name_never_falls_back(change):
    with pytest.raises(ValueError, match="use reference"):
        select_linear_backend(Backend.INT8, **(SELECT | change))


def test_a_gpu_too_old_for_the_kernels_is_named(capability):
    """A T4 would fail to compile them in the first forward pass."""
    capability(7, 5)
    choice = select_linear_backend(Backend.AUTO, **(SELECT | {"device": CUDA}))
    reason = "compute capability 7.5, kernels need 8.0"
    assert choice == Choice(Backend.REFERENCE, f"no kernel runs this layer: {reason}")
    with pytest.raises(ValueError, match="compute capability 7.5"):
        select_linear_backend(Backend.TRITON, **(SELECT | {"device": CUDA}))
    capability(8, 0)
    assert select_linear_backend(Backend.AUTO, **(SELECT | {"device": CUDA})).backend is Backend.TRITON


def test_triton_by_name_never_falls_back(capability):
    assert select_linear_backend(Backend.TRITON, **(SELECT | {"device": CUDA})).reason == "asked for"
    for change, words in (({}, "not on cpu"), ({"device": CUDA, "weight_bits": 3, "offsets": (0, 12)}, "multiple of 8")):
        with pytest.raises(ValueError, match=words):
            select_linear_backend(Backend.TRITON, **(SELECT | change))


@pytest.mark.parametrize("requested", (Backend.INT8, Backend.REFERENCE))
def test_a_backend_asked_for_by_name_is_taken(requested):
    narrow = SELECT | {"offsets": tuple(range(257))}  # AUTO would choose otherwise for INT8
    choice = select_linear_backend(requested, **narrow)
    assert choice.backend is requested and choice.reason == "asked for"


@pytest.mark.parametrize("exact", (True, False), ids=("vnni", "no vnni"))
def test_8_bit_weights_need_exact_products(exact, monkeypatch):
    monkeypatch.setattr("kernels.linear.choose.exact_int8_products", lambda: exact)
    eight = SELECT | {"weight_bits": 8}
    if exact:
        assert select_linear_backend(Backend.AUTO, **eight).backend is Backend.INT8
        return
    choice = select_linear_backend(Backend.AUTO, **eight)
    assert choice.backend is Backend.REFERENCE and "saturate" in choice.reason
    with pytest.raises(ValueError, match="saturates on this processor"):
        select_linear_backend(Backend.INT8, **eight)
    assert select_linear_backend(Backend.INT8, **(SELECT | {"weight_bits": 7})).backend is Backend.INT8
