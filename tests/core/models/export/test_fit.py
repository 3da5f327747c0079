"""What fits a format and what is refused, each with its reason; the other exports; nothing half-written."""

from __future__ import annotations

import errno
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from core.errors import InputError, ResourceError
from core.evaluation.describe import report_from_dict
from core.models.export.card import model_card, read_numbers
from core.models.export.export import export_model
from core.models.export.fit import loads_in, require_fit
from core.models.io.catalog import EMBEDDED
from core.models.io.load import load_model
from core.models.io.origin import Origin
from core.models.io.quantized import save_quantized
from core.models.tiny import tiny_model
from core.options import BitNetOptions
from tests.core.disk_tools import failing, failing_rust
from tests.core.models.export.export_tools import made
from tests.core.tools import quantised, relative, tokens

IDS = tokens(2, 40, seed=3)
REFUSED = [
    ("compressed-tensors", "clusters", "layers.0.qkv: it groups reordered columns"),
    ("compressed-tensors", "rotated", "layers.0.qkv: it rotates its input"),
    ("compressed-tensors", "keys", "layers.0 quantises k with 3 bits inside attention"),
    ("compressed-tensors", "4-bit inputs", "layers.0.qkv: its inputs have 4 bits"),
    ("compressed-tensors", "static clusters", "its inputs have static ranges in 32 clusters"),
    ("compressed-tensors", "ternary", "use gguf or bitnet"),
    ("gguf", "W8A16", "use 7 bits or fewer"),
    ("gguf", "official", "its scales are float32"),
    ("gguf", "W4A8 static", "ranges that llama.cpp does not have"),
    ("gguf", "clusters", "reordered columns"),
    ("gguf", "keys", "inside attention"),
    ("bitnet", "W4A16", "its weights are not ternary"),
    ("bitnet", "clusters", "its weights are not ternary"),
]


@pytest.mark.parametrize(("fmt", "recipe", "reason"), REFUSED)
def test_what_does_not_fit_is_refused_with_the_reason(fmt, recipe, reason, tmp_path):
    with pytest.raises(InputError) as caught:
        export_model(tmp_path / "out", made(recipe).loaded, fmt)
    message = str(caught.value)
    assert message.startswith(f"{fmt} cannot hold this model: ") and reason in message, message
    assert caught.value.code == "E-PARAM-FORMAT" and message.endswith(".") and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("architecture", "overrides", "reason"), [
    ("opt", {}, "the architecture opt is not written"),
    ("bitnet", {}, "SiLU in place of its squared ReLU"),
    ("mistral", {"sliding_window": 8}, "limited to a window"),
    ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rotary positions (dynamic)"),
    ("llama", {"intermediate_size": 80}, "layers.0.down: 80 columns are no multiple"),
])
def test_models_that_gguf_has_no_place_for(architecture, overrides, reason):
    q = quantised(architecture, base=tiny_model(architecture, **overrides), method="rtn", weights="rtn", scheme="W4A16")
    with pytest.raises(InputError, match="gguf cannot hold") as caught:
        require_fit(q.loaded, "gguf")
    assert reason in str(caught.value)


@pytest.mark.parametrize("fmt", ["compressed-tensors", "gguf", "transformers"])
@pytest.mark.parametrize("architecture", ["phi3", "gpt2", "gemma", "gemma2", "granite", "olmo2", "stablelm", "gpt_neox"])
def test_tensors_that_were_changed_while_they_were_read_are_not_written(architecture, fmt):
    q = quantised(architecture, method="rtn", weights="rtn", scheme="W4A16")
    with pytest.raises(InputError, match="are changed while they are read"):
        require_fit(q.loaded, fmt)


@pytest.mark.parametrize("fmt", ["compressed-tensors", "gguf", "bitnet", "transformers"])
def test_a_float_model_is_refused(fmt):
    with pytest.raises(InputError, match="no weight is quantised"):
        require_fit(tiny_model("llama"), fmt)


