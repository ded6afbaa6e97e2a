"""Warm starts: two published models joined into a new pair (Rothe et al. 2020).

Each side is read through its family's rules for single checkpoints; what neither side holds,
cross-attention above all, is drawn or copied. `join` returns everything, report included;
`from_encoder_decoder_pretrained` is the short form.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import unflatten_dict
from jax.sharding import Sharding

from jax_encdec import hub
from jax_encdec.config import Role
from jax_encdec.convert import digests, rules, tables
from jax_encdec.convert.readers import open_tensors
from jax_encdec.convert.rules import Report
from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.encoder_decoder import EncoderDecoderModel
from jax_encdec.encoder_decoder_config import MODEL_TYPES, EncoderDecoderConfig
from jax_encdec.errors import ConfigError, EncDecError, InputError, nearest
from jax_encdec.families import FamilyConfig, family_config
from jax_encdec.layers import flatten
from jax_encdec.pair_params import model_params
from jax_encdec.pretrained import (
    Loaded,
    Params,
    Shardings,
    TreePath,
    dtype_of,
    fresh_values,
    read_leaves,
    refuse_custom_code,
)
from jax_encdec.token_ids import resolve_ids

_SIDE_ARGUMENTS = ("config", "layers", "revision")


def from_encoder_decoder_pretrained(
    encoder: str | Path | None = None, decoder: str | Path | None = None, **options: Any
) -> tuple[EncoderDecoderModel, Params]:
    """Join two checkpoints into a new pair; what neither holds is initialised.

    Args:
        encoder, decoder: folder, weight file or hub repository id; None for a random side, whose
            configuration is then given by `encoder_config` or `decoder_config`.
        **options: of `join`.

    Returns:
        The model and its parameters. Cross-attention is new unless copied, and wants training.
    """
    loaded = join(encoder, decoder, **options)
    return loaded.model, loaded.params


def join(
    encoder: str | Path | None,
    decoder: str | Path | None,
    *,
    encoder_config: FamilyConfig | None = None,
    decoder_config: FamilyConfig | None = None,
    encoder_layers: int | Sequence[int] | None = None,
    decoder_layers: int | Sequence[int] | None = None,
    cross_attention: str = "fresh",
    tie_encoder_decoder: bool = False,
    decoder_start_token_id: int | None = None,
    pad_token_id: int | None = None,
    eos_token_id: int | tuple[int, ...] | None = None,
    key: jax.Array | None = None,
    dtype: Any = None,
    revision: str | None = None,
    encoder_revision: str | None = None,
    decoder_revision: str | None = None,
    token: hub.Token = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    shardings: Shardings | None = None,
    verify: bool = True,
    **fields: Any,
) -> Loaded:
    """Like `from_encoder_decoder_pretrained`, with the report.

    Args:
        encoder_config, decoder_config: configuration of a random side, or instead of the
            checkpoint's own.
        encoder_layers, decoder_layers: how many of the checkpoint's layers to take, from the
            first; or which ones, by number from zero.
        cross_attention: "fresh": drawn from the decoder's initial distribution; "self": copied
            from each layer's self-attention.
        tie_encoder_decoder: the decoder shares every parameter that the encoder has, too.
        decoder_start_token_id, pad_token_id, eos_token_id: by default found in the decoder's
            configuration or tokenizer ([CLS] or <s> starts, [SEP] or </s> ends).
        key: for what is drawn; by default `jax.random.key(0)`.
        dtype: of parameters and computation; None: float32.
        revision: branch, tag or commit of both hub repositories; `encoder_revision` and
            `decoder_revision` of one.
        token, cache_dir, local_files_only: as in `from_pretrained`.
        shardings, verify: as in `pretrained.load`.
        **fields: `encoder_...` and `decoder_...` change fields of the configurations, as in
            `decoder_hidden_dropout_prob=0.2`.
    """
    if cross_attention not in ("fresh", "self"):
        raise InputError(f"cross_attention must be 'fresh' or 'self'; got {cross_attention!r}")
    if dtype == "auto":
        raise InputError("two files may differ in dtype: name one, such as 'float32'")

    def found(name: str | Path | None, own: str | None) -> Path | None:
        if name is None:
            return None
        return hub.resolve(
            name,
            revision=own or revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )

    places = found(encoder, encoder_revision), found(decoder, decoder_revision)
    sides: dict[Role, _Side] = {
        "encoder": _Side.of("encoder", encoder, places[0], encoder_config, encoder_layers),
        "decoder": _Side.of("decoder", decoder, places[1], decoder_config, decoder_layers),
    }
    for name, value in fields.items():
        role, _, field = name.partition("_")
        if role not in sides:
            known = [f"{side}_{what}" for side in sides for what in _SIDE_ARGUMENTS]
            raise InputError(f"unknown argument {name!r}{nearest(name, known)}")
        sides[role].config = sides[role].config.replace(**{field: value})
    config = EncoderDecoderConfig(
        encoder=sides["encoder"].config,
        decoder=sides["decoder"].config,
        decoder_start_token_id=decoder_start_token_id,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        tie_encoder_decoder=tie_encoder_decoder,
    )
    kind = dtype_of(dtype, {})  # type: ignore[arg-type]
    flat: dict[TreePath, jax.Array] = {}
    reports: dict[str, Report] = {}
    for role, side in sides.items():
        if side.place is None:
            continue
        config, report = side.load(role, config, flat, kind, shardings, verify)
        reports[role] = report
    declared = flatten(model_params(config))
    homes = _homes(config, kind, shardings)
    if cross_attention == "self":
        flat.update(_copied(declared, flat, homes))
    absent = [path for path in declared if path not in flat]
    seed = jax.random.key(0) if key is None else key
    flat.update(fresh_values(declared, absent, seed, kind, homes))
    config = _with_ids(config, sides["decoder"].place)
    model = EncoderDecoderModel(config, dtype=kind, param_dtype=kind)
    return Loaded(model, unflatten_dict({p: flat[p] for p in declared}), reports)


@dataclass
class _Side:
    """One side of a warm start: its configuration, where its weights are, which layers to take."""

    config: FamilyConfig
    place: Path | None
    layers: tuple[int, ...] | None
    name: str

    @classmethod
    def of(
        cls,
        role: Role,
        name: str | Path | None,
        place: Path | None,
        config: FamilyConfig | None,
        layers: int | Sequence[int] | None,
    ) -> _Side:
        if name is None and config is None:
            raise InputError(
                f"without a checkpoint for the {role}, {role}_config must say what it is: "
                f"{role}_config=BertConfig(...)"
            )
        if config is None:
            assert place is not None
            file = (place if place.is_dir() else place.parent) / "config.json"
            config = _single_config(hub.read_json(file), str(file))
        taken = None
        if layers is not None:
            have = config.layer_count(role)
            taken = tuple(range(layers)) if isinstance(layers, int) else tuple(layers)
            if not taken or not all(isinstance(i, int) and 0 <= i < have for i in taken):
                raise InputError(
                    f"{role}_layers must choose among the checkpoint's {have} layers; got {layers}"
                )
            config = config.with_layers(role, taken)
        return cls(config, place, taken, str(name))

    def load(
        self,
        role: Role,
        config: EncoderDecoderConfig,
        flat: dict[TreePath, jax.Array],
        dtype: Any,
        shardings: Shardings | None,
        verify: bool,
    ) -> tuple[EncoderDecoderConfig, Report]:
        """Read this side into `flat`; return the pair's configuration, untied where the file is."""
        assert self.place is not None
        with digests.checking(self.place, verify), open_tensors(self.place) as source:
            while True:
                # The side on its own: complete, whatever the pair shares.
                untied = config.replace(tie_encoder_decoder=False)
                declared = {
                    p: leaf for p, leaf in flatten(model_params(untied)).items() if p[0] == role
                }
                side: FamilyConfig = getattr(config, role)
                part = tables.standalone_part(
                    side, role, source, where=self.name, layers=self.layers
                )
                if role == "decoder" and side.ties_head is False:
                    # A model that was never a decoder may be published without its own kernel.
                    part = replace(part, optional=(*part.optional, "decoder/kept/*"))
                part = replace(part, trunks={role: getattr(config, f"{role}_trunk")})
                # What else a checkpoint carries (somebody's own head) is reported, not refused.
                plan = rules.match([part], declared, source, where=self.name, strict=False)
                broken = plan.broken_ties(source)
                if not broken:
                    break
                warnings.warn(
                    f"{self.name} is configured as tied, but {broken[0][1]} and {broken[0][2]} "
                    f"differ; they were loaded as untied parameters",
                    stacklevel=5,
                )
                config = config.replace(**{role: side.replace(tie_word_embeddings=False)})
            aliases, homes = config.aliases(), _homes(config, dtype, shardings)
            own = None if homes is None else {p: homes[aliases.get(p, p)] for p in declared}
            for path, leaf in read_leaves(plan, source, declared, dtype, own):
                flat.setdefault(aliases.get(path, path), leaf)
        return config, plan.report


