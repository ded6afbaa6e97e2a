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
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_encdec.convert.tensor_source import ALIGNMENT, aligned

_THREADS = 4


@dataclass(frozen=True, eq=False)
class HostArray:
    """How an array is made; in a tree of parameters it stands in an array's place.

    Attributes:
        read: make it, or a view of it, in its dtype; threads may call it at the same time.
        shape: known beforehand of what a model declares, () of what is made of it.
        array: what it is already, where there is nothing to make.
        layer: make one layer of it, without the others.
        fresh: whether `read` gives memory that nobody else has.
    """

    read: Callable[[], np.ndarray]
    shape: tuple[int, ...] = ()
    array: jax.Array | None = None
    layer: Callable[[int], np.ndarray] | None = None
    fresh: bool = False

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
        return HostArray(lambda: self.read().T, self.shape[::-1], fresh=self.fresh)

    def __getitem__(self, index: int) -> HostArray:
        """One layer of a stack, of which no other is read."""
        if self.layer is None:
            return HostArray(lambda: self.read()[index], self.shape[1:])
        return HostArray(partial(self.layer, index), self.shape[1:], fresh=self.fresh)


def arrange(make: Callable[..., Any], *arrays: Any) -> Any:
    """`make(jax.numpy, *arrays)`; of recipes the recipe of `make(numpy, *arrays)`."""
    if all(isinstance(array, HostArray) for array in arrays):
        fresh = all(array.fresh for array in arrays)
        return HostArray(lambda: make(np, *(array.read() for array in arrays)), fresh=fresh)
    return make(jnp, *arrays)


def _landed(array: np.ndarray) -> bool:
    """Whether a device takes it without a copy, and no more memory than it needs stays with it."""
    root = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    whole = root.nbytes <= array.nbytes + ALIGNMENT
    return whole and array.flags.c_contiguous and array.ctypes.data % ALIGNMENT == 0


def land(tree: Any, device: Any = None) -> Any:
    """A tree with arrays in the place of recipes; one recipe in two places becomes one array.

    Args:
        device: a `jax.Device`, where what is made goes; None: the default device.
    """
    leaves, treedef = jax.tree.flatten(tree)
    wanted = {id(leaf): leaf for leaf in leaves if isinstance(leaf, HostArray)}

    def make(recipe: HostArray) -> jax.Array:
        if recipe.array is not None:
            return recipe.array
        values = recipe.read()
        if not (recipe.fresh and _landed(values)):
            copy = aligned(values.shape, values.dtype)
            copy[...] = values
            values = copy
        return jax.device_put(values, device)

    # Copies of arrays let other threads run.
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        made = dict(zip(wanted, pool.map(make, wanted.values()), strict=True))
    return jax.tree.unflatten(treedef, [made.get(id(leaf), leaf) for leaf in leaves])
