"""T5's kin, RoFormer, DeBERTa-v2, ModernBERT and Longformer beyond `test_families.py`: options that
published checkpoints use, files as they were published, and what is refused."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from oracle import (
    CONFIGS,
    WHOLE,
    as_torch,
    assert_same_tokens,
    family_config,
    family_model,
    from_torch,
    labels_batch,
    randomize,
    source_batch,
    torch,
    torch_pair,
    transformers,
)
from safetensors.numpy import load_file, save_file
from test_families import check_files, whole
from test_pairs import close

from jax_encdec import BertConfig, ConfigError, EncoderDecoderModel, InputError
from jax_encdec.families import FAMILIES
from jax_encdec.families import family_config as read
from jax_encdec.layers import initialize
from jax_encdec.transformer import transformer
from jax_encdec.trunk_params import transformer_params
from jax_encdec.warm_start import join

PARTNER = BertConfig(
    vocab_size=53,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=16,
    max_position_embeddings=48,
)


@pytest.fixture(autouse=True)
def _exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield


def saved(model, folder, edit=lambda tensors: tensors, **config):
    """A checkpoint alone in a folder, its tensors edited and its configuration changed."""
    model.save_pretrained(folder)
    if config:
        file = folder / "config.json"
        data = json.loads(file.read_text()) | config
        file.write_text(json.dumps({k: v for k, v in data.items() if v != "absent"}))
    file = folder / "model.safetensors"
    save_file(edit(load_file(file)), file, {"format": "pt"})
    return folder


def warm_encoder(folder, **options):
    """The published encoder in a pair with a random BERT: the pair, its parameters."""
    loaded = join(folder, None, decoder_config=PARTNER, **options)
    return loaded.model, loaded.params


def check_encoder(oracle, folder, length=9, tolerance=2e-5, **more):
    """States of a published encoder, warm-started, are PyTorch's; returns ours and the pair."""
    model, params = warm_encoder(folder)
    ids, mask = source_batch(np.random.default_rng(length), length=length)
    with torch.no_grad():
        theirs = oracle(
            input_ids=as_torch(ids),
            attention_mask=as_torch(mask),
            **{name: as_torch(value) for name, value in more.items()},
        ).last_hidden_state
    ours = model.apply({"params": params}, ids, mask, method="encode", **more).last_hidden_state
    real = mask.astype(bool)
    close(np.asarray(ours)[real], theirs[torch.tensor(real)], tolerance)
    return model, params


def encoder(family, seed=0, hidden=16, **more):
    """A random PyTorch encoder."""
    torch.manual_seed(seed)
    config = family_config(family, "encoder", hidden, **more)
    return randomize(family_model(family, "encoder", config, "eager"), seed)


# Options that published checkpoints use -----------------------------------------------------------

DEBERTA = {
    "v3, one string": {"pos_att_type": "p2c|c2p"},
    "own projections": {"share_att_key": False},
    "content to position": {"pos_att_type": ["c2p"], "share_att_key": False},
    "position to content": {"pos_att_type": ["p2c"], "share_att_key": False},
    "no terms": {"pos_att_type": [], "share_att_key": True},
    "no buckets": {"position_buckets": -1, "max_relative_positions": 5},
    "unlimited": {"position_buckets": -1, "max_relative_positions": -1},
    "buckets of 50": {"max_relative_positions": -1},
    "v2-xlarge's convolution": {
        "conv_kernel_size": 3,
        "conv_act": "gelu",
        "attention_head_size": 4,
    },
    "grouped convolution": {"conv_kernel_size": 5, "conv_groups": 2, "num_hidden_layers": 4},
    "one layer, convolution": {"conv_kernel_size": 3, "num_hidden_layers": 1},
    "absolute positions": {"relative_attention": False, "norm_rel_ebd": "none"}
    | {"position_biased_input": True, "type_vocab_size": 2},
    "terms without positions": {"relative_attention": False, "norm_rel_ebd": "none"},
    "all of it": {"position_biased_input": True, "type_vocab_size": 2, "norm_rel_ebd": "none"},
}
MODERNBERT = {
    "one layer": {"num_hidden_layers": 1},
    "no whole period": {"num_hidden_layers": 3},
    "a remainder": {"num_hidden_layers": 9},
    "every second": {"global_attn_every_n_layers": 2, "num_hidden_layers": 5},
    "all global": {"global_attn_every_n_layers": 1},
    "named layers": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] + ["sliding_attention"] * 2,
    },
    "biases": {"norm_bias": True, "mlp_bias": True, "attention_bias": True},
    "other bases": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 50.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        }
    },
    "narrow": {"local_attention": 2, "hidden_activation": "silu"},
}
LONGFORMER = {
    "one window": {"attention_window": 4},
    "a window for each": {"attention_window": [4, 8, 4, 16], "num_hidden_layers": 4},
}
T5 = {
    "relu": {},
    "gelu": {"feed_forward_proj": "gelu"},
    "gated-gelu": {"feed_forward_proj": "gated-gelu"},
    "gated-silu": {"feed_forward_proj": "gated-silu", "num_layers": 3, "num_decoder_layers": 1},
}
ROFORMER = {
    "keys only": {"rotary_value": False},
    "equal": {"embedding_size": 16},
    "unset": {"embedding_size": None, "hidden_act": "relu", "type_vocab_size": 1},
}
OPTIONS = {
    (family, name): options
    for family, table in (
        ("deberta-v2", DEBERTA),
        ("modernbert", MODERNBERT),
        ("longformer", LONGFORMER),
        ("t5", T5),
        ("roformer", ROFORMER),
    )
    for name, options in table.items()
}


