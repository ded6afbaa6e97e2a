"""What cannot work in a GenerationConfig: ranges, lengths, contradictions, ids.

`check` raises one sentence with what was expected and what was given.  Options that have no effect
(sampling options without `do_sample`) are not judged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jax_encdec.decoding.fields import KINDS, REFUSED, is_neutral
from jax_encdec.errors import InputError

if TYPE_CHECKING:
    from jax_encdec.decoding.config import GenerationConfig

# Smallest values: the option may be equal to them.
_AT_LEAST = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0,
    "num_return_sequences": 1,
    "max_length": 1,
    "max_new_tokens": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
}
_AT_LEAST_SAMPLING = {"top_k": 0, "min_p": 0, "epsilon_cutoff": 0, "eta_cutoff": 0}
_ABOVE_ZERO = ("repetition_penalty", "encoder_repetition_penalty", "max_time")
_ABOVE_ZERO_SAMPLING = ("temperature", "top_p", "typical_p", "top_h")
_AT_MOST_ONE_SAMPLING = ("top_p", "typical_p", "top_h", "min_p")
_BELOW_ONE_SAMPLING = ("epsilon_cutoff", "eta_cutoff")


def check(config: GenerationConfig, vocab_size: int | None, prompt_length: int) -> None:
    """See `GenerationConfig.validate`."""
    for name, (neutral, reason) in REFUSED.items():
        value = config.extra.get(name)
        if not is_neutral(value, neutral):
            raise InputError(
                f"the generation config file sets {name!r} to {value!r}, which is not "
                f"implemented ({reason}); override it with {name}={neutral[-1]!r}"
            )
    _check_ranges(config)
    _check_lengths(config, prompt_length)
    _check_contradictions(config)
    if vocab_size is not None:
        _check_ids(config, vocab_size)


def _check_ranges(config: GenerationConfig) -> None:
    def given(*groups: Any) -> list[str]:
        names = [name for group in groups for name in group]
        return [name for name in names if getattr(config, name) is not None]

    sample = bool(config.do_sample)
    at_least = {**_AT_LEAST, **(_AT_LEAST_SAMPLING if sample else {})}
    for name in given(at_least):
        if getattr(config, name) < at_least[name]:
            raise InputError(
                f"{name} must be at least {at_least[name]}, got {getattr(config, name)}"
            )
    for name in given(_ABOVE_ZERO, _ABOVE_ZERO_SAMPLING if sample else ()):
        value = getattr(config, name)
        if value <= 0:
            hint = "; for greedy decoding set do_sample=False" if name == "temperature" else ""
            raise InputError(f"{name} must be above 0, got {value}{hint}")
    for name in given(_AT_MOST_ONE_SAMPLING) if sample else ():
        if getattr(config, name) > 1:
            raise InputError(f"{name} must be at most 1, got {getattr(config, name)}")
    for name in given(_BELOW_ONE_SAMPLING) if sample else ():
        if getattr(config, name) >= 1:
            raise InputError(f"{name} must be below 1, got {getattr(config, name)}")
    decay = config.exponential_decay_length_penalty
    if decay is not None and (decay[0] < 0 or decay[1] <= 0):
        raise InputError(
            "exponential_decay_length_penalty must be a token count of at least 0 and a factor "
            f"above 0, got {list(decay)}"
        )


def _check_lengths(config: GenerationConfig, prompt_length: int) -> None:
    full = config.resolved(prompt_length)
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


def _check_contradictions(config: GenerationConfig) -> None:
    beams, returned = config.num_beams or 1, config.num_return_sequences or 1
    if beams > 1 and returned > beams:
        raise InputError(f"num_return_sequences ({returned}) must be at most num_beams ({beams})")
    if beams == 1 and returned > 1 and not config.do_sample:
        raise InputError(
            f"greedy decoding returns one sequence, got num_return_sequences={returned}; "
            f"set num_beams={returned} or do_sample=True"
        )
    groups = config.num_beam_groups or 1
    if groups > 1:
        if beams % groups:
            raise InputError(
                f"num_beams must be a multiple of num_beam_groups, got {beams} and {groups}"
            )
        if config.do_sample:
            raise InputError(
                f"groups of beams are not drawn, got num_beam_groups={groups} with do_sample=True; "
                "set one of them back"
            )
        if not config.diversity_penalty:
            raise InputError(
                f"without a diversity_penalty above 0 all {groups} groups of beams find the same; "
                "set it, or num_beam_groups=1"
            )
    suppressed = set(config.suppress_tokens or ())
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        value = getattr(config, name)
        forced = set() if value is None else set(value if isinstance(value, tuple) else [value])
        if forced and forced <= suppressed:
            raise InputError(
                f"{name} ({value}) is also in suppress_tokens, which would forbid every token; "
                "remove it from one of them"
            )


def _check_ids(config: GenerationConfig, vocab_size: int) -> None:
    for name in KINDS:
        value = getattr(config, name)
        if name == "sequence_bias":
            value = tuple(ids for ids, _ in value or ())
        elif not (name.endswith(("_id", "_ids")) or name.endswith("suppress_tokens")):
            continue
        for token in _flat(value):
            if not 0 <= token < vocab_size:
                raise InputError(
                    f"{name} must lie in the vocabulary, 0 to {vocab_size - 1}, got {token}"
                )
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        if len(set(getattr(config, name) or ())) == vocab_size:
            raise InputError(f"{name} must leave a token to generate; got all {vocab_size}")
    if len(config.eos_token_ids) >= vocab_size:
        raise InputError(
            f"eos_token_id must leave other tokens to generate, got {len(config.eos_token_ids)} "
            f"ids for a vocabulary of {vocab_size}"
        )


def _flat(value: Any) -> list[int]:
    if value is None:
        return []
    return [i for v in value for i in _flat(v)] if isinstance(value, tuple) else [value]
