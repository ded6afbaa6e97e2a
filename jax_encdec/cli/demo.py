"""`jax-encdec demo`: train a small BERT2BERT from nothing, measure it, save it, in minutes.

The task is to read dates as people write them, `the 3rd of May, 1998` -> `1998-05-03`. Every
training example is new, so there are no epochs: one array of all batches, one jitted step, one
loop. What is measured is the model as read back from what was saved; the output folder gets it
only when all is done.

Axis letters: B batch, S source length, T target length.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jax_encdec.cli.generate import positive
from jax_encdec.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from jax_encdec import EncoderDecoderModel, Tokenizer

BATCH_SIZE = 64
PEAK_LEARNING_RATE = 1e-3
TOKENIZER_TEXTS = 10_000
HELD_OUT = 2_000
SHOWN = 10
MARK = "demo.json"
"""What was measured; and by it, the demo knows a folder as its own."""

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

        count = args.steps * BATCH_SIZE
        examples = dates.make_examples("train", max(count, TOKENIZER_TEXTS), args.seed)
        texts = [text for example in examples[:TOKENIZER_TEXTS] for text in example]
        tokenizer = dates.train_tokenizer(texts)
        print(f"tokenizer: {tokenizer.vocab_size} tokens, learned from dates like {texts[0]!r}")
        model = build_model(tokenizer)
        params = model.init_params(jax.random.key(args.seed))
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        print(f"model: BERT encoder, BERT decoder, {size:,} parameters, all random so far")
        batches = make_batches(tokenizer, examples[:count])
        params, losses = train(model, params, batches)

        model.save_pretrained(folder, params)
        tokenizer.save(folder)
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


class Batch(NamedTuple):
    """What one step learns from, or with one more axis in front, what all steps do."""

    input_ids: np.ndarray
    """`[B, S]` int32, padded."""
    attention_mask: np.ndarray
    """`[B, S]` int32, 0 for pads."""
    labels: np.ndarray
    """`[B, T]` int32, ending with [SEP]; -100 where there is nothing to predict."""


def make_batches(tokenizer: Tokenizer, examples: Sequence[Example]) -> Batch:
    """All batches at once, `[steps, B, ...]`: one shape, so that the step is compiled once."""
    import numpy as np

    texts, dates = zip(*examples, strict=True)
    input_ids, mask = tokenizer.batch(texts, buckets=None)
    targets, target_mask = tokenizer.batch(dates, buckets=None)
    # The model puts the start token before the labels itself; [CLS] is not one of them.
    labels = np.where(target_mask, targets, -100)[:, 1:]
    return Batch(*(x.reshape(-1, BATCH_SIZE, x.shape[1]) for x in (input_ids, mask, labels)))


def train(model: EncoderDecoderModel, params: Any, batches: Batch) -> tuple[Any, list[float]]:
    """Take one step per batch. Returns the trained parameters and each step's loss in nats."""
    import jax
    import optax
    from tqdm import tqdm

    steps = len(batches.labels)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            optax.warmup_cosine_decay_schedule(0.0, PEAK_LEARNING_RATE, steps // 10, steps),
            b2=0.98,
            weight_decay=0.01,
        ),
    )

    @partial(jax.jit, donate_argnames=("params", "state"))
    def step(params: Any, state: Any, batch: Batch) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            out: Any = model.apply(
                {"params": params},
                batch.input_ids,
                attention_mask=batch.attention_mask,
                labels=batch.labels,
            )
            return out.loss

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    losses: list[float] = []
    # Where the bar cannot be redrawn in place, seldom is enough.
    every = 0.5 if sys.stderr.isatty() else 10.0
    with tqdm(total=steps, unit="step", desc="compiling", mininterval=every) as bar:
        began = time.perf_counter()
        for number in range(steps):
            params, state, value = step(params, state, Batch(*(x[number] for x in batches)))
            losses.append(float(value))
            if number == 0:
                began = time.perf_counter()
                bar.set_description("training")
                bar.unpause()
            else:
                rate = number * BATCH_SIZE / (time.perf_counter() - began)
                bar.set_postfix_str(f"loss {losses[-1]:.4f}, {rate:.0f} examples/s", refresh=False)
            bar.update()
    return params, losses


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
                os.replace(file, output / file.name)
    finally:
        if not any(output.iterdir()):
            output.rmdir()