@pytest.mark.parametrize(("family", "name"), OPTIONS)
def test_encoder_option(family, name, tmp_path):
    oracle = encoder(family, **OPTIONS[family, name])
    model, _ = check_encoder(oracle, saved(oracle, tmp_path))
    # What we would write means the same to PyTorch.
    stated = model.config.encoder.to_dict("encoder")
    again = type(oracle.config)(**stated)
    again._attn_implementation = "eager"
    clone = type(oracle)(again).eval()
    missing, unexpected = clone.load_state_dict(oracle.state_dict(), strict=False)
    assert not unexpected
    assert all("embed" in name for name in missing)
    ids, mask = source_batch(np.random.default_rng(1))
    with torch.no_grad():
        first, second = (
            m(input_ids=as_torch(ids), attention_mask=as_torch(mask)).last_hidden_state
            for m in (oracle, clone)
        )
    real = as_torch(mask).bool()
    assert torch.allclose(first[real], second[real], atol=1e-5)


@pytest.mark.parametrize("family", ["longformer", "modernbert"])
def test_long_input(family, tmp_path):
    more = {"max_position_embeddings": 640} if family == "longformer" else {}
    more |= {"attention_window": [32, 64]} if family == "longformer" else {"local_attention": 64}
    oracle = encoder(family, **more)
    check_encoder(oracle, saved(oracle, tmp_path), length=600)


def test_segments_of_modernbert():
    """A first block, whole periods that one scan runs, and what is left of one."""
    config = FAMILIES["modernbert"](num_hidden_layers=22)
    trunk = config.to_trunk("encoder")
    assert [(len(s.blocks), s.repeat) for s in trunk.segments] == [(1, 1), (3, 7)]
    trunk = config.replace(num_hidden_layers=24).to_trunk("encoder")
    assert [(len(s.blocks), s.repeat) for s in trunk.segments] == [(1, 1), (3, 7), (2, 1)]
    assert [a.window for a in trunk.attentions()] == [None, 64, 64, None, 64, 64]


# Longformer's global attention --------------------------------------------------------------------


def chosen(mask):
    """The first token of each row and, in one, another and a pad."""
    out = np.zeros_like(mask)
    out[:, 0] = 1
    out[1, 3] = out[2, -1] = 1
    return out


def test_global_attention(tmp_path):
    oracle = encoder("longformer", num_hidden_layers=3, attention_window=[4, 4, 8])
    _, mask = source_batch(np.random.default_rng(9))
    check_encoder(oracle, saved(oracle, tmp_path), global_attention_mask=chosen(mask))


def test_global_attention_reaches_generation():
    oracle = torch_pair("longformer", "bert", seed=4)
    model, params = from_torch(oracle)
    ids, mask = source_batch(np.random.default_rng(3))
    given = chosen(mask)
    with torch.no_grad():
        states = oracle.encoder(
            input_ids=as_torch(ids),
            attention_mask=as_torch(mask),
            global_attention_mask=as_torch(given),
        )
    for beams in (1, 4):
        options = {"max_new_tokens": 20, "num_beams": beams}
        found = model.generate(
            params, ids, attention_mask=mask, global_attention_mask=given, **options
        )
        with torch.no_grad():
            same = oracle.generate(
                input_ids=as_torch(ids),
                attention_mask=as_torch(mask),
                global_attention_mask=as_torch(given),
                **options,
            ).numpy()
            from_states = oracle.generate(
                encoder_outputs=states, attention_mask=as_torch(mask), **options
            ).numpy()
        np.testing.assert_array_equal(same, from_states)
        for row, length in enumerate(np.asarray(found.lengths)):
            np.testing.assert_array_equal(
                np.asarray(found.sequences)[row, :length], same[row, :length]
            )
    plain = model.generate(params, ids, attention_mask=mask, **options)
    assert not np.allclose(plain.sequences_scores, found.sequences_scores)


