"""Text is said as soon as it is certain, and never taken back, whatever the tokenizer."""

from __future__ import annotations

import functools

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_folders import FOLDERS, texts

from jax_encdec.text_streaming import TextStream, pieces, probes
from jax_encdec.tokenization import Tokenizer

KINDS = [
    "bert-bare",
    "bert-v4",
    "own-pipeline",
    "gpt2-bare",
    "bart-bare-prefix",
    "unigram",
    "bytes",
    "suffix",
]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    @functools.cache
    def tokenizer(name: str) -> Tokenizer:
        if name == "bytes":
            return with_byte_fallback()
        if name == "suffix":
            return with_suffix()
        return Tokenizer.from_pretrained(FOLDERS[name](tmp_path_factory.mktemp(name)))

    return tokenizer


def with_byte_fallback() -> Tokenizer:
    """As Llama's: what no token spells is spelled in bytes."""
    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581the", "\u2581a", "b", "é", "."]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True)
    )
    d = tokenizers.decoders
    backend.decoder = d.Sequence(
        [d.Replace("\u2581", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend)


def with_suffix() -> Tokenizer:
    """As CLIP's: the end of a word is marked."""
    words = ["the</w>", "th", "e", ".</w>", "'</w>", "s</w>", "x"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({w: i for i, w in enumerate(words)}, []))
    backend.decoder = tokenizers.decoders.BPEDecoder("</w>")
    return Tokenizer(backend)


def say(tokenizer: Tokenizer, ids: list[int], size: int = 1) -> list[str]:
    return list(pieces(tokenizer, (ids[i : i + size] for i in range(0, len(ids), size))))


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_pieces_are_the_text_whatever_the_tokens(name, opened, data):
    tokenizer = opened(name)
    every = st.integers(0, tokenizer.vocab_size - 1)
    if name == "bytes":  # Valid characters among them, whole and torn.
        every = st.sampled_from([0xE3 + 1, 0x81 + 1, 0x82 + 1, 0xC3 + 1, 0xA9 + 1, 257, 259, 0x42])
    elif tokenizer.config.get("clean_up_tokenization_spaces"):
        names = [".", ",", "'", "s", "n", "t", "m", "re", "ve", "a", "##s", "!"]
        found = [tokenizer.backend.token_to_id(name) for name in names]
        every |= st.sampled_from([i for i in found if i is not None])
    ids = data.draw(st.lists(every, max_size=14))
    size = data.draw(st.integers(1, 3))
    assert "".join(say(tokenizer, ids, size)) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", KINDS[:6])
def test_real_texts_come_back_and_come_soon(name, opened):
    tokenizer = opened(name)
    for text in texts()[::7]:
        ids = tokenizer.encode([text], allow_empty=True)[0]
        if tokenizer.decode(ids):
            assert "".join(say(tokenizer, ids)) == tokenizer.decode(ids)
    ids = tokenizer.encode(["the quick brown fox jumps over the lazy dog and people walk"])[0]
    stream = TextStream(tokenizer)
    said = [len(stream.push([i])) for i in ids]
    # All but the last word or two is said before the end.
    assert sum(said) >= len(tokenizer.decode(ids)) - 8
    assert sum(map(bool, said)) > 5


def test_a_character_of_several_tokens_is_said_whole(opened):
    tokenizer = opened("gpt2-bare")
    ids = tokenizer.encode(["\U0001f642 ok"])[0]
    said = say(tokenizer, ids)
    assert said[0].startswith("\U0001f642")
    assert "\ufffd" not in "".join(said)
    # Cut in the middle of it, the end says what is there, as `decode` does.
    assert "".join(say(tokenizer, ids[:2])) == tokenizer.decode(ids[:2])


def test_what_no_token_has_and_special_tokens_say_nothing(opened):
    tokenizer = opened("bert-bare")
    words = tokenizer.encode(["the dog"])[0]
    assert say(tokenizer, [*words, tokenizer.vocab_size + 3]) == say(tokenizer, words)
    assert "".join(say(tokenizer, words)) == "the dog"
    assert say(tokenizer, []) == []


def test_probes_are_few(opened):
    assert all(2 <= len(probes(opened(name))) < 80 for name in KINDS)
