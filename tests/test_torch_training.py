"""The same training as PyTorch: one checkpoint, one stream of batches, the same losses.

Ours is `make_optimizer` under `make_train_step`; theirs is `torch.optim.AdamW` on Transformers'
`EncoderDecoderModel`, weight decay on matrices alone, gradients clipped to a norm.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from oracle import as_torch, from_torch, labels_batch, randomize, source_batch, torch, torch_pair

from jax_encdec.layers import flatten
from jax_encdec.pretrained import write_order
from jax_encdec.training.optimizer import OptimizerConfig, make_optimizer
from jax_encdec.training.sharding import make_mesh
from jax_encdec.training.state import init_state
from jax_encdec.training.step import make_train_step

# What Transformers says whenever it computes this loss.
pytestmark = pytest.mark.filterwarnings("ignore:Version v4.12.0:FutureWarning")

PAIRS = (("bert", "bert"), ("roberta", "gpt2"))
STEPS = 50
RATE, DECAY, CLIP, B1, B2, EPS = 5e-3, 0.05, 1.0, 0.9, 0.98, 1e-8


@functools.cache
def pair(encoder, decoder):
    """Both sides' copy of one checkpoint, and what they are to train on."""
    # Five times the published initial scale. With the larger weights of other tests, PyTorch's own
    # float32 gradients are 1.7e-5 from its float64 ones.
    oracle = randomize(torch_pair(encoder, decoder, seed=3), 3, scale=0.1)
    rng = np.random.default_rng(5)
    batches = [(*source_batch(rng, 4), labels_batch(rng, 4)) for _ in range(5)]
    return oracle, *from_torch(oracle), batches


def theirs(oracle, ids, mask, labels):
    return oracle(
        input_ids=as_torch(ids), attention_mask=as_torch(mask), labels=as_torch(labels)
    ).loss


@pytest.mark.parametrize("names", PAIRS, ids="2".join)
def test_the_first_gradient_is_autograds(names):
    """Tensor by tensor, within 1e-5 of its norm, or of a thousandth of the global norm."""
    oracle, model, params, batches = pair(*names)
    ids, mask, labels = batches[0]

    def loss(params):
        out = model.apply({"params": params}, ids, mask, labels, method="loss")
        return out.loss_sum / out.loss_weight

    grads = flatten(jax.jit(jax.grad(loss))(params))
    oracle.zero_grad()
    theirs(oracle, ids, mask, labels).backward()
    expected = {
        name: (torch.zeros_like(p) if p.grad is None else p.grad).numpy()
        for name, p in oracle.state_dict(keep_vars=True).items()
        if p.is_floating_point()
    }
    moved = [p.grad.numpy() for p in oracle.parameters() if p.grad is not None]
    whole = np.sqrt(sum(np.sum(np.square(grad)) for grad in moved))
    seen = 0
    for name, _, make in write_order(model.config, grads):
        gap = np.linalg.norm(make() - expected[name])
        assert gap <= 1e-5 * max(np.linalg.norm(expected[name]), 1e-3 * whole), name
        seen += np.linalg.norm(expected[name]) > 0
    assert seen > 40  # layers, embeddings and head all heard of the loss


@pytest.mark.parametrize("names", PAIRS, ids="2".join)
def test_fifty_steps_are_pytorchs(names):
    oracle, model, params, batches = pair(*names)
    config = OptimizerConfig(
        learning_rate=RATE, schedule="constant", weight_decay=DECAY, clip_norm=CLIP, b1=B1, b2=B2,
        eps=EPS,
    )  # fmt: skip
    optimizer = make_optimizer(config, model, total_steps=STEPS)
    mesh = make_mesh(devices=jax.devices()[:1])
    state = init_state(model, optimizer, mesh, params=params)
    step = make_train_step(model, optimizer, mesh, dropout=False)

    trained = [p for p in oracle.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=RATE, betas=(B1, B2), eps=EPS)
    ours, expected = [], []
    for number in range(STEPS):
        ids, mask, labels = batches[number % len(batches)]
        given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        state, metrics = step(state, given)
        ours.append(float(metrics["loss"]))
        adamw.zero_grad()
        loss = theirs(oracle, ids, mask, labels)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        np.testing.assert_allclose(metrics["grad_norm"], norm.item(), rtol=1e-3)
        adamw.step()
        expected.append(loss.item())
    with torch.no_grad():  # as others find it
        for p, before in zip(trained, start, strict=True):
            p.copy_(before)
    assert expected[-1] < 0.8 * expected[0]  # it learns
    error = np.abs(np.array(ours) / np.array(expected) - 1)
    assert error.max() <= 1e-4, error
