"""Batches whose order is a pure function of (seed, epoch, step), for any number of processes.

An epoch is planned whole, before it is cut: pairs are shuffled, gathered into rows and rows into
global batches of one of few shapes, and only then does each process take its rows of each batch.
So the global batches are the same for any number of processes, and a step can be restored from
its number alone. These few lines of numpy do that without grain, whose iterators are cut by process
before they are shuffled and whose saved state is tied to the number of processes.

B batch, S source length, T target length.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from jax_encdec.errors import ConfigError, InputError
from jax_encdec.prefetch import Prefetch
from jax_encdec.training.dataset import Ragged, TokenizedData
from jax_encdec.training.shapes import (
    Shape,
    assign,
    check_buckets,
    choose_packed_shape,
    choose_shapes,
    first_fit_decreasing,
    shape_grid,
)

IGNORE = -100
_ORDER = 1
"""Version of the order; another one makes other batches of the same seed."""

Batch = dict[str, np.ndarray]
"""`input_ids`, `attention_mask` `[B, S]` and `labels` `[B, T]`, int32; packed also `segment_ids`
`[B, S]` and `decoder_segment_ids` `[B, T]`, which count from 1 within a row, 0 for pads."""


class Plan(NamedTuple):
    """An epoch: which pairs make a row, which rows a batch."""

    pairs: np.ndarray
    """Pairs, row by row."""
    starts: np.ndarray
    """`[rows + 1]`, where each row begins in `pairs`."""
    rows: np.ndarray
    """`[steps, B]`; -1 for a row that fills up the last batch."""
    shapes: np.ndarray
    """`[steps]`, the number of each batch's shape."""


