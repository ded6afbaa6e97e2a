"""The rules of a whole checkpoint, for each layout that people publish.

`composite_parts` nests the tables of two families as EncoderDecoderModel does; `whole_parts` is a
family's own sequence-to-sequence layout; `standalone_part` reads a single checkpoint for one side
of a warm start.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import replace

from jax_encdec.config import Role, TransformerConfig
from jax_encdec.convert.rules import Part, linear, published_names
from jax_encdec.convert.table import LEFT_OUT, NO_CROSS, NO_HEAD, Table
from jax_encdec.encoder_decoder_config import EncoderDecoderConfig
from jax_encdec.errors import CheckpointError, ConfigError
from jax_encdec.families import FamilyConfig


def table_of(config: FamilyConfig) -> Table:
    """A family's table: that of its model type in the module named like the family's own."""
    name = type(config).__module__.rpartition(".")[2]
    module = importlib.import_module(f"jax_encdec.convert.{name}")
    return module.TABLES[config.model_type]


_TIED_HEAD = ("decoder", "head", "kernel"), ("decoder", "embedding", "token")
_UNUSED = "*/kept/*"  # published, never read: a file may lack them


def _lacking(**trunks: TransformerConfig) -> tuple[str, ...]:
    """Patterns of leaves that a file may lack: unused ones, and tables that a formula fills."""
    tables = {path: trunk.embedding.position for path, trunk in trunks.items()}
    fixed = [path for path, table in tables.items() if table is not None and table.fixed]
    return _UNUSED, *(f"{path}/embedding/position" for path in fixed)


def _head_alias(config: FamilyConfig) -> dict[tuple[str, ...], tuple[str, ...]]:
    return dict([_TIED_HEAD]) if config.ties_head else {}


def _chased(aliases: dict[tuple[str, ...], tuple[str, ...]]) -> dict:
    """Resolve aliases of aliases (a tied head on a shared embedding)."""
    return {alias: aliases.get(leaf, leaf) for alias, leaf in aliases.items()}


def composite_parts(config: EncoderDecoderConfig) -> tuple[Part, ...]:
    """Rules of a checkpoint in EncoderDecoderModel's layout."""
    encoder, decoder = table_of(config.encoder), table_of(config.decoder)
    aliases = _chased(config.aliases() | _head_alias(config.decoder))
    inner = [
        rule.prefixed("encoder.", "encoder") for rule in encoder.body(config.encoder, "encoder")
    ]
    outer = [
        rule.prefixed(f"decoder.{decoder.nested}", "decoder")
        for rule in decoder.body(config.decoder, "decoder")
    ]
    outer += [rule.prefixed("decoder.", "decoder") for rule in decoder.head(config.decoder)]
    joint = linear("enc_to_dec_proj", "enc_to_dec_proj") if config.projects else ()
    return (
        Part(
            tuple(inner),
            trunks={"encoder": config.encoder_trunk},
            ignored=tuple((f"encoder.{p}", why) for p, why in encoder.ignored),
            aliases=aliases,
            optional=_lacking(encoder=config.encoder_trunk),
        ),
        Part(
            tuple(outer),
            trunks={"decoder": config.decoder_trunk},
            ignored=tuple((f"decoder.{p}", why) for p, why in decoder.ignored),
            aliases=aliases,
            optional=_lacking(decoder=config.decoder_trunk),
        ),
        Part(joint),
    )


def whole_parts(config: EncoderDecoderConfig, names: Iterable[str] = ()) -> tuple[Part, ...]:
    """Rules of a checkpoint in a family's own sequence-to-sequence layout.

    Many were published without their head, and so without the prefix that the head's class puts
    before everything: `names`, the file's tensors, show which it is.
    """
    table = table_of(config.decoder)
    assert table.whole is not None
    rules = table.whole(config.decoder)
    names = published_names(names)
    if names and not any(name.startswith("model.") for name in names):
        rules = tuple(replace(rule, tensor=rule.tensor.removeprefix("model.")) for rule in rules)
    trunks = {"encoder": config.encoder_trunk, "decoder": config.decoder_trunk}
    return (
        Part(
            rules,
            trunks=trunks,
            ignored=table.ignored,
            aliases=_chased(config.aliases() | _head_alias(config.decoder)),
            optional=(*_lacking(**trunks), "decoder/head/bias"),
        ),
    )


