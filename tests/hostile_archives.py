"""Zip archives that lie: each is a complete checkpoint in which one thing is not as it should be.

`ATTACKS`: what is done -> (how to make the file from the good checkpoint's entries, a part of the
refusal). `archive` writes local headers, directory and end record by hand, with any field changed.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

Entries = dict[str, bytes]

_LOCAL = "<4s5H3L2H"
_CENTRAL = "<4s6H3L5H2L"
_END = "<4s4H2LH"


def entry(name: str, data: bytes, **changed: Any) -> dict[str, Any]:
    """An entry, fields as in the specification; `local_` before one changes the local header."""
    fields = {"flags": 0, "method": 0, "crc": zlib.crc32(data), "compressed": len(data)}
    fields |= {"size": len(data), "name": name.encode(), "extra": b"", "data": data, "offset": None}
    return fields | changed


def archive(entries: list[dict[str, Any]], **end: Any) -> bytes:
    """The file; `end` changes the end record: count, directory (its size), start, comment."""
    out, directory = io.BytesIO(), bytearray()
    for fields in entries:
        at = out.tell()
        for kind, layout in (("local_", _LOCAL), ("", _CENTRAL)):

            def get(name: str, kind: str = kind, fields: dict[str, Any] = fields) -> Any:
                return fields.get(kind + name, fields[name])

            head = [get("flags"), get("method"), 0, 0, get("crc"), get("compressed"), get("size")]
            lengths = [len(get("name")), len(get("extra"))]
            if kind:
                out.write(struct.pack(layout, b"PK\x03\x04", 20, *head, *lengths))
                out.write(get("name") + get("extra") + fields["data"] + fields.get("after", b""))
            else:
                offset = at if fields["offset"] is None else fields["offset"]
                rest = [*lengths, 0, 0, 0, 0, offset]
                directory += struct.pack(layout, b"PK\x01\x02", 20, 20, *head, *rest)
                directory += get("name") + get("extra")
    begin = out.tell()
    start, count = end.get("start", begin), end.get("count", len(entries)) & 0xFFFF
    comment = end.get("comment", b"")
    out.write(directory + end.get("before_end", b""))
    size = end.get("directory", out.tell() - begin)
    out.write(struct.pack(_END, b"PK\x05\x06", 0, 0, count, count, size, start, len(comment)))
    return out.getvalue() + comment


def of(entries: Entries, *more: dict[str, Any], **changed: Any) -> list[dict[str, Any]]:
    """All entries, the last one's fields changed, and more of them."""
    made = [entry(name, data) for name, data in entries.items()]
    made[-1] |= changed
    return [*made, *more]


def _last(entries: Entries) -> tuple[str, bytes]:
    return list(entries.items())[-1]


def _without(entries: Entries, *names: str) -> Entries:
    return {name: data for name, data in entries.items() if not name.endswith(names)}


def _compressed(method: int) -> Callable[[Entries], bytes]:
    def make(entries: Entries) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
        return file.getvalue()

    return make


def _bomb(entries: Entries) -> bytes:
    """10 GB in 10 MB."""
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = bytes(1 << 20)
    data = b"".join(packed.compress(zeros) for _ in range(100)) + packed.flush()
    return archive(of(entries, data=data, method=8, compressed=len(data), size=100 << 20))


def _zip64(size: int) -> bytes:
    return struct.pack("<HHQQ", 1, 16, size, size)


_DAMAGED = "is damaged"
_BIG = 0xFFFFFFFF

