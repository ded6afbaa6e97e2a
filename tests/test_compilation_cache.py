"""The command line keeps compiled programs: a second process compiles nothing; the library never
does so by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_pairs

from jax_encdec.cli import compilation_cache

# Runs a command and tells, on the last line, what JAX asked of the cache.
CHILD = """
import collections, json, sys
import jax
from jax_encdec.cli import main
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name.split("/")[-1]]))
code = main(sys.argv[1:])
print(json.dumps(counts))
sys.exit(code)
"""

# Switches the cache on, computes something, tells the settings.
SMALL = """
import argparse, collections, json, sys, warnings
import jax
from jax_encdec.cli.compilation_cache import use_cache
warnings.simplefilter("default")
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name.split("/")[-1]]))
use_cache(argparse.Namespace(compilation_cache="off" not in sys.argv))
assert jax.jit(lambda x: x * 2 + 1)(20.0) == 41
c = jax.config
settings = c.jax_compilation_cache_dir, c.jax_compilation_cache_max_size
print(json.dumps([*settings, c.jax_persistent_cache_min_compile_time_secs, counts]))
"""


def child(code: str, *arguments, **environment) -> tuple[list[str], str]:
    """Lines of its standard output, and its standard error."""
    inherited = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=inherited | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def small(*arguments, **environment) -> list:
    out, err = child(SMALL, *arguments, **environment)
    assert err == ""
    return json.loads(out[-1])


def test_a_second_process_compiles_nothing(tmp_path):
    folder = tiny_pairs.save(tmp_path / "model")
    command = ["generate", "--model", folder, "--num-beams", "2", *tiny_pairs.texts(3)]
    first, _ = child(CHILD, *command, XDG_CACHE_HOME=tmp_path)
    counts = json.loads(first.pop())
    assert counts["cache_misses"] > 0
    second, err = child(CHILD, *command, XDG_CACHE_HOME=tmp_path)
    counts = json.loads(second.pop())
    assert counts.get("cache_misses", 0) == 0
    assert counts["cache_hits"] == counts["compile_requests_use_cache"] > 0
    assert (second, err) == (first, "")
    place = tmp_path / "jax_encdec" / "programs"
    assert place.stat().st_mode & 0o077 == 0
    assert list(place.glob("*-cache"))
    third, _ = child(CHILD, *command, "--no-compilation-cache", XDG_CACHE_HOME=tmp_path)
    assert not json.loads(third.pop()).get("compile_requests_use_cache")
    assert third == first


def test_it_lies_where_the_environment_says_and_is_bounded(tmp_path):
    home = small(HOME=tmp_path, XDG_CACHE_HOME="relative")
    assert home[:3] == [
        str(tmp_path / ".cache/jax_encdec/programs"),
        compilation_cache.MAX_BYTES,
        0.0,
    ]
    own = small(
        JAX_COMPILATION_CACHE_DIR=tmp_path / "own",
        JAX_COMPILATION_CACHE_MAX_SIZE=10**6,
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5,
    )
    assert own[:3] == [str(tmp_path / "own"), 10**6, 0.5]


def test_it_can_be_switched_off(tmp_path):
    assert not small("off", XDG_CACHE_HOME=tmp_path)[3].get("compile_requests_use_cache")
    off = {"JAX_ENABLE_COMPILATION_CACHE": "0", "XDG_CACHE_HOME": tmp_path}
    assert small(**off)[0] is None
    assert not list(tmp_path.iterdir())


def test_a_library_import_switches_nothing_on(tmp_path):
    code = (
        "import jax, jax_encdec.pipeline, jax_encdec.training, jax_encdec.cli.generate\n"
        "assert jax.config.jax_compilation_cache_dir is None\n"
        "assert jax.config.jax_compilation_cache_max_size == -1"
    )
    child(code, XDG_CACHE_HOME=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_used_is_done_without_and_in_silence(tmp_path):
    (tmp_path / "file").write_text("")
    assert small(XDG_CACHE_HOME=tmp_path / "file")[0] is None
    small(JAX_COMPILATION_CACHE_DIR=tmp_path / "file" / "x")
    small(XDG_CACHE_HOME=tmp_path)
    for entry in (tmp_path / "jax_encdec/programs").glob("*-cache"):
        entry.write_bytes(b"damaged")
    assert not small(XDG_CACHE_HOME=tmp_path)[3].get("cache_hits")


def test_entries_torn_by_a_kill_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = compilation_cache.default_folder()
    folder.mkdir(parents=True)
    for name in ("whole-cache", "whole-atime", "torn-cache", "new-cache"):
        (folder / name).write_bytes(b"x")
    os.utime(folder / "torn-cache", (0, 0))
    assert compilation_cache._own_folder() == folder
    assert {p.name for p in folder.iterdir()} == {"whole-cache", "whole-atime", "new-cache"}
