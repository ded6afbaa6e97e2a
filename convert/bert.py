"""BERT's tensors, whose body its kin share."""

from __future__ import annotations

from jax_encdec.config import Role
from jax_encdec.convert.layouts import Linear, Vector
from jax_encdec.convert.rules import Rule, linear, norm
from jax_encdec.convert.table import BUFFER, OTHER_HEAD, Standalone, Table
from jax_encdec.families import FamilyConfig

EMBEDDINGS = (
    Rule("embeddings.word_embeddings.weight", "embedding/token"),
    Rule("embeddings.position_embeddings.weight", "embedding/position"),
    Rule("embeddings.token_type_embeddings.weight", "embedding/type"),
    *norm("embeddings.LayerNorm", "embedding/norm"),
)
LAYER = "encoder.layer.{}"
POOLER = (
    Rule("pooler.dense.weight", "kept/pooler_kernel", Linear()),
    Rule("pooler.dense.bias", "kept/pooler_bias", Vector()),
)


def blocks(
    attention_norm: str = "output.LayerNorm",
    mlp_norm: str = "output.LayerNorm",
    place: str = "norm_after",
) -> tuple[Rule, ...]:
    """Tensors of the layers; kin differ in where the norms are, and so in what they are called."""

    def attention(tensor: str, leaf: str) -> tuple[Rule, ...]:
        return (
            *linear(f"{tensor}.self.query", f"{leaf}/query"),
            *linear(f"{tensor}.self.key", f"{leaf}/key"),
            *linear(f"{tensor}.self.value", f"{leaf}/value"),
            *linear(f"{tensor}.output.dense", f"{leaf}/out", inputs=2),
            *norm(f"{tensor}.{attention_norm}", f"{leaf}/{place}"),
        )

    return (
        *attention(f"{LAYER}.attention", "{}/self_attention"),
        *attention(f"{LAYER}.crossattention", "{}/cross_attention"),
        *feed_forward(mlp_norm, place),
    )


def feed_forward(mlp_norm: str = "output.LayerNorm", place: str = "norm_after") -> tuple[Rule, ...]:
    """Tensors of the layers' feed-forward."""
    return (
        *linear(f"{LAYER}.intermediate.dense", "{}/mlp/up"),
        *linear(f"{LAYER}.output.dense", "{}/mlp/down"),
        *norm(f"{LAYER}.{mlp_norm}", f"{{}}/mlp/{place}"),
    )


def body(config: FamilyConfig, role: Role) -> tuple[Rule, ...]:
    """Tensors of BertModel."""
    return (*EMBEDDINGS, *blocks(), *POOLER)


def decoder_biases(config: FamilyConfig, outer: str, inner: str) -> tuple[Rule, ...]:
    """The bias of the logits, beside the head's kernel and inside it."""
    # The bias is published twice. Untied, the forward pass reads only the inner one.
    if config.ties_head:
        return Rule(outer, "head/bias"), Rule(inner, "head/bias")
    return (
        Rule(inner, "head/bias"),
        Rule(outer, "kept/head_bias"),
        Rule(outer, "head/bias", fallback=True),  # files older than the inner one
    )


def bert_head(config: FamilyConfig) -> tuple[Rule, ...]:
    """Tensors of BertLMHeadModel beside the bare model."""
    stem = "cls.predictions"
    return (
        *linear(f"{stem}.transform.dense", "head/transform"),
        *norm(f"{stem}.transform.LayerNorm", "head/norm"),
        Rule(f"{stem}.decoder.weight", "head/kernel"),
        *decoder_biases(config, f"{stem}.bias", f"{stem}.decoder.bias"),
    )


IGNORED = (
    ("*embeddings.position_ids", BUFFER),
    ("*embeddings.token_type_ids", BUFFER),
    ("cls.seq_relationship.*", OTHER_HEAD),
    ("classifier.*", OTHER_HEAD),
    ("qa_outputs.*", OTHER_HEAD),
    ("*pooler.dense.*", "a pooler, which a decoder has not"),
)

BERT = Table(
    body=body,
    head=bert_head,
    nested="bert.",
    standalone=lambda config, role: Standalone(("bert.", "")),
    ignored=IGNORED,
)

TABLES = {"bert": BERT}
