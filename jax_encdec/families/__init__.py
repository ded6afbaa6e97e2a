"""Families as data: one small file each, from the published config.json to the trunk's parts.

Every module of this package is a family, or a few namesakes; its classes register themselves by
being here. The table of its published tensors is the module of the same name in
`jax_encdec.convert`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

from jax_encdec.errors import ConfigError, nearest
from jax_encdec.families.base import FamilyConfig


def _classes() -> Iterator[type[FamilyConfig]]:
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            own = isinstance(value, type) and value.__module__ == module.__name__
            if own and issubclass(value, FamilyConfig) and hasattr(value, "model_type"):
                yield value


FAMILIES: Mapping[str, type[FamilyConfig]] = {cls.model_type: cls for cls in _classes()}
"""Every supported family, by its published `model_type`."""

CONFIGS: Mapping[str, type[FamilyConfig]] = {cls.__name__: cls for cls in FAMILIES.values()}
"""The same, by the class's name."""


def __getattr__(name: str) -> Any:
    if name in CONFIGS:
        return CONFIGS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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


__all__ = ["CONFIGS", "FAMILIES", "FamilyConfig", "family_config"]
