"""A search that is watched finds what it finds unwatched, and takes nothing back."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pairs
from toy_search import FAST_TO_COMPILE, START, VOCAB, make_sources, make_table, ours, step

from jax_encdec.decoding import search as searches
from jax_encdec.decoding import streaming
from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.decoding.programs import compiled_programs, warmup
from jax_encdec.decoding.search import prepare
from jax_encdec.errors import InputError

MODES = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 8, "num_return_sequences": 2},
    "beam": {"num_beams": 3},
    "beam sample": {"num_beams": 3, "do_sample": True, "top_k": 8},
    "groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
}


@functools.partial(jax.jit, static_argnames="spec", compiler_options=FAST_TO_COMPILE)
def begin(spec, values, table, source, prompt, key, lengths):
    prefix = jnp.zeros((len(prompt), spec.lanes), jnp.int32)
    state = (table, source, prefix)
    return searches.start(
        step, state, prompt, spec=spec, values=values, prompt_length=lengths, key=key
    )


@functools.partial(
    jax.jit, static_argnames="spec", donate_argnames="carry", compiler_options=FAST_TO_COMPILE
)
def proceed(spec, values, carry, until):
    carry = searches.advance(step, carry, until, spec=spec, values=values)
    more = searches.unfinished(carry, spec=spec, values=values)
    return carry, searches.decided(carry, spec=spec, values=values), more


@functools.partial(jax.jit, static_argnames="spec", compiler_options=FAST_TO_COMPILE)
def end(spec, values, carry):
    return searches.finish(carry, spec=spec, values=values)


@pytest.mark.parametrize("mode", MODES)
def test_step_by_step_gives_what_one_run_gives_and_takes_nothing_back(mode):
    table = make_table(31)
    table[..., 2] += 1.5
    ids, mask = make_sources(np.random.default_rng(1), 4)
    options = {**MODES[mode], "eos_token_id": 2, "max_length": 16, "pad_token_id": 3}
    key = jax.random.key(5)
    expected = ours(table, ids, mask, options, key=key)
    spec, values = prepare(GenerationConfig(**options), vocab_size=VOCAB, capacity=24)
    prompt = np.full((4, 1), START, np.int32)
    carry = begin(spec, values, table, ids[:, 0], prompt, key, np.int32(1))
    until, more, seen, early = 1, True, [], 0
    while more:
        until += 1
        carry, (sequences, lengths), more = proceed(spec, values, carry, np.int32(until))
        seen.append((np.asarray(sequences), np.asarray(lengths)))
        early += int((seen[-1][1] > 1).sum()) if until < 6 else 0
    out = end(spec, values, carry)
    for a, b in zip(out[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(a, b)
    before = np.ones_like(seen[0][1])
    for sequences, lengths in seen:
        assert (lengths >= before).all()
        assert (lengths <= expected.lengths[:, : lengths.shape[1]]).all()
        for row in np.ndindex(lengths.shape):
            n = lengths[row]
            np.testing.assert_array_equal(sequences[row][:n], expected.sequences[row][:n])
        before = lengths
    if mode != "groups":  # whose first words differ by design
        assert early  # Something is decided long before the end.
    if "num_beams" not in options:
        np.testing.assert_array_equal(before, expected.lengths)


def test_a_position_is_a_number_of_the_program():
    before = proceed._cache_size()
    test_step_by_step_gives_what_one_run_gives_and_takes_nothing_back("greedy")
    assert proceed._cache_size() <= before + 1


@pytest.mark.parametrize("mode", ["greedy", "beam", "groups"])
def test_a_search_that_is_cut_short_gives_what_it_has(mode):
    """As if `max_length` were reached there."""
    table = make_table(32)
    table[..., 2] += 0.5
    ids, mask = make_sources(np.random.default_rng(2), 4)
    options = {**MODES[mode], "eos_token_id": 2, "max_length": 16, "pad_token_id": 3}
    spec, values = prepare(GenerationConfig(**options), vocab_size=VOCAB, capacity=24)
    prompt = np.full((4, 1), START, np.int32)
    carry = begin(spec, values, table, ids[:, 0], prompt, jax.random.key(0), np.int32(1))
    carry, _, more = proceed(spec, values, carry, np.int32(7))
    assert more
    out = end(spec, values, carry)
    expected = ours(table, ids, mask, {**options, "max_length": 7})
    np.testing.assert_array_equal(out.lengths, expected.lengths)
    np.testing.assert_array_equal(out.sequences, expected.sequences)
    np.testing.assert_allclose(out.sequences_scores, expected.sequences_scores, rtol=1e-6)


# --- with a model --------------------------------------------------------------------------------

OPTIONS = {
    "greedy": {},
    "sample": {"do_sample": True, "num_return_sequences": 2},
    "beam": {"num_beams": 3},
}


def batch(rows: int):
    tokenizer = tiny_pairs.tokenizers().source
    encoded = tokenizer.encode(list(tiny_pairs.texts(rows)))
    ids = np.zeros((rows, max(map(len, encoded))), np.int32)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(encoded):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    return ids, mask


@pytest.mark.parametrize("mode", OPTIONS)
def test_the_pieces_of_a_stream_are_what_generate_returns(mode):
    model, params = tiny_pairs.pair()
    ids, mask = batch(3)
    options = {"max_new_tokens": 12, "attention_mask": mask, **OPTIONS[mode]}
    options |= {"key": jax.random.key(1)} if "do_sample" in options else {}
    expected = model.generate(params, ids, **options)
    pieces = list(model.stream(params, ids, chunk=3, **options))
    assert [piece.output is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    assert len(pieces) == 4
    out = pieces[-1].output
    np.testing.assert_array_equal(out.sequences, expected.sequences)
    np.testing.assert_array_equal(out.lengths, expected.lengths)
    np.testing.assert_allclose(out.sequences_scores, expected.sequences_scores, rtol=1e-5)
    for row, length in enumerate(np.asarray(expected.lengths)):
        told = np.concatenate([piece.tokens[row] for piece in pieces])
        np.testing.assert_array_equal(told, np.asarray(expected.sequences)[row, 1:length])


def test_lengths_of_prompts_and_pieces_compile_nothing_new():
    model, params = tiny_pairs.pair()
    ids, mask = batch(3)
    prompt = np.array([[7, 8, 0], [9, 0, 0], [7, 8, 9]], np.int32)
    programs = (streaming._begin, streaming._proceed, streaming._end)

    def run(chunk, lengths, **options):
        shown = (np.arange(3) < np.array(lengths)[:, None]).astype(np.int32)
        return list(
            model.stream(
                params, ids, attention_mask=mask, decoder_input_ids=prompt,
                decoder_attention_mask=shown, chunk=chunk, **options,
            )
        )  # fmt: skip

    run(3, (2, 1, 3), max_new_tokens=11)
    before = [program._cache_size() for program in programs]
    pieces = run(5, (1, 3, 2), max_new_tokens=8)
    assert [program._cache_size() for program in programs] == before
    for row, length in enumerate((1, 3, 2)):
        alone = model.generate(
            params, ids[row : row + 1], attention_mask=mask[row : row + 1],
            decoder_input_ids=prompt[row : row + 1, :length], max_new_tokens=8,
        )  # fmt: skip
        told = np.concatenate([piece.tokens[row] for piece in pieces])
        np.testing.assert_array_equal(
            told, np.asarray(alone.sequences)[0, length + 1 :][: len(told)]
        )
        assert len(told) == int(alone.lengths[0]) - length - 1


def test_programs_of_streams_are_counted_and_can_be_had_before():
    model, params = tiny_pairs.pair()
    programs = (streaming._begin, streaming._proceed, streaming._end)

    def sizes():
        return sum(program._cache_size() for program in programs)

    options = {"num_beams": 2, "max_new_tokens": 25}
    before, count = sizes(), len(compiled_programs())
    made = warmup(model, params, [(5, 10)], stream=True, **options)
    assert made == tuple((5, 16, 32, 2, part) for part in ("beginning", "steps", "end"))
    assert compiled_programs()[count:] == made
    ids = np.full((5, 12), 9)
    list(model.stream(params, ids, chunk=5, **options))
    model.generate(params, ids, max_time=1e6, **options)
    assert compiled_programs()[count:] == made
    assert sizes() == before + 3


def test_max_time_stops_with_what_there_is(monkeypatch):
    model, params = tiny_pairs.pair()
    ids, mask = batch(2)
    options = {"attention_mask": mask, "max_new_tokens": 30, "suppress_tokens": [3], "num_beams": 2}
    whole = model.generate(params, ids, **options)
    assert int(whole.lengths.max()) == 31
    clock = iter(range(100))
    time = SimpleNamespace(monotonic=lambda: float(next(clock)))  # JAX keeps its own
    monkeypatch.setattr(streaming, "time", time)
    out = model.generate(params, ids, max_time=1.5, **options)  # Two chunks of one "second" each.
    assert out.sequences.shape == (2, 1 + 2 * streaming.CHUNK)
    short = model.generate(params, ids, **{**options, "max_new_tokens": 2 * streaming.CHUNK})
    np.testing.assert_array_equal(out.sequences, short.sequences)
    in_time = model.generate(params, ids, max_time=1e6, **options)
    np.testing.assert_array_equal(in_time.sequences, whole.sequences)


def test_stop_strings_end_a_text():
    model, params = tiny_pairs.pair()
    tokenizer = tiny_pairs.tokenizers().target
    ids, mask = batch(1)
    free = model.generate(params, ids, attention_mask=mask)
    tokens = np.asarray(free.sequences)[0, : int(free.lengths[0])]
    text = tokenizer.decode(tokens[:6])
    out = model.generate(
        params, ids, attention_mask=mask, stop_strings=text[-3:], tokenizer=tokenizer
    )
    assert int(out.lengths[0]) <= 6
    assert tokenizer.decode(np.asarray(out.sequences)[0]).endswith(text[-3:])
    with pytest.raises(InputError, match="tokenizer="):
        model.generate(params, ids, stop_strings="x")


def test_what_cannot_be_streamed_is_refused():
    model, params = tiny_pairs.pair()
    ids, _ = batch(1)
    with pytest.raises(InputError, match="num_return_sequences=1"):
        model.stream(params, ids, num_beams=2, num_return_sequences=2)
    with pytest.raises(InputError, match="chunk must be a positive integer"):
        model.stream(params, ids, chunk=0)
    with pytest.raises(InputError, match="inside jit"):
        jax.jit(lambda p: list(model.stream(p, ids)))(params)
    with pytest.raises(InputError, match="clock"):
        jax.jit(lambda p: model.generate(p, ids, max_time=1.0).sequences)(params)
