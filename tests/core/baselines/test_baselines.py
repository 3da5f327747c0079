"""Baselines of other libraries: bytes against a count by hand, codes against their formulas, the cache against single tokens."""

import copy

import numpy as np
import pytest
import torch
from transformers.cache_utils import QuantizedLayer

from app.cli.__main__ import main
from core.baselines.apply import with_baseline
from core.baselines.cache import PIECE, ForeignKVLayer
from core.baselines.registry import BASELINES, Baseline, baseline_key, split_key
from core.doctor import examine
from core.errors import InputError, ModelError, ResourceError
from core.evaluation.eval_report import footprint_of
from core.evaluation.memory import kv_bytes_per_token, measured_parts
from core.evaluation.perplexity import Reference, hidden_windows, score
from core.models.tiny import tiny_model
from core.quant.kv_cache import FloatKVLayer

WINDOWS = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(1))
CODES, ROWS = 192 * 64 + 64 * 128 + 192 * 64 + 64 * 96, 192 + 64 + 192 + 64
"""Weights and rows of one layer of the tiny model: q|k|v, o, gate|up and down."""
STORED = {
    "gguf-q8_0": CODES // 32 * (2 + 32),
    "gguf-q5_1": CODES // 32 * (2 + 2 + 4 + 16),
    "gguf-q5_0": CODES // 32 * (2 + 4 + 16),
    "gguf-q4_1": CODES // 32 * (2 + 2 + 16),
    "gguf-q4_0": CODES // 32 * (2 + 16),
    "bnb-int8": CODES + 4 * ROWS,
    "bnb-nf4": CODES // 2 + CODES // 64 * 4,
    # of every matrix: a byte for each scale, a float32 for each 256 of them, and a float32
    "bnb-nf4-double": CODES // 2 + CODES // 64 + 4 * sum(-(-n // 64 // 256) + 1 for n in (192 * 64, 64 * 128, 192 * 64, 64 * 96)),
    "torchao-int8": CODES + 4 * ROWS,
    "torchao-int4": CODES // 2 + CODES // 32 * (2 + 1),
    "llmc-gptq": CODES // 2 + CODES // 32 * 2,
}
KEPT = {"kv-quanto-4": 4, "kv-quanto-2": 2, "kv-hqq-8": 8, "kv-hqq-4": 4}
"""Bits of a code of keys and values; each 64 have a scale and an offset in float32."""


def installed(names) -> list:
    """Names of baselines; those whose library is missing skip, with the sentence that tells how to install it."""
    gone = {name: BASELINES[name].missing for name in names}
    return [pytest.param(name, marks=pytest.mark.skipif(gone[name] is not None, reason=gone[name] or "")) for name in names]


@pytest.fixture(scope="module")
def base():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def wide():
    """A model whose token has 128 numbers of keys: the libraries' groups take 64."""
    return tiny_model("llama", num_key_value_heads=8)


def divergence(base, made) -> float:
    reference = Reference("base", base.model.get_output_embeddings(), hidden_windows(base.model, WINDOWS))
    return score(made.model, WINDOWS, reference=reference).kld_mean


def test_every_baseline_has_a_count_by_hand():
    assert set(BASELINES) == {*STORED, *KEPT, "kv-fp8"}


@pytest.mark.parametrize("name", installed(STORED))
def test_bytes_of_weights_are_those_counted_by_hand(base, name):
    before = measured_parts(base.model)
    made = with_baseline(base, name)
    found = footprint_of(made)
    assert found.parts["packed weights"] + found.parts.get("scales and zero points", 0) == 2 * STORED[name]
    assert found.linear == (2 * STORED[name], 2 * CODES) and "decoder weights (float)" not in found.parts
    assert measured_parts(base.model) == before
    assert made.name == f"{base.name}::{name}" and made.label.endswith(BASELINES[name].label)


@pytest.mark.parametrize(("coarse", "fine"), [("gguf-q4_0", "gguf-q8_0"), ("gguf-q4_0", "gguf-q5_0"), ("gguf-q4_1", "gguf-q5_1")])
def test_more_bits_diverge_less(base, coarse, fine):
    assert 0 < divergence(base, with_baseline(base, fine)) < divergence(base, with_baseline(base, coarse))


PAIRS = [("bnb-nf4", "bnb-int8"), ("torchao-int4", "torchao-int8"), ("torchao-int4", "llmc-gptq")]


@pytest.mark.parametrize(("coarse", "fine"), PAIRS)
def test_more_bits_or_gptq_of_optional_libraries_diverge_less(base, coarse, fine):
    if said := BASELINES[coarse].missing or BASELINES[fine].missing:
        pytest.skip(said)
    assert 0 < divergence(base, with_baseline(base, fine)) < divergence(base, with_baseline(base, coarse))


def test_q8_0_is_the_formula_of_its_blocks(base):
    """d = max |x| / 127 of 32 columns, stored in float16; x ≈ d round(x / d), d before it was stored."""
    weight = base.model.blocks[0].linears()["down"].weight.detach().numpy()
    blocks = weight.reshape(-1, 32)
    d = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    expected = np.round(blocks / d) * d.astype(np.float16).astype(np.float32)
    made = with_baseline(base, "gguf-q8_0").model.blocks[0].linears()["down"].dequantized_weight().numpy()
    assert np.array_equal(made, expected.reshape(weight.shape))


@pytest.mark.parametrize("name", installed(STORED))
def test_the_product_is_that_of_the_dequantised_weight(base, name):
    """LLM.int8() rounds the input too: within a step of 1 / 127 of its largest entry."""
    layer = with_baseline(base, name).model.blocks[0].linears()["up"]
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    exact = x @ layer.dequantized_weight().T
    gap = (layer(x) - exact).norm() / exact.norm()
    assert gap < (0.02 if layer.weight.product else 1e-6)
    assert [part.shape[-1] for part in layer.parts(x, (96, 96))] == [96, 96]


