"""Malformed GGUF headers: refused at once, where the library's reader would follow them for hours."""

from __future__ import annotations

import contextlib
import struct

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import ModelError
from core.models.io.preflight.gguf import BLOCKS, UNREAD, read_gguf_header
from tests.core.models.io.malformed import GOOD_KEYS, GOOD_TENSORS, gguf_bytes, key, tensor, text
from tests.core.tools import few_calls


def test_a_good_file_passes(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes())
    header = read_gguf_header(path)
    assert (header.architecture, header.parameters, header.layers) == ("llama", 80, 1)
    assert header.values["tokenizer.ggml.pre"] == "smollm" and header.values["tokenizer.ggml.scores"] == [0.0, 0.0]
    assert [entry.decode() for entry in header.values["tokenizer.ggml.tokens"]] == ["a", "b", "ü"]
    places = {tensor.name: (tensor.shape, tensor.kind, tensor.nbytes, tensor.offset) for tensor in header.tensors.values()}
    start = len(gguf_bytes()) - 128
    assert places == {"token_embd.weight": ((32, 2), 2, 36, start), "blk.0.attn_q.weight": ((4, 4), 0, 64, start + 64)}


def test_what_the_library_writes_passes(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_block_count(1)
    writer.add_token_list(["a", "b"])
    writer.add_tensor("token_embd.weight", np.zeros((2, 64), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((64, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert read_gguf_header(tmp_path / "x.gguf").parameters == 2 * 64 + 64 * 32


def test_what_is_read_is_what_the_library_unpacks():
    unpacked = {0: (1, 4), 1: (1, 2)}
    for kind, (elements, size) in gguf.GGML_QUANT_SIZES.items():
        with contextlib.suppress(NotImplementedError):
            assert gguf.dequantize(np.zeros((1, size), np.uint8), kind).shape == (1, elements)
            unpacked[int(kind)] = elements, size
    assert unpacked == BLOCKS and not BLOCKS.keys() & UNREAD.keys()


@pytest.mark.parametrize("kind", [*UNREAD, 99])
def test_a_type_without_an_unpacker_is_named(kind, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(tensors=[tensor("blk.0.attn_q.weight", (256, 1), kind, 0)]))
    with pytest.raises(ModelError) as caught:
        read_gguf_header(path)
    assert caught.value.code == "E-MODEL-ARCH"
    assert f"{UNREAD.get(kind, 'an unknown type')} (ggml type {kind})" in str(caught.value)


def array(kind: int, count: int, body: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + body


MORE = [*GOOD_KEYS]
MALFORMED = {
    "empty": (b"", "CUT"),
    "short": (b"GGUF" + bytes(20), "CUT"),
    "magic": (gguf_bytes(magic=b"GGML"), "BAD"),
    "version 1": (gguf_bytes(version=1), "BAD"),
    "big endian": (gguf_bytes(version=3 << 24), "BAD"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "CUT"),
    "2**61 elements in 49 bytes": (gguf_bytes([text("k") + struct.pack("<I", 9) + array(4, 2**61)], [], n_tensors=1,
                                              data=0, alignment=1), "BAD"),
    "2**63 keys": (gguf_bytes(n_keys=2**63), "BAD"),
    "2**63 tensors": (gguf_bytes(n_tensors=2**63), "BAD"),
    "no tensors": (gguf_bytes(tensors=[]), "BAD"),
    "10,001 keys": (gguf_bytes([key(f"k{n}", 0, b"\0") for n in range(10_001)]), "BAD"),
    "key endless": (gguf_bytes([struct.pack("<Q", 2**40)]), "BAD"),
    "key twice": (gguf_bytes([*MORE, MORE[0]]), "BAD"),
    "key empty": (gguf_bytes([*MORE, key("", 0, b"\0")]), "BAD"),
    "value type 7777": (gguf_bytes([*MORE, key("k", 7777, b"\0")]), "BAD"),
    "text past the end": (gguf_bytes([*MORE, key("k", 8, struct.pack("<Q", 2**19))]), "CUT"),
    "array of arrays": (gguf_bytes([*MORE, key("k", 9, array(9, 1, array(0, 1, b"\0")))]), "BAD"),
    "array past the end": (gguf_bytes([*MORE, key("k", 9, array(12, 999_999))]), "CUT"),
    "texts past the end": (gguf_bytes([*MORE, key("k", 9, array(8, 999_999))]), "BAD"),
    "alignment 2**31": (gguf_bytes([*MORE, key("general.alignment", 4, struct.pack("<I", 2**31))]), "BAD"),
    "alignment 0": (gguf_bytes([*MORE, key("general.alignment", 4, bytes(4))]), "BAD"),
    "alignment 48": (gguf_bytes([*MORE, key("general.alignment", 4, struct.pack("<I", 48))]), "BAD"),
    "alignment a text": (gguf_bytes([*MORE, key("general.alignment", 8, text("32"))]), "BAD"),
    "no architecture": (gguf_bytes(MORE[1:]), "BAD"),
    "architecture a number": (gguf_bytes([key("general.architecture", 4, bytes(4)), *MORE[1:]]), "BAD"),
    "tensor of 5 dimensions": (gguf_bytes(tensors=[tensor("a", (1, 1, 1, 1, 1), 0, 0)]), "BAD"),
    "tensor of 2**31 dimensions": (gguf_bytes(tensors=[text("a") + struct.pack("<I", 2**31)]), "BAD"),
    "tensor of no size": (gguf_bytes(tensors=[tensor("a", (0, 4), 0, 0)]), "BAD"),
    "tensor not of blocks": (gguf_bytes(tensors=[tensor("a", (33,), 2, 0)]), "BAD"),
    "tensor overflow": (gguf_bytes(tensors=[*GOOD_TENSORS, tensor("a", (2**63, 2**63), 0, 128)]), "CUT"),
    "tensor past the end": (gguf_bytes(tensors=[*GOOD_TENSORS, tensor("a", (32,), 0, 128)]), "CUT"),
    "tensors overlap": (gguf_bytes(tensors=[*GOOD_TENSORS, tensor("a", (4,), 0, 64)]), "BAD"),
    "tensor misaligned": (gguf_bytes(tensors=[tensor("a", (4,), 0, 4)]), "BAD"),
    "tensor twice": (gguf_bytes(tensors=[GOOD_TENSORS[1], tensor("blk.0.attn_q.weight", (1,), 0, 0)]), "BAD"),
    "tensor name a path": (gguf_bytes(tensors=[tensor("../x", (4,), 0, 0)]), "BAD"),
    "layers": (gguf_bytes([MORE[0], key("llama.block_count", 4, struct.pack("<I", 200))]), "MISSING"),
    "100,000 layers": (gguf_bytes([MORE[0], key("llama.block_count", 4, struct.pack("<I", 100_000))]), "SIZE"),
    "layers negative": (gguf_bytes([MORE[0], key("llama.block_count", 5, struct.pack("<i", -1))]), "BAD"),
    "width": (gguf_bytes([*MORE, key("llama.embedding_length", 10, struct.pack("<Q", 2**60))]), "SIZE"),
    "split": (gguf_bytes([*MORE, key("split.count", 2, struct.pack("<H", 3))]), "BAD"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_headers_are_refused(tmp_path, name):
    path = tmp_path / "x.gguf"
    path.write_bytes(MALFORMED[name][0])
    with few_calls(100_000), pytest.raises(ModelError) as caught:
        read_gguf_header(path)
    assert len(str(caught.value)) <= 240
    assert caught.value.code == f"E-MODEL-{MALFORMED[name][1]}"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_headers_pass_or_are_refused(tmp_path, data):
    raw = bytearray(gguf_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[:data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    try:
        read_gguf_header(path)
    except ModelError as error:
        assert len(str(error)) <= 240


def test_a_vocabulary_as_large_as_published_ones_takes_two_calls_a_token(tmp_path):
    words = b"".join(text(f"token{n}") for n in range(260_000))
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes([*GOOD_KEYS, key("tokenizer.ggml.merges", 9, array(8, 260_000, words))]))
    with few_calls(2 * 260_000 + 1000):
        read_gguf_header(path)
