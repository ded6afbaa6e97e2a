"""`Execution`: every way to compute a model gives what the plain way gives."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_encdec import (
    AlbertConfig,
    BartConfig,
    BertConfig,
    ConfigError,
    DebertaV2Config,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    ModernBertConfig,
    T5Config,
)
from jax_encdec import attention_kernels as kernels
from jax_encdec.attention import KV, _dense_attention, visible
from jax_encdec.attention_kernels import fused_attention, resolve_attention
from jax_encdec.config import Attention
from jax_encdec.execution import REMAT, Execution, constrain

VOCAB = 40
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}
BERT = BertConfig(**SMALL, num_hidden_layers=2)
GPT2 = GPT2Config(
    vocab_size=VOCAB,
    n_embd=16,
    n_layer=2,
    n_head=2,
    n_positions=24,
    scale_attn_by_inverse_layer_idx=True,
)
BART = BartConfig(
    vocab_size=VOCAB, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=24,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
)  # fmt: skip
T5 = T5Config(
    vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2,
    relative_attention_num_buckets=8, relative_attention_max_distance=12, pad_token_id=0,
    eos_token_id=1, decoder_start_token_id=0,
)  # fmt: skip
ALBERT = AlbertConfig(**SMALL, num_hidden_layers=2, embedding_size=8)
MODERNBERT = ModernBertConfig(
    vocab_size=VOCAB, hidden_size=16, num_attention_heads=2, intermediate_size=24,
    num_hidden_layers=4, local_attention=4, pad_token_id=0,
)  # fmt: skip
DEBERTA = DebertaV2Config(
    **SMALL,
    num_hidden_layers=2,
    relative_attention=True,
    position_buckets=4,
    pos_att_type=("c2p", "p2c"),
    conv_kernel_size=3,
)
IDS = {"decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PAIRS = {
    "bert2gpt2": EncoderDecoderConfig(encoder=BERT, decoder=GPT2, **IDS),
    "bart": EncoderDecoderConfig(encoder=BART, decoder=BART, whole=True),
    "t5": EncoderDecoderConfig(encoder=T5, decoder=T5, whole=True),
    "modernbert2bert": EncoderDecoderConfig(encoder=MODERNBERT, decoder=BERT, **IDS),
    "albert2bert": EncoderDecoderConfig(encoder=ALBERT, decoder=BERT, **IDS),
    "deberta2bert": EncoderDecoderConfig(encoder=DEBERTA, decoder=BERT, **IDS),
    "tied bert2bert": EncoderDecoderConfig(
        encoder=BERT, decoder=BERT, tie_encoder_decoder=True, **IDS
    ),
}
WAYS = [
    Execution(scan_layers=False, remat="full"),
    Execution(scan_layers=True, remat="dots"),
]
EVERY_WAY = [
    Execution(scan_layers=scan, remat=remat, attention=attention)
    for scan, remat, attention in itertools.product((True, False), REMAT, ("dense", "auto"))
]


def batch() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(3, VOCAB, (3, 8)), rng.integers(3, VOCAB, (3, 6))
    mask = np.arange(8)[None] < np.array([[8], [5], [7]])
    return {
        "input_ids": ids.astype(np.int32),
        "attention_mask": mask.astype(np.int32),
        "labels": np.where(np.arange(6)[None] < [[6], [4], [3]], labels, -100).astype(np.int32),
    }


def train(model: EncoderDecoderModel, params: Any, dropout: bool = True, **more: Any) -> Any:
    """The loss and its slopes."""

    @jax.jit
    def run(params, batch, key):
        def loss(params):
            rngs = {"dropout": key} if dropout else None
            options = {"deterministic": not dropout, "rngs": rngs, "method": "loss"}
            return model.apply({"params": params}, **batch, **options).loss_sum

        return jax.value_and_grad(loss)(params)

    return run(params, batch() | more, jax.random.key(7))


def close(ours: Any, theirs: Any, tolerance: float = 2e-5) -> None:
    """Equal up to rounding, relative to the largest number of the same tensor, or of all."""
    ours, theirs = jax.tree.map(np.asarray, (ours, theirs))  # JAX would compile for each shape
    norm = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(theirs))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        top = max(float(np.abs(b).max()), 1e-3 * norm)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * top)


def lively(model: EncoderDecoderModel) -> Any:
    params = model.init_params(jax.random.key(0))
    return jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)


@pytest.mark.parametrize("name", PAIRS)
def test_layers_scanned_or_straight_kept_or_computed_again_learn_the_same(name):
    model = EncoderDecoderModel(PAIRS[name])
    params = lively(model)
    plain = train(model, params)
    assert float(plain[0]) > 1
    for way in WAYS:
        close(train(model.clone(execution=way), params), plain)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dropout", [True, False])
def test_every_way_to_train_is_the_same(name, dropout):
    model = EncoderDecoderModel(PAIRS[name])
    params = lively(model)
    plain = train(model, params, dropout)
    for way in EVERY_WAY:
        close(train(model.clone(execution=way), params, dropout), plain)


def primitives(jaxpr: Any) -> list[str]:
    """The names of all operations, inner functions included."""
    names = []
    for eqn in jaxpr.eqns:
        names.append(eqn.primitive.name)
        for value in jax.tree.leaves(tuple(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            names += primitives(inner) if hasattr(inner, "eqns") else []
    return names


@pytest.mark.parametrize(
    ("way", "has", "has_not"),
    [
        (Execution(), ["scan"], ["remat2", "checkpoint", "split"]),
        (Execution(scan_layers=False), ["split"], ["scan", "pad"]),
        (Execution(remat="full"), ["scan"], []),
    ],
)
def test_what_was_asked_for_is_in_the_program(way, has, has_not):
    """Straight layers' gradients are stacked once, never padded and added layer by layer."""
    model = EncoderDecoderModel(PAIRS["bert2gpt2"], execution=way)

    def loss(params):
        return model.apply({"params": params}, **batch(), method="loss").loss_sum

    names = primitives(jax.make_jaxpr(jax.grad(loss))(model.param_shapes()).jaxpr)
    assert not set(has) - set(names)
    assert not set(has_not) & set(names)
    assert bool({"remat2", "checkpoint", "remat"} & set(names)) == (way.remat != "none")


