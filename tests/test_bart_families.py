"""BART's kin: every layout they were published in, their options, and their halves as sides."""

from __future__ import annotations

import json
import warnings

import jax
import numpy as np
import pytest
from oracle import (
    POSITIONS,
    WHOLE,
    as_torch,
    assert_same_tokens,
    family_config,
    from_torch,
    labels_batch,
    randomize,
    source_batch,
    torch,
    torch_pair,
    transformers,
)
from safetensors.numpy import load_file, save_file
from test_families import check_files
from test_pairs import close
from test_pretrained import save_as_bin, trees_equal

from jax_encdec import CheckpointError, ConfigError, EncoderDecoderModel
from jax_encdec.families import FAMILIES
from jax_encdec.families import family_config as read_config
from jax_encdec.layers import flatten
from jax_encdec.pretrained import load
from jax_encdec.warm_start import join

KIN = ("bart", "mbart", "marian", "pegasus", "blenderbot", "blenderbot-small", "plbart")
FIXED = ("marian", "pegasus")  # tables of sinusoids that a formula can replace


@pytest.fixture(autouse=True)
def _exact_matmuls():
    with jax.default_matmul_precision("highest"):
        yield


def whole(family, seed=3, **more):
    """A family's own sequence-to-sequence model, random."""
    config = family_config(family, "decoder", **more)
    config.is_decoder, config.add_cross_attention = False, False
    model = randomize(WHOLE[family](config), seed)
    model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(0))
    return model


def same_logits(oracle, model, params, seed=1):
    ids, mask = source_batch(np.random.default_rng(seed))
    ids = np.minimum(ids, 52)
    inputs = np.random.default_rng(seed + 1).integers(3, 50, (3, 6)).astype(np.int32)
    with torch.no_grad():
        theirs = oracle(
            input_ids=as_torch(ids),
            attention_mask=as_torch(mask),
            decoder_input_ids=as_torch(inputs),
        )
    ours = model.apply({"params": params}, ids, mask, decoder_input_ids=inputs)
    close(ours.logits, theirs.logits, 2e-5)


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


# Layouts of whole models -------------------------------------------------------------------------

TOKENS = "model.shared.weight"
HALVES = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight")
BIAS = "final_logits_bias"


def without(*names):
    return lambda tensors: {k: v for k, v in tensors.items() if k not in names}


def copies(tensors):
    """As a pickle of Transformers 4 has them: tied tensors under every name."""
    return tensors | dict.fromkeys((*HALVES, "lm_head.weight"), tensors[TOKENS])


def renamed(new):
    def change(tensors):
        tensors = dict(tensors)
        tensors[new] = tensors.pop(TOKENS)
        return tensors

    return change


def bare(tensors):
    """The model without its head, and so without the prefix."""
    return {k.removeprefix("model."): v for k, v in tensors.items() if k != BIAS}


