"""ModernBERT's tensors: queries, keys and values fused, and so are gate and up."""

from __future__ import annotations

from jax_encdec.config import Role
from jax_encdec.convert.rules import Rule, linear, norm
from jax_encdec.convert.table import NO_HEAD, OTHER_HEAD, Standalone, Table
from jax_encdec.families import FamilyConfig


def body(config: FamilyConfig, role: Role) -> tuple[Rule, ...]:
    """Tensors of ModernBertModel."""
    own = "{}/self_attention"
    return (
        Rule("embeddings.tok_embeddings.weight", "embedding/token"),
        *norm("embeddings.norm", "embedding/norm"),
        *linear("layers.{}.attn.Wqkv", (f"{own}/query", f"{own}/key", f"{own}/value")),
        *linear("layers.{}.attn.Wo", f"{own}/out", inputs=2),
        *norm("layers.{}.attn_norm", f"{own}/norm_before"),
        *linear("layers.{}.mlp.Wi", ("{}/mlp/gate", "{}/mlp/up")),
        *linear("layers.{}.mlp.Wo", "{}/mlp/down"),
        *norm("layers.{}.mlp_norm", "{}/mlp/norm_before"),
        *norm("final_norm", "final_norm"),
    )


MODERNBERT = Table(
    body=body,
    head=lambda config: (),
    nested="model.",
    standalone=lambda config, role: Standalone(("model.", "")),
    ignored=(
        ("head.*", NO_HEAD),
        ("decoder.*", NO_HEAD),
        ("classifier.*", OTHER_HEAD),
    ),
)

TABLES = {"modernbert": MODERNBERT}