def _homes(
    config: EncoderDecoderConfig, dtype: Any, shardings: Shardings | None
) -> Mapping[TreePath, Sharding] | None:
    """The sharding of each leaf of the pair, by path."""
    if shardings is None:
        return None
    return flatten(shardings(EncoderDecoderModel(config, dtype=dtype, param_dtype=dtype)))


def _single_config(data: Mapping[str, Any], where: str) -> FamilyConfig:
    refuse_custom_code(data, where)
    if data.get("model_type") in MODEL_TYPES:
        raise ConfigError(
            f"{where} describes a pair; load it with EncoderDecoderModel.from_pretrained"
        )
    return family_config(data, where)


def _copied(
    declared: Mapping[TreePath, Any],
    flat: Mapping[TreePath, jax.Array],
    homes: Mapping[TreePath, Sharding] | None,
) -> dict[TreePath, jax.Array]:
    """Cross-attention leaves as copies of self-attention's."""
    copies = {}
    for path, leaf in declared.items():
        if "cross_attention" not in path or path in flat:
            continue
        twin = tuple("self_attention" if name == "cross_attention" else name for name in path)
        source = flat.get(twin, flat.get(("encoder", *twin[1:])))
        if source is None or source.shape != leaf.shape:
            raise InputError(
                "cross_attention='self' needs a decoder checkpoint whose self-attention has the "
                f"shapes of its cross-attention; {'/'.join(path)} has {leaf.shape}, its twin "
                f"{None if source is None else source.shape}"
            )
        copies[path] = source if homes is None else jax.device_put(source, homes[path])
    return copies


def _with_ids(config: EncoderDecoderConfig, place: Path | None) -> EncoderDecoderConfig:
    """Fill in ids that the configuration leaves open from the decoder's tokenizer."""
    wanted: dict[str, Callable[[Any], int | None]] = {
        "decoder_start_token_id": lambda t: _first(t.cls_token_id, t.bos_token_id),
        "eos_token_id": lambda t: _first(t.sep_token_id, t.eos_token_id),
        "pad_token_id": lambda t: t.pad_token_id,
    }
    open_ids = [name for name in wanted if not _resolves(name, config)]
    if not open_ids or place is None:
        return config
    from jax_encdec.tokenization import Tokenizer

    try:
        tokenizer = Tokenizer.from_pretrained(place if place.is_dir() else place.parent)
    except EncDecError:
        return config
    found = {name: wanted[name](tokenizer) for name in open_ids}
    size = config.target_vocabulary
    return config.replace(**{k: v for k, v in found.items() if v is not None and v < size})


def _resolves(name: str, config: EncoderDecoderConfig) -> bool:
    try:
        resolve_ids(name, GenerationConfig(), config)
    except ConfigError:
        return False
    return True


def _first(*values: int | None) -> int | None:
    return next((v for v in values if v is not None), None)
