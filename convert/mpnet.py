"""MPNet's tensors: BERT's, with attention under names of its own and one bias for all layers."""

from __future__ import annotations

from jax_encdec.config import Role
from jax_encdec.convert.bert import EMBEDDINGS, IGNORED, LAYER, POOLER, feed_forward
from jax_encdec.convert.rules import Rule, linear, norm
from jax_encdec.convert.table import NO_HEAD, Standalone, Table
from jax_encdec.families import FamilyConfig


def body(config: FamilyConfig, role: Role) -> tuple[Rule, ...]:
    """Tensors of MPNetModel."""
    own = "{}/self_attention"
    return (
        *EMBEDDINGS,
        Rule("encoder.relative_attention_bias.weight", "bucket_bias"),
        *linear(f"{LAYER}.attention.attn.q", f"{own}/query"),
        *linear(f"{LAYER}.attention.attn.k", f"{own}/key"),
        *linear(f"{LAYER}.attention.attn.v", f"{own}/value"),
        *linear(f"{LAYER}.attention.attn.o", f"{own}/out", inputs=2),
        *norm(f"{LAYER}.attention.LayerNorm", f"{own}/norm_after"),
        *feed_forward(),
        *POOLER,
    )


MPNET = Table(
    body=body,
    head=lambda config: (),
    nested="mpnet.",
    standalone=lambda config, role: Standalone(("mpnet.", "")),
    ignored=(*IGNORED, ("lm_head.*", NO_HEAD)),
)

TABLES = {"mpnet": MPNET}
