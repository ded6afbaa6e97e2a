"""Searches find what Transformers' `generate` finds, for every row, whatever the other rows are."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_search import (
    HASHES,
    PAD,
    START,
    VOCAB,
    WIDTH,
    assert_same,
    make_sources,
    make_table,
    oracle_class,
    ours,
    run,
    step,
    theirs,
)  # fmt: skip

from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.decoding.search import prepare, search
from jax_encdec.decoding.top_k import first_largest, top_k
from jax_encdec.errors import InputError

# --- the oracle: transformers.generate -------------------------------------------------------


def random_structure(rng: np.random.Generator) -> dict:
    """What shapes the program: drawn once, then shared by several draws of numbers."""
    beams = int(rng.choice([1, 2, 3, 4, 6]))
    names = ("ngram", "encoder", "words", "repeat", "bos", "forced_eos", "suppress", "begin", "min")
    return {
        "beams": beams,
        "returned": int(rng.integers(1, beams + 1)),
        "rows": int(rng.integers(1, 6)),
        "eos": int(rng.integers(0, 4)),
        "prompt": int(rng.choice([1, 1, 1, 3])),
        "on": frozenset(name for name in names if rng.random() < 0.3),
    }


def random_options(rng: np.random.Generator, structure: dict) -> dict:
    on, prompt = structure["on"], structure["prompt"]
    ids = rng.permutation(np.arange(4, VOCAB)).tolist()
    eos = [2, 5, 9][: structure["eos"]]
    free = [i for i in ids if i not in eos]
    longest = prompt + int(rng.integers(2, 14))
    options = {
        "num_beams": structure["beams"],
        "num_return_sequences": structure["returned"],
        "eos_token_id": eos if len(eos) != 1 else eos[0],
        "length_penalty": float(rng.choice([-1.0, 0.0, 0.6, 1.0, 2.0])),
        "early_stopping": [False, True, "never"][rng.integers(3)],
    }
    options |= (
        {"max_length": longest} if rng.random() < 0.5 else {"max_new_tokens": longest - prompt}
    )
    if not eos:
        del options["eos_token_id"]
    if "ngram" in on:
        options["no_repeat_ngram_size"] = int(rng.integers(1, 5))
    if "encoder" in on:
        options["encoder_no_repeat_ngram_size"] = int(rng.integers(1, 4))
    if "words" in on:
        words = [rng.choice(VOCAB, size=rng.integers(1, 4)).tolist() for _ in range(6)]
        options["bad_words_ids"] = [*words, [free[0], free[1], free[2], free[3]]]
    if "repeat" in on:
        options["repetition_penalty"] = float(rng.choice([0.7, 1.3, 2.5]))
    if "bos" in on:
        options["forced_bos_token_id"] = free[4]
    if "forced_eos" in on:
        options["forced_eos_token_id"] = eos[0] if eos else free[5]
    if "suppress" in on:
        options["suppress_tokens"] = free[6 : 7 + int(rng.integers(1, 4))]
    if "begin" in on:
        options["begin_suppress_tokens"] = free[:8]
    if "min" in on:
        new = int(rng.integers(1, longest - prompt + 1))
        options |= {"min_new_tokens": new} if rng.random() < 0.5 else {"min_length": new + prompt}
    return options


def check_against_generate(seed: int, draws: int):
    rng = np.random.default_rng(seed)
    structure = random_structure(rng)
    for draw in range(draws):
        table = make_table(int(rng.integers(1000)))
        table[..., [2, 5, 9]] += 1.0  # sentences end now and then
        ids, mask = make_sources(rng, structure["rows"])
        prompt = np.full((structure["rows"], structure["prompt"]), START, np.int32)
        prompt[:, 1:] = rng.integers(4, VOCAB, prompt[:, 1:].shape)
        options = random_options(rng, structure)
        got = ours(table, ids, mask, options, prompt)
        sequences, scores = theirs(table, ids, options, prompt)
        assert_same(got, sequences, scores, f"seed {seed} draw {draw}: {options}")


@pytest.mark.parametrize("seed", range(14))
def test_generates_what_transformers_generates(seed):
    check_against_generate(seed, draws=15)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(1000, 1060))
def test_generates_what_transformers_generates_long(seed):
    check_against_generate(seed, draws=12)


@pytest.mark.parametrize("length_penalty", [-0.2, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_early_stopping_and_length_penalty_stop_where_transformers_stops(
    early_stopping, length_penalty
):
    ids, mask = make_sources(np.random.default_rng(0), 8)
    options = {
        "num_beams": 3,
        "num_return_sequences": 3,
        "eos_token_id": 2,
        "max_length": 20,
        "early_stopping": early_stopping,
        "length_penalty": length_penalty,
    }
    for seed in (3, 11, 14, 19, 25):  # tables where stopping a step too early or late shows
        table = make_table(seed)
        table[..., 2] += 1.5 if seed == 14 else 3.0
        assert_same(ours(table, ids, mask, options), *theirs(table, ids, options), str(seed))


def test_pad_id_zero_pads_beams_where_transformers_writes_eos():
    """Transformers 5 fills beams with EOS when the pad id is 0 (BERT's); padding is right."""
    table = make_table(1)
    table[..., 2] += 2.0
    ids, mask = make_sources(np.random.default_rng(1), 4)
    options = {"num_beams": 3, "eos_token_id": 2, "max_length": 20, "pad_token_id": 0}
    got = ours(table, ids, mask, options)
    sequences, _ = theirs(table, ids, options)
    lengths = got.lengths[:, 0]
    assert lengths.min() < lengths.max()
    for mine, other, n in zip(got.sequences[:, 0], sequences, lengths, strict=True):
        np.testing.assert_array_equal(mine[:n], other[:n])
        assert (mine[n:] == 0).all()
        assert (other[n:] == 2).all()  # the bug


def test_greedy_score_is_the_log_probability_of_the_sequence():
    torch, _, _ = oracle_class()
    table = make_table(2)
    ids, mask = make_sources(np.random.default_rng(2), 3)
    got = ours(table, ids, mask, {"max_new_tokens": 6})
    prefix = np.zeros(3, int)
    expected = np.zeros(3)
    for t in range(6):
        prefix = (prefix * 31 + got.sequences[:, 0, t] + 7) % HASHES
        logits = torch.tensor(table[ids[:, 0], (prefix + 37 * t) % HASHES])
        logp = torch.log_softmax(logits.double(), -1).numpy()
        expected += logp[np.arange(3), got.sequences[:, 0, t + 1]]
    np.testing.assert_allclose(got.sequences_scores[:, 0], expected, atol=1e-5)


# --- brute force -----------------------------------------------------------------------------


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 1.7])
def test_wide_beam_finds_the_best_of_all_sequences(length_penalty):
    vocab, new, eos, returned = 4, 5, 0, 8
    rng = np.random.default_rng(11)
    logits = rng.normal(size=(new + 1, vocab, vocab)) * 1.5
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def markov(state, tokens, parents, position):
        return jnp.asarray(logits, jnp.float32)[position, tokens], state

    def score(tokens):
        path = zip((1, *tokens), tokens, strict=False)
        return sum(logp[t, a, b] for t, (a, b) in enumerate(path)) / len(tokens) ** length_penalty

    sequences = [
        (*body, *end)
        for n in range(new + 1)
        for body in itertools.product(range(1, vocab), repeat=n)
        for end in (((eos,),) if n < new else ((),))
    ]
    best = sorted(sequences, key=score, reverse=True)[:returned]
    config = GenerationConfig(
        num_beams=128,
        num_return_sequences=returned,
        eos_token_id=eos,
        max_new_tokens=new,
        early_stopping="never",
        length_penalty=length_penalty,
    )
    spec, values = prepare(config, vocab_size=vocab)
    out = search(markov, None, jnp.ones((1, 1), jnp.int32), spec=spec, values=values)
    found = [
        tuple(row[1:n]) for row, n in zip(out.sequences[0].tolist(), out.lengths[0], strict=True)
    ]
    assert found == best
    np.testing.assert_allclose(out.sequences_scores[0], [score(s) for s in best], atol=1e-5)


