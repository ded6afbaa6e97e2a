"""What goes wrong through somebody's input: one clear sentence, never a deep stack trace.

Every error that a user can cause is one of these. The command line prints the message and exits
with code 2; in Python they are ordinary `ValueError`s.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EncDecError(ValueError):
    """Base of all errors caused by input: a file, an argument, a configuration."""


class ConfigError(EncDecError):
    """A configuration that is malformed, contradictory or incomplete."""


class CheckpointError(EncDecError):
    """A checkpoint file that is missing, damaged, hostile or does not fit its configuration."""


class InputError(EncDecError):
    """An argument of a call (ids, masks, options, text) that cannot be used."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the known name closest to `name`, or an empty string."""
    hits = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {hits[0]!r}?" if hits else ""
