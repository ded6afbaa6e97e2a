"""Plans for machines that are not here: bounds on what TPUs' own compiler says, and how it is read.

One process compiles everything, little optimised. Without libtpu, those tests are skipped.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_encdec import BertConfig, EncoderDecoderConfig
from jax_encdec.cli import Parser
from jax_encdec.cli import plan as command
from jax_encdec.errors import EncDecError, InputError
from jax_encdec.training import chips, hlo, plan_compile
from jax_encdec.training import plan as planning
from jax_encdec.training.config import ExecutionConfig
from jax_encdec.training.optimizer_config import Group, OptimizerConfig
from jax_encdec.training.plan import Planner, PlanRequest

MISSING = planning.missing(gpu=False)
needs_libtpu = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def pair(**more) -> EncoderDecoderConfig:
    """Small, and with a vocabulary that two does not divide."""
    size = {"vocab_size": 509, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"intermediate_size": 128, "max_position_embeddings": 128}
    bert = BertConfig(**(size | more))
    ids = {"decoder_start_token_id": 1, "pad_token_id": 0}
    return EncoderDecoderConfig(encoder=bert, decoder=bert, **ids)


def request(mesh: str | None = None, **more) -> PlanRequest:
    execution = ExecutionConfig(mesh=mesh, dtype="bfloat16")
    options = {"topology": "v5e:4x4", "batch_size": 32, "source_length": 32, "target_length": 16}
    options |= {"model": pair(), "execution": execution, "dropout": False}
    return PlanRequest(**(options | more))


# Compiled for TPUs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planner():
    with Planner(request()) as planner:
        yield planner


def kinds(plan: planning.Plan) -> dict[str, dict]:
    assert plan.collectives is not None
    return {c["kind"]: c for c in plan.collectives}


@pytest.mark.xdist_group("plan")
@needs_libtpu
def test_data_parallel_sums_gradients_and_gathers_nothing(planner):
    plan = planner.plan(request("replica=16"))
    assert plan.fits
    assert "all-gather" not in kinds(plan)
    gradients = 4 * plan.parameters
    # Every gradient at least once, and nothing else of its size; bfloat16 halves some.
    assert 0.4 * gradients < kinds(plan)["all-reduce"]["bytes"] < 1.5 * gradients
    assert plan.memory["parameters"] == pytest.approx(4 * plan.parameters, rel=0.01)
    assert not plan.placements
    assert plan.utilisation is not None
    assert 0 < plan.utilisation < 1


@pytest.mark.xdist_group("plan")
@needs_libtpu
def test_fsdp_gathers_parameters_and_needs_less_on_more_chips(planner):
    small, large = planner.plan(request("fsdp=4", topology="v5e:2x2")), planner.plan(request())
    for plan in (small, large):
        assert plan.fits
        assert "all-gather" in kinds(plan)
        # Every matrix is gathered, for the forward and for the backward pass at most.
        assert kinds(plan)["all-gather"]["bytes"] < 3 * 4 * plan.parameters
    assert small.mesh == {"replica": 1, "fsdp": 4, "tensor": 1}
    assert large.mesh == {"replica": 1, "fsdp": 16, "tensor": 1}
    for part in ("parameters", "moments", "temporaries"):
        assert large.memory[part] < small.memory[part], part
    assert large.needed < small.needed
    assert large.flops == small.flops
    # Over the square of 16, TPUs' compiler has no reduce-scatter, and the plan says so.
    assert "reduce-scatter" in kinds(small)
    assert not small.notes
    whole = any("summed whole" in note for note in large.notes)
    assert whole == ("reduce-scatter" not in kinds(large))


@pytest.mark.xdist_group("plan")
@needs_libtpu
def test_tensor_parallel_sums_activations(planner):
    plan = planner.plan(request("fsdp=8,tensor=2"))
    tensor = kinds(plan)["all-reduce"]
    # At least the two sums of each of five sublayers, forward and backward.
    assert tensor["count"] >= 10
    rows = {row["path"]: row["note"] for row in plan.placements}
    assert "509 does not divide by tensor=2" in rows["decoder/embedding/token"]
    shown = command.text(plan)
    assert "decoder/embedding/token [509, 64]" in shown
    assert "utilisation is at most" in shown
    json.dumps(plan.to_json())


@pytest.mark.xdist_group("plan")
@needs_libtpu
def test_what_is_too_large_is_refused_with_sizes(planner):
    """By the compiler where the state would fit, by arithmetic where not even that does."""
    for rows, share in ((9_000_000, 0.8), (12_000_000, 1.0)):
        plan = planner.plan(request("replica=16", model=pair(vocab_size=rows)))
        assert not plan.fits
        assert plan.needed > plan.usable > 15 * 2**30
        assert plan.collectives is None
        assert plan.memory["parameters"] + plan.memory["moments"] > share * plan.usable
        assert "DOES NOT FIT" in command.text(plan)


@pytest.mark.xdist_group("plan")
@needs_libtpu
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"topology": "v5e:3x5"}, "no TPU topology 'v5e:3x5'"),
        ({"batch_size": 30}, "rows must divide"),
        ({"optimizer": OptimizerConfig(groups=(Group(pattern="x"),))}, "matches no parameter"),
    ],
)
def test_what_cannot_be_planned_is_said_and_the_planner_lives_on(planner, change, words):
    with pytest.raises(InputError, match=words):
        planner.plan(dataclasses.replace(request(), **change))
    state = planner.plan(request(), compile=False)
    assert state.collectives is None
    assert state.needed == sum(state.memory[k] for k in ("parameters", "moments", "average"))


# The process that compiles ------------------------------------------------------------------------


def test_a_compiler_that_takes_too_long_breaks_or_is_left_alone_ends(installed):
    slow, dead = Planner(request(), timeout=0.01), Planner(request())
    with slow, pytest.raises(InputError, match=r"compiling for v5e:4x4 took more than 0 s"):
        slow.plan(request())
    with dead:
        dead.process.kill()
        with pytest.raises(InputError, match=r"ended without an answer \(exit code -9"):
            dead.plan(request())
    with Planner(request()) as planner:
        with pytest.raises(InputError, match="made for effort 'low'"):
            planner.plan(request(effort="full"))
        assert planner.process.stdin is not None
        planner.process.stdin.close()  # whoever asks is gone
        assert planner.process.wait(60) == 0


# GPUs, without their compiler ---------------------------------------------------------------------


def test_every_gpu_is_described_to_its_compiler(monkeypatch):
    seen: list[dict[str, Any]] = []

    def described(**options):
        seen.append(options)
        return SimpleNamespace(devices=())

    monkeypatch.setattr(plan_compile.topologies, "get_topology_desc", described)
    assert set(plan_compile.gpu_names()) <= set(chips.GPUS)
    for name in plan_compile.gpu_names():
        plan_compile._gpus(name, 8)
    assert {options["topology"] for options in seen} == {"1x1x8"}
    text = dict(zip(plan_compile.gpu_names(), (o["target_config"] for o in seen), strict=True))
    assert "cuda_compute_capability { major: 9 minor: 0 }" in text["h100"]
    assert "core_count: 132 fpus_per_core: 128" in text["h100"]
    assert "core_count: 108 fpus_per_core: 64" in text["a100"]
    assert f"device_memory_size: {int(chips.GPUS['l4'].memory)}" in text["l4"]


def test_whether_a_gpu_s_memory_suffices_is_our_own_sum(monkeypatch):
    """Its compiler does not say. Here, devices are this machine's, and its answer is made up."""
    import jax

    monkeypatch.setattr(plan_compile, "_gpus", lambda name, count: jax.devices()[:count])
    asked = request("fsdp=8", topology="l4:8")
    answer = plan_compile.answer_to(asked.to_json(compile=False))
    assert answer["mesh"]["fsdp"] == 8
    state = sum(answer["memory"][name] for name in ("parameters", "moments", "average"))
    sizes = {"arguments": state + 100, "results": 20, "program": 3}
    gathered = {"kind": "all-gather", "across_slices": False, "count": 1, "bytes": 8, "sent": 7}
    for free, fits, warned in (
        (2**30, True, False),
        (20 * 2**30, True, True),
        (2**35, False, False),
    ):
        compiled = {"compiled": sizes | {"temporaries": free}, "collectives": [gathered]}
        plan = planning._plan(asked, answer | compiled)
        assert plan.needed == state + 100 + 20 + 3 + free
        assert plan.usable == int(0.92 * chips.GPUS["l4"].memory)
        assert plan.fits == fits
        assert any("XLA_PYTHON_CLIENT_MEM_FRACTION" in note for note in plan.notes) == warned
        assert plan.bound is not None
        assert ("DOES NOT FIT" in command.text(plan)) != fits


