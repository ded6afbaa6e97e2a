"""Fine-tuning: data, optimizer, sharded step, checkpoints, the loop around them, and its plan.

The public names, loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Batches": "batches",
    "Callback": "callbacks",
    "EarlyStopping": "callbacks",
    "Stop": "callbacks",
    "Checkpoints": "checkpoint",
    "EvaluationConfig": "config",
    "ExecutionConfig": "config",
    "ModelConfig": "config",
    "RunConfig": "config",
    "TrainingConfig": "config",
    "load_config": "config_io.load",
    "save_config": "config_io.save",
    "DataConfig": "data_config",
    "TokenizedData": "dataset",
    "tokenize": "dataset",
    "EvaluationResult": "evaluation",
    "evaluate": "evaluation",
    "TrainResult": "finish",
    "model_flops": "flops",
    "NonFiniteError": "loop",
    "Run": "loop",
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
    "to_global": "sharding",
    "TrainState": "state",
    "abstract_state": "state",
    "init_state": "state",
    "make_eval_step": "step",
    "make_train_step": "step",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jax_encdec.training' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(".")
    found = importlib.import_module(f"jax_encdec.training.{module}")
    return getattr(found, attribute or name)


def __dir__() -> list[str]:
    return list(__all__)
