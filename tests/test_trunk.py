"""What the trunk promises whatever it is configured to be: families and architectures to come.

Pads change nothing, the future changes nothing, packed texts do not see each other, decoding token
by token equals the whole forward pass, layers may be scanned or not, and depth costs no compile
time. Inputs are made and outputs compared by NumPy: each operation of JAX's would be compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trunks
from trunks import lively

from jax_encdec import EncoderDecoderConfig, EncoderDecoderModel, layers
from jax_encdec.attention import attend, attention_params, keys_values, learned_positions
from jax_encdec.attention_kernels import Visible
from jax_encdec.config import Attention, Dropout, TransformerConfig
from jax_encdec.families import (
    AlbertConfig,
    BartConfig,
    BertConfig,
    GPT2Config,
    ModernBertConfig,
    RobertaConfig,
    T5Config,
)
from jax_encdec.transformer import (
    decode_step,
    init_caches,
    logits,
    transformer,
)
from jax_encdec.trunk_params import transformer_params, unstack

run = jax.jit(
    transformer, static_argnums=0, static_argnames=("output_hidden_states", "output_attentions")
)
positions = jax.jit(learned_positions, static_argnums=(0, 2))
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 37,
}
BERT = BertConfig(**SMALL, intermediate_size=24, max_position_embeddings=40)
ROBERTA = RobertaConfig(**SMALL, intermediate_size=24, max_position_embeddings=40)
GPT2 = GPT2Config(
    vocab_size=37,
    n_embd=16,
    n_layer=2,
    n_head=4,
    n_positions=40,
    scale_attn_by_inverse_layer_idx=True,
)
BART = BartConfig(vocab_size=37, d_model=16, encoder_attention_heads=4, decoder_attention_heads=4)
MODERNBERT = ModernBertConfig(
    **(SMALL | {"num_hidden_layers": 7}), intermediate_size=24, local_attention=4
)
ALBERT = AlbertConfig(
    **(SMALL | {"num_hidden_layers": 4}),
    num_hidden_groups=2,
    embedding_size=8,
    intermediate_size=24,
    max_position_embeddings=40,
)
T5 = T5Config(vocab_size=37, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=4,
              relative_attention_num_buckets=8, relative_attention_max_distance=12)  # fmt: skip
ENCODERS: dict[str, TransformerConfig] = {
    "roberta": ROBERTA.to_trunk("encoder"),
    "modernbert": MODERNBERT.to_trunk("encoder"),
    "t5": T5.replace(feed_forward_proj="gated-gelu").to_trunk("encoder"),
    "albert": ALBERT.to_trunk("encoder"),
}
DECODERS: dict[str, TransformerConfig] = {
    "roberta": ROBERTA.to_trunk("decoder"),
    "gpt2": GPT2.to_trunk("decoder"),
    "t5": replace(T5.to_trunk("decoder"), encoder_hidden=trunks.ENCODER_HIDDEN),
    "llama": trunks.llama(cross=True, qk_norm=True),
    "gemma2": trunks.gemma2(cross=True),
}
ALL = {f"{name}-encoder": t for name, t in ENCODERS.items()} | {
    f"{name}-decoder": t for name, t in DECODERS.items()
}
PAD = 1

encoders = pytest.mark.parametrize("trunk", ENCODERS.values(), ids=ENCODERS)
decoders = pytest.mark.parametrize("trunk", DECODERS.values(), ids=DECODERS)
everyone = pytest.mark.parametrize("trunk", ALL.values(), ids=ALL)


@pytest.fixture(autouse=True)
def _exact():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def params_of(trunk: TransformerConfig) -> Any:
    return lively(trunk, seed=3)


def text(seed: int, *shape: int) -> np.ndarray:
    """Random tokens, none of them a pad."""
    return np.random.default_rng(seed).integers(2, 37, shape).astype(np.int32)


def source(trunk: TransformerConfig, batch: int = 2, length: int = 6) -> dict[str, Any]:
    """Encoder states for a trunk that reads them, the second row one shorter."""
    if not any(a.source == "encoder" for a in trunk.attentions()):
        return {}
    rng = np.random.default_rng(5)
    width = trunk.encoder_hidden or trunk.hidden
    mask = np.ones((batch, length), np.int32)
    mask[1:, -1] = 0
    states = rng.standard_normal((batch, length, width), np.float32)
    return {"encoder_states": states, "encoder_mask": mask}


def close(ours: Any, theirs: Any) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    atol = 1e-5 * max(1.0, float(np.max(np.abs(theirs))))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


def states(trunk: TransformerConfig, ids: Any, **inputs: Any) -> np.ndarray:
    return np.asarray(run(trunk, params_of(trunk), ids, **inputs).last_hidden_state)


# What a position may see -------------------------------------------------------------------------


@everyone
def test_pads_on_the_right_change_nothing(trunk):
    ids, given = text(0, 2, 7), source(trunk)
    bare = states(trunk, ids, **given)
    wide = np.pad(ids, ((0, 0), (0, 4)), constant_values=PAD)
    mask = (np.arange(11) < 7).astype(np.int32)[None].repeat(2, 0)
    close(states(trunk, wide, attention_mask=mask, **given)[:, :7], bare)


@pytest.mark.parametrize("name", ["roberta", "modernbert", "t5"])
def test_pads_on_the_left_change_nothing_where_positions_are_relative_or_skip_pads(name):
    trunk, ids = ENCODERS[name], text(0, 2, 7)
    wide = np.pad(ids, ((0, 0), (4, 0)), constant_values=PAD)
    mask = (np.arange(11) >= 4).astype(np.int32)[None].repeat(2, 0)
    close(states(trunk, wide, attention_mask=mask)[:, 4:], states(trunk, ids))


@decoders
def test_pads_of_the_source_change_nothing(trunk):
    given = source(trunk)
    bare = states(trunk, text(0, 2, 7), **given)
    wide = {k: np.concatenate([v, 0 * v[:, :3]], axis=1) for k, v in given.items()}
    wide["encoder_states"][:, 6:] = 9.0
    close(states(trunk, text(0, 2, 7), **wide), bare)


@everyone
def test_a_later_token_changes_earlier_states_only_where_attention_looks_ahead(trunk):
    ids, given = text(0, 2, 7), source(trunk)
    other = ids.copy()
    other[:, 4] = ids[:, 4] % 30 + 3
    change = np.abs(states(trunk, ids, **given) - states(trunk, other, **given)).max((0, 2))
    assert float(change[4:].min()) > 1e-3
    if trunk.causal:
        assert float(change[:4].max()) < 1e-6
    else:
        assert float(change[:4].min()) > 1e-5


@encoders
def test_packed_texts_are_as_if_alone(trunk):
    lengths, ids = (5, 4), [text(1, 1, 5), text(2, 1, 4)]
    row, segments, places = packed(ids, pads=2)
    together = states(trunk, row, segment_ids=segments, position_ids=places)
    for (start, end), one in zip(spans(lengths), ids, strict=True):
        close(together[:, start:end], states(trunk, one))


@decoders
def test_packed_pairs_are_as_if_alone(trunk):
    lengths, ids = (5, 4), [text(1, 1, 5), text(2, 1, 4)]
    row, segments, places = packed(ids, pads=2)
    given = source(trunk, batch=1, length=7)["encoder_states"]
    together = states(
        trunk,
        row,
        segment_ids=segments,
        position_ids=places,
        encoder_states=given,
        encoder_mask=np.array([[1, 1, 1, 1, 1, 1, 0]], np.int32),
        encoder_segment_ids=np.array([[1, 1, 1, 1, 2, 2, 2]], np.int32),
    )
    for (start, end), one, its in zip(
        spans(lengths), ids, (given[:, :4], given[:, 4:6]), strict=True
    ):
        close(together[:, start:end], states(trunk, one, encoder_states=its))


def packed(ids: list[np.ndarray], pads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Texts `[1, L]` in one row: tokens, segments counted from one, positions from zero."""
    lengths = [x.shape[1] for x in ids]
    row = np.concatenate([*ids, np.full((1, pads), PAD, np.int32)], axis=1)
    segments = np.repeat([*range(1, len(ids) + 1), 0], [*lengths, pads])[None]
    places = np.concatenate([np.arange(n) for n in (*lengths, pads)])[None]
    return row, segments.astype(np.int32), places.astype(np.int32)


