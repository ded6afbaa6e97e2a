"""Checkpoints in and out: bit for bit with PyTorch, ties and legacy layouts, warm starts."""

from __future__ import annotations

import json
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from oracle import (
    DECODERS,
    ENCODERS,
    VOCAB,
    as_torch,
    family_config,
    from_torch,
    randomize,
    source_batch,
    torch,
    torch_pair,
    transformers,
)
from safetensors.numpy import load_file, save_file

from jax_encdec import (
    BertConfig,
    CheckpointError,
    ConfigError,
    EncDecError,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    InputError,
)
from jax_encdec.pretrained import load
from jax_encdec.warm_start import join


def state(model):
    """Persistent tensors by name, as raw bytes with dtype and shape."""
    return {
        name: (str(t.dtype), tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes())
        for name, t in model.state_dict().items()
    }


def trees_equal(a, b):
    a, b = flatten_dict(a), flatten_dict(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        assert np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes(), path


def save_as_bin(model, folder):
    """What Transformers 4 wrote: every name, tied ones twice."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))


# Round trips -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", DECODERS)
def test_pytorch_reloads_every_bit(family, tied, dtype, tmp_path):
    # BART's encoder is no class that PyTorch's composite can rebuild, so BERT stands in for it.
    encoder = "bert" if family == "bart" else family
    oracle = torch_pair(encoder, family, hidden=(16, 24), tied=tied, seed=5)
    oracle = oracle.to(getattr(torch, dtype))
    oracle.save_pretrained(tmp_path / "theirs")
    model, params = EncoderDecoderModel.from_pretrained(tmp_path / "theirs", dtype="auto")
    assert model.dtype == jnp.dtype(dtype)
    model.save_pretrained(tmp_path / "ours", params)
    back, info = transformers.EncoderDecoderModel.from_pretrained(
        tmp_path / "ours", dtype=getattr(torch, dtype), output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert state(back) == state(oracle)
    again, reread = EncoderDecoderModel.from_pretrained(tmp_path / "ours", dtype="auto")
    trees_equal(params, reread)
    assert again == model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_whole_bart_round_trip(tied, tmp_path):
    config = family_config("bart", "decoder", tied=tied)
    config.is_decoder, config.add_cross_attention = False, False
    oracle = randomize(transformers.BartForConditionalGeneration(config), 2)
    oracle.final_logits_bias.uniform_()
    oracle.save_pretrained(tmp_path / "theirs")
    model, params = EncoderDecoderModel.from_pretrained(tmp_path / "theirs")
    assert model.config.whole
    model.save_pretrained(tmp_path / "ours", params)
    back = transformers.BartForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert state(back) == state(oracle)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_bart_published_without_its_head(tied, tmp_path):
    """facebook/bart-base is such a file: BartModel, no `model.` before its names."""
    config = family_config("bart", "decoder", tied=tied)
    config.is_decoder, config.add_cross_attention = False, False
    oracle = randomize(transformers.BartForConditionalGeneration(config), 2)
    oracle.model.save_pretrained(tmp_path)
    if not tied:  # then the head is nowhere, and PyTorch draws one
        with pytest.raises(CheckpointError, match="lm_head"):
            EncoderDecoderModel.from_pretrained(tmp_path)
        return
    rewrite(tmp_path, lambda t: t.update({"encoder.version": np.ones(1, np.float32)}))
    model, params = EncoderDecoderModel.from_pretrained(tmp_path)
    ids, mask = source_batch(np.random.default_rng(1))
    ids = np.minimum(ids, 52)
    with torch.no_grad():
        expected = oracle(
            input_ids=as_torch(ids), attention_mask=as_torch(mask), decoder_input_ids=as_torch(ids)
        ).logits
    np.testing.assert_allclose(
        model.apply({"params": params}, ids, mask, ids).logits, expected, atol=1e-4
    )


@pytest.mark.parametrize("encoder", ENCODERS)
def test_bin_files_hold_the_same(encoder, tmp_path):
    oracle = torch_pair(encoder, "gpt2", seed=6)
    save_as_bin(oracle, tmp_path / "bin")
    oracle.save_pretrained(tmp_path / "safe")
    _, one = EncoderDecoderModel.from_pretrained(tmp_path / "bin")
    _, two = EncoderDecoderModel.from_pretrained(tmp_path / "safe")
    trees_equal(one, two)


def test_sharded_both_ways(tmp_path):
    oracle = torch_pair("bert", "bert", seed=7)
    oracle.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    model, params = EncoderDecoderModel.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours", params, max_shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    back = transformers.EncoderDecoderModel.from_pretrained(tmp_path / "ours")
    assert state(back) == state(oracle)


def test_generation_defaults_reach_pytorch(tmp_path):
    """BUG of the oracle, mended: its folders lose decoder_start_token_id, and cannot generate."""
    oracle = torch_pair("bert", "bert")
    model, params = from_torch(oracle)
    config = model.config.replace(decoder_start_token_id=0, eos_token_id=2, pad_token_id=1)
    model = model.clone(config=config).clone(
        generation_config=model.generation_config.replace(num_beams=3, max_new_tokens=9)
    )
    model.save_pretrained(tmp_path, params)
    back = transformers.EncoderDecoderModel.from_pretrained(tmp_path)
    ids, mask = source_batch(np.random.default_rng(0))
    theirs = back.generate(input_ids=as_torch(ids), attention_mask=as_torch(mask))
    ours = model.generate(params, ids, attention_mask=mask)
    for row, length in enumerate(np.asarray(ours.lengths)):
        np.testing.assert_array_equal(ours.sequences[row, :length], theirs[row, :length])


# Ties --------------------------------------------------------------------------------------------


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def edit_config(folder, **keys):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def shared_pair(folder):
    """A tied encoder-decoder as Transformers 4 held it: the decoder's modules are the encoder's."""
    oracle = torch_pair("bert", "bert", seed=8, vocab=53)
    theirs = oracle.decoder.bert.state_dict()
    theirs.update({k: v for k, v in oracle.encoder.state_dict().items() if k in theirs})
    oracle.decoder.bert.load_state_dict(theirs)
    oracle.save_pretrained(folder)
    edit_config(folder, tie_encoder_decoder=True)
    return oracle


@pytest.mark.parametrize("lacking", ["nothing", "encoder", "decoder"])
def test_shared_encoder_and_decoder(lacking, tmp_path):
    """BUG of the oracle, mended: v4 files of tied pairs lack one side, and v5 leaves it random."""
    oracle = shared_pair(tmp_path / "theirs")

    def strip(tensors):
        for name in list(tensors):
            own = "pooler" in name or "crossattention" in name or ".cls." in name
            if name.startswith(lacking) and not own:
                del tensors[name]

    rewrite(tmp_path / "theirs", strip)
    model, params = EncoderDecoderModel.from_pretrained(tmp_path / "theirs")
    assert model.config.tie_encoder_decoder
    assert ("decoder", "embedding", "token") not in flatten_dict(params)
    ids, mask = source_batch(np.random.default_rng(1))
    ids = np.minimum(ids, 52)
    inputs = np.random.default_rng(2).integers(3, 50, (3, 5)).astype(np.int32)
    with torch.no_grad():
        expected = oracle(
            input_ids=as_torch(ids),
            attention_mask=as_torch(mask),
            decoder_input_ids=as_torch(inputs),
        ).logits
    ours = model.apply({"params": params}, ids, mask, inputs).logits
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    # Written with both sides present, so that today's PyTorch opens it whole.
    model.save_pretrained(tmp_path / "ours", params)
    back = transformers.EncoderDecoderModel.from_pretrained(tmp_path / "ours")
    assert state(back) == state(oracle)
    # One leaf: one gradient, from both uses.
    grads = jax.grad(lambda p: model.apply({"params": p}, ids, mask, inputs).logits.sum())(params)
    assert flatten_dict(grads).keys() == flatten_dict(params).keys()


def test_tied_by_config_but_not_in_fact(tmp_path):
    shared_pair(tmp_path)

    def bend(tensors):
        tensors["decoder.bert.encoder.layer.0.output.dense.bias"] += 1

    rewrite(tmp_path, bend)
    with pytest.warns(UserWarning, match="differ; they were loaded as untied"):
        model, _ = EncoderDecoderModel.from_pretrained(tmp_path)
    assert not model.config.tie_encoder_decoder


@pytest.mark.parametrize("biases", [2, 1])
@pytest.mark.parametrize("decoder", ["bert", "gpt2", "roberta"])
def test_head_tied_by_config_but_not_in_fact(decoder, biases, tmp_path):
    oracle = torch_pair("bert", decoder, tied=False, seed=9)
    oracle.save_pretrained(tmp_path)
    if biases == 1:  # as files were before the head's bias was published twice

        def age(tensors):
            for name in [n for n in tensors if n.endswith(".decoder.bias")]:
                tensors[name.replace(".decoder.bias", ".bias")] = tensors.pop(name)

        rewrite(tmp_path, age)
    config = json.loads((tmp_path / "config.json").read_text())
    config["decoder"]["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="untied"):
        model, params = EncoderDecoderModel.from_pretrained(tmp_path)
    assert not model.config.decoder.tie_word_embeddings
    ids, mask = source_batch(np.random.default_rng(1))
    inputs = np.random.default_rng(2).integers(3, 50, (3, 5)).astype(np.int32)
    with torch.no_grad():
        expected = oracle(
            input_ids=as_torch(ids),
            attention_mask=as_torch(mask),
            decoder_input_ids=as_torch(inputs),
        ).logits
    ours = model.apply({"params": params}, ids, mask, inputs).logits
    np.testing.assert_allclose(ours, expected, atol=1e-4)


# Old files ---------------------------------------------------------------------------------------


def test_legacy_names(tmp_path):
    """LayerNorm.gamma and beta, position buffers, the next-sentence head, a training wrapper."""
    oracle = torch_pair("bert", "bert", seed=10)
    oracle.save_pretrained(tmp_path)
    _, expected = EncoderDecoderModel.from_pretrained(tmp_path)

    def age(tensors):
        new = {}
        for name, tensor in tensors.items():
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            new["module." + name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
        new["module.encoder.embeddings.position_ids"] = np.arange(50)[None]
        new["module.decoder.bert.embeddings.position_ids"] = np.arange(50)[None]
        new["module.decoder.cls.seq_relationship.weight"] = np.zeros((2, 16), np.float32)
        tensors.clear()
        tensors.update(new)

    rewrite(tmp_path, age)
    loaded = load(tmp_path)
    trees_equal(expected, loaded.params)
    report = loaded.reports[str(tmp_path)]
    assert len(report.ignored) == 3
    assert "next" in str(report) or "another task" in str(report)


def test_flat_generation_options_of_2020(tmp_path):
    oracle = torch_pair("bert", "bert", seed=12)
    oracle.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    edit_config(
        tmp_path, model_type="encoder_decoder", num_beams=4, no_repeat_ngram_size=3, max_length=12,
        length_penalty=2.0, early_stopping=True, decoder_start_token_id=0, eos_token_id=2,
        pad_token_id=1,
    )  # fmt: skip
    model, params = EncoderDecoderModel.from_pretrained(tmp_path)
    assert model.generation_config.num_beams == 4
    ids, mask = source_batch(np.random.default_rng(1))
    theirs = oracle.generate(
        input_ids=as_torch(ids), attention_mask=as_torch(mask), num_beams=4, max_length=12,
        no_repeat_ngram_size=3, length_penalty=2.0, early_stopping=True,
    )  # fmt: skip
    ours = model.generate(params, ids, attention_mask=mask)
    for row, length in enumerate(np.asarray(ours.lengths)):
        np.testing.assert_array_equal(ours.sequences[row, :length], theirs[row, :length])


def test_options_that_are_not_there_are_refused_from_old_files_too(tmp_path):
    torch_pair("bert", "bert").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    edit_config(tmp_path, penalty_alpha=0.6)
    model, params = EncoderDecoderModel.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"penalty_alpha.*not implemented"):
        model.generate(params, np.ones((1, 3), int), decoder_start_token_id=1)


def test_somebody_elses_head_is_reported_not_refused(tmp_path):
    save_single("bert", "encoder", tmp_path / "bert", head=False)
    rewrite(tmp_path / "bert", lambda t: t.update({"my_head.weight": np.zeros(3, np.float32)}))
    reports = join(tmp_path / "bert", tmp_path / "bert", decoder_start_token_id=1).reports
    assert "my_head.weight" in reports["encoder"].ignored


# Warm starts -------------------------------------------------------------------------------------


def save_single(family, role, folder, head=True, seed=0, cross=False, vocab=None):
    """A published single model of a family: (PyTorch model, folder)."""
    config = family_config(family, role, vocab=vocab)
    config.add_cross_attention = cross
    if family == "bart":
        config.is_decoder, config.add_cross_attention = False, False
        cls = transformers.BartForConditionalGeneration if head else transformers.BartModel
        model = cls(config)
    elif head:
        config.is_decoder = role == "decoder"
        model = transformers.AutoModelForCausalLM.from_config(config)
    else:
        model = transformers.AutoModel.from_config(config)
    randomize(model, seed).save_pretrained(folder)
    return model


@pytest.mark.parametrize("head", [True, False], ids=["with head", "bare"])
@pytest.mark.parametrize("family", DECODERS)
def test_warm_start_holds_the_published_weights(family, head, tmp_path):
    save_single(family, "encoder", tmp_path / "enc", head=head, seed=1)
    save_single(family, "decoder", tmp_path / "dec", head=head, seed=2)
    loaded = join(tmp_path / "enc", tmp_path / "dec", decoder_start_token_id=0)
    model, params = loaded.model, loaded.params
    fresh = {name for name in loaded.reports["decoder"].fresh if "head" not in name}
    assert bool(fresh) == (family != "bart")
    assert all("cross_attention" in name or "kept" in name for name in fresh)
    # The oracle: a pair whose halves PyTorch loads from the same folders.
    if family == "bart":
        enc = transformers.BartModel.from_pretrained(tmp_path / "enc").encoder
        dec = transformers.BartForCausalLM.from_pretrained(tmp_path / "dec")
        # On its own PyTorch leaves this class's embeddings random: it does not know `shared`.
        half = transformers.BartModel.from_pretrained(tmp_path / "dec").decoder
        dec.model.decoder.load_state_dict(half.state_dict())
        oracle = transformers.EncoderDecoderModel(encoder=enc, decoder=dec)
    else:
        oracle = transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(
            str(tmp_path / "enc"), str(tmp_path / "dec")
        )
    oracle.config.decoder_start_token_id = 0
    oracle.save_pretrained(tmp_path / "pair")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, expected = EncoderDecoderModel.from_pretrained(tmp_path / "pair")
    mine, theirs = flatten_dict(params), flatten_dict(expected)
    assert mine.keys() == theirs.keys()
    for path in mine:
        drawn = "cross_attention" in path and family != "bart"
        if not (drawn or "kept" in path or (not head and "head" in path)):
            np.testing.assert_array_equal(mine[path], theirs[path], err_msg="/".join(path))
    assert model.token_id("decoder_start_token_id") == 0


def test_new_cross_attention_is_drawn_as_published(tmp_path):
    config = GPT2Config(vocab_size=60, n_embd=64, n_layer=8, n_head=4, n_positions=32)
    _, params = EncoderDecoderModel.from_encoder_decoder_pretrained(
        encoder_config=BertConfig(vocab_size=60, hidden_size=64, num_hidden_layers=1,
                                  num_attention_heads=4, intermediate_size=64),
        decoder_config=config, decoder_start_token_id=3,
    )  # fmt: skip
    cross = params["decoder"]["segment_0"]["block_0"]["cross_attention"]
    assert np.std(cross["query"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(cross["out"]["kernel"]) == pytest.approx(0.02 / 4, rel=0.05)
    assert not np.any(cross["out"]["bias"])
    assert np.all(cross["norm_before"]["scale"] == 1)


def test_cross_attention_from_self_attention(tmp_path):
    save_single("bert", "encoder", tmp_path / "bert", head=False)
    _, params = EncoderDecoderModel.from_encoder_decoder_pretrained(
        tmp_path / "bert", tmp_path / "bert", cross_attention="self", decoder_start_token_id=3
    )
    block = params["decoder"]["segment_0"]["block_0"]
    jax.tree.map(np.testing.assert_array_equal, block["cross_attention"], block["self_attention"])


def test_chosen_layers(tmp_path):
    save_single("bert", "encoder", tmp_path / "bert", head=False)
    whole = EncoderDecoderModel.from_encoder_decoder_pretrained(
        tmp_path / "bert", tmp_path / "bert", decoder_start_token_id=3
    )[1]
    for layers, rows in ((1, [0]), ((1,), [1]), ((1, 0), [1, 0])):
        model, params = EncoderDecoderModel.from_encoder_decoder_pretrained(
            tmp_path / "bert", tmp_path / "bert", decoder_layers=layers, decoder_start_token_id=3
        )
        assert model.config.decoder.num_hidden_layers == len(rows)
        for name in ("self_attention", "mlp"):
            jax.tree.map(
                lambda a, b, rows=rows: np.testing.assert_array_equal(a, b[np.asarray(rows)]),
                params["decoder"]["segment_0"]["block_0"][name],
                whole["decoder"]["segment_0"]["block_0"][name],
            )
    with pytest.raises(InputError, match="2 layers; got 3"):
        join(tmp_path / "bert", tmp_path / "bert", decoder_layers=3)


def test_shared_warm_start(tmp_path):
    save_single("roberta", "encoder", tmp_path / "roberta")
    model, params = EncoderDecoderModel.from_encoder_decoder_pretrained(
        tmp_path / "roberta", tmp_path / "roberta", tie_encoder_decoder=True
    )
    flat = flatten_dict(params)
    assert {path[1] for path in flat if path[0] == "decoder"} == {"segment_0", "head"}
    assert all("cross_attention" in p or "head" in p for p in flat if p[0] == "decoder")
    # A random encoder side takes its weights from the decoder when the two are one.
    config = model.config.encoder
    _, other = EncoderDecoderModel.from_encoder_decoder_pretrained(
        None, tmp_path / "roberta", encoder_config=config, tie_encoder_decoder=True
    )
    np.testing.assert_array_equal(
        params["encoder"]["embedding"]["token"], other["encoder"]["embedding"]["token"]
    )


def test_fields_of_either_side_can_be_changed(tmp_path):
    save_single("bert", "encoder", tmp_path / "bert", head=False)
    loaded = join(
        tmp_path / "bert", tmp_path / "bert", decoder_start_token_id=1,
        encoder_hidden_dropout_prob=0.3, decoder_attention_probs_dropout_prob=0.4,
    )  # fmt: skip
    assert loaded.model.config.encoder_trunk.dropout.residual == 0.3
    assert loaded.model.config.decoder_trunk.dropout.attention == 0.4


def test_ids_are_found_in_the_tokenizer(tmp_path):
    save_single("bert", "encoder", tmp_path / "bert", head=False)
    data = json.loads((tmp_path / "bert" / "config.json").read_text())
    data |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="decoder_start_token_id"):
        join(tmp_path / "bert", tmp_path / "bert").model.token_id("decoder_start_token_id")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    model = join(tmp_path / "bert", tmp_path / "bert").model
    assert model.token_id("decoder_start_token_id") == 2
    assert model.token_id("eos_token_id") == 3
    assert model.token_id("pad_token_id") == 0


# Dtypes ------------------------------------------------------------------------------------------


def test_dtype(tmp_path):
    oracle = torch_pair("bert", "bert").to(torch.bfloat16)
    oracle.save_pretrained(tmp_path)
    kinds = {"auto": "bfloat16", None: "float32", "bfloat16": "bfloat16", jnp.float16: "float16"}
    for asked, kind in kinds.items():
        model, params = EncoderDecoderModel.from_pretrained(tmp_path, dtype=asked)
        assert {str(x.dtype) for x in jax.tree.leaves(params)} == {kind}
        assert model.dtype == jnp.dtype(kind)
    for wrong in ("float64", "int8", "bf16", 3):
        with pytest.raises(InputError, match="dtype must be"):
            EncoderDecoderModel.from_pretrained(tmp_path, dtype=wrong)
    # bfloat16 widened to float32 and narrowed again is the same number.
    assert np.asarray(params["encoder"]["embedding"]["token"]).dtype != ml_dtypes.bfloat16


# What is refused ---------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    torch_pair("bert", "bert").save_pretrained(tmp_path)
    return tmp_path


def drop(name):
    return lambda folder: rewrite(folder, lambda t: t.pop(name))


def put(name, array):
    return lambda folder: rewrite(folder, lambda t: t.update({name: array}))


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


BROKEN = [
    (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    (lambda f: (f / "config.json").write_text("{"), "not readable as JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    (lambda f: edit_config(f, model_type="llama"), "llama"),
    (lambda f: edit_config(f, decoder_start_token_id=VOCAB["decoder"]), "0..52; got 53"),
    (truncate, "model.safetensors"),
    (drop("encoder.encoder.layer.1.output.dense.weight"), "1 tensors are missing"),
    (put("encoder.surprise", np.zeros(3)), "1 tensors are unexpected: encoder.surprise"),
    (
        put("encoder.embeddings.LayerNorm.bias", np.zeros(3, np.float32)),
        "has shape (3,), expected (16,)",
    ),
    (
        lambda f: (f / "generation_config.json").write_text('{"num_beams": "four"}'),
        "num_beams must be an integer",
    ),
]


@pytest.mark.parametrize(("damage", "says"), BROKEN, ids=[says for _, says in BROKEN])
def test_refused(saved, damage, says):
    damage(saved)
    with pytest.raises(EncDecError) as caught:
        EncoderDecoderModel.from_pretrained(saved)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_folder():
    with pytest.raises(CheckpointError, match="no such file or folder"):
        EncoderDecoderModel.from_pretrained("./nowhere")
    with pytest.raises(CheckpointError, match=r"is not in the cache .*HF_HUB_OFFLINE"):
        EncoderDecoderModel.from_pretrained("somebody/nothing-of-the-kind")


def test_save_checks_the_tree(saved, tmp_path):
    model, params = EncoderDecoderModel.from_pretrained(saved)
    before = sorted(tmp_path.iterdir())
    broken = {**params, "encoder": {**params["encoder"], "more": jnp.zeros(2)}}
    with pytest.raises(InputError, match="encoder/more is unexpected"):
        model.save_pretrained(tmp_path / "out", broken)
    assert sorted(tmp_path.iterdir()) == before


def test_single_models_are_not_pairs(tmp_path):
    save_single("bert", "encoder", tmp_path, head=False)
    with pytest.raises(ConfigError, match="from_encoder_decoder_pretrained"):
        EncoderDecoderModel.from_pretrained(tmp_path)


def test_random_model_saves_and_returns(tmp_path):
    part = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                      intermediate_size=32)  # fmt: skip
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        part, part, decoder_start_token_id=1, eos_token_id=2, tie_encoder_decoder=True
    )
    model = EncoderDecoderModel(config)
    params = model.init_params(jax.random.key(3))
    model.save_pretrained(tmp_path, params)
    back, reread = EncoderDecoderModel.from_pretrained(tmp_path)
    assert back.config == config
    trees_equal(params, reread)