# Whole T5 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", T5)
def test_whole_t5(name, tmp_path):
    config = CONFIGS["t5"]("decoder", 16, name == "relu", 53, **T5[name])
    oracle = randomize(WHOLE["t5"](config), 5)
    check_whole(oracle, *from_torch(oracle))
    check_files(oracle, tmp_path)


def check_whole(oracle, model, params):
    rng = np.random.default_rng(1)
    ids, mask = source_batch(rng)
    ids, labels = np.minimum(ids, 52), labels_batch(rng)
    with torch.no_grad():
        theirs = oracle(
            input_ids=as_torch(ids), attention_mask=as_torch(mask), labels=as_torch(labels)
        )
    ours = model.apply({"params": params}, ids, mask, labels=labels)
    counted = labels != -100
    close(ours.logits[counted], theirs.logits[as_torch(counted).bool()], 2e-5)
    assert_same_tokens(oracle, model, params, ids, mask, max_new_tokens=16, num_beams=4)


@pytest.mark.parametrize("family", ["t5", "mt5", "umt5"])
def test_whole_of_old_file(family, tmp_path):
    """A file of long ago: every name of the embedding, a bias that nothing reads, no new keys."""
    oracle = whole(family, tied=family == "t5")

    def edit(tensors):
        extra = {f"{role}.embed_tokens.weight" for role in ("encoder", "decoder")}
        extra |= set() if "lm_head.weight" in tensors else {"lm_head.weight"}
        tensors |= {name: tensors["shared.weight"].copy() for name in extra}
        own = "decoder.block.0.layer.{}.relative_attention_bias.weight"
        tensors[own.format("1.EncDecAttention")] = tensors[own.format("0.SelfAttention")].copy()
        return tensors

    old = {"scale_decoder_outputs": "absent", "is_gated_act": "absent", "dense_act_fn": "absent"}
    folder = saved(oracle, tmp_path, edit, **old)
    check_whole(oracle, *EncoderDecoderModel.from_pretrained(folder))


def test_head_that_transformers_5_calls_tied(tmp_path):
    """Flan-T5 saved again: called tied, not scaled, its head untied. The file decides."""
    oracle = whole("t5", tied=False)
    folder = saved(oracle, tmp_path, tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="loaded as untied"):
        model, params = EncoderDecoderModel.from_pretrained(folder)
    assert not model.config.decoder.tie_word_embeddings
    assert not model.config.decoder.scale_decoder_outputs
    check_whole(oracle, model, params)


def test_head_that_is_left_out(tmp_path):
    """Said to be untied, but with no head in the file: the embedding is the head."""
    oracle = whole("mt5", tied=True)
    folder = saved(oracle, tmp_path, tie_word_embeddings=False)
    check_whole(oracle, *EncoderDecoderModel.from_pretrained(folder))


def test_umt5_without_scale_as_published():
    """BUG of the oracle, not copied: it scales every UMT5 head, though published ones are untied
    and were trained without."""
    config = {"model_type": "umt5", "tie_word_embeddings": False}
    assert read(config).to_trunk("decoder").head.scale == 1.0
    assert read(config | {"tie_word_embeddings": True}).to_trunk("decoder").head.scale < 1.0


def test_fresh_t5_has_scores_of_order_one():
    config = FAMILIES["t5"](d_model=64, d_kv=16, num_heads=4, d_ff=64, vocab_size=101)
    trunk = config.to_trunk("encoder")
    params = initialize(transformer_params(trunk), jax.random.key(0), np.float32)
    own = params["segment_0"]["block_0"]["self_attention"]
    x = np.random.default_rng(0).standard_normal((50, 64), np.float32)
    q, k = (np.einsum("bd,dnh->bnh", x, own[n]["kernel"][0]) for n in ("query", "key"))
    scores = np.einsum("bnh,snh->nbs", q, k)
    assert 0.3 < scores.std() < 3.0
    ids = np.arange(6, dtype=np.int32)[None]
    assert np.isfinite(transformer(trunk, params, ids).last_hidden_state).all()


