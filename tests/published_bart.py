"""Tiny published configurations of BART's kin; see published.py."""

from __future__ import annotations

from published import POSITIONS, bart_kin, transformers


def trocr(role, hidden, tied, vocab, **more):
    usual = {
        "vocab_size": vocab,
        "d_model": hidden,
        "decoder_layers": 2,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 2 * hidden,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "tie_word_embeddings": tied,
    }
    return transformers.TrOCRConfig(**(usual | more))


def xglm(role, hidden, tied, vocab, **more):
    usual = {
        "vocab_size": vocab,
        "d_model": hidden,
        "num_layers": 2,
        "attention_heads": 4,
        "ffn_dim": 2 * hidden,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "tie_word_embeddings": tied,
    }
    return transformers.XGLMConfig(**(usual | more))


CONFIGS = {
    "mbart": bart_kin(transformers.MBartConfig, scale_embedding=True),
    "marian": bart_kin(transformers.MarianConfig, scale_embedding=True, activation_function="silu"),
    "pegasus": bart_kin(transformers.PegasusConfig, scale_embedding=True),
    "blenderbot": bart_kin(transformers.BlenderbotConfig),
    "blenderbot-small": bart_kin(transformers.BlenderbotSmallConfig),
    "plbart": bart_kin(transformers.PLBartConfig),
    "trocr": trocr,
    "xglm": xglm,
}
WHOLE = {
    "mbart": transformers.MBartForConditionalGeneration,
    "marian": transformers.MarianMTModel,
    "pegasus": transformers.PegasusForConditionalGeneration,
    "blenderbot": transformers.BlenderbotForConditionalGeneration,
    "blenderbot-small": transformers.BlenderbotSmallForConditionalGeneration,
    "plbart": transformers.PLBartForConditionalGeneration,
}
MODELS = {
    (name, "encoder"): lambda config, cls=cls: cls(config).get_encoder()
    for name, cls in WHOLE.items()
} | {
    # These have no fused attention to ask for.
    ("trocr", "decoder"): transformers.TrOCRForCausalLM,
    ("xglm", "encoder"): transformers.XGLMModel,
    ("xglm", "decoder"): transformers.XGLMForCausalLM,
}
