"""From a configuration to everything that a run needs, in the order in which one follows from
another: mesh, tokenizers and model, data, optimizer, compiled steps.

A run that starts loads its model as the configuration says; one that goes on takes configuration
and tokenizers from its folder and the weights from its checkpoint, whatever has become of the
files that it once started from. What the caller of `train` passes takes the place of each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jax_encdec.attention_kernels import resolve_attention
from jax_encdec.config import Attention
from jax_encdec.encoder_decoder import EncoderDecoderModel
from jax_encdec.errors import ConfigError, InputError
from jax_encdec.layers import flatten
from jax_encdec.pair_params import model_params
from jax_encdec.tokenization import TokenizerPair
from jax_encdec.training import models, run_folder, scores
from jax_encdec.training.batches import Batches
from jax_encdec.training.chips import peak_flops
from jax_encdec.training.config import TrainingConfig
from jax_encdec.training.dataset import TokenizedData, tokenize
from jax_encdec.training.flops import model_flops
from jax_encdec.training.optimizer import Optimizer, make_optimizer
from jax_encdec.training.sharding import ShardingRules, check_rows, data_shard, make_mesh
from jax_encdec.training.state import TrainState, abstract_state, init_state
from jax_encdec.training.step import Step, make_eval_step, make_train_step

Pairs = Sequence[tuple[str, str]]
"""(source, target) texts."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What the caller of `train` has already."""

    model: EncoderDecoderModel | None = None
    params: Any = None
    tokenizers: TokenizerPair | None = None
    train: Pairs | TokenizedData | None = None
    validation: Pairs | TokenizedData | None = None
    test: Pairs | TokenizedData | None = None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run is made of; nothing of it changes while it goes on."""

    config: TrainingConfig
    mesh: jax.sharding.Mesh
    rules: ShardingRules
    model: EncoderDecoderModel
    tokenizers: TokenizerPair
    batches: Batches
    validation: TokenizedData | None
    test: TokenizedData | None
    total_steps: int
    optimizer: Optimizer
    step: Step
    evaluate: Step
    initial: Callable[[], TrainState]
    """Make the state of step 0; may be called once."""
    notes: tuple[str, ...] = ()

    @property
    def ema(self) -> bool:
        """Whether an average of the parameters is kept."""
        return bool(self.optimizer.config.ema_decay)

    def abstract_state(self) -> TrainState:
        """What a checkpoint is restored into."""
        return abstract_state(self.model, self.optimizer, self.mesh, self.rules, ema=self.ema)


def assemble(config: TrainingConfig, given: Given, *, folder: Path, resuming: bool) -> Parts:
    """Build the parts of a run.

    Args:
        config: resolved.
        given: what the caller passed.
        folder: of the run.
        resuming: weights will come from a checkpoint, so that none are loaded.

    Raises:
        EncDecError: some part of the configuration cannot be followed; the message says which.
    """
    execution, run = config.execution, config.run
    mesh = make_mesh(execution.mesh)
    rules = ShardingRules(indivisible=execution.indivisible)
    check_rows(config.data.batch_size, mesh, execution.accumulate)
    data_shard(mesh)  # refuses a mesh that gives the processes unequal parts
    _check_given(given)
    model, params, tokenizers, notes = _model(config, given, mesh, rules, folder, resuming)
    data = {
        split: _data(config, given, split, tokenizers, model)
        for split in ("train", "validation", "test")
    }
    notes += tuple(f"{split}: {note}" for split, d in data.items() if d for note in d.notes)
    train = data["train"]
    if train is None:
        raise ConfigError("there is nothing to train on: name data.train, or pass train_data")
    batches = Batches(
        train,
        batch_size=config.data.batch_size,
        seed=run.seed,
        source_buckets=config.data.source_buckets,
        target_buckets=config.data.target_buckets,
        max_shapes=config.data.max_shapes,
        pack=config.data.pack,
        shuffle=config.data.shuffle,
        drop_last=config.data.drop_last,
    )
    if _scored(config, data):
        scores.check_metrics(config.evaluation.metrics)
    longest = int(train.target.lengths.max())
    model = models.with_generation(model, config, longest)
    total_steps = run.total_steps(batches.steps_per_epoch(0))
    optimizer = make_optimizer(config.optimizer, model, total_steps)
    ema_decay = optimizer.config.ema_decay or None
    step = make_train_step(
        model,
        optimizer,
        mesh,
        rules,
        seed=run.seed,
        accumulate=execution.accumulate,
        label_smoothing=execution.label_smoothing,
        loss_chunk=execution.loss_chunk,
        ema_decay=ema_decay,
        skip_non_finite=run.on_non_finite == "continue",
    )

    weights = [params]
    del params  # Once they are placed, nothing here keeps them alive.

    def initial() -> TrainState:
        key, ema = jax.random.key(run.seed), ema_decay is not None
        return init_state(model, optimizer, mesh, rules, params=weights.pop(), key=key, ema=ema)

    return Parts(
        config=config,
        mesh=mesh,
        rules=rules,
        model=model,
        tokenizers=tokenizers,
        batches=batches,
        validation=data["validation"],
        test=data["test"],
        total_steps=total_steps,
        optimizer=optimizer,
        step=step,
        evaluate=make_eval_step(model, mesh, rules, loss_chunk=execution.loss_chunk),
        initial=initial,
        notes=notes,
    )


def _check_given(given: Given) -> None:
    if given.params is not None and given.model is None:
        raise InputError("params were passed without the model that they belong to: pass model=...")
    tokenizers = given.tokenizers
    if tokenizers is not None and not isinstance(tokenizers, TokenizerPair):
        raise InputError(
            f"tokenizers must be a TokenizerPair; got {type(tokenizers).__name__}: one for both "
            f"sides is TokenizerPair(source=tokenizer, target=tokenizer)"
        )


def _model(
    config: TrainingConfig,
    given: Given,
    mesh: jax.sharding.Mesh,
    rules: ShardingRules,
    folder: Path,
    resuming: bool,
) -> tuple[EncoderDecoderModel, Any, TokenizerPair, tuple[str, ...]]:
    """The model, its parameters (None: to be drawn, or to be restored), and the tokenizers."""
    if resuming and (given.model is None or given.tokenizers is None):
        model, tokenizers = run_folder.read_start(folder)
        model = given.model or models.configured(model, config)
        return model, None, given.tokenizers or tokenizers, ()
    if given.model is not None:
        tokenizers = given.tokenizers or models.load_tokenizers(config)
        return given.model, given.params, tokenizers, ()
    tokenizers = given.tokenizers or models.load_tokenizers(config)
    loaded = models.load_model(config, mesh, rules)
    return loaded.model, loaded.params, tokenizers, tuple(loaded.notes)


def _data(
    config: TrainingConfig,
    given: Given,
    split: str,
    tokenizers: TokenizerPair,
    model: EncoderDecoderModel,
) -> TokenizedData | None:
    """A split's token ids, from what was passed or from files; None where there is neither."""
    pairs = getattr(given, split)
    if isinstance(pairs, TokenizedData):
        return pairs
    source = pairs if pairs is not None else getattr(config.data, split)
    if not len(source):
        return None
    return tokenize(source, tokenizers, config.data, split, model=model)


