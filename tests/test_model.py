"""The model as somebody uses it: what it takes, what it refuses, what it never does twice."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from jax_encdec import (
    BertConfig,
    EncDecError,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GenerationConfig,
    RobertaConfig,
)

PART = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
}
CONFIG = EncoderDecoderConfig(
    encoder=BertConfig(**PART),
    decoder=BertConfig(**PART),
    decoder_start_token_id=1,
    eos_token_id=2,
)
MODEL = EncoderDecoderModel(CONFIG)
IDS = np.random.default_rng(0).integers(3, 40, (3, 8)).astype(np.int32)


@pytest.fixture(scope="module")
def params():
    return MODEL.init_params(jax.random.key(0))


def compiled(caplog):
    return [r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()]


def test_a_second_call_compiles_nothing(params, caplog):
    def calls():
        MODEL.apply({"params": params}, IDS, labels=IDS)
        MODEL.apply({"params": params}, IDS, method="encode")
        MODEL.generate(params, IDS, num_beams=2, max_new_tokens=5)

    calls()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        calls()
        # Other lengths, numbers and prompts of one bucket.
        MODEL.generate(params, IDS[:, :6], num_beams=2, max_new_tokens=7, length_penalty=2.0)
        assert not compiled(caplog)
        MODEL.generate(params, IDS, decoder_input_ids=IDS[:, :3], max_new_tokens=4)
        before = len(compiled(caplog))
        MODEL.generate(params, IDS, decoder_input_ids=IDS[:, :5], max_new_tokens=3)
        assert not [m for m in compiled(caplog)[before:] if "_generate" in m]


def test_dtypes_of_any_spelling_are_one_key():
    spelt = [MODEL.clone(dtype=d) for d in (jnp.float32, "float32", np.dtype("float32"))]
    assert len({*spelt, MODEL}) == 1
    assert pickle.loads(pickle.dumps(MODEL)) == MODEL


def test_packed_pairs_lose_what_they_lose_apart(params):
    sources, source_segments = np.array([[4, 5, 6, 7, 8, 9]]), np.array([[1, 1, 2, 2, 2, 2]])
    labels = np.array([[5, 6, 2, 7, 8, 9, 2, -100]])
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0]])
    packed = MODEL.apply(
        {"params": params},
        sources,
        labels=labels,
        segment_ids=source_segments,
        decoder_segment_ids=segments,
    )
    apart = [
        MODEL.apply({"params": params}, sources[:, :2], labels=labels[:, :3]),
        MODEL.apply({"params": params}, sources[:, 2:], labels=labels[:, 3:7]),
    ]
    assert float(packed.loss_weight) == 7
    np.testing.assert_allclose(packed.loss_sum, sum(a.loss_sum for a in apart), rtol=1e-5)


def test_dropout_needs_a_key_and_follows_it(params):
    def loss(key):
        return MODEL.apply(
            {"params": params}, IDS, labels=IDS, deterministic=False, rngs={"dropout": key}
        ).loss

    one, two = loss(jax.random.key(1)), loss(jax.random.key(2))
    assert one == loss(jax.random.key(1))
    assert one != two
    assert one != MODEL.apply({"params": params}, IDS, labels=IDS).loss


def test_training_leaves_carried_tensors_alone(params):
    optimizer = optax.masked(optax.adamw(1e-2, weight_decay=0.1), MODEL.trainable())

    @jax.jit
    def step(params):
        state = optimizer.init(params)
        grads = jax.grad(lambda p: MODEL.apply({"params": p}, IDS, labels=IDS).loss)(params)
        return optax.apply_updates(params, optimizer.update(grads, state, params)[0]), grads

    after, grads = jax.tree.map(np.asarray, step(params))
    before = jax.tree.map(np.asarray, params)
    old, new, trained = (flatten_dict(t) for t in (before, after, MODEL.trainable()))
    slopes = flatten_dict(grads)
    assert not all(trained.values())
    for path in old:
        changed = bool((old[path] != new[path]).any())
        if trained[path]:
            assert changed or not slopes[path].any(), path
        else:
            assert not changed, path


def test_works_as_a_part_of_a_linen_module():
    class Scorer(nn.Module):
        @nn.compact
        def __call__(self, ids):
            states = EncoderDecoderModel(CONFIG, name="pair").encode(ids).last_hidden_state
            return nn.Dense(1)(states[:, 0])

    variables = Scorer().init(jax.random.key(0), IDS)
    assert Scorer().apply(variables, IDS).shape == (3, 1)
    assert set(variables["params"]) == {"pair", "Dense_0"}


def test_what_linen_initialises_works_everywhere(tmp_path):
    variables = MODEL.init(jax.random.key(0), IDS, labels=IDS)
    assert MODEL.apply(variables, IDS, labels=IDS).loss > 0
    assert MODEL.generate(variables["params"], IDS, max_new_tokens=2).sequences.shape == (3, 3)
    MODEL.save_pretrained(tmp_path, variables["params"])
    assert EncoderDecoderModel.from_pretrained(tmp_path)[0].config == CONFIG


def test_declarations_agree(params):
    shapes, axes, trained = (
        flatten_dict(tree) for tree in (MODEL.param_shapes(), MODEL.param_axes(), MODEL.trainable())
    )
    flat = flatten_dict(params)
    assert flat.keys() == shapes.keys() == axes.keys() == trained.keys()
    for path, leaf in flat.items():
        assert leaf.shape == shapes[path].shape
        assert len(axes[path]) == leaf.ndim


def test_generation_from_ready_states(params):
    states = MODEL.apply({"params": params}, IDS, method="encode")
    ready = MODEL.generate(params, encoder_outputs=states, num_beams=2, max_new_tokens=6)
    fresh = MODEL.generate(params, IDS, num_beams=2, max_new_tokens=6)
    np.testing.assert_array_equal(ready.sequences, fresh.sequences)


def test_lists_wide_integers_and_boolean_masks_will_do(params):
    expected = MODEL.generate(params, IDS, max_new_tokens=4).sequences
    mask = np.ones(IDS.shape, bool)
    for ids in (IDS.tolist(), IDS.astype(np.int64), jnp.asarray(IDS)):
        found = MODEL.generate(params, ids, attention_mask=mask, max_new_tokens=4)
        np.testing.assert_array_equal(found.sequences, expected)


def test_a_call_outranks_the_checkpoint(params):
    model = MODEL.clone(generation_config=GenerationConfig(max_new_tokens=12, min_new_tokens=12))
    out = model.generate(params, IDS, max_length=5, min_length=0)
    assert out.sequences.shape[1] <= 5
    # The default of 20 new tokens gives way to a decoder with fewer positions.
    small = EncoderDecoderModel(
        CONFIG.replace(decoder=BertConfig(**{**PART, "max_position_embeddings": 10}))
    )
    out = small.generate(small.init_params(jax.random.key(0)), IDS, suppress_tokens=[2])
    assert out.sequences.shape[1] == 11


def test_ids_resolve_down_to_the_decoder():
    decoder = RobertaConfig.from_dict({**PART, "decoder_start_token_id": 7})
    model = EncoderDecoderModel(EncoderDecoderConfig(encoder=CONFIG.encoder, decoder=decoder))
    assert model.token_id("decoder_start_token_id") == 7
    assert model.clone(
        generation_config=GenerationConfig(decoder_start_token_id=9)
    ).token_id("decoder_start_token_id") == 9  # fmt: skip
    assert model.token_id("eos_token_id") == 2
    plain = EncoderDecoderModel(
        EncoderDecoderConfig(encoder=CONFIG.encoder, decoder=RobertaConfig(**PART))
    )
    assert plain.token_id("decoder_start_token_id") == 0  # bos, when nothing names a start


def test_64_bit_integers_change_nothing():
    code = (
        "import jax, numpy as np; from tests_model import MODEL, IDS\n"
        "p = MODEL.init_params(jax.random.key(0))\n"
        "for o in ({}, {'num_beams': 2}): MODEL.generate(p, IDS, max_new_tokens=3, **o)\n"
        "print(float(MODEL.apply({'params': p}, IDS, labels=IDS).loss))"
    ).replace("tests_model", "test_model")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JAX_ENABLE_X64": "1", "PYTHONPATH": os.path.dirname(__file__)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def wrong(**given):
    return lambda p: MODEL.apply({"params": p}, **{"input_ids": IDS, "labels": IDS, **given})


def asked(ids=IDS, **given):
    return lambda p: MODEL.generate(p, ids, max_new_tokens=3, **given)


REFUSED = {
    "labels of another batch": (wrong(labels=IDS[:1]), "as many rows; got 3 and 1"),
    "labels of one row": (wrong(labels=IDS[0]), "labels must have shape [batch, length]; got [8]"),
    "labels of another length": (wrong(decoder_input_ids=IDS[:, :5]), "labels must have shape"),
    "an unknown label": (wrong(labels=IDS - 40), "expected 0..39"),
    "a mask of another shape": (wrong(attention_mask=IDS[:, :5]), "[3, 8]; got [3, 5]"),
    "no source": (wrong(input_ids=None), "exactly one of input_ids and inputs_embeds; got neither"),
    "an empty source": (wrong(input_ids=IDS[:, :0]), "got [3, 0]"),
    "fractions": (wrong(input_ids=IDS * 0.5), "input_ids must be integers; got float32"),
    "an id too large": (wrong(input_ids=IDS + 30), "expected 0..39"),
    "a position too large": (wrong(position_ids=IDS + 24), "expected 0..23"),
    "a type too large": (wrong(token_type_ids=IDS), "expected 0..1"),
    "a source too long": (wrong(input_ids=np.ones((3, 25), int)), "positions for 24"),
    "segments of one side": (wrong(segment_ids=IDS), "together"),
    "embeddings too wide": (
        wrong(input_ids=None, inputs_embeds=np.zeros((3, 4, 5))),
        "[batch, length, 16]; got [3, 4, 5]",
    ),
    "ragged rows": (asked([[1, 2], [3]]), "rows of one length"),
    "a number for a key": (asked(do_sample=True, key=0), "jax.random.key(0); got 0"),
    "no key": (asked(do_sample=True), "needs a random key"),
    "states too wide": (asked(None, encoder_outputs=np.zeros((1, 2, 3))), "[batch, length, 16]"),
    "a start outside": (asked(decoder_start_token_id=77), "77"),
    "a misspelt option": (asked(num_beam=3), "did you mean 'num_beams'"),
    "a misspelt argument": (asked(atention_mask=IDS), "did you mean 'attention_mask'"),
    "more than the positions": (
        lambda p: MODEL.generate(p, IDS, max_length=60),
        "max_length is 60, but the decoder has positions for 25 tokens",
    ),
    "prompts that half begin": (
        asked(decoder_input_ids=np.array([[1, 5], [5, 6], [6, 7]])),
        "some rows of decoder_input_ids begin with the start token 1",
    ),
    "an option that is not there": (asked(penalty_alpha=0.6), "penalty_alpha=0.6 is not"),
    "parameters of nobody": (lambda p: MODEL.generate({"encoder": p}, IDS), "do not fit"),
    "parameters that are none": (lambda p: MODEL.generate(None, IDS), "nested dict"),
    "a start outside, in the defaults": (
        lambda p: MODEL.clone(
            generation_config=GenerationConfig(decoder_start_token_id=77)
        ).apply({"params": p}, IDS, labels=IDS),
        "0..39; got 77",
    ),
    "an unknown activation": (
        lambda p: EncoderDecoderModel(
            CONFIG.replace(encoder=BertConfig(**PART, hidden_act="geluu"))
        ).param_shapes(),
        "unknown activation 'geluu'",
    ),
    "a rate above one": (
        lambda p: CONFIG.replace(encoder=BertConfig(**PART, hidden_dropout_prob=1.5)),
        "below 1; got 1.5",
    ),
    "a text for a number": (lambda p: BertConfig(hidden_size="16"), "must be int; got '16'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, params):
    call, says = REFUSED[case]
    with pytest.raises(EncDecError) as caught:
        call(params)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_ids_under_a_trace_are_nan_not_somebody_else(params):
    def loss(ids, labels):
        return MODEL.apply({"params": params}, ids, labels=labels).loss

    good = jax.jit(loss)(IDS, IDS)
    assert np.isfinite(good)
    for bad in (-1, 40, 10**6):
        assert np.isnan(jax.jit(loss)(np.where(IDS[0, 0] == IDS, bad, IDS), IDS))
        assert np.isnan(jax.jit(loss)(IDS, np.where(IDS[0, 0] == IDS, bad, IDS)))
