"""A folder that holds only a SentencePiece model gives the ids its family was trained with.

The oracle is the SentencePiece library, moved by what each family published about its ids; and
Transformers, where it reads such a file right. Without the library, models are made by hand.
"""

from __future__ import annotations

import functools
import io
import itertools
import pydoc_data.topics
import struct
import unicodedata
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_folders import texts, write_json

from jax_encdec.errors import CheckpointError
from jax_encdec.sentencepiece_model import build, read_model

PATH = Path("spiece.model")
T5 = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
ALBERT = {"pad_id": 0, "unk_id": 1, "bos_id": -1, "eos_id": -1}
ALBERT |= {"control_symbols": "[CLS],[SEP],[MASK]", "user_defined_symbols": "(,),-"}
DEBERTA = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "pad_piece": "[PAD]"}
DEBERTA |= {"bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}

# How each was trained, and what becomes of the library's ids: those of pieces that have another
# place, how far the others move, and the tokens before and after a text.
FAMILIES = {
    "T5Tokenizer": (T5, {}, 0, (), ("</s>",)),
    "XLMRobertaTokenizer": ({}, {0: 3}, 1, ("<s>",), ("</s>",)),
    "CamembertTokenizer": ({}, {0: 3}, 4, ("<s>",), ("</s>",)),
    "MBartTokenizer": ({}, {0: 3}, 1, (), ("</s>", "de_DE")),
    "MBart50Tokenizer": ({}, {0: 3}, 1, ("de_DE",), ("</s>",)),
    "XGLMTokenizer": ({}, {0: 3}, 1, ("</s>",), ()),
    "PegasusTokenizer": (T5, {}, 103, (), ("</s>",)),
    "BertGenerationTokenizer": ({}, {}, 0, (), ()),
    "DebertaV2Tokenizer": (DEBERTA, {}, 0, ("[CLS]",), ("[SEP]",)),
}
# Transformers 5 reads these right from a `.model` file; it normalises no text for mBART and
# DeBERTa, and does not find XGLM's pieces.
RIGHT_THERE = ("T5", "XLMRoberta", "Camembert", "MBart50", "Pegasus", "BertGeneration")


@functools.cache
def trained(**options) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its bindings
        sentencepiece = pytest.importorskip(
            "sentencepiece", reason="the oracle needs `pip install sentencepiece`"
        )
    topics = " ".join(pydoc_data.topics.topics.values()).split("\n")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in topics if line.strip()] + texts()[:20]),
        model_writer=model,
        vocab_size=900,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return model.getvalue()


def library(data: bytes):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=data)


@functools.cache
def plain() -> list[str]:
    """Texts that name no special token, which the library would spell out; and without a mark on
    a character that is replaced, as in "\u02b3\u0fb5": the `tokenizers` library loses the mark."""
    return [text for text in texts() if not any(c in text for c in "<[") and not loses_mark(text)]


def loses_mark(text: str) -> bool:
    return any(
        unicodedata.category(mark).startswith("M") and unicodedata.normalize("NFKC", base) != base
        for base, mark in itertools.pairwise(text)
    )


def is_tidy(text: str) -> bool:
    """Transformers splits at control characters, and keeps some spaces at the end."""
    return text == text.strip() and not any(unicodedata.category(c) == "Cc" for c in text)


@pytest.mark.parametrize("named", FAMILIES)
def test_ids_are_those_of_the_library_in_the_places_of_the_family(named):
    options, moved, offset, before, after = FAMILIES[named]
    data = trained(**options)
    backend, _ = build(PATH, data, named, {"src_lang": "de_DE"})
    first, last = ([backend.token_to_id(text) for text in around] for around in (before, after))
    for text in plain():
        pieces = library(data).encode(text)
        expected = [*first, *(moved.get(i, i + offset) for i in pieces), *last]
        assert backend.encode(text).ids == expected, text


@pytest.mark.parametrize("named", [f"{name}Tokenizer" for name in RIGHT_THERE])
def test_ids_and_vocabulary_are_those_of_transformers(named, tmp_path):
    transformers = pytest.importorskip("transformers")
    data = trained(**FAMILIES[named][0])
    cls = getattr(transformers, named)
    (tmp_path / cls.vocab_files_names["vocab_file"]).write_bytes(data)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": named, "src_lang": "de_DE"})
    theirs = cls.from_pretrained(tmp_path)
    backend, special = build(PATH, data, named, {"src_lang": "de_DE"})
    for text in filter(is_tidy, plain()):
        assert backend.encode(text).ids == theirs(text).input_ids, text
    assert backend.get_vocab().items() <= theirs.get_vocab().items()
    for name in ("pad_token", "eos_token", "unk_token"):
        assert special[name] == getattr(theirs, name)


