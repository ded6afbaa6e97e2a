"""DeBERTa-v2's tensors: BERT's, relative positions and a convolution."""

from __future__ import annotations

from dataclasses import replace

from jax_encdec.config import Role
from jax_encdec.convert.layouts import Conv
from jax_encdec.convert.rules import Rule, linear, norm
from jax_encdec.convert.table import BUFFER, NO_HEAD, OTHER_HEAD, Standalone, Table
from jax_encdec.families import FamilyConfig


def body(config: FamilyConfig, role: Role) -> tuple[Rule, ...]:
    """Tensors of DebertaV2Model."""
    layer, leaf = "encoder.layer.{}", "{}/self_attention"
    own = f"{layer}.attention.self"
    return (
        Rule("embeddings.word_embeddings.weight", "embedding/token"),
        Rule("embeddings.position_embeddings.weight", "embedding/position"),
        Rule("embeddings.token_type_embeddings.weight", "embedding/type"),
        *norm("embeddings.LayerNorm", "embedding/norm"),
        *linear(f"{own}.query_proj", f"{leaf}/query"),
        *linear(f"{own}.key_proj", f"{leaf}/key"),
        *linear(f"{own}.value_proj", f"{leaf}/value"),
        *linear(f"{own}.pos_key_proj", f"{leaf}/position_key"),
        *linear(f"{own}.pos_query_proj", f"{leaf}/position_query"),
        # As the TensorFlow class calls them; PyTorch's cannot read its files then.
        *(replace(rule, fallback=True) for rule in _tensorflow_positions(own, leaf)),
        *linear(f"{layer}.attention.output.dense", f"{leaf}/out", inputs=2),
        *norm(f"{layer}.attention.output.LayerNorm", f"{leaf}/norm_after"),
        *linear(f"{layer}.intermediate.dense", "{}/mlp/up"),
        *linear(f"{layer}.output.dense", "{}/mlp/down"),
        *norm(f"{layer}.output.LayerNorm", "{}/mlp/norm_after"),
        Rule("encoder.rel_embeddings.weight", "relative/table"),
        *norm("encoder.LayerNorm", "relative/norm"),
        # Only the first block has one.
        Rule("encoder.conv.conv.weight", "{}/convolution/kernel", Conv()),
        Rule("encoder.conv.conv.bias", "{}/convolution/bias"),
        *norm("encoder.conv.LayerNorm", "{}/convolution/norm_after"),
    )


def _tensorflow_positions(own: str, leaf: str) -> tuple[Rule, ...]:
    return (
        *linear(f"{own}.pos_proj", f"{leaf}/position_key"),
        *linear(f"{own}.pos_q_proj", f"{leaf}/position_query"),
    )


DEBERTA_V2 = Table(
    body=body,
    head=lambda config: (),
    nested="deberta.",
    standalone=lambda config, role: Standalone(("deberta.", "")),
    ignored=(
        ("*embeddings.position_ids", BUFFER),
        ("*embeddings.position_embeddings.weight", "positions that the model does not add"),
        ("cls.*", NO_HEAD),
        ("lm_predictions.*", NO_HEAD),
        ("mask_predictions.*", OTHER_HEAD),
        ("pooler.*", OTHER_HEAD),
        ("classifier.*", OTHER_HEAD),
        ("qa_outputs.*", OTHER_HEAD),
    ),
)

TABLES = {"deberta-v2": DEBERTA_V2}
