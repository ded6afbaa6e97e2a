"""The oracle: tiny random PyTorch models of every family, and the pairs built from them."""

from __future__ import annotations

import copy

import numpy as np
import published
import published_bart
import published_bert
import published_other
import pytest

torch = pytest.importorskip("torch", reason="the oracle needs PyTorch")
transformers = pytest.importorskip("transformers", reason="the oracle needs Transformers")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)

_MODULES = (published, published_bert, published_bart, published_other)
CONFIGS = {name: make for module in _MODULES for name, make in module.CONFIGS.items()}
MODELS = {key: make for module in _MODULES for key, make in module.MODELS.items()}
WHOLE = {name: cls for module in _MODULES for name, cls in module.WHOLE.items()}

ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "gpt2", "bart")
DECODERS = ENCODERS
"""The families whose pairs are all tested; `test_families.py` tests every family."""
VOCAB = {"encoder": 61, "decoder": 53}
POSITIONS = published.POSITIONS


def family_config(family, role, hidden=16, tied=True, vocab=None, **more):
    """A tiny published configuration of a family."""
    config = CONFIGS[family](role, hidden, tied, vocab or VOCAB[role], **more)
    if role == "decoder":
        config.is_decoder, config.add_cross_attention = True, True
    return config


def family_model(family, role, config, attention="sdpa"):
    """A family's model in a role: with cross-attention and head as a decoder."""
    if (family, role) in MODELS:
        return MODELS[family, role](config)
    auto = transformers.AutoModel if role == "encoder" else transformers.AutoModelForCausalLM
    return auto.from_config(config, attn_implementation=attention)


def randomize(model, seed: int, scale: float = 0.35):
    """Make every parameter matter: random biases and norms, kernels large enough to disagree."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue  # a table of sinusoids, which some files leave out
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name.lower() or "ln_" in name:
                p.add_(0.2 * noise)
            else:
                p.copy_(scale * noise)
    return model.eval()


def torch_pair(
    encoder: str,
    decoder: str,
    *,
    hidden=(16, 16),
    tied=True,
    seed=0,
    vocab=None,
    attention="sdpa",
    **more,
):
    """A random EncoderDecoderModel; parts are assembled by hand where PyTorch cannot."""
    enc = family_config(encoder, "encoder", hidden[0], vocab=vocab)
    dec = family_config(decoder, "decoder", hidden[1], tied, vocab, **more)
    torch.manual_seed(seed)
    enc_model = family_model(encoder, "encoder", enc, attention)
    dec_model = family_model(decoder, "decoder", dec, attention)
    model = transformers.EncoderDecoderModel(encoder=enc_model, decoder=dec_model)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 0, 1, 2
    return randomize(model, seed)


def source_batch(rng: np.random.Generator, batch: int = 3, length: int = 9):
    """Source ids and mask `[batch, length]`, padded right, every row of another length."""
    ids = rng.integers(3, VOCAB["encoder"], (batch, length))
    mask = np.ones_like(ids)
    for row in range(1, batch):
        mask[row, length - 2 * row :] = 0
    ids[mask == 0] = 1
    return ids.astype(np.int32), mask.astype(np.int32)


def labels_batch(rng: np.random.Generator, batch: int = 3, length: int = 7):
    """Labels `[batch, length]`, ends padded with -100."""
    labels = rng.integers(3, VOCAB["decoder"], (batch, length))
    for row in range(1, batch):
        labels[row, length - row :] = -100
    return labels.astype(np.int32)


def as_torch(x):
    return torch.tensor(np.asarray(x), dtype=torch.long)


def clone(model):
    return copy.deepcopy(model)


def from_torch(model):
    """The same model here, through a saved folder: (model, params)."""
    import tempfile

    from jax_encdec import EncoderDecoderModel

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return EncoderDecoderModel.from_pretrained(folder)


def assert_same_tokens(model, ours, params, ids, mask, **options):
    """Generate with both: same tokens up to near-ties of the oracle, same scores with beams.

    A row may differ where the oracle's own float64 margin at the first difference is under 1e-4.
    Returns the number of such rows.
    """
    with torch.no_grad():
        theirs = model.generate(
            input_ids=as_torch(ids),
            attention_mask=as_torch(mask),
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    found = ours.generate(params, ids, attention_mask=mask, **options)
    sequences, lengths = np.asarray(found.sequences), np.asarray(found.lengths)
    expected = theirs.sequences.numpy()
    assert len(sequences) == len(expected)
    ties = 0
    for row, length in enumerate(lengths):
        # After the end both pad, the oracle sometimes with the wrong token.
        same = expected.shape[1] >= length and np.array_equal(
            sequences[row, :length], expected[row, :length]
        )
        same = same and (length == expected.shape[1] or _ended(model, expected[row], length))
        if not same:
            margin = near_tie(model, ids, mask, row, sequences[row], expected[row], options)
            assert margin < 1e-4, (row, sequences[row], expected[row], margin)
            ties += 1
    if options.get("num_beams", 1) > 1 and not ties:
        np.testing.assert_allclose(
            np.asarray(found.sequences_scores),
            theirs.sequences_scores.numpy(),
            atol=1e-4,
            rtol=2e-6,
        )
    return ties


def _ended(model, sequence, length):
    eos = model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    rest = set(sequence[length:].tolist())
    return not rest or rest <= {*eos, model.generation_config.pad_token_id}


def near_tie(model, ids, mask, row, ours, theirs, options):
    """How far apart the oracle, in float64, scores the two answers of a row."""
    exact = copy.deepcopy(model).double()
    beams = options.get("num_beams", 1)
    at = int(np.argmax(ours[: len(theirs)] != theirs[: len(ours)]))
    source = row // options.get("num_return_sequences", 1)
    given = {
        "input_ids": as_torch(ids[source : source + 1]),
        "attention_mask": as_torch(mask[source : source + 1]),
    }
    with torch.no_grad():
        if beams == 1:
            logits = exact(**given, decoder_input_ids=as_torch(theirs[None, :at])).logits[0, -1]
            return abs(float(logits[int(ours[at])] - logits[int(theirs[at])]))
        scores = []
        for answer in (ours, theirs):
            prefix = as_torch(answer[None])
            logits = exact(**given, decoder_input_ids=prefix[:, :-1]).logits.log_softmax(-1)
            picked = logits.gather(-1, prefix[:, 1:, None])[0, :, 0]
            scores.append(float(picked[: at + 1].sum()))
        return abs(scores[0] - scores[1])
