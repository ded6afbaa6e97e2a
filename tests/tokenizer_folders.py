"""Tokenizer folders of every published shape, made offline, and texts to try them on."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = """
The quick brown fox jumps over the lazy dog. It's raining; they've gone home, haven't they?
In 1969 the first people walked on the Moon, 384,400 km away! Don't panic -- it's only a test.
Café, naïve, façade, Ångström, Übermut, señor and crème brûlée are words with accents.
東京は日本の首都です。 北京是中国的首都。 서울은 대한민국의 수도이다. Привет, мир!
def encode(text): return [token.id for token in text.split()]  # code, too: a_b-c/d\\e @home #tag
Emoji 🙂 and 👩‍🔬 appear in text; so do tabs\tand double  spaces and e-mails like a.b@example.org.
she said "I'm here" ( or was it there ? ) ; the answer was 'no' . we 're fine , i 'm told !
""".strip().splitlines()

ODD = [
    "plain words",
    "  leading and trailing  ",
    "don't stop , i 'm here ; we 've won , they 're ' late ' !",
    "Ünïcödé ÉCLAIR Straße İstanbul ǅ ﬁ",
    "e\u0301 vs é; a\u0308",  # combining marks
    "漢字かなカナ混じり文 and latin",
    "𠀀𠀁 \U0002ebef rare ideographs",
    "👩‍🔬🏳️‍🌈🙂🇩🇪 emoji",
    "zero\u200bwidth\u200djoiner\ufeffbom\u2060",
    "control\x00\x01\x07\x1f\x7f\x85chars",
    "tab\tnewline\nreturn\r\nnbsp\u00a0line\u2028para\u2029ideo\u3000",
    "x" * 99 + " " + "y" * 101 + " " + "z" * 500,
    "[CLS] in text [SEP][MASK] [PAD] [UNK]",
    "<s> in text </s><mask> <mask>  <pad><unk>",
    "<|endoftext|>middle<|endoftext|> [cls] <S>",
    "soft\u00adhyphen, non\u2011breaking—dash…",
    "עברית العربية हिन्दी ไทย",
    "\ufffd \ufffe \U0010ffff \ue000 private",
    "1234567890 3.14159 1,000,000 ½ ² ⅷ",
    "!?.,;:'\"()[]{}<>@#$%^&*-_=+|\\/~`",
    "a",
    ".",
    "CamelCase snake_case kebab-case",
]


@functools.cache
def texts() -> list[str]:
    """Odd texts, and a few hundred made of shuffled pieces of the corpus and of any Unicode."""
    rng = random.Random(7)
    words = " ".join(CORPUS).split(" ")
    made = []
    for _ in range(150):
        made.append(" ".join(rng.choices(words, k=rng.randint(1, 30))))
    for _ in range(150):
        points = [rng.choice([0x7F, 0x2FF, 0x3100, 0xD7FF, 0x1F9FF]) for _ in range(20)]
        chars = [chr(rng.randint(1, top)) for top in points]
        made.append("".join(char for char in chars if not "\ud800" <= char <= "\udfff"))
    return ODD + [text for text in made if text.strip()]


@functools.cache
def wordpiece_vocab(lowercase: bool) -> dict[str, int]:
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=special, show_progress=False, continuing_subword_prefix="##"
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend.get_vocab()


@functools.cache
def bytelevel(special: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


GPT2_SPECIAL = ("<|endoftext|>",)
ROBERTA_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def bare_bert(folder: Path, lowercase: bool, config: dict | None, model: dict | None) -> Path:
    vocab = wordpiece_vocab(lowercase)
    lines = sorted(vocab, key=vocab.__getitem__)
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return side_files(folder, config, model)


def bare_bpe(folder: Path, special, config: dict | None, model: dict | None) -> Path:
    vocab, merges = bytelevel(special)
    write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return side_files(folder, config, model)


def side_files(folder: Path, config: dict | None, model: dict | None) -> Path:
    if config is not None:
        write_json(folder / "tokenizer_config.json", config)
    if model is not None:
        write_json(folder / "config.json", model)
    return folder


def saved(folder: Path, name: str, **options) -> Path:
    """What Transformers' own class writes."""
    transformers = pytest.importorskip("transformers")
    if "Bert" in name:
        built = getattr(transformers, name)(vocab=wordpiece_vocab(True), **options)
    else:
        special = GPT2_SPECIAL if "GPT2" in name else ROBERTA_SPECIAL
        vocab, merges = bytelevel(special)
        built = getattr(transformers, name)(vocab=vocab, merges=merges, **options)
    built.save_pretrained(folder)
    return folder


def bert_with_added(folder: Path) -> Path:
    """The oldest way to add tokens: numbered in one file, special ones named in another."""
    bare_bert(folder, True, {"tokenizer_class": "BertTokenizer", "do_lower_case": True}, None)
    n = len(wordpiece_vocab(True))
    write_json(folder / "added_tokens.json", {"<b>": n + 1, "<a>": n, "New Word": n + 2})
    named = {"pad_token": "[PAD]", "additional_special_tokens": ["<a>", "<b>"]}
    named["cls_token"] = {"content": "[CLS]", "lstrip": False, "rstrip": False}
    write_json(folder / "special_tokens_map.json", named)
    return folder


