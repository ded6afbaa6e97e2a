"""The demo's task: dates as people write them -> ISO 8601, `the 3rd of May, 1998` -> `1998-05-03`.

A date is written in one of `STYLES`, with the casing and punctuation of hasty writers, but never
ambiguously: no day and month in digits alone without the year first, no two-digit years. About one
calendar date in twenty is held out: a model never sees it in any style until it is tested on it.
Everything is a pure function of its arguments; the same seed gives the same examples everywhere.
"""

from __future__ import annotations

import datetime
import hashlib
import random
from collections import Counter
from collections.abc import Iterable
from typing import Literal

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from ..tokenization import Tokenizer

FIRST = datetime.date(1900, 1, 1)
LAST = datetime.date(2099, 12, 31)

_MONTHS = {
    "month": "January February March April May June July August September October November "
    "December",
    "mon": "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec",
    "german": "Januar Februar März April Mai Juni Juli August September Oktober November Dezember",
    "french": "janvier février mars avril mai juin juillet août septembre octobre novembre "
    "décembre",
    "spanish": "enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre "
    "diciembre",
    "italian": "gennaio febbraio marzo aprile maggio giugno luglio agosto settembre ottobre "
    "novembre dicembre",
}
_NUMBERS = {
    "ones": "zero one two three four five six seven eight nine ten eleven twelve thirteen "
    "fourteen fifteen sixteen seventeen eighteen nineteen",
    "tens": "- - twenty thirty forty fifty sixty seventy eighty ninety",
}
_MONTH_NAMES = {field: names.split() for field, names in _MONTHS.items()}
_ONES, _TENS = (names.split() for names in _NUMBERS.values())
_WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_ORDINALS = {"one": "first", "two": "second", "three": "third", "five": "fifth"}
_ORDINALS |= {"eight": "eighth", "nine": "ninth", "twelve": "twelfth"}
_ORDINALS |= {"twenty": "twentieth", "thirty": "thirtieth"}

# {d} 3 {dd} 03 {nth} 3rd {third} third; {m} 5 {mm} 05 {month} May {mon} a short form, with or
# without a full stop; {y} 1998 {year} nineteen ninety-eight; {weekday} Sunday {wday} Sun.
STYLES = (
    "{y}-{mm}-{dd}",
    "{y}/{mm}/{dd}",
    "{y}/{m}/{d}",
    "{y}.{mm}.{dd}",
    "{y} {mm} {dd}",
    "{y}{mm}{dd}",
    "{y} {month} {d}",
    "{y}, {month} {nth}",
    "{y}-{mon}-{dd}",
    "{month} {d}, {y}",
    "{month} {nth}, {y}",
    "{mon} {d}, {y}",
    "{mon} {dd} {y}",
    "{d} {month} {y}",
    "{d} {month}, {y}",
    "{d} {mon} {y}",
    "{dd}-{mon}-{y}",
    "{dd}/{mon}/{y}",
    "{nth} {month} {y}",
    "{nth} of {month}, {y}",
    "the {nth} of {month}, {y}",
    "the {nth} of {mon} {y}",
    "{weekday}, {d} {month} {y}",
    "{weekday}, {month} {d}, {y}",
    "{weekday} the {nth} of {month} {y}",
    "{weekday} {y}-{mm}-{dd}",
    "{wday}, {d} {mon} {y}",
    "{wday} {mon} {dd} {y}",
    "{month} the {third}, {year}",
    "{month} {third}, {year}",
    "the {third} of {month}, {year}",
    "{third} of {month} {year}",
    "{weekday}, the {third} of {month} {year}",
    "{weekday}, {month} the {third}, {y}",
    "the {third} of {month} {y}",
    "{d} {month} {year}",
    "{d}. {german} {y}",
    "am {d}. {german} {y}",
    "{jour} {french} {y}",
    "le {jour} {french} {y}",
    "{d} de {spanish} de {y}",
    "el {d} de {spanish} de {y}",
    "{d} {italian} {y}",
    "il {d} {italian} {y}",
)


