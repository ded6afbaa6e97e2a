"""The layout of inference changes no token, is made once per parameters, and compiles little."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pairs
import trunks

from jax_encdec import EncoderDecoderModel
from jax_encdec.decoding import engine
from jax_encdec.decoding.arguments import Inputs, settings_of
from jax_encdec.decoding.layout import LastPrepared, Layout, _decoder, prepare_params
from jax_encdec.decoding.programs import compiled_programs, warmup
from jax_encdec.dense_kernels import TILE, Kernel
from jax_encdec.errors import InputError
from jax_encdec.tokenization import LADDER
from jax_encdec.transformer import decode_step, init_caches
from jax_encdec.trunk_params import unstack

LAYOUTS = [
    Layout(rows=rows, platform=platform)
    for platform, rows in (("cpu", "one"), ("cpu", "few"), ("cpu", "many"), ("gpu", "many"))
]


@functools.cache
def pair(kind: str = "bert2bert"):
    model, params = tiny_pairs.pair(kind)
    return model, jax.tree.map(jnp.asarray, params)


def source(model, rows: int, length: int = 9):
    rng = np.random.default_rng(rows)
    ids = rng.integers(5, 150, (rows, length)).astype(np.int32)
    mask = (np.arange(length) < rng.integers(3, length + 1, (rows, 1))).astype(np.int32)
    return {"input_ids": ids, "attention_mask": mask}


def same(a, b) -> None:
    length = min(a.sequences.shape[1], b.sequences.shape[1])
    np.testing.assert_array_equal(a.lengths, b.lengths)
    np.testing.assert_array_equal(a.sequences[:, :length], b.sequences[:, :length])
    np.testing.assert_allclose(a.sequences_scores, b.sequences_scores, rtol=2e-4, atol=2e-4)


# The same results ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "rows", "beams"),
    [("bert2bert", 1, 1), ("bert2bert", 3, 4), ("bert2gpt2", 2, 3), ("bart", 1, 1), ("tied", 2, 1)],
)
def test_prepared_parameters_generate_what_the_parameters_do(kind, rows, beams):
    """Prepared for these rows by the call itself, for others beforehand, and not at all."""
    model, params = pair(kind)
    given, options = source(model, rows), {"num_beams": beams, "max_new_tokens": 8}
    by_itself = model.generate(params, **given, **options)
    for meant_for in (1, 4):
        prepared = model.prepare(params, rows=meant_for)
        same(by_itself, model.generate(prepared, **given, **options))
    plain = jax.jit(lambda p: model.generate(p, **given, **options))(params)  # nothing prepared
    same(by_itself, plain)


def test_preparing_is_a_pure_function_for_jit_and_its_result_an_argument_of_jit_and_vmap():
    model, params = pair()
    given, options = source(model, 2), {"max_new_tokens": 6, "num_beams": 2}
    expected = model.generate(params, **given, **options)
    prepared = jax.jit(lambda p: model.prepare(p, rows=4))(params)
    same(expected, jax.jit(lambda p: model.generate(p, **given, **options))(prepared))
    one = jax.vmap(
        lambda ids, mask: model.generate(prepared, ids[None], attention_mask=mask[None], **options)
    )(jnp.asarray(given["input_ids"]), jnp.asarray(given["attention_mask"]))
    np.testing.assert_array_equal(one.lengths[:, 0], expected.lengths)
    width = expected.sequences.shape[1]
    np.testing.assert_array_equal(one.sequences[:, 0, :width], expected.sequences)


TRUNKS = {
    "grouped queries, rotary, gated": trunks.llama(cross=True),
    "norms of queries and keys, biases": trunks.llama(cross=True, qk_norm=True, bias=True),
    "windows, capped scores, three norms": trunks.gemma2(cross=True),
    "shared layers": replace(
        trunks.llama(cross=True),
        segments=(replace(trunks.llama(cross=True).segments[0], share=True),),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", TRUNKS)
def test_a_step_of_every_kind_of_trunk_is_the_same_in_every_layout(name, layout):
    trunk, params, expected = TRUNKS[name], *stepped(name)
    got = steps(trunk, _decoder(trunk, params, layout))
    close = 2e-5 * max(1.0, float(jnp.abs(expected).max()))
    np.testing.assert_allclose(got, expected, atol=close, rtol=1e-4)


@functools.cache
def stepped(name: str):
    """Parameters as they are declared, and what three steps make of them."""
    trunk = TRUNKS[name]
    params = jax.tree.map(jnp.asarray, trunks.lively(trunk, 0))
    return params, steps(trunk, params)


def steps(trunk, params):
    """The logits of three steps of two sources' three lanes."""
    states = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, trunks.ENCODER_HIDDEN)))

    def logits(tree):
        tree = unstack(trunk, tree)
        caches = init_caches(trunk, tree, states.astype(jnp.float32), pools=2, slots=4 * 3)
        scores = []
        for t in range(3):
            visible = np.zeros((2, 3, 4, 3), bool)
            visible[:, np.arange(3), : t + 1, np.arange(3)] = True
            tokens = jnp.full((2, 3), 4 + t, jnp.int32) + jnp.arange(3)
            out, caches = decode_step(
                trunk, tree, tokens, caches, position=jnp.int32(t),
                token_positions=jnp.full((2, 3), t), visible=jnp.asarray(visible.reshape(2, 3, 12)),
                encoder_mask=None, dtype=jnp.float32,
            )  # fmt: skip
            scores.append(out)
        return jnp.stack(scores)

    return jax.jit(logits)(params)


