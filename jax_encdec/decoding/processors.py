"""Logits processors: what may not, must, or should less often come next.

`split` cuts a GenerationConfig in two: a static `ProcessorSpec` (which processors exist, and the
few sizes that shape the program) and traced `ProcessorValues` (every number and token id).
`process` is the pure function that applies them, in Transformers' order, to one step's scores.  So
changing a temperature, a penalty, a length or a list of ids does not compile anything again;
switching a processor on or off does, once.

Axes: B batch, K beams, T target capacity, S source length, V vocabulary.  A banned token scores
-inf.  A traced number is a scalar or one value per row, `[B]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jax_encdec.decoding import penalties, sampling
from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.decoding.constraints import Constraint, constrain
from jax_encdec.decoding.context import Context as Context
from jax_encdec.decoding.context import rows, table
from jax_encdec.errors import InputError

Processor = Callable[[Array, Context], Array]
"""A processor of the user's: a pure function `(scores [B, K, V], context) -> scores`."""

_MOST_CANDIDATES = 1024  # Above it, halving finds the k-th best sooner than `top_k`.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessorSpec:
    """Which processors exist, in the order they run, and the sizes that shape the program."""

    sequence_bias: bool = False
    encoder_repetition_penalty: bool = False
    repetition_penalty: bool = False
    no_repeat_ngram: bool = False
    encoder_no_repeat_ngram: bool = False
    bad_words: bool = False
    min_length: bool = False
    constraint: bool = False
    forced_bos: bool = False
    forced_eos: bool = False
    remove_invalid: bool = False
    exponential_decay: bool = False
    suppress: bool = False
    begin_suppress: bool = False
    custom: tuple[Processor, ...] = ()
    temperature: bool = False
    top_h: bool = False
    top_k: bool = False
    top_k_candidates: int = 0  # a bound of every k; 0: none
    top_p: bool = False
    min_p: bool = False
    typical_p: bool = False
    epsilon_cutoff: bool = False
    eta_cutoff: bool = False
    renormalize: bool = False
    min_tokens_to_keep: int = 1  # when sampling

    @property
    def reads_source(self) -> bool:
        """Whether a processor needs the source's token ids."""
        return self.encoder_no_repeat_ngram or self.encoder_repetition_penalty


class ProcessorValues(NamedTuple):
    """The numbers of the processors: arrays, None where `ProcessorSpec` says absent.

    Scalars may also be given per row as `[B]`, the boolean `[V]` tables as `[B, V]`.
    """

    biased_words: ArrayLike | None = None  # int32 [words, width], right-aligned, -1 before the word
    bias: ArrayLike | None = None  # float32 [words]
    encoder_repetition_penalty: ArrayLike | None = None  # float32
    repetition_penalty: ArrayLike | None = None  # float32
    no_repeat_ngram_size: ArrayLike | None = None  # int32
    encoder_no_repeat_ngram_size: ArrayLike | None = None  # int32
    bad_words: ArrayLike | None = None  # int32 [words, width], right-aligned, -1 before the word
    min_length: ArrayLike | None = None  # int32, prompt included
    min_new_tokens: ArrayLike | None = None  # int32
    eos: ArrayLike | None = None  # bool [V]
    constraint: Constraint | None = None
    forced_bos: ArrayLike | None = None  # bool [V]
    forced_eos: ArrayLike | None = None  # bool [V]
    decay_start: ArrayLike | None = None  # int32, prompt not counted
    decay_factor: ArrayLike | None = None  # float32
    suppress: ArrayLike | None = None  # bool [V]
    begin_suppress: ArrayLike | None = None  # bool [V]
    temperature: ArrayLike | None = None  # float32
    top_h: ArrayLike | None = None  # float32
    top_k: ArrayLike | None = None  # int32, already between min_tokens_to_keep and V
    top_p_tail: ArrayLike | None = None  # float32, the probability mass to cut: 1 - top_p
    min_p: ArrayLike | None = None  # float32
    typical_p: ArrayLike | None = None  # float32
    epsilon_cutoff: ArrayLike | None = None  # float32
    eta_cutoff: ArrayLike | None = None  # float32


