"""Fine-tuning: data, optimizer, sharded step, checkpoints, the loop around them, and its plan.

The public names, loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Callback": "callbacks",
    "EarlyStopping": "callbacks",
    "Stop": "callbacks",
    "EvaluationConfig": "config",
    "ExecutionConfig": "config",
    "ModelConfig": "config",
    "RunConfig": "config",
    "TrainingConfig": "config",
    "DataConfig": "data_config",
    "NonFiniteError": "loop",
    "Run": "loop",
    "TrainResult": "loop",
    "train": "loop",
    "Group": "optimizer_config",
    "OptimizerConfig": "optimizer_config",
    "make_optimizer": "optimizer",
    "load_sharded": "loading",
    "join_sharded": "loading",
    "DEFAULT_RULES": "sharding",
    "ShardingRules": "sharding",
    "make_mesh": "sharding",
    "placements": "sharding",
    "TrainState": "state",
    "init_state": "state",
    "make_eval_step": "step",
    "make_train_step": "step",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jax_encdec.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jax_encdec.training.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
