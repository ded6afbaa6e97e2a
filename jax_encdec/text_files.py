"""Texts to generate from, read from a file one after the other.

A file of lines, JSONL, CSV or TSV is never held as a whole: `TextFile` is opened anew each time it
is iterated over, so that a file of any size can be checked first and worked through later. What is
wrong is said with its file and line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from jax_encdec.errors import InputError, nearest

COLUMNS = ("source", "text")
"""Looked for in this order where no column is named."""
KINDS = "lines of text, or .jsonl, .csv, .tsv"
_WITH_COLUMNS = (".jsonl", ".csv", ".tsv")


class Record(NamedTuple):
    """A text and where it stands, for error messages."""

    text: str
    where: str


class TextFile:
    """The records of a file, read anew at each iteration.

    Attributes:
        path: the file; its ending says what it is, see `records`.
        column: which field of objects and rows is the text; None: "source", or else "text".
    """

    def __init__(self, path: str | Path, column: str | None = None):
        """Check the file's kind; its content is looked at when iterated over.

        Raises:
            InputError: a kind of file that is not read, or a column of what has none.
        """
        self.path = Path(path)
        self.column = column
        _check_kind(str(path), self.path.suffix.lower(), column)

    def __iter__(self) -> Iterator[Record]:
        with open(self.path, "rb") as file:
            yield from records(file, str(self.path), self.path.suffix, self.column)


def read_texts(data: bytes, name: str, suffix: str, column: str | None = None) -> list[Record]:
    """Read all texts of a file called `name` from its content; the rest is as in `records`."""
    return list(records(io.BytesIO(data), name, suffix, column))


def records(
    file: Iterable[bytes], name: str, suffix: str, column: str | None = None
) -> Iterator[Record]:
    """The texts of a file called `name`, one at a time.

    Args:
        file: its lines, as an open binary file gives them.
        suffix: .jsonl: an object (or a string) per line; .csv, .tsv: a header and rows; .json is
            refused, and everything else is one text per line.
        column: which field of objects and rows; None: "source", or else "text".

    Raises:
        InputError: with the file, the line and what is wrong there, when that line is met.
    """
    suffix = suffix.lower()
    _check_kind(name, suffix, column)
    lines = _decoded(file, name)
    if suffix == ".jsonl":
        found = _jsonl(lines, name, column)
    elif suffix in (".csv", ".tsv"):
        found = _csv(lines, name, column, "," if suffix == ".csv" else "\t")
    else:
        found = (
            Record(line.removesuffix("\n").removesuffix("\r"), f"{name}, line {number}")
            for number, line in enumerate(lines, 1)
        )
    empty = True
    for record in found:
        empty = False
        if not record.text.strip():
            raise InputError(f"{record.where} is empty; leave it out")
        yield record
    if empty:
        raise InputError(f"{name} holds no texts")


def _check_kind(name: str, suffix: str, column: str | None) -> None:
    if suffix == ".json":
        raise InputError(f"{name}: expected {KINDS}; got .json: write one object per line")
    if column and suffix not in _WITH_COLUMNS:
        raise InputError(f"{name} has no columns for --source-column {column!r}; it is plain text")


def _decoded(file: Iterable[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}, line {number} is not UTF-8 (byte 0x{line[error.start]:02x}); "
                f"convert the file to UTF-8"
            ) from None


def _jsonl(lines: Iterable[str], name: str, column: str | None) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        where = f"{name}, line {number}"
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{where} is not valid JSON: {error}") from None
        if isinstance(value, dict):
            value = value[_column(where, list(value), column)]
        if not isinstance(value, str):
            raise InputError(f"{where}: the text must be a string; got {type(value).__name__}")
        try:
            value.encode()
        except UnicodeEncodeError:  # Only an escape can spell one; the file itself is UTF-8.
            raise InputError(f"{where} is not valid Unicode: it holds a lone surrogate") from None
        yield Record(value, where)


def _csv(lines: Iterable[str], name: str, column: str | None, delimiter: str) -> Iterator[Record]:
    # Old files end their lines with a carriage return alone.
    pieces = (piece for line in lines for piece in io.StringIO(line, newline=""))
    reader = csv.reader(pieces, delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        place = header.index(_column(f"{name}, line 1", header, column))
        for row in reader:
            where = f"{name}, line {reader.line_num}"
            if not row:
                continue
            if len(row) != len(header):
                raise InputError(
                    f"{where} has {len(row)} fields, the header {len(header)}; "
                    f"quote fields that hold a {delimiter!r}"
                )
            yield Record(row[place], where)
    except csv.Error as error:
        raise InputError(f"{name}, line {reader.line_num} is not valid CSV: {error}") from None


def _column(where: str, names: list[str], wanted: str | None) -> str:
    for name in (wanted,) if wanted else COLUMNS:
        if name in names:
            return name
    expected = repr(wanted) if wanted else " or ".join(map(repr, COLUMNS))
    hint = nearest(wanted, names) if wanted else "; name one with --source-column"
    raise InputError(f"{where}: expected a column {expected}; got {', '.join(names)}{hint}")
