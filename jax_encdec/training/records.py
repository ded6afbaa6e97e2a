"""Files of pairs -> `Record(source, target, file, line)`, one at a time, in the files' order.

JSONL, CSV and TSV, parallel text, Parquet and the `datasets` library, by `DataConfig`. A row that
cannot be used is named by file and line; by option it ends the run or is counted in `Skipped`.
What is wrong with a whole file (a column that its header does not have, parallel files of unequal
length, not gzip) always ends it.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jax_encdec.errors import InputError
from jax_encdec.training.data_config import DataConfig
from jax_encdec.training.record import BadRow, Record, Skipped
from jax_encdec.training.record_files import Source

_EXTENSIONS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip


def read_records(
    patterns: Sequence[str],
    config: DataConfig,
    split: str = "train",
    *,
    skipped: Skipped | None = None,
) -> Iterator[Record]:
    """Yield the pairs of `patterns`, spelled as in `DataConfig.train`, at most the split's limit.

    Args:
        patterns: files, globs, pairs of them, or names of data sets.
        config: how to read them; its own `train`, `validation` and `test` are not looked at.
        split: whose `max_..._samples` holds, and which split of a data set is meant by its name.
        skipped: counts what `config.bad_rows == "skip"` leaves out.

    Raises:
        BadRow: a row that cannot be used, with `config.bad_rows == "error"`.
        InputError: a file is missing or cannot be read, or an extra is not installed.
    """
    rows = (row for item in find_sources(patterns, config, split) for row in item.read(config))
    return usable(rows, config, split, Skipped() if skipped is None else skipped)


def usable(
    rows: Iterable[Record | BadRow], config: DataConfig, split: str, skipped: Skipped
) -> Iterator[Record]:
    """The rows that can be used, at most the split's limit; the others are raised or counted."""
    left = config.limit(split)
    for row in rows:
        if isinstance(row, BadRow):
            skipped.take(row, config)
            continue
        yield row
        if left is not None:
            left -= 1
            if not left:
                return


# Which files -------------------------------------------------------------------------------------


def find_sources(patterns: Sequence[str], config: DataConfig, split: str) -> list[Source]:
    """Resolve globs, pairs and formats; the order of files is the order of their names.

    Raises:
        InputError: nothing matches, or a format cannot be told.
    """
    if isinstance(patterns, str):
        patterns = (patterns,)
    found: list[Source] = []
    for pattern in patterns:
        exists = Path(pattern).expanduser().exists()
        if config.format == "datasets" or (pattern.startswith("datasets:") and not exists):
            found.append(Source("datasets", pattern.removeprefix("datasets:"), (), split))
        elif "," in pattern and not exists and config.format in (None, "text"):
            sides = _pair(pattern)
            found += [Source("text", f"{a} and {b}", (a, b)) for a, b in sides]
        else:
            for path in map(Path, _glob(pattern)):
                found.append(Source(config.format or _format(path), str(path), (path,)))
                if found[-1].format == "text":
                    raise InputError(
                        f"{path} is one side of parallel text; name both files, joined by a comma: "
                        f'"train.en,train.de"'
                    )
    return found


def _format(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    ending = Path(name).suffix.lower()
    if ending not in _EXTENSIONS:
        raise InputError(
            f"the format of {path} cannot be told from its name; expected one of "
            f"{', '.join(_EXTENSIONS)}, with or without .gz, a pair of text files joined by a "
            f'comma ("train.en,train.de"), or data.format'
        )
    return _EXTENSIONS[ending]


def _glob(pattern: str) -> list[str]:
    pattern = os.path.expanduser(pattern)
    matches = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
    # Files are read twice, the first time for their digest: a pipe would not do.
    files = [name for name in matches if os.path.isfile(name)]
    if not files:
        what = f"{matches[0]} is no file" if matches else f"{pattern} matches no file"
        raise InputError(f"{what}; expected files, or a glob such as data/train-*.jsonl")
    return files


def _pair(pattern: str) -> list[tuple[Path, Path]]:
    sides = pattern.split(",")
    if len(sides) != 2 or any(side.count("*") > 1 or set(side) & set("?[") for side in sides):
        raise InputError(
            f'{pattern} is no pair of text files; expected "train.en,train.de", with at most one * '
            f"on each side and no other wildcard"
        )
    found = []
    for side in sides:
        before, _, after = os.path.expanduser(side.strip()).partition("*")
        # By what the star stands for, "" where there is none.
        found.append({n[len(before) : len(n) - len(after)]: Path(n) for n in _glob(side.strip())})
    left, right = found
    if left.keys() != right.keys():
        lonely = sorted(str({**left, **right}[key]) for key in left.keys() ^ right.keys())
        raise InputError(f"{pattern}: {lonely[0]} has no counterpart")
    return [(left[key], right[key]) for key in left]
