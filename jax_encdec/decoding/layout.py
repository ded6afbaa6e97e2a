"""Parameters in the layout of inference: made once, read at every step of every call.

`prepare_params` is a pure function from a model's parameters to a `PreparedParams`, a pytree that
`generate` takes in their place. The decoder's layers stand apart instead of stacked; projections of
one input are joined; each matrix lies as the platform multiplies it fastest by so many rows, in the
precision asked for. What needs no other layout (embeddings, most of the encoder) is the very same
array as in the parameters.

What is fast was measured (AMD EPYC, 2 threads; times relative to `[in, out]`, float32):

    rows   1       `[out, in]` where more goes in than out: 0.6; the head as `[D, V]`: 0.6 at D 256
    rows   2 to 8  tiles: 0.4 to 0.6; up to 16: 0.7 to 0.8
    rows   more    `[in, out]`: with tiles 0.9 to 1.1 at 32 rows and 1.3 at 64, where every product
                   has an input of its own that is repeated for each tile
    bfloat16 weights, float32 sums: of the head's time 0.4 to 0.8 from 2 rows on, as `[V, D]`; of
    the blocks' 0.6 from 9 rows on, and no less than tiles before; 12 times slower at 1 row, and
    slower for the many rows of an encoder, so that these keep float32

On a CPU nothing is compiled for this: what is made of the parameters is copied by threads, leaf by
leaf (`host_arrays.py`). From a file it is made so without the parameters themselves ever existing.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.core import Tracer

from jax_encdec.attention_kernels import platform as current_platform
from jax_encdec.config import Attention, Convolution, FeedForward, Sublayer, TransformerConfig
from jax_encdec.dense_kernels import Kernel
from jax_encdec.encoder_decoder_config import EncoderDecoderConfig
from jax_encdec.errors import InputError, nearest
from jax_encdec.host_arrays import HostArray, arrange, land
from jax_encdec.layers import Params, flatten
from jax_encdec.pair_params import check_tree, plain_params, with_aliases
from jax_encdec.trunk_params import unstack

PRECISIONS = ("float32", "bfloat16")
FEW = {"float32": 16, "bfloat16": 8}  # rows up to which float32 tiles are the fastest
NARROW = 512  # states so wide or less make a copy of the head worth its memory at one row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Which orders the matrices of a decode step have.

    Attributes:
        rows: `one`, `few` or `many` at a time; `any`: kernels stay as they are declared, which
            suits every number of rows and every way to split weights over devices.
        platform: `cpu`, `gpu`, `cuda` or `tpu`.
        precision: of the weights that matrices multiply by: `float32` means as they are.
    """

    rows: str = "any"
    platform: str = "cpu"
    precision: str = "float32"

    @classmethod
    def choose(
        cls, rows: int | None, precision: str | None = None, platform: str | None = None
    ) -> Layout:
        """The layout for steps of so many rows (batch x beams).

        Raises:
            InputError: an unknown precision, or rows that are no positive number.
        """
        precision = precision or "float32"
        if precision not in PRECISIONS:
            raise InputError(
                f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}"
                + nearest(str(precision), PRECISIONS)
            )
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise InputError(f"rows must be a positive number or None; got {rows!r}")
        platform = platform or current_platform()
        kind = "any"
        if rows is not None:
            few = platform == "cpu" and rows <= FEW[precision]
            kind = "many" if not few else "one" if rows == 1 else "few"
        return cls(rows=kind, platform=platform, precision=precision)

    @property
    def head_dtype(self) -> Any:
        """What the head's weights are cast to; None: they stay."""
        return None if self.rows == "one" else self._low

    @property
    def step_dtype(self) -> Any:
        """What other weights of a decode step are cast to."""
        return None if self.rows in ("one", "few") else self._low

    @property
    def dtype(self) -> Any:
        """What weights are cast to whose matrices meet many rows at a time."""
        return None if self.platform == "cpu" else self._low

    @property
    def _low(self) -> Any:
        return jnp.bfloat16 if self.precision == "bfloat16" else None

    def order(self, inputs: int, outputs: int) -> str:
        """How a matrix of a block lies."""
        if self.platform != "cpu" or self.step_dtype is not None:
            return "in_out"
        if self.rows == "few":
            return "tiles"
        return "out_in" if self.rows == "one" and inputs > outputs else "in_out"


