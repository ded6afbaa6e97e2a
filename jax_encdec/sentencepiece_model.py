"""SentencePiece `.model` files -> the `tokenizers` pipeline that gives the same ids.

Older T5, XLM-RoBERTa, CamemBERT, mBART, ALBERT, Pegasus and BertGeneration folders hold their
vocabulary only as a SentencePiece model: a protobuf message of pieces with scores and of the rules
that normalise text. `read_model` parses it, strictly and without protobuf; `build` puts it into the
frame its family was published with, which moves ids (XLM-RoBERTa opens with four tokens of its
own), adds tokens (T5's `<extra_id_0>`) and says what stands around a text.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from .errors import CheckpointError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _, _BYTE = range(1, 7)
_ALGORITHMS = {1: "Unigram", 2: "BPE", 3: "word", 4: "character"}

_MBART = (
    "ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT "
    "lv_LV my_MM ne_NP nl_XX ro_RO ru_RU si_LK tr_TR vi_VN zh_CN"
)
_MBART50 = (
    "af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID ka_GE km_KH mk_MK ml_IN mn_MN mr_IN pl_PL ps_AF "
    "pt_XX sv_SE sw_KE ta_IN te_IN th_TH tl_XX uk_UA ur_PK xh_ZA gl_ES sl_SI"
)


class Piece(NamedTuple):
    """One entry of the vocabulary."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True, kw_only=True)
class SentencePieceModel:
    """What a `.model` file says, as far as encoding needs it."""

    pieces: tuple[Piece, ...]
    charsmap: bytes  # the compiled table of character replacements; empty: none
    byte_fallback: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


class Family(NamedTuple):
    """The frame around the pieces that a published tokenizer class fixes."""

    special_tokens: Mapping[str, str]
    before: tuple[str, ...] = ()  # instead of the model's first `replaced` pieces
    replaced: int = 0
    after: tuple[str, ...] = ()
    first: tuple[str, ...] = ()  # names of the tokens that open a text,
    last: tuple[str, ...] = ()  # and of those that close it
    rules: str = ""  # what is done to a text before the model's own normalisation
    mask_takes_space: bool = False


_BASE = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_FAIRSEQ = {**_BASE, "bos_token": "<s>", "cls_token": "<s>", "sep_token": "</s>"}
_MASKED = {**_FAIRSEQ, "mask_token": "<mask>"}
_BERT = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
_BERT |= {"bos_token": "[CLS]", "eos_token": "[SEP]"}

_T5 = Family(_BASE, after=("<extra_id_*>",), last=("eos_token",))  # *: as many as `extra_ids`
_XLM_R = Family(
    _MASKED,
    before=("<s>", "<pad>", "</s>", "<unk>"),
    replaced=3,
    after=("<mask>",),
    first=("bos_token",),
    last=("eos_token",),
    mask_takes_space=True,
)
_CAMEMBERT = _XLM_R._replace(
    before=("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED"), replaced=1
)
_MBART_25 = _XLM_R._replace(
    after=(*_MBART.split(), "<mask>"), first=(), last=("eos_token", "src_lang")
)
_MBART_50 = _XLM_R._replace(
    after=(*_MBART.split(), *_MBART50.split(), "<mask>"), first=("src_lang",), last=("eos_token",)
)
_XGLM = _XLM_R._replace(
    special_tokens=_FAIRSEQ,
    after=tuple(f"<madeupword{i}>" for i in range(7)),
    first=("sep_token",),
    last=(),
)
_PEGASUS = Family(
    {**_BASE, "mask_token": "<mask_2>"},
    before=("<pad>", "</s>", "<mask_1>", "<mask_2>", *(f"<unk_{i}>" for i in range(2, 103))),
    replaced=2,
    last=("eos_token",),
)
_ALBERT = Family(
    {**_BERT, "unk_token": "<unk>", "pad_token": "<pad>"},
    first=("cls_token",),
    last=("sep_token",),
    rules="albert",
    mask_takes_space=True,
)
_DEBERTA = Family(
    {**_BERT, "unk_token": "[UNK]", "pad_token": "[PAD]"},
    after=("[MASK]",),
    first=("cls_token",),
    last=("sep_token",),
    rules="deberta",
)
_BERT_GENERATION = Family({**_BASE, "bos_token": "<s>", "sep_token": "<::::>"})

# By `tokenizer_class` (less a final "Fast") and by `model_type`.
FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(("T5Tokenizer", "MT5Tokenizer", "t5", "mt5", "umt5"), _T5),
    **dict.fromkeys(("XLMRobertaTokenizer", "xlm-roberta", "xlm-roberta-xl"), _XLM_R),
    **dict.fromkeys(("CamembertTokenizer", "camembert"), _CAMEMBERT),
    **dict.fromkeys(("MBartTokenizer", "mbart"), _MBART_25),
    "MBart50Tokenizer": _MBART_50,
    **dict.fromkeys(("XGLMTokenizer", "xglm"), _XGLM),
    **dict.fromkeys(("PegasusTokenizer", "pegasus"), _PEGASUS),
    **dict.fromkeys(("AlbertTokenizer", "albert"), _ALBERT),
    **dict.fromkeys(("DebertaV2Tokenizer", "deberta-v2"), _DEBERTA),
    **dict.fromkeys(("BertGenerationTokenizer", "bert-generation"), _BERT_GENERATION),
}


