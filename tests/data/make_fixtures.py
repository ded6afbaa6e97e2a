"""Make the folders beside this file; needs the last versions that had Flax and TensorFlow classes.

    pip install transformers==4.48.3 torch jax==0.4.35 flax==0.10.2
    pip install tensorflow-cpu==2.18 tf-keras==2.18
    python make_fixtures.py FOLDER [NAME...]

Each tiny model of random weights is saved by the real PyTorch class (model.safetensors), read and
saved again by the real Flax class (flax_model.msgpack) and by the real TensorFlow class
(tf_model.h5, packed by gzip: HDF5 is mostly zeros at this size), where there is one. Then the
PyTorch class reads both: it must find what it saved, bit for bit.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax.numpy as jnp
import torch
import transformers as tr
from safetensors.torch import load_file

BERT = {
    "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 12, "max_position_embeddings": 10,
}  # fmt: skip
GPT2 = {"vocab_size": 22, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 10}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
BART = {
    "vocab_size": 20, "d_model": 8, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12, "max_position_embeddings": 10,
}  # fmt: skip
T5 = {
    "vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2,
    "relative_attention_num_buckets": 4,
}  # fmt: skip
DISTILBERT = {
    "vocab_size": 20, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 12,
    "max_position_embeddings": 10,
}  # fmt: skip
DEBERTA = BERT | {
    "relative_attention": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm",
    "conv_kernel_size": 3, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False,
    "share_att_key": True, "pad_token_id": 0,
}  # fmt: skip
XGLM = {
    "vocab_size": 20, "d_model": 8, "num_layers": 1, "attention_heads": 2, "ffn_dim": 12,
    "max_position_embeddings": 10,
}  # fmt: skip
SMALL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STARTED = SMALL_IDS | {"decoder_start_token_id": 1, "forced_eos_token_id": 2}
DECODER = {"is_decoder": True, "add_cross_attention": True}


def pair(encoder, decoder):
    """A pair's configuration."""
    config = tr.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    return config


def models() -> dict[str, tuple[str, object]]:
    """Folder -> (name of the PyTorch class, configuration)."""
    bert = tr.BertConfig(**BERT)
    return {
        "bert_lm": ("BertForMaskedLM", bert),
        "roberta_lm": ("RobertaForCausalLM", tr.RobertaConfig(**BERT, is_decoder=True)),
        "electra": ("ElectraModel", tr.ElectraConfig(**BERT, embedding_size=4)),
        "albert": ("AlbertModel", tr.AlbertConfig(**BERT, embedding_size=4)),
        "gpt2": ("GPT2LMHeadModel", tr.GPT2Config(**GPT2)),
        "bart": ("BartForConditionalGeneration", tr.BartConfig(**BART)),
        "t5": ("T5ForConditionalGeneration", tr.T5Config(**T5)),
        "mt5": ("MT5ForConditionalGeneration", tr.MT5Config(**T5)),
        "blenderbot": (
            "BlenderbotForConditionalGeneration",
            tr.BlenderbotConfig(**BART, **STARTED),
        ),
        "blenderbot_small": (
            "BlenderbotSmallForConditionalGeneration",
            tr.BlenderbotSmallConfig(**BART, **STARTED),
        ),
        "marian": ("MarianMTModel", tr.MarianConfig(**BART, **STARTED)),
        "mbart": ("MBartForConditionalGeneration", tr.MBartConfig(**BART, **STARTED)),
        "pegasus": ("PegasusForConditionalGeneration", tr.PegasusConfig(**BART, **STARTED)),
        "bert_both": ("BertForPreTraining", bert),
        "albert_lm": ("AlbertForMaskedLM", tr.AlbertConfig(**BERT, embedding_size=4)),
        "camembert": ("CamembertForMaskedLM", tr.CamembertConfig(**BERT)),
        "deberta_v2": ("DebertaV2ForMaskedLM", tr.DebertaV2Config(**DEBERTA)),
        "distilbert": ("DistilBertForMaskedLM", tr.DistilBertConfig(**DISTILBERT)),
        "electra_lm": ("ElectraForMaskedLM", tr.ElectraConfig(**BERT, embedding_size=4)),
        "longformer": (
            "LongformerForMaskedLM",
            tr.LongformerConfig(**BERT, attention_window=[4]),
        ),
        "mpnet": ("MPNetForMaskedLM", tr.MPNetConfig(**BERT)),
        "rembert": (
            "RemBertForMaskedLM",
            tr.RemBertConfig(**BERT, **SMALL_IDS, input_embedding_size=4, output_embedding_size=6),
        ),
        "roberta_prelayernorm": (
            "RobertaPreLayerNormForMaskedLM",
            tr.RobertaPreLayerNormConfig(**BERT),
        ),
        "roformer": ("RoFormerForMaskedLM", tr.RoFormerConfig(**BERT)),
        "xglm": ("XGLMForCausalLM", tr.XGLMConfig(**XGLM, **SMALL_IDS)),
        "xlm_roberta": ("XLMRobertaForMaskedLM", tr.XLMRobertaConfig(**BERT)),
        "bert_gpt2": (
            "EncoderDecoderModel",
            pair(bert, tr.GPT2Config(**GPT2, **DECODER)),
        ),
        "roberta_bert": (
            "EncoderDecoderModel",
            pair(
                tr.RobertaConfig(**BERT),
                tr.BertConfig(**{**BERT, "hidden_size": 12}, **DECODER),
            ),
        ),
        "xlm_roberta_pair": (
            "EncoderDecoderModel",
            pair(tr.XLMRobertaConfig(**BERT), tr.XLMRobertaConfig(**BERT, **DECODER)),
        ),
    }


