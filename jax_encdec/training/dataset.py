"""Pairs of texts, tokenized once: ragged arrays of ids, kept in a folder and mapped into memory.

The folder is named by everything the ids depend on: the bytes of the files, the tokenizers, the
options; see `array_cache`. Texts are kept beside the ids, for evaluation and for messages.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import __version__ as tokenizers_version

from jax_encdec.errors import ConfigError, InputError
from jax_encdec.tokenization import Tokenizer, TokenizerPair
from jax_encdec.training.array_cache import Writer, cached, digest
from jax_encdec.training.data_config import DataConfig
from jax_encdec.training.encoding import Chunk, Ids, Side, encode_all, make_side
from jax_encdec.training.record import BadRow, Record, Skipped, check_texts, pick_columns
from jax_encdec.training.record_files import Source, load_dataset
from jax_encdec.training.records import find_sources, usable

if TYPE_CHECKING:
    from jax_encdec.encoder_decoder import EncoderDecoderModel

_VERSION = 1
"""Of what the cache holds; another one is another folder."""
_ARRAYS = {
    "source_ids": np.int32,
    "target_ids": np.int32,
    "lengths": np.int32,  # [pairs, 2]: tokens of source and target
    "source_text": np.uint8,
    "target_text": np.uint8,
    "places": np.int64,  # [pairs, 4]: bytes of source and target, number of the file, line
}


class Ragged:
    """Rows of different lengths, one after the other.

    Attributes:
        values: `[sum of lengths]`.
        lengths: `[rows]`.
        offsets: `[rows + 1]` int64, where each row begins.
    """

    def __init__(self, values: np.ndarray, lengths: np.ndarray):
        self.values = np.asarray(values)  # a plain view of a mapped file: indexing is faster
        self.lengths = lengths
        self.offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]


class TokenizedData:
    """A split, ready for batches.

    Attributes:
        source: ids of the sources, special tokens included.
        target: ids of the targets: labels, with the closing token and without a start token.
        skipped: the rows that were left out.
        cut: how many sources and targets were longer than their limit.
        fingerprint: of the ids; equal for equal data, however it was stored.
        limits: lengths that sources and targets were cut to; None: they were not.
        positions: lengths that the model has positions for; None: any, or not known.
        pad_id: what sources are padded with.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray],
        manifest: Mapping[str, Any],
        *,
        files: Sequence[str],
        limits: tuple[int | None, int | None],
        positions: tuple[int | None, int | None],
        pad_id: int,
    ):
        lengths = arrays["lengths"].reshape(-1, 2)
        self.source = Ragged(arrays["source_ids"], np.ascontiguousarray(lengths[:, 0]))
        self.target = Ragged(arrays["target_ids"], np.ascontiguousarray(lengths[:, 1]))
        self.skipped = Skipped(**manifest["skipped"])
        self.cut: tuple[int, int] = tuple(manifest["cut"])
        self.fingerprint: str = manifest["fingerprint"]
        self.limits = limits
        self.positions = positions
        self.pad_id = pad_id
        self._files = list(files)
        self._arrays = arrays
        self._places = arrays["places"].reshape(-1, 4)

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    def _texts(self) -> tuple[Ragged, Ragged]:
        return (
            Ragged(self._arrays["source_text"], self._places[:, 0]),
            Ragged(self._arrays["target_text"], self._places[:, 1]),
        )

    def record(self, index: int) -> Record:
        """The pair as it was read, `config.source_prefix` not included, and where it stands."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        source, target = (side[index].tobytes().decode() for side in self._texts)
        file, line = self._places[index, 2:].tolist()
        return Record(source, target, self._files[file], line)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of how the data was read, in sentences."""
        notes = [str(self.skipped)] if self.skipped else []
        for name, cut, limit in zip(("sources", "targets"), self.cut, self.limits, strict=True):
            if cut:
                notes.append(f"{cut:,} of {len(self):,} {name} are cut to {limit} tokens")
        return tuple(notes)

    def records(self, count: int | None = None) -> list[Record]:
        """The first `count` pairs; None: all."""
        count = len(self) if count is None else min(count, len(self))
        return [self.record(i) for i in range(count)]


