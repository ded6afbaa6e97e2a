"""The fields of GenerationConfig: what each one holds, and which options there are beside them.

`KINDS` names every field with the function that checks its value and says what was expected.
`REFUSED` names what Transformers offers and this library does not, with the reason a user reads.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

# Options of Transformers that change the result and are not implemented here: the values that mean
# "off" (every file of Transformers v4 spells them out), and why.
_OUT_OF_CORE = "left the core of Transformers in v5"
_UNASSISTED = "there is no assisted generation"
_CONSTRAINED = f"constrained beam search {_OUT_OF_CORE}; prefix_allowed_tokens_fn is here"
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "assistant_early_exit": ((None,), _UNASSISTED),
    "constraints": ((None,), _CONSTRAINED),
    "dola_layers": ((None,), f"DoLa decoding {_OUT_OF_CORE}"),
    "force_words_ids": ((None,), _CONSTRAINED),
    "forced_decoder_ids": ((None,), f"it {_OUT_OF_CORE}; decoder_input_ids do the same"),
    "guidance_scale": (
        (None, 1),
        "in an encoder-decoder Transformers' unconditional pass has no source: it fails, or takes "
        "the target for one",
    ),
    "penalty_alpha": ((None, 0), f"contrastive search {_OUT_OF_CORE}"),
    "prompt_lookup_num_tokens": ((None,), _UNASSISTED),
    "token_healing": ((None, False), "it rewrites a prompt that continues, which a source is not"),
    "use_mtp": ((None, False), "no family here has heads for several tokens"),
    "watermarking_config": ((None,), "texts are not watermarked"),
}
# Options that do not change which tokens come out: fine in a file whatever their value; in a call
# only with the values that describe what this library does anyway.
_SAME = "it would not change what comes out"
NO_INFLUENCE: dict[str, tuple[tuple[Any, ...], str]] = {
    "cache_implementation": ((None,), _SAME),
    "return_dict_in_generate": ((None, True), "what comes out always has its parts by name"),
    "use_cache": ((None, True), _SAME),
    **dict.fromkeys(
        (
            "cache_config",
            "compile_config",
            "continuous_batching_config",
            "disable_compile",
            "low_memory",
            "max_cache_len",
            "prefill_chunk_size",
        ),
        ((None, False), _SAME),
    ),
    **dict.fromkeys(
        (
            "assistant_confidence_threshold",
            "assistant_ensemble_weight",
            "assistant_lookbehind",
            "is_assistant",
            "max_matching_ngram_size",
            "num_assistant_tokens",
            "num_assistant_tokens_schedule",
            "speculation_type",
            "target_lookbehind",
        ),
        ((None, False), _UNASSISTED),
    ),
}


def is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether `value` is one of the values that switch an option off."""
    return any(value is n or (n is not None and value == n) for n in neutral)


def as_tuples(value: Any) -> Any:
    """Nested lists as nested tuples."""
    return tuple(as_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def as_lists(value: Any) -> Any:
    """Nested tuples as nested lists."""
    return [as_lists(v) for v in value] if isinstance(value, tuple) else value


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


def _biases(value: Any) -> tuple[tuple[tuple[int, ...], float], ...]:
    if isinstance(value, Mapping):
        value = tuple((as_tuples(ids), bias) for ids, bias in value.items())
    found = {}
    if not isinstance(value, tuple):
        raise TypeError
    for ids, bias in value:
        if not ids:
            raise TypeError
        found[_id_tuple(ids)] = _number(bias)  # given twice: the last one counts
    return tuple(found.items())


def _decay(value: Any) -> tuple[int, float]:
    start, factor = value
    return _integer(start), _number(factor)


def _strings(value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, tuple) or not value:
        raise TypeError
    if not all(isinstance(v, str) and v for v in value):
        raise TypeError
    return value


def _early_stopping(value: Any) -> bool | str:
    if value == "never":
        return "never"
    return _boolean(value)


_INTEGER = (_integer, "an integer")
_NUMBER = (_number, "a finite number")
_BOOLEAN = (_boolean, "true or false")
_IDS = (_id_tuple, "a list of token ids")
_ONE_OR_MORE_IDS = (_id_or_ids, "a token id or a non-empty list of token ids")
KINDS: dict[str, tuple[Any, str]] = {
    "num_beams": _INTEGER,
    "num_beam_groups": _INTEGER,
    "diversity_penalty": _NUMBER,
    "num_return_sequences": _INTEGER,
    "do_sample": _BOOLEAN,
    "max_length": _INTEGER,
    "max_new_tokens": _INTEGER,
    "min_length": _INTEGER,
    "min_new_tokens": _INTEGER,
    "max_time": _NUMBER,
    "stop_strings": (_strings, "a text or a non-empty list of texts, none of them empty"),
    "length_penalty": _NUMBER,
    "exponential_decay_length_penalty": (_decay, "a pair of a token count and a finite factor"),
    "early_stopping": (_early_stopping, 'false, true or "never"'),
    "temperature": _NUMBER,
    "top_h": _NUMBER,
    "top_k": _INTEGER,
    "top_p": _NUMBER,
    "min_p": _NUMBER,
    "typical_p": _NUMBER,
    "epsilon_cutoff": _NUMBER,
    "eta_cutoff": _NUMBER,
    "no_repeat_ngram_size": _INTEGER,
    "encoder_no_repeat_ngram_size": _INTEGER,
    "repetition_penalty": _NUMBER,
    "encoder_repetition_penalty": _NUMBER,
    "bad_words_ids": (_words, "a list of non-empty lists of token ids"),
    "sequence_bias": (
        _biases,
        "a list of pairs of a non-empty list of token ids and a finite number",
    ),
    "forced_bos_token_id": _INTEGER,
    "forced_eos_token_id": _ONE_OR_MORE_IDS,
    "suppress_tokens": _IDS,
    "begin_suppress_tokens": _IDS,
    "remove_invalid_values": _BOOLEAN,
    "renormalize_logits": _BOOLEAN,
    "decoder_start_token_id": _INTEGER,
    "bos_token_id": _INTEGER,
    "eos_token_id": _ONE_OR_MORE_IDS,
    "pad_token_id": _INTEGER,
    "output_scores": _BOOLEAN,
    "output_logits": _BOOLEAN,
    "output_attentions": _BOOLEAN,
    "output_hidden_states": _BOOLEAN,
}


_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
GENERATION_KEYS = frozenset(KINDS) - frozenset(_OUTPUTS) | frozenset(REFUSED)
"""Keys that say how to decode; the oldest files keep them in config.json."""
