"""Why a run stops before its end, and how its processes agree on it.

A callback, the clock, Ctrl-C or SIGTERM asks for a stop; `Stopping.asked` says between two steps
whether there is to be one. Several processes stop after the same step: on SIGTERM JAX makes them
agree at no cost, and on the rest they exchange what they know, which waits for the device and so is
done only now and then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import jax

from jax_encdec.training.callbacks import Stop
from jax_encdec.training.gather import agreed

Stopped = Literal["finished", "callback", "minutes", "interrupted", "signal"]
Ending = tuple[Stopped, str]
"""How a run ended, and why, in words."""

_KINDS: tuple[Stopped, ...] = ("finished", "callback", "minutes", "interrupted", "signal")
"""The later one counts where there are several."""


class Interrupted(Exception):
    """A signal came during an evaluation, which is given up."""


class Stopping:
    """The wishes to stop one run.

    Attributes:
        signals: of `stop_on_signals`, while they are caught.
        wish: what a callback has returned.
    """

    def __init__(
        self,
        max_minutes: float | None,
        *,
        began: float,
        reached_preemption: Callable[[int], bool],
    ):
        """Begin to listen.

        Args:
            max_minutes: after which the run stops.
            began: when, by `time.monotonic`.
            reached_preemption: of `Checkpoints`.
        """
        self.signals: Any = None
        self.wish: Stop | None = None
        self._max_minutes, self._began = max_minutes, began
        self._reached_preemption, self._times = reached_preemption, 0

    def asked(self, *, agree: bool) -> Ending | None:
        """Why the run has to stop here, if it has.

        Args:
            agree: several processes exchange their wishes; otherwise only SIGTERM counts.
        """
        if jax.process_count() > 1:
            if self._told():
                return self.signalled()
            if not agree:
                return None
        found: dict[Stopped, str] = {}
        if self.wish is not None:
            found["callback"] = self.wish.reason
        if self._max_minutes is not None and time.monotonic() - self._began >= (
            60 * self._max_minutes
        ):
            found["minutes"] = f"run.max_minutes ({self._max_minutes:g}) had passed"
        if self.signals.requested is not None:
            found.update([self.signalled()])
        kind = _KINDS[agreed(max(map(_KINDS.index, found), default=0))]
        if kind == "finished":
            return None
        return kind, found.get(kind, "another process stopped")

    def check(self) -> None:
        """Give up an evaluation when a signal came: whoever sends one does not wait for long.

        Several processes call this equally often. Of them only SIGTERM is heard.

        Raises:
            Interrupted: in all processes at the same call.
        """
        if self._told():
            raise Interrupted

    def signalled(self) -> Ending:
        """How a signal ends the run."""
        number = self.signals.requested
        if number is None:
            return "signal", "it was told to stop"
        if number.name == "SIGINT":
            return "interrupted", "it was interrupted"
        return "signal", f"it was told to stop ({number.name})"

    def _told(self) -> bool:
        """Whether a signal came; of several processes to any, once all have asked this often."""
        if jax.process_count() == 1:
            return self.signals.requested is not None
        self._times += 1
        return self._reached_preemption(self._times)
