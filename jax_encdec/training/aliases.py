"""Flag names of run_summarization, run_translation and Seq2SeqTrainingArguments, as keys of ours.

Only the names are taken over: what is not given has our default, not theirs. A flag whose meaning
does not exist here is refused with the reason, unless it is given the value that says what happens
anyway; one that cannot change the result is let through with a notice. Sizes per device stay so
until the run starts (`TrainingConfig.resolved`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence

from jax_encdec.errors import ConfigError
from jax_encdec.training.config_io import Flag, Override

Words = tuple[str, ...]
Given = Mapping[str, Words]
Settings = list[tuple[str, Words]]

PREFIX = "alias:"

RENAMED = {
    "model": "model.path",
    "batch_size": "data.batch_size",
    "model_name_or_path": "model.path",
    "config_name": "model.config",
    "tokenizer_name": "model.tokenizer",
    "model_revision": "model.revision",
    "hub_token": "model.token",
    "cache_dir": "model.cache_dir",
    "train_file": "data.train",
    "validation_file": "data.validation",
    "test_file": "data.test",
    "text_column": "data.source_column",
    "summary_column": "data.target_column",
    "preprocessing_num_workers": "data.workers",
    "max_predict_samples": "data.max_test_samples",
    "per_device_train_batch_size": "execution.batch_size_per_device",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "gradient_accumulation_steps": "execution.accumulate",
    "adam_beta1": "optimizer.b1",
    "adam_beta2": "optimizer.b2",
    "adam_epsilon": "optimizer.eps",
    "max_grad_norm": "optimizer.clip_norm",
    "label_smoothing_factor": "execution.label_smoothing",
    "logging_steps": "run.log_every",
    "save_total_limit": "run.keep",
    "output_dir": "run.output",
    "generation_num_beams": "evaluation.num_beams",
    "generation_max_length": "evaluation.max_length",
    "val_max_target_length": "evaluation.max_length",
}
"""Another name of a key, its values as they are."""

SWITCHES = {
    "overwrite_output_dir": ("run.overwrite", "true", "false"),
    "bf16": ("execution.dtype", "bfloat16", "float32"),
    "gradient_checkpointing": ("execution.remat", "full", "none"),
    "activation_checkpointing": ("execution.remat", "full", "none"),
    "dataloader_drop_last": ("data.drop_last", "true", "false"),
    "load_best_model_at_end": ("run.final", "best", "last"),
    "disable_tqdm": ("run.progress", "false", "true"),
}
"""A key, and its values for true and false."""

CHOICES: dict[str, tuple[str, dict[str, str]]] = {
    "lr_scheduler_type": (
        "optimizer.schedule",
        {
            "linear": "linear",
            "cosine": "cosine",
            "constant": "constant",
            "constant_with_warmup": "constant",
            "inverse_sqrt": "inverse_sqrt",
        },
    ),
    "optim": (
        "optimizer.name",
        {
            "adamw_torch": "adamw",
            "adamw_torch_fused": "adamw",
            "adamw_hf": "adamw",
            "adafactor": "adafactor",
            "lion_32bit": "lion",
        },
    ),
    "save_strategy": ("run.save_every", {"steps": "", "epoch": "epoch", "no": "none"}),
    "eval_strategy": ("run.evaluate_every", {"steps": "", "epoch": "epoch", "no": "none"}),
    "evaluation_strategy": ("run.evaluate_every", {"steps": "", "epoch": "epoch", "no": "none"}),
}
"""A key, and its values by theirs; "" leaves it to another flag."""

_OFF = ("false", "no", "none", "")
_DEVICES = "devices are laid out by --mesh, without a launcher"
_HUB = "nothing is uploaded; the final model lies in the run's folder"

REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "fp16": (_OFF, "float16 needs loss scaling, which bfloat16 does without: use --bf16"),
    "fp16_full_eval": (_OFF, "evaluation computes as training does: --execution.dtype"),
    "bf16_full_eval": (_OFF, "evaluation computes as training does: --execution.dtype"),
    "tf32": (_OFF, "precision is set by --execution.dtype"),
    "adafactor": (_OFF, "use --optim adafactor"),
    "lr_scheduler_kwargs": (_OFF, "schedules have no further arguments"),
    "optim_args": (_OFF, "the optimizer's options are --optimizer.* keys"),
    "gradient_checkpointing_kwargs": (_OFF, "what is computed again is set by --execution.remat"),
    "activation_checkpointing_kwargs": (_OFF, "what is computed again is set by --execution.remat"),
    "use_liger_kernel": (_OFF, "kernels are chosen by --execution.attention"),
    "average_tokens_across_devices": (("true",), "a loss is a sum over all devices, divided once"),
    "train_sampling_strategy": (("random",), "the order is random, batches are of like lengths"),
    "auto_find_batch_size": (_OFF, "`jax-encdec plan` says which batch fits"),
    "pad_to_max_length": (
        _OFF,
        "lengths are set by --data.source-buckets and --data.target-buckets",
    ),
    "ignore_pad_token_for_loss": (("true",), "pads never count in the loss"),
    "resize_position_embeddings": (_OFF, "positions are those of the checkpoint"),
    "trust_remote_code": (_OFF, "code that comes with a checkpoint is never run"),
    "lang": (_OFF, "the tokenizer's own language settings are used"),
    "forced_bos_token": (_OFF, "set forced_bos_token_id in the model's generation_config.json"),
    "generation_config": (_OFF, "generation options are --evaluation.* keys"),
    "prediction_loss_only": (_OFF, "use --evaluation.samples 0"),
    "neftune_noise_alpha": (_OFF, "there is no noise on embeddings"),
    "data_seed": (_OFF, "one --seed sets everything random"),
    "ignore_data_skip": (_OFF, "a resumed run always goes on where the data stopped"),
    "save_only_model": (_OFF, "checkpoints hold all that a run resumes from"),
    "use_cpu": (_OFF, "set JAX_PLATFORMS=cpu in the environment"),
    "no_cuda": (_OFF, "set JAX_PLATFORMS=cpu in the environment"),
    "deepspeed": (_OFF, _DEVICES),
    "fsdp": (_OFF, _DEVICES),
    "fsdp_config": (_OFF, _DEVICES),
    "accelerator_config": (_OFF, _DEVICES),
    "parallelism_config": (_OFF, _DEVICES),
    "ddp_backend": (_OFF, _DEVICES),
    "local_rank": (("-1", "0"), "use --coordinator, --num-processes and --process-id"),
    "push_to_hub": (_OFF, _HUB),
    "hub_model_id": (_OFF, _HUB),
    "hub_strategy": (_OFF, _HUB),
    "hub_private_repo": (_OFF, _HUB),
    "use_auth_token": (_OFF, "pass it as --token"),
    "logging_strategy": (("steps",), "numbers are written every --logging_steps steps"),
    "eval_delay": (("0",), "evaluations begin with the first --eval_steps"),
    "eval_on_start": (_OFF, "`jax-encdec evaluate` scores a model before training"),
}
"""Values that say what happens anyway, and the reason why others are refused."""

NO_INFLUENCE = {
    "use_fast_tokenizer": "all tokenizers are fast ones",
    "overwrite_cache": "token ids are cached under what they follow from",
    "logging_dir": "TensorBoard files lie in the run's folder",
    "logging_first_step": "the first numbers come after --logging_steps steps",
    "log_level": "there are no log levels",
    "run_name": "the run is named by its folder",
    "dataloader_num_workers": "batches are made by a thread beside the training",
    "dataloader_pin_memory": "batches are made by a thread beside the training",
    "dataloader_persistent_workers": "batches are made by a thread beside the training",
    "remove_unused_columns": "columns are named",
    "group_by_length": "batches are always of like lengths",
    "length_column_name": "lengths are counted",
    "sortish_sampler": "batches are always of like lengths",
    "torch_compile": "everything is compiled",
    "torch_compile_backend": "everything is compiled",
    "torch_compile_mode": "everything is compiled",
    "use_cache": "generation always keeps what it has computed",
    "logging_nan_inf_filter": "numbers are written as they are; see --run.on-non-finite",
    "include_num_input_tokens_seen": "tokens are always counted",
    "dataloader_prefetch_factor": "batches are made by a thread beside the training",
    "skip_memory_metrics": "memory is not measured",
    "eval_accumulation_steps": "predictions never wait on the device",
    "include_inputs_for_metrics": "metrics see texts",
    "ddp_find_unused_parameters": _DEVICES,
    "ddp_timeout": _DEVICES,
    "save_safetensors": "models are always saved as safetensors",
    "full_determinism": "a run is a function of its configuration on the same machine",
    "half_precision_backend": "there is one",
}
"""Accepted with a notice: the reason why they cannot change the result."""


def translate(overrides: Sequence[Override]) -> tuple[list[Override], list[str]]:
    """Replace flags of theirs by what they set; returns also notices of what has no influence.

    Raises:
        ConfigError: a flag has no meaning here, or not with this value.
    """
    theirs = {o.key.removeprefix(PREFIX): o for o in overrides if o.key.startswith(PREFIX)}
    given = {name: override.words for name, override in theirs.items()}
    out: list[Override] = []
    notices: list[str] = []
    for override in overrides:
        name = override.key.removeprefix(PREFIX)
        if name == override.key:
            out.append(override)
        elif name in NO_INFLUENCE:
            notices.append(f"{override.where} has no influence: {NO_INFLUENCE[name]}")
        else:
            settings = _settings(name, override, given)
            out += [Override(key, words, override.where) for key, words in settings]
    return out, notices


def names() -> tuple[str, ...]:
    """Every name that is known here."""
    parts = (RENAMED, SWITCHES, CHOICES, REFUSED, NO_INFLUENCE, _SPECIAL)
    return tuple(name for part in parts for name in part)


def add_aliases(parser: argparse.ArgumentParser) -> None:
    """Add the flags, hidden from the help text, which names them in one sentence."""
    for name in names():
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(
            *spellings, action=Flag, key=f"{PREFIX}{name}", nargs="*", help=argparse.SUPPRESS
        )


def _settings(name: str, override: Override, given: Given) -> Settings:
    where, words = override.where, override.words
    if name in RENAMED:
        if not words:
            raise ConfigError(f"{where} needs a value")
        return [(RENAMED[name], words)]
    if name in SWITCHES:
        key, yes, no = SWITCHES[name]
        return [(key, (yes if _truth(where, words) else no,))]
    if name in CHOICES:
        key, values = CHOICES[name]
        word = " ".join(words)
        if word not in values:
            raise ConfigError(f"{where} must be one of {', '.join(values)}; got {word!r}")
        return [(key, (values[word],))] if values[word] else []
    if name in REFUSED:
        neutral, reason = REFUSED[name]
        if " ".join(words or ("true",)).lower() not in neutral:
            raise ConfigError(f"{where} has no meaning here: {reason}")
        return []
    return _SPECIAL[name](where, words, given)


def _truth(where: str, words: Words) -> bool:
    word = " ".join(words or ("true",)).lower()
    if word in ("true", "yes", "1"):
        return True
    if word in ("false", "no", "0"):
        return False
    raise ConfigError(f"{where} must be true or false; got {' '.join(words)!r}")


def _number(where: str, words: Words) -> float:
    try:
        number = float(" ".join(words))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{where} must be a number; got {' '.join(words)!r}")
    return number


# Flags that depend on others, or set several keys -------------------------------------------------


def _steps(where: str, words: Words, given: Given) -> Settings:
    return [] if _number(where, words) <= 0 else [("run.steps", words)]


def _epochs(where: str, words: Words, given: Given) -> Settings:
    limit = given.get("max_steps")
    if limit and _number("--max_steps", limit) > 0:
        return []  # As documented there: max_steps overrides num_train_epochs.
    return [("run.epochs", words)]


def _eval_steps(where: str, words: Words, given: Given) -> Settings:
    strategy = given.get("eval_strategy", given.get("evaluation_strategy", ("steps",)))
    return [] if strategy != ("steps",) else [("run.evaluate_every", words)]


def _save_steps(where: str, words: Words, given: Given) -> Settings:
    return (
        [] if given.get("save_strategy", ("steps",)) != ("steps",) else [("run.save_every", words)]
    )


def _warmup_ratio(where: str, words: Words, given: Given) -> Settings:
    ratio = _number(where, words)
    if ratio == 0:
        return []
    limit = given.get("max_steps")
    steps = _number("--max_steps", limit) if limit else 0
    if steps <= 0 or not 0 < ratio < 1:
        raise ConfigError(
            f"{where} must be between 0 and 1 and stand beside --max_steps, of which it is a "
            f"share; or give --warmup_steps"
        )
    return [("optimizer.warmup_steps", (str(math.ceil(ratio * steps)),))]


def _eval_samples(where: str, words: Words, given: Given) -> Settings:
    return [("data.max_validation_samples", words), ("evaluation.samples", words)]


def _do_train(where: str, words: Words, given: Given) -> Settings:
    if not _truth(where, words):
        raise ConfigError(f"{where}: this command trains; `jax-encdec evaluate` only scores")
    return []


def _do_eval(where: str, words: Words, given: Given) -> Settings:
    return [] if _truth(where, words) else [("run.evaluate_every", ("0",))]


def _do_predict(where: str, words: Words, given: Given) -> Settings:
    # What is in data.test is scored at the end, and what is not there cannot be.
    wanted = _truth(where, words)
    named = "test_file" in given or "dataset_name" in given
    if wanted and not named:
        raise ConfigError(f"{where} needs test data: --test_file")
    if not wanted and "test_file" in given:
        raise ConfigError(f"{where}: --test_file is scored at the end of a run; leave it out")
    return []


def _with_generate(where: str, words: Words, given: Given) -> Settings:
    return (
        []
        if _truth(where, words)
        else [("evaluation.samples", ("0",)), ("evaluation.test_samples", ("0",))]
    )


def _resume(where: str, words: Words, given: Given) -> Settings:
    word = " ".join(words or ("true",))
    if word.lower() in ("true", "1", "yes"):
        return [("run.resume", ("always",))]
    if word.lower() in _OFF:
        return []
    output = given.get("output_dir", (word,))
    if output != (word,):
        raise ConfigError(
            f"{where}: a run goes on in its own folder, from its latest checkpoint; got {word!r} "
            f"and --output_dir {' '.join(output)!r}"
        )
    return [("run.output", (word,)), ("run.resume", ("always",))]


def _report_to(where: str, words: Words, given: Given) -> Settings:
    wanted = {part for word in words for part in word.split(",") if part}
    if unknown := wanted - {"none", "tensorboard"}:
        raise ConfigError(
            f"{where} may be none or tensorboard; got {sorted(unknown)[0]!r}: metrics.jsonl is "
            f"always written, and a callback may send its lines anywhere"
        )
    return [("run.tensorboard", ("true" if "tensorboard" in wanted else "false",))]


def _best_metric(where: str, words: Words, given: Given) -> Settings:
    name = " ".join(words).removeprefix("eval_").removeprefix("test_")
    return [("run.best_metric", (name,))]


def _greater(where: str, words: Words, given: Given) -> Settings:
    metric = " ".join(given.get("metric_for_best_model", ("loss",))).removeprefix("eval_")
    if _truth(where, words) != (metric != "loss"):
        raise ConfigError(
            f"{where} contradicts --metric_for_best_model {metric}: "
            f"{'a lower' if metric == 'loss' else 'a higher'} one is better"
        )
    return []


def _dataset(where: str, words: Words, given: Given) -> Settings:
    for name in ("train_file", "validation_file", "test_file"):
        if name in given:
            raise ConfigError(f"give {where} or --{name}, not both")
    parts = [*words, *given.get("dataset_config_name", ())]
    splits = ["train", "validation"]
    if "do_predict" in given and _truth("--do_predict", given["do_predict"]):
        splits.append("test")
    return [("data.format", ("datasets",))] + [
        (f"data.{split}", (":".join([*parts, split]),)) for split in splits
    ]


def _dataset_config(where: str, words: Words, given: Given) -> Settings:
    if "dataset_name" not in given:
        raise ConfigError(f"{where} needs --dataset_name")
    return []


def _language(side: str) -> Callable[[str, Words, Given], Settings]:
    def settings(where: str, words: Words, given: Given) -> Settings:
        # Their files hold {"translation": {"en": ..., "de": ...}}; "en_XX" names the key "en".
        return [(f"data.{side}_column", (f"translation.{' '.join(words).split('_')[0]}",))]

    return settings


_SPECIAL: dict[str, Callable[[str, Words, Given], Settings]] = {
    "max_steps": _steps,
    "num_train_epochs": _epochs,
    "eval_steps": _eval_steps,
    "save_steps": _save_steps,
    "warmup_ratio": _warmup_ratio,
    "max_eval_samples": _eval_samples,
    "do_train": _do_train,
    "do_eval": _do_eval,
    "do_predict": _do_predict,
    "predict_with_generate": _with_generate,
    "resume_from_checkpoint": _resume,
    "report_to": _report_to,
    "metric_for_best_model": _best_metric,
    "greater_is_better": _greater,
    "dataset_name": _dataset,
    "dataset_config_name": _dataset_config,
    "source_lang": _language("source"),
    "target_lang": _language("target"),
}
