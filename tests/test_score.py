"""model.score: the log-probabilities of PyTorch, the scores that generate reports, in chunks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import as_torch, from_torch, labels_batch, source_batch, torch, torch_pair

from jax_encdec import InputError
from jax_encdec.config import Embedding, Head, TransformerConfig
from jax_encdec.embedding import embedding_params, head_params
from jax_encdec.layers import initialize
from jax_encdec.scoring import head_log_probs


@pytest.fixture(scope="module")
def pair():
    oracle = torch_pair("bert", "gpt2", hidden=(16, 24), seed=5)
    return oracle, *from_torch(oracle)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(1)
    return *source_batch(rng), labels_batch(rng)


@pytest.mark.filterwarnings("ignore:Version v4.12.0")
@pytest.mark.parametrize("chunk", [None, 4])
def test_scores_are_those_of_pytorch(pair, batch, chunk):
    oracle, model, params = pair
    ids, mask, labels = batch
    with torch.no_grad():
        logits = oracle(
            input_ids=as_torch(ids), attention_mask=as_torch(mask), labels=as_torch(labels)
        ).logits
    expected = logits.log_softmax(-1).gather(-1, as_torch(labels).clamp(min=0)[..., None])
    expected = np.where(labels == -100, 0.0, expected[..., 0].numpy())
    out = model.score(params, ids, labels, attention_mask=mask, chunk=chunk)
    assert out.token_log_probs.shape == labels.shape
    np.testing.assert_allclose(out.token_log_probs, expected, atol=2e-5)
    np.testing.assert_allclose(out.log_probs, expected.sum(1), atol=1e-4)
    mean = model.score(params, ids, labels, attention_mask=mask, length_penalty=1.0, chunk=chunk)
    np.testing.assert_allclose(mean.log_probs, expected.sum(1) / (labels != -100).sum(1), atol=2e-5)


@pytest.mark.parametrize("chunk", [None, 4])
def test_slopes_are_those_of_the_loss(pair, batch, chunk):
    _, model, params = pair
    ids, mask, labels = batch

    def by_score(params):
        return -model.score(params, ids, labels, attention_mask=mask, chunk=chunk).log_probs.sum()

    def by_loss(params):
        return model.apply({"params": params}, ids, mask, labels=labels).loss_sum

    ours, theirs = jax.grad(by_score)(params), jax.grad(by_loss)(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), ours, theirs)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3, "length_penalty": 0.0}, {"num_beams": 3, "length_penalty": 0.7}],
)
def test_what_generate_found_has_the_score_that_it_was_reported_with(pair, batch, options):
    _, model, params = pair
    ids, mask, _ = batch
    # Ids that are told apart from the padding, so that targets end, or hold pads in their midst.
    options = {"max_new_tokens": 10, "eos_token_id": 7, "forced_eos_token_id": None, **options}
    out = model.generate(params, ids, attention_mask=mask, **options)
    targets = out.sequences[:, 1:]
    shown = jnp.arange(targets.shape[1]) < out.lengths[:, None] - 1
    again = model.score(
        params,
        ids,
        targets,
        attention_mask=mask,
        target_mask=shown,
        length_penalty=options.get("length_penalty", 0.0),
    )
    np.testing.assert_allclose(again.log_probs, out.sequences_scores, rtol=1e-4, atol=1e-4)
    assert not np.any(np.asarray(again.token_log_probs)[~np.asarray(shown)])


def test_inside_jit_and_whatever_the_padding(pair, batch):
    _, model, params = pair
    ids, mask, labels = batch
    alone = model.score(params, ids, labels, attention_mask=mask)

    @jax.jit
    def inside(params, ids, mask, labels):
        return model.score(params, ids, labels, attention_mask=mask)

    wide = np.pad(labels, ((0, 0), (0, 5)), constant_values=-100)
    for out in (
        inside(params, ids, mask, labels),
        model.score(params, ids, wide, attention_mask=mask),
        model.score(params, ids, np.where(wide < 0, 5, wide), attention_mask=mask,
                    target_mask=wide != -100),
    ):  # fmt: skip
        np.testing.assert_allclose(out.log_probs, alone.log_probs, atol=1e-5)
    states = model.apply({"params": params}, ids, mask, method="encode")
    again = model.score(params, None, labels, attention_mask=mask, encoder_outputs=states)
    np.testing.assert_allclose(again.log_probs, alone.log_probs, atol=1e-5)


def test_chunks_hold_no_logits_of_all_positions():
    """Forwards and backwards, whatever there is of memory is far from [B, T, V] float32."""
    vocab, width, rows, length = 5000, 8, 4, 64
    config = TransformerConfig(
        hidden=width,
        embedding=Embedding(vocab=vocab, width=width),
        segments=(),
        head=Head(softcap=30.0),
    )
    declared = {"embedding": embedding_params(config), "head": head_params(config)}
    params = initialize(declared, jax.random.key(0), jnp.float32)
    states, labels = jnp.ones((rows, length, width)), jnp.zeros((rows, length), jnp.int32)

    def total(params, chunk):
        return head_log_probs(config, params, states, labels, chunk=chunk).sum()

    step = jax.jit(jax.value_and_grad(total), static_argnums=1)
    taken = [
        step.lower(params, chunk).compile().memory_analysis().temp_size_in_bytes
        for chunk in (None, 4)
    ]
    assert taken[1] < rows * length * vocab * 4 / 3 < taken[0]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"target_ids": None}, "needs target_ids"),
        ({"target_ids": [[10**6]]}, r"target_ids\[0, 0\]"),
        ({"target_ids": [[4, 5], [6, 7]]}, "as many rows"),
        ({"target_mask": [[1, 1]]}, "target_mask must have shape"),
        ({"chunk": 0}, "chunk must be a positive number"),
    ],
)
def test_what_cannot_be_scored_is_refused(pair, wrong, said):
    _, model, params = pair
    arguments = {"source_ids": [[5, 6, 7]], "target_ids": [[4, 5, 6]], **wrong}
    with pytest.raises(InputError, match=said):
        model.score(params, **arguments)
