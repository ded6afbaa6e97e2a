"""One step of training, `(state, batch) -> (state, metrics)`, and one of evaluation.

Both are `jax.jit` functions with the shardings of `sharding.py` on everything that goes in and
comes out; the old state is given away. The loss is a sum over target tokens, divided once by their
number in the whole batch: over all devices and all micro-batches, so that neither the mesh nor
accumulation changes what is computed. Dropout is a function of (seed, step, micro-batch).

Axis letters: B rows of the global batch, S source length, T target length, M micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from jax_encdec.encoder_decoder import EncoderDecoderModel
from jax_encdec.errors import InputError
from jax_encdec.layers import flatten
from jax_encdec.loss import IGNORE
from jax_encdec.training.optimizer import Optimizer
from jax_encdec.training.sharding import (
    DEFAULT_RULES,
    LeafPath,
    ShardingRules,
    batch_shardings,
    param_shardings,
    replicated,
    rows,
    used_shardings,
)
from jax_encdec.training.state import TrainState, init_state, state_shardings

__all__ = ["Step", "TrainState", "init_state", "make_eval_step", "make_train_step"]

Leaves = dict[LeafPath, jax.Array]
Batch = Mapping[str, Any]
"""int32 arrays: `input_ids`, `attention_mask` `[B, S]`, `labels` `[B, T]` (-100: no loss) and, when
packed, `segment_ids` `[B, S]` and `decoder_segment_ids` `[B, T]`; or any other argument of
`model.loss`."""


@dataclass(frozen=True)
class Step:
    """A compiled function of (state or parameters, batch), called under its mesh.

    A call compiles once per shape of the batch. `lower` takes arrays or `jax.ShapeDtypeStruct`s.
    """

    mesh: Mesh
    jitted: Any
    parts: int = 1
    """Into how many micro-batches a batch is split."""
    ema: bool | None = None
    """Whether the state must hold a moving average; None: there is no state."""

    def __call__(self, state: Any, batch: Batch) -> Any:
        """Run the function, compiled for the shapes of `batch`."""
        self._check(state, batch)
        with jax.set_mesh(self.mesh):
            return self.jitted(state, dict(batch))

    def lower(self, state: Any, batch: Batch) -> Any:
        """The step lowered for these shapes: `.as_text()`, `.compile()`."""
        self._check(state, batch)
        with jax.set_mesh(self.mesh):
            return self.jitted.lower(state, dict(batch))

    def _check(self, state: Any, batch: Batch) -> None:
        batch_shardings(self.mesh, batch, self.parts)
        if self.ema is not None and self.ema != (state.ema is not None):
            have = "keeps none" if self.ema else "keeps one"
            raise InputError(
                f"the step was made {'with' if self.ema else 'without'} ema_decay, but the state "
                f"{have}: give ema={self.ema} to init_state"
            )


def make_train_step(
    model: EncoderDecoderModel,
    optimizer: Optimizer | optax.GradientTransformation,
    mesh: Mesh,
    rules: ShardingRules = DEFAULT_RULES,
    *,
    seed: int = 0,
    accumulate: int = 1,
    label_smoothing: float = 0.0,
    loss_chunk: int | None = None,
    dropout: bool = True,
    ema_decay: float | None = None,
    skip_non_finite: bool = False,
) -> Step:
    """Make the function `(state, batch) -> (state, metrics)` that takes one optimizer step.

    The state that goes in is given away (donated), so that the new one takes its memory.

    Args:
        model: parameters are updated in their own dtype (float32 masters); the computation is in
            `model.dtype`. Activation rules are taken from `rules`.
        optimizer: of `make_optimizer`, or any of optax's; clips, schedules and masks by itself.
            What `model.trainable()` leaves out is never changed.
        seed: of dropout.
        accumulate: number of micro-batches into which the batch is split, one after the other
            through forward and backward pass; their gradients are summed in float32.
        label_smoothing: mass of each target that is spread over the vocabulary, 0 to 1.
        loss_chunk: target positions whose logits exist at once; None: all.
        dropout: False trains without.
        ema_decay: how much of the moving average stays at each step; the state must have one.
        skip_non_finite: a step whose loss or gradients are not finite counts, and changes nothing
            else. Both states are then held at once.

    Returns:
        The step. `metrics` are float32 scalars: `loss` (mean nats per target token, unsmoothed),
        `objective` (what was minimised), `grad_norm` (of the trained parameters, before clipping),
        `target_tokens`, `source_tokens`, `accuracy` (of the next token), `finite` (1, or 0 where
        loss or gradients are not).

    Raises:
        ConfigError: the rules do not fit the model, see `placements`.
        InputError: an option out of range; on a call: rows that mesh and `accumulate` do not
            divide, or a state that keeps an average when the step does not, or the reverse.
    """
    if type(accumulate) is not int or accumulate < 1:
        raise InputError(f"accumulate must be a positive number of micro-batches; got {accumulate}")
    if ema_decay is not None and not 0.0 <= ema_decay < 1.0:
        raise InputError(f"ema_decay must be from 0 to below 1; got {ema_decay}")
    if ema_decay is not None and model.param_dtype != jnp.float32:
        raise InputError(
            f"a moving average needs float32 parameters, as in {model.param_dtype} its small steps "
            f"round to nothing; set param_dtype to float32, or ema_decay to none"
        )
    model = on_mesh(model, mesh, rules)
    used = used_shardings(model, mesh, rules)
    trained = trained_leaves(model, optimizer)
    placed = {p: s for p, s in flatten(param_shardings(model, mesh, rules)).items() if p in trained}

    def objective(moving: Leaves, still: Leaves, batch: Batch, weight: Any, key: Any) -> Any:
        out: Any = model.apply(
            {"params": gathered(unflatten_dict(moving | still), used)},
            **batch,
            label_smoothing=label_smoothing,
            loss_chunk=loss_chunk,
            deterministic=not dropout,
            rngs={"dropout": key} if dropout else None,
            method="loss",
        )
        sums = {"nll_sum": out.nll_sum, "loss_sum": out.loss_sum, "correct": out.correct}
        # Divided here and not at the end, gradients need no pass of their own for it.
        return out.loss_sum / weight, sums

    def gradients(*args: Any) -> tuple[dict[str, jax.Array], Leaves]:
        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(*args)
        # Each device needs the sum of its own part only: a reduce-scatter, no all-reduce.
        return sums, grads if mesh.size == 1 else jax.lax.with_sharding_constraint(grads, placed)

    def summed(moving: Leaves, still: Leaves, batch: Batch, weight: Any, key: Any) -> Any:
        """Sums and gradients over the micro-batches, one at a time."""
        if accumulate == 1:
            return gradients(moving, still, batch, weight, jax.random.fold_in(key, 0))

        def add(total: Any, micro: Any) -> tuple[Any, None]:
            part, number = micro
            new = gradients(moving, still, part, weight, jax.random.fold_in(key, number))
            return jax.tree.map(lambda t, n: t + n.astype(t.dtype), total, new), None

        micro = {name: split_rows(x, accumulate, mesh) for name, x in batch.items()}
        first = {name: x[0] for name, x in micro.items()}
        shapes = jax.eval_shape(gradients, moving, still, first, weight, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
        if mesh.size > 1:
            zeros = zeros[0], jax.lax.with_sharding_constraint(zeros[1], placed)
        return jax.lax.scan(add, zeros, (micro, jnp.arange(accumulate)))[0]

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        tokens = jnp.sum(batch["labels"] != IGNORE).astype(jnp.float32)
        weight = jnp.maximum(tokens, 1.0)
        leaves = flatten(state.params)
        moving = {path: leaves.pop(path) for path in trained}
        sums, grads = summed(moving, leaves, batch, weight, key)
        norm, params, opt_state = updated(optimizer, grads, state)
        ema = state.ema
        if ema_decay is not None:
            ema = averaged(ema, params, trained, ema_decay)
        finite = jnp.isfinite(sums["loss_sum"]) & jnp.isfinite(norm)
        new = TrainState(state.step + 1, params, opt_state, ema)
        if skip_non_finite:
            new = jax.tree.map(lambda n, old: jnp.where(finite, n, old), new, state)
            new = new.replace(step=state.step + 1)
        mask = batch.get("attention_mask")
        source = batch["input_ids"].size if mask is None else jnp.sum(mask)
        metrics = {
            "loss": sums["nll_sum"] / weight,
            "objective": sums["loss_sum"] / weight,
            "grad_norm": norm,
            "target_tokens": tokens,
            "source_tokens": source,
            "accuracy": sums["correct"] / weight,
            "finite": finite,
        }
        metrics = {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}
        return new, metrics

    shardings = state_shardings(model, optimizer, mesh, rules, ema=ema_decay is not None)
    jitted = jax.jit(
        step,
        in_shardings=(shardings, rows(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
    return Step(mesh, jitted, accumulate, ema_decay is not None)


def trained_leaves(model: EncoderDecoderModel, optimizer: Any) -> tuple[LeafPath, ...]:
    """The leaves that a step changes; of the others not even a gradient is computed."""
    own = optimizer.trained if isinstance(optimizer, Optimizer) else model.trainable()
    return tuple(path for path, trained in flatten(own).items() if trained)


def updated(optimizer: Any, grads: Leaves, state: TrainState) -> tuple[jax.Array, Any, Any]:
    """The gradients' norm, the new parameters, the optimizer's new state."""
    if isinstance(optimizer, Optimizer):  # one pass over each trained leaf
        tree = unflatten_dict(grads)
        norm = optimizer.gradient_norm(tree, state.opt_state)
        return norm, *optimizer.apply(tree, state.opt_state, state.params)
    zeros = {p: jnp.zeros_like(x) for p, x in flatten(state.params).items() if p not in grads}
    updates, opt_state = optimizer.update(
        unflatten_dict(grads | zeros), state.opt_state, state.params
    )
    params = flatten(optax.apply_updates(state.params, updates))
    kept = {path: x for path, x in flatten(state.params).items() if path in zeros}
    return optax.tree.norm(grads), unflatten_dict(params | kept), opt_state


def averaged(ema: Any, params: Any, trained: tuple[LeafPath, ...], decay: float) -> Any:
    """The moving average after a step; what is not trained is the parameters' own."""
    old, new = flatten(ema), flatten(params)
    moved = {path: decay * old[path] + (1.0 - decay) * new[path] for path in trained}
    return unflatten_dict(old | moved)


