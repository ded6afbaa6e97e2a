"""GenerationConfig: how to decode, under Transformers' option names, and nothing else.

A field that is None is *not set*, so configurations can be layered: a checkpoint's
`generation_config.json` (`from_dict`) under the options of a call (`replace`).  `resolved` fills
in the defaults of Transformers v5 and `validate` says, in one sentence, what cannot work.  Whatever
else a file holds is kept in `extra` and written back by `to_dict`; an option of Transformers that
this library does not implement is refused by name, never silently ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jax_encdec.decoding import validation
from jax_encdec.decoding.fields import GENERATION_KEYS as GENERATION_KEYS
from jax_encdec.decoding.fields import (
    KINDS,
    NO_INFLUENCE,
    REFUSED,
    as_lists,
    as_tuples,
    is_neutral,
)
from jax_encdec.errors import ConfigError, InputError, nearest

DEFAULT_NEW_TOKENS = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to decode.  Hashable; None means not set; lists are taken as tuples.

    Lengths count tokens.  `max_length` and `min_length` include the decoder prompt (the start
    token), `max_new_tokens` and `min_new_tokens` do not and win over the former.
    `temperature`, `top_h`, `top_k` (0 switches it off), `top_p`, `min_p`, `typical_p` and the two
    cutoffs act only when `do_sample` is true; `length_penalty` and `early_stopping` only when
    `num_beams` is above 1, `diversity_penalty` only with groups of beams. `sequence_bias` may also
    be given as a dict from tuples of ids to numbers. In a call a number, or the start token, may be
    an array, one per row: see `numbers`.

    Raises:
        ConfigError: a field has a value of the wrong kind.
    """

    num_beams: int | None = None
    num_beam_groups: int | None = None
    diversity_penalty: float | None = None
    num_return_sequences: int | None = None
    do_sample: bool | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int | None = None
    min_new_tokens: int | None = None
    max_time: float | None = None
    stop_strings: str | tuple[str, ...] | None = None
    length_penalty: float | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    early_stopping: bool | Literal["never"] | None = None
    temperature: float | None = None
    top_h: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    no_repeat_ngram_size: int | None = None
    encoder_no_repeat_ngram_size: int | None = None
    repetition_penalty: float | None = None
    encoder_repetition_penalty: float | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | tuple[int, ...] | None = None
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    remove_invalid_values: bool | None = None
    renormalize_logits: bool | None = None
    decoder_start_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    output_attentions: bool | None = None
    output_hidden_states: bool | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        for name, (convert, expected) in KINDS.items():
            value = getattr(self, name)
            if value is None:
                continue
            try:
                object.__setattr__(self, name, convert(as_tuples(value)))
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
        known = {k: v for k, v in data.items() if k in KINDS}
        return cls(**known, extra={k: v for k, v in data.items() if k not in KINDS})

    def to_dict(self) -> dict[str, Any]:
        """Return what is set, and `extra`, as JSON-ready values (tuples become lists)."""
        fields = {name: as_lists(getattr(self, name)) for name in KINDS}
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
            if name in KINDS:
                fields[name] = value
                continue
            known = REFUSED.get(name) or NO_INFLUENCE.get(name)
            if known is None:
                raise InputError(f"unknown generation option {name!r}{nearest(name, KINDS)}")
            neutral, reason = known
            if not is_neutral(value, neutral):
                raise InputError(
                    f"generation option {name}={value!r} is not implemented ({reason}); "
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
            num_beam_groups=default(self.num_beam_groups, 1),
            diversity_penalty=default(self.diversity_penalty, 0.0),
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
            typical_p=default(self.typical_p, 1.0),
            epsilon_cutoff=default(self.epsilon_cutoff, 0.0),
            eta_cutoff=default(self.eta_cutoff, 0.0),
            no_repeat_ngram_size=default(self.no_repeat_ngram_size, 0),
            encoder_no_repeat_ngram_size=default(self.encoder_no_repeat_ngram_size, 0),
            repetition_penalty=default(self.repetition_penalty, 1.0),
            encoder_repetition_penalty=default(self.encoder_repetition_penalty, 1.0),
            remove_invalid_values=default(self.remove_invalid_values, False),
            output_scores=default(self.output_scores, False),
            decoder_start_token_id=start,
            pad_token_id=default(self.pad_token_id, next(iter(self.eos_token_ids), None)),
        )

    def validate(self, vocab_size: int | None = None, prompt_length: int = 1) -> None:
        """Check ranges, contradictions and, when `vocab_size` is given, that every id exists.

        Options that have no effect (sampling options without `do_sample`) are not judged.

        Raises:
            InputError: one sentence with what was expected and what was given.
        """
        validation.check(self, vocab_size, prompt_length)
