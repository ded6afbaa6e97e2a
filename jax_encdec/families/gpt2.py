"""GPT-2 (Radford et al. 2019): learned positions, pre-norm blocks; causal in either role."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from jax_encdec.config import (
    Attention,
    Dropout,
    Embedding,
    FeedForward,
    Head,
    Learned,
    Norm,
    Role,
    Source,
    Sublayer,
    TransformerConfig,
)
from jax_encdec.families.base import FamilyConfig, usual_segment


@dataclass(frozen=True, kw_only=True)
class GPT2Config(FamilyConfig):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "gpt2"
    limits: ClassVar[str] = "as an encoder, causal as it was trained"

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.require(
            vocab_size=self.vocab_size,
            n_positions=self.n_positions,
            n_layer=self.n_layer,
            layer_norm_epsilon=self.layer_norm_epsilon,
        )
        if self.n_inner is not None:
            self.require(n_inner=self.n_inner)
        self.require_heads("n_embd", self.n_embd, "n_head", self.n_head)

    def layers_field(self, role: Role) -> str:
        """Name of the field that holds the number of layers."""
        return "n_layer"

    def to_trunk(self, role: Role) -> TransformerConfig:
        """Translate into the trunk's configuration."""
        norm = Norm(eps=self.layer_norm_epsilon)

        def attention(source: Source) -> Sublayer:
            f = Attention(
                source=source,
                heads=self.n_head,
                head_dim=self.n_embd // self.n_head,
                scale=None if self.scale_attn_weights else 1.0,
                scale_by_layer=self.scale_attn_by_inverse_layer_idx,
            )
            return Sublayer(f=f, before=norm)

        mlp = Sublayer(
            f=FeedForward(
                width=4 * self.n_embd if self.n_inner is None else self.n_inner,
                activation=self.activation_function,
            ),
            before=norm,
        )
        layers = self.n_layer
        return TransformerConfig(
            hidden=self.n_embd,
            causal=True,
            embedding=Embedding(
                vocab=self.vocab_size,
                width=self.n_embd,
                position=Learned(length=self.n_positions),
            ),
            segments=(usual_segment(role, attention, mlp, layers),),
            final_norm=norm,
            head=Head(tied=self.tie_word_embeddings) if role == "decoder" else None,
            dropout=Dropout(
                embedding=self.embd_pdrop, residual=self.resid_pdrop, attention=self.attn_pdrop
            ),
            init_std=self.initializer_range,
            # Residual projections start smaller with depth (section 2.3 of the paper).
            residual_init_std=self.initializer_range / math.sqrt(2 * self.n_layer),
        )
