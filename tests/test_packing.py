"""Several pairs in one row: every pair once, no row too full, and the same loss."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
import tiny_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batches import make_data

from jax_encdec import DebertaV2Config, EncoderDecoderModel
from jax_encdec.cli import dates
from jax_encdec.errors import ConfigError
from jax_encdec.families import FAMILIES
from jax_encdec.training.batches import Batches
from jax_encdec.training.data_config import DataConfig
from jax_encdec.training.dataset import tokenize
from jax_encdec.training.shapes import choose_packed_shape, first_fit_decreasing

PAIRS = [(source.strip(), target) for source, target in dates.make_examples("train", 30, 5)]

# Which pairs share a row -------------------------------------------------------------------------

SHAPE = (20, 10)
LENGTHS = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 10)), min_size=1, max_size=80)


def reference(lengths, shape, window):
    """First fit decreasing, pair by pair: the rows as lists of pairs."""
    rows = []
    for start in range(0, len(lengths), window):
        part = range(start, min(start + window, len(lengths)))
        by_size = sorted(part, key=lambda i: -max(n / s for n, s in zip(lengths[i], shape)))  # noqa: B905
        opened: list[list[int]] = []
        for i in by_size:
            for row in opened:
                sums = [sum(lengths[j][side] for j in [*row, i]) for side in (0, 1)]
                if sums[0] <= shape[0] and sums[1] <= shape[1]:
                    row.append(i)
                    break
            else:
                opened.append([i])
        rows += opened
    return rows


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 90))
def test_rows_are_those_of_first_fit_decreasing(lengths, window):
    found = first_fit_decreasing(np.array(lengths).T, SHAPE, window)
    rows = {frozenset(row) for row in reference(lengths, SHAPE, window)}
    assert {frozenset(np.flatnonzero(found == r).tolist()) for r in range(found.max() + 1)} == rows
    for side in (0, 1):
        used = np.bincount(found, weights=np.array(lengths)[:, side])
        assert used.max() <= SHAPE[side]


def test_packing_is_worth_it():
    lengths = np.random.default_rng(0).integers([5, 4], [40, 16], (3000, 2)).T
    shape = choose_packed_shape(lengths, np.arange(3000))
    rows = first_fit_decreasing(lengths, shape).max() + 1
    assert lengths.sum() / (rows * sum(shape)) > 0.9


# The loss ----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def loss(model, params, batch):
    out = model.apply({"params": params}, **batch)
    return out.loss_sum, out.loss_weight


gradient = jax.jit(jax.grad(loss, argnums=1, has_aux=True), static_argnums=0)


def whole_epoch(function, model, params, data, pack):
    """What `function` gives, summed over all batches of an epoch."""
    batches = Batches(data, batch_size=4, pack=pack, max_shapes=1)
    with jax.default_matmul_precision("highest"):
        parts = [
            function(model, params, batches.batch(step))
            for step in range(batches.steps_per_epoch())
        ]
    return functools.reduce(lambda a, b: jax.tree.map(np.add, a, b), parts), batches


def check_same_loss(model, params, data):
    (alone, weight), rows = whole_epoch(loss, model, params, data, False)
    (packed, same_weight), fewer = whole_epoch(loss, model, params, data, True)
    assert weight == same_weight == data.target.lengths.sum()
    assert fewer.padding() < rows.padding()
    assert 1 < fewer.steps_per_epoch() < rows.steps_per_epoch()
    assert packed == pytest.approx(float(alone), rel=1e-5)


def tiny_data(model):
    config = DataConfig(pack=True, cache_dir="", max_source_length=20)
    return tokenize(PAIRS, tiny_pairs.tokenizers(), config, model=model)


@pytest.mark.parametrize("kind", ["bert2bert", "bart"])
def test_packed_rows_have_the_loss_of_rows_of_their_own(kind):
    model, params = tiny_pairs.pair(kind)
    check_same_loss(model, params, tiny_data(model))


def test_packed_rows_have_the_gradient_of_rows_of_their_own():
    model, params = tiny_pairs.pair("bert2gpt2")
    (alone, weight), _ = whole_epoch(gradient, model, params, tiny_data(model), False)
    (packed, same_weight), _ = whole_epoch(gradient, model, params, tiny_data(model), True)
    assert weight == same_weight
    total = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(alone)))
    for leaf, same in zip(*map(jax.tree.leaves, (alone, packed)), strict=True):
        assert np.linalg.norm(leaf - same) <= 5e-5 * max(np.linalg.norm(leaf), 1e-3 * total)


def test_a_model_that_would_mix_the_pairs_is_refused():
    config = tiny_pairs.config().replace(
        encoder=DebertaV2Config(
            vocab_size=160, hidden_size=16, num_hidden_layers=1, num_attention_heads=4,
            intermediate_size=32, max_position_embeddings=48, conv_kernel_size=3,
        )
    )  # fmt: skip
    model = EncoderDecoderModel(config)
    options = {"cache_dir": "", "pack": True}
    with pytest.raises(ConfigError, match=r"encoder has a convolution.*pack = false"):
        tokenize(PAIRS, tiny_pairs.tokenizers(), DataConfig(**options), model=model)


@pytest.mark.exhaustive
@pytest.mark.parametrize("role", ["encoder", "decoder", "whole"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_the_pairs_of_a_row_apart(family, role):
    if not (
        FAMILIES[family].whole_architecture if role == "whole" else role in FAMILIES[family].roles
    ):
        pytest.skip(f"{family} is no {role}")
    pytest.importorskip("transformers")
    from oracle import from_torch, torch_pair
    from test_families import whole

    if role == "whole":
        model, params = from_torch(whole(family, True))
    else:
        names = (family, "bert") if role == "encoder" else ("bert", family)
        model, params = from_torch(torch_pair(*names))
    rng = np.random.default_rng(0)
    data = make_data(rng.integers([3, 2], [20, 9], (30, 2)), model)
    for side in (data.source, data.target):
        side.values[:] = rng.integers(3, 50, len(side.values))
    check_same_loss(model, params, data)