def test_layers_that_share_weights_share_what_was_prepared():
    trunk = TRUNKS["shared layers"]
    params = jax.tree.map(jnp.asarray, trunks.lively(trunk, 0))
    prepared = _decoder(trunk, params, Layout(rows="few"))
    assert trunk.segments[0].repeat > 1
    for leaves in (params, prepared):
        assert isinstance(leaves["segment_0"], dict)  # one layer's, not a tuple of layers
    assert prepared["segment_0"].keys() == params["segment_0"].keys()


@pytest.mark.parametrize("order", ["in_out", "out_in", "tiles"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_a_kernel_multiplies_as_the_matrices_it_was_made_of(order, rows, dtype):
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((2, rows, 2, 5), np.float32) if rows > 1 else np.ones((1, 2, 5), "f4")
    parts = [rng.standard_normal((2, 5, *out), np.float32) for out in ((3, 4), (TILE + 1,))]
    bias = rng.standard_normal(12 + TILE + 1).astype(np.float32)
    kernel = Kernel.of([jnp.asarray(part) for part in parts], 2, order, dtype)
    got = kernel.product(jnp.asarray(x), jnp.asarray(bias))
    biases = bias[:12].reshape(3, 4), bias[12:]
    for y, part, own in zip(got, parts, biases, strict=True):
        expected = np.tensordot(x, part, 2) + own
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(y, expected, atol=1e-5 if dtype is None else 0.1)


def dtypes_of(prepared) -> tuple[set[str], str]:
    """Of a block's weights and of the logits'."""
    decoder = prepared.tree["decoder"]
    logits = decoder["head"].get("logits", decoder["embedding"]["token"])
    block = {str(leaf.dtype) for leaf in jax.tree.leaves(decoder["segment_0"])}
    return block, str(jax.tree.leaves(logits)[0].dtype)


def test_bfloat16_weights_sum_in_float32_where_that_is_faster():
    """On a CPU one row keeps float32, few do but for the head; norms and biases keep theirs."""
    model, params = pair()
    given = source(model, 2)
    exact = model.generate(params, **given, num_beams=2, max_new_tokens=1)
    mixed = {"bfloat16", "float32"}
    for rows, expected in ((1, ({"float32"}, "float32")), (4, ({"float32"}, "bfloat16")),
                           (9, (mixed, "bfloat16")), (100, (mixed, "bfloat16"))):  # fmt: skip
        low = model.prepare(params, rows=rows, precision="bfloat16", platform="cpu")
        assert dtypes_of(low) == expected
        assert {str(x.dtype) for x in jax.tree.leaves(low.tree["encoder"])} == {"float32"}
        rough = model.generate(low, **given, num_beams=2, max_new_tokens=1)
        np.testing.assert_allclose(rough.sequences_scores, exact.sequences_scores, atol=0.5)
    low = model.prepare(params, rows=1, precision="bfloat16", platform="tpu")
    assert dtypes_of(low) == (mixed, "bfloat16")
    assert "bfloat16" in {str(x.dtype) for x in jax.tree.leaves(low.tree["encoder"])}


def test_float32_tiles_are_for_2_to_16_rows():
    model, params = pair()
    for rows, expected in ((1, False), (2, True), (16, True), (17, False), (None, False)):
        prepared = model.prepare(params, rows=rows, platform="cpu")
        kernels = jax.tree.leaves(prepared.tree["decoder"], is_leaf=lambda x: isinstance(x, Kernel))
        assert any(isinstance(k, Kernel) and k.order == "tiles" for k in kernels) == expected


# Made once ---------------------------------------------------------------------------------------


def test_what_needs_no_other_layout_is_the_same_array():
    model, params = pair()
    last = LastPrepared()
    prepared = last.get(model.config, params, Layout(rows="few"))
    for own, kept in zip(
        jax.tree.leaves(params["encoder"]), jax.tree.leaves(prepared.tree["encoder"]), strict=True
    ):
        assert own.unsafe_buffer_pointer() == kept.unsafe_buffer_pointer()
    token = prepared.tree["decoder"]["embedding"]["token"]
    assert (
        token.unsafe_buffer_pointer()
        == params["decoder"]["embedding"]["token"].unsafe_buffer_pointer()
    )


def test_the_layout_is_kept_for_the_same_arrays_only_and_not_longer_than_they():
    model, params = pair()
    last, layout = LastPrepared(), Layout(rows="few")
    first = last.get(model.config, params, layout)
    assert last.get(model.config, dict(params), layout) is first  # the same arrays in another dict
    assert last.get(model.config, params, Layout(rows="one")) is not first
    changed = jax.tree.map(lambda x: x + 1, params)
    other = last.get(model.config, changed, layout)
    assert other is not first
    del changed
    assert last._entry is None  # what it was made of is gone
    numpy = jax.tree.map(np.array, params)
    last.get(model.config, numpy, layout)
    assert last._entry is None  # these could change unseen


def test_changed_parameters_change_what_is_generated():
    model, params = pair()
    given = source(model, 3)
    before = model.generate(params, **given, max_new_tokens=8)
    other = jax.tree.map(lambda x: -x, params)
    fresh = EncoderDecoderModel(model.config, model.generation_config)
    expected = jax.jit(lambda p: fresh.generate(p, **given, max_new_tokens=8))(other)
    same(model.generate(other, **given, max_new_tokens=8), expected)
    same(model.generate(params, **given, max_new_tokens=8), before)


def test_mistakes_are_named():
    model, params = pair()
    other, _ = pair("bert2gpt2")
    prepared = model.prepare(params)
    with pytest.raises(InputError, match="prepared for another model"):
        other.generate(prepared, **source(model, 1))
    with pytest.raises(InputError, match="prepared already"):
        model.prepare(prepared)
    with pytest.raises(InputError, match=r"precision must be .* 'bfloat17'.*bfloat16"):
        model.prepare(params, precision="bfloat17")
    with pytest.raises(InputError, match="rows must be a positive number"):
        model.prepare(params, rows=0)
    with pytest.raises(InputError, match="params do not fit the model"):
        prepare_params(other.config, params)
    with pytest.raises(InputError, match="pairs"):
        warmup(model, params, [(0, 3)])


# Programs ----------------------------------------------------------------------------------------


def test_texts_of_any_length_compile_at_most_as_many_programs_as_the_ladder_has_rungs():
    model, params = pair()
    before = len(compiled_programs())
    for length in range(1, tiny_pairs.POSITIONS + 1):
        model.generate(params, np.full((2, length), 7), max_new_tokens=3 + length % 5)
    added = compiled_programs()[before:]
    rungs = [rung for rung in LADDER if rung < tiny_pairs.POSITIONS]
    assert len(added) <= len(rungs) + 1
    assert len(set(added)) == len(added)


def test_warmed_up_programs_are_the_ones_that_generate_uses():
    model, params = pair()
    options = {"num_beams": 3, "max_new_tokens": 20}
    (made,) = warmup(model, params, [(5, 11), (5, 13)], **options)  # of one rung
    assert made[:4] == (5, 16, 32, 3)
    before = engine._generate._cache_size()
    model.generate(params, np.full((5, 12), 9), num_beams=3, max_new_tokens=18)
    assert compiled_programs()[-1] == made
    assert engine._generate._cache_size() == before
    assert warmup(model, params, [(5, 16)], **options) == ()


def test_no_step_copies_a_cache():
    """The loop's program writes keys and values in place, in the layout that products read."""
    model, params = pair()
    settings, _ = settings_of(model, None, {"num_beams": 3, "max_new_tokens": 30})
    asked, _, _ = engine.request(model, params, settings, Inputs(**source(model, 2)))
    text = engine._generate.lower(*asked).compile().as_text()
    slots = asked.spec.capacity * 3
    heads, size = 4, 4
    caches = (f"f32[2,{heads},{size},{slots}]", f"f32[2,{heads},{slots},{size}]")
    assert all(cache in text for cache in caches)
    loop = re.findall(r"= (f32\[[\d,]+\])\S* (copy|transpose)\(.*while/body", text)
    assert not [shape for shape, _ in loop if shape in caches]
