"""Tiny published configurations of BERT, RoBERTa and its namesakes, GPT-2 and BART.

`CONFIGS[family](role, hidden, tied, vocab, **more)` makes one; `MODELS[family, role](config)` makes
the model where Transformers' auto classes do not, and `WHOLE[family]` is the class of a family's
own sequence-to-sequence model. The modules published_*.py do the same for the other families.
"""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers", reason="the oracle needs Transformers")

POSITIONS = 48


def bert_kin(cls):
    """A maker of configurations that name everything as BERT does."""

    def make(role, hidden, tied, vocab, **more):
        usual = {
            "vocab_size": vocab,
            "hidden_size": hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 2 * hidden,
            "max_position_embeddings": POSITIONS + 2,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
            "tie_word_embeddings": tied,
        }
        return cls(**(usual | more))

    return make


def bart_kin(cls, **own):
    """A maker of configurations that name everything as BART does."""

    def make(role, hidden, tied, vocab, **more):
        usual = {
            "vocab_size": vocab,
            "d_model": hidden,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 2 * hidden,
            "decoder_ffn_dim": 2 * hidden,
            "max_position_embeddings": POSITIONS,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
            "tie_word_embeddings": tied,
            "forced_eos_token_id": None,
        }
        return cls(**(usual | own | more))

    return make


def gpt2(role, hidden, tied, vocab, **more):
    usual = {
        "vocab_size": vocab,
        "n_embd": hidden,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": POSITIONS,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "tie_word_embeddings": tied,
    }
    return transformers.GPT2Config(**(usual | more))


CONFIGS = {
    "bert": bert_kin(transformers.BertConfig),
    "roberta": bert_kin(transformers.RobertaConfig),
    "xlm-roberta": bert_kin(transformers.XLMRobertaConfig),
    "camembert": bert_kin(transformers.CamembertConfig),
    "gpt2": gpt2,
    "bart": bart_kin(transformers.BartConfig),
}
MODELS = {("bart", "encoder"): lambda config: transformers.BartModel(config).encoder}
WHOLE = {"bart": transformers.BartForConditionalGeneration}