def test_albert_lowercases_strips_accents_and_splits_numbers_from_commas():
    data = trained(**ALBERT)
    backend, _ = build(PATH, data, "AlbertTokenizer", {})
    for text in plain():
        if "," not in text:
            letters = unicodedata.normalize("NFKD", text.replace("``", '"').replace("''", '"'))
            letters = "".join(c for c in letters if not unicodedata.combining(c)).lower()
            assert backend.encode(text).ids[1:-1] == library(data).encode(letters), text

    pieces = backend.encode("Ünder ``1969, (and) so-called''").tokens
    assert pieces[0] == "[CLS]"
    assert pieces[-1] == "[SEP]"
    assert "".join(pieces[1:-1]) == '▁under▁"1969,▁(and)▁so-called"'
    assert "(" in pieces
    assert not any(piece[:1].isdigit() and piece.endswith(",") for piece in pieces)


def test_decoding_gives_the_text_back():
    data = trained(byte_fallback=True, **T5)
    backend, _ = build(PATH, data, "T5Tokenizer", {})
    for text in plain():
        ids = library(data).encode(text)
        assert backend.encode(text).ids == [*ids, 1], text
        assert backend.decode(ids) == library(data).decode(ids), text


def test_the_parser_finds_what_the_library_finds():
    data = trained(byte_fallback=True)
    theirs, ours = library(data), read_model(PATH, data)
    assert len(ours.pieces) == theirs.get_piece_size()
    for i, piece in enumerate(ours.pieces):
        assert piece[:2] == (theirs.id_to_piece(i), theirs.get_score(i))
    assert ours.byte_fallback
    assert len(ours.charsmap) > 100_000


# By hand -----------------------------------------------------------------------------------------


def field(number: int, value: int | bytes | float) -> bytes:
    """A field of a protobuf message."""
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    body = b"" if isinstance(value, int) else value
    value = value if isinstance(value, int) else len(value)
    wire = 2 if body or value == 0 else 0
    digits = []
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    key = number << 3 | wire
    assert number < 16
    return bytes([key, *digits, value]) + body


def piece(text: str, score: float = -1.0, kind: int = 1) -> bytes:
    return field(1, field(1, text.encode()) + field(2, score) + field(3, kind))


OPENING = piece("<pad>", 0.0, 3) + piece("</s>", 0.0, 3) + piece("<unk>", 0.0, 2)
LETTERS = b"".join(piece(letter, -5.0 - i / 9) for i, letter in enumerate("▁abcdefgh"))
SMALL = OPENING + piece("▁ab", -2.0) + piece("cab", -2.5) + LETTERS


def test_a_model_without_a_table_of_characters():
    backend, special = build(PATH, SMALL, "t5", {"extra_ids": 2})
    assert backend.encode("  abcab  a ZZ").tokens == ["▁ab", "cab", "▁", "a", "▁", "ZZ", "</s>"]
    assert backend.decode(backend.encode("  abcab  a").ids) == "abcab a"
    assert backend.encode("<extra_id_0> a").ids[0] == backend.get_vocab_size() - 1
    assert special == {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


@pytest.mark.parametrize(
    ("data", "named", "says"),
    [
        (SMALL, "LlamaTokenizer", "not rebuilt"),
        (b"", "t5", "no pieces"),
        (b"{}", "t5", "no protobuf message"),
        (SMALL[:-3], "t5", "cut off"),
        (SMALL + piece("▁ab"), "t5", "there twice"),
        (SMALL + piece(""), "t5", "empty"),
        (SMALL + piece("x", float("nan")), "t5", "not finite"),
        (SMALL + piece("x", 0.0, 5), "t5", "unused"),
        (SMALL + piece("x", 0.0, 2), "t5", "one piece of the unknown kind"),
        (LETTERS, "t5", "one piece of the unknown kind"),
        (OPENING, "t5", "no piece that spells text"),
        (SMALL + field(2, field(3, 2)), "t5", "Unigram kind; got BPE"),
        (SMALL + field(3, field(2, b"\x00\x04\x00\x00abc")), "t5", "table of characters"),
        (SMALL + field(1, 7), "t5", "wrong type"),
        (SMALL + field(1, field(1, b"\xff\xfe")), "t5", "utf-8"),
        (SMALL, "CamembertTokenizer", "special tokens at another place"),
        (piece("<unk>", 0.0, 2) + LETTERS, "xlm-roberta", "does not open with the special"),
        (SMALL, "albert", "lacks the cls_token"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(data, named, says):
    with pytest.raises(CheckpointError, match=says) as caught:
        build(PATH, data, named, {})
    assert str(PATH) in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_or_gives_a_tokenizer_that_works(data):
    content = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] or content
    try:
        backend, _ = build(PATH, bytes(content), "t5", {})
    except CheckpointError:
        return
    assert isinstance(backend.decode(backend.encode("abc ZZ\n<pad> ▁").ids), str)
