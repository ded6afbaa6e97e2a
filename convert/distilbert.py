"""DistilBERT's tensors."""

from __future__ import annotations

from jax_encdec.config import Role
from jax_encdec.convert.bert import EMBEDDINGS, IGNORED
from jax_encdec.convert.rules import Rule, linear, norm
from jax_encdec.convert.table import NO_HEAD, OTHER_HEAD, Standalone, Table
from jax_encdec.families import FamilyConfig


def body(config: FamilyConfig, role: Role) -> tuple[Rule, ...]:
    """Tensors of DistilBertModel."""
    layer, own = "transformer.layer.{}", "{}/self_attention"
    return (
        *EMBEDDINGS,
        *linear(f"{layer}.attention.q_lin", f"{own}/query"),
        *linear(f"{layer}.attention.k_lin", f"{own}/key"),
        *linear(f"{layer}.attention.v_lin", f"{own}/value"),
        *linear(f"{layer}.attention.out_lin", f"{own}/out", inputs=2),
        *norm(f"{layer}.sa_layer_norm", f"{own}/norm_after"),
        *linear(f"{layer}.ffn.lin1", "{}/mlp/up"),
        *linear(f"{layer}.ffn.lin2", "{}/mlp/down"),
        *norm(f"{layer}.output_layer_norm", "{}/mlp/norm_after"),
    )


DISTILBERT = Table(
    body=body,
    head=lambda config: (),
    nested="distilbert.",
    standalone=lambda config, role: Standalone(("distilbert.", "")),
    ignored=(
        *IGNORED,
        ("vocab_transform.*", NO_HEAD),
        ("vocab_layer_norm.*", NO_HEAD),
        ("vocab_projector.*", NO_HEAD),
        ("pre_classifier.*", OTHER_HEAD),
    ),
)

TABLES = {"distilbert": DISTILBERT}
