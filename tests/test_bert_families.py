"""BERT's kin beyond `test_families.py`: options that published checkpoints use, files as they were
published alone, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import transformers
from oracle import (
    as_torch,
    assert_same_tokens,
    clone,
    family_config,
    family_model,
    from_torch,
    labels_batch,
    randomize,
    source_batch,
    torch,
    torch_pair,
)
from test_pairs import close

from jax_encdec import BertConfig, ConfigError, EncoderDecoderConfig, EncoderDecoderModel
from jax_encdec.config import Block, Dropout, Segment
from jax_encdec.families import FAMILIES
from jax_encdec.families import family_config as read
from jax_encdec.layers import initialize
from jax_encdec.transformer import transformer
from jax_encdec.trunk_params import transformer_params
from jax_encdec.warm_start import join

KIN = (
    "electra",
    "albert",
    "distilbert",
    "bert-generation",
    "mpnet",
    "ernie",
    "data2vec-text",
    "roberta-prelayernorm",
    "megatron-bert",
    "xlm-roberta-xl",
    "rembert",
)
PARTNER = BertConfig(
    vocab_size=53,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=16,
    max_position_embeddings=48,
)
IDS = {"decoder_start_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}


@pytest.fixture(autouse=True)
def _exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield


# Configurations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KIN)
def test_published_names_and_defaults(family):
    theirs = transformers.AutoConfig.for_model(family).to_dict()
    for name, value in FAMILIES[family]().to_dict().items():
        assert theirs[name] == value, name


@pytest.mark.parametrize("family", KIN)
def test_their_file_round_trips_and_ours_opens_there(family):
    theirs = transformers.AutoConfig.for_model(family, architectures=["X"], my_own_key={"a": [1]})
    theirs = json.loads(json.dumps(theirs.to_dict()))
    back = read(theirs).to_dict("encoder")
    for name, value in theirs.items():
        if name not in ("is_decoder", "add_cross_attention"):
            assert back[name] == value, name
    ours = FAMILIES[family](vocab_size=77).to_dict("encoder")
    assert transformers.AutoConfig.for_model(**ours).vocab_size == 77


def test_distilbert_reads_berts_names():
    """As PyTorch does: a size that is not read would be a silent wrong answer."""
    names = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 1}
    ours = read({"model_type": "distilbert", **names})
    theirs = transformers.DistilBertConfig(**names)
    assert (ours.dim, ours.n_heads, ours.n_layers) == (theirs.dim, theirs.n_heads, theirs.n_layers)


REFUSED = [
    ("electra", {"embedding_size": 0}, "embedding_size must be positive; got 0"),
    ("albert", {"num_hidden_groups": 13}, "at most num_hidden_layers; got 13 groups of 12 layers"),
    ("albert", {"inner_group_num": 0}, "inner_group_num must be positive"),
    ("albert", {"inner_group_num": 10**9}, "inner_group_num must be at most 100; got 1000000000"),
    ("distilbert", {"dim": 10}, "dim must be a multiple of n_heads; got 10 and 12"),
    ("distilbert", {"hidden_size": 10}, "dim must be a multiple of n_heads; got 10 and 12"),
    ("bert-generation", {"num_attention_heads": 7}, "1024 and 7"),
    ("mpnet", {"relative_attention_num_buckets": 64}, "relative_attention_num_buckets must be 32"),
    ("mpnet", {"max_position_embeddings": 2}, "max_position_embeddings must exceed the 2 rows"),
    ("ernie", {"use_task_id": True, "task_type_vocab_size": 0}, "task_type_vocab_size"),
    ("data2vec-text", {"pad_token_id": None}, "pad_token_id is a row of the position table"),
    ("roberta-prelayernorm", {"pad_token_id": 511}, "expected 0..510, got 511"),
    ("xlm-roberta-xl", {"layer_norm_eps": 0.0}, "layer_norm_eps must be positive"),
    ("rembert", {"output_embedding_size": -1}, "output_embedding_size must be positive; got -1"),
    *((name, {"position_embedding_type": "relative_key"}, "relative_key") for name in KIN),
]


@pytest.mark.parametrize(("family", "values", "says"), REFUSED)
def test_refused(family, values, says):
    with pytest.raises(ConfigError) as caught:
        read({"model_type": family, **values})
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["albert", "distilbert", "mpnet"])
def test_only_published_as_an_encoder(family):
    with pytest.raises(ConfigError, match=f"{family} cannot be the decoder"):
        EncoderDecoderConfig(encoder=PARTNER, decoder=FAMILIES[family]())


# Options -----------------------------------------------------------------------------------------


def encoder_close(folder, theirs, ids, mask, **arguments):
    """A checkpoint warm-starts an encoder that computes what PyTorch's model does; the report."""
    loaded = join(folder, None, decoder_config=PARTNER, **IDS)
    with torch.no_grad():
        wanted = {name: as_torch(value) for name, value in arguments.items()}
        expected = theirs(input_ids=as_torch(ids), attention_mask=as_torch(mask), **wanted)
    ours = loaded.model.apply(
        {"params": loaded.params}, ids, mask, **arguments, method="encode"
    ).last_hidden_state
    shown = mask == 1
    close(np.asarray(ours)[shown], expected.last_hidden_state[as_torch(shown).bool()], 2e-5)
    return loaded.reports["encoder"]


