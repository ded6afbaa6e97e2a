"""The count of floating point operations: against the matrix products of the traced program."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_execution import PAIRS

from jax_encdec import EncoderDecoderModel
from jax_encdec.execution import Execution
from jax_encdec.training.flops import model_flops

BATCH, SOURCE, TARGET = 2, 8, 6


def products(jaxpr: Any) -> int:
    """Operations of all matrix products and convolutions, a loop's body once per turn."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            over = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += 2 * over * math.prod(eqn.outvars[0].aval.shape)
        if eqn.primitive.name == "conv_general_dilated":
            width, inputs, _ = eqn.invars[1].aval.shape
            total += 2 * width * inputs * math.prod(eqn.outvars[0].aval.shape)
        turns = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for value in jax.tree.leaves(tuple(eqn.params.values())):
            inner = getattr(value, "jaxpr", value)
            total += turns * products(inner) if hasattr(inner, "eqns") else 0
    return total


def forward(model: EncoderDecoderModel):
    def run(params):
        source = jnp.ones((BATCH, SOURCE), jnp.int32)
        target = jnp.ones((BATCH, TARGET), jnp.int32)
        return model.apply({"params": params}, source, decoder_input_ids=target).logits

    return run


@pytest.mark.parametrize("name", PAIRS)
def test_every_product_of_the_forward_pass_is_counted(name):
    model = EncoderDecoderModel(PAIRS[name])
    traced = jax.make_jaxpr(forward(model))(model.param_shapes())
    assert model_flops(model, BATCH, SOURCE, TARGET).forward == products(traced.jaxpr)


def test_a_step_of_training_is_three_forward_passes():
    """Of the first layer, too, since the embeddings before it are trained."""
    model = EncoderDecoderModel(PAIRS["bert2gpt2"])
    flops = model_flops(model, BATCH, SOURCE, TARGET)

    def loss(params):
        return jnp.sum(jnp.sin(forward(model)(params)))

    traced = jax.make_jaxpr(jax.grad(loss))(model.param_shapes())
    assert flops.train_step == products(traced.jaxpr)
    assert set(flops.parts) >= {"encoder/self_attention", "decoder/cross_attention", "decoder/head"}
    assert flops.train_step == 3 * sum(flops.parts.values())


def test_the_compilers_count_is_not_far():
    """It counts elementwise work as well, and can be asked only where no loop hides layers."""
    model = EncoderDecoderModel(PAIRS["bert2gpt2"], execution=Execution(scan_layers=False))
    cost = jax.jit(forward(model)).lower(model.param_shapes()).cost_analysis()
    ours = model_flops(model, BATCH, SOURCE, TARGET).forward
    assert ours <= cost["flops"] < 1.3 * ours
