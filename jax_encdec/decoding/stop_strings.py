"""Stop strings, compiled to one table: an automaton that reads tokens.

A sequence ends with the token that completes a stop string, wherever in that token it does so. The
strings' automaton (Aho and Corasick 1975) reads characters; here it is run over the text of every
token of the vocabulary from every state, once, on the host. In the search a lane's state is one
number, and each new token one look-up: `table[state, token]`.

Where a tokenizer's tokens are bytes, the automaton reads bytes, so that a character spread over
several tokens counts too, as in Transformers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jax_encdec.errors import InputError
from jax_encdec.tokenization import Tokenizer

_BEFORE = "abcdef"  # put before a token, so that decoders treat it as the middle of a text


def stop_table(tokenizer: Any, stop_strings: str | Sequence[str], vocab_size: int) -> np.ndarray:
    """Return the automaton of `stop_strings` over the tokens of a `jax_encdec.Tokenizer`.

    Returns:
        int32 `[states, vocab_size]`: the state after a token, or its complement `~state` where the
        token completes a string. State 0: nothing of any string has been said. The number of
        states is rounded up to a power of two, so that other strings rarely compile anew.

    Raises:
        InputError: no token completes one of the strings.
    """
    strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
    if not isinstance(tokenizer, Tokenizer):
        raise InputError(
            "tokenizer must be one of this library, such as the target of "
            f"TokenizerPair.from_pretrained(path); got {type(tokenizer).__name__}"
        )
    return _table(_Same(tokenizer.backend), strings, vocab_size)


class _Same:
    """A tokenizer as a key of a cache: itself and no other, kept alive."""

    def __init__(self, backend: Any):
        self.backend = backend

    def __hash__(self) -> int:
        return id(self.backend)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.backend is self.backend


@functools.lru_cache(maxsize=8)
def _table(key: _Same, strings: tuple[str, ...], vocab_size: int) -> np.ndarray:
    return automaton_table(_pieces(key), strings, vocab_size)


def automaton_table(
    pieces: dict[int, str] | dict[int, bytes], strings: tuple[str, ...], vocab_size: int
) -> np.ndarray:
    """As `stop_table`, given what each token adds to a text (all str, or all bytes)."""
    as_bytes = isinstance(next(iter(pieces.values()), ""), bytes)
    wanted = [list(s.encode() if as_bytes else s) for s in strings]
    letters = {letter: i + 1 for i, letter in enumerate(sorted({x for s in wanted for x in s}))}
    goto, full = _automaton([[letters[x] for x in s] for s in wanted], 1 + len(letters))
    # Letters of every token, -1 after its end; 0 is a letter of no stop string.
    known = {i: piece for i, piece in pieces.items() if i < vocab_size}
    width = max(map(len, known.values()), default=1)
    text = np.full((vocab_size, max(width, 1)), -1, np.int32)
    for i, piece in known.items():
        text[i, : len(piece)] = [letters.get(x, 0) for x in piece]
    unknown = np.ones(vocab_size, bool)
    unknown[list(known)] = False
    states = np.repeat(np.arange(len(goto), dtype=np.int32)[:, None], vocab_size, axis=1)
    said = np.zeros((len(strings), *states.shape), bool)
    for letter in text.T:
        moved = goto[states, np.maximum(letter, 0)]
        states = np.where(letter < 0, states, moved)
        said |= full[:, states] & (letter >= 0)
    states[:, unknown] = 0  # An id without a text breaks off whatever was begun.
    for string, ends in zip(strings, said, strict=True):
        if not ends.any():
            raise InputError(
                f"the stop string {string!r} can never be completed: no token ends with a part "
                "of it that would"
            )
    table = np.where(said.any(0), ~states, states).astype(np.int32)
    rows = max(8, 1 << (len(table) - 1).bit_length())
    padded = np.zeros((rows, vocab_size), np.int32)
    padded[: len(table)] = table
    return padded


def _automaton(strings: list[list[int]], letters: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `goto [states, letters]`, and bool `[strings, states]`: which end in which state."""
    children: list[dict[int, int]] = [{}]
    ends: list[int] = []
    for string in strings:
        state = 0
        for letter in string:
            if letter not in children[state]:
                children[state][letter] = len(children)
                children.append({})
            state = children[state][letter]
        ends.append(state)
    goto = np.zeros((len(children), letters), np.int32)
    full = np.zeros((len(strings), len(children)), bool)
    full[np.arange(len(strings)), ends] = True
    fallback = [0] * len(children)  # the longest other beginning that a state ends with
    queue = [0]
    for state in queue:
        back = fallback[state]
        full[:, state] |= full[:, back]
        if state:
            goto[state] = goto[back]
        for letter, child in children[state].items():
            fallback[child] = goto[state, letter] if state else 0
            goto[state, letter] = child
            queue.append(child)
    return goto, full


@functools.lru_cache(maxsize=4)
def _pieces(key: _Same) -> dict[int, str] | dict[int, bytes]:
    """What each token adds to a text: str, or bytes where the tokenizer's tokens are bytes."""
    backend = key.backend
    decoder = backend.decoder
    kinds = _kinds(decoder)
    base = backend.encode(_BEFORE, add_special_tokens=False).tokens
    join = (lambda tokens: " ".join(tokens)) if decoder is None else decoder.decode
    before = join(base)

    def piece(token: str) -> str:
        text = join([*base, token])
        start = text.find(_BEFORE)
        return text[start + len(_BEFORE) :] if start >= 0 else text[len(before) :]

    found = {i: token for token, i in backend.get_vocab(with_added_tokens=True).items()}
    if not kinds & {"ByteLevel", "ByteFallback"}:
        return {i: piece(token) for i, token in found.items()}
    letters = None if "ByteFallback" in kinds else _byte_letters()
    return {i: _token_bytes(token, letters, piece) for i, token in found.items()}


def _token_bytes(token: str, letters: dict[str, int] | None, piece: Any) -> bytes:
    if letters is not None and all(letter in letters for letter in token):
        return bytes(letters[letter] for letter in token)
    if letters is None and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return piece(token).encode()


def _kinds(decoder: Any) -> set[str]:
    """The types of a decoder and of all that it is made of."""
    if decoder is None:
        return set()

    def walk(node: Any) -> set[str]:
        if isinstance(node, dict):
            own = {node["type"]} if isinstance(node.get("type"), str) else set()
            return own.union(*map(walk, node.values()))
        return set().union(*map(walk, node)) if isinstance(node, list) else set()

    return walk(json.loads(decoder.__getstate__()))


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2), and the byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}