LAYOUTS = {
    "as today": dict,
    "all copies": copies,
    "all copies, bare": lambda tensors: without("lm_head.weight")(bare(copies(tensors))),
    "shared, bare": bare,
    "encoder's name": renamed(HALVES[0]),
    "decoder's name": renamed(HALVES[1]),
    "head's name": renamed("lm_head.weight"),
    "no bias": without(BIAS),
    "old buffers": lambda tensors: (
        tensors | {"model.encoder.version": np.ones(1, np.float32), "encoder.version": np.ones(1)}
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", KIN)
def test_every_layout_of_a_whole_model_loads(family, layout, tmp_path):
    oracle = whole(family)
    oracle.save_pretrained(tmp_path)
    _, expected = EncoderDecoderModel.from_pretrained(tmp_path)
    before = set(load_file(tmp_path / "model.safetensors"))
    rewrite(tmp_path, LAYOUTS[layout])
    loaded = load(tmp_path)
    (report,) = loaded.reports.values()
    if BIAS not in load_file(tmp_path / "model.safetensors"):
        assert BIAS in before
        assert not loaded.params["decoder"]["head"]["bias"].any()
        expected["decoder"]["head"]["bias"] = np.zeros(53, np.float32)
    trees_equal(loaded.params, expected)
    assert {name.split("/", 1)[1] for name in report.fresh} <= {"head/bias", "embedding/position"}


@pytest.mark.parametrize("family", FIXED)
def test_tables_of_sinusoids_are_computed_or_read(family, tmp_path):
    """Files that lack the tables get the formula's; another table in the file is taken as it is."""
    oracle = whole(family)
    oracle.save_pretrained(tmp_path / "new")
    tables = [f"model.{half}.embed_positions.weight" for half in ("encoder", "decoder")]
    rewrite(tmp_path / "new", without(*tables))
    model, params = EncoderDecoderModel.from_pretrained(tmp_path / "new")
    for half in ("encoder", "decoder"):
        table = getattr(oracle.model, half).embed_positions.weight
        np.testing.assert_array_equal(params[half]["embedding"]["position"], table.detach())
    same_logits(oracle, model, params)
    with torch.no_grad():
        for half in ("encoder", "decoder"):
            getattr(oracle.model, half).embed_positions.weight.uniform_(-1, 1)
    save_as_bin(oracle, tmp_path / "old")
    model, params = EncoderDecoderModel.from_pretrained(tmp_path / "old")
    same_logits(oracle, model, params)
    state = oracle.state_dict() | {tables[0]: torch.zeros(3, 16)}
    torch.save(state, tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"embed_positions.weight has shape \(3, 16\)"):
        EncoderDecoderModel.from_pretrained(tmp_path / "old")


@pytest.mark.parametrize("tied", [True, False], ids=["says tied", "says untied"])
@pytest.mark.parametrize("family", ["bart", "marian"])
def test_a_head_of_its_own_beside_a_shared_embedding(family, tied, tmp_path):
    """Transformers 4 shared the halves' embedding always, and so wrote it once."""
    oracle = whole(family)
    oracle.save_pretrained(tmp_path)
    other = np.random.default_rng(0).normal(size=(53, 16)).astype(np.float32)
    rewrite(tmp_path, lambda t: t | {"lm_head.weight": other})
    oracle.lm_head.weight = torch.nn.Parameter(torch.tensor(other))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": tied}))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, params = EncoderDecoderModel.from_pretrained(tmp_path)
    assert ["loaded as untied" in str(w.message) for w in said] == [True] * tied
    same_logits(oracle, model, params)
    model.save_pretrained(tmp_path / "again", params)
    same_logits(type(oracle).from_pretrained(tmp_path / "again"), model, params)


def test_defaults_of_generation_that_only_the_family_knows(tmp_path):
    """Without a generation_config.json, as PyTorch's GenerationConfig.from_model_config."""
    for family in KIN:
        oracle = whole(family, forced_eos_token_id=2, max_length=17)
        oracle.save_pretrained(tmp_path / family)
        (tmp_path / family / "generation_config.json").unlink()
        file = tmp_path / family / "config.json"
        data = json.loads(file.read_text())
        for key in ("forced_eos_token_id", "encoder_no_repeat_ngram_size"):
            data.pop(key, None)
        file.write_text(json.dumps(data))
        theirs = transformers.GenerationConfig.from_model_config(type(oracle.config)(**data))
        ours = EncoderDecoderModel.from_pretrained(tmp_path / family)[0].generation_config
        for key in (
            "forced_eos_token_id",
            "encoder_no_repeat_ngram_size",
            "decoder_start_token_id",
            "eos_token_id",
            "pad_token_id",
            "max_length",
        ):
            assert getattr(ours, key) == getattr(theirs, key), (family, key)


# Marian: two vocabularies, a pad that opens and must not be generated ---------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_marian_with_two_vocabularies(tied, tmp_path):
    more = {"decoder_vocab_size": 53, "share_encoder_decoder_embeddings": False}
    oracle = whole("marian", tied=tied, vocab=61, **more)
    model, params = from_torch(oracle)
    assert params["encoder"]["embedding"]["token"].shape == (61, 16)
    assert params["decoder"]["embedding"]["token"].shape == (53, 16)
    assert ("kernel" in params["decoder"]["head"]) == (not tied)
    ids, mask = source_batch(np.random.default_rng(0))
    labels = labels_batch(np.random.default_rng(1))
    with torch.no_grad():
        theirs = oracle(
            input_ids=as_torch(ids), attention_mask=as_torch(mask), labels=as_torch(labels)
        )
    ours = model.apply({"params": params}, ids, mask, labels=labels)
    assert float(ours.loss) == pytest.approx(theirs.loss.item(), rel=1e-5)
    for beams in (1, 4):
        options = {"num_beams": beams, "max_new_tokens": 20}
        assert_same_tokens(oracle, model, params, ids, mask, **options)
    check_files(oracle, tmp_path)
    with pytest.raises(ConfigError, match=r"pad_token_id.*0\.\.52"):
        model.config.replace(pad_token_id=53)
    # Its halves as sides of a pair.
    oracle.save_pretrained(tmp_path / "whole")
    pair = join(tmp_path / "whole", tmp_path / "whole", decoder_start_token_id=2)
    trees_equal(pair.params["encoder"], {k: v for k, v in params["encoder"].items() if k != "kept"})
    assert pair.params["decoder"]["embedding"]["token"].shape == (53, 16)


def test_marian_never_generates_its_pad():
    """Published: the pad starts every target, and bad_words_ids forbids it afterwards."""
    oracle = whole("marian", pad_token_id=52, decoder_start_token_id=52, eos_token_id=0, seed=6)
    oracle.final_logits_bias[0, 52] = 30.0
    g = oracle.generation_config
    g.pad_token_id, g.decoder_start_token_id, g.eos_token_id = 52, 52, 0
    g.bad_words_ids, g.num_beams, g.max_length, g.forced_eos_token_id = [[52]], 6, 17, 0
    model, params = from_torch(oracle)
    assert model.generation_config.bad_words_ids == ((52,),)
    ids, mask = source_batch(np.random.default_rng(2))
    ids = np.minimum(ids, 51)
    assert_same_tokens(oracle, model, params, ids, mask)
    found = model.generate(params, ids, attention_mask=mask)
    for row, length in zip(np.asarray(found.sequences), np.asarray(found.lengths), strict=True):
        assert 52 not in row[1:length]


# mBART and PLBART: the language code at the end of the labels opens the target ------------------


@pytest.mark.parametrize("family", ["mbart", "plbart"])
@pytest.mark.parametrize("filler", [-100, 1], ids=["ignored", "pads"])
def test_labels_are_wrapped(family, filler):
    oracle = whole(family)
    model, params = from_torch(oracle)
    ids, mask = source_batch(np.random.default_rng(0))
    ids = np.minimum(ids, 52)
    labels = labels_batch(np.random.default_rng(1))
    real = labels != -100
    labels[~real] = filler
    with torch.no_grad():
        theirs = oracle(
            input_ids=as_torch(ids), attention_mask=as_torch(mask), labels=as_torch(labels)
        )
    ours = model.apply({"params": params}, ids, mask, labels=labels)
    close(ours.logits[real], theirs.logits[as_torch(real).bool()], 2e-5)
    if filler == -100:
        assert float(ours.loss) == pytest.approx(theirs.loss.item(), rel=1e-5)


# Halves as sides ---------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [True, False], ids=["with head", "bare"])
@pytest.mark.parametrize("family", KIN)
def test_halves_of_a_whole_model_are_sides(family, head, tmp_path):
    oracle = whole(family, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24)
    (oracle if head else oracle.model).save_pretrained(tmp_path / "whole")
    torch.manual_seed(0)
    bert = randomize(transformers.BertModel(family_config("bert", "encoder")), 1)
    bert.save_pretrained(tmp_path / "bert")

    first = join(tmp_path / "whole", tmp_path / "bert", decoder_start_token_id=0)
    assert not first.reports["encoder"].fresh or family == "marian"
    ids, mask = source_batch(np.random.default_rng(0))
    ids = np.minimum(ids, 52)
    with torch.no_grad():
        states = oracle.get_encoder()(as_torch(ids), attention_mask=as_torch(mask))[0]
    ours = first.model.apply({"params": first.params}, ids, mask, method="encode")
    real = mask.astype(bool)
    close(ours.last_hidden_state[real], states[torch.tensor(real)], 1e-5)

    second = join(tmp_path / "bert", tmp_path / "whole", decoder_start_token_id=0)
    assert set(second.reports["decoder"].fresh) <= {"decoder/embedding/position"}
    inputs = np.random.default_rng(2).integers(3, 50, (3, 6)).astype(np.int32)
    with torch.no_grad():
        source = bert(as_torch(ids), attention_mask=as_torch(mask))[0]
        theirs = oracle.model.decoder(
            input_ids=as_torch(inputs),
            encoder_hidden_states=source,
            encoder_attention_mask=as_torch(mask),
            use_cache=False,
        )[0]
        theirs = oracle.lm_head(theirs)  # the bias belongs to the whole model
    ours = second.model.apply({"params": second.params}, ids, mask, decoder_input_ids=inputs)
    close(ours.logits, theirs, 2e-5)


@pytest.mark.parametrize("family", ["mbart", "marian", "pegasus"])
def test_layers_of_a_half_can_be_chosen(family, tmp_path):
    whole(family).save_pretrained(tmp_path)
    pair = join(tmp_path, tmp_path, encoder_layers=(1,), decoder_layers=1, decoder_start_token_id=0)
    _, params = EncoderDecoderModel.from_pretrained(tmp_path)
    for half, layer in (("encoder", 1), ("decoder", 0)):
        mine, theirs = pair.params[half]["segment_0"], params[half]["segment_0"]
        trees_equal(mine, jax.tree.map(lambda x, i=layer: x[i : i + 1], theirs))


# TrOCR and XGLM: options of published checkpoints ------------------------------------------------

TROCR = {
    "learned": {},
    "sinusoidal": {"use_learned_position_embeddings": False},
    "no norm": {"layernorm_embedding": False, "activation_function": "relu"},
    "small": {
        "use_learned_position_embeddings": False,
        "scale_embedding": True,
        "activation_function": "relu",
        "tie_word_embeddings": False,
    },
}
XGLM = {
    "published": {},
    "unscaled": {"scale_embedding": False},
    "pad in the table": {"pad_token_id": 4},
    "odd width": {"d_model": 15, "attention_heads": 3},
}


@pytest.mark.parametrize("option", TROCR)
def test_trocr_options(option, tmp_path):
    check_decoder("trocr", tmp_path, **TROCR[option])


@pytest.mark.parametrize("option", XGLM)
def test_xglm_options(option, tmp_path):
    check_decoder("xglm", tmp_path, **XGLM[option])


def check_decoder(family, folder, encoder_hidden=16, **more):
    oracle = torch_pair("bert", family, hidden=(encoder_hidden, 16), seed=7, **more)
    model, params = from_torch(oracle)
    same_logits(oracle, model, params)
    ids, mask = source_batch(np.random.default_rng(1))
    assert_same_tokens(oracle, model, params, ids, mask, max_new_tokens=20, num_beams=4)
    check_files(oracle, folder, (family, "decoder"))
    return model, params


def test_trocr_reads_encoder_states_of_another_width(tmp_path):
    model, params = check_decoder("trocr", tmp_path, 24, cross_attention_hidden_size=24)
    assert "enc_to_dec_proj" not in params
    config = model.config
    with pytest.raises(ConfigError, match="cross_attention_hidden_size must equal"):
        config.replace(decoder=config.decoder.replace(cross_attention_hidden_size=20))


def test_sinusoids_that_skip_pads():
    """TrOCR counts the tokens that are no pads, in the middle of a text, too."""
    oracle = torch_pair("bert", "trocr", seed=8, use_learned_position_embeddings=False)
    model, params = from_torch(oracle)
    ids, mask = source_batch(np.random.default_rng(0))
    inputs = np.array([[0, 5, 1, 1, 7, 9], [1, 4, 4, 1, 8, 3], [0, 6, 6, 6, 1, 1]], np.int32)
    with torch.no_grad():
        theirs = oracle(
            input_ids=as_torch(ids),
            attention_mask=as_torch(mask),
            decoder_input_ids=as_torch(inputs),
        )
    ours = model.apply({"params": params}, ids, mask, decoder_input_ids=inputs)
    close(ours.logits, theirs.logits, 2e-5)


def test_far_positions_of_computed_sinusoids():
    """Float32 angles magnify the last bit of a frequency; still close to PyTorch's."""
    from jax_encdec.embedding import _sinusoids

    config = FAMILIES["xglm"](vocab_size=5, d_model=1024, num_layers=1, attention_heads=1)
    table = config.position_table()
    rows = np.arange(table.length)[None]
    ours = np.asarray(_sinusoids(table, rows, 1024))[0]
    theirs = transformers.models.xglm.modeling_xglm.XGLMSinusoidalPositionalEmbedding
    theirs = theirs.get_embedding(table.length, 1024, 1).numpy()
    assert np.abs(ours - theirs).max() < 5e-5


def test_trocr_published_with_its_image_encoder(tmp_path):
    """As microsoft/trocr-* have it: the decoder inside of a VisionEncoderDecoderModel."""
    oracle = torch_pair("bert", "trocr", seed=9, use_learned_position_embeddings=False)
    _, params = from_torch(oracle)
    state = {
        k: v for k, v in oracle.state_dict().items() if k != "decoder.output_projection.weight"
    }
    state["decoder.model.decoder.embed_positions._float_tensor"] = torch.zeros(1)
    (tmp_path / "vision").mkdir()
    torch.save(state, tmp_path / "vision" / "pytorch_model.bin")
    oracle.encoder.save_pretrained(tmp_path / "bert")
    config = read_config(oracle.decoder.config.to_dict())
    pair = join(tmp_path / "bert", tmp_path / "vision", decoder_config=config)
    trees_equal(pair.params["decoder"], params["decoder"])


@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_xglm_as_it_was_published(role, tmp_path):
    """facebook/xglm-564M: no cross-attention, a buffer of sinusoids in the file."""
    config = family_config("xglm", "encoder")
    single = randomize(transformers.XGLMForCausalLM(config), 4)
    single.save_pretrained(tmp_path / "xglm")
    buffer = {"model.embed_positions.weights": np.zeros((50, 16), np.float32)}
    rewrite(tmp_path / "xglm", lambda tensors: tensors | buffer)
    bert = randomize(transformers.BertModel(family_config("bert", "encoder")), 1)
    bert.save_pretrained(tmp_path / "bert")
    sides = ("xglm", "bert") if role == "encoder" else ("bert", "xglm")
    pair = join(*(tmp_path / side for side in sides), decoder_start_token_id=0)
    assert "recomputes" in pair.reports[role].ignored["model.embed_positions.weights"]
    ids, mask = source_batch(np.random.default_rng(0))
    if role == "encoder":
        with torch.no_grad():
            theirs = single.model(as_torch(ids), attention_mask=as_torch(mask))[0]
        ours = pair.model.apply({"params": pair.params}, ids, mask, method="encode")
        real = mask.astype(bool)
        close(ours.last_hidden_state[real], theirs[torch.tensor(real)])
    else:
        fresh = pair.reports["decoder"].fresh
        assert fresh
        assert all("cross_attention" in name for name in fresh)
        own = pair.params["decoder"]["segment_0"]["block_0"]["self_attention"]["query"]["bias"]
        theirs = single.model.layers[1].self_attn.q_proj.bias.detach().reshape(4, 4)
        np.testing.assert_array_equal(own[1], theirs)


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("marian", {"decoder_vocab_size": 7}, "decoder_vocab_size must equal vocab_size"),
        ("marian", {"decoder_vocab_size": 0}, "decoder_vocab_size must be positive"),
        ("mbart", {"d_model": 15}, "d_model must be a multiple of encoder_attention_heads"),
        ("trocr", {"d_model": 15}, "d_model must be a multiple of decoder_attention_heads"),
        ("trocr", {"cross_attention_hidden_size": 0}, "cross_attention_hidden_size must be pos"),
        (
            "trocr",
            {"use_learned_position_embeddings": False, "pad_token_id": None},
            r"pad_token_id is a row of the position table; expected 0\.\.511, got None",
        ),
        ("xglm", {"num_layers": 0}, "num_layers must be positive"),
    ],
)
def test_impossible_values_are_refused(family, fields, message):
    with pytest.raises(ConfigError, match=message):
        FAMILIES[family](**fields)


