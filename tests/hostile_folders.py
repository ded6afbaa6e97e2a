"""Folders whose index of shards lies, or whose files are not what they seem.

`ATTACKS`: what is done -> (how to change a good folder of two shards, a part of the refusal). An
index's map goes from tensors to `A` and `B`. A link to a file is followed, as the hub's cache is
made of them; nothing of what an unexpected file holds may be told.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
SECRET = "the secret of another file"

Attack = Callable[[Path, dict[str, str]], None]


def to(shard: Any) -> Attack:
    """The index says that the first tensor is in `shard`."""

    def change(folder: Path, where: dict[str, str]) -> None:
        mapping: dict[str, Any] = dict(where)
        mapping[next(iter(mapping))] = shard
        write(folder, mapping)

    return change


def write(folder: Path, mapping: Any) -> None:
    """Write an index."""
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": mapping}))


def raw(content: bytes | Callable[[dict[str, str]], bytes]) -> Attack:
    """The index is these bytes."""

    def change(folder: Path, where: dict[str, str]) -> None:
        data = content(where) if callable(content) else content
        (folder / INDEX).write_bytes(data)

    return change


def link(name: str, target: str) -> Attack:
    """A file becomes a link; `SECRET` is in ../secret.txt and ../secret.json."""

    def change(folder: Path, where: dict[str, str]) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return change


def holds(content: bytes) -> Attack:
    """The first shard is these bytes."""

    def change(folder: Path, where: dict[str, str]) -> None:
        (folder / A).write_bytes(content)

    return change


def _pipe(folder: Path, where: dict[str, str]) -> None:
    (folder / A).unlink()
    os.mkfifo(folder / A)


def _folder(folder: Path, where: dict[str, str]) -> None:
    (folder / A).unlink()
    (folder / A).mkdir()


def _socket(folder: Path, where: dict[str, str]) -> None:
    (folder / A).unlink()
    here = os.getcwd()
    os.chdir(folder)  # the whole path may be longer than a socket's name
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(A)
    finally:
        os.chdir(here)


def _cut(folder: Path, where: dict[str, str]) -> None:
    os.truncate(folder / A, (folder / A).stat().st_size - 1)


def _swapped(folder: Path, where: dict[str, str]) -> None:
    write(folder, {name: A if shard == B else B for name, shard in where.items()})


def _both(folder: Path, where: dict[str, str]) -> None:
    (folder / "model.safetensors").write_bytes((folder / A).read_bytes())


def _many_files(folder: Path, where: dict[str, str]) -> None:
    """400 shards, each of which is asked for all the tensors it should hold."""
    content = (folder / A).read_bytes()
    for i in range(400):
        (folder / f"s{i}").write_bytes(content)
    first = next(iter(where))
    write(folder, {**where, **{f"t{i}": f"s{i % 400}" for i in range(29_000)}, first: "s7"})


PLAIN, LACKS, ABSENT, JSON = "plain name", "lacks what", "is missing|incomplete", "not valid JSON"

ATTACKS: dict[str, tuple[Attack, str]] = {
    "../ to a file that is there": (to(f"../other/{A}"), PLAIN),
    "../../ and so on": (to("../" * 12 + "etc/passwd"), PLAIN),
    "absolute": (to("/etc/passwd"), PLAIN),
    "a folder below": (to(f"sub/{A}"), PLAIN),
    "./": (to(f"./{A}"), PLAIN),
    "a home": (to("~/.netrc"), PLAIN),
    "an address": (to("https://example.org/a.safetensors"), PLAIN),
    "backslashes": (to(f"..\\{A}"), PLAIN),
    "a drive": (to(f"C:{A}"), PLAIN),
    "a drive's root": (to(f"C:\\{A}"), PLAIN),
    "another machine": (to(f"\\\\server\\share\\{A}"), PLAIN),
    "another stream": (to(f"{A}:$DATA"), f"{PLAIN}|{ABSENT}"),
    "a null character": (to(f"{A}\0.json"), PLAIN),
    "a line break": (to(f"{A}\n"), PLAIN),
    "nothing": (to(""), PLAIN),
    "the folder": (to("."), PLAIN),
    "the folder above": (to(".."), PLAIN),
    "written backwards": (to(f"\u202e{A}"), PLAIN),
    "a space of no width": (to(f"{A}\u200b"), PLAIN),
    "half a character": (to("\ud800"), PLAIN),
    "a wide slash": (to(f"..\uff0f{A}"), ABSENT),
    "another dot": (to(f"\u2024\u2024/{A}"), PLAIN),
    "a space": (to(" "), ABSENT),
    "a name of 5,000 characters": (to("a" * 5_000), f"{ABSENT}|{PLAIN}|too long"),
    "a number": (to(3), PLAIN),
    "null": (to(None), PLAIN),
    "a truth": (to(True), PLAIN),
    "a list": (to([A]), PLAIN),
    "an object": (to({A: A}), PLAIN),
    "the index itself": (to(INDEX), "neither|not a safetensors"),
    "the configuration": (to("config.json"), "neither|not a safetensors"),
    "a link to somebody's file": (link(A, "../secret.txt"), "not a safetensors"),
    "a link to a password file": (link(A, "/etc/passwd"), "not a safetensors"),
    "a link to endless zeros": (link(A, "/dev/zero"), "not a file"),
    "a link to a folder": (link(A, "/etc"), "not a file"),
    "a link to nothing": (link(A, "absent"), ABSENT),
    "a link to itself": (link(A, A), f"{ABSENT}|cannot be opened"),
    "a link to this process": (link(A, "/proc/self/mem"), "not a file|cannot be|empty"),
    "the index is a link to somebody's file": (link(INDEX, "../secret.txt"), JSON),
    "the index is a link to endless zeros": (link(INDEX, "/dev/zero"), "not a file"),
    "the configuration is a link to somebody's file": (
        link("config.json", "../secret.txt"),
        "JSON",
    ),
    "the configuration is a link to other JSON": (
        link("config.json", "../secret.json"),
        "model_type",
    ),
    "the configuration is a link to endless zeros": (
        link("config.json", "/dev/zero"),
        "not a file",
    ),
    "a pipe": (_pipe, "not a file"),
    "a folder": (_folder, "not a file"),
    "a socket": (_socket, "not a file"),
    "a web page": (holds(b"<!DOCTYPE html><title>x</title>"), "web page"),
    "a git-lfs pointer": (holds(b"version https://git-lfs.github.com/spec/v1\n"), "git-lfs"),
    "a bare pickle": (
        holds(b"\x80\x02cos\nsystem\nX\x0e\0\0\0touch executed\x85R."),
        "not a safetensors|neither",
    ),
    "a shard cut short": (_cut, "damaged or incomplete"),
    "shards swapped": (_swapped, LACKS),
    "a tensor that its shard lacks": (
        lambda f, w: write(f, {**w, "encoder.extra": A}),
        LACKS,
    ),
    "all tensors in one shard": (lambda f, w: write(f, dict.fromkeys(w, A)), LACKS),
    "tensors left out": (lambda f, w: write(f, dict(list(w.items())[1:])), "missing"),
    "a single file as well": (_both, "several weights"),
    "a tensor twice": (
        raw(
            lambda w: (
                json.dumps({"weight_map": w})
                .replace(": {", f': {{"{next(iter(w))}": "{B}", ', 1)
                .encode()
            )
        ),
        "twice",
    ),
    "two maps": (
        raw(lambda w: b'{"weight_map": {}, ' + json.dumps({"weight_map": w}).encode()[1:]),
        "twice",
    ),
    "an empty map": (lambda f, w: write(f, {}), "no weight_map"),
    "no map": (raw(b'{"metadata": {}}'), "no weight_map"),
    "a list for a map": (lambda f, w: write(f, [A, B]), "no weight_map"),
    "a list instead of an index": (raw(b"[]"), "JSON object"),
    "nothing in the index": (raw(b""), JSON),
    "an index cut short": (raw(lambda w: json.dumps({"weight_map": w}).encode()[:-9]), JSON),
    "two objects": (raw(b"{}{}"), JSON),
    "100,000 brackets": (raw(b'{"weight_map":' + b"[" * 100_000), JSON),
    "100,000 objects deep": (raw(b'{"weight_map":' * 100_000), JSON),
    "NaN": (raw(b'{"weight_map": NaN}'), "no weight_map|NaN|JSON"),
    "an integer of 100,000 digits": (
        raw(b'{"weight_map": ' + b"9" * 100_000 + b"}"),
        f"{JSON}|no weight_map",
    ),
    "a byte order mark": (
        raw(lambda w: b"\xef\xbb\xbf" + json.dumps({"weight_map": w}).encode()),
        JSON,
    ),
    "UTF-16": (raw(lambda w: json.dumps({"weight_map": w}).encode("utf-16")), JSON),
    "not UTF-8": (raw(b'{"weight_map": {"\xff": "a"}}'), JSON),
    "30,000 tensors that are nowhere": (
        lambda f, w: write(f, {**w, **{f"t{i}": "absent" for i in range(29_000)}}),
        ABSENT,
    ),
    "30,000 tensors not in the shard": (
        lambda f, w: write(f, {**w, **{f"t{i}": A for i in range(29_000)}}),
        LACKS,
    ),
    "30,000 shards": (
        lambda f, w: write(f, {**w, **{f"t{i}": f"s{i}" for i in range(29_000)}}),
        ABSENT,
    ),
    "400 shards and 29,000 tensors": (_many_files, LACKS),
    "10^6 tensors": (
        lambda f, w: write(f, {str(i): A for i in range(1_000_000)}),
        "more than|tensors",
    ),
    "8,000,000 empty objects": (
        raw(b'{"weight_map": [' + b"{}," * 8_000_000 + b"{}]}"),
        "more than",
    ),
    "an index of 110 MB": (raw(b'{"weight_map": "' + b"a" * 110_000_000 + b'"}'), "bytes"),
    "80 MB of text": (
        raw(b'{"weight_map": "\xf0\x9f\x98\x80' + b"a" * 80_000_000 + b'"}'),
        "bytes|no weight_map",
    ),
}
