"""The trunk's configuration: one Transformer, composed from a few orthogonal parts.

Every supported architecture is a value of `TransformerConfig`. A `Block` is a tuple of `Sublayer`s,
and one line of `Sublayer` says pre-, post- and sandwich-norm, self- and cross-attention alike:

    x = after(x + branch(f(before(x))))

Blocks repeat in `Segment`s, whose parameters are stacked `[repeat, ...]` so that one `scan` runs
them. Everything here is frozen and hashable: a configuration is a static argument of `jax.jit`.
Families (BERT, GPT-2, ...) translate their published configuration into these parts, one way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jax_encdec.errors import ConfigError

Role = Literal["encoder", "decoder"]
Source = Literal["self", "encoder"]
"""Whose states an attention's keys and values are made of: the trunk's own, or the encoder's."""


ACTIVATIONS = (
    "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu",
    "relu2", "silu", "swish", "tanh", "sigmoid", "mish", "linear",
)  # fmt: skip
"""Published names of activations; `layers.activation` computes them."""


def check_activation(name: str) -> None:
    """Refuse an activation that nobody computes."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")


@dataclass(frozen=True, kw_only=True)
class Norm:
    """Layer norm (Ba et al. 2016) or RMS norm (Zhang & Sennrich 2019)."""

    kind: Literal["layer", "rms"] = "layer"
    eps: float = 1e-12
    bias: bool = True
    one_plus: bool = False
    """The learned scale is stored as its difference from one (Gemma)."""


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary position embedding (Su et al. 2021): pairs of each head's numbers are rotated."""

    theta: float = 10_000.0
    interleaved: bool = False
    """Pairs are neighbours (RoFormer); else number i goes with number i + head_dim / 2."""
    values: bool = False
    """Rotate the values, too."""


@dataclass(frozen=True, kw_only=True)
class BucketBias:
    """A learned bias per head and bucketed distance (Raffel et al. 2020)."""

    buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True
    per_layer: bool = False
    """Each attention has a table of its own (UMT5); else all share the trunk's."""


@dataclass(frozen=True, kw_only=True)
class RelativeTable:
    """Embeddings of relative positions, for disentangled attention (He et al. 2021).

    The trunk has `2 * span` of them; distances beyond the span share the outermost ones. With
    `max_distance`, distances are bucketed first, logarithmically from half of the span on.
    """

    span: int
    max_distance: int | None = None
    norm: Norm | None = None


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Multi-head or, with `kv_heads < heads`, grouped-query attention (Ainslie et al. 2023)."""

    source: Source = "self"
    heads: int
    head_dim: int
    kv_heads: int | None = None
    """None: as many as `heads`."""
    bias: bool = True
    """Biases on the query, key and value projections."""
    out_bias: bool = True
    scale: float | None = None
    """Factor on the scores; None: `head_dim ** -0.5`."""
    scale_by_layer: bool = False
    """Divide the scores by the layer's number, counted from one (GPT-2's option)."""
    rotary: Rotary | None = None
    bucket_bias: bool = False
    """Add a bucketed relative position bias, as the trunk defines it."""
    disentangled: tuple[Literal["c2p", "p2c"], ...] = ()
    """Terms between contents and the trunk's relative positions that are added to the scores:
    content to position, position to content (DeBERTa)."""
    shared_positions: bool = True
    """Relative positions go through the contents' own query and key projections."""
    window: int | None = None
    """The largest distance `|query - key|` attended to; None: no limit."""
    global_projections: bool = False
    """Chosen tokens see and are seen by all, through projections of their own, whatever the
    window (Longformer, Beltagy et al. 2020)."""
    softcap: float | None = None
    qk_norm: Norm | None = None

    @property
    def groups(self) -> int:
        """Number of key and value heads."""
        return self.kv_heads or self.heads

    def __post_init__(self):
        if self.rotary is not None and self.head_dim % 2:
            raise ConfigError(f"rotary heads must be of even size; got {self.head_dim}")
        if self.heads % self.groups:
            raise ConfigError(
                f"attention heads must be a multiple of key/value heads; got {self.heads} heads "
                f"and {self.groups} key/value heads"
            )


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """Two dense layers; `gated`: `down(act(gate(x)) * up(x))` (Shazeer 2020)."""

    width: int
    activation: str
    gated: bool = False
    bias: bool = True

    def __post_init__(self):
        check_activation(self.activation)


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """A convolution over the block's input, beside what the block has made of it (DeBERTa-v2)."""

    width: int
    activation: str
    groups: int = 1

    def __post_init__(self):
        check_activation(self.activation)
        if self.width % 2 == 0:
            raise ConfigError(f"a convolution's width must be odd; got {self.width}")


@dataclass(frozen=True, kw_only=True)
class Sublayer:
    """`x = after(x + branch(f(before(x))))`, each norm optional."""

    f: Attention | FeedForward | Convolution
    before: Norm | None = None
    branch: Norm | None = None
    after: Norm | None = None
    dropout: bool = True
    """Whether the residual dropout applies to this branch (not to ALBERT's feed-forward)."""

    @property
    def name(self) -> str:
        """The sublayer's place in the parameter tree."""
        if isinstance(self.f, Convolution):
            return "convolution"
        if isinstance(self.f, FeedForward):
            return "mlp"
        return "self_attention" if self.f.source == "self" else "cross_attention"


