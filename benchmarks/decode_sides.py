"""Whom the decoding benchmark compares, each in a process of its own that stays alive.

All read the same random model from the same folder: a BERT2BERT (`bert`) for PyTorch Transformers
and its last Flax classes, a BART (`bart`) for CTranslate2, which knows no BERT2BERT; PyTorch runs
both. A side may run in another Python, so that this file imports only what every Python has.

    python decode_sides.py SIDE FOLDER CACHE PIPE ROWS     # what `Side` starts
"""

from __future__ import annotations

import functools
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from decode_machine import THREADS

NEW_TOKENS = 64
VOCAB = 30522
START, END, PAD = 101, 102, 0
SHAPES = {"small": (256, 4, 4), "base": (768, 12, 12)}  # width, layers, heads
Cell = tuple[int, int, int]
"""Source length, batch, beams."""
Run = Callable[[Any, Any, int], list[list[int]]]
"""(source ids [B, S], mask [B, S], beams) -> sequences."""


def source(length: int, batch: int):
    """Source tokens and mask, `[batch, length]`."""
    import numpy as np

    rng = np.random.default_rng(batch)
    return rng.integers(1000, VOCAB, (batch, length)), np.ones((batch, length), np.int64)


def make(family: str, size: str, folder: Path) -> None:
    """Save a random model that all sides open."""
    import jax

    from jax_encdec import BartConfig, BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    width, layers, heads = SHAPES[size]
    ids: dict[str, Any] = {
        "decoder_start_token_id": START,
        "pad_token_id": PAD,
        "eos_token_id": END,
    }
    if family == "bert":
        part: Any = BertConfig(
            vocab_size=VOCAB, hidden_size=width, num_hidden_layers=layers,
            num_attention_heads=heads, intermediate_size=4 * width,
        )  # fmt: skip
    else:
        part = BartConfig(
            vocab_size=VOCAB, d_model=width, encoder_layers=layers, decoder_layers=layers,
            encoder_attention_heads=heads, decoder_attention_heads=heads,
            encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width, forced_eos_token_id=None,
            bos_token_id=START, **ids,
        )  # fmt: skip
    config = EncoderDecoderConfig(encoder=part, decoder=part, whole=family == "bart", **ids)
    model = EncoderDecoderModel(config)
    model.save_pretrained(folder, model.init_params(jax.random.key(0)))


def convert(folder: Path) -> None:
    """Write what CTranslate2 reads, float32 and int8, beside the model."""
    from ctranslate2.converters import TransformersConverter

    class Words:
        """Of CTranslate2's converter, all it asks of a tokenizer."""

        bos_token, eos_token, unk_token = (f"t{i}" for i in (START, END, 100))

        def get_vocab(self) -> dict[str, int]:
            return {f"t{i}": i for i in range(VOCAB)}

        def convert_ids_to_tokens(self, i: int) -> str:
            return f"t{i}"

    class Converter(TransformersConverter):
        def load_tokenizer(self, *_: Any, **__: Any) -> Any:
            return Words()

        def load_model(self, *arguments: Any, **options: Any) -> Any:
            model = super().load_model(*arguments, **options)
            model.config.normalize_before = False  # It asks for what BART's files no longer say.
            return model

    for kind in ("float32", "int8"):
        Converter(str(folder)).convert(str(folder / f"ctranslate2-{kind}"), quantization=kind)


def convert_to_flax(folder: Path) -> None:
    """Write what the Flax classes read, beside the model."""
    from jax_encdec.convert.convert import convert

    convert(folder, folder / "flax", format="msgpack")


def open_ours(folder: str, mode: str, rows: int | None) -> Run:
    """jax_encdec; with bfloat16, weights are stored so and sums are made in float32.

    Where the rows of all calls are known, parameters are read into the layout for them; else, in
    float32, `generate` gets the model's own.
    """
    from jax_encdec import EncoderDecoderModel

    @functools.lru_cache(1)
    def loaded(rows: int | None) -> Any:
        precision = None if mode == "float32" else mode
        return EncoderDecoderModel.from_pretrained(folder, rows=rows, precision=precision)

    if rows is not None or mode == "float32":
        loaded(rows)

    def run(ids, mask, beams):
        own = mode == "float32" and rows is None
        model, params = loaded(None if own else len(ids) * beams)
        return model.generate(
            params,
            ids,
            attention_mask=mask,
            num_beams=beams,
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
        ).sequences.tolist()

    return run


def open_pytorch(folder: str, mode: str) -> Run:
    """PyTorch Transformers."""
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    import json

    bart = json.loads((Path(folder) / "config.json").read_text())["model_type"] == "bart"
    kind = transformers.BartForConditionalGeneration if bart else transformers.EncoderDecoderModel
    model = kind.from_pretrained(folder, dtype=getattr(torch, mode)).eval()

    def run(ids, mask, beams):
        with torch.inference_mode():
            return model.generate(
                input_ids=torch.tensor(ids),
                attention_mask=torch.tensor(mask),
                num_beams=beams,
                do_sample=False,
                min_new_tokens=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
            ).tolist()

    return run


