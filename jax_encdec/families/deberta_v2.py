"""DeBERTa-v2 and v3 (He et al. 2021): BERT whose attention tells content and position apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from jax_encdec.config import (
    Attention,
    Block,
    Convolution,
    Embedding,
    Kept,
    RelativeTable,
    Role,
    Segment,
    Sublayer,
)
from jax_encdec.errors import ConfigError
from jax_encdec.families.base import periodic_segments
from jax_encdec.families.bert import BertKin

_TERMS: tuple[Literal["c2p", "p2c"], ...] = ("c2p", "p2c")


@dataclass(frozen=True, kw_only=True)
class DebertaV2Config(BertKin):
    """The published configuration, with the published defaults."""

    model_type: ClassVar[str] = "deberta-v2"
    roles: ClassVar[tuple[Role, ...]] = ("encoder",)
    limits: ClassVar[str] = "embedding_size must equal hidden_size, as in all published models"

    vocab_size: int = 128100
    hidden_size: int = 1536
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    layer_norm_eps: float = 1e-7
    type_vocab_size: int = 0
    relative_attention: bool = False
    max_relative_positions: int = -1
    """Below one: as `max_position_embeddings`."""
    position_buckets: int = -1
    """Below one: every distance has a row of its own."""
    position_biased_input: bool = True
    """Positions enter with the tokens, too."""
    pos_att_type: str | tuple[str, ...] | None = None
    """Of "c2p" and "p2c", with "|" between them in a string."""
    share_att_key: bool = False
    norm_rel_ebd: str = "none"
    conv_kernel_size: int = 0
    conv_act: str = "tanh"
    conv_groups: int = 1

    def __post_init__(self):
        super().__post_init__()
        size, heads = self.hidden_size, self.num_attention_heads
        # Keys that some files carry, and that say the same in every published one.
        for name, usual in (("embedding_size", size), ("attention_head_size", size // heads)):
            if (got := self.extra.get(name, usual)) != usual:
                raise ConfigError(f"{name} other than {usual} is not supported here; got {got!r}")
        if unknown := sorted(set(self.named(self.pos_att_type)) - set(_TERMS)):
            raise ConfigError(f"pos_att_type must name 'c2p' and 'p2c' only; got {unknown[0]!r}")
        if self.norms_table and not self.relative_attention:
            raise ConfigError("norm_rel_ebd 'layer_norm' needs relative_attention to be true")
        if self.conv_kernel_size > 0 and self.conv_kernel_size % 2 == 0:
            raise ConfigError(f"conv_kernel_size must be odd; got {self.conv_kernel_size}")
        self.require(conv_groups=self.conv_groups)
        if size % self.conv_groups:
            raise ConfigError(f"conv_groups must divide hidden_size {size}; got {self.conv_groups}")
        # The logarithm starts at half of the buckets and must have distances left.
        most = 2 * self.span_limit - 4
        if self.position_buckets > 0 and not 2 <= self.position_buckets <= most:
            raise ConfigError(f"position_buckets must be 2 to {most}; got {self.position_buckets}")

    @staticmethod
    def named(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
        """The names in a list, or in a string with "|" between them."""
        names = value.lower().split("|") if isinstance(value, str) else value or ()
        return tuple(name.strip() for name in names if name.strip())

    @property
    def norms_table(self) -> bool:
        """Whether the relative positions' embeddings are normalised."""
        return "layer_norm" in self.named(self.norm_rel_ebd)

    @property
    def span_limit(self) -> int:
        """The largest distance that is told from larger ones."""
        stated = self.max_relative_positions
        return self.max_position_embeddings if stated < 1 else stated

    def embedding(self) -> Embedding:
        """Tokens, with positions and types where they are asked for; pads enter as zeros."""
        position = self.position_table() if self.position_biased_input else None
        return replace(
            super().embedding(), position=position, types=self.type_vocab_size, mask_pads=True
        )

    def kept(self, role: Role) -> tuple[Kept, ...]:
        """The bare model has nothing that is not read."""
        return ()

    def segments(self, role: Role) -> tuple[Segment, ...]:
        """BERT's blocks, of which the first may have a convolution."""
        own, mlp = super().segments(role)[0].blocks[0].sublayers
        assert isinstance(own.f, Attention)
        terms = tuple(t for t in _TERMS if t in self.named(self.pos_att_type))
        f = replace(
            own.f,
            # Each term adds to the variance, whether or not positions are relative.
            scale=((1 + len(terms)) * own.f.head_dim) ** -0.5,
            disentangled=terms if self.relative_attention else (),
            shared_positions=self.share_att_key,
        )
        usual = (replace(own, f=f), mlp)
        blocks = [Block(sublayers=usual)] * self.num_hidden_layers
        if self.conv_kernel_size > 0:
            width, groups = self.conv_kernel_size, self.conv_groups
            convolution = Convolution(width=width, activation=self.conv_act, groups=groups)
            last = Sublayer(f=convolution, after=self.norm, dropout=False)
            first = Segment(blocks=(Block(sublayers=(*usual, last)),), repeat=1)
            return first, *periodic_segments(blocks[1:])
        return periodic_segments(blocks)

    def relative(self) -> RelativeTable | None:
        """As many rows as there are buckets or distances, in either direction."""
        if not self.relative_attention:
            return None
        buckets, limit = self.position_buckets, self.span_limit
        return RelativeTable(
            span=buckets if buckets > 0 else limit,
            max_distance=limit if buckets > 0 else None,
            norm=self.norm if self.norms_table else None,
        )
