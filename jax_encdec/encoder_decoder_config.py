"""The configuration of a pair: an encoder's, a decoder's, and what joins them.

A pair is published in one of two layouts. The composite one (`model_type: "encoder-decoder"`)
nests two complete configurations. A whole model (BART, T5, ...) has one configuration for both
halves; its pair is loaded from it, and saved to it, as it is.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from jax_encdec.config import TransformerConfig
from jax_encdec.errors import ConfigError
from jax_encdec.families import FAMILIES, FamilyConfig, family_config

if TYPE_CHECKING:
    from jax_encdec.layers import Param

MODEL_TYPE = "encoder-decoder"
ARCHITECTURE = "EncoderDecoderModel"
MODEL_TYPES = (MODEL_TYPE, "encoder_decoder")  # the latter in the oldest files

_ID_FIELDS = ("decoder_start_token_id", "bos_token_id", "pad_token_id", "eos_token_id")

Path = tuple[str, ...]
"""Where a leaf stands in the parameter tree."""


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
    """An encoder, a decoder with cross-attention, and their common ids.

    Attributes:
        encoder, decoder: the families' published configurations.
        decoder_start_token_id: the token that opens every target.
        pad_token_id, eos_token_id: override the decoder's own.
        tie_encoder_decoder: the decoder shares every parameter that the encoder also has
            (embeddings, self-attention, feed-forward; Rothe et al. 2020, "shared").
        whole: the pair is one published sequence-to-sequence model, embeddings shared.
        extra: other keys of config.json, written back on saving.
    """

    encoder: FamilyConfig
    decoder: FamilyConfig
    decoder_start_token_id: int | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    tie_encoder_decoder: bool = False
    whole: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        for part in ("encoder", "decoder"):
            if not isinstance(getattr(self, part), FamilyConfig):
                raise ConfigError(
                    f"{part} must be a family's configuration such as BertConfig(); "
                    f"got {type(getattr(self, part)).__name__}"
                )
            family = getattr(self, part)
            if part not in family.roles:
                raise ConfigError(
                    f"{family.model_type} cannot be the {part} of a pair: it was only published "
                    f"as {'an encoder' if part == 'decoder' else 'a decoder'}"
                )
        if self.whole and self.encoder != self.decoder:
            raise ConfigError("a whole model has one configuration for both halves")
        if self.whole and self.decoder.whole_architecture is None:
            raise ConfigError(f"{self.decoder.model_type} has no whole model; leave whole=True out")
        if self.whole and self.tie_encoder_decoder:
            raise ConfigError("a whole model cannot be published with tie_encoder_decoder")
        for name in _ID_FIELDS:
            ids = _ids(name, getattr(self, name))
            object.__setattr__(self, name, ids)
            for i in ids if isinstance(ids, tuple) else (ids,):
                if i is not None and not 0 <= i < self.target_vocabulary:
                    raise ConfigError(
                        f"{name} must be within the decoder's vocabulary, "
                        f"0..{self.target_vocabulary - 1}; got {i}"
                    )
        stated = self.decoder.extra.get("cross_attention_hidden_size")
        stated = self.decoder_trunk.encoder_hidden if stated is None else stated
        if stated is not None and stated != self.encoder_trunk.hidden:
            raise ConfigError(
                f"the decoder's cross_attention_hidden_size must equal the encoder's hidden size "
                f"{self.encoder_trunk.hidden}; got {stated}"
            )
        # Whatever cannot be translated is refused now, not when weights have been read.
        _ = self.encoder_trunk, self.decoder_trunk
        if self.tie_encoder_decoder:
            self._check_tied()

    @classmethod
    def from_encoder_decoder_configs(
        cls, encoder_config: FamilyConfig, decoder_config: FamilyConfig, **options: Any
    ) -> Self:
        """Join two configurations; `options` are this class's other fields."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(options) - known):
            raise ConfigError(f"EncoderDecoderConfig has no field {unknown[0]!r}")
        return cls(encoder=encoder_config, decoder=decoder_config, **options)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config") -> Self:
        """Read a published config.json, composite or whole.

        Raises:
            ConfigError: it describes something else, or a value is impossible.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where} must be a JSON object; got {type(data).__name__}")
        kind = data.get("model_type")
        if isinstance(kind, str) and kind in FAMILIES and FAMILIES[kind].whole_architecture:
            part = family_config(data, where)
            return cls(encoder=part, decoder=part, whole=True)
        if kind not in MODEL_TYPES:
            hint = ""
            if isinstance(kind, str) and kind in FAMILIES:
                hint = (
                    "; this is a single model: join two with "
                    "EncoderDecoderModel.from_encoder_decoder_pretrained(encoder, decoder)"
                )
            raise ConfigError(
                f"{where}: expected model_type {MODEL_TYPE!r} or a whole sequence-to-sequence "
                f"model; got {kind!r}{hint}"
            )
        for part in ("encoder", "decoder"):
            if part not in data:
                raise ConfigError(f"{where} lacks the {part!r} configuration")
        values, extra = {}, {}
        for key, value in data.items():
            if key in ("encoder", "decoder", "model_type", "is_encoder_decoder"):
                continue
            if key in _ID_FIELDS:
                values[key] = _ids(f"{where}: {key}", value)
            elif key == "tie_encoder_decoder":
                values[key] = value is True
            else:
                extra[key] = value
        try:
            return cls(
                encoder=family_config(data["encoder"], f"{where}: encoder"),
                decoder=family_config(data["decoder"], f"{where}: decoder"),
                **values,
                extra=extra,
            )
        except ConfigError as error:
            text = str(error)
            raise ConfigError(text if text.startswith(where) else f"{where}: {text}") from None

    def to_dict(self) -> dict[str, Any]:
        """The published config.json as plain JSON values."""
        if self.whole:
            data = self.decoder.to_dict()
            data["architectures"] = [self.decoder.whole_architecture]
            data["is_encoder_decoder"] = True
            return dict(sorted(data.items()))
        eos = self.eos_token_id
        data = dict(self.extra)
        data.update(
            architectures=[ARCHITECTURE],
            model_type=MODEL_TYPE,
            is_encoder_decoder=True,
            encoder=self.encoder.to_dict("encoder"),
            decoder=self.decoder.to_dict("decoder"),
            decoder_start_token_id=self.decoder_start_token_id,
            pad_token_id=self.pad_token_id,
        )
        if self.bos_token_id is not None:
            data["bos_token_id"] = self.bos_token_id
        if eos is not None:
            data["eos_token_id"] = list(eos) if isinstance(eos, tuple) else eos
        if self.tie_encoder_decoder:
            data["tie_encoder_decoder"] = True
        return dict(sorted(data.items()))

    def replace(self, **changes: Any) -> Self:
        """Return a copy with fields changed."""
        return dataclasses.replace(self, **changes)

    # What follows from the configuration --------------------------------------------------------

    @cached_property
    def encoder_trunk(self) -> TransformerConfig:
        """The encoder's trunk."""
        return (
            self.encoder.whole_trunk("encoder") if self.whole else self.encoder.to_trunk("encoder")
        )

    @cached_property
    def decoder_trunk(self) -> TransformerConfig:
        """The decoder's trunk, with cross-attention and head."""
        return (
            self.decoder.whole_trunk("decoder") if self.whole else self.decoder.to_trunk("decoder")
        )

    @property
    def target_vocabulary(self) -> int:
        """Number of tokens that the decoder knows."""
        return self.decoder.vocabulary("decoder")

    @property
    def projects(self) -> bool:
        """Whether `enc_to_dec_proj` takes encoder states to the decoder's width."""
        decoder = self.decoder_trunk
        return decoder.encoder_hidden is None and self.encoder_trunk.hidden != decoder.hidden

    def aliases(self) -> dict[Path, Path]:
        """Leaves that exist only as another name of an encoder leaf: alias -> the leaf.

        The parameter tree holds the latter only; one array, one gradient, one moment.
        """
        if self.tie_encoder_decoder:
            return {("decoder", *p): ("encoder", *p) for p in self._shared()}
        if self.whole and self.decoder.shares_embeddings:
            token = ("embedding", "token")
            return {("decoder", *token): ("encoder", *token)}
        return {}

    def _sides(self) -> tuple[dict[Path, Param], dict[Path, Param]]:
        from jax_encdec.trunk_params import transformer_params  # reading a config needs no JAX

        encoder, decoder = self.encoder_trunk, self.decoder_trunk
        return _leaves(transformer_params(encoder)), _leaves(transformer_params(decoder))

    def _shared(self) -> list[Path]:
        # The pooler and the head belong to one side only, cross-attention to the decoder.
        encoder, decoder = self._sides()
        return [p for p in decoder if p in encoder and p[0] not in ("head", "kept")]

    def _check_tied(self) -> None:
        encoder, decoder = self._sides()
        for path, param in decoder.items():
            if path[0] in ("head", "kept") or "cross_attention" in path:
                continue
            other = encoder.get(path)
            if other is None or other.shape != param.shape:
                got = "nothing" if other is None else f"shape {other.shape}"
                raise ConfigError(
                    f"tie_encoder_decoder needs an encoder and a decoder of one architecture and "
                    f"size; the decoder has {'/'.join(path)} of shape {param.shape}, the encoder "
                    f"{got}"
                )


def _leaves(tree: Mapping[str, Any], prefix: Path = ()) -> dict[Path, Param]:
    out: dict[Path, Param] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            out.update(_leaves(value, (*prefix, name)))
        else:
            out[(*prefix, name)] = value
    return out


def _integer(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)  # NumPy's integers, too, become Python's


def _ids(where: str, value: Any) -> int | tuple[int, ...] | None:
    try:
        if value is None:
            return None
        if isinstance(value, list | tuple) and value:
            return tuple(_integer(v) for v in value)
        return _integer(value)
    except TypeError:
        pass
    raise ConfigError(f"{where} must be an integer or null; got {value!r}")