def _scored(config: TrainingConfig, data: dict[str, TokenizedData | None]) -> bool:
    """Whether texts will be generated and scored, which takes packages that may be absent."""
    validated = data["validation"] is not None and config.run.evaluate_every != 0
    wanted = config.evaluation.samples, config.evaluation.test_samples
    return bool((validated and wanted[0]) or (data["test"] is not None and wanted[1] != 0))


# What the report says of them ---------------------------------------------------------------------


def facts(parts: Parts) -> dict[str, Any]:
    """What a run is made of, in numbers and words, for its report."""
    config, model = parts.config, parts.model
    declared = flatten(model_params(model.config))
    sizes = {path: math.prod(leaf.shape) for path, leaf in declared.items()}
    rows = parts.optimizer.describe()
    trained = sum(math.prod(row.shape) for row in rows if row.trained)
    groups: dict[str, int] = {}
    for row in rows:
        if row.trained:
            groups[row.group] = groups.get(row.group, 0) + math.prod(row.shape)
    sides = [side.model_type for side in (model.config.encoder, model.config.decoder)]
    named = (config.model.path, config.model.encoder, config.model.decoder)
    settings = parts.optimizer.config
    return {
        "total_steps": parts.total_steps,
        "seed": config.run.seed,
        "mesh": dict(parts.mesh.shape),
        "notes": list(parts.notes),
        "model": {
            "name": sides[0] if model.config.whole else "2".join(sides),
            "base": [name for name in named if name],
            "parameters": sum(sizes.values()),
            "trained": trained,
            "dtype": f"{model.dtype} over {model.param_dtype} parameters",
        },
        "data": {
            "training files": list(config.data.train) or "none: pairs were given in Python",
            "training pairs": len(parts.batches.data),
            "validation pairs": len(parts.validation) if parts.validation is not None else 0,
            "test pairs": len(parts.test) if parts.test is not None else 0,
            "shapes of a batch": [f"{s}/{t}" for s, t in parts.batches.shapes],
            "rows of a batch": config.data.batch_size,
            "steps per epoch": parts.batches.steps_per_epoch(0),
            "fingerprint": parts.batches.data.fingerprint,
        },
        "optimizer": {
            "name": settings.name,
            "peak rate": settings.learning_rate,
            "schedule": f"{settings.schedule}, warm-up {settings.warmup_steps}",
            "parameters by group": groups,
        },
        "execution": {
            "mesh": dict(parts.mesh.shape),
            "attention": attention_facts(parts),
            "remat": model.execution.remat,
            "layers": "scanned" if model.execution.scan_layers else "in a straight line",
        },
    }


