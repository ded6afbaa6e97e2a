"""The pickles inside PyTorch checkpoints, read without running them.

A pickle is a program for a small stack machine, and Python's own machine calls whatever the
program names. This one interprets an allow-list of opcodes over an allow-list of names
(torch_names), and calls nothing: a name becomes an inert marker, and REDUCE on a marker builds a
record. Anything else is refused. Results are None, bool, int, float, str, bytes, tuple, list,
`dict` with text keys, and the records of torch_names; no other object can come out.

Values may be endless (a list that holds itself), so none is ever walked: see torch_names.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from jax_encdec.convert.tensor_source import is_count, short
from jax_encdec.convert.torch_names import (
    Global,
    Opaque,
    OrderedDict,
    Refused,
    Storage,
    called,
    find_global,
    said,
)
from jax_encdec.errors import CheckpointError

MAX_BYTES = 25_000_000
"""Largest pickle: it names and describes tensors, some 200 bytes each, and holds no numbers."""
MAX_OPCODES = 1_100_000
"""About 35 are used for a tensor. Bounds the time, about a second, and with it stack, memo and
everything built, a few hundred MB."""
MAX_CALLS = 100_000
"""Two or three are used for a tensor; they take longer than other opcodes."""
MAX_MARKS = 100
"""Depth of open brackets; a state dict needs five."""
_MAX_NAME = 200
"""Characters of a global's module or name."""
_FIRST_READ = 1 << 16


class View(NamedTuple):
    """What the files before PyTorch 1.6 say of a storage: a whole one, or a part of another."""

    dtype: np.dtype | None  # None: untyped bytes
    numel: int
    root: str | None = None
    offset: int = 0


def unpickle(data: bytes, where: str, start: int = 0) -> tuple[Any, int]:
    """Interpret one pickle.

    Args:
        data: holds the pickle, from `start`.
        where: the file's name, for error messages.

    Returns:
        The value, and where the pickle ends in `data`.

    Raises:
        CheckpointError: it is damaged, too large, or uses anything outside the allow-lists.
    """
    if len(data) - start > MAX_BYTES:
        raise CheckpointError(
            f"{where} has a pickle of {len(data) - start} bytes; at most {MAX_BYTES} are read"
        )
    machine = _Machine(data, start)
    return _run(machine, where), machine.position


class PickleStream:
    """Pickles that follow each other from the start of a file, read no further than they go.

    Args:
        read: (offset, most bytes) -> bytes, fewer only at the end of the file.
        where: the file's name, for error messages.

    Attributes:
        position: of the first byte after the pickles read so far.
        views: as `_Machine.views`, of all pickles.
    """

    def __init__(self, read: Callable[[int, int], bytes], where: str) -> None:
        self._read, self._where = read, where
        self._data = bytearray()
        self._steps = 0
        self.position = 0
        self.views: dict[str, View] = {}

    def next(self) -> Any:
        """Interpret the next pickle; bytes and steps are bounded over all of them.

        Raises:
            CheckpointError: as `unpickle`.
        """
        machine = _Machine(self._data, self.position, self._more, self.views, self._steps)
        value = _run(machine, self._where)
        self.position, self._steps = machine.position, machine.steps
        return value

    def _more(self, end: int) -> None:
        """Have at least `end` bytes at hand, if the file has them."""
        if end > MAX_BYTES:
            raise Refused(f"has pickles of more than {MAX_BYTES} bytes")
        have = len(self._data)
        # Twice as much each time: few reads, and little beyond the pickles.
        self._data += self._read(have, min(max(end, 2 * have, _FIRST_READ), MAX_BYTES) - have)


def _run(machine: _Machine, where: str) -> Any:
    try:
        return machine.run()
    except Refused as error:
        raise CheckpointError(f"{where} {error}") from None


# The machine -------------------------------------------------------------------------------------

_OPS: dict[int, Callable[[_Machine], None]] = {}


def _op(code: bytes) -> Callable[[Callable[[_Machine], None]], Callable[[_Machine], None]]:
    def register(method: Callable[[_Machine], None]) -> Callable[[_Machine], None]:
        _OPS[code[0]] = method
        return method

    return register


