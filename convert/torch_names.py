"""What a PyTorch pickle may name, and the inert records that stand for what it would have built.

An allow-list: names of storages, dtypes, classes, and of the calls by which `torch.save` rebuilds
tensors. Each call has a function here that checks the arguments and returns a record; none of them
calls, imports or looks up anything. `pickle_reader` is the machine that uses the list.

A small pickle can describe an endless value (lists of the same list, tuples a million deep), so
nothing here may walk one: no `repr`, `==`, `hash` or copy of a value from the file but text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jax_encdec.convert.tensor_source import MAX_DIMS, is_count, short


class Refused(Exception):
    """Why a pickle is not read; the file's name goes before."""


# Records -----------------------------------------------------------------------------------------


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

    __slots__ = ()


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """An allowed name: a storage class or dtype, a call that we know, or a constant."""

    name: str
    kind: str  # "storage", "dtype", "call", "constant"
    dtype: np.dtype | None = None


# Names -----------------------------------------------------------------------------------------


def _known(kind: str, module: str, dtypes: dict[str, Any]) -> dict[tuple[str, str], Global]:
    return {
        (module, name): Global(f"{module}.{name}", kind, None if d is None else np.dtype(d))
        for name, d in dtypes.items()
    }


STORAGES: dict[str, Any] = {
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
_GLOBALS: dict[tuple[str, str], Global] = {
    **_known("storage", "torch", STORAGES),
    **_known("storage", "torch.storage", {"UntypedStorage": None}),
    **_known("dtype", "torch", _TORCH_DTYPES),
    **_known("constant", "torch", {"Tensor": None}),
    **_known("constant", "torch.nn.parameter", {"Parameter": None}),
}


def said(value: Any) -> str:
    """Name a value in an error message without walking into it."""
    return value.name if isinstance(value, Global) else f"a {type(value).__name__}"


# Calls: from (name, arguments) to a record. None of them calls, imports or looks up anything.


def _ordered_dict(*args: Any) -> OrderedDict:
    if args:
        raise Refused("has an OrderedDict built from arguments, which torch.save does not write")
    return OrderedDict()


def _counts(value: Any) -> bool:
    # A long tuple, recalled from the memo for call after call, would be walked each time.
    if type(value) is not tuple:
        return False
    if len(value) > MAX_DIMS:
        raise Refused(f"has a tensor of {len(value)} dimensions; at most {MAX_DIMS} are supported")
    return all(map(is_count, value))


def _tensor(*args: Any) -> Tensor | Opaque:
    """`_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata=None)`."""
    dtype = args[0].dtype if isinstance(args[0], Storage) else None
    return _view(args, dtype, args[6] if len(args) > 6 else None)


def _tensor_of_dtype(*args: Any) -> Tensor | Opaque:
    """`_rebuild_tensor_v3(..., hooks, dtype, metadata=None)`: a view of untyped bytes."""
    dtype = args[6]
    if not isinstance(dtype, Global) or dtype.kind != "dtype":
        raise Refused(f"has a tensor of dtype {said(dtype)}")
    if dtype.dtype is None:
        return Opaque("tensor", f"has dtype {dtype.name}, which is not supported")
    return _view(args, dtype.dtype, args[7] if len(args) > 7 else None)


def _view(args: tuple[Any, ...], dtype: np.dtype | None, metadata: Any) -> Tensor | Opaque:
    storage, offset, shape, strides = args[:4]
    if not isinstance(storage, Storage) or dtype is None:
        raise Refused(f"has a tensor without a storage; got {said(storage)}")
    if not (is_count(offset) and _counts(shape) and _counts(strides)):
        raise Refused("has a tensor whose offset, shape or strides are not integers from zero up")
    if len(shape) != len(strides):
        raise Refused(f"has a tensor with {len(shape)} dimensions and {len(strides)} strides")
    if isinstance(metadata, dict) and (len(metadata) > 2 or any(metadata.values())):
        # Set on views that PyTorch negates or conjugates when they are next used.
        return Opaque("tensor", "is a view with a pending negation or conjugation")
    return Tensor(storage, dtype, offset, shape, strides)


def _parameter(*args: Any) -> Tensor | Opaque:
    if not isinstance(args[0], Tensor | Opaque):
        raise Refused(f"has a parameter that is no tensor but {said(args[0])}")
    return args[0]


def _from_type(*args: Any) -> Any:
    """`_rebuild_from_type_v2(rebuild, class, arguments, state)`: tensors with attributes."""
    function, kind, inner = args[:3]
    if not isinstance(kind, Global) or kind.kind != "constant":
        raise Refused(f"has a tensor of class {said(kind)}")
    if not isinstance(function, Global) or function.name not in _TENSOR_CALLS:
        raise Refused(f"rebuilds a tensor by {said(function)}")
    return called(function, inner)


def _size(*args: Any) -> tuple[int, ...]:
    if not _counts(args[0]):
        raise Refused("has a torch.Size that is not integers from zero up")
    return args[0]


def _opaque(kind: str, problem: str | None = None) -> Callable[..., Opaque]:
    value = Opaque(kind, problem)
    return lambda *_: value


_SPARSE = "is sparse, which is not supported"
_META = "was saved from the meta device and has no numbers"
# module, name, fewest arguments, most arguments, record
_CALLS: dict[Global, tuple[int, int, Callable[..., Any]]] = {}
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
    _marker = Global(f"{_module}.{_name}", "call")
    _GLOBALS[_module, _name] = _marker
    _CALLS[_marker] = (_fewest, _most, _record)
_TENSOR_CALLS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3")


def find_global(module: str, name: str) -> Global:
    """The marker of an allowed name.

    Raises:
        Refused: any other.
    """
    found = _GLOBALS.get((module, name))
    if found is None:
        raise Refused(
            f"names {short(f'{module}.{name}')}, which is not part of a state dict and was not "
            f"loaded; save model.state_dict() or safetensors instead"
        )
    return found


def called(function: Global, args: Any) -> Any:
    """The record of an allowed call.

    Raises:
        Refused: the arguments are not those that `torch.save` writes.
    """
    fewest, most, record = _CALLS[function]
    if type(args) is not tuple or not fewest <= len(args) <= most:
        raise Refused(f"has malformed arguments of {function.name}")
    return record(*args)
