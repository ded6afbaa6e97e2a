"""What the loop needs of several processes: agreement, and whole values from parts of them.

Each function is called by every process at the same point, and costs nothing where there is one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jax_encdec.errors import EncDecError, InputError


def first_process() -> bool:
    """Whether this is the process that writes metrics, report and model."""
    return jax.process_index() == 0


def agreed(code: int) -> int:
    """The largest of the processes' codes, an int from 0."""
    if jax.process_count() == 1:
        return code
    from jax.experimental import multihost_utils

    return int(np.max(multihost_utils.process_allgather(np.int32(code))))


def on_first_process(
    action: Callable[[], int | None], *, otherwise: type[EncDecError] = InputError
) -> int:
    """Let the first process do something; all get the number it returns, 0 where that is None.

    What it raises there stops the other processes, too.

    Args:
        otherwise: what the others raise then.
    """
    result, error = 0, None
    if first_process():
        try:
            result = action() or 0
        except Exception as raised:
            error = raised
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        told = multihost_utils.broadcast_one_to_all(np.array([error is not None, result], np.int32))
        result = int(told[1])
        if told[0] and error is None:
            raise otherwise("process 0 could not go on; its own message says why")
    if error is not None:
        raise error
    return result


def from_first_process(make: Callable[[], Any]) -> Any:
    """What the first process makes, as JSON holds it; what it raises of ours, all raise."""
    told: dict[str, Any] = {}
    if first_process():
        try:
            told["made"] = make()
        except EncDecError as error:
            told["error"] = str(error)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        data = np.frombuffer(json.dumps(told).encode(), np.uint8)
        size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
        data = data if first_process() else np.zeros(size, np.uint8)
        told = json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(data))))
    if "error" in told:
        raise InputError(told["error"])
    return told["made"]


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