def test_without_cuda_s_plugin_one_sentence_names_the_packages(monkeypatch):
    monkeypatch.setattr(planning, "_has", lambda module: False)
    with pytest.raises(InputError, match="pip install jax-cuda12-plugin jax-cuda12-pjrt"):
        Planner(request(topology="h100:8"))


# Without a compiler -------------------------------------------------------------------------------


class Pretended:
    """A planner whose compiler wants one GiB per row of a device, less when rematerialised."""

    def __init__(self):
        self.compiled: list[str] = []

    def plan(self, request: PlanRequest, *, compile: bool = True) -> planning.Plan:
        execution = request.execution
        mesh = {"replica": 1, "fsdp": 16, "tensor": 1}
        sizes = dict(part.split("=") for part in (execution.mesh or "").split(",") if part)
        mesh |= {"fsdp": int(sizes.get("fsdp", 1 if sizes else 16))}
        mesh |= {axis: int(sizes.get(axis, 1)) for axis in ("replica", "tensor")}
        parts = mesh["replica"] * mesh["fsdp"] * execution.accumulate
        if request.batch_size % parts:
            raise InputError("rows must divide")
        kept = 2**30 * request.batch_size // parts // (4 if execution.remat == "full" else 1)
        state = 12 * 2**30 // (mesh["fsdp"] * mesh["tensor"])
        self.compiled += [f"{mesh} {execution.remat} {execution.accumulate}"] * compile
        return planning.Plan(
            request=request, mesh=mesh, devices=16, usable=2**34, parameters=10**9, flops={},
            fits=state + kept <= 2**34, needed=state + kept * compile, placements=(),
            memory={"parameters": state, "moments": 0, "average": 0, "activations": kept},
            collectives=None, bound=None, seconds=1.0,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("mesh", "rows", "mesh_found", "remat", "accumulate"),
    [
        ("replica=16", 128, "fsdp=16", "none", 1),  # the state alone was too much
        (None, 512, "fsdp=16", "full", 1),
        ("fsdp=16", 4096, "fsdp=16", "full", 8),
    ],
)
def test_the_cheapest_change_that_fits_is_proposed(mesh, rows, mesh_found, remat, accumulate):
    planner: Any = Pretended()
    asked = planner.plan(request(mesh, batch_size=rows))
    asked = dataclasses.replace(asked, fits=False)
    *_, found = planning.propose(planner, asked)
    assert found.fits
    execution = found.request.execution
    assert (execution.mesh, execution.remat, execution.accumulate) == (
        mesh_found,
        remat,
        accumulate,
    )
    assert len(set(planner.compiled)) == len(planner.compiled), "something was compiled twice"


