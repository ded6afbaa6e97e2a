"""Crafted pickles: each is put into an otherwise complete checkpoint, by hand-made opcodes.

`ENTRIES` are values beside the model's tensors, `STREAMS` replace the whole pickle, `TENSORS` are
tensors that lie about themselves. Of the first, those in `EXECUTE` really run something under
Python's own pickle: that is tested, too. The text beside an attack is a part of its refusal.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Mapping

import numpy as np

Storages = dict[str, bytes]


# A small assembler -------------------------------------------------------------------------------


def text(value: str) -> bytes:
    """BINUNICODE."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """LONG1."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def octets(data: bytes) -> bytes:
    """BINBYTES."""
    return b"B" + struct.pack("<I", len(data)) + data


def tuple_of(*items: bytes) -> bytes:
    """MARK ... TUPLE."""
    return b"(" + b"".join(items) + b"t"


def name(module: str, attribute: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{attribute}\n".encode()


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
    """GLOBAL, its arguments, REDUCE."""
    return name(module, attribute) + tuple_of(*arguments) + b"R"


def storage(key: str, numel: int, kind: str = "FloatStorage") -> bytes:
    """The persistent id of a storage."""
    parts = text("storage"), name("torch", kind), text(key), text("cpu"), number(numel)
    return tuple_of(*parts) + b"Q"


HOOKS = b"\x89" + name("collections", "OrderedDict") + b")R"


def tensor(
    held: bytes,
    shape: tuple[int, ...] | bytes,
    strides: tuple[int, ...] | bytes | None = None,
    offset: bytes = b"K\x00",
) -> bytes:
    """A call of `_rebuild_tensor_v2`."""
    if strides is None:
        assert isinstance(shape, tuple)
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    dims, steps = (
        tuple_of(*map(number, n)) if isinstance(n, tuple) else n for n in (shape, strides)
    )
    return call("torch._utils", "_rebuild_tensor_v2", held, offset, dims, steps, HOOKS)


def model(tensors: Mapping[str, np.ndarray], *extra: bytes) -> tuple[bytes, Storages]:
    """The pickle of a state dict, `extra` items first, and its storages."""
    items, storages = list(extra), {}
    for i, (title, array) in enumerate(tensors.items()):
        storages[str(i)] = array.astype(np.float32).tobytes()
        items += [text(title), tensor(storage(str(i), array.size), array.shape)]
    return b"\x80\x02}(" + b"".join(items) + b"u.", storages


def zipped(pickled: bytes, storages: Storages) -> bytes:
    """What torch.save writes since 1.6."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return file.getvalue()


def legacy(pickled: bytes, storages: Storages) -> bytes:
    """What torch.save wrote before: five pickles, then each storage behind its length."""
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    system = b"\x80\x02}(" + text("little_endian") + b"\x88u."
    keys = b"\x80\x02](" + b"".join(map(text, storages)) + b"e."
    blocks = b"".join(struct.pack("<q", len(d) // 4) + d for d in storages.values())
    # There, a storage's persistent id has one member more: what it is a view of.
    pickled = pickled.replace(b"tQ", b"NtQ")
    return magic + b"\x80\x02M\xe9\x03." + system + pickled + keys + blocks


# Attacks -----------------------------------------------------------------------------------------

TOUCH = text("touch executed")
SYSTEM = call("os", "system", TOUCH)
NOT_LOADED, NOT_NEEDED = "was not loaded", "which state dicts do not need"

EXECUTE: dict[str, bytes] = {
    "os.system": SYSTEM,
    "posix.system": call("posix", "system", TOUCH),
    "subprocess.check_output": call("subprocess", "check_output", tuple_of(text("true"))),
    "builtins.eval": call("builtins", "eval", text("__import__('os').mkdir('executed')")),
    "builtins.exec": call("builtins", "exec", text("import os; os.mkdir('executed')")),
    "builtins.open": call("builtins", "open", text("executed"), text("w")),
    "builtins.__import__": call("builtins", "__import__", text("this")),
    "Python 2's __builtin__": call("__builtin__", "eval", text("__import__('this')")),
    "importlib.import_module": call("importlib", "import_module", text("this")),
    "import by naming": name("this", "s"),
    "runpy": call("runpy", "run_module", text("this")),
    "socket": call("socket", "socket"),
    "pickle in a pickle": call(
        "pickle", "loads", octets(call("os", "mkdir", text("executed")) + b".")
    ),
    "a shell through pty": call("pty", "spawn", text("true")),
    "numpy's eval": call(
        "numpy.f2py.crackfortran", "myeval", text("__import__('os').mkdir('executed')")
    ),
    "timeit": call("timeit", "timeit", text("1"), text("import os; os.mkdir('executed')")),
    "nested reduce": call("os", "mkdir", call("os.path", "join", text(""), text("executed"))),
    "reduce of a reduced callable": call(
        "operator", "methodcaller", text("mkdir"), text("executed")
    )
    + tuple_of(call("importlib", "import_module", text("os")))
    + b"R",
    "partial": call("functools", "partial", name("os", "mkdir"), text("executed")) + b")R",
    "getattr chain": call(
        "builtins", "getattr", call("builtins", "__import__", text("os")), text("mkdir")
    )
    + tuple_of(text("executed"))
    + b"R",
    "map": call(
        "builtins", "list", call("builtins", "map", name("os", "mkdir"), tuple_of(text("executed")))
    ),
    "stack global": text("os") + text("mkdir") + b"\x93" + tuple_of(text("executed")) + b"R",
    "inst": b"(" + TOUCH + b"ios\nsystem\n",
    "obj": b"(" + name("os", "system") + TOUCH + b"o",
    "newobj": name("mmap", "mmap") + tuple_of(number(-1), number(4096)) + b"\x81",
    "newobj_ex": name("mmap", "mmap") + tuple_of(number(-1), number(4096)) + b"}\x92",
    "build calls __setstate__": call("functools", "partial", name("os", "mkdir"))
    + tuple_of(name("os", "mkdir"), tuple_of(text("executed")), b"}", b"N")
    + b"b)R",
    "as a key of a dict": b"}" + SYSTEM + b"K\x01s",
    "in a list": b"](" + SYSTEM + b"e",
    "below what stays": SYSTEM + b"0N",
}
"""Each runs, writes, connects or imports something when Python's own pickle reads it."""

PERSISTENT = "malformed storage"
ENTRIES: dict[str, tuple[bytes, str]] = {
    **{what: (code, f"{NOT_LOADED}|{NOT_NEEDED}") for what, code in EXECUTE.items()},
    "as a tensor's storage": (tensor(SYSTEM, (1,)), NOT_LOADED),
    "as a tensor's offset": (tensor(b"N", (1,), offset=SYSTEM), NOT_LOADED),
    "as a tensor's shape": (tensor(b"N", SYSTEM, b")"), NOT_LOADED),
    "as a tensor's hooks": (tensor(b"N", (1,)).replace(HOOKS, b"\x89" + SYSTEM), NOT_LOADED),
    "through rebuild_from_type": (
        call(
            "torch._tensor",
            "_rebuild_from_type_v2",
            name("os", "system"),
            name("torch", "Tensor"),
            tuple_of(TOUCH),
            b"}",
        ),
        NOT_LOADED,
    ),
    "torch.load": (call("torch.serialization", "load", text("x")), NOT_LOADED),
    "torch.storage._load_from_bytes": (
        call("torch.storage", "_load_from_bytes", b"C\x01x"),
        NOT_LOADED,
    ),
    "torch.hub.load": (call("torch.hub", "load", text("a/b"), text("c")), NOT_LOADED),
    "torch.jit": (call("torch.jit", "load", text("x")), NOT_LOADED),
    "a module of torch.nn": (name("torch.nn.modules.linear", "Linear") + b")\x81}b", NOT_LOADED),
    "dotted name": (text("torch") + text("os.system") + b"\x93", NOT_LOADED),
    "dotted dunder": (name("torch._utils", "_rebuild_tensor_v2.__globals__"), NOT_LOADED),
    "dunder of a builtin": (name("builtins", "bytes.__class__"), NOT_LOADED),
    "name of a lookalike": (text("t\u043erch") + text("FloatStorage") + b"\x93", NOT_LOADED),
    "name with a space": (text("torch ") + text("FloatStorage") + b"\x93", NOT_LOADED),
    "name as bytes": (b"C\x02osC\x06system\x93", "not text"),
    "name as a list": (b"]" + text("system") + b"\x93", "not text"),
    "name without an end": (b"c" + b"os" * 10_000, "without an end"),
    "name that is not UTF-8": (b"cos\xff\nsystem\n", "not UTF-8"),
    "extension 1": (b"\x82\x01", NOT_NEEDED),
    "extension 2": (b"\x83\x01\x02", NOT_NEEDED),
    "extension 4": (b"\x84\x01\x02\x03\x04", NOT_NEEDED),
    "newobj of an allowed class": (name("collections", "OrderedDict") + b")\x81", NOT_NEEDED),
    "next buffer": (b"\x97", NOT_NEEDED),
    "text opcodes": (b"S'a'\n", NOT_NEEDED),
    "build on a tensor": (b"N}" + text("__class__") + b"Nsb", "fills a"),
    "build on a class": (name("torch", "Tensor") + b"}" + text("__reduce__") + b"Nsb", "fills a"),
    "build on a dict": (b"}}b", "fills a"),
    "reduce of a dtype": (name("torch", "float32") + b")R", "nothing to call"),
    "reduce of a storage class": (
        call("torch", "FloatStorage", number(1 << 62)),
        "nothing to call",
    ),
    "reduce of text": (text("os.system") + b")R", "nothing to call"),
    "reduce without a tuple": (
        name("torch._utils", "_rebuild_tensor_v2") + b"]R",
        "malformed arguments",
    ),
    "rebuild_from_type of itself": (
        name("torch._tensor", "_rebuild_from_type_v2")
        + b"q\x00"
        + tuple_of(b"h\x00", name("torch", "Tensor"), b")", b"}")
        + b"R",
        "rebuilds a tensor by",
    ),
    "ordered dict of an argument": (call("collections", "OrderedDict", b"]"), "from arguments"),
    "size of a huge list": (call("torch", "Size", b"]"), "not integers"),
    "persistent id: a number": (b"K\x01Q", PERSISTENT),
    "persistent id: None": (b"NQ", PERSISTENT),
    "persistent id: a list": (b"](" + storage("0", 1)[1:-2] + b"eQ", PERSISTENT),
    "persistent id: too short": (tuple_of(text("storage")) + b"Q", PERSISTENT),
    "persistent id: another kind": (tuple_of(text("module"), b"N", b"N", b"N") + b"Q", PERSISTENT),
    "persistent id: a class that is none": (
        storage("0", 1).replace(b"ctorch\nFloatStorage", b"ccollections\nOrderedDict"),
        PERSISTENT,
    ),
    "persistent id: a key that is a tuple": (storage("0", 1).replace(text("0"), b")"), PERSISTENT),
    "persistent id: a negative size": (storage("0", -1), PERSISTENT),
    "persistent id: a size that is text": (
        storage("0", 1).replace(number(1), text("1")),
        PERSISTENT,
    ),
    "persistent id: as text": (b"P0\n", NOT_NEEDED),
    "memo never noted": (b"h\xff", "never noted"),
    "memo beyond 2^31": (b"j\xff\xff\xff\xff", "never noted"),
    "more taken than put": (b"0" * 9, "takes more"),
    "unopened tuple": (b"t" * 9, "closes more|not a string|fills a|takes more"),
    "odd dict": (b"}(Nu", "no value"),
    "append to a number": (b"K\x01Na", "fills a"),
    "length of text 2^63": (b"\x8d" + b"\xff" * 7 + b"\x7f", "ends too early"),
    "length of bytes 2^64": (b"\x8e" + b"\xff" * 8, "ends too early"),
    "length of a bytearray 2^62": (b"\x96" + b"\xff" * 7 + b"\x3f", "ends too early"),
    "length of a frame 2^63": (b"\x95" + b"\xff" * 7 + b"\x7f", "ends too early"),
    "length of an integer 2^31": (b"\x8b\xff\xff\xff\x7f", NOT_NEEDED),
    "100,000 open brackets": (b"(" * 100_000, "nested deeper"),
}
"""Values that stand beside the model's tensors."""

_SELF = b"]q\x00h\x00a"
_DEEP = b")" + b"\x85" * 100_000
_LAUGHS = b"]q\x00" + b"".join(
    b"](" + bytes([0x68, i]) * 10 + b"eq" + bytes([i + 1]) for i in range(100)
)
_ROOT = "state dict|tensors"

STREAMS: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "nothing": (b"", "ends too early"),
    "stop alone": (b".", "takes more"),
    "no stop": (b"\x80\x02}", "ends too early"),
    "protocol 0": (b"(dp0\nS'a'\np1\ncos\nsystem\n(S'touch executed'\ntRs.", NOT_NEEDED),
    "protocol 9": (b"\x80\x09}.", "protocol 9"),
    "a list that holds itself": (b"\x80\x02" + _SELF + b".", _ROOT),
    "a dict that holds itself": (b"\x80\x02}q\x00" + text("a") + b"h\x00s.", _ROOT),
    "a tuple 100,000 deep": (b"\x80\x02" + _DEEP + b".", _ROOT),
    "a tuple 100,000 deep, called": (b"\x80\x02" + _DEEP + b")R.", "nothing to call"),
    "a tuple 100,000 deep as a key": (b"\x80\x02}" + _DEEP + b"Ns.", _ROOT),
    "a tuple 100,000 deep as a storage": (b"\x80\x02" + _DEEP + b"Q.", PERSISTENT),
    "a tuple 100,000 deep as a name": (b"\x80\x04" + _DEEP + text("a") + b"\x93.", "not text"),
    "10^100 laughs": (b"\x80\x02" + _LAUGHS + b".", _ROOT),
    "10^100 laughs, called": (b"\x80\x02" + _LAUGHS + b")R.", "nothing to call"),
    "10^100 laughs as a shape": (
        b"\x80\x02}" + text("a") + tensor(storage("0", 1), _LAUGHS + b"\x85", b")") + b"s.",
        "not integers|malformed",
    ),
    "a second pickle after the first": (b"\x80\x02}." + SYSTEM + b".", "after the pickle's end"),
    "several stops": (b"\x80\x02}....", "after the pickle's end"),
    "a list as a key": (b"\x80\x02}]Ns.", _ROOT),
    "endless": (lambda: b"\x80\x02" + b"]0" * 8_000_000 + b"}.", "steps"),
    "millions of dicts": (lambda: b"\x80\x02" + b"}" * 8_000_000 + b".", "steps"),
    "millions of sets": (lambda: b"\x80\x02" + b"\x8f" * 8_000_000 + b".", "steps"),
    "millions of memos": (lambda: b"\x80\x04" + b"]\x94" * 8_000_000 + b".", "steps"),
    "millions of ordered dicts": (
        lambda: (
            b"\x80\x02" + name("collections", "OrderedDict") + b"q\x00" + b"h\x00)R" * 4_000_000
        ),
        "steps|calls",
    ),
    "millions of integers": (
        lambda: b"\x80\x02" + number(1 << 700) * 250_000 + b".",
        "steps|more bytes|ends|[Ss]tate dict",
    ),
    "millions of wide texts": (
        lambda: (
            b"\x80\x02](" + (b"\x8c\x12" + "\U0001f600".encode() + b"a" * 14) * 1_050_000 + b"e."
        ),
        "steps|bytes|state dict",
    ),
    "a giant pickle": (lambda: b"\x80\x02" + b"]0" * 40_000_000, "bytes"),
}
"""Whole pickles."""

