"""`jax-encdec demo`: train a small BERT2BERT from nothing, measure it, save it, in minutes.

The task is to read dates as people write them, `the 3rd of May, 1998` -> `1998-05-03`. Every
training example is new, so that one epoch is all. The training is `jax_encdec.training.train`, as
anybody calls it from Python. What is measured is the model as read back from what was saved; the
output folder gets it only when all is done.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_encdec.cli.arguments import positive
from jax_encdec.cli.compilation_cache import add_cache_option, use_cache
from jax_encdec.errors import InputError

if TYPE_CHECKING:
    from jax_encdec import EncoderDecoderModel, Tokenizer
    from jax_encdec.training.config import TrainingConfig
    from jax_encdec.training.finish import TrainResult

BATCH_SIZE = 64
PEAK_LEARNING_RATE = 1e-3
TOKENIZER_TEXTS = 10_000
HELD_OUT = 2_000
SHOWN = 10
MARK = "demo.json"
"""What was measured; and by it, the demo knows a folder as its own."""
TRAINING = "training"
"""The folder, inside the output, of how it was trained: configuration, metrics, report."""
KEPT = ("config.toml", "metrics.jsonl", "report.md", "curves")

Example = tuple[str, str]
"""A date as people write it, and the same in ISO 8601."""


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="train a small pair on dates and try it, in under 3 minutes",
        description="Train a tokenizer and a small BERT2BERT from nothing to read dates as people "
        "write them, measure it on dates it never saw, and save it.",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        default="./jax-encdec-demo",
        help="folder to save into: new, empty, or of an earlier demo (default: ./jax-encdec-demo)",
    )
    parser.add_argument(
        "--steps", type=positive, default=800, metavar="N", help="training steps (default: 800)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of everything random (default: 0)"
    )
    add_cache_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, measure, save and print; see `add_parser` for the arguments.

    Raises:
        InputError: the output folder holds something else, or the seed is out of range.
        OSError: the output folder cannot be written.
    """
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed must be from 0 to {2**32 - 1}; got {args.seed}")
    with _unfinished(Path(args.output)) as folder:
        import jax

        from jax_encdec import Text2TextPipeline
        from jax_encdec.cli import dates

        use_cache(args)
        count = args.steps * BATCH_SIZE
        examples = dates.make_examples("train", max(count, TOKENIZER_TEXTS), args.seed)
        texts = [text for example in examples[:TOKENIZER_TEXTS] for text in example]
        tokenizer = dates.train_tokenizer(texts)
        print(f"tokenizer: {tokenizer.vocab_size} tokens, learned from dates like {texts[0]!r}")
        model = build_model(tokenizer)
        params = model.init_params(jax.random.key(args.seed))
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        print(f"model: BERT encoder, BERT decoder, {size:,} parameters, all random so far")
        work = folder / ".run"
        _, losses = train(model, params, tokenizer, examples[:count], configure(work, args))
        adopt(work, folder)
        held_out = dates.make_examples("heldout", HELD_OUT, args.seed)
        pipe = Text2TextPipeline.from_pretrained(folder)
        predictions = pipe([text for text, _ in held_out], batch_size=250)
        right = sum(p == iso for p, (_, iso) in zip(predictions, held_out, strict=True))
        print(
            f"exact match on {HELD_OUT:,} examples of held-out dates, greedy search: "
            f"{right / HELD_OUT:.2%}\n\nfour beams:"
        )
        shown = held_out[:SHOWN]
        print(table(shown, pipe([text for text, _ in shown], num_beams=4)))
        measured = {"steps": args.steps, "seed": args.seed, "losses": losses}
        measured["exact_match"] = right / HELD_OUT
        (folder / MARK).write_text(json.dumps(measured) + "\n")
    where = shlex.quote(args.output)
    print(f"\nsaved: {where}, which PyTorch's EncoderDecoderModel.from_pretrained opens, too")
    print(f'go on: jax-encdec generate --model {where} "the 3rd of May, 1998"')
    return 0


