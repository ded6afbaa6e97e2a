"""The pickles inside PyTorch checkpoints, read without running them.

A pickle is a program for a small stack machine, and Python's own machine calls whatever the
program names. This one interprets an allow-list of opcodes over an allow-list of names, and calls
nothing: a name becomes an inert marker, and REDUCE on a marker builds one of the records below.
Anything else is refused. Results are None, bool, int, float, str, bytes, tuple, list, `dict` with
text keys, `Storage`, `Tensor`, `Opaque` and markers; no other object can come out.

A small pickle can describe an endless value (lists of the same list, tuples a million deep), so
nothing here may walk one: no `repr`, `==`, `hash` or copy of a value from the file but text.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jax_encdec.convert.tensor_source import is_count, short
from jax_encdec.errors import CheckpointError

MAX_BYTES = 1 << 26
"""Largest pickle: it names and describes tensors, some 200 bytes each, and holds no numbers."""
MAX_OPCODES = 4_000_000
"""About 35 are used for a tensor. Bounds stack, memo and everything built, a few hundred MB."""
MAX_MARKS = 100
"""Depth of open brackets; a state dict needs five."""
_MAX_NAME = 200
"""Characters of a global's module or name."""


@dataclass(frozen=True, slots=True)
class Opaque:
    """A value of no interest; `problem` says why, if it is a tensor that cannot be read."""

    kind: str
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Storage:
    """A block of numbers that lies elsewhere in the file."""

    key: str
    dtype: np.dtype | None  # None: untyped bytes
    numel: int  # of dtype, or bytes


@dataclass(frozen=True, slots=True)
class Tensor:
    """A view of a storage; offset and strides count elements of `dtype`."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class OrderedDict(dict):
    """What `collections.OrderedDict` becomes: the one kind of value that BUILD may follow."""


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
    try:
        return machine.run(), machine.position
    except _Refused as error:
        raise CheckpointError(f"{where} {error}") from None


# Names -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Global:
    """An allowed name: a storage class or dtype, a call that we know, or a constant."""

    name: str
    kind: str  # "storage", "dtype", "call", "constant"
    dtype: np.dtype | None = None


def _known(kind: str, module: str, dtypes: dict[str, Any]) -> dict[tuple[str, str], _Global]:
    return {
        (module, name): _Global(f"{module}.{name}", kind, None if d is None else np.dtype(d))
        for name, d in dtypes.items()
    }


_STORAGES: dict[str, Any] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
}
_TORCH_DTYPES: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
    "complex64": np.complex64,
    "complex128": np.complex128,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
    # Known, so that the error can name the tensor.
    "float4_e2m1fn_x2": None,
    "complex32": None,
}
_GLOBALS: dict[tuple[str, str], _Global] = {
    **_known("storage", "torch", _STORAGES),
    **_known("storage", "torch.storage", {"UntypedStorage": None}),
    **_known("dtype", "torch", _TORCH_DTYPES),
    **_known("constant", "torch", {"Tensor": None}),
    **_known("constant", "torch.nn.parameter", {"Parameter": None}),
}


class _Refused(Exception):
    """Why a pickle is not read; the file's name goes before."""


def _said(value: Any) -> str:
    """A value in an error message, without walking into it."""
    return value.name if isinstance(value, _Global) else f"a {type(value).__name__}"


# Calls: from (name, arguments) to a record. None of them calls, imports or looks up anything.


def _ordered_dict(*args: Any) -> OrderedDict:
    if args:
        raise _Refused("has an OrderedDict built from arguments, which torch.save does not write")
    return OrderedDict()


def _counts(value: Any) -> bool:
    return type(value) is tuple and all(map(is_count, value))


def _tensor(*args: Any) -> Tensor | Opaque:
    """`_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata=None)`."""
    storage, dtype, metadata = args[0], None, args[6] if len(args) > 6 else None
    if isinstance(storage, Storage):
        dtype = storage.dtype
    return _view(args, dtype, metadata)