_BIG = 10**12
TENSORS: dict[str, tuple[bytes, str]] = {
    "stride 0, 10^12 numbers": (
        tensor(storage("0", 1), (_BIG,), (0,)),
        "expanded|beyond its storage",
    ),
    "stride 0, 10^9 numbers": (tensor(storage("0", 1), (10**9,), (0,)), "expanded"),
    "stride 0, twice 10^6": (tensor(storage("0", 1), (10**6, 10**6), (0, 0)), "expanded"),
    "stride 0, product beyond 2^64": (
        tensor(storage("0", 1), (1 << 62, 1 << 62), (0, 0)),
        "impossible shape",
    ),
    "nothing times 2^120": (
        tensor(storage("0", 1), (0, 1 << 60, 1 << 60), (0, 0, 0)),
        "impossible shape",
    ),
    "negative shape": (tensor(storage("0", 1), (-1,), (1,)), "not integers"),
    "negative stride": (tensor(storage("0", 1), (1,), (-1,)), "not integers"),
    "negative offset": (tensor(storage("0", 1), (1,), (1,), number(-4)), "not integers"),
    "offset of 2^63": (tensor(storage("0", 1), (1,), (1,), number(1 << 63)), "beyond its storage"),
    "offset of 2^2000": (
        tensor(storage("0", 1), (1,), (1,), number(1 << 2000)),
        "beyond its storage",
    ),
    "stride of 2^2000": (tensor(storage("0", 1), (2,), (1 << 2000,)), "beyond its storage"),
    "shape of 2^2000": (tensor(storage("0", 1), (1 << 2000,), (0,)), "impossible shape"),
    "shape beyond the storage": (tensor(storage("0", 1), (_BIG,)), "beyond its storage"),
    "storage beyond its entry": (tensor(storage("0", _BIG), (_BIG,)), "storage"),
    "storage of 2^2000": (tensor(storage("0", 1 << 2000), (1,)), "storage"),
    "storage that is not there": (tensor(storage("none", 1), (1,)), "storage"),
    "storage called ../../etc/passwd": (tensor(storage("../../etc/passwd", 1), (1,)), "storage"),
    "storage called data.pkl": (tensor(storage("../data.pkl", 1), (1,)), "storage"),
    "more strides than dimensions": (
        tensor(storage("0", 2), (1,), (1, 1)),
        "1 dimensions and 2 strides",
    ),
    "70 dimensions": (tensor(storage("0", 1), (1,) * 70), "70 dimensions"),
    "a truth as a dimension": (tensor(storage("0", 1), b"\x88\x85", (1,)), "not integers"),
    "a float as a dimension": (
        tensor(storage("0", 1), b"G?\xf0\0\0\0\0\0\0\x85", (1,)),
        "not integers",
    ),
    "a list as a shape": (tensor(storage("0", 1), b"](K\x01e", (1,)), "not integers"),
    "a name as a dtype": (
        tensor(storage("0", 1), (1,))
        .replace(b"_v2", b"_v3")
        .replace(HOOKS, HOOKS + text("float32")),
        "of dtype",
    ),
    "a tensor without a storage": (tensor(b"N", (1,)), "without a storage"),
    "a parameter of a dict": (
        call("torch._utils", "_rebuild_parameter", b"}", b"\x88", b"N"),
        "no tensor",
    ),
}
"""Tensors that lie."""
