"""Generation stays within what is allowed, as Transformers' prefix_allowed_tokens_fn has it."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import as_torch, assert_same_tokens, from_torch, source_batch, torch, torch_pair

from jax_encdec.decoding import constraints
from jax_encdec.decoding.constraints import allowed_sequences, allowed_transitions, explored
from jax_encdec.decoding.context import Context
from jax_encdec.errors import InputError

EOS, V = 2, 53


@functools.cache
def pair():
    oracle = torch_pair("bert", "bert", hidden=(16, 24), seed=11)
    return oracle, *from_torch(oracle)


def answers(seed=0, count=40):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 9, size=rng.integers(1, 7)).tolist() for _ in range(count)]


def function_of(sequences):
    """What Transformers takes: after the start token, the next tokens of the sequences."""

    def allowed(row, ids):
        said = ids.tolist()[1:]
        found = {
            (*sequence, EOS)[len(said)]
            for sequence in sequences
            if len(sequence) >= len(said) and sequence[: len(said)] == said
        }
        return sorted(found) or [EOS]

    return allowed


@pytest.mark.parametrize("beams", [1, 3, 5])
def test_tables_generate_what_the_function_does_in_transformers(beams):
    oracle, model, params = pair()
    ids, mask = source_batch(np.random.default_rng(beams))
    allowed = function_of(answers())
    options = {"num_beams": beams, "max_new_tokens": 9, "num_return_sequences": min(beams, 3)}
    assert not assert_same_tokens(
        oracle, model, params, ids, mask, prefix_allowed_tokens_fn=allowed, **options
    )
    by_function = model.generate(
        params, ids, attention_mask=mask, prefix_allowed_tokens_fn=allowed, **options
    )
    table = allowed_sequences(answers(), eos_token_id=EOS)
    by_table = model.generate(
        params, ids, attention_mask=mask, prefix_allowed_tokens_fn=table, **options
    )
    np.testing.assert_array_equal(by_function.sequences, by_table.sequences)
    for sequence, length in zip(np.asarray(by_table.sequences), by_table.lengths, strict=True):
        assert sequence[length - 1] == EOS
        assert sequence[1 : length - 1].tolist() in answers()


def test_every_row_may_have_its_own_rules_and_its_own_prompt():
    oracle, model, params = pair()
    ids, mask = source_batch(np.random.default_rng(8))
    prompt = np.array([[0, 7, 8], [0, 9, 10], [0, 11, 12]], np.int32)

    def allowed(row, ids):
        said = ids.tolist()
        return [3 + row, 20 + said[1], EOS] if len(said) % 2 else [6 + row, 30 + len(said)]

    with torch.no_grad():
        theirs = oracle.generate(
            input_ids=as_torch(ids),
            attention_mask=as_torch(mask),
            decoder_input_ids=as_torch(prompt),
            prefix_allowed_tokens_fn=allowed,
            num_beams=3,
            max_new_tokens=8,
            do_sample=False,
        ).numpy()
    ours = model.generate(
        params, ids, attention_mask=mask, decoder_input_ids=prompt, num_beams=3, max_new_tokens=8,
        prefix_allowed_tokens_fn=allowed,
    )  # fmt: skip
    for row, length in enumerate(np.asarray(ours.lengths)):
        np.testing.assert_array_equal(ours.sequences[row, :length], theirs[row, :length])


def test_where_all_that_is_allowed_is_banned_it_comes_all_the_same():
    oracle, model, params = pair()
    ids, mask = source_batch(np.random.default_rng(9))
    options = {"max_new_tokens": 6, "bad_words_ids": [[5], [6]]}
    for beams in (1, 2):
        assert not assert_same_tokens(
            oracle, model, params, ids, mask, num_beams=beams, **options,
            prefix_allowed_tokens_fn=lambda row, ids: [5] if len(ids) == 3 else [6, 7, 8, EOS],
        )  # fmt: skip


@pytest.mark.parametrize("beams", [1, 3])
def test_nothing_need_be_allowed_where_no_search_goes(beams):
    """As in Transformers, which asks at the moment it gets there."""
    oracle, model, params = pair()
    ids, mask = source_batch(np.random.default_rng(beams))
    options = {"num_beams": beams, "max_new_tokens": 6}
    asked = set()

    def allowed(row, ids):
        asked.add((row, *np.asarray(ids).tolist()))
        return [5, 6, 7, EOS] if len(ids) < 5 else [EOS]

    def only_there(row, ids):
        return allowed(row, ids) if (row, *np.asarray(ids).tolist()) in reached else []

    assert not assert_same_tokens(
        oracle, model, params, ids, mask, prefix_allowed_tokens_fn=allowed, **options
    )
    asked.clear()
    with torch.no_grad():
        oracle.generate(
            input_ids=as_torch(ids), attention_mask=as_torch(mask), do_sample=False,
            prefix_allowed_tokens_fn=allowed, **options,
        )  # fmt: skip
    reached = frozenset(asked)
    assert len(reached) < len(ids) * sum(3**n for n in range(5))
    assert not assert_same_tokens(
        oracle, model, params, ids, mask, prefix_allowed_tokens_fn=only_there, **options
    )


def test_where_a_search_goes_something_must_be_allowed():
    oracle, model, params = pair()
    ids, mask = source_batch(np.random.default_rng(9))
    free = [5, 6, 7, 8]
    out = model.generate(
        params, ids, attention_mask=mask, max_new_tokens=5, prefix_allowed_tokens_fn=lambda *_: free
    )
    end = np.asarray(out.sequences)[1, :4].tolist()

    def allowed(row, ids):
        return [] if (row, ids.tolist()) == (1, end) else free

    options = {"max_new_tokens": 5, "prefix_allowed_tokens_fn": allowed}
    with torch.no_grad(), pytest.raises(ValueError, match="empty list for batch ID 1"):
        oracle.generate(
            input_ids=as_torch(ids), attention_mask=as_torch(mask), do_sample=False, **options
        )
    message = rf"got none for row 1 after {re.escape(str(end))}"
    with pytest.raises(InputError, match=message):
        model.generate(params, ids, attention_mask=mask, **options)
    pieces = model.stream(params, ids, attention_mask=mask, chunk=3, **options)
    next(pieces)
    with pytest.raises(InputError, match=message):
        next(pieces)
    with pytest.raises(InputError, match=message):
        model.generate(params, ids, attention_mask=mask, max_time=1e6, **options)
    scores = jax.jit(
        lambda p: model.generate(p, ids, attention_mask=mask, **options).sequences_scores
    )(params)
    assert (np.asarray(scores) > -1e6).tolist() == [True, False, True]
    others = model.generate(params, ids, attention_mask=mask, num_beams=3, **options)
    for row, sequence in enumerate(np.asarray(others.sequences)):
        assert row != 1 or sequence[:4].tolist() != end  # Another beam won.
        assert set(sequence[1:].tolist()) <= set(free)


def test_a_grammar_with_states_goes_on_for_ever():
    """Pairs of a letter and a digit: as a function of the prefix, far too many to explore."""
    _, model, params = pair()
    ids, mask = source_batch(np.random.default_rng(10))
    letters, digits = range(10, 20), range(20, 30)
    grammar = {
        "letter": dict.fromkeys(letters, "digit"),
        "digit": {**dict.fromkeys(digits, "letter"), EOS: None},
    }
    table = allowed_transitions(grammar, start="letter", eos_token_id=EOS)
    out = model.generate(
        params, ids, attention_mask=mask, num_beams=3, max_new_tokens=12,
        prefix_allowed_tokens_fn=table,
    )  # fmt: skip
    for sequence, length in zip(np.asarray(out.sequences), np.asarray(out.lengths), strict=True):
        said = sequence[1:length]
        said = said[:-1] if said[-1] == EOS else said
        assert set(said[0::2]) <= set(letters)
        assert set(said[1::2]) <= set(digits)
    with pytest.raises(InputError, match="more than 50000 prefixes, too many to compile"):
        explored(lambda row, ids: range(10, 20), [[0]], eos_token_id=EOS, max_length=12)


def test_tables_may_be_an_argument_of_somebodys_program():
    _, model, params = pair()
    ids, mask = source_batch(np.random.default_rng(15))
    table = allowed_sequences(answers(), eos_token_id=EOS)

    def run(table):
        return model.generate(
            params, ids, attention_mask=mask, max_new_tokens=9, prefix_allowed_tokens_fn=table
        ).sequences

    inside, outside = jax.jit(run)(table), run(table)
    np.testing.assert_array_equal(inside[:, : outside.shape[1]], outside)


def test_constraints_of_a_size_share_a_program():
    from jax_encdec.decoding.engine import _generate

    _, model, params = pair()
    ids, mask = source_batch(np.random.default_rng(11))
    sizes = []
    for seed in range(3):
        table = allowed_sequences(answers(seed), eos_token_id=EOS)
        model.generate(
            params, ids, attention_mask=mask, max_new_tokens=9, prefix_allowed_tokens_fn=table
        )
        sizes.append(_generate._cache_size())
    assert len(set(sizes)) == 1


@given(
    st.lists(st.lists(st.integers(3, 6), max_size=4), min_size=1, max_size=12),
    st.lists(st.integers(2, 6), max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_a_state_allows_exactly_the_continuations(sequences, said):
    table = allowed_sequences(sequences, eos_token_id=EOS)
    context = Context(
        sequences=jnp.array([[[0, *said, *[0] * (6 - len(said))]]], jnp.int32),
        cur_len=jnp.int32(1 + len(said)),
        prompt_length=jnp.int32(1),
        max_length=jnp.int32(7),
    )
    # Sizes are kept the same, so that all examples share a program.
    table = constraints.Constraint(
        first=np.pad(table.first, (0, 65 - len(table.first)), mode="edge"),
        tokens=np.pad(table.tokens, (0, 128 - len(table.tokens))),
        targets=np.pad(table.targets, (0, 128 - len(table.targets))),
        start=table.start,
        width=table.width,
    )
    scores = CONSTRAIN(jnp.zeros((1, 1, 8)), context, table)
    expected = function_of([list(s) for s in sequences])(0, np.array([0, *said]))
    np.testing.assert_array_equal(np.flatnonzero(np.asarray(scores[0, 0]) == 0.0), expected)


CONSTRAIN = jax.jit(constraints.constrain)


def test_equal_futures_share_a_state():
    """All binary words of length 8: 9 states rather than 511, and the one that is over."""
    words = [list(word) for word in itertools.product((3, 4), repeat=8)]
    table = allowed_sequences(words, eos_token_id=EOS)
    assert np.count_nonzero(np.diff(np.asarray(table.first))) == 10
    rows = explored(function_of(words), [[0], [0]], eos_token_id=EOS, max_length=10)
    assert np.count_nonzero(np.diff(np.asarray(rows.first))) == 10
    assert np.asarray(rows.start)[0] == np.asarray(rows.start)[1]


def test_what_cannot_be_allowed_is_refused():
    _, model, params = pair()
    ids, _ = source_batch(np.random.default_rng(12))

    def run(rule, **options):
        return model.generate(params, ids, prefix_allowed_tokens_fn=rule, **options)

    with pytest.raises(InputError, match="must not hold the end token"):
        allowed_sequences([[3, 2, 4]], eos_token_id=2)
    with pytest.raises(InputError, match="at least one sequence, got none"):
        allowed_sequences([], eos_token_id=2)
    with pytest.raises(InputError, match="lead to state 'b', which they lack"):
        allowed_transitions({"a": {5: "b"}}, start="a", eos_token_id=2)
    with pytest.raises(InputError, match="state 'a' of the transitions must allow a token"):
        allowed_transitions({"a": {}}, start="a", eos_token_id=2)
    with pytest.raises(InputError, match=r"got none for row 0 after \[0, 5\]"):
        run(lambda row, ids: [5] if len(ids) == 1 else [])
    with pytest.raises(InputError, match=r"got none for row 2 after \[0\]"):
        explored(lambda row, ids: [5] * (row < 2), [[0]] * 3, eos_token_id=2, max_length=4)
    with pytest.raises(InputError, match="must lie in the vocabulary, 0 to 52, got 60"):
        run(lambda row, ids: [60, 2] if len(ids) == 1 else [2])
    three = explored(lambda row, ids: [2], [[0]] * 2, eos_token_id=2, max_length=4)
    with pytest.raises(InputError, match="made for 2 rows, got a batch of 3"):
        run(three)
    for forced in (9, np.array([5, 9, 5])):
        with pytest.raises(InputError, match=r"forced_bos_token_id \(9\) is not among"):
            run(allowed_sequences([[5, 6]], eos_token_id=2), forced_bos_token_id=forced)
    with pytest.raises(InputError, match="make tables of it before"):
        jax.jit(lambda ids: run(lambda row, ids: [2], decoder_input_ids=ids))(ids)


# Processors of the user's ------------------------------------------------------------------------


def prefer_even(scores, context):
    """Even tokens gain one at even places."""
    even = jnp.arange(scores.shape[-1]) % 2 == 0
    return scores + jnp.where(even & (context.cur_len % 2 == 0), 1.0, 0.0)


def halve_last(scores, context):
    """What was said last becomes half as likely again."""
    last = jax.lax.dynamic_index_in_dim(context.sequences, context.cur_len - 1, 2)
    return jnp.where(jnp.arange(scores.shape[-1]) == last, scores - 0.5, scores)


class TheirEven:
    def __call__(self, input_ids, scores):
        if input_ids.shape[1] % 2 == 0:
            scores = scores + (torch.arange(scores.shape[1]) % 2 == 0)
        return scores


class TheirHalf:
    def __call__(self, input_ids, scores):
        return scores - 0.5 * torch.nn.functional.one_hot(input_ids[:, -1], scores.shape[1])


@pytest.mark.parametrize("beams", [1, 4])
def test_processors_of_the_user_run_where_transformers_runs_them(beams):
    oracle, model, params = pair()
    ids, mask = source_batch(np.random.default_rng(13))
    options = {"num_beams": beams, "max_new_tokens": 10, "forced_bos_token_id": 7}
    options |= {"suppress_tokens": [4], "renormalize_logits": True}
    with torch.no_grad():
        theirs = oracle.generate(
            input_ids=as_torch(ids),
            attention_mask=as_torch(mask),
            logits_processor=[TheirEven(), TheirHalf()],
            do_sample=False,
            **options,
        ).numpy()
    ours = model.generate(
        params, ids, attention_mask=mask, logits_processors=(prefer_even, halve_last), **options
    )
    for row, length in enumerate(np.asarray(ours.lengths)):
        np.testing.assert_array_equal(ours.sequences[row, :length], theirs[row, :length])


def test_a_processor_that_returns_something_else_is_named():
    _, model, params = pair()
    ids, _ = source_batch(np.random.default_rng(14))

    def best_only(scores, context):
        return scores.max(-1)

    with pytest.raises(InputError, match=r"best_only must return scores of the shape it was given"):
        model.generate(params, ids, logits_processors=(best_only,))
    with pytest.raises(InputError, match="must be hashable functions, got 3"):
        model.generate(params, ids, logits_processors=(3,))
