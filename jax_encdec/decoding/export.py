"""A model, its tokenizers and its whole `generate` as one file that needs none of this library's
dependencies but jax, numpy and tokenizers to run: `export(model, params, path, ...)`.

For each platform, batch size and source length, encoder and search are lowered to StableHLO, as one
program. Its arguments are the weights, the source, a random key per row, and the numbers of the
search, one per row; what shapes the program is fixed here. `load_exported` in `exported.py` is the
other side.

Axis letters: B batch, S source length.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

import jax_encdec
from jax_encdec.decoding import archive
from jax_encdec.decoding.arguments import checked_name, config_of, with_ids, with_room
from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.decoding.engine import generate
from jax_encdec.decoding.exported import ADJUSTABLE, LAYOUT, PROGRAM, TOKENIZERS, WEIGHTS
from jax_encdec.decoding.layout import prepare_params
from jax_encdec.decoding.lowered import lower
from jax_encdec.errors import InputError, nearest
from jax_encdec.layers import flatten
from jax_encdec.pair_params import check_tree, plain_params
from jax_encdec.tokenization import TokenizerPair

if TYPE_CHECKING:
    from jax_encdec.encoder_decoder import EncoderDecoderModel

PLATFORMS = ("cpu", "cuda", "tpu", "rocm")
# Numbers that cost nothing and are arguments wherever they mean something.
_ALWAYS: dict[str, Callable[[Any], bool]] = {
    "length_penalty": lambda full: full.num_beams > 1,
    "diversity_penalty": lambda full: (full.num_beam_groups or 1) > 1,
    "temperature": lambda full: full.do_sample,
}
_SAMPLING = ("top_h", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_NEUTRAL = {
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "min_p": 0.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


class Summary(NamedTuple):
    """What was written."""

    path: Path
    nbytes: int
    programs: tuple[tuple[str, int, int, int], ...]
    """Platform, batch, source length, and bytes of each program."""
    adjustable: Mapping[str, float]
    """The numbers that remain arguments, and their defaults."""


def export(
    model: EncoderDecoderModel,
    params: Any,
    path: str | Path,
    *,
    tokenizers: TokenizerPair | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    batch: Sequence[int] = (1, 8),
    source_length: Sequence[int] = (128,),
    generation_config: GenerationConfig | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Summary:
    """Write a model with its search as one file.

    Args:
        params: the model's parameters.
        path: the file to write.
        tokenizers: for texts in and out; without them the file takes and gives token ids.
        platforms: out of `cpu`, `cuda`, `tpu`, `rocm`; none of them need be there.
        batch, source_length: the sizes to make programs for, each with each. What is smaller is
            padded up to the next one.
        generation_config: instead of the model's own.
        overwrite: replace `path` if it is there.
        **options: fields of `GenerationConfig`, over the configuration's. What shapes the program
            is fixed by them. `max_new_tokens` remains an argument, up to its value here, and so
            does each number that does something, or is given here: what is to be changed later is
            given with its neutral value, say `repetition_penalty=1.0`. `top_k` is fixed, for speed.

    Raises:
        InputError: an option or size that cannot be used, or a file that cannot be written.
    """
    config, params = model.config, plain_params(params)
    check_tree(config, flatten(params))
    target = Path(path)
    platforms = _platforms(platforms)
    sizes = _sizes("batch", batch, None)
    lengths = _sizes("source_length", source_length, config.encoder_trunk.max_length)
    settings = _settings(model, generation_config, options)
    numbers = _numbers(settings, options)
    leaves = {"/".join(names): leaf for names, leaf in flatten(params).items()}
    full = settings.resolved(1)
    lanes = max(full.num_beams or 1, full.num_return_sequences or 1)
    nbytes = sum(x.size * np.dtype(x.dtype).itemsize for x in leaves.values())
    with archive.writing(target, nbytes, overwrite=overwrite) as writer:
        layouts: dict[str, _Layout] = {}
        programs: dict[tuple[str, int, int], tuple[str, jax.export.Exported]] = {}
        for platform, rows in itertools.product(platforms, sizes):
            made = _Layout(model, leaves, rows * lanes, platform)
            layout = layouts.setdefault(made.name, made)
            for length in lengths:
                lowered = _lower(model, layout, settings, numbers, platform, rows, length)
                layout.used |= {i for i in lowered.module_kept_var_idx if i < len(layout.leaves)}
                programs[platform, rows, length] = layout.name, lowered
        making = {name: layout.lower() for name, layout in layouts.items()}
        # What nobody reads (BERT's pooler) stays behind.
        read = {name for _, entry in making.values() for name in _read(entry)}
        weights = {name: x for name, x in leaves.items() if name in read}
        writer.add_tensors(WEIGHTS, weights)
        if tokenizers is not None:
            for side in ("source", "target"):
                tokenizer = getattr(tokenizers, side)
                data = {"config": tokenizer.config, "backend": tokenizer.backend.to_str()}
                writer.add(TOKENIZERS[side], json.dumps(data, ensure_ascii=False).encode())
        for maker, entry in making.values():
            if maker is not None:
                writer.add(entry["part"], bytes(maker.mlir_module_serialized))
        entries, convention = [], 0
        for (platform, rows, length), (name, lowered) in programs.items():
            part = PROGRAM.format(platform=platform, batch=rows, length=length)
            writer.add(part, bytes(lowered.mlir_module_serialized))
            convention = lowered.calling_convention_version
            entries.append(
                {
                    "part": part,
                    "platform": platform,
                    "batch": rows,
                    "source_length": length,
                    "layout": name,
                    "kept": layouts[name].renumbered(lowered.module_kept_var_idx),
                }
            )
        position = config.encoder_trunk.embedding.position
        writer.finish(
            {
                "made_by": {"jax_encdec": jax_encdec.__version__, "jax": jax.__version__},
                "calling_convention": convention,
                "weights": {name: _shape(x) for name, x in weights.items()},
                "layouts": {name: entry for name, (_, entry) in making.items()},
                "programs": entries,
                "numbers": numbers,
                "generation": settings.to_dict(),
                "prng": _prng() if settings.do_sample else None,
                "source_vocabulary": config.encoder_trunk.embedding.vocab,
                "source_pad": (position.pad_token_id or 0) if position is not None else 0,
                "target_vocabulary": config.target_vocabulary,
            }
        )
    written = tuple((*at, len(p.mlir_module_serialized)) for at, (_, p) in programs.items())
    return Summary(target, target.stat().st_size, written, numbers)


class _Layout:
    """The weights as programs of one platform and number of rows take them: flat leaves, each a
    weight as it is, or made of weights by a program of its own, once.

    Attributes:
        leaves: shapes and dtypes.
        used: numbers of the leaves that some program reads.
    """

    def __init__(
        self, model: EncoderDecoderModel, weights: Mapping[str, Any], rows: int, platform: str
    ):
        def prepare(*arrays: jax.Array) -> Any:
            tree = _nested(dict(zip(weights, arrays, strict=True)))
            return prepare_params(model.config, tree, rows=rows, platform=platform)

        self._weights, self._prepare, self._platform = weights, prepare, platform
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in weights.values()]
        jaxpr, prepared = jax.make_jaxpr(prepare, return_shape=True)(*shapes)
        self.leaves, self.treedef = jax.tree.flatten(prepared)
        self.name = f"{platform}-{prepared.layout.rows}"
        names = dict(zip(map(id, jaxpr.jaxpr.invars), weights, strict=True))
        self._as_is = [names.get(id(var)) for var in jaxpr.jaxpr.outvars]
        self.used: set[int] = set()

    def lower(self) -> tuple[jax.export.Exported | None, dict[str, Any]]:
        """The program that makes what is not there as it is, and the manifest's entry."""
        made = [i for i in sorted(self.used) if self._as_is[i] is None]
        leaves = [self._as_is[i] or made.index(i) for i in sorted(self.used)]
        entry: dict[str, Any] = {"leaves": leaves, "made": [_shape(self.leaves[i]) for i in made]}
        if not made:
            return None, entry

        def make(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            found = jax.tree.leaves(self._prepare(*arrays))
            return tuple(found[i] for i in made)

        lowered = lower(make, list(self._weights.values()), self._platform)
        names = list(self._weights)
        return lowered, entry | {
            "part": LAYOUT.format(layout=self.name),
            "reads": [names[i] for i in lowered.module_kept_var_idx],
        }

    def renumbered(self, kept: Sequence[int]) -> list[int]:
        """Numbers of a program's arguments when only used leaves are among them."""
        place = {old: new for new, old in enumerate(sorted(self.used))}
        gone = len(self.leaves) - len(self.used)
        return [place[i] if i < len(self.leaves) else i - gone for i in kept]


def _read(entry: Mapping[str, Any]) -> list[str]:
    """The weights that a layout needs."""
    return [leaf for leaf in entry["leaves"] if isinstance(leaf, str)] + entry.get("reads", [])


def _shape(x: Any) -> dict[str, Any]:
    return {"dtype": str(x.dtype), "shape": list(x.shape)}


def _lower(
    model: EncoderDecoderModel,
    layout: _Layout,
    settings: GenerationConfig,
    numbers: Mapping[str, Any],
    platform: str,
    batch: int,
    length: int,
) -> jax.export.Exported:
    """`generate` for one platform and shape.

    Its arguments are flat: the layout's leaves, ids and mask `[B, S]`, key data `[B, ...]` if it
    samples, and the numbers `[B]`. Its results are sequences, their scores and their lengths.
    """
    impl = _prng()

    def program(*args: jax.Array) -> tuple[jax.Array, ...]:
        rest = iter(args)
        weights = jax.tree.unflatten(layout.treedef, [next(rest) for _ in layout.leaves])
        ids, mask = next(rest), next(rest)
        key = jax.random.wrap_key_data(next(rest), impl=impl) if settings.do_sample else None
        # What comes as an array has its processor in the program, whatever its value.
        values: dict[str, Any] = {name: next(rest) for name in numbers}
        out = generate(
            model,
            weights,
            ids,
            attention_mask=mask,
            generation_config=settings,
            key=key,
            **values,
        )
        return out.sequences, out.sequences_scores, out.lengths

    arguments = [*layout.leaves, *[jax.ShapeDtypeStruct((batch, length), np.int32)] * 2]
    if settings.do_sample:
        data = jax.random.key_data(jax.random.key(0))
        arguments.append(jax.ShapeDtypeStruct((batch, *data.shape), data.dtype))
    arguments += [jax.ShapeDtypeStruct((batch,), ADJUSTABLE[name]) for name in numbers]
    return lower(program, arguments, platform)


def _nested(weights: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in weights.items():
        *path, last = name.split("/")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = leaf
    return tree


def _prng() -> str:
    return str(jax.random.key_impl(jax.random.key(0)))


def _platforms(platforms: Sequence[str]) -> tuple[str, ...]:
    given = (platforms,) if isinstance(platforms, str) else tuple(dict.fromkeys(platforms))
    for name in given:
        if name not in PLATFORMS:
            raise InputError(
                f"platforms must be out of {', '.join(PLATFORMS)}; got {name!r}"
                + (" (say cuda or rocm)" if name == "gpu" else nearest(str(name), PLATFORMS))
            )
    if not given:
        raise InputError(f"name at least one platform out of {', '.join(PLATFORMS)}")
    return given


def _sizes(name: str, sizes: Sequence[int], limit: int | None) -> tuple[int, ...]:
    given = (sizes,) if isinstance(sizes, int) else tuple(sorted(set(sizes)))
    for size in given:
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise InputError(f"{name} must be positive integers; got {size!r}")
        if limit is not None and size > limit:
            raise InputError(f"{name} is {size}, but the encoder takes at most {limit} tokens")
    if not given:
        raise InputError(f"{name} needs at least one size")
    return tuple(int(size) for size in given)


def _settings(
    model: EncoderDecoderModel, config: GenerationConfig | None, options: Mapping[str, Any]
) -> GenerationConfig:
    """All options, complete, lengths in the one form that the programs have them in."""
    for name, value in options.items():
        checked_name(name)
        if isinstance(value, jax.Array | np.ndarray):
            raise InputError(f"{name} must be a Python value to be exported; rows come later")
    settings = config_of(model, config).replace(**options)
    trunk = model.config.decoder_trunk
    settings = with_room(with_ids(settings, model.config), trunk, 1)
    for name in ("stop_strings", "max_time"):
        if getattr(settings, name):
            raise InputError(f"{name} cannot be exported; override it with {name}=None")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(settings, name):
            raise InputError(f"an exported model returns sequences only: leave out {name}")
    settings.validate(model.config.target_vocabulary, 1)
    full = settings.resolved(1)
    shortest = full.min_length if settings.min_length or settings.min_new_tokens else None
    return settings.replace(max_length=full.max_length, min_length=shortest)


def _numbers(settings: GenerationConfig, asked: Collection[str]) -> dict[str, Any]:
    """The numbers that remain arguments, with their defaults: those `asked` for by name, and those
    of the model's configuration that do something."""
    full = settings.resolved(1)
    assert full.max_length is not None
    asked = {"min_length" if name == "min_new_tokens" else name for name in asked}
    numbers: dict[str, Any] = {"max_new_tokens": full.max_length - 1}
    for name in ADJUSTABLE:
        value = getattr(full, name)
        if name in numbers or value is None:
            continue
        if name in _ALWAYS:
            wanted = _ALWAYS[name](full)
        else:
            acts = full.do_sample or name not in _SAMPLING
            wanted = acts and (name in asked or value != _NEUTRAL.get(name))
        if wanted:
            numbers[name] = value
    return numbers
