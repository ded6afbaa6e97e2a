"""How good a model is on a split: its loss, and the texts it generates, scored beside baselines.

    found = evaluate(model, params, tokenizers, data, config.evaluation, mesh=mesh)
    found.loss, found.scores["rouge2"], found.baselines["lead"]["rouge2"], found.samples

Generation starts from the token ids that the data holds, so prefix and truncation are those of
training. Programs are compiled once per shape, and serve every evaluation of a run.

Axis letters: B batch, S source length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.decoding.sharded import has_room
from jax_encdec.encoder_decoder import EncoderDecoderModel
from jax_encdec.pipeline import Text2TextPipeline, decode
from jax_encdec.tokenization import TokenizerPair, bucket_length
from jax_encdec.training import scores as scoring
from jax_encdec.training.batches import evaluation_batches
from jax_encdec.training.config import EvaluationConfig
from jax_encdec.training.dataset import TokenizedData
from jax_encdec.training.models import generation_of
from jax_encdec.training.record import Record
from jax_encdec.training.sharding import (
    DEFAULT_RULES,
    ShardingRules,
    data_shard,
    make_mesh,
    replicated,
    to_global,
)
from jax_encdec.training.step import make_eval_step

Rows = Sequence[Sequence[int]]
"""Token ids of sources, special tokens included."""


class Sample(NamedTuple):
    """One pair and what the model made of its source."""

    source: str
    reference: str
    prediction: str


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How texts are generated: what `generate_texts` is given beside the sources."""

    config: GenerationConfig
    batch_size: int = 32
    pad_id: int = 0
    """Fills sources up, hidden."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """What an evaluation found; scores are from 0 to 100."""

    loss: float
    """Mean nats per target token."""
    accuracy: float
    """Share of target tokens that were the likeliest, from 0 to 1."""
    weight: float
    """Target tokens that the loss was measured on."""
    predictions: tuple[Sample, ...] = ()
    """Every pair that a text was generated for."""
    shown: int = 5
    scores: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By name ("lead", "best_sentence"), then by metric."""
    signatures: Mapping[str, str] = field(default_factory=dict)
    """sacrebleu's, by metric."""
    seconds: float = 0.0

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The predictions that tables show."""
        return self.predictions[: self.shown]

    @property
    def distinct(self) -> float:
        """Share of predictions that differ from all before them; low where a model ignores its
        source."""
        made = [sample.prediction for sample in self.predictions]
        return len(set(made)) / len(made) if made else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Flat JSON: loss, accuracy, scores by their names, those of baselines as `lead_rouge1`."""
        data: dict[str, Any] = {
            "loss": self.loss,
            "accuracy": self.accuracy,
            "target_tokens": int(self.weight),
            "predictions": len(self.predictions),
            **self.scores,
        }
        for baseline, found in self.baselines.items():
            data |= {f"{baseline}_{name}": value for name, value in found.items()}
        if self.predictions:
            data["distinct"] = self.distinct
            data["prediction_words"] = _words(s.prediction for s in self.predictions)
            data["reference_words"] = _words(s.reference for s in self.predictions)
        data |= {f"{name}_signature": text for name, text in self.signatures.items()}
        return data | {"seconds": self.seconds}


def evaluate(
    model: EncoderDecoderModel,
    params: Any,
    tokenizers: TokenizerPair,
    data: TokenizedData,
    config: EvaluationConfig,
    *,
    mesh: Mesh | None = None,
    rules: ShardingRules = DEFAULT_RULES,
    eval_step: Callable[..., Mapping[str, jax.Array]] | None = None,
    generate_texts: Callable[[Rows, Generation], list[str]] | None = None,
    samples: int | None = None,
) -> EvaluationResult:
    """Measure the loss on a split, generate texts for its first pairs, and score them.

    In a job of several processes all of them call it, with the same arguments.

    Args:
        params: of `model`, on the mesh.
        config: its generation options are those that differ from the model's own.
        mesh, rules: where to compute; None: on one device.
        eval_step: of `make_eval_step`, to be compiled once in a run.
        generate_texts: in place of this module's, which knows one process only.
        samples: pairs that texts are generated for; None: all; 0: the loss alone.

    Raises:
        InputError: a metric's package is not installed, or an option cannot be used.
    """
    began = time.perf_counter()
    wanted = len(data) if samples is None else min(samples, len(data))
    if wanted:
        scoring.check_metrics(config.metrics)
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    eval_step = eval_step or make_eval_step(model, mesh, rules)
    sums = losses(params, data, config.batch_size, mesh, eval_step)
    tokens = max(sums["weight"], 1.0)
    found = EvaluationResult(
        loss=sums["nll_sum"] / tokens,
        accuracy=sums["correct"] / tokens,
        weight=sums["weight"],
        shown=config.shown,
    )
    if wanted:
        longest = int(data.target.lengths.max())
        options = Generation(
            config=generation_of(model.generation_config, config, longest),
            batch_size=config.batch_size,
            pad_id=data.pad_id,
        )
        rows = [data.source[i].tolist() for i in range(wanted)]
        generate = generate_texts or partial(_generate_texts, model, params, tokenizers)
        found = _scored(found, data.records(wanted), generate(rows, options), config)
    return replace(found, seconds=time.perf_counter() - began)


