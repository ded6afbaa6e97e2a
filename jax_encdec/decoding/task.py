"""What a search is given: its structure (static), its numbers (traced), and what never changes.

`SearchSpec` shapes the compiled program, `SearchValues` are its numbers, and a `Task` is both
together with the rows' prompts, sources and random keys: what every algorithm reads and none
changes. The algorithms, `single`, `beams` and `groups`, are pure functions of a task, the lanes so
far, and one step's logits.

Axes: B batch, K lanes (beams, or independent samples), R returned sequences, T capacity, V
vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from jax_encdec.decoding.processors import Context, ProcessorSpec, ProcessorValues, process

State = Any
StepFn = Callable[[State, Array, Array, Array], tuple[Array, State]]
"""`step(state, tokens, parents, position) -> (logits, state)`.

Feeds `tokens [B, K]` int32, which stand at `position` (int32 scalar).  Beam k continues what was
beam `parents[b, k]` at the previous call, so the model reorders or relabels its cache by `parents
[B, K]` int32.  Returns the logits `[B, K, V]` of position + 1.
"""

NEVER_FINISHED = -1e9  # score of an empty slot, and what closes a beam; Transformers' constant
EARLY_STOPPING = {False: 0, True: 1, "never": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """What shapes the compiled program.

    Attributes:
        capacity: T, the length of the sequence arrays, at least any `max_length`.
        num_beams: K; 1 means greedy search or plain sampling.
        num_beam_groups: how many groups the beams form; 1: they all compete.
        num_return_sequences: R; at most K with beams; with plain sampling the R samples of a row
            are R beams that never mix, so they share the row's encoder state.
        do_sample: draw instead of taking the best.
        num_eos: number of end-of-sequence ids; a beam step looks at `max(2, 1 + num_eos) * K`
            candidates.
        output_scores: keep every step's processed scores, `T * B * K * V * 4` bytes.
        output_logits: keep every step's raw logits, as much again.
        processors: which logits processors run.
    """

    capacity: int
    num_beams: int = 1
    num_beam_groups: int = 1
    num_return_sequences: int = 1
    do_sample: bool = False
    num_eos: int = 1
    output_scores: bool = False
    output_logits: bool = False
    processors: ProcessorSpec = dataclasses.field(default_factory=ProcessorSpec)

    @property
    def lanes(self) -> int:
        """K, how many sequences of a row are decoded side by side."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences


class SearchValues(NamedTuple):
    """Every number of a search, traced.  Scalars may also be given per row, `[B]`."""

    max_length: ArrayLike  # int32, prompt included, at most capacity
    eos: ArrayLike  # bool [V], true at the end-of-sequence ids
    pad_token_id: ArrayLike  # int32
    length_penalty: ArrayLike  # float32
    early_stopping: ArrayLike  # int32: 0 False, 1 True, 2 "never"
    processors: ProcessorValues
    diversity_penalty: ArrayLike | None = None  # float32, for groups of beams
    stops: ArrayLike | None = None  # int32 [states, V], see `stop_strings`


class SearchOutput(NamedTuple):
    """What a search returns, best sequence of a row first (samples in the order drawn).

    Attributes:
        sequences: `[B, R, T]` int32, prompt included, padded after the end of the sequence.
        sequences_scores: `[B, R]` float32.  Beams: sum of the processed log-probabilities divided
            by `(generated length) ** length_penalty`.  Greedy and samples: log-probability of the
            generated tokens under the processed distribution.  When forced and banned tokens
            leave a row fewer hypotheses than R, the surplus ones score about -1e9.
        lengths: `[B, R]` int32, tokens of a sequence, prompt and end-of-sequence token included.
        scores: `[B, K, T, V]` float32, or None when not asked for: at t, the processed scores
            that decided the tokens at t.  0 in prompts, and once a row (a sample) is done.
        logits: the same before any processor.
        beam_indices: `[B, R, T]` int32, with either of them and beams: which of the K the token at
            t was decided by; -1 in the prompt and after the end.
    """

    sequences: Array
    sequences_scores: Array
    lengths: Array
    scores: Array | None = None
    logits: Array | None = None
    beam_indices: Array | None = None


