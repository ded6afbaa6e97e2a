"""Configurations: in and out as Transformers writes them, checked with expected and got."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_encdec import (
    BartConfig,
    BertConfig,
    ConfigError,
    EncoderDecoderConfig,
    GPT2Config,
    RobertaConfig,
)
from jax_encdec.families import FAMILIES, family_config

CLASSES = tuple(FAMILIES.values())


_T5 = ("bos_token_id", "decoder_start_token_id", "num_decoder_layers", "scale_decoder_outputs")
FOLLOWS = {
    "deberta-v2": ("conv_act", "conv_groups", "conv_kernel_size", "norm_rel_ebd",
                   "position_buckets", "share_att_key"),
    "marian": ("decoder_vocab_size",),
    "modernbert": ("global_attn_every_n_layers", "global_rope_theta", "layer_types",
                   "local_rope_theta"),
    "t5": _T5,
    "mt5": _T5,
    "umt5": _T5,
    "pegasus": ("bos_token_id",),
    "plbart": ("decoder_start_token_id",),
    "roformer": ("embedding_size",),
}  # fmt: skip
"""Keys that only files carry, or whose default (None here) follows from another key."""


def published(cls):
    transformers = pytest.importorskip("transformers")
    return type(transformers.AutoConfig.for_model(cls.model_type))


@pytest.mark.parametrize("cls", CLASSES)
def test_published_names_and_defaults(cls):
    theirs = published(cls)().to_dict()
    for name, value in cls().to_dict().items():
        if name not in FOLLOWS.get(cls.model_type, ()):
            assert theirs[name] == value, name


@pytest.mark.parametrize("cls", CLASSES)
def test_their_file_round_trips(cls):
    theirs = published(cls)(architectures=["Something"], my_own_key={"a": [1, 2]}).to_dict()
    back = cls.from_dict(json.loads(json.dumps(theirs))).to_dict("encoder")
    for name, value in json.loads(json.dumps(theirs)).items():
        if name not in ("is_decoder", "add_cross_attention", "rope_parameters"):
            assert back[name] == value, name
    # Read and written under the older names, which say the same.
    again = published(cls).from_dict(back).to_dict()
    assert again.get("rope_parameters") == theirs.get("rope_parameters")


@pytest.mark.parametrize("cls", CLASSES)
def test_our_file_opens_there(cls):
    ours = cls(vocab_size=77).to_dict("decoder")
    theirs = published(cls).from_dict(json.loads(json.dumps(ours)))
    assert theirs.vocab_size == 77
    assert theirs.add_cross_attention is True


def test_pair_round_trips_through_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(), GPT2Config(), decoder_start_token_id=3, pad_token_id=4, eos_token_id=(5, 6)
    )
    theirs = transformers.EncoderDecoderConfig.from_dict(ours.to_dict())
    assert theirs.decoder_start_token_id == 3
    assert theirs.encoder.model_type == "bert"
    assert theirs.decoder.add_cross_attention is True
    theirs.save_pretrained(tmp_path)
    back = EncoderDecoderConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    assert back == ours


def test_legacy_layout():
    """The flat files of 2020: generation keys everywhere, an underscore in the model type."""
    defaults = {
        "max_length": 20,
        "num_beams": 1,
        "no_repeat_ngram_size": 0,
        "decoder_start_token_id": None,
        "bad_words_ids": None,
        "task_specific_params": None,
        "pruned_heads": {},
        "id2label": {"0": "LABEL_0"},
        "position_embedding_type": "absolute",
        "xla_device": None,
    }
    data = {
        "model_type": "encoder_decoder",
        "architectures": ["EncoderDecoderModel"],
        "encoder": {
            **defaults,
            "model_type": "bert",
            "vocab_size": 90,
            "gradient_checkpointing": False,
        },
        "decoder": {**defaults, "model_type": "bert", "is_decoder": True, "vocab_size": 90},
        "decoder_start_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "max_length": 142,
        "num_beams": 4,
        "vocab_size": 90,
        "tie_encoder_decoder": False,
    }
    config = EncoderDecoderConfig.from_dict(data)
    assert (config.decoder_start_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert config.extra["vocab_size"] == 90
    written = config.to_dict()
    assert written["model_type"] == "encoder-decoder"
    assert written["encoder"]["pruned_heads"] == {}
    assert EncoderDecoderConfig.from_dict(written) == config


REFUSED = [
    (lambda: BertConfig(hidden_size=100, num_attention_heads=12), "100 and 12"),
    (lambda: GPT2Config(n_embd=10, n_head=3), "n_embd must be a multiple of n_head"),
    (lambda: BartConfig(decoder_attention_heads=7), "decoder_attention_heads"),
    (lambda: BertConfig(num_hidden_layers=0), "num_hidden_layers must be positive; got 0"),
    (lambda: RobertaConfig(pad_token_id=None), "pad_token_id"),
    (lambda: BertConfig().replace(hiden_size=3), "did you mean 'hidden_size'"),
    (lambda: BertConfig.from_dict({"hidden_size": "768"}), "hidden_size must be int; got '768'"),
    (lambda: BertConfig.from_dict({"layer_norm_eps": float("nan")}), "must be finite"),
    (lambda: BertConfig.from_dict({"hidden_size": True}), "must be int"),
    (lambda: BertConfig.from_dict({"position_embedding_type": "relative_key"}), "relative_key"),
    (lambda: family_config({"model_type": "llama"}), "'llama' is not supported"),
    (lambda: family_config({"model_type": "robertta"}), "did you mean 'roberta'"),
    (lambda: family_config({}), "no model_type"),
    (
        lambda: EncoderDecoderConfig.from_dict({"model_type": "bert"}),
        "from_encoder_decoder_pretrained",
    ),
    (
        lambda: EncoderDecoderConfig.from_dict({"model_type": "encoder-decoder"}),
        "lacks the 'encoder'",
    ),
    (
        lambda: EncoderDecoderConfig(
            encoder=BertConfig(), decoder=BertConfig(), decoder_start_token_id=30522
        ),
        "0..30521; got 30522",
    ),
    (
        lambda: EncoderDecoderConfig(
            encoder=BertConfig(), decoder=GPT2Config(), tie_encoder_decoder=True
        ),
        "one architecture",
    ),
    (
        lambda: EncoderDecoderConfig(
            encoder=BertConfig(),
            decoder=BertConfig.from_dict({"cross_attention_hidden_size": 5}),
        ),
        "cross_attention_hidden_size",
    ),
    (lambda: EncoderDecoderConfig(encoder="bert", decoder=BertConfig()), "BertConfig()"),
    (
        lambda: EncoderDecoderConfig.from_encoder_decoder_configs(
            BertConfig(), BertConfig(), decoder_start=3
        ),
        "decoder_start",
    ),
]


@pytest.mark.parametrize(("build", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_refused(build, says):
    with pytest.raises(ConfigError) as caught:
        build()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from([*BertConfig().to_dict(), "other", "extra", "model_type"]),
        st.none() | st.booleans() | st.integers(-5, 900) | st.floats() | st.text(max_size=3)
        | st.lists(st.integers(0, 3), max_size=2),
    )
)  # fmt: skip
def test_any_json_is_read_or_refused(data):
    try:
        config = BertConfig.from_dict(data)
    except ConfigError:
        return
    assert BertConfig.from_dict(config.to_dict()) == config
    hash(config)


def test_configurations_are_static():
    one = EncoderDecoderConfig(encoder=BertConfig(), decoder=BertConfig(), extra={"a": [1]})
    two = EncoderDecoderConfig(encoder=BertConfig(), decoder=BertConfig(), extra={"b": {}})
    assert one == two
    assert hash(one) == hash(two)
