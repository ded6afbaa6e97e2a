"""Tensors of BERT for generation: BERT's body, a head that is one dense layer."""

from __future__ import annotations

from jax_encdec.convert.bert import IGNORED, body, decoder_biases
from jax_encdec.convert.rules import Rule
from jax_encdec.convert.table import Standalone, Table
from jax_encdec.families import FamilyConfig


def head(config: FamilyConfig) -> tuple[Rule, ...]:
    """Tensors of BertGenerationDecoder beside the bare model."""
    return (
        Rule("lm_head.decoder.weight", "head/kernel"),
        *decoder_biases(config, "lm_head.bias", "lm_head.decoder.bias"),
    )


BERT_GENERATION = Table(
    body=body,
    head=head,
    nested="bert.",
    standalone=lambda config, role: Standalone(("bert.", "")),
    ignored=(
        *IGNORED,
        ("*embeddings.token_type_embeddings.weight", "token types, which this family has not"),
    ),
)

TABLES = {"bert-generation": BERT_GENERATION}
