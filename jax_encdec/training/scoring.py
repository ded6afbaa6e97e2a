"""An evaluation amid a run: by its compiled step, over its mesh, in all its processes.

The loss is computed on the mesh. To generate, each process gathers the parameters, takes its share
of the texts, and all exchange what they made: simple, and right for models that one host can hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jax_encdec.training import evaluation
from jax_encdec.training.assemble import Parts
from jax_encdec.training.dataset import TokenizedData
from jax_encdec.training.evaluation import EvaluationResult, Generation, Rows
from jax_encdec.training.gather import gathered, in_parts


def scored(
    parts: Parts,
    params: Any,
    data: TokenizedData,
    split: str,
    *,
    may_go_on: Callable[[], None],
) -> EvaluationResult:
    """Evaluate parameters on a split, as the configuration says.

    Args:
        may_go_on: called between batches, equally often in every process; what it raises ends the
            evaluation.
    """
    config = parts.config.evaluation
    whole: list[Any] = []

    def loss(params: Any, batch: Any) -> Any:
        may_go_on()
        return parts.evaluate(params, batch)

    def generate(rows: Rows, options: Generation) -> list[str]:
        whole.append(gathered(params))
        share = -(-len(rows) // jax.process_count())
        return in_parts(lambda own: by_length(own, lambda some: made(some, options), share), rows)

    def made(rows: Rows, options: Generation) -> list[str]:
        may_go_on()
        if not rows:
            return []
        return evaluation.generate_texts(parts.model, whole[0], parts.tokenizers, rows, options)

    return evaluation.evaluate(
        parts.model,
        params,
        parts.tokenizers,
        data,
        config,
        mesh=parts.mesh,
        rules=parts.rules,
        eval_step=loss,
        generate_texts=generate,
        samples=config.samples if split == "validation" else config.test_samples,
    )


def by_length(
    rows: Rows, work: Callable[[Rows], list[str]], most: int, size: int = 256
) -> list[str]:
    """`work` of rows, a few hundred of like length at a time, the longest first; in their order.

    Args:
        most: of rows in any process; all call `work` as often, some with none at the end.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    made = [""] * len(rows)
    for start in range(0, most, size):
        part = order[start : start + size]
        for i, text in zip(part, work([rows[i] for i in part]), strict=True):
            made[i] = text
    return made
