"""Safetensors files that lie: `ATTACKS`, what is done -> (how to make it, part of the refusal).

Each is made from the header and the data of a good checkpoint, as dict and bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

Header = dict[str, Any]
Make = Callable[[Header, bytes], bytes]


def file(header: Header | bytes, data: bytes, length: int | None = None) -> bytes:
    """A file; `length` is what it says of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def first(**changed: Any) -> Make:
    """The first tensor says something else of itself."""

    def make(header: Header, data: bytes) -> bytes:
        name = min(
            (n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"]
        )
        entry = {k: v for k, v in (header[name] | changed).items() if v is not ...}
        return file({**header, name: entry}, data)

    return make


def evil(shape: list[Any], begin: Any, end: Any, dtype: str = "F32") -> Make:
    """One more tensor."""
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return lambda header, data: file({**header, "evil": entry}, data)


def moved(by: int) -> Make:
    """Every tensor lies so many bytes further on."""

    def make(header: Header, data: bytes) -> bytes:
        out = {
            n: e
            if n == "__metadata__"
            else {**e, "data_offsets": [o + by for o in e["data_offsets"]]}
            for n, e in header.items()
        }
        return file(out, bytes(max(by, 0)) + data)

    return make


def _overlap(header: Header, data: bytes) -> bytes:
    name = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    begin, end = header[name]["data_offsets"]
    return file({**header, name: {**header[name], "data_offsets": [begin - 4, end - 4]}}, data[:-4])


def _text(old: bytes, new: bytes) -> Make:
    return lambda header, data: file(json.dumps(header).encode().replace(old, new, 1), data)


def _many(count: int) -> Make:
    empty = '"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'

    def make(header: Header, data: bytes) -> bytes:
        return file(("{" + ",".join(empty % i for i in range(count)) + "}").encode(), b"")

    return make


_NO_FILE = "not a safetensors file"
_OFFSETS, _SHAPE = "impossible data_offsets", "impossible shape"

ATTACKS: dict[str, tuple[Make, str]] = {
    "overlap": (_overlap, "is damaged"),
    "all in one place": (
        lambda h, d: file(
            {
                n: e
                if n == "__metadata__"
                else {**e, "data_offsets": [0, e["data_offsets"][1] - e["data_offsets"][0]]}
                for n, e in h.items()
            },
            d,
        ),
        "is damaged",
    ),
    "a hole in front": (moved(4), "is damaged"),
    "a hole": (
        lambda h, d: file(
            {**h, "evil": {"dtype": "U8", "shape": [1], "data_offsets": [len(d) + 9, len(d) + 10]}},
            d + bytes(10),
        ),
        "is damaged",
    ),
    "bytes left over": (lambda h, d: file(h, d + b"touch executed"), "damaged or incomplete"),
    "bytes missing": (lambda h, d: file(h, d[:-1]), "damaged or incomplete"),
    "no data": (lambda h, d: file(h, b""), "damaged or incomplete"),
    "header of 2^64 - 1": (lambda h, d: file(h, d, 2**64 - 1), _NO_FILE),
    "header of 2^63": (lambda h, d: file(h, d, 2**63), _NO_FILE),
    "header of 10^9": (lambda h, d: file(h, d, 10**9), _NO_FILE),
    "header of 99 MB in a small file": (lambda h, d: file(h, d, 99_000_000), _NO_FILE),
    "header of 20 MB in a small file": (lambda h, d: file(h, d, 20_000_000), "ends too early"),
    "header of nothing": (lambda h, d: file(h, d, 0), "not valid JSON"),
    "header one byte short": (lambda h, d: file(h, d, len(json.dumps(h)) - 1), "not valid JSON"),
    "header that runs into the data": (
        lambda h, d: file(h, d, len(json.dumps(h)) + 64),
        "not valid JSON",
    ),
    "seven bytes": (lambda h, d: b"\x01" * 7, "ends too early"),
    "nothing": (lambda h, d: b"", "is empty"),
    "a list": (lambda h, d: file(b"[]", d), "JSON object"),
    "not JSON": (lambda h, d: file(b"{]", d), "not valid JSON"),
    "not UTF-8": (_text(b'"encoder', b'"\xffncoder'), "not valid JSON"),
    "UTF-16": (lambda h, d: file(json.dumps(h).encode("utf-16"), d), "not valid JSON"),
    "a byte order mark": (
        lambda h, d: file(b"\xef\xbb\xbf" + json.dumps(h).encode(), d),
        "not valid JSON",
    ),
    "half a character": (
        lambda h, d: file(
            {**h, "\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}, d
        ),
        "Unicode",
    ),
    "a tensor twice": (lambda h, d: file(b'{"a":1,"a":2}', d), "twice"),
    "a key of a tensor twice": (_text(b'"dtype"', b'"dtype": "F16", "dtype"'), "twice"),
    "100,000 brackets": (lambda h, d: file(b'{"a":' + b"[" * 100_000, d), "not valid JSON"),
    "an unknown dtype": (first(dtype="F33"), "has dtype 'F33'"),
    "a dtype in a list": (first(dtype=["F32"]), "has dtype"),
    "no dtype": (first(dtype=...), "needs dtype"),
    "no shape": (first(shape=...), "needs dtype"),
    "no offsets": (first(data_offsets=...), "needs dtype"),
    "a number for a tensor": (lambda h, d: file({**h, "evil": 3}, d), "needs dtype"),
    "negative shape": (first(shape=[-1]), _SHAPE),
    "shape of floats": (first(shape=[1.0]), _SHAPE),
    "shape of truths": (first(shape=[True]), _SHAPE),
    "shape of text": (first(shape="12"), _SHAPE),
    "shape of NaN": (first(shape=[float("nan")]), _SHAPE),
    "shape of 10^5 digits": (
        _text(b'"shape": [', b'"shape": [' + b"9" * 100_000 + b","),
        "not valid JSON|impossible",
    ),
    "another shape": (first(shape=[1]), "give"),
    "shapes beyond 2^64": (evil([2**32, 2**32, 4], 0, 0), _SHAPE),
    "nothing, times 2^120": (evil([0, 2**60, 2**60], 0, 0), _SHAPE),
    "65 dimensions": (evil([1] * 65, 0, 4), "65 dimensions"),
    "200,000 dimensions": (evil([1] * 200_000, 0, 4), "200000 dimensions"),
    "begin after end": (evil([1], 8, 4), "give -4"),
    "negative offsets": (evil([1], -4, 0), _OFFSETS),
    "offsets beyond 2^64": (evil([1], 2**64, 2**64 + 4), "is damaged"),
    "offsets of floats": (evil([1], 0.0, 4.0), _OFFSETS),
    "three offsets": (first(data_offsets=[0, 1, 2]), _OFFSETS),
    "offsets in an object": (first(data_offsets={"0": 0, "1": 4}), _OFFSETS),
    "metadata of numbers": (lambda h, d: file({**h, "__metadata__": {"a": 1}}, d), "not text"),
    "metadata of lists": (lambda h, d: file({**h, "__metadata__": []}, d), "not text"),
    "metadata that nests": (
        lambda h, d: file({**h, "__metadata__": {"a": {"b": "c"}}}, d),
        "not text",
    ),
    "70 MB of metadata": (
        lambda h, d: file({**h, "__metadata__": {"a": "\U0001f600" * 6_000_000}}, d),
        _NO_FILE,
    ),
    "a name of 5 MB": (
        lambda h, d: file(
            {**h, "n" * 5_000_000: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}, d
        ),
        "unexpected",
    ),
    "29,000 tensors": (_many(29_000), "does not fit"),
    "31,000 tensors": (_many(31_000), "tensors|more than"),
    "10^6 tensors": (_many(1_000_000), "more than|header"),
    "8,000,000 empty objects": (
        lambda h, d: file(b'{"a":[' + b"{}," * 8_000_000 + b"{}]}", b""),
        "more than",
    ),
    "10,000,000 numbers": (
        lambda h, d: file(b'{"a":[' + b"0," * 10_000_000 + b"0]}", b""),
        "more than",
    ),
}