ATTACKS: dict[str, tuple[Callable[[Entries], bytes], str]] = {
    "deflated": (_compressed(zipfile.ZIP_DEFLATED), "compressed"),
    "bzip2": (_compressed(zipfile.ZIP_BZIP2), "compressed"),
    "lzma": (_compressed(zipfile.ZIP_LZMA), "compressed"),
    "one entry deflated, 100 MB": (_bomb, "compressed"),
    "an unknown method": (lambda e: archive(of(e, method=99)), "compressed"),
    "stored, but two sizes": (
        lambda e: archive(of(e, size=1 << 40 & _BIG)),
        "compressed|not where",
    ),
    "encrypted": (lambda e: archive(of(e, flags=1)), "encrypted"),
    "two entries of one name": (lambda e: archive(of(e, entry(*_last(e)))), "two entries"),
    "two directory entries for the same bytes": (
        lambda e: archive(of(e, entry("archive/data/x", _last(e)[1], offset=0))),
        "overlaps",
    ),
    "all entries in one place": (
        lambda e: archive([x | {"offset": 0} for x in of(e)]),
        "overlaps|two entries",
    ),
    "an entry inside another": (
        lambda e: archive(of(e, data=archive(of(e)), size=100, compressed=100, offset=40)),
        "overlaps|not where",
    ),
    "an entry larger than the file": (
        lambda e: archive(of(e, size=1 << 31, compressed=1 << 31)),
        "not where",
    ),
    "an entry beyond the file": (lambda e: archive(of(e, offset=1 << 31)), "overlaps|not where"),
    "an entry inside the directory": (
        lambda e: archive(of(e, offset=len(archive(of(e))) - 60)),
        "overlaps|not where",
    ),
    "zip64: 2^63 bytes": (
        lambda e: archive(of(e, size=_BIG, compressed=_BIG, extra=_zip64((1 << 63) - 1))),
        "not where",
    ),
    "zip64: 2^64 bytes": (
        lambda e: archive(of(e, size=_BIG, compressed=_BIG, extra=_zip64((1 << 64) - 1))),
        "not where",
    ),
    "zip64: a field cut short": (
        lambda e: archive(of(e, size=_BIG, compressed=_BIG, extra=struct.pack("<HHL", 1, 4, 9))),
        _DAMAGED,
    ),
    "zip64: an end record that lies": (
        lambda e: archive(
            of(e),
            before_end=struct.pack(
                "<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1 << 60, 1 << 60, 1 << 62, 0
            )
            + struct.pack("<4sLQL", b"PK\x06\x07", 0, 0, 1),
            count=0xFFFF,
            directory=_BIG,
            start=_BIG,
        ),
        _DAMAGED,
    ),
    "a directory of 2^32 bytes": (lambda e: archive(of(e), directory=_BIG - 1), _DAMAGED),
    "a directory that starts at 2^32": (lambda e: archive(of(e), start=_BIG - 1), _DAMAGED),
    "a directory of nothing": (
        lambda e: archive(of(e), directory=0),
        "no PyTorch checkpoint|damaged",
    ),
    "no end record": (lambda e: archive(of(e))[:-22], _DAMAGED),
    "garbage after the end": (lambda e: archive(of(e)) + b"\0" * 70_000, _DAMAGED),
    "garbage in front": (lambda e: b"#!/bin/sh\ntouch executed\n" + archive(of(e)), "neither"),
    "another archive in front": (
        lambda e: archive([entry("archive/version", b"3")]) + archive(of(e)),
        "starts with",
    ),
    "local header of another kind": (
        lambda e: (
            archive(of(e))
            .replace(b"PK\x03\x04", b"PK\x03\x05")
            .replace(b"PK\x03\x05", b"PK\x03\x04", 1)
        ),
        "not where",
    ),
    "a name of 60,000 characters": (
        lambda e: archive(of(e, entry("a" * 60_000, b""), name=b"x" * 60_000)),
        "storage|damaged",
    ),
    "two models": (
        lambda e: archive(of(e, entry("other/data.pkl", b"\x80\x02}."))),
        "no PyTorch checkpoint",
    ),
    "no data.pkl": (lambda e: archive(of(_without(e, "data.pkl"))), "no PyTorch checkpoint"),
    "data.pkl at the top": (
        lambda e: archive(of(_without(e, "data.pkl"), entry("data.pkl", b"\x80\x02}."))),
        "no PyTorch checkpoint",
    ),
    "data.pkl outside": (
        lambda e: archive(of(_without(e, "data.pkl"), entry("../archive/data.pkl", b"\x80\x02}."))),
        "no PyTorch checkpoint",
    ),
    "storages at absolute names": (
        lambda e: archive([entry(n.replace("archive/data/", "/etc/"), d) for n, d in e.items()]),
        "storage",
    ),
    "storages outside": (
        lambda e: archive(
            [entry(n.replace("archive/data/", "../../data/"), d) for n, d in e.items()]
        ),
        "storage",
    ),
    "storages behind a backslash": (
        lambda e: archive([entry(n.replace("data/", "data\\"), d) for n, d in e.items()]),
        "storage",
    ),
    "a name with a null character": (
        lambda e: archive(of(e, entry(*_last(e)), name=_last(e)[0].encode() + b"\0x")),
        "two entries|storage",
    ),
    "a storage cut short": (
        lambda e: archive(of(e, data=b"", size=0, compressed=0)),
        "needs a storage",
    ),
    "a TorchScript program": (
        lambda e: archive(
            of(
                e,
                entry("archive/constants.pkl", b""),
                entry("archive/code/__torch__.py", b"import os"),
            )
        ),
        "TorchScript",
    ),
    "big-endian": (
        lambda e: archive(of(_without(e, "byteorder"), entry("archive/byteorder", b"big"))),
        "byte order",
    ),
    "100,000 entries": (
        lambda e: archive(of(e, *(entry(f"archive/data/x{i}", b"") for i in range(100_000)))),
        "directory of",
    ),
    "10^6 entries": (
        lambda e: archive(of(e), before_end=_many()),
        "directory of",
    ),
    "30,000 entries of no use, and no model": (
        lambda e: archive([entry(f"archive/data/{i}", b"") for i in range(30_000)]),
        "no PyTorch checkpoint",
    ),
}


def _many() -> bytes:
    """Directory entries for one and the same empty entry."""
    head = struct.pack(_CENTRAL, b"PK\x01\x02", 20, 20, *(0,) * 7, 1, *(0,) * 6) + b"x"
    return head * 1_000_000