def test_of_equal_hypotheses_the_first_found_wins():
    """`1 0` after one token, and `1 1 0` after two, have exactly the same probability."""
    table = np.full((4, 3, 3), -np.inf, np.float32)
    table[0, 1] = [0.0, 0.0, -np.inf]
    table[1, 1] = [0.0, -np.inf, -np.inf]
    table[:, 0] = 0.0

    def markov(state, tokens, parents, position):
        return jnp.asarray(table)[position, tokens], state

    options: Any = {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.0}
    config = GenerationConfig(eos_token_id=0, max_new_tokens=3, **options)
    spec, values = prepare(config, vocab_size=3)
    out = search(markov, None, jnp.ones((1, 1), jnp.int32), spec=spec, values=values)
    assert out.lengths.tolist() == [[2, 3]]
    np.testing.assert_allclose(out.sequences_scores, np.log([[0.5, 0.5]]), rtol=1e-6)


# --- promises of our own ---------------------------------------------------------------------

MODES = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 8, "num_return_sequences": 2},
    "beam": {"num_beams": 3, "num_return_sequences": 2, "no_repeat_ngram_size": 2},
    "beam sample": {"num_beams": 3, "do_sample": True, "top_k": 8},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_row_alone_gives_what_it_gives_in_its_batch(mode):
    table = make_table(3)
    table[..., 2] += 1.5
    ids, mask = make_sources(np.random.default_rng(3), 5)
    mask[:, 4:] = np.arange(4, WIDTH) < np.array([[4], [5], [6], [7], [7]])
    options = {
        "eos_token_id": 2,
        "max_length": 16,
        "encoder_no_repeat_ngram_size": 2,
        **MODES[mode],
    }
    keys = jax.random.split(jax.random.key(7), 5)
    together = ours(table, ids, mask, options, key=keys)
    assert len(set(together.lengths[:, 0].tolist())) > 1  # rows end at different times
    for row in range(5):
        one = slice(row, row + 1)
        alone = ours(table, ids[one], mask[one], options, key=keys[one])
        for a, b in zip(alone[:3], together[:3], strict=True):
            np.testing.assert_array_equal(a, b[one])


