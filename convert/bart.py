"""BART's tensors: two like halves, as sides of a pair or as the whole published model."""

from __future__ import annotations

from jax_encdec.config import Role
from jax_encdec.convert.rules import Row, Rule, linear, norm
from jax_encdec.convert.table import BUFFER, OTHER_HALF, OTHER_HEAD, Standalone, Table
from jax_encdec.families import FamilyConfig


def _attention(tensor: str, leaf: str) -> tuple[Rule, ...]:
    return (
        *linear(f"{tensor}.q_proj", f"{leaf}/query"),
        *linear(f"{tensor}.k_proj", f"{leaf}/key"),
        *linear(f"{tensor}.v_proj", f"{leaf}/value"),
        *linear(f"{tensor}.out_proj", f"{leaf}/out", inputs=2),
        *norm(f"{tensor}_layer_norm", f"{leaf}/norm_after"),
    )


def body(config: FamilyConfig, role: Role) -> tuple[Rule, ...]:
    """Tensors of BartEncoder or BartDecoder."""
    return (
        Rule("embed_tokens.weight", "embedding/token"),
        Rule("embed_positions.weight", "embedding/position"),
        *norm("layernorm_embedding", "embedding/norm"),
        *_attention("layers.{}.self_attn", "{}/self_attention"),
        *_attention("layers.{}.encoder_attn", "{}/cross_attention"),
        *linear("layers.{}.fc1", "{}/mlp/up"),
        *linear("layers.{}.fc2", "{}/mlp/down"),
        *norm("layers.{}.final_layer_norm", "{}/mlp/norm_after"),
    )


def head(config: FamilyConfig) -> tuple[Rule, ...]:
    """Tensors of BartForCausalLM beside the bare decoder."""
    return (Rule("lm_head.weight", "head/kernel"),)


def whole(config: FamilyConfig) -> tuple[Rule, ...]:
    """Tensors of BartForConditionalGeneration."""
    shared = "encoder/embedding/token" if config.ties_head else "encoder/kept/shared"
    return (
        Rule("model.shared.weight", shared),
        *(rule.prefixed("model.encoder.", "encoder") for rule in body(config, "encoder")),
        *(rule.prefixed("model.decoder.", "decoder") for rule in body(config, "decoder")),
        Rule("lm_head.weight", "decoder/head/kernel"),
        Rule("final_logits_bias", "decoder/head/bias", Row()),
    )


def standalone(config: FamilyConfig, role: Role) -> Standalone:
    """A half of any published BART: BartModel, BartForConditionalGeneration, BartForCausalLM."""
    other = "decoder" if role == "encoder" else "encoder"
    shared = ("model.shared.weight", "shared.weight")
    tied = config.ties_head
    return Standalone(
        prefixes=(f"model.{role}.", f"{role}."),
        rules=tuple(Rule(name, "embedding/token") for name in shared) if tied else (),
        ignored=(
            (f"model.{other}.*", OTHER_HALF),
            (f"{other}.*", OTHER_HALF),
            *((name, OTHER_HALF) for name in shared if not tied),
        ),
    )


BART = Table(
    body=body,
    head=head,
    nested="model.decoder.",
    standalone=standalone,
    ignored=(
        ("classification_head.*", OTHER_HEAD),
        ("*encoder.version", BUFFER),
        ("*decoder.version", BUFFER),
        ("final_logits_bias", "a bias that only the whole model adds"),
    ),
    whole=whole,
)

TABLES = {"bart": BART}