def spans(lengths: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    ends = np.cumsum(lengths)
    return zip(ends - lengths, ends, strict=True)


@everyone
def test_a_row_that_hides_everything_stays_finite_and_so_do_its_gradients(trunk):
    mask, given = np.array([[1] * 5, [0] * 5]), source(trunk)
    if given:
        given["encoder_mask"] = np.array([[1] * 6, [0] * 6])

    def loss(params):
        out = transformer(trunk, params, text(0, 2, 5), attention_mask=mask, **given)
        return jnp.sum(jnp.sin(out.last_hidden_state))

    value, grads = jax.jit(jax.value_and_grad(loss))(params_of(trunk))
    assert all(np.isfinite(leaf).all() for leaf in [value, *jax.tree.leaves(grads)])


def test_a_query_that_sees_nothing_averages_all_values():
    config = Attention(heads=4, head_dim=4)
    declared = attention_params(config, 16, 16, 0.5, 0.5)
    params = layers.initialize(declared, jax.random.key(0), jnp.float32)
    x = jax.random.normal(jax.random.key(1), (2, 3, 16))
    kv = keys_values(config, params, x, None)
    mask = jnp.zeros((2, 3, 3), bool).at[0].set(True)
    bias = 5 * jnp.ones((1, 4, 3, 3))
    out, weights = attend(config, params, x, kv, visible=Visible(mask), bias=bias)
    np.testing.assert_allclose(weights[1], 1 / 3, rtol=1e-6)
    assert float(jnp.abs(weights[0] - 1 / 3).max()) > 0.01
    mean = jnp.einsum("ghd,gh->d", params["out"]["kernel"], kv.value[1].mean(axis=1))
    close(out[1], jnp.broadcast_to(mean, (3, 16)))


@everyone
@pytest.mark.parametrize("bad", [-1, 37, 2**31 - 1])
def test_a_token_outside_the_vocabulary_is_nan_and_nobody_elses(trunk, bad):
    ids = text(0, 2, 7)
    ids[1, 2] = bad
    found = states(trunk, ids, **source(trunk))
    assert np.isnan(found[1, 2]).all()
    assert np.isfinite(found[0]).all()


def test_a_position_or_type_outside_its_table_is_nan():
    trunk = BERT.to_trunk("encoder")
    beyond = states(trunk, text(0, 1, 5), position_ids=np.array([[0, 1, 2, 3, 40]]))
    assert np.isnan(beyond[0, 4]).all()
    typed = states(trunk, text(0, 1, 5), token_type_ids=np.array([[0, 1, 0, 1, 2]]))
    assert np.isnan(typed[0, 4]).all()


# Decoding ----------------------------------------------------------------------------------------


@decoders
@pytest.mark.parametrize(("lanes", "shared"), [(1, True), (3, True), (3, False)])
def test_decoding_step_by_step_equals_the_whole_forward_pass(trunk, lanes, shared):
    """Every lane's scores at every step are those of the text on its path through the pool."""
    steps, capacity, batch = 6, 8, 2
    params, given = params_of(trunk), source(trunk)
    rng = np.random.default_rng(lanes)
    width = lanes if shared else 1  # lanes of one pool

    @jax.jit
    def begin(params):
        layers = unstack(trunk, params)
        pools, slots = batch * lanes // width, capacity * width
        caches = init_caches(trunk, layers, given["encoder_states"], pools=pools, slots=slots)
        return layers, caches

    straight, caches = begin(params)
    step = jax.jit(functools.partial(decode_step, trunk, dtype=jnp.float32))

    @jax.jit
    def whole(ids: jax.Array) -> jax.Array:
        every = {name: jnp.repeat(value, lanes, axis=0) for name, value in given.items()}
        return logits(trunk, params, transformer(trunk, params, ids, **every).last_hidden_state)

    history = np.zeros((batch, lanes, steps), np.int32)
    path = np.zeros((batch * lanes // width, width, capacity), np.int32)
    for t in range(steps):
        # Pads among them: tables that skip pads must skip them here, too.
        tokens = rng.integers(PAD, 37 if t % 3 else 4, (batch, lanes)).astype(np.int32)
        if shared:  # beams continue one another; lanes with their own pool only themselves
            parents = rng.integers(0, lanes, (batch, lanes, 1))
            history = np.take_along_axis(history, parents, axis=1)
            path = np.take_along_axis(path, parents, axis=1)
        history[:, :, t], path[:, :, t] = tokens, np.arange(width)
        visible = np.zeros((*path.shape, width), bool)
        np.put_along_axis(visible[:, :, : t + 1], path[:, :, : t + 1, None], True, axis=3)
        places = np.full_like(tokens, t)
        if trunk.embedding.position is not None:
            every = positions(trunk.embedding.position, history.reshape(-1, steps), steps)
            last = np.asarray(every)[:, t]  # Later tokens change no earlier position.
            places = np.broadcast_to(last, batch * lanes).reshape(batch, lanes)
        scores, caches = step(
            straight,
            tokens,
            caches,
            position=np.int32(t),
            token_positions=places,
            visible=visible.reshape(*path.shape[:2], -1),
            encoder_mask=given["encoder_mask"],
        )
        expected = np.asarray(whole(history.reshape(-1, steps)))[:, t]
        close(np.asarray(scores).reshape(batch * lanes, -1), expected)


# Layers, scanned or not --------------------------------------------------------------------------


@everyone
def test_scanned_layers_equal_unstacked_layers_with_dropout_and_all_that_is_let_out(trunk):
    trunk = replace(
        trunk, dropout=Dropout(embedding=0.1, residual=0.2, attention=0.1, activation=0.3)
    )
    more = {
        "dropout_key": jax.random.key(7),
        "output_hidden_states": True,
        "output_attentions": True,
        **source(trunk),
    }
    stacked = params_of(trunk)
    unstacked = jax.jit(unstack, static_argnums=0)(trunk, stacked)
    scanned = run(trunk, stacked, text(0, 2, 5), **more)
    straight = run(trunk, unstacked, text(0, 2, 5), **more)
    assert jax.tree.structure(scanned) == jax.tree.structure(straight)
    for ours, theirs in zip(jax.tree.leaves(scanned), jax.tree.leaves(straight), strict=True):
        close(ours, theirs)
    assert scanned.hidden_states is not None
    assert scanned.attentions is not None
    assert len(scanned.hidden_states) == trunk.layers + 1
    assert len(scanned.attentions) == trunk.layers
    close(scanned.hidden_states[-1], scanned.last_hidden_state)
    weights = np.asarray(scanned.attentions[0])
    close(weights.sum(-1), np.ones(weights.shape[:-1]))


def deeper(trunk: TransformerConfig, repeat: int) -> TransformerConfig:
    return replace(trunk, segments=tuple(replace(s, repeat=repeat) for s in trunk.segments))


def equations(jaxpr: Any) -> int:
    """Number of equations, those of inner functions included."""
    inner = [j for e in jaxpr.eqns for v in e.params.values() for j in subjaxprs(v)]
    return len(jaxpr.eqns) + sum(equations(j) for j in inner)


def subjaxprs(value: Any) -> list[Any]:
    if isinstance(value, tuple | list):
        return [j for v in value for j in subjaxprs(v)]
    jaxpr = getattr(value, "jaxpr", value)
    return [jaxpr] if hasattr(jaxpr, "eqns") else []


@everyone
def test_depth_costs_no_compile_time(trunk):
    def program(repeat: int) -> int:
        deep = deeper(trunk, repeat)

        def loss(params):
            return transformer(deep, params, text(0, 2, 5), **source(deep)).last_hidden_state.sum()

        shapes = layers.abstract(transformer_params(deep), jnp.float32)
        return equations(jax.make_jaxpr(jax.grad(loss))(shapes).jaxpr)

    assert program(2) == program(12) > 100


@everyone
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_states_are_of_the_dtype_asked_for_and_logits_of_float32(trunk, dtype):
    def both(params):
        out = transformer(trunk, params, text(0, 2, 5), dtype=dtype, **source(trunk))
        return out.last_hidden_state, trunk.head and logits(trunk, params, out.last_hidden_state)

    found, scores = jax.eval_shape(both, params_of(trunk))
    assert found.dtype == dtype
    assert scores is None or scores.dtype == jnp.float32


@pytest.mark.parametrize("name", ["t5", "roberta"])
def test_parameters_may_be_numpy_arrays(name):
    """As read from a file; outside of any jit, or constants of one."""
    trunk, params = DECODERS[name], params_of(DECODERS[name])
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    ids, given = text(0, 2, 7), source(trunk)
    close(transformer(trunk, params, ids, **given).last_hidden_state, states(trunk, ids, **given))
    constant = jax.jit(lambda ids: transformer(trunk, params, ids, **given).last_hidden_state)
    close(constant(ids), states(trunk, ids, **given))


# Dropout -----------------------------------------------------------------------------------------


def test_dropout_keeps_the_mean_and_drops_the_stated_share():
    x = jnp.linspace(1.0, 2.0, 50_000)
    for rate in (0.1, 0.5, 0.9):
        y = layers.dropout(x, rate, jax.random.key(0))
        assert abs(float((y == 0).mean()) - rate) < 0.01
        assert abs(float(y.mean() / x.mean()) - 1) < 0.03
        np.testing.assert_allclose(y[y != 0], (x / (1 - rate))[y != 0], rtol=1e-6)


@pytest.mark.parametrize("place", ["embedding", "residual", "attention", "activation"])
@pytest.mark.parametrize("name", ["roberta", "gemma2"])
def test_dropout_acts_in_each_place_by_key_alone(name, place):
    calm = DECODERS[name]
    wild = replace(calm, dropout=Dropout(**{place: 0.4}))
    ids, given, params = text(0, 2, 5), source(calm), params_of(calm)

    def found(trunk: TransformerConfig, key: int | None) -> np.ndarray:
        rng = None if key is None else jax.random.key(key)
        return np.asarray(run(trunk, params, ids, dropout_key=rng, **given).last_hidden_state)

    still = replace(calm, dropout=Dropout())
    np.testing.assert_array_equal(found(wild, None), found(still, 3))
    np.testing.assert_array_equal(found(wild, 3), found(wild, 3))
    assert np.abs(found(wild, 3) - found(still, 3)).max() > 0.01
    assert np.abs(found(wild, 3) - found(wild, 4)).max() > 0.01


def test_every_sublayer_and_layer_draws_its_own_dropout():
    """Seen where branches put out nothing but a bias: each residual mask is laid bare."""
    trunk = replace(GPT2.to_trunk("encoder"), final_norm=None, dropout=Dropout(residual=0.5))
    params = jax.tree.map(np.zeros_like, params_of(trunk))
    block = params["segment_0"]["block_0"]
    block["self_attention"]["out"]["bias"] += 1
    block["mlp"]["down"]["bias"] += 10
    key = jax.random.key(0)
    out = run(trunk, params, text(0, 1, 8), dropout_key=key, output_hidden_states=True)
    _, first, both = (np.asarray(x) for x in out.hidden_states)
    assert set(np.unique(first)) == {0.0, 2.0, 20.0, 22.0}
    assert np.mean(both - first == first) < 0.5


# Declarations ------------------------------------------------------------------------------------


def is_axes(x: Any) -> bool:
    return isinstance(x, tuple)


@everyone
def test_values_shapes_and_axes_have_one_structure(trunk):
    declared = transformer_params(trunk)
    values = layers.initialize(declared, jax.random.key(0), jnp.bfloat16)
    shapes = layers.abstract(declared, jnp.bfloat16)
    axes = layers.logical_axes(declared)
    assert jax.tree.structure(values) == jax.tree.structure(shapes)
    assert jax.tree.structure(values) == jax.tree.structure(axes, is_leaf=is_axes)
    same = jax.tree.map(lambda v, s: (v.shape, v.dtype) == (s.shape, s.dtype), values, shapes)
    assert all(jax.tree.leaves(same))
    assert layers.count(declared) == layers.count(values)


@pytest.mark.parametrize("decoder", [BERT, GPT2, BART], ids=["bert", "gpt2", "bart"])
@pytest.mark.parametrize("encoder", [BERT, ROBERTA], ids=["bert", "roberta"])
def test_every_dimension_of_a_pairs_parameters_has_a_name_of_its_own(encoder, decoder):
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    model = EncoderDecoderModel(config)
    shapes, axes = jax.tree.leaves(model.param_shapes()), model.param_axes()
    for shape, names in zip(shapes, jax.tree.leaves(axes, is_leaf=is_axes), strict=True):
        assert len(names) == len(shape.shape)
        named = [name for name in names if name is not None]
        assert len(set(named)) == len(named)  # one mesh axis cannot shard two dimensions


def test_initial_values_have_the_configured_spread():
    config = replace(GPT2, n_embd=64, n_layer=8, initializer_range=0.05)
    trunk = config.to_trunk("decoder")
    params = layers.initialize(transformer_params(trunk), jax.random.key(0), jnp.float32)
    residual = 0.05 / np.sqrt(2 * 8)
    block = params["segment_0"]["block_0"]
    expected = {"query": 0.05, "key": 0.05, "value": 0.05, "out": residual}
    for name in ("self_attention", "cross_attention"):
        for part, std in expected.items():
            assert abs(float(block[name][part]["kernel"].std()) / std - 1) < 0.05
            assert not block[name][part]["bias"].any()
        np.testing.assert_array_equal(block[name]["norm_before"]["scale"], 1.0)
    assert abs(float(block["mlp"]["up"]["kernel"].std()) / 0.05 - 1) < 0.05
    assert abs(float(block["mlp"]["down"]["kernel"].std()) / residual - 1) < 0.05
    assert abs(float(params["embedding"]["token"].std()) / 0.05 - 1) < 0.05
    kernels = block["self_attention"]["query"]["kernel"]
    assert np.abs(np.corrcoef(kernels.reshape(8, -1)) - np.eye(8)).max() < 0.1
    assert float(jnp.abs(kernels - block["self_attention"]["key"]["kernel"]).max()) > 0.05


def test_a_scale_kept_as_a_difference_from_one_starts_at_zero():
    params = layers.initialize(transformer_params(trunks.gemma2()), jax.random.key(0), jnp.float32)
    assert not params["final_norm"]["scale"].any()
    x = jax.random.normal(jax.random.key(1), (3, 16))
    rule = trunks.gemma2().final_norm
    assert rule is not None
    y = layers.norm(rule, params["final_norm"], x)
    np.testing.assert_allclose(jnp.square(y).mean(-1), 1.0, rtol=1e-4)
