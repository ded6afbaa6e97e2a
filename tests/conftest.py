"""Shared set-up: a fixed platform with 8 fake devices, quick compilation, no network.

Tests compile hundreds of tiny programs and run each for milliseconds, so XLA is told to optimise
little, which compiles four times as fast. The exhaustive matrices run as users' programs do.
"""

import gc
import os
import sys
from pathlib import Path

import pytest

_FLAGS = ["--xla_force_host_platform_device_count=8"]
if "exhaustive" not in " ".join(sys.argv):
    _FLAGS += ["--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"]

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_ENCDEC_TEST_PLATFORM", "cpu")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Programs compiled by tests do not belong into the cache of whoever runs them.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"


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
