"""Text to ids and back is what Transformers' AutoTokenizer does on the same folder."""

from __future__ import annotations

import functools
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_folders import ENCDEC, FOLDERS, texts, write_json
from tokenizers import models

from jax_encdec.errors import CheckpointError, InputError
from jax_encdec.tokenization import LADDER, Tokenizer, TokenizerPair, bucket_length


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    @functools.cache
    def build(name: str) -> Path:
        return FOLDERS[name](tmp_path_factory.mktemp(name))

    return build


@functools.cache
def oracle(folder: Path):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def plain(oracle_tokenizer, batch: list[str], **options) -> list[list[int]]:
    options = {"padding": False, "truncation": False, "verbose": False} | options
    return oracle_tokenizer(batch, **options)["input_ids"]


def assert_same(ours: Tokenizer, theirs, batch: list[str]) -> None:
    rows = ours.encode(batch, allow_empty=True, max_length=10**6)
    assert rows == plain(theirs, batch)
    for skip in (True, False):
        expected = theirs.batch_decode(rows, skip_special_tokens=skip)
        assert ours.decode_batch(rows, skip_special_tokens=skip) == expected


def test_the_texts_tell_the_variants_apart(folder_of):
    """The comparisons below would notice a lost option: no two of these folders agree."""
    names = ("bert", "bert-cased", "bert-accents", "bert-bare-chinese", "gpt2", "gpt2-prefix")
    names += ("roberta", "bart", "roberta-hub")
    rows = [
        Tokenizer.from_pretrained(folder_of(name)).encode(
            texts(), allow_empty=True, max_length=10**6
        )
        for name in names
    ]
    for i, one in enumerate(rows):
        assert all(one != other for other in rows[:i]), names[i]


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_text_equal_autotokenizer(folder_of, name):
    folder = folder_of(name)
    ours, theirs = Tokenizer.from_pretrained(folder), oracle(folder)
    assert_same(ours, theirs, [*texts(), "", " ", "\n"])
    bare = ours.encode(texts(), allow_empty=True, add_special_tokens=False, max_length=10**6)
    assert bare == plain(theirs, texts(), add_special_tokens=False)
    assert ours.vocab_size == len(theirs)
    for kind in ("pad", "bos", "eos", "cls", "sep", "unk", "mask"):
        assert getattr(ours, f"{kind}_token_id") == getattr(theirs, f"{kind}_token_id"), kind