@pytest.mark.parametrize(("recipe", "vllm", "llama_cpp", "transformers"), [
    ("W4A16", "yes, as compressed-tensors", "yes, as gguf", "yes, as compressed-tensors"),
    ("W3A16", "yes", "yes", "yes, as compressed-tensors"),
    ("W8A16", "no, because layers.0.qkv: vLLM takes 8-bit weights without zero points", "no", "yes, as compressed-tensors"),
    ("W4A8 static", "yes", "no", "yes, as compressed-tensors"),
    ("clusters", "no, because layers.0.qkv: it groups reordered", "no, because", "yes, as transformers"),
    ("rotated W4A4", "no", "no", "yes, as transformers; weights are float32; inputs, keys and values stay in float"),
    ("ternary", "no, because its weights are ternary", "yes, as gguf", "yes, as bitnet"),
])
def test_where_a_model_loads_is_said(recipe, vllm, llama_cpp, transformers):
    said = loads_in(made(recipe).loaded)
    assert list(said) == ["vLLM", "llama.cpp", "transformers"]
    for answer, beginning in zip(said.values(), (vllm, llama_cpp, transformers), strict=True):
        assert answer.startswith(beginning), answer
    assert said["transformers"].endswith("exactly, as the folder that quantize writes, after import core.hf")


def test_our_own_folder_is_named_where_no_other_format_fits():
    said = loads_in(quantised("gpt2", method="rtn", weights="rtn", scheme="W4A16").loaded)
    assert said["transformers"] == "yes, as the folder that quantize writes, after import core.hf"
    assert said["vLLM"].startswith("no, because tensors of") and "core.hf" not in said["llama.cpp"]
    assert "core.hf" not in loads_in(load_model("quantscope-bitnet-b1.58-6m"))["transformers"]


@pytest.mark.parametrize(("architecture", "recipe"), [
    ("llama", "clusters"),
    ("opt", "clusters"),
    ("qwen3", "clusters"),
    ("llama", "one order"),
    ("smollm", "one order"),
    ("opt", "one order"),
    ("llama", "rotated"),
    ("bitnet", "rotated"),
    ("llama", "official"),
])
def test_float_weights_give_our_logits(architecture, recipe, tmp_path):
    """Reordered and rotated weights return to the checkpoint's channels; no input is quantised in these recipes."""
    q = made(recipe, architecture)
    report = export_model(tmp_path / "out", q.loaded, "transformers")
    assert report.differences == ["weights are float32"]
    theirs, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.inference_mode():
        assert relative(theirs(IDS).logits, q.model(IDS).logits) <= 1e-5


def test_weights_of_quantised_inputs_are_those_of_the_float_block(tmp_path):
    """Quantised keys, queries and inputs leave no trace in the weights."""
    q = made("rotated W4A4")
    report = export_model(tmp_path / "out", q.loaded, "transformers")
    assert "stay in float there" in report.differences[0]
    theirs, base = load_model(str(tmp_path / "out")), q.base
    with torch.inference_mode():
        near, far = (relative(model(IDS).logits, base.model(IDS).logits) for model in (theirs.model, q.model))
    assert near < far


@pytest.mark.parametrize("architecture", ["llama", "bitnet"])
def test_bitnet_folders_keep_codes_and_scales(architecture, tmp_path):
    q = made("ternary", architecture)
    export_model(tmp_path / "out", q.loaded, "bitnet")
    back = load_model(str(tmp_path / "out"))
    assert torch.equal(back.model(IDS).logits, q.model(IDS).logits)
    assert back.model.blocks[0].rules == q.blocks[0].rules and back.model.blocks[0].rules.trained is None


def test_bitnet_folders_say_what_they_leave_out(tmp_path):
    trained = load_model("quantscope-bitnet-a4.8-6m")
    assert require_fit(trained, "bitnet") == ["transformers rounds all inputs to 8 bits, Quantscope by a4.8"]
    export_model(tmp_path / "out", trained, "bitnet")
    again = load_model(str(tmp_path / "out"))
    assert again.model.blocks[0].rules == trained.model.blocks[0].rules
    assert torch.equal(again.model(IDS).logits, trained.model(IDS).logits)
    keys = quantised("llama", method="bitnet", bitnet=BitNetOptions(kv_bits=3))
    with pytest.raises(InputError, match="keys, values or queries are quantised"):
        require_fit(keys.loaded, "bitnet")


