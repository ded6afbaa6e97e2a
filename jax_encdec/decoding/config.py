"""GenerationConfig: how to decode, under Transformers' option names, and nothing else.

A field that is None is *not set*, so configurations can be layered: a checkpoint's
`generation_config.json` (`from_dict`) under the options of a call (`replace`).  `resolved` fills
in the defaults of Transformers v5 and `validate` says, in one sentence, what cannot work.  Whatever
else a file holds is kept in `extra` and written back by `to_dict`; an option of Transformers that
this library does not implement is refused by name, never silently ignored.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping
from typing import Any, Literal

from jax_encdec.errors import ConfigError, InputError, nearest

DEFAULT_NEW_TOKENS = 20

# Options of Transformers that change the result and are not implemented here, each with the
# values that mean "off" (every file of Transformers v4 spells them out).
_NOT_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (None,),
    "constraints": (None,),
    "diversity_penalty": (None, 0),
    "dola_layers": (None,),
    "encoder_repetition_penalty": (None, 1),
    "epsilon_cutoff": (None, 0),
    "eta_cutoff": (None, 0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None,),
    "forced_decoder_ids": (None,),
    "guidance_scale": (None, 1),
    "max_time": (None,),
    "min_p": (None, 0),
    "num_beam_groups": (None, 1),
    "penalty_alpha": (None, 0),
    "prompt_lookup_num_tokens": (None,),
    "remove_invalid_values": (None, False),
    "renormalize_logits": (None, False),
    "sequence_bias": (None,),
    "stop_strings": (None,),
    "token_healing": (None, False),
    "top_h": (None,),
    "typical_p": (None, 1),
    "use_mtp": (None, False),
    "watermarking_config": (None,),
}
# Options that do not change which tokens come out: fine in a file whatever their value; in a call
# only with the value that describes what this library does anyway.
_NO_INFLUENCE: dict[str, tuple[Any, ...]] = {
    "cache_implementation": (None,),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "output_logits": (None, False),
    "output_scores": (None, False),
    "return_dict_in_generate": (None, True),
    "use_cache": (None, True),
}


def _neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    return any(value is n or (n is not None and value == n) for n in neutral)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _lists(value: Any) -> Any:
    return [_lists(v) for v in value] if isinstance(value, tuple) else value


def _integer(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _number(value: Any) -> float:
    if isinstance(value, bool | str):
        raise TypeError
    value = float(value)
    if not math.isfinite(value):
        raise TypeError
    return value


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _id_tuple(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple):
        raise TypeError
    return tuple(_integer(v) for v in value)


def _id_or_ids(value: Any) -> int | tuple[int, ...]:
    if not isinstance(value, tuple):
        return _integer(value)
    if not value:
        raise TypeError
    return _id_tuple(value)


def _words(value: Any) -> tuple[tuple[int, ...], ...]:
    if not isinstance(value, tuple) or not all(isinstance(v, tuple) and v for v in value):
        raise TypeError
    return tuple(_id_tuple(v) for v in value)


def _early_stopping(value: Any) -> bool | str:
    if value == "never":
        return "never"
    return _boolean(value)


_INTEGER = (_integer, "an integer")
_NUMBER = (_number, "a finite number")
_BOOLEAN = (_boolean, "true or false")
_IDS = (_id_tuple, "a list of token ids")
_ONE_OR_MORE_IDS = (_id_or_ids, "a token id or a non-empty list of token ids")
_KINDS: dict[str, tuple[Any, str]] = {
    "num_beams": _INTEGER,
    "num_return_sequences": _INTEGER,
    "do_sample": _BOOLEAN,
    "max_length": _INTEGER,
    "max_new_tokens": _INTEGER,
    "min_length": _INTEGER,
    "min_new_tokens": _INTEGER,
    "length_penalty": _NUMBER,
    "early_stopping": (_early_stopping, 'false, true or "never"'),
    "temperature": _NUMBER,
    "top_k": _INTEGER,
    "top_p": _NUMBER,
    "no_repeat_ngram_size": _INTEGER,
    "encoder_no_repeat_ngram_size": _INTEGER,
    "repetition_penalty": _NUMBER,
    "bad_words_ids": (_words, "a list of non-empty lists of token ids"),
    "forced_bos_token_id": _INTEGER,
    "forced_eos_token_id": _ONE_OR_MORE_IDS,
    "suppress_tokens": _IDS,
    "begin_suppress_tokens": _IDS,
    "decoder_start_token_id": _INTEGER,
    "bos_token_id": _INTEGER,
    "eos_token_id": _ONE_OR_MORE_IDS,
    "pad_token_id": _INTEGER,
}


GENERATION_KEYS = frozenset(_KINDS) | frozenset(_NOT_IMPLEMENTED)
"""Keys that say how to decode; the oldest files keep them in config.json."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to decode.  Hashable; None means not set; lists are taken as tuples.

    Lengths count tokens.  `max_length` and `min_length` include the decoder prompt (the start
    token), `max_new_tokens` and `min_new_tokens` do not and win over the former.
    `temperature`, `top_k` (0 switches it off) and `top_p` act only when `do_sample` is true;
    `length_penalty` and `early_stopping` only when `num_beams` is above 1.

    Raises:
        ConfigError: a field has a value of the wrong kind.
    """

    num_beams: int | None = None
    num_return_sequences: int | None = None
    do_sample: bool | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    no_repeat_ngram_size: int | None = None
    encoder_no_repeat_ngram_size: int | None = None
    repetition_penalty: float | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | tuple[int, ...] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    decoder_start_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        for name, (convert, expected) in _KINDS.items():
            value = getattr(self, name)
            if value is None:
                continue
            try:
                object.__setattr__(self, name, convert(_tuples(value)))
            except (TypeError, ValueError, OverflowError):
                raise ConfigError(f"{name} must be {expected}, got {value!r}") from None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GenerationConfig:
        """Read the content of a `generation_config.json` of Transformers v4 or v5, or of ours.

        Unknown keys go to `extra`.  A key of Transformers that changes the result and is not
        implemented is accepted here and refused by `validate`, where a call can still override it.

        Raises:
            ConfigError: a known key has a value of the wrong kind.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(
                f"a generation config must be a JSON object, got {type(data).__name__}"
            )
        known = {k: v for k, v in data.items() if k in _KINDS}
        return cls(**known, extra={k: v for k, v in data.items() if k not in _KINDS})

    def to_dict(self) -> dict[str, Any]:
        """Return what is set, and `extra`, as JSON-ready values (tuples become lists)."""
        fields = {name: _lists(getattr(self, name)) for name in _KINDS}
        return {**self.extra, **{k: v for k, v in fields.items() if v is not None}}

    def replace(self, **options: Any) -> GenerationConfig:
        """Return a copy with `options` of one call laid over this configuration.

        An option that is given as None becomes not set.  An option of Transformers that is not
        implemented is accepted only with its neutral value, which also clears what a file said.
        A call's `max_length` (`min_length`) also clears an inherited `max_new_tokens`
        (`min_new_tokens`), which would win over it.

        Raises:
            InputError: an unknown option (the message names the nearest known one), an option that
                is not implemented, or a value of the wrong kind.
        """
        extra = dict(self.extra)
        fields = {}
        for name, value in options.items():
            if name in _KINDS:
                fields[name] = value
                continue
            neutral = {**_NOT_IMPLEMENTED, **_NO_INFLUENCE}.get(name)
            if neutral is None:
                raise InputError(f"unknown generation option {name!r}{nearest(name, _KINDS)}")
            if not _neutral(value, neutral):
                raise InputError(
                    f"generation option {name}={value!r} is not implemented; "
                    f"leave it out or pass {name}={neutral[-1]!r}"
                )
            extra.pop(name, None)
        for ours, inherited in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if ours in fields:
                fields.setdefault(inherited, None)
        try:
            return dataclasses.replace(self, **fields, extra=extra)
        except ConfigError as error:
            raise InputError(str(error)) from None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence ids as a tuple, empty when none is set."""
        eos = self.eos_token_id
        return () if eos is None else eos if isinstance(eos, tuple) else (eos,)

    def resolved(self, prompt_length: int = 1) -> GenerationConfig:
        """Fill in every default of Transformers v5, for decoder prompts of `prompt_length` tokens.

        `max_new_tokens` turns into `max_length` and `min_new_tokens` into `min_length`; without
        any maximum 20 new tokens are generated; without `pad_token_id` the first end-of-sequence id
        pads; without `decoder_start_token_id` decoding starts from `bos_token_id`.
        """
        max_length, min_length = self.max_length, self.min_length or 0
        if self.max_new_tokens is not None:
            max_length = prompt_length + self.max_new_tokens
        elif max_length is None:
            max_length = prompt_length + DEFAULT_NEW_TOKENS
        if self.min_new_tokens is not None:
            min_length = prompt_length + self.min_new_tokens if self.min_new_tokens else 0

        def default(value, fallback):
            return fallback if value is None else value

        start = default(self.decoder_start_token_id, self.bos_token_id)
        return dataclasses.replace(
            self,
            num_beams=default(self.num_beams, 1),
            num_return_sequences=default(self.num_return_sequences, 1),
            do_sample=default(self.do_sample, False),
            max_length=max_length,
            max_new_tokens=None,
            min_length=min_length,
            min_new_tokens=None,
            length_penalty=default(self.length_penalty, 1.0),
            early_stopping=default(self.early_stopping, False),
            temperature=default(self.temperature, 1.0),
            top_k=default(self.top_k, 50),
            top_p=default(self.top_p, 1.0),
            no_repeat_ngram_size=default(self.no_repeat_ngram_size, 0),
            encoder_no_repeat_ngram_size=default(self.encoder_no_repeat_ngram_size, 0),
            repetition_penalty=default(self.repetition_penalty, 1.0),
            decoder_start_token_id=start,
            pad_token_id=default(self.pad_token_id, next(iter(self.eos_token_ids), None)),
        )

    def validate(self, vocab_size: int | None = None, prompt_length: int = 1) -> None:
        """Check ranges, contradictions and, when `vocab_size` is given, that every id exists.

        Options that have no effect (sampling options without `do_sample`) are not judged.

        Raises:
            InputError: one sentence with what was expected and what was given.
        """
        for name, neutral in _NOT_IMPLEMENTED.items():
            value = self.extra.get(name)
            if not _neutral(value, neutral):
                raise InputError(
                    f"the generation config file sets {name!r} to {value!r}, which is not "
                    f"implemented; override it with {name}={neutral[-1]!r}"
                )
        self._check_ranges()
        self._check_lengths(prompt_length)
        self._check_contradictions()
        if vocab_size is not None:
            self._check_ids(vocab_size)

    def _check_ranges(self) -> None:
        at_least = {
            "num_beams": 1,
            "num_return_sequences": 1,
            "max_length": 1,
            "max_new_tokens": 1,
            "min_length": 0,
            "min_new_tokens": 0,
            "no_repeat_ngram_size": 0,
            "encoder_no_repeat_ngram_size": 0,
        }
        if self.do_sample:
            at_least["top_k"] = 0
        for name, bound in at_least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise InputError(f"{name} must be at least {bound}, got {value}")
        above_zero = ("repetition_penalty", *(("temperature", "top_p") if self.do_sample else ()))
        for name in above_zero:
            value = getattr(self, name)
            if value is not None and value <= 0:
                hint = "; for greedy decoding set do_sample=False" if name == "temperature" else ""
                raise InputError(f"{name} must be above 0, got {value}{hint}")
        if self.do_sample and self.top_p is not None and self.top_p > 1:
            raise InputError(f"top_p must be at most 1, got {self.top_p}")

    def _check_lengths(self, prompt_length: int) -> None:
        full = self.resolved(prompt_length)
        assert full.max_length is not None
        assert full.min_length is not None
        if full.max_length <= prompt_length:
            raise InputError(
                f"max_length is {full.max_length} but the decoder prompt alone has {prompt_length} "
                "token(s); raise max_length or set max_new_tokens"
            )
        if full.min_length > full.max_length:
            raise InputError(
                f"min_length ({full.min_length}) is above max_length ({full.max_length}), both "
                f"counted with the prompt of {prompt_length} token(s); lower one or raise the other"
            )

    def _check_contradictions(self) -> None:
        beams, returned = self.num_beams or 1, self.num_return_sequences or 1
        if beams > 1 and returned > beams:
            raise InputError(
                f"num_return_sequences ({returned}) must be at most num_beams ({beams})"
            )
        if beams == 1 and returned > 1 and not self.do_sample:
            raise InputError(
                f"greedy decoding returns one sequence, got num_return_sequences={returned}; "
                f"set num_beams={returned} or do_sample=True"
            )
        suppressed = set(self.suppress_tokens or ())
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            value = getattr(self, name)
            forced = set() if value is None else set(value if isinstance(value, tuple) else [value])
            if forced and forced <= suppressed:
                raise InputError(
                    f"{name} ({value}) is also in suppress_tokens, which would forbid every token; "
                    "remove it from one of them"
                )

    def _check_ids(self, vocab_size: int) -> None:
        for name in _KINDS:
            if not (name.endswith(("_id", "_ids")) or name.endswith("suppress_tokens")):
                continue
            for value in _flat(getattr(self, name)):
                if not 0 <= value < vocab_size:
                    raise InputError(
                        f"{name} must lie in the vocabulary, 0 to {vocab_size - 1}, got {value}"
                    )
        if len(self.eos_token_ids) >= vocab_size:
            raise InputError(
                f"eos_token_id must leave other tokens to generate, got {len(self.eos_token_ids)} "
                f"ids for a vocabulary of {vocab_size}"
            )


def _flat(value: Any) -> list[int]:
    if value is None:
        return []
    return [i for v in value for i in _flat(v)] if isinstance(value, tuple) else [value]