@pytest.mark.parametrize("name", ["bert", "bert-added", "gpt2", "roberta-bare", "own-pipeline"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_equals_autotokenizer(folder_of, name, text):
    folder = folder_of(name)
    assert_same(Tokenizer.from_pretrained(folder), oracle(folder), [text])


@pytest.mark.parametrize("name", FOLDERS)
def test_a_saved_tokenizer_is_the_same_for_us_and_for_transformers(folder_of, name, tmp_path):
    ours = Tokenizer.from_pretrained(folder_of(name))
    expected = ours.encode(texts(), allow_empty=True, max_length=10**6)
    ours.save(tmp_path)
    # No config.json here: the tokenizer's own files must be enough.
    theirs = oracle(tmp_path)
    assert plain(theirs, texts()) == expected
    again = Tokenizer.from_pretrained(tmp_path)
    assert_same(again, theirs, texts())
    assert again.pad_token_id == ours.pad_token_id
    again.save(tmp_path / "twice")
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    second = {path.name: path.read_bytes() for path in (tmp_path / "twice").iterdir()}
    assert first == second


@pytest.mark.parametrize("name", ["bert", "gpt2", "roberta", "bert-v4"])
def test_original_files_are_carried_byte_for_byte(folder_of, name, tmp_path):
    folder = folder_of(name)
    Tokenizer.from_pretrained(folder).save(tmp_path)
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("name", ["bert", "gpt2", "roberta-bare"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_equals_transformers(folder_of, name, side, tmp_path):
    shutil.copytree(folder_of(name), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    write_json(path, config | {"truncation_side": side})
    ours, theirs = Tokenizer.from_pretrained(tmp_path), oracle(tmp_path)
    for limit in (3, 8, 16):
        rows = ours.encode(texts(), max_length=limit, truncation=True, allow_empty=True)
        assert rows == plain(theirs, texts(), truncation=True, max_length=limit)
        assert max(map(len, rows)) == limit


def test_truncation_in_one_thread_does_not_leak_into_another(folder_of):
    ours = Tokenizer.from_pretrained(folder_of("bert"))
    whole = ours.encode(texts(), allow_empty=True)
    seen = []

    def cut():
        for _ in range(20):
            ours.encode(texts()[:40], max_length=4, truncation=True, allow_empty=True)

    thread = threading.Thread(target=cut)
    thread.start()
    while thread.is_alive():
        seen.append(ours.encode(texts(), allow_empty=True) == whole)
    thread.join()
    assert all(seen)


def test_a_batch_is_padded_right_to_a_bucket(folder_of):
    ours = Tokenizer.from_pretrained(folder_of("roberta"))
    batch = ["a fox", "the quick brown fox jumps over the lazy dog, it's true"]
    rows = ours.encode(batch)
    ids, mask = ours.batch(batch)
    assert ids.dtype == mask.dtype == np.int32
    assert ids.shape == mask.shape == (2, bucket_length(max(map(len, rows))))
    for row, got, kept in zip(rows, ids, mask, strict=True):
        assert got[: len(row)].tolist() == row
        assert (got[len(row) :] == ours.pad_token_id).all()
        assert kept.tolist() == [1] * len(row) + [0] * (len(got) - len(row))
    assert ours.batch(batch, buckets=None)[0].shape[1] == max(map(len, rows))
    assert ours.batch(batch, max_length=40)[0].shape[1] == 40  # 33 tokens: not 64
    assert ours.batch([])[0].shape == (0, 0)
    assert ours.decode_batch(ids) == [ours.decode(row) for row in rows]


def test_a_tokenizer_without_pad_token_says_so(folder_of):
    ours = Tokenizer.from_pretrained(folder_of("gpt2"))
    assert ours.pad_token_id is None
    with pytest.raises(InputError, match=r"pass pad_token_id, .* the eos_token_id"):
        ours.batch(["a fox"])
    ids, mask = ours.batch(["a fox"], pad_token_id=ours.eos_token_id)
    assert (ids[mask == 0] == ours.eos_token_id).all()


@given(n=st.integers(0, LADDER[-1]), limit=st.integers(1, 2000))
def test_bucket_length_is_the_next_rung_and_never_beyond_the_limit(n, limit):
    rung = bucket_length(n)
    assert rung in LADDER
    assert rung >= n
    assert all(other < n for other in LADDER if other < rung)
    if n <= limit:
        assert bucket_length(n, limit=limit) == min(rung, limit)
    else:
        with pytest.raises(InputError):
            bucket_length(n, limit=limit)


def test_the_ladder():
    assert LADDER[:11] == (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
    with pytest.raises(InputError, match="beyond the last bucket"):
        bucket_length(LADDER[-1] + 1)


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        ("one text", {}, "texts must be a list of str, got str"),
        (["good", 3], {}, "text 1 must be a str, got int"),
        (["good", None], {}, "text 1 must be a str, got NoneType"),
        (["good", ""], {}, "text 1 is empty"),
        (["good", " \n\t"], {}, "text 1 is empty"),
        (["good", "\u200b\x00"], {}, "text 1 .* holds nothing this tokenizer keeps"),
        (["good", "bad \ud800"], {}, "text 1 is not valid Unicode"),
        (["fox", "fox " * 30], {"max_length": 16}, r"text 1 has 32 tokens, the limit is 16.*trunc"),
        (["fox"], {"max_length": 2, "truncation": True}, "leaves no room"),
        (["fox"], {"truncation": True}, "truncation=True needs max_length"),
    ],
)
def test_bad_text_is_named(folder_of, batch, options, message):
    ours = Tokenizer.from_pretrained(folder_of("bert"))
    with pytest.raises(InputError, match=message):
        ours.batch(batch, **options)


def test_the_models_own_limit_holds_and_caps_the_bucket(folder_of):
    ours = Tokenizer.from_pretrained(folder_of("bert-v4"))
    assert ours.model_max_length == 512
    assert ours.batch(["fox " * 500])[0].shape == (1, 512)
    with pytest.raises(InputError, match="602 tokens, the limit is 512"):
        ours.encode(["fox " * 600])
    assert len(ours.encode(["fox " * 600], truncation=True)[0]) == 512


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5, -100], "id -100 is not in the vocabulary.*labels"),
        ([5, 10**6], "id 1000000 is not in the vocabulary"),
        ([[5]], "one row"),
        ([0.5], "integer ids"),
    ],
)
def test_bad_ids_are_named(folder_of, ids, message):
    with pytest.raises(InputError, match=message):
        Tokenizer.from_pretrained(folder_of("bert")).decode(ids)


