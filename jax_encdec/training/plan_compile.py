"""The part of a plan that needs JAX: build the very step of training and compile it for machines
that are not here.

A process of its own (`python -m jax_encdec.training.plan_compile`), so that the compilers' plugins
neither touch this machine's devices nor take the caller down with them. It reads requests as JSON,
one a line, and answers each with a line; `plan.py` asks and reads. Axis letters: B, S, T.
"""

from __future__ import annotations

import json
import math
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from jax_encdec.encoder_decoder import EncoderDecoderModel
from jax_encdec.encoder_decoder_config import EncoderDecoderConfig
from jax_encdec.errors import EncDecError, InputError
from jax_encdec.execution import Execution
from jax_encdec.training import flops
from jax_encdec.training.config import ExecutionConfig
from jax_encdec.training.hlo import collectives
from jax_encdec.training.optimizer import make_optimizer
from jax_encdec.training.optimizer_config import Group, OptimizerConfig
from jax_encdec.training.sharding import BATCH_AXES, ShardingRules, make_mesh, placements
from jax_encdec.training.state import abstract_state
from jax_encdec.training.step import make_train_step

Request = Mapping[str, Any]
"""As `plan.PlanRequest.to_json` makes it."""

# What XLA must know of a GPU that is not here: compute capability, multiprocessors, shared memory
# per multiprocessor in KiB, second-level cache in MiB, clock in GHz.
_GPUS: dict[str, tuple[int, int, int, int, int, float]] = {
    "b200": (10, 0, 148, 228, 126, 1.97),
    "h200": (9, 0, 132, 228, 50, 1.98),
    "h100": (9, 0, 132, 228, 50, 1.98),
    "h100-pcie": (9, 0, 114, 228, 50, 1.76),
    "a100": (8, 0, 108, 164, 40, 1.41),
    "a100-80gb": (8, 0, 108, 164, 40, 1.41),
    "l40s": (8, 9, 142, 100, 96, 2.52),
    "l4": (8, 9, 58, 100, 48, 2.04),
}


def main() -> None:
    """Answer requests from standard input until it ends."""
    # Plugins print what they like; answers have a channel of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in _lines():
        try:
            answer = answer_to(json.loads(line))
        except EncDecError as error:
            answer = {"error": str(error)}
        except Exception as error:  # whatever a compiler or JAX raises: the next one may work
            what = f"{type(error).__name__}: {_line(str(error))}"
            answer = {"error": f"this cannot be planned for: {what}"}
        print(json.dumps(answer), file=answers, flush=True)


