"""ALBERT's tensors: groups of layers, in which a number stands for all that share parameters."""

from __future__ import annotations

from jax_encdec.config import Role
from jax_encdec.convert.bert import EMBEDDINGS, IGNORED
from jax_encdec.convert.layouts import Linear, Vector
from jax_encdec.convert.rules import Rule, linear, norm
from jax_encdec.convert.table import NO_HEAD, OTHER_HEAD, Standalone, Table
from jax_encdec.families import FamilyConfig


def _block(tensor: str, leaf: str) -> tuple[Rule, ...]:
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


def body(config: FamilyConfig, role: Role) -> tuple[Rule, ...]:
    """Tensors of AlbertModel: a group is a segment, an inner layer one of its blocks."""
    groups = (
        _block(f"encoder.albert_layer_groups.{i}.albert_layers.{j}", f"segment_{i}/block_{j}")
        for i, segment in enumerate(config.to_trunk(role).segments)
        for j in range(len(segment.blocks))
    )
    return (
        *EMBEDDINGS,
        *linear("encoder.embedding_hidden_mapping_in", "embedding/project"),
        *(rule for group in groups for rule in group),
        Rule("pooler.weight", "kept/pooler_kernel", Linear()),
        Rule("pooler.bias", "kept/pooler_bias", Vector()),
    )


ALBERT = Table(
    body=body,
    head=lambda config: (),
    nested="albert.",
    standalone=lambda config, role: Standalone(("albert.", "")),
    ignored=(*IGNORED, ("predictions.*", NO_HEAD), ("sop_classifier.*", OTHER_HEAD)),
)

TABLES = {"albert": ALBERT}
