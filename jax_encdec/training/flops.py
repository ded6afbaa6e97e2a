"""How many floating point operations a model takes: our own count, from the configuration.

Matrix products only, two operations per multiplication and addition, on the shapes as they are
computed: pads count, causal attention and windows count in full, no token attends globally, and
embedding look-ups are free. The backward pass of a product is two products of its size. What
rematerialisation computes again is left out, as is usual for utilisation: it is work, but not the
model's. A compiler's count is no substitute, since it counts the body of a loop over layers once.

Axis letters as in `attention.py`; V vocabulary, W width of the embedding or head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jax_encdec.config import Attention, Convolution, Segment, Sublayer, TransformerConfig

if TYPE_CHECKING:
    from jax_encdec.encoder_decoder import EncoderDecoderModel


@dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """Floating point operations of one batch."""

    parts: dict[str, int]
    """Of the forward pass, by part: `encoder/self_attention`, `decoder/mlp`, `decoder/head`..."""

    @property
    def forward(self) -> int:
        """Of the forward pass to the logits."""
        return sum(self.parts.values())

    @property
    def train_step(self) -> int:
        """Of forward and backward pass."""
        return 3 * self.forward


def model_flops(
    model: EncoderDecoderModel, batch: int, source_length: int, target_length: int
) -> ModelFlops:
    """Count the operations on `batch` sources and targets of these (padded) lengths."""
    config = model.config
    encoder, decoder = config.encoder_trunk, config.decoder_trunk
    parts: dict[str, int] = {}
    sides = (("encoder", encoder, source_length), ("decoder", decoder, target_length))
    for side, trunk, length in sides:
        for name, flops in _trunk(trunk, batch, length, source_length):
            parts[f"{side}/{name}"] = parts.get(f"{side}/{name}", 0) + flops
    if config.projects:
        parts["projection"] = 2 * batch * source_length * encoder.hidden * decoder.hidden
    head = decoder.head
    if head is not None:
        width = decoder.embedding.width if head.width is None else head.width
        each = decoder.embedding.vocab * width
        each += 0 if head.transform is None else decoder.hidden * width
        parts["decoder/head"] = 2 * batch * target_length * each
    return ModelFlops(parts=parts)


def _trunk(
    config: TransformerConfig, batch: int, length: int, source_length: int
) -> Iterator[tuple[str, int]]:
    """What each part of a trunk takes, some parts more than once."""
    if config.embedding.project:
        yield "embedding", 2 * batch * length * config.embedding.width * config.hidden
    for segment in config.segments:
        for sublayer in _sublayers(segment):
            f, d = sublayer.f, config.hidden
            if isinstance(f, Attention):
                keys = source_length if f.source == "encoder" else length
                flops = _attention(config, f, batch, length, keys)
            elif isinstance(f, Convolution):
                flops = 2 * batch * length * f.width * (d // f.groups) * d
            else:
                flops = 2 * batch * length * d * f.width * (3 if f.gated else 2)
            yield sublayer.name, segment.repeat * flops


def _sublayers(segment: Segment) -> Iterator[Sublayer]:
    for block in segment.blocks:
        yield from block.sublayers


def _attention(
    config: TransformerConfig, attention: Attention, batch: int, queries: int, keys: int
) -> int:
    """One attention: projections, scores, weighted values; relative positions where it has any."""
    d, h = config.hidden, attention.head_dim
    source = (config.encoder_hidden or d) if attention.source == "encoder" else d
    of_query, of_key = 2 * d * attention.heads * h, 2 * source * attention.groups * h
    project = batch * (queries * of_query + keys * 2 * of_key)
    mix = 2 * (2 * batch * attention.heads * queries * keys * h)
    out = batch * queries * of_query
    flops = project + mix + out
    if attention.disentangled and config.relative is not None:
        rows = 2 * config.relative.span
        for term in attention.disentangled:
            c2p = term == "c2p"
            flops += rows * (of_key if c2p else of_query)
            flops += 2 * batch * attention.heads * (queries if c2p else keys) * rows * h
    return flops