def one(family, role="encoder", **more):
    """A random model of one family."""
    config = family_config(family, role, **more)
    return randomize(family_model(family, role, config), len(family))


ENCODERS = [
    ("electra", {"embedding_size": 16}),  # as wide as the blocks, and so not projected
    ("electra", {"hidden_act": "relu"}),
    ("albert", {"num_hidden_layers": 4, "num_hidden_groups": 1, "inner_group_num": 1}),
    ("albert", {"num_hidden_layers": 7, "num_hidden_groups": 5, "inner_group_num": 1}),
    ("albert", {"num_hidden_layers": 3, "num_hidden_groups": 3, "inner_group_num": 2}),
    ("albert", {"embedding_size": 16, "hidden_act": "gelu"}),  # as wide, projected all the same
    ("distilbert", {"sinusoidal_pos_embds": True}),
    ("bert-generation", {"hidden_act": "gelu_new"}),
    ("ernie", {"use_task_id": False, "hidden_act": "relu"}),
    ("ernie", {"use_task_id": True, "task_type_vocab_size": 16, "type_vocab_size": 4}),
    ("data2vec-text", {"type_vocab_size": 1, "pad_token_id": 3}),
    ("roberta-prelayernorm", {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    ("rembert", {"input_embedding_size": 16}),
]


@pytest.mark.parametrize(("family", "options"), ENCODERS)
def test_encoder_option(family, options, tmp_path):
    theirs = one(family, **options)
    theirs.save_pretrained(tmp_path)
    encoder_close(tmp_path, theirs, *source_batch(np.random.default_rng(0)))


@pytest.mark.parametrize("family", ["electra", "albert", "ernie", "megatron-bert", "rembert"])
def test_token_types(family, tmp_path):
    theirs = one(family)
    theirs.save_pretrained(tmp_path)
    ids, mask = source_batch(np.random.default_rng(0))
    types = (np.arange(ids.shape[1])[None] > 3).astype(np.int32) * np.ones_like(ids)
    encoder_close(tmp_path, theirs, ids, mask, token_type_ids=types)


def test_mpnet_beyond_every_bucket(tmp_path):
    """Distances up to 149 tokens: exact buckets, logarithmic ones, and all that share the last."""
    theirs = one("mpnet", max_position_embeddings=160)
    theirs.save_pretrained(tmp_path)
    ids, mask = source_batch(np.random.default_rng(0), batch=2, length=150)
    encoder_close(tmp_path, theirs, ids, mask)


DECODERS = [
    ("electra", {"embedding_size": 16}),
    ("ernie", {"use_task_id": True}),
    ("data2vec-text", {"type_vocab_size": 1, "pad_token_id": 3}),
    ("bert-generation", {"hidden_act": "gelu_new"}),
]


@pytest.mark.parametrize(("family", "options"), DECODERS)
def test_decoder_option(family, options):
    oracle = torch_pair("bert", family, seed=1, **options)
    model, params = from_torch(oracle)
    ids, mask = source_batch(np.random.default_rng(0))
    labels = labels_batch(np.random.default_rng(1))[:1]
    with torch.no_grad():
        theirs = oracle(
            input_ids=as_torch(ids[:1]),
            attention_mask=as_torch(mask[:1]),
            decoder_input_ids=as_torch(labels),
        )
    ours = model.apply({"params": params}, ids[:1], mask[:1], labels).logits
    close(ours, theirs.logits, 2e-5)
    assert_same_tokens(oracle, model, params, ids, mask, max_new_tokens=16, num_beams=4)


# Where each family's branches end, and those branches that PyTorch does not drop out.
ENDS = {
    "bert": ("BertLayer", "attention.output.dense", "output.dense", []),
    "albert": ("AlbertLayer", "attention.dense", "ffn_output", ["mlp"]),
    "distilbert": ("TransformerBlock", "attention.out_lin", "ffn.lin2", ["self_attention"]),
    "xlm-roberta-xl": ("XLMRobertaXLLayer", "attention.output.dense", "output.dense", ["mlp"]),
}


@pytest.mark.parametrize("family", ENDS)
def test_branches_that_pytorch_does_not_drop_out(family):
    kind, *ends, undropped = ENDS[family]
    trunk = FAMILIES[family]().to_trunk("encoder")
    sublayers = trunk.segments[0].blocks[0].sublayers
    assert [sub.name for sub in sublayers if not sub.dropout] == undropped

    # In training, at a rate that drops all, the oracle's layer is what undropped branches make it.
    rates = {"hidden_dropout_prob": 1.0, "attention_probs_dropout_prob": 0.0}
    if family == "distilbert":
        rates = {"dropout": 1.0, "attention_dropout": 0.0}
    config = family_config(family, "encoder", **rates)
    model = randomize(family_model(family, "encoder", config), 0)
    layer = next(part for part in model.modules() if type(part).__name__ == kind)
    left = clone(layer)
    for sub, end in zip(sublayers, ends, strict=True):
        if sub.dropout:
            left.get_submodule(end).requires_grad_(False).weight.zero_()
            left.get_submodule(end).bias.zero_()
    x = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(layer.train()(x)[0], left(x)[0], atol=1e-6)


def test_dropout_spares_a_branch():
    trunk = FAMILIES["albert"](hidden_size=16, num_attention_heads=4, intermediate_size=8)
    trunk = replace(trunk.to_trunk("encoder"), dropout=Dropout(residual=0.5))
    mlp = trunk.segments[0].blocks[0].sublayers[1]
    spared, dropped = (
        replace(trunk, segments=(Segment(blocks=(Block(sublayers=(sub,)),), repeat=2, share=True),))
        for sub in (mlp, replace(mlp, dropout=True))
    )
    params = initialize(transformer_params(spared), jax.random.key(0), np.float32)
    ids = np.arange(6)[None]
    exact = transformer(spared, params, ids).last_hidden_state
    key = jax.random.key(1)
    np.testing.assert_array_equal(
        transformer(spared, params, ids, dropout_key=key).last_hidden_state, exact
    )
    assert not np.allclose(
        transformer(dropped, params, ids, dropout_key=key).last_hidden_state, exact
    )


# Checkpoints as they were published, alone -------------------------------------------------------

CLASSES = {
    "electra": ("ElectraModel", "ElectraForMaskedLM", "ElectraForPreTraining"),
    "albert": ("AlbertModel", "AlbertForMaskedLM", "AlbertForPreTraining"),
    "distilbert": (
        "DistilBertModel",
        "DistilBertForMaskedLM",
        "DistilBertForSequenceClassification",
        "DistilBertForQuestionAnswering",
    ),
    "bert-generation": ("BertGenerationEncoder", "BertGenerationDecoder"),
    "mpnet": ("MPNetModel", "MPNetForMaskedLM"),
    "ernie": ("ErnieModel", "ErnieForMaskedLM", "ErnieForPreTraining"),
    "data2vec-text": ("Data2VecTextModel", "Data2VecTextForMaskedLM"),
    "roberta-prelayernorm": ("RobertaPreLayerNormModel", "RobertaPreLayerNormForMaskedLM"),
    "megatron-bert": (
        "MegatronBertModel",
        "MegatronBertForMaskedLM",
        "MegatronBertForPreTraining",
    ),
    "xlm-roberta-xl": ("XLMRobertaXLModel", "XLMRobertaXLForMaskedLM"),
    "rembert": ("RemBertModel", "RemBertForMaskedLM"),
}


def aged(model, folder):
    """Save as in 2020: pickled, buffers of positions included, LayerNorm's old names."""
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if "LayerNorm" in name:
            name = name.replace(".weight", ".gamma").replace(".bias", ".beta")
        if name.endswith("embeddings.word_embeddings.weight"):
            stem = name.removesuffix("word_embeddings.weight")
            tensors[stem + "position_ids"] = torch.arange(48)[None]
        tensors[name] = tensor
    torch.save(tensors, folder / "pytorch_model.bin")


def bare(model):
    return getattr(model, model.base_model_prefix, model)


@pytest.mark.parametrize("age", ["new", "old"])
@pytest.mark.parametrize(
    ("family", "name"), [(f, n) for f, names in CLASSES.items() for n in names]
)
def test_published_alone_starts_an_encoder(family, name, age, tmp_path):
    theirs = randomize(getattr(transformers, name)(family_config(family, "encoder")), 3)
    if age == "old":
        aged(theirs, tmp_path)
    else:
        theirs.save_pretrained(tmp_path)
    report = encoder_close(tmp_path, bare(theirs), *source_batch(np.random.default_rng(0)))
    assert not any("no rule of this family" in why for why in report.ignored.values())
    assert all("pooler" in leaf for leaf in report.fresh)


HEADS = [
    (f, n)
    for f, names in CLASSES.items()
    for n in names
    if "decoder" in FAMILIES[f].roles and ("MaskedLM" in n or "PreTraining" in n or "Decoder" in n)
    if n != "ElectraForPreTraining"
]


@pytest.mark.parametrize(("family", "name"), HEADS)
def test_published_alone_starts_a_decoder_with_its_head(family, name, tmp_path):
    theirs = randomize(getattr(transformers, name)(family_config(family, "encoder")), 3)
    aged(theirs, tmp_path / "part")
    loaded = join(None, tmp_path / "part", encoder_config=PARTNER, **IDS)
    report = loaded.reports["decoder"]
    assert not any("no rule of this family" in why for why in report.ignored.values())
    # PyTorch, too, then finds nothing new but cross-attention.
    loaded.model.save_pretrained(tmp_path / "ours", loaded.params)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "part")
    config.is_decoder = config.add_cross_attention = True
    decoder = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "part", config=config)
    ours = transformers.EncoderDecoderModel.from_pretrained(tmp_path / "ours").decoder.state_dict()
    for key, tensor in decoder.state_dict().items():
        if "crossattention" not in key:
            assert torch.equal(ours[key], tensor), key
    assert all("cross_attention" in leaf for leaf in report.fresh)


