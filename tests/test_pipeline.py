"""Text2TextPipeline: the strings that Transformers makes, whatever the batches."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny_pairs

from jax_encdec import ConfigError, EncoderDecoderModel, InputError, Text2TextPipeline
from jax_encdec.pipeline import TextError


@pytest.fixture(scope="module")
def pipe() -> Text2TextPipeline:
    model, params = tiny_pairs.pair()
    return Text2TextPipeline(model, params, tiny_pairs.tokenizers())


TEXTS = list(tiny_pairs.texts(20))


@pytest.mark.parametrize(
    ("kind", "all_beams"), [("bert2bert", (1, 4)), ("bert2gpt2", (4,)), ("bart", (4,))]
)
def test_strings_are_those_of_transformers(kind, all_beams, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tiny_pairs.save(tmp_path, kind)
    auto = (
        transformers.AutoModelForSeq2SeqLM if kind == "bart" else transformers.EncoderDecoderModel
    )
    model = auto.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    ours = Text2TextPipeline.from_pretrained(folder)
    for beams in all_beams:
        with torch.no_grad():
            made = model.generate(**batch, num_beams=beams, do_sample=False)
        expected = tokenizer.batch_decode(made, skip_special_tokens=True)
        got = ours(TEXTS, num_beams=beams, batch_size=8)
        assert got == expected
        assert len(set(got)) > 10  # The texts are heard.


def test_a_text_or_a_list_of_texts_or_none(pipe):
    several = pipe(TEXTS[:4])
    assert pipe(TEXTS[1]) == several[1]
    assert pipe([]) == []
    assert pipe(tuple(TEXTS[:3])) == several[:3]


def test_several_sequences_come_as_lists(pipe):
    made = pipe(TEXTS[:3], num_beams=3, num_return_sequences=2)
    assert [len(m) for m in made] == [2, 2, 2]
    assert pipe(TEXTS[0], num_beams=3, num_return_sequences=2) == made[0]
    assert [m[0] for m in made] == pipe(TEXTS[:3], num_beams=3)


def test_batches_change_nothing(pipe):
    options = {"do_sample": True, "num_return_sequences": 2, "key": jax.random.key(3)}
    whole = pipe(TEXTS[:7], **options)
    assert pipe(TEXTS[:7], batch_size=3, **options) == whole
    # A text's draws follow its place in the list, not its neighbours.
    other = [TEXTS[0], "1 May 1901", *TEXTS[2:4]]
    made = pipe(other, batch_size=3, **options)
    assert [made[i] for i in (0, 2, 3)] == [whole[i] for i in (0, 2, 3)]


def test_text_i_draws_from_the_key_folded_with_i(pipe):
    options = {"do_sample": True, "temperature": 0.9, "key": jax.random.key(11)}
    ids, mask = pipe.tokenizers.source.batch(TEXTS[:4])
    out = pipe.model.generate(pipe.params, ids, attention_mask=mask, **options)
    expected = pipe.tokenizers.target.decode_batch(np.asarray(out.sequences))
    assert pipe(TEXTS[:4], batch_size=2, **options) == expected


def test_a_mesh_takes_the_parameters_as_they_are_read_and_changes_no_text(pipe, tmp_path):
    folder = tiny_pairs.save(tmp_path)
    placed = Text2TextPipeline.from_pretrained(folder, mesh={"replica": 2, "tensor": 4})
    kernel = placed.params["decoder"]["segment_0"]["block_0"]["mlp"]["up"]["kernel"]
    assert {part.data.size for part in kernel.addressable_shards} == {kernel.size // 4}
    options = {"num_beams": 3, "num_return_sequences": 2}
    assert placed(TEXTS[:5], batch_size=3, **options) == pipe(TEXTS[:5], **options)
    with pytest.raises(ConfigError, match="mesh tensor=3 takes 3 devices; there are 8"):
        Text2TextPipeline.from_pretrained(folder, mesh="tensor=3")


def test_few_programs_are_compiled(pipe):
    # Lengths 5 to 20 fall on two rungs, batches on one size: two programs, and none anew.
    from jax_encdec.decoding.engine import _generate

    texts = ["1 " * n for n in range(3, 18)]
    pipe(texts, batch_size=4)
    before = _generate._cache_size()  # type: ignore[attr-defined]
    pipe(texts[:13], batch_size=4)
    pipe(texts[5:], batch_size=4, max_new_tokens=9)
    assert _generate._cache_size() == before  # type: ignore[attr-defined]


def test_texts_that_cannot_be_used_are_named(pipe):
    with pytest.raises(TextError, match=r"text 1 is empty"):
        pipe(["1 May", "  "])
    with pytest.raises(TextError, match=r"text 2 must be a str; got int"):
        pipe(["1 May", "2 May", 3])
    with pytest.raises(TextError, match=r"text 1 .*holds nothing the tokenizer keeps"):
        pipe(["1 May", "\u200b"])
    long = "1 " * 60
    with pytest.raises(TextError, match=r"text 1 has 62 tokens, the limit is 48.*truncation=True"):
        pipe(["1 May", long])
    cut, full = pipe.encode(["1 May", long], truncation=True)[1], pipe.encode(["1 " * 46])[0]
    assert cut == full
    assert len(cut) == 48


def test_a_tokenizer_of_another_model_is_refused():
    config = tiny_pairs.config().replace(encoder=tiny_pairs.bert().replace(vocab_size=20))
    other = Text2TextPipeline(EncoderDecoderModel(config), {}, tiny_pairs.tokenizers())
    with pytest.raises(TextError, match=r"text 0 has the token .*vocabulary 0\.\.19"):
        other(["the third of May"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beam": 4}, "unknown generation option 'num_beam'; did you mean 'num_beams'"),
        ({"batchsize": 4}, "no argument 'batchsize'; did you mean 'batch_size'"),
        ({"batch_size": 0}, "batch_size must be a positive integer; got 0"),
        ({"do_sample": True}, "key=jax.random.key"),
        ({"num_return_sequences": 2}, "greedy decoding returns one sequence"),
        ({"num_beams": 2, "num_return_sequences": 3}, "must be at most num_beams"),
        ({"eos_token_id": 999}, "eos_token_id must lie in the vocabulary, 0 to"),
        ({"max_new_tokens": 500}, "positions for"),
    ],
)
def test_options_that_cannot_be_used_are_refused(pipe, options, message):
    with pytest.raises(InputError, match=message):
        pipe(TEXTS[:2], **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "chunk": 1},
        {"do_sample": True, "key": jax.random.key(5), "chunk": 1},
        {"stop_strings": "apr", "chunk": 3},
    ],
    ids=["greedy", "beams", "sampling", "stop"],
)
def test_a_text_is_streamed_as_it_is_decided(pipe, options):
    plain = {name: value for name, value in options.items() if name != "chunk"}
    count = 0
    for text in TEXTS[2:5]:
        said = list(pipe.stream(text, **options))
        assert "".join(said) == pipe(text, **plain)
        assert all(said)
        count += len(said)
    if "do_sample" in options:  # Beams that never agree say all at the end.
        assert count > 6


def test_what_cannot_be_streamed_is_refused_at_once(pipe):
    with pytest.raises(InputError, match="one text, a str; got list"):
        pipe.stream(TEXTS)
    with pytest.raises(InputError, match="streaming yields one text; got num_return_sequences=2"):
        pipe.stream(TEXTS[0], num_beams=2, num_return_sequences=2)
    with pytest.raises(TextError, match="has 62 tokens"):
        pipe.stream("1 " * 60)


def test_progress_goes_to_standard_error(pipe, capsys):
    pipe(TEXTS[:3], progress=True, batch_size=4)
    out, err = capsys.readouterr()
    assert not out
    assert "3/3" in err
