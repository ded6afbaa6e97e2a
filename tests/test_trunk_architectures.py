"""The trunk and the rule language hold architectures beyond the families: against the real ones.

Every architecture in `trunks.py` is a configuration and a table, nothing more. With a random
model's weights read through the table, the trunk computes what the model computes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import trunks
from trunks import HEADS, HIDDEN, VOCAB, WIDTH

from jax_encdec.attention import distance_buckets, learned_positions, relative_rows, rotate
from jax_encdec.config import BucketBias, RelativeTable, Rotary
from jax_encdec.convert import gpt2
from jax_encdec.families import GPT2Config, RobertaConfig
from jax_encdec.transformer import logits, transformer

torch, transformers = oracle.torch, oracle.transformers

LENGTHS = ((13, 7, 1), (5, 11, 9, 10))
"""Two batches of texts by length; the seed picks one."""
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_attention_heads": HEADS,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
run = jax.jit(transformer, static_argnums=0, static_argnames="output_hidden_states")


@pytest.fixture(autouse=True)
def _exact():
    with jax.default_matmul_precision("highest"):
        yield


def padded(seed: int, turn: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Texts `[B, L]` of odd lengths, padded on the right, and their mask."""
    rng, lengths = np.random.default_rng(seed + 10 * turn), LENGTHS[seed][:: 1 - 2 * turn]
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int32)
    return rng.integers(2, VOCAB, mask.shape).astype(np.int32) * mask, mask


def assert_close(ours, theirs, mask):
    """Equal at all real positions, within 1e-5 of the largest value."""
    ours, theirs = np.asarray(ours)[mask == 1], theirs.detach().numpy()[mask == 1]
    assert ours.shape == theirs.shape
    assert np.std(theirs) > 0.05  # a model whose output hardly varies would prove nothing
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1, np.abs(theirs).max()))


def weights(model) -> trunks.Published:
    return trunks.Published({k: v.detach().numpy() for k, v in model.state_dict().items()})


def check_encoder(model, trunk, rules, seed, *ignored, types=False):
    """Every layer's states are the published model's."""
    params = trunks.read(trunks.part_of(trunk, rules, *ignored), weights(model))["trunk"]
    ids, mask = padded(seed)
    more = {"token_type_ids": np.arange(ids.size).reshape(ids.shape) % 3 // 2} if types else {}
    with torch.no_grad():
        theirs = model(
            input_ids=oracle.as_torch(ids),
            attention_mask=oracle.as_torch(mask),
            output_hidden_states=True,
            **{k: oracle.as_torch(v) for k, v in more.items()},
        )
    ours = run(trunk, params, ids, attention_mask=mask, output_hidden_states=True, **more)
    assert_close(ours.last_hidden_state, theirs.last_hidden_state, mask)
    return ours, theirs, mask


def check_language_model(model, trunk, rules, seed, *ignored):
    """The logits are the published model's."""
    params = trunks.read(trunks.part_of(trunk, rules, *ignored), weights(model))["trunk"]
    ids, mask = padded(seed)
    with torch.no_grad():
        theirs = model(input_ids=oracle.as_torch(ids), attention_mask=oracle.as_torch(mask))
    states = run(trunk, params, ids, attention_mask=mask).last_hidden_state
    assert_close(logits(trunk, params, states), theirs.logits, mask)


# Encoders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("by_layer", [True, False])
def test_gpt2_scales_attention_by_layer_or_not_at_all(by_layer, seed):
    """A family already, here with the options that its published checkpoints leave alone."""
    options = {
        "vocab_size": VOCAB,
        "n_embd": HIDDEN,
        "n_layer": 4,
        "n_head": HEADS,
        "n_positions": 40,
        "scale_attn_weights": by_layer,
        "scale_attn_by_inverse_layer_idx": by_layer,
    }
    ours, theirs = GPT2Config(**options), transformers.GPT2Config(**options)
    model = oracle.randomize(transformers.GPT2Model(theirs), seed, scale=0.25)
    check_encoder(model, ours.to_trunk("encoder"), gpt2.body(ours, "encoder"), seed)


# Decoder-only language models --------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_llama(seed):
    config = transformers.LlamaConfig(
        **SIZES, num_hidden_layers=2, num_key_value_heads=2, tie_word_embeddings=False
    )
    model = oracle.randomize(transformers.LlamaForCausalLM(config), seed)
    check_language_model(model, trunks.llama(), trunks.LLAMA, seed)


@pytest.mark.parametrize("seed", [0, 1])
def test_qwen2_biases_queries_keys_and_values_only(seed):
    config = transformers.Qwen2Config(
        **SIZES, num_hidden_layers=2, num_key_value_heads=2, tie_word_embeddings=False
    )
    model = oracle.randomize(transformers.Qwen2ForCausalLM(config), seed)
    check_language_model(model, trunks.llama(bias=True), trunks.LLAMA, seed)


@pytest.mark.parametrize("seed", [0, 1])
def test_qwen3_norms_queries_and_keys(seed):
    config = transformers.Qwen3Config(
        **SIZES,
        num_hidden_layers=2,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
    )
    model = oracle.randomize(transformers.Qwen3ForCausalLM(config), seed)
    check_language_model(model, trunks.llama(qk_norm=True, head_dim=8), trunks.LLAMA, seed)


@pytest.mark.parametrize("seed", [0, 1])
def test_gemma2_sandwich_norms_softcaps_and_windows(seed):
    config = transformers.Gemma2Config(
        **SIZES,
        num_hidden_layers=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=5,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0,
        sliding_window=3,
        attn_implementation="eager",
    )
    model = oracle.randomize(transformers.Gemma2ForCausalLM(config), seed)
    check_language_model(model, trunks.gemma2(window=3), trunks.GEMMA2, seed, "lm_head.weight")


# Positions, far beyond what tiny texts reach -----------------------------------------------------


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (8, 12), (64, 256), (32, 20)])
def test_every_distance_falls_into_t5s_bucket(buckets, farthest, bidirectional):
    from transformers.models.t5.modeling_t5 import T5Attention

    n = 300
    relative = torch.arange(n)[None, :] - torch.arange(n)[:, None]
    theirs = T5Attention._relative_position_bucket(relative, bidirectional, buckets, farthest)
    config = BucketBias(buckets=buckets, max_distance=farthest, bidirectional=bidirectional)
    ours = jax.jit(lambda p: distance_buckets(config, p, p))(jnp.arange(n)[None])
    np.testing.assert_array_equal(np.asarray(ours)[0], theirs.numpy())


