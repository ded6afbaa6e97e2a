"""Every logits processor, alone and chained, scores what Transformers' processor scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.decoding.processors import Context, ProcessorSpec, process, split

V = 40
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}
PREPARED = jax.jit(process, static_argnums=0, compiler_options=FAST_TO_COMPILE)


def random_context(rng, B, K, cur_len, T=16, S=9, prompt_length=1, alphabet=7):
    """Sequences over a small alphabet, so that n-grams repeat; rubbish after `cur_len`."""
    sequences = rng.integers(0, alphabet, size=(B, K, T)).astype(np.int32)
    return Context(
        sequences=jnp.asarray(sequences),
        cur_len=jnp.int32(cur_len),
        prompt_length=jnp.int32(prompt_length),
        max_length=jnp.int32(T),
        source_ids=jnp.asarray(rng.integers(0, alphabet, size=(B, S)).astype(np.int32)),
        source_mask=jnp.ones((B, S), jnp.int32),
    )


def random_scores(rng, B, K, beams: bool):
    scores = (3 * rng.normal(size=(B, K, V))).astype(np.float32)
    return np.array(jax.nn.log_softmax(scores)) if beams else scores


def ours(options: dict, scores, context) -> np.ndarray:
    config = GenerationConfig(**options)
    config.validate(V)
    spec, values = split(config, vocab_size=V)
    return np.asarray(PREPARED(spec, values, jnp.asarray(scores), context))


def theirs(options: dict, scores, context) -> np.ndarray:
    """Let Transformers itself choose, order and run its processors."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.GenerationConfig(**options)
    for name, value in config._get_default_generation_params().items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    eos = config.eos_token_id
    config._eos_token_tensor = None if eos is None else torch.tensor(eos).reshape(-1)
    config.max_length = int(context.max_length)
    prompt_length = int(context.prompt_length)
    if config.min_new_tokens is not None:
        config.min_length = config.min_new_tokens + prompt_length

    class Owner(transformers.GenerationMixin):
        class config:
            is_encoder_decoder = True

    chain = Owner()._get_logits_processor(
        config,
        input_ids_seq_length=prompt_length,
        encoder_input_ids=torch.tensor(np.asarray(context.source_ids)).long(),
        device="cpu",
    )
    cur_len = int(context.cur_len)
    sequences = torch.tensor(np.asarray(context.sequences)[:, :, :cur_len]).long().flatten(0, 1)
    flat = torch.tensor(np.asarray(scores)).flatten(0, 1)
    return chain(sequences, flat).reshape(scores.shape).numpy()


def assert_agrees(options, scores, context, note=""):
    got, expected = ours(options, scores, context), theirs(options, scores, context)
    assert not np.isnan(got).any()
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected), err_msg=note)
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6, err_msg=note)


