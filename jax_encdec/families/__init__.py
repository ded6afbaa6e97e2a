"""Families as data: one small file each, from the published config.json to the trunk's parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_encdec.errors import ConfigError, nearest
from jax_encdec.families.bart import BartConfig
from jax_encdec.families.base import FamilyConfig
from jax_encdec.families.bert import BertConfig
from jax_encdec.families.gpt2 import GPT2Config
from jax_encdec.families.roberta import CamembertConfig, RobertaConfig, XLMRobertaConfig

FAMILIES: Mapping[str, type[FamilyConfig]] = {
    cls.model_type: cls
    for cls in (
        BertConfig,
        RobertaConfig,
        XLMRobertaConfig,
        CamembertConfig,
        GPT2Config,
        BartConfig,
    )
}
"""Every supported family, by its published `model_type`."""


def family_config(data: Mapping[str, Any], where: str = "config") -> FamilyConfig:
    """Read one model's published configuration, of whichever family it names.

    Raises:
        ConfigError: the family is missing or unknown, or a value is impossible.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} must be an object with a model_type; got {data!r}")
    name = data.get("model_type")
    if name is None:
        raise ConfigError(f"{where} has no model_type; expected one of {', '.join(FAMILIES)}")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError(
            f"{where}: model_type {name!r} is not supported; expected one of "
            f"{', '.join(FAMILIES)}{nearest(str(name), FAMILIES)}"
        )
    return FAMILIES[name].from_dict(data, where)


__all__ = [
    "FAMILIES",
    "BartConfig",
    "BertConfig",
    "CamembertConfig",
    "FamilyConfig",
    "GPT2Config",
    "RobertaConfig",
    "XLMRobertaConfig",
    "family_config",
]
