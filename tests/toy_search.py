"""A toy model for searches: logits from a random table, and `transformers.generate` on the same.

The table is indexed by the source row, the position and a rolling hash of the whole prefix, so one
wrong parent anywhere shows. The oracle is a real `GenerationMixin` model.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.decoding.search import SearchOutput, prepare, search

VOCAB, HASHES, SOURCES, WIDTH = 23, 509, 8, 7
START, PAD = 1, 3


def make_table(seed: int = 0, scale: float = 1.5) -> np.ndarray:
    """Random logits `[SOURCES, HASHES, VOCAB]`."""
    rng = np.random.default_rng(seed)
    return (scale * rng.normal(size=(SOURCES, HASHES, VOCAB))).astype(np.float32)


def make_sources(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Unpadded random sources; the first token of a row picks its logit table."""
    ids = rng.integers(4, VOCAB, size=(rows, WIDTH)).astype(np.int32)
    ids[:, 0] = rng.permutation(SOURCES)[:rows] if rows <= SOURCES else 0
    return ids, np.ones_like(ids)


def step(state, tokens, parents, position):
    """One step of the toy model in JAX: its state is the hash of every beam's prefix."""
    table, rows, prefix = state
    prefix = jnp.take_along_axis(prefix, parents, axis=1)
    prefix = (prefix * 31 + tokens + 7) % HASHES
    return table[rows[:, None], (prefix + 37 * position) % HASHES], (table, rows, prefix)


FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}


@functools.partial(jax.jit, static_argnames="spec", compiler_options=FAST_TO_COMPILE)
def run(spec, values, table, source_ids, source_mask, prompt, key, prompt_length=None):
    lanes = spec.num_beams if spec.num_beams > 1 else spec.num_return_sequences
    prefix = jnp.zeros((len(prompt), lanes), jnp.int32)
    return search(
        step,
        (table, source_ids[:, 0], prefix),
        prompt,
        spec=spec,
        values=values,
        source_ids=source_ids,
        source_mask=source_mask,
        key=key,
        prompt_length=prompt_length,
    )


def ours(table, ids, mask, options, prompt=None, key=None, capacity=24, stops=None) -> SearchOutput:
    prompt = np.full((len(ids), 1), START, np.int32) if prompt is None else prompt
    config = GenerationConfig(decoder_start_token_id=START, pad_token_id=PAD).replace(**options)
    spec, values = prepare(
        config, vocab_size=VOCAB, prompt_length=prompt.shape[1], capacity=capacity, stops=stops
    )
    out = run(spec, values, table, ids, mask, prompt, jax.random.key(0) if key is None else key)
    return jax.tree.map(np.asarray, out)


@functools.cache
def oracle_class():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

    class Config(transformers.PretrainedConfig):
        model_type = "toy-table"

    class Encoder(torch.nn.Module):
        main_input_name = "input_ids"

        def forward(self, input_ids, attention_mask=None, **unused):
            return BaseModelOutput(last_hidden_state=input_ids[..., None].float())

    class Model(transformers.PreTrainedModel, transformers.GenerationMixin):
        config_class = Config
        main_input_name = "input_ids"

        def __init__(self, config):
            super().__init__(config)
            self.encoder = Encoder()
            self.anchor = torch.nn.Parameter(torch.zeros(1))
            self.post_init()

        def get_encoder(self, *unused, **also):
            return self.encoder

        def prepare_inputs_for_generation(self, decoder_input_ids, encoder_outputs=None, **unused):
            return {"decoder_input_ids": decoder_input_ids, "encoder_outputs": encoder_outputs}

        def forward(
            self,
            input_ids=None,
            attention_mask=None,
            decoder_input_ids: Any = None,
            encoder_outputs: Any = None,
            return_dict=True,
            **unused,
        ):
            rows = encoder_outputs.last_hidden_state[:, 0, 0].long()
            prefix = torch.zeros_like(rows)
            for token in decoder_input_ids.unbind(1):
                prefix = (prefix * 31 + token + 7) % HASHES
            entry = (prefix + 37 * (decoder_input_ids.shape[1] - 1)) % HASHES
            return Seq2SeqLMOutput(logits=self.table[rows, entry][:, None])

    return torch, Model, Config


def theirs(table, ids, options, prompt=None) -> tuple[np.ndarray, np.ndarray | None]:
    """Run `transformers.generate`; sequences `[B * R, *]` and scores (None when greedy)."""
    torch, Model, Config = oracle_class()
    model = Model(Config(is_encoder_decoder=True, vocab_size=VOCAB))
    model.table = torch.tensor(table)
    model.generation_config.decoder_start_token_id = START
    options = {"pad_token_id": PAD, **options}
    options = {k: jax.tree.map(lambda x: x, v) for k, v in options.items()}
    if prompt is not None:
        options["decoder_input_ids"] = torch.tensor(prompt).long()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        out = model.generate(
            torch.tensor(ids).long(),
            return_dict_in_generate=True,
            output_scores=True,
            use_cache=False,
            **options,
        )
    scores = getattr(out, "sequences_scores", None)
    return out.sequences.numpy(), None if scores is None else scores.numpy()


def assert_same(got: SearchOutput, sequences: np.ndarray, scores: np.ndarray | None, note=""):
    """Compare up to each sequence's length; both must be padding from there on.

    Where forced and banned tokens leave fewer hypotheses than were asked for, the rest score about
    -1e9 on both sides, and what stands there is nobody's promise.
    """
    flat = got.sequences.reshape(-1, got.sequences.shape[-1])
    lengths = got.lengths.reshape(-1)
    real = np.ones(len(flat), bool)
    if scores is not None:
        mine = got.sequences_scores.reshape(-1)
        real = scores > -1e8
        np.testing.assert_array_equal(mine > -1e8, real, err_msg=note)
        np.testing.assert_allclose(mine[real], scores[real], atol=1e-4, rtol=1e-5, err_msg=note)
    assert real.any()
    for row in np.flatnonzero(real):
        a, b, n = flat[row], sequences[row], lengths[row]
        np.testing.assert_array_equal(a[:n], b[:n], err_msg=f"{note} sequence {row}")
        assert (a[n:] == PAD).all(), note
        assert (b[n:] == PAD).all(), note
