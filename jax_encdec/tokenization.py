"""Text <-> padded integer arrays, for a model's source side and its target side.

`Tokenizer` is a `tokenizers.Tokenizer` with the names of its special tokens and the files it came
from; `TokenizerPair` is one for the source and one for the target, which may be the same. Arrays
are padded to a rung of `LADDER`, so that a jitted model meets few different lengths.

B batch, S length.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from . import hub
from .errors import CheckpointError, InputError
from .tokenizer_files import FILES, SPECIAL_TOKENS, read_tokenizer

# Powers of two and, from 64 on, their halves in between: at most a third of a row is padding, and
# a program is compiled for about two lengths per doubling.
LADDER = (16, 32, *(rung for k in range(6, 20) for rung in (2**k, 2**k + 2 ** (k - 1))))

# Larger than any model: how published files spell "no limit".
_NO_LIMIT = 10**9

_CLEAN_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def bucket_length(n: int, ladder: Sequence[int] = LADDER, limit: int | None = None) -> int:
    """Return the smallest rung of the ascending `ladder` that holds `n` tokens, at most `limit`.

    Raises:
        InputError: `n` is beyond `limit` or beyond the last rung.
    """
    if limit is not None and n > limit:
        raise InputError(f"{n} tokens do not fit into the limit of {limit}")
    for rung in ladder:
        if rung >= n:
            return rung if limit is None else min(rung, limit)
    if limit is not None:
        return limit
    raise InputError(f"{n} tokens are beyond the last bucket, {ladder[-1] if ladder else None}")


class Tokenizer:
    """Text to token ids and back, exactly as the tokenizer was published.

    Attributes:
        backend: The `tokenizers.Tokenizer` that does the work; it neither pads nor truncates.
        config: The settings, spelled as in tokenizer_config.json; `pad_token` etc. are strings.
        files: Original files that `save` carries along, by name.
        vocab_size: Highest id + 1, added tokens included: the rows an embedding needs.
        model_max_length: The longest input the model takes, in tokens, or None if unknown.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ):
        """Wrap `backend`; `config` must name its special tokens, e.g. `{"pad_token": "[PAD]"}`.

        Raises:
            InputError: A special token named in `config` is not in the vocabulary, or its
                `model_max_length` is no number.
        """
        if backend.padding or backend.truncation:  # theirs to keep, ours to be without
            backend = tokenizers.Tokenizer.from_str(backend.to_str())
            backend.no_padding()
            backend.no_truncation()
        self.backend = backend
        self.config = dict(config or {})
        self.files = dict(files or {})
        for name in SPECIAL_TOKENS:
            token = self.config.get(name)
            if token is None:
                continue
            if not isinstance(token, str) or backend.token_to_id(token) is None:
                raise InputError(f"the {name} {token!r} is not in the tokenizer's vocabulary")
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        limit = self.config.get("model_max_length", self.config.get("max_len"))
        if limit is not None and not isinstance(limit, int | float):
            raise InputError(f"the tokenizer's model_max_length must be a number, got {limit!r}")
        self.model_max_length = int(limit) if limit and limit < _NO_LIMIT else None

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        subfolder: str | None = None,
        *,
        role: str = "encoder",
        revision: str | None = None,
        token: hub.Token = None,
        cache_dir: Path | str | None = None,
        local_files_only: bool = False,
    ) -> Tokenizer:
        """Read the tokenizer in `folder` (or a hub repository), or in `subfolder` of it.

        `tokenizer.json` is preferred; without it BERT, GPT-2 and RoBERTa/BART tokenizers are
        rebuilt from `vocab.txt` or `vocab.json` and `merges.txt`. `role` ("encoder" or "decoder")
        says which half of an encoder-decoder's `config.json` names the kind of tokenizer. The
        other arguments are as in `EncoderDecoderModel.from_pretrained`.

        Raises:
            CheckpointError: The folder, its tokenizer, or part of it is missing or damaged.
        """
        place = hub.resolve(
            folder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            weights=False,
        )
        path = (place if place.is_dir() else place.parent) / (subfolder or "")
        if not path.is_dir():
            raise CheckpointError(f"no folder {path} to read a tokenizer from")
        return cls(*read_tokenizer(path, role=role))

    def save(self, folder: Path | str) -> None:
        """Write the tokenizer into `folder`, for `from_pretrained` here and for AutoTokenizer.

        Original files are written byte for byte. `tokenizer.json` is made where there was none or
        where other files overruled it, `tokenizer_config.json` where it named no `tokenizer_class`.
        Tokenizer files of an earlier save that are not part of this tokenizer are removed.

        Raises:
            InputError: `folder` is a file.
        """
        path = Path(folder)
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; a tokenizer is saved into a folder")
        path.mkdir(parents=True, exist_ok=True)
        files = dict(self.files)
        files.setdefault("tokenizer.json", self.backend.to_str(pretty=True).encode())
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.config}
        config.setdefault("clean_up_tokenization_spaces", False)
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        files.setdefault("tokenizer_config.json", text.encode())
        unfinished = {name: path / f".{name}.{os.getpid()}" for name in files}
        try:
            for name, data in files.items():
                unfinished[name].write_bytes(data)
            _remove_tokenizer(path, keep=files)
            for name in files:
                os.replace(unfinished[name], path / name)
        finally:
            for name in files:
                unfinished[name].unlink(missing_ok=True)

    def encode(
        self,
        texts: Sequence[str],
        *,
        max_length: int | None = None,
        truncation: bool = False,
        add_special_tokens: bool = True,
        allow_empty: bool = False,
    ) -> list[list[int]]:
        """Return the token ids of each text, special tokens included.

        Args:
            texts: A list or tuple of str.
            max_length: Most tokens per text, special tokens included; None takes the model's limit.
            truncation: Cut longer texts (at the end, unless the tokenizer's `truncation_side` says
                "left"); without it they are refused.
            add_special_tokens: Put the tokenizer's special tokens ([CLS], </s>, ...) around a text.
            allow_empty: Let through texts that hold no token of their own.

        Raises:
            InputError: A text is no str, empty, or too long; the message names its index.
        """
        texts = _checked_texts(texts, allow_empty)
        limit = self._limit(max_length)
        if truncation and limit is None:
            raise InputError("truncation=True needs max_length: this tokenizer states no limit")
        around = self.backend.num_special_tokens_to_add(False) if add_special_tokens else 0
        if limit is not None and limit <= around:
            raise InputError(
                f"max_length={limit} leaves no room for text: {around} special tokens are added"
            )
        try:
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        except BaseException as error:
            # A damaged table inside makes the library panic, which is no Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise CheckpointError(f"the tokenizer is damaged and gave up: {error}") from None
        rows = [encoding.ids for encoding in encodings]
        for index, ids in enumerate(rows):
            if len(ids) <= around and not allow_empty:
                raise InputError(
                    f"text {index} ({texts[index][:40]!r}) holds nothing this tokenizer keeps; "
                    "leave it out or pass allow_empty=True"
                )
            if limit is not None and len(ids) > limit:
                if not truncation:
                    raise InputError(
                        f"text {index} has {len(ids)} tokens, the limit is {limit}; "
                        "shorten it or pass truncation=True"
                    )
                rows[index] = self._encode_truncated(texts[index], limit - around, bool(around))
        return rows

    def _encode_truncated(self, text: str, room: int, add_special_tokens: bool) -> list[int]:
        # Cuts one encoding; the backend's own truncation is state that all callers would share.
        encoding = self.backend.encode(text, add_special_tokens=False)
        encoding.truncate(room, direction=self.config.get("truncation_side", "right"))
        return self.backend.post_process(encoding, None, add_special_tokens).ids

    def batch(
        self,
        texts: Sequence[str],
        *,
        max_length: int | None = None,
        truncation: bool = False,
        add_special_tokens: bool = True,
        allow_empty: bool = False,
        buckets: Sequence[int] | None = LADDER,
        pad_token_id: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return `(input_ids, attention_mask)`, both `[B, S]` int32, padded on the right.

        S is the longest row rounded up to a rung of `buckets`, at most the limit; with
        `buckets=None`, or for an empty batch, it is the longest row itself. `pad_token_id` is
        needed only for tokenizers without a pad token, as GPT-2's. The rest is as in `encode`.
        """
        rows = self.encode(
            texts,
            max_length=max_length,
            truncation=truncation,
            add_special_tokens=add_special_tokens,
            allow_empty=allow_empty,
        )
        length = max(map(len, rows), default=0)
        if buckets is not None and rows:
            length = bucket_length(length, buckets, self._limit(max_length))
        pad = self.pad_token_id if pad_token_id is None else pad_token_id
        if pad is None:
            if any(len(row) < length for row in rows):
                raise InputError(
                    "this tokenizer has no pad token; pass pad_token_id, e.g. the eos_token_id "
                    f"{self.eos_token_id} (padding is masked out, so any valid id will do)"
                )
            pad = 0
        input_ids = np.full((len(rows), length), pad, np.int32)
        attention_mask = np.zeros((len(rows), length), np.int32)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = row
            attention_mask[index, : len(row)] = 1
        return input_ids, attention_mask

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`: one row of integers, `[S]`, a list or any array.

        Raises:
            InputError: An id is no integer of the vocabulary (-100 in labels, for instance).
        """
        row = np.asarray(ids)
        if row.ndim != 1 or (row.size and not np.issubdtype(row.dtype, np.integer)):
            raise InputError(
                f"decode takes one row of integer ids, got shape {row.shape} of {row.dtype}; "
                "decode_batch takes several rows"
            )
        if row.size and (row.min() < 0 or row.max() >= self.vocab_size):
            wrong = row.min() if row.min() < 0 else row.max()
            raise InputError(
                f"id {wrong} is not in the vocabulary (0 to {self.vocab_size - 1})"
                + ("; drop the masked positions of labels before decoding" if wrong == -100 else "")
            )
        text = self.backend.decode(row.tolist(), skip_special_tokens=skip_special_tokens)
        # Byte-level text has its own spaces and is left alone, as in Transformers 5.
        is_bpe = isinstance(self.backend.model, tokenizers.models.BPE)
        if self.config.get("clean_up_tokenization_spaces", False) and not is_bpe:
            for piece in _CLEAN_UP:
                text = text.replace(piece, piece.strip(" "))
        return text

    def decode_batch(self, ids: Any, skip_special_tokens: bool = True) -> list[str]:
        """Return the text of each row of `ids`: `[B, S]`, or a list of rows of any length."""
        return [self.decode(row, skip_special_tokens) for row in ids]

    def _limit(self, max_length: int | None) -> int | None:
        return self.model_max_length if max_length is None else max_length

    def _special_id(self, name: str) -> int | None:
        token = self.config.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token, or None."""
        return self._special_id("pad_token")

    @property
    def bos_token_id(self) -> int | None:
        """Id of the beginning-of-sequence token, or None (BERT has a `cls_token_id` instead)."""
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end-of-sequence token, or None (BERT has a `sep_token_id` instead)."""
        return self._special_id("eos_token")

    @property
    def cls_token_id(self) -> int | None:
        """Id of the token that opens a text in BERT-like models, or None."""
        return self._special_id("cls_token")

    @property
    def sep_token_id(self) -> int | None:
        """Id of the token that closes a text in BERT-like models, or None."""
        return self._special_id("sep_token")

    @property
    def unk_token_id(self) -> int | None:
        """Id that stands for what the vocabulary cannot spell, or None."""
        return self._special_id("unk_token")

    @property
    def mask_token_id(self) -> int | None:
        """Id of the token that masked language models fill in, or None."""
        return self._special_id("mask_token")


@dataclass(frozen=True, kw_only=True)
class TokenizerPair:
    """The tokenizers of an encoder-decoder's two sides; the same object where they are one.

    In a folder the source's files lie at the top (or in `encoder_tokenizer/`) and the target's, if
    it has its own, in `decoder_tokenizer/`.
    """

    source: Tokenizer
    target: Tokenizer

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        revision: str | None = None,
        token: hub.Token = None,
        cache_dir: Path | str | None = None,
        local_files_only: bool = False,
    ) -> TokenizerPair:
        """Read both tokenizers of `folder`, or of a hub repository.

        Arguments and errors are those of `Tokenizer.from_pretrained`.
        """
        place = hub.resolve(
            folder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            weights=False,
        )
        path = place if place.is_dir() else place.parent
        own = (path / "encoder_tokenizer").is_dir()
        source = Tokenizer.from_pretrained(path, "encoder_tokenizer" if own else None)
        if not (path / "decoder_tokenizer").is_dir():
            return cls(source=source, target=source)
        target = Tokenizer.from_pretrained(path, "decoder_tokenizer", role="decoder")
        return cls(source=source, target=target)

    def save(self, folder: Path | str) -> None:
        """Write both tokenizers so that `from_pretrained` reads them back."""
        path = Path(folder)
        self.source.save(path)
        if self.target is not self.source:
            self.target.save(path / "decoder_tokenizer")
        else:
            _remove_tokenizer(path / "decoder_tokenizer")
        _remove_tokenizer(path / "encoder_tokenizer")


def _checked_texts(texts: Sequence[str], allow_empty: bool) -> list[str]:
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise InputError(f"texts must be a list of str, got {type(texts).__name__}")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"text {index} must be a str, got {type(text).__name__}")
        if not (allow_empty or text.strip()):
            raise InputError(f"text {index} is empty; leave it out or pass allow_empty=True")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"text {index} is not valid Unicode: it holds a lone surrogate"
            ) from None
    return list(texts)


def _remove_tokenizer(folder: Path, keep: Mapping[str, Any] | None = None) -> None:
    """Remove a tokenizer's files, except those to `keep`, and a folder left empty by that."""
    if not folder.is_dir():
        return
    for name in FILES:
        if name not in (keep or {}):
            (folder / name).unlink(missing_ok=True)
    if keep is None and not any(folder.iterdir()):
        folder.rmdir()