def _lines() -> Iterator[str]:
    """Lines of standard input. When it ends, so does the process, even while it compiles: whoever
    asked is gone."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield lines.get()


def answer_to(request: Request) -> dict[str, Any]:
    """Everything that is found out about one plan, as JSON.

    Without `compile`, only what follows from shapes: the state's bytes, FLOPs, activations.

    Raises:
        EncDecError: the request cannot be planned for.
    """
    devices, notes = _devices(request)
    execution = ExecutionConfig(**request["execution"])
    mesh = make_mesh(execution.mesh, devices=devices)
    rules = ShardingRules(indivisible=execution.indivisible)
    config = EncoderDecoderConfig.from_dict(request["model"])
    attention = execution.attention
    if request["gpu"] and attention in ("auto", "cudnn") and not _has_cudnn():
        attention = "dense" if request["dropout"] else "xla"
        notes.append("attention is planned without cuDNN's kernel, which is not installed here")
    model = EncoderDecoderModel(
        config, dtype=execution.dtype, param_dtype=execution.param_dtype
    ).clone(
        execution=Execution(
            remat=execution.remat,
            attention=attention,
            scan_layers=execution.scans_layers("gpu" if request["gpu"] else "tpu"),
        )
    )
    optimizer = make_optimizer(_optimizer_config(request["optimizer"]), model, 1000)
    ema = optimizer.config.ema_decay or None
    state = abstract_state(model, optimizer, mesh, rules, ema=ema is not None)
    batch = _batch(request)
    step = make_train_step(
        model,
        optimizer,
        mesh,
        rules,
        accumulate=execution.accumulate,
        label_smoothing=execution.label_smoothing,
        loss_chunk=execution.loss_chunk,
        dropout=request["dropout"],
        ema_decay=ema,
    )
    counted = flops.model_flops(
        model, request["batch_size"], request["source_length"], request["target_length"]
    )
    answer: dict[str, Any] = {
        "device_kind": devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "slices": len({getattr(d, "slice_index", 0) for d in devices}),
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)),
        "memory": {
            "parameters": _bytes(state.params),
            "moments": _bytes(state.opt_state),
            "average": _bytes(state.ema),
            "activations": _activations(model, state.params, batch, mesh, execution, request),
        },
        "flops": {"forward": counted.forward, "train_step": counted.train_step},
        "placements": [
            {"path": "/".join(path), "shape": list(p.shape), "spec": str(p.spec), "note": p.note}
            for path, p in placements(model, mesh, rules).items()
            if p.note
        ],
        "notes": notes,
    }
    least = sum(answer["memory"][name] for name in ("parameters", "moments", "average"))
    # Where not even the state fits, the compiler need not be asked.
    if request["compile"] and least * len(devices) <= request["chip_memory"] * request["chips"]:
        answer |= _compiled(step, state, batch, mesh)
    return answer


def _compiled(step: Any, state: Any, batch: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        program = step.lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if (refused := _out_of_memory(str(error))) is None:
            raise InputError(f"the compiler refuses this step: {_line(str(error))}") from None
        return {"refused": refused, "seconds": time.perf_counter() - began}
    seconds = time.perf_counter() - began
    memory = program.memory_analysis()
    slices = [getattr(d, "slice_index", 0) or 0 for d in mesh.devices.flat]
    return {
        "seconds": seconds,
        "compiled": {
            "arguments": memory.argument_size_in_bytes,
            "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "program": memory.generated_code_size_in_bytes,
        },
        "collectives": [asdict(c) for c in collectives(program.as_text(), slices)],
    }


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "": 1}
_SIZE = r"([\d.]+)([KMGT]?)"


def _out_of_memory(message: str) -> dict[str, Any] | None:
    """What a TPU's compiler says of a program that does not fit, in bytes; None: another error.

    `needed` of all, or `temporaries` alone, and what is `usable`.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    out: dict[str, Any] = {"message": _line(message)}
    for needed, pattern in (
        ("needed", rf"Used {_SIZE} of {_SIZE} hbm"),
        ("temporaries", rf"temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    ):
        if found := re.search(pattern, message):
            sizes = [int(float(found[i]) * _UNITS[found[i + 1]]) for i in (1, 3)]
            out |= {needed: sizes[0], "usable": sizes[1]}
    return out


def _line(text: str) -> str:
    return " ".join(text.split())[:400]


# Devices ------------------------------------------------------------------------------------------


def _devices(request: Request) -> tuple[list[Any], list[str]]:
    """Devices that exist on paper, and what to know of them."""
    if request["gpu"]:
        return _gpus(request["gpu"], request["count"]), []
    more: dict[str, Any] = {"num_slices": request["slices"]} if request["slices"] > 1 else {}
    if request["topology"].startswith("v4:"):
        more["chip_config_name"] = "megacore"  # one device per chip, as on the machine itself
    try:
        found = topologies.get_topology_desc(request["topology"], "tpu", **more)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"there is no TPU topology {request['topology']!r} (as in v5e:4x4 or v5p:2x2x2): "
            f"{_line(str(error)).removeprefix('INVALID_ARGUMENT: ')}"
        ) from None
    return list(found.devices), []


def _gpus(name: str, count: int) -> list[Any]:
    from jax_encdec.training.chips import GPUS

    major, minor, cores, shared, cache, clock = _GPUS[name]
    chip = GPUS[name]
    target = f"""
    gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
      shared_memory_per_block: 49152 shared_memory_per_core: {shared * 1024}
      shared_memory_per_block_optin: {(shared - 1) * 1024}
      core_count: {cores} fpus_per_core: {128 if major > 8 or minor else 64}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {int(chip.memory_bandwidth)} l2_cache_size: {cache * 2**20}
      clock_rate_ghz: {clock} device_memory_size: {int(chip.memory)}
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
    device_description_str: "{chip.name}"
    """
    return list(
        topologies.get_topology_desc(
            platform="cuda", target_config=target, topology=f"1x1x{count}"
        ).devices
    )


def gpu_names() -> tuple[str, ...]:
    """GPUs that can be planned for."""
    return tuple(_GPUS)


def _has_cudnn() -> bool:
    import importlib.util

    try:
        return importlib.util.find_spec("nvidia.cudnn") is not None
    except ModuleNotFoundError:
        return False


# Shapes -------------------------------------------------------------------------------------------


def _optimizer_config(data: Mapping[str, Any]) -> OptimizerConfig:
    groups = tuple(Group(**group) for group in data["groups"])
    return OptimizerConfig(**{**data, "groups": groups})


def _batch(request: Request) -> dict[str, jax.ShapeDtypeStruct]:
    rows = request["batch_size"]
    source, target = (rows, request["source_length"]), (rows, request["target_length"])
    shapes = {"input_ids": source, "attention_mask": source, "labels": target}
    if request["packed"]:
        shapes |= {"segment_ids": source, "decoder_segment_ids": target}
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}


def _bytes(tree: Any) -> int:
    """Bytes of one device's part of a tree of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _activations(
    model: EncoderDecoderModel,
    params: Any,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    mesh: Mesh,
    execution: ExecutionConfig,
    request: Request,
) -> int:
    """Bytes per device that the forward pass of a micro-batch keeps for the backward pass.

    Counted from the trace: what the compiler computes again to save memory still counts, and what
    `tensor` splits counts whole.
    """
    parts = math.prod(mesh.shape[a] for a in BATCH_AXES)
    rows = request["batch_size"] // execution.accumulate // parts
    part = {
        k: jax.ShapeDtypeStruct((max(1, rows), *x.shape[1:]), x.dtype) for k, x in batch.items()
    }
    if model.execution.attention in ("cudnn", "splash"):  # which cannot be traced here
        model = model.clone(execution=replace(model.execution, attention="auto"))

    def kept(params: Any, batch: Any) -> list[jax.Array]:
        def loss(params: Any) -> jax.Array:
            out: Any = model.apply(
                {"params": params},
                **batch,
                label_smoothing=execution.label_smoothing,
                loss_chunk=execution.loss_chunk,
                deterministic=not request["dropout"],
                rngs={"dropout": jax.random.key(0)},
                method="loss",
            )
            return out.loss_sum

        _, pull = jax.vjp(loss, params)
        own = {id(x) for x in jax.tree.leaves(params)}
        return [x for x in jax.tree.leaves(pull) if id(x) not in own]

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    found = jax.eval_shape(kept, shapes, part)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in found)


if __name__ == "__main__":
    main()
