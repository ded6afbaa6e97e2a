"""Texts -> token ids by the thousand: what a model's two sides look like, and processes that do it.

A source is opened and closed as its tokenizer was published; a target ends with the model's
end-of-sequence token and has no start token, which the model puts before it. Workers are fresh
interpreters that import neither JAX nor the program that started them: nothing is forked, and a
script needs no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import array
import contextlib
import itertools
import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from jax_encdec.errors import CheckpointError, ConfigError, EncDecError, InputError
from jax_encdec.tokenization import Tokenizer

CHUNK = 1024
"""Pairs that are tokenized at a time."""
_WORTH_WORKERS = 4 * CHUNK


@dataclass(frozen=True, kw_only=True)
class Side:
    """How the texts of one side become ids: all that the ids depend on."""

    name: str
    backend: str
    """The tokenizer, as JSON."""
    prefix: str
    opening: tuple[int, ...]
    closing: tuple[int, ...]
    limit: int | None
    """Most tokens, `opening` and `closing` included."""
    cuts_left: bool
    vocabulary: int | None
    """Ids are below it; None: not known."""

    @property
    def room(self) -> int | None:
        """Most tokens of the text itself."""
        return None if self.limit is None else self.limit - len(self.opening) - len(self.closing)


def make_side(
    name: str,
    tokenizer: Tokenizer,
    *,
    limit: int | None = None,
    prefix: str = "",
    vocabulary: int | None = None,
    drop: int | None = None,
    ends: Sequence[int] | None = None,
) -> Side:
    """Describe one side of a model.

    Args:
        name: "source" or "target", for messages.
        tokenizer: of this side.
        limit: most tokens, special ones included.
        prefix: put before each text.
        vocabulary: rows of the model's embedding.
        drop: an id that must not open a text (the start token of targets).
        ends: ids of which one must close a text; the first is added where there is none.

    Raises:
        ConfigError: the limit leaves no room for text.
    """
    backend = tokenizer.backend
    probe = backend.encode("a", add_special_tokens=False)
    around = backend.post_process(probe, None, True)
    before = list(itertools.takewhile(bool, around.special_tokens_mask))
    opening = list(around.ids[: len(before)])
    closing = list(around.ids[len(before) + len(probe.ids) :])
    if opening and opening[0] == drop:
        del opening[0]
    if ends and not set(ends) & set(closing):
        closing.append(ends[0])
    side = Side(
        name=name,
        backend=backend.to_str(),
        prefix=prefix,
        opening=tuple(opening),
        closing=tuple(closing),
        limit=limit,
        cuts_left=tokenizer.config.get("truncation_side") == "left",
        vocabulary=vocabulary,
    )
    if side.room is not None and side.room < 1:
        raise ConfigError(
            f"data.max_{name}_length = {limit} leaves no room for text: "
            f"{len(opening) + len(closing)} special tokens stand around it"
        )
    return side


class Ids(NamedTuple):
    """The ids of some texts, one after the other."""

    ids: np.ndarray
    """`[tokens]` int32."""
    lengths: np.ndarray
    """`[texts]` int32; 0 for a text that holds nothing the tokenizer keeps."""
    cut: int
    """How many were too long."""


def encode(side: Side, backend: tokenizers.Tokenizer, texts: Sequence[str]) -> Ids:
    """Tokenize texts; those that are too long are cut.

    Raises:
        CheckpointError: the tokenizer is damaged.
        InputError: an id is outside the model's vocabulary.
    """
    if side.prefix:
        texts = [side.prefix + text for text in texts]
    try:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    except BaseException as error:
        # A damaged table inside makes the library panic, which is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"the tokenizer is damaged and gave up: {error}") from None
    flat, lengths = array.array("i"), array.array("i")
    around, room, cut = len(side.opening) + len(side.closing), side.room, 0
    for encoding in encodings:
        ids = encoding.ids
        if room is not None and len(ids) > room:
            ids = ids[-room:] if side.cuts_left else ids[:room]
            cut += 1
        if ids:
            flat.extend(side.opening)
            flat.extend(ids)
            flat.extend(side.closing)
        lengths.append(len(ids) + around if ids else 0)
    ids = np.array(flat, np.int32)
    if side.vocabulary is not None and ids.size and ids.max() >= side.vocabulary:
        wrong = int(ids.max())
        raise InputError(
            f"the {side.name}'s tokenizer gives the token {backend.id_to_token(wrong)!r} of id "
            f"{wrong}, outside the model's vocabulary 0..{side.vocabulary - 1}; it belongs to "
            f"another model"
        )
    return Ids(ids, np.array(lengths, np.int32), cut)


Chunk = Sequence[tuple[Any, ...]]
"""Records; the first two fields are the texts."""


class Encoder:
    """Both sides, with their tokenizers built."""

    def __init__(self, sides: tuple[Side, Side]):
        self.sides = sides
        self.backends = [tokenizers.Tokenizer.from_str(side.backend) for side in sides]

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> tuple[Ids, Ids]:
        """Tokenize pairs."""
        source, target = (
            encode(side, backend, [pair[i] for pair in pairs])
            for i, (side, backend) in enumerate(zip(self.sides, self.backends, strict=True))
        )
        return source, target


def encode_all(
    sides: tuple[Side, Side], records: Iterable[Any], workers: int | None
) -> Iterator[tuple[Chunk, Ids, Ids]]:
    """Tokenize records in their order, by `workers` processes; 0: here; None: as many as pay."""
    records = iter(records)
    first = list(itertools.islice(records, _WORTH_WORKERS))
    if workers is None:
        few = len(first) < _WORTH_WORKERS
        workers = 0 if few or not sys.executable else _cores()
    rest = itertools.chain(first, records)
    chunks = iter(lambda: list(itertools.islice(rest, CHUNK)), [])
    if workers == 0:
        encoder = Encoder(sides)
        for chunk in chunks:
            yield chunk, *encoder([record[:2] for record in chunk])
        return
    with _Workers(sides, workers) as pool:
        pending: deque[tuple[Chunk, Future[tuple[Ids, Ids]]]] = deque()
        for chunk in chunks:
            pending.append((chunk, pool.submit([record[:2] for record in chunk])))
            if len(pending) > 2 * workers:
                done, future = pending.popleft()
                yield done, *future.result()
        for done, future in pending:
            yield done, *future.result()


# Workers -----------------------------------------------------------------------------------------


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class _Workers:
    """Processes, each with a thread here that asks it; closed, they end."""

    def __init__(self, sides: tuple[Side, Side], count: int):
        self.free: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.pool = ThreadPoolExecutor(count, "tokenize")
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        # One thread each, where libraries would start as many as there are cores.
        env = os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from {__name__} import work; work()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=env,
                start_new_session=True,  # Control-C is this process's to handle.
            )
            self.processes.append(process)
            self.free.put(process)
        self.sides: bytes = pickle.dumps(sides)
        self.told: set[int] = set()

    def submit(self, pairs: list[tuple[str, str]]) -> Future[tuple[Ids, Ids]]:
        return self.pool.submit(self._ask, pairs)

    def _ask(self, pairs: list[tuple[str, str]]) -> tuple[Ids, Ids]:
        process = self.free.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.pid not in self.told:
                process.stdin.write(self.sides)
                self.told.add(process.pid)
            pickle.dump(pairs, process.stdin)
            process.stdin.flush()
            # Through a pipe to a child of this very package: no file, nobody else can write to it.
            answer = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            process.kill()  # if it is still there
            code = process.wait()
            raise RuntimeError(
                f"a process that tokenizes ended with code {code} (-9: for want of memory?); "
                f"data.workers = 0 does without"
            ) from None
        finally:
            self.free.put(process)
        if isinstance(answer, EncDecError):
            raise answer
        return answer

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: Any) -> None:
        self.pool.shutdown(cancel_futures=True)
        for process in self.processes:
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # of one that has died
                    assert pipe is not None
                    pipe.close()
        for process in self.processes:
            process.wait()


def work() -> None:
    """Answer what comes in on standard input until it ends, which it does with the parent."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # What anything prints must not come between.
    questions = sys.stdin.buffer
    encoder: Encoder | None = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            question = pickle.load(questions)
            try:
                if encoder is None:
                    encoder = Encoder(question)
                    continue
                answer: Any = encoder(question)
            except EncDecError as error:
                answer = error
            pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
