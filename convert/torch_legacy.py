"""PyTorch checkpoints from before 1.6: five pickles, then the storages' bytes.

The pickles are a magic number, the format's version, facts about the machine, the object that was
saved, and the storages' keys in the order in which they follow: each the number of its elements
(int64) and their bytes. Only the pickles and those numbers are read on opening.
"""

from __future__ import annotations

from jax_encdec.convert.pickle_reader import PickleStream, View
from jax_encdec.convert.tensor_source import BinaryFile, short
from jax_encdec.convert.torch_zip import TorchTensors
from jax_encdec.errors import CheckpointError

MAGIC = 0x1950A86A20F9469CFC6C
_MAGIC_BYTES = b"\x8a\x0a" + MAGIC.to_bytes(10, "little") + b"."
_VERSION = 1001


def is_torch_legacy(head: bytes) -> bool:
    """Whether a file that begins so is such a checkpoint, of any binary pickle protocol."""
    return head[:1] == b"\x80" and _MAGIC_BYTES in head[:32]


def is_torch_tar(head: bytes) -> bool:
    """Whether a file that begins so (512 bytes) is a tar archive, as PyTorch wrote until 0.1."""
    return head[257:262] == b"ustar"


def open_torch_legacy(file: BinaryFile) -> TorchTensors:
    """Open what `torch.save` wrote before 1.6.

    Raises:
        CheckpointError: the file is damaged or cut short, its pickles name anything outside the
            allow-list, or it holds no state dict.
    """
    where = str(file.path)

    def read(offset: int, most: int) -> bytes:
        return file.read(offset, min(most, file.size - offset))

    stream = PickleStream(read, where)
    if stream.next() != MAGIC:
        raise CheckpointError(f"{where} is damaged: its magic number is another")
    version = stream.next()
    if type(version) is not int or version != _VERSION:
        raise CheckpointError(
            f"{where} has format version {_said(version)}; expected {_VERSION}, PyTorch 0.2 to 1.5"
        )
    machine = stream.next()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise CheckpointError(
            f"{where} was not saved on a little-endian machine; only such files are supported"
        )
    root = stream.next()
    views = dict(stream.views)
    keys = stream.next()
    places = _storages(file, stream.position, keys, views)
    for key, view in views.items():
        if view.root is not None and view.root in places:
            start = places[view.root][0] + view.offset * _itemsize(view)
            places[key] = start, view.numel * _itemsize(view)
    return TorchTensors(file, root, places)


def _storages(
    file: BinaryFile, start: int, keys: object, views: dict[str, View]
) -> dict[str, tuple[int, int]]:
    """Where each whole storage lies: key -> (first byte, bytes), checked against the file."""
    where = str(file.path)
    if not isinstance(keys, list):
        raise CheckpointError(f"{where} is damaged: its list of storages is {_said(keys)}")
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        if type(key) is not str or key in places or key not in views or views[key].root:
            raise CheckpointError(
                f"{where} is damaged: its list of storages has {_said(key)}, which no tensor "
                f"uses or which is there twice"
            )
        numel = int.from_bytes(file.read(start, 8), "little", signed=True)
        if numel != views[key].numel:
            raise CheckpointError(
                f"{where} is damaged: storage {short(key)} has {numel} elements, expected "
                f"{short(views[key].numel)}"
            )
        start, size = start + 8, numel * _itemsize(views[key])
        if start + size > file.size:
            raise CheckpointError(
                f"{where} is incomplete: storage {short(key)} ends at byte {start + size}, the "
                f"file at {file.size}"
            )
        places[key] = start, size
        start += size
    return places


def _itemsize(view: View) -> int:
    return view.dtype.itemsize if view.dtype is not None else 1


def _said(value: object) -> str:
    """A value from the file: only text and numbers are looked into."""
    return short(value) if type(value) in (str, int) else f"a {type(value).__name__}"