def losses(
    params: Any,
    data: TokenizedData,
    batch_size: int,
    mesh: Mesh,
    eval_step: Callable[..., Mapping[str, jax.Array]],
) -> dict[str, float]:
    """Sums over a whole split: nll_sum (nats), weight (target tokens), correct (tokens).

    Args:
        batch_size: rows of a global batch, rounded up to what the mesh divides.
    """
    index, count = data_shard(mesh)
    parts = mesh.shape["replica"] * mesh.shape["fsdp"]
    size = -(-batch_size // parts) * parts
    totals: dict[str, float] = {}
    pending: list[Mapping[str, jax.Array]] = []
    batches = evaluation_batches(data, size, process_index=index, process_count=count)
    for batch in batches:
        pending.append(eval_step(params, to_global(batch, mesh)))
        if len(pending) > 1:  # The device works on one while the host adds up the one before.
            _add(totals, pending.pop(0))
    for found in pending:
        _add(totals, found)
    return totals


def _add(totals: dict[str, float], found: Mapping[str, jax.Array]) -> None:
    for name, value in found.items():
        totals[name] = totals.get(name, 0.0) + float(value)


def _scored(
    found: EvaluationResult,
    records: Sequence[Record],
    predictions: Sequence[str],
    config: EvaluationConfig,
) -> EvaluationResult:
    sources = tuple(record.source for record in records)
    references = tuple(record.target for record in records)
    kinds, tokenizer = config.metrics, config.bleu_tokenizer
    scored = scoring.score(predictions, references, kinds, bleu_tokenizer=tokenizer)
    baselines = {}
    if config.baselines:
        for name, part in scoring.baseline_scores(sources, references, kinds, tokenizer).items():
            baselines[name] = part.values
    return replace(
        found,
        predictions=tuple(map(Sample, sources, references, predictions)),
        scores=scored.values,
        intervals=scored.intervals,
        baselines=baselines,
        signatures=scored.signatures,
    )


def _words(found: Iterable[str]) -> float:
    counts = [len(text.split()) for text in found]
    return sum(counts) / len(counts)


# Generation ---------------------------------------------------------------------------------------


def generate_texts(
    model: EncoderDecoderModel,
    params: Any,
    tokenizers: TokenizerPair,
    sources: Rows | Sequence[str],
    options: Generation,
) -> list[str]:
    """Generate a text from each source, given as token ids, or as a text to be cut to fit.

    Batches are of one size and few lengths; a text does not depend on which others are in its
    batch.

    Raises:
        InputError: a source is empty or not of the model's vocabulary, or an option impossible.
    """
    rows = _rows(model, params, tokenizers, sources)
    settings = options.config.replace(num_return_sequences=None)
    keys = None
    if settings.do_sample:
        numbers = jnp.arange(len(rows), dtype=jnp.uint32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), numbers)
    made = [""] * len(rows)
    params, parts = _spread(params)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # What fails does so at once.
    size = min(options.batch_size, 1 << (len(rows) - 1).bit_length()) if rows else 1
    size = -(-size // parts) * parts
    for start in range(0, len(order), size):
        real = order[start : start + size]
        batch = real + real[-1:] * (size - len(real))
        length = bucket_length(len(rows[batch[0]]), limit=model.config.encoder_trunk.max_length)
        input_ids = np.full((size, length), options.pad_id, np.int32)  # [B, S]
        mask = np.zeros_like(input_ids)
        for b, i in enumerate(batch):
            input_ids[b, : len(rows[i])] = rows[i]
            mask[b, : len(rows[i])] = 1
        out = model.generate(
            params,
            input_ids,
            attention_mask=mask,
            generation_config=settings,
            key=None if keys is None else keys[np.asarray(batch)],
        )
        sequences, lengths = np.asarray(out.sequences), np.asarray(out.lengths)
        for b, i in enumerate(real):
            made[i] = decode(tokenizers.target, sequences[b, : lengths[b]])
    return made


def _spread(params: Any) -> tuple[Any, int]:
    """The parameters, whole on each of this process's devices, and into how many parts that splits
    batches.

    Sharded parameters would make the devices talk for every token and layer. Where a device has no
    room for the whole, they stay as they are.
    """
    leaves = jax.tree.leaves(params)
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    devices = sorted(arrays[0].devices(), key=lambda d: d.id) if arrays else jax.local_devices()
    if len(devices) == 1:
        return jax.device_put(params, devices[0]), 1
    if not has_room(devices[0], 2 * sum(leaf.nbytes for leaf in leaves)):
        return params, 1
    mesh = make_mesh({"replica": len(devices)}, devices=devices)
    return jax.device_put(params, replicated(mesh)), len(devices)


_generate_texts = generate_texts  # The name that an argument of `evaluate` hides.


def _rows(
    model: EncoderDecoderModel,
    params: Any,
    tokenizers: TokenizerPair,
    sources: Rows | Sequence[str],
) -> Rows:
    if all(isinstance(source, str) for source in sources):
        pipeline = Text2TextPipeline(model, params, tokenizers)
        return pipeline.encode(cast(Sequence[str], sources), truncation=True)
    return cast(Rows, sources)
