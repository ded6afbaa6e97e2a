"""One training run, however it is cut up: meshes, packing, micro-batches; and what a step promises.

The model is small enough that eight fake devices divide every dimension that rules split.
"""

from __future__ import annotations

import collections
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_encdec import BertConfig, EncoderDecoderConfig, EncoderDecoderModel
from jax_encdec.errors import InputError
from jax_encdec.execution import Execution
from jax_encdec.training.optimizer import OptimizerConfig, make_optimizer
from jax_encdec.training.sharding import make_mesh
from jax_encdec.training.state import TrainState, abstract_state, init_state
from jax_encdec.training.step import make_eval_step, make_train_step

VOCAB, STEPS, ROWS, LENGTH = 72, 20, 16, 8
MESHES = {
    "replica": "replica=8",
    "fsdp": "fsdp=8",
    "tensor": "tensor=8",
    "all": "replica=2,fsdp=2,tensor=2",
}


@functools.cache
def model(**more) -> EncoderDecoderModel:
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 8}
    size |= {"intermediate_size": 48, "vocab_size": VOCAB, "max_position_embeddings": 40}
    size |= {"initializer_range": 0.2} | more
    ids = {"decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 2}
    return EncoderDecoderModel(
        EncoderDecoderConfig(encoder=BertConfig(**size), decoder=BertConfig(**size), **ids)
    )


@functools.cache
def params():
    """Drawn once; kept on the host, for steps give their state away."""
    return jax.tree.map(np.asarray, model().init_params(jax.random.key(0)))


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def pairs(seed: int, rows: int = ROWS):
    """Sources and targets of uneven length, at most half a row, as lists of ids."""
    rng = np.random.default_rng(seed)

    def text():
        return rng.integers(3, VOCAB, rng.integers(2, LENGTH // 2 + 1)).astype(np.int32)

    return [(text(), text()) for _ in range(rows)]


def batch(examples, length: int = LENGTH):
    """One pair per row."""
    out = {
        "input_ids": np.zeros((len(examples), length), np.int32),
        "attention_mask": np.zeros((len(examples), length), np.int32),
        "labels": np.full((len(examples), length), -100, np.int32),
    }
    for row, (source, target) in enumerate(examples):
        out["input_ids"][row, : len(source)] = source
        out["attention_mask"][row, : len(source)] = 1
        out["labels"][row, : len(target)] = target
    return out


def packed(examples, length: int = LENGTH):
    """Two pairs per row, told apart by segments."""
    shape = (len(examples) // 2, length)
    out = {name: np.zeros(shape, np.int32) for name in ("input_ids", "attention_mask")}
    out |= {name: np.zeros(shape, np.int32) for name in ("segment_ids", "decoder_segment_ids")}
    out["labels"] = np.full(shape, -100, np.int32)
    for row in range(shape[0]):
        s = t = 0
        for number, (source, target) in enumerate(examples[2 * row : 2 * row + 2], 1):
            out["input_ids"][row, s : s + len(source)] = source
            out["segment_ids"][row, s : s + len(source)] = number
            out["labels"][row, t : t + len(target)] = target
            out["decoder_segment_ids"][row, t : t + len(target)] = number
            s, t = s + len(source), t + len(target)
        out["attention_mask"][row, :s] = 1
    return out


def optimizer(**more):
    config = {"learning_rate": 2e-3, "schedule": "constant", "weight_decay": 0.01} | more
    return make_optimizer(OptimizerConfig(**config), model(), total_steps=STEPS)


def train(mesh, *, make=batch, chosen=None, **options):
    """Losses and gradient norms of a run, the program that made them, what it was made from."""
    chosen = optimizer() if chosen is None else chosen
    step = make_train_step(model(), chosen, mesh, dropout=False, **options)
    state = init_state(model(), chosen, mesh, params=params())
    lowered = step.lower(state, make(pairs(0)))
    program = lowered.compile()
    batches = [jax.device_put(make(pairs(i)), program.input_shardings[0][1]) for i in range(4)]
    seen = []
    for number in range(STEPS):
        state, metrics = program(state, batches[number % 4])
        seen.append((metrics["loss"], metrics["grad_norm"]))
    return Run(np.array(seen), state, lowered.as_text(), program.as_text())


class Run(NamedTuple):
    seen: np.ndarray
    state: TrainState
    lowered: str
    compiled: str

    @property
    def constraints(self) -> int:
        return self.lowered.count("sharding_constraint")

    @property
    def collectives(self) -> collections.Counter[str]:
        kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
        return collections.Counter(re.findall(rf" ({kinds})(?:-start)?\(", self.compiled))

    @property
    def whole_layers(self) -> list[str]:
        """Arrays as large as all layers of a parameter together."""
        shapes = "2,32,8,4|2,8,4,32|2,32,48|2,48,32"
        return sorted(set(re.findall(rf"\w+\[(?:{shapes})\]", self.compiled)))


@functools.cache
def reference() -> Run:
    """The run of one device, one batch, one pair per row."""
    return train(one_device())


def assert_same_run(run: Run, expected: Run, tolerance=1e-5):
    assert expected.seen[-1, 0] < 0.8 * expected.seen[0, 0]  # it learns
    np.testing.assert_allclose(run.seen[:, 0], expected.seen[:, 0], rtol=tolerance)
    np.testing.assert_allclose(run.seen[:, 1], expected.seen[:, 1], rtol=20 * tolerance)


# The same run ------------------------------------------------------------------------------------

HOW = {
    "replica": (batch, 1),
    "fsdp": (packed, 1),
    "tensor": (batch, 4),
    "all": (packed, 2),
}
"""Each mesh with rows packed or not, in how many micro-batches; all others are exhaustive."""


@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_trains_alike(name):
    """The run of one device; and the programs communicate as their kind should."""
    mesh, (make, accumulate) = make_mesh(MESHES[name]), HOW[name]
    run = train(mesh, make=make, accumulate=accumulate)
    assert_same_run(run, reference())
    if name == "replica":  # data parallel: sums, and every device has every parameter
        assert set(run.collectives) == {"all-reduce"}
    elif name == "fsdp":  # parameters gathered, layer by layer: nowhere all layers at once
        assert run.collectives["all-gather"] > 10
        assert not run.whole_layers
    elif name == "tensor":  # work split inside of rows: sums, and no parameter is ever gathered
        assert set(run.collectives) == {"all-reduce"}
        assert not run.whole_layers
    # Nothing shuffles activations from one layout to another.
    assert not run.collectives["all-to-all"]
    assert not run.collectives["collective-permute"]
    assert run.constraints > 40
    # The new state lies as the old one did.
    expected = abstract_state(model(), optimizer(), mesh)
    for leaf, place in zip(*map(jax.tree.leaves, (run.state, expected)), strict=True):
        assert leaf.sharding.is_equivalent_to(place.sharding, leaf.ndim)


def test_one_device_is_asked_for_nothing():
    """No collectives, no constraints: the program is that of a model that knows no mesh."""
    assert not reference().collectives
    assert not reference().constraints


@pytest.mark.exhaustive
@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("make", [batch, packed])
@pytest.mark.parametrize("name", ["one", *MESHES])
def test_any_combination_trains_alike(name, make, accumulate, chunk):
    if make is packed and accumulate == 2 and name in ("replica", "fsdp"):
        pytest.skip("eight rows for eight devices are one micro-batch")
    mesh = make_mesh(MESHES[name]) if name in MESHES else one_device()
    run = train(mesh, make=make, accumulate=accumulate, loss_chunk=chunk)
    assert_same_run(run, reference())


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["adafactor", "lion"])
@pytest.mark.parametrize("name", MESHES)
def test_every_optimizer_trains_alike_on_every_mesh(name, kind):
    chosen = optimizer(name=kind, learning_rate=1e-3)
    expected = train(one_device(), chosen=chosen)
    run = train(make_mesh(MESHES[name]), chosen=chosen)
    # Lion takes signs: a gradient that rounds to either side of zero is a step either way.
    rtol = 1e-3 if kind == "lion" else 1e-5
    np.testing.assert_allclose(run.seen[:, 0], expected.seen[:, 0], rtol=rtol)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("kind", ["straight", "full", "dots"])
def test_every_execution_trains_alike_on_every_mesh(kind, name, monkeypatch):
    options = {"scan_layers": False} if kind == "straight" else {"remat": kind}
    other = model().clone(execution=Execution(**options))
    expected = reference()
    monkeypatch.setitem(globals(), "model", lambda: other)
    assert_same_run(train(make_mesh(MESHES[name])), expected)


# What a step promises ----------------------------------------------------------------------------


@functools.cache
def small() -> EncoderDecoderModel:
    """Quick to compile: what it is to show does not depend on size."""
    size = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    own = model(**size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    return own.clone(execution=Execution(scan_layers=False))


@functools.cache
def small_params():
    return jax.tree.map(np.asarray, small().init_params(jax.random.key(1)))


@functools.cache
def plain_step():
    options = {"dropout": False, "label_smoothing": 0.1, "ema_decay": 0.9}
    return make_train_step(small(), optax.sgd(0.1), one_device(), **options)


@functools.cache
def plain_model():
    """The model's own outputs for a batch."""
    return jax.jit(lambda given: small().apply({"params": small_params()}, **given))


def plain_state(tree):
    return init_state(small(), optax.sgd(0.1), one_device(), params=tree, ema=True)


def test_metrics_average_and_step():
    """The metrics are what the model's own outputs say; the average follows the parameters."""
    given, state = batch(pairs(5)), plain_state(small_params())
    new, metrics = plain_step()(state, given)
    out = jax.tree.map(np.asarray, plain_model()(given))
    counted = given["labels"] != -100
    picked = np.argmax(out.logits, -1) == given["labels"]
    uniform = -np.mean(jax.nn.log_softmax(out.logits), axis=-1)[counted].mean()
    expected = {
        "loss": out.loss,
        "objective": 0.9 * out.loss + 0.1 * uniform,
        "accuracy": picked[counted].mean(),
        "target_tokens": counted.sum(),
        "source_tokens": given["attention_mask"].sum(),
        "finite": 1.0,
    }
    assert set(metrics) == {*expected, "grad_norm"}
    for name, value in expected.items():
        assert metrics[name].dtype == jnp.float32
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    assert int(new.step) == 1
    after = jax.tree.map(np.asarray, new.params)
    moved = jax.tree.map(lambda p, q: (p - q) / 0.1, small_params(), after)
    norm = np.sqrt(sum(np.vdot(leaf, leaf) for leaf in jax.tree.leaves(moved)))
    np.testing.assert_allclose(norm, metrics["grad_norm"], rtol=1e-4)
    average = jax.tree.map(lambda p, q: 0.9 * p + 0.1 * q, small_params(), after)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), new.ema, average)
    # Given away: the new parameters took the old ones' memory.
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_numbers_that_are_not_finite_are_reported():
    broken = jax.tree.map(np.copy, small_params())
    broken["encoder"]["embedding"]["token"][:] = np.inf
    _, metrics = plain_step()(plain_state(broken), batch(pairs(0)))
    assert float(metrics["finite"]) == 0.0


def test_an_update_that_is_not_finite_can_be_left_out():
    options = {"dropout": False, "ema_decay": 0.9, "skip_non_finite": True}
    step = make_train_step(small(), optax.adam(0.1), one_device(), **options)
    state = init_state(small(), optax.adam(0.1), one_device(), params=small_params(), ema=True)
    broken = jax.tree.map(np.copy, small_params())
    broken["encoder"]["embedding"]["token"][:] = np.inf
    before = jax.tree.map(np.array, state.replace(params=broken))
    after, metrics = step(state.replace(params=jax.tree.map(jnp.asarray, broken)), batch(pairs(0)))
    assert float(metrics["finite"]) == 0.0
    jax.tree.map(np.testing.assert_array_equal, after, before.replace(step=np.int32(1)))
    state = init_state(small(), optax.adam(0.1), one_device(), params=small_params(), ema=True)
    after, metrics = step(state, batch(pairs(0)))
    assert float(metrics["finite"]) == 1.0
    moved = jax.tree.map(lambda p, q: bool(np.any(p != q)), small_params(), after.params)
    assert any(jax.tree.leaves(moved))


def test_an_average_of_bfloat16_parameters_is_refused():
    with pytest.raises(InputError, match="needs float32 parameters"):
        make_train_step(
            small().clone(param_dtype="bfloat16"), optax.sgd(0.1), one_device(), ema_decay=0.9
        )


@pytest.mark.parametrize("mesh", ["replica=8", "fsdp=8"])
def test_the_state_shares_no_memory_with_what_it_is_made_of(mesh):
    """Not even where two leaves are one array (cross-attention copied from self-attention)."""
    given = jax.tree.map(jnp.asarray, small_params())
    leaves = jax.tree.leaves(given)
    twins = [leaf for leaf in leaves if leaf.shape == leaves[-1].shape]
    assert len(twins) > 1
    given = jax.tree.map(lambda leaf: twins[0] if leaf.shape == twins[0].shape else leaf, given)
    state = init_state(small(), optax.sgd(0.1), make_mesh(mesh), params=given)
    buffers = collections.Counter(
        (shard.device, shard.data.unsafe_buffer_pointer())
        for leaf in jax.tree.leaves((state.params, given))
        for shard in leaf.addressable_shards
    )
    own = {id(leaf): leaf for leaf in jax.tree.leaves(given)}
    shards = sum(len(leaf.addressable_shards) for leaf in jax.tree.leaves(state.params))
    assert len(buffers) == shards + len(own)


def test_a_batch_without_targets_moves_nothing():
    given = batch(pairs(0))
    given["labels"][:] = -100
    state, metrics = plain_step()(plain_state(small_params()), given)
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0.0
    assert float(metrics["finite"]) == 1.0
    jax.tree.map(np.testing.assert_array_equal, state.params, small_params())


def test_dropout_is_a_function_of_seed_step_and_micro_batch():
    """The same step drops the same, however it was reached; another one, or another micro-batch,
    does not."""
    still, row = optax.sgd(0.0), batch(pairs(3, 1))

    def losses(step, start, given):
        state = init_state(small(), still, one_device(), params=small_params())
        state = state.replace(step=jnp.asarray(start, jnp.int32))
        found = []
        for _ in range(2):
            state, metrics = step(state, given)
            found.append(float(metrics["loss"]))
        return found

    step = make_train_step(small(), still, one_device(), seed=2)
    first = losses(step, 0, row)
    assert first == losses(step, 0, row)
    assert abs(first[0] - first[1]) > 1e-3
    assert losses(step, 1, row)[0] == first[1]
    # Did each micro-batch drop the same, the loss would be that of one row, four times.
    split = make_train_step(small(), still, one_device(), seed=2, accumulate=4)
    four = {name: np.repeat(x, 4, axis=0) for name, x in row.items()}
    assert abs(losses(split, 0, four)[0] - first[0]) > 1e-3
    state = init_state(small(), still, one_device(), params=small_params())
    texts = [
        make_train_step(small(), still, one_device(), seed=seed).lower(state, row).as_text()
        for seed in (2, 2, 3)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_half_precision_computes_over_float32_masters():
    half = small().clone(dtype="bfloat16")
    chosen = make_optimizer(OptimizerConfig(), half, total_steps=9)
    state = init_state(half, chosen, one_device(), params=small_params())
    step = make_train_step(half, chosen, one_device(), dropout=False, accumulate=2)
    text = step.lower(state, batch(pairs(0))).as_text()
    assert re.search(r"dot_general.*bf16", text)
    state, metrics = step(state, batch(pairs(0)))
    exact = plain_model()(batch(pairs(0))).loss
    np.testing.assert_allclose(metrics["loss"], exact, rtol=0.01)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def test_evaluation_sums():
    given = batch(pairs(7))
    out = plain_model()(given)
    sums = make_eval_step(small(), one_device())(small_params(), given)
    np.testing.assert_allclose(sums["nll_sum"], out.loss_sum, rtol=1e-5)
    assert float(sums["weight"]) == (given["labels"] != -100).sum()
    assert float(sums["correct"]) == (np.argmax(out.logits, -1) == given["labels"]).sum()


def test_what_cannot_be_done_is_said_in_a_sentence():
    mesh, chosen = make_mesh("fsdp=8"), optax.sgd(0.1)
    with pytest.raises(InputError, match="accumulate must be a positive number"):
        make_train_step(model(), chosen, mesh, accumulate=0)
    with pytest.raises(InputError, match=r"ema_decay must be from 0 to below 1; got 1\.0"):
        make_train_step(model(), chosen, mesh, ema_decay=1.0)
    step = make_train_step(model(), chosen, mesh, accumulate=2)
    state = abstract_state(model(), chosen, mesh)
    with pytest.raises(InputError, match=r"fsdp x 2 micro-batches = 16; input_ids has shape \(8, "):
        step(state, batch(pairs(0, 8)))
    averaging = make_train_step(model(), chosen, mesh, ema_decay=0.9)
    with pytest.raises(InputError, match="with ema_decay, but the state keeps none"):
        averaging(state, batch(pairs(0)))