def test_nothing_is_proposed_where_nothing_can_fit():
    planner: Any = Pretended()
    asked = planner.plan(request("fsdp=16", batch_size=2**20))
    assert list(planning.propose(planner, asked)) == []


@pytest.mark.skipif(MISSING is None, reason="libtpu is here")
def test_without_libtpu_one_sentence_names_the_extra():
    with pytest.raises(InputError, match=r"pip install 'jax_encdec\[plan\]'"):
        Planner(request())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"topology": "v9:4x4"}, "no figures are known of 'v9'"),
        ({"topology": "v5e-16"}, "no figures are known|written as"),
        ({"topology": "h100:2x2"}, "by number, as in h100:8"),
        ({"topology": "v5e:4x"}, "written as v5e:4x4"),
        ({"topology": "h100:8", "slices": 2}, "on one host"),
        ({"source_length": 129}, "source_length 129 exceeds the model's 128"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"effort": "max"}, "effort"),
    ],
)
def test_impossible_requests_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        request(**change)


def parsed(*words: str) -> PlanRequest:
    parser = Parser()
    command.add_parser(parser.add_subparsers(parser_class=Parser))
    return command.read(parser.parse_args(["plan", *words]))[0]


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(planning, "missing", lambda gpu: None)


def test_a_command_line_is_a_request(tmp_path: Path, installed):
    (tmp_path / "config.json").write_text(json.dumps(pair().to_dict()))
    found = parsed(
        "--topology", "v5e:4x4", "--model", str(tmp_path), "--batch", "64", "--mesh", "fsdp=16",
        "--source-length", "100", "--target-length", "20", "--optimizer", "adafactor",
        "--remat", "full", "--dtype", "bfloat16", "--slices", "2",
    )  # fmt: skip
    assert found == PlanRequest(
        model=pair(),
        topology="v5e:4x4",
        slices=2,
        batch_size=64,
        source_length=100,
        target_length=20,
        optimizer=OptimizerConfig(name="adafactor"),
        execution=ExecutionConfig(mesh="fsdp=16", remat="full", dtype="bfloat16"),
    )
    json.dumps(found.to_json())


