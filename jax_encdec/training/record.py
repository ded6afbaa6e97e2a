"""One pair of texts, or why a row is none.

Whatever the format, a row becomes a `Record` or a `BadRow`, which names file and line; `Skipped`
counts those that are left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax_encdec.errors import InputError, nearest
from jax_encdec.training.data_config import DataConfig

_NAMED = 5
"""Rows that are named when they are counted."""


class Record(NamedTuple):
    """A pair of texts and where it stands."""

    source: str
    target: str
    file: str
    line: int
    """Counted from 1, a header included; in Parquet and `datasets`, the row."""


class BadRow(InputError):
    """A row that cannot be used: `file`, `line`, `reason`."""

    def __init__(self, file: str, line: int, reason: str):
        super().__init__(
            f"{file}, line {line}: {reason}; repair or remove it, or leave such rows out with "
            f'bad_rows = "skip"'
        )
        self.file, self.line, self.reason = file, line, reason


@dataclasses.dataclass
class Skipped:
    """The rows that were left out: how many, and the first few by name."""

    count: int = 0
    named: list[str] = dataclasses.field(default_factory=list)

    def take(self, row: BadRow, config: DataConfig) -> None:
        """Count a row, or raise it if `config` says so."""
        if config.bad_rows == "error":
            raise row
        self.count += 1
        if len(self.named) < _NAMED:
            self.named.append(f"{row.file}, line {row.line}: {row.reason}")

    def __str__(self) -> str:
        rows = "row" if self.count == 1 else "rows"
        named = "; ".join([*self.named, *["..."] * (self.count > len(self.named))])
        return f"{self.count:,} {rows} left out" + (f" ({named})" if named else "")

    def __bool__(self) -> bool:
        return self.count > 0


def pick_columns(
    row: Mapping[str, Any], config: DataConfig, file: str, line: int
) -> Record | BadRow:
    """The configured columns of a row."""
    texts = []
    for column in (config.source_column, config.target_column):
        found = _column(row, column)
        if found is _MISSING:
            known = ", ".join(map(repr, list(row)[:10])) or "none"
            hint = nearest(column, map(str, row))
            return BadRow(file, line, f"has no column {column!r}{hint}; it has {known}")
        texts.append(found)
    names = (f"column {config.source_column!r}", f"column {config.target_column!r}")
    return check_texts(texts, names, file, line)


def check_texts(
    texts: Sequence[Any], names: Sequence[str], file: str, line: int
) -> Record | BadRow:
    """A pair whose sides are texts that can be used, or why not; `names` are for the message."""
    for name, text in zip(names, texts, strict=True):
        if not isinstance(text, str):
            return BadRow(file, line, f"{name} must be a text; got {kind(text)}")
        if not text.strip():
            return BadRow(file, line, f"{name} is empty")
        if "\0" in text:
            return BadRow(file, line, f"{name} holds a NUL character")
        if text.startswith("\ufeff"):
            return BadRow(file, line, f"{name} opens with a byte order mark, U+FEFF")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                return BadRow(file, line, f"{name} is not UTF-8")
    return Record(texts[0], texts[1], file, line)


_MISSING = object()


def _column(row: Any, name: str) -> Any:
    """A column by name; by its dots, where it is none itself."""
    if isinstance(row, Mapping):
        if name in row:
            return row[name]
        first, dot, rest = name.partition(".")
        if dot and first in row:
            return _column(row[first], rest)
    return _MISSING


def kind(value: Any) -> str:
    """What a value of JSON is, in words."""
    kinds = {type(None): "null", bool: "a boolean", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else "no text")
