"""TensorFlow checkpoints (`tf_model.h5`) under PyTorch's names, read without TensorFlow or h5py.

Keras files each variable under its layer: `bert/tf_bert_model/bert/encoder/layer_._0/.../kernel:0`
is in group `bert`, the rest being the variable's own name, which begins with the model's. The
Transformers library's TensorFlow classes are its PyTorch classes with other names for the last
part, with `layer_._0` for `layer.0`, and with kernels transposed. `torch_names` undoes that, so the
families' rules need not know.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from jax_encdec.convert.flax_msgpack import torch_axes
from jax_encdec.convert.hdf5 import Dataset, datasets
from jax_encdec.convert.tensor_source import (
    BinaryFile,
    FileTensors,
    TensorInfo,
    as_tensor,
    check_tensors,
    short,
)
from jax_encdec.errors import CheckpointError

_WEIGHT_NAMES = "weight_names"
_LAST = {"kernel": "weight", "gamma": "weight", "embeddings": "weight", "beta": "bias"}


def torch_names(variables: Iterable[str]) -> dict[str, str]:
    """PyTorch's names of all variables of a model: variable -> name.

    Args:
        variables: as TensorFlow names them, with the model's name in front.
    """
    names = {variable: _torch_name(variable) for variable in variables}
    return _without_main_layer(names)


def _torch_name(variable: str) -> str:
    name = variable.removesuffix(":0")
    # A layer called `mlm___cls` is PyTorch's `cls`.
    name = re.sub(r"/[^/]*___([^/]*)/", r"/\1/", name).replace("_._", "/")
    parts = [part for part in name.split("/") if part]
    if len(parts) > 1:
        del parts[0]
    if parts:
        parts[-1] = _LAST.get(parts[-1], parts[-1])
    return ".".join(parts)


def _without_main_layer(names: dict[str, str]) -> dict[str, str]:
    """Of a pair, PyTorch's encoder has no main layer: `encoder.bert.x` is `encoder.x`."""
    inner = [name.split(".") for name in names.values() if name.startswith("encoder.")]
    layers = {parts[1] for parts in inner}
    paired = any(name.startswith("decoder.") for name in names.values())
    if not paired or len(layers) != 1 or any(len(parts) < 4 for parts in inner):
        return names
    prefix = f"encoder.{layers.pop()}."
    return {
        variable: re.sub(f"^{re.escape(prefix)}", "encoder.", name)
        for variable, name in names.items()
    }


def shard_name(variable: str) -> str:
    """What a variable of an index is called inside its shard: the model's name is left out."""
    _, _, rest = variable.partition("/")
    return variable if "model." in variable or not rest else rest


class KerasTensors(FileTensors):
    """The variables of one h5 file, named and laid out as PyTorch has them.

    Args:
        names: of a shard, what it holds -> PyTorch's name; more names do no harm.
    """

    def __init__(self, file: BinaryFile, names: Mapping[str, str] | None = None) -> None:
        self.path = file.path
        self._file = file
        self._ignored: dict[str, str] = {}
        found: dict[str, list[Dataset]] = {}
        for dataset in datasets(file, _WEIGHT_NAMES):
            path = "/".join(dataset.path)
            if dataset.info is None:
                self._ignored[path] = "not an array of numbers"
            else:
                found.setdefault(_variable(dataset), []).append(dataset)
        if not found:
            raise CheckpointError(f"{self.path} holds no arrays; expected a model's variables")
        check_tensors(len(found), str(self.path))
        own = torch_names(found)
        self._tensors: dict[str, list[tuple[Dataset, bool]]] = {}
        for variable, copies in found.items():
            name = (names or {}).get("/".join(copies[0].path), own[variable])
            kernel = variable.removesuffix(":0").endswith("/kernel")
            self._tensors.setdefault(name, []).extend((copy, kernel) for copy in copies)
        for name, copies in self._tensors.items():
            if len({(d.info, kernel) for d, kernel in copies}) > 1:
                raise CheckpointError(f"{self.path} has {short(name)} twice, in different shapes")

    def info(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor, as PyTorch has it."""
        dataset, kernel = self._entry_of(name)[0]
        assert dataset.info is not None
        dtype, shape = dataset.info
        if kernel:
            shape = tuple(shape[i] for i in torch_axes(shape))
        elif name.endswith(".bias") and len(shape) == 2 and shape[0] == 1:
            shape = shape[1:]  # of GPT-2's Conv1D
        return TensorInfo(dtype, shape)

    def __getitem__(self, name: str) -> np.ndarray:
        info = self.info(name)
        (first, kernel), *others = self._tensors[name]
        assert first.info is not None
        data = self._file.read_array(first.start, first.info.nbytes)
        for other, _ in others:
            # Keras saves a variable once for each layer that uses it.
            copy = self._file.read_array(other.start, first.info.nbytes)
            if not np.array_equal(copy, data):
                raise CheckpointError(f"{self.path} has {short(name)} twice, and they differ")
        if not kernel:
            return as_tensor(data, info)
        tensor = as_tensor(data, first.info)
        return tensor.transpose(torch_axes(tensor.shape)).copy(order="C")


def _variable(dataset: Dataset) -> str:
    """The variable's own name.

    A whole model's file has layers, groups that list the names of their variables. A shard has
    the variables at once, the model's name left out.
    """
    path = dataset.path
    if len(path) > 1 and dataset.attributed[1]:
        return "/".join(path[1:])
    name = "/".join(path)
    return name if shard_name(name) == name else f"model/{name}"
