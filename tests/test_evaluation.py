"""Scores are those of rouge-score and sacrebleu, texts the model's own, baselines honest."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any

import jax
import numpy as np
import pytest
import tiny_pairs
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jax_encdec import GenerationConfig, Text2TextPipeline
from jax_encdec.cli import dates
from jax_encdec.errors import InputError
from jax_encdec.training import scores
from jax_encdec.training.config import EvaluationConfig
from jax_encdec.training.data_config import DataConfig
from jax_encdec.training.dataset import tokenize
from jax_encdec.training.evaluation import Generation, evaluate, generate_texts
from jax_encdec.training.sharding import make_mesh

PAIRS = tuple((text.strip(), iso) for text, iso in dates.make_examples("heldout", 13, 5))
WORDS = st.sampled_from(("the", "cat", "cats", "ran", "running", "1998-05-03", "東京", "x.", "Z?"))
TEXTS = st.lists(WORDS, max_size=9).map(" ".join)
PACKAGES = ("rouge_score.rouge_scorer", "sacrebleu")


@pytest.fixture(scope="module")
def pair() -> Any:
    model, params = tiny_pairs.pair()
    return model, params, tiny_pairs.tokenizers()


@pytest.fixture(scope="module")
def data(pair):
    model, _, tokenizers = pair
    return tokenize(PAIRS, tokenizers, DataConfig(workers=0, cache_dir=""), model=model)


# Scores -------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6))
@example([("", "")])
@example([("the cats are running. He ran.", "the cat runs.\nhe ran!"), ("", "x")])
def test_scores_are_those_of_the_packages(pairs):
    rouge_scorer, sacrebleu = (pytest.importorskip(name) for name in PACKAGES)
    predictions, references = (list(side) for side in zip(*pairs, strict=True))
    found = scores.score(predictions, references)
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = rouge_scorer.RougeScorer(kinds, use_stemmer=True)
    rows = [scorer.score(reference, text) for text, reference in pairs]
    for kind in kinds:
        mean = 100 * np.mean([row[kind].fmeasure for row in rows])
        assert found.values[kind] == pytest.approx(mean, abs=1e-9)
    bleu = sacrebleu.corpus_bleu(predictions, [references])
    chrf = sacrebleu.corpus_chrf(predictions, [references])
    assert found.values["bleu"] == bleu.score
    assert found.values["chrf"] == chrf.score
    exact = np.mean([a.strip() == b.strip() for a, b in pairs])
    assert found.values["exact_match"] == pytest.approx(100 * exact)
    for name, (low, high) in found.intervals.items():
        assert low - 1e-9 <= found.values[name] <= high + 1e-9 or len(pairs) < 3
    assert found.signatures["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|")
    assert found == scores.score(predictions, references)


def test_rouge_lsum_compares_sentence_by_sentence():
    rouge_scorer = pytest.importorskip(PACKAGES[0])
    prediction, reference = "He ran. The cat sat.", "The cat sat. He ran."
    found = scores.score([prediction], [reference], ["rouge"]).values
    lines = [text.replace(". ", ".\n") for text in (reference, prediction)]
    scorer = rouge_scorer.RougeScorer(["rougeLsum"], use_stemmer=True)
    assert found["rougeLsum"] == 100 * scorer.score(*lines)["rougeLsum"].fmeasure == 100.0
    assert found["rougeL"] == 60.0
    assert set(found) == {"rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match"}


def test_bleu_splits_words_as_asked():
    sacrebleu = pytest.importorskip(PACKAGES[1])
    texts, references = ["東京の天気はいい"], ["東京の天気は悪い"]
    found = scores.score(texts, references, ["bleu"], bleu_tokenizer="char")
    expected = sacrebleu.corpus_bleu(texts, [references], tokenize="char").score
    assert found.values["bleu"] == expected > 50
    assert "tok:char" in found.signatures["bleu"]


def test_intervals_hold_the_mean_and_narrow_with_more_texts():
    pytest.importorskip(PACKAGES[0])
    predictions, references = ["a b", "c d", "e x", "x y"], ["a b", "c d", "e f", "g h"]
    few = scores.score(predictions, references, ["rouge"])
    many = scores.score(predictions * 50, references * 50, ["rouge"])
    assert few.values["rouge1"] == many.values["rouge1"] == 62.5
    widths = [b - a for a, b in (few.intervals["rouge1"], many.intervals["rouge1"])]
    assert widths[1] < widths[0] / 5
    # Of a mean of 200 values: 1.96 standard errors to each side.
    error = np.std([100, 100, 50, 0]) / math.sqrt(200)
    assert widths[1] == pytest.approx(2 * 1.96 * error, rel=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scores.score([], []), "no predictions to score"),
        (lambda: scores.score(["a"], []), "there are 1 predictions, but 0 references"),
        (lambda: scores.score("a", ["a"]), "must be lists of texts; got one text"),
        (lambda: scores.score(["a"], ["a"], ["meteor"]), "metrics are rouge, bleu, chrf; got"),
    ],
)
def test_what_cannot_be_scored_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(
    ("module", "metric", "package"),
    [
        ("rouge_score.rouge_scorer", "rouge", "rouge-score"),
        ("sacrebleu.metrics", "bleu", "sacrebleu"),
    ],
)
def test_a_missing_package_is_one_sentence_that_says_how_to_get_it(
    module, metric, package, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError) as error:
        scores.check_metrics([metric])
    assert f"needs {package}, which is not installed: pip install 'jax_encdec[train]'" in str(
        error.value
    )
    scores.check_metrics([])


# Baselines ----------------------------------------------------------------------------------------


@given(st.text())
def test_sentences_lose_nothing_but_space(text):
    parts = scores.sentences(text)
    assert all(part.strip() == part and part for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())


def test_baselines_of_package_descriptions():
    sources = [
        "This package holds a fast parser. It reads XML files.\n* and JSON",
        "A small game of cards! Rules are simple? Yes.",
        "no end at all",
        "   ",
    ]
    references = ["reads XML and JSON files", "simple game of cards", "no end", "empty"]
    lead = scores.lead_baseline(sources)
    assert lead == ["This package holds a fast parser.", "A small game of cards!", sources[2], ""]
    pytest.importorskip(PACKAGES[0])
    best = scores.best_sentence_baseline(sources, references)
    assert best == ["It reads XML files.", "A small game of cards!", "no end at all", ""]
    found = scores.baseline_scores(tuple(sources), tuple(references), ("rouge",))
    assert found["lead"].values == scores.score(lead, references, ["rouge"]).values
    assert found["best_sentence"].values["rougeL"] > found["lead"].values["rougeL"]
    # Asked again, as at every evaluation of a run, nothing is computed.
    again = scores.baseline_scores(tuple(sources), tuple(references), ("rouge",))
    assert again is found


# Generation and loss ------------------------------------------------------------------------------


def test_texts_are_those_of_the_pipeline_in_whatever_batches(pair, data):
    model, params, tokenizers = pair
    sources = [source for source, _ in PAIRS]
    settings = GenerationConfig(max_length=12, num_beams=2)
    expected = Text2TextPipeline(*pair)(sources, generation_config=settings, batch_size=4)
    rows = [data.source[i].tolist() for i in range(len(data))]
    for size, given_ in ((4, rows), (4, sources), (16, rows)):
        options = Generation(config=settings, batch_size=size, pad_id=data.pad_id)
        assert generate_texts(model, params, tokenizers, given_, options) == expected
    assert generate_texts(model, params, tokenizers, [], options) == []


def test_sampling_repeats_and_one_text_is_made_per_source(pair, data):
    settings = GenerationConfig(max_length=8, do_sample=True, top_k=5, num_return_sequences=2)
    rows = [data.source[i].tolist() for i in range(5)]
    options = Generation(config=settings, batch_size=4)
    made = generate_texts(*pair, rows, options)
    assert len(made) == 5
    assert generate_texts(*pair, rows, options) == made
    # The first text is drawn the same, whatever stands behind it.
    assert generate_texts(*pair, rows[:3], options)[0] == made[0]


def test_an_evaluation_is_loss_scores_baselines_and_samples(pair, data):
    pytest.importorskip(PACKAGES[0])
    pytest.importorskip(PACKAGES[1])
    model, params, tokenizers = pair
    config = EvaluationConfig(batch_size=4, num_beams=2, max_length=12, shown=3)
    found = evaluate(model, params, tokenizers, data, config, samples=6)

    ids, mask = tokenizers.source.batch([source for source, _ in PAIRS])
    targets, shown = tokenizers.target.batch([target for _, target in PAIRS])
    labels = np.where(shown, targets, -100)[:, 1:]  # without [CLS], which starts a target
    out = jax.jit(lambda p: model.apply({"params": p}, ids, attention_mask=mask, labels=labels))
    assert found.weight == (labels != -100).sum()
    assert found.loss == pytest.approx(float(out(params).loss), rel=1e-5)

    made = Text2TextPipeline(*pair)(
        [s for s, _ in PAIRS[:6]], num_beams=2, max_length=12, batch_size=4
    )
    assert found.predictions == tuple((*p, m) for p, m in zip(PAIRS[:6], made, strict=True))
    assert found.samples == found.predictions[:3]
    assert found.distinct == len(set(made)) / 6
    references = [iso for _, iso in PAIRS[:6]]
    assert found.scores == scores.score(made, references).values
    lead = scores.lead_baseline([text for text, _ in PAIRS[:6]])
    assert found.baselines["lead"] == scores.score(lead, references).values
    flat = found.to_dict()
    assert flat["lead_rouge1"] == found.baselines["lead"]["rouge1"]
    assert all(isinstance(value, float | int | str) for value in flat.values())

    alone = evaluate(model, params, tokenizers, data, config, samples=0)
    assert alone.loss == found.loss
    assert not alone.predictions
    plain = dataclasses.replace(config, metrics=(), baselines=False)
    only = evaluate(model, params, tokenizers, data, plain, samples=2)
    assert set(only.scores) == {"exact_match"}
    assert not only.baselines


def test_eight_devices_evaluate_as_one_and_nothing_is_compiled_twice(pair, data):
    from jax_encdec.training.sharding import DEFAULT_RULES, param_shardings
    from jax_encdec.training.step import make_eval_step

    model, params, tokenizers = pair
    config = EvaluationConfig(batch_size=4, num_beams=2, max_length=12, metrics=(), baselines=False)
    one = evaluate(model, params, tokenizers, data, config, samples=4)
    mesh = make_mesh("replica=2,fsdp=2,tensor=2")
    placed = jax.device_put(params, param_shardings(model, mesh, DEFAULT_RULES))
    step = make_eval_step(model, mesh)
    eight = evaluate(model, placed, tokenizers, data, config, samples=4, mesh=mesh, eval_step=step)
    assert eight.loss == pytest.approx(one.loss, rel=1e-5)
    assert eight.accuracy == one.accuracy
    assert eight.predictions == one.predictions

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: (
            compiled.append(event) if event.endswith("compile_duration") else None
        )
    )
    other = jax.tree.map(lambda x: x * 1.01, placed)
    compiled.clear()
    again = evaluate(model, other, tokenizers, data, config, samples=4, mesh=mesh, eval_step=step)
    assert again.loss != eight.loss
    assert not compiled


def test_texts_may_be_generated_elsewhere(pair, data):
    model, params, tokenizers = pair
    config = EvaluationConfig(metrics=(), num_beams=3)
    asked = []

    def elsewhere(rows, options):
        asked.append((len(rows), options.config.num_beams))
        return [str(len(row)) for row in rows]

    found = evaluate(model, params, tokenizers, data, config, generate_texts=elsewhere)
    assert asked == [(len(PAIRS), 3)]
    lengths = [str(len(row)) for row in data.source]
    assert [sample.prediction for sample in found.predictions] == lengths


def test_lengths_follow_the_configuration_then_the_model_then_the_targets(pair, data):
    from jax_encdec.training.models import generation_of

    model = pair[0]
    assert model.generation_config.max_new_tokens == 12
    assert generation_of(model.generation_config, EvaluationConfig(), 30) == model.generation_config
    found = generation_of(model.generation_config, EvaluationConfig(max_length=9, min_length=2), 30)
    assert (found.max_length, found.max_new_tokens, found.min_length) == (9, None, 2)
    assert generation_of(GenerationConfig(), EvaluationConfig(), 30).max_length == 31
    assert generation_of(GenerationConfig(), EvaluationConfig(), None).max_length is None