def test_electra_discriminator_starts_a_decoder_with_a_new_head(tmp_path):
    theirs = randomize(transformers.ElectraForPreTraining(family_config("electra", "encoder")), 3)
    theirs.save_pretrained(tmp_path)
    report = join(None, tmp_path, encoder_config=PARTNER, **IDS).reports["decoder"]
    assert {leaf for leaf in report.fresh if "cross_attention" not in leaf} == {
        "decoder/head/transform/kernel",
        "decoder/head/transform/bias",
        "decoder/head/norm/scale",
        "decoder/head/norm/bias",
        "decoder/head/bias",
    }
    assert report.ignored["discriminator_predictions.dense.weight"] == "a head for another task"


def test_ernie_without_tasks_leaves_their_table(tmp_path):
    one("ernie", use_task_id=True).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"use_task_id": False}))
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    report = encoder_close(tmp_path, theirs, *source_batch(np.random.default_rng(0)))
    reason = report.ignored["embeddings.task_type_embeddings.weight"]
    assert reason == "a table that use_task_id=false does not read"


@pytest.mark.parametrize("family", ["distilbert", "albert", "electra"])
def test_some_layers_only(family, tmp_path):
    shape = {"num_hidden_groups": 1} if family == "albert" else {}
    shape["n_layers" if family == "distilbert" else "num_hidden_layers"] = 4
    theirs = one(family, **shape)
    theirs.save_pretrained(tmp_path / "whole")
    loaded = join(tmp_path / "whole", None, decoder_config=PARTNER, encoder_layers=2, **IDS)
    layers = loaded.model.config.encoder_trunk.layers
    assert layers == (4 if family == "albert" else 2)  # a layer of ALBERT's is two blocks here
    if family == "distilbert":
        theirs.transformer.layer = theirs.transformer.layer[:2]
    elif family == "electra":
        theirs.encoder.layer = theirs.encoder.layer[:2]
    else:
        theirs.encoder.config.num_hidden_layers = 2
    ids, mask = source_batch(np.random.default_rng(0), batch=1)
    with torch.no_grad():
        expected = theirs(input_ids=as_torch(ids)).last_hidden_state
    ours = loaded.model.apply({"params": loaded.params}, ids, mask, method="encode")
    close(ours.last_hidden_state, expected, 2e-5)


