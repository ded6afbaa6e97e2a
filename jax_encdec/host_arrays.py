"""Arrays made when they are wanted: parameters laid out anew, and never twice in memory.

A `HostArray` is a recipe: read this tensor of a file, take this layer of an array, join these and
turn them round. Rearranging a tree of recipes touches no number. `land` then makes what came of it,
leaf by leaf, in threads, straight into memory that a CPU device takes as it is; nothing is compiled
for it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ALIGNMENT = 64
"""Bytes; from such an address on, a CPU device takes an array without copying it."""
_THREADS = 4


@dataclass(frozen=True, eq=False)
class HostArray:
    """How an array is made; in a tree of parameters it stands in an array's place.

    Attributes:
        read: make it, or a view of it, in its dtype; threads may call it at the same time.
        shape: known beforehand of what a model declares, () of what is made of it.
        array: what it is already, where there is nothing to make.
    """

    read: Callable[[], np.ndarray]
    shape: tuple[int, ...] = ()
    array: jax.Array | None = None
    layer: Callable[[int], np.ndarray] | None = None

    @classmethod
    def of(cls, array: Any) -> HostArray:
        """An array that there is: on a CPU its numbers are seen where they are."""
        known = array if isinstance(array, jax.Array) else None
        return cls(lambda: np.asarray(array), tuple(array.shape), known)

    @property
    def size(self) -> int:
        """Numbers."""
        return math.prod(self.shape)

    @property
    def T(self) -> HostArray:
        """Axes in reverse."""
        return HostArray(lambda: self.read().T, self.shape[::-1])

    def __getitem__(self, index: int) -> HostArray:
        """One layer of a stack, of which no other is read."""
        layer = self.layer or (lambda i: self.read()[i])
        return HostArray(lambda: layer(index), self.shape[1:])


def arrange(make: Callable[..., Any], *arrays: Any) -> Any:
    """`make(jax.numpy, *arrays)`; of recipes the recipe of `make(numpy, *arrays)`."""
    if all(isinstance(array, HostArray) for array in arrays):
        return HostArray(lambda: make(np, *(array.read() for array in arrays)))
    return make(jnp, *arrays)


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array without values, which a CPU device takes without a copy."""
    dtype = np.dtype(dtype)
    count = math.prod(shape) * dtype.itemsize
    memory = np.empty(count + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + count].view(dtype).reshape(shape)


def land(tree: Any, device: jax.Device | None = None) -> Any:
    """A tree with arrays in the place of recipes; one recipe in two places becomes one array.

    Args:
        device: where what is made goes; None: the default device.
    """
    leaves, treedef = jax.tree.flatten(tree)
    wanted = {id(leaf): leaf for leaf in leaves if isinstance(leaf, HostArray)}

    def make(recipe: HostArray) -> jax.Array:
        if recipe.array is not None:
            return recipe.array
        values = recipe.read()
        out = aligned(values.shape, values.dtype)
        out[...] = values
        return jax.device_put(out, device)

    # Copies of arrays let other threads run.
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        made = dict(zip(wanted, pool.map(make, wanted.values()), strict=True))
    return jax.tree.unflatten(treedef, [made.get(id(leaf), leaf) for leaf in leaves])
