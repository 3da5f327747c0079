"""The probe: gradients layer by layer are those of the whole model, what is kept is enough, and what does not fit is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from core.errors import ResourceError
from core.models.tiny import tiny_model
from core.probe import probe as probe_module
from core.probe.layers import Change, differentiate, float_twin, run
from core.probe.probe import Half, build_probe, head_logits
from core.recipe import SITES
from tests.core.probe.probe_tools import READ, divergence, probed
from tests.core.tools import ARCHITECTURES, relative, tokens


def whole_gradients(model, ids: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values of every site, and gradients of Σ log p(label) there, by one backward pass through the whole model."""
    seen: dict[str, Tensor] = {}
    h, rotary = model.decoder.enter(ids, torch.arange(ids.shape[1])[None])
    h = h.detach().requires_grad_()
    for index, block in enumerate(model.blocks):
        with block.slots.watch(lambda site, x, index=index: seen.update({f"{index}.{site}": x})):
            h = block(h, rotary)
    log_p = model.decoder.head(model.decoder.leave(h)).log_softmax(-1)
    found = torch.autograd.grad(log_p.gather(-1, labels[..., None]).sum(), list(seen.values()))
    return {name: x.detach() for name, x in seen.items()}, dict(zip(seen, found, strict=True))


@pytest.mark.parametrize("architecture", (*ARCHITECTURES, "gemma2", "olmo2", "gpt_neox"))
def test_gradients_are_those_of_a_pass_through_the_whole_model(architecture, monkeypatch):
    """With the same label at every position; kept in half precision, products of the way back perhaps in bfloat16."""
    labels = torch.full_like(READ, 7)
    monkeypatch.setattr(torch, "multinomial", lambda p, count, **options: torch.full((len(p), count), 7))
    loaded = tiny_model(architecture)
    probe = build_probe(loaded.model, READ, draws=1)
    values, expected = whole_gradients(loaded.model, READ, labels)
    for index, layer in enumerate(probe.layers):
        for site in SITES:
            assert relative(layer.values[site].get(), values[f"{index}.{site}"]) < 1e-3
            assert relative(layer.gradients[site].get()[0], expected[f"{index}.{site}"]) < 0.03, (index, site)


def test_a_sliding_window_is_looked_through_too():
    """Its mask may have been made in inference mode."""
    loaded = tiny_model("mistral", sliding_window=8)
    with torch.inference_mode():
        loaded.model(READ)
    probe = build_probe(loaded.model, READ, draws=1)
    assert all(torch.isfinite(g.get()).all() for layer in probe.layers for g in layer.gradients.values())


@pytest.mark.parametrize("architecture", ("llama", "opt"))
def test_gradients_at_outputs_of_linear_layers_are_those_of_their_bias(architecture):
    """Σ_t g[t] = d objective / d bias."""
    loaded, _ = probed(architecture)
    block, wanted = loaded.model.blocks[0], torch.randn(2, 2, 24, loaded.model.blocks[0].spec.hidden)
    h, rotary = loaded.model.decoder.enter(READ, torch.arange(24)[None])
    _, found = differentiate(block, h, rotary, Change(), wanted)
    for name in ("o", "down"):
        bias = torch.zeros(block.spec.hidden, requires_grad=True)
        handle = block.linears()[name].register_forward_hook(lambda _, __, y, bias=bias: y + bias)
        with torch.enable_grad():
            y = block(h.detach().requires_grad_(), rotary)
        handle.remove()
        for draw in range(2):
            expected = torch.autograd.grad(y, bias, wanted[draw], retain_graph=True)[0]
            assert relative(found.outputs[name][draw].sum((0, 1)), expected) < 0.02


def test_labels_are_drawn_from_the_models_own_softmax():
    """Their gradient has mean zero, so its mean over many draws is small against its size."""
    loaded, _ = probed("llama")
    probe = build_probe(loaded.model, READ[:1, :8], draws=400)
    for layer in probe.layers:
        for g in layer.gradients.values():
            assert float(g.get().mean(0).norm() / g.get().square().mean(0).sum().sqrt()) < 0.12  # 1 / √400 = 0.05


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_kept_restarts_the_pass(architecture):
    loaded, probe = probed(architecture)
    with torch.no_grad():
        expected = loaded.model(READ).logits
        assert relative(torch.cat(list(head_logits(loaded.model, probe.hidden[-1].flatten(0, 1)))), expected.flatten(0, 1)) < 1e-5
        assert relative(probe.log_p, expected.log_softmax(-1).flatten(0, 1)) < 1e-5
        for index, block in enumerate(loaded.model.blocks):
            assert torch.equal(run(*float_twin(block)[:1], probe.hidden[index], probe.rotary, Change()), probe.hidden[index + 1])


def test_the_model_is_left_alone():
    loaded = tiny_model("llama")
    before = {name: t.clone() for name, t in loaded.model.state_dict().items()}
    precision = torch.get_float32_matmul_precision()
    build_probe(loaded.model, READ)
    assert all(torch.equal(t, before[name]) for name, t in loaded.model.state_dict().items())
    assert not any(block.slots for block in loaded.model.blocks) and torch.get_float32_matmul_precision() == precision
    assert not any(m._forward_hooks for m in loaded.model.modules())


@pytest.mark.parametrize("architecture", ("llama", "opt", "qwen3"))
def test_the_noise_floor_is_that_of_the_model_in_bfloat16(architecture):
    loaded, probe = probed(architecture)
    narrow = tiny_model(architecture)
    narrow.model.to(torch.bfloat16)
    expected = divergence(loaded.model, narrow.model, READ)
    assert probe.noise_floor > 0 and 0.2 < probe.noise_floor / expected < 5


def test_large_logits_are_computed_again(monkeypatch):
    loaded, probe = probed("llama")
    monkeypatch.setattr(probe_module, "LOGIT_BYTES", 0)
    other = build_probe(loaded.model, READ)
    assert other.log_p is None and other.nbytes < probe.nbytes
    assert other.noise_floor == pytest.approx(probe.noise_floor, rel=1e-4)


def test_a_probe_that_does_not_fit_has_fewer_draws_or_is_refused(monkeypatch):
    loaded, probe = probed("llama")
    monkeypatch.setattr(probe_module, "PROBE_BYTES", probe.nbytes * 0.8)
    smaller = build_probe(loaded.model, READ)
    assert 1 <= smaller.draws < probe.draws and smaller.nbytes <= probe.nbytes * 0.8
    monkeypatch.setattr(probe_module, "PROBE_BYTES", 1000)
    with pytest.raises(ResourceError, match="use fewer tokens") as caught:
        build_probe(loaded.model, READ)
    assert caught.value.code == "E-RES-PROBE"


def test_the_same_seed_gives_the_same_probe():
    loaded, probe = probed("llama")
    again, other = build_probe(loaded.model, READ), build_probe(loaded.model, READ, seed=1)
    for one, two, three in zip(probe.layers, again.layers, other.layers, strict=True):
        assert all(torch.equal(one.gradients[s].values, two.gradients[s].values) for s in SITES)
        assert not any(torch.equal(one.gradients[s].values, three.gradients[s].values) for s in SITES)


@pytest.mark.parametrize("size", (1e-12, 1.0, 3e7))
def test_half_precision_behind_a_scale_keeps_eleven_bits(size):
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)) * size
    assert relative(Half.of(x).get(), x) < 2.0**-11
    assert torch.equal(Half.of(torch.zeros(3)).get(), torch.zeros(3))


def test_windows_of_one_token_have_a_probe():
    loaded, _ = probed("llama")
    assert build_probe(loaded.model, tokens(3, 1)).tokens == 3
