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
    BucketBias,
    Embedding,
    FeedForward,
    Head,
    Learned,
    Norm,
    Rotary,
    Segment,
    Sublayer,
    TransformerConfig,
)
from jax_encdec.convert.rules import Part, Rule, linear, match, norm, tensors
from jax_encdec.convert.tensor_source import TensorInfo
from jax_encdec.layers import Param, tree_map
from jax_encdec.transformer import transformer_params

VOCAB, HIDDEN, WIDTH, HEADS, HEAD_DIM = 37, 16, 24, 4, 4
ENCODER_HIDDEN = 12
"""Width of the states that decoders with cross-attention read here."""


def blocks(repeat: int, *of: tuple[Sublayer, ...], share: bool = False) -> Segment:
    return Segment(blocks=tuple(Block(sublayers=b) for b in of), repeat=repeat, share=share)


# ModernBERT: one block without a first norm, then periods of two local blocks and a global one ----


def modernbert(window: int = 2, periods: int = 2) -> TransformerConfig:
    rule = Norm(eps=1e-5, bias=False)
    mlp = FeedForward(width=WIDTH, activation="gelu", gated=True, bias=False)

    def block(theta: float, window: int | None, before: Norm | None) -> tuple[Sublayer, ...]:
        attention = Attention(
            heads=HEADS,
            head_dim=HEAD_DIM,
            bias=False,
            out_bias=False,
            rotary=Rotary(theta=theta),
            window=window,
        )
        return Sublayer(f=attention, before=before), Sublayer(f=mlp, before=rule)

    near, far = block(10_000.0, window, rule), block(160_000.0, None, rule)
    return TransformerConfig(
        hidden=HIDDEN,
        embedding=Embedding(vocab=VOCAB, width=HIDDEN, norm=rule),
        segments=(blocks(1, block(160_000.0, None, None)), blocks(periods, near, near, far)),
        final_norm=rule,
    )


MODERNBERT = (
    Rule("embeddings.tok_embeddings.weight", "embedding/token"),
    *norm("embeddings.norm", "embedding/norm"),
    *norm("layers.{}.attn_norm", "{}/self_attention/norm_before"),
    *linear(
        "layers.{}.attn.Wqkv", tuple(f"{{}}/self_attention/{x}" for x in ("query", "key", "value"))
    ),
    *linear("layers.{}.attn.Wo", "{}/self_attention/out", inputs=2),
    *norm("layers.{}.mlp_norm", "{}/mlp/norm_before"),
    *linear("layers.{}.mlp.Wi", ("{}/mlp/gate", "{}/mlp/up")),
    *linear("layers.{}.mlp.Wo", "{}/mlp/down"),
    *norm("final_norm", "final_norm"),
)


# T5: bucketed relative positions, no biases, no scaling -------------------------------------------


def t5(
    role: str, *, gated: bool, layers: int = 2, encoder_hidden: int | None = None
) -> TransformerConfig:
    rule, decoder = Norm(kind="rms", eps=1e-6), role == "decoder"
    own = Attention(
        heads=HEADS, head_dim=6, bias=False, out_bias=False, scale=1.0, bucket_bias=True
    )
    cross = replace(own, source="encoder", bucket_bias=False)
    activation = "gelu_new" if gated else "relu"
    mlp = FeedForward(width=WIDTH, activation=activation, gated=gated, bias=False)
    parts = (own, cross, mlp) if decoder else (own, mlp)
    head = Head(tied=False) if gated else Head(scale=HIDDEN**-0.5)
    return TransformerConfig(
        hidden=HIDDEN,
        causal=decoder,
        embedding=Embedding(vocab=VOCAB, width=HIDDEN),
        encoder_hidden=encoder_hidden,
        bucket_bias=BucketBias(buckets=8, max_distance=12, bidirectional=not decoder),
        segments=(blocks(layers, tuple(Sublayer(f=f, before=rule) for f in parts)),),
        final_norm=rule,
        head=head if decoder else None,
    )


def t5_rules(role: str, gated: bool) -> tuple[Rule, ...]:
    def attention(tensor: str, leaf: str, letters: str = "qkvo") -> tuple[Rule, ...]:
        names = zip(letters, ("query", "key", "value", "out"), strict=True)
        return tuple(
            rule
            for letter, name in names
            for rule in linear(f"{tensor}.{letter}", f"{leaf}/{name}", inputs=1 + (name == "out"))
        )

    block, last = "block.{}.layer.", 2 if role == "decoder" else 1
    mlp = f"{block}{last}.DenseReluDense"
    up = "wi_1" if gated else "wi"
    return (
        Rule("embed_tokens.weight", "embedding/token"),
        Rule(block.format(0) + "0.SelfAttention.relative_attention_bias.weight", "bucket_bias"),
        *attention(f"{block}0.SelfAttention", "{}/self_attention"),
        *norm(f"{block}0.layer_norm", "{}/self_attention/norm_before"),
        *attention(f"{block}1.EncDecAttention", "{}/cross_attention"),
        *norm(f"{block}1.layer_norm", "{}/cross_attention/norm_before"),
        *linear(f"{mlp}.{up}", "{}/mlp/up"),
        *linear(f"{mlp}.wi_0", "{}/mlp/gate"),
        *linear(f"{mlp}.wo", "{}/mlp/down"),
        *norm(f"{block}{last}.layer_norm", "{}/mlp/norm_before"),
        *norm("final_layer_norm", "final_norm"),
    )


