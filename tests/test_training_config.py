"""The training configuration: checked, written and read back, and a flag for every key of it."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import importlib.util
import subprocess
import sys
import tomllib
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_encdec.errors import ConfigError
from jax_encdec.training import aliases, config_io, schema
from jax_encdec.training.config import (
    EvaluationConfig,
    ExecutionConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from jax_encdec.training.config_io import all_keys, load, short_names, to_toml
from jax_encdec.training.data_config import DataConfig
from jax_encdec.training.optimizer_config import Group, OptimizerConfig
from jax_encdec.training.presets import PRESETS

WORDS = st.text(min_size=1).filter(str.strip).filter(lambda text: text != "none")


# Values for every annotation ----------------------------------------------------------------------


def values(annotation: Any) -> st.SearchStrategy:
    """Values that most keys of an annotation take."""
    if annotation == schema.Options:
        pairs = st.dictionaries(WORDS, st.booleans() | numbers() | WORDS, max_size=3)
        return pairs.map(lambda found: tuple(sorted(found.items())))
    options = typing.get_args(annotation) if isinstance(annotation, UNIONS) else (annotation,)
    return st.one_of([one(option) for option in options])


UNIONS = (type(int | str), type(typing.Optional[int]))  # noqa: UP045


def numbers() -> st.SearchStrategy:
    return st.integers(1, 10**6) | st.floats(1e-8, 0.99)


def one(option: Any) -> st.SearchStrategy:
    if option is type(None):
        return st.none()
    if typing.get_origin(option) is Literal:
        return st.sampled_from(typing.get_args(option))
    if typing.get_origin(option) is tuple:
        item = typing.get_args(option)[0]
        lists = st.lists(values(item), min_size=1, max_size=3, unique_by=repr)
        if item is Group:
            lists = lists.filter(lambda found: len({g.label for g in found}) == len(found))
        return lists.map(lambda found: tuple(sorted(found) if item is int else found))
    if dataclasses.is_dataclass(option):
        return sections(option)
    return {
        bool: st.booleans(),
        int: st.integers(1, 10**6),
        float: st.floats(1e-8, 0.99),
        str: WORDS,
    }[option]


def sections(cls: Any, **fixed: Any) -> st.SearchStrategy:
    """Instances of a section with any of its keys set."""
    known = schema.keys(cls)
    free = {n: values(k.annotation) for n, k in known.items() if n not in (*fixed, *AWAY)}
    needed = {n: free.pop(n) for n, k in known.items() if k.default is dataclasses.MISSING}
    return st.fixed_dictionaries(needed, optional=free).map(lambda found: cls(**{**found, **fixed}))


AWAY = ("token", "preset", "pattern_")
MODELS = st.one_of(
    sections(ModelConfig, path="a/b", **{n: ModelConfig.__dataclass_fields__[n].default for n in (
        "config", "encoder", "decoder", "encoder_config", "decoder_config", "encoder_layers",
        "decoder_layers", "cross_attention", "tie_encoder_decoder", "encoder_revision",
        "decoder_revision", "source_tokenizer", "target_tokenizer",
    )}),
    sections(ModelConfig, path=None, config=None, encoder="e", decoder="d", tokenizer=None),
)  # fmt: skip
CONFIGS = st.builds(
    TrainingConfig,
    model=MODELS,
    data=sections(DataConfig),
    optimizer=sections(OptimizerConfig)
    | st.sampled_from(sorted(PRESETS)).map(lambda name: OptimizerConfig(preset=name)),
    execution=sections(ExecutionConfig),
    run=sections(RunConfig, steps=None, overwrite=False, best_metric="loss"),
    evaluation=sections(EvaluationConfig, min_length=None),
)


# Files --------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(CONFIGS)
def test_what_is_written_is_read_back_equal(config):
    text = to_toml(config)
    tomllib.loads(text)
    assert load(tomllib.loads(text)) == config
    assert hash(load(tomllib.loads(text))) == hash(config)


FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(st.dictionaries(st.text(), st.text() | st.integers() | FINITE | st.booleans()))
def test_any_names_and_texts_survive_toml(options):
    pairs = tuple(sorted(options.items()))
    assert tomllib.loads(f"x = {config_io._table(pairs)}")["x"] == options


def test_a_file_is_written_whole_and_read_from_disk(tmp_path):
    config = TrainingConfig(
        model=ModelConfig(path="a", token="hf_secret"),
        run=RunConfig(evaluate_every=None, epochs=1.5),
        optimizer=OptimizerConfig(groups=(Group(pattern="*/x", factor=3.0),)),
    )
    config_io.save(config, tmp_path / "c.toml")
    assert [file.name for file in tmp_path.iterdir()] == ["c.toml"]
    assert "hf_secret" not in (tmp_path / "c.toml").read_text()
    assert "hf_secret" not in repr(config)
    assert load(tmp_path / "c.toml") == config
    assert load(str(tmp_path / "c.toml"), ["run.epochs=2"]).run.epochs == 2.0


def test_text_that_no_file_holds_is_refused():
    with pytest.raises(ConfigError, match="not Unicode"):
        to_toml(TrainingConfig(run=RunConfig(output="\udcff")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\nsteps = 'x'", "F, line 2: run.steps must be an integer or 'none'; got 'x'"),
        ("[run]\nsteps = true", "F, line 2: run.steps must be an integer or 'none'; got True"),
        ("[run]\n\nsteps = 1.5", "F, line 3: run.steps must be an integer or 'none'; got 1.5"),
        ("[run]\nsteps = 0", "F: run.steps must be at least 1; got 0"),
        ("run.steps = 'x'", "F, line 1: run.steps must be an integer"),
        ("[run]\nstep = 3", "F, line 2: there is no key 'run.step'; did you mean 'steps'?"),
        ("[run]\nlearning_rate = 3", "there is no key 'run.learning_rate'; there is 'optimizer.l"),
        ("[optimiser]\n", "F, line 1 has no section 'optimiser'; did you mean 'optimizer'?"),
        ("steps = 3", "F, line 1 has no section 'steps'; it belongs into [run]"),
        ("run = 3", "F: run must be a table; got 3"),
        ("[run]\nsteps = ", "F is not valid TOML: Invalid value (at end of document)"),
        ("[run]\nkeep = 3\nkeep = 4", "F is not valid TOML"),
        ("[execution]\nremat = 'ful'", "'none', 'dots', 'full'; got 'ful'; did you mean 'full'?"),
        ("[execution]\nlabel_smoothing = nan", "must be a number; got nan"),
        ("[data]\ntrain = [1]", "F, line 2: data.train[0] must be a string; got 1"),
        ("[data]\ntrain = ['']", "F: data.train must be a list of file names"),
        ("[data]\nbatch_size = -1", "F: data.batch_size must be a positive integer; got -1"),
        ("[[optimizer.groups]]\npatern = 'x'", "optimizer.groups[0] has no key 'patern'; did you"),
        ("[[optimizer.groups]]\nfactor = 2", "optimizer.groups[0] lacks the key 'pattern'"),
        ("[[optimizer.groups]]\npattern='x'\nfactor='y'", "groups[0].factor must be a number"),
        ("[model]\nencoder_options = 3", "must be a table of options; got 3"),
        ("[model.encoder_options]\na = []", "model.encoder_options.a must be true, false, a num"),
        ("[model]\nencoder = 'x'", "F: model.encoder is given, model.decoder is not"),
        ("[model]\npath = 'x'\nconfig = 'y'", "F: give one of model.path or model.config"),
        ("[model]\npath = 'x'\nencoder_layers = 2", "model.encoder_layers is for joining two"),
        ("[run]\nsteps = 1\nepochs = 2", "F: give run.steps or run.epochs, not both; got 1 and 2"),
        ("[run]\nbest_metric = 'bleu'\n[evaluation]\nmetrics = ['rouge']", "best_metric is 'bleu'"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_named_with_its_line(text, message, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(file)
    assert message in str(error.value).replace(str(file), "F")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"\xff", b"", b"[" * 10_000, b"x = " + b"[" * 5000])
def test_hostile_files_are_refused_or_empty(content, tmp_path):
    file = tmp_path / "c.toml"
    file.write_bytes(content)
    if not content:
        assert load(file) == TrainingConfig()
        return
    with pytest.raises(ConfigError, match=r"not valid TOML|not UTF-8 \(byte 0xff\)"):
        load(file)
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "absent.toml")


# Python -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RunConfig(steps="3"), "RunConfig.steps must be an integer or 'none'; got '3'"),
        (lambda: RunConfig(steps=0), "run.steps must be at least 1; got 0"),
        (lambda: RunConfig(epochs=0.0), "run.epochs must be positive"),
        (lambda: RunConfig(seed=-1), "run.seed must be from 0"),
        (lambda: RunConfig(output=" "), "run.output must name a folder"),
        (lambda: RunConfig(resume="auto", overwrite=True), "run.overwrite removes"),
        (lambda: ModelConfig(dropout=1.0), "model.dropout must be at least 0 and below 1"),
        (lambda: ModelConfig(path="a", encoder="b", decoder="c"), "model.path or model.encoder"),
        (lambda: ModelConfig(tokenizer="a", source_tokenizer="b"), "model.tokenizer for both"),
        (lambda: ExecutionConfig(accumulate=0), "execution.accumulate must be at least 1"),
        (lambda: ExecutionConfig(dtype="float16"), "'float32', 'bfloat16'; got 'float16'"),
        (lambda: EvaluationConfig(min_length=9, max_length=8), "min_length (9) is above"),
        (lambda: EvaluationConfig(metrics=("meteor",)), "'rouge', 'bleu', 'chrf'; got 'meteor'"),
        (lambda: EvaluationConfig(repetition_penalty=0.0), "repetition_penalty must be positive"),
        (lambda: TrainingConfig(run=3), "TrainingConfig.run must be a table of output, steps"),
        (
            lambda: TrainingConfig(
                run=RunConfig(best_metric="rouge2"), evaluation=EvaluationConfig(samples=0)
            ),
            "needs predictions; got evaluation.samples=0",
        ),
    ],
)
def test_values_that_cannot_be_are_refused_when_made(make, message):
    with pytest.raises(ConfigError) as error:
        make()
    assert message in str(error.value)


def test_lists_become_tuples_and_configurations_hash():
    config = EvaluationConfig(metrics=["rouge"])
    assert config.metrics == ("rouge",)
    changed = TrainingConfig().replace(run={"steps": 3}, evaluation=config)
    assert changed.run.steps == 3
    assert changed.evaluation is config
    assert len({TrainingConfig(), TrainingConfig(), changed}) == 2
    options = ModelConfig(path="a", encoder_options={"b": 1, "a": 2.0}).encoder_options
    assert options == (("a", 2.0), ("b", 1))


def test_steps_follow_from_epochs():
    assert RunConfig(steps=7).total_steps(100) == 7
    assert RunConfig(epochs=0.5).total_steps(100) == 50
    assert RunConfig(epochs=0.1).total_steps(30) == 3
    assert RunConfig(epochs=0.001).total_steps(30) == 1
    assert RunConfig().total_steps(10) == 30


def test_sizes_per_device_and_places_are_settled_where_the_run_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b1.csv", "b2.csv", "t.en", "t.de"):
        (tmp_path / name).touch()
    (tmp_path / "pair").mkdir()
    config = TrainingConfig(
        model=ModelConfig(path="pair", tokenizer="org/on-the-hub"),
        data=DataConfig(train=("a.jsonl", "b*.csv", "t.en,t.de", "absent.csv", "NAME:split")),
        execution=ExecutionConfig(batch_size_per_device=4, accumulate=2),
    )
    found = config.resolved(devices=8, platform="cpu")
    assert found.data.batch_size == 64
    assert found.execution.batch_size_per_device is None
    assert found.execution.scan_layers is False
    assert found.model.path == str(tmp_path / "pair")
    assert found.model.tokenizer == "org/on-the-hub"
    here = str(tmp_path)
    assert found.data.train == (
        f"{here}/a.jsonl", f"{here}/b*.csv", f"{here}/t.en,{here}/t.de", "absent.csv", "NAME:split",
    )  # fmt: skip
    assert found.resolved(devices=2, platform="cpu") == found
    assert config.resolved(devices=1, platform="tpu").execution.scan_layers is True
    with pytest.raises(ConfigError, match="batch_size must be a multiple of"):
        TrainingConfig(execution=ExecutionConfig(accumulate=3)).resolved(devices=1, platform="gpu")


# Flags --------------------------------------------------------------------------------------------


@functools.cache
def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(allow_abbrev=False)
    config_io.add_flags(found)
    aliases.add_aliases(found)
    return found


def parse(*words: str) -> list[config_io.Override]:
    return parser().parse_args(list(words)).overrides or []


def flags(*words: str) -> TrainingConfig:
    return load(None, aliases.translate(parse(*words))[0])


SAMPLES = {bool: "true", int: "7", float: "0.25", str: "a b"}


def sample(annotation: Any) -> tuple[list[str], Any]:
    """Words for a flag of an annotation, and the value they say."""
    if annotation == schema.Options:
        return ["a=1", "b=x"], (("a", 1), ("b", "x"))
    options = typing.get_args(annotation) if isinstance(annotation, UNIONS) else (annotation,)
    option = options[0]
    if typing.get_origin(option) is Literal:
        return [typing.get_args(option)[-1]], typing.get_args(option)[-1]
    if typing.get_origin(option) is tuple:
        item = typing.get_args(option)[0]
        if item is Group:
            toml = "[{pattern = 'x', factor = 2}, {pattern = 'y'}]"
            return [toml], (Group(pattern="x", factor=2.0), Group(pattern="y"))
        if typing.get_origin(item) is Literal:
            return ["rouge", "bleu"], ("rouge", "bleu")
        return {str: (["a", "b c"], ("a", "b c")), int: (["7", "9"], (7, 9))}[item]
    return [SAMPLES[option]], {bool: True, int: 7, float: 0.25, str: "a b"}[option]


NEEDS = {
    "model": ["--set", "model.encoder=e", "--set", "model.decoder=d"],
    "model.path": [],
    "model.config": [],
    "run.overwrite": [],
    "optimizer.preset": [],
}


@pytest.mark.parametrize("full", sorted(all_keys()))
def test_every_key_is_a_flag_and_has_a_help(full):
    key = all_keys()[full]
    assert key.help
    words, value = sample(key.annotation)
    if full == "optimizer.preset":
        words, value = ["rothe"], "rothe"
    if full == "optimizer.groups":
        assert flags("--optimizer.groups", "{pattern = 'x'}").optimizer.groups[0].pattern == "x"
    before = NEEDS.get(full, NEEDS.get(full.split(".")[0], []))
    section, _, name = full.partition(".")
    spellings = [f"--{full}", f"--{section}.{name.replace('_', '-')}"]
    if name in short_names():
        spellings += [f"--{name}", f"--{name.replace('_', '-')}"]
    for spelling in spellings:
        config = flags(*before, spelling, *words)
        assert getattr(getattr(config, section), name) == value
    if len(words) == 1:
        assert flags(*before, "--set", f"{full}={words[0]}") == config
        assert flags(*before, f"--{full}={words[0]}") == config


def test_later_words_win_and_none_is_none(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[run]\nsteps = 3\nkeep = 9\n")
    config = load(file, parse("--steps", "4", "--set", "run.steps=5", "--data.pack", "--seed=1"))
    assert (config.run.steps, config.run.keep, config.run.seed) == (5, 9, 1)
    assert config.data.pack is True
    assert load(file, parse("--steps", "none", "--epochs", "2")).run.steps is None
    assert flags("--data.source-buckets", "64,32").data.source_buckets == (32, 64)
    assert flags("--data.train", '["a", "b,c"]').data.train == ("a", "b,c")
    assert flags("--source_prefix=summarize: ").data.source_prefix == "summarize: "
    sides = ("--encoder=a", "--decoder=b")
    assert flags("--encoder-layers=2", *sides).model.encoder_layers == 2
    assert flags("--encoder-layers", "0", "2", *sides).model.encoder_layers == (0, 2)
    assert flags("--learning-rate", "1e-4").optimizer.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "run.step=3"], "there is no key 'run.step'; did you mean 'steps'?"),
        (["--set", "batch_size=3"], "'batch_size' may be 'data.batch_size' or 'evaluation.batch"),
        (["--set", "learnin_rate=3"], "no key 'learnin_rate'; did you mean 'learning_rate'?"),
        (["--set", "run.steps"], "--set takes section.key=value; got 'run.steps'"),
        (["--set", "run.steps=x"], "run.steps must be an integer or 'none'; got 'x'"),
        (["--steps", "x"], "--steps must be an integer or 'none'; got 'x'"),
        (["--data.pack", "maybe"], "--data.pack must be true or false; got 'maybe'"),
        (["--model.encoder-options", "a"], "must be written as NAME=VALUE; got 'a'"),
        (["--optimizer.groups", "{x"], "--optimizer.groups must be a list, each a table of patt"),
        (["--metrics", "rouge", "blue"], "--metrics[1] must be 'rouge', 'bleu', 'chrf'; got 'bl"),
        (["--learning-rate", "inf"], "--learning-rate must be a number"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_flag_is_named_with_it(words, message):
    with pytest.raises(ConfigError) as error:
        flags(*words)
    assert message in str(error.value)


def test_reading_a_configuration_needs_no_jax():
    code = (
        "import sys\n"
        "from jax_encdec.cli import main\n"
        "for command in ('train', 'evaluate'):\n"
        "    try: main([command, '--help'])\n"
        "    except SystemExit: pass\n"
        "heavy = {'jax', 'flax', 'numpy', 'optax', 'orbax', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for full in all_keys():
        assert f"--{full.replace('_', '-')}" in done.stdout, full


# Other people's flags -----------------------------------------------------------------------------

SUMMARIZATION = """--model_name_or_path m --train_file a.csv --validation_file b.csv
 --test_file c.csv --text_column article --summary_column highlights --source_prefix sum:
 --output_dir out
 --per_device_train_batch_size=4 --per_device_eval_batch_size=8 --overwrite_output_dir
 --predict_with_generate --do_train --do_eval --do_predict --max_source_length 512
 --max_target_length 64 --val_max_target_length 70 --num_beams 4 --gradient_accumulation_steps 2
 --learning_rate 3e-5 --weight_decay 0.01 --adam_beta1 0.8 --adam_beta2 0.98 --adam_epsilon 1e-6
 --max_grad_norm 0.5 --num_train_epochs 2 --lr_scheduler_type cosine --warmup_steps 100
 --logging_steps 20 --save_steps 30 --eval_strategy steps --eval_steps 40 --save_total_limit 2
 --seed 7 --label_smoothing_factor 0.1 --bf16 True --gradient_checkpointing --fp16 False
 --max_train_samples 1000 --max_eval_samples 50 --max_predict_samples 60 --optim adafactor
 --report_to tensorboard --load_best_model_at_end --metric_for_best_model eval_rouge2
 --greater_is_better True --cache_dir cache --preprocessing_num_workers 3 --tokenizer_name t"""


def test_a_summarization_command_means_what_it_says():
    config = flags(*SUMMARIZATION.split())
    assert config == TrainingConfig(
        model=ModelConfig(path="m", cache_dir="cache", tokenizer="t"),
        data=DataConfig(
            train=("a.csv",), validation=("b.csv",), test=("c.csv",), source_column="article",
            target_column="highlights", source_prefix="sum:", max_source_length=512,
            max_target_length=64, max_train_samples=1000, max_validation_samples=50,
            max_test_samples=60, workers=3,
        ),
        optimizer=OptimizerConfig(
            name="adafactor", learning_rate=3e-5, weight_decay=0.01, b1=0.8, b2=0.98, eps=1e-6,
            clip_norm=0.5, schedule="cosine", warmup_steps=100,
        ),
        execution=ExecutionConfig(
            batch_size_per_device=4, accumulate=2, label_smoothing=0.1, dtype="bfloat16",
            remat="full",
        ),
        run=RunConfig(
            output="out", epochs=2.0, log_every=20, save_every=30, evaluate_every=40, keep=2,
            seed=7, overwrite=True, tensorboard=True, final="best", best_metric="rouge2",
        ),
        evaluation=EvaluationConfig(
            num_beams=4, max_length=70, batch_size=8, samples=50,
        ),
    )  # fmt: skip
    assert config.resolved(devices=8, platform="cpu").data.batch_size == 4 * 8 * 2


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("--max_steps 10 --num_train_epochs 3", "run.steps", 10),
        ("--max_steps -1 --num_train_epochs 3", "run.epochs", 3.0),
        ("--eval_strategy epoch --eval_steps 3", "run.evaluate_every", "epoch"),
        ("--evaluation_strategy no", "run.evaluate_every", None),
        ("--save_strategy epoch --save_steps 3", "run.save_every", "epoch"),
        ("--do_eval False", "run.evaluate_every", 0),
        ("--warmup_ratio 0.1 --max_steps 95", "optimizer.warmup_steps", 10),
        ("--predict_with_generate false", "evaluation.samples", 0),
        ("--generation_max_length 30 --val-max-target-length 20", "evaluation.max_length", 20),
        ("--lr_scheduler_type constant_with_warmup", "optimizer.schedule", "constant"),
        ("--optim adamw_torch_fused", "optimizer.name", "adamw"),
        ("--resume_from_checkpoint out", "run.output", "out"),
        ("--resume_from_checkpoint out --output_dir out", "run.resume", "always"),
        ("--resume_from_checkpoint True --output_dir out", "run.resume", "always"),
        ("--report_to none", "run.tensorboard", False),
        ("--dataset_name cnn --dataset_config_name 3.0.0", "data.train", ("cnn:3.0.0:train",)),
        ("--dataset_name x", "data.validation", ("x:validation",)),
        ("--dataset_name x --do_predict", "data.test", ("x:test",)),
        ("--dataset_name x", "data.format", "datasets"),
        ("--source_lang en --target_lang ro", "data.target_column", "translation.ro"),
        ("--source_lang en_XX --target_lang ro_RO", "data.source_column", "translation.en"),
        ("--batch-size 12", "data.batch_size", 12),
        ("--model m", "model.path", "m"),
    ],
)  # fmt: skip
def test_flags_that_stand_for_something_else(words, key, value):
    section, _, name = key.partition(".")
    assert getattr(getattr(flags(*words.split()), section), name) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--fp16", "--fp16 has no meaning here: float16 needs loss scaling, which bfloat16"),
        ("--deepspeed ds.json", "--deepspeed has no meaning here: devices are laid out by --mesh"),
        ("--push-to-hub", "--push-to-hub has no meaning here"),
        ("--ignore_pad_token_for_loss False", "pads never count"),
        ("--report_to wandb", "--report_to may be none or tensorboard; got 'wandb'"),
        ("--optim sgd", "--optim must be one of adamw_torch,"),
        ("--lr_scheduler_type polynomial", "--lr_scheduler_type must be one of linear,"),
        ("--do_train False", "`jax-encdec evaluate` only scores"),
        ("--do_predict", "--do_predict needs test data: --test_file"),
        ("--test_file x --do_predict False", "leave it out"),
        ("--warmup_ratio 0.1", "stand beside --max_steps"),
        ("--warmup_ratio x", "--warmup_ratio must be a number; got 'x'"),
        ("--bf16 maybe", "--bf16 must be true or false; got 'maybe'"),
        ("--output_dir", "--output_dir needs a value"),
        ("--resume_from_checkpoint a --output_dir b", "goes on in its own folder"),
        ("--greater_is_better True", "contradicts --metric_for_best_model loss"),
        ("--dataset_name x --train_file y", "give --dataset_name or --train_file, not both"),
        ("--dataset_config_name x", "needs --dataset_name"),
        ("--metric_for_best_model accuracy", "--metric_for_best_model must be 'loss'"),
        ("--learning_rate x", "--learning_rate must be a number"),
    ],
)  # fmt: skip
def test_flags_without_a_meaning_are_refused_with_the_reason(words, message):
    with pytest.raises(ConfigError) as error:
        flags(*words.split())
    assert message in str(error.value)


def test_flags_that_change_nothing_are_noticed():
    words = "--use_fast_tokenizer True --group_by_length --save_safetensors"
    overrides, notices = aliases.translate(parse(*words.split()))
    assert not overrides
    assert len(notices) == 3
    assert notices[0] == "--use_fast_tokenizer has no influence: all tokenizers are fast ones"


OF_SCRIPTS = """adafactor evaluation_strategy fp16_full_eval group_by_length half_precision_backend
 include_inputs_for_metrics jit_mode_eval logging_dir no_cuda overwrite_output_dir save_safetensors
 warmup_ratio model_name_or_path config_name tokenizer_name cache_dir use_fast_tokenizer
 model_revision token use_auth_token trust_remote_code resize_position_embeddings lang dataset_name
 dataset_config_name text_column summary_column train_file validation_file test_file overwrite_cache
 preprocessing_num_workers max_source_length max_target_length val_max_target_length
 pad_to_max_length max_train_samples max_eval_samples max_predict_samples num_beams
 ignore_pad_token_for_loss source_prefix forced_bos_token source_lang target_lang"""
"""Arguments of the scripts themselves, and of earlier releases."""


def test_names_taken_over_are_really_theirs_and_set_what_exists():
    # Read, not imported, which would take seconds.
    package = importlib.util.find_spec("transformers")
    if package is None:
        pytest.skip("transformers is not installed")
    arguments = set(OF_SCRIPTS.split())
    for name in ("training_args.py", "training_args_seq2seq.py"):
        text = (Path(str(package.origin)).parent / name).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                arguments.add(node.target.id)
    assert "label_smoothing_factor" in arguments
    ours = {"model", "batch_size"}
    assert set(aliases.names()) - arguments <= ours
    assert len(set(aliases.names())) == len(aliases.names())
    assert not set(aliases.names()) & set(short_names())
    targets = [*aliases.RENAMED.values(), *(key for key, _, _ in aliases.SWITCHES.values())]
    targets += [key for key, _ in aliases.CHOICES.values()]
    assert set(targets) <= set(all_keys())
    known = {*aliases.names(), *short_names()}
    assert set(OF_SCRIPTS.split()) - known == {"jit_mode_eval"}