def bert_v4(folder: Path) -> Path:
    """As Transformers 4 saved a slow tokenizer."""
    vocab = wordpiece_vocab(True)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(vocab[name]): {"content": name, "special": True, **flags}
        for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    }
    added[str(len(vocab))] = {"content": "<sep>", "special": False, **flags, "lstrip": True}
    config = {
        "added_tokens_decoder": added,
        "clean_up_tokenization_spaces": True,
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "model_max_length": 512,
        "pad_token": "[PAD]",
    }
    return bare_bert(folder, True, config, None)


def own_pipeline(folder: Path) -> Path:
    """A tokenizer.json of no known class, with truncation and padding baked in."""
    backend = tokenizers.Tokenizer(models.WordPiece(wordpiece_vocab(True), unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)]
    )
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    ids = wordpiece_vocab(True)
    backend.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=50, pad_token="[PAD]", pad_id=ids["[PAD]"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True}
    return side_files(folder, config | {"pad_token": "[PAD]", "eos_token": "<new>"}, None)


def cased_but_told_otherwise(folder: Path) -> Path:
    """The class's options win over tokenizer.json, as in Transformers 4 and 5."""
    saved(folder, "BertTokenizerFast", do_lower_case=False)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", config | {"do_lower_case": True})
    return folder


def as_on_the_hub(folder: Path, name: str, model_type: str) -> Path:
    """tokenizer.json of a known class, next to files that hardly say anything."""
    saved(folder, name)
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        token["lstrip"] = token["content"] == "<mask>"
    write_json(folder / "tokenizer.json", content)
    return side_files(folder, {"model_max_length": 512}, {"model_type": model_type})


def unigram(folder: Path) -> Path:
    """As SentencePiece models come out once they are converted."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    backend.save(str(folder / "tokenizer.json"))
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    named |= {"extra_special_tokens": ["<extra>"], "add_eos_token": False}
    return side_files(folder, named | {"tokenizer_class": "PreTrainedTokenizerFast"}, None)


ENCDEC = {"model_type": "encoder-decoder", "encoder": {"model_type": "bert"}}
ENCDEC["decoder"] = {"model_type": "gpt2"}
FOLDERS = {
    "bert": lambda f: saved(f, "BertTokenizerFast"),
    "bert-cased": lambda f: saved(f, "BertTokenizerFast", do_lower_case=False),
    "bert-accents": lambda f: saved(f, "BertTokenizerFast", strip_accents=False),
    "bert-cleaned": lambda f: saved(f, "BertTokenizerFast", clean_up_tokenization_spaces=True),
    "gpt2": lambda f: saved(f, "GPT2TokenizerFast"),
    "gpt2-cleaned": lambda f: saved(f, "GPT2TokenizerFast", clean_up_tokenization_spaces=True),
    "gpt2-prefix": lambda f: saved(f, "GPT2TokenizerFast", add_prefix_space=True),
    "roberta": lambda f: saved(f, "RobertaTokenizerFast"),
    "bart": lambda f: saved(f, "BartTokenizerFast", add_prefix_space=True),
    "bert-bare": lambda f: bare_bert(f, True, None, {"model_type": "bert"}),
    "bert-bare-cased": lambda f: bare_bert(
        f, False, {"do_lower_case": False, "tokenizer_class": "BertTokenizer"}, None
    ),
    "bert-bare-chinese": lambda f: bare_bert(
        f, True, {"tokenize_chinese_chars": False, "strip_accents": False}, {"model_type": "bert"}
    ),
    "encdec-bare": lambda f: bare_bert(f, True, {"do_lower_case": True}, ENCDEC),
    "gpt2-bare": lambda f: bare_bpe(f, GPT2_SPECIAL, None, {"model_type": "gpt2"}),
    "gpt2-bare-bos": lambda f: bare_bpe(
        f,
        GPT2_SPECIAL,
        {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "pad_token": "<pad>"},
        None,
    ),
    "roberta-bare": lambda f: bare_bpe(f, ROBERTA_SPECIAL, None, {"model_type": "roberta"}),
    "bart-bare-prefix": lambda f: bare_bpe(
        f, ROBERTA_SPECIAL, {"tokenizer_class": "BartTokenizer", "add_prefix_space": True}, None
    ),
    "bert-added": bert_with_added,
    "bert-v4": bert_v4,
    "own-pipeline": own_pipeline,
    "bert-hub": lambda f: as_on_the_hub(f, "BertTokenizerFast", "bert"),
    "gpt2-hub": lambda f: as_on_the_hub(f, "GPT2TokenizerFast", "gpt2"),
    "roberta-hub": lambda f: as_on_the_hub(f, "RobertaTokenizerFast", "roberta"),
    "unigram": unigram,
    "bert-overruled": cased_but_told_otherwise,
}
