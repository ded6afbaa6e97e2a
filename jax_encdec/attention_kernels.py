"""Which program computes an attention, and the fused ones.

`resolve_attention` decides, and says why: `dense` is our own code in `attention.py`, which can do
everything; `xla` is `jax.nn.dot_product_attention`; `cudnn` the same on cuDNN's flash attention;
`splash` the Pallas kernel for TPUs. The fused ones never hold the `[B, N, Q, S]` weights on their
platform. `fused_attention` runs one. Axis letters as in `attention.py`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jax_encdec.config import Attention
from jax_encdec.errors import ConfigError
from jax_encdec.execution import Execution, split_over

SPLASH_BLOCK = 128
"""Splash attention works on tiles of so many queries and keys, or a multiple."""


class Choice(NamedTuple):
    """A kernel and why it is the one."""

    name: str
    reason: str


class Visible(NamedTuple):
    """Who may attend to whom, in the forms that the kernels take."""

    mask: jax.Array | None
    """Boolean, broadcastable to `[B, Q, S]`: all there is."""
    rest: jax.Array | None = None
    """The same without causality, where `causal` says that there is some."""
    causal: bool = False
    segments: tuple[jax.Array, jax.Array] | None = None
    """Ids `[B, Q]` and `[B, S]`; only equal ones see each other. Pads that are hidden as keys have
    the id -1. None: nothing but causality and the window hides."""


def platform() -> str:
    """Where the program being traced will run: the current mesh's platform, else the default's."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    device = getattr(jax.config, "jax_default_device", None) if device is None else device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def resolve_attention(
    execution: Execution,
    attention: Attention,
    platform: str,
    *,
    dtype: Any,
    query_length: int,
    key_length: int,
    dropout: float = 0.0,
    weights: bool = False,
    batch: int = 1,
) -> Choice:
    """The kernel that will run one attention of a trunk, and why.

    Args:
        attention: the attention as the trunk's configuration has it.
        platform: `cpu`, `gpu` (or `cuda`) or `tpu`.
        dtype: of queries, keys and values.
        dropout: the rate on attention weights, 0 when switched off.
        weights: whether the weights are asked for (`output_attentions`).
        batch: rows, which several devices share out.

    Raises:
        ConfigError: the kernel asked for by name cannot do this.
    """
    asked = execution.attention
    if asked == "dense":
        return Choice("dense", "asked for")
    gpu, tpu = platform in ("gpu", "cuda"), platform == "tpu"
    name = asked if asked != "auto" else "cudnn" if gpu else "splash" if tpu else "dense"
    if name == "dense":
        return Choice("dense", f"nothing is faster on {platform}")
    lengths = (query_length, key_length)
    why = _forbidden(name, attention, dropout, weights)
    if why is None and name == "cudnn":
        why = _no_cudnn(attention, dtype, lengths) if gpu else f"it needs a GPU, not a {platform}"
    if why is None and name == "splash":
        why = f"it needs a TPU, not a {platform}"
        if tpu:
            why = _no_splash(execution, attention, lengths, batch)
    if why is None:
        return Choice(name, "asked for" if asked == name else f"the fused kernel of a {platform}")
    if asked == name:
        raise ConfigError(
            f"execution attention={name!r} cannot compute the {attention.source} attention: {why}; "
            "use attention='auto', which takes another kernel there"
        )
    return Choice("dense", f"not {name}: {why}")


def _forbidden(name: str, attention: Attention, dropout: float, weights: bool) -> str | None:
    """What no fused kernel, or this one, can do, whatever the machine."""
    if weights:
        return "output_attentions asks for weights that it never holds"
    if dropout > 0.0:
        return f"it cannot drop attention weights, and their dropout is {dropout}"
    if attention.disentangled:
        return "it cannot add disentangled position scores"
    if attention.bucket_bias and name != "xla":
        return "it cannot add a trained bias to the scores"
    if attention.softcap is not None and name != "splash":
        return "it cannot cap the scores"
    if attention.global_projections and name == "splash":
        return "its mask is static, and here any token may be a global one"
    return None


