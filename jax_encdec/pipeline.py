"""Texts in, texts out: a model, its parameters and its tokenizers under one call.

    pipe = Text2TextPipeline.from_pretrained("checkpoint-folder-or-hub-id")
    pipe(["a text", "another"], num_beams=4, max_new_tokens=64)

Texts are tokenized, sorted by length, cut into batches of few different shapes, so that little is
padded and little compiled, generated from, decoded, and put back in order. What comes out for a
text does not depend on which others it was batched with, sampling included.

Axis letters: B batch, S source length, R returned sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_encdec import hub
from jax_encdec.decoding.arguments import config_of, random_key
from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.encoder_decoder import EncoderDecoderModel
from jax_encdec.errors import InputError, nearest
from jax_encdec.file_generation import (
    Batch,
    FileResult,
    bar,
    batches,
    fitting_size,
    opened,
    run_batches,
    run_settings,
    write_predictions,
)
from jax_encdec.prediction_files import Printed, check_output
from jax_encdec.text_files import Record, TextFile
from jax_encdec.text_streaming import pieces
from jax_encdec.tokenization import Tokenizer, TokenizerPair, bucket_length

DEFAULT_BATCH_SIZE = 16
_UNLIMITED = 2**31 - 1
_ARGUMENTS = (
    "batch_size",
    "truncation",
    "progress",
    "key",
    "generation_config",
    "restart",
    "chunk",
)


class TextError(InputError):
    """One text of a list that cannot be used: `index` says which, `reason` why.

    Of a text of a file, `where` is the file and the line.
    """

    def __init__(self, index: int, reason: str, where: str | None = None):
        super().__init__(f"{where or f'text {index}'} {reason}")
        self.index = index
        self.reason = reason


class Text2TextPipeline:
    """Generate a text from each text.

    Attributes:
        model: static.
        params: its parameters, placed where the computation is to happen; or what `model.prepare`
            made of them.
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
        mesh: Mesh | str | Mapping[str, int] | None = None,
        rows: int | None = None,
        precision: str | None = None,
        revision: str | None = None,
        token: hub.Token = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Text2TextPipeline:
        """Load a published pair with its tokenizers.

        Args:
            path: a folder, a weight file with its configuration beside it, or a hub repository id.
            dtype: of parameters and computation; None: float32; "auto": as the file has it.
            mesh: devices to generate over, of `make_mesh` or what it takes: "replica=2,tensor=4".
                Each reads its own part of the parameters. Of several processes, all make the same
                calls; each gets the results, and the first one writes the files. None: one device.
            rows, precision: as in `EncoderDecoderModel.from_pretrained`: parameters are read into
                the layout of inference, for batches times beams of about so many rows.
            revision: branch, tag or commit of a hub repository.
            token: for a repository that asks for one; None: the stored one, if any; False: none.
            cache_dir: where downloads are kept.
            local_files_only: take what the cache holds and ask nobody.

        Raises:
            CheckpointError, ConfigError: no such model, a damaged one, or one without a tokenizer;
                a mesh that does not fit the devices.
            InputError: an unknown precision, or a mesh together with rows or precision.
        """
        if mesh is not None:
            if rows is not None or precision is not None:
                raise InputError("rows and precision are for one device; leave them out, or mesh")
            from jax_encdec.decoding.sharded import GENERATION_RULES
            from jax_encdec.training.loading import load_sharded
            from jax_encdec.training.sharding import make_mesh

            mesh = mesh if isinstance(mesh, Mesh) else make_mesh(mesh)
            load = partial(load_sharded, mesh=mesh, rules=GENERATION_RULES)
        else:
            load = partial(EncoderDecoderModel.from_pretrained, rows=rows, precision=precision)
        place = hub.resolve(
            path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        tokenizers = TokenizerPair.from_pretrained(place)
        model, params = load(place, dtype=dtype)
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
        settings, key = self._settings(generation_config, options, batch_size, key)
        rows = self.encode([texts] if isinstance(texts, str) else texts, truncation=truncation)
        # The longest first: what does not fit into memory fails at once.
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        cut = batches(order, fitting_size(len(rows), batch_size))
        made = (Batch(numbers, [rows[i] for i in numbers]) for numbers in cut)
        results: list[Any] = [None] * len(rows)
        with bar(len(rows), 0, progress) as shown:
            for _, found, _ in run_batches(self, made, settings, key):
                for i, made_of_it in found.items():
                    results[i] = made_of_it if len(made_of_it) > 1 else made_of_it[0]
                shown.update(len(found))
        return results[0] if single else results

    def stream(
        self,
        text: str,
        *,
        chunk: int = 4,
        truncation: bool = False,
        key: jax.Array | None = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> Iterator[str]:
        """Generate from one text, and yield the result piece by piece, as soon as it is certain.

        The pieces together are what `__call__` returns. With beams, a piece is certain when all
        beams that can still win agree on it.

        Args:
            text: the source.
            chunk: decoding steps between two pieces; fewer bring them sooner and cost a little.
            others: as in `__call__`.

        Raises:
            TextError, InputError: as in `__call__`; also for several returned sequences.
        """
        if not isinstance(text, str):
            raise InputError(f"stream takes one text, a str; got {type(text).__name__}")
        settings, key = self._settings(generation_config, options, 1, key)
        if (settings.num_return_sequences or 1) > 1:
            raise InputError(
                f"streaming yields one text; got num_return_sequences="
                f"{settings.num_return_sequences}"
            )
        inputs = self._inputs(self.encode([text], truncation=truncation), [0], settings, key)
        made = self.model.stream(self.params, chunk=chunk, **inputs)
        return pieces(self.tokenizers.target, (piece.tokens[0] for piece in made))

    def generate_file(
        self,
        input: str | Path,
        output: str | Path,
        *,
        source_column: str | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        truncation: bool = False,
        restart: bool = False,
        progress: bool = False,
        key: jax.Array | None = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> FileResult:
        """Generate from every text of a file, of any size, into another, in the same order.

        The input is streamed and never held. Until all is done, what there is stands in
        `OUTPUT.partial`, with a journal beside it; whenever the process dies, the same call goes on
        where it was, and what comes out in the end is the same.

        Args:
            input: lines of text, .jsonl, .csv or .tsv.
            output: .jsonl, .csv, .tsv or .txt.
            source_column: field of the input's objects or rows; None: "source", or else "text".
            batch_size: texts generated from at a time.
            truncation: cut sources that are too long; without it the first one ends the run, and
                the same call with truncation=True goes on.
            restart: begin anew where an earlier call did not finish.
            progress: show a bar on standard error: texts and tokens per second, time left.
            key, generation_config, **options: as in `__call__`; text i is the i-th of the file.

        Raises:
            TextError: a text is too long, or not in the model's vocabulary.
            InputError: an option that cannot be used; a malformed line, before anything is run; an
                unfinished output that was begun with another model, options or input.
        """
        source = TextFile(input, source_column)
        check_output(output)
        return self.generate_records(
            source,
            output,
            batch_size=batch_size,
            truncation=truncation,
            restart=restart,
            total=sum(1 for _ in source),  # And all lines are well-formed.
            progress=progress,
            key=key,
            generation_config=generation_config,
            **options,
        )

    def generate_records(
        self,
        source: Iterable[Record],
        output: str | Path | Printed,
        *,
        batch_size: int = DEFAULT_BATCH_SIZE,
        truncation: bool = False,
        restart: bool = False,
        total: int | None = None,
        progress: bool = False,
        key: jax.Array | None = None,
        generation_config: GenerationConfig | None = None,
        **options: Any,
    ) -> FileResult:
        """As `generate_file`, from texts of any origin, or to a stream.

        Args:
            source: texts, and where each stands; the same at every call.
            output: a file, or `Printed(stream)`, which keeps nothing.
            total: the number of texts, for the bar.
            others: as in `generate_file`.
        """
        settings, key = self._settings(generation_config, options, batch_size, key)
        printed = isinstance(output, Printed)
        begun_with = {} if printed else run_settings(self, settings, batch_size, key)
        with opened(self, output, begun_with, restart) as sink:
            return write_predictions(
                self,
                source,
                sink,
                settings=settings,
                batch_size=batch_size,
                truncation=truncation,
                key=key,
                total=total,
                progress=progress,
            )

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

    def encode_records(
        self, records: Sequence[Record], *, truncation: bool = False
    ) -> list[list[int]]:
        """As `encode`; what is wrong with a text is said with where it stands."""
        try:
            return self.encode([record.text for record in records], truncation=truncation)
        except TextError as error:
            where = records[error.index].where
            raise TextError(error.index, error.reason, where) from None

    def run(
        self,
        rows: Sequence[Sequence[int]],
        numbers: Sequence[int],
        settings: GenerationConfig,
        key: jax.Array | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Generate from token rows, the `numbers`-th of the whole input.

        Returns:
            Sequences `[B * R, length]` and their lengths `[B * R]`, on the host.
        """
        out = self.model.generate(self.params, **self._inputs(rows, numbers, settings, key))
        return np.asarray(out.sequences), np.asarray(out.lengths)

    def _inputs(
        self,
        rows: Sequence[Sequence[int]],
        numbers: Sequence[int],
        settings: GenerationConfig,
        key: jax.Array | None,
    ) -> dict[str, Any]:
        """The model's arguments, padded to a length of the ladder."""
        trunk = self.model.config.encoder_trunk
        position = trunk.embedding.position
        # Hidden, so that any id would do; but some position tables count what is no pad.
        pad = position.pad_token_id if position and position.pad_token_id else 0
        length = bucket_length(max(map(len, rows)), limit=trunk.max_length)
        input_ids = np.full((len(rows), length), pad, np.int32)  # [B, S]
        mask = np.zeros_like(input_ids)
        for b, ids in enumerate(rows):
            input_ids[b, : len(ids)] = ids
            mask[b, : len(ids)] = 1
        if key is not None:
            places = np.asarray(numbers, np.uint32)
            key = jax.vmap(jax.random.fold_in, (None, 0))(key, places)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask, "key": key}
        if settings.stop_strings:  # Found in tokens by how they are spelled.
            inputs["tokenizer"] = self.tokenizers.target
        return inputs | {"generation_config": settings}

    def decode(self, ids: np.ndarray) -> str:
        """Text of generated ids; rows of the vocabulary no token has (padding) say nothing."""
        return decode(self.tokenizers.target, ids)

    def _settings(
        self,
        config: GenerationConfig | None,
        options: dict[str, Any],
        batch_size: Any,
        key: jax.Array | None,
    ) -> tuple[GenerationConfig, jax.Array | None]:
        """The options, complete and checked as far as they can be here; and the key if needed."""
        for name in options:
            if name in ("logits_processors", "prefix_allowed_tokens_fn"):
                raise InputError(f"{name} is an argument of model.generate, not of the pipeline")
            hint = nearest(name, _ARGUMENTS)
            if name not in GenerationConfig.__dataclass_fields__ and hint:
                raise InputError(f"the pipeline has no argument {name!r}{hint}")
        settings = config_of(self.model, config).replace(**options)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size must be a positive integer; got {batch_size!r}")
        if settings.do_sample and key is None:
            raise InputError("do_sample=True needs a random key: pass key=jax.random.key(seed)")
        return settings, random_key(key) if settings.do_sample else None


def decode(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    """Text of generated ids; rows of the vocabulary that no token has (padding) say nothing."""
    return tokenizer.decode(ids[ids < tokenizer.vocab_size])
