"""Batches: each pair once per epoch, few shapes, and an order of (seed, epoch, step) alone."""

from __future__ import annotations

import gc
import itertools
import json
import threading
import time
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_encdec.errors import ConfigError, InputError
from jax_encdec.training.batches import (
    IGNORE,
    Batches,
    _mixed,
    evaluation_batches,
    permutation,
    prefetch,
)
from jax_encdec.training.dataset import TokenizedData
from jax_encdec.training.shapes import assign, choose_packed_shape, choose_shapes, shape_grid

PAD = 1


def make_data(lengths, model=None) -> TokenizedData:
    """Pairs of given lengths; no two tokens of one side are the same."""
    lengths = np.array(lengths, np.int32).reshape(-1, 2)
    sums = lengths.sum(0)
    arrays = {
        "source_ids": np.arange(2, 2 + sums[0], dtype=np.int32),
        "target_ids": np.arange(2, 2 + sums[1], dtype=np.int32),
        "lengths": lengths,
        "places": np.zeros((len(lengths), 4), np.int64),
    }
    manifest = {"skipped": {}, "fingerprint": "f", "cut": (0, 0)}
    positions = (None, None)
    if model is not None:
        positions = model.config.encoder_trunk.max_length, model.config.decoder_trunk.max_length
    return TokenizedData(
        arrays, manifest, files=[], limits=positions, positions=positions, pad_id=PAD
    )


def pairs_of(batch) -> list[tuple[list[int], list[int]]]:
    """The pairs in a batch, by what stands in its arrays; fillers hold none."""
    found = []
    for row in range(len(batch["labels"])):
        labels, shown = batch["labels"][row], batch["attention_mask"][row] == 1
        source = batch.get("segment_ids", batch["attention_mask"])[row]
        target = batch.get("decoder_segment_ids", (labels[None] != IGNORE).astype(int)[0])
        target = target[row] if target.ndim == 2 else target
        if (labels == IGNORE).all():
            assert source.tolist() == [1] + [0] * (len(source) - 1)
            continue
        assert ((source > 0) == shown).all()
        assert ((target > 0) == (labels != IGNORE)).all()
        assert (batch["input_ids"][row][~shown] == PAD).all()
        for ids in (source, target):  # segments are contiguous, count from 1, pads come last
            runs = [number for number, _ in itertools.groupby(ids.tolist())]
            count = int(ids.max())
            assert runs in ([*range(1, count + 1)], [*range(1, count + 1), 0])
        assert source.max() == target.max()
        for number in range(1, int(source.max()) + 1):
            found.append(
                (batch["input_ids"][row][source == number].tolist(),
                 labels[target == number].tolist())
            )  # fmt: skip
    return found


def all_pairs(data):
    return sorted((data.source[i].tolist(), data.target[i].tolist()) for i in range(len(data)))


def epoch_of(batches, epoch):
    start = sum(batches.steps_per_epoch(e) for e in range(epoch))
    return [batches.batch(start + i) for i in range(batches.steps_per_epoch(epoch))]


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


LENGTHS = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=60)
SOME = [(1 + i * 7 % 40, 1 + i * 5 % 19) for i in range(53)]


# Each pair once, in few shapes -------------------------------------------------------------------


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 2**64 - 1))
def test_an_epoch_holds_every_pair_once(lengths, batch_size, pack, shuffle, seed):
    data = make_data(lengths)
    batches = Batches(data, batch_size=batch_size, seed=seed, pack=pack, shuffle=shuffle)
    assert len(batches.shapes) <= (1 if pack else 4)
    for epoch in (0, 1):
        made = epoch_of(batches, epoch)
        assert sorted(pair for batch in made for pair in pairs_of(batch)) == all_pairs(data)
        for batch in made:
            shape = batch["input_ids"].shape[1], batch["labels"].shape[1]
            assert shape in batches.shapes
            names = {"input_ids", "attention_mask", "labels"}
            assert batch.keys() - {"segment_ids", "decoder_segment_ids"} == names
            assert ("segment_ids" in batch) == pack
            assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
            assert {len(array) for array in batch.values()} == {batch_size}
    tokens = sum(sum(pair) for pair in lengths)
    positions = sum(b["input_ids"].size + b["labels"].size for b in epoch_of(batches, 0))
    assert batches.padding() == pytest.approx(1 - tokens / positions)


def test_only_the_last_batch_is_filled_up_or_left_out():
    for pack in (False, True):
        filled, dropped = (
            Batches(make_data(SOME), batch_size=8, pack=pack, drop_last=drop)
            for drop in (False, True)
        )
        fillers = [int((batch["labels"] == IGNORE).all(1).sum()) for batch in epoch_of(filled, 0)]
        assert sorted(fillers)[:-1] == [0] * (len(fillers) - 1)
        assert 0 < max(fillers) < 8
        assert dropped.steps_per_epoch() == len(fillers) - 1
        assert all((b["labels"] != IGNORE).any(1).all() for b in epoch_of(dropped, 0))


def test_too_few_pairs_to_drop():
    with pytest.raises(InputError, match="3 pairs do not fill a batch of 4; set"):
        Batches(make_data(SOME[:3]), batch_size=4, drop_last=True)


