"""Scores of predicted texts, and of what costs nothing: the source's first, or best, sentence.

ROUGE is rouge-score's (stemmed, means of F), BLEU and chrF are sacrebleu's, with their signatures.
All are from 0 to 100. A model is worth its training where it beats the first sentence; the best
one, chosen with the reference in hand, is what copying one sentence could reach at most.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from jax_encdec.errors import InputError

METRICS = ("rouge", "bleu", "chrf")
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
RESAMPLES = 1000

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n")
_PACKAGES = {"rouge": ("rouge_score.rouge_scorer", "ROUGE", "rouge-score")}
_PACKAGES |= {
    "bleu": ("sacrebleu.metrics", "BLEU", "sacrebleu"),
    "chrf": ("sacrebleu.metrics", "chrF", "sacrebleu"),
}


@dataclass(frozen=True)
class Scores:
    """What predictions scored."""

    values: Mapping[str, float]
    """From 0 to 100: rouge1, rouge2, rougeL, rougeLsum, bleu, chrf, exact_match."""
    intervals: Mapping[str, tuple[float, float]]
    """95 % of the means of ROUGE and exact match over resampled texts lie between these."""
    signatures: Mapping[str, str]
    """sacrebleu's, by metric: what exactly was computed."""


def check_metrics(metrics: Sequence[str]) -> None:
    """See that the packages that metrics need are installed.

    Raises:
        InputError: a metric is unknown, or its package is not installed.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise InputError(f"metrics are {', '.join(METRICS)}; got {metric!r}")
        _package(metric)


def score(
    predictions: Sequence[str],
    references: Sequence[str],
    metrics: Sequence[str] = METRICS,
    *,
    bleu_tokenizer: str = "13a",
    intervals: bool = True,
) -> Scores:
    """Score predictions against one reference each; exact match (of stripped texts) always.

    Raises:
        InputError: the lists differ in length or are empty, or a metric's package is missing.
    """
    _check(predictions, references)
    check_metrics(metrics)
    rows: dict[str, np.ndarray] = {}
    values: dict[str, float] = {}
    signatures: dict[str, str] = {}
    pairs = list(zip(predictions, references, strict=True))
    if "rouge" in metrics:
        found = [_rouge_of(*pair) for pair in pairs]
        rows |= {name: np.array([row[name] for row in found]) for name in ROUGE}
    rows["exact_match"] = np.array([100.0 * (p.strip() == r.strip()) for p, r in pairs])
    for name in ("bleu", "chrf"):
        if name in metrics:
            values[name], signatures[name] = _sacrebleu(name, pairs, bleu_tokenizer)
    values |= {name: float(row.mean()) for name, row in rows.items()}
    order = (*ROUGE, "bleu", "chrf", "exact_match")
    return Scores(
        {name: values[name] for name in order if name in values},
        {name: _interval(row) for name, row in rows.items()} if intervals else {},
        signatures,
    )


# Baselines ---------------------------------------------------------------------------------------


def sentences(text: str) -> list[str]:
    """A text's sentences: cut at line ends, and at spaces after `.`, `!` and `?`."""
    return [part.strip() for part in _SENTENCE.split(text) if part.strip()]


def lead_baseline(sources: Sequence[str]) -> list[str]:
    """The first sentence of each source."""
    return [next(iter(sentences(source)), "") for source in sources]


def best_sentence_baseline(sources: Sequence[str], references: Sequence[str]) -> list[str]:
    """The sentence of each source with the highest ROUGE-L, the first one of equals.

    Raises:
        InputError: the lists differ in length or are empty, or rouge-score is not installed.
    """
    _check(sources, references)
    found = []
    for source, reference in zip(sources, references, strict=True):
        parts = sentences(source)
        rated = [_scorer(("rougeL",)).score(reference, part)["rougeL"].fmeasure for part in parts]
        found.append(parts[int(np.argmax(rated))] if parts else "")
    return found


@lru_cache(maxsize=4)
def baseline_scores(
    sources: tuple[str, ...],
    references: tuple[str, ...],
    metrics: tuple[str, ...],
    bleu_tokenizer: str = "13a",
) -> Mapping[str, Scores]:
    """Scores of "lead", and with ROUGE of "best_sentence"; computed once for the same texts."""
    texts = {"lead": lead_baseline(sources)}
    if "rouge" in metrics:
        texts["best_sentence"] = best_sentence_baseline(sources, references)
    return {
        name: score(found, references, metrics, bleu_tokenizer=bleu_tokenizer)
        for name, found in texts.items()
    }


# Arithmetic --------------------------------------------------------------------------------------


def _check(texts: Sequence[str], references: Sequence[str]) -> None:
    if isinstance(texts, str) or isinstance(references, str):
        raise InputError("predictions and references must be lists of texts; got one text")
    if len(texts) != len(references):
        raise InputError(f"there are {len(texts)} predictions, but {len(references)} references")
    if not texts:
        raise InputError("there are no predictions to score")


def _package(metric: str) -> Any:
    module, called, package = _PACKAGES[metric]
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f"{called} needs {package}, which is not installed: pip install 'jax_encdec[train]', "
            f"or leave {metric} out of evaluation.metrics"
        ) from None


@cache
def _scorer(names: tuple[str, ...]) -> Any:
    return _package("rouge").RougeScorer(list(names), use_stemmer=True)


def _rouge_of(prediction: str, reference: str) -> dict[str, float]:
    # rougeLsum compares sentence by sentence, and takes them line by line.
    lines = ["\n".join(sentences(text)) for text in (reference, prediction)]
    found = _scorer(("rouge1", "rouge2", "rougeL")).score(reference, prediction)
    found |= _scorer(("rougeLsum",)).score(*lines)
    return {name: 100 * found[name].fmeasure for name in ROUGE}


def _sacrebleu(name: str, pairs: Sequence[tuple[str, str]], tokenizer: str) -> tuple[float, str]:
    metrics = _package(name)
    metric = metrics.BLEU(tokenize=tokenizer) if name == "bleu" else metrics.CHRF()
    found = metric.corpus_score([p for p, _ in pairs], [[r for _, r in pairs]])
    return float(found.score), str(metric.get_signature())


def _interval(row: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of the means of rows drawn with replacement, always the same ones."""
    drawn = np.random.default_rng(0).integers(len(row), size=(RESAMPLES, len(row)))
    low, high = np.percentile(row[drawn].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)