@pytest.mark.parametrize("name", installed(KEPT))
def test_bytes_of_a_cache_are_those_counted_by_hand(wide, name):
    made = with_baseline(wide, name)
    assert kv_bytes_per_token(made.model) == 2 * 2 * (128 * KEPT[name] // 8 + 2 * 2 * 4)
    assert measured_parts(made.model) == measured_parts(wide.model)
    assert 0 < divergence(wide, made) < 0.5


@pytest.mark.parametrize("name", installed(KEPT))
def test_a_token_whose_keys_fill_no_even_number_of_groups_gets_smaller_ones(name):
    """192 numbers are three groups of 64: HQQ puts codes of two into a byte, so a token would end in the middle of one."""
    base = tiny_model("llama", layers=1, hidden_size=192, num_attention_heads=12, num_key_value_heads=12)
    group = 32 if name == "kv-hqq-4" else 64
    made = with_baseline(base, name)
    assert kv_bytes_per_token(made.model) == 2 * (192 * KEPT[name] // 8 + 192 // group * 2 * 4)
    assert 0 < divergence(base, made) < 0.5


@pytest.mark.parametrize("name", installed(["kv-fp8"]))
def test_fp8_takes_a_byte_for_each_number(base, name):
    """Its scale is set by the first tokens: the windows are longer than those."""
    made, ids = with_baseline(base, name), WINDOWS.repeat(1, 4)
    assert kv_bytes_per_token(made.model) == 2 * (2 * 32 + 8 // PIECE)
    own, float_ = (x.model.decoder(ids) for x in (made, base))
    assert torch.equal(own[:, :PIECE], float_[:, :PIECE]) and not torch.allclose(own[:, PIECE:], float_[:, PIECE:], atol=1e-5)


class Rounded(QuantizedLayer):
    """A layer of the library's own rule whose codes are multiples of an eighth."""

    def _quantize(self, tensor, axis):
        return (tensor * 8).round()

    def _dequantize(self, q_tensor):
        return q_tensor / 8


def test_pieces_see_what_single_tokens_see(base):
    """The window in pieces, as it is measured, against one token after another: three flushes of the exact rest."""
    model = copy.deepcopy(base.model).double()  # else a sum in another order moves a few codes
    for block in model.blocks:
        block.attention.store = lambda: ForeignKVLayer(Rounded, 1)
    ids = torch.randint(0, 256, (1, 3 * PIECE), generator=torch.Generator().manual_seed(2))
    whole, cache = model.decoder(ids), model.decoder.new_cache()
    single = torch.cat([model.decoder(ids[:, i : i + 1], cache) for i in range(ids.shape[1])], dim=1)
    assert torch.allclose(whole, single, atol=1e-9)
    for block in model.blocks:
        block.attention.store = None
    assert not torch.allclose(whole, model.decoder(ids), atol=1e-2)
    assert cache.get_seq_length() == 3 * PIECE and cache.nbytes == 2 * 2 * 3 * PIECE * 32 * 8


def test_a_float_store_takes_all_tokens_at_once():
    assert FloatKVLayer().pieces(7) == [7] and sum(ForeignKVLayer(Rounded, 1).pieces(400)) == 400


def test_what_cannot_run_says_what_to_do(base, monkeypatch):
    with pytest.raises(InputError, match="'nf5': use one of gguf-q8_0"):
        with_baseline(base, "nf5")
    for needs, state in ("nowhere-to-be-found>=1", "is not installed"), ("torch>=99", "is installed as 2"):
        monkeypatch.setitem(BASELINES, "absent", Baseline("absent", "Absent", (needs,), 4))
        with pytest.raises(ResourceError, match=f"absent needs {needs}, which {state}.*run `pip install '{needs}'`"):
            with_baseline(base, "absent")
    with pytest.raises(ModelError, match="already quantised or ternary: apply gguf-q4_0 to a float model"):
        with_baseline(with_baseline(base, "gguf-q8_0"), "gguf-q4_0")
    with pytest.raises(InputError, match="groups of 32 columns, and down has 80"):
        with_baseline(tiny_model("llama", layers=1, intermediate_size=80), "gguf-q4_0")


@pytest.mark.parametrize("name", installed(["kv-quanto-4", "kv-fp8"]))
def test_models_that_a_cache_does_not_fit_are_refused(base, name):
    with pytest.raises(InputError, match="takes no sliding window"):
        with_baseline(tiny_model("gemma2", layers=1), name)
    if BASELINES[name].bits == 4:
        with pytest.raises(InputError, match="64, 32 or 16 numbers, and a token's keys have 24"):
            with_baseline(tiny_model("llama", layers=1, num_key_value_heads=1, num_attention_heads=4, head_dim=24), name)


def test_a_missing_library_ends_the_command_with_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(BASELINES, "absent", Baseline("absent", "Absent", ("nowhere-to-be-found",), 4))
    assert main(["compare", "--models", "base", "--baseline", "absent"]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("error E-EXTRA: absent needs nowhere-to-be-found, which is not")
    assert next(b for b in examine().baselines if b.name == "absent").reason in err


def test_a_key_names_the_model_and_its_baseline():
    assert baseline_key("owner/name", "bnb-nf4") == "owner/name::bnb-nf4"
    assert split_key("owner/name::bnb-nf4") == ("owner/name", "bnb-nf4") and split_key("a:b") == ("a:b", None)