def test_without_shuffling_pairs_stay_in_order_within_a_shape():
    data = make_data(SOME)
    batches = Batches(data, batch_size=4, shuffle=False, source_buckets=(64,))
    found = [pair for batch in epoch_of(batches, 0) for pair in pairs_of(batch)]
    assert found == all_pairs(data)
    assert all(map(equal, epoch_of(batches, 0), epoch_of(batches, 3)))


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 9), st.sampled_from([1, 2, 4]))
def test_evaluation_holds_every_pair_once(lengths, batch_size, count):
    data = make_data(lengths)
    shares = [
        list(evaluation_batches(data, batch_size * count, process_index=i, process_count=count))
        for i in range(count)
    ]
    assert len({len(share) for share in shares}) == 1
    found = [pair for share in shares for batch in share for pair in pairs_of(batch)]
    assert sorted(found) == all_pairs(data)


# The order ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.booleans(), st.integers(0, 5), st.integers(0, 99))
def test_any_number_of_processes_makes_the_same_global_batches(lengths, pack, step, seed):
    whole = Batches(make_data(lengths), batch_size=8, pack=pack, seed=seed).batch(step)
    for count in (2, 4, 8):
        # Each process has objects of its own, as in life.
        parts = [
            Batches(make_data(lengths), batch_size=8, pack=pack, seed=seed).batch(step, i, count)
            for i in range(count)
        ]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in whole}
        assert equal(joined, whole)


def test_the_order_differs_by_epoch_and_seed_and_by_nothing_else():
    data = make_data(SOME)
    for pack in (False, True):
        a, b = (Batches(data, batch_size=4, seed=5, pack=pack) for _ in range(2))
        # Random access: in whatever order steps are asked for.
        for step in (40, 3, 0, 17, 3):
            assert equal(a.batch(step), b.batch(step))
        other = Batches(data, batch_size=4, seed=6, pack=pack)
        assert not equal(a.batch(0), other.batch(0))
        assert not equal(epoch_of(a, 0)[0], epoch_of(a, 1)[0])


def test_the_order_rests_on_no_version_of_anything():
    """Otherwise a later numpy could not go on with today's checkpoints."""
    # The first outputs of SplitMix64 from seed 0, as published with xoshiro256**.
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert _mixed(np.arange(4, dtype=np.uint64)).tolist() == published
    # The same arithmetic in Python's integers.
    assert permutation(10, (0, 0, 0)).tolist() == [8, 3, 5, 9, 1, 0, 7, 4, 2, 6]
    assert permutation(5, (2**64 - 1, 7, 1)).tolist() == [2, 3, 1, 4, 0]


@settings(deadline=None)
@given(st.integers(0, 3000), st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 99)))
def test_permutations(count, key):
    assert np.array_equal(np.sort(permutation(count, key)), np.arange(count))


def test_permutations_are_even():
    places = np.array([permutation(8, (seed, epoch)) for seed in range(70) for epoch in range(100)])
    counts = np.array([np.bincount(column, minlength=8) for column in places.T])
    expected = len(places) / 8
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert 20 < chi_square < 100  # 49 degrees of freedom


@settings(deadline=None)
@given(st.integers(0, 500), st.booleans())
def test_position_counts_the_steps_of_epochs(step, pack):
    batches = BATCHES[pack]
    epoch, index = batches.position(step)
    assert 0 <= index < batches.steps_per_epoch(epoch)
    assert sum(batches.steps_per_epoch(e) for e in range(epoch)) + index == step


BATCHES = {pack: Batches(make_data(SOME), batch_size=4, pack=pack) for pack in (False, True)}


@pytest.mark.parametrize(("index", "count"), [(0, 3), (2, 2), (-1, 2)])
def test_processes_that_cannot_share_a_batch(index, count):
    with pytest.raises(ConfigError, match="batch_size = 4 rows cannot be shared by"):
        BATCHES[False].batch(0, index, count)


# State -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [False, True])
def test_a_state_is_json_and_tells_where_to_go_on(pack):
    state = json.loads(json.dumps(BATCHES[pack].state(33)))
    again = Batches(make_data(SOME), batch_size=4, pack=pack)
    assert again.check(state) == 33
    assert (state["epoch"], state["index"]) == again.position(33)


def test_a_state_of_other_batches_is_refused():
    state = BATCHES[False].state(3)
    for options, message in (
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"batch_size": 8}, "batch_size was 4 and is 8"),
        ({"pack": True}, "pack was False and is True"),
        ({"shuffle": False}, "shuffle was True and is False"),
        ({"source_buckets": (64,)}, "shapes was"),
    ):
        other = Batches(make_data(SOME), **({"batch_size": 4} | options))
        with pytest.raises(InputError, match=f"made with other batches.*{message}"):
            other.check(state)
    other = Batches(make_data(SOME[1:]), batch_size=4)
    with pytest.raises(InputError, match="pairs was 53 and is 52"):
        other.check(state)
    for damaged in ({"step": None}, {"step": 4}, {"index": 7}, {"step": -1}, {"step": True}):
        with pytest.raises(InputError, match="position in the data is damaged"):
            BATCHES[False].check(state | damaged)