def tokenize(
    data: Sequence[str] | Iterable[Any],
    tokenizers: TokenizerPair | Tokenizer,
    config: DataConfig,
    split: str = "train",
    *,
    model: EncoderDecoderModel | None = None,
) -> TokenizedData:
    """Read and tokenize a split, or take it from the cache.

    Args:
        data: file names as in `DataConfig.train`; or pairs: tuples of two texts, mappings with the
            configured columns, or `Record`s. Pairs are cached only where `config.cache_dir` is set.
        tokenizers: of both sides, or one for both.
        config: how to read and cut.
        split: "train", "validation" or "test".
        model: says which token starts and ends a target, and how long and how large ids may be.
            Without it the tokenizer's own tokens around a text are taken.

    Raises:
        BadRow: a row that cannot be used, with `config.bad_rows == "error"`.
        InputError: no file, no usable row, a tokenizer of another model.
        ConfigError: a limit that leaves no room or that the model does not have.
    """
    if isinstance(tokenizers, Tokenizer):
        tokenizers = TokenizerPair(source=tokenizers, target=tokenizers)
    if model is not None and config.pack:
        check_packing(model)
    given = [data] if isinstance(data, str) else list(data)
    if not given:
        raise InputError(f"no data for {split!r}: name its files in data.{split}")
    patterns = [item for item in given if isinstance(item, str)]
    if patterns and len(patterns) != len(given):
        raise InputError("data must be file names or pairs of texts, not both")
    sides = _sides(tokenizers, config, model)
    sources = find_sources(patterns, config, split)
    before = _stamps(sources)

    def rows() -> Iterator[Record | BadRow]:
        for source in sources:
            yield from source.read(config)
        if not patterns:
            yield from _given_rows(given, config)

    def write(writer: Writer) -> dict[str, Any]:
        manifest = _write(writer, sides, rows(), config, split, map(_name, sources))
        if _stamps(sources) != before:
            raise InputError(f"the files of {split!r} were changed while they were read")
        return manifest

    folder = _cache_folder(config, is_files=bool(patterns))
    if folder is None:
        writer = Writer(_ARRAYS)
        manifest = write(writer)
        arrays = writer.arrays()
    else:
        content = [_content(source) for source in sources] if patterns else _digest_items(given)
        described = [dataclasses.asdict(side) for side in sides]
        key = digest(_VERSION, tokenizers_version, content, _options(config, split), described)
        arrays, manifest = cached(folder / key, _ARRAYS, write)
    names = list(dict.fromkeys(map(_name, sources)))  # as they are now, not when it was written
    return TokenizedData(
        arrays,
        manifest,
        files=names or manifest["files"],
        limits=(sides[0].limit, sides[1].limit),
        positions=_positions(model),
        pad_id=_pad_id(tokenizers, model),
    )


# What the model asks for -------------------------------------------------------------------------


def check_packing(model: EncoderDecoderModel) -> None:
    """Refuse models that cannot keep the pairs of a row apart.

    Raises:
        ConfigError: such a model.
    """
    for side, trunk in (
        ("encoder", model.config.encoder_trunk),
        ("decoder", model.config.decoder_trunk),
    ):
        if trunk.convolves:
            raise ConfigError(
                f"data.pack: this model's {side} has a convolution, which would mix the pairs of a "
                f"row; train it with pack = false"
            )


def _sides(
    tokenizers: TokenizerPair, config: DataConfig, model: EncoderDecoderModel | None
) -> tuple[Side, Side]:
    source, target = tokenizers.source, tokenizers.target
    if model is None:
        start = target.bos_token_id if target.cls_token_id is None else target.cls_token_id
        end = target.eos_token_id if target.eos_token_id is not None else target.sep_token_id
        ends = None if end is None else (end,)
        sizes = (None, None)
    else:
        from jax_encdec.token_ids import resolve_ids

        wraps = model.config.whole and model.config.decoder.wraps_labels
        start = None if wraps else model.token_id("decoder_start_token_id")
        ends = resolve_ids("eos_token_id", model.generation_config, model.config)
        sizes = (model.config.encoder_trunk.embedding.vocab, model.config.target_vocabulary)
    positions = _positions(model)
    limits = [
        _limit(name, getattr(config, f"max_{name}_length"), buckets, positions[i], tokenizer)
        for i, (name, buckets, tokenizer) in enumerate(
            (
                ("source", config.source_buckets, source),
                ("target", config.target_buckets, target),
            )
        )
    ]
    return (
        make_side("source", source, limit=limits[0], prefix=config.source_prefix,
                  vocabulary=sizes[0]),
        make_side("target", target, limit=limits[1], vocabulary=sizes[1], drop=start, ends=ends),
    )  # fmt: skip


def _positions(model: EncoderDecoderModel | None) -> tuple[int | None, int | None]:
    if model is None:
        return None, None
    return model.config.encoder_trunk.max_length, model.config.decoder_trunk.max_length


def _limit(
    name: str,
    asked: int | None,
    buckets: tuple[int, ...] | None,
    positions: int | None,
    tokenizer: Tokenizer,
) -> int | None:
    if asked is not None and positions is not None and asked > positions:
        raise ConfigError(
            f"data.max_{name}_length = {asked}, but the model has positions for {positions}"
        )
    if asked is not None:
        return asked
    if buckets:
        return buckets[-1] if positions is None else min(buckets[-1], positions)
    known = [n for n in (positions, tokenizer.model_max_length) if n is not None]
    return min(known, default=None)


