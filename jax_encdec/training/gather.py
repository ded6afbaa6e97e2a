"""What the loop needs of several processes: agreement, and whole values from parts of them.

Each function is called by every process at the same point, and costs nothing where there is one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jax_encdec.errors import InputError


def first_process() -> bool:
    """Whether this is the process that writes metrics, report and model."""
    return jax.process_index() == 0


def agreed(code: int) -> int:
    """The largest of the processes' codes, an int from 0."""
    if jax.process_count() == 1:
        return code
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(code))))


def on_first_process(action: Callable[[], Any]) -> None:
    """Let the first process do something; what it raises stops all of them.

    Raises:
        InputError: on the other processes, where the first one's action failed.
    """
    error: BaseException | None = None
    if first_process():
        try:
            action()
        except Exception as raised:
            error = raised
    failed = agreed(int(error is not None))
    if error is not None:
        raise error
    if failed:
        raise InputError("process 0 could not go on; its own message says why")


def gathered(params: Any, *, keep: bool = True) -> Any:
    """Parameters that lie across processes, as whole NumPy arrays; in one process as they are.

    Leaf by leaf, so that no device holds more than one whole leaf beside its own parts.

    Args:
        keep: False: take part, but return None; for processes that need no copy.
    """
    if jax.process_count() == 1:
        return params if keep else None
    from jax.experimental import multihost_utils

    def whole(leaf: Any) -> Any:
        array = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(array) if keep else None

    found = jax.tree.map(whole, params)
    return found if keep else None


def in_parts(work: Callable[[Sequence[Any]], list[str]], rows: Sequence[Any]) -> list[str]:
    """`work(rows)`, each process doing every n-th row; all get all of the results, in order."""
    count = jax.process_count()
    if count == 1:
        return work(rows)
    own = json.dumps(work(list(rows[jax.process_index() :: count]))).encode()
    parts = [json.loads(data) for data in _exchange(own)]
    results: list[str] = [""] * len(rows)
    for index, part in enumerate(parts):
        results[index::count] = part
    return results


def _exchange(own: bytes) -> list[bytes]:
    """Every process's bytes, at every process."""
    from jax.experimental import multihost_utils

    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    padded = np.zeros(int(np.max(sizes)), np.uint8)
    padded[: len(own)] = np.frombuffer(own, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row[: int(size)]) for row, size in zip(rows, np.ravel(sizes), strict=True)]