def test_layers_of_several_groups_cannot_be_left_out(tmp_path):
    one("albert").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"no layers of .* can be left out.* 3 groups"):
        join(tmp_path, None, decoder_config=PARTNER, encoder_layers=4, **IDS)


# The checkpoints of Rothe et al. -----------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True], ids=["two halves", "shared"])
def test_rothe(shared, tmp_path):
    """Pairs as converted in 2020: flat generation keys, pickled, with buffers; some with one set
    of weights for both halves, of which the file has one."""
    oracle = torch_pair("bert-generation", "bert-generation", vocab=53, seed=4)
    if shared:
        own = oracle.decoder.bert.state_dict()
        own.update({k: v for k, v in oracle.encoder.state_dict().items() if k in own})
        oracle.decoder.bert.load_state_dict(own)
    aged(oracle, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"max_length": 128, "num_beams": 4, "length_penalty": 0.6}
    config["tie_encoder_decoder"] = shared
    for part in (config["encoder"], config["decoder"]):
        del part["tie_word_embeddings"]
        part |= {"type_vocab_size": 2, "gradient_checkpointing": False, "num_beams": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if shared:
        tensors = torch.load(tmp_path / "pytorch_model.bin")
        drop = [n for n in tensors if n.startswith("decoder.bert") and "cross" not in n]
        kept = {n: t for n, t in tensors.items() if n not in drop}
        torch.save(kept, tmp_path / "pytorch_model.bin")
    model, params = EncoderDecoderModel.from_pretrained(tmp_path)
    assert model.config.tie_encoder_decoder is shared
    ids, mask = source_batch(np.random.default_rng(0))
    assert_same_tokens(
        oracle, model, params, np.minimum(ids, 52), mask, max_new_tokens=20, num_beams=4
    )


# Megatron-BERT's decoder -------------------------------------------------------------------------


def test_megatron_cross_attention_wants_equal_lengths():
    """BUG of the oracle: its cross-attention reads as many source tokens as the target has.

    Where the two are equally long it is right, and so the source is padded to the target's length
    here and the whole target is computed anew for each token.
    """
    repaired = torch_pair("bert", "megatron-bert", seed=5)
    oracle = clone(repaired)
    for layer in oracle.decoder.bert.encoder.layer:
        layer.crossattention.self.__class__ = type(layer.attention.self)
    ids, mask = source_batch(np.random.default_rng(0))
    with pytest.raises(RuntimeError, match=r"size|shape"), torch.no_grad():
        oracle(
            input_ids=as_torch(ids),
            attention_mask=as_torch(mask),
            decoder_input_ids=as_torch(ids[:, :5] % 53),
        )

    length = 24
    wide_ids, wide_mask = (np.pad(x, ((0, 0), (0, length - x.shape[1]))) for x in (ids, mask))
    target = np.zeros((len(ids), length), np.int32)
    given = {"input_ids": as_torch(wide_ids), "attention_mask": as_torch(wide_mask)}
    model, params = from_torch(repaired)
    for step in range(length - 1):
        with torch.no_grad():
            logits = oracle(**given, decoder_input_ids=as_torch(target), use_cache=False).logits
        target[:, step + 1] = logits[:, step].argmax(-1)
    ours = model.apply({"params": params}, ids, mask, target[:, :-1])
    close(ours.logits, logits[:, :-1], 2e-5)
    found = model.generate(params, ids, attention_mask=mask, max_new_tokens=length - 1)
    for row, expected in zip(np.asarray(found.sequences), target, strict=True):
        end = np.flatnonzero(expected == 2)
        end = end[0] + 1 if len(end) else length
        assert np.array_equal(row[:end], expected[:end])