# Shapes ------------------------------------------------------------------------------------------


def padded(shapes, lengths):
    return sum(sum(shapes[i]) for i in assign(shapes, lengths))


@settings(deadline=None, max_examples=50)
@given(LENGTHS, st.integers(1, 3))
def test_chosen_shapes_hold_all_and_pad_little(lengths, most):
    sides = np.array(lengths).T
    shapes = choose_shapes(sides, most)
    assert 1 <= len(shapes) <= most
    sizes = [range(8, 48, 8), range(8, 32, 8)]
    grid = list(itertools.product(*sizes))
    largest = tuple(-(-side.max() // 8) * 8 for side in sides)
    best = min(
        padded(sorted([*rest, largest], key=sum), sides)
        for rest in itertools.combinations_with_replacement(grid, most - 1)
    )
    assert shapes[-1] == largest
    assert padded(shapes, sides) <= 1.1 * best  # a shape that saves less than 3 % is not made


def test_shapes_stay_within_limits():
    sides = np.array([[50, 10], [20, 30]]).T
    assert choose_shapes(sides, 4, (50, 31))[-1] == (50, 31)
    assert choose_shapes(sides, 4, (100, 100))[-1] == (56, 32)
    assert choose_packed_shape(sides, np.arange(2), positions=(50, 30)) == (50, 30)


def test_given_buckets_span_a_grid_of_what_is_needed():
    sides = np.array([[10, 3], [10, 9], [30, 3]]).T
    assert shape_grid(sides, ((32, 16), (4, 16))) == ((16, 4), (16, 16), (32, 4), (32, 16))
    assert shape_grid(sides, ((16, 32, 64), None)) == ((16, 16), (32, 16), (64, 16))
    data = make_data(sides.T)
    packed = Batches(data, batch_size=2, pack=True, source_buckets=(16, 64), target_buckets=(12,))
    assert packed.shapes == ((64, 12),)
    for side, longest in (("source", 30), ("target", 9)):
        with pytest.raises(ConfigError, match=f"longest {side} has {longest} tokens and the larg"):
            Batches(data, batch_size=2, **{f"{side}_buckets": (8,)})
    data.positions = (32, None)
    with pytest.raises(ConfigError, match="source_buckets is 64, but the model has positions for"):
        Batches(data, batch_size=2, source_buckets=(64,))


def test_planning_and_making_batches_is_fast():
    rng = np.random.default_rng(0)
    data = make_data(np.stack([rng.integers(5, 65, 32_000), rng.integers(4, 33, 32_000)], 1))
    for pack in (False, True):
        batches = Batches(data, batch_size=32, pack=pack)
        began = time.process_time()
        batches.plan(1)
        assert time.process_time() - began < 1
        began = time.process_time()
        for step in range(50):
            batches.batch(step)
        assert 50 * 32 / (time.process_time() - began) > 5_000


# Prefetching -------------------------------------------------------------------------------------


class Counting:
    """Batches that are numbers, and fail at one."""

    def __init__(self, fails_at=None):
        self.made: list[int] = []
        self.fails_at = fails_at

    def batch(self, step, process_index=0, process_count=1):
        if step == self.fails_at:
            raise InputError(f"no step {step}")
        self.made.append(step)
        return step


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def wait_for(condition):
    until = time.monotonic() + 20
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    assert condition()


def test_prefetch_gives_the_batches_in_order_and_ends():
    with prefetch(BATCHES[False], 2, stop_step=7, process_index=1, process_count=2) as ahead:
        made = list(ahead)
    assert len(made) == 5
    for step, batch in enumerate(made, 2):
        assert equal(batch, BATCHES[False].batch(step, 1, 2))
    assert list(prefetch(Counting(), 0, stop_step=0)) == []
    assert list(prefetch(Counting(), 3, stop_step=6, transform=lambda n: -n)) == [-3, -4, -5]
    assert not threads()


def test_prefetch_makes_no_more_than_asked_ahead():
    source = Counting()
    with prefetch(source, depth=2) as ahead:
        assert next(ahead) == 0
        # Two wait in the queue, one waits for a place in it.
        wait_for(lambda: source.made == [0, 1, 2, 3])
        time.sleep(0.05)
        assert source.made == [0, 1, 2, 3]
    assert not threads()
    with pytest.raises(StopIteration):
        next(ahead)
    ahead.close()


def test_what_goes_wrong_in_the_thread_is_raised_in_its_turn():
    ahead = prefetch(Counting(fails_at=2))
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(InputError, match="no step 2"):
        next(ahead)
    assert not threads()
    with pytest.raises(StopIteration):
        next(ahead)


def test_a_prefetch_let_go_of_ends_its_thread():
    ahead = prefetch(Counting())
    next(ahead)
    gone = weakref.ref(ahead)
    del ahead
    gc.collect()
    assert gone() is None
    wait_for(lambda: not threads())


def test_prefetch_refuses_no_depth():
    with pytest.raises(ConfigError, match="depth must be a positive integer; got 0"):
        prefetch(Counting(), depth=0)
