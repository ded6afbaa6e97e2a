"""A step reads no more of the cache than is in use, and finds what reading all of it finds."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pairs
import trunks

from jax_encdec import BertConfig, EncoderDecoderConfig, EncoderDecoderModel
from jax_encdec.attention import Cache
from jax_encdec.decoding import engine
from jax_encdec.decoding.arguments import Inputs, settings_of
from jax_encdec.transformer import decode_step, init_caches
from jax_encdec.trunk_params import unstack

# Against Transformers: answers that outgrow every prefix of a cache of 256 -----------------------

LONG = {"min_new_tokens": 195, "max_new_tokens": 195}


@functools.cache
def pair(decoder: str):
    from oracle import from_torch, torch_pair

    more = {} if decoder == "t5" else {"max_position_embeddings": 256}
    oracle = torch_pair("bert", decoder, seed=5, **more)
    return oracle, *from_torch(oracle)


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("decoder", ["bert", "t5", "roformer"])
def test_long_answers_are_those_of_transformers(decoder, beams):
    """Learned, relative and rotary positions."""
    from oracle import assert_same_tokens, source_batch

    oracle, model, params = pair(decoder)
    assert engine.live_prefixes("cpu", 3 * beams, 256) == (32, 64, 256)
    ids, mask = source_batch(np.random.default_rng(3))
    assert_same_tokens(oracle, model, params, ids, mask, num_beams=beams, **LONG)


# Against our own without a choice -----------------------------------------------------------------


def wide_pair():
    """A pair with room for long answers."""
    half = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=32, max_position_embeddings=512,
    )  # fmt: skip
    ids = {"decoder_start_token_id": 3, "eos_token_id": 2, "pad_token_id": 0}
    model = EncoderDecoderModel(EncoderDecoderConfig(encoder=half, decoder=half, **ids))
    params = model.init_params(jax.random.key(1))
    return model, jax.tree.map(lambda x: 8 * x if x.ndim > 2 else x, params)


def sources(rows: int):
    return np.random.default_rng(rows).integers(5, 60, (rows, 7)).astype(np.int32)


@pytest.mark.parametrize("beams", [1, 3])
def test_vmap_keeps_the_choice_and_the_tokens(beams):
    model, params = wide_pair()
    options = {"num_beams": beams, "max_new_tokens": 139}
    ids = jnp.asarray(sources(3))

    def one(row):
        return model.generate(params, row[None], **options)

    expected = model.generate(params, ids, **options)
    mapped = jax.jit(jax.vmap(one))
    width = expected.sequences.shape[1]
    np.testing.assert_array_equal(mapped(ids).sequences[:, 0, :width], expected.sequences)
    # A branch for each row would be both branches for all rows.
    nested = jax.vmap(jax.vmap(one))
    for f, rows in ((mapped, ids), (nested, ids[None])):
        assert len(re.findall(r"\bcond\[", str(jax.make_jaxpr(f)(rows)))) == 2  # one per layer


def test_more_room_changes_no_token():
    model, params = wide_pair()
    ids = sources(2)
    short = model.generate(params, ids, max_new_tokens=60)
    long = model.generate(params, ids, max_new_tokens=250)
    width = short.sequences.shape[1]
    np.testing.assert_array_equal(long.sequences[:, :width], short.sequences)


KINDS = {
    "grouped queries, rotary": trunks.llama(cross=True),
    "windows, capped scores": trunks.gemma2(cross=True),
}


@pytest.mark.parametrize("pools", ["shared", "own"])
@pytest.mark.parametrize("name", KINDS)
def test_what_is_not_in_use_is_not_read(name, pools):
    """Slots that no step has written hold what would spoil every sum."""
    trunk, capacity, lanes = KINDS[name], 8, 3
    tree = unstack(trunk, jax.tree.map(jnp.asarray, trunks.lively(trunk, 0)))
    states = np.random.default_rng(0).standard_normal((2, 5, trunks.ENCODER_HIDDEN))
    shared = pools == "shared"
    slots, shape = (capacity * lanes, (2, lanes)) if shared else (capacity, (2 * lanes, 1))

    @functools.partial(jax.jit, static_argnums=3)
    def step(caches, t, tokens, prefixes):
        path = jnp.arange(capacity)[:, None] <= t
        if shared:
            path = path[None] & jnp.eye(lanes, dtype=bool)[:, None]  # [K, T, K]
        visible = jnp.broadcast_to(path.reshape(1, shape[1], slots), (*shape, slots))
        return decode_step(
            trunk, tree, tokens, caches, position=t, token_positions=jnp.full((2, lanes), t),
            visible=visible, encoder_mask=None, dtype=jnp.float32, prefixes=prefixes,
        )  # fmt: skip

    whole = chosen = init_caches(
        trunk, tree, jnp.asarray(states, jnp.float32), pools=shape[0], slots=slots
    )
    unread = [2, 2, 4, 4, 8, 8, 8, 8]  # What step t must not read begins here.
    for t in range(capacity):
        tokens = jnp.asarray(
            np.random.default_rng(t).integers(4, trunks.VOCAB, (2, lanes)), jnp.int32
        )
        expected, whole = step(whole, jnp.int32(t), tokens, ())
        beyond = unread[t] * (lanes if shared else 1)
        spoiled = [
            {
                name: cache
                if name == "cross_attention"
                else Cache(
                    cache.key.at[..., beyond:].set(jnp.nan),
                    cache.value.at[:, :, beyond:].set(jnp.nan),
                )
                for name, cache in layer.items()
            }
            for layer in chosen
        ]
        got, written = step(tuple(spoiled), jnp.int32(t), tokens, (2, 4, capacity))
        chosen = jax.tree.map(lambda x: jnp.nan_to_num(x), written)
        close = 2e-5 * max(1.0, float(jnp.abs(expected).max()))
        np.testing.assert_allclose(got, expected, atol=close, rtol=1e-4)


# What it costs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "beams", "length"), [(1, 1, 40), (2, 1, 40), (1, 1, 200), (2, 3, 200)]
)
def test_no_step_copies_a_cache(rows, beams, length):
    model, params = wide_pair()
    settings, _ = settings_of(model, None, {"num_beams": beams, "max_new_tokens": length})
    asked, _, _ = engine.request(model, params, settings, Inputs(sources(rows)))
    text = engine._generate.lower(*asked).compile().as_text()
    slots, heads, size = asked.spec.capacity * beams, 4, 4
    caches = f"f32[{rows},{heads},{size},{slots}]", f"f32[{rows},{heads},{slots},{size}]"
    assert all(cache in text for cache in caches)
    loops = set(re.findall(r"body=(%[\w.-]+)", text))
    assert loops
    for part in re.split(r"\n(?=%|ENTRY)", text):
        if part.split(" ")[0] in loops:
            copied = re.findall(r"= (f32\[[\d,]+\])\S* copy\(", part)
            assert not set(copied) & set(caches)


def test_short_caches_of_several_rows_and_accelerators_have_no_choice():
    assert engine.live_prefixes("cpu", 4, 64) == ()
    assert engine.live_prefixes("gpu", 1, 512) == engine.live_prefixes("tpu", 1, 512) == ()
    assert engine.live_prefixes("cpu", 1, 64) == (0, 64)
    assert engine.live_prefixes("cpu", 4, 128) == (32, 128)


def test_tiny_pairs_stay_below_it():
    """So that most tests compile as little as they can."""
    assert tiny_pairs.POSITIONS < engine.LONG