def build(
    path: Path, data: bytes, named: str | None, config: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Return the pipeline of a `.model` file and the family's special tokens by name.

    Args:
        path: The SentencePiece model, for messages.
        data: Its content.
        named: Which kind of tokenizer: a `tokenizer_class` without "Fast", or a `model_type`.
        config: Settings as tokenizer_config.json spells them: special tokens, `extra_ids` (T5),
            `src_lang` (mBART), `do_lower_case` and `keep_accents` (ALBERT).

    Raises:
        CheckpointError: The file is damaged, or of a kind that is not rebuilt from it.
    """
    family = FAMILIES.get(named or "")
    if family is None:
        raise CheckpointError(
            f"{path} is the vocabulary of a tokenizer of the kind {named!r}, which is not rebuilt "
            "from it; save it once with Transformers' AutoTokenizer, which writes a tokenizer.json"
        )
    model = read_model(path, data)
    vocab, unk_id = _vocabulary(path, model, family, config)
    backend = tokenizers.Tokenizer(
        models.Unigram(vocab, unk_id=unk_id, byte_fallback=model.byte_fallback)
    )
    backend.normalizer = _normalizer(path, model, family, config)
    scheme = "always" if model.add_dummy_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    metaspace = decoders.Metaspace(prepend_scheme=scheme)
    if model.byte_fallback:
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace])
    else:
        backend.decoder = metaspace

    special = dict(family.special_tokens)
    mask = special.get("mask_token") if family.mask_takes_space else None
    kept = model.pieces[family.replaced :]
    own = [*family.before, *_after(family, config)]
    own += [piece.text for piece in kept if piece.kind in (_CONTROL, _UNKNOWN)]
    backend.add_special_tokens(
        [AddedToken(text, special=True, lstrip=text == mask) for text in dict.fromkeys(own)]
    )
    _add_post_processor(path, backend, family, config)
    return backend, special


# The file ----------------------------------------------------------------------------------------


def read_model(path: Path, data: bytes) -> SentencePieceModel:
    """Parse the content of a SentencePiece model; `path` is for messages.

    Raises:
        CheckpointError: The file is no such model, is damaged, or is not of the Unigram kind.
    """
    try:
        return _parse(data)
    except (ValueError, struct.error) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{path} is not a usable SentencePiece model: {error}") from None


def _parse(data: bytes) -> SentencePieceModel:
    """Read `ModelProto`: 1 the pieces, 2 how it was trained, 3 how text is normalised."""
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    rules: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            fields = dict(_fields(_as(bytes, value)))
            text = _as(bytes, fields.get(1, b"")).decode()
            (score,) = struct.unpack("<f", _as(bytes, fields.get(2, bytes(4))))
            pieces.append(Piece(text, score, _as(int, fields.get(3, _NORMAL))))
        elif number == 2:
            trainer |= _fields(_as(bytes, value))
        elif number == 3:
            rules |= _fields(_as(bytes, value))
    if not pieces:
        raise ValueError("it holds no pieces")
    algorithm = _as(int, trainer.get(3, 1))
    if algorithm != 1:
        name = _ALGORITHMS.get(algorithm, algorithm)
        raise ValueError(f"expected one of the Unigram kind; got {name}")
    _check(pieces)
    charsmap = _as(bytes, rules.get(2, b""))
    _check_charsmap(charsmap)
    return SentencePieceModel(
        pieces=tuple(pieces),
        charsmap=charsmap,
        byte_fallback=bool(_as(int, trainer.get(35, 0))),
        add_dummy_prefix=bool(_as(int, rules.get(3, 1))),
        remove_extra_whitespaces=bool(_as(int, rules.get(4, 1))),
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a protobuf message: number and value, fixed-width values as their bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
        elif wire in (1, 2, 5):
            size, at = _varint(data, at) if wire == 2 else (8 if wire == 1 else 4, at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"it is no protobuf message (wire type {wire})")
        if at > len(data) or number == 0:
            raise ValueError("it is cut off or no protobuf message")
        yield number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("it is cut off or no protobuf message")


def _as(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError("a field has the wrong type")
    return value


def _check(pieces: list[Piece]) -> None:
    if len({piece.text for piece in pieces}) < len(pieces) or not all(p.text for p in pieces):
        raise ValueError("a piece is empty or there twice")
    if not all(math.isfinite(piece.score) for piece in pieces):
        raise ValueError("a score is not finite")
    if sum(piece.kind == _UNKNOWN for piece in pieces) != 1:
        raise ValueError("expected one piece of the unknown kind")
    if not any(piece.kind == _NORMAL for piece in pieces):
        raise ValueError("it holds no piece that spells text")
    kinds = {_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE}
    if not all(piece.kind in kinds for piece in pieces):
        raise ValueError("it has pieces that are marked as unused, or of a kind not known here")


def _check_charsmap(data: bytes) -> None:
    """Check that no text can lead outside the table, which the library would not survive.

    The size of a double-array trie in bytes, the trie, then texts that end in NUL. A unit of the
    trie leads to the block of 256 at its place xor its offset; a leaf says where its text begins.
    """
    if not data:
        return
    (size,) = struct.unpack_from("<I", data)
    texts = data[4 + size :]
    if not size or size % 1024 or 4 + size > len(data):
        raise ValueError("its table of characters is damaged")
    texts.decode()
    units = np.frombuffer(data, "<u4", size // 4, 4)
    offset = (units >> 10) << ((units & (1 << 9)) >> 6)
    leaf = units >> 31 == 1
    reach = (np.arange(len(units)) ^ offset) // 256
    starts = (units & 0x7FFFFFFF)[leaf]
    inside = np.frombuffer(texts, np.uint8)
    if (reach[~leaf] >= len(units) // 256).any() or (starts >= len(texts)).any():
        raise ValueError("its table of characters leads outside itself")
    if (inside[starts] & 0xC0 == 0x80).any():
        raise ValueError("its table of characters cuts characters apart")


# The pipeline ------------------------------------------------------------------------------------


def _vocabulary(
    path: Path, model: SentencePieceModel, family: Family, config: Mapping[str, Any]
) -> tuple[list[tuple[str, float]], int]:
    """Pieces and scores in the order of the family's ids, and the id of what cannot be spelled.

    Scores are such that the library finds SentencePiece's own segmentation: no special token may
    lower the least score, from which the price of an unknown character is reckoned, and what the
    user defined wins over all that spells the same.
    """
    replaced, kept = model.pieces[: family.replaced], model.pieces[family.replaced :]
    if any(piece.kind in (_NORMAL, _USER_DEFINED, _BYTE) for piece in replaced):
        raise CheckpointError(
            f"{path} does not open with the special pieces that a tokenizer of its family has; is "
            "the tokenizer_class in tokenizer_config.json right?"
        )
    scores = [piece.score for piece in model.pieces if piece.kind == _NORMAL]
    least, most = min(scores), max(scores)
    vocab = [(text, 0.0) for text in family.before]
    for text, score, kind in kept:
        if kind == _USER_DEFINED:
            score = len(text) * most - 0.1
        elif kind == _BYTE:
            score = least
        elif family.rules == "albert" and len(text) > 1 and text[-1] == "," and text[-2].isdigit():
            score -= 100  # ALBERT splits the comma off a number
        vocab.append((text, score))
    known = {text for text, _ in vocab}
    if len(known) < len(vocab):
        raise CheckpointError(f"{path} holds special tokens at another place than its family has")
    vocab += [(text, 0.0) for text in _after(family, config) if text not in known]
    unknown = next(piece.text for piece in model.pieces if piece.kind == _UNKNOWN)
    name = family.special_tokens["unk_token"] if "<unk>" in family.before else unknown
    return vocab, next(i for i, (text, _) in enumerate(vocab) if text == name)


def _after(family: Family, config: Mapping[str, Any]) -> list[str]:
    if family is not _T5:
        return list(family.after)
    count = config.get("extra_ids", 100)
    if not isinstance(count, int) or not 0 <= count <= 10_000:
        raise CheckpointError(f"extra_ids in tokenizer_config.json must be a count; got {count!r}")
    return [f"<extra_id_{i}>" for i in reversed(range(count))]


def _normalizer(
    path: Path, model: SentencePieceModel, family: Family, config: Mapping[str, Any]
) -> Any:
    steps: list[Any] = []
    if family.rules == "albert":
        steps += [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
        if not config.get("keep_accents", False):
            steps += [normalizers.NFKD(), normalizers.StripAccents()]
    if family.rules and config.get("do_lower_case", family.rules == "albert"):
        steps.append(normalizers.Lowercase())
    if model.charsmap:
        try:
            steps.append(normalizers.Precompiled(model.charsmap))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} has a damaged table of characters: {error}") from None
    if model.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(Regex("^ +| +$"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    return normalizers.Sequence(steps)


def _add_post_processor(
    path: Path, backend: tokenizers.Tokenizer, family: Family, config: Mapping[str, Any]
) -> None:
    def token(name: str) -> tuple[str, int]:
        given = config.get(name)
        text = given.get("content") if isinstance(given, Mapping) else given
        text = text or family.special_tokens.get(name, "en_XX")
        index = backend.token_to_id(text) if isinstance(text, str) else None
        if index is None:
            raise CheckpointError(
                f"{path} lacks the {name} {text!r}, which this tokenizer puts around every text"
            )
        return text, index

    first = [token(name) for name in family.first]
    last = [token(name) for name in family.last]
    if first or last:
        single = [*(text for text, _ in first), "$A", *(text for text, _ in last)]
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=list(dict.fromkeys(first + last))
        )