class Batches:
    """All batches of a training run, by step.

    Attributes:
        shapes: all (S, T) that a batch can have.
    """

    def __init__(
        self,
        data: TokenizedData,
        *,
        batch_size: int,
        seed: int = 0,
        source_buckets: Sequence[int] | None = None,
        target_buckets: Sequence[int] | None = None,
        max_shapes: int = 4,
        pack: bool = False,
        shuffle: bool = True,
        drop_last: bool = False,
        pad_id: int | None = None,
    ):
        """Plan batches; the options are those of `DataConfig`.

        Args:
            data: the pairs.
            batch_size: rows of a global batch, B.
            seed: of the order, from 0 to 2**64 - 1.
            source_buckets: lengths of sources; None: from the data. Packed rows have the largest.
            target_buckets: lengths of targets.
            max_shapes: most shapes that are chosen from the data.
            pack: several pairs in a row.
            shuffle: False: pairs of a shape in the order of the files, smaller shapes first.
            drop_last: leave out what does not fill a batch.
            pad_id: in `input_ids`; None: `data.pad_id`.

        Raises:
            ConfigError, InputError: buckets that do not hold the data, or too few pairs.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size must be a positive integer; got {batch_size}")
        if not 0 <= seed < 2**64:
            raise ConfigError(f"the seed must be from 0 to 2**64 - 1; got {seed}")
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.pack, self.shuffle, self.drop_last = pack, shuffle, drop_last
        self.pad_id = data.pad_id if pad_id is None else pad_id
        lengths = data.source.lengths, data.target.lengths
        buckets = source_buckets, target_buckets
        check_buckets(buckets, lengths, data.positions)
        if pack:
            mixed = permutation(len(data), (0,))
            self.shapes = (choose_packed_shape(lengths, mixed, buckets, data.positions),)
        elif source_buckets or target_buckets:
            self.shapes = shape_grid(lengths, buckets, data.limits)
        else:
            self.shapes = choose_shapes(lengths, max_shapes, data.limits)
        self._shape_of = None if pack else assign(self.shapes, lengths)
        self._alone = None if pack else (np.arange(len(data)), np.arange(len(data) + 1))
        self._plans: dict[int, Plan] = {}
        self._ends = [0]  # the number of steps before each epoch, as far as known
        self._lock = threading.RLock()  # a prefetching thread asks, too
        if not self.steps_per_epoch(0):
            raise InputError(
                f"{len(data)} pairs do not fill a batch of {batch_size}; "
                f"set data.drop_last = false, or a smaller data.batch_size"
            )

    # Order ---------------------------------------------------------------------------------------

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Number of steps of an epoch: always the same, but packed, where it may vary a little."""
        return self._end(epoch + 1) - self._end(epoch)

    def position(self, step: int) -> tuple[int, int]:
        """The epoch of a step, and its place within."""
        if step < 0:
            raise InputError(f"a step counts from 0; got {step}")
        epoch = 0 if self.pack else step // self.steps_per_epoch(0)
        while self._end(epoch + 1) <= step:
            epoch += 1
        return epoch, step - self._end(epoch)

    def _end(self, epoch: int) -> int:
        """Number of steps before an epoch; only packed must those before it be planned."""
        with self._lock:
            if not self.pack and len(self._ends) > 1:
                return epoch * self._ends[1]
            while len(self._ends) <= epoch:
                steps = len(self.plan(len(self._ends) - 1).rows)
                self._ends.append(self._ends[-1] + steps)
            return self._ends[epoch]

    def plan(self, epoch: int) -> Plan:
        """The plan of an epoch; the last two that were made are kept."""
        with self._lock:
            if epoch not in self._plans:
                for old in list(self._plans)[:-1]:
                    del self._plans[old]
                self._plans[epoch] = self._make_plan(epoch)
            return self._plans[epoch]

    def _make_plan(self, epoch: int) -> Plan:
        count = len(self.data)
        order = self._permutation(count, epoch, 0)
        if self._alone is None or self._shape_of is None:
            pairs, starts = self._packed_rows(order)
            rows = self._permutation(len(starts) - 1, epoch, 1)
            batches, shapes = [self._filled(rows)], [0]
        else:
            pairs, starts = self._alone
            batches, shapes = self._bucketed(order, self._shape_of)
        numbers = np.repeat(shapes, [len(batch) for batch in batches])
        steps = self._permutation(len(numbers), epoch, 2)
        return Plan(pairs, starts, np.concatenate(batches)[steps], numbers[steps])

    def _bucketed(
        self, order: np.ndarray, shape_of: np.ndarray
    ) -> tuple[list[np.ndarray], list[int]]:
        """Batches `[n, B]` of each shape. What does not fill one goes into a larger shape's."""
        shape_of = shape_of.copy()
        batches = []
        for i, shape in enumerate(self.shapes):
            mine = order[shape_of[order] == i]
            if i == len(self.shapes) - 1:
                batches.append(self._filled(mine))
                continue
            whole = len(mine) - len(mine) % self.batch_size
            batches.append(mine[:whole].reshape(-1, self.batch_size))
            larger = (j for j in range(i + 1, len(self.shapes)) if _holds(self.shapes[j], shape))
            shape_of[mine[whole:]] = next(larger)
        return batches, list(range(len(self.shapes)))

    def _filled(self, rows: np.ndarray) -> np.ndarray:
        """Rows as batches `[n, B]`, the last one filled up or left out."""
        over = len(rows) % self.batch_size
        if self.drop_last:
            rows = rows[: len(rows) - over]
        elif over:
            rows = np.append(rows, np.full(self.batch_size - over, -1))
        return rows.reshape(-1, self.batch_size)

    def _packed_rows(self, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lengths = self.data.source.lengths[order], self.data.target.lengths[order]
        row_of = first_fit_decreasing(lengths, self.shapes[0])
        counts = np.bincount(row_of)
        return order[np.argsort(row_of, kind="stable")], np.append(0, np.cumsum(counts))

    def _permutation(self, count: int, epoch: int, stream: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(count)
        return permutation(count, (self.seed, epoch, stream))

    # Batches -------------------------------------------------------------------------------------

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """The batch of a step, or this process's rows of it: its share, in the processes' order.

        Raises:
            ConfigError: the processes cannot have equal shares.
        """
        if self.batch_size % process_count or not 0 <= process_index < process_count:
            raise ConfigError(
                f"batch_size = {self.batch_size} rows cannot be shared by {process_count} "
                f"processes (this one is number {process_index}); make it a multiple"
            )
        epoch, index = self.position(step)
        plan = self.plan(epoch)
        share = self.batch_size // process_count
        rows = plan.rows[index, process_index * share : (process_index + 1) * share]
        source_length, target_length = self.shapes[plan.shapes[index]]

        first, counts = plan.starts[rows], plan.starts[rows + 1] - plan.starts[rows]
        counts = np.where(rows < 0, 0, counts)
        row_of = np.repeat(np.arange(share), counts)
        segment = np.arange(len(row_of)) - np.repeat(np.cumsum(counts) - counts, counts)
        pairs = plan.pairs[np.repeat(first, counts) + segment]

        size = share, source_length
        source, tokens, at = _lay(self.data.source, pairs, row_of, segment, size)
        input_ids = _filled_with(self.pad_id, size, at, tokens)
        made = {"input_ids": input_ids, "attention_mask": _filled_with(0, size, at, 1)}
        if self.pack:
            made["segment_ids"] = _filled_with(0, size, at, source + 1)
        size = share, target_length
        target, tokens, at = _lay(self.data.target, pairs, row_of, segment, size)
        made["labels"] = _filled_with(IGNORE, size, at, tokens)
        if self.pack:
            made["decoder_segment_ids"] = _filled_with(0, size, at, target + 1)
        # No row is hidden as a whole: some attention kernels return NaN for that.
        for name in {"attention_mask", "segment_ids", "decoder_segment_ids"} & made.keys():
            made[name][rows < 0, 0] = 1
        return made

    # State ---------------------------------------------------------------------------------------

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` steps keeps, as JSON; `check` compares it."""
        epoch, index = self.position(step)
        return {"step": step, "epoch": epoch, "index": index, **self._identity()}

    def check(self, state: Mapping[str, Any]) -> int:
        """The step to go on with from a checkpoint's state, if the batches are still the same.

        Raises:
            InputError: data, seed or options are others than those of the checkpoint.
        """
        mine = self._identity()
        wrong = [name for name in mine if state.get(name) != mine[name]]
        step = state.get("step")
        if wrong:
            said = "; ".join(f"{n} was {state.get(n)!r} and is {mine[n]!r}" for n in wrong)
            raise InputError(
                f"the checkpoint was made with other batches: {said}; restore these, or start "
                f"anew from the saved model"
            )
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise InputError(f"the checkpoint's position in the data is damaged: step {step!r}")
        if self.position(step) != (state.get("epoch"), state.get("index")):
            raise InputError(f"the checkpoint's position in the data is damaged: at step {step}")
        return step

    def _identity(self) -> dict[str, Any]:
        return {
            "order": _ORDER,
            "seed": self.seed,
            "data": self.data.fingerprint,
            "pairs": len(self.data),
            "batch_size": self.batch_size,
            "shapes": [list(shape) for shape in self.shapes],
            "pack": self.pack,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
        }

    def padding(self, epoch: int = 0) -> float:
        """The part of an epoch's positions, of both sides, that holds no token."""
        plan = self.plan(epoch)
        sizes = np.array([sum(shape) for shape in self.shapes])
        positions = int(sizes[plan.shapes].sum()) * self.batch_size
        rows = plan.rows[plan.rows >= 0]
        used = np.zeros(len(plan.starts) - 1, np.int64)
        tokens = (self.data.source.lengths + self.data.target.lengths.astype(np.int64))[plan.pairs]
        np.add.at(used, np.repeat(np.arange(len(used)), np.diff(plan.starts)), tokens)
        return 1 - int(used[rows].sum()) / positions


def evaluation_batches(
    data: TokenizedData,
    batch_size: int,
    *,
    source_buckets: Sequence[int] | None = None,
    target_buckets: Sequence[int] | None = None,
    max_shapes: int = 4,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Every pair once, unpacked, pairs of one shape together; rows without loss fill up the last.

    Arguments and errors are those of `Batches`.
    """
    batches = Batches(
        data,
        batch_size=batch_size,
        source_buckets=source_buckets,
        target_buckets=target_buckets,
        max_shapes=max_shapes,
        shuffle=False,
    )
    for step in range(batches.steps_per_epoch()):
        yield batches.batch(step, process_index, process_count)


# Arrays ------------------------------------------------------------------------------------------


def _holds(large: Shape, small: Shape) -> bool:
    return large[0] >= small[0] and large[1] >= small[1]


def _lay(
    side: Ragged, pairs: np.ndarray, row_of: np.ndarray, segment: np.ndarray, size: Shape
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay pairs one after the other into rows `[B, length]`.

    Returns, for each token, its segment (from 0), its id, and its place in the flattened rows.
    """
    lengths = side.lengths[pairs].astype(np.int64)
    total = np.cumsum(lengths) - lengths  # tokens before each pair, in the batch
    opens = np.maximum.accumulate(np.where(segment == 0, np.arange(len(pairs)), 0))
    column = total - total[opens]
    token = np.arange(int(lengths.sum()))
    ids = side.values[token + np.repeat(side.offsets[pairs] - total, lengths)]
    at = token + np.repeat(row_of * size[1] + column - total, lengths)
    return np.repeat(segment, lengths), ids, at


def _filled_with(pad: int, size: Shape, at: np.ndarray, values: Any) -> np.ndarray:
    array = np.full(size, pad, np.int32)
    array.ravel()[at] = values
    return array


def permutation(count: int, key: Sequence[int]) -> np.ndarray:
    """A permutation of `count` numbers that depends on `key` alone, not on numpy's version.

    Numbers are ordered by outputs of the generator SplitMix64 (Steele et al., 2014).
    """
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mixed(state + np.uint64(part))
    return np.argsort(_mixed(state + np.arange(count, dtype=np.uint64)), kind="stable")


def _mixed(x: np.ndarray) -> np.ndarray:
    """The outputs of SplitMix64 from seed 0, by their numbers."""
    x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# Prefetching -------------------------------------------------------------------------------------


class Steps(Protocol):
    """What `prefetch` asks for batches."""

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """The batch of a step."""
        ...


def prefetch(
    batches: Steps,
    start_step: int = 0,
    depth: int = 2,
    *,
    stop_step: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    transform: Callable[[Batch], Any] | None = None,
) -> Prefetch:
    """Iterate over the batches from `start_step` on, made by a thread while steps compute.

    Args:
        batches: a `Batches`.
        start_step: the first.
        depth: how many are made ahead.
        stop_step: the one after the last; None: no end.
        process_index: which process's rows.
        process_count: of how many.
        transform: done to each batch in the thread, as placing it on devices.

    What goes wrong in the thread is raised where the batch is asked for.
    """
    if depth < 1:
        raise ConfigError(f"depth must be a positive integer; got {depth}")

    def make(step: int) -> Any:
        batch = batches.batch(step, process_index, process_count)
        return batch if transform is None else transform(batch)

    return Prefetch(make, start_step, stop_step, depth)