def test_an_execution_is_one_key_and_refuses_what_it_does_not_know():
    rules = [["act_batch", ["replica", "fsdp"]]]
    one = Execution(activation_rules=rules)  # pyright: ignore[reportArgumentType]
    assert one == Execution(activation_rules=(("act_batch", ("replica", "fsdp")),))
    assert len({one, Execution(), Execution(remat="none")}) == 2
    for wrong, says in (
        ({"remat": "dot"}, "did you mean 'dots'"),
        ({"attention": "flash"}, "must be one of auto, dense"),
        ({"activation_rules": (("batch", ()),)}, "did you mean 'act_batch'"),
    ):
        with pytest.raises(ConfigError, match=says):
            Execution(**wrong)


# Attention kernels --------------------------------------------------------------------------------

PLAIN = Attention(heads=4, head_dim=64)


def choose(execution=Execution(), attention=PLAIN, platform="cpu", **more):  # noqa: B008
    given = {"dtype": jnp.bfloat16, "query_length": 256, "key_length": 256}
    return resolve_attention(execution, attention, platform, **given | more)


@pytest.mark.parametrize(
    ("platform", "attention", "more", "name", "says"),
    [
        ("cpu", {}, {}, "dense", "cpu"),
        ("gpu", {}, {}, "cudnn", "fused kernel"),
        ("tpu", {}, {}, "splash", "fused kernel"),
        ("gpu", {}, {"dtype": jnp.float32}, "dense", "bfloat16 or float16"),
        ("gpu", {}, {"dropout": 0.1}, "dense", "dropout"),
        ("gpu", {}, {"weights": True}, "dense", "output_attentions"),
        ("gpu", {"head_dim": 12}, {}, "dense", "multiple of 8"),
        ("gpu", {"bucket_bias": True}, {}, "dense", "bias"),
        ("gpu", {"softcap": 3.0}, {}, "dense", "cap"),
        ("gpu", {}, {"query_length": 7}, "dense", "even"),
        ("tpu", {"softcap": 3.0}, {}, "splash", "fused kernel"),
        ("tpu", {"disentangled": ("c2p",)}, {}, "dense", "disentangled"),
        ("tpu", {"global_projections": True}, {}, "dense", "global"),
        ("tpu", {}, {"query_length": 64}, "dense", "multiples of 128"),
    ],
)
def test_the_kernel_that_runs_and_why(platform, attention, more, name, says):
    attention = Attention(**{"heads": 4, "head_dim": 64} | attention)
    choice = choose(attention=attention, platform=platform, **more)
    assert choice.name == name
    assert says in choice.reason