def test_what_has_no_such_side_is_refused():
    with pytest.raises(ConfigError, match="trocr cannot be the encoder"):
        EncoderDecoderModel.from_encoder_decoder_pretrained(
            encoder_config=FAMILIES["trocr"](), decoder_config=FAMILIES["bert"]()
        )
    with pytest.raises(ConfigError, match="at most 65536 positions; got 1000000000"):
        FAMILIES["marian"](max_position_embeddings=10**9).to_trunk("encoder")
    with pytest.raises(ConfigError, match="width of at least 4"):
        FAMILIES["xglm"](d_model=2, attention_heads=1).to_trunk("decoder")
    assert FAMILIES["xglm"](max_position_embeddings=POSITIONS).to_trunk("encoder").causal


@pytest.mark.parametrize("family", ["marian", "pegasus", "bart"])
def test_what_is_not_trained_has_no_gradient(family):
    """So that `optax.masked(optimizer, model.trainable())` leaves it as it is."""
    model, params = from_torch(whole(family))
    rng = np.random.default_rng(0)
    ids, mask = source_batch(rng)
    ids, labels = np.minimum(ids, 52), labels_batch(rng)

    def loss(params):
        return model.apply({"params": params}, ids, mask, labels=labels).loss

    gradients = flatten(jax.jit(jax.grad(loss))(params))
    trained = flatten(model.trainable())
    assert not all(trained.values())
    for path, gradient in gradients.items():
        assert trained[path] == bool(np.any(gradient)), path


@pytest.mark.parametrize("family", ["mbart", "plbart"])
def test_packed_targets_open_with_their_own_language(family):
    model, params = from_torch(whole(family))
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(3, 53, (2, 6)), rng.integers(3, 53, (2, 5))
    apart = model.apply({"params": params}, ids, labels=labels)
    packed = model.apply(
        {"params": params},
        ids.reshape(1, -1),
        labels=labels.reshape(1, -1),
        segment_ids=np.repeat([[0, 1]], 6, axis=1),
        decoder_segment_ids=np.repeat([[0, 1]], 5, axis=1),
    )
    np.testing.assert_allclose(packed.loss_sum, apart.loss_sum, rtol=1e-5)
