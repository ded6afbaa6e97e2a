"""Real texts without a model hub: Debian's package descriptions, in many languages, through apt.

    python benchmarks/debian_text.py FOLDER [--languages en,de,ja]

Every package has a one-line synopsis and a longer description: pairs to learn summaries from. apt's
own `update` fetches the indexes, from the machine's own sources, into a folder given here, so that
the machine's lists stay as they are. An index is a list of records of `Field: value`, continued on
lines that begin with a space; translations of descriptions carry the MD5 of the English one, by
which they are joined with the package's record. What is printed is one JSON object per pair.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LANGUAGES = ("en", "de", "fr", "ja", "ru", "zh_CN")


class Pair(NamedTuple):
    """A description and its synopsis."""

    source: str
    target: str
    project: str  # the source package: what the relatives of one library have in common


def fetch(folder: Path, languages: tuple[str, ...] = LANGUAGES) -> Path:
    """Fetch the indexes into `folder`, unless they lie there already; returns where they lie."""
    lists = folder / "lists"
    if all(list(lists.glob(_translation(language))) for language in languages):
        return lists
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    (folder / "archives" / "partial").mkdir(parents=True, exist_ok=True)
    own = folder / "apt.conf"
    own.write_text(f'Dir::State::Lists "{lists.resolve()}";\nDir::Cache "{folder.resolve()}";\n')
    options = [f"Acquire::Languages={','.join(languages)}", "Acquire::GzipIndexes=false"]
    subprocess.run(
        ["apt-get", "update", "-q", *(part for option in options for part in ("-o", option))],
        env={**os.environ, "APT_CONFIG": str(own)},
        stdout=sys.stderr,
        check=True,
    )
    return lists


def descriptions(lists: Path, language: str) -> dict[str, tuple[str, str]]:
    """Synopsis and description of each text of a language, by the MD5 of the English one."""
    found = {}
    for path in sorted(lists.glob(_translation(language))):
        for record in records(path):
            synopsis, _, text = record.get(f"Description-{language}", "").partition("\n")
            if synopsis and text:
                found[record["Description-md5"]] = (synopsis.strip(), _joined(text))
    return found


def texts(lists: Path, count: int, languages: tuple[str, ...] = LANGUAGES) -> list[str]:
    """`count` descriptions, as many of each language, no two of them alike."""
    chosen: list[str] = []
    for number, language in enumerate(languages):
        share = (count - len(chosen)) // (len(languages) - number)
        found = {text: None for _, text in descriptions(lists, language).values()}
        chosen += sorted(found, key=_digest)[:share]
    return chosen


def pairs(lists: Path) -> tuple[list[Pair], list[Pair]]:
    """English descriptions and synopses, to learn from and, of other projects, held out.

    One pair per project, so that `libfoo1`, `libfoo-dev` and `libfoo-doc` are not three; and only
    where the synopsis is a phrase and not already a part of the description.
    """
    english = descriptions(lists, "en")
    chosen: dict[str, Pair] = {}
    for path in sorted(lists.glob("*_Packages")):
        for record in records(path):
            project = record.get("Source", record["Package"]).split()[0]
            target, source = english.get(record.get("Description-md5", ""), ("", ""))
            words = len(source.split()), len(target.split())
            fits = words[0] >= 20 and 3 <= words[1] <= 12 and target.lower() not in source.lower()
            if fits and "transitional" not in target and project not in chosen:
                chosen[project] = Pair(source, target, project)
    parts: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in sorted(chosen.values(), key=lambda pair: _digest(pair.project)):
        parts[_digest(pair.project) < "10"].append(pair)  # one project in sixteen is held out
    return parts


def release(lists: Path) -> list[str]:
    """Which state of the archive the indexes are of."""
    found = []
    for path in sorted(lists.glob("*InRelease")):
        lines = path.read_text(errors="replace").splitlines()
        wanted = ("Label:", "Codename:", "Date:")
        found.append(", ".join(line for line in lines if line.startswith(wanted)))
    return found


def _translation(language: str) -> str:
    return f"*_Translation-{language.replace('_', '%5f')}"


def records(path: Path) -> Iterator[dict[str, str]]:
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        fields = re.findall(r"^(\S+):[ \t]*(.*(?:\n[ \t].*)*)", block, re.MULTILINE)
        if fields:
            yield dict(fields)


def _joined(text: str) -> str:
    """The lines of a description as paragraphs, one per line; ` .` stands for an empty line."""
    paragraphs = re.split(r"^ \.?\s*$", text, flags=re.MULTILINE)
    return "\n".join(" ".join(p.split()) for p in paragraphs if p.strip())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main() -> None:
    """Print the pairs, held out or not."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--languages", default=",".join(LANGUAGES))
    args = parser.parse_args()
    lists = fetch(args.folder, tuple(args.languages.split(",")))
    for name, part in zip(("train", "test"), pairs(lists), strict=True):
        for pair in part:
            print(json.dumps({**pair._asdict(), "split": name}, ensure_ascii=False))


if __name__ == "__main__":
    main()