ALONE = {
    "repetition_penalty up": {"repetition_penalty": 1.7},
    "repetition_penalty down": {"repetition_penalty": 0.6},
    "no_repeat_ngram_size 1": {"no_repeat_ngram_size": 1},
    "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2},
    "no_repeat_ngram_size 3": {"no_repeat_ngram_size": 3},
    "no_repeat_ngram_size 7": {"no_repeat_ngram_size": 7},
    "encoder_no_repeat_ngram_size 1": {"encoder_no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size 2": {"encoder_no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size 4": {"encoder_no_repeat_ngram_size": 4},
    "bad_words_ids": {
        "bad_words_ids": [[3], [1, 2], [2, 30], [1, 5, 6], [4, 5, 6], *([i, 31] for i in range(7))]
    },
    "bad_words_ids, an EOS among them": {"bad_words_ids": [[9], [8], [2, 9]], "eos_token_id": [9]},
    "min_length": {"min_length": 9, "eos_token_id": 9},
    "min_length, several EOS": {"min_length": 9, "eos_token_id": [9, 4]},
    "min_new_tokens": {"min_new_tokens": 8, "min_length": 12, "eos_token_id": 9},
    "forced_bos_token_id": {"forced_bos_token_id": 5},
    "forced_eos_token_id": {"forced_eos_token_id": 5},
    "forced_eos_token_id, several": {"forced_eos_token_id": [5, 6]},
    "suppress_tokens": {"suppress_tokens": [1, 20, 39]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [1, 20, 39]},
    "begin_suppress_tokens after forced_bos_token_id": {
        "begin_suppress_tokens": [1, 20, 39],
        "forced_bos_token_id": 3,
    },
    "temperature": {"do_sample": True, "temperature": 0.4, "top_k": 0},
    "top_k": {"do_sample": True, "top_k": 5},
    "top_k above the vocabulary": {"do_sample": True, "top_k": 400},
    "top_k by default": {"do_sample": True},
    "top_p": {"do_sample": True, "top_k": 0, "top_p": 0.7},
    "top_p, tiny": {"do_sample": True, "top_k": 0, "top_p": 1e-4},
    "top_p, tiny, with beams": {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1e-4,
        "num_beams": 2,
        "eos_token_id": [3, 4],
    },
    "top_k and top_p": {"do_sample": True, "top_k": 12, "top_p": 0.8},
    "top_k 1 with beams": {"do_sample": True, "top_k": 1, "num_beams": 2},
    "sequence_bias": {
        "sequence_bias": [
            [[3], 2.5],
            [[1, 2], -3.0],
            [[4, 2], 1.5],
            [[2, 30], 9.0],
            [[1, 5, 6], 2.0],
            [[5, 6], -1.0],
            [[3], -4.0],
            *([[i, 31], 1.0 + i] for i in range(7)),
        ]
    },
    "encoder_repetition_penalty up": {"encoder_repetition_penalty": 1.7},
    "encoder_repetition_penalty down": {"encoder_repetition_penalty": 0.6},
    "exponential_decay_length_penalty": {
        "exponential_decay_length_penalty": (4, 1.3),
        "eos_token_id": [9, 4],
    },
    "exponential_decay_length_penalty of a banned token": {
        "exponential_decay_length_penalty": (0, 1.3),
        "eos_token_id": [9, 4],
        "bad_words_ids": [[1, 4], [5, 4]],
        "min_length": 9,
    },
    "remove_invalid_values": {"remove_invalid_values": True, "no_repeat_ngram_size": 1},
    "renormalize_logits": {"renormalize_logits": True, "suppress_tokens": [3, 5]},
    "renormalize_logits of samples": {
        "renormalize_logits": True,
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 7,
    },
    "top_h": {"do_sample": True, "top_k": 0, "top_h": 0.4},
    "top_h with beams": {"do_sample": True, "top_h": 0.1, "num_beams": 3},
    "min_p": {"do_sample": True, "top_k": 0, "min_p": 0.1},
    "min_p with beams": {"do_sample": True, "top_k": 0, "min_p": 0.9, "num_beams": 2},
    "typical_p": {"do_sample": True, "top_k": 0, "typical_p": 0.6},
    "typical_p after top_k": {"do_sample": True, "top_k": 8, "typical_p": 0.8},
    "typical_p, tiny, with beams": {
        "do_sample": True,
        "top_k": 0,
        "typical_p": 1e-4,
        "num_beams": 2,
        "eos_token_id": [3, 4],
    },
    "epsilon_cutoff": {"do_sample": True, "top_k": 0, "epsilon_cutoff": 0.03},
    "epsilon_cutoff with beams": {
        "do_sample": True,
        "top_k": 0,
        "epsilon_cutoff": 0.9,
        "num_beams": 2,
    },
    "eta_cutoff": {"do_sample": True, "top_k": 0, "eta_cutoff": 0.05},
    "eta_cutoff with beams": {"do_sample": True, "eta_cutoff": 0.9, "num_beams": 2},
}


@pytest.mark.parametrize("name", ALONE)
def test_one_processor_agrees_with_transformers(name):
    rng = np.random.default_rng(list(ALONE).index(name))
    options = ALONE[name]
    for prompt_length in (1, 3):
        for cur_len in (prompt_length, prompt_length + 1, 8, 9, 15):
            context = random_context(rng, 2, 3, cur_len, prompt_length=prompt_length)
            scores = random_scores(rng, 2, 3, beams="num_beams" in options)
            assert_agrees(options, scores, context, f"cur_len {cur_len} prompt {prompt_length}")


def random_options(rng) -> dict:
    def maybe(probability=0.4):
        return rng.random() < probability

    beams = int(rng.choice([1, 3]))
    eos = rng.permutation(7)[: rng.integers(1, 4)].tolist()
    options: dict = {"eos_token_id": eos, "num_beams": beams}
    if maybe():
        options["repetition_penalty"] = float(rng.uniform(0.5, 2))
    if maybe():
        options["no_repeat_ngram_size"] = int(rng.integers(1, 5))
    if maybe():
        options["encoder_no_repeat_ngram_size"] = int(rng.integers(1, 5))
    if maybe():
        options["bad_words_ids"] = [
            *(rng.integers(0, 7, size=rng.integers(1, 5)).tolist() for _ in range(5)),
            [1, 2, 3],
        ]
    if maybe():
        options["min_length"] = int(rng.integers(1, 16))
    if maybe():
        options["min_new_tokens"] = int(rng.integers(1, 15))
    if maybe(0.2):
        options["forced_bos_token_id"] = int(rng.integers(20, 30))
    if maybe(0.2):
        options["forced_eos_token_id"] = int(rng.integers(20, 30))
    if maybe():
        options["suppress_tokens"] = rng.integers(0, 20, size=4).tolist()
    if maybe():
        options["begin_suppress_tokens"] = rng.integers(0, V, size=4).tolist()
    if maybe(0.6):
        options |= {"do_sample": True, "temperature": float(rng.uniform(0.5, 2))}
        options["top_k"] = int(rng.choice([0, 1, 5, 20, 50]))
        options["top_p"] = float(rng.choice([0.3, 0.9, 0.99, 1.0]))
        for name, values in SAMPLING.items():
            if maybe(0.3):
                options[name] = float(rng.choice(values))
    if maybe(0.3):
        options["sequence_bias"] = [
            [rng.integers(0, 7, size=n).tolist(), float(rng.normal())] for n in (1, 1, 2, 2, 3)
        ]
    if maybe(0.3):
        options["encoder_repetition_penalty"] = float(rng.uniform(0.5, 2))
    if maybe(0.3):
        start, factor = int(rng.integers(0, 9)), float(rng.uniform(0.8, 1.5))
        options["exponential_decay_length_penalty"] = (start, factor)
    options["remove_invalid_values"] = maybe(0.2)
    options["renormalize_logits"] = maybe(0.2)
    return options


SAMPLING = {
    "min_p": (0.01, 0.1, 0.5),
    "typical_p": (0.2, 0.7, 0.95),
    "epsilon_cutoff": (0.001, 0.02),
    "eta_cutoff": (0.001, 0.02),
    "top_h": (0.3, 0.7, 1.0),
}


def check_chain(seed: int, draws: int):
    rng = np.random.default_rng(seed)
    options = random_options(rng)
    beams, prompt_length = options["num_beams"], int(rng.choice([1, 1, 4]))
    for draw in range(draws):
        cur_len = int(rng.choice([prompt_length, prompt_length + 1, 8, 11, 15]))
        context = random_context(rng, 2, beams, cur_len, prompt_length=prompt_length)
        scores = random_scores(rng, 2, beams, beams=beams > 1)
        assert_agrees(options, scores, context, f"seed {seed} draw {draw} {options}")


@pytest.mark.parametrize("seed", range(14))
def test_random_chains_agree_with_transformers(seed):
    check_chain(seed, draws=8)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(100, 160))
def test_random_chains_agree_with_transformers_long(seed):
    check_chain(seed, draws=20)


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 5},
        {"top_k": 0, "top_p": 0.6},
        {"top_k": 20, "top_p": 0.8},
        {"top_k": 9, "top_p": 0.1},
    ],
)
def test_of_equal_scores_as_many_survive_as_in_transformers(options):
    """Scores in steps of one half, as in half precision.  Which of equals goes is torch's whim."""
    rng = np.random.default_rng(3)
    context = random_context(rng, 4, 3, 5)
    options = {"do_sample": True, **options}
    for _ in range(20):
        scores = np.round(2 * rng.normal(size=(4, 3, V))).astype(np.float32) / 2
        got, expected = ours(options, scores, context), theirs(options, scores, context)
        np.testing.assert_array_equal(np.sort(got), np.sort(expected))
        assert np.isin(got, [*np.unique(scores), -np.inf]).all()