def test_decoding_takes_any_integer_array(folder_of):
    ours = Tokenizer.from_pretrained(folder_of("bert"))
    row = ours.encode(["the lazy dog"])[0]
    for kind in (list, tuple, np.array, functools.partial(np.array, dtype=np.uint16)):
        assert ours.decode(kind(row)) == "the lazy dog"
    assert ours.decode([]) == ""


def test_a_pair_of_two_tokenizers(folder_of, tmp_path):
    one = Tokenizer.from_pretrained(folder_of("bert"))
    two = Tokenizer.from_pretrained(folder_of("gpt2"))
    TokenizerPair(source=one, target=two).save(tmp_path)
    pair = TokenizerPair.from_pretrained(tmp_path)
    assert pair.source.encode(["a fox"]) == one.encode(["a fox"])
    assert pair.target.encode(["a fox"]) == two.encode(["a fox"])
    assert plain(oracle(tmp_path / "decoder_tokenizer"), ["a fox"]) == two.encode(["a fox"])

    TokenizerPair(source=two, target=two).save(tmp_path)  # and nothing of the earlier pair is left
    pair = TokenizerPair.from_pretrained(tmp_path)
    assert pair.target is pair.source
    assert pair.source.encode(["a fox"]) == two.encode(["a fox"])
    assert not (tmp_path / "decoder_tokenizer").exists()


def test_a_source_tokenizer_in_its_own_folder(folder_of, tmp_path):
    shutil.copytree(folder_of("bert"), tmp_path / "encoder_tokenizer")
    shutil.copytree(folder_of("gpt2"), tmp_path / "decoder_tokenizer")
    pair = TokenizerPair.from_pretrained(tmp_path)
    assert pair.source.cls_token_id is not None
    assert pair.target.cls_token_id is None


def test_saving_over_another_tokenizer_leaves_nothing_of_it(folder_of, tmp_path):
    Tokenizer.from_pretrained(folder_of("bert-added")).save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not ours")
    ours = Tokenizer.from_pretrained(folder_of("gpt2"))
    ours.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*ours.files, "model.safetensors"}
    assert plain(oracle(tmp_path), ["a fox <a>"]) == ours.encode(["a fox <a>"])


@pytest.mark.parametrize("name", ["bert-bare", "gpt2-bare", "roberta-bare"])
def test_the_vocabulary_tells_the_layout_when_nothing_else_does(folder_of, name, tmp_path):
    folder = folder_of(name)
    expected = Tokenizer.from_pretrained(folder).encode(texts(), allow_empty=True)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").unlink()
    assert Tokenizer.from_pretrained(tmp_path).encode(texts(), allow_empty=True) == expected


def test_the_decoder_half_of_a_config_tells_the_targets_layout(folder_of, tmp_path):
    shutil.copytree(folder_of("gpt2-bare"), tmp_path, dirs_exist_ok=True)
    write_json(tmp_path / "config.json", ENCDEC)
    ours = Tokenizer.from_pretrained(tmp_path, role="decoder")
    assert ours.encode(["a fox"]) == plain(oracle(folder_of("gpt2-bare")), ["a fox"])


