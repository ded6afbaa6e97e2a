"""The folder of a run: whose it is, what is in it, and how its parts are written.

    config.toml      every option, resolved; all that `--resume` needs, with
    start/           the model's configuration and tokenizers
    metrics.jsonl    the numbers, line by line
    sessions.jsonl   every start and end: hardware, versions, why it ended
    checkpoints/     what a run resumes from
    samples/         tables of sample predictions
    tensorboard/     where that was asked for
    report.md, curves/
    model/           the trained model, as PyTorch Transformers opens it

A folder that holds anything else is left alone.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jax_encdec import hub
from jax_encdec.encoder_decoder import EncoderDecoderModel
from jax_encdec.errors import EncDecError, InputError
from jax_encdec.pretrained import generation_defaults, published_config, read_configs
from jax_encdec.tokenization import TokenizerPair
from jax_encdec.training import config_io
from jax_encdec.training.checkpoint import Checkpoints
from jax_encdec.training.config import RunConfig, TrainingConfig

CONFIG, METRICS, SESSIONS = "config.toml", "metrics.jsonl", "sessions.jsonl"
CHECKPOINTS, MODEL, START, SAMPLES = "checkpoints", "model", "start", "samples"
TENSORBOARD, CURVES, REPORT = "tensorboard", "curves", "report.md"
NAMES = (CONFIG, METRICS, SESSIONS, CHECKPOINTS, MODEL, START, SAMPLES, TENSORBOARD, CURVES, REPORT)


def check(config: TrainingConfig) -> None:
    """See that the output folder is new, or holds a run that may be gone on with or replaced.

    Raises:
        InputError: it is a file, holds something else than a run, or a run that `run.resume` and
            `run.overwrite` do not allow to touch, or that this one starts from; or no run where
            `run.resume` is "always".
    """
    run, folder = config.run, Path(config.run.output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"run.output {folder} is a file; expected a folder")
    foreign = (
        sorted(e.name for e in folder.iterdir() if not _own(e.name)) if folder.exists() else []
    )
    if foreign:
        raise InputError(
            f"run.output {folder} holds {foreign[0]}, which is not of a run; nothing was touched: "
            f"name a new or empty folder"
        )
    held = any((folder / name).exists() for name in (SESSIONS, CHECKPOINTS, MODEL))
    if (folder / CONFIG).exists() and not held:
        raise InputError(
            f"run.output {folder} holds a config.toml but no run, which would write its own there; "
            f"name another folder"
        )
    if held and not run.overwrite and run.resume == "never":
        raise InputError(
            f"run.output {folder} holds a run already: run.resume='auto' (--resume {folder}) goes "
            f"on with it, run.overwrite=true removes it, or name another folder"
        )
    if not held and run.resume == "always":
        raise InputError(f"run.output {folder} holds no run to go on with")
    for key, name in _inputs(config) if run.overwrite else ():
        if folder.resolve() in Path(name).expanduser().resolve().parents:
            raise InputError(
                f"{key} is {name}, inside run.output {folder}, which run.overwrite removes; name "
                f"another output folder"
            )


def _inputs(config: TrainingConfig) -> Iterator[tuple[str, str]]:
    """The keys and values that may name files to read."""
    names = ("path", "config", "encoder", "decoder", "encoder_config", "decoder_config")
    for name in (*names, "tokenizer", "source_tokenizer", "target_tokenizer"):
        if value := getattr(config.model, name):
            yield f"model.{name}", value
    for name in ("train", "validation", "test"):
        yield from ((f"data.{name}", value) for value in getattr(config.data, name))


def make(run: RunConfig) -> None:
    """Make the output folder, without what an earlier run left where that is to be replaced.

    Raises:
        OSError: it cannot be written.
    """
    folder = Path(run.output)
    for name in NAMES if run.overwrite else ():
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def saved(run: RunConfig) -> bool:
    """Whether there is a checkpoint to go on from."""
    folder = Path(run.output) / CHECKPOINTS
    if run.overwrite or not folder.is_dir():
        return False
    with Checkpoints(folder, read_only=True) as checkpoints:
        return bool(checkpoints.steps())


def _own(name: str) -> bool:
    # Hidden files are a killed process's temporary ones, or the file system's.
    return name in NAMES or name.startswith(".")


def save_config(folder: Path, config: TrainingConfig) -> None:
    """Write config.toml; used again, it neither goes on with a run unasked nor removes one."""
    config_io.save(config.replace(run={"resume": "never", "overwrite": False}), folder / CONFIG)


def changes(folder: Path, config: TrainingConfig) -> list[str]:
    """What a resumed run does otherwise than the run until now, a sentence for each key."""
    try:
        before = config_io.load(folder / CONFIG)
    except EncDecError:
        return ["the configuration until now is not known: config.toml is missing or damaged"]
    found = []
    for section in dataclasses.fields(config):
        old, new = getattr(before, section.name), getattr(config, section.name)
        for key in dataclasses.fields(new):
            values = getattr(old, key.name), getattr(new, key.name)
            if values[0] != values[1] and f"{section.name}.{key.name}" not in _FREE:
                found.append(f"{section.name}.{key.name} was {values[0]} and is {values[1]}")
    return found


_FREE = {f"run.{name}" for name in ("output", "resume", "overwrite", "progress", "max_minutes")}


def save_start(folder: Path, model: EncoderDecoderModel, tokenizers: TokenizerPair | None) -> None:
    """Keep what a resumed run needs besides its checkpoint: configuration and tokenizers."""
    with replaced(folder / START) as start:
        hub.write_json(
            start / "config.json", published_config(model.config, str(model.param_dtype))
        )
        defaults = generation_defaults(model.generation_config, model.config)
        hub.write_json(start / "generation_config.json", defaults.to_dict())
        if tokenizers is not None:
            tokenizers.save(start)


def read_start(folder: Path) -> tuple[EncoderDecoderModel, TokenizerPair]:
    """The model and the tokenizers that `save_start` kept.

    Raises:
        CheckpointError, ConfigError: the folder is missing or damaged.
    """
    config, generation_config = read_configs(folder / START)
    model = EncoderDecoderModel(config, generation_config=generation_config)
    return model, TokenizerPair.from_pretrained(folder / START)


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A new folder to fill, that takes the place of `folder` when all is in it.

    On any failure the old one stays, or, after a kill, is put back by the next call.
    """
    new, old = (folder.parent / f".{folder.name}-{part}" for part in ("unfinished", "old"))
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        if folder.exists():
            os.rename(folder, old)
        os.rename(new, folder)
    finally:
        if old.exists() and not folder.exists():
            os.rename(old, folder)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def write_model(
    folder: Path,
    model: EncoderDecoderModel,
    params: Any,
    tokenizers: TokenizerPair | None,
    card: str,
) -> None:
    """Write the model folder of a run: weights, configurations, tokenizers, card."""
    with replaced(folder / MODEL) as made:
        model.save_pretrained(made, params)
        if tokenizers is not None:
            tokenizers.save(made)
        hub.write_bytes(made / "README.md", card.encode())
