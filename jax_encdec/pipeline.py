"""Texts in, texts out: a model, its parameters and its tokenizers under one call.

    pipe = Text2TextPipeline.from_pretrained("checkpoint-folder-or-hub-id")
    pipe(["a text", "another"], num_beams=4, max_new_tokens=64)

Texts are tokenized, sorted by length, cut into batches of few different shapes, so that little is
padded and little compiled, generated from, decoded, and put back in order. What comes out for a
text does not depend on which others it was batched with, sampling included.

Axis letters: B batch, S source length, R returned sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_encdec import hub
from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.encoder_decoder import EncoderDecoderModel
from jax_encdec.errors import InputError, nearest
from jax_encdec.tokenization import Tokenizer, TokenizerPair

DEFAULT_BATCH_SIZE = 16
_UNLIMITED = 2**31 - 1
_ARGUMENTS = ("batch_size", "truncation", "progress", "key", "generation_config")


class TextError(InputError):
    """One text of a list that cannot be used: `index` says which, `reason` why."""

    def __init__(self, index: int, reason: str):
        super().__init__(f"text {index} {reason}")
        self.index = index
        self.reason = reason


class Text2TextPipeline:
    """Generate a text from each text.

    Attributes:
        model: static.
        params: its parameters, placed where the computation is to happen.
        tokenizers: of the source and the target side.
    """

    def __init__(self, model: EncoderDecoderModel, params: Any, tokenizers: TokenizerPair):
        self.model = model
        self.params = params
        self.tokenizers = tokenizers

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: Any = None,
        revision: str | None = None,
        token: hub.Token = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Text2TextPipeline:
        """Load a published pair with its tokenizers.

        Args:
            path: a folder, a weight file with its configuration beside it, or a hub repository id.
            dtype: of parameters and computation; None: float32; "auto": as the file has it.
            revision: branch, tag or commit of a hub repository.
            token: for a repository that asks for one; None: the stored one, if any; False: none.
            cache_dir: where downloads are kept.
            local_files_only: take what the cache holds and ask nobody.

        Raises:
            CheckpointError, ConfigError: no such model, a damaged one, or one without a tokenizer.
        """
        place = hub.resolve(
            path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        tokenizers = TokenizerPair.from_pretrained(place)
        model, params = EncoderDecoderModel.from_pretrained(place, dtype=dtype)
        return cls(model, params, tokenizers)

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        truncation: bool = False,
        progress: bool = False,
        key: jax.Array | None = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> Any:
        """Generate from one text or several.

        Args:
            texts: a str, or a list of them.
            batch_size: texts generated from at a time.
            truncation: cut sources that are longer than the model or its tokenizer takes; without
                it they are refused.
            progress: show a bar on standard error.
            key: a random key, needed for `do_sample=True`; text i draws from `fold_in(key, i)`,
                whatever the batches.
            generation_config: instead of the model's own.
            **options: fields of `GenerationConfig`, over the configuration's.

        Returns:
            A str for a str, a list of str for a list, special tokens left out. With
            `num_return_sequences` above 1, a list of str, best first, in the place of each str.

        Raises:
            TextError: a text is empty, too long, or not in the model's vocabulary.
            InputError: an option that cannot be used.
        """
        single = isinstance(texts, str)
        settings = self._settings(generation_config, options)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size must be a positive integer; got {batch_size!r}")
        if settings.do_sample and key is None:
            raise InputError("do_sample=True needs a random key: pass key=jax.random.key(seed)")
        if not settings.do_sample:
            key = None
        rows = self.encode([texts] if isinstance(texts, str) else texts, truncation=truncation)
        results: list[Any] = [None] * len(rows)
        # The longest first: what does not fit into memory fails at once.
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        with _bar(len(rows), progress) as bar:
            for batch in _batches(order, batch_size):
                found = self._generate([rows[i] for i in batch], batch, settings, key)
                results_of = dict(zip(batch, found, strict=True))  # Dummy rows repeat a real one.
                for i, made in results_of.items():
                    results[i] = made
                bar.update(len(results_of))
        return results[0] if single else results

    def encode(self, texts: Sequence[str], *, truncation: bool = False) -> list[list[int]]:
        """Tokenize sources and check that the model can take them; arguments as in `__call__`."""
        tokenizer = self.tokenizers.source
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise InputError(f"texts must be a str or a list of them; got {type(texts).__name__}")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise TextError(index, f"must be a str; got {type(text).__name__}")
            if not text.strip():
                raise TextError(index, "is empty; leave it out")
        rows = tokenizer.encode(texts, max_length=_UNLIMITED, allow_empty=True)
        limit = self.max_source_length
        vocabulary = self.model.config.encoder_trunk.embedding.vocab
        around = tokenizer.backend.num_special_tokens_to_add(False)
        for index, ids in enumerate(rows):
            if len(ids) <= around:
                raise TextError(index, f"({texts[index][:40]!r}) holds nothing the tokenizer keeps")
            if max(ids) >= vocabulary:
                token = tokenizer.backend.id_to_token(max(ids))
                raise TextError(
                    index,
                    f"has the token {token!r} of id {max(ids)}, outside the encoder's vocabulary "
                    f"0..{vocabulary - 1}; this tokenizer belongs to another model",
                )
            if limit is not None and len(ids) > limit:
                if not truncation:
                    raise TextError(
                        index,
                        f"has {len(ids)} tokens, the limit is {limit}; "
                        f"shorten it or pass truncation=True",
                    )
                rows[index] = tokenizer.encode([texts[index]], max_length=limit, truncation=True)[0]
        return rows

    @property
    def max_source_length(self) -> int | None:
        """Most tokens of a source, special tokens included; None where nothing limits it."""
        limits = (
            self.model.config.encoder_trunk.max_length,
            self.tokenizers.source.model_max_length,
        )
        return min((limit for limit in limits if limit is not None), default=None)

    def _settings(
        self, config: GenerationConfig | None, options: dict[str, Any]
    ) -> GenerationConfig:
        for name in options:
            hint = nearest(name, _ARGUMENTS)
            if name not in GenerationConfig.__dataclass_fields__ and hint:
                raise InputError(f"the pipeline has no argument {name!r}{hint}")
        return (config or self.model.generation_config).replace(**options)

    def _generate(
        self,
        rows: Sequence[Sequence[int]],
        numbers: Sequence[int],
        settings: GenerationConfig,
        key: jax.Array | None,
    ) -> list[Any]:
        """Generate from token rows, the `numbers`-th of the whole input; one result per row."""
        position = self.model.config.encoder_trunk.embedding.position
        # Hidden, so that any id would do; but some position tables count what is no pad.
        pad = position.pad_token_id if position and position.pad_token_id else 0
        longest = max(map(len, rows))
        input_ids = np.full((len(rows), longest), pad, np.int32)  # [B, S]
        mask = np.zeros_like(input_ids)
        for b, ids in enumerate(rows):
            input_ids[b, : len(ids)] = ids
            mask[b, : len(ids)] = 1
        if key is not None:
            key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.asarray(numbers, jnp.uint32))
        out = self.model.generate(
            self.params, input_ids, attention_mask=mask, generation_config=settings, key=key
        )
        sequences, lengths = np.asarray(out.sequences), np.asarray(out.lengths)
        texts = [
            decode(self.tokenizers.target, ids[:length])
            for ids, length in zip(sequences, lengths, strict=True)
        ]
        returned = len(texts) // len(rows)
        if returned == 1:
            return texts
        return [texts[b * returned : (b + 1) * returned] for b in range(len(rows))]


def decode(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Text of generated ids; rows of the vocabulary that no token has (padding) say nothing."""
    return tokenizer.decode(ids[ids < tokenizer.vocab_size])


def _batches(order: Sequence[int], size: int) -> Iterator[list[int]]:
    """Cut `order` into batches of one size, the last filled up by repeating its last member.

    A few texts alone make a batch of a power of two, not a whole one.
    """
    if len(order) < size:
        size = min(size, 1 << (len(order) - 1).bit_length()) if order else 1
    for start in range(0, len(order), size):
        batch = list(order[start : start + size])
        yield batch + batch[-1:] * (size - len(batch))


def _bar(total: int, shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, unit="text", disable=not shown)