def damage(name, data):
    def apply(folder: Path):
        (folder / name).write_bytes(data) if data is not None else (folder / name).unlink()

    return apply


@pytest.mark.parametrize(
    ("start", "change", "message"),
    [
        ("bert", damage("tokenizer.json", b"{"), "tokenizer.json is not valid JSON"),
        ("bert", damage("tokenizer.json", b"[]"), "must hold a JSON object, got list"),
        ("bert", damage("tokenizer.json", b"{}"), "not a tokenizer that tokenizers"),
        ("bert", damage("tokenizer.json", b"[" * 10**5), "not valid JSON"),
        ("bert", damage("tokenizer_config.json", b"\xff"), "tokenizer_config.json is not valid"),
        ("bert-bare", damage("vocab.txt", None), "no tokenizer in .*; found config.json"),
        ("bert-bare", damage("vocab.txt", b"\xff\xfe\n"), "vocab.txt .* cannot be used"),
        ("bert-bare", damage("vocab.txt", b"[CLS]\n[SEP]\n"), r"unknown-word token '\[UNK\]'"),
        ("bert-bare", damage("vocab.txt", b"[UNK]\n[SEP]\n"), r"lack the cls_token '\[CLS\]'"),
        ("bert-bare", damage("config.json", b'{"model_type": "t5"}'), "kind 't5' without"),
        ("gpt2-bare", damage("merges.txt", None), "vocab.json but not merges.txt"),
        ("gpt2-bare", damage("merges.txt", b"a b c\n"), "cannot be used: .*1"),
        ("gpt2-bare", damage("merges.txt", b"qq zz\n"), "cannot be used"),
        ("gpt2-bare", damage("vocab.json", b"{1}"), "vocab.json is not valid JSON"),
        ("bert-added", damage("added_tokens.json", b'{"<x>": 7}'), "'<x>' the id 7, but"),
        ("bert-added", damage("added_tokens.json", b'{"<x>": "y"}'), "added tokens .* damaged"),
        ("bert-added", damage("special_tokens_map.json", b"null"), "got NoneType"),
    ],
)
def test_a_damaged_folder_is_named(folder_of, tmp_path, start, change, message):
    shutil.copytree(folder_of(start), tmp_path, dirs_exist_ok=True)
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_pretrained(tmp_path)


def test_what_is_not_a_tokenizer_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent: no such .*folder"):
        Tokenizer.from_pretrained(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="found nothing"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"\x0a")
    with pytest.raises(CheckpointError, match=r"SentencePiece model spiece.model .* AutoTokenizer"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("hello\nworld\n")
    with pytest.raises(CheckpointError, match="does not tell whether"):
        Tokenizer.from_pretrained(tmp_path)


def test_a_file_in_the_way_is_named(folder_of, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="out is a file"):
        Tokenizer.from_pretrained(folder_of("bert")).save(tmp_path / "out")


def test_a_failed_save_leaves_the_old_tokenizer_whole(folder_of, tmp_path):
    Tokenizer.from_pretrained(folder_of("bert-added")).save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = Tokenizer.from_pretrained(folder_of("gpt2"))
    other.files["vocab.json"] = "not bytes"  # type: ignore[assignment]
    with pytest.raises(TypeError):
        other.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_special_token_must_be_in_the_vocabulary():
    backend = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    with pytest.raises(InputError, match=r"pad_token '\[PAD\]' is not in"):
        Tokenizer(backend, {"pad_token": "[PAD]"})
    with pytest.raises(InputError, match="must be a number, got '512'"):
        Tokenizer(backend, {"model_max_length": "512"})


def test_wrapping_leaves_the_callers_backend_alone(folder_of):
    backend = tokenizers.Tokenizer.from_file(str(folder_of("own-pipeline") / "tokenizer.json"))
    ours = Tokenizer(backend, {"pad_token": "[PAD]"})
    assert backend.padding is not None
    assert len(ours.encode(["the fox"])[0]) == 4
