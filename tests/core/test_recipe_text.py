"""Clusters and bits as people write them: what is read, what a link writes, and what is refused."""

from __future__ import annotations

from urllib.parse import parse_qs

import pytest
from hypothesis import given, settings

from core.recipe import PER_CHANNEL, Bits, Clusters, QuantRecipe, parse_bits
from tests.core.recipe_tools import CLUSTERS, refused


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", Clusters()),
        ("32", Clusters()),
        ("8", Clusters(8, 1, 1, 8, 8)),
        ("1", Clusters(1, 1, 1, 1, 1)),
        ("256", Clusters(256, 32, 32, 256, 256)),
        ("channel", Clusters(*[PER_CHANNEL] * 5)),
        ("R2=7", Clusters(R2=7)),
        (" R1 = 3 , R5=2", Clusters(R1=3, R5=2)),
        ("Channel", Clusters.uniform(PER_CHANNEL)),
    ],
)
def test_clusters_are_read(text, expected):
    assert Clusters.parse(text) == expected


@pytest.mark.parametrize(
    "text",
    (
        "0",
        "-1",
        "1.5",
        "R6=3",
        "R1",
        "R1=",
        "R1=a",
        "R1=0",
        "R1=٣",
        "٣",
        "R1=1;R2=2",
        "R1=99999999",
        "9999999",
        "r1=3",
        ",",
        "R1=3,",
    ),
)
def test_other_cluster_texts_are_refused(text):
    refused(Clusters.parse, text)


@settings(max_examples=60, deadline=None)
@given(clusters=CLUSTERS)
def test_what_a_query_writes_is_read_back(clusters):
    text = parse_qs(QuantRecipe("m", clusters=clusters).to_query())["clusters"][0]
    assert Clusters.parse(text) == clusters


@pytest.mark.parametrize(
    "text, expected", [("", Bits()), ("weights=4,k=3,v=3", Bits(weights=4, k=3, v=3)), (" q = 8 ,", Bits(q=8))]
)
def test_bits_are_read(text, expected):
    assert parse_bits(text) == expected


@pytest.mark.parametrize("text", ("q", "q=", "x=4", "q=1", "q=4.0", "4", "q=4;k=4", "q=99999999999999999999"))
def test_other_bits_are_refused(text):
    refused(parse_bits, text)