def test_a_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes.txt\): choose a new or empty folder") as caught:
        export_model(tmp_path, made("W4A16").loaded, "gguf")
    assert caught.value.code == "E-PARAM-OUT" and [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    export_model(tmp_path / "out", made("W4A16").loaded, "gguf")
    with pytest.raises(InputError, match="'out' is not empty: choose a new or empty one"):
        export_model(tmp_path / "out", made("W3A16").loaded, "gguf")


@pytest.mark.parametrize("fmt", ["compressed-tensors", "gguf", "transformers"])
def test_nothing_half_written_stays(fmt, tmp_path):
    with failing(tmp_path, errno.ENOSPC, after=6), pytest.raises(ResourceError) as caught:
        export_model(tmp_path / "out", made("W4A16").loaded, fmt)
    assert caught.value.code == "E-DISK" and list(tmp_path.iterdir()) == []
    if fmt != "gguf":
        with failing_rust(errno.ENOSPC), pytest.raises(ResourceError):
            export_model(tmp_path / "out", made("W4A16").loaded, fmt)
        assert list(tmp_path.iterdir()) == []


def test_the_card_says_what_was_made_and_measured(tmp_path):
    q = made("W4A16")
    origin = Origin("owner/name", "abc", "Hugging Face Hub, owner/name", "bfloat16", False, "Hub")
    saved = replace(q.loaded, label="RTN plain · W4A16", origin=origin, path=tmp_path / "q")
    facts = {"label": saved.label, "calibration": "8 windows"}
    save_quantized(tmp_path / "q", saved, {"recipe": q.recipe.to_dict(), "report": facts})
    measured = {"label": saved.label, "perplexity": 12.345, "perplexity_stderr": 0.5, "protocol": "two windows", "kld_mean": None}
    (tmp_path / "n.json").write_text(json.dumps(measured))
    numbers = read_numbers(str(tmp_path / "n.json"), saved.label)
    report = export_model(tmp_path / "out", saved, "compressed-tensors", numbers=numbers)
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ('base_model: "owner/name"', "quantized", "RTN plain · W4A16", "8 windows", '"scheme": "W4A16"', "12.35 ± 0.5",
                 "two windows", "vLLM: yes", "not known here", "bfloat16"):
        assert part in card, part
    assert report.files[0] == "README.md" and report.nbytes > 10_000
    for content in ("no json", "[]", '{"perplexity": 1}'):
        (tmp_path / "n.json").write_text(content)
        with pytest.raises(InputError, match="holds no numbers"):
            read_numbers(str(tmp_path / "n.json"), saved.label)
    (tmp_path / "n.json").write_text(json.dumps(measured | {"label": "another"}))
    with pytest.raises(InputError, match="numbers of another model"):
        read_numbers(str(tmp_path / "n.json"), saved.label)


def test_the_card_of_an_embedded_model_has_its_licence():
    loaded = load_model(EMBEDDED.joinpath("quantscope-bitnet-b1.58-6m").name)
    card = model_card(loaded, "bitnet", facts={}, differences=[], loads={}, numbers=None)
    assert "Apache-2.0" in card and "Measured\n\nNothing" in card and "trained w1.58a8" in card


@pytest.mark.parametrize(("stored", "read"), [({"vLLM": "no"}, {"vLLM": "no"}), (["vLLM"], None), (None, None)])
def test_what_a_folder_says_of_programs_is_text_or_nothing(stored, read):
    fields = {"key": "k", "recipe": {}, "label": "", "bits_description": "", "seconds": 0.0, "stages": {}, "calibration": ""}
    sizes = {"effective_weight_bits": 4.0, "weight_bytes": 1, "float_bytes": 2, "layers": [], "backends": [], "folder": ""}
    assert report_from_dict(fields | sizes | {"loads": stored}).loads == read
    assert report_from_dict(fields | sizes).loads is None
