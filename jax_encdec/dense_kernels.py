"""Dense layers' kernels as inference reads them: flat, joined, transposed, in tiles, or narrower.

A `Kernel` takes a kernel's place in a tree of parameters, and `layers.dense` multiplies by it as by
any other. It is made once, by `decoding/layout.py`, which also says which order is fast where.

Axis letters: M rows, I numbers in, O numbers out.
"""

from __future__ import annotations

import math
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp

from jax_encdec.convert.tensor_source import aligned
from jax_encdec.host_arrays import arrange

TILE = 64
"""Outputs of a tile. On CPU a product of few rows by a tile reads the weights once, as they lie."""


@flax.struct.dataclass
class Kernel:
    """One matrix, or several side by side that meet the same input."""

    array: jax.Array
    """`[I, O]` in the order `in_out`, `[O, I]` in `out_in`, `[O / TILE, I, TILE]` in `tiles`."""
    order: str = flax.struct.field(pytree_node=False)
    inputs: int = flax.struct.field(pytree_node=False)
    """How many of an input's last axes make up I."""
    outputs: tuple[tuple[int, ...], ...] = flax.struct.field(pytree_node=False)
    """The axes that each joined matrix puts out."""

    @classmethod
    def of(cls, arrays: list[Any], inputs: int, order: str, dtype: Any = None) -> Kernel:
        """Join arrays `[*inputs, *outputs]` of equal inputs, or recipes of such (`HostArray`)."""
        outputs = tuple(tuple(a.shape[inputs:]) for a in arrays)
        size = math.prod(arrays[0].shape[:inputs])

        def make(xp: Any, *arrays: Any) -> Any:
            flat = [xp.reshape(a, (size, -1)) for a in arrays]
            joined = flat[0] if len(flat) == 1 else xp.concatenate(flat, axis=1)
            joined = joined if dtype is None else joined.astype(dtype)
            if order == "out_in":
                return joined.T
            return _tiles(xp, joined) if order == "tiles" else joined

        return cls(arrange(make, *arrays), order, inputs, outputs)

    def product(
        self, x: jax.Array, bias: jax.Array | None = None, dtype: Any = None
    ) -> tuple[jax.Array, ...]:
        """What each joined matrix makes of `x`: one array each, in `dtype` or else in x's.

        Factors have the weights' dtype, sums are float32. `bias` has O numbers, in any shape.
        """
        dtype = x.dtype if dtype is None else dtype
        lead = x.shape[: x.ndim - self.inputs]
        rows = x.reshape(math.prod(lead), -1).astype(self.array.dtype)
        sizes = [math.prod(shape) for shape in self.outputs]
        y = self._multiply(rows)[:, : sum(sizes)].astype(dtype)
        y = y if bias is None else y + bias.reshape(-1).astype(dtype)
        parts = [y] if len(sizes) == 1 else jax.lax.split(y, sizes, axis=1)
        return tuple(
            part.reshape(*lead, *shape) for part, shape in zip(parts, self.outputs, strict=True)
        )

    def _multiply(self, x: jax.Array) -> jax.Array:
        """`[M, I]` -> float32 `[M, O]`, or a few more columns with tiles."""
        if len(x) == 1 and x.dtype == jnp.bfloat16:
            # XLA's product of a matrix and one row of bfloat16 is ten times slower on CPU.
            return self._multiply(jnp.broadcast_to(x, (2, x.shape[1])))[:1]
        if self.order == "tiles":
            tiles = self.array.shape[0]
            each = jnp.broadcast_to(x, (tiles, *x.shape))
            y = _dot(each, self.array, (((2,), (1,)), ((0,), (0,))))  # [tiles, M, TILE]
            y = jnp.swapaxes(y, 0, 1)
            if sum(map(math.prod, self.outputs)) % TILE:
                # Else what follows would be fused with it and look up each number's tile, one
                # number at a time: 6 % of a small model's step.
                y = jax.lax.optimization_barrier(y)
            return y.reshape(len(x), -1)
        return _dot(x, self.array, (((1,), (0 if self.order == "in_out" else 1,)), ((), ())))


def _tiles(xp: Any, matrix: Any) -> Any:
    """`[I, O]` -> `[O / TILE, I, TILE]`, zeros after the last of O."""
    inputs, outputs = matrix.shape
    if xp is jnp:
        matrix = jnp.pad(matrix, ((0, 0), (0, -outputs % TILE)))
        return jnp.swapaxes(matrix.reshape(inputs, -1, TILE), 0, 1)
    tiles = aligned((-(-outputs // TILE), inputs, TILE), matrix.dtype)
    tiles[-1] = 0
    for number, tile in enumerate(tiles):  # One at a time, which fits into a processor's cache.
        part = matrix[:, number * TILE : (number + 1) * TILE]
        tile[:, : part.shape[1]] = part
    return tiles


def _dot(a: jax.Array, b: jax.Array, dimensions: Any) -> jax.Array:
    return cast(
        jax.Array, jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)
    )
