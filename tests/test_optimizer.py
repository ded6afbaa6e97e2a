"""The optimizer: optax's and PyTorch's arithmetic on each published tensor, one rate per group."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_pairs
from flax.traverse_util import unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_encdec import BertConfig, EncoderDecoderConfig, EncoderDecoderModel, GPT2Config
from jax_encdec.errors import ConfigError, EncDecError, InputError
from jax_encdec.layers import flatten
from jax_encdec.pair_params import model_params
from jax_encdec.training import presets, schedules, updates
from jax_encdec.training.optimizer import Group, OptimizerConfig, make_optimizer
from jax_encdec.training.optimizer_config import SCHEDULES

CROSS = "decoder/*/cross_attention"
MLP = "encoder/*/mlp"


@functools.cache
def model(kind: str = "bert2gpt2") -> EncoderDecoderModel:
    return EncoderDecoderModel(tiny_pairs.config(kind))


@functools.cache
def stacked() -> EncoderDecoderModel:
    """Two layers a side, and matrices long enough for Adafactor to factor some of them."""
    bert = BertConfig(
        vocab_size=150, hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=160, max_position_embeddings=16,
    )  # fmt: skip
    gpt2 = GPT2Config(vocab_size=130, n_embd=64, n_layer=2, n_head=4, n_inner=128, n_positions=8)
    return EncoderDecoderModel(EncoderDecoderConfig(encoder=bert, decoder=gpt2))


def tree(model: EncoderDecoderModel, seed: int, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    flat = flatten(model.param_shapes())
    return unflatten_dict(
        {p: scale * rng.standard_normal(x.shape, np.float32) for p, x in flat.items()}
    )


def run(optimizer, params, gradients):
    """Parameters after one update per gradient, and the state."""
    step = jax.jit(optimizer.apply)
    state = optimizer.init(params)
    for gradient in gradients:
        params, state = step(gradient, state, params)
    return params, state


REST = Group(pattern="decoder, enc_to_dec_proj", frozen_steps=-1)
"""One side shows it all, in half the time."""


def published(params) -> dict[str, np.ndarray]:
    """One array per published tensor: layers apart, heads and head_dim as one dimension."""
    out = {}
    for path, param in flatten(model_params(stacked().config)).items():
        if not param.trained or path[0] != "encoder":
            continue
        x = np.asarray(flatten(params)[path])
        layers = x if param.axes[0] == "layers" else x[None]
        for i, layer in enumerate(layers):
            axes = param.axes[param.axes[0] == "layers" :]
            shape: list[int] = []
            for axis, size in zip(axes, layer.shape, strict=True):
                if axis == "head_dim" and len(axes) > 1:
                    shape[-1] *= size
                else:
                    shape.append(size)
            out["/".join((*path, str(i)))] = layer.reshape(shape)
    return out


def close(a, b, tolerance: float = 2e-6):
    for name in a:
        scale = max(1e-6, float(np.abs(b[name]).max()))
        np.testing.assert_allclose(
            np.asarray(a[name]), b[name], atol=tolerance * scale, rtol=0, err_msg=name
        )


# Against optax and PyTorch, on the published tensors ----------------------------------------------

RATE, DECAY, CLIP = 0.01, 0.1, 30.0


def oracle(name: str, shapes: dict[str, np.ndarray]) -> optax.GradientTransformation:
    decay = {key: x.ndim > 1 for key, x in shapes.items()}
    schedule = optax.linear_schedule(RATE, 0.0, 10)
    scale = {
        "adamw": (optax.scale_by_adam(0.9, 0.99, 1e-6),),
        "lion": (optax.scale_by_lion(0.9, 0.99),),
        "adafactor": (
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
        ),
    }[name]
    return optax.chain(
        optax.clip_by_global_norm(CLIP),
        *scale,
        optax.add_decayed_weights(DECAY, mask=decay),
        optax.scale_by_learning_rate(schedule),
    )


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_updates_are_optax_s_on_each_published_tensor(name):
    more = {"b1": 0.9, "b2": 0.99, "eps": 1e-6} if name == "adamw" else {}
    config = OptimizerConfig(
        name=name,
        learning_rate=RATE,
        schedule="linear",
        weight_decay=DECAY,
        clip_norm=CLIP,
        groups=(REST,),
        **more,
    )
    optimizer = make_optimizer(config, stacked(), 10)
    params, gradients = tree(stacked(), 0, 0.1), [tree(stacked(), i, 0.3) for i in (1, 2, 3)]
    if name == "adafactor":
        state = flatten(optimizer.declare()["row"])
        assert len(state) >= 4, "nothing is factored"
    want = published(params)
    transform = oracle(name, want)
    state, step = transform.init(want), jax.jit(transform.update)
    for gradient in gradients:
        change, state = step(published(gradient), state, want)
        want = {key: np.asarray(want[key] + change[key]) for key in want}
    got, _ = run(optimizer, params, gradients)
    close(published(got), want)


def test_adamw_is_pytorch_s():
    torch = pytest.importorskip("torch")
    config = OptimizerConfig(
        learning_rate=RATE, schedule="constant", weight_decay=DECAY, clip_norm=1.0,
        groups=(Group(pattern=MLP, learning_rate=2 * RATE, weight_decay=0.0), REST),
    )  # fmt: skip
    optimizer = make_optimizer(config, stacked(), 10)
    params, gradients = tree(stacked(), 0, 0.1), [tree(stacked(), i) for i in range(1, 6)]
    tensors = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in published(params).items()}

    def options(name, tensor):
        mlp = "/mlp/" in name
        decay = DECAY if tensor.ndim > 1 and not mlp else 0.0
        return {"params": [tensor], "lr": RATE * (1 + mlp), "weight_decay": decay}

    adamw = torch.optim.AdamW([options(*item) for item in tensors.items()])
    for gradient in gradients:
        for name, x in published(gradient).items():
            tensors[name].grad = torch.tensor(x)
        torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0)
        adamw.step()
    got, _ = run(optimizer, params, gradients)
    close(published(got), {n: t.detach().numpy() for n, t in tensors.items()}, 1e-5)


def test_the_optax_interface_gives_the_same_update():
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.1), model(), 10)
    params, gradient = tree(model(), 0), tree(model(), 1)
    change, state = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    want, other = run(optimizer, params, [gradient])
    close(flatten(optax.apply_updates(params, change)), flatten(want), 1e-6)
    assert jax.tree.structure(state) == jax.tree.structure(other)


def test_parameters_keep_their_dtype_and_moments_are_float32():
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree(model(), 0))
    optimizer = make_optimizer(OptimizerConfig(), model(), 10)
    params, state = run(optimizer, half, [half])
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(state["mu"])} == {jnp.dtype("float32")}


def test_the_state_is_declared_with_axes():
    optimizer = make_optimizer(OptimizerConfig(name="adafactor"), stacked(), 10)
    declared, state = (
        flatten(optimizer.declare()),
        flatten(optimizer.init(stacked().param_shapes())),
    )
    assert {p: x.shape for p, x in declared.items()} == {p: x.shape for p, x in state.items()}
    assert all(len(x.axes) == len(x.shape) for x in declared.values())
    query = ("encoder", "segment_0", "block_0", "self_attention", "query", "kernel")
    axes = {declared[(part, *query)].axes for part in ("row", "column")}
    assert axes == {("layers", "embed"), ("layers", "heads", "head_dim")}


# Decay --------------------------------------------------------------------------------------------


def test_decay_spares_biases_and_norms_whatever_their_rank():
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.1), stacked(), 10)
    for row in optimizer.describe():
        spared = row.path.endswith(("bias", "scale")) or not row.trained
        assert row.decays != spared, row


def test_tables_of_relative_positions_do_not_decay():
    from jax_encdec import T5Config

    t5 = T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    pair = EncoderDecoderModel(EncoderDecoderConfig(encoder=t5, decoder=t5, whole=True))
    rows = {
        r.path: r.decays
        for r in make_optimizer(OptimizerConfig(weight_decay=1.0), pair, 1).describe()
    }
    assert not rows["encoder/bucket_bias"]
    assert rows["encoder/embedding/token"]


# Groups -------------------------------------------------------------------------------------------


def test_groups_have_rates_of_their_own():
    config = OptimizerConfig(
        learning_rate=1e-3, schedule="linear", warmup_steps=10,
        groups=(
            Group(pattern=CROSS, name="cross", factor=3.0),
            Group(pattern="encoder/*", learning_rate=1e-4, warmup_steps=0, schedule="constant"),
        ),
    )  # fmt: skip
    optimizer = make_optimizer(config, model(), 110)
    assert optimizer.rates(5) == pytest.approx(
        {"cross": 1.5e-3, "encoder/*": 1e-4, "default": 5e-4}, rel=1e-6
    )
    assert optimizer.rates(60) == pytest.approx(
        {"cross": 1.5e-3, "encoder/*": 1e-4, "default": 5e-4}, rel=1e-6
    )
    groups = {row.path: row.group for row in optimizer.describe()}
    assert groups["decoder/segment_0/block_0/cross_attention/query/kernel"] == "cross"
    assert groups["encoder/embedding/token"] == "encoder/*"
    assert groups["decoder/embedding/token"] == "default"
    assert groups["encoder/kept/pooler_kernel"] == ""


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_a_frozen_group_waits_and_then_starts_as_if_new(name):
    """Frozen for 2 steps, then as if the run had begun there, for exactly those leaves."""
    groups = (Group(pattern="encoder", frozen_steps=2, warmup_steps=2),)
    config = OptimizerConfig(name=name, learning_rate=RATE, clip_norm=0.0, groups=groups)
    params, gradients = tree(model(), 0), [tree(model(), i) for i in range(1, 6)]
    late, _ = run(make_optimizer(config, model(), 8), params, gradients)
    waiting, state = run(make_optimizer(config, model(), 8), params, gradients[:2])
    thawed = dataclasses.replace(config, groups=(dataclasses.replace(groups[0], frozen_steps=0),))
    alone, _ = run(make_optimizer(thawed, model(), 6), params, gradients[2:])
    for path, leaf in flatten(params).items():
        if path[0] == "encoder":
            np.testing.assert_array_equal(flatten(waiting)[path], leaf)
            close({path: flatten(late)[path]}, {path: flatten(alone)[path]}, 1e-6)
    for key, moments in flatten({k: v for k, v in state.items() if k != "count"}).items():
        assert bool(np.any(moments)) != (key[1] == "encoder"), key


def test_the_norm_is_that_of_what_is_trained_now():
    groups = (
        Group(pattern="encoder", frozen_steps=1),
        Group(pattern="decoder/embedding", frozen_steps=-1),
    )
    optimizer = make_optimizer(OptimizerConfig(groups=groups), model(), 8)
    gradient = tree(model(), 0)
    state = optimizer.init(gradient)

    def norm(*parts):
        flat = flatten(gradient)
        kept = {
            p: x
            for p, x in flat.items()
            if "kept" not in p and p[0] in parts and p[:2] != ("decoder", "embedding")
        }
        return float(np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in kept.values())))

    assert float(optimizer.gradient_norm(gradient, state)) == pytest.approx(
        norm("decoder", "enc_to_dec_proj")
    )
    state["count"] += 1
    assert float(optimizer.gradient_norm(gradient, state)) == pytest.approx(
        norm("encoder", "decoder", "enc_to_dec_proj")
    )


def test_what_is_not_trained_has_no_moments_and_stays_as_it_is():
    optimizer = make_optimizer(
        OptimizerConfig(weight_decay=0.1, groups=(Group(pattern="encoder", frozen_steps=-1),)),
        model(),
        8,
    )
    params = jax.tree.map(jnp.asarray, tree(model(), 0))
    gradient = {p: x for p, x in flatten(tree(model(), 1)).items() if p[0] != "encoder"}
    state = optimizer.init(params)
    assert "encoder" not in state["mu"]
    new, _ = optimizer.apply(unflatten_dict(gradient), state, params)
    for path, leaf in flatten(params).items():
        assert (flatten(new)[path] is leaf) == (path[0] == "encoder"), path
    assert flatten(optimizer.trained) == {p: p[0] != "encoder" for p in flatten(params)}
    change, _ = optimizer.update(unflatten_dict(gradient), state, params)
    assert not any(np.any(x) for x in jax.tree.leaves(change["encoder"]))


def test_one_state_serves_a_run_that_stops_and_goes_on():
    """The update is a function of (gradient, state, params) alone: a saved state resumes it."""
    config = OptimizerConfig(groups=(Group(pattern="encoder", frozen_steps=3),), warmup_steps=2)
    params, gradients = tree(model(), 0), [tree(model(), i) for i in range(1, 7)]
    optimizer = make_optimizer(config, model(), 6)
    whole, _ = run(optimizer, params, gradients)
    half, state = run(optimizer, params, gradients[:2])
    saved = jax.tree.map(np.asarray, (half, state))
    again = make_optimizer(config, EncoderDecoderModel(tiny_pairs.config("bert2gpt2")), 6)
    assert again == optimizer
    assert hash(again) == hash(optimizer)
    step, (params, state) = jax.jit(again.apply), saved
    for gradient in gradients[2:]:
        params, state = step(gradient, state, params)
    jax.tree.map(np.testing.assert_array_equal, params, whole)


# Tied leaves --------------------------------------------------------------------------------------


def test_tied_sides_are_one_leaf_with_one_moment():
    optimizer = make_optimizer(OptimizerConfig(), model("tied"), 8)
    state = optimizer.init(model("tied").param_shapes())
    assert "self_attention" not in state["mu"]["decoder"]["segment_0"]["block_0"]
    assert "self_attention" in state["mu"]["encoder"]["segment_0"]["block_0"]


@pytest.mark.parametrize("pattern", ["decoder", "encoder", "decoder/embedding/token"])
def test_a_tied_leaf_cannot_belong_to_two_groups(pattern):
    with pytest.raises(ConfigError, match=r"one tied parameter.*'\*/embedding/token'"):
        make_optimizer(OptimizerConfig(groups=(Group(pattern=pattern),)), model("bart"), 8)


def test_a_pattern_that_names_both_sides_takes_a_tied_leaf():
    groups = (Group(pattern="*/embedding/token", name="shared"), Group(pattern="decoder"))
    optimizer = make_optimizer(OptimizerConfig(groups=groups), model("bart"), 8)
    rows = {row.path: row.group for row in optimizer.describe()}
    assert rows["encoder/embedding/token"] == "shared"
    assert rows["encoder/embedding/position"] == "default"


# Presets and schedules ----------------------------------------------------------------------------


def test_liu_and_lapata_s_rates():
    optimizer = make_optimizer(OptimizerConfig(preset="liu-lapata"), model(), 200_000)
    for n in (1, 10_000, 15_000, 20_000, 200_000):
        want = {
            "encoder": 2e-3 * min(n**-0.5, n * 20_000**-1.5),
            "decoder": 0.1 * min(n**-0.5, n * 10_000**-1.5),
        }
        assert optimizer.rates(n - 1) == pytest.approx(want, rel=1e-5)
    assert (optimizer.config.b1, optimizer.config.b2) == (0.9, 0.999)


def test_rothe_et_al_s_rates():
    optimizer = make_optimizer(OptimizerConfig(preset="rothe"), model(), 300_000)
    hidden = model().config.decoder_trunk.hidden
    for n in (1, 40_000, 160_000):
        want = 0.05 * hidden**-0.5 * min(n**-0.5, n * 40_000**-1.5)
        assert optimizer.rates(n - 1) == pytest.approx({"default": want}, rel=1e-5)


def test_fresh_cross_attention_learns_three_times_as_fast():
    config = OptimizerConfig(
        preset="fresh-cross-attention", learning_rate=3e-4, schedule="constant"
    )
    optimizer = make_optimizer(config, model("bert2bert"), 10)
    assert optimizer.rates(0) == pytest.approx({"fresh": 9e-4, "default": 3e-4})
    fresh = {row.path.split("/")[-3] for row in optimizer.describe() if row.group == "fresh"}
    assert {"cross_attention", "head"} <= fresh


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_presets_give_way_to_what_is_stated(preset):
    config = OptimizerConfig(
        preset=preset, clip_norm=5.0, groups=(Group(pattern=CROSS, learning_rate=1.0),)
    )
    resolved = presets.resolve(config)
    assert resolved.clip_norm == 5.0
    assert resolved == presets.resolve(resolved)
    rows = make_optimizer(config, model("bert2bert"), 10).describe()
    cross = {row.group for row in rows if "cross_attention" in row.path}
    assert cross == {CROSS}
    open_fields = [
        f.name for f in dataclasses.fields(resolved) if getattr(resolved, f.name) is None
    ]
    assert open_fields == ["preset", "ema_decay"]


@given(st.sampled_from(SCHEDULES), st.integers(0, 50), st.integers(1, 100), st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_schedules_rise_to_the_peak_and_fall_as_everybody_s(schedule, warmup, total, step):
    host = schedules.rate(schedule, 1.0, warmup, total, np.asarray(step), np)
    compiled = schedules.rate(schedule, 1.0, warmup, total, jnp.asarray(step), jnp)
    np.testing.assert_allclose(host, compiled, rtol=1e-5, atol=1e-6)
    every = schedules.rate(schedule, 1.0, warmup, total, np.arange(200), np)
    assert np.all(every >= 0)
    assert np.all(every <= 1 + 1e-6)
    # The last update of the rise, where the end does not come first.
    cut = schedule in ("linear", "cosine") and warmup >= total
    peak = max(warmup - 1, 0) if schedule == "noam" or cut else warmup
    assert np.all(np.diff(every[: peak + 1]) > 0)
    assert np.all(np.diff(every[peak:]) <= 1e-6)
    if schedule in ("linear", "cosine") and warmup < total:
        assert every[total - 1] > 0
        assert np.all(every[total:] < 1e-6)
    if schedule != "noam" and warmup < total:
        assert every[peak] == pytest.approx(1.0)


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize(
    ("schedule", "theirs"),
    [
        ("linear", "linear"),
        ("cosine", "cosine"),
        ("constant", "constant_with_warmup"),
        ("inverse_sqrt", "inverse_sqrt"),
    ],
)
def test_schedules_are_those_of_transformers(schedule, theirs, warmup):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    total, found = 60, []
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = transformers.get_scheduler(theirs, optimizer, warmup, total)
    for _ in range(total):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = schedules.rate(schedule, 2.0, warmup, total, np.arange(total), np)
    np.testing.assert_allclose(ours, found, rtol=1e-5, atol=1e-6)


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: OptimizerConfig(name="adam"), "adamw, adafactor, lion; got 'adam'; did you mean"),
        (lambda: OptimizerConfig(preset="liu"), "liu-lapata"),
        (lambda: OptimizerConfig(schedule="exponential"), "schedule must be one of"),
        (lambda: OptimizerConfig(learning_rate=-1), "learning_rate must be at least 0; got -1"),
        (lambda: OptimizerConfig(learning_rate=float("nan")), "learning_rate"),
        (lambda: OptimizerConfig(b1=1.0), "b1 must be at least 0 and below 1; got 1.0"),
        (lambda: OptimizerConfig(warmup_steps=1.5), "warmup_steps must be a whole number"),
        (lambda: Group(pattern=" "), "needs a pattern"),
        (lambda: Group(pattern="a", frozen_steps=-2), "frozen_steps .* at least -1; got -2"),
        (lambda: OptimizerConfig(groups=(Group(pattern="a"),) * 2), "two optimizer groups"),
        (lambda: OptimizerConfig(groups=("a",)), "must hold Groups; got str"),
    ],
)
def test_impossible_options_are_refused_in_one_sentence(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("decoder/*/crossattention", "matches no parameter"),
        ("encoder/embeding", "did you mean 'encoder/embedding'"),
        ("model/encoder", "did you mean|paths begin with"),
        ("encoder/kept/*", "never trained"),
        ("encoder, decodr", "'decodr' matches no parameter; did you mean 'decoder'"),
    ],
)
def test_a_pattern_that_matches_nothing_names_the_nearest_path(pattern, words):
    with pytest.raises(ConfigError, match=words):
        make_optimizer(OptimizerConfig(groups=(Group(pattern=pattern),)), model(), 8)


def test_nothing_left_to_train_is_refused():
    with pytest.raises(ConfigError, match="nothing is left to train"):
        make_optimizer(OptimizerConfig(groups=(Group(pattern="*", frozen_steps=-1),)), model(), 8)
    with pytest.raises(ConfigError, match="total_steps"):
        make_optimizer(OptimizerConfig(), model(), 0)
    with pytest.raises(ConfigError, match="no first moment"):
        make_optimizer(OptimizerConfig(name="adafactor", b1=0.9), model(), 8)


def test_another_model_s_parameters_are_refused():
    optimizer = make_optimizer(OptimizerConfig(), model(), 8)
    with pytest.raises(InputError, match="made for another model"):
        optimizer.init(stacked().param_shapes())


@given(st.text(alphabet="abcdeknor/*?[]_, ", max_size=20))
@settings(max_examples=60, deadline=None)
def test_any_pattern_is_taken_or_refused(pattern):
    with contextlib.suppress(EncDecError):
        make_optimizer(OptimizerConfig(groups=(Group(pattern=pattern),)), model(), 8)


def test_shapes_are_those_of_published_tensors():
    """Every leaf's dimensions, taken together, are as long as the tensor that PyTorch has."""
    for path, param in flatten(model_params(model("bart").config)).items():
        sizes = [int(np.prod([param.shape[i] for i in axes])) for axes in updates.dimensions(param)]
        assert len(sizes) == (1 if path[-1] in ("bias", "scale") else 2), path