def flops_of(parts: Parts) -> tuple[Callable[[int, int, int], float], float | None]:
    """Model FLOPs of a training step by (B, S, T), and what all devices can do in a second.

    The second is None where no peak is published for the device and dtype, as for CPUs.
    """
    model = parts.model

    def flops(batch: int, source: int, target: int) -> float:
        return float(model_flops(model, batch, source, target).train_step)

    kind = parts.mesh.devices.flat[0].device_kind
    peak = peak_flops(kind, str(model.dtype))
    return flops, None if peak is None else peak * parts.mesh.size


def attention_facts(parts: Parts) -> str:
    """Which kernels compute the attentions of the largest batch, and why."""
    model, platform = parts.model, parts.mesh.devices.flat[0].platform
    source, target = max(parts.batches.shapes)
    found: dict[tuple[str, str], list[str]] = {}
    for side, trunk, length in (
        ("encoder", model.config.encoder_trunk, source),
        ("decoder", model.config.decoder_trunk, target),
    ):
        sublayers = [s for part in trunk.segments for block in part.blocks for s in block.sublayers]
        for sublayer in sublayers:
            if isinstance(sublayer.f, Attention):
                keys = source if sublayer.f.source == "encoder" else length
                choice = resolve_attention(
                    model.execution,
                    sublayer.f,
                    platform,
                    dtype=model.dtype,
                    query_length=length,
                    key_length=keys,
                    dropout=trunk.dropout.attention,
                    batch=parts.batches.batch_size,
                )
                names = found.setdefault((choice.name, choice.reason), [])
                name = f"{side} {sublayer.f.source}"
                names += [] if name in names else [name]
    if len(found) == 1:
        return "{} ({})".format(*next(iter(found)))
    said = [f"{name} in {', '.join(at)} ({reason})" for (name, reason), at in found.items()]
    return "; ".join(said)