def _pad_id(tokenizers: TokenizerPair, model: EncoderDecoderModel | None) -> int:
    # Pads are hidden, so that any id would do; but some position tables count what is no pad.
    if model is not None:
        position = model.config.encoder_trunk.embedding.position
        if position is not None and position.pad_token_id is not None:
            return position.pad_token_id
    return tokenizers.source.pad_token_id or 0


# From rows to arrays -----------------------------------------------------------------------------


def _given_rows(given: Sequence[Any], config: DataConfig) -> Iterator[Record | BadRow]:
    for number, item in enumerate(given, 1):
        file, line = item[2:] if isinstance(item, Record) else ("the given pairs", number)
        if isinstance(item, Mapping):
            yield pick_columns(item, config, file, line)
        elif isinstance(item, tuple | list) and len(item) >= 2:
            yield check_texts(item[:2], ("the source", "the target"), file, line)
        else:
            yield BadRow(file, line, f"is no pair of texts: {str(item)[:40]!r}")


def _write(
    writer: Writer,
    sides: tuple[Side, Side],
    rows: Iterable[Record | BadRow],
    config: DataConfig,
    split: str,
    files: Iterable[str],
) -> dict[str, Any]:
    """Write all arrays; return the manifest."""
    skipped = Skipped()
    numbers = {name: i for i, name in enumerate(dict.fromkeys(files))}
    pairs, cut = 0, np.zeros(2, np.int64)
    records = usable(rows, config, split, skipped)
    for chunk, source, target in encode_all(sides, records, config.workers):
        kept = (source.lengths > 0) & (target.lengths > 0)
        for i in np.flatnonzero(~kept).tolist():
            side = "target" if source.lengths[i] else "source"
            _, _, file, line = chunk[i]
            bad = BadRow(file, line, f"the {side} holds nothing that the tokenizer keeps")
            skipped.take(bad, config)
        _append(writer, chunk, source, target, kept, numbers)
        pairs += int(kept.sum())
        cut += source.cut, target.cut
    if not pairs:
        raise InputError(
            f"{split!r} holds no pair that can be used" + (f"; {skipped}" if skipped else "")
        )
    digests = writer.digests()
    return {
        "fingerprint": digest(*(digests[name] for name in ("source_ids", "target_ids", "lengths"))),
        "pairs": pairs,
        "cut": cut.tolist(),
        "files": list(numbers),
        "skipped": dataclasses.asdict(skipped),
    }


def _append(
    writer: Writer,
    chunk: Chunk,
    source: Ids,
    target: Ids,
    kept: np.ndarray,
    numbers: dict[str, int],
) -> None:
    texts: list[list[bytes]] = [[], []]
    places = []
    for (first, second, file, line), keep in zip(chunk, kept.tolist(), strict=True):
        if keep:
            texts[0].append(first.encode())
            texts[1].append(second.encode())
            number = numbers.setdefault(file, len(numbers))
            places.append((len(texts[0][-1]), len(texts[1][-1]), number, line))
    writer.append("source_text", b"".join(texts[0]))
    writer.append("target_text", b"".join(texts[1]))
    writer.append("places", np.array(places, np.int64))
    writer.append("source_ids", source.ids[np.repeat(kept, source.lengths)])
    writer.append("target_ids", target.ids[np.repeat(kept, target.lengths)])
    writer.append("lengths", np.stack([source.lengths, target.lengths], axis=1)[kept])


# What the ids depend on --------------------------------------------------------------------------


def _cache_folder(config: DataConfig, is_files: bool) -> Path | None:
    if config.cache_dir == "" or (config.cache_dir is None and not is_files):
        return None
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "jax_encdec" / "tokenized"


def _options(config: DataConfig, split: str) -> list[Any]:
    names = ("source_column", "target_column", "bad_rows", "max_line_bytes", "csv_quoting")
    return [config.limit(split), *(getattr(config, name) for name in names)]


def _name(source: Source) -> str:
    """What the records of a source give as their file."""
    return str(source.files[0]) if source.files else source.name


def _content(source: Source) -> list[Any]:
    if not source.files:
        rows = load_dataset(source)
        return [source.format, getattr(rows, "_fingerprint", None) or _digest_items(rows)]
    digests = [_of_file(path, _digest_file) for path in source.files]
    return [source.format, digests, [path.name.endswith(".gz") for path in source.files]]


def _digest_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_items(items: Iterable[Any]) -> str:
    made = hashlib.sha256()
    for item in items:
        made.update(json.dumps(item, default=str).encode() + b"\n")
    return made.hexdigest()


def _stamps(sources: Sequence[Source]) -> list[tuple[int, int]]:
    found = [_of_file(path, os.stat) for source in sources for path in source.files]
    return [(status.st_size, status.st_mtime_ns) for status in found]


def _of_file(path: Path, ask: Callable[[Path], Any]) -> Any:
    try:
        return ask(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
