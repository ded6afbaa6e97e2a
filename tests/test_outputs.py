"""What `generate` returns beside the sequences is what Transformers returns."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from oracle import as_torch, from_torch, source_batch, torch, torch_pair

BEAMS = {
    "greedy": {},
    "beam": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.8},
}
ASKED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")


@functools.cache
def pair():
    oracle = torch_pair("bert", "bert", hidden=(16, 24), seed=11, attention="eager")
    return oracle, *from_torch(oracle)


@functools.cache
def both(mode: str):
    """`(ours, theirs)` for one batch, with everything asked for."""
    oracle, model, params = pair()
    ids, mask = source_batch(np.random.default_rng(31))
    options = {"max_new_tokens": 9, "no_repeat_ngram_size": 2, **BEAMS[mode]}
    options |= dict.fromkeys(ASKED, True)
    prompt = np.array([[0, 7, 9]] * 3, np.int32)
    with torch.no_grad():
        theirs = oracle.generate(
            input_ids=as_torch(ids),
            attention_mask=as_torch(mask),
            decoder_input_ids=as_torch(prompt),
            do_sample=False,
            return_dict_in_generate=True,
            **options,
        )
    ours = model.generate(params, ids, attention_mask=mask, decoder_input_ids=prompt, **options)
    np.testing.assert_array_equal(ours.sequences, theirs.sequences[:, : ours.sequences.shape[1]])
    return ours, theirs


@pytest.mark.parametrize("mode", BEAMS)
@pytest.mark.parametrize("name", ["scores", "logits"])
def test_scores_and_logits_of_every_step(mode, name):
    ours, theirs = both(mode)
    got = np.asarray(getattr(ours, name))  # [B * K, length, V]
    expected = np.stack([x.numpy() for x in getattr(theirs, name)], axis=1)
    assert got.shape == (expected.shape[0], ours.sequences.shape[1], expected.shape[2])
    assert (got[:, :3] == 0).all()
    got = got[:, 3:]
    live = (got != 0).any(-1)  # There is nothing to decide where a row is done.
    assert live[:, 0].all()
    np.testing.assert_allclose(got[live], expected[:, : got.shape[1]][live], atol=2e-5, rtol=1e-5)


def test_beam_indices_lead_to_the_scores_of_a_sequence():
    ours, theirs = both("beam")
    indices, expected = np.asarray(ours.beam_indices), theirs.beam_indices.numpy()
    width = min(indices.shape[1] - 3, expected.shape[1])
    np.testing.assert_array_equal(indices[:, 3 : 3 + width], expected[:, :width])
    assert (indices[:, :3] == -1).all()
    sequences, scores = np.asarray(ours.sequences), np.asarray(ours.scores)
    for row, length in enumerate(np.asarray(ours.lengths)):
        at = np.arange(3, length)
        total = scores[indices[row, at], at, sequences[row, at]].sum()
        np.testing.assert_allclose(
            total / (length - 3) ** 0.8, ours.sequences_scores[row], rtol=1e-5
        )
        assert (indices[row, length:] == -1).all()


def test_nothing_is_kept_that_nobody_asked_for():
    _, model, params = pair()
    ids, mask = source_batch(np.random.default_rng(31))
    out = model.generate(params, ids, attention_mask=mask, num_beams=2, max_new_tokens=4)
    assert out.scores is None
    assert out.logits is None
    assert out.beam_indices is None
    assert out.cross_attentions is None


def test_states_and_attentions_of_the_encoder():
    ours, theirs = both("greedy")
    for name in ("encoder_hidden_states", "encoder_attentions"):
        got, expected = getattr(ours, name), getattr(theirs, name)
        assert len(got) == len(expected)
        for a, b in zip(got, expected, strict=True):
            assert a.shape == b.shape
            real = np.asarray(source_batch(np.random.default_rng(31))[1], bool)
            a, b = (np.moveaxis(np.asarray(x), -2, 1)[real] for x in (a, b))
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_states_and_attentions_of_the_decoder():
    ours, theirs = both("greedy")
    lengths = np.asarray(ours.lengths)
    steps = ours.sequences.shape[1] - 1

    def joined(name: str, layer: int, axis: int) -> np.ndarray:
        """All steps of one layer; attentions to what comes later are 0."""
        parts = [step[layer].numpy() for step in getattr(theirs, name)]
        if name == "decoder_attentions":
            widen = [(0, 0)] * 3
            parts = [np.pad(p, [*widen, (0, steps - p.shape[-1])]) for p in parts]
        return np.concatenate(parts, axis=axis)

    for name, axis in (
        ("decoder_hidden_states", 1), ("decoder_attentions", 2), ("cross_attentions", 2),
    ):  # fmt: skip
        got = getattr(ours, name)
        assert len(got) == len(getattr(theirs, name)[0])
        for layer, mine in enumerate(got):
            expected = joined(name, layer, axis)
            assert mine.shape == expected.shape
            for row, length in enumerate(lengths):
                a, b = (np.moveaxis(np.asarray(x)[row], axis - 1, 0) for x in (mine, expected))
                np.testing.assert_allclose(a[: length - 1], b[: length - 1], atol=1e-4)


def test_states_of_beams_are_those_of_the_returned_sequences():
    ours, _ = both("beam")
    _, model, params = pair()
    ids, mask = source_batch(np.random.default_rng(31))
    out = model.apply(
        {"params": params},
        np.repeat(ids, 2, axis=0),
        np.repeat(mask, 2, axis=0),
        np.asarray(ours.sequences)[:, :-1],
        output_hidden_states=True,
        output_attentions=True,
    )
    for name in ("decoder_hidden_states", "decoder_attentions", "cross_attentions"):
        for a, b in zip(getattr(ours, name), getattr(out, name), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