def save_torch(folder: Path, kind: str, config) -> None:
    """model.safetensors, with no biases of zeros or scales of ones, which agree when swapped."""
    torch.manual_seed(0)
    model = getattr(tr, kind)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # a table of sines is what it is
                parameter.normal_()
        for name, buffer in model.named_buffers():
            if name == "final_logits_bias":
                buffer.normal_()
    model.save_pretrained(folder)


def save_flax(folder: Path, kind: str) -> None:
    """flax_model.msgpack."""
    # RoFormer's class asks it of arrays, which had it in older versions of JAX.
    type(jnp.ones(2)).split = jnp.split
    model = getattr(tr, f"Flax{kind}").from_pretrained(folder, from_pt=True)
    model.save_pretrained(folder)
    check(folder, kind, "flax_model.msgpack", from_flax=True)


def save_tensorflow(folder: Path, kind: str) -> None:
    """tf_model.h5.gz."""
    # A pair's class looks for an encoder's tensors under its model type, where XLM-RoBERTa's main
    # layer is called "roberta"; what it does not find it leaves random.
    tr.TFEncoderDecoderModel.tf_to_pt_weight_rename = lambda self, name: (
        re.sub(r"^encoder\.(bert|roberta)\.", "encoder.", name),
    )
    model = getattr(tr, f"TF{kind}").from_pretrained(folder, from_pt=True)
    model.save_pretrained(folder, safe_serialization=False)
    check(folder, kind, "tf_model.h5", from_tf=True)
    file = folder / "tf_model.h5"
    (folder / "tf_model.h5.gz").write_bytes(gzip.compress(file.read_bytes(), mtime=0))
    file.unlink()


def check(folder: Path, kind: str, file: str, **source) -> None:
    """The PyTorch class reads from a file what it saved, but for buffers, which it does not."""
    if kind == "EncoderDecoderModel":
        return  # It reads those of PyTorch only.
    with tempfile.TemporaryDirectory() as alone:
        for name in ("config.json", file):
            shutil.copy(folder / name, alone)
        found = dict(getattr(tr, kind).from_pretrained(alone, **source).named_parameters())
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name in found and not torch.equal(found[name], tensor):
            print(f"{folder.name}: {kind} reads another {name} from {file}")


def main(out: Path, names: list[str]) -> None:
    """Make everything, or what is named."""
    for name, (kind, config) in models().items():
        if names and name not in names:
            continue
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        save_torch(folder, kind, config)
        text = (folder / "config.json").read_bytes()
        for prefix, save in (("Flax", save_flax), ("TF", save_tensorflow)):
            if hasattr(tr, f"{prefix}{kind}"):
                save(folder, kind)
                (folder / "config.json").write_bytes(text)
        (folder / "generation_config.json").unlink(missing_ok=True)
    print(sum(f.stat().st_size for f in out.rglob("*") if f.is_file()), "bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
