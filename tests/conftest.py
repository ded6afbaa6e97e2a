"""Shared set-up: a fixed platform with 8 fake devices, quick compilation, no network.

Tests compile thousands of tiny programs and run each for milliseconds, so what is saved here is the
compiler's work: it optimises little, and compiles no program twice in one session, whichever worker
or child process asks for it. The exhaustive matrices run as users' programs do.
"""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

_FLAGS = ["--xla_force_host_platform_device_count=8"]
if "exhaustive" not in " ".join(sys.argv):
    _FLAGS += [
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        # The workers keep all cores busy; to split up a program for several is work on top.
        "--xla_cpu_parallel_codegen_split_count=1",
    ]

if "PYTEST_XDIST_WORKER" not in os.environ:
    # Programs compiled by tests do not belong into the cache of whoever runs them, nor do those of
    # an earlier session belong into this one: the session has a cache of its own, which workers
    # and child processes inherit.
    _CACHE = tempfile.mkdtemp(prefix="jax-encdec-tests-")
    atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = "-1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_ENCDEC_TEST_PLATFORM", "cpu")
# Where in Python each operation comes from is looked up and written down, and read by nobody here.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_finish():
    """Do not go through millions of objects, all of them in use, time and again."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)


@pytest.fixture(autouse=True)
def _room_for_compiled_programs():
    """Let go of old programs before a process has as many memory mappings as Linux allows.

    Each compiled program takes some; a worker of thousands of tests would crash in the compiler.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        import jax

        jax.clear_caches()
        gc.collect()
