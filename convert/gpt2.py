"""GPT-2's tensors: kernels stored untransposed, queries, keys and values fused."""

from __future__ import annotations

from jax_encdec.config import Role
from jax_encdec.convert.rules import Rule, conv1d, norm
from jax_encdec.convert.table import BUFFER, OTHER_HEAD, Standalone, Table
from jax_encdec.families import FamilyConfig


def body(config: FamilyConfig, role: Role) -> tuple[Rule, ...]:
    """Tensors of GPT2Model."""
    own, cross = "{}/self_attention", "{}/cross_attention"
    return (
        Rule("wte.weight", "embedding/token"),
        Rule("wpe.weight", "embedding/position"),
        *norm("h.{}.ln_1", f"{own}/norm_before"),
        *conv1d("h.{}.attn.c_attn", (f"{own}/query", f"{own}/key", f"{own}/value")),
        *conv1d("h.{}.attn.c_proj", f"{own}/out", inputs=2),
        *norm("h.{}.ln_cross_attn", f"{cross}/norm_before"),
        *conv1d("h.{}.crossattention.q_attn", f"{cross}/query"),
        *conv1d("h.{}.crossattention.c_attn", (f"{cross}/key", f"{cross}/value")),
        *conv1d("h.{}.crossattention.c_proj", f"{cross}/out", inputs=2),
        *norm("h.{}.ln_2", "{}/mlp/norm_before"),
        *conv1d("h.{}.mlp.c_fc", "{}/mlp/up"),
        *conv1d("h.{}.mlp.c_proj", "{}/mlp/down"),
        *norm("ln_f", "final_norm"),
    )


def head(config: FamilyConfig) -> tuple[Rule, ...]:
    """Tensors of GPT2LMHeadModel beside the bare model."""
    return (Rule("lm_head.weight", "head/kernel"),)


GPT2 = Table(
    body=body,
    head=head,
    nested="transformer.",
    standalone=lambda config, role: Standalone(("transformer.", "")),
    ignored=(
        ("*.attn.bias", BUFFER),
        ("*.attn.masked_bias", BUFFER),
        ("*crossattention.bias", BUFFER),
        ("*crossattention.masked_bias", BUFFER),
        ("multiple_choice_head.*", OTHER_HEAD),
        ("score.*", OTHER_HEAD),
    ),
)

TABLES = {"gpt2": GPT2}
