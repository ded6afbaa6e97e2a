"""Text from tokens that come one after the other, of which nothing said is ever taken back.

What a token says can depend on those after it: a character may be spread over several tokens, a
space may vanish before a full stop. How, is the tokenizer's affair; so it is asked. The text of the
tokens so far is decoded once more with each of some probes behind them, tokens of every kind that
the vocabulary has, and what all agree on is said.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator

from jax_encdec.tokenization import Tokenizer

_UNDECIDED = "\ufffd"  # What stands for bytes that are no character yet, or never will be.
_LONGEST_CLEANED = 4  # " n't": what cleaning up can change is short and begins with a space.
_PREFIX = re.compile(r"##|[\u2581\u0120 ]")  # Of tokens that go on with a word, or begin one.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SUFFIX = re.compile(r"@@|</w>$")


class TextStream:
    """What is certain of a text whose tokens are still coming."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._probes = probes(tokenizer)
        self._ids: list[int] = []
        self._said = 0

    def push(self, ids: Iterable[int]) -> str:
        """Take the next tokens; return the text that is certain now and was not before."""
        new = [int(i) for i in ids if i < self.tokenizer.vocab_size]
        if not new:
            return ""
        self._ids += new
        decode = self.tokenizer.decode
        text = decode(self._ids)
        guesses = [decode([*self._ids, probe]) for probe in self._probes]
        certain = _agreed([text, *guesses]).rstrip(_UNDECIDED)
        if self.tokenizer.config.get("clean_up_tokenization_spaces"):
            space = text.find(" ", max(0, len(text) - _LONGEST_CLEANED))
            certain = certain if space < 0 else certain[:space]
        return self._say(certain)

    def end(self) -> str:
        """The rest of the text, once there are no more tokens."""
        return self._say(self.tokenizer.decode(self._ids))

    def _say(self, text: str) -> str:
        piece = text[self._said :]
        self._said = max(self._said, len(text))
        return piece


def pieces(tokenizer: Tokenizer, chunks: Iterable[Iterable[int]]) -> Iterator[str]:
    """The text of tokens that come in chunks, piece by piece; no piece is empty."""
    stream = TextStream(tokenizer)
    for ids in chunks:
        piece = stream.push(ids)
        if piece:
            yield piece
    piece = stream.end()
    if piece:
        yield piece


def probes(tokenizer: Tokenizer) -> list[int]:
    """Tokens of every kind there is in a vocabulary, as far as their neighbours' text goes."""
    found: dict[tuple, tuple[int, int]] = {}
    for token, number in tokenizer.backend.get_vocab(with_added_tokens=False).items():
        if _BYTE.fullmatch(token):
            kind: tuple = ("byte",)
        else:
            prefix = _PREFIX.match(token)
            rest = token[prefix.end() if prefix else 0 :]
            shape = unicodedata.category(rest[0])[0] if rest else ""
            # Full stops and apostrophes pull at the words before them, each in its own way.
            mark = rest if shape == "P" and rest.isascii() and len(rest) < 3 else ""
            kind = (prefix and prefix[0], shape, mark, bool(_SUFFIX.search(token)))
        least, most = found.get(kind, (number, number))
        # Of bytes the last, which is never part of a character.
        found[kind] = min(least, number), max(most, number)
    return sorted({number for pair in found.values() for number in pair})


def _agreed(texts: list[str]) -> str:
    """The longest beginning that all have: that of the first and the last in the dictionary."""
    first, last = min(texts), max(texts)
    for i, (one, other) in enumerate(zip(first, last, strict=False)):
        if one != other:
            return first[:i]
    return first