def _no_cudnn(attention: Attention, dtype: Any, lengths: tuple[int, int]) -> str | None:
    """What cuDNN's flash attention asks of shapes and types: the limits that jax.nn enforces."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 or float16, not {jnp.dtype(dtype)}"
    if attention.head_dim % 8 or attention.head_dim > 128:
        return f"heads must be a multiple of 8 and at most 128 wide; these are {attention.head_dim}"
    if any(length % 2 for length in lengths):
        return f"lengths must be even where a mask hides tokens; got {lengths[0]} x {lengths[1]}"
    return None


def _no_splash(
    execution: Execution, attention: Attention, lengths: tuple[int, int], batch: int
) -> str | None:
    """What the splash kernel asks of shapes and of the mesh."""
    if any(length % SPLASH_BLOCK for length in lengths):
        return (
            f"lengths must be multiples of {SPLASH_BLOCK}; got {lengths[0]} queries and "
            f"{lengths[1]} keys"
        )
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        over = _splash_axes(execution, attention, batch)
        covered = math.prod(mesh.shape[a] for axes in over for a in axes)
        if covered != mesh.size:
            return (
                f"each device runs it on its own rows and heads, but activation_rules split "
                f"{batch} rows and {attention.groups} heads over {covered} of {mesh.size} devices"
            )
    return None


# The kernels -------------------------------------------------------------------------------------


def fused_attention(
    execution: Execution,
    name: str,
    config: Attention,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: Visible,
    *,
    bias: jax.Array | None,
    scale: jax.Array | float,
    interpret: bool = False,
) -> jax.Array:
    """Attend from `query` `[B, Q, N, H]` to `key` and `value` `[B, G, S, H]`: `[B, Q, N, H]`.

    A row that hides everything averages values, so that it stays finite.

    Args:
        name: `xla`, `cudnn` or `splash`, as `resolve_attention` chose.
        bias: added to the scores, broadcastable to `[B, N, Q, S]`; only for `xla`.
        interpret: run the splash kernel in Python, where there is no TPU.
    """
    if not isinstance(scale, float):  # differs by layer, and layers may be scanned
        query, scale = query * jnp.asarray(scale, query.dtype), 1.0
    if name == "splash":
        return _splash(execution, config, query * scale, key, value, visible, interpret)
    causal = name == "cudnn" and visible.causal  # it then skips what is hidden
    mask = visible.rest if causal else visible.mask
    if mask is not None:
        mask = mask[:, None]
        if name == "cudnn":
            shape = (mask.shape[0], 1, query.shape[1], key.shape[2])
            mask = jnp.broadcast_to(mask, shape)
    return jax.nn.dot_product_attention(
        query,
        jnp.swapaxes(key, 1, 2),
        jnp.swapaxes(value, 1, 2),
        bias=bias,
        mask=mask,
        scale=scale,
        is_causal=causal,
        implementation="cudnn" if name == "cudnn" else "xla",
    )


def _splash_axes(
    execution: Execution, config: Attention, batch: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Mesh axes that share out rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = split_over(mesh, execution.rule("act_batch") or (), batch) or ()
    heads = split_over(mesh, execution.rule("act_heads") or (), config.groups, rows) or ()
    return rows, heads


def _splash(
    execution: Execution,
    config: Attention,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visible: Visible,
    interpret: bool,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    b, q, s = *query.shape[:2], key.shape[2]
    if config.window is not None and config.source == "self":
        window = (config.window, 0 if visible.causal else config.window)
        mask: Any = masks.LocalMask((q, s), window, 0)
    else:
        mask = masks.CausalMask((q, s)) if visible.causal else masks.FullMask((q, s))
    tile_q, tile_s = (next(t for t in (512, 256, SPLASH_BLOCK) if x % t == 0) for x in (q, s))
    tiles = splash.BlockSizes(
        block_q=tile_q,
        block_kv=tile_s,
        block_q_dkv=tile_q,
        block_kv_dkv=tile_s,
        block_kv_dkv_compute=tile_s,
        block_q_dq=tile_q,
        block_kv_dq=tile_s,
    )
    segments = visible.segments

    def local(query: jax.Array, key: jax.Array, value: jax.Array, *ids: jax.Array) -> jax.Array:
        kernel: Any = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * query.shape[1]),
            block_sizes=tiles,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=config.softcap,
            interpret=interpret,
        )
        row = splash.SegmentIds(*ids) if ids else None
        return jax.vmap(kernel, in_axes=(0, 0, 0, None if row is None else 0))(
            query, key, value, row
        )

    query = jnp.swapaxes(query, 1, 2)
    ids = () if segments is None else tuple(jnp.broadcast_to(i, (b, i.shape[1])) for i in segments)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        # A kernel is opaque to the partitioner: each device runs it on its own rows and heads.
        rows, heads = _splash_axes(execution, config, b)
        states, row = PartitionSpec(rows or None, heads or None), PartitionSpec(rows or None)
        specs = (states, states, states, *(row for _ in ids))
        local = jax.shard_map(local, in_specs=specs, out_specs=states, check_vma=False)
    return jnp.swapaxes(local(query, key, value, *ids), 1, 2)