def token_table(ids: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """Return bool `[vocab_size]`, true at `ids`."""
    table = np.zeros(vocab_size, bool)
    table[list(ids)] = True
    return table


def split(
    config: GenerationConfig,
    *,
    vocab_size: int,
    arrays: Mapping[str, Any] | None = None,
    constraint: Constraint | None = None,
    logits_processors: tuple[Processor, ...] = (),
) -> tuple[ProcessorSpec, ProcessorValues]:
    """Cut a configuration into its static and its traced half; `validate` it first.

    With beams, sampling keeps one token more than there are end-of-sequence ids, so that a beam can
    always continue.

    Args:
        config: what to do.
        vocab_size: V.
        arrays: numbers that are traced or differ from row to row, scalar or `[B]`, by option; they
            go before those of `config`, and their processors are always there.
        constraint: what may follow what.
        logits_processors: the user's, static.
    """
    arrays = arrays or {}
    full = config.resolved()
    eos = config.eos_token_ids
    sample = bool(full.do_sample)
    keep = 1 if full.num_beams == 1 else max(2, len(eos) + 1)

    def present(name: str, *neutral: Any, when: bool = True) -> bool:
        return when and (name in arrays or getattr(full, name) not in (None, *neutral))

    def number(wanted: bool, name: str, dtype: type) -> Any:
        if not wanted:
            return None
        if name not in arrays:
            return np.asarray(getattr(full, name), dtype)
        given = arrays[name]
        return given.astype(dtype)

    def tokens(ids: int | tuple[int, ...] | None, wanted: bool = True) -> np.ndarray | None:
        if not wanted or ids is None or ids == ():
            return None
        return token_table(ids if isinstance(ids, tuple) else (ids,), vocab_size)

    # A single-token "bad word" that is an end-of-sequence id is dropped, as Transformers does.
    words = [w for w in config.bad_words_ids or () if not (len(w) == 1 and w[0] in eos)]
    biases = config.sequence_bias or ()
    new_tokens = config.min_new_tokens is not None or "min_new_tokens" in arrays
    minimum = present("min_new_tokens", 0) or present("min_length", 0)
    decay = config.exponential_decay_length_penalty if eos else None
    top_k, candidates = _top_k(full.top_k if sample else 0, arrays.get("top_k"), keep, vocab_size)
    spec = ProcessorSpec(
        sequence_bias=bool(biases),
        encoder_repetition_penalty=present("encoder_repetition_penalty", 1.0),
        repetition_penalty=present("repetition_penalty", 1.0),
        no_repeat_ngram=present("no_repeat_ngram_size", 0),
        encoder_no_repeat_ngram=present("encoder_no_repeat_ngram_size", 0),
        bad_words=bool(words),
        min_length=bool(eos) and minimum,
        constraint=constraint is not None,
        forced_bos=present("forced_bos_token_id"),
        forced_eos=config.forced_eos_token_id is not None,
        remove_invalid=bool(full.remove_invalid_values),
        exponential_decay=decay is not None,
        suppress=bool(config.suppress_tokens),
        begin_suppress=bool(config.begin_suppress_tokens),
        custom=logits_processors,
        temperature=sample,
        top_h=present("top_h", when=sample),
        top_k=sample and top_k is not None,
        top_k_candidates=candidates if sample else 0,
        top_p=present("top_p", 1.0, when=sample),
        min_p=present("min_p", 0.0, when=sample),
        typical_p=present("typical_p", 1.0, when=sample),
        epsilon_cutoff=present("epsilon_cutoff", 0.0, when=sample),
        eta_cutoff=present("eta_cutoff", 0.0, when=sample),
        renormalize=bool(config.renormalize_logits),
        min_tokens_to_keep=keep if sample else 1,
    )
    values = ProcessorValues(
        biased_words=penalties.word_table([ids for ids, _ in biases]) if biases else None,
        bias=_padded([bias for _, bias in biases]) if biases else None,
        encoder_repetition_penalty=number(
            spec.encoder_repetition_penalty, "encoder_repetition_penalty", np.float32
        ),
        repetition_penalty=number(spec.repetition_penalty, "repetition_penalty", np.float32),
        no_repeat_ngram_size=number(spec.no_repeat_ngram, "no_repeat_ngram_size", np.int32),
        encoder_no_repeat_ngram_size=number(
            spec.encoder_no_repeat_ngram, "encoder_no_repeat_ngram_size", np.int32
        ),
        bad_words=penalties.word_table(words) if words else None,
        min_length=np.int32(0)
        if spec.min_length and new_tokens
        else number(spec.min_length, "min_length", np.int32),
        min_new_tokens=(
            number(spec.min_length, "min_new_tokens", np.int32)
            if "min_new_tokens" in arrays
            else np.int32(config.min_new_tokens or 0)
            if spec.min_length
            else None
        ),
        eos=tokens(eos, spec.min_length or spec.exponential_decay),
        constraint=constraint,
        forced_bos=arrays["forced_bos_token_id"].reshape(-1, 1) == np.arange(vocab_size)
        if "forced_bos_token_id" in arrays
        else tokens(config.forced_bos_token_id),
        forced_eos=tokens(config.forced_eos_token_id),
        decay_start=np.int32(decay[0]) if decay else None,
        decay_factor=np.float32(decay[1]) if decay else None,
        suppress=tokens(config.suppress_tokens),
        begin_suppress=tokens(config.begin_suppress_tokens),
        temperature=number(spec.temperature, "temperature", np.float32),
        top_h=number(spec.top_h, "top_h", np.float32),
        top_k=top_k if spec.top_k else None,
        top_p_tail=_tail(arrays.get("top_p", full.top_p)) if spec.top_p else None,
        min_p=number(spec.min_p, "min_p", np.float32),
        typical_p=number(spec.typical_p, "typical_p", np.float32),
        epsilon_cutoff=number(spec.epsilon_cutoff, "epsilon_cutoff", np.float32),
        eta_cutoff=number(spec.eta_cutoff, "eta_cutoff", np.float32),
    )
    return spec, values


def _padded(bias: list[float]) -> np.ndarray:
    """Biases `[words]` as long as `word_table` makes their words."""
    found = np.zeros(penalties.bucket(len(bias), 8), np.float32)
    found[: len(bias)] = bias
    return found


def _tail(top_p: Any) -> Any:
    """What top_p cuts; of float64 where there is one, so that 0.9 leaves 0.1."""
    if isinstance(top_p, Array):
        return 1.0 - top_p.astype(np.float32)
    return np.asarray(1.0 - np.asarray(top_p, np.float64), np.float32)


def _top_k(k: int | None, given: Any, keep: int, vocab_size: int) -> tuple[Any, int]:
    """Return every row's k, None where there is none, and a bound of them, 0 where there is none.

    A k of 0 keeps everything.
    """
    if given is None and not k:
        return None, 0
    if isinstance(given, Array):  # perhaps traced: nothing is known of it
        return jnp.where(given > 0, jnp.clip(given, keep, vocab_size), vocab_size), 0
    each = np.asarray(given if given is not None else k, np.int64)
    each = np.where(each > 0, np.clip(each, keep, vocab_size), vocab_size).astype(np.int32)
    most = int(each.max())
    if most > _MOST_CANDIDATES:
        return each, 0
    return each, min(penalties.bucket(most, 64), vocab_size)


def process(spec: ProcessorSpec, values: ProcessorValues, scores: Array, context: Context) -> Array:
    """Apply the processors of `spec` to one step's scores.

    Args:
        spec: static; which processors run.
        values: traced; their numbers.
        scores: `[B, K, V]` float32, logits (greedy, sampling) or log-probabilities (beams).
        context: the sequences so far and the source.

    Returns:
        `[B, K, V]` float32, -inf at what is banned; free of NaN when `scores` is.
    """
    v = values
    if spec.sequence_bias:
        scores = penalties.sequence_bias(scores, context, v.biased_words, v.bias)
    if spec.encoder_repetition_penalty:
        scores = penalties.encoder_repetition(scores, context, v.encoder_repetition_penalty)
    if spec.repetition_penalty:
        scores = penalties.repetition(scores, context, v.repetition_penalty)
    if spec.no_repeat_ngram:
        scores = penalties.no_repeat_ngram(scores, context, v.no_repeat_ngram_size)
    if spec.encoder_no_repeat_ngram:
        scores = penalties.encoder_no_repeat_ngram(scores, context, v.encoder_no_repeat_ngram_size)
    if spec.bad_words:
        scores = penalties.bad_words(scores, context, v.bad_words)
    if spec.min_length:
        short = context.cur_len < rows(v.min_length)
        short |= context.cur_len - rows(context.prompt_length) < rows(v.min_new_tokens)
        scores = jnp.where(short & table(v.eos), -jnp.inf, scores)
    if spec.constraint:
        assert v.constraint is not None
        scores = constrain(scores, context, v.constraint)
    if spec.forced_bos:
        scores = penalties.force(scores, context.cur_len == 1, v.forced_bos)
    if spec.forced_eos:
        last = context.cur_len == rows(context.max_length) - 1
        scores = penalties.force(scores, last, v.forced_eos)
    if spec.remove_invalid:
        scores = penalties.remove_invalid(scores)
    if spec.exponential_decay:
        scores = penalties.exponential_decay(
            scores, context, v.decay_start, v.decay_factor, table(v.eos)
        )
    if spec.suppress:
        scores = jnp.where(table(v.suppress), -jnp.inf, scores)
    if spec.begin_suppress:
        # After a lone start token a forced token comes first, and the ban falls on the one after.
        begin = rows(context.prompt_length)
        begin = jnp.where((begin == 1) & spec.forced_bos, 2, begin)
        banned = (context.cur_len == begin) & table(v.begin_suppress)
        scores = jnp.where(banned, -jnp.inf, scores)
    for processor in spec.custom:
        scores = _applied(processor, scores, context)
    scores = _narrowed(spec, v, scores)
    return sampling.renormalized(scores) if spec.renormalize else scores


def _applied(processor: Processor, scores: Array, context: Context) -> Array:
    name = getattr(processor, "__name__", repr(processor))
    found = processor(scores, context)
    if jnp.shape(found) != scores.shape:
        raise InputError(
            f"logits processor {name} must return scores of the shape it was given, "
            f"{list(scores.shape)}, got {list(jnp.shape(found))}"
        )
    return jnp.asarray(found, jnp.float32)


def _narrowed(spec: ProcessorSpec, v: ProcessorValues, scores: Array) -> Array:
    """What acts only on a distribution to draw from."""
    keep = spec.min_tokens_to_keep
    if spec.temperature:
        scores = scores / rows(v.temperature)
    if spec.top_h:
        scores = sampling.top_h(scores, v.top_h)
    if spec.top_p and spec.top_k_candidates:
        n = spec.top_k_candidates
        scores = sampling.top_k_top_p(scores, v.top_k, v.top_p_tail, keep, n)
    else:
        if spec.top_k:
            scores = sampling.top_k(scores, v.top_k, spec.top_k_candidates)
        if spec.top_p:
            scores = sampling.top_p(scores, v.top_p_tail, keep)
    if spec.min_p:
        scores = sampling.min_p(scores, v.min_p, keep)
    if spec.typical_p:
        scores = sampling.typical_p(scores, v.typical_p, keep)
    if spec.epsilon_cutoff:
        scores = sampling.epsilon_cutoff(scores, v.epsilon_cutoff, keep)
    if spec.eta_cutoff:
        scores = sampling.eta_cutoff(scores, v.eta_cutoff, keep)
    return scores
