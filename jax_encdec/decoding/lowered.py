"""One pure function of flat arrays as StableHLO bytes (`lower`), and back (`raised`).

`jax.export` does the work on both sides. Its own file format asks for a further package and is
promised for half a year; what is written here are the StableHLO bytes alone, which are promised for
five years, and jax's `Exported` is made anew from its fields.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.core

from jax_encdec.errors import CheckpointError

Shaped = Any
"""What has a shape and a dtype."""


def lower(
    function: Callable[..., Any], arguments: Sequence[Shaped], platform: str
) -> jax.export.Exported:
    """A function lowered for `cpu`, `cuda`, `tpu` or `rocm`, none of which need be there."""
    flat = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments]
    with _no_locations():
        return jax.export.export(jax.jit(function), platforms=(platform,))(*flat)


@contextlib.contextmanager
def _no_locations() -> Iterator[None]:
    """Without the paths and lines of the code lowered: nobody's business, and a third of the size,
    and different from one call to the next."""
    config: Any = jax.config
    before = config.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        yield
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def readable(convention: int) -> bool:
    """Whether this jax calls programs in the way that these were made to be called."""
    low = jax.export.minimum_supported_calling_convention_version
    return low <= convention <= jax.export.maximum_supported_calling_convention_version


def raised(
    stablehlo: bytes,
    arguments: Sequence[Shaped],
    results: Sequence[Shaped],
    *,
    kept: Sequence[int],
    platform: str,
    convention: int,
) -> Callable[..., tuple[jax.Array, ...]]:
    """The function of `arguments`, flat, again; pure, and under `vmap` run row after row.

    Args:
        stablehlo: what it was lowered to.
        arguments, results: their shapes and dtypes.
        kept: numbers of the arguments that it reads.
        platform: that it was lowered for.
        convention: the version of jax's calling convention.

    Raises:
        CheckpointError: this jax cannot read it.
    """
    values = {
        "fun_name": "program",
        "in_tree": jax.tree.structure((tuple(0 for _ in arguments), {})),
        "in_avals": tuple(jax.core.ShapedArray(x.shape, x.dtype) for x in arguments),
        "out_tree": jax.tree.structure(tuple(0 for _ in results)),
        "out_avals": tuple(jax.core.ShapedArray(x.shape, x.dtype) for x in results),
        "_has_named_shardings": True,
        "_in_named_shardings": (None,) * len(arguments),
        "_out_named_shardings": (None,) * len(results),
        "in_shardings_hlo": (None,) * len(arguments),
        "out_shardings_hlo": (None,) * len(results),
        "nr_devices": 1,
        "platforms": (platform,),
        "ordered_effects": (),
        "unordered_effects": (),
        "disabled_safety_checks": (),
        "mlir_module_serialized": stablehlo,
        "calling_convention_version": convention,
        "module_kept_var_idx": tuple(kept),
        "uses_global_constants": False,
        "_get_vjp": None,
    }
    fields = [field.name for field in dataclasses.fields(jax.export.Exported)]
    if not values.keys() >= set(fields):
        raise CheckpointError(
            f"jax {jax.__version__} has exported programs of a kind that this library does not know"
        )
    program = jax.export.Exported(**{name: values[name] for name in fields})
    try:
        program.mlir_module()
    except Exception as error:  # Whatever the parser raises.
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"jax {jax.__version__} cannot read a program: {reason}") from None
    # jax cannot batch a program; running it once per row is what is left.
    return jax.custom_batching.sequential_vmap(program.call)
