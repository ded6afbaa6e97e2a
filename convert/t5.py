"""T5's tensors: two stacks around one embedding.

As half of a pair, the encoder is named as in T5EncoderModel, and the decoder as in the whole model,
its head beside it and an embedding within.
"""

from __future__ import annotations

from dataclasses import replace

from jax_encdec.config import Role
from jax_encdec.convert.rules import Rule, linear, norm
from jax_encdec.convert.table import OTHER_HALF, OTHER_HEAD, Standalone, Table
from jax_encdec.families import FamilyConfig


def _attention(tensor: str, leaf: str) -> tuple[Rule, ...]:
    return (
        *linear(f"{tensor}.q", f"{leaf}/query"),
        *linear(f"{tensor}.k", f"{leaf}/key"),
        *linear(f"{tensor}.v", f"{leaf}/value"),
        *linear(f"{tensor}.o", f"{leaf}/out", inputs=2),
    )


def stack(config: FamilyConfig, role: Role) -> tuple[Rule, ...]:
    """Tensors of T5Stack."""
    layer, last = "block.{}.layer.", 2 if role == "decoder" else 1
    own, mlp = f"{layer}0.SelfAttention", f"{layer}{last}.DenseReluDense"
    bias = f"{own}.relative_attention_bias.weight"
    gated = getattr(config, "feed_forward_proj", "").startswith("gated-")
    return (
        Rule("embed_tokens.weight", "embedding/token"),
        *_attention(own, "{}/self_attention"),
        # The first layer's serve all of them, or each has its own.
        Rule(bias.format(0), "bucket_bias"),
        Rule(bias, "{}/self_attention/bucket_bias"),
        *norm(f"{layer}0.layer_norm", "{}/self_attention/norm_before"),
        *_attention(f"{layer}1.EncDecAttention", "{}/cross_attention"),
        *norm(f"{layer}1.layer_norm", "{}/cross_attention/norm_before"),
        *linear(f"{mlp}.wi_0", "{}/mlp/gate"),
        *linear(f"{mlp}.wi_1" if gated else f"{mlp}.wi", "{}/mlp/up"),
        *linear(f"{mlp}.wo", "{}/mlp/down"),
        *norm(f"{layer}{last}.layer_norm", "{}/mlp/norm_before"),
        *norm("final_layer_norm", "final_norm"),
    )


def body(config: FamilyConfig, role: Role) -> tuple[Rule, ...]:
    """Tensors of T5EncoderModel, or of the decoder's stack."""
    rules = stack(config, role)
    if role == "decoder":
        return rules
    # The embedding has two names, of which files of today carry the first.
    named = (replace(rule, tensor=f"encoder.{rule.tensor}") for rule in rules)
    return Rule("shared.weight", "embedding/token"), *named


def head(config: FamilyConfig) -> tuple[Rule, ...]:
    """The language model head, tied or not."""
    return (Rule("lm_head.weight", "head/kernel"),)


def whole(config: FamilyConfig) -> tuple[Rule, ...]:
    """Tensors of T5ForConditionalGeneration."""
    return (
        *(rule.prefixed("", "encoder") for rule in body(config, "encoder")),
        *(rule.prefixed("decoder.", "decoder") for rule in body(config, "decoder")),
        *(rule.prefixed("", "decoder") for rule in head(config)),
        # Transformers 5 leaves out a head that is equal, whatever the configuration says.
        Rule("shared.weight", "decoder/head/kernel", fallback=True),
    )


def standalone(config: FamilyConfig, role: Role) -> Standalone:
    """A half of any published T5."""
    if role == "encoder":
        return Standalone(("",), ignored=(("decoder.*", OTHER_HALF),))
    shared = Rule("shared.weight", "embedding/token")
    return Standalone(("decoder.",), (shared,), ignored=(("encoder.*", OTHER_HALF),))


T5 = Table(
    body=body,
    head=head,
    nested="decoder.",
    standalone=standalone,
    ignored=(
        ("*EncDecAttention.relative_attention_bias.weight", "a bias that nothing ever read"),
        ("classification_head.*", OTHER_HEAD),
        ("classifier.*", OTHER_HEAD),
        ("qa_outputs.*", OTHER_HEAD),
    ),
    whole=whole,
)

TABLES = {"t5": T5}