def test_two_sides_or_a_run_s_configuration_are_a_model(tmp_path: Path, installed):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        side = pair().encoder.replace(num_hidden_layers=2 if name == "b" else 1)
        (tmp_path / name / "config.json").write_text(json.dumps(side.to_dict()))
    both = f"{tmp_path / 'a'}+{tmp_path / 'b'}"
    found = parsed("--gpu", "h100:8", "--model", both)
    assert found.model.decoder_trunk.layers == 2
    assert (found.source_length, found.target_length) == (128, 128)
    toml = tmp_path / "run.toml"
    toml.write_text(
        f"[model]\nencoder = '{tmp_path / 'a'}'\ndecoder = '{tmp_path / 'b'}'\n"
        f"[data]\nbatch_size = 48\n[optimizer]\npreset = 'liu-lapata'\n"
    )
    from_file = parsed(str(toml), "--gpu", "h100:8")
    assert from_file.batch_size == 48
    assert from_file.optimizer.preset == "liu-lapata"
    assert from_file.model == found.model


def test_lengths_come_from_buckets_or_are_said_to_be_assumed(tmp_path: Path, installed):
    (tmp_path / "config.json").write_text(json.dumps(pair().to_dict()))
    toml = tmp_path / "run.toml"
    toml.write_text(f"[model]\npath = '{tmp_path}'\n[data]\nsource_buckets = [32, 64]\n")
    parser = Parser()
    command.add_parser(parser.add_subparsers(parser_class=Parser))
    found, notes = command.read(parser.parse_args(["plan", str(toml), "--topology", "v5e:4x4"]))
    assert (found.source_length, found.target_length) == (64, 128)
    assert len(notes) == 1
    assert "--target-length" in notes[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name the machines"),
        (("--topology", "v5e:4x4", "--gpu", "h100:8"), "not both"),
        (("--topology", "v5e:4x4"), "name a model"),
        (("--topology", "v5e:4x4", "--model", "/nowhere"), "no such file or folder"),
    ],
)
def test_command_lines_that_say_too_little_are_refused(installed, words, message):
    with pytest.raises(EncDecError, match=message):
        parsed(*words)


# Chips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("TPU7x", "TPU7x"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe"),
        ("NVIDIA H200", "NVIDIA H200"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "NVIDIA A100"),
        ("NVIDIA A10G", "NVIDIA A10"),
        ("Tesla T4", "NVIDIA T4"),
        ("NVIDIA RTX A1000", None),
        ("cpu", None),
    ],
)
def test_chips_are_known_by_jax_s_names(kind, name):
    found = chips.chip(kind)
    assert (None if found is None else found.name) == name


