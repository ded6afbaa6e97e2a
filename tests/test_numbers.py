"""Options as arrays: a row of a batch is generated as if alone with its own numbers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import from_torch, source_batch, torch_pair

from jax_encdec.decoding import engine
from jax_encdec.errors import InputError


@functools.cache
def pair():
    return from_torch(torch_pair("bert", "bert", hidden=(16, 24), seed=11))


def sources(batch=4):
    return source_batch(np.random.default_rng(2), batch, length=11)


BEAMS = {
    "num_beams": 3,
    "length_penalty": [0.5, 2.0, -1.0, 1.0],
    "max_new_tokens": [4, 14, 9, 12],
    "min_new_tokens": [3, 8, 0, 2],
    "repetition_penalty": [1.5, 0.7, 1.0, 1.2],
    "encoder_repetition_penalty": [1.0, 1.5, 0.8, 1.2],
    "no_repeat_ngram_size": [0, 1, 2, 3],
    "encoder_no_repeat_ngram_size": [0, 2, 1, 3],
    "forced_bos_token_id": [5, 6, 7, 8],
}
SAMPLES = {
    "do_sample": True,
    "max_length": [5, 15, 10, 12],
    "min_length": [3, 9, 0, 2],
    "temperature": [0.5, 2.0, 1.0, 1.3],
    "top_k": [0, 3, 20, 50],
    "top_p": [0.5, 1.0, 0.9, 0.7],
    "min_p": [0.0, 0.1, 0.01, 0.2],
    "typical_p": [0.5, 1.0, 0.9, 0.95],
    "epsilon_cutoff": [0.0, 0.01, 0.001, 0.1],
    "eta_cutoff": [0.0, 0.01, 0.1, 0.001],
    "top_h": [0.5, 1.0, 0.9, 0.99],
}
GROUPS = {
    "num_beams": 4,
    "num_beam_groups": 2,
    "max_new_tokens": 9,
    "diversity_penalty": [0.5, 5.0, 1.0, 20.0],
}


def parted(options):
    """The same options as arrays, and as every row's own."""
    lists = {k: v for k, v in options.items() if isinstance(v, list)}
    arrays = {k: np.array(v) for k, v in lists.items()}
    each = [{k: v[row] for k, v in lists.items()} for row in range(4)]
    return options | arrays, [options | own for own in each]


@pytest.mark.parametrize("options", [BEAMS, SAMPLES, GROUPS], ids=["beams", "samples", "groups"])
def test_every_row_follows_its_own_numbers(options):
    model, params = pair()
    ids, mask = sources()
    together, alone = parted(options)
    keys = jax.random.split(jax.random.key(3), 4)
    key = {"key": keys} if "do_sample" in options else {}
    out = model.generate(params, ids, attention_mask=mask, **together, **key)
    for row, own in enumerate(alone):
        key = {"key": keys[row : row + 1]} if "do_sample" in options else {}
        at = slice(row, row + 1)
        single = model.generate(params, ids[at], attention_mask=mask[at], **own, **key)
        length = int(single.lengths[0])
        assert length == int(out.lengths[row])
        np.testing.assert_array_equal(
            np.asarray(single.sequences)[0, :length], np.asarray(out.sequences)[row, :length]
        )
        np.testing.assert_allclose(
            single.sequences_scores[0], out.sequences_scores[row], rtol=1e-6, atol=1e-5
        )


def test_values_of_arrays_compile_nothing():
    model, params = pair()
    ids, mask = sources()

    def run(scale):
        together, _ = parted(BEAMS)
        numbers = {k: v for k, v in together.items() if isinstance(v, np.ndarray)}
        numbers["repetition_penalty"] = numbers["repetition_penalty"] * scale
        numbers["no_repeat_ngram_size"] = numbers["no_repeat_ngram_size"] + scale
        model.generate(params, ids, attention_mask=mask, num_beams=3, **numbers)

    run(1)
    before = engine._generate._cache_size()
    run(2)
    assert engine._generate._cache_size() == before


@pytest.mark.parametrize(
    ("fixed", "traced"),
    [
        (
            {"num_beams": 2, "max_length": 12},
            {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "max_new_tokens": 6},
        ),
        (
            {"do_sample": True, "max_new_tokens": 8},
            {"temperature": 0.7, "top_k": 5, "top_p": 0.8, "min_length": 4, "max_length": 7},
        ),
    ],
)
def test_numbers_that_only_a_jit_knows(fixed, traced):
    model, params = pair()
    ids, mask = sources()
    key = {"key": jax.random.key(1)} if "do_sample" in fixed else {}

    @jax.jit
    def pipeline(ids, numbers):
        out = model.generate(params, ids, attention_mask=mask, **fixed, **numbers, **key)
        return out.sequences, out.lengths

    inside, lengths = pipeline(ids, jax.tree.map(jnp.asarray, traced))
    limits = {k: v for k, v in fixed.items() if k not in ("max_length", "max_new_tokens")}
    outside = model.generate(params, ids, attention_mask=mask, **limits, **traced, **key)
    np.testing.assert_array_equal(lengths, outside.lengths)
    width = outside.sequences.shape[1]
    np.testing.assert_array_equal(inside[:, :width], outside.sequences)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"temperature": np.ones(3), "do_sample": True},
            "one number for each of the 4 rows, got 3",
        ),
        ({"temperature": np.ones((4, 1))}, "a scalar or one number per row"),
        ({"temperature": np.array([1, 0, 1, 1.0]), "do_sample": True}, "temperature must be above"),
        ({"top_k": np.ones(4)}, "top_k must be an array of integers, got float64"),
        ({"max_new_tokens": np.array([1, 2, 0, 3])}, "max_new_tokens must be at least 1, got 0"),
        ({"forced_bos_token_id": np.array([1, 2, -1, 3])}, "forced_bos_token_id must lie in"),
        ({"forced_bos_token_id": np.array([1, 2, 53, 3])}, "forced_bos_token_id must lie in"),
        ({"num_beams": np.ones(4, int)}, "num_beams must be an integer"),
        ({"repetition_penalty": np.array([1, np.nan, 1, 1])}, "must be a finite number"),
    ],
)
def test_arrays_that_do_not_fit(options, message):
    model, params = pair()
    ids, mask = sources()
    with pytest.raises(InputError) as error:
        model.generate(params, ids, attention_mask=mask, key=jax.random.key(0), **options)
    assert message in str(error.value)


def test_traced_options_that_shape_the_program_are_refused():
    model, params = pair()
    ids, _ = sources()
    for name, message in (
        ("num_beams", "num_beams shapes the compiled program"),
        ("max_new_tokens", "bound it by a max_length"),
    ):
        with pytest.raises(InputError, match=message):
            jax.jit(lambda n, name=name: model.generate(params, ids, **{name: n}))(3)


def test_ids_may_be_arrays_too():
    model, params = pair()
    ids, mask = sources()
    a = model.generate(params, ids, attention_mask=mask, eos_token_id=np.array([2, 7]), num_beams=2)
    b = model.generate(params, ids, attention_mask=mask, eos_token_id=[2, 7], num_beams=2)
    np.testing.assert_array_equal(a.sequences, b.sequences)