@flax.struct.dataclass
class PreparedParams:
    """A model's parameters in the layout of inference; takes the place of params in `generate`.

    It is a pytree like any other: an argument of `jit`, mapped over by `vmap`. Once there is one,
    the parameters themselves may go.
    """

    tree: Any
    """As the parameters, with tied leaves at both places and `Kernel`s among the leaves."""
    config: EncoderDecoderConfig = flax.struct.field(pytree_node=False)
    layout: Layout = flax.struct.field(pytree_node=False)


def prepare_params(
    config: EncoderDecoderConfig,
    params: Any,
    *,
    rows: int | None = None,
    precision: str | None = None,
    platform: str | None = None,
) -> PreparedParams:
    """Bring parameters into the layout of inference.

    A pure function, for inside or outside of `jit`. In float32 the tokens are the same with any
    `rows`; with bfloat16 they follow what is rounded for so many rows.

    Args:
        params: as of `init_params`.
        rows: batch times beams (or samples) of the steps it will serve; None: nothing is assumed.
        precision: `bfloat16` multiplies by weights rounded to bfloat16, with float32 sums.
        platform: where it will run; by default where this process computes.

    Raises:
        InputError: arguments out of range, or parameters that are not this model's.
    """
    layout = Layout.choose(rows, precision, platform)
    if isinstance(params, PreparedParams):
        raise InputError("params are prepared already; prepare the model's own")
    return _prepared_now(config, checked(config, params), layout)


def tree_of(config: EncoderDecoderConfig, params: Any) -> Params:
    """A complete tree, from parameters or from what was prepared of them."""
    return params.tree if isinstance(params, PreparedParams) else with_aliases(config, params)


def checked(config: EncoderDecoderConfig, params: Any) -> Any:
    """`params` as they are if prepared, else without boxes.

    Raises:
        InputError: they are not this model's.
    """
    if isinstance(params, PreparedParams):
        if params.config != config:
            raise InputError("params were prepared for another model; prepare this model's")
        return params
    params = plain_params(params)
    check_tree(config, flatten(params))
    return params


def read_prepared(
    config: EncoderDecoderConfig, recipes: Any, rows: int | None, precision: str | None
) -> PreparedParams:
    """`prepare_params` of what is still in a file: a tree of `HostArray`s.

    Raises:
        InputError: as `prepare_params`.
    """
    layout = Layout.choose(rows, precision)
    if layout.platform == "cpu":
        return land(_prepared(config, recipes, layout))
    return _prepared_now(config, land(recipes), layout)


def _prepared(config: EncoderDecoderConfig, params: Any, layout: Layout) -> PreparedParams:
    tree = dict(with_aliases(config, params))
    if layout.rows != "any" or layout.precision != "float32":
        tree["decoder"] = _decoder(config.decoder_trunk, tree["decoder"], layout)
        if layout.dtype is not None:
            tree["encoder"] = _encoder(config.encoder_trunk, tree["encoder"], layout)
    else:
        tree["decoder"] = unstack(config.decoder_trunk, tree["decoder"])
    return PreparedParams(tree, config, layout)


# One trunk ---------------------------------------------------------------------------------------


def _decoder(trunk: TransformerConfig, params: Params, layout: Layout) -> dict[str, Any]:
    out = dict(params)
    for i, segment in enumerate(trunk.segments):
        # Blocks that share weights share their prepared form: such a segment stays one tree.
        periods = (
            (out[f"segment_{i}"],) if segment.share else unstack(trunk, params)[f"segment_{i}"]
        )
        periods = tuple(
            {
                f"block_{j}": {
                    sub.name: _step_sublayer(sub, period[f"block_{j}"][sub.name], layout)
                    for sub in block.sublayers
                }
                for j, block in enumerate(segment.blocks)
            }
            for period in periods
        )
        out[f"segment_{i}"] = periods[0] if segment.share else periods
    if trunk.head is not None:
        out["head"] = _head(trunk, params, layout)
    return out


