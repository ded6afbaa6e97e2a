"""Decoder prompts of different lengths: every row is searched as if it were alone."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny_pairs
from toy_search import START, VOCAB, make_sources, make_table, ours, run

from jax_encdec.decoding.arguments import decoder_prompt
from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.decoding.search import prepare
from jax_encdec.errors import InputError

LENGTHS = np.array([3, 1, 5, 2, 4], np.int32)
# All that counts positions or looks back at what was said.
RULES = {
    "eos_token_id": 2,
    "pad_token_id": 3,
    "min_length": 4,
    "min_new_tokens": 2,
    "no_repeat_ngram_size": 2,
    "repetition_penalty": 1.3,
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 2,
    "begin_suppress_tokens": [8, 10],
    "bad_words_ids": [[5, 6], [7]],
    "length_penalty": 0.7,
}
MODES = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 8, "num_return_sequences": 2},
    "beam": {"num_beams": 3, "num_return_sequences": 2},
    "beam sample": {"num_beams": 3, "do_sample": True, "top_k": 8},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
}


def prompts(seed: int) -> np.ndarray:
    prompt = np.random.default_rng(seed).integers(4, VOCAB, (5, 5)).astype(np.int32)
    prompt[:, 0] = START
    return prompt  # Whatever stands after a row's own length must not matter.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limit", ["max_length", "max_new_tokens"])
def test_every_row_is_as_if_it_were_alone(mode, limit):
    table, prompt = make_table(21), prompts(0)
    table[..., 2] += 1.0
    ids, mask = make_sources(np.random.default_rng(1), 5)
    keys = jax.random.split(jax.random.key(3), 5)
    options = {**RULES, **MODES[mode], limit: 12}
    spec, values = prepare(GenerationConfig(**options), vocab_size=VOCAB, capacity=24)
    if limit == "max_new_tokens":
        values = values._replace(max_length=LENGTHS + 12)
    together = run(spec, values, table, ids, mask, prompt, keys, LENGTHS)
    for row, length in enumerate(LENGTHS):
        one = slice(row, row + 1)
        alone = ours(table, ids[one], mask[one], options, prompt[one, :length], keys[one])
        np.testing.assert_array_equal(alone.lengths, together.lengths[one])
        np.testing.assert_array_equal(alone.sequences, together.sequences[one])
        np.testing.assert_allclose(
            alone.sequences_scores, together.sequences_scores[one], rtol=1e-6
        )


def test_lengths_are_numbers_of_the_program():
    table, prompt = make_table(22), prompts(1)
    ids, mask = make_sources(np.random.default_rng(2), 5)
    config = GenerationConfig(num_beams=2, max_length=9, pad_token_id=3)
    spec, values = prepare(config, vocab_size=VOCAB, capacity=16)
    run(spec, values, table, ids, mask, prompt, jax.random.key(0), LENGTHS)
    before = run._cache_size()
    out = run(spec, values, table, ids, mask, prompt, jax.random.key(0), LENGTHS[::-1].copy())
    assert run._cache_size() == before
    for row, length in enumerate(LENGTHS[::-1]):
        np.testing.assert_array_equal(out.sequences[row, 0, :length], prompt[row, :length])


# --- as arguments of generate --------------------------------------------------------------------


def aligned(ids, mask, batch=3):
    model, _ = tiny_pairs.pair()
    return decoder_prompt(ids, mask, START, batch, model.config.decoder_trunk)


def test_padding_may_stand_on_either_side():
    right = np.array([[7, 0, 0], [8, 9, 0], [5, 6, 7]])
    left = np.array([[0, 0, 7], [0, 8, 9], [5, 6, 7]])
    wanted = [[START, 7], [START, 8, 9], [START, 5, 6, 7]]
    for ids in (right, left):
        prompt, lengths = aligned(ids, ids > 0)
        assert lengths.tolist() == [2, 3, 4]
        assert [row[:n].tolist() for row, n in zip(prompt, lengths, strict=True)] == wanted


def test_equal_lengths_are_one_number_and_columns_of_pads_cost_nothing():
    ids = np.array([[0, START, 7, 0], [START, 8, 0, 0], [0, 0, START, 9]])
    prompt, length = aligned(ids, ids > 0)
    assert length == 2
    assert prompt.tolist() == [[START, 7], [START, 8], [START, 9]]


def test_a_row_that_is_told_nothing_has_the_start_token():
    ids = np.array([[7, 8], [0, 0], [9, 0]])
    prompt, lengths = aligned(ids, ids > 0)
    assert lengths.tolist() == [3, 1, 2]
    assert prompt[:, 0].tolist() == [START] * 3
    begun = np.array([[START, 8], [0, 0], [START, 0]])
    prompt, lengths = aligned(begun, begun > 0)
    assert lengths.tolist() == [2, 1, 1]
    assert prompt[:, 0].tolist() == [START] * 3


@pytest.mark.parametrize(
    ("ids", "mask", "complaint"),
    [
        ([[7, 0, 8]] * 3, [[1, 0, 1]] * 3, "what lies between"),
        ([[7, 8]] * 3, [[1, 1, 1]] * 3, r"must have shape \[3, 2\]"),
        ([[7, 8]] * 2, None, "the source's 3 rows"),
        ([[START, 8], [8, 8], [START, 8]], None, "begin all rows with it, or none"),
        (None, [[1]] * 3, "without decoder_input_ids"),
    ],
    ids=["hole", "shape", "rows", "start", "mask alone"],
)
def test_prompts_that_cannot_be_meant_are_refused(ids, mask, complaint):
    with pytest.raises(InputError, match=complaint):
        aligned(None if ids is None else np.array(ids), None if mask is None else np.array(mask))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beam"])
def test_a_model_writes_on_from_each_prompt_as_if_alone(options):
    model, params = tiny_pairs.pair("bert2gpt2")
    ids = np.random.default_rng(2).integers(5, 60, (3, 6)).astype(np.int32)
    prompt = np.array([[0, 0, 7], [0, 8, 9], [5, 6, 7]], np.int32)
    options = {**options, "max_new_tokens": 7}
    together = model.generate(
        params, ids, decoder_input_ids=prompt, decoder_attention_mask=prompt > 0, **options
    )
    for row in range(3):
        alone = model.generate(
            params,
            ids[row : row + 1],
            decoder_input_ids=prompt[row : row + 1, 2 - row :],
            **options,
        )
        length = int(alone.lengths[0])
        assert length == int(together.lengths[row])
        np.testing.assert_array_equal(
            np.asarray(alone.sequences)[0, :length], np.asarray(together.sequences)[row, :length]
        )
        np.testing.assert_allclose(
            alone.sequences_scores[0], together.sequences_scores[row], rtol=1e-4
        )
