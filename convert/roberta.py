"""RoBERTa's tensors, and those of its namesakes: BERT's body, a head of its own."""

from __future__ import annotations

from jax_encdec.convert.bert import IGNORED, body, decoder_biases
from jax_encdec.convert.rules import Rule, linear, norm
from jax_encdec.convert.table import Standalone, Table
from jax_encdec.families import FamilyConfig


def head(config: FamilyConfig) -> tuple[Rule, ...]:
    """Tensors of RobertaForCausalLM beside the bare model."""
    return (
        *linear("lm_head.dense", "head/transform"),
        *norm("lm_head.layer_norm", "head/norm"),
        Rule("lm_head.decoder.weight", "head/kernel"),
        *decoder_biases(config, "lm_head.bias", "lm_head.decoder.bias"),
    )


ROBERTA = Table(
    body=body,
    head=head,
    nested="roberta.",
    standalone=lambda config, role: Standalone(("roberta.", "")),
    ignored=IGNORED,
)

TABLES = {"roberta": ROBERTA, "xlm-roberta": ROBERTA, "camembert": ROBERTA}