@dataclass
class _Machine:
    """Data, a position in it, a stack of open brackets (each a stack of values), and a memo.

    `more(end)` lengthens the data, if it can. `views` collects the storages of a file before
    PyTorch 1.6, whose persistent ids have another form; without it they are refused.
    """

    data: bytes | bytearray
    position: int
    more: Callable[[int], None] = lambda end: None
    views: dict[str, View] | None = None
    steps: int = 0

    def run(self) -> Any:
        """Interpret up to STOP and return the top of the stack."""
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.calls = 0
        for _ in range(MAX_OPCODES):
            if self.position >= len(self.data):
                self.need(self.position + 1)
            code = self.data[self.position]
            self.position += 1
            if code == 0x2E:  # STOP
                return self.pop()
            operation = _OPS.get(code)
            if operation is None:
                raise Refused(
                    f"uses pickle opcode 0x{code:02x} at byte {self.position - 1}, which "
                    f"state dicts do not need"
                )
            operation(self)
        raise Refused(f"has a pickle of more than {MAX_OPCODES} steps")

    def take(self, count: int) -> bytes:
        """The next bytes."""
        end = self.position + count
        if end > len(self.data):
            self.need(end)
        taken = bytes(self.data[self.position : end])
        self.position = end
        return taken

    def need(self, end: int) -> None:
        """Have the data reach to `end`."""
        self.more(end)
        if end > len(self.data):
            raise Refused("has a pickle that ends too early")

    def byte(self) -> int:
        """The next byte, as a number."""
        if self.position >= len(self.data):
            raise Refused("has a pickle that ends too early")
        self.position += 1
        return self.data[self.position - 1]

    def number(self, layout: str) -> Any:
        """The next bytes as a number, in `struct`'s notation."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        """Text up to a line break, as GLOBAL has it."""
        if self.position + _MAX_NAME >= len(self.data):
            self.more(self.position + _MAX_NAME + 1)
        end = self.data.find(b"\n", self.position, self.position + _MAX_NAME + 1)
        if end < 0:
            raise Refused("has a name without an end")
        text = self.text(end - self.position)
        self.position += 1
        return text

    def text(self, count: int) -> str:
        """The next bytes as UTF-8."""
        try:
            return self.take(count).decode("utf-8")
        except UnicodeDecodeError:
            raise Refused("has text that is not UTF-8") from None

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def pop(self) -> Any:
        """Take the top value, not from below a bracket."""
        if not self.stack:
            raise Refused("has a pickle that takes more than it puts")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        """The top value, which must be a `kind`."""
        value = self.stack[-1] if self.stack else None
        if not isinstance(value, kind):
            raise Refused(f"has a pickle that fills a {type(value).__name__} as a {kind.__name__}")
        return value

    def bracket(self) -> list[Any]:
        """All values since the last mark, taken together with it."""
        if not self.outer:
            raise Refused("has a pickle that closes more than it opens")
        values, self.stack = self.stack, self.outer.pop()
        return values

    def last(self, count: int) -> list[Any]:
        """The top values, taken."""
        return [self.pop() for _ in range(count)][::-1]

    def remember(self, index: int) -> None:
        """Note the top value in the memo."""
        if not self.stack:
            raise Refused("has a pickle that takes more than it puts")
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        """Put a value of the memo on the stack."""
        if index not in self.memo:
            raise Refused(f"has a pickle that recalls what it never noted (memo {index})")
        self.push(self.memo[index])

    def fill(self, pairs: list[Any]) -> None:
        """Set items of the dict on top.

        Other keys than text never name a tensor and are dropped: hashing them could take forever.
        """
        target = self.top(dict)
        if len(pairs) % 2:
            raise Refused("has a dict with a key but no value")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) is str:
                target[key] = value


# Structure


@_op(b"\x80")
def _proto(m: _Machine) -> None:
    version = m.byte()
    if not 2 <= version <= 5:
        raise Refused(f"has a pickle of protocol {version}; expected 2 to 5")


@_op(b"\x95")
def _frame(m: _Machine) -> None:
    size = m.number("<Q")
    if size > len(m.data) - m.position:
        m.need(m.position + size)


@_op(b"(")
def _mark(m: _Machine) -> None:
    if len(m.outer) >= MAX_MARKS:
        raise Refused(f"has a pickle nested deeper than {MAX_MARKS}")
    m.outer.append(m.stack)
    m.stack = []


@_op(b"0")
def _pop(m: _Machine) -> None:
    m.pop()


@_op(b"1")
def _pop_mark(m: _Machine) -> None:
    m.bracket()


# The memo

_op(b"q")(lambda m: m.remember(m.byte()))
_op(b"r")(lambda m: m.remember(m.number("<I")))
_op(b"\x94")(lambda m: m.remember(len(m.memo)))
_op(b"h")(lambda m: m.recall(m.byte()))
_op(b"j")(lambda m: m.recall(m.number("<I")))

# Atoms

_op(b"N")(lambda m: m.push(None))
_op(b"\x88")(lambda m: m.push(True))
_op(b"\x89")(lambda m: m.push(False))
_op(b"J")(lambda m: m.push(m.number("<i")))
_op(b"K")(lambda m: m.push(m.byte()))
_op(b"M")(lambda m: m.push(m.number("<H")))
_op(b"\x8a")(lambda m: m.push(int.from_bytes(m.take(m.byte()), "little", signed=True)))
_op(b"G")(lambda m: m.push(m.number(">d")))
_op(b"X")(lambda m: m.push(m.text(m.number("<I"))))
_op(b"\x8c")(lambda m: m.push(m.text(m.byte())))
_op(b"\x8d")(lambda m: m.push(m.text(m.number("<Q"))))
_op(b"U")(lambda m: m.push(m.text(m.byte())))  # Python 2's str
_op(b"B")(lambda m: m.push(m.take(m.number("<I"))))
_op(b"C")(lambda m: m.push(m.take(m.byte())))
_op(b"\x8e")(lambda m: m.push(m.take(m.number("<Q"))))

# Containers

_SET, _FROZENSET, _BYTEARRAY = map(Opaque, ("set", "frozenset", "bytearray"))
_op(b")")(lambda m: m.push(()))
_op(b"\x85")(lambda m: m.push(tuple(m.last(1))))
_op(b"\x86")(lambda m: m.push(tuple(m.last(2))))
_op(b"\x87")(lambda m: m.push(tuple(m.last(3))))
_op(b"t")(lambda m: m.push(tuple(m.bracket())))
_op(b"]")(lambda m: m.push([]))
_op(b"l")(lambda m: m.push(m.bracket()))
_op(b"}")(lambda m: m.push({}))
_op(b"\x8f")(lambda m: m.push(_SET))
_op(b"s")(lambda m: m.fill(m.last(2)))
_op(b"u")(lambda m: m.fill(m.bracket()))


@_op(b"\x96")
def _bytearray(m: _Machine) -> None:
    m.take(m.number("<Q"))
    m.push(_BYTEARRAY)


@_op(b"a")
def _append(m: _Machine) -> None:
    value = m.pop()
    m.top(list).append(value)


@_op(b"e")
def _appends(m: _Machine) -> None:
    values = m.bracket()
    m.top(list).extend(values)


@_op(b"\x90")
def _additems(m: _Machine) -> None:
    m.bracket()
    m.top(Opaque)


@_op(b"\x91")
def _frozenset(m: _Machine) -> None:
    m.bracket()
    m.push(_FROZENSET)


# Where a pickle could do harm


@_op(b"c")
def _read_global(m: _Machine) -> None:
    module = m.line()
    m.push(find_global(module, m.line()))


@_op(b"\x93")
def _stack_global(m: _Machine) -> None:
    module, name = m.last(2)
    if type(module) is not str or type(name) is not str:
        raise Refused("names a global by something that is not text")
    m.push(find_global(module, name))


@_op(b"R")
def _reduce(m: _Machine) -> None:
    function, args = m.last(2)
    if not isinstance(function, Global) or function.kind != "call":
        raise Refused(f"calls {said(function)}, which is nothing to call")
    m.calls += 1
    if m.calls > MAX_CALLS:
        raise Refused(f"has a pickle of more than {MAX_CALLS} calls")
    m.push(called(function, args))


@_op(b"b")
def _build(m: _Machine) -> None:
    """Attributes of a state dict (its `_metadata`) are of no use to us."""
    m.pop()
    m.top(OrderedDict)


@_op(b"Q")
def _persistent(m: _Machine) -> None:
    """`("storage", class, key, location, numel)`: the only persistent id of torch.save."""
    value = m.pop()
    match value if type(value) is tuple else None:
        case ("storage", Global(kind="storage") as kind, str(key), str(), int(numel)) if (
            is_count(numel) and m.views is None
        ):
            m.push(Storage(key, kind.dtype, numel))
        case ("storage", Global(kind="storage") as kind, str(key), str(), int(numel), part) if (
            is_count(numel) and m.views is not None
        ):
            m.push(_viewed(m.views, key, View(kind.dtype, numel), part))
        case _:
            raise Refused(f"has a malformed storage, {said(value)}")


def _viewed(views: dict[str, View], key: str, whole: View, part: Any) -> Storage:
    """Note a whole storage, and the part of it that is meant: `None` or `(key, offset, numel)`."""
    found = [(key, whole)]
    if part is not None:
        match part:
            case (str(name), int(offset), int(numel)) if is_count(offset) and is_count(numel):
                found.append((name, View(whole.dtype, numel, key, offset)))
            case other:
                raise Refused(f"has a malformed view of a storage, {said(other)}")
        if offset + numel > whole.numel:
            raise Refused(f"has a view of a storage that reaches beyond it ({short(name)})")
    for name, view in found:
        if views.setdefault(name, view) != view:
            raise Refused(f"describes storage {short(name)} in two ways")
    name, view = found[-1]
    return Storage(name, view.dtype, view.numel)
