"""Tiny random pairs with a tokenizer, saved as users find them; made without PyTorch."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jax_encdec import (
    BartConfig,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GenerationConfig,
    GPT2Config,
    TokenizerPair,
)
from jax_encdec.cli import dates

POSITIONS = 48


@functools.cache
def tokenizers() -> TokenizerPair:
    """A small WordPiece vocabulary for both sides."""
    texts = [text for example in dates.make_examples("train", 300, 0) for text in example]
    tokenizer = dates.train_tokenizer(texts, 160)
    return TokenizerPair(source=tokenizer, target=tokenizer)


@functools.cache
def texts(count: int) -> tuple[str, ...]:
    """Texts of one bucket of lengths, so that one program serves them all."""
    return tuple(text.strip() for text, _ in dates.make_examples("heldout", count, 1))


def bert(**more) -> BertConfig:
    size: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    size |= {"intermediate_size": 32, "max_position_embeddings": POSITIONS}
    return BertConfig(vocab_size=tokenizers().source.vocab_size, **(size | more))


def config(kind: str = "bert2bert") -> EncoderDecoderConfig:
    vocab = tokenizers().source.vocab_size
    cls, sep = (tokenizers().source.backend.token_to_id(t) for t in ("[CLS]", "[SEP]"))
    ids = {"decoder_start_token_id": cls, "eos_token_id": sep, "pad_token_id": 0}
    if kind == "bart":
        half = BartConfig(
            vocab_size=vocab, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32,
            decoder_ffn_dim=32, max_position_embeddings=POSITIONS, bos_token_id=cls, **ids,
        )  # fmt: skip
        return EncoderDecoderConfig(encoder=half, decoder=half, whole=True)
    decoder = bert()
    if kind == "bert2gpt2":
        decoder = GPT2Config(
            vocab_size=vocab, n_embd=24, n_layer=1, n_head=4, n_positions=POSITIONS,
            bos_token_id=cls, eos_token_id=sep,
        )  # fmt: skip
    tie = kind == "tied"
    return EncoderDecoderConfig(encoder=bert(), decoder=decoder, tie_encoder_decoder=tie, **ids)


@functools.cache
def pair(kind: str = "bert2bert"):
    """A model and parameters large enough that every text has an answer of its own."""
    model = EncoderDecoderModel(config(kind), GenerationConfig(max_new_tokens=12))
    rng = np.random.default_rng(0)
    flat: dict[tuple[str, ...], Any] = flatten_dict(model.param_shapes())
    for path, leaf in flat.items():
        scale = 0.8 if path[-1] in ("kernel", "token") else 0.1
        if "cross_attention" in path and path[-2] in ("value", "out"):
            scale *= 3  # The text must be heard.
        noise = scale * rng.standard_normal(leaf.shape, np.float32)
        flat[path] = (path[-1] == "scale") + noise
    params = unflatten_dict(flat)
    return model, params


def save(folder: Path, kind: str = "bert2bert") -> Path:
    model, params = pair(kind)
    model.save_pretrained(folder, params)
    tokenizers().save(folder)
    return folder
