"""A sequence ends with the token that completes a stop string, as in Transformers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import tokenizers as tk
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from toy_search import PAD, START, VOCAB, assert_same, make_sources, make_table, ours, theirs

from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.decoding.search import prepare
from jax_encdec.decoding.stop_strings import automaton_table, stop_table
from jax_encdec.errors import InputError
from jax_encdec.tokenization import Tokenizer

WORDPIECE = [
    "[UNK]", "[CLS]", "[SEP]", "[PAD]", "s", "##t", "##op", "st", "##opera", "stop", "las",
    "##topper", "##s", "##to", "##pped", "p", "##p", ".", "##o", "o", "top", "abcdef", "##stops",
]  # fmt: skip
BYTES = [
    "Ġ", "<s>", "</s>", "<pad>", "a", "b", "c", "d", "e", "f", "Ã", "©", "s", "t", "op", "Ġst",
    "stop", "o", "p", "topper", "to", "Ãī", "pped",
]  # fmt: skip


def wordpiece() -> tk.Tokenizer:
    vocab = {token: i for i, token in enumerate(WORDPIECE)}
    backend = tk.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    return backend


def byte_level() -> tk.Tokenizer:
    backend = tk.Tokenizer(models.BPE({token: i for i, token in enumerate(BYTES)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


STRINGS = {
    wordpiece: ["stop", "top", "op", "p", "p.", "s o", "stopp", "tos", "ops"],
    byte_level: ["stop", "top", "op", "p", " s", "é", "tÉ", "opt", "toe"],
}


@pytest.mark.parametrize("make", STRINGS)
@pytest.mark.parametrize("beams", [1, 3])
def test_ends_where_transformers_ends(make, beams):
    transformers = pytest.importorskip("transformers")
    backend = make()
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer = Tokenizer(backend)
    assert len(WORDPIECE) == len(BYTES) == VOCAB
    rng = random.Random(beams)
    early = 0
    for seed in range(12):
        table = make_table(seed)
        table[..., [0, 1, 2, 3]] -= 5.0
        ids, mask = make_sources(np.random.default_rng(seed), 4)
        prompt = np.full((4, 3), START, np.int32)
        # What the prompt says counts as the beginning of a stop string.
        prompt[:, 1:] = np.random.default_rng(seed).integers(4, VOCAB, (4, 2))
        options: dict[str, Any] = {"num_beams": beams, "eos_token_id": 2, "max_new_tokens": 14}
        options |= {"num_return_sequences": beams, "stop_strings": rng.sample(STRINGS[make], 2)}
        stops = stop_table(tokenizer, options["stop_strings"], VOCAB)
        got = ours(table, ids, mask, options, prompt, stops=stops)
        expected = theirs(table, ids, {**options, "tokenizer": oracle}, prompt)
        assert_same(got, *expected, note=f"{seed} {options['stop_strings']}")
        early += int((got.lengths < 17).sum())
    assert early > 20


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=4), min_size=3, max_size=9),
    strings=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3),
    said=st.lists(st.integers(0, 8), min_size=1, max_size=8),
    as_bytes=st.booleans(),
)
def test_the_table_finds_what_is_in_the_text(pieces, strings, said, as_bytes):
    known: Any = {i: piece.encode() if as_bytes else piece for i, piece in enumerate(pieces)}
    known |= {9 + i: x.encode() if as_bytes else x for i, x in enumerate("abc")}  # all can end
    table = automaton_table(known, tuple(strings), 13)
    text, state = "", 0
    for token in said:
        before, text = text, text + (pieces[token] if token < len(pieces) else "")
        if token >= len(pieces):
            state, text = int(table[state, 12]), ""  # An id of no token breaks off.
            assert state == 0
            continue
        after = int(table[state, token])
        ends = range(len(before) + 1, len(text) + 1)
        assert (after < 0) == any(text[:end].endswith(s) for end in ends for s in strings)
        state = ~after if after < 0 else after


def test_other_strings_of_like_length_run_the_same_program():
    tokenizer = Tokenizer(wordpiece())
    a, b = (stop_table(tokenizer, string, VOCAB) for string in ("stop", ["top", "op"]))
    assert a.shape == b.shape == (8, VOCAB)


def test_what_cannot_work_is_refused():
    with pytest.raises(InputError, match="can never be completed"):
        stop_table(Tokenizer(wordpiece()), "xyz", VOCAB)
    with pytest.raises(InputError, match="tokenizer="):
        prepare(GenerationConfig(stop_strings="stop", pad_token_id=PAD), vocab_size=VOCAB)