def make_eval_step(
    model: EncoderDecoderModel,
    mesh: Mesh,
    rules: ShardingRules = DEFAULT_RULES,
    *,
    loss_chunk: int | None = None,
) -> Step:
    """Make the function `(params, batch) -> sums`, without dropout or smoothing.

    Returns:
        The step; `sums` are float32 scalars over the global batch: `nll_sum` (nats), `weight`
        (target tokens) and `correct` (next tokens that were the likeliest).
    """
    model = on_mesh(model, mesh, rules)
    used = used_shardings(model, mesh, rules)

    def step(params: Any, batch: Batch) -> dict[str, jax.Array]:
        params = gathered(params, used)
        out: Any = model.apply({"params": params}, **batch, loss_chunk=loss_chunk, method="loss")
        return {"nll_sum": out.nll_sum, "weight": out.loss_weight, "correct": out.correct}

    shardings = param_shardings(model, mesh, rules), rows(mesh)
    return Step(mesh, jax.jit(step, in_shardings=shardings, out_shardings=replicated(mesh)))


def on_mesh(model: EncoderDecoderModel, mesh: Mesh, rules: ShardingRules) -> EncoderDecoderModel:
    """The model with its activations laid out by the rules; on one device, as it is."""
    if mesh.size == 1:
        return model
    return model.clone(execution=replace(model.execution, activation_rules=rules.activations))


def gathered(params: Any, used: Any) -> Any:
    """Parameters as they are used, see `used_shardings`; gradients go back the same way."""
    return params if used is None else jax.lax.with_sharding_constraint(params, used)


def split_rows(x: jax.Array, parts: int, mesh: Mesh) -> jax.Array:
    """`[B, ...]` -> micro-batches `[M, B / M, ...]`, none of which moves a row between devices.

    Micro-batch m is every M-th row from m: of each device's rows, its share.
    """
    x = jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
    if mesh.size == 1:
        return x
    spec = jax.sharding.PartitionSpec(None, *rows(mesh).spec)
    return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(mesh, spec))
