"""BART's tensors, and its descendants': two like halves, sides of a pair or one published model."""

from __future__ import annotations

from jax_encdec.config import Role
from jax_encdec.convert.layouts import Row
from jax_encdec.convert.rules import Rule, linear, norm
from jax_encdec.convert.table import (
    BUFFER,
    OTHER_HALF,
    OTHER_HEAD,
    Standalone,
    Table,
)
from jax_encdec.families import FamilyConfig
from jax_encdec.families.bart import BartConfig, BartKin

_SHARED = ("model.shared.weight", "shared.weight")


def _attention(tensor: str, leaf: str, place: str) -> tuple[Rule, ...]:
    return (
        *linear(f"{tensor}.q_proj", f"{leaf}/query"),
        *linear(f"{tensor}.k_proj", f"{leaf}/key"),
        *linear(f"{tensor}.v_proj", f"{leaf}/value"),
        *linear(f"{tensor}.out_proj", f"{leaf}/out", inputs=2),
        *norm(f"{tensor}_layer_norm", f"{leaf}/{place}"),
    )


def body(config: FamilyConfig, role: Role) -> tuple[Rule, ...]:
    """Tensors of BartEncoder or BartDecoder; of those whose leaf a family lacks it has none."""
    assert isinstance(config, BartKin)
    place = "norm_before" if config.pre_norm else "norm_after"
    return (
        Rule("embed_tokens.weight", "embedding/token"),
        Rule("embed_positions.weight", "embedding/position"),
        *norm("layernorm_embedding", "embedding/norm"),
        *_attention("layers.{}.self_attn", "{}/self_attention", place),
        *_attention("layers.{}.encoder_attn", "{}/cross_attention", place),
        *linear("layers.{}.fc1", "{}/mlp/up"),
        *linear("layers.{}.fc2", "{}/mlp/down"),
        *norm("layers.{}.final_layer_norm", f"{{}}/mlp/{place}"),
        *norm("layer_norm", "final_norm"),
    )


def head(config: FamilyConfig) -> tuple[Rule, ...]:
    """Tensors of BartForCausalLM beside the bare decoder."""
    return (Rule("lm_head.weight", "head/kernel"),)


def whole(config: FamilyConfig) -> tuple[Rule, ...]:
    """Tensors of BartForConditionalGeneration."""
    assert isinstance(config, BartConfig)
    shared: tuple[Rule, ...] = ()
    if config.shares_embeddings:
        shared = (Rule(_SHARED[0], "encoder/embedding/token"),)
    elif config.publishes_shared:
        # Files that were tied when they were written hold this one alone.
        tokens = ("encoder/embedding/token", "decoder/embedding/token")
        shared = (
            Rule(_SHARED[0], "encoder/kept/shared"),
            *(Rule(_SHARED[0], token, fallback=True) for token in tokens),
        )
    return (
        *shared,
        *(rule.prefixed("model.encoder.", "encoder") for rule in body(config, "encoder")),
        *(rule.prefixed("model.decoder.", "decoder") for rule in body(config, "decoder")),
        Rule("lm_head.weight", "decoder/head/kernel"),
        Rule("final_logits_bias", "decoder/head/bias", Row()),
    )


def standalone(config: FamilyConfig, role: Role) -> Standalone:
    """A half of any published BART: BartModel, BartForConditionalGeneration, BartForCausalLM."""
    assert isinstance(config, BartConfig)
    other = "decoder" if role == "encoder" else "encoder"
    own = not config.shares_embeddings
    return Standalone(
        prefixes=(f"model.{role}.", f"{role}."),
        rules=tuple(Rule(name, "embedding/token", fallback=own) for name in _SHARED),
        ignored=(
            (f"model.{other}.*", OTHER_HALF),
            (f"{other}.*", OTHER_HALF),
            *((name, OTHER_HALF) for name in _SHARED if own),
        ),
    )


IGNORED = (
    ("classification_head.*", OTHER_HEAD),
    ("qa_outputs.*", OTHER_HEAD),
    ("*encoder.version", BUFFER),
    ("*decoder.version", BUFFER),
    ("*embed_positions.weights", BUFFER),
    ("*embed_positions._float_tensor", BUFFER),
    ("final_logits_bias", "a bias that only the whole model adds"),
)

BART = Table(
    body=body,
    head=head,
    nested="model.decoder.",
    standalone=standalone,
    ignored=IGNORED,
    whole=whole,
)

TABLES = {"bart": BART}
