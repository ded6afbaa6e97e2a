"""What makers publish about their accelerators: peak rates, memory, bandwidths. One place.

Figures are of one chip, dense (no sparsity), from Google Cloud's TPU pages ("TPU v5e", "TPU v5p",
"TPU v6e", "TPU7x", "TPU v4" and Jouppi et al. 2023) and NVIDIA's data sheets. A float32 product
runs as JAX runs it by default: in one bfloat16 pass on a TPU, in TF32 on a GPU that has it. A rate
measured against these is a fraction of what is published, not of what is possible.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip's published figures, in FLOP/s, bytes and bytes/s."""

    name: str
    bf16: float
    """Matrix products of bfloat16 (or float16), FLOP/s."""
    f32: float
    """Matrix products of float32 at JAX's default precision, FLOP/s."""
    memory: float
    """High-bandwidth memory, bytes."""
    memory_bandwidth: float
    """Of that memory, bytes/s."""
    link_bandwidth: float | None = None
    """Chip to chip, both directions together, bytes/s; None: no link, or none published."""
    network_bandwidth: float | None = None
    """Between slices (TPU), bytes/s per chip and direction; None: not published."""
    devices: int = 1
    """Devices of JAX on one chip; each has its part of everything."""

    def peak(self, dtype: str) -> float:
        """FLOP/s of one JAX device for products of this dtype."""
        return (self.bf16 if dtype in ("bfloat16", "float16") else self.f32) / self.devices


def _tpu(name: str, tflops: float, gib: float, memory: float, link: float, **more: float) -> Chip:
    network = more.get("network")
    return Chip(
        name=name,
        bf16=tflops * 1e12,
        f32=tflops * 1e12,
        memory=gib * GIB,
        memory_bandwidth=memory * 1e9,
        link_bandwidth=link * 1e9,
        network_bandwidth=None if network is None else network / 8 * 1e9,
        devices=int(more.get("devices", 1)),
    )


def _gpu(
    name: str, bf16: float, f32: float, gb: float, memory: float, link: float | None = None
) -> Chip:
    return Chip(
        name=name,
        bf16=bf16 * 1e12,
        f32=f32 * 1e12,
        memory=gb * 1e9,
        memory_bandwidth=memory * 1e9,
        link_bandwidth=None if link is None else link * 1e9,
    )


# TFLOP/s, GiB, GB/s, GB/s both ways, Gb/s of the data center network.
TPUS: dict[str, Chip] = {
    "v4": _tpu("TPU v4", 275, 32, 1228, 600),
    "v5e": _tpu("TPU v5e", 197, 16, 819, 400, network=25),
    "v5p": _tpu("TPU v5p", 459, 95, 2765, 1200, network=50),
    "v6e": _tpu("TPU v6e", 918, 32, 1638, 800, network=100),
    "tpu7x": _tpu("TPU7x", 2307, 192, 7380, 1200, network=100, devices=2),
}
"""By the name that topologies begin with."""

# TFLOP/s of bfloat16, of float32 products (TF32 where there is one), GB, GB/s, NVLink GB/s.
GPUS: dict[str, Chip] = {
    "b200": _gpu("NVIDIA B200", 2250, 1125, 180, 8000, 1800),
    "h200": _gpu("NVIDIA H200", 989.4, 494.7, 141, 4800, 900),
    "h100-pcie": _gpu("NVIDIA H100 PCIe", 756, 378, 80, 2000, 600),
    "h100": _gpu("NVIDIA H100", 989.4, 494.7, 80, 3350, 900),
    "a100-80gb": _gpu("NVIDIA A100 80GB", 312, 156, 80, 2039, 600),
    "a100": _gpu("NVIDIA A100", 312, 156, 40, 1555, 600),
    "l40s": _gpu("NVIDIA L40S", 362, 183, 48, 864),
    "l4": _gpu("NVIDIA L4", 121, 60, 24, 300),
    "a10": _gpu("NVIDIA A10", 125, 62.5, 24, 600),
    "v100": _gpu("NVIDIA V100", 125, 15.7, 32, 900, 300),
    "t4": _gpu("NVIDIA T4", 65, 8.1, 16, 320),
}
"""By a short name, which `device_kind` contains; the more specific ones first."""

_TPU_KINDS = {
    "tpu v4": "v4",
    "tpu v5 lite": "v5e",
    "tpu v5e": "v5e",
    "tpu v5": "v5p",
    "tpu v5p": "v5p",
    "tpu v6 lite": "v6e",
    "tpu v6e": "v6e",
    "tpu7x": "tpu7x",
    "tpu v7x": "tpu7x",
}


def chip(kind: str) -> Chip | None:
    """The chip of a JAX `device_kind` ("TPU v5 lite", "NVIDIA H100 80GB HBM3") or of a short name.

    None for a device that is not in the tables, such as a CPU.
    """
    name = kind.strip().lower()
    if name in TPUS or name in _TPU_KINDS:
        return TPUS[_TPU_KINDS.get(name, name)]
    words = re.split(r"[\s\-_]+", name)
    for short, found in GPUS.items():
        if all(any(_is(part, word) for word in words) for part in short.split("-")):
            return found
    return None


def _is(part: str, word: str) -> bool:
    """Whether a word of a device's name is this part of a short name: A10G is an A10, A100 not."""
    return word.startswith(part) and not word[len(part) :][:1].isdigit()


def peak_flops(kind: str, dtype: str = "bfloat16") -> float | None:
    """FLOP/s of one JAX device of this kind for products of this dtype; None: not known."""
    found = chip(kind)
    return None if found is None else found.peak(dtype)
