"""Architectures that are no family yet, as values of the trunk's configuration and tables of rules.

Each function is what a family's `to_trunk` and table would be: sizes in, a `TransformerConfig` out,
and the published names of its tensors. Nothing here needs PyTorch.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jax_encdec.config import (
    Attention,
    Block,
    Embedding,
    FeedForward,
    Head,
    Norm,
    Rotary,
    Segment,
    Sublayer,
    TransformerConfig,
)
from jax_encdec.convert.rules import Part, Rule, linear, match, norm, tensors
from jax_encdec.convert.tensor_source import TensorInfo
from jax_encdec.host_arrays import land
from jax_encdec.layers import Param, tree_map
from jax_encdec.trunk_params import transformer_params

VOCAB, HIDDEN, WIDTH, HEADS, HEAD_DIM = 37, 16, 24, 4, 4
ENCODER_HIDDEN = 12
"""Width of the states that decoders with cross-attention read here."""


def blocks(repeat: int, *of: tuple[Sublayer, ...], share: bool = False) -> Segment:
    return Segment(blocks=tuple(Block(sublayers=b) for b in of), repeat=repeat, share=share)


# Llama, Qwen3, Gemma 2: grouped queries, rotary positions, RMS norms, gated feed-forward ----------


def llama(
    *,
    qk_norm: bool = False,
    cross: bool = False,
    bias: bool = False,
    head_dim: int = HEAD_DIM,
    theta: float = 10_000.0,
) -> TransformerConfig:
    rule = Norm(kind="rms", eps=1e-6)
    own = Attention(
        heads=HEADS,
        kv_heads=2,
        head_dim=head_dim,
        bias=bias,
        out_bias=False,
        rotary=Rotary(theta=theta),
        qk_norm=rule if qk_norm else None,
    )
    mlp = FeedForward(width=WIDTH, activation="silu", gated=True, bias=False)
    parts = (own, replace(own, source="encoder", rotary=None), mlp) if cross else (own, mlp)
    return TransformerConfig(
        hidden=HIDDEN,
        causal=True,
        embedding=Embedding(vocab=VOCAB, width=HIDDEN),
        encoder_hidden=ENCODER_HIDDEN,
        segments=(blocks(2, tuple(Sublayer(f=f, before=rule) for f in parts)),),
        final_norm=rule,
        head=Head(tied=False),
    )


def gemma2(*, window: int = 3, cross: bool = False) -> TransformerConfig:
    rule = Norm(kind="rms", eps=1e-6, one_plus=True)
    mlp = FeedForward(width=WIDTH, activation="gelu_pytorch_tanh", gated=True, bias=False)

    def block(window: int | None) -> tuple[Sublayer, ...]:
        own = Attention(
            heads=HEADS,
            kv_heads=2,
            head_dim=8,
            bias=False,
            out_bias=False,
            scale=5.0**-0.5,
            rotary=Rotary(),
            window=window,
            softcap=3.0,
        )
        other = replace(own, source="encoder", rotary=None, window=None)
        parts = (own, other, mlp) if cross else (own, mlp)
        return tuple(Sublayer(f=f, before=rule, branch=rule) for f in parts)

    return TransformerConfig(
        hidden=HIDDEN,
        causal=True,
        embedding=Embedding(vocab=VOCAB, width=HIDDEN, scale=math.sqrt(HIDDEN)),
        encoder_hidden=ENCODER_HIDDEN,
        # A published window counts the token itself.
        segments=(blocks(2, block(window - 1), block(None)),),
        final_norm=rule,
        head=Head(softcap=4.0),
    )


_LLAMA_BODY = (
    Rule("model.embed_tokens.weight", "embedding/token"),
    *linear("model.layers.{}.self_attn.q_proj", "{}/self_attention/query"),
    *linear("model.layers.{}.self_attn.k_proj", "{}/self_attention/key"),
    *linear("model.layers.{}.self_attn.v_proj", "{}/self_attention/value"),
    *linear("model.layers.{}.self_attn.o_proj", "{}/self_attention/out", inputs=2),
    *norm("model.layers.{}.self_attn.q_norm", "{}/self_attention/query_norm"),
    *norm("model.layers.{}.self_attn.k_norm", "{}/self_attention/key_norm"),
    *norm("model.layers.{}.input_layernorm", "{}/self_attention/norm_before"),
    *linear("model.layers.{}.mlp.gate_proj", "{}/mlp/gate"),
    *linear("model.layers.{}.mlp.up_proj", "{}/mlp/up"),
    *linear("model.layers.{}.mlp.down_proj", "{}/mlp/down"),
    *norm("model.norm", "final_norm"),
    Rule("lm_head.weight", "head/kernel"),
)
LLAMA = (
    *_LLAMA_BODY,
    *norm("model.layers.{}.post_attention_layernorm", "{}/mlp/norm_before"),
)
GEMMA2 = (
    *_LLAMA_BODY,
    *norm("model.layers.{}.post_attention_layernorm", "{}/self_attention/norm_branch"),
    *norm("model.layers.{}.pre_feedforward_layernorm", "{}/mlp/norm_before"),
    *norm("model.layers.{}.post_feedforward_layernorm", "{}/mlp/norm_branch"),
)


# Weights -----------------------------------------------------------------------------------------


class Published(dict):
    """Published tensors in memory, as `match` reads them."""

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self[name].dtype, self[name].shape)


def part_of(trunk: TransformerConfig, rules: tuple[Rule, ...], *ignored: str) -> Part:
    """The rules of a model that is one trunk, which stands under "trunk" in the tree."""
    return Part(
        rules=tuple(rule.prefixed("", "trunk") for rule in rules),
        trunks={"trunk": trunk},
        ignored=tuple((pattern, "not of the trunk") for pattern in ignored),
    )


def read(part: Part, published: Published) -> dict:
    """Fill the part's trunks; check that writing them again gives the tensors that were read."""
    declared = {path: transformer_params(trunk) for path, trunk in part.trunks.items()}
    leaves = {p: leaf for p, leaf in flatten_dict(declared).items() if p not in part.aliases}
    plan = match([part], leaves, published, where="the oracle")
    assert not plan.fresh
    values = land(plan.recipes(published, leaves, np.dtype(np.float32)))
    for name, info, make in tensors([part], values):
        assert info == published.info(name)
        np.testing.assert_array_equal(make(), published[name])
    values |= {alias: values[path] for alias, path in part.aliases.items()}
    return unflatten_dict(values)


def lively(trunk: TransformerConfig, seed: int) -> dict:
    """Random parameters of a trunk, all of which matter: no zeros, no ones, large kernels."""
    rng = np.random.default_rng(seed)

    def value(param: Param) -> np.ndarray:
        noise = rng.standard_normal(param.shape, np.float32)
        if isinstance(param.init, str):
            return 0.2 * noise + (param.init == "ones")
        return 0.25 * noise

    return tree_map(value, transformer_params(trunk))
