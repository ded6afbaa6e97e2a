"""TrainingConfig: everything that a run is made of, in six sections, hashable and checked.

    TrainingConfig(
        model=ModelConfig(encoder="google-bert/bert-base-uncased", decoder="..."),
        data=DataConfig(train=("train.jsonl",), validation=("valid.jsonl",)),
        optimizer=OptimizerConfig(learning_rate=3e-4),
        run=RunConfig(output="runs/first", steps=1000),
    )

`config_io.py` reads it from a TOML file and from flags, and writes it back. A key's help text is
the string under its field. Some things are settled only where the run starts, by `resolved`: sizes
given per device, what depends on the platform, and where files lie. Nothing here needs JAX.
"""

from __future__ import annotations

import glob
import math
import os
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jax_encdec.errors import ConfigError
from jax_encdec.training.data_config import SPLITS, DataConfig
from jax_encdec.training.optimizer_config import OptimizerConfig
from jax_encdec.training.schema import Options, check_fields

DEFAULT_EPOCHS = 3

Metric = Literal["loss", "rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf", "exact_match"]


def _at_least(section: str, config: Any, low: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not isinstance(value, str) and value < low:
            raise ConfigError(f"{section}.{name} must be at least {low}; got {value}")


def _rate(where: str, value: float | None) -> None:
    if value is not None and not 0 <= value < 1:
        raise ConfigError(f"{where} must be at least 0 and below 1; got {value}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained: a saved pair, or two checkpoints joined, or a random model.

    Either `path`; or `encoder` and `decoder`, each a checkpoint or the configuration of a random
    side; or `config`, of a random pair.
    """

    path: str | None = None
    """Saved pair to go on from: folder, weight file or hub repository id."""
    config: str | None = None
    """config.json of a pair (file, folder or hub id) that starts from random weights."""
    encoder: str | None = None
    """Checkpoint that the encoder starts from: folder, weight file or hub id."""
    decoder: str | None = None
    """Checkpoint that the decoder starts from."""
    encoder_config: str | None = None
    """config.json (file, folder or hub id) of a random encoder, or instead of the checkpoint's."""
    decoder_config: str | None = None
    """config.json (file, folder or hub id) of a random decoder, or instead of the checkpoint's."""
    encoder_layers: int | tuple[int, ...] | None = None
    """How many layers to take of the encoder's checkpoint, from the first; or which, from zero."""
    decoder_layers: int | tuple[int, ...] | None = None
    """How many layers to take of the decoder's checkpoint, from the first; or which, from zero."""
    cross_attention: Literal["fresh", "self"] = "fresh"
    """How cross-attention starts: drawn, or copied from each decoder layer's self-attention."""
    tie_encoder_decoder: bool = False
    """The decoder shares every parameter that the encoder has, too."""
    decoder_start_token_id: int | None = None
    """Token that opens every target; by default found in the decoder's checkpoint."""
    pad_token_id: int | None = None
    """Token that fills up; by default found in the decoder's checkpoint."""
    eos_token_id: int | tuple[int, ...] | None = None
    """Token or tokens that end a target; by default found in the decoder's checkpoint."""
    encoder_options: Options = ()
    """Fields of the encoder's configuration to change: hidden_dropout_prob=0.2."""
    decoder_options: Options = ()
    """Fields of the decoder's configuration to change."""
    dropout: float | None = None
    """Every dropout rate of both sides; by default as published."""
    tokenizer: str | None = None
    """Folder or hub id of one tokenizer for both sides; by default each side's checkpoint's."""
    source_tokenizer: str | None = None
    """Folder or hub id of the source side's tokenizer."""
    target_tokenizer: str | None = None
    """Folder or hub id of the target side's tokenizer."""
    revision: str | None = None
    """Branch, tag or commit of hub repositories."""
    encoder_revision: str | None = None
    """Branch, tag or commit of the encoder's hub repository."""
    decoder_revision: str | None = None
    """Branch, tag or commit of the decoder's hub repository."""
    token: str | None = field(default=None, repr=False, compare=False, metadata={"secret": True})
    """For hub repositories that ask for one; never written to a file. By default HF_TOKEN, or `hf
    auth login`'s."""
    cache_dir: str | None = None
    """Where downloads are kept."""
    offline: bool = False
    """Use what the cache holds, download nothing."""

    def __post_init__(self):
        check_fields(self)
        sides = [n for n in ("encoder", "decoder") if self._side(n)]
        given = [n for n in ("path", "config") if getattr(self, n)] + (
            ["encoder and decoder"] if sides else []
        )
        if len(given) > 1:
            raise ConfigError(f"give one of {' or '.join(f'model.{n}' for n in given)}")
        if len(sides) == 1:
            other = "decoder" if sides == ["encoder"] else "encoder"
            raise ConfigError(
                f"model.{sides[0]} is given, model.{other} is not: name a checkpoint for it, or "
                f"the configuration of a random one as model.{other}_config"
            )
        if not sides:
            for name in _JOIN_ONLY:
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise ConfigError(
                        f"model.{name} is for joining two checkpoints, model.encoder and "
                        f"model.decoder; got model.{(given or ['path'])[0]}"
                    )
        if self.tokenizer and (self.source_tokenizer or self.target_tokenizer):
            raise ConfigError(
                "give model.tokenizer for both sides, or model.source_tokenizer and "
                "model.target_tokenizer"
            )
        _rate("model.dropout", self.dropout)

    def _side(self, role: str) -> bool:
        return bool(getattr(self, role) or getattr(self, f"{role}_config"))

    @property
    def kind(self) -> Literal["saved", "joined", "random"] | None:
        """Which of the three ways it is; None where nothing is named yet."""
        if self.path:
            return "saved"
        if self.config:
            return "random"
        return "joined" if self._side("encoder") else None

    def hub_options(self) -> dict[str, Any]:
        """How hub repositories are had: arguments of `hub.resolve`."""
        return {
            "revision": self.revision,
            "token": self.token,
            "cache_dir": self.cache_dir,
            "local_files_only": self.offline,
        }


_PLACES = (
    "path",
    "config",
    "encoder",
    "decoder",
    "encoder_config",
    "decoder_config",
    "tokenizer",
    "source_tokenizer",
    "target_tokenizer",
)
_JOIN_ONLY = (
    "encoder_layers",
    "decoder_layers",
    "cross_attention",
    "tie_encoder_decoder",
    "encoder_revision",
    "decoder_revision",
)


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How a step is computed: on which mesh, in which precision, with how much memory."""

    mesh: str | None = None
    """Devices by axis, as "replica=2,fsdp=4,tensor=1", one of them -1 for the rest; by default all
    on fsdp."""
    indivisible: Literal["move", "replicate", "error"] = "move"
    """What becomes of a dimension that its mesh axis does not divide: another one is divided in its
    place, none is, or it is an error."""
    batch_size_per_device: int | None = None
    """Rows per device and micro-batch; sets data.batch_size to this times devices times accumulate
    when the run starts."""
    accumulate: int = 1
    """Micro-batches that a batch is cut into, their gradients summed."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again instead of keeping it."""
    attention: Literal["auto", "dense", "xla", "cudnn", "splash"] = "auto"
    """Kernel of the attention; auto: the best one that the platform has."""
    scan_layers: bool | Literal["auto"] = "auto"
    """Layers as a loop (compiles fast) or in a straight line; auto: straight on CPU, where it was
    measured faster, a loop elsewhere."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters that are trained."""
    loss_chunk: int | None = None
    """Target positions whose logits exist at a time; by default all."""
    label_smoothing: float = 0.0
    """Share of each target that goes to the whole vocabulary."""

    def __post_init__(self):
        check_fields(self)
        _at_least("execution", self, 1, "batch_size_per_device", "accumulate", "loss_chunk")
        _rate("execution.label_smoothing", self.label_smoothing)

    def scans_layers(self, platform: str) -> bool:
        """`scan_layers` with "auto" settled for a platform ("cpu", "gpu", "tpu")."""
        return platform != "cpu" if self.scan_layers == "auto" else self.scan_layers


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, where to, and how often what is written."""

    output: str = "./jax-encdec-run"
    """Folder of the run: configuration, metrics, checkpoints, report, and the final model."""
    steps: int | None = None
    """Updates to take; by default from epochs."""
    epochs: float | None = None
    """Passes over the training data, 3 where steps is not given either."""
    max_minutes: float | None = None
    """Stop, with a checkpoint, after this time; the schedules still follow the steps."""
    seed: int = 0
    """Of everything random: fresh parameters, order, dropout."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    evaluate_every: int | Literal["epoch"] | None = 500
    """Steps between evaluations on data.validation, or "epoch"; none: only at the end; 0: never."""
    save_every: int | Literal["epoch"] | None = 500
    """Steps between checkpoints, or "epoch"; none: only at the end."""
    keep: int = 3
    """Checkpoints that are kept, the latest ones."""
    keep_best: int = 1
    """Checkpoints kept besides, the best ones by best_metric."""
    best_metric: Metric = "loss"
    """What makes a checkpoint the best: the lowest loss, or the highest of the other metrics."""
    final: Literal["best", "last"] = "best"
    """Which checkpoint becomes the final model; without validation data the last one does."""
    patience: int | None = None
    """Stop when best_metric has not become better for this many evaluations."""
    resume: Literal["never", "auto", "always"] = "never"
    """What to do with a run that is in output already: never: refuse; auto: go on from its latest
    checkpoint, if it has one; always: refuse a folder without one."""
    overwrite: bool = False
    """Remove what an earlier run left in output."""
    on_non_finite: Literal["stop", "continue"] = "stop"
    """What to do when a loss or gradient is not finite: stop, or leave that update out."""
    progress: bool = True
    """Show a progress bar."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard, too."""

    def __post_init__(self):
        check_fields(self)
        _at_least("run", self, 1, "steps", "log_every", "save_every", "keep", "patience")
        _at_least("run", self, 0, "evaluate_every", "keep_best")
        if not self.output.strip():
            raise ConfigError("run.output must name a folder; got an empty name")
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(
                f"give run.steps or run.epochs, not both; got {self.steps} and {self.epochs} "
                f"(one of them may be set to none)"
            )
        for name in ("epochs", "max_minutes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"run.{name} must be positive; got {value}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"run.seed must be from 0 to {2**32 - 1}; got {self.seed}")
        if self.resume != "never" and self.overwrite:
            raise ConfigError("run.resume goes on with the folder that run.overwrite removes")

    @property
    def best_mode(self) -> Literal["min", "max"]:
        """Which way `best_metric` is better."""
        return "min" if self.best_metric == "loss" else "max"

    def total_steps(self, steps_per_epoch: int) -> int:
        """Updates of the whole run, at least 1."""
        if self.steps is not None:
            return self.steps
        epochs = DEFAULT_EPOCHS if self.epochs is None else self.epochs
        return max(1, math.ceil(epochs * steps_per_epoch - 1e-9))


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How texts are generated and scored; what is None is as the model's generation_config says."""

    num_beams: int | None = None
    """Beams of beam search; 1: greedy search."""
    max_length: int | None = None
    """Most tokens of a prediction, start token included; where the model does not say either, as
    the longest target."""
    min_length: int | None = None
    """Fewest tokens of a prediction, start token included."""
    length_penalty: float | None = None
    """Exponent on the length that divides a beam's score."""
    no_repeat_ngram_size: int | None = None
    """No n-gram of this size occurs twice in a prediction."""
    early_stopping: bool | Literal["never"] | None = None
    """When beam search stops: true, false or never."""
    repetition_penalty: float | None = None
    """Above 1: tokens used already become less probable."""
    batch_size: int = 32
    """Texts that are generated from at a time."""
    samples: int = 200
    """Validation rows that texts are generated for at each evaluation, the first ones; 0: none."""
    test_samples: int | None = None
    """Test rows that texts are generated for at the end; by default all; 0: none."""
    metrics: tuple[Literal["rouge", "bleu", "chrf"], ...] = ("rouge", "bleu", "chrf")
    """What predictions are scored by, besides exact match."""
    bleu_tokenizer: Literal["13a", "char", "intl", "zh", "ja-mecab", "ko-mecab", "none"] = "13a"
    """How BLEU splits words, sacrebleu's `tokenize`."""
    baselines: bool = True
    """Score the first sentence of each source, and the best one, as predictions, too."""
    shown: int = 5
    """Sample predictions shown in tables."""

    def __post_init__(self):
        check_fields(self)
        _at_least("evaluation", self, 1, "num_beams", "max_length", "batch_size")
        counts = ("min_length", "no_repeat_ngram_size", "samples", "test_samples", "shown")
        _at_least("evaluation", self, 0, *counts)
        if self.repetition_penalty is not None and self.repetition_penalty <= 0:
            raise ConfigError(
                f"evaluation.repetition_penalty must be positive; got {self.repetition_penalty}"
            )
        low, high = self.min_length, self.max_length
        if low is not None and high is not None and low > high:
            raise ConfigError(
                f"evaluation.min_length ({low}) is above evaluation.max_length ({high})"
            )

    def generation_options(self) -> dict[str, Any]:
        """Fields of `GenerationConfig` that are set."""
        options = {name: getattr(self, name) for name in _GENERATION}
        return {name: value for name, value in options.items() if value is not None}


_GENERATION = (
    "num_beams",
    "max_length",
    "min_length",
    "length_penalty",
    "no_repeat_ngram_size",
    "early_stopping",
    "repetition_penalty",
)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """A whole run. Equal configurations train the same model on the same machine."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    run: RunConfig = field(default_factory=RunConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self):
        check_fields(self)
        metric = self.run.best_metric
        name = "rouge" if metric.startswith("rouge") else metric
        if name in ("rouge", "bleu", "chrf") and name not in self.evaluation.metrics:
            raise ConfigError(
                f"run.best_metric is {metric!r}, but evaluation.metrics leaves it out; "
                f"got {', '.join(self.evaluation.metrics) or 'none'}"
            )
        if metric != "loss" and not self.evaluation.samples:
            raise ConfigError(
                f"run.best_metric {metric!r} needs predictions; got evaluation.samples=0"
            )

    def replace(self, **sections: Any) -> TrainingConfig:
        """A copy with sections changed: `run={"steps": 10}` changes one key, a section all."""
        changed = {
            name: replace(getattr(self, name), **value) if isinstance(value, dict) else value
            for name, value in sections.items()
        }
        return replace(self, **changed)

    def resolved(self, *, devices: int, platform: str) -> TrainingConfig:
        """What was left to the machine, settled for it; a configuration to be saved.

        Names of files that are here become absolute, so that the run goes on from any folder.

        Args:
            devices: of all processes together; multiplies execution.batch_size_per_device.
            platform: "cpu", "gpu" or "tpu".
        """
        execution = replace(
            self.execution,
            scan_layers=self.execution.scans_layers(platform),
            batch_size_per_device=None,
        )
        model = replace(self.model, **{n: _absolute(getattr(self.model, n)) for n in _PLACES})
        files = {split: _absolute_all(getattr(self.data, split)) for split in SPLITS}
        data, each = replace(self.data, **files), self.execution.batch_size_per_device
        if each is not None:
            data = replace(data, batch_size=each * devices * execution.accumulate)
        if data.batch_size % execution.accumulate:
            raise ConfigError(
                f"data.batch_size must be a multiple of execution.accumulate; got "
                f"{data.batch_size} and {execution.accumulate}"
            )
        return replace(self, model=model, data=data, execution=execution)


def _absolute(name: str | None) -> str | None:
    """The absolute path of a file or folder that is here; anything else as it is."""
    there = name is not None and os.path.exists(os.path.expanduser(name))
    return os.path.abspath(os.path.expanduser(name)) if name and there else name


def _absolute_all(names: tuple[str, ...]) -> tuple[str, ...]:
    """`_absolute` for files, globs, and pairs of either joined by a comma."""
    found = []
    for name in names:
        parts = [os.path.expanduser(part) for part in name.split(",")]
        if all(glob.glob(part) or os.path.exists(part) for part in parts):
            name = ",".join(map(os.path.abspath, parts))
        found.append(name)
    return tuple(found)
