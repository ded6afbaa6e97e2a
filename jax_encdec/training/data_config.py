"""DataConfig: which files hold the pairs of texts, how they are read, and how they become batches.

Frozen and hashable. What is read and tokenized follows from the upper fields alone, so that
changing how batches are made (the lower ones) keeps the cache of token ids.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from jax_encdec.errors import ConfigError

FORMATS = ("jsonl", "csv", "tsv", "text", "parquet", "datasets")
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of a run.  Lists are taken as tuples.

    Raises:
        ConfigError: a field has a value that cannot be used.
    """

    train: tuple[str, ...] = ()
    """Files or globs, `.gz` or not. Parallel text is a pair joined by a comma, "train.en,train.de",
    of which each may hold one `*`. With the `datasets` library, "datasets:NAME", and where needed
    "datasets:NAME:SPLIT", "datasets:NAME:CONFIG:SPLIT"; NAME may be a folder of `save_to_disk`."""
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    format: Literal["jsonl", "csv", "tsv", "text", "parquet", "datasets"] | None = None
    """None: by the files' extension, and "text" for a pair."""
    source_column: str = "source"
    """Name of the column; dots lead into nested ones, "translation.en"."""
    target_column: str = "target"
    source_prefix: str = ""
    """Put before each source, as T5 has it ("summarize: ")."""
    max_source_length: int | None = None
    """Most tokens of a source, special tokens included; longer ones are cut. None: the largest of
    `source_buckets`, or what the model or else its tokenizer takes."""
    max_target_length: int | None = None
    """Most tokens of a target, the closing one included; as `max_source_length`."""
    bad_rows: Literal["error", "skip"] = "error"
    """"error": a row that cannot be used ends the run; "skip": it is counted and left out."""
    max_line_bytes: int = 1 << 20
    """A longer row is a bad row."""
    csv_quoting: bool = True
    """False: in CSV and TSV files `"` is a character like any other."""
    max_train_samples: int | None = None
    """Take the first so many pairs only."""
    max_validation_samples: int | None = None
    max_test_samples: int | None = None
    workers: int | None = None
    """Processes that tokenize; 0: this one does; None: as many as pay."""
    cache_dir: str | None = None
    """Where token ids are kept; None: in the user's cache folder; "": in memory only."""

    batch_size: int = 32
    """Rows of a global batch, over all processes."""
    source_buckets: tuple[int, ...] | None = None
    """Lengths that sources are padded to. With `target_buckets` they span all (S, T) shapes that a
    batch can have; None for both: shapes are chosen from the data."""
    target_buckets: tuple[int, ...] | None = None
    max_shapes: int = 4
    """Most shapes that are chosen from the data; a program is compiled for each."""
    pack: bool = False
    """Put several short pairs into one row; the loss is the same."""
    shuffle: bool = True
    """Whether each epoch of training has an order of its own."""
    drop_last: bool = False
    """Whether an epoch's last pairs, too few for a batch, are left out. Otherwise that batch is
    filled with rows that carry no loss, and each epoch shows every pair exactly once."""

    def __post_init__(self):
        for name in (*SPLITS, "source_buckets", "target_buckets"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in SPLITS:
            value = getattr(self, name)
            if not isinstance(value, tuple) or not all(isinstance(v, str) and v for v in value):
                raise ConfigError(f"data.{name} must be a list of file names; got {value!r}")
        for name in ("source_column", "target_column"):
            self._check(name, str, "the name of a column", bool)
        self._check("source_prefix", str, "a text")
        self._check("cache_dir", str, "a folder", optional=True)
        self._check("format", str, f"one of {', '.join(FORMATS)}", FORMATS.__contains__, True)
        self._check("bad_rows", str, '"error" or "skip"', ("error", "skip").__contains__)
        for name in ("csv_quoting", "pack", "shuffle", "drop_last"):
            self._check(name, bool, "true or false")
        for name in ("batch_size", "max_shapes"):
            self._check(name, int, "a positive integer", _positive)
        self._check("max_line_bytes", int, "from 1 to 2**30", lambda n: 0 < n <= 2**30)
        limits = [f"max_{split}_samples" for split in SPLITS]
        for name in ("max_source_length", "max_target_length", *limits):
            self._check(name, int, "a positive integer", _positive, optional=True)
        self._check("workers", int, "an integer from 0", lambda n: n >= 0, optional=True)
        for name in ("source_buckets", "target_buckets"):
            expected = "a list of different positive integers"
            self._check(name, tuple, expected, _lengths, optional=True)
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(sorted(getattr(self, name))))

    def _check(self, name: str, kind: type, expected: str, holds: Any = None, optional=False):
        value = getattr(self, name)
        if value is None and optional:
            return
        right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not right or (holds is not None and not holds(value)):
            raise ConfigError(f"data.{name} must be {expected}; got {value!r}")

    def limit(self, split: str) -> int | None:
        """Most pairs that are taken of a split; None: all."""
        return getattr(self, f"max_{split}_samples")


def _positive(value: int) -> bool:
    return value > 0


def _lengths(value: tuple[Any, ...]) -> bool:
    integers = all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in value)
    return bool(value) and integers and len(set(value)) == len(value)