@pytest.mark.parametrize("p", [0.3, 0.7, 0.95])
def test_top_p_among_candidates_equals_top_p_of_the_whole_vocabulary(p):
    """A vocabulary larger than the candidate bucket, with ties: as sorting everything would."""
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(9)
    scores = (np.round(16 * rng.normal(size=(3, 2, 500))) / 4).astype(np.float32)
    config = GenerationConfig(do_sample=True, top_k=30, top_p=p)
    spec, values = split(config, vocab_size=500)
    assert spec.top_k_candidates == 64
    got = np.asarray(PREPARED(spec, values, scores, random_context(rng, 3, 2, 4)))
    flat = torch.tensor(scores).flatten(0, 1)
    expected = warpers.TopPLogitsWarper(p)(None, warpers.TopKLogitsWarper(30)(None, flat))
    np.testing.assert_array_equal(np.sort(got.reshape(6, 500)), np.sort(expected.numpy()))


def test_the_sampled_distribution_is_that_of_transformers_to_1e6():
    rng = np.random.default_rng(17)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.95}
    options |= {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    for _ in range(10):
        context, scores = random_context(rng, 3, 1, 12), random_scores(rng, 3, 1, beams=False)
        a, b = (jax.nn.softmax(f(options, scores, context)) for f in (ours, theirs))
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_source_padding_forms_no_ngrams_where_transformers_lets_it():
    """Transformers 5 counts pads as source tokens, so a row depends on its batch; ours do not."""
    rng = np.random.default_rng(4)
    context = random_context(rng, 2, 2, 6)
    scores = random_scores(rng, 2, 2, beams=True)
    pad = 8
    mask = np.ones((2, 9), np.int32)
    mask[1, 5:] = 0
    ids = np.where(mask == 1, np.asarray(context.source_ids), pad)
    padded = context._replace(source_ids=jnp.asarray(ids), source_mask=jnp.asarray(mask))
    options = {"encoder_no_repeat_ngram_size": 1}
    got = ours(options, scores, padded)
    assert np.isfinite(got[1, :, pad]).all()
    assert np.isneginf(theirs(options, scores, padded)[1, :, pad]).all()  # the bug
    for n in (1, 2, 3):
        options = {"encoder_no_repeat_ngram_size": n}
        got = ours(options, scores, padded)
        short = context._replace(
            sequences=context.sequences[1:],
            source_ids=jnp.asarray(ids[1:, :5]),
            source_mask=jnp.ones((1, 5), jnp.int32),
        )
        np.testing.assert_array_equal(got[1:], theirs(options, scores[1:], short))


def test_padding_on_the_left_of_the_source_is_the_same_to_us():
    rng = np.random.default_rng(5)
    context = random_context(rng, 2, 2, 6)
    scores = random_scores(rng, 2, 2, beams=True)
    wide = context._replace(
        source_ids=jnp.pad(jnp.asarray(context.source_ids), ((0, 0), (3, 0))),
        source_mask=jnp.pad(jnp.asarray(context.source_mask), ((0, 0), (3, 0))),
    )
    for n in (1, 2, 3):
        options = {"encoder_no_repeat_ngram_size": n}
        np.testing.assert_array_equal(ours(options, scores, wide), ours(options, scores, context))


def test_numbers_per_row_act_on_their_row():
    """Any number may be an array `[B]`: row i is then processed with value i."""
    rng = np.random.default_rng(6)
    low = GenerationConfig(
        do_sample=True,
        repetition_penalty=1.5,
        no_repeat_ngram_size=1,
        encoder_no_repeat_ngram_size=2,
        min_length=9,
        eos_token_id=2,
        forced_eos_token_id=3,
        temperature=0.5,
        top_k=3,
        top_p=0.5,
    )
    high = low.replace(
        repetition_penalty=0.5,
        no_repeat_ngram_size=3,
        encoder_no_repeat_ngram_size=1,
        min_length=2,
        temperature=2.0,
        top_k=30,
        top_p=0.9,
        forced_eos_token_id=5,
        eos_token_id=4,
    )
    context, scores = random_context(rng, 2, 3, 8), random_scores(rng, 2, 3, beams=False)
    (spec, a), (other, b) = split(low, vocab_size=V), split(high, vocab_size=V)
    assert spec == other
    both = jax.tree.map(lambda x, y: np.stack([x, y]), a, b)
    limits = jnp.array([9, 16], jnp.int32)
    got = PREPARED(spec, both, scores, context._replace(max_length=limits))
    for row, values in enumerate((a, b)):
        alone = PREPARED(spec, values, scores, context._replace(max_length=limits[row]))
        np.testing.assert_array_equal(got[row], alone[row])


def test_a_row_with_every_token_banned_stays_free_of_nan():
    scores = np.full((1, 1, V), -np.inf, np.float32)
    context = random_context(np.random.default_rng(0), 1, 1, 4)
    options = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.2}
    for more in ({"top_k": 0, "top_p": 0.5}, {"top_k": 4, "top_p": 0.5}, {"top_k": 4}):
        assert np.isneginf(ours({**options, **more}, scores, context)).all()


def test_tokens_outside_the_logits_are_left_alone():
    """A decoder whose embedding is larger than its head may hold ids that cannot be scored."""
    scores = np.zeros((1, 1, V), np.float32)
    sequences = jnp.full((1, 1, 8), V + 5, jnp.int32)
    context = Context(sequences, jnp.int32(6), jnp.int32(1), jnp.int32(8))
    got = ours({"repetition_penalty": 2.0, "no_repeat_ngram_size": 1}, scores, context)
    np.testing.assert_array_equal(got, scores)


def test_absent_processors_cost_nothing():
    spec, values = split(GenerationConfig(eos_token_id=2, min_length=0), vocab_size=V)
    assert spec == ProcessorSpec()
    assert not jax.tree.leaves(values)