@pytest.mark.parametrize(("span", "farthest"), [(256, 512), (8, 40), (16, 48), (128, 512)])
def test_every_distance_falls_into_debertas_row(span, farthest):
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    n = 700
    theirs = build_relative_position(torch.zeros(n, 1), torch.zeros(n, 1), span, farthest)
    config = RelativeTable(span=span, max_distance=farthest)
    ours = jax.jit(lambda p: relative_rows(config, p, p))(jnp.arange(n)[None])
    expected = np.clip(theirs.numpy() + span, 0, 2 * span - 1)
    np.testing.assert_array_equal(np.asarray(ours), expected)


def test_pads_take_no_position_and_read_robertas_own_row():
    from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

    trunk = RobertaConfig(pad_token_id=3).to_trunk("encoder")
    config = trunk.embedding.position
    assert config is not None
    ids = np.random.default_rng(0).integers(2, 6, (20, 15))
    theirs = RobertaEmbeddings.create_position_ids_from_input_ids(oracle.as_torch(ids), 3)
    ours = learned_positions(config, jnp.asarray(ids), 15) + config.offset
    np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("theta", [10_000.0, 160_000.0, 1e6])
def test_rotary_angles_are_exact_at_the_end_of_a_long_text(theta):
    places, half = np.array([0, 1, 7, 500, 8_191, 32_767]), 32
    angle = places[:, None] * theta ** (-np.arange(half) / half)  # in float64
    x = np.concatenate([np.ones(half), np.zeros(half)]).astype(np.float32)
    ours = jax.jit(lambda x, p: rotate(Rotary(theta=theta), x, p))(
        np.tile(x, (1, len(places), 1, 1)), places[None]
    )[0, :, 0]
    # Float32 angles round: half a unit in the last place of the largest, and a little.
    error = np.abs(np.asarray(ours) - np.concatenate([np.cos(angle), np.sin(angle)], axis=1))
    assert np.all(error <= 2e-6 + 1.5e-7 * angle.max(axis=1, keepdims=True))
