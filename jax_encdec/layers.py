"""Parameters and the arithmetic on them: one declaration gives shape, initialiser and logical axes.

A layer is two functions side by side: `dense_params(...)` declares a nested dict of `Param`s,
`dense(params, x)` computes with arrays laid out the same way. From a tree of declarations follow
the initial values (`initialize`), the shapes without memory (`abstract`) and the logical axes
that sharding rules read (`logical_axes`). Stacking a layer `[repeat, ...]` is `stack(tree, n)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from jax_encdec.config import Norm
from jax_encdec.dense_kernels import Kernel

Params = Mapping[str, Any]
"""A nested dict of arrays."""


@dataclass(frozen=True)
class Param:
    """One parameter: its shape, the logical name of each axis, its initial distribution."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: float | str = "zeros"
    """A standard deviation (normal around 0), "zeros", "ones" or "sinusoidal"."""
    trained: bool = True
    """False for published tensors that are carried along and not to be changed."""

    def value(self, key: jax.Array, dtype: Any) -> jax.Array:
        """Draw the initial value, in `dtype`."""
        if self.init == "sinusoidal":
            return jnp.asarray(_sinusoidal(*self.shape), dtype)
        if isinstance(self.init, str):
            return {"zeros": jnp.zeros, "ones": jnp.ones}[self.init](self.shape, dtype)
        return _normal(key, self.init, self.shape, dtype)


# Compiled once per shape, of which a model has few: random numbers take long to compile.
@partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key: jax.Array, std: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def _sinusoidal(length: int, width: int) -> np.ndarray:
    """Sines of each position, then cosines (Vaswani et al. 2017, 3.5): `[length, width]`."""
    frequency = 10_000.0 ** (-np.arange(0, width, 2) / width)
    angle = np.arange(length)[:, None] * frequency
    return np.concatenate([np.sin(angle), np.cos(angle[:, : width // 2])], axis=1)


def _is_param(x: Any) -> bool:
    return isinstance(x, Param)


def tree_map(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Map `f` over the `Param`s of a declaration tree."""
    return jax.tree.map(f, tree, *rest, is_leaf=_is_param)


def stack(tree: Any, repeat: int) -> Any:
    """Declare `repeat` copies of a layer in one tree of leaves `[repeat, ...]`."""
    return tree_map(
        lambda p: replace(p, shape=(repeat, *p.shape), axes=("layers", *p.axes)),
        tree,
    )


def initialize(tree: Any, key: jax.Array, dtype: Any) -> Any:
    """Initial values of a declaration tree; each leaf's key is folded from its position."""
    leaves, treedef = jax.tree.flatten(tree, is_leaf=_is_param)
    values = [p.value(jax.random.fold_in(key, i), dtype) for i, p in enumerate(leaves)]
    return jax.tree.unflatten(treedef, values)


def abstract(tree: Any, dtype: Any) -> Any:
    """The declaration tree as `jax.ShapeDtypeStruct`s."""
    return tree_map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), tree)


def flatten(tree: Any) -> dict[tuple[str, ...], Any]:
    """A nested dict of leaves as a flat one, by path."""
    return cast(dict[tuple[str, ...], Any], flatten_dict(tree))


def logical_axes(tree: Any) -> Any:
    """The declaration tree as tuples of logical axis names."""
    return tree_map(lambda p: p.axes, tree)


# Activations, by their published names -----------------------------------------------------------


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution up to x, from erf as PyTorch has it; in x's dtype.

    By `erfc`, as in `jax.nn.gelu`, it takes longer on a CPU, and its derivative keeps more.
    """
    y = x.astype(jnp.float32)
    return (y * _normal_up_to(y)).astype(x.dtype)


@gelu.defjvp
def _gelu_slope(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> Any:
    # The slope is one array, made at once: all that waits for the backward pass.
    (x,), (tangent,) = primals, tangents
    y = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(y)) * (2.0 * math.pi) ** -0.5
    return gelu(x), (_normal_up_to(y) + y * density).astype(x.dtype) * tangent


def _normal_up_to(x: jax.Array) -> jax.Array:
    return 0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)


_ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_python": gelu,
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "mish": jax.nn.mish,
    "linear": lambda x: x,
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Look an activation up by its published name, one of `config.ACTIVATIONS`."""
    return _ACTIVATIONS[name]


# Layers ------------------------------------------------------------------------------------------


def dense_params(
    inputs: Mapping[str, int], outputs: Mapping[str, int], *, bias: bool, std: float
) -> dict[str, Param]:
    """Declare a dense layer from the named input axes to the named output axes."""
    shape = {"kernel": Param((*inputs.values(), *outputs.values()), (*inputs, *outputs), std)}
    if bias:
        shape["bias"] = Param(tuple(outputs.values()), tuple(outputs))
    return shape


def dense(params: Params, x: jax.Array, inputs: int = 1) -> jax.Array:
    """Contract the last `inputs` axes of `x` with the kernel's first; in x's dtype."""
    if isinstance(params["kernel"], Kernel):
        return params["kernel"].product(x, params.get("bias"))[0]
    kernel = params["kernel"].astype(x.dtype)
    y = jax.lax.dot_general(
        x,
        kernel,
        ((tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs))), ((), ())),
    )
    return y + params["bias"].astype(x.dtype) if "bias" in params else y


def dense_each(params: Params, names: tuple[str, ...], x: jax.Array) -> tuple[jax.Array, ...]:
    """What each of several dense layers makes of `x`; they may have been joined to one."""
    joined = params.get("+".join(names))
    if joined is None:
        return tuple(dense(params[name], x) for name in names)
    return joined["kernel"].product(x, joined.get("bias"))


def norm_params(config: Norm, size: int, axis: str | None = "embed") -> dict[str, Param]:
    """Declare a norm over the last axis."""
    params = {"scale": Param((size,), (axis,), "zeros" if config.one_plus else "ones")}
    if config.bias and config.kind == "layer":
        params["bias"] = Param((size,), (axis,))
    return params


def norm(config: Norm, params: Params, x: jax.Array) -> jax.Array:
    """Normalise the last axis; statistics in float32, the result in x's dtype."""
    y = x.astype(jnp.float32)
    if config.kind == "layer":
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + config.eps)
    scale = params["scale"].astype(jnp.float32)
    y = y * (1.0 + scale if config.one_plus else scale)
    if "bias" in params:
        y = y + params["bias"].astype(jnp.float32)
    return y.astype(x.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero a fraction `rate` of `x` and rescale the rest; without a key, return `x`."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def count(tree: Any) -> int:
    """Number of parameters in a tree of arrays or declarations."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree, is_leaf=_is_param))