def t5_part(
    encoder: TransformerConfig, decoder: TransformerConfig | None = None, *, gated: bool
) -> Part:
    """The encoder or both halves, around an embedding that they share."""
    trunks = {"encoder": encoder} | ({"decoder": decoder} if decoder else {})
    token = ("embedding", "token")
    return Part(
        rules=(
            Rule("shared.weight", "encoder/embedding/token"),
            *(r.prefixed(f"{role}.", role) for role in trunks for r in t5_rules(role, gated)),
            # Tied, the head is the embedding under a third name.
            Rule("lm_head.weight", "decoder/head/kernel"),
        ),
        trunks=trunks,
        aliases={("decoder", *token): ("encoder", *token)} if decoder else {},
        ignored=(("lm_head.weight", "tied"),),
    )


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


# ALBERT and ELECTRA: embeddings narrower than the trunk, ALBERT's layers shared -------------------


def factorised(
    *segments: tuple[int, int], share: bool, activation: str, embedding: int = 8
) -> TransformerConfig:
    """BERT behind narrow embeddings; `segments` are (blocks in a period, repeat)."""
    rule = Norm(eps=1e-12)
    block = (
        Sublayer(f=Attention(heads=HEADS, head_dim=HEAD_DIM), after=rule),
        Sublayer(f=FeedForward(width=WIDTH, activation=activation), after=rule),
    )
    return TransformerConfig(
        hidden=HIDDEN,
        embedding=Embedding(
            vocab=VOCAB,
            width=embedding,
            types=2,
            position=Learned(length=40),
            norm=rule,
            project=True,
        ),
        segments=tuple(blocks(n, *[block] * size, share=share) for size, n in segments),
    )


_BERT_EMBEDDINGS = (
    Rule("embeddings.word_embeddings.weight", "embedding/token"),
    Rule("embeddings.position_embeddings.weight", "embedding/position"),
    Rule("embeddings.token_type_embeddings.weight", "embedding/type"),
    *norm("embeddings.LayerNorm", "embedding/norm"),
)


def albert_rules(trunk: TransformerConfig) -> tuple[Rule, ...]:
    """A segment is a group of shared layers, a block one of the group's inner layers."""

    def block(tensor: str, leaf: str) -> tuple[Rule, ...]:
        return (
            *linear(f"{tensor}.attention.query", f"{leaf}/self_attention/query"),
            *linear(f"{tensor}.attention.key", f"{leaf}/self_attention/key"),
            *linear(f"{tensor}.attention.value", f"{leaf}/self_attention/value"),
            *linear(f"{tensor}.attention.dense", f"{leaf}/self_attention/out", inputs=2),
            *norm(f"{tensor}.attention.LayerNorm", f"{leaf}/self_attention/norm_after"),
            *linear(f"{tensor}.ffn", f"{leaf}/mlp/up"),
            *linear(f"{tensor}.ffn_output", f"{leaf}/mlp/down"),
            *norm(f"{tensor}.full_layer_layer_norm", f"{leaf}/mlp/norm_after"),
        )

    groups = (
        block(f"encoder.albert_layer_groups.{i}.albert_layers.{j}", f"segment_{i}/block_{j}")
        for i, segment in enumerate(trunk.segments)
        for j in range(len(segment.blocks))
    )
    project = linear("encoder.embedding_hidden_mapping_in", "embedding/project")
    return (*_BERT_EMBEDDINGS, *project, *(rule for group in groups for rule in group))


def _electra_layer(layer: str = "encoder.layer.{}") -> tuple[Rule, ...]:
    return (
        *linear(f"{layer}.attention.self.query", "{}/self_attention/query"),
        *linear(f"{layer}.attention.self.key", "{}/self_attention/key"),
        *linear(f"{layer}.attention.self.value", "{}/self_attention/value"),
        *linear(f"{layer}.attention.output.dense", "{}/self_attention/out", inputs=2),
        *norm(f"{layer}.attention.output.LayerNorm", "{}/self_attention/norm_after"),
        *linear(f"{layer}.intermediate.dense", "{}/mlp/up"),
        *linear(f"{layer}.output.dense", "{}/mlp/down"),
        *norm(f"{layer}.output.LayerNorm", "{}/mlp/norm_after"),
    )


ELECTRA = (
    *_BERT_EMBEDDINGS,
    *linear("embeddings_project", "embedding/project"),
    *_electra_layer(),
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
    values = dict(plan.leaves(published, leaves, None))
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