class Rows(NamedTuple):
    """What belongs to the rows of a batch and never changes."""

    prompt_length: Array  # int32, scalar or [B]
    keys: Array | None  # [B, K] random keys
    source_ids: Array | None  # int32 [B, S]
    source_mask: Array | None  # [B, S]


@dataclasses.dataclass(frozen=True)
class Task:
    """All that a search reads and does not change."""

    spec: SearchSpec
    values: SearchValues
    rows: Rows

    @property
    def prompt_length(self) -> Array:
        """int32 `[1 or B, 1]`."""
        return self.rows.prompt_length.reshape(-1, 1)

    @property
    def max_length(self) -> Array:
        """int32 `[1 or B, 1]`."""
        return jnp.asarray(self.values.max_length).reshape(-1, 1)

    @property
    def traced_back(self) -> bool:
        """Whether beams remember which beam decided each of their tokens."""
        return self.spec.num_beams > 1 and (self.spec.output_scores or self.spec.output_logits)

    @property
    def unprocessed(self) -> bool:
        """Whether nothing looks at a step's whole distribution."""
        processors = self.spec.processors
        return processors == type(processors)() and not self.spec.output_scores

    def held(self, done: Array, cur_len: Array) -> Array:
        """Lanes that stay as they are in this step: done, without room, or still in their prompt.

        Args:
            done: bool `[B, 1 or K]`.
        """
        held = done | (cur_len >= self.max_length)
        if self.rows.prompt_length.ndim:
            held |= cur_len < self.prompt_length
        return held

    def processed(
        self, scores: Array, sequences: Array, cur_len: Array, diversity: Array | None = None
    ) -> Array:
        """Apply the logits processors to `scores [B, K, V]` of lanes `sequences [B, K, T]`."""
        if diversity is not None:
            # Only `sequence_bias` comes before it there, which adds, so that the order is the same.
            scores = scores - diversity
        context = Context(
            sequences=sequences,
            cur_len=cur_len,
            prompt_length=self.rows.prompt_length,
            max_length=jnp.asarray(self.values.max_length),
            source_ids=self.rows.source_ids,
            source_mask=self.rows.source_mask,
        )
        return process(self.spec.processors, self.values.processors, scores, context)

    def heard(self, stops: Array | None, token: Array) -> tuple[Array, Array | None]:
        """Whether `token` ends a lane, and the state of its search for stop strings after it.

        Args:
            stops: int32, the states before the token, as `token` in shape; None without strings.
            token: int32 `[B, n]`.
        """
        ends = jnp.asarray(self.values.eos)[token]
        if stops is None:
            return ends, None
        after = jnp.asarray(self.values.stops)[stops, token]
        # A negative entry is the complement of the state in which a stop string is complete.
        return ends | (after < 0), jnp.where(after < 0, ~after, after)


# Small steps on sequences `[B, K, T]` ------------------------------------------------------------


def column(sequences: Array, position: Array) -> Array:
    """Return `[B, K]`, the tokens of `sequences [B, K, T]` at `position`."""
    return lax.dynamic_index_in_dim(sequences, position, axis=2, keepdims=False)


def set_column(sequences: Array, tokens: Array, position: Array) -> Array:
    """Return `sequences [B, K, T]` with `tokens [B, K]` at `position`."""
    return lax.dynamic_update_index_in_dim(sequences, tokens, position, axis=2)


def keep(held: Array, old: Any, new: Any) -> Any:
    """Take `new`, but `old` in the rows that are `held [B, 1]`."""

    def select(a, b):
        return jnp.where(held.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(select, old, new)


def gumbel(keys: Array, position: Array, vocab_size: int) -> Array:
    """Return Gumbel noise `[B, K, V]` for one position from keys `[B, K]`."""

    def draw(key):
        return jax.random.gumbel(jax.random.fold_in(key, position), (vocab_size,), jnp.float32)

    return jax.vmap(jax.vmap(draw))(keys)
