"""What every family's configuration shares: reading, writing and checking a published config.json.

A family is a frozen dataclass whose fields are the published keys with the published defaults. It
is the source of truth and the only thing ever serialised; `to_trunk(role)` translates it, one way,
into the trunk's parts. Keys that we do not know are kept in `extra` and written back.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from numbers import Integral, Real
from typing import Any, ClassVar, Self

from jax_encdec.config import Block, Role, Segment, Source, Sublayer, TransformerConfig
from jax_encdec.errors import ConfigError, nearest

# Written by `to_dict` from what the model is, so never taken from a file.
ROLE_KEYS = ("model_type", "is_decoder", "add_cross_attention")

_MAX_LAYERS = 1000
"""Ten times the most that are published; each has rules of its own, so more would take long."""


@dataclass(frozen=True, kw_only=True)
class FamilyConfig:
    """Base of the families' published configurations."""

    model_type: ClassVar[str]
    """The family's published name."""
    whole_architecture: ClassVar[str | None] = None
    """The published class that holds an encoder and a decoder of this family, if there is one."""
    roles: ClassVar[tuple[Role, ...]] = ("encoder", "decoder")
    """What models of this family were published as, and so what their tensors have names for."""
    limits: ClassVar[str] = ""
    """What of the published family is not supported, for the table of families."""
    wraps_labels: ClassVar[bool] = False
    """The whole model starts a target with its own last token (mBART's language code) in place of
    a start token."""

    extra: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Keys of config.json that have no meaning here; written back by `to_dict`."""

    # Every family has these four, under these names.
    vocab_size: int
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        for name, annotation in _types(type(self)).items():
            if name != "extra":
                object.__setattr__(self, name, _checked(name, getattr(self, name), annotation))
        for role in self.roles:
            name = self.layers_field(role)
            if (layers := getattr(self, name, None) or 0) > _MAX_LAYERS:
                raise ConfigError(f"{name} must be at most {_MAX_LAYERS}; got {layers}")

    def to_trunk(self, role: Role) -> TransformerConfig:
        """Translate into the trunk's configuration, as an encoder or as a decoder with a
        language model head and cross-attention."""
        raise AssertionError(f"{type(self).__name__} defines no to_trunk")  # pragma: no cover

    def whole_trunk(self, role: Role) -> TransformerConfig:
        """Like `to_trunk`, for a half of the family's whole model."""
        raise AssertionError(f"{type(self).__name__} has no whole model")  # pragma: no cover

    @property
    def width(self) -> int:
        """Hidden size, whatever the family calls it."""
        return self.to_trunk("encoder").hidden

    def vocabulary(self, role: Role) -> int:
        """Number of tokens that a role knows; few families have more than one."""
        return self.vocab_size

    @property
    def ties_head(self) -> bool:
        """Whether the decoder's logits share the token embedding."""
        return bool(getattr(self, "tie_word_embeddings", True))

    @property
    def shares_embeddings(self) -> bool:
        """Whether the halves of the whole model read one token embedding."""
        return self.ties_head

    def replace(self, **changes: Any) -> Self:
        """Return a copy with fields changed; an unknown name is refused."""
        known = _types(type(self))
        for name in changes:
            if name not in known:
                raise ConfigError(
                    f"{type(self).__name__} has no field {name!r}{nearest(name, known)}"
                )
        return replace(self, **changes)

    def layers_field(self, role: Role) -> str:
        """Name of the field that holds the number of layers."""
        return "num_hidden_layers"

    def layer_count(self, role: Role) -> int:
        """Number of layers."""
        return getattr(self, self.layers_field(role))

    def with_layers(self, role: Role, taken: tuple[int, ...]) -> Self:
        """The configuration of a model that has some of this one's layers, by number."""
        return self.replace(**{self.layers_field(role): len(taken)})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "config") -> Self:
        """Read a published configuration.

        Args:
            data: the parsed config.json (or the part of it that describes this model).
            where: how to call it in error messages.

        Raises:
            ConfigError: a value has the wrong type or an impossible value.
        """
        known, values, extra = _types(cls), {}, {}
        for key, value in data.items():
            if key in ROLE_KEYS:
                continue
            if key in known and key != "extra":
                values[key] = _checked(f"{where}: {key}", value, known[key])
            else:
                extra[key] = value
        kind = data.get("position_embedding_type", "absolute")
        if kind != "absolute":
            raise ConfigError(
                f"{where}: position_embedding_type {kind!r} is not supported; expected 'absolute'"
            )
        try:
            return cls(**values, extra=extra)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    def to_dict(self, role: Role | None = None) -> dict[str, Any]:
        """The published configuration as plain JSON values; `role` adds the decoder's flags."""
        data: dict[str, Any] = {
            f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "extra"
        }
        data.update(self.extra)
        data["model_type"] = self.model_type
        if role is not None:
            data["is_decoder"] = data["add_cross_attention"] = role == "decoder"
        return dict(sorted(data.items()))

    def require(self, **positive: int | float) -> None:
        """Check that the named values are positive."""
        for name, value in positive.items():
            if value <= 0:
                raise ConfigError(f"{name} must be positive; got {value}")

    def require_heads(self, size_name: str, size: int, heads_name: str, heads: int) -> None:
        """Check that heads divide the hidden size."""
        self.require(**{size_name: size, heads_name: heads})
        if size % heads:
            raise ConfigError(
                f"{size_name} must be a multiple of {heads_name}; got {size} and {heads}"
            )


def usual_segment(
    role: Role, attention: Callable[[Source], Sublayer], mlp: Sublayer, layers: int
) -> Segment:
    """Like blocks of self-attention, cross-attention in a decoder, and feed-forward."""
    cross = (attention("encoder"),) if role == "decoder" else ()
    return Segment(blocks=(Block(sublayers=(attention("self"), *cross, mlp)),), repeat=layers)


def periodic_segments(blocks: Sequence[Block]) -> tuple[Segment, ...]:
    """Blocks as the shortest period that they repeat, and the part of one that may be left."""
    if not blocks:
        return ()
    kinds = list(dict.fromkeys(blocks))
    row = [kinds.index(block) for block in blocks]  # numbers compare faster than blocks
    period = next(p for p in range(1, len(row) + 1) if row[p:] == row[:-p])
    repeat, rest = divmod(len(blocks), period)
    left = (Segment(blocks=tuple(blocks[-rest:]), repeat=1),) if rest else ()
    return Segment(blocks=tuple(blocks[:period]), repeat=repeat), *left


@cache
def _types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _checked(where: str, value: Any, annotation: Any) -> Any:
    """Check a JSON value against a field's annotation; integers pass as floats, lists as tuples."""
    options = (
        typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    )
    for option in options:
        if option is type(None) and value is None:
            return None
        if option is bool and isinstance(value, bool):
            return value
        if option is int and isinstance(value, Integral) and not isinstance(value, bool):
            return int(value)  # NumPy's, too, become Python's
        if option is float and isinstance(value, Real) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise ConfigError(f"{where} must be finite; got {value}")
            return float(value)
        if option is str and isinstance(value, str):
            return value
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            item = typing.get_args(option)[0]
            return tuple(_checked(where, v, item) for v in value)
    expected = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise ConfigError(f"{where} must be {expected}; got {value!r}".replace("NoneType", "null"))
