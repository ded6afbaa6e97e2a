"""What a family says about its published tensors: one `Table` each, data for `tables.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jax_encdec.config import Role
from jax_encdec.convert.rules import Rule
from jax_encdec.families import FamilyConfig

# Why a tensor is left aside; reports quote these.
BUFFER = "a buffer that the code recomputes"
OTHER_HEAD = "a head for another task"
NO_HEAD = "a language model head, which an encoder has not"
NO_CROSS = "cross-attention, which an encoder has not"
OTHER_HALF = "the other half of the published model"
LEFT_OUT = "a layer left out"


@dataclass(frozen=True)
class Standalone:
    """How single checkpoints hold one role's bare model.

    Attributes:
        prefixes: what stands before the body's names, tried in order.
        rules: further names of the same leaves, complete.
        ignored: (pattern, reason) of tensors that only this use leaves over.
    """

    prefixes: tuple[str, ...]
    rules: tuple[Rule, ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Table:
    """Where one family's published tensors live in a trunk's parameters.

    Attributes:
        body: rules of the bare model in a role; leaves are relative to the trunk.
        head: rules of the decoder's language model head, under the names that stand beside the
            nested bare model.
        nested: how a decoder with its head nests the bare model ("bert.").
        standalone: how single checkpoints hold the bare model in a role.
        ignored: (pattern, reason) of tensors that checkpoints carry and nobody needs; patterns
            match complete names.
        whole: all rules of the family's own sequence-to-sequence model, if it has one.
    """

    body: Callable[[FamilyConfig, Role], tuple[Rule, ...]]
    head: Callable[[FamilyConfig], tuple[Rule, ...]]
    nested: str
    standalone: Callable[[FamilyConfig, Role], Standalone]
    ignored: tuple[tuple[str, str], ...] = ()
    whole: Callable[[FamilyConfig], tuple[Rule, ...]] | None = None
