"""What may follow what: `prefix_allowed_tokens_fn` as tables that a compiled loop can read.

A `Constraint` is an automaton over generated tokens.  `allowed_sequences` makes one of a list of
answers, `allowed_transitions` of a grammar with states, and `explored` of a Python function of the
prefix, as Transformers takes it, by asking it about every prefix that can come up.  `constrain`
bans, in the loop, what the state of a sequence does not allow.

Axes: B batch, K beams, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from jax_encdec.decoding.context import Context, lanes, rows
from jax_encdec.errors import InputError

Allowed = Callable[[int, np.ndarray], Iterable[int]]
"""`(row, ids) -> allowed ids`: what may follow a prefix, int32, decoder prompt first."""

MAX_PREFIXES = 50_000
"""How many prefixes `explored` asks about before it gives up."""

_OVER = 0  # the state of a sequence that has ended, or has left the automaton


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Constraint:
    """An automaton as arrays; make one with the functions of this module.

    The transitions out of a state stand together: those of state s are `first[s]` to
    `first[s + 1]`.  Sizes are powers of two, so that constraints can share a program.

    Attributes:
        first: int32 `[states + 1]`.
        tokens: int32 `[transitions]`, what is allowed.
        targets: int32 `[transitions]`, the state after it; 0 when the sequence is over.
        start: int32, scalar or `[B]`, the state after the decoder prompt.
        width: static, at least the number of transitions out of any state.
    """

    first: ArrayLike
    tokens: ArrayLike
    targets: ArrayLike
    start: ArrayLike
    width: int = dataclasses.field(metadata={"static": True})


# Making one --------------------------------------------------------------------------------------


def allowed_sequences(
    sequences: Iterable[Sequence[int]], *, eos_token_id: int | Sequence[int]
) -> Constraint:
    """Allow exactly these sequences after the decoder prompt, each ended by an end token.

    Args:
        sequences: token ids, without the start token and without the end token.
        eos_token_id: what ends a sequence.

    Raises:
        InputError: no sequence, or one that holds an end token.
    """
    ends = _ids(eos_token_id)
    root: dict[int, Any] = {}
    for sequence in sequences:
        node = root
        for token in _ids(sequence):
            if token in ends:
                raise InputError(
                    f"an allowed sequence must not hold the end token, got {list(sequence)}; "
                    "it is added where the sequence ends"
                )
            node = node.setdefault(token, {})
        node.update(dict.fromkeys(ends))
    if not root:
        raise InputError("allowed_sequences needs at least one sequence, got none")
    found: list[dict[int, Any]] = [root]
    for node in found:
        found.extend(child for child in node.values() if child is not None)
    place = {id(node): i for i, node in enumerate(found)}
    nodes = [
        {token: None if child is None else place[id(child)] for token, child in node.items()}
        for node in found
    ]
    states, starts = _merged(nodes, [0])
    return _packed(states, starts[0], ends)


def allowed_transitions(
    transitions: Mapping[Hashable, Mapping[int, Hashable]],
    *,
    start: Hashable,
    eos_token_id: int | Sequence[int],
) -> Constraint:
    """Allow what a grammar of states allows.

    Args:
        transitions: for every state, the tokens it allows and the state after each; after an end
            token any state, such as None.
        start: the state after the decoder prompt.
        eos_token_id: what ends a sequence.

    Raises:
        InputError: a state that is nowhere described, or allows nothing.
    """
    ends = _ids(eos_token_id)
    place = {state: i for i, state in enumerate(transitions, 1)}
    states: list[dict[int, int]] = [{}]
    for state, allowed in transitions.items():
        if not allowed:
            raise InputError(f"state {state!r} of the transitions must allow a token, got none")
        states.append({})
        for token, target in allowed.items():
            if token not in ends and target not in place:
                raise InputError(f"the transitions lead to state {target!r}, which they lack")
            states[-1][int(token)] = _OVER if token in ends else place[target]
    if start not in place:
        raise InputError(f"start must be a state of the transitions, got {start!r}")
    return _packed(states, place[start], ends)


def explored(
    allowed: Allowed,
    prompts: Sequence[Sequence[int]],
    *,
    eos_token_id: int | Sequence[int],
    max_length: int,
    forced_bos_token_id: ArrayLike | None = None,
) -> Constraint:
    """Turn a Python function of the prefix into tables, by asking about every possible prefix.

    After some of them it may allow nothing, as long as no search goes there: beams that do are
    dropped, and `generate` refuses a sequence that did. (Inside `jit` such a one scores -1e9 or
    less.)

    Args:
        allowed: must always answer the same.
        prompts: the decoder prompt of every row.
        eos_token_id: what ends a sequence; nothing is asked about what would follow.
        max_length: how long a sequence can become, prompt included.
        forced_bos_token_id: what follows a prompt of one token whatever is allowed, int or `[B]`.

    Raises:
        InputError: more than `MAX_PREFIXES` prefixes, or a prompt after which nothing is allowed.
    """
    if not callable(allowed):
        raise InputError(
            "prefix_allowed_tokens_fn must be a function (row, ids) -> allowed ids, or a "
            f"Constraint; got {allowed!r}"
        )
    ends = _ids(eos_token_id)
    prefixes = [(row, tuple(int(t) for t in prompt)) for row, prompt in enumerate(prompts)]
    forced: list[Any] = [None] * len(prefixes)
    if forced_bos_token_id is not None:
        forced = np.broadcast_to(np.asarray(forced_bos_token_id), len(prefixes)).tolist()
    nodes: list[dict[int, int | None]] = []
    for row, prefix in prefixes:  # which grows
        if len(nodes) == MAX_PREFIXES:
            raise InputError(
                f"prefix_allowed_tokens_fn allows more than {MAX_PREFIXES} prefixes, too many to "
                "compile; lower max_length, or describe it by constraints.allowed_transitions"
            )
        node: dict[int, int | None] = {}
        first = forced[row] if len(prefix) == 1 else None
        answer = allowed(row, np.array(prefix, np.int32)) if first is None else (first,)
        try:
            answer = _ids(answer)
        except (TypeError, ValueError):
            raise InputError(
                f"prefix_allowed_tokens_fn must return token ids; got {answer!r}"
            ) from None
        for token in answer:
            goes_on = token not in ends and len(prefix) + 1 < max_length
            if token not in node:
                node[token] = len(prefixes) if goes_on else None
                prefixes.extend([(row, (*prefix, token))] if goes_on else [])
        if not node and len(nodes) < len(prompts):
            raise _nothing(row, prefix)
        nodes.append(node)
    states, starts = _merged(nodes, range(len(prompts)))
    return _packed(states, np.array(starts, np.int32), ends)


def _nothing(row: int, prefix: Iterable[Any]) -> InputError:
    return InputError(
        f"prefix_allowed_tokens_fn must allow a token, got none for row {row} after "
        f"{[int(token) for token in prefix]}"
    )


def _ids(tokens: Any) -> tuple[int, ...]:
    if hasattr(tokens, "tolist"):
        tokens = tokens.tolist()
    return tuple(int(t) for t in tokens) if isinstance(tokens, Iterable) else (int(tokens),)


def _merged(
    nodes: Sequence[Mapping[int, int | None]], roots: Iterable[int]
) -> tuple[list[dict[int, int]], list[int]]:
    """Give nodes that allow the same from there on one state; children come after parents."""
    known: dict[tuple[tuple[int, int], ...], int] = {}
    states: list[dict[int, int]] = [{}]
    place = [_OVER] * len(nodes)
    for i in range(len(nodes) - 1, -1, -1):
        state = {t: _OVER if to is None else place[to] for t, to in nodes[i].items()}
        key = tuple(sorted(state.items()))
        if key not in known:
            known[key] = len(states)
            states.append(state)
        place[i] = known[key]
    return states, [place[root] for root in roots]


def _packed(
    states: list[dict[int, int]], start: int | np.ndarray, ends: tuple[int, ...]
) -> Constraint:
    states = [dict.fromkeys(ends, _OVER), *states[1:]]
    if any(token < 0 for state in states for token in state):
        raise InputError("allowed tokens must not be negative, got one that is")
    counts = [len(state) for state in states]
    first = np.zeros(_power(len(states)) + 1, np.int32)
    first[1 : len(states) + 1] = np.cumsum(counts)
    first[len(states) + 1 :] = first[len(states)]
    width = _power(max(counts))
    # A window that begins at any transition must not reach beyond the end.
    tokens = np.full(_power(sum(counts) + width), -1, np.int32)
    targets = np.zeros_like(tokens)
    tokens[: sum(counts)] = [t for state in states for t in state]
    targets[: sum(counts)] = [to for state in states for to in state.values()]
    return Constraint(
        first=first, tokens=tokens, targets=targets, start=np.asarray(start, np.int32), width=width
    )


def _power(size: int) -> int:
    return 1 << max(3, (size - 1).bit_length())


def check(
    constraint: Constraint, *, vocab_size: int, batch: int | None, forced: ArrayLike | None
) -> None:
    """Check that a constraint fits a vocabulary, a batch, and a forced first token.

    Args:
        forced: the token that is forced after the decoder prompt, if any; scalar or `[B]`.

    Raises:
        InputError: it does not.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(constraint)):
        return
    tokens, first = np.asarray(constraint.tokens), np.asarray(constraint.first)
    if tokens.max() >= vocab_size:
        raise InputError(
            f"allowed tokens must lie in the vocabulary, 0 to {vocab_size - 1}, got {tokens.max()}"
        )
    start = np.asarray(constraint.start)
    if start.ndim and batch is not None and start.shape != (batch,):
        raise InputError(
            f"the constraint was made for {start.shape[0]} rows, got a batch of {batch}"
        )
    if forced is None or isinstance(forced, Tracer):
        return
    for state, token in np.broadcast(start, np.asarray(forced)):
        if token not in tokens[first[state] : first[state + 1]]:
            raise InputError(
                f"forced_bos_token_id ({token}) is not among the tokens allowed first; begin what "
                "is allowed with it, or set forced_bos_token_id=None"
            )