def split(date: datetime.date) -> Literal["train", "heldout"]:
    """Say to which part a calendar date belongs, always the same; about 5 % are held out."""
    digest = hashlib.sha256(date.isoformat().encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % 20 == 0 else "train"


def render(date: datetime.date, rng: random.Random) -> str:
    """Write `date` (years 1900 to 2099) in a style, casing and punctuation drawn from `rng`."""
    text = render_style(rng.choice(STYLES), date, rng)
    case, stray = rng.random(), rng.random()
    if case < 0.3:
        text = text.lower() if case < 0.15 else text.upper()
    if stray < 0.12:
        text = text.replace(",", "")
    elif stray < 0.18:
        text = text.replace(", ", " , ")
    elif stray < 0.24:
        text = text.replace(" ", "  ")
    elif stray < 0.28:
        text = f" {text},"
    return text


def render_style(style: str, date: datetime.date, rng: random.Random) -> str:
    """Write `date` in one of `STYLES`; `rng` draws among short forms and ways to say a year."""
    d, m, y = date.day, date.month, date.year
    fields = {field: names[m - 1] for field, names in _MONTH_NAMES.items()}
    short = "Sept" if m == 9 and rng.random() < 0.5 else fields["mon"]
    fields["mon"] = short + "." if m != 5 and rng.random() < 0.3 else short  # "May" is whole
    weekday = _WEEKDAYS[date.weekday()]
    return style.format(
        **fields,
        d=d,
        dd=f"{d:02}",
        nth=_nth(d),
        third=_third(d),
        jour="1er" if d == 1 else d,
        m=m,
        mm=f"{m:02}",
        y=y,
        year=_year_in_words(y, rng),
        weekday=weekday,
        wday=weekday[:3],
    )


def make_examples(part: str, count: int, seed: int) -> list[tuple[str, str]]:
    """Return `count` pairs (text, ISO date) from `part`, "train" or "heldout".

    Dates are drawn uniformly, with replacement, from those that `split` puts there.
    """
    if part not in ("train", "heldout"):
        raise ValueError(f"part must be 'train' or 'heldout', got {part!r}")
    rng = random.Random(f"{part} {seed}")
    examples = []
    while len(examples) < count:
        date = datetime.date.fromordinal(rng.randint(FIRST.toordinal(), LAST.toordinal()))
        if split(date) == part:
            examples.append((render(date, rng), date.isoformat()))
    return examples


def train_tokenizer(texts: Iterable[str], vocab_size: int = 384) -> Tokenizer:
    """Learn a small lowercasing WordPiece vocabulary, in the manner of BERT, from `texts`.

    It holds the most frequent whole words of `texts`, and single letters to spell all others.
    Digits stand alone, so that numbers never seen are still spelled from known parts; decoding
    closes the gaps between digits and hyphens again, so an ISO date comes back unchanged. Save it
    with `Tokenizer.save`; Transformers' AutoTokenizer opens it as well.
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer = normalizers.BertNormalizer(lowercase=True)
    pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)]
    )
    counts: Counter[str] = Counter()
    for text in texts:
        words = pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text))
        counts.update(word for word, _ in words)
    letters = sorted({letter for word in counts for letter in word} | set("0123456789-"))
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters if letter.isalpha())]
    words = sorted(counts, key=lambda word: (-counts[word], word))
    pieces += [word for word in words if len(word) > 1][: max(0, vocab_size - len(pieces))]

    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="##"),
            decoders.Fuse(),
            decoders.Replace(Regex("(?<=[0-9-]) (?=[0-9-])"), ""),
        ]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return Tokenizer(backend, dict(zip(names, special, strict=True)))


def _nth(n: int) -> str:
    suffix = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"


def _number(n: int) -> str:
    """0 to 99 in words."""
    if n < 20:
        return _ONES[n]
    return _TENS[n // 10] + (f"-{_ONES[n % 10]}" if n % 10 else "")


def _third(n: int) -> str:
    head, hyphen, last = _number(n).rpartition("-")
    return head + hyphen + _ORDINALS.get(last, f"{last}th")


def _year_in_words(year: int, rng: random.Random) -> str:
    century, rest = divmod(year, 100)
    thousands = rng.random() < 0.5  # two thousand (and) ten, rather than twenty ten
    joint = " and " if rng.random() < 0.5 else " "
    if century == 20 and (rest < 10 or thousands):
        return "two thousand" + (joint + _number(rest) if rest else "")
    if rest == 0:
        return f"{_number(century)} hundred"
    return f"{_number(century)} {'oh ' if rest < 10 else ''}{_number(rest)}"