def open_ctranslate2(folder: str, mode: str) -> Run:
    """CTranslate2."""
    import ctranslate2

    translator = ctranslate2.Translator(
        str(Path(folder) / f"ctranslate2-{mode}"),
        device="cpu",
        compute_type=mode,
        inter_threads=1,
        intra_threads=THREADS,
    )

    def run(ids, mask, beams):
        rows = [[f"t{i}" for i in row] for row in ids.tolist()]
        found = translator.translate_batch(
            rows,
            beam_size=beams,
            max_batch_size=0,
            min_decoding_length=NEW_TOKENS,
            max_decoding_length=NEW_TOKENS,
            max_input_length=0,
        )
        return [[START, *(int(token[1:]) for token in row.hypotheses[0])] for row in found]

    return run


def open_flax(folder: str, mode: str) -> Run:
    """Transformers' last Flax classes, all of `generate` compiled, as their users ran it.

    Their `encode` hands positions to a BERT encoder as token types, out of range from the third
    on: `generate` as documented sees only NaN and returns pads. Zeros passed as positions are the
    right token types, and leave the encoder to count positions itself. `min_new_tokens` they
    ignore; their lengths count the start token.
    """
    os.environ |= {"USE_TORCH": "0", "USE_TF": "0"}  # Else imported where installed.
    import jax
    import jax.numpy as jnp
    import transformers

    transformers.logging.set_verbosity_error()
    kind = transformers.FlaxEncoderDecoderModel  # pyright: ignore[reportAttributeAccessIssue]
    model = kind.from_pretrained(str(Path(folder) / "flax"), dtype=getattr(jnp, mode))

    @functools.partial(jax.jit, static_argnames="beams")
    def generate(params, ids, mask, beams):
        return model.generate(
            ids,
            attention_mask=mask,
            position_ids=jnp.zeros_like(ids),
            params=params,
            num_beams=beams,
            do_sample=False,
            min_length=NEW_TOKENS + 1,
            max_length=NEW_TOKENS + 1,
        ).sequences

    return lambda ids, mask, beams: generate(model.params, ids, mask, beams=beams).tolist()


OPENERS = {
    "ours": open_ours,
    "pytorch": open_pytorch,
    "flax": open_flax,
    "ctranslate2": open_ctranslate2,
}
SIDES = {
    "ours": ("ours", "float32"),
    "ours-bf16": ("ours", "bfloat16"),
    "pytorch": ("pytorch", "float32"),
    "pytorch-bf16": ("pytorch", "bfloat16"),
    "flax": ("flax", "float32"),
    "ctranslate2": ("ctranslate2", "float32"),
    "ctranslate2-int8": ("ctranslate2", "int8"),
}
RUNS = {
    "bert": ("ours", "ours-bf16", "pytorch", "pytorch-bf16", "flax"),
    "bart": ("ours", "ours-bf16", "pytorch", "ctranslate2", "ctranslate2-int8"),
}


class Side:
    """A live process of one side, in this Python or in another.

    Args:
        rows: batch times beams of all its calls, where they are known when it loads.

    Raises:
        SystemExit: here and in `run`, when it fails or dies, with what it said.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        cache: Path | None = None,
        python: str | None = None,
        rows: int | None = None,
    ):
        self.pipe, other = Pipe()
        began = time.perf_counter()
        arguments = [name, str(folder), str(cache or ""), str(other.fileno()), str(rows or "")]
        self.process = subprocess.Popen(
            [python or sys.executable, __file__, *arguments], pass_fds=[other.fileno()]
        )
        other.close()
        self._receive()
        self.loaded = time.perf_counter() - began
        self.pid = self.process.pid

    def run(self, cell: Cell) -> tuple[float, list[list[int]], float]:
        """Seconds, sequences, and the process's peak memory so far in MiB."""
        self.pipe.send(cell)
        return self._receive()

    def close(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.wait()

    def _receive(self) -> Any:
        try:
            found = self.pipe.recv()
        except EOFError:
            raise SystemExit(f"a process died: exit code {self.process.wait()}") from None
        if isinstance(found, str):
            raise SystemExit(found)
        return found


def _work(name: str, folder: str, cache: str, pipe: Connection, rows: str) -> None:
    """Answer cells with (seconds, sequences, peak MiB), after saying that the model is loaded."""
    opener, mode = SIDES[name]
    # Else a libtpu that happens to be installed is loaded: 100 MiB and a third of a second.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true" if cache else "false"
    if cache:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    try:
        opened = {"rows": int(rows) if rows else None} if opener == "ours" else {}
        run = OPENERS[opener](folder, mode, **opened)
        pipe.send(None)
        while (cell := pipe.recv()) is not None:
            length, batch, beams = cell
            ids, mask = source(length, batch)
            began = time.perf_counter()
            sequences = run(ids, mask, beams)
            seconds = time.perf_counter() - began
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            pipe.send((seconds, sequences, peak))
    except (EOFError, BrokenPipeError):
        return  # Nobody asks any more.
    except Exception as error:
        pipe.send(f"{name} failed: {type(error).__name__}: {error}")


if __name__ == "__main__":
    _, side, model, programs, number, rows_of_calls = sys.argv
    _work(side, model, programs, Connection(int(number)), rows_of_calls)
