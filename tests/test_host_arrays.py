"""Parameters in the layout of inference: made by threads or read from a file, the same numbers."""

from __future__ import annotations

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_encdec import EncoderDecoderModel, T5Config
from jax_encdec.convert.tensor_source import aligned
from jax_encdec.encoder_decoder_config import EncoderDecoderConfig
from jax_encdec.errors import InputError
from jax_encdec.host_arrays import HostArray, arrange, land
from jax_encdec.pretrained import load

KINDS = ("bert2bert", "bert2gpt2", "bart", "tied", "t5")
LAYOUTS = ((1, None), (4, None), (32, None), (None, "bfloat16"), (4, "bfloat16"))


def pair(kind: str):
    if kind != "t5":
        model, params = tiny_pairs.pair(kind)
        return model, jax.tree.map(jnp.asarray, params)
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    part = T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3,
        num_heads=4, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **ids,
    )  # fmt: skip
    model = EncoderDecoderModel(EncoderDecoderConfig(encoder=part, decoder=part, whole=True, **ids))
    return model, model.init_params(jax.random.key(0))


def identical(got, expected) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_threads_make_what_a_compiled_program_makes(kind):
    model, params = pair(kind)
    for rows, precision in LAYOUTS:
        compiled = jax.jit(lambda p, r=rows, c=precision: model.prepare(p, rows=r, precision=c))
        identical(model.prepare(params, rows=rows, precision=precision), compiled(params))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_read_from_a_file_is_what_is_made_of_its_parameters(kind, dtype, tmp_path):
    model, params = pair(kind)
    model.save_pretrained(tmp_path, params, max_shard_bytes=50_000)
    model, params = EncoderDecoderModel.from_pretrained(tmp_path, dtype=dtype)
    for rows, precision in LAYOUTS:
        options = {"rows": rows, "precision": precision}
        again, read = EncoderDecoderModel.from_pretrained(tmp_path, dtype=dtype, **options)
        assert again == model
        identical(read, model.prepare(params, **options))


def test_generation_from_a_file_s_layout_is_generation_from_its_parameters(tmp_path):
    model, params = pair("bert2bert")
    model.save_pretrained(tmp_path, params)
    ids = np.random.default_rng(0).integers(5, 150, (2, 9))
    expected = model.generate(params, ids, num_beams=3, max_new_tokens=8).sequences
    _, read = EncoderDecoderModel.from_pretrained(tmp_path, rows=6)
    found = model.generate(read, ids, num_beams=3, max_new_tokens=8).sequences
    np.testing.assert_array_equal(found, expected)


def test_a_file_is_never_in_memory_twice(tmp_path):
    """Loading and preparing one after the other would hold both forms."""
    config = tiny_pairs.config()
    wide = tiny_pairs.bert(hidden_size=256, intermediate_size=1024, num_hidden_layers=4)
    model = EncoderDecoderModel(config.replace(encoder=wide, decoder=wide))
    model.save_pretrained(tmp_path, model.init_params(jax.random.key(0)))
    EncoderDecoderModel.from_pretrained(tmp_path, rows=4)  # what happens only once
    tracemalloc.start()
    _, prepared = EncoderDecoderModel.from_pretrained(tmp_path, rows=4)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    made = sum(leaf.nbytes for leaf in jax.tree.leaves(prepared))
    assert made > 20_000_000
    assert peak < 1.4 * made


def test_rows_and_shardings_are_refused_together(tmp_path):
    model, params = pair("bert2bert")
    model.save_pretrained(tmp_path, params)
    with pytest.raises(InputError, match="leave them out, or shardings"):
        load(tmp_path, rows=4, shardings=lambda model: {})
    with pytest.raises(InputError, match="rows must be a positive number"):
        EncoderDecoderModel.from_pretrained(tmp_path, rows=-1)


def test_parameters_may_change_hands_after_they_were_prepared():
    """Donated or deleted, they take nothing from what was made of them."""
    model, params = pair("bert2bert")
    prepared = model.prepare(params, rows=4)
    kept = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
    made = [x for x in jax.tree.leaves(prepared) if x.unsafe_buffer_pointer() not in kept]
    before = [np.array(x) for x in made]
    jax.block_until_ready(
        jax.jit(lambda p: jax.tree.map(jnp.zeros_like, p), donate_argnums=0)(params)
    )
    for a, b in zip(made, before, strict=True):
        np.testing.assert_array_equal(a, b)


@given(
    shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "int8", "bool"]),
)
@settings(max_examples=50, deadline=None)
def test_any_array_lands_as_it_is(shape, dtype):
    values = np.arange(np.prod(shape)).reshape(shape).astype(jnp.dtype(dtype))
    assert not values.size or aligned(shape, values.dtype).ctypes.data % 64 == 0
    recipe = HostArray.of(values)
    back = arrange(lambda xp, a, b: xp.concatenate([xp.ravel(a), xp.ravel(b)]), recipe, recipe.T)
    tree = land({"a": recipe, "b": [recipe, back], "c": 3})
    assert tree["a"] is tree["b"][0]  # one recipe, one array
    assert tree["c"] == 3
    np.testing.assert_array_equal(tree["a"], values)
    np.testing.assert_array_equal(tree["b"][1], np.concatenate([values.ravel(), values.T.ravel()]))


def test_what_goes_wrong_in_a_thread_is_raised():
    def read():
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        land([HostArray(read)])
