"""The end of a run: whose parameters become the model, and what is written of it.

    chosen = best_kept(checkpoints, best, last)
    restored = restore(checkpoints, like, chosen)
    write(folder, model, tokenizers, restored.state.params, restored.step)

In a job of several processes all of them call these, with the same arguments.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_encdec.encoder_decoder import EncoderDecoderModel
from jax_encdec.errors import CheckpointError
from jax_encdec.tokenization import TokenizerPair
from jax_encdec.training import report, run_folder
from jax_encdec.training.checkpoint import Checkpoints, Restored
from jax_encdec.training.distributed import EXIT_STOPPED
from jax_encdec.training.gather import first_process, gathered, on_first_process
from jax_encdec.training.model_card import model_card
from jax_encdec.training.stopping import Stopped


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What became of a run."""

    folder: Path
    step: int
    """Updates taken, those before a resume included."""
    stopped: Stopped
    """`finished`, `callback` and `minutes` leave a finished folder; after `signal` there is a
    checkpoint to go on from, and no new model."""
    why: str
    """The same in words."""
    metrics: Mapping[str, Any]
    """The last line of training, of validation, and of test, by its `kind`."""
    best: tuple[int, float] | None
    """Step and value of the best evaluation by `run.best_metric`."""
    model: EncoderDecoderModel
    params: Any
    """The parameters of model/: the best or the last ones, averaged if an average is kept."""
    params_step: int
    """Whose they are."""
    tokenizers: TokenizerPair

    @property
    def exit_code(self) -> int:
        """Of a command: 0, or `EXIT_STOPPED` when a signal ended the run before its end."""
        return EXIT_STOPPED if self.stopped == "signal" else 0


def best_kept(checkpoints: Checkpoints, best: int, last: int) -> int:
    """The best step if its checkpoint is there; else the best that is, or the last one."""
    if best == last or best in checkpoints.steps():
        return best
    chosen = checkpoints.best()
    taken = "the last" if chosen in (None, last) else str(chosen)
    warnings.warn(f"the best step, {best}, was not kept: {taken} is taken", stacklevel=3)
    return last if chosen is None else chosen


def restore(checkpoints: Checkpoints, like: Any, step: int) -> Restored:
    """A step of a run that has saved its last one; the newest sound one if it is damaged."""
    try:
        restored = checkpoints.restore(like, step=step)
    except CheckpointError as error:
        warnings.warn(f"{error}; the newest sound step is taken instead", stacklevel=3)
        restored = checkpoints.restore(like)
    assert restored is not None
    return restored


def write(
    folder: Path, model: EncoderDecoderModel, tokenizers: TokenizerPair, params: Any, step: int
) -> None:
    """Write model/ and the report of a run.

    Args:
        params: of `model`, perhaps across processes.
        step: whose they are.
    """
    whole = gathered(params, keep=first_process())

    def files() -> None:
        record = report.read_record(folder)
        own = tokenizers.target is not tokenizers.source
        card = model_card(record, step=step, whole=model.config.whole, own_target_tokenizer=own)
        run_folder.write_model(folder, model, whole, tokenizers, card)
        report.write_report(folder)

    on_first_process(files)
