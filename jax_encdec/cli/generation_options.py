"""Every field of `GenerationConfig` as a flag, derived from the dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from jax_encdec.decoding.config import GenerationConfig

_META = {"int": "N", "float": "X"}
HELP = {
    "num_beams": "beams of beam search; 1: greedy search or sampling",
    "num_beam_groups": "groups that the beams form, each kept unlike those before it",
    "diversity_penalty": "what a token costs that another group has just chosen",
    "num_return_sequences": "predictions per text, best first",
    "do_sample": "draw tokens instead of taking the best",
    "max_length": "most tokens of a prediction, start token included",
    "max_new_tokens": "most tokens of a prediction, start token not counted (default: 20)",
    "min_length": "fewest tokens, start token included",
    "min_new_tokens": "fewest tokens, start token not counted",
    "max_time": "seconds after which a batch ends with what it has",
    "stop_strings": 'texts that end a prediction: "." or ["a b", "c"]',
    "length_penalty": "exponent on the length that divides a beam's score",
    "exponential_decay_length_penalty": "after N tokens the end token gains a power of X: [N, X]",
    "early_stopping": "when beam search stops: true, false or never",
    "temperature": "divides the logits when sampling",
    "top_h": "draw from the most probable tokens that hold this share of the entropy",
    "top_k": "draw from the k most probable tokens; 0: from all",
    "top_p": "draw from the fewest tokens whose probabilities sum to p",
    "min_p": "draw from tokens at least this probable, relative to the best",
    "typical_p": "draw from the tokens nearest to the expected surprise that sum to p",
    "epsilon_cutoff": "draw from tokens at least this probable",
    "eta_cutoff": "the same, lower where many tokens are possible",
    "no_repeat_ngram_size": "no n-gram of this size occurs twice in a prediction",
    "encoder_no_repeat_ngram_size": "no n-gram of this size is copied from the source",
    "repetition_penalty": "above 1: tokens used already become less probable",
    "encoder_repetition_penalty": "above 1: tokens of the source become more probable",
    "bad_words_ids": "token sequences never to be produced: [[5, 6], [7]]",
    "sequence_bias": "added to the score of token sequences: [[[5, 6], -2.0]]",
    "forced_bos_token_id": "first token after the start token",
    "forced_eos_token_id": "last token when the maximal length is reached: 2 or [2, 3]",
    "suppress_tokens": "tokens never produced: [5, 6]",
    "begin_suppress_tokens": "tokens never produced first: [5, 6]",
    "remove_invalid_values": "scores that are not numbers become 0, infinite ones finite",
    "renormalize_logits": "processed scores become log-probabilities again",
    "decoder_start_token_id": "token that opens every prediction",
    "bos_token_id": "opens predictions where no start token is defined",
    "eos_token_id": "tokens that end a prediction: 2 or [2, 3]",
    "pad_token_id": "token that fills up what has ended",
}


def generation_fields() -> tuple[dataclasses.Field, ...]:
    """The fields of `GenerationConfig` that concern texts: what else to output does not."""
    fields = dataclasses.fields(GenerationConfig)
    return tuple(f for f in fields if f.name != "extra" and not f.name.startswith("output_"))


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; what is not given is as the model's generation_config.json says."""
    group = parser.add_argument_group(
        "generation", "What is not given is as the model's generation_config.json says."
    )
    for field in generation_fields():
        flag = "--" + field.name.replace("_", "-")
        kind = str(field.type).split(" | ")[0]
        if kind == "bool" and "Literal" not in str(field.type):
            how: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        else:
            how = {"type": _value, "metavar": _META.get(kind, "VALUE")}
        group.add_argument(flag, default=argparse.SUPPRESS, help=HELP.get(field.name), **how)


def generation_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, checked.

    Raises:
        InputError: a value that cannot be used.
    """
    names = [field.name for field in generation_fields()]
    options = {name: getattr(args, name) for name in names if hasattr(args, name)}
    GenerationConfig().replace(**options)
    return options


def _value(text: str) -> Any:
    """JSON, or else a plain word; GenerationConfig checks what it is."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