def check_found(
    constraint: Constraint | None,
    sequences: ArrayLike,
    lengths: ArrayLike,
    prompt_lengths: ArrayLike,
) -> None:
    """Check that no sequence went on from where nothing is allowed.

    Args:
        sequences: `[B * R, T]`, found under the constraint, or as far as they are.
        lengths: `[B * R]`, prompts included.
        prompt_lengths: `[B]`.

    Raises:
        InputError: one did.
    """
    if constraint is None:
        return
    arrays = (constraint.first, constraint.tokens, constraint.targets)
    first, tokens, targets = map(np.asarray, arrays)
    closed = first[1:] == first[:-1]
    closed[_OVER] = False  # Empty where nothing ends a sequence.
    if not closed[targets[: first[-1]]].any():
        return
    sequences, lengths, begins = map(np.asarray, (sequences, lengths, prompt_lengths))
    states = np.broadcast_to(constraint.start, len(begins))
    returned = len(sequences) // len(begins)
    for i, (sequence, length) in enumerate(zip(sequences, lengths, strict=True)):
        row = i // returned
        state = states[row]
        for place in range(begins[row], length):
            if closed[state]:
                raise _nothing(row, sequence[:place])
            out = slice(first[state], first[state + 1])
            taken = targets[out][tokens[out] == sequence[place]]
            state = taken[0] if len(taken) else _OVER


