"""Work done ahead by a thread, while the device computes."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any


class Prefetch(Iterator[Any]):
    """What `make(0)`, `make(1)`, ... return, made ahead by a thread.

    `close` it, or use it in a `with` statement. What goes wrong in the thread is raised where the
    item is asked for; a `StopIteration` of `make` ends the items.

    Args:
        make: called with consecutive numbers, in the thread; returns anything but None.
        start: the first number.
        stop: the one after the last; None: no end.
        depth: how many items are made ahead.
    """

    def __init__(self, make: Callable[[int], Any], start: int, stop: int | None, depth: int):
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._stop = threading.Event()
        # The thread holds no reference to this object, so that one let go of ends its thread.
        self._thread = threading.Thread(
            target=_produce,
            args=(make, start, stop, self._queue, self._stop),
            name="prefetch",
            daemon=True,
        )
        self._finalizer = weakref.finalize(self, _shut, self._queue, self._stop)
        self._thread.start()

    def __next__(self) -> Any:
        if self._stop.is_set():
            raise StopIteration
        item, error = self._queue.get()
        if item is not None:
            return item
        self.close()
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        """End the thread; what it has made ahead is dropped."""
        self._finalizer()
        self._thread.join()

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _produce(
    make: Callable[[int], Any],
    number: int,
    stop_number: int | None,
    made: queue.Queue[Any],
    stop: threading.Event,
) -> None:
    error = None
    try:
        while not stop.is_set() and (stop_number is None or number < stop_number):
            made.put((make(number), None))
            number += 1
    except BaseException as caught:
        error = caught
    if not stop.is_set():
        made.put((None, error))


def _shut(made: queue.Queue[Any], stop: threading.Event) -> None:
    """Tell the thread to end, and make room for what it is about to put."""
    stop.set()
    while not made.empty():
        made.get_nowait()
