"""Tiny published configurations of BERT's kin; see published.py."""

from __future__ import annotations

import published
import pytest
from published import bert_kin

torch = pytest.importorskip("torch", reason="the oracle needs PyTorch")
transformers = pytest.importorskip("transformers", reason="the oracle needs Transformers")


def distilbert(role, hidden, tied, vocab, **more):
    usual = {
        "vocab_size": vocab,
        "dim": hidden,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 2 * hidden,
        "max_position_embeddings": published.POSITIONS,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    return transformers.DistilBertConfig(**(usual | more))


def ernie(role, hidden, tied, vocab, **more):
    """Tasks in an encoder, none in a decoder; the other ways are tested on their own."""
    usual = {"use_task_id": role == "encoder"}
    return bert_kin(transformers.ErnieConfig)(role, hidden, tied, vocab, **(usual | more))


def kin(name, **own):
    """A maker of BERT-like configurations with settings that a family has of its own."""
    make = bert_kin(getattr(transformers, name))
    return lambda *args, **more: make(*args, **(own | more))


CONFIGS = {
    "electra": kin("ElectraConfig", embedding_size=12),
    "albert": kin(
        "AlbertConfig",
        embedding_size=12,
        num_hidden_layers=5,
        num_hidden_groups=3,
        inner_group_num=2,
    ),
    "distilbert": distilbert,
    "bert-generation": kin("BertGenerationConfig"),
    "mpnet": kin("MPNetConfig"),
    "ernie": ernie,
    "data2vec-text": kin("Data2VecTextConfig"),
    "roberta-prelayernorm": kin("RobertaPreLayerNormConfig"),
    "megatron-bert": kin("MegatronBertConfig"),
    "xlm-roberta-xl": kin("XLMRobertaXLConfig"),
    "rembert": kin("RemBertConfig", input_embedding_size=12, output_embedding_size=20),
}


def repaired_megatron(config):
    """MegatronBertForCausalLM, its cross-attention repaired.

    PyTorch's takes the source for as long as the target, and fails where they differ; see the test
    named after it. Here it is what the class computes where it does not fail.
    """
    model = transformers.AutoModelForCausalLM.from_config(config)
    for layer in model.bert.encoder.layer:
        layer.crossattention.self.__class__ = _CrossAttention
    return model


class _CrossAttention(
    transformers.models.megatron_bert.modeling_megatron_bert.MegatronBertSelfAttention
):
    def forward(self, hidden_states, attention_mask=None, encoder_hidden_states=None, **unused):
        def heads(x):
            return x.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)

        query = heads(self.query(hidden_states))
        key = heads(self.key(encoder_hidden_states))
        value = heads(self.value(encoder_hidden_states))
        scores = query @ key.transpose(-1, -2) / self.attention_head_size**0.5
        weights = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
        return (weights @ value).transpose(1, 2).flatten(2), weights


# These know eager attention only.
MODELS = {
    (name, "encoder"): transformers.AutoModel.from_config
    for name in ("mpnet", "megatron-bert", "rembert")
}
MODELS["rembert", "decoder"] = transformers.AutoModelForCausalLM.from_config
MODELS["megatron-bert", "decoder"] = repaired_megatron
WHOLE = {}
