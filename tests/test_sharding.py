"""Where parameters, moments and rows live: every family, every mesh, every optimizer."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny_pairs import config, pair

from jax_encdec import BartConfig, BertConfig, EncoderDecoderConfig, EncoderDecoderModel, GPT2Config
from jax_encdec.errors import ConfigError, InputError
from jax_encdec.families import FAMILIES
from jax_encdec.layers import Param
from jax_encdec.training import sharding
from jax_encdec.training.sharding import (
    AXES,
    ShardingRules,
    batch_shardings,
    data_shard,
    make_mesh,
    param_shardings,
    placements,
    to_global,
)
from jax_encdec.training.state import abstract_state, init_state, state_shardings

P = PartitionSpec
SHAPES = ("replica=8", "fsdp=8", "tensor=8", "replica=2,fsdp=2,tensor=2")


# Meshes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        (None, (1, 8, 1)),
        ("fsdp=8", (1, 8, 1)),
        ("replica=2,fsdp=4", (2, 4, 1)),
        (" tensor = 2 , fsdp=-1 ", (1, 4, 2)),
        ({"replica": 2, "tensor": 4}, (2, 1, 4)),
        ({"replica": -1}, (8, 1, 1)),
    ],
)
def test_mesh(asked, sizes):
    mesh = make_mesh(asked)
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == sizes
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_one_device_is_a_mesh_like_any_other():
    assert make_mesh(devices=jax.devices()[:1]).devices.shape == (1, 1, 1)
    assert make_mesh("", devices=jax.devices()[:1]).devices.shape == (1, 1, 1)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("data=8", "axes replica, fsdp, tensor; got 'data'"),
        ("fsdp=8,tensr=1", "did you mean 'tensor'"),
        ("fsdp=4", "takes 4 devices; there are 8"),
        ("fsdp=3,tensor=-1", "takes 3 devices or a multiple; there are 8"),
        ("fsdp=-1,tensor=-1", "only one mesh axis may be -1"),
        ("fsdp=0", "positive integer"),
        ("fsdp=-2", "positive integer"),
        ({"fsdp": True}, "positive integer"),
        ({"fsdp": 8.0}, "positive integer"),
        ("fsdp", "is written as 'replica=2,fsdp=4,tensor=1'"),
        ("fsdp=4,fsdp=2", "each axis once"),
        ("fsdp=" + "9" * 400, "is written as"),
        ("", "takes 1 devices; there are 8"),
    ],
)
def test_what_is_no_mesh_is_refused_in_a_sentence(asked, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        make_mesh(asked)


# Anything but a mesh of eight devices is a ConfigError, and nothing else.
@given(st.text("replicafsdptnor=-,0123456789 ", max_size=40))
@settings(max_examples=200, deadline=None)
def test_no_text_breaks_the_parser(text):
    try:
        assert make_mesh(text).size == 8
    except ConfigError as error:
        assert len(str(error)) < 300  # noqa: PT017


@dataclass(frozen=True)
class Chip:
    id: int
    slice_index: int
    process_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"


def test_only_replica_may_span_slices():
    """Two slices of 2x2 chips, as the runtime describes them."""
    devices = [Chip(i, i // 4, i // 4, (i % 2, i % 4 // 2, 0)) for i in range(8)]
    with pytest.raises(ConfigError, match="does not fit 2 slices: only replica may span slices"):
        make_mesh("fsdp=8", devices=devices)
    for asked, sizes in ((None, (2, 4, 1)), ("replica=4,tensor=2", (4, 1, 2))):
        mesh = make_mesh(asked, devices=devices)
        assert mesh.devices.shape == sizes
        for replica in mesh.devices:
            assert len({d.slice_index for d in replica.flat}) == 1


# Rules -------------------------------------------------------------------------------------------


def published(model_type: str, vocabulary: int, hidden: int = 768, heads: int = 12):
    size = {"hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": 2}
    half = BertConfig(vocab_size=vocabulary, **size)
    other = half
    if model_type == "gpt2":
        other = GPT2Config(vocab_size=vocabulary, n_embd=hidden, n_head=heads, n_layer=2)
    return EncoderDecoderModel(EncoderDecoderConfig(encoder=half, decoder=other))


@pytest.mark.parametrize("vocabulary", [30522, 50257, 50265])
def test_published_vocabularies_move_to_the_other_dimension(vocabulary):
    """None of the published vocabularies divides by 8."""
    model, mesh = published("gpt2", vocabulary), make_mesh("tensor=8")
    table = placements(model, mesh)["encoder", "embedding", "token"]
    assert table.spec == P(None, "tensor")
    assert table.shard_shape(mesh) == (vocabulary, 96)
    assert table.note == (
        f"vocab {vocabulary} does not divide by tensor=8: tensor splits embed 768 instead"
    )
    mesh = make_mesh("fsdp=2,tensor=4")
    table = placements(model, mesh)["encoder", "embedding", "token"]
    assert table.spec == P(None, ("fsdp", "tensor"))
    assert table.shard_shape(mesh) == (vocabulary, 96)
    whole = placements(model, mesh, ShardingRules(indivisible="replicate"))
    table = whole["encoder", "embedding", "token"]
    assert table.spec == P(None, "fsdp")
    assert table.note == (
        f"vocab {vocabulary} does not divide by tensor=4: whole on each device of tensor"
    )
    with pytest.raises(ConfigError, match=f"vocab {vocabulary} does not divide by tensor=4"):
        placements(model, mesh, ShardingRules(indivisible="error"))


def test_what_divides_lies_as_the_rules_say():
    mesh = make_mesh("replica=2,fsdp=2,tensor=2")
    placed = placements(published("bert", 30522), mesh)
    assert placed["encoder", "embedding", "token"].spec == P("tensor", "fsdp")
    block = ("decoder", "segment_0", "block_0")
    assert placed[*block, "cross_attention", "query", "kernel"].spec == P(None, "fsdp", "tensor")
    assert placed[*block, "cross_attention", "out", "kernel"].spec == P(
        None, "tensor", None, "fsdp"
    )
    assert placed[*block, "mlp", "up", "kernel"].spec == P(None, "fsdp", "tensor")
    assert placed[*block, "mlp", "down", "kernel"].spec == P(None, "tensor", "fsdp")
    assert placed[*block, "mlp", "up", "bias"].spec == P(None, "tensor")
    assert not any(leaf.note for leaf in placed.values())


def test_a_mesh_axis_splits_a_leaf_once():
    rules = ShardingRules(params=(("heads", ("tensor",)), ("head_dim", ("tensor",))))
    with pytest.raises(ConfigError, match=r"heads and head_dim both ask for it"):
        placements(published("bert", 64), make_mesh("tensor=8"), rules)
    # On a mesh where the axis splits nothing there is nothing to collide.
    placements(published("bert", 64), make_mesh("fsdp=8"), rules)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"params": (("embed", ("data",)),)}, "mesh axes among replica, fsdp, tensor"),
        ({"params": (("embed", "fsdp"),)}, "in a tuple; got 'fsdp'"),
        ({"params": (("embed", ("fsdp", "fsdp")),)}, "each once"),
        ({"params": (("embed", ("fsdp",)), ("embed", ()))}, "'embed' twice"),
        ({"activations": (("act_batch", ("x",)),)}, "sharding rule 'act_batch'"),
        ({"indivisible": "pad"}, "indivisible must be 'move', 'replicate' or 'error'"),
    ],
)
def test_rules_that_cannot_be_are_refused(wrong, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        ShardingRules(**wrong)


NAMES = ("layers", "embed", "vocab", "heads", "kv_heads", "mlp", "head_dim", None)


@given(
    dims=st.lists(
        st.tuples(st.sampled_from(NAMES), st.sampled_from((1, 2, 3, 4, 6, 8, 12, 30, 64))),
        min_size=1, max_size=4, unique_by=lambda d: d[0],
    ),
    shape=st.sampled_from((*SHAPES, "fsdp=2,tensor=4", "replica=4,tensor=2")),
    embed=st.sampled_from((("fsdp",), ("fsdp", "tensor"), ("replica", "fsdp"), ())),
    indivisible=st.sampled_from(("move", "replicate")),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_every_placement_is_possible_and_explained(dims, shape, embed, indivisible):
    """Whatever the leaf: a sharding JAX accepts, with a note exactly where it departs."""
    axes, sizes = zip(*dims, strict=True)
    wanted = (("embed", embed), ("vocab", ("tensor",)), ("mlp", ("replica",)))
    rules, mesh = ShardingRules(params=wanted, indivisible=indivisible), make_mesh(shape)
    asked = [tuple(a for a in dict(wanted).get(x, ()) if mesh.shape[a] > 1) for x in axes]
    leaf = Param(sizes, axes)
    everything = [a for part in asked for a in part]
    if len(set(everything)) < len(everything):
        with pytest.raises(ConfigError, match="twice by mesh axis"):
            sharding._place("leaf", leaf, mesh, rules)
        return
    placed = sharding._place("leaf", leaf, mesh, rules)
    part = placed.shard_shape(mesh)  # raises where JAX would refuse it
    spec = [*placed.spec, *[None] * (len(sizes) - len(placed.spec))]
    split = [() if s is None else (s,) if isinstance(s, str) else s for s in spec]
    used = [a for some in split for a in some]
    assert sorted(set(used)) == sorted(used)
    assert set(used) <= set(everything)
    assert (placed.note is None) == (split == asked)
    if indivisible == "move":
        for axis in set(everything) - set(used):  # nothing was left that it could have split
            n = mesh.shape[axis]
            assert all(p % n for p, x in zip(part, axes, strict=True) if x != "layers")
    if "layers" in axes:
        assert split[axes.index("layers")] == ()


@pytest.mark.parametrize(
    ("family", "role"), [(name, role) for name, cls in FAMILIES.items() for role in cls.roles]
)
def test_every_family_has_a_place(family, role):
    """Every leaf of every family, at its published size: known axes, no collision, less bytes."""
    known = {name for name, _ in sharding.DEFAULT_RULES.params}
    unsplit = {"layers", "head_dim", "embed_in", "embed_out", None}
    sides = {"encoder": BertConfig(), "decoder": BertConfig(), role: FAMILIES[family]()}
    model = EncoderDecoderModel(EncoderDecoderConfig(**sides))
    for shape in SHAPES:
        mesh = make_mesh(shape)
        placed = placements(model, mesh)
        assert {axis for leaf in placed.values() for axis in leaf.axes} <= known | unsplit
        whole = sum(math.prod(leaf.shape) for leaf in placed.values())
        part = sum(math.prod(leaf.shard_shape(mesh)) for leaf in placed.values())
        parts = math.prod(n for axis, n in mesh.shape.items() if axis != "replica")
        # Norms are whole along tensor, and untrained leaves everywhere: ALBERT's pooler is large.
        assert part <= (1.5 if family == "albert" else 1.1) * whole / parts, shape


# Batches -----------------------------------------------------------------------------------------


def test_batches_split_over_replica_and_fsdp():
    mesh = make_mesh("replica=2,fsdp=2,tensor=2")
    batch = {"input_ids": np.arange(24, dtype=np.int32).reshape(8, 3), "labels": np.ones((8, 5))}
    shardings = batch_shardings(mesh, batch)
    assert {s.spec for s in shardings.values()} == {P(("replica", "fsdp"))}
    placed = to_global(batch, mesh)
    assert placed["input_ids"].sharding.shard_shape((8, 3)) == (2, 3)
    assert np.array_equal(placed["input_ids"], batch["input_ids"])
    with pytest.raises(InputError, match=r"replica x fsdp = 4; labels has shape \(6, 5\)"):
        batch_shardings(mesh, {"labels": np.ones((6, 5))})
    with pytest.raises(InputError, match=r"x 3 micro-batches = 12; labels has shape \(8, 5\)"):
        batch_shardings(mesh, {"labels": batch["labels"]}, 3)
    with pytest.raises(InputError, match="must divide by 4"):
        to_global({"labels": np.ones((6, 5))}, mesh)


def processes(shape, order):
    """A mesh of the given sizes whose devices belong to the processes in `order`."""
    grid = np.array([SimpleNamespace(process_index=p) for p in order], object).reshape(shape)
    return SimpleNamespace(devices=grid, shape=dict(zip(AXES, shape, strict=True)))


def test_which_rows_a_process_feeds():
    four = processes((1, 8, 1), [0, 0, 1, 1, 2, 2, 3, 3])
    assert [data_shard(four, p) for p in range(4)] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    # Torus order: what counts is that each process has its own rows, as many as the others.
    torus = processes((1, 8, 1), [0, 0, 1, 1, 0, 0, 1, 1])
    assert [data_shard(torus, p) for p in range(2)] == [(0, 2), (1, 2)]
    # Where tensor joins processes, they feed the same rows.
    assert data_shard(processes((1, 1, 8), [0] * 4 + [1] * 4), 1) == (0, 1)
    joined = processes((1, 2, 4), [0, 0, 1, 1, 2, 2, 3, 3])
    assert [data_shard(joined, p) for p in range(4)] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    with pytest.raises(ConfigError, match="splits batches unevenly among 2 processes"):
        data_shard(processes((1, 3, 2), [0, 0, 0, 1, 1, 1]), 0)


# The state ---------------------------------------------------------------------------------------


def wide():
    """Two tiny sides whose dimensions eight devices divide."""
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8}
    size |= {"intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 24}
    ids = {"decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 2}
    return EncoderDecoderModel(
        EncoderDecoderConfig(encoder=BertConfig(**size), decoder=BertConfig(**size), **ids)
    )


def of_side(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, params)


OPTIMIZERS = {
    "adamw": lambda model: optax.adamw(1e-3),
    "lion": lambda model: optax.lion(1e-3),
    "masked": lambda model: optax.masked(optax.adamw(1e-3), model.trainable()),
    "chain": lambda model: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    "partition": lambda model: optax.partition(
        {"encoder": optax.adamw(1e-3), "decoder": optax.sgd(1e-2, momentum=0.9)}, of_side
    ),
    "accumulating": lambda model: optax.MultiSteps(optax.adamw(1e-3), 2).gradient_transformation(),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_live_where_their_parameters_do(name):
    model, mesh = wide(), make_mesh("fsdp=4,tensor=2")
    optimizer = OPTIMIZERS[name](model)
    placed = flatten_dict(param_shardings(model, mesh))
    state = abstract_state(model, optimizer, mesh, ema=True)
    assert jax.tree.structure(state) == jax.tree.structure(
        state_shardings(model, optimizer, mesh, ema=True)
    )
    seen = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        names = tuple(getattr(key, "key", None) for key in path)
        if leaf.ndim == 0:
            assert leaf.sharding.spec == P()
            continue
        owner = next(p for p in placed if p == names[-len(p) :])
        assert leaf.sharding == placed[owner], path
        seen += 1
    assert seen >= len(placed) - 2  # the pooler has no moments where it is masked
    assert jax.tree.all(
        jax.tree.map(lambda a, b: a.sharding == b.sharding, state.params, state.ema)
    )


def test_factored_statistics_keep_the_split_of_what_is_left_of_the_parameter():
    model, mesh = wide(), make_mesh("fsdp=4,tensor=2")
    optimizer = optax.adafactor(1e-3, min_dim_size_to_factor=8)
    state = abstract_state(model, optimizer, mesh)
    nodes = jax.tree.leaves(state.opt_state, is_leaf=lambda node: hasattr(node, "v_row"))
    factored = next(node for node in nodes if hasattr(node, "v_row"))
    up = ("decoder", "segment_0", "block_0", "mlp", "up", "kernel")
    row, column = flatten_dict(factored.v_row)[up], flatten_dict(factored.v_col)[up]
    found = {row.shape: row.sharding.spec, column.shape: column.sharding.spec}
    assert found == {(2, 32): P(None, "fsdp"), (2, 48): P(None, "tensor")}
    # Heads and head_dim as one dimension are split as heads are.
    owner = placements(model, mesh)[
        "decoder", "segment_0", "block_0", "self_attention", "query", "kernel"
    ]
    from jax_encdec.training.state import _like

    assert owner.shape == (2, 32, 8, 4)
    assert _like(owner, (2, 32), mesh).spec == P(None, "fsdp")
    assert _like(owner, (2, 12, 4), mesh).spec == P(None, None, None)


def test_our_own_optimizer_is_split_like_any_other():
    from jax_encdec.training.optimizer import OptimizerConfig, make_optimizer

    model, mesh = wide(), make_mesh("fsdp=4,tensor=2")
    placed = flatten_dict(param_shardings(model, mesh))
    for name in ("adamw", "lion", "adafactor"):
        optimizer = make_optimizer(OptimizerConfig(name=name), model, total_steps=10)
        state = abstract_state(model, optimizer, mesh)
        for path, leaf in flatten_dict(state.opt_state).items():
            owner = next((p for p in placed if p == path[-len(p) :]), None)
            if owner is None:
                assert leaf.ndim == 0, path
            elif leaf.shape == flatten_dict(model.param_shapes())[owner].shape:
                assert leaf.sharding == placed[owner]


@pytest.mark.parametrize("given_params", [False, True])
def test_the_state_is_made_in_its_shards(given_params):
    """Every array is born split, drawn or given; and the numbers do not depend on the mesh."""
    model, mesh = wide(), make_mesh("fsdp=8")
    plain = model.init_params(jax.random.key(3))
    tree = jax.tree.map(np.asarray, plain) if given_params else None
    state = init_state(model, optax.adamw(1e-3), mesh, params=tree, key=jax.random.key(3), ema=True)
    expected = state_shardings(model, optax.adamw(1e-3), mesh, ema=True)
    for leaf, place in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert held < 0.2 * sum(x.nbytes for x in jax.tree.leaves(state))
    for tree in (state.params, state.ema):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), tree, plain)


@pytest.mark.exhaustive
def test_no_device_holds_a_whole_parameter_while_they_are_drawn():
    model, mesh = wide(), make_mesh("fsdp=8")
    shardings = param_shardings(model, mesh)
    compiled = jax.jit(model.init_params, out_shardings=shardings).lower(jax.random.key(0))
    text = compiled.compile().as_text()
    assert "f32[64,4]" in text  # a table's part
    assert "f32[64,32]" not in text  # and nowhere the table


def test_given_arrays_stay_the_users():
    model = wide()
    params = model.init_params(jax.random.key(0))
    mesh = make_mesh(devices=jax.devices()[:1])
    state = init_state(model, optax.sgd(1.0), mesh, params=params)
    pointers = [
        {x.unsafe_buffer_pointer() for x in jax.tree.leaves(t)} for t in (params, state.params)
    ]
    assert not pointers[0] & pointers[1]


def test_a_tree_of_another_model_is_refused():
    mesh = make_mesh(devices=jax.devices()[:1])
    _, params = pair()
    with pytest.raises(InputError, match="params do not fit the model"):
        init_state(wide(), optax.sgd(1.0), mesh, params=params)


def test_half_precision_files_become_masters_in_the_models_dtype():
    model, params = pair()
    mesh = make_mesh("fsdp=8")
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    state = init_state(model, optax.sgd(1.0), mesh, params=params)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_tied_sides_are_one_leaf():
    model = EncoderDecoderModel(config("tied"))
    placed = placements(model, make_mesh("fsdp=8"))
    assert ("decoder", "embedding", "token") not in placed


def test_whole_models_have_a_place_too():
    half = BartConfig(d_model=64, encoder_attention_heads=8, decoder_attention_heads=8)
    model = EncoderDecoderModel(EncoderDecoderConfig(encoder=half, decoder=half, whole=True))
    mesh = make_mesh("fsdp=2,tensor=4")
    table = next(p for path, p in placements(model, mesh).items() if path[-1] == "token")
    assert table.spec == P(None, ("fsdp", "tensor"))  # 50265 rows
    assert NamedSharding(mesh, table.spec).shard_shape(table.shape) == (50265, 8)
