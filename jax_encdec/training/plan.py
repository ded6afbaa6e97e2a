"""What a training run would take on machines nobody has at hand: `plan(request)`.

The very step that training runs is compiled ahead of time, by the compiler of the machine in
question, in a process of its own (`plan_compile.py`): for TPUs by libtpu, for NVIDIA's GPUs by
JAX's CUDA plugin, neither of which needs the device. From the result follow the bytes on each
device and whether they fit, what is communicated, and, with the figures makers publish
(`chips.py`), a bound on the share of the peak rate that can be reached. Where a mesh does not fit,
`propose` finds one that does. Nothing here imports JAX.

The bound is an upper one: it takes communication, memory traffic and computation to overlap
perfectly, every link to be busy, and memory to be touched only by what must be (the state read and
written once, kept activations written and read once).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from jax_encdec.encoder_decoder_config import EncoderDecoderConfig
from jax_encdec.errors import InputError, nearest
from jax_encdec.training.chips import GPUS, TPUS, Chip
from jax_encdec.training.config import ExecutionConfig
from jax_encdec.training.optimizer_config import OptimizerConfig

_USABLE = 0.92
"""Share of a GPU's memory that a program may fill; a TPU's compiler knows by itself."""
_MAX_TRIALS = 4


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What is to be trained, where, and how.

    Attributes:
        topology: TPUs as "v5e:4x4" (kind and arrangement), or GPUs of one host as "h100:8".
        slices: how many such TPU slices, joined by the data center's network.
        batch_size: rows of the global batch.
        source_length, target_length: tokens per row, as padded.
        packed: several pairs per row.
        dropout: whether dropout is on, whose random numbers cost time to compile.
        effort: how hard the compiler tries: "low" is quicker and uses somewhat more memory than
            the program that would run, "full" is that program.
    """

    model: EncoderDecoderConfig
    topology: str
    slices: int = 1
    batch_size: int = 32
    source_length: int = 512
    target_length: int = 128
    packed: bool = False
    dropout: bool = True
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    effort: str = "low"

    def __post_init__(self):
        kind = self.kind
        known = (*TPUS, *GPUS)
        if kind not in known:
            hint = nearest(kind, known) or f"; known kinds are {', '.join(known)}"
            raise InputError(f"no figures are known of {kind!r}{hint}")
        if self.gpu is not None and not self.topology.split(":")[-1].isdigit():
            raise InputError(f"GPUs are given by number, as in {kind}:8; got {self.topology!r}")
        for name in ("slices", "batch_size", "source_length", "target_length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.gpu is not None and self.slices > 1:
            raise InputError(f"GPUs are planned for on one host; got {self.slices} slices")
        if self.effort not in ("low", "full"):
            raise InputError(f"effort must be 'low' or 'full'; got {self.effort!r}")
        if re.fullmatch(r"[a-z0-9\-]+:\d+(x\d+)*", self.topology) is None:
            raise InputError(
                f"a topology is written as v5e:4x4, or h100:8 for GPUs; got {self.topology!r}"
            )
        for role, trunk in (
            ("source_length", self.model.encoder_trunk),
            ("target_length", self.model.decoder_trunk),
        ):
            most = trunk.max_length
            if most is not None and getattr(self, role) > most:
                raise InputError(f"{role} {getattr(self, role)} exceeds the model's {most}")

    @property
    def kind(self) -> str:
        """The chip's short name."""
        return self.topology.split(":")[0]

    @property
    def gpu(self) -> str | None:
        """The GPU's short name; None for TPUs."""
        return self.kind if self.kind in GPUS else None

    @property
    def chip(self) -> Chip:
        """Published figures."""
        return (GPUS | TPUS)[self.kind]

    @property
    def chips(self) -> int:
        """How many chips there are."""
        return self.slices * math.prod(int(n) for n in self.topology.split(":")[1].split("x"))

    def to_json(self, *, compile: bool = True) -> dict[str, Any]:
        """What `plan_compile` reads."""
        return {
            "model": self.model.to_dict(),
            "gpu": self.gpu,
            "count": int(self.topology.split(":")[-1]) if self.gpu else 0,
            **{
                name: getattr(self, name)
                for name in ("topology", "slices", "batch_size", "source_length", "target_length")
            },
            "chips": self.chips,
            "chip_memory": int(self.chip.memory),
            "packed": self.packed,
            "dropout": self.dropout,
            "compile": compile,
            "optimizer": asdict(self.optimizer),
            "execution": asdict(self.execution),
        }


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The least seconds per step that each resource is busy, and what share of peak that leaves."""

    ideal: float
    """The model's own FLOPs at the peak rate, nothing computed twice."""
    compute: float
    memory: float
    links: float
    network: float

    @property
    def seconds(self) -> float:
        """The least time of a step, all overlapping."""
        return max(self.compute, self.memory, self.links, self.network)

    @property
    def limit(self) -> str:
        """What the step waits for."""
        return max(("compute", "memory", "links", "network"), key=lambda name: getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known of a run before it runs. Bytes are those of one device, unless said."""

    request: PlanRequest
    mesh: dict[str, int]
    devices: int
    fits: bool
    usable: int
    """Bytes of memory that a device can use."""
    needed: int
    """Bytes that the step takes at its peak; without `collectives`, at the least."""
    memory: dict[str, int]
    """`parameters`, `moments`, `average` and, if compiled, `temporaries`, of which `activations`
    are kept for the backward pass, `program` and `other`."""
    parameters: int
    """Number of parameters of the whole model."""
    flops: dict[str, int]
    """Of one step on all devices together, by our own count: `forward`, `train_step`."""
    placements: tuple[dict[str, Any], ...]
    """Parameters that do not lie as the rules say, and why."""
    collectives: tuple[dict[str, Any], ...] | None
    """By kind, see `hlo.Collective`; None where nothing was compiled."""
    bound: Bound | None
    seconds: float
    """That compiling took."""
    notes: tuple[str, ...] = ()

    @property
    def utilisation(self) -> float | None:
        """At most this share of the peak rate can go into the model's own FLOPs."""
        return None if self.bound is None else self.bound.ideal / self.bound.seconds

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["request"] = self.request.to_json()
        out["bound"] = None if self.bound is None else asdict(self.bound)
        return out | {"utilisation_at_most": self.utilisation}


class Planner:
    """A process that compiles, asked one request after the other; a context manager.

    It ends with the caller, and takes at most `timeout` seconds for a plan.
    """

    def __init__(self, request: PlanRequest, *, timeout: float = 3600.0):
        _check_installed(request)
        level = {"low": "O0", "full": "O2"}[request.effort]
        self.effort, self.timeout = request.effort, timeout
        env = {k: v for k, v in os.environ.items() if not k.startswith(("TPU_", "JAX_", "XLA_"))}
        env |= {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",  # nobody is asked which TPU this machine is
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
            "JAX_OPTIMIZATION_LEVEL": level,
            "JAX_MEMORY_FITTING_LEVEL": level,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "jax_encdec.training.plan_compile"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=env,
            text=True,
        )

    def __enter__(self) -> Planner:
        return self

    def __exit__(self, *_: Any) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def plan(self, request: PlanRequest, *, compile: bool = True) -> Plan:
        """Plan one run.

        Args:
            compile: False: only what follows from shapes, in a second or two.

        Raises:
            InputError: it cannot be planned for, takes too long, or the compiler broke.
        """
        if request.effort != self.effort:
            raise InputError(f"this planner was made for effort {self.effort!r}")
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request.to_json(compile=compile)) + "\n")
            self.process.stdin.flush()
        timer, began = threading.Timer(self.timeout, self.process.kill), time.monotonic()
        timer.daemon = True
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if not line and time.monotonic() - began >= self.timeout:
            raise InputError(
                f"compiling for {request.topology} took more than {self.timeout:.0f} s"
            )
        if not line:
            raise InputError(
                f"the compiler for {request.topology} ended without an answer (exit code "
                f"{self.process.wait()}, -9 where this machine's memory was too small): "
                f"{self._last_words()}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise InputError(answer["error"])
        return _plan(request, answer)

    def _last_words(self) -> str:
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read()[-2000:].splitlines() if line.strip()]
        return lines[-1] if lines else "it said nothing"


