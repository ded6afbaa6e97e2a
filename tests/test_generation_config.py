"""A generation config loads from any Transformers file, and says in one sentence what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.decoding.fields import KINDS
from jax_encdec.errors import ConfigError, InputError

V = 100


def test_is_hashable_and_lists_become_tuples():
    options: Any = {
        "eos_token_id": [1, 2],
        "bad_words_ids": [[1], [2, 3]],
        "num_beams": np.int64(4),
    }
    config = GenerationConfig(**options)
    assert config == GenerationConfig(
        eos_token_id=(1, 2), bad_words_ids=((1,), (2, 3)), num_beams=4
    )
    assert len({config, config.replace()}) == 1
    assert type(config.num_beams) is int


def test_importing_it_needs_neither_numpy_nor_jax():
    code = (
        "import sys, types; package = types.ModuleType('jax_encdec');"
        "import importlib.util as u; spec = u.find_spec('jax_encdec.decoding.config');"
        "before = set(sys.modules); module = u.module_from_spec(spec);"
        "sys.modules[spec.name] = module; spec.loader.exec_module(module);"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "assert not new & {'numpy', 'jax', 'torch', 'transformers'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("full", [False, True])
def test_files_of_transformers_load_and_come_back(full):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GenerationConfig(
        num_beams=4,
        max_length=142,
        min_length=56,
        no_repeat_ngram_size=3,
        early_stopping=True,
        length_penalty=2.0,
        eos_token_id=[102, 103],
        pad_token_id=0,
        decoder_start_token_id=101,
        bad_words_ids=[[5], [6, 7]],
    )
    text = theirs.to_json_string(use_diff=not full)
    data = json.loads(text)
    config = GenerationConfig.from_dict(data)
    config.validate(1000)
    assert config.eos_token_ids == (102, 103)
    assert config.bad_words_ids == ((5,), (6, 7))
    back = json.loads(json.dumps(config.to_dict()))
    assert back == {k: v for k, v in data.items() if v is not None or k not in KINDS}
    again = transformers.GenerationConfig.from_dict(back)
    assert again.to_json_string() == theirs.to_json_string()


def test_the_defaults_a_v4_file_spells_out_are_fine():
    v4 = {
        "bos_token_id": 0,
        "diversity_penalty": 0.0,
        "do_sample": False,
        "early_stopping": False,
        "encoder_no_repeat_ngram_size": 0,
        "encoder_repetition_penalty": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
        "exponential_decay_length_penalty": None,
        "force_words_ids": None,
        "forced_decoder_ids": None,
        "guidance_scale": None,
        "length_penalty": 1.0,
        "low_memory": None,
        "max_length": 20,
        "max_time": None,
        "num_beam_groups": 1,
        "num_beams": 1,
        "output_attentions": False,
        "penalty_alpha": None,
        "remove_invalid_values": False,
        "renormalize_logits": False,
        "return_dict_in_generate": False,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "transformers_version": "4.36.0",
        "typical_p": 1.0,
        "use_cache": True,
    }
    config = GenerationConfig.from_dict(v4)
    config.validate(V)
    assert config.to_dict() == {k: v for k, v in v4.items() if v is not None or k not in KINDS}


IDS = st.integers(0, V - 1)
VALUES = {
    "num_beams": st.integers(1, 8),
    "do_sample": st.booleans(),
    "early_stopping": st.sampled_from([False, True, "never"]),
    "length_penalty": st.floats(-3, 3),
    "eos_token_id": IDS | st.lists(IDS, min_size=1, max_size=4),
    "bad_words_ids": st.lists(st.lists(IDS, min_size=1, max_size=3), max_size=3),
    "suppress_tokens": st.lists(IDS, max_size=4),
    "sequence_bias": st.lists(
        st.tuples(st.lists(IDS, min_size=1, max_size=3), st.floats(-9, 9)).map(list),
        max_size=3,
        unique_by=lambda pair: tuple(pair[0]),
    ),
    "stop_strings": st.text(min_size=1) | st.lists(st.text(min_size=1), min_size=1),
    "my_own_key": st.none() | st.integers() | st.lists(st.text(max_size=3), max_size=2),
}


@given(st.fixed_dictionaries({}, optional=VALUES))
def test_from_dict_and_to_dict_are_inverse(data):
    config = GenerationConfig.from_dict(data)
    assert config.to_dict() == data
    assert GenerationConfig.from_dict(config.to_dict()) == config
    hash(config)


@given(
    st.dictionaries(
        st.sampled_from(list(KINDS)),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
            lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=2), x, max_size=2),
            max_leaves=6,
        ),
        max_size=6,
    )
)
def test_any_json_gives_a_usable_config_or_one_clear_error(data):
    message = "got nothing to complain about"
    try:
        config = GenerationConfig.from_dict(data)
        hash(config)
        json.dumps(config.to_dict(), allow_nan=False)
        config.validate(V)
        config.resolved()
    except (ConfigError, InputError) as error:
        message = str(error)
    assert "\n" not in message
    assert any(word in message for word in ("got", "raise", "remove"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beam": 4}, "unknown generation option 'num_beam'; did you mean 'num_beams'?"),
        ({"max_tokens": 4}, "did you mean 'max_new_tokens'?"),
        ({"zzz": 4}, "unknown generation option 'zzz'"),
        (
            {"guidance_scale": 1.5},
            "guidance_scale=1.5 is not implemented (in an encoder-decoder Transformers' "
            "unconditional pass has no source: it fails, or takes the target for one); leave it "
            "out or pass guidance_scale=1",
        ),
        ({"penalty_alpha": 0.6}, "penalty_alpha=0.6 is not implemented (contrastive search left"),
        ({"use_cache": False}, "use_cache=False is not implemented"),
        ({"num_beams": "four"}, "num_beams must be an integer, got 'four'"),
        ({"num_beams": 2.5}, "num_beams must be an integer, got 2.5"),
        ({"num_beams": True}, "num_beams must be an integer, got True"),
        ({"do_sample": 1}, "do_sample must be true or false, got 1"),
        ({"temperature": float("nan")}, "temperature must be a finite number, got nan"),
        ({"early_stopping": "always"}, 'early_stopping must be false, true or "never"'),
        ({"eos_token_id": []}, "eos_token_id must be a token id or a non-empty list"),
        ({"bad_words_ids": [5]}, "bad_words_ids must be a list of non-empty lists"),
        ({"suppress_tokens": 5}, "suppress_tokens must be a list of token ids, got 5"),
        ({"sequence_bias": [[[], 1.0]]}, "sequence_bias must be a list of pairs of a non-empty"),
        ({"sequence_bias": {5: 1.0}}, "sequence_bias must be a list of pairs"),
        ({"exponential_decay_length_penalty": 2}, "must be a pair of a token count and a finite"),
        ({"stop_strings": ["a", ""]}, "stop_strings must be a text or a non-empty list of texts"),
        ({"max_time": "long"}, "max_time must be a finite number"),
    ],
)
def test_replace_refuses_what_it_cannot_do(options, message):
    with pytest.raises(InputError) as error:
        GenerationConfig().replace(**options)
    assert message in str(error.value)


def test_neutral_values_of_other_options_are_accepted_and_override_the_file():
    config = GenerationConfig.from_dict({"penalty_alpha": 0.5, "num_beams": 2})
    with pytest.raises(
        InputError, match=r"file sets 'penalty_alpha' to 0.5.*override it with penalty_alpha"
    ):
        config.validate(V)
    config = config.replace(penalty_alpha=0, use_cache=True, use_mtp=False, dola_layers=None)
    config.validate(V)
    assert config.to_dict() == {"num_beams": 2}
    assert config.replace(num_beams=None).to_dict() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"num_return_sequences": 0}, "num_return_sequences must be at least 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"min_length": -1}, "min_length must be at least 0, got -1"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be at least 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, got 0.0"),
        ({"do_sample": True, "temperature": 0.0}, "for greedy decoding set do_sample=False"),
        ({"do_sample": True, "top_p": 0.0}, "top_p must be above 0, got 0.0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p must be at most 1, got 1.5"),
        ({"do_sample": True, "top_k": -1}, "top_k must be at least 0, got -1"),
        ({"num_return_sequences": 2}, "greedy decoding returns one sequence"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences (3) must be at most"),
        (
            {"num_beams": 2, "num_return_sequences": 3, "do_sample": True},
            "num_return_sequences (3) must be at most",
        ),
        ({"max_length": 1}, "the decoder prompt alone has 1 token(s)"),
        ({"max_length": 9, "min_length": 10}, "min_length (10) is above max_length (9)"),
        ({"max_new_tokens": 3, "min_new_tokens": 4}, "min_length (5) is above max_length (4)"),
        ({"eos_token_id": V}, "eos_token_id must lie in the vocabulary, 0 to 99, got 100"),
        ({"pad_token_id": -1}, "pad_token_id must lie in the vocabulary"),
        ({"bad_words_ids": [[1, 2], [3, 100]]}, "bad_words_ids must lie in the vocabulary"),
        ({"suppress_tokens": [-1]}, "suppress_tokens must lie in the vocabulary"),
        ({"begin_suppress_tokens": [200]}, "begin_suppress_tokens must lie in the vocabulary"),
        ({"forced_bos_token_id": 100}, "forced_bos_token_id must lie in the vocabulary"),
        ({"eos_token_id": list(range(V))}, "eos_token_id must leave other tokens"),
        ({"forced_eos_token_id": 5, "suppress_tokens": [5]}, "is also in suppress_tokens"),
        ({"sequence_bias": [[[1, 100], 2.0]]}, "sequence_bias must lie in the vocabulary"),
        ({"do_sample": True, "typical_p": 0.0}, "typical_p must be above 0, got 0.0"),
        ({"do_sample": True, "min_p": 1.5}, "min_p must be at most 1, got 1.5"),
        ({"do_sample": True, "top_h": 0.0}, "top_h must be above 0, got 0.0"),
        ({"do_sample": True, "eta_cutoff": 1.0}, "eta_cutoff must be below 1, got 1.0"),
        ({"encoder_repetition_penalty": 0.0}, "encoder_repetition_penalty must be above 0"),
        ({"exponential_decay_length_penalty": [3, -1.0]}, "a factor above 0, got [3, -1.0]"),
        ({"num_beams": 4, "num_beam_groups": 3}, "num_beams must be a multiple of num_beam_groups"),
        ({"num_beams": 4, "num_beam_groups": 2}, "without a diversity_penalty above 0 all 2"),
        (
            {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 1.0, "do_sample": True},
            "groups of beams are not drawn",
        ),
    ],
)
def test_validate_says_what_was_expected_and_what_came(options, message):
    with pytest.raises(InputError) as error:
        GenerationConfig().replace(**options).validate(V)
    assert message in str(error.value)


def test_sampling_options_are_not_judged_when_nothing_is_sampled():
    GenerationConfig(temperature=0.0, top_p=0.0).validate(V)
    GenerationConfig(do_sample=True, num_return_sequences=5).validate(V)


def test_resolved_fills_in_the_defaults_of_transformers():
    transformers = pytest.importorskip("transformers")
    defaults = transformers.GenerationConfig._get_default_generation_params()
    full = GenerationConfig().resolved(prompt_length=3)
    for name in set(KINDS) & set(defaults) - {"max_length"}:
        assert getattr(full, name) == defaults[name], name
    assert full.max_length == defaults["max_length"] + 3  # v5: 20 new tokens


@pytest.mark.parametrize(
    ("options", "max_length", "min_length"),
    [
        ({}, 23, 0),
        ({"max_length": 9}, 9, 0),
        ({"max_length": 9, "max_new_tokens": 4}, 7, 0),
        ({"min_length": 5, "min_new_tokens": 4}, 23, 7),
        ({"min_length": 5}, 23, 5),
    ],
)
def test_new_tokens_win_over_total_lengths(options, max_length, min_length):
    full = GenerationConfig(**options).resolved(prompt_length=3)
    assert (full.max_length, full.min_length) == (max_length, min_length)
    assert full.resolved(3) == full


def test_special_tokens_fall_back_as_in_transformers():
    full = GenerationConfig(bos_token_id=4, eos_token_id=(7, 8)).resolved()
    assert full.decoder_start_token_id == 4
    assert full.pad_token_id == 7
    full = GenerationConfig(bos_token_id=4, decoder_start_token_id=0, pad_token_id=0).resolved()
    assert (full.decoder_start_token_id, full.pad_token_id) == (0, 0)


def test_every_option_of_transformers_is_known_or_harmless():
    """No option of a newer Transformers may slip through unnoticed."""
    from jax_encdec.decoding.fields import NO_INFLUENCE, REFUSED

    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = {k for k in vars(transformers.GenerationConfig()) if not k.startswith("_")}
    how_fast_only = {
        "assistant_confidence_threshold",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "cache_config",
        "compile_config",
        "continuous_batching_config",
        "disable_compile",
        "is_assistant",
        "low_memory",
        "max_cache_len",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "prefill_chunk_size",
        "speculation_type",
        "target_lookbehind",
        "transformers_version",
    }
    assert theirs <= set(KINDS) | set(REFUSED) | set(NO_INFLUENCE) | how_fast_only