# The model, the data, the training ---------------------------------------------------------------


def build_model(tokenizer: Tokenizer) -> EncoderDecoderModel:
    """A BERT2BERT of half a million parameters; targets start with [CLS], end with [SEP]."""
    from jax_encdec import BertConfig, EncoderDecoderConfig, EncoderDecoderModel, GenerationConfig

    bert = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=32,
    )
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        bert,
        bert,
        decoder_start_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return EncoderDecoderModel(config, generation_config=GenerationConfig(max_length=16))


def configure(folder: Path, args: argparse.Namespace) -> TrainingConfig:
    """How it is trained: all defaults but these."""
    from jax_encdec.training.config import RunConfig, TrainingConfig
    from jax_encdec.training.data_config import DataConfig
    from jax_encdec.training.optimizer_config import OptimizerConfig

    return TrainingConfig(
        # One shape of batches, so that the step is compiled once.
        data=DataConfig(batch_size=BATCH_SIZE, max_shapes=1, workers=0),
        optimizer=OptimizerConfig(
            learning_rate=PEAK_LEARNING_RATE,
            schedule="cosine",
            warmup_steps=args.steps // 10,
            b2=0.98,
            weight_decay=0.01,
        ),
        run=RunConfig(
            output=str(folder), steps=args.steps, seed=args.seed, save_every=None, keep_best=0
        ),
    )


def train(
    model: EncoderDecoderModel,
    params: Any,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    config: TrainingConfig,
) -> tuple[TrainResult, list[float]]:
    """Train into the folder of `config`; what became of it, and each step's loss in nats."""
    from jax_encdec import TokenizerPair
    from jax_encdec.training import loop
    from jax_encdec.training.callbacks import Callback

    losses: list[float] = []

    class Losses(Callback):
        def on_step(self, run: Any, metrics: Mapping[str, float]) -> None:
            losses.append(metrics["loss"])

    try:
        result = loop.train(
            config,
            callbacks=[Losses()],
            model=model,
            params=params,
            tokenizers=TokenizerPair(source=tokenizer, target=tokenizer),
            train_data=examples,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was saved") from None  # the run's folder vanishes
    return result, losses


def adopt(work: Path, folder: Path) -> None:
    """Take the model, and the record of how it was trained, out of the folder of a run."""
    for file in (work / "model").iterdir():
        os.replace(file, folder / file.name)
    (folder / TRAINING).mkdir()
    for name in KEPT:
        if (work / name).exists():
            os.replace(work / name, folder / TRAINING / name)
    shutil.rmtree(work)


# Showing and saving ------------------------------------------------------------------------------


def table(examples: Sequence[Example], predictions: Sequence[str]) -> str:
    """Sources, predictions, and whether they are right, in columns."""
    rows = [("source", "prediction", "ok?")]
    for (text, iso), prediction in zip(examples, predictions, strict=True):
        rows.append((text, prediction, "yes" if prediction == iso else f"no: {iso}"))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)


@contextlib.contextmanager
def _unfinished(output: Path) -> Iterator[Path]:
    """A temporary folder whose files move into `output` at the end, and vanish on any failure."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; expected a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / MARK).is_file():
        raise InputError(
            f"--output {output} holds files that are not of an earlier demo; they are left alone: "
            f"name a new or empty folder"
        )
    # The temporary folder is made at once, so that a place that cannot be written shows now.
    output.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=output, prefix=".unfinished-") as folder:
            yield Path(folder)
            # config.json comes last: without it, a folder is no model.
            for file in sorted(Path(folder).iterdir(), key=lambda f: f.name == "config.json"):
                if file.is_dir():
                    shutil.rmtree(output / file.name, ignore_errors=True)
                os.replace(file, output / file.name)
    finally:
        if not any(output.iterdir()):
            output.rmdir()