def test_one_key_gives_row_i_the_same_draws_whatever_the_other_rows():
    table = make_table(4)
    ids, mask = make_sources(np.random.default_rng(4), 4)
    options = {"do_sample": True, "max_length": 12, "eos_token_id": 2}
    first = ours(table, ids, mask, options)
    other = ids.copy()
    other[[0, 1, 3]] = other[[3, 0, 1]]
    second = ours(table, other, mask, options)
    np.testing.assert_array_equal(first.sequences[2], second.sequences[2])
    assert (first.sequences[0] != second.sequences[0]).any()
    again = ours(table, ids, mask, options)
    np.testing.assert_array_equal(first.sequences, again.sequences)
    raw = ours(table, ids, mask, options, key=jax.random.key_data(jax.random.key(0)))
    np.testing.assert_array_equal(first.sequences, raw.sequences)


@pytest.mark.parametrize("beams", [1, 3])
def test_every_number_is_traced(beams):
    """Lengths, penalties, ids: new values run the program that is already compiled."""
    traces = []

    @functools.partial(jax.jit, static_argnames="spec")
    def program(spec, values, prompt, prompt_length, ids, mask, key):
        traces.append(1)
        prefix = jnp.zeros((2, beams), jnp.int32)
        return search(
            step,
            (jnp.asarray(make_table()), ids[:, 0], prefix),
            prompt,
            spec=spec,
            values=values,
            prompt_length=prompt_length,
            source_ids=ids,
            source_mask=mask,
            key=key,
        )

    base = {
        "num_beams": beams,
        "do_sample": True,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "max_length": 12,
        "min_length": 3,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "encoder_no_repeat_ngram_size": 3,
        "bad_words_ids": [[4, 5], [6]],
        "suppress_tokens": [7],
        "begin_suppress_tokens": [8, 9],
        "forced_bos_token_id": 10,
        "forced_eos_token_id": 2,
        "length_penalty": 1.0,
        "early_stopping": False,
    }
    changes = {
        "eos_token_id": 5,
        "pad_token_id": 1,
        "max_length": 15,
        "min_length": 7,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.5,
        "repetition_penalty": 0.8,
        "no_repeat_ngram_size": 4,
        "encoder_no_repeat_ngram_size": 1,
        "bad_words_ids": [[9, 4], [3, 2], [1]],
        "suppress_tokens": [7, 11, 12],
        "begin_suppress_tokens": [3],
        "forced_bos_token_id": 11,
        "forced_eos_token_id": 4,
        "length_penalty": 2.0,
        "early_stopping": "never",
    }
    ids, mask = make_sources(np.random.default_rng(0), 2)
    prompt = np.full((2, 4), START, np.int32)
    start = GenerationConfig(**base)
    for name, value in [("max_length", 12), *changes.items()]:
        config = start.replace(**{name: value})
        for prompt_length in (1, 3):
            spec, values = prepare(config, vocab_size=VOCAB, prompt_length=1, capacity=16)
            program(spec, values, prompt, np.int32(prompt_length), ids, mask, jax.random.key(0))
    assert len(traces) == 1


