"""A whole training run in miniature: model, data, optimizer and step, and what goes on between.

Used in the process of a test, and by tests/training_child.py in processes of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
import tiny_pairs

from jax_encdec.cli import dates
from jax_encdec.training.batches import Batches
from jax_encdec.training.checkpoint import Checkpoints
from jax_encdec.training.data_config import DataConfig
from jax_encdec.training.dataset import tokenize
from jax_encdec.training.optimizer import make_optimizer
from jax_encdec.training.optimizer_config import OptimizerConfig
from jax_encdec.training.sharding import data_shard, make_mesh, to_global
from jax_encdec.training.state import TrainState, abstract_state, init_state
from jax_encdec.training.step import make_train_step

SEED = 3


@dataclass
class TinyRun:
    """Dropout, epochs of 5 steps, warm-up and decay, an average: what a resume could get wrong."""

    mesh: str | None = None
    total: int = 24
    devices: int | None = None

    def __post_init__(self):
        self.model, self.params = tiny_pairs.pair()
        self.place = make_mesh(self.mesh, devices=jax.devices()[: self.devices])
        config = OptimizerConfig(
            learning_rate=2e-3, warmup_steps=4, weight_decay=0.1, ema_decay=0.9
        )
        self.optimizer = make_optimizer(config, self.model, self.total)
        self.batches = self.make_batches()

    def make_batches(self) -> Batches:
        pairs = dates.make_examples("train", 36, SEED)
        config = DataConfig(cache_dir="", workers=0, max_source_length=40, max_target_length=16)
        data = tokenize(pairs, tiny_pairs.tokenizers(), config, model=self.model)
        return Batches(data, batch_size=8, source_buckets=(40,), target_buckets=(16,), seed=SEED)

    @cached_property
    def step(self) -> Any:
        return make_train_step(self.model, self.optimizer, self.place, seed=SEED, ema_decay=0.9)

    def begin(self) -> TrainState:
        return init_state(self.model, self.optimizer, self.place, params=self.params, ema=True)

    @property
    def like(self) -> TrainState:
        return abstract_state(self.model, self.optimizer, self.place, ema=True)

    def go(
        self, state: TrainState, begin: int = 0, end: int | None = None
    ) -> tuple[TrainState, list[float]]:
        """Take the steps up to `end`; the last state, and the loss of each step."""
        shard, losses = data_shard(self.place), []
        for number in range(begin, self.total if end is None else end):
            batch = to_global(self.batches.batch(number, *shard), self.place)
            state, metrics = self.step(state, batch)
            losses.append(float(metrics["loss"]))
        return state, losses

    def save(self, checkpoints: Checkpoints, step: int, state: TrainState) -> None:
        checkpoints.save(step, state, {"data": self.batches.state(step)})

    def restore(self, checkpoints: Checkpoints, step: int | None = None) -> tuple[int, TrainState]:
        """Where the run was, or its beginning."""
        restored = checkpoints.restore(self.like, step)
        if restored is None:
            return 0, self.begin()
        return self.make_batches().check(restored.extra["data"]), restored.state


def as_numpy(state: TrainState) -> Any:
    return jax.tree.map(np.array, state)
