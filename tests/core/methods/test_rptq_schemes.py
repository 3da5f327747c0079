"""What a scheme and a recipe promise of RPTQ: oracle 10 (bits of every tensor), quantiser calls, and cluster counts."""

from __future__ import annotations

import pytest
import torch

from core.quant.static import ActivationQuantizer
from core.recipe import INPUT_SITE, PER_CHANNEL, SCHEMES, SITES, Clusters
from tests.core.methods.rptq_tools import made
from tests.core.tools import ARCHITECTURES, spec_of, tokens

# Bits of every tensor of a scheme, written again from the published table.

TABLE = {  # norm outputs, q, k and v, p, o_in, down_in, weights
    "W4A16": (16, 16, 16, 16, 16, 16, 4),
    "W4A8": (8, 8, 8, 8, 8, 8, 4),
    "W4A4": (8, 4, 4, 8, 4, 4, 4),
    "W4A4KV": (16, 16, 4, 16, 16, 16, 4),
    "W4A3KV": (16, 16, 3, 16, 16, 16, 4),
    "W3A3KV": (16, 16, 3, 16, 16, 16, 3),
}


FEW = Clusters(4, 2, 2, 4, 4)


@pytest.mark.parametrize(
    "architecture, method, variant",
    [
        ("llama", "rptq", "default"),
        ("llama", "rptq", "official"),
        ("llama", "rptq", "strict"),
        ("llama", "rtn", "default"),
        ("opt", "rptq", "default"),
    ],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bits_of_every_tensor(architecture, scheme, method, variant):
    q = made(architecture, scheme=scheme, variant=variant, method=method, weights="rtn", clusters=FEW)
    norm, query, kv, p, o_in, down, weights = TABLE[scheme]
    if variant == "strict":
        norm = o_in
    for block, outcome in zip(q.blocks, q.outcomes, strict=True):
        inputs = {n: 16 if x.quantizer is None else x.quantizer.bits for n, x in block.linears().items()}
        assert inputs == {"qkv": norm, "o": o_in, "up": norm, "down": down}
        quantizers = {s: getattr(block.attention, f"{s}_quantizer") for s in "qkv"}
        heads = {s: 16 if q is None else q.bits for s, q in quantizers.items()}
        assert heads == {"q": query, "k": kv, "v": kv} and block.attention.softmax_bits == p
        assert {x.bits for x in block.linears().values()} == {weights} == {n.bits for n in outcome.weights.values()}
        quantizers = [m for m in block.modules() if isinstance(m, ActivationQuantizer)]
        assert len(quantizers) == sum(b < 16 for b in (norm, norm, query, kv, kv, o_in, down))
        assert all(isinstance(x, torch.Tensor) and x.dtype == torch.uint8 for x in (m.packed for m in block.linears().values()))
        assert block.attention.sink_tokens == (
            1 if (method, variant) != ("rptq", "official") and method == "rptq" and scheme != "W4A16" else 0
        )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("variant", ("default", "official", "strict"))
def test_quantiser_calls_of_a_forward_pass(scheme, variant, monkeypatch):
    """Counted where they happen: nothing is quantised twice, and nothing that a report does not list."""
    q = made("llama", scheme=scheme, variant=variant, method="rptq", weights="rtn", clusters=FEW)
    calls: list[int] = []
    for name in ("fake", "fake_heads", "codes"):
        real = getattr(ActivationQuantizer, name)
        monkeypatch.setattr(ActivationQuantizer, name, lambda self, *a, f=real, **k: calls.append(self.bits) or f(self, *a, **k))
    q.model(tokens(1, 8))
    norm, query, kv, _, o_in, down, _ = TABLE[scheme]
    norm = o_in if variant == "strict" else norm
    assert sorted(calls) == sorted(2 * [b for b in (norm, query, kv, kv, o_in, norm, down) if b < 16])


@pytest.mark.parametrize("architecture", ("llama", "opt"))
@pytest.mark.parametrize(
    "clusters", (Clusters(), Clusters(7, 2, 3, 9, 5), Clusters.uniform(PER_CHANNEL)), ids=("default", "own", "channel")
)
def test_cluster_counts_are_those_of_the_recipe(architecture, clusters):
    q = made(architecture, clusters=clusters, weights="rtn")
    spec, plan = spec_of(q.base), q.outcomes[0].plan
    counts = {site: len(plan.sites[site].offsets) - 1 for site in SITES}
    assert counts == {
        "attn_in": min(clusters.R1, spec.hidden),
        "q": min(clusters.R2, 16) * spec.heads,
        "k": min(clusters.R2, 16) * spec.kv_heads,
        "v": min(clusters.R3, 16) * spec.kv_heads,
        "o_in": min(clusters.R3, 16) * spec.heads,
        "mlp_in": min(clusters.R4, spec.hidden),
        "down_in": min(clusters.R5, spec.ffn),
    }
    groups = {n: x.weight_scale.shape[1] for n, x in q.blocks[0].linears().items()}
    assert groups == {n: counts[s] for n, s in INPUT_SITE.items()}, "weights are grouped like their inputs"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", ("default", "official"))
def test_query_heads_share_the_clusters_of_their_kv_head(architecture, variant):
    """R2 and R3 are one order and one partition per kv head: q beside k, o_in beside v, with scales of their own."""
    q = made(architecture, variant=variant, weights="rtn")
    spec = spec_of(q.base)
    for outcome in q.outcomes:
        for wide, own in (("q", "k"), ("o_in", "v")):
            ends = [
                [[b - h * 16 for b in outcome.plan.sites[s].offsets.tolist() if h * 16 <= b <= h * 16 + 16] for h in range(heads)]
                for s, heads in ((wide, spec.heads), (own, spec.kv_heads))
            ]
            assert ends[0] == [ends[1][h // spec.groups] for h in range(spec.heads)]
    assert len({tuple(e) for e in ends[1]}) > 1, "kv heads differ, or this test sees nothing"
