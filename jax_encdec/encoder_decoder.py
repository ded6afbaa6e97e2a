"""The pair: two trunks, one projection, and the forward pass through them to logits or loss.

`EncoderDecoderModel` is a flax.linen module: static and hashable, with `params` a plain nested
dict. It declares its parameters from the configuration and computes with pure functions, so that
`model.apply({"params": params}, ...)` can be jitted, differentiated, vmapped and sharded freely.

Axis letters: B batch, S source length, T target length, D hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from jax_encdec import layers
from jax_encdec.checks import (
    check_global,
    check_ids,
    check_inputs,
    check_positions,
    check_segments,
    check_shape,
    check_states,
    check_types,
)
from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.embedding import logits
from jax_encdec.encoder_decoder_config import EncoderDecoderConfig
from jax_encdec.errors import InputError
from jax_encdec.execution import Execution
from jax_encdec.layers import Params, dense, flatten
from jax_encdec.loss import IGNORE, LossOutput, cross_entropy, head_loss, shift_right
from jax_encdec.pair_params import check_tree, model_params, plain_params, with_aliases
from jax_encdec.token_ids import resolve_ids
from jax_encdec.transformer import TransformerOutput, transformer

if TYPE_CHECKING:
    import pathlib
    from collections.abc import Iterator

    from jax_encdec.decoding.engine import GenerationOutput
    from jax_encdec.decoding.layout import PreparedParams
    from jax_encdec.decoding.streaming import StreamPiece
    from jax_encdec.scoring import ScoreOutput


@flax.struct.dataclass
class EncoderOutput:
    """The encoder's states."""

    last_hidden_state: jax.Array
    """`[B, S, D_encoder]`."""
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@flax.struct.dataclass
class Seq2SeqLMOutput:
    """Result of a forward pass; what was not asked for is None."""

    logits: jax.Array
    """`[B, T, V]`, float32."""
    loss: jax.Array | None = None
    """Mean cross-entropy over the labels that count, in nats: `loss_sum / loss_weight`."""
    loss_sum: jax.Array | None = None
    loss_weight: jax.Array | None = None
    """Number of labels that count."""
    decoder_hidden_states: tuple[jax.Array, ...] | None = None
    decoder_attentions: tuple[jax.Array, ...] | None = None
    cross_attentions: tuple[jax.Array, ...] | None = None
    encoder_last_hidden_state: jax.Array | None = None
    encoder_hidden_states: tuple[jax.Array, ...] | None = None
    encoder_attentions: tuple[jax.Array, ...] | None = None


# The model ---------------------------------------------------------------------------------------


