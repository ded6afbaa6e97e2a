"""Shared set-up: a fixed CPU platform with 8 fake devices, full float32 matmuls, quiet oracles."""

import os

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_ENCDEC_TEST_PLATFORM", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