def _tensor_of_dtype(*args: Any) -> Tensor | Opaque:
    """`_rebuild_tensor_v3(..., hooks, dtype, metadata=None)`: a view of untyped bytes."""
    dtype = args[6]
    if not isinstance(dtype, _Global) or dtype.kind != "dtype":
        raise _Refused(f"has a tensor of dtype {_said(dtype)}")
    if dtype.dtype is None:
        return Opaque("tensor", f"has dtype {dtype.name}, which is not supported")
    return _view(args, dtype.dtype, args[7] if len(args) > 7 else None)


def _view(args: tuple[Any, ...], dtype: np.dtype | None, metadata: Any) -> Tensor | Opaque:
    storage, offset, shape, strides = args[:4]
    if not isinstance(storage, Storage) or dtype is None:
        raise _Refused(f"has a tensor without a storage; got {_said(storage)}")
    if not (is_count(offset) and _counts(shape) and _counts(strides)):
        raise _Refused("has a tensor whose offset, shape or strides are not integers from zero up")
    if len(shape) != len(strides):
        raise _Refused(f"has a tensor with {len(shape)} dimensions and {len(strides)} strides")
    if isinstance(metadata, dict) and any(metadata.values()):
        # Set on views that PyTorch negates or conjugates when they are next used.
        return Opaque("tensor", "is a view with a pending negation or conjugation")
    return Tensor(storage, dtype, offset, shape, strides)


def _parameter(*args: Any) -> Tensor | Opaque:
    if not isinstance(args[0], Tensor | Opaque):
        raise _Refused(f"has a parameter that is no tensor but {_said(args[0])}")
    return args[0]


def _from_type(*args: Any) -> Any:
    """`_rebuild_from_type_v2(rebuild, class, arguments, state)`: tensors with attributes."""
    function, kind, inner = args[:3]
    if not isinstance(kind, _Global) or kind.kind != "constant":
        raise _Refused(f"has a tensor of class {_said(kind)}")
    if not isinstance(function, _Global) or function.name not in _TENSOR_CALLS:
        raise _Refused(f"rebuilds a tensor by {_said(function)}")
    return _called(function, inner)


def _size(*args: Any) -> tuple[int, ...]:
    if not _counts(args[0]):
        raise _Refused("has a torch.Size that is not integers from zero up")
    return args[0]


def _opaque(kind: str, problem: str | None = None) -> Callable[..., Opaque]:
    value = Opaque(kind, problem)
    return lambda *_: value


_SPARSE = "is sparse, which is not supported"
_META = "was saved from the meta device and has no numbers"
# module, name, fewest arguments, most arguments, record
_CALLS: dict[_Global, tuple[int, int, Callable[..., Any]]] = {}
for _module, _name, _fewest, _most, _record in (
    ("collections", "OrderedDict", 0, 1, _ordered_dict),
    ("torch._utils", "_rebuild_tensor_v2", 6, 7, _tensor),
    ("torch._utils", "_rebuild_tensor_v3", 7, 8, _tensor_of_dtype),
    ("torch._utils", "_rebuild_parameter", 3, 3, _parameter),
    ("torch._utils", "_rebuild_parameter_with_state", 4, 4, _parameter),
    ("torch._tensor", "_rebuild_from_type_v2", 4, 4, _from_type),
    ("torch._utils", "_rebuild_sparse_tensor", 2, 2, _opaque("tensor", _SPARSE)),
    ("torch._utils", "_rebuild_meta_tensor_no_storage", 4, 4, _opaque("tensor", _META)),
    ("torch.serialization", "_get_layout", 1, 1, _opaque("torch.layout")),
    ("torch", "Size", 1, 1, _size),
    ("torch", "device", 1, 2, _opaque("torch.device")),
    ("_codecs", "encode", 1, 2, _opaque("bytes")),
    *((m, "bytes", 0, 2, _opaque("bytes")) for m in ("builtins", "__builtin__")),
    *((m, "bytearray", 0, 2, _opaque("bytearray")) for m in ("builtins", "__builtin__")),
    *((m, "set", 0, 1, _opaque("set")) for m in ("builtins", "__builtin__")),
    *((m, "complex", 1, 2, _opaque("complex")) for m in ("builtins", "__builtin__")),
):
    _marker = _Global(f"{_module}.{_name}", "call")
    _GLOBALS[_module, _name] = _marker
    _CALLS[_marker] = (_fewest, _most, _record)