@pytest.mark.parametrize("mode", ["greedy", "beam"])
def test_a_padded_prompt_with_its_length_is_the_short_prompt(mode):
    table = make_table(6)
    ids, mask = make_sources(np.random.default_rng(6), 3)
    long = np.full((3, 5), START, np.int32)
    long[:, 1:] = np.random.default_rng(7).integers(4, VOCAB, (3, 4))
    options = {"eos_token_id": 2, "max_length": 14, **MODES[mode]}
    expected = ours(table, ids, mask, options, long[:, :3])
    config = GenerationConfig(pad_token_id=PAD).replace(**options)
    spec, values = prepare(config, vocab_size=VOCAB, prompt_length=3, capacity=24)
    lanes = spec.num_beams
    state = (jnp.asarray(table), ids[:, 0], jnp.zeros((3, lanes), jnp.int32))
    got = search(
        step, state, jnp.asarray(long), spec=spec, values=values, prompt_length=jnp.int32(3)
    )
    for a, b in zip(got[:3], expected[:3], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize("mode", ["greedy", "beam"])
def test_a_maximum_per_row_and_vmap_work(mode):
    table = make_table(8)
    ids, mask = make_sources(np.random.default_rng(8), 3)
    options = {"eos_token_id": 2, "max_length": 16, "length_penalty": 1.0, **MODES[mode]}
    keys = jax.random.split(jax.random.key(1), 3)
    spec, values = prepare(GenerationConfig(pad_token_id=PAD).replace(**options), vocab_size=VOCAB)
    limits = np.array([5, 16, 9], np.int32)
    per_row = values._replace(max_length=limits)
    prompt = np.full((3, 1), START, np.int32)
    got = run(spec, per_row, table, ids, mask, prompt, keys)
    alone = jax.vmap(
        lambda limit, i, m, k: run(
            spec, values._replace(max_length=limit), table, i[None], m[None], prompt[:1], k[None]
        )
    )(limits, ids, mask, keys)
    for a, b in zip(got[:3], alone[:3], strict=True):
        np.testing.assert_allclose(a, b[:, 0], rtol=1e-6)
    assert (got.lengths <= limits[:, None]).all()


@pytest.mark.parametrize("mode", ["greedy", "beam"])
def test_search_stops_as_soon_as_every_row_is_done(mode):
    table = make_table(9)
    table[..., 2] += 50.0
    calls = []

    def counted(state, tokens, parents, position):
        jax.debug.callback(lambda p: calls.append(int(p)), position)
        return step(state, tokens, parents, position)

    options = {"eos_token_id": 2, "max_length": 20, **MODES[mode]}
    spec, values = prepare(GenerationConfig(**options), vocab_size=VOCAB)
    state = (jnp.asarray(table), jnp.arange(2), jnp.zeros((2, spec.num_beams), jnp.int32))
    out = search(counted, state, jnp.ones((2, 1), jnp.int32), spec=spec, values=values)
    jax.block_until_ready(out)
    jax.effects_barrier()
    assert len(calls) < 6
    assert (out.lengths[:, 0] == 2).all()


@pytest.mark.parametrize("mode", MODES)
def test_banning_every_token_gives_no_nan(mode):
    table = make_table(10)
    ids, mask = make_sources(np.random.default_rng(10), 2)
    # All but one are suppressed, and that one is a bad word.
    banned = {"suppress_tokens": list(range(VOCAB - 1)), "bad_words_ids": [[VOCAB - 1]]}
    options = {"max_length": 6, **banned, **MODES[mode]}
    out = ours(table, ids, mask, options)
    assert not np.isnan(out.sequences_scores).any()
    assert ((out.sequences >= 0) & (out.sequences < VOCAB)).all()


def test_sampling_without_a_key_is_refused():
    spec, values = prepare(GenerationConfig(do_sample=True), vocab_size=VOCAB)
    with pytest.raises(InputError, match="needs a random key"):
        search(step, None, jnp.ones((1, 1), jnp.int32), spec=spec, values=values)
    with pytest.raises(InputError, match="one key or one per row"):
        search(
            step,
            None,
            jnp.ones((1, 1), jnp.int32),
            spec=spec,
            values=values,
            key=jax.random.split(jax.random.key(0), 3),
        )


def test_what_does_not_fit_the_capacity_is_refused():
    with pytest.raises(InputError, match=r"max_length \(30\) must be at most the capacity of 24"):
        prepare(GenerationConfig(max_length=30), vocab_size=VOCAB, capacity=24)
    spec, values = prepare(GenerationConfig(max_length=4), vocab_size=VOCAB)
    with pytest.raises(InputError, match="prompt of 9 tokens"):
        search(step, None, jnp.ones((1, 9), jnp.int32), spec=spec, values=values)
    spec, values = prepare(GenerationConfig(encoder_no_repeat_ngram_size=2), vocab_size=VOCAB)
    with pytest.raises(InputError, match="source_ids, got None"):
        search(step, None, jnp.ones((1, 1), jnp.int32), spec=spec, values=values)


def test_specs_are_hashable_and_numbers_do_not_change_them():
    a, _ = prepare(GenerationConfig(max_length=9, eos_token_id=4), vocab_size=9, capacity=16)
    b, _ = prepare(GenerationConfig(max_length=8, eos_token_id=2), vocab_size=9, capacity=16)
    assert hash(a) == hash(b)
    assert a == b
    assert dataclasses.replace(a, num_eos=2) != b


# --- distributions ---------------------------------------------------------------------------


def chi_square_is_plausible(observed: np.ndarray, probability: np.ndarray):
    """Compare counts with expectations, rare cells pooled; 5 sigma of the chi-square law."""
    expected = probability * observed.sum()
    common = expected >= 8
    o = np.append(observed[common], observed[~common].sum())
    e = np.append(expected[common], expected[~common].sum())
    o, e = o[e > 0], e[e > 0]
    freedom = len(o) - 1
    statistic = ((o - e) ** 2 / e).sum()
    assert statistic < freedom + 5 * np.sqrt(2 * freedom), (statistic, freedom)


def distribution(table, source: int, temperature: float, top_k: int) -> np.ndarray:
    logits = table[source, (START + 7) % HASHES].astype(np.float64) / temperature
    logits[logits < np.sort(logits)[-top_k]] = -np.inf
    p = np.exp(logits - logits.max())
    return p / p.sum()


def test_samples_follow_the_processed_distribution():
    table, draws = make_table(12), 6000
    ids, mask = make_sources(np.random.default_rng(12), 1)
    options = {"do_sample": True, "temperature": 1.3, "top_k": 10, "max_new_tokens": 1}
    out = ours(table, ids, mask, {**options, "num_return_sequences": draws}, capacity=2)
    p = distribution(table, ids[0, 0], 1.3, 10)
    counts = np.bincount(out.sequences[0, :, 1], minlength=VOCAB)
    assert counts[p == 0].sum() == 0
    chi_square_is_plausible(counts, p)
    np.testing.assert_allclose(
        out.sequences_scores[0], np.log(p[out.sequences[0, :, 1]]), atol=1e-5
    )


def test_beam_sampling_draws_without_replacement():
    """The first K candidates of a one-token search are a K-subset drawn without replacement."""
    table, draws = make_table(13), 6000
    ids = np.broadcast_to(make_sources(np.random.default_rng(13), 1)[0], (draws, WIDTH))
    options = {
        "num_beams": 2,
        "num_return_sequences": 2,
        "do_sample": True,
        "temperature": 1.3,
        "top_k": 8,
        "max_new_tokens": 1,
        "eos_token_id": 2,
    }
    out = ours(table, ids, np.ones_like(ids), options, capacity=2)
    # Temperature divides log-probabilities without renormalising; softmax does that.
    p = distribution(table, ids[0, 0], 1.3, 8)
    pairs = list(itertools.combinations(range(VOCAB), 2))
    probability = np.array([p[a] * p[b] * (1 / (1 - p[a]) + 1 / (1 - p[b])) for a, b in pairs])
    drawn = np.sort(out.sequences[:, :, 1], axis=1)
    cell = {pair: i for i, pair in enumerate(pairs)}
    counts = np.bincount([cell[tuple(d)] for d in drawn.tolist()], minlength=len(pairs))
    np.testing.assert_allclose(probability.sum(), 1.0)
    chi_square_is_plausible(counts, probability)
    assert (out.sequences_scores[:, 0] >= out.sequences_scores[:, 1]).all()


# --- the best few ----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), levels=st.sampled_from([2, 30, 10**6]), banned=st.booleans())
def test_the_best_few_are_those_of_top_k_ties_included(seed, levels, banned):
    rng = np.random.default_rng(seed)
    for vocab, n in ((1200, 4), (3001, 12), (40, 8)):
        scores = (rng.integers(0, levels, (3, vocab)) / 7).astype(np.float32)
        if banned:
            scores[:, rng.permutation(vocab)[: vocab - n // 2]] = -np.inf
        for got, expected in zip(top_k(scores, n), jax.lax.top_k(scores, n), strict=True):
            np.testing.assert_array_equal(got, expected)
        np.testing.assert_array_equal(first_largest(scores), scores.argmax(axis=-1))


def test_the_largest_of_nothing_but_banned_is_the_first():
    assert first_largest(np.full((2, 5), -np.inf, np.float32)).tolist() == [0, 0]
