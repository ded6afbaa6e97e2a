"""One reader per format: a file -> its rows, each a `Record` or a `BadRow`.

What is wrong with a whole file is raised. Memory grows neither with a file nor with a line.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import importlib
import io
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_encdec.errors import InputError, nearest
from jax_encdec.training.data_config import DataConfig
from jax_encdec.training.record import BadRow, Record, check_texts, kind, pick_columns


@dataclasses.dataclass(frozen=True)
class Source:
    """One thing to read: a file, two parallel ones, or a data set (which has no files)."""

    format: str
    name: str
    files: tuple[Path, ...]
    split: str = ""

    def read(self, config: DataConfig) -> Iterator[Record | BadRow]:
        """Yield what it holds, row by row."""
        return _READERS[self.format](self, config)


# Lines -------------------------------------------------------------------------------------------


def _lines(path: Path, most: int) -> Iterator[tuple[int, bytes | None]]:
    """Number and bytes of each line, without its end; None in the place of one that is too long.

    A line ends with a line feed and nothing else: text holds other separators (U+2028).
    """
    try:
        with _open(path) as file:
            number = 0
            while line := file.readline(most + 2):
                number += 1
                if number == 1:
                    line = _without_mark(path, line)
                whole = line.endswith(b"\n")
                line = line.removesuffix(b"\n").removesuffix(b"\r")
                if len(line) <= most:
                    yield number, line
                    continue
                while not whole and (rest := file.readline(1 << 16)):
                    whole = rest.endswith(b"\n")
                yield number, None
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged or no gzip file: {error}") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.name.endswith(".gz") else open(path, "rb")


def _without_mark(path: Path, line: bytes) -> bytes:
    if line.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path} is UTF-16; convert it to UTF-8, e.g. by iconv -f UTF-16 -t UTF-8")
    return line.removeprefix(b"\xef\xbb\xbf")


def _too_long(config: DataConfig) -> str:
    return f"is longer than max_line_bytes = {config.max_line_bytes:,}"


def _decode(line: bytes) -> str | None:
    try:
        return line.decode()
    except UnicodeDecodeError:
        return None


# Formats -----------------------------------------------------------------------------------------


def _read_jsonl(source: Source, config: DataConfig) -> Iterator[Record | BadRow]:
    path = source.files[0]
    for number, line in _lines(path, config.max_line_bytes):
        if line is None:
            yield BadRow(str(path), number, _too_long(config))
        elif (text := _decode(line)) is None:
            yield BadRow(str(path), number, "is not UTF-8")
        elif text.strip():
            yield _json_row(text, config, path, number)


def _json_row(text: str, config: DataConfig, path: Path, number: int) -> Record | BadRow:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        if number == 1 and text.strip() in ("[", "{"):
            raise InputError(
                f"{path} is one JSON document over many lines; expected JSONL, one object per line"
            ) from None
        return BadRow(str(path), number, f"is not JSON: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError):  # nested too deeply, or a number of thousands of digits
        return BadRow(str(path), number, "is not JSON that can be read")
    if not isinstance(row, dict):
        if isinstance(row, list) and number == 1:
            raise InputError(f"{path} is a JSON array; expected JSONL, one object per line")
        return BadRow(str(path), number, f"must be a JSON object; got {kind(row)}")
    return pick_columns(row, config, str(path), number)


def _read_table(source: Source, config: DataConfig) -> Iterator[Record | BadRow]:
    """CSV and TSV with a header; a quoted field may span lines."""
    path = source.files[0]
    rows = _Rows(path, config, "\t" if source.format == "tsv" else ",")
    header: list[str] | None = None
    for number, row in rows:
        if header is None:
            if isinstance(row, str):
                raise InputError(f"{path}, line {number}: the header {row}")
            _check_header(row, config, path)
            header = row
        elif isinstance(row, str):
            yield BadRow(str(path), number, row)
        elif len(row) != len(header):
            yield BadRow(
                str(path), number, f"has {len(row)} columns, but the header has {len(header)}"
            )
        else:
            yield pick_columns(dict(zip(header, row, strict=True)), config, str(path), number)


def _check_header(header: Sequence[str], config: DataConfig, path: Path) -> None:
    for column in (config.source_column, config.target_column):
        if header.count(column) != 1:
            many = f"has several columns {column!r}" if column in header else ""
            none = f"has no column {column!r}{nearest(column, header)}"
            raise InputError(
                f"{path} {many or none}; its header is {', '.join(map(repr, header))}; "
                f"set data.source_column and data.target_column"
            )


class _Rows:
    """Rows of a CSV file, with the number of their first line; a str says why one is bad.

    A quote that is never closed would swallow the file: it costs its first line only, and the
    lines after it are parsed anew.
    """

    def __init__(self, path: Path, config: DataConfig, delimiter: str):
        self.lines = _lines(path, config.max_line_bytes)
        self.most, self.too_long = config.max_line_bytes, _too_long(config)
        quoting = csv.QUOTE_MINIMAL if config.csv_quoting else csv.QUOTE_NONE
        self.options: dict[str, Any] = {
            "delimiter": delimiter, "quoting": quoting, "strict": True,
        }  # fmt: skip
        self.hint = "" if config.csv_quoting is False else ' (if " is no quote here: csv_quoting)'
        self.again: deque[tuple[int, bytes | None]] = deque()
        self.row: list[tuple[int, bytes | None]] = []
        self.size = 0

    def __iter__(self) -> Iterator[tuple[int, list[str] | str]]:
        reader = csv.reader(self._feed(), **self.options)
        while True:
            self.row, self.size = [], 0
            try:
                row = _next(reader, self.most)
            except StopIteration:
                return
            except (csv.Error, _Stop) as error:
                first, *rest = self.row
                self.again.extendleft(reversed(rest))
                reader = csv.reader(self._feed(), **self.options)
                long = first[1] is None or (isinstance(error, _Stop) and not rest)
                yield first[0], self.too_long if long else f"cannot be read: {error}{self.hint}"
                continue
            if row:
                bad = any(not field.isascii() and _surrogate(field) for field in row)
                yield self.row[0][0], "is not UTF-8" if bad else row

    def _feed(self) -> Iterator[str]:
        while True:
            item = self.again.popleft() if self.again else next(self.lines, None)
            if item is None:
                return
            self.row.append(item)
            line = item[1]
            self.size += len(line or b"") + 1
            if line is None or self.size > self.most + 1:
                raise _Stop(f"the row that opens here does not end within {self.most:,} bytes")
            yield line.decode(errors="surrogateescape") + "\n"


class _Stop(Exception):
    """Ends a parse from within the lines that feed it."""


def _next(reader: Any, most: int) -> list[str]:
    # The limit of a field is the csv module's own state: set for this call, and put back.
    before = csv.field_size_limit(most)
    try:
        return next(reader)
    finally:
        csv.field_size_limit(before)


def _surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _read_text(source: Source, config: DataConfig) -> Iterator[Record | BadRow]:
    """Two files, line by line."""
    a, b = source.files
    left, right = _lines(a, config.max_line_bytes), _lines(b, config.max_line_bytes)
    count = 0
    while True:
        one, other = next(left, None), next(right, None)
        if one is None or other is None:
            break
        count += 1
        texts = []
        for path, (_, line) in ((a, one), (b, other)):
            text = None if line is None else _decode(line)
            if text is None:
                reason = _too_long(config) if line is None else "is not UTF-8"
                yield BadRow(str(path), count, reason)
                break
            texts.append(text)
        else:
            made = check_texts(texts, ("the source", "the target"), str(a), count)
            if isinstance(made, BadRow) and made.reason.startswith("the target"):
                made = BadRow(str(b), count, made.reason)
            yield made
    if one is not None or other is not None:
        longer, shorter = (a, b) if one is not None else (b, a)
        raise InputError(
            f"{longer} has more lines than {shorter}, which has {count:,}: parallel files must "
            f"have as many lines, since one line too few shifts all pairs after it"
        )


def _read_parquet(source: Source, config: DataConfig) -> Iterator[Record | BadRow]:
    parquet = extra("pyarrow.parquet", "parquet")
    path = source.files[0]
    columns = list(dict.fromkeys((config.source_column, config.target_column)))
    try:
        with parquet.ParquetFile(path) as file:
            known = [field.name for field in file.schema_arrow]
            for column in columns:
                if column not in known and column.partition(".")[0] not in known:
                    raise InputError(
                        f"{path} has no column {column!r}{nearest(column, known)}; it has "
                        f"{', '.join(map(repr, known))}"
                    )
            number = 0
            for batch in file.iter_batches(1024, columns=columns):
                values = [batch.column(i) for i in range(batch.num_columns)]
                for i in range(batch.num_rows):
                    number += 1
                    try:
                        cells = (value[i].as_py() for value in values)
                        row = dict(zip(batch.schema.names, cells, strict=True))
                    except UnicodeDecodeError:
                        yield BadRow(str(path), number, "is not UTF-8")
                        continue
                    yield pick_columns(row, config, str(path), number)
    except FileNotFoundError:
        raise InputError(f"there is no file {path}") from None
    except (OSError, extra("pyarrow", "parquet").ArrowException) as error:
        message = str(error).splitlines()[0]
        raise InputError(f"{path} is damaged or no Parquet file: {message}") from None


def _read_datasets(source: Source, config: DataConfig) -> Iterator[Record | BadRow]:
    for number, row in enumerate(load_dataset(source), 1):
        yield pick_columns(row, config, source.name, number)


def load_dataset(source: Source) -> Iterable[Mapping[str, Any]]:
    """The rows of "NAME", "NAME:SPLIT", "NAME:CONFIG:SPLIT" or a folder of `save_to_disk`.

    Raises:
        InputError: the library is not installed, or has no such data set.
    """
    datasets = extra("datasets", "datasets")
    name, _, rest = source.name.partition(":")
    slice_at = rest.find("[") if "[" in rest else len(rest)
    config, _, split = rest[:slice_at].rpartition(":")
    split = (split + rest[slice_at:]) or source.split
    try:
        if Path(name).is_dir() and any(
            (Path(name) / mark).exists() for mark in ("dataset_info.json", "dataset_dict.json")
        ):
            found = datasets.load_from_disk(name)
            return found[split] if isinstance(found, Mapping) else found
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # whatever the library and the network raise
        message = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"the data set {source.name!r} cannot be read: {message}") from None


def extra(module: str, name: str) -> Any:
    """Import a module that an extra of this package brings.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f"reading this data needs {module.partition('.')[0]}, which is not installed: "
            f"pip install 'jax_encdec[{name}]'"
        ) from None


_READERS: dict[str, Callable[[Source, DataConfig], Iterator[Record | BadRow]]] = {
    "jsonl": _read_jsonl,
    "csv": _read_table,
    "tsv": _read_table,
    "text": _read_text,
    "parquet": _read_parquet,
    "datasets": _read_datasets,
}