_TENSOR_CALLS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")


def _global(module: str, name: str) -> _Global:
    found = _GLOBALS.get((module, name))
    if found is None:
        raise _Refused(
            f"names {short(f'{module}.{name}')}, which is not part of a state dict and was not "
            f"loaded; save model.state_dict() or safetensors instead"
        )
    return found


def _called(function: _Global, args: Any) -> Any:
    fewest, most, record = _CALLS[function]
    if type(args) is not tuple or not fewest <= len(args) <= most:
        raise _Refused(f"has malformed arguments of {function.name}")
    return record(*args)


# The machine -------------------------------------------------------------------------------------

_OPS: dict[int, Callable[[_Machine], None]] = {}


def _op(code: bytes) -> Callable[[Callable[[_Machine], None]], Callable[[_Machine], None]]:
    def register(method: Callable[[_Machine], None]) -> Callable[[_Machine], None]:
        _OPS[code[0]] = method
        return method

    return register


@dataclass
class _Machine:
    """Data, a position in it, a stack of open brackets (each a stack of values), and a memo."""

    data: bytes
    position: int

    def run(self) -> Any:
        """Interpret up to STOP and return the top of the stack."""
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        for _ in range(MAX_OPCODES):
            code = self.take(1)[0]
            if code == 0x2E:  # STOP
                return self.pop()
            operation = _OPS.get(code)
            if operation is None:
                raise _Refused(
                    f"uses pickle opcode 0x{code:02x} at byte {self.position - 1}, which "
                    f"state dicts do not need"
                )
            operation(self)
        raise _Refused(f"has a pickle of more than {MAX_OPCODES} steps")

    def take(self, count: int) -> bytes:
        """The next bytes."""
        end = self.position + count
        if end > len(self.data):
            raise _Refused("has a pickle that ends too early")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def number(self, layout: str) -> Any:
        """The next bytes as a number, in `struct`'s notation."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        """Text up to a line break, as GLOBAL has it."""
        end = self.data.find(b"\n", self.position, self.position + _MAX_NAME + 1)
        if end < 0:
            raise _Refused("has a name without an end")
        text = self.text(end - self.position)
        self.position += 1
        return text

    def text(self, count: int) -> str:
        """The next bytes as UTF-8."""
        try:
            return self.take(count).decode("utf-8")
        except UnicodeDecodeError:
            raise _Refused("has text that is not UTF-8") from None

    def push(self, value: Any) -> None:
        """Put a value on the stack."""
        self.stack.append(value)

    def pop(self) -> Any:
        """Take the top value, not from below a bracket."""
        if not self.stack:
            raise _Refused("has a pickle that takes more than it puts")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        """The top value, which must be a `kind`."""
        value = self.stack[-1] if self.stack else None
        if not isinstance(value, kind):
            raise _Refused(f"has a pickle that fills a {type(value).__name__} as a {kind.__name__}")
        return value

    def bracket(self) -> list[Any]:
        """All values since the last mark, taken together with it."""
        if not self.outer:
            raise _Refused("has a pickle that closes more than it opens")
        values, self.stack = self.stack, self.outer.pop()
        return values

    def last(self, count: int) -> list[Any]:
        """The top values, taken."""
        return [self.pop() for _ in range(count)][::-1]

    def remember(self, index: int) -> None:
        """Note the top value in the memo."""
        if not self.stack:
            raise _Refused("has a pickle that takes more than it puts")
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        """Put a value of the memo on the stack."""
        if index not in self.memo:
            raise _Refused(f"has a pickle that recalls what it never noted (memo {index})")
        self.push(self.memo[index])

    def fill(self, pairs: list[Any]) -> None:
        """Set items of the dict on top.

        Other keys than text never name a tensor and are dropped: hashing them could take forever.
        """
        target = self.top(dict)
        if len(pairs) % 2:
            raise _Refused("has a dict with a key but no value")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) is str:
                target[key] = value


# Structure


@_op(b"\x80")
def _proto(m: _Machine) -> None:
    version = m.number("B")
    if not 2 <= version <= 5:
        raise _Refused(f"has a pickle of protocol {version}; expected 2 to 5")


@_op(b"\x95")
def _frame(m: _Machine) -> None:
    if m.number("<Q") > len(m.data) - m.position:
        raise _Refused("has a pickle that ends too early")


@_op(b"(")
def _mark(m: _Machine) -> None:
    if len(m.outer) >= MAX_MARKS:
        raise _Refused(f"has a pickle nested deeper than {MAX_MARKS}")
    m.outer.append(m.stack)
    m.stack = []


@_op(b"0")
def _pop(m: _Machine) -> None:
    m.pop()


@_op(b"1")
def _pop_mark(m: _Machine) -> None:
    m.bracket()


# The memo

_op(b"q")(lambda m: m.remember(m.number("B")))
_op(b"r")(lambda m: m.remember(m.number("<I")))
_op(b"\x94")(lambda m: m.remember(len(m.memo)))
_op(b"h")(lambda m: m.recall(m.number("B")))
_op(b"j")(lambda m: m.recall(m.number("<I")))

# Atoms

_op(b"N")(lambda m: m.push(None))
_op(b"\x88")(lambda m: m.push(True))
_op(b"\x89")(lambda m: m.push(False))
_op(b"J")(lambda m: m.push(m.number("<i")))
_op(b"K")(lambda m: m.push(m.number("B")))
_op(b"M")(lambda m: m.push(m.number("<H")))
_op(b"\x8a")(lambda m: m.push(int.from_bytes(m.take(m.number("B")), "little", signed=True)))
_op(b"G")(lambda m: m.push(m.number(">d")))
_op(b"X")(lambda m: m.push(m.text(m.number("<I"))))
_op(b"\x8c")(lambda m: m.push(m.text(m.number("B"))))
_op(b"\x8d")(lambda m: m.push(m.text(m.number("<Q"))))
_op(b"U")(lambda m: m.push(m.text(m.number("B"))))  # Python 2's str
_op(b"B")(lambda m: m.push(m.take(m.number("<I"))))
_op(b"C")(lambda m: m.push(m.take(m.number("B"))))
_op(b"\x8e")(lambda m: m.push(m.take(m.number("<Q"))))

# Containers

_op(b")")(lambda m: m.push(()))
_op(b"\x85")(lambda m: m.push(tuple(m.last(1))))
_op(b"\x86")(lambda m: m.push(tuple(m.last(2))))
_op(b"\x87")(lambda m: m.push(tuple(m.last(3))))
_op(b"t")(lambda m: m.push(tuple(m.bracket())))
_op(b"]")(lambda m: m.push([]))
_op(b"l")(lambda m: m.push(m.bracket()))
_op(b"}")(lambda m: m.push({}))
_op(b"\x8f")(lambda m: m.push(Opaque("set")))
_op(b"s")(lambda m: m.fill(m.last(2)))
_op(b"u")(lambda m: m.fill(m.bracket()))


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
    m.push(Opaque("frozenset"))


# Where a pickle could do harm


@_op(b"c")
def _read_global(m: _Machine) -> None:
    module = m.line()
    m.push(_global(module, m.line()))


@_op(b"\x93")
def _stack_global(m: _Machine) -> None:
    module, name = m.last(2)
    if type(module) is not str or type(name) is not str:
        raise _Refused("names a global by something that is not text")
    m.push(_global(module, name))


@_op(b"R")
def _reduce(m: _Machine) -> None:
    function, args = m.last(2)
    if not isinstance(function, _Global) or function.kind != "call":
        raise _Refused(f"calls {_said(function)}, which is nothing to call")
    m.push(_called(function, args))


@_op(b"b")
def _build(m: _Machine) -> None:
    """Attributes of a state dict (its `_metadata`) are of no use to us."""
    m.pop()
    m.top(OrderedDict)


@_op(b"Q")
def _persistent(m: _Machine) -> None:
    """`("storage", class, key, location, numel)`: the only persistent id of torch.save."""
    match m.pop():
        case ("storage", _Global(kind="storage") as kind, str(key), str(), int(numel)) if is_count(
            numel
        ):
            m.push(Storage(key, kind.dtype, numel))
        case other:
            raise _Refused(f"has a malformed storage, {_said(other)}")