def plan(request: PlanRequest) -> Plan:
    """Plan one run; see `Planner.plan`."""
    with Planner(request) as planner:
        return planner.plan(request)


# From an answer to a plan -------------------------------------------------------------------------


def _plan(request: PlanRequest, answer: dict[str, Any]) -> Plan:
    chip, devices = request.chip, math.prod(answer["mesh"].values())
    share = max(1, devices // request.chips)  # devices of JAX on one chip
    usable = int(chip.memory / share * (_USABLE if request.gpu else 1.0))
    state = {name: answer["memory"][name] for name in ("parameters", "moments", "average")}
    memory, needed, notes = dict(state), sum(state.values()), list(answer["notes"])
    memory["activations"] = answer["memory"]["activations"]
    bound, collectives, fits = None, None, needed <= usable
    if (refused := answer.get("refused")) is not None:
        fits = False
        needed = refused.get("needed", needed + refused.get("temporaries", 0))
        usable = refused.get("usable", usable)
        memory |= {k: v for k, v in refused.items() if k == "temporaries"}
        notes.append(f"the compiler says: {refused['message']}")
    elif (compiled := answer.get("compiled")) is not None:
        memory["temporaries"] = compiled["temporaries"]
        memory["program"] = compiled["program"]
        memory["other"] = max(0, compiled["arguments"] + compiled["results"] - needed)
        memory["activations"] = min(memory["activations"], memory["temporaries"])
        needed = sum(v for k, v in memory.items() if k != "activations")
        fits = needed <= usable
        collectives = tuple(answer["collectives"])
        bound = _bound(request, answer, memory, devices, share)
        if request.gpu is None:
            notes += _sums(answer)
        if request.gpu and fits and needed > 0.75 * chip.memory:
            notes.append(
                "JAX takes three quarters of a GPU's memory by default: set "
                "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
            )
    return Plan(
        request=request,
        mesh=answer["mesh"],
        devices=devices,
        fits=fits,
        usable=usable,
        needed=needed,
        memory=memory,
        parameters=answer["parameters"],
        flops=answer["flops"],
        placements=tuple(answer["placements"]),
        collectives=collectives,
        bound=bound,
        seconds=answer.get("seconds", 0.0),
        notes=tuple(notes),
    )


def _sums(answer: dict[str, Any]) -> Iterator[str]:
    """Where TPUs' compiler (libtpu 0.0.42, at every effort) does not do what FSDP asks for.

    It has no reduce-scatter over squares of chips (4x4, 8x8, 16x16 of v5e and v6e) nor over v5p's
    2x2x4, 2x4x4 and 4x4x4, not even an explicit one; over 2x2, 2x4, 4x8, 8x16, or one side of a
    square it has.
    """
    mesh, parameters = answer["mesh"], answer["parameters"]
    if mesh["fsdp"] == 1 or mesh["tensor"] > 1:  # which sums activations
        return
    within = {c["kind"]: c["bytes"] for c in answer["collectives"] if not c["across_slices"]}
    if "reduce-scatter" not in within and within.get("all-reduce", 0) > 0.4 * parameters:
        yield (
            "gradients are summed whole (all-reduce), at twice the bytes, though each device needs "
            "its part only: TPUs' compiler has no reduce-scatter over these chips; over one side "
            "of a square it has, as in replica=4,fsdp=4 on 4x4"
        )
    if within.get("all-gather", 0) < 2 * parameters < within.get("all-reduce", 0):
        yield "parameters are gathered by all-reduces, too, each device's part being so small"


def _bound(
    request: PlanRequest, answer: dict[str, Any], memory: dict[str, int], devices: int, share: int
) -> Bound:
    chip = request.chip
    flops = own = answer["flops"]["train_step"]
    if request.execution.remat == "full":
        flops += answer["flops"]["forward"]
    rate = chip.peak(request.execution.dtype) * chip.devices / share
    state = memory["parameters"] + memory["moments"] + memory["average"]
    sent = {False: 0, True: 0}
    for c in answer["collectives"]:
        sent[c["across_slices"]] += c["sent"]
    link, network = chip.link_bandwidth, chip.network_bandwidth
    return Bound(
        ideal=own / devices / rate,
        compute=flops / devices / rate,
        memory=2 * (state + memory["activations"]) / (chip.memory_bandwidth / share),
        links=sent[False] / (link / 2 / share) if link else 0.0,
        network=sent[True] / (network / share) if network else 0.0,
    )


# A mesh that fits ---------------------------------------------------------------------------------


def propose(planner: Planner, refused: Plan) -> Iterator[Plan]:
    """Compile what should fit where a plan does not, cheapest change first, until one does.

    Yields:
        Every plan that was compiled, the fitting one last; nothing fits if the last one does not.
    """
    trials = 0
    for request in _candidates(refused):
        try:
            guess = planner.plan(request, compile=False)
        except InputError:
            continue  # heads, rows or micro-batches that do not divide
        least = guess.needed + guess.memory["activations"]
        if least > min(guess.usable, refused.usable) or _alike(guess, refused):
            continue
        found = planner.plan(request)
        trials += 1
        yield found
        if found.fits or trials == _MAX_TRIALS:
            return


def _alike(a: Plan, b: Plan) -> bool:
    """Whether two plans differ in no more than how their mesh was written."""
    same = replace(a.request.execution, mesh=None) == replace(b.request.execution, mesh=None)
    return same and a.mesh == b.mesh


def _candidates(refused: Plan) -> Iterator[PlanRequest]:
    request, devices = refused.request, refused.devices
    replicas = request.slices
    inner = devices // replicas

    def changed(tensor: int, **options: Any) -> PlanRequest:
        mesh = {"replica": replicas, "fsdp": inner // tensor, "tensor": tensor}
        text = ",".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1)
        execution = replace(request.execution, mesh=text or "fsdp=1", **options)
        return replace(request, execution=execution)

    yield changed(1)
    yield changed(1, remat="full")
    at = request.execution.accumulate
    for times in (2, 4, 8, 16, 32):
        yield changed(1, remat="full", accumulate=at * times)
    for tensor in (2, 4, 8, 16):
        if inner % tensor == 0:
            yield changed(tensor, remat="full")


# What must be installed ---------------------------------------------------------------------------


def missing(gpu: bool) -> str | None:
    """What must be installed to plan for TPUs, or GPUs, that is not: a sentence, or None."""
    if gpu:
        names = {"jax_plugins.xla_cuda12": "jax-cuda12-plugin jax-cuda12-pjrt"}
        lacking = [package for module, package in names.items() if not _has(module)]
        if lacking:
            return (
                "planning for GPUs needs JAX's CUDA plugin and compiler (not a GPU): pip install "
                "jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12, the first two in the "
                "version of jaxlib"
            )
        return None
    if _has("libtpu"):
        return None
    return "planning for TPUs needs libtpu (not a TPU): pip install 'jax_encdec[plan]'"


def _has(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return False
    return spec is not None and spec.origin is not None


def _check_installed(request: PlanRequest) -> None:
    if (sentence := missing(request.gpu is not None)) is not None:
        raise InputError(sentence)