def test_a_kernel_asked_for_by_name_is_used_or_refused():
    assert choose(Execution(attention="xla")).name == "xla"
    assert choose(Execution(attention="dense"), platform="tpu").name == "dense"
    for name, platform in (("splash", "cpu"), ("cudnn", "tpu")):
        with pytest.raises(ConfigError, match=f"attention='{name}' cannot compute .* it needs a"):
            choose(Execution(attention=name), platform=platform)
    model = EncoderDecoderModel(PAIRS["deberta2bert"], execution=Execution(attention="xla"))
    with pytest.raises(ConfigError, match="disentangled"):
        model.apply({"params": lively(model)}, **batch(), method="loss")


CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "bidirectional": ({}, False),
    "causal, grouped queries": ({"kv_heads": 2}, True),
    "window": ({"window": 20, "scale": 0.3}, False),
    "causal window": ({"window": 20}, True),
    "cross": ({"source": "encoder"}, False),
}


def attention_of(case: str, length: int, segments: bool):
    """Two functions, dense and fused, of the same queries, keys, values; and who is seen."""
    options, causal = CASES[case]
    config = Attention(**{"heads": 4, "head_dim": 8} | options)
    rng = np.random.default_rng(0)
    query = rng.standard_normal((2, length, 4, 8), np.float32)
    key, value = rng.standard_normal((2, 2, config.groups, length, 8), np.float32)
    order = jnp.arange(length)[None]
    mask = jnp.asarray(np.arange(length)[None] < [[length], [length // 2]], jnp.int32)
    ids = jnp.asarray(np.arange(length)[None] // [[length // 4], [length // 2]])
    pair = (ids, ids) if segments else (None, None)
    seen = visible(order, mask, *pair, causal=causal)
    if config.window is not None:
        near = jnp.abs(order[:, :, None] - order[:, None, :]) <= config.window
        seen = seen._replace(mask=seen.mask & near, rest=seen.rest & near)
    scale = config.head_dim**-0.5 if config.scale is None else config.scale

    def dense(query, key, value):
        return _dense_attention(
            config, {}, query, KV(key, value), seen.mask, None, None, scale, 0.0, None
        )[0]

    def fused(name, query, key, value, execution=Execution(), **more):  # noqa: B008
        return fused_attention(
            execution, name, config, query, key, value, seen, bias=None, scale=scale, **more
        )

    # Rows that see nobody are only promised to be finite.
    shown = jnp.broadcast_to(seen.mask.any(-1), (2, length))
    return dense, fused, tuple(map(jnp.asarray, (query, key, value))), shown[..., None, None]


def same_attention(dense, fused, given, shown):
    def run(f):
        def loss(*given):
            y = f(*given)
            return jnp.sum(jnp.where(shown, jnp.sin(y), 0.0)), y

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*given)

    (slopes, y), (wanted, expected) = run(fused), run(dense)
    assert jnp.isfinite(y).all()
    assert all(jnp.isfinite(s).all() for s in slopes)
    close(jnp.where(shown, y, 0.0), jnp.where(shown, expected, 0.0))
    close(slopes, wanted)


@pytest.mark.parametrize("case", CASES)
def test_xla_attention_is_the_dense_one(case):
    dense, fused, given, shown = attention_of(case, 12, segments=case != "cross")
    same_attention(dense, lambda *g: fused("xla", *g), given, shown)


@pytest.mark.parametrize("case", ["causal, grouped queries", "window"])
def test_splash_attention_is_the_dense_one(case):
    """Interpreted, since there is no TPU here."""
    dense, fused, given, shown = attention_of(case, 128, segments=True)
    same_attention(dense, lambda *g: fused("splash", *g, interpret=True), given, shown)


def test_splash_attention_over_a_mesh_is_the_dense_one():
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = (("act_batch", ("fsdp",)), ("act_heads", ("tensor",)))
    split = Execution(activation_rules=rules)
    dense, fused, given, _ = attention_of("causal window", 128, segments=True)
    with jax.set_mesh(mesh):
        choice = choose(split, platform="tpu", batch=2)
        assert choice.name == "splash"
        assert "over 1 of 4 devices" in choose(platform="tpu", batch=2).reason
        ours = jax.jit(lambda *g: fused("splash", *g, execution=split, interpret=True))(*given)
    close(np.asarray(ours), np.asarray(dense(*given)))


@pytest.mark.parametrize(("name", "platform"), [("cudnn", "cuda"), ("splash", "tpu")])
def test_the_fused_kernels_are_in_programs_for_their_platforms(name, platform, monkeypatch):
    """As far as it goes without the device: forward and backward pass, lowered."""
    if name == "cudnn":
        # Its version is asked of the library, which comes with the CUDA build of JAX.
        module = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
        monkeypatch.setattr(module, "check_cudnn_version", lambda: 91_000)
    # Of a size of its own: traced programs are kept, and their platform is not really another.
    part = BERT.replace(max_position_embeddings=128, vocab_size=VOCAB + len(name))
    config = EncoderDecoderConfig(encoder=part, decoder=part, **IDS)
    monkeypatch.setattr("jax_encdec.block.platform", lambda: platform)
    model = EncoderDecoderModel(config, dtype=jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((2, 128), jnp.int32)

    def loss(params, ids):
        return model.apply({"params": params}, ids, jnp.ones_like(ids), ids, method="loss").loss_sum

    traced = jax.jit(jax.grad(loss)).trace(model.param_shapes(), ids)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    call = "__cudnn$fmha" if name == "cudnn" else "tpu_custom_call"
    # Encoder, decoder and cross-attention, each forward and backward, once per loop over layers.
    assert text.count(call) >= 6


def test_kernels_are_chosen_for_where_the_program_will_run():
    assert kernels.platform() == "cpu"
    with jax.default_device(jax.devices()[1]):
        assert kernels.platform() == "cpu"
    with jax.set_mesh(jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert kernels.platform() == "cpu"


# Activations over a mesh --------------------------------------------------------------------------


def test_activations_are_laid_out_by_rules_where_they_divide():
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rules = (("act_batch", ("replica", "fsdp")), ("act_embed", ("tensor",)), ("act_mlp", ("fsdp",)))
    execution = Execution(activation_rules=rules)
    axes = ("act_batch", "act_length", "act_embed")

    def text(shape, axes, execution=execution):
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        return jax.jit(lambda x: constrain(execution, x, *axes)).lower(x).as_text()

    assert "sharding" not in text((4, 3, 8), axes)  # no mesh
    with jax.set_mesh(mesh):
        assert "sharding_constraint" not in text((4, 3, 8), axes, Execution())
        assert '[{"fsdp"}, {?}, {"tensor"}]' in text((4, 3, 8), axes)
        assert '[{?}, {?}, {"tensor"}]' in text((3, 3, 8), axes)  # 3 rows over 2
        assert '[{"fsdp"}, {}, {}]' in text((4, 3, 8), ("act_batch", None, "act_mlp"))  # taken


def test_a_model_over_a_mesh_learns_the_same():
    mesh = jax.make_mesh(
        (2, 2, 2), ("replica", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    rules = (
        ("act_batch", ("replica",)),
        ("act_heads", ("tensor",)),
        ("act_mlp", ("tensor",)),
        ("act_vocab", ("tensor",)),
        ("act_embed", ()),
    )
    model = EncoderDecoderModel(PAIRS["bert2gpt2"])
    params = lively(model)
    four = {name: np.tile(x, (2, 1))[:4] for name, x in batch().items()}
    plain = train(model, params, dropout=False, **four)
    with jax.set_mesh(mesh):
        split = model.clone(execution=Execution(activation_rules=rules))
        close(train(split, params, dropout=False, **four), plain)
