"""The loss: PyTorch's, whatever the head, whole or by chunks; what a chunked one never holds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_encdec import BertConfig, EncoderDecoderConfig, EncoderDecoderModel, InputError
from jax_encdec.config import Embedding, Head, Norm, TransformerConfig
from jax_encdec.embedding import embedding_params, head_params, logits
from jax_encdec.execution import Execution
from jax_encdec.layers import initialize
from jax_encdec.loss import IGNORE, head_loss

V, D, B, T = 41, 6, 4, 8
HEADS = {
    "tied": Head(),
    "untied with a bias": Head(tied=False, bias="trained"),
    "fixed bias and scale": Head(bias="fixed", scale=0.4),
    "capped": Head(softcap=1.5, bias="trained"),
    "transformed": Head(transform=Norm(), bias="trained", activation="gelu"),
}
SPLIT = Execution(
    activation_rules=(
        ("act_batch", ("replica", "fsdp")),
        ("act_embed", ()),
        ("act_vocab", ("tensor",)),
    )
)


def head_of(head: Head, vocab: int = V) -> tuple[TransformerConfig, Any]:
    """A trunk that is nothing but its two ends, and lively parameters."""
    embedding = Embedding(vocab=vocab, width=D)
    config = TransformerConfig(hidden=D, embedding=embedding, segments=(), head=head)
    declared = {"embedding": embedding_params(config), "head": head_params(config)}
    params = initialize(declared, jax.random.key(0), jnp.float32)
    keys = iter(jax.random.split(jax.random.key(1), 9))
    return config, jax.tree.map(lambda x: x + jax.random.normal(next(keys), x.shape), params)


def targets(vocab: int = V) -> tuple[jax.Array, jax.Array]:
    """States and labels, a third of which do not count, in any place."""
    rng = np.random.default_rng(0)
    labels = np.where(rng.random((B, T)) < 1 / 3, IGNORE, rng.integers(0, vocab, (B, T)))
    return jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32), jnp.asarray(labels)


def run(config, params, states, labels, **options):
    """A `LossOutput` and the slopes of its sum by parameters and states."""
    options.setdefault("execution", Execution())

    def loss(params, states):
        out = head_loss(config, params, states, labels, **options)
        return out.loss_sum, out

    slopes, out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, states)
    return out, slopes


def close(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "smoothing"), [("tied", 0.0), *((h, 0.2) for h in HEADS)])
def test_the_loss_and_its_slopes_are_pytorchs(name, smoothing):
    torch = pytest.importorskip("torch")
    config, params = head_of(HEADS[name])
    states, labels = targets()
    head = config.head
    tensor = lambda x: torch.tensor(np.asarray(x), requires_grad=True)  # noqa: E731
    leaves, theirs = jax.tree.map(tensor, params), tensor(states)
    own, x = leaves["head"], theirs
    if head.transform is not None:
        p = own["transform"]
        x = torch.nn.functional.gelu(x @ p["kernel"] + p["bias"])
        x = torch.nn.functional.layer_norm(
            x, (D,), own["norm"]["scale"], own["norm"]["bias"], eps=head.transform.eps
        )
    y = (x * head.scale) @ (leaves["embedding"]["token"] if head.tied else own["kernel"]).T
    if head.bias != "none":
        y = y + (own["bias"].detach() if head.bias == "fixed" else own["bias"])
    if head.softcap is not None:
        y = head.softcap * torch.tanh(y / head.softcap)
    flat, ids = y.reshape(-1, V), torch.tensor(np.asarray(labels).reshape(-1)).long()
    ask = {"ignore_index": IGNORE, "reduction": "sum"}
    expected = torch.nn.functional.cross_entropy(flat, ids, label_smoothing=smoothing, **ask)
    plain = torch.nn.functional.cross_entropy(flat, ids, **ask)
    expected.backward()
    slope = lambda t: np.zeros(t.shape) if t.grad is None else t.grad.numpy()  # noqa: E731
    wanted = (jax.tree.map(slope, leaves), slope(theirs))
    for chunk in (None, 2, 3):  # 3 does not divide the length
        out, slopes = run(config, params, states, labels, label_smoothing=smoothing, chunk=chunk)
        close(out.loss_sum, expected.item())
        close(out.nll_sum, plain.item())
        assert out.loss_weight == (np.asarray(labels) != IGNORE).sum()
        right = (flat.argmax(-1) == ids).sum().item()
        assert out.correct == right
        close(slopes, wanted)


def test_evaluation_which_wants_no_slopes_finds_the_same():
    config, params = head_of(HEADS["capped"])
    given = targets()
    whole = head_loss(config, params, *given, execution=Execution())
    close(head_loss(config, params, *given, chunk=3, execution=Execution()), whole)


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_label_outside_the_vocabulary_is_nan_and_none_at_all_is_nothing(chunk):
    config, params = head_of(HEADS["tied"])
    states, labels = targets()
    for bad in (V, -1):
        out, _ = run(config, params, states, labels.at[1, 2].set(bad), chunk=chunk)
        assert jnp.isnan(out.loss_sum)
    out, slopes = run(config, params, states, jnp.full_like(labels, IGNORE), chunk=chunk)
    assert out.loss_sum == out.loss_weight == out.correct == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(slopes))


def test_positions_without_a_label_are_never_looked_at():
    """They stand in chunks of their own, after the others, which are left out."""
    config, params = head_of(HEADS["tied"])
    states, labels = targets()
    counted = jnp.arange(T) % 4 == 1  # 2 of 8
    states = jnp.where(counted[:, None], states, jnp.nan)
    labels = jnp.where(counted, jnp.maximum(labels, 0), IGNORE)
    out, slopes = run(config, params, states, labels, chunk=2)
    assert jnp.isfinite(out.loss_sum)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


def shapes(jaxpr: Any) -> set[tuple[int, ...]]:
    """The shapes of everything that a program computes, inner functions included."""
    found = {v.aval.shape for eqn in jaxpr.eqns for v in eqn.outvars if hasattr(v.aval, "shape")}
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(tuple(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            found |= shapes(inner) if hasattr(inner, "eqns") else set()
    return found


@pytest.mark.parametrize("chunk", [None, 2])
def test_chunked_logits_are_never_there_at_once(chunk):
    config, params = head_of(HEADS["capped"])
    states, labels = targets()
    jaxpr = jax.make_jaxpr(lambda p, x: run(config, p, x, labels, chunk=chunk))(params, states)
    large = [s for s in shapes(jaxpr.jaxpr) if V in s and np.prod(s) > B * 2 * V]
    assert bool(large) == (chunk is None)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (1, 1, 8)])
def test_over_a_mesh_the_same_and_the_batch_stays_where_it_is(shape):
    mesh = jax.make_mesh(
        shape, ("replica", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    vocab = 48  # the tensor axis divides it
    config, params = head_of(HEADS["untied with a bias"], vocab)
    states, labels = targets(vocab)
    if shape == (1, 8, 1):
        states, labels = jnp.tile(states, (2, 1, 1)), jnp.tile(labels, (2, 1))
    options = {"label_smoothing": 0.1, "chunk": 2}
    alone = run(config, params, states, labels, **options)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("replica", "fsdp")))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def loss(params, states, labels):
        out = head_loss(config, params, states, labels, execution=SPLIT, **options)
        return out.loss_sum, out

    step = jax.jit(
        jax.grad(loss, argnums=(0, 1), has_aux=True),
        in_shardings=(whole, rows, rows),
        out_shardings=((whole, rows), whole),
    )
    with jax.set_mesh(mesh):
        compiled = step.lower(params, states, labels).compile()
        slopes, out = step(params, states, labels)
    close((out, slopes), alone)
    if shape == (1, 8, 1):
        assert "all-gather" not in compiled.as_text()


# The model ----------------------------------------------------------------------------------------

PART: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
}
CONFIG = EncoderDecoderConfig(
    encoder=BertConfig(**PART),
    decoder=BertConfig(**PART),
    decoder_start_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
MODEL = EncoderDecoderModel(CONFIG)


def test_the_models_loss_is_that_of_its_logits():
    params = MODEL.init_params(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {
        "input_ids": rng.integers(3, 40, (2, 8)),
        "attention_mask": np.arange(8)[None] < np.array([[8], [5]]),
        "labels": np.where(rng.random((2, 6)) < 0.3, IGNORE, rng.integers(3, 40, (2, 6))),
        "segment_ids": np.repeat([[1, 2]], 4, axis=1).repeat(2, axis=0),
        "decoder_segment_ids": np.repeat([[1, 2]], 3, axis=1).repeat(2, axis=0),
    }
    whole = MODEL.apply({"params": params}, **batch)
    for chunk in (None, 4):
        out = MODEL.apply({"params": params}, **batch, loss_chunk=chunk, method="loss")
        close((out.loss_sum, out.nll_sum), (whole.loss_sum, whole.loss_sum))
        close(out.loss_weight, whole.loss_weight)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"labels": None}, "needs labels"),
        ({"label_smoothing": 1.0}, "label_smoothing must be"),
        ({"loss_chunk": 0}, "loss_chunk must be"),
        ({"labels": np.array([[40]])}, "expected 0..39"),
    ],
)
def test_what_the_loss_refuses(options, says):
    given = {"input_ids": np.array([[4, 5]]), "labels": np.array([[4]])} | options
    with pytest.raises(InputError, match=says):
        MODEL.apply({"params": MODEL.init_params(jax.random.key(0))}, **given, method="loss")


def test_dtype_of_the_states_is_kept_and_sums_are_float32():
    config, params = head_of(HEADS["untied with a bias"])
    states, labels = targets()
    exact, (wanted, _) = run(config, params, states, labels)
    out, (by_params, by_states) = run(config, params, states.astype("bfloat16"), labels, chunk=2)
    assert by_states.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((out, by_params)))
    close(out.loss_sum / exact.loss_sum, 1.0, 1e-2)
    kernels = by_params["head"]["kernel"], wanted["head"]["kernel"]
    np.testing.assert_allclose(*kernels, atol=2e-2 * float(jnp.abs(kernels[1]).max()))


def test_logits_are_what_the_loss_compares():
    config, params = head_of(HEADS["transformed"])
    states, labels = targets()
    scores = jax.nn.log_softmax(logits(config, params, states))
    picked = jnp.take_along_axis(scores, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    out = head_loss(config, params, states, labels, chunk=1, execution=Execution())
    close(out.loss_sum, -jnp.sum(jnp.where(labels == IGNORE, 0.0, picked)))
