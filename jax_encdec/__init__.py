"""Any pretrained encoder, any pretrained decoder, one sequence-to-sequence model, in pure JAX.

The public names, loaded when first used: reading a checkpoint or a configuration needs only NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_encdec.decoding.config import GenerationConfig as GenerationConfig
    from jax_encdec.decoding.engine import GenerationOutput as GenerationOutput
    from jax_encdec.decoding.export import export as export
    from jax_encdec.decoding.exported import load_exported as load_exported
    from jax_encdec.decoding.sharded import shard_params as shard_params
    from jax_encdec.encoder_decoder import EncoderDecoderModel as EncoderDecoderModel
    from jax_encdec.encoder_decoder import EncoderOutput as EncoderOutput
    from jax_encdec.encoder_decoder import Seq2SeqLMOutput as Seq2SeqLMOutput
    from jax_encdec.encoder_decoder_config import EncoderDecoderConfig as EncoderDecoderConfig
    from jax_encdec.errors import CheckpointError as CheckpointError
    from jax_encdec.errors import ConfigError as ConfigError
    from jax_encdec.errors import EncDecError as EncDecError
    from jax_encdec.errors import InputError as InputError
    from jax_encdec.execution import Execution as Execution
    from jax_encdec.families.bart import BartConfig as BartConfig
    from jax_encdec.families.bert import BertConfig as BertConfig
    from jax_encdec.families.gpt2 import GPT2Config as GPT2Config
    from jax_encdec.families.roberta import CamembertConfig as CamembertConfig
    from jax_encdec.families.roberta import RobertaConfig as RobertaConfig
    from jax_encdec.families.roberta import XLMRobertaConfig as XLMRobertaConfig
    from jax_encdec.pipeline import Text2TextPipeline as Text2TextPipeline
    from jax_encdec.tokenization import Tokenizer as Tokenizer
    from jax_encdec.tokenization import TokenizerPair as TokenizerPair
    from jax_encdec.training.sharding import make_mesh as make_mesh

__version__ = "0.1.0"

_HOME = {
    "GenerationConfig": "decoding.config",
    "GenerationOutput": "decoding.engine",
    "export": "decoding.export",
    "load_exported": "decoding.exported",
    "shard_params": "decoding.sharded",
    "EncoderDecoderModel": "encoder_decoder",
    "EncoderOutput": "encoder_decoder",
    "Seq2SeqLMOutput": "encoder_decoder",
    "EncoderDecoderConfig": "encoder_decoder_config",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "EncDecError": "errors",
    "InputError": "errors",
    "Execution": "execution",
    "Text2TextPipeline": "pipeline",
    "make_mesh": "training.sharding",
    "Tokenizer": "tokenization",
    "TokenizerPair": "tokenization",
}

__all__ = ["__version__", *sorted(_HOME)]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name.endswith("Config") and name not in _HOME:
        # Every family's configuration, without a list of them here.
        from jax_encdec.families import CONFIGS

        if name in CONFIGS:
            return CONFIGS[name]
    if name not in _HOME:
        raise AttributeError(f"module 'jax_encdec' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jax_encdec.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    from jax_encdec.families import CONFIGS

    return sorted({*__all__, *CONFIGS})