# Using one ---------------------------------------------------------------------------------------


def constrain(scores: Array, context: Context, constraint: Constraint) -> Array:
    """Ban what the state of each sequence does not allow.

    Where that leaves a row nothing in any beam, what is allowed scores 0 instead.
    """
    state = _state(scores, context, constraint)
    tokens, _, real = _transitions(constraint, state)
    tokens = jnp.where(real, tokens, scores.shape[2])
    mask = jnp.full_like(scores, -jnp.inf).at[*lanes(scores), tokens].set(0.0, mode="drop")
    nothing = jnp.all(jnp.isneginf(scores + mask), axis=(1, 2), keepdims=True)
    return jnp.where(nothing, mask, scores + mask)


def _state(scores: Array, context: Context, constraint: Constraint) -> Array:
    """Return int32 `[B, K]`, where the generated tokens lead."""
    begin = rows(context.prompt_length)[..., 0]

    def follow(place, state):
        token = lax.dynamic_slice_in_dim(context.sequences, place, 1, axis=2)
        tokens, targets, real = _transitions(constraint, state)
        taken = real & (tokens == token)
        after = jnp.max(jnp.where(taken, targets, _OVER), axis=2)
        return jnp.where(place >= begin, after, state)

    start = jnp.broadcast_to(jnp.asarray(constraint.start).reshape(-1, 1), scores.shape[:2])
    return lax.fori_loop(jnp.min(begin), context.cur_len, follow, start)


def _transitions(constraint: Constraint, state: Array) -> tuple[Array, Array, Array]:
    """Return tokens, targets and which of them exist, `[B, K, width]`, of `state [B, K]`."""
    first = jnp.asarray(constraint.first)
    begin, end = first[state][..., None], first[state + 1][..., None]
    place = begin + jnp.arange(constraint.width)
    tokens, targets = jnp.asarray(constraint.tokens), jnp.asarray(constraint.targets)
    return tokens[place], targets[place], place < end