# Published alone ----------------------------------------------------------------------------------


def test_t5_drops_what_its_last_norm_gives():
    """So training sees states of which a share is zero, and the rest larger; as PyTorch's are."""
    oracle = family_model("t5", "encoder", CONFIGS["t5"]("encoder", 64, True, 61, dropout_rate=0.5))
    trunk = read(oracle.config.to_dict()).to_trunk("encoder")
    ids = np.random.default_rng(0).integers(3, 61, (8, 40))
    params = initialize(transformer_params(trunk), jax.random.key(0), np.float32)
    ours = transformer(trunk, params, ids, dropout_key=jax.random.key(1)).last_hidden_state
    theirs = oracle.train()(input_ids=as_torch(ids)).last_hidden_state.detach().numpy()
    # Where embedding and all four sublayers were dropped, there was nothing to drop any more.
    expected = 0.5 + 0.5 * 0.5**5
    for states in (np.asarray(ours), theirs):
        assert abs(np.mean(states == 0.0) - expected) < 0.02


@pytest.mark.parametrize("family", ["t5", "mt5", "umt5"])
def test_halves_of_a_whole_t5(family, tmp_path):
    """Both sides of a pair from whole models: with the trained cross-attention, the same model."""
    oracle = whole(family, tied=family == "t5")
    oracle.config.decoder_start_token_id = 0
    folder = saved(oracle, tmp_path)
    loaded = join(folder, folder, encoder_layers=2, decoder_layers=2)
    assert not loaded.reports["decoder"].fresh
    check_whole(oracle, loaded.model, loaded.params)


MASKED = {
    "roformer": ("RoFormerForMaskedLM", "roformer"),
    "deberta-v2": ("DebertaV2ForMaskedLM", "deberta"),
    "modernbert": ("ModernBertForMaskedLM", "model"),
    "longformer": ("LongformerForMaskedLM", "longformer"),
}


@pytest.mark.parametrize("family", MASKED)
def test_masked_language_model(family, tmp_path):
    name, body = MASKED[family]
    config = family_config(family, "encoder")
    oracle = getattr(transformers, name)(config)
    if family == "roformer":
        table = oracle.roformer.encoder.embed_positions.weight.detach().clone()
    oracle = randomize(oracle, 2)
    if family == "roformer":
        oracle.roformer.encoder.embed_positions.weight.data = table

    def edit(tensors):
        if family == "deberta-v2":
            old = np.zeros((4, 4), np.float32)
            tensors["lm_predictions.lm_head.dense.weight"] = old
            tensors["mask_predictions.dense.weight"] = old
            tensors["deberta.embeddings.position_embeddings.weight"] = old
        if family in ("longformer", "deberta-v2"):
            tensors[f"{body}.embeddings.position_ids"] = np.arange(4)[None]
        return tensors

    check_encoder(getattr(oracle, body), saved(oracle, tmp_path, edit))


def test_roformer_decoder_alone(tmp_path):
    """A causal model as a decoder: its body and head are read, cross-attention is new."""
    config = family_config("roformer", "decoder")
    config.add_cross_attention = False
    oracle = randomize(family_model("roformer", "decoder", config), 6)
    folder = saved(oracle, tmp_path)
    loaded = join(None, folder, encoder_config=PARTNER)
    assert all("cross_attention" in name for name in loaded.reports["decoder"].fresh)
    table = oracle.roformer.encoder.embed_positions.weight.numpy()
    np.testing.assert_array_equal(loaded.params["decoder"]["kept"]["positions"], table)


def test_fresh_roformer_has_the_published_table():
    config = FAMILIES["roformer"](hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    params = initialize(
        transformer_params(config.to_trunk("encoder")), jax.random.key(0), np.float32
    )
    published = transformers.RoFormerModel(
        transformers.RoFormerConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    ).encoder.embed_positions.weight
    np.testing.assert_allclose(params["kept"]["positions"], published, atol=1e-6)


def test_modernbert_of_old_config(tmp_path):
    """Keys of the first release, before bases and layers had names of their own."""
    oracle = encoder(
        "modernbert",
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 60.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
        },
    )
    old = {"global_rope_theta": 60.0, "local_rope_theta": 30.0, "global_attn_every_n_layers": 3}
    gone = {"rope_parameters": "absent", "layer_types": "absent"}
    check_encoder(oracle, saved(oracle, tmp_path, **old, **gone))
    assert read({"model_type": "modernbert", "local_rope_theta": None}).to_trunk("encoder")