@dataclass(frozen=True, kw_only=True)
class Block:
    """Sublayers in order."""

    sublayers: tuple[Sublayer, ...]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A period of blocks, run `repeat` times with parameters of its own or shared (ALBERT)."""

    blocks: tuple[Block, ...]
    repeat: int
    share: bool = False


MAX_COMPUTED_ROWS = 1 << 16
"""Positions that a computed table may have."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A learned position table of `length` rows; position p reads row `p + offset`.

    With `pad_token_id` set, pads do not advance the position and read row `offset - 1` (RoBERTa).
    """

    length: int
    offset: int = 0
    pad_token_id: int | None = None
    fixed: bool = False
    """Sines, then cosines (Vaswani et al. 2017): published with the weights, never trained."""

    def __post_init__(self):
        # Computed where a file lacks it, so that nothing else bounds what it takes.
        if self.fixed and self.length > MAX_COMPUTED_ROWS:
            raise ConfigError(
                f"a table of sinusoids has at most {MAX_COMPUTED_ROWS} positions; got {self.length}"
            )

    @property
    def usable(self) -> int:
        """The longest sequence that the table can hold, in tokens."""
        return self.length - self.offset


@dataclass(frozen=True, kw_only=True)
class Sinusoidal(Learned):
    """Like `Learned`, but computed: no tensor is published (XGLM).

    Frequencies as in tensor2tensor, whose last one is exactly 1/10000.
    """

    zero_row: int | None = None
    """The row that holds zeros instead."""


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Token (+ position + type) embeddings, summed, normalised and, if `project`, widened."""

    vocab: int
    width: int
    scale: float = 1.0
    types: int = 0
    tasks: int = 0
    """Rows of a table of tasks, of which the first is added to every token (ERNIE)."""
    position: Learned | None = None
    norm: Norm | None = None
    norm_first: bool = False
    """Normalise the tokens' embeddings alone, before positions are added (Blenderbot-small)."""
    mask_pads: bool = False
    """Pads enter as zeros; a convolution would mix them in otherwise (DeBERTa-v2)."""
    project: bool = False
    """A dense layer from `width` to the trunk's hidden size (ELECTRA, ALBERT)."""

    def __post_init__(self):
        if isinstance(self.position, Sinusoidal) and self.width < 4:
            raise ConfigError(f"computed positions need a width of at least 4; got {self.width}")


@dataclass(frozen=True, kw_only=True)
class Head:
    """The language model head: optional transform, then logits over the vocabulary."""

    transform: Norm | None = None
    """Dense, activation and this norm before the logits (BERT)."""
    activation: str = "gelu"
    bias: Literal["none", "trained", "fixed"] = "none"
    """`fixed`: carried by the checkpoint and added, never trained (BART's final_logits_bias)."""
    tied: bool = True
    """The logits' kernel is the token embedding."""
    width: int | None = None
    """Size after the transform; None: the embedding's, as tying demands."""
    scale: float = 1.0
    """Factor on the states before the logits (T5 ties with `hidden ** -0.5`)."""
    softcap: float | None = None

    def __post_init__(self):
        check_activation(self.activation)


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Rates, each in [0, 1): of the embeddings, of each residual branch, of attention weights, of
    the feed-forward activation, of the final norm's output (T5)."""

    embedding: float = 0.0
    residual: float = 0.0
    attention: float = 0.0
    activation: float = 0.0
    final: float = 0.0

    @classmethod
    def everywhere(cls, rate: float) -> Dropout:
        """One rate for all."""
        return cls(embedding=rate, residual=rate, attention=rate, activation=rate, final=rate)

    def __post_init__(self):
        for name in ("embedding", "residual", "attention", "activation", "final"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(
                    f"{name} dropout must be at least 0 and below 1; got {getattr(self, name)}"
                )


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A published tensor that nothing here reads, carried so that saving loses nothing."""

    name: str
    shape: tuple[int, ...]
    sinusoidal: bool = False
    """Not random where it is new: sines, then cosines, of each position (RoFormer)."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """One encoder or decoder trunk."""

    hidden: int
    embedding: Embedding
    segments: tuple[Segment, ...]
    causal: bool = False
    encoder_hidden: int | None = None
    """Width of the encoder states that cross-attention reads; None: `hidden`."""
    bucket_bias: BucketBias | None = None
    relative: RelativeTable | None = None
    final_norm: Norm | None = None
    head: Head | None = None
    kept: tuple[Kept, ...] = ()
    dropout: Dropout = Dropout()
    init_std: float = 0.02
    residual_init_std: float | None = None
    """Standard deviation for the projections that end a residual branch; None: `init_std`."""

    @property
    def layers(self) -> int:
        """Number of blocks, all segments counted."""
        return sum(len(segment.blocks) * segment.repeat for segment in self.segments)

    @property
    def max_length(self) -> int | None:
        """The longest sequence in tokens; None where positions are relative."""
        position = self.embedding.position
        return None if position is None else position.usable

    @property
    def convolves(self) -> bool:
        """Whether tokens reach their neighbours other than by attention."""
        return any(
            isinstance(sublayer.f, Convolution)
            for segment in self.segments
            for block in segment.blocks
            for sublayer in block.sublayers
        )

    def attentions(self) -> tuple[Attention, ...]:
        """Every attention of one pass over the segments' blocks, in order."""
        return tuple(
            sublayer.f
            for segment in self.segments
            for block in segment.blocks
            for sublayer in block.sublayers
            if isinstance(sublayer.f, Attention)
        )

    def __post_init__(self):
        heads = {a.heads for a in self.attentions() if a.bucket_bias}
        if heads and self.bucket_bias is None:
            raise ConfigError("an attention asks for bucket_bias, but the trunk defines none")
        if len(heads) > 1:
            raise ConfigError(f"attentions that share one bucket_bias differ in heads: {heads}")
        if self.relative is None and any(a.disentangled for a in self.attentions()):
            raise ConfigError("an attention is disentangled, but the trunk defines no relative")
        if self.embedding.width != self.hidden and not self.embedding.project:
            raise ConfigError(
                f"embeddings of width {self.embedding.width} need project=True to enter a trunk "
                f"of hidden size {self.hidden}"
            )
