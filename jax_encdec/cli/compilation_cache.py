"""Compiled programs are kept on disk, so that a command that runs again compiles nothing.

The cache is JAX's own, switched on here and nowhere in the library. It is of bounded size and lies
in the user's cache folder, unless JAX's environment variables say otherwise. Where it cannot be
written, programs are compiled each time, as without it. Nobody else may write there: what it holds
is run.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
import warnings
from pathlib import Path
from typing import Any

MAX_BYTES = 2 * 1024**3
_TORN_AFTER = 60.0  # Seconds in which a program that is being written will be there.
_SETTINGS = {
    "jax_compilation_cache_max_size": MAX_BYTES,
    # Small programs are many, and loading one takes a tenth of compiling it.
    "jax_persistent_cache_min_compile_time_secs": 0.0,
}


def add_cache_option(parser: argparse.ArgumentParser) -> None:
    """Declare the flag."""
    parser.add_argument(
        "--no-compilation-cache",
        dest="compilation_cache",
        action="store_false",
        help="do not keep compiled programs on disk (JAX_ENABLE_COMPILATION_CACHE=0 does the same)",
    )


def default_folder() -> Path:
    """Where programs are kept where JAX_COMPILATION_CACHE_DIR does not say."""
    base = os.environ.get("XDG_CACHE_HOME")
    # A relative path there is invalid and to be ignored, says its specification.
    home = Path(base) if base and os.path.isabs(base) else Path.home() / ".cache"
    return home / "jax_encdec" / "programs"


def use_cache(args: argparse.Namespace) -> None:
    """Switch the cache on for this process, unless `--no-compilation-cache` was given."""
    import jax

    config: Any = jax.config
    if not args.compilation_cache:
        jax.config.update("jax_enable_compilation_cache", False)
    if not config.jax_enable_compilation_cache:
        return
    # An entry that cannot be read or written costs a compilation, and nobody's attention.
    warnings.filterwarnings("ignore", ".*persistent compilation cache", UserWarning)
    if not config.jax_compilation_cache_dir:
        folder = _own_folder()
        if folder is None:
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    for name, value in _SETTINGS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def _own_folder() -> Path | None:
    """The default folder, made if need be; None where it cannot be written."""
    try:
        folder = default_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            return None
        _remove_torn(folder)
    except (OSError, RuntimeError):  # No home folder, or a file in the way.
        return None
    return folder


def _remove_torn(folder: Path) -> None:
    """Remove what a process was writing when it was killed; JAX never would.

    JAX writes `KEY-cache` and then `KEY-atime`.
    """
    complete = {path.name.removesuffix("-atime") for path in folder.glob("*-atime")}
    for path in folder.glob("*-cache"):
        if path.name.removesuffix("-cache") not in complete:
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _TORN_AFTER:
                    path.unlink()
