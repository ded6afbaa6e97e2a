"""Whatever Transformers' `generate` takes is taken as it takes it, or refused in one sentence."""

from __future__ import annotations

import argparse
import errno

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pairs
from oracle import as_torch, from_torch, source_batch, torch_pair, transformers

from jax_encdec import EncDecError, GenerationConfig, InputError, Text2TextPipeline
from jax_encdec.cli.generate import _explained
from jax_encdec.decoding.fields import KINDS, NO_INFLUENCE, REFUSED

IDS = np.random.default_rng(0).integers(5, 150, (3, 8))


def generate(**options):
    model, params = tiny_pairs.pair()
    return model.generate(params, IDS, max_new_tokens=4, **options)


def unchanged(scores, context):
    return scores


def test_every_field_of_transformers_is_implemented_or_refused_by_name():
    fields = vars(transformers.GenerationConfig())
    about_the_file = {"transformers_version", "_commit_hash", "_from_model_config"}
    assert fields.keys() - about_the_file <= {*KINDS, *REFUSED, *NO_INFLUENCE}
    for name, (neutral, reason) in {**REFUSED, **NO_INFLUENCE}.items():
        assert GenerationConfig().replace(**dict.fromkeys([name], neutral[-1])) is not None
        with pytest.raises(InputError) as error:
            generate(**{name: {"a": 1}})
        assert name in str(error.value)
        assert reason in str(error.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"streamer": 1}, "call model.stream"),
        ({"stopping_criteria": [1]}, "stop_strings"),
        ({"logits_processor": [1]}, "logits_processors"),
        ({"inputs_embeds": 1}, "encoder_outputs"),
        ({"logits_processors": unchanged}, "put it into a tuple"),
        ({"logits_processors": 5}, "list or tuple of functions; got 5"),
        ({"generation_config": {"num_beams": 2}}, r"GenerationConfig\(\*\*it\)"),
        ({"generation_config": 5}, "must be a GenerationConfig; got 5"),
        ({"prefix_allowed_tokens_fn": 5}, "must be a function"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: None}, "must return token ids; got None"),
        ({"suppress_tokens": list(range(160))}, "leave a token"),
        ({"begin_suppress_tokens": list(range(160))}, "leave a token"),
        ({"stop_strings": "a", "tokenizer": 5}, "tokenizer must be one of this library"),
        ({"decoder_start_token_id": [1, 2]}, "each of the 3 rows, got 2"),
        ({"decoder_start_token_id": [1, 2, 160]}, "0 to 159, got 160"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else value,
)
def test_wrong_arguments_are_refused_in_a_sentence(options, said):
    with pytest.raises(InputError, match=said) as error:
        generate(**options)
    assert "\n" not in str(error.value)


def test_the_pipeline_says_what_it_does_not_take():
    model, params = tiny_pairs.pair()
    pipe = Text2TextPipeline(model, params, tiny_pairs.tokenizers())
    for options, said in (
        ({"logits_processors": (unchanged,)}, "model.generate"),
        ({"generation_config": {}}, "must be a GenerationConfig"),
        ({"do_sample": True, "key": 5}, "random key"),
    ):
        with pytest.raises(InputError, match=said):
            pipe("a text", **options)


def test_score_says_what_it_does_not_take():
    model, params = tiny_pairs.pair()
    for options in ({"chunk": 1.5}, {"chunk": "a"}, {"length_penalty": "a"}):
        with pytest.raises(InputError, match=next(iter(options))):
            model.score(params, IDS, IDS, **options)


def test_apply_says_which_parameters_it_takes():
    model, params = tiny_pairs.pair()
    for variables, said in (
        ({"params": model.prepare(params)}, "generate and stream"),
        (params, '{"params": params}'),
        (5, '{"params": params}'),
        ({"params": 5}, "nested dict"),
    ):
        with pytest.raises(EncDecError, match=said):
            model.apply(variables, IDS, decoder_input_ids=IDS)


def test_a_full_disk_is_said_with_the_file_and_what_to_do():
    args = argparse.Namespace(output="out.jsonl", batch_size=4)
    said = r"out\.jsonl: no space left .* the same command goes on"
    with pytest.raises(InputError, match=said), _explained(args):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_every_row_may_have_a_start_token_of_its_own(options):
    oracle = torch_pair("bert", "gpt2", seed=11)
    model, params = from_torch(oracle)
    ids, mask = source_batch(np.random.default_rng(3))
    options = {"max_new_tokens": 6, "decoder_start_token_id": [7, 8, 9], **options}
    for prompt in (None, [[20, 21], [22, 23], [24, 25]]):
        theirs = oracle.generate(
            input_ids=as_torch(ids),
            attention_mask=as_torch(mask),
            decoder_input_ids=None if prompt is None else as_torch(prompt),
            do_sample=False,
            **options,
        ).numpy()
        ours = model.generate(params, ids, attention_mask=mask, decoder_input_ids=prompt, **options)
        rows = zip(np.asarray(ours.sequences), theirs, np.asarray(ours.lengths), strict=True)
        assert all(np.array_equal(a[:n], b[:n]) for a, b, n in rows)

    @jax.jit
    def traced(starts):
        return model.generate(
            params, ids, attention_mask=mask, **options | {"decoder_start_token_id": starts}
        ).sequences

    alone = model.generate(params, ids, attention_mask=mask, **options).sequences
    assert np.array_equal(traced(jnp.array([7, 8, 9]))[:, : alone.shape[1]], alone)