def _step_sublayer(sub: Sublayer, params: Params, layout: Layout) -> dict[str, Any]:
    """A sublayer of the decoder."""
    out = dict(params)
    joined: tuple[str, ...] = ()
    if isinstance(sub.f, Convolution):
        return out
    if isinstance(sub.f, Attention):
        # Joined, heads could not be split over devices: there is no mesh on a CPU.
        if sub.f.source == "self" and layout.platform == "cpu" and not sub.f.disentangled:
            joined = ("query", "key", "value")
    elif isinstance(sub.f, FeedForward) and sub.f.gated:
        joined = ("gate", "up")
    source = ("key", "value") if isinstance(sub.f, Attention) and sub.f.source == "encoder" else ()
    for name, child in params.items():
        if name in source:
            if layout.dtype is not None:
                out[name] = _dense(child, 1, lambda i, o: "in_out", layout.dtype)
        elif name not in joined and isinstance(child, Mapping) and "kernel" in child:
            inputs = 2 if name == "out" else 1
            out[name] = _dense(child, inputs, layout.order, layout.step_dtype)
    if joined:
        for name in joined:
            del out[name]
        out["+".join(joined)] = _join([params[name] for name in joined], layout)
    return out


def _dense(
    params: Params, inputs: int, order: Callable[[int, int], str], dtype: Any
) -> dict[str, Any]:
    kernel = params["kernel"]
    size = 1
    for axis in kernel.shape[:inputs]:
        size *= axis
    return {
        **params,
        "kernel": Kernel.of([kernel], inputs, order(size, kernel.size // size), dtype),
    }


def _join(parts: list[Params], layout: Layout) -> dict[str, Any]:
    kernels = [part["kernel"] for part in parts]
    size = kernels[0].shape[0]
    order = layout.order(size, sum(k.size for k in kernels) // size)
    out: dict[str, Any] = {"kernel": Kernel.of(kernels, 1, order, layout.step_dtype)}
    present = [part["bias"] for part in parts if "bias" in part]
    if present:

        def make(xp: Any, *biases: Any) -> Any:
            each = iter(biases)
            zeros = partial(xp.zeros, dtype=biases[0].dtype)
            return xp.concatenate(
                [
                    xp.ravel(next(each)) if "bias" in part else zeros(part["kernel"].size // size)
                    for part in parts
                ]
            )

        out["bias"] = arrange(make, *present)
    return out


def _head(trunk: TransformerConfig, params: Params, layout: Layout) -> dict[str, Any]:
    """The head, with a copy of the logits' kernel where another layout of it is faster."""
    assert trunk.head is not None
    head = dict(params.get("head", {}))
    if "transform" in head:
        head["transform"] = _dense(head["transform"], 1, layout.order, layout.step_dtype)
    kernel = params["embedding"]["token"] if trunk.head.tied else head["kernel"]
    order = "out_in"  # as it is
    if layout.platform == "cpu" and layout.head_dtype is None:
        wide = kernel.shape[1] > NARROW
        order = {"one": "out_in" if wide else "in_out", "few": "tiles"}.get(layout.rows, "out_in")
    if layout.head_dtype is not None or order != "out_in":
        head.pop("kernel", None)
        head["logits"] = Kernel.of([kernel.T], 1, order, layout.head_dtype)
    return head


def _encoder(trunk: TransformerConfig, params: Params, layout: Layout) -> dict[str, Any]:
    """Layers stay stacked; what their dense layers multiply by is cast."""
    out = dict(params)
    for i, segment in enumerate(trunk.segments):
        period = {}
        for j, block in enumerate(segment.blocks):
            period[f"block_{j}"] = dict(params[f"segment_{i}"][f"block_{j}"])
            for sub in block.sublayers:
                if isinstance(sub.f, Convolution):
                    continue
                children = period[f"block_{j}"][sub.name]
                period[f"block_{j}"][sub.name] = {
                    name: _cast(child, 2 if name == "out" else 1, layout.dtype, segment.share)
                    if isinstance(child, Mapping) and "kernel" in child
                    else child
                    for name, child in children.items()
                }
        out[f"segment_{i}"] = period
    return out


def _cast(params: Params, inputs: int, dtype: Any, share: bool) -> dict[str, Any]:
    make = partial(Kernel.of, inputs=inputs, order="in_out", dtype=dtype)
    kernel = params["kernel"]
    flat = make([kernel]) if share else jax.vmap(lambda k: make([k]))(kernel)
    return {**params, "kernel": flat}


# For callers that bring the parameters every time ------------------------------------------------


class LastPrepared:
    """The prepared form of the parameters of the last call, as long as these exist.

    It holds the parameters weakly: when one of their arrays goes, so does what was made of it.
    Other arrays, even of equal values, are other parameters. Arrays of numpy can change under our
    hands and are prepared anew every time.
    """

    def __init__(self):
        # Replaced as one, so that a thread sees an entry whole or not at all.
        self._entry: tuple[list[weakref.ref[Any]], tuple[Any, ...], PreparedParams] | None = None

    def get(self, config: EncoderDecoderConfig, params: Any, layout: Layout) -> PreparedParams:
        """`prepare_params`, or what it gave the last time for the very same arrays.

        What is prepared already, or lies on several devices, is returned as it is.
        """
        leaves, treedef = jax.tree.flatten(params)
        if _spread(leaves) or isinstance(params, PreparedParams):
            return checked(config, params)
        key, entry = (config, layout, treedef), self._entry
        if entry is not None:
            refs, known, prepared = entry
            same = key == known and len(leaves) == len(refs)
            if same and all(ref() is leaf for ref, leaf in zip(refs, leaves, strict=True)):
                return prepared
        self.clear()
        prepared = _prepared_now(config, checked(config, params), layout)
        if all(isinstance(leaf, jax.Array) for leaf in leaves):
            self._entry = [weakref.ref(leaf, self.clear) for leaf in leaves], key, prepared
        return prepared

    def clear(self, _: Any = None) -> None:
        """Forget it."""
        self._entry = None


def _prepared_now(config: EncoderDecoderConfig, params: Any, layout: Layout) -> PreparedParams:
    """`_prepared` without a copy of what stays as it is, and without waiting for XLA's compiler
    where that can be."""
    leaves, treedef = jax.tree.flatten(params)
    if any(isinstance(leaf, Tracer) for leaf in leaves) or _spread(leaves):
        return _prepared(config, params, layout)
    homes = [leaf.devices() for leaf in leaves if isinstance(leaf, jax.Array)]
    if layout.platform == "cpu" and all(d.platform == "cpu" for home in homes for d in home):
        recipes = jax.tree.map(HostArray.of, params)
        committed = any(isinstance(leaf, jax.Array) and leaf.committed for leaf in leaves)
        device = next(iter(homes[0])) if committed else None
        return land(_prepared(config, recipes, layout), device)
    made: list[Any] = []
    jax.eval_shape(lambda x: made.extend(_split(config, treedef, layout, x)[1:]), leaves)
    origins, form = made
    changed = iter(_changed(config, treedef, layout, leaves))
    return jax.tree.unflatten(form, [next(changed) if i is None else leaves[i] for i in origins])


def _spread(leaves: list[Any]) -> bool:
    """Whether any lies on several devices."""
    return any(len(getattr(leaf, "devices", set)()) > 1 for leaf in leaves)


def _split(
    config: EncoderDecoderConfig, treedef: Any, layout: Layout, leaves: list[jax.Array]
) -> tuple[list[jax.Array], list[int | None], Any]:
    """The arrays that preparing makes; which leaf, if any, each of the result is; its form."""
    prepared = _prepared(config, jax.tree.unflatten(treedef, leaves), layout)
    arrays, form = jax.tree.flatten(prepared)
    index = {id(leaf): i for i, leaf in enumerate(leaves)}
    origins = [index.get(id(array)) for array in arrays]
    new = [array for array, i in zip(arrays, origins, strict=True) if i is None]
    return new, origins, form


@partial(jax.jit, static_argnums=(0, 1, 2))
def _changed(
    config: EncoderDecoderConfig, treedef: Any, layout: Layout, leaves: list[jax.Array]
) -> list[jax.Array]:
    return _split(config, treedef, layout, leaves)[0]