# Configurations as they stand on the hub ----------------------------------------------------------

PUBLISHED = {
    "t5-small": (
        {"model_type": "t5", "n_positions": 512, "output_past": True, "vocab_size": 32128}
        | {"task_specific_params": {"summarization": {"num_beams": 4}}, "use_cache": True},
        {"head.tied": True, "head.scale": 512**-0.5, "layers": 6},
    ),
    "flan-t5-base": (
        {"model_type": "t5", "d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12}
        | {"num_decoder_layers": 12, "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new"}
        | {"is_gated_act": True, "tie_word_embeddings": False, "decoder_start_token_id": 0},
        {"head.tied": False, "head.scale": 1.0, "layers": 12},
    ),
    "mt5-small": (
        {"model_type": "mt5", "d_model": 512, "num_decoder_layers": 8, "tokenizer_class": "T5"}
        | {"tie_word_embeddings": False},
        {"head.tied": False, "head.scale": 1.0, "layers": 8},
    ),
    "umt5-small": (
        {"model_type": "umt5", "vocab_size": 256384, "scalable_attention": True}
        | {"tie_word_embeddings": False},
        {"head.tied": False, "head.scale": 1.0, "bucket_bias.per_layer": True},
    ),
    "deberta-v3-base": (
        {"model_type": "deberta-v2", "hidden_size": 768, "num_hidden_layers": 12}
        | {"num_attention_heads": 12, "intermediate_size": 3072, "relative_attention": True}
        | {"position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True}
        | {"pos_att_type": "p2c|c2p", "position_biased_input": False, "max_relative_positions": -1},
        {"relative.span": 256, "relative.max_distance": 512, "max_length": None},
    ),
    "deberta-v2-xlarge": (
        {"model_type": "deberta-v2", "attention_head_size": 64, "relative_attention": True}
        | {"conv_kernel_size": 3, "conv_act": "gelu", "position_buckets": 256}
        | {"norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p"}
        | {"position_biased_input": False, "max_relative_positions": -1, "pooler_dropout": 0},
        {"relative.span": 256, "layers": 24},
    ),
    "ModernBERT-base": (
        {"model_type": "modernbert", "position_embedding_type": "absolute", "num_hidden_layers": 22}
        | {"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0}
        | {"local_rope_theta": 10000.0, "local_attention": 128, "reference_compile": None},
        {"layers": 22, "max_length": None},
    ),
    "longformer-base-4096": (
        {"model_type": "longformer", "attention_mode": "longformer", "vocab_size": 50265}
        | {"attention_window": [512] * 12, "max_position_embeddings": 4098}
        | {"ignore_attention_mask": False, "layer_norm_eps": 1e-05, "sep_token_id": 2},
        {"layers": 12, "max_length": 4096},
    ),
    "roformer_chinese_base": (
        {"model_type": "roformer", "embedding_size": 768, "rotary_value": False},
        {"layers": 12, "embedding.project": False, "max_length": None},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config(name):
    data, expected = PUBLISHED[name]
    config = read(data)
    trunk = config.to_trunk("decoder" if "decoder" in config.roles else "encoder")
    for path, value in expected.items():
        got = trunk
        for part in path.split("."):
            got = getattr(got, part)
        assert got == value, path
    # Keys without a meaning here are written back.
    written = config.to_dict()
    assert {k: v for k, v in data.items() if k in config.extra}.items() <= written.items()


# Positions, segments, layers ---------------------------------------------------------------------


@pytest.mark.parametrize("family", ["longformer", "modernbert"])
def test_windows_follow_the_order_whatever_the_positions(family, tmp_path):
    oracle = encoder(family)
    rng = np.random.default_rng(0)
    places = np.stack([rng.permutation(9) + 2 for _ in range(3)]).astype(np.int32)
    check_encoder(oracle, saved(oracle, tmp_path), position_ids=places)


@pytest.mark.parametrize("spelling", ["layer_types", "global_attn_every_n_layers"])
def test_chosen_layers_of_modernbert_keep_what_they_see(spelling, tmp_path):
    oracle = encoder("modernbert", num_hidden_layers=5, local_attention=4)
    folder = saved(oracle, tmp_path)
    if spelling != "layer_types":
        old = {"global_attn_every_n_layers": 3, "layer_types": "absent"}
        folder = saved(oracle, tmp_path, **old)
    taken = (0, 2, 3)
    model, params = warm_encoder(folder, encoder_layers=taken)
    oracle.layers = torch.nn.ModuleList(oracle.layers[i] for i in taken)
    ids, mask = source_batch(np.random.default_rng(1))
    with torch.no_grad():
        theirs = oracle(input_ids=as_torch(ids), attention_mask=as_torch(mask)).last_hidden_state
    ours = model.apply({"params": params}, ids, mask, method="encode").last_hidden_state
    real = mask.astype(bool)
    close(np.asarray(ours)[real], theirs[torch.tensor(real)], 2e-5)
    with pytest.raises(ConfigError, match="layer 0 has no norm"):
        warm_encoder(folder, encoder_layers=(1, 2))


def test_chosen_layers_of_longformer_keep_their_windows(tmp_path):
    oracle = encoder("longformer", attention_window=[4, 8])
    model, _ = warm_encoder(saved(oracle, tmp_path), encoder_layers=(1,))
    assert model.config.encoder.windows == (8,)


def test_segments_do_not_meet_in_a_convolution():
    model, params = from_torch(torch_pair("deberta-v2", "bert", seed=1))
    encoder = model.config.encoder.replace(conv_kernel_size=3)
    model = model.clone(config=model.config.replace(encoder=encoder))
    params = model.init_params(jax.random.key(0))
    ids, segments = np.full((1, 6), 5, np.int32), np.array([[0, 0, 0, 1, 1, 1]])
    with pytest.raises(InputError, match="convolution"):
        model.apply({"params": params}, ids, method="encode", segment_ids=segments)


@pytest.mark.parametrize("family", ["t5", "roformer"])
def test_position_ids_are_never_ignored(family):
    model, params = from_torch(torch_pair(family, "bert"))
    ids = np.full((1, 6), 5, np.int32)
    places = np.arange(6)[None] if family == "t5" else np.arange(6.0)[None] + 0.5
    words = {"t5": "has no position ids", "roformer": "must be integers"}
    with pytest.raises(InputError, match=words[family]):
        model.apply({"params": params}, ids, position_ids=places, method="encode")


def test_t5_with_more_layers_has_them_in_both_halves():
    config = FAMILIES["t5"](num_layers=2).replace(num_layers=4)
    assert config.to_trunk("decoder").layers == 4


# Refusals -----------------------------------------------------------------------------------------

REFUSED = {
    "gated twice": ("t5", {"feed_forward_proj": "gated-gated-gelu"}, "feed_forward_proj"),
    "no activation": ("t5", {"feed_forward_proj": "gated-what"}, "activation"),
    "few buckets": ("t5", {"relative_attention_num_buckets": 2}, "relative_attention_num_buckets"),
    "no layers": ("umt5", {"num_decoder_layers": 0}, "num_decoder_layers"),
    "narrow": ("deberta-v2", {"embedding_size": 8}, "embedding_size"),
    "head size": ("deberta-v2", {"attention_head_size": 7}, "attention_head_size"),
    "p2p": ("deberta-v2", {"pos_att_type": ["p2p"]}, "pos_att_type"),
    "even": ("deberta-v2", {"conv_kernel_size": 4}, "conv_kernel_size"),
    "buckets": ("deberta-v2", {"position_buckets": 4096}, "position_buckets"),
    "groups": ("deberta-v2", {"conv_groups": 5}, "conv_groups"),
    "norm": ("deberta-v2", {"norm_rel_ebd": "layer_norm"}, "norm_rel_ebd"),
    "scaled": ("modernbert", {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling"),
    "yarn": (
        "modernbert",
        {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
        "rope_parameters",
    ),
    "flat": ("modernbert", {"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters"),
    "layers": ("modernbert", {"layer_types": ["full_attention"]}, "layer_types"),
    "kind": ("modernbert", {"num_hidden_layers": 1, "layer_types": ["none"]}, "layer_types"),
    "odd window": ("longformer", {"attention_window": 5}, "attention_window"),
    "windows": ("longformer", {"attention_window": [4, 4]}, "attention_window"),
    "zero": ("roformer", {"embedding_size": 0}, "embedding_size"),
    "odd heads": ("roformer", {"hidden_size": 12, "num_attention_heads": 4}, "even size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    family, values, word = REFUSED[case]
    with pytest.raises(ConfigError, match=word):
        declared({"model_type": family} | values)


def declared(data):
    return transformer_params(read(data).to_trunk("encoder"))