def parts(config: EncoderDecoderConfig, names: Iterable[str] = ()) -> tuple[Part, ...]:
    """Rules of a pair's checkpoint in the layout that its configuration names.

    Args:
        names: the tensors of the file to be read; none for writing.
    """
    return whole_parts(config, names) if config.whole else composite_parts(config)


def standalone_part(
    config: FamilyConfig,
    role: Role,
    names: Iterable[str],
    *,
    where: str,
    layers: tuple[int, ...] | None = None,
) -> Part:
    """Rules of a single checkpoint as one side of a pair.

    Args:
        config: the side's configuration, layers already cut.
        names: the file's tensors, from which it is seen how it nests the bare model.
        layers: published layers to take; None: all, in order.

    Raises:
        CheckpointError: the file holds no model of this family.
    """
    table = table_of(config)
    names = published_names(names)
    body = table.body(config, role)
    # What shows how a file nests the bare model is a layer, if they have numbers of their own:
    # embeddings may stand elsewhere.
    layered = [rule.tensor for rule in body if "{}" in rule.tensor and "cross" not in rule.tensor]
    probe = layered[0] if layered else body[0].tensor
    single = table.standalone(config, role)
    prefix = next((p for p in single.prefixes if p + probe.format(0) in names), None)
    if prefix is None:
        looked = " or ".join(repr(p + probe.format(0)) for p in single.prefixes)
        raise CheckpointError(
            f"{where} holds no {config.model_type} {role}: expected a tensor {looked}; "
            f"got {len(names)} others such as {next(iter(names), 'none')!r}"
        )
    head = table.head(config)
    rules = [rule.prefixed(prefix, role) for rule in body]
    rules += [rule.prefixed("", role) for rule in single.rules]
    ignored = [*table.ignored, *single.ignored]
    trunk = config.to_trunk(role)
    optional = list(_lacking(**{role: trunk}))
    aliases: dict[tuple[str, ...], tuple[str, ...]] = {}
    if role == "decoder":
        rules += [rule.prefixed("", role) for rule in head]
        aliases = _head_alias(config)
        # What a warm start adds: cross-attention always, a head where the checkpoint has none.
        optional += ["*/cross_attention/*", "decoder/head/*"]
    else:
        ignored += [(rule.tensor, NO_HEAD) for rule in head]
        ignored += [(prefix + p, NO_CROSS) for p in ("*crossattention*", "*ln_cross_attn*")]
    if layers is not None and not layered and len(trunk.segments) > 1:
        raise ConfigError(
            f"no layers of {where} can be left out: their number decides which of its "
            f"{len(trunk.segments)} groups of shared parameters each layer belongs to"
        )
    if layers is not None and layered:
        taken = set(layers)
        total = 1 + max(int(m) for m in _layer_numbers(names, prefix, probe))
        for number in range(total):
            if number not in taken:
                stem = prefix + probe.split("{}")[0]
                ignored.append((f"{stem}{number}.*", LEFT_OUT))
    return Part(
        tuple(rules),
        trunks={role: trunk},
        layers=layers,
        ignored=tuple(ignored),
        aliases=aliases,
        optional=tuple(optional),
    )


def _layer_numbers(names: Iterable[str], prefix: str, probe: str) -> list[str]:
    before, after = (prefix + probe).split("{}")
    return [
        name[len(before) : len(name) - len(after)]
        for name in names
        if name.startswith(before)
        and name.endswith(after)
        and name[len(before) : len(name) - len(after)].isdecimal()
    ]