class EncoderDecoderModel(nn.Module):
    """An encoder and a decoder with cross-attention, of any two families.

    Attributes:
        config: what the model is.
        generation_config: this model's defaults for `generate`.
        dtype: of the computation; norms' statistics, softmax, logits and loss are float32.
        param_dtype: of the parameters that `init_params` makes.
        execution: how it is computed, never what: see `jax_encdec.execution`.
    """

    config: EncoderDecoderConfig
    generation_config: GenerationConfig = GenerationConfig()
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    execution: Execution = Execution()

    def __post_init__(self):
        # One spelling of each dtype, so that equal models are one key of a compilation cache.
        for name in ("dtype", "param_dtype"):
            object.__setattr__(self, name, jnp.dtype(getattr(self, name)))
        super().__post_init__()

    def setup(self):
        """Declare the parameters, each part one entry of the `params` collection."""

        def boxed(tree: Any, key: jax.Array) -> Any:
            values = layers.initialize(tree, key, self.param_dtype)
            return layers.tree_map(
                lambda p, value: nn.LogicallyPartitioned(value, p.axes), tree, values
            )

        if self.has_variable("params", "encoder"):
            given = self.variables["params"]
            check_tree(self.config, flatten(plain_params(given)))
            self._params = plain_params(given)
            return
        declared = model_params(self.config)
        self._params = {
            part: self.param(part, lambda key, tree=tree: boxed(tree, key))
            for part, tree in declared.items()
        }

    # The forward pass ---------------------------------------------------------------------------

    def __call__(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        decoder_input_ids: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        encoder_outputs: EncoderOutput | jax.Array | None = None,
        labels: jax.Array | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        global_attention_mask: jax.Array | None = None,
        decoder_inputs_embeds: jax.Array | None = None,
        decoder_position_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> Seq2SeqLMOutput:
        """Encode a source, decode a target, compare with labels.

        Args:
            input_ids: source tokens `[B, S]`; or `inputs_embeds` `[B, S, D]`; or neither, with
                `encoder_outputs` of an earlier `encode`.
            attention_mask: `[B, S]` of 0/1, 0 for pads.
            decoder_input_ids: target tokens `[B, T]`, shifted already; by default made from
                `labels`: the start token, then all labels but the last.
            decoder_attention_mask: `[B, T]` of 0/1. When inputs are made from labels, the pads
                among them are hidden, but never the first position.
            labels: `[B, T]`, -100 where nothing is to be predicted.
            token_type_ids, position_ids: `[B, S]`, for the encoder.
            segment_ids, decoder_segment_ids: `[B, S]`, `[B, T]`: several pairs in one row; a
                token sees its own segment only, in all three attentions.
            global_attention_mask: `[B, S]` of 0/1, for encoders with windows (Longformer): 1 for
                tokens that see and are seen by all.
            deterministic: False switches dropout on, and needs `rngs={"dropout": key}`.

        Raises:
            InputError: inputs missing, contradictory, too long, or outside the vocabulary.
        """
        decoder_mask = decoder_attention_mask
        if labels is not None:
            labels = check_ids("labels", labels, self.config.target_vocabulary, also=IGNORE)
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids, shown = self._inputs_of(labels, decoder_segment_ids)
                decoder_mask = shown if decoder_mask is None else decoder_mask
        if encoder_outputs is None:
            encoder_outputs = self.encode(
                input_ids,
                attention_mask,
                inputs_embeds=inputs_embeds,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                segment_ids=segment_ids,
                global_attention_mask=global_attention_mask,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
                deterministic=deterministic,
            )
        elif not isinstance(encoder_outputs, EncoderOutput):
            encoder_outputs = EncoderOutput(encoder_outputs)
        out = self.decode(
            decoder_input_ids,
            encoder_outputs,
            attention_mask,
            decoder_mask,
            decoder_inputs_embeds=decoder_inputs_embeds,
            decoder_position_ids=decoder_position_ids,
            decoder_segment_ids=decoder_segment_ids,
            encoder_segment_ids=segment_ids,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            deterministic=deterministic,
        )
        if labels is None:
            return out
        check_shape("labels", labels, out.logits.shape[:2])
        total, weight = cross_entropy(out.logits, labels)
        return dataclasses.replace(
            out, loss=total / jnp.maximum(weight, 1.0), loss_sum=total, loss_weight=weight
        )

    def loss(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        labels: jax.Array | None = None,
        *,
        decoder_attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        global_attention_mask: jax.Array | None = None,
        label_smoothing: float = 0.0,
        loss_chunk: int | None = None,
        deterministic: bool = True,
    ) -> LossOutput:
        """The loss of targets given sources, for training: `apply(..., method="loss")`.

        The same as `__call__` with labels, but without the logits, of which at most `loss_chunk`
        positions of each row exist at one time. Other arguments as in `__call__`.

        Args:
            label_smoothing: the share, at least 0 and below 1, of each label's weight that is
                spread over the whole vocabulary.
            loss_chunk: a positive number; None: all positions at once.

        Raises:
            InputError: as `__call__`.
        """
        if labels is None:
            raise InputError("the loss needs labels [batch, length]; got none")
        if not 0.0 <= label_smoothing < 1.0:
            raise InputError(f"label_smoothing must be in [0, 1); got {label_smoothing}")
        if loss_chunk is not None and loss_chunk < 1:
            raise InputError(f"loss_chunk must be a positive number or None; got {loss_chunk}")
        labels = check_ids("labels", labels, self.config.target_vocabulary, also=IGNORE)
        inputs, shown = self._inputs_of(labels, decoder_segment_ids)
        source = self.encode(
            input_ids,
            attention_mask,
            token_type_ids=token_type_ids,
            segment_ids=segment_ids,
            global_attention_mask=global_attention_mask,
            deterministic=deterministic,
        )
        out = self._decoder_states(
            inputs,
            source.last_hidden_state,
            attention_mask,
            shown if decoder_attention_mask is None else decoder_attention_mask,
            decoder_segment_ids=decoder_segment_ids,
            encoder_segment_ids=segment_ids,
            deterministic=deterministic,
        )
        return head_loss(
            self.config.decoder_trunk,
            self._tree()["decoder"],
            out.last_hidden_state,
            labels,
            label_smoothing=label_smoothing,
            chunk=loss_chunk,
            execution=self.execution,
        )

    def encode(
        self,
        input_ids: jax.Array | None = None,
        attention_mask: jax.Array | None = None,
        *,
        inputs_embeds: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        global_attention_mask: jax.Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> EncoderOutput:
        """Run the encoder alone; arguments as in `__call__`. States are `[B, S, D_encoder]`."""
        trunk = self.config.encoder_trunk
        input_ids, shape = check_inputs("input_ids", input_ids, inputs_embeds, trunk)
        attention_mask = check_shape("attention_mask", attention_mask, shape)
        segment_ids = check_segments(segment_ids, shape, trunk)
        out = transformer(
            trunk,
            self._tree()["encoder"],
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            segment_ids=segment_ids,
            token_type_ids=check_types(token_type_ids, shape, trunk),
            position_ids=check_positions("position_ids", position_ids, shape, trunk),
            global_attention_mask=check_global(global_attention_mask, shape, trunk),
            dtype=self.dtype,
            dropout_key=None if deterministic else self.make_rng("dropout"),
            execution=self.execution,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        return EncoderOutput(out.last_hidden_state, out.hidden_states, out.attentions)

    def decode(
        self,
        decoder_input_ids: jax.Array | None,
        encoder_outputs: EncoderOutput | jax.Array,
        encoder_attention_mask: jax.Array | None = None,
        decoder_attention_mask: jax.Array | None = None,
        *,
        decoder_inputs_embeds: jax.Array | None = None,
        decoder_position_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        encoder_segment_ids: jax.Array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
    ) -> Seq2SeqLMOutput:
        """Run the decoder on encoder states `[B, S, D_encoder]`; arguments as in `__call__`."""
        if not isinstance(encoder_outputs, EncoderOutput):
            encoder_outputs = EncoderOutput(encoder_outputs)
        out = self._decoder_states(
            decoder_input_ids,
            encoder_outputs.last_hidden_state,
            encoder_attention_mask,
            decoder_attention_mask,
            decoder_inputs_embeds=decoder_inputs_embeds,
            decoder_position_ids=decoder_position_ids,
            decoder_segment_ids=decoder_segment_ids,
            encoder_segment_ids=encoder_segment_ids,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            deterministic=deterministic,
        )
        trunk, states = self.config.decoder_trunk, out.last_hidden_state
        return Seq2SeqLMOutput(
            logits=logits(trunk, self._tree()["decoder"], states, self.execution),
            decoder_hidden_states=out.hidden_states,
            decoder_attentions=out.attentions,
            cross_attentions=out.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
        )

    def _decoder_states(
        self,
        decoder_input_ids: jax.Array | None,
        encoder_states: jax.Array,
        encoder_attention_mask: jax.Array | None,
        decoder_attention_mask: jax.Array | None,
        *,
        decoder_inputs_embeds: jax.Array | None = None,
        decoder_position_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None,
        encoder_segment_ids: jax.Array | None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool,
    ) -> TransformerOutput:
        trunk, params = self.config.decoder_trunk, self._tree()
        decoder_input_ids, shape = check_inputs(
            "decoder_input_ids", decoder_input_ids, decoder_inputs_embeds, trunk
        )
        states = check_states(encoder_states, self.config.encoder_trunk.hidden)
        if states.shape[0] != shape[0]:
            raise InputError(
                f"source and target must have as many rows; got {states.shape[0]} and {shape[0]}"
            )
        encoder_attention_mask = check_shape(
            "attention_mask", encoder_attention_mask, states.shape[:2]
        )
        encoder_segment_ids = check_shape("segment_ids", encoder_segment_ids, states.shape[:2])
        decoder_attention_mask = check_shape(
            "decoder_attention_mask", decoder_attention_mask, shape
        )
        decoder_segment_ids = check_shape("decoder_segment_ids", decoder_segment_ids, shape)
        if (encoder_segment_ids is None) != (decoder_segment_ids is None):
            raise InputError(
                "give segment_ids and decoder_segment_ids together: with one alone, "
                "cross-attention would mix the segments"
            )
        return transformer(
            trunk,
            params["decoder"],
            decoder_input_ids,
            inputs_embeds=decoder_inputs_embeds,
            attention_mask=decoder_attention_mask,
            segment_ids=decoder_segment_ids,
            position_ids=check_positions(
                "decoder_position_ids", decoder_position_ids, shape, trunk
            ),
            encoder_states=project(params, states.astype(self.dtype)),
            encoder_mask=encoder_attention_mask,
            encoder_segment_ids=encoder_segment_ids,
            dtype=self.dtype,
            dropout_key=None if deterministic else self.make_rng("dropout"),
            execution=self.execution,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )

    def _inputs_of(
        self, labels: jax.Array, segment_ids: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Decoder inputs `[B, T]` that predict these labels, and their mask."""
        check_shape("decoder_segment_ids", segment_ids, labels.shape)
        pad = self.token_id("pad_token_id")
        return shift_right(labels, self._start(labels, segment_ids), pad, segment_ids)

    def _start(self, labels: jax.Array, segment_ids: jax.Array | None) -> int | jax.Array:
        """What opens a target: the start token, or `[B, T]`, its own last label that is no pad."""
        if not (self.config.whole and self.config.decoder.wraps_labels):
            return self.token_id("decoder_start_token_id")
        segments = jnp.zeros_like(labels) if segment_ids is None else segment_ids
        shown = (labels != IGNORE) & (labels != self.token_id("pad_token_id"))
        own = shown[:, None, :] & (segments[:, :, None] == segments[:, None, :])
        last = jnp.max(jnp.where(own, jnp.arange(labels.shape[1]), 0), axis=-1)
        return jnp.take_along_axis(labels, last, axis=1)

    def _tree(self) -> Params:
        return with_aliases(self.config, self._params)

    # Around the forward pass: plain functions of the model and params ----------------------------

    @nn.nowrap
    def apply(self, variables: Any, *args: Any, **options: Any) -> Any:
        """The forward pass, or another `method`, with `{"params": params}`; see flax."""
        if not isinstance(variables, Mapping) or "params" not in variables:
            raise InputError('apply takes the parameters as {"params": params}')
        if not isinstance(variables["params"], Mapping):
            plain_params(variables)  # Says what it is instead.
        return super().apply(variables, *args, **options)

    @nn.nowrap
    def init_params(self, key: jax.Array) -> dict[str, Any]:
        """Random parameters, as the published implementations initialise: a plain nested dict."""
        return layers.initialize(model_params(self.config), key, self.param_dtype)

    @nn.nowrap
    def param_shapes(self) -> dict[str, Any]:
        """Shapes and dtypes of the parameters, without any memory for them."""
        return layers.abstract(model_params(self.config), self.param_dtype)

    @nn.nowrap
    def param_axes(self) -> dict[str, Any]:
        """The logical name of each axis of each parameter, for sharding rules."""
        return layers.logical_axes(model_params(self.config))

    @nn.nowrap
    def trainable(self) -> dict[str, Any]:
        """A tree of booleans like the parameters: False for what published files carry along and
        training must leave as it is, by `optax.masked(optimizer, model.trainable())`."""
        return layers.tree_map(lambda p: p.trained, model_params(self.config))

    @nn.nowrap
    def token_id(self, name: str) -> int:
        """Resolve `decoder_start_token_id`, `pad_token_id` or the first `eos_token_id`.

        Looked up in the generation config, then in the pair's, then in the decoder's; a missing
        start token falls back to the beginning-of-sequence token, a missing pad to the end token.

        Raises:
            ConfigError: nothing defines it.
        """
        return resolve_ids(name, self.generation_config, self.config)[0]

    @nn.nowrap
    def prepare(self, params: Params, **options: Any) -> PreparedParams:
        """Parameters in the layout of inference, which `generate` takes instead: a pure function;
        see `jax_encdec.decoding.layout.prepare_params`."""
        from jax_encdec.decoding.layout import prepare_params

        return prepare_params(self.config, params, **options)

    @nn.nowrap
    def generate(self, params: Params, input_ids: Any = None, **options: Any) -> GenerationOutput:
        """Generate target sequences; see `jax_encdec.decoding.engine.generate`."""
        from jax_encdec.decoding.engine import generate

        return generate(self, params, input_ids, **options)

    @nn.nowrap
    def stream(
        self, params: Params, input_ids: Any = None, **options: Any
    ) -> Iterator[StreamPiece]:
        """Generate, yielding tokens as they are decided; see `jax_encdec.decoding.streaming`."""
        from jax_encdec.decoding.streaming import stream

        return stream(self, params, input_ids, **options)

    @nn.nowrap
    def score(
        self, params: Params, source_ids: Any = None, target_ids: Any = None, **options: Any
    ) -> ScoreOutput:
        """Log-probabilities of given targets; see `jax_encdec.scoring.score`."""
        from jax_encdec.scoring import score

        return score(self, params, source_ids, target_ids, **options)

    @nn.nowrap
    def save_pretrained(self, folder: str | pathlib.Path, params: Params, **options: Any) -> None:
        """Save what PyTorch opens as its own; see `jax_encdec.pretrained.save_pretrained`."""
        from jax_encdec.pretrained import save_pretrained

        save_pretrained(folder, self, params, **options)

    @classmethod
    def from_pretrained(
        cls, path: str | pathlib.Path, **options: Any
    ) -> tuple[EncoderDecoderModel, Any]:
        """Load a published pair; see `jax_encdec.pretrained.from_pretrained`."""
        from jax_encdec.pretrained import from_pretrained

        return from_pretrained(path, **options)

    @classmethod
    def from_encoder_decoder_pretrained(
        cls, encoder: Any = None, decoder: Any = None, **options: Any
    ) -> tuple[EncoderDecoderModel, Any]:
        """Join two checkpoints; see `jax_encdec.warm_start.join`."""
        from jax_encdec.warm_start import from_encoder_decoder_pretrained

        return from_encoder_decoder_pretrained(encoder, decoder, **options)


def project(params: Params, states: jax.Array) -> jax.Array:
    """Take encoder states `[B, S, D_encoder]` to the decoder's width, where it differs."""
    return dense(params["enc_to_dec_proj"], states) if "enc_to_dec_proj" in params else states
