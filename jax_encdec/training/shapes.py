"""Which (S, T) shapes batches come in: few, since each is compiled for, and with little padding;
and which pairs share a row.

B batch, S source length, T target length.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from jax_encdec.errors import ConfigError

Shape = tuple[int, int]
"""Source length, target length."""
Lengths = tuple[np.ndarray, np.ndarray]
"""Tokens of the sources and of the targets, `[pairs]` each."""
Buckets = tuple[Sequence[int] | None, Sequence[int] | None]
"""Given lengths of both sides; None: none are given."""
Limits = tuple[int | None, int | None]
"""Largest lengths of both sides; None: any."""

MULTIPLE = 8
"""Chosen lengths are multiples of it, or the longest that is allowed."""
_CANDIDATES = 16
WINDOW = 256
"""Pairs among which those of a packed row are found."""
_SAMPLE = 4096
_WORTH = 0.03
"""A further shape must save this part of all positions, or it is not worth its compilation."""


def check_buckets(buckets: Buckets, lengths: Lengths, positions: Limits = (None, None)) -> None:
    """Check that the largest of given buckets holds the longest row, and that the model takes it.

    Raises:
        ConfigError: it does not.
    """
    for name, given, rows, most in zip(
        ("source", "target"), buckets, lengths, positions, strict=True
    ):
        if given and max(given) < rows.max():
            raise ConfigError(
                f"the longest {name} has {rows.max()} tokens and the largest of "
                f"data.{name}_buckets is {max(given)}; set data.max_{name}_length"
            )
        if given and most is not None and max(given) > most:
            raise ConfigError(
                f"the largest of data.{name}_buckets is {max(given)}, but the model has positions "
                f"for {most}"
            )


def shape_grid(
    lengths: Lengths, buckets: Buckets, limits: Limits = (None, None)
) -> tuple[Shape, ...]:
    """All shapes of the given buckets that hold some pair best, and the largest.

    A side without buckets has one, its longest row's.
    """
    sides = [
        given or [round_up(rows.max(), limit)]
        for rows, given, limit in zip(lengths, buckets, limits, strict=True)
    ]
    grid = tuple(sorted(itertools.product(sides[0], sides[1]), key=cost))
    used = np.unique(assign(grid, lengths))
    return tuple(grid[i] for i in sorted({*used.tolist(), len(grid) - 1}))


def choose_shapes(
    lengths: Lengths, most: int = 4, limits: Limits = (None, None)
) -> tuple[Shape, ...]:
    """At most `most` shapes that hold all pairs with about as little padding as can be.

    Greedy, then exchanged one by one while that helps. Few are chosen where few will do.

    Args:
        lengths: tokens of the sources and of the targets, `[pairs]` each.
        most: number of shapes.
        limits: lengths that no shape may exceed.
    """
    sides = [_candidates(rows, limit) for rows, limit in zip(lengths, limits, strict=True)]
    grid = np.array(list(itertools.product(*sides)))  # [C, 2], the last is the largest
    # Pairs by the smallest candidate that holds them: few cells, however many the pairs.
    cells = [np.searchsorted(side, rows) for side, rows in zip(sides, lengths, strict=True)]
    weight = np.bincount(cells[0] * len(sides[1]) + cells[1], minlength=len(grid))
    holds = (grid[:, None] >= grid[None]).all(-1)  # [shape, cell]
    price = np.where(holds, grid.sum(1)[:, None], np.inf)[:, weight > 0]
    weight = weight[weight > 0]

    chosen = [len(grid) - 1]
    best = price[chosen[0]]
    while len(chosen) < most:
        totals = np.minimum(best, price) @ weight
        new = int(totals.argmin())
        if totals[new] > (1 - _WORTH) * (best @ weight):
            break
        chosen.append(new)
        chosen, best = _exchanged(chosen, price, weight)
    return tuple(sorted(((int(s), int(t)) for s, t in grid[chosen]), key=cost))


def _exchanged(
    chosen: list[int], price: np.ndarray, weight: np.ndarray
) -> tuple[list[int], np.ndarray]:
    """Exchange a shape for another while that lowers the price; the largest one stays."""
    total = price[chosen].min(0) @ weight
    improved = True
    while improved:
        improved = False
        for place in range(1, len(chosen)):
            others = price[chosen[:place] + chosen[place + 1 :]].min(0)
            totals = np.minimum(others, price) @ weight
            new = int(totals.argmin())
            if totals[new] < total:
                chosen[place], total, improved = new, totals[new], True
    return chosen, price[chosen].min(0)


def choose_packed_shape(
    lengths: Lengths,
    order: np.ndarray,
    buckets: Buckets = (None, None),
    positions: Limits = (None, None),
) -> Shape:
    """The shape of rows that hold several pairs: of one to two longest sources, tried on a sample.

    A larger row leaves less empty and costs more in attention; it must be worth that.

    Args:
        lengths: tokens of the sources and of the targets, `[pairs]` each.
        order: of the pairs, random; its first few thousand are the sample.
        buckets: given lengths, the largest of which is taken.
        positions: lengths that the model's position tables allow.
    """
    longest = [int(side.max()) for side in lengths]
    sample = lengths[0][order[:_SAMPLE]], lengths[1][order[:_SAMPLE]]
    tokens = [int(side.sum()) for side in sample]
    sources = [round_up(scale * longest[0], positions[0]) for scale in (1, 1.5, 2)]
    best, least = (0, 0), np.inf
    for source in [max(buckets[0])] if buckets[0] else sources:
        fair = source * tokens[1] / tokens[0]
        targets = {
            round_up(max(longest[1], part * fair), positions[1])
            for part in (0.8, 0.9, 1, 1.1, 1.2, 1.4)
        }
        for target in [max(buckets[1])] if buckets[1] else sorted(targets):
            rows = int(first_fit_decreasing(sample, (source, target)).max()) + 1
            waste = rows * (source + target) / sum(tokens)
            if waste < (1 - _WORTH) * least:
                best, least = (source, target), waste
    return best


def first_fit_decreasing(lengths: Lengths, shape: Shape, window: int = WINDOW) -> np.ndarray:
    """Pack pairs into rows of `shape`, within windows of consecutive pairs.

    In each window the largest pair comes first, and each goes into the first row with room on both
    sides. All windows take their n-th pair at the same time.

    Returns:
        The row of each pair, `[pairs]`, from 0 without gaps.
    """
    count = len(lengths[0])
    window = min(window, count)
    windows = -(-count // window)
    # The pairs that fill up the last window are empty, and come last.
    size = np.zeros((2, windows * window), np.int32)
    size[0, :count], size[1, :count] = lengths
    size = size.reshape(2, windows, window)
    largest = np.maximum(size[0] / shape[0], size[1] / shape[1])
    order = np.argsort(-largest, axis=1, kind="stable")
    free = np.empty((2, windows, window + 1), np.int32)
    free[0], free[1] = shape
    row = np.empty((windows, window), np.int64)
    each, opened = np.arange(windows), 0
    for n in range(window):
        pair = order[:, n]
        need = size[:, each, pair]
        room = (free[:, :, : opened + 1] >= need[:, :, None]).all(0)
        first = room.argmax(1)
        free[:, each, first] -= need
        row[each, pair] = first
        opened = max(opened, int(first.max()) + 1)
    flat = (row + (each * window)[:, None]).ravel()[:count]
    return np.unique(flat, return_inverse=True)[1]


def assign(shapes: Sequence[Shape], lengths: Lengths) -> np.ndarray:
    """Number of the first shape that holds each pair, `[pairs]`; the last one holds all."""
    number = np.full(len(lengths[0]), len(shapes) - 1)
    for i in reversed(range(len(shapes))):
        number[(lengths[0] <= shapes[i][0]) & (lengths[1] <= shapes[i][1])] = i
    return number


def cost(shape: Shape) -> Shape:
    """What a row of a shape costs, for ordering: positions in all, then of the target."""
    return shape[0] + shape[1], shape[1]


def round_up(length: float, limit: int | None = None) -> int:
    """The least multiple of `MULTIPLE` that is at least `length`, or `limit` if that is less."""
    rounded = int(np.ceil(length / MULTIPLE)) * MULTIPLE
    return rounded if limit is None else min(rounded, limit)


def _candidates(lengths: np.ndarray, limit: int | None) -> np.ndarray:
    """Ascending lengths to choose from; the last holds the longest row.

    All multiples that rows need, or where these are many, those at equal shares of the rows.
    """
    needed, rows = np.unique(-(-lengths // MULTIPLE), return_counts=True)
    if len(needed) > _CANDIDATES:
        shares = np.linspace(0, len(lengths), _CANDIDATES + 1)[1:]
        needed = needed[np.unique(np.searchsorted(np.cumsum(rows), shares))]
    return np.unique([round_up(MULTIPLE * int(n), limit) for n in needed])