def test_peak_is_that_of_one_device():
    assert chips.peak_flops("TPU v5 lite") == 197e12
    assert chips.peak_flops("TPU7x") == 2307e12 / 2
    assert chips.peak_flops("NVIDIA H100 80GB HBM3", "float32") == 494.7e12
    assert chips.peak_flops("cpu") is None


# Reading a compiled program -----------------------------------------------------------------------

PROGRAM = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: f32[8,4]) -> f32[2,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %all-reduce.9 = f32[8,4]{1,0:T(8,128)} all-reduce(%p), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  ROOT %d = f32[2,4]{1,0} dynamic-slice(%all-reduce.9)
}

%body (x: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %x = (s32[], bf16[2,4]{1,0}) parameter(0)
  %all-gather.1 = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %fusion.1 = f32[2,4]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = (s32[], bf16[2,4]{1,0}) tuple(%x)
}

%condition (x: (s32[], bf16[2,4])) -> pred[] {
  %x = (s32[], bf16[2,4]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[] compare(%x, %limit), direction=LT
}

ENTRY %main (p: bf16[2,4]) -> bf16[2,4] {
  %p = bf16[2,4]{1,0} parameter(0)
  %w = (s32[], bf16[2,4]{1,0}) while(%p), condition=%condition, body=%body
  %w2 = (s32[], bf16[2,4]{1,0}) while(%p), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %all-reduce.1 = (f32[4]{0}, s32[]) all-reduce(%p, %p), replica_groups=mesh['x'=2,'y'=4] {'x'}, to_apply=%add
  %all-reduce-start.2 = f32[4]{0} all-reduce-start(%p), replica_groups={}, to_apply=%add
  %gather = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}
  %permute = (bf16[2,4]{1,0}, bf16[2,4]{1,0}) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}
  %send = (f32[10]{0}, u32[], token[]) send(%p), is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %r = bf16[2,4]{1,0} copy(%p)
}
"""  # noqa: E501


def test_collectives_are_counted_as_often_as_loops_run():
    found = hlo.collectives(PROGRAM, [0] * 4 + [1] * 4)
    got = {(c.kind, c.across_slices): (c.count, c.bytes, c.sent) for c in found}
    assert got == {
        ("all-gather", False): (12 + 3 + 1, 16 * 64, 16 * 48),
        # Groups of every second device, so that each has some of both slices.
        ("reduce-scatter", True): (15, 15 * 128, 15 * 96),
        # Pairs 4 apart: 20 bytes, twice a half; all eight: 16 bytes, twice 7/8; by the hosts: 40.
        ("all-reduce", True): (3, 20 + 16 + 40, 20 + 28 + 40),
        ("collective-permute", False): (1, 16, 16),
    }


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("{}", []),
    ],
)
def test_groups_are_read_in_every_notation(written, groups):
    assert hlo._groups(f"x = f32[] all-reduce(y), replica_groups={written}, more=1") == groups


def test_a_real_program_is_read():
    """On fake devices of this machine: a gather, and a sum inside of a loop."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def program(x, w):
        def layer(carry, w):
            return carry @ w, None  # contracts what is divided: a sum

        y, _ = jax.lax.scan(layer, x, w)
        return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, P(None, None)))

    shardings = (NamedSharding(mesh, P(None, "x")), NamedSharding(mesh, P(None, "x", None)))
    shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in ((16, 64), (5, 64, 64))]
    text = jax.jit(program, in_shardings=shardings).lower(*shapes).compile().as_text()
    found = {c.kind: c for c in hlo.collectives(text, [0] * 8)}
    sums = [c for kind, c in found.items() if kind in ("all-reduce", "reduce-scatter")]
    assert sum(c.count for c in sums) == 5
    assert sum(c.bytes for c in sums) == 5 * 16 * 64 * 4


@given(st.text(max_size=200))
@settings(max_examples=50, deadline=None)
def test_any_text_is_a_program_without_collectives(text):
    assert hlo.collectives(text, [0]) == ()


def test_bytes_are_shown_in_units():
    assert [command.size(x) for x in (12, 1536, 3 * 2**20, 2**34)] == [
        "12 B", "1.5 KiB", "3.0 MiB", "16.00 GiB",
    ]  # fmt: skip
