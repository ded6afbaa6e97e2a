"""Tokenizer files of a published folder -> a `tokenizers.Tokenizer` and its settings.

`read_tokenizer(folder)` takes `tokenizer.json` where there is one. Older folders hold only a
vocabulary; three published layouts are rebuilt from it: BERT (`vocab.txt`), GPT-2 and RoBERTa/BART
(`vocab.json` + `merges.txt`). The side files `tokenizer_config.json`, `special_tokens_map.json`
and `added_tokens.json` are then applied, so that ids come out as Transformers' AutoTokenizer
gives them.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from . import hub, sentencepiece_model
from .errors import CheckpointError, ConfigError

# In the order in which Transformers adds the ones a vocabulary lacks.
SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

# Everything that belongs to a tokenizer and travels with it when it is saved.
SENTENCEPIECE = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "spm.model")
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    *SENTENCEPIECE,
)

_MAX_BYTES = 100_000_000  # several times the largest vocabulary


class Layout(NamedTuple):
    """What a published tokenizer class fixes beyond its files."""

    special_tokens: Mapping[str, str]
    vocabulary: tuple[str, ...]  # the files it is rebuilt from
    evidence: tuple[str, ...]  # entries of a vocabulary that say: this layout


_BERT = Layout(
    {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
    ("vocab.txt",),
    ("[CLS]", "[SEP]"),
)
_ROBERTA = Layout(
    {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "cls_token": "<s>",
        "mask_token": "<mask>",
    },
    ("vocab.json", "merges.txt"),
    ("<s>", "</s>"),
)
_GPT2 = Layout(
    {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
    ("vocab.json", "merges.txt"),
    ("<|endoftext|>",),
)
_LAYOUTS = (_BERT, _ROBERTA, _GPT2)

# Published `tokenizer_class` (less a final "Fast"), or `model_type` of config.json.
_BY_CLASS = {
    **{
        f"{name}Tokenizer": _BERT
        for name in ("Bert", "DistilBert", "Electra", "ConvBert", "MobileBert", "LayoutLM")
    },
    **{f"{name}Tokenizer": _ROBERTA for name in ("Roberta", "Bart", "Longformer", "LED")},
    "GPT2Tokenizer": _GPT2,
}
_BY_MODEL = {
    **dict.fromkeys(("bert", "distilbert", "electra", "convbert", "mobilebert", "layoutlm"), _BERT),
    **dict.fromkeys(("megatron-bert", "qdqbert", "nezha", "squeezebert", "ernie"), _BERT),
    **dict.fromkeys(("roberta", "bart", "longformer", "led", "roberta-prelayernorm"), _ROBERTA),
    **dict.fromkeys(("data2vec-text", "ibert"), _ROBERTA),
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "opt"), _GPT2),
}
# These say "whatever tokenizer.json says".
_GENERIC_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend")
_RESAVE = "save it once with Transformers' AutoTokenizer, which writes a tokenizer.json"


def read_tokenizer(
    folder: Path, *, role: str = "encoder"
) -> tuple[tokenizers.Tokenizer, dict[str, Any], dict[str, bytes]]:
    """Return `(backend, config, files)` of the tokenizer in `folder`.

    Args:
        folder: Holds the tokenizer's files, and may hold the model's `config.json`.
        role: Which half of an encoder-decoder `config.json` tells the kind of tokenizer:
            "encoder" or "decoder".

    Returns:
        The backend without padding or truncation; the settings as tokenizer_config.json spells
        them, with the names of all special tokens; and the original files by name, less those that
        would no longer say the whole truth (see `Tokenizer.save`).

    Raises:
        CheckpointError: No tokenizer here, or one of its files is damaged.
    """
    files = {name: _read(folder / name) for name in FILES if (folder / name).is_file()}
    config = _read_json(folder / "tokenizer_config.json")
    layout, named = _find_layout(folder, config, role)
    special = layout.special_tokens if layout else {}
    pieces = next((name for name in SENTENCEPIECE if name in files), None)
    if "tokenizer.json" in files:
        backend = _read_tokenizer_json(folder / "tokenizer.json", files["tokenizer.json"])
    elif pieces and named in sentencepiece_model.FAMILIES:
        if "added_tokens_decoder" not in config:
            config |= _read_json(folder / "special_tokens_map.json")
        backend, special = sentencepiece_model.build(folder / pieces, files[pieces], named, config)
    else:
        layout = layout or _guess_layout(folder, files, named)
        special = layout.special_tokens
        backend = _build(folder, layout, config)
    before = _state(backend)

    if "added_tokens_decoder" not in config:
        config |= _read_json(folder / "special_tokens_map.json")
    if backend.padding:
        config.setdefault("pad_token", backend.padding["pad_token"])
    for name, token in special.items():
        if backend.token_to_id(token) is not None:
            config.setdefault(name, token)
    if layout is not None:
        _apply_options(backend, config)
    _add_tokens(folder, backend, config, verify="tokenizer.json" not in files)
    if "tokenizer.json" not in files and layout is not None:
        _add_post_processor(folder, backend, layout, config)
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = bool(config.get("split_special_tokens", False))

    if _state(backend) != before:
        files.pop("tokenizer.json", None)
    if "tokenizer_class" not in config:  # without it AutoTokenizer needs the model's config.json
        files.pop("tokenizer_config.json", None)
    special = {name: text for name in SPECIAL_TOKENS if (text := _content(config.get(name)))}
    return backend, {**config, **special}, files


def _read(path: Path) -> bytes:
    try:
        return hub.read_bytes(path, _MAX_BYTES)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return _parse_json(path, _read(path))


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _read_tokenizer_json(path: Path, data: bytes) -> tokenizers.Tokenizer:
    # The library trusts these two, and ends the process where it should not.
    if b"recompiled" in data or b"\\u" in data:
        check_charsmaps(path, _parse_json(path, data).get("normalizer"))
    try:
        backend = tokenizers.Tokenizer.from_buffer(data)
        if backend.post_processor is not None:
            check_templates(path, json.loads(backend.post_processor.__getstate__()))
        return backend
    except CheckpointError:
        raise
    except Exception as error:  # the library raises bare Exception
        _parse_json(path, data)  # which may have a better message
        raise CheckpointError(
            f"{path} is not a tokenizer that tokenizers {tokenizers.__version__} can read: {error}"
        ) from None


def check_charsmaps(path: Path, normalizer: Any, depth: int = 0) -> None:
    """Refuse a compiled table of characters that cannot be one.

    It is the length of a trie (4 bytes), the trie (4 bytes a node) and the texts it leads to.

    Raises:
        CheckpointError: it is something else.
    """
    if not isinstance(normalizer, dict) or depth > 8:
        return
    parts = normalizer.get("normalizers")
    for part in parts if isinstance(parts, list) else ():
        check_charsmaps(path, part, depth + 1)
    if normalizer.get("type") != "Precompiled":
        return
    try:
        table = base64.b64decode(str(normalizer.get("precompiled_charsmap")), validate=True)
    except ValueError:
        table = b""
    nodes = int.from_bytes(table[:4], "little")
    if not 0 < nodes <= len(table) - 4 or nodes % 4:
        raise CheckpointError(f"{path} has a damaged table of characters (precompiled_charsmap)")


def check_templates(path: Path, processor: Mapping[str, Any], depth: int = 0) -> None:
    """Refuse a template that puts a token around a text without saying which id it has.

    Raises:
        CheckpointError: it does.
    """
    for part in processor.get("processors") or () if depth < 8 else ():
        check_templates(path, part, depth + 1)
    known = processor.get("special_tokens") or {}
    for piece in (*(processor.get("single") or ()), *(processor.get("pair") or ())):
        name = piece.get("SpecialToken", {}).get("id") if isinstance(piece, dict) else None
        if name is not None and name not in known:
            raise CheckpointError(
                f"{path} puts the token {str(name)[:80]!r} around texts, which its "
                f"post_processor does not define"
            )


def _find_layout(
    folder: Path, config: Mapping[str, Any], role: str
) -> tuple[Layout | None, str | None]:
    """The layout that tokenizer_config.json or config.json names, if we know it; and that name."""
    model = _read_json(folder / "config.json")
    if str(model.get("model_type")).replace("_", "-") == "encoder-decoder":
        half = model.get(role)
        model = half if isinstance(half, dict) else {}
    named = config.get("tokenizer_class") or model.get("tokenizer_class")
    if isinstance(named, str):
        named = named.removesuffix("Fast")
        if named in _GENERIC_CLASSES and (folder / "tokenizer.json").is_file():
            return None, named
        if named not in _GENERIC_CLASSES:
            return _BY_CLASS.get(named), named
    named = model.get("model_type")
    return _BY_MODEL.get(str(named)), named


def _guess_layout(folder: Path, files: Mapping[str, bytes], named: str | None) -> Layout:
    """Without tokenizer.json and without a usable hint, the vocabulary itself says what it is."""
    candidates = [layout for layout in _LAYOUTS if layout.vocabulary[0] in files]
    if not candidates:
        _raise_no_files(folder)
    if named is not None:
        raise CheckpointError(
            f"{folder} holds a tokenizer of the kind {named!r} without tokenizer.json; only BERT, "
            f"GPT-2 and RoBERTa/BART tokenizers are rebuilt from vocabulary files: {_RESAVE}"
        )
    for layout in candidates:
        if all(token.encode() in files[layout.vocabulary[0]] for token in layout.evidence):
            return layout
    raise CheckpointError(
        f"{folder / candidates[0].vocabulary[0]} does not tell whether it is of a BERT, RoBERTa or "
        "GPT-2 tokenizer; write the right tokenizer_class into tokenizer_config.json there"
    )


def _raise_no_files(folder: Path) -> NoReturn:
    pieces = [name for name in SENTENCEPIECE if (folder / name).is_file()]
    if pieces:
        raise CheckpointError(
            f"{folder} holds the SentencePiece model {pieces[0]} without tokenizer.json, which is "
            f"not read here; {_RESAVE}"
        )
    there = sorted(path.name for path in folder.iterdir())
    listing = ", ".join(there[:12]) + (", ..." if len(there) > 12 else "") if there else "nothing"
    raise CheckpointError(
        f"no tokenizer in {folder}: looked for tokenizer.json, vocab.txt, or vocab.json with "
        f"merges.txt; found {listing}"
    )


def _build(folder: Path, layout: Layout, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Rebuild the pipeline of a layout from its vocabulary files, special tokens still unmarked."""
    paths = [folder / name for name in layout.vocabulary]
    missing = [path.name for path in paths if not path.is_file()]
    if len(missing) == len(paths):
        _raise_no_files(folder)
    if missing:
        raise CheckpointError(f"{folder} holds {paths[0].name} but not {missing[0]}")
    names = " and ".join(layout.vocabulary)
    try:
        if layout is _BERT:
            vocab = models.WordPiece.read_file(str(paths[0]))
            unk = _content(config.get("unk_token")) or _BERT.special_tokens["unk_token"]
            backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=unk))
            backend.normalizer = normalizers.BertNormalizer()
            backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            backend.decoder = decoders.WordPiece(prefix="##")
            if unk not in vocab:
                raise ValueError(f"the unknown-word token {unk!r} is missing")
        else:
            _read_json(paths[0])  # for a better message than the library's
            vocab, merges = models.BPE.read_file(*map(str, paths))
            backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            backend.decoder = decoders.ByteLevel()
    except CheckpointError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{names} in {folder} cannot be used: {error}") from None
    return backend


