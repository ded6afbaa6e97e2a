"""Tiny published configurations of T5's kin and of encoders with positions of their own.

See published.py. Sizes make each family's own axis matter: buckets, windows and relative positions
are smaller than the texts, RoFormer's embeddings narrower than its trunk.
"""

from __future__ import annotations

from importlib import import_module
from typing import ClassVar

import pytest
from published import bert_kin, transformers

torch = pytest.importorskip("torch", reason="the oracle needs PyTorch")
outputs = transformers.modeling_outputs

# T5 ----------------------------------------------------------------------------------------------


def t5_kin(cls, **own):
    """A maker of configurations that name everything as T5 does."""

    def make(role, hidden, tied, vocab, **more):
        usual = {
            "vocab_size": vocab,
            "d_model": hidden,
            "d_kv": 6,
            "d_ff": 2 * hidden,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 3,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
            "tie_word_embeddings": tied,
        }
        config = cls(**(usual | own | more))
        # The constructor takes it for a sign of the scale and then calls every head tied.
        config.tie_word_embeddings = tied
        return config

    return make


def t5_decoder(base, stack):
    """The decoder with its head as a class of its own, which Transformers lacks."""

    class Decoder(base, transformers.GenerationMixin):
        _tied_weights_keys: ClassVar = {"lm_head.weight": "decoder.embed_tokens.weight"}

        def __init__(self, config):
            self.__dict__["tied"] = config.tie_word_embeddings
            super().__init__(config)
            self.decoder = stack(config)
            self.lm_head = torch.nn.Linear(config.d_model, config.vocab_size, bias=False)
            self.post_init()

        @property
        def config(self):
            return self.__dict__["_config"]

        @config.setter
        def config(self, config):
            # EncoderDecoderModel makes the configuration anew, and so calls the head tied.
            config.tie_word_embeddings = self.__dict__["tied"]
            self.__dict__["_config"] = config

        def get_input_embeddings(self):
            return self.decoder.embed_tokens

        def get_output_embeddings(self):
            return self.lm_head

        def forward(
            self,
            input_ids=None,
            attention_mask=None,
            encoder_hidden_states=None,
            encoder_attention_mask=None,
            past_key_values=None,
            use_cache=None,
            return_dict=True,
            **kwargs,
        ):
            out = self.decoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
            scaled = self.config.tie_word_embeddings and self.config.model_type != "mt5"
            states = out.last_hidden_state * (self.config.d_model**-0.5 if scaled else 1.0)
            return outputs.CausalLMOutputWithCrossAttentions(
                logits=self.lm_head(states),
                past_key_values=out.past_key_values,
                hidden_states=out.hidden_states,
                attentions=out.attentions,
                cross_attentions=out.cross_attentions,
            )

    return Decoder


def t5_whole(cls):
    """A maker of whole models; Transformers 5 unties a head only when it reads such a file."""

    def make(config):
        tied, config.tie_word_embeddings = config.tie_word_embeddings, True
        model = cls(config)
        if not tied:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
            model.all_tied_weights_keys.pop("lm_head.weight")
            model.config.tie_word_embeddings = False
        return model

    return make


# RoFormer ----------------------------------------------------------------------------------------


def roformer(auto):
    """A maker of models whose table of sines is no parameter that the tests could make random."""

    def make(config):
        model = auto.from_config(config)
        for module in list(model.modules()):
            if type(module).__name__ == "RoFormerSinusoidalPositionalEmbedding":
                table = module.weight.detach().clone()
                del module._parameters["weight"]
                module.register_buffer("weight", table)
        return model

    return make


# The others --------------------------------------------------------------------------------------


def with_options(make, **own):
    """A maker of configurations with options that the family's own axis wants."""
    return lambda role, hidden, tied, vocab, **more: make(role, hidden, tied, vocab, **(own | more))


def modernbert(role, hidden, tied, vocab, **more):
    usual = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "local_attention": 4,
        "bos_token_id": 0,
        "cls_token_id": 0,
        "eos_token_id": 2,
        "sep_token_id": 2,
        "pad_token_id": 1,
    }
    return transformers.ModernBertConfig(**(usual | more))


CONFIGS = {
    "t5": t5_kin(transformers.T5Config),
    "mt5": t5_kin(transformers.MT5Config),
    "umt5": t5_kin(transformers.UMT5Config),
    "roformer": with_options(
        bert_kin(transformers.RoFormerConfig), embedding_size=12, rotary_value=True
    ),
    "deberta-v2": with_options(
        bert_kin(transformers.DebertaV2Config),
        relative_attention=True,
        position_buckets=4,
        max_relative_positions=8,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
    ),
    "modernbert": modernbert,
    "longformer": with_options(bert_kin(transformers.LongformerConfig), attention_window=[4, 8]),
}
MODELS = {
    ("t5", "encoder"): transformers.T5EncoderModel,
    ("mt5", "encoder"): transformers.MT5EncoderModel,
    ("umt5", "encoder"): transformers.UMT5EncoderModel,
    ("roformer", "encoder"): roformer(transformers.AutoModel),
    ("deberta-v2", "encoder"): transformers.DebertaV2Model,
    ("longformer", "encoder"): transformers.LongformerModel,
    ("roformer", "decoder"): roformer(transformers.AutoModelForCausalLM),
}
WHOLE = {}
for _name in ("t5", "mt5", "umt5"):
    _module = import_module(f"transformers.models.{_name}.modeling_{_name}")
    _base, _stack, _whole = (
        getattr(_module, _name.upper() + what)
        for what in ("PreTrainedModel", "Stack", "ForConditionalGeneration")
    )
    MODELS[_name, "decoder"] = t5_decoder(_base, _stack)
    WHOLE[_name] = t5_whole(_whole)
