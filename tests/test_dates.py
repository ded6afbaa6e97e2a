"""The demo's dates: unambiguous, true to the calendar, the same everywhere, cleanly split."""

from __future__ import annotations

import datetime
import random
import re
import subprocess
import sys
import unicodedata

import pytest

from jax_encdec.cli.dates import (
    FIRST,
    LAST,
    STYLES,
    make_examples,
    render,
    render_style,
    split,
    train_tokenizer,
)
from jax_encdec.tokenization import Tokenizer

DAY = datetime.timedelta(days=1)
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ALL = [FIRST + i * DAY for i in range((LAST - FIRST).days + 1)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    pairs = make_examples("train", 4000, seed=0)
    return train_tokenizer([text for pair in pairs for text in pair])


def skeleton(text: str) -> str:
    """Words and numbers alone: as if casing, accents and punctuation counted for nothing."""
    plain = unicodedata.normalize("NFD", text.lower())
    plain = "".join(char for char in plain if not unicodedata.combining(char))
    return " ".join(re.findall(r"[a-z]+|[0-9]+", plain))


def assert_injective(pairs) -> None:
    seen: dict[str, str] = {}
    for text, iso in pairs:
        assert seen.setdefault(skeleton(text), iso) == iso, (text, iso)


def test_no_text_means_two_dates_over_a_large_sample():
    rng = random.Random(1)
    assert_injective((render(date, rng), date.isoformat()) for date in rng.choices(ALL, k=60000))


def test_no_text_means_two_dates_in_any_style():
    rng = random.Random(2)
    years = (1900, 1910, 1919, 1998, 2000, 2001, 2012, 2020)
    dates = [date for date in ALL if date.year in years or (date.month, date.day) == (9, 21)]
    assert_injective(
        (render_style(style, date, rng), date.isoformat()) for style in STYLES for date in dates
    )


@pytest.mark.exhaustive
def test_no_text_means_two_dates_in_the_whole_calendar():
    rng = random.Random(3)
    assert_injective(
        (render_style(style, date, rng), date.isoformat()) for style in STYLES for date in ALL
    )


def test_no_two_dates_give_a_model_the_same_ids(tokenizer):
    pairs = make_examples("train", 20000, seed=5) + make_examples("heldout", 20000, seed=5)
    seen: dict[tuple[int, ...], str] = {}
    rows = tokenizer.encode([text for text, _ in pairs])
    for ids, (text, iso) in zip(rows, pairs, strict=True):
        assert seen.setdefault(tuple(ids), iso) == iso, (text, iso)


def test_weekdays_are_true():
    named = 0
    for text, iso in make_examples("train", 10000, seed=8):
        for word in re.findall("[a-z]+", text.lower()):
            for full in WEEKDAYS:
                if word in (full.lower(), full.lower()[:3]):
                    assert datetime.date.fromisoformat(iso).strftime("%A") == full, (text, iso)
                    named += 1
    assert named > 500
    sunday = datetime.date(1998, 5, 3)
    assert render_style("{weekday} {d}", sunday, random.Random(0)) == "Sunday 3"


@pytest.mark.parametrize(
    ("style", "date", "expected"),
    [
        ("the {nth} of {month}, {y}", "1998-05-03", {"the 3rd of May, 1998"}),
        ("{nth} {month} {y}", "2004-09-11", {"11th September 2004"}),
        ("{nth} {month} {y}", "2004-09-22", {"22nd September 2004"}),
        ("{d} {mon} {y}", "2004-09-20", {f"20 {m} 2004" for m in ("Sep", "Sep.", "Sept", "Sept.")}),
        ("{dd}-{mon}-{y}", "1998-05-03", {"03-May-1998"}),
        ("{jour} {french} {y}", "1999-08-01", {"1er août 1999"}),
        ("{d}. {german} {y}", "1999-03-01", {"1. März 1999"}),
        ("{year}", "1998-01-01", {"nineteen ninety-eight"}),
        ("{year}", "1900-01-01", {"nineteen hundred"}),
        ("{year}", "1905-01-01", {"nineteen oh five"}),
        ("{year}", "2000-01-01", {"two thousand"}),
        ("{year}", "2005-01-01", {"two thousand five", "two thousand and five"}),
        ("{year}", "2020-01-01", {"twenty twenty", "two thousand twenty"}),
    ],
)
def test_a_style_reads_as_people_write(style, date, expected):
    rng = random.Random(0)
    made = {render_style(style, datetime.date.fromisoformat(date), rng) for _ in range(60)}
    assert expected <= made
    assert made - expected <= {"two thousand and twenty"}


def test_ordinals_in_words():
    made = {
        render_style("{third}", datetime.date(2000, 1, d), random.Random(0)) for d in range(1, 32)
    }
    assert len(made) == 31
    assert {"first", "second", "third", "fifth", "eighth", "ninth", "twelfth", "thirteenth"} <= made
    assert {"twentieth", "twenty-first", "twenty-fifth", "thirtieth", "thirty-first"} <= made


def test_every_style_and_variant_occurs():
    class Spy(random.Random):
        seen: set[str] = set()  # noqa: RUF012

        def choice(self, seq):
            picked = super().choice(seq)
            self.seen.add(picked)
            return picked

    rng = Spy(4)
    made = [render(rng.choices(ALL)[0], rng) for _ in range(3000)]
    assert rng.seen == set(STYLES)
    assert any(text.isupper() for text in made)
    assert any(text.islower() for text in made)
    assert any(" , " in text for text in made)
    assert any("  " in text for text in made)
    assert any(text.endswith(",") for text in made)


def test_no_numeric_day_and_month_without_the_year_first():
    for text, _ in make_examples("train", 20000, seed=6):
        assert re.search(r"\b\d{4}|[^\W\d_]", text), text
        assert not re.search(r"\b\d{1,2}[-/. ]+\d{1,2}[-/. ]+\d{4}", text), text


def test_train_and_heldout_share_no_date():
    parts = {"train": set(), "heldout": set()}
    for date in ALL:
        parts[split(date)].add(date.isoformat())
    assert 0.045 < len(parts["heldout"]) / len(ALL) < 0.055
    for part, dates in parts.items():
        pairs = make_examples(part, 5000, seed=1)
        assert len(pairs) == 5000
        assert {iso for _, iso in pairs} <= dates
    with pytest.raises(ValueError, match="part must be"):
        make_examples("test", 1, 0)


def test_examples_are_the_same_in_another_process():
    code = "from jax_encdec.cli.dates import make_examples as m; print(m('heldout', 50, 9))"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert runs == {str(make_examples("heldout", 50, 9))}
    assert make_examples("heldout", 50, 9) != make_examples("heldout", 50, 10)
    assert make_examples("heldout", 60, 9)[:50] == make_examples("heldout", 50, 9)


def test_iso_dates_come_back_exactly(tokenizer):
    dates = [date.isoformat() for date in ALL]
    rows = tokenizer.encode(dates)
    assert {len(row) for row in rows} == {12}
    assert tokenizer.decode_batch(rows) == dates
    assert tokenizer.decode(tokenizer.encode(["May 3, 1998"])[0]) == "may 3, 1998"


def test_vocabulary_and_sequences_are_small(tokenizer):
    assert tokenizer.vocab_size < 400
    pairs = make_examples("train", 20000, seed=2) + make_examples("heldout", 5000, seed=2)
    rows = tokenizer.encode([text for text, _ in pairs])
    assert max(map(len, rows)) <= 24
    assert not any(tokenizer.unk_token_id in row for row in rows)
    # Nothing people write of a date has to be spelled letter by letter.
    pieces = {token for row in rows for token in row}
    spelled = [tokenizer.backend.id_to_token(index) for index in pieces]
    assert not [piece for piece in spelled if piece.startswith("##")]


def test_the_tokenizer_is_saved_for_transformers_too(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    texts = [text for pair in make_examples("heldout", 500, seed=3) for text in pair]
    texts += ["Nicht bekannt: 3. Brumaire, 日本 1900!"]
    rows = tokenizer.encode(texts)
    for again in (Tokenizer.from_pretrained(tmp_path), tokenizer):
        assert again.encode(texts) == rows
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(texts)["input_ids"] == rows
    assert theirs.batch_decode(rows, skip_special_tokens=True) == tokenizer.decode_batch(rows)
    assert theirs.pad_token_id == tokenizer.pad_token_id == 0


def test_training_the_tokenizer_does_not_depend_on_chance():
    texts = [text for pair in make_examples("train", 500, seed=0) for text in pair]
    backends = {train_tokenizer(texts).backend.to_str() for _ in range(2)}
    assert len(backends) == 1