def _apply_options(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Options of a known class win over tokenizer.json, absent ones count as their defaults."""
    if isinstance(backend.normalizer, normalizers.BertNormalizer):
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
            strip_accents=config.get("strip_accents"),
            lowercase=bool(config.get("do_lower_case", True)),
        )
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        backend.pre_tokenizer.add_prefix_space = bool(config.get("add_prefix_space", False))


def _add_tokens(
    folder: Path, backend: tokenizers.Tokenizer, config: Mapping[str, Any], *, verify: bool
) -> None:
    """Mark or add the tokens the side files name: numbered ones in order, then special ones."""
    wanted: dict[str, AddedToken] = {}
    index_of: dict[str, int] = {}
    special: dict[str, AddedToken] = {}
    for token in _special_tokens(config):
        special.setdefault(token.content, token)
    try:
        if "added_tokens_decoder" in config:
            for index, fields in config["added_tokens_decoder"].items():
                token = AddedToken(**fields)
                wanted[token.content], index_of[token.content] = token, int(index)
        else:
            for text, index in _read_json(folder / "added_tokens.json").items():
                is_special = text in special
                wanted[text] = AddedToken(text, normalized=not is_special, special=is_special)
                index_of[text] = int(index)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the added tokens listed in {folder} are damaged: {error}") from None
    # tokenizer.json has its own list; what it already holds keeps its place and its flags.
    present = {token.content for token in backend.get_added_tokens_decoder().values()}
    numbered = sorted(index_of, key=index_of.__getitem__)
    for text in (*numbered, *special):
        if text in present:
            continue
        token = wanted.get(text) or special[text]
        if text in special:
            token.special = True
        backend.add_tokens([token])
        present.add(text)
    if verify:
        for text, index in index_of.items():
            if (got := backend.token_to_id(text)) != index:
                raise CheckpointError(
                    f"the files in {folder} give the added token {text!r} the id {index}, but "
                    f"after the vocabulary it comes out as {got}: they do not belong together"
                )


def _special_tokens(config: Mapping[str, Any]) -> Iterator[AddedToken]:
    names = [*SPECIAL_TOKENS, *(k for k in config if k.endswith("_token"))]
    values = [config.get(name) for name in dict.fromkeys(names)]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if not isinstance(extra, dict | list):
        raise CheckpointError(
            f"extra_special_tokens must be a list of tokens; got {str(extra)[:80]!r}"
        )
    values += extra.values() if isinstance(extra, dict) else extra
    for value in values:
        if isinstance(value, dict) and isinstance(value.get("content"), str):
            flags = ("lstrip", "rstrip", "single_word", "normalized")
            fields = {flag: bool(value[flag]) for flag in flags if flag in value}
            yield AddedToken(value["content"], special=True, **fields)
        elif isinstance(value, str) and value:
            yield AddedToken(value, special=True)


def _content(token: Any) -> str | None:
    """The text of a special token, written as a string or as an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _add_post_processor(
    folder: Path, backend: tokenizers.Tokenizer, layout: Layout, config: Mapping[str, Any]
) -> None:
    """The special tokens a layout puts around a text."""

    def token(name: str) -> tuple[str, int]:
        text = _content(config.get(name)) or layout.special_tokens.get(name, name)
        index = backend.token_to_id(text)
        if index is None:
            raise CheckpointError(
                f"{' and '.join(layout.vocabulary)} in {folder} lack the {name} {text!r}, which "
                "this tokenizer puts around every text"
            )
        return text, index

    if layout is _ROBERTA:
        backend.post_processor = processors.RobertaProcessing(
            token("sep_token"),
            token("cls_token"),
            trim_offsets=bool(config.get("trim_offsets", True)),
            add_prefix_space=bool(config.get("add_prefix_space", False)),
        )
        return
    if layout is _BERT:
        first, last = token("cls_token"), token("sep_token")
    else:
        first = token("bos_token") if config.get("add_bos_token") else None
        last = token("eos_token") if config.get("add_eos_token") else None
    around = [pair for pair in (first, last) if pair is not None]
    if around:
        single = [first[0] if first else None, "$A", last[0] if last else None]
        backend.post_processor = processors.TemplateProcessing(
            single=[piece for piece in single if piece is not None], special_tokens=around
        )


def _state(backend: tokenizers.Tokenizer) -> list[str]:
    """All that reading the side files can change; equal before and after means: nothing did."""
    added = backend.get_added_tokens_decoder()
    parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
    return [*map(repr, parts), repr({index: repr(added[index]) for index in sorted(added)})]
