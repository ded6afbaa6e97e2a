"""What `export` wrote, run with nothing but jax, numpy and tokenizers: `load_exported(path)`.

    exported = load_exported("summaries.jaxed")
    exported(["a text", "another"])                          # texts in, texts out
    exported.generate(input_ids, attention_mask)             # token ids in, arrays out
    f = exported.function(8, 128)                            # pure, for somebody's own jit
    f(exported.params(8), input_ids, attention_mask)

The file is checked before anything of it runs. Weights stay in the file, mapped into memory, until
they are used. Axis letters: B batch, S source length, R returned sequences, T capacity.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from jax.core import Tracer

from jax_encdec.decoding import numbers
from jax_encdec.decoding.archive import Archive
from jax_encdec.decoding.config import GenerationConfig
from jax_encdec.decoding.lowered import raised, readable
from jax_encdec.errors import CheckpointError, EncDecError, InputError, nearest
from jax_encdec.tokenization import Tokenizer

WEIGHTS = "weights.safetensors"
TOKENIZERS = {"source": "source_tokenizer.json", "target": "target_tokenizer.json"}
LAYOUT = "layouts/{layout}.stablehlo"
PROGRAM = "programs/{platform}/{batch}x{length}.stablehlo"
ADJUSTABLE: dict[str, Any] = {
    name: np.int32 if name in numbers.INTEGERS else np.float32
    for name in sorted(
        numbers.NUMBERS - {"decoder_start_token_id", "max_length", "min_new_tokens", "top_k"}
    )
}
"""The options that a program may take as arguments, one number per row, and their types. Lengths
are those of `max_new_tokens` and `min_length`, into which the others turn."""


class ExportedOutput(NamedTuple):
    """Generated sequences; the R sequences of one source stand together, best first."""

    sequences: Any
    """`[B * R, length]` int32: the start token, what was generated, then pads."""
    sequences_scores: Any
    """`[B * R]` float32, as in `GenerationOutput`."""
    lengths: Any
    """`[B * R]` int32: tokens before the pads, start and end token included."""


def load_exported(path: str | Path, *, verify: bool = True) -> Exported:
    """Open an exported model.

    Args:
        path: the file.
        verify: read the whole file once and compare its digest. False leaves the weights out of
            that, for files so large that it takes long.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or is not for this machine's platform
            or this version of jax.
    """
    return Exported(Archive(Path(path), verify=verify))


class Exported:
    """A model and its search, ready to run; see `load_exported`.

    Attributes:
        manifest: what the file says of itself.
        generation_config: how it decodes, as exported.
        platform: of the programs in use, this machine's.
        shapes: the `(batch, source length)` that there are programs for.
        defaults: the numbers that calls can change, and what they are otherwise.
    """

    def __init__(self, archive: Archive):
        self._archive, self.manifest = archive, archive.manifest
        try:
            self.generation_config = GenerationConfig.from_dict(self.manifest["generation"])
            self.defaults: dict[str, Any] = dict(self.manifest["numbers"])
            self._vocabulary = int(self.manifest["source_vocabulary"])
            self._target_vocabulary = int(self.manifest["target_vocabulary"])
            self._pad = int(self.manifest["source_pad"])
            self._prng = self.manifest["prng"]
            self._weights = {k: _shaped(w) for k, w in self.manifest["weights"].items()}
            self._layouts = dict(self.manifest["layouts"])
            entries = self.manifest["programs"]
            platforms = list(dict.fromkeys(entry["platform"] for entry in entries))
            full = self.generation_config.resolved(1)
            self._returned = full.num_return_sequences or 1
            self._capacity = full.max_length or 1
            self.platform = jax.export.default_export_platform()
            self._entries = {
                (int(e["batch"]), int(e["source_length"])): e
                for e in entries
                if e["platform"] == self.platform
            }
            self._convention = int(self.manifest["calling_convention"])
            self._jax = str(self.manifest["made_by"]["jax"])
        except (KeyError, TypeError, ValueError, AttributeError, EncDecError) as error:
            raise archive.damaged(error) from None
        unknown = [name for name in self.defaults if name not in ADJUSTABLE]
        if unknown:
            raise CheckpointError(
                f"{archive.path} was exported by a newer version of this library "
                f"({self.manifest['made_by']}): it has the option {unknown[0]!r}"
            )
        if not self._entries:
            raise CheckpointError(
                f"{archive.path} was exported for {', '.join(platforms)}, and this process "
                f"computes on {self.platform}; export it with --platforms {self.platform}"
            )
        self.shapes = tuple(sorted(self._entries))
        self._calls: dict[tuple[int, int], Callable[..., Any]] = {}
        self._jitted: dict[tuple[int, int], Callable[..., Any]] = {}
        self._placed: dict[str, jax.Array] = {}
        self._params: dict[str, tuple[jax.Array, ...]] = {}
        self._tokenizers: dict[str, Tokenizer] = {}
        if not readable(self._convention):
            raise CheckpointError(
                f"{archive.path} was exported by jax {self._jax}, whose programs jax "
                f"{jax.__version__} does not call; export the model again"
            )

    def __repr__(self) -> str:
        shapes = ", ".join(f"{b}x{s}" for b, s in self.shapes)
        return f"Exported({str(self._archive.path)!r}, {self.platform}: {shapes})"

    # Texts and token ids --------------------------------------------------------------------------

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        truncation: bool = False,
        key: jax.Array | None = None,
        **options: Any,
    ) -> Any:
        """Generate from one text or several.

        Args:
            texts: a str, or a list of them.
            truncation: cut sources that are longer than the longest program takes; without it they
                are refused.
            key: a random key, needed if the exported search samples; text i draws from
                `fold_in(key, i)`.
            **options: as in `generate`.

        Returns:
            A str for a str, a list of str for a list; with several returned sequences a list of
            str, best first, in the place of each str.

        Raises:
            InputError: a text or an option that cannot be used.
        """
        source, target = self._tokenizer("source"), self._tokenizer("target")
        single = isinstance(texts, str)
        limit = min(self.max_source_length, source.model_max_length or self.max_source_length)
        rows = source.encode(
            [texts] if isinstance(texts, str) else texts, max_length=limit, truncation=truncation
        )
        if not rows:
            return []
        out = self._run(rows, key, options)
        ids, lengths = np.asarray(out.sequences), np.asarray(out.lengths)
        made = [
            target.decode(row[:length][row[:length] < target.vocab_size])
            for row, length in zip(ids, lengths, strict=True)
        ]
        count = self._returned
        grouped = made if count == 1 else [made[i : i + count] for i in range(0, len(made), count)]
        return grouped[0] if single else grouped

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        key: jax.Array | None = None,
        **options: Any,
    ) -> ExportedOutput:
        """Generate from token ids, with the smallest program that fits.

        A batch larger than the largest program goes through it in turns.

        Args:
            input_ids: source tokens `[B, S]`, padded on the right.
            attention_mask: `[B, S]` of 0/1; by default nothing is hidden.
            key: a random key, needed if the exported search samples; row i draws from
                `fold_in(key, i)`; or one key per row, `[B]`.
            **options: the numbers in `defaults`, scalars or arrays `[B]`, and the lengths
                (`max_length`, `min_new_tokens`, ...) that say the same.

        Returns:
            Arrays on the host, as long as the longest sequence.

        Raises:
            InputError: an array or an option that cannot be used.
        """
        if isinstance(input_ids, Tracer) or isinstance(attention_mask, Tracer):
            raise InputError("inside jit, vmap, ..., call exported.function(batch, length)")
        ids = np.asarray(input_ids)
        if ids.ndim != 2 or 0 in ids.shape or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(
                f"input_ids must be integers [batch, length]; got {ids.dtype} {list(ids.shape)}"
            )
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
        if mask.shape != ids.shape:
            raise InputError(
                f"attention_mask must have shape {list(ids.shape)}; got {list(mask.shape)}"
            )
        return self._run_arrays(ids.astype(np.int32), (mask != 0).astype(np.int32), key, options)

    @property
    def max_source_length(self) -> int:
        """Most tokens of a source, special tokens included."""
        return max(length for _, length in self.shapes)

    def _run(
        self, rows: Sequence[Sequence[int]], key: jax.Array | None, options: dict[str, Any]
    ) -> ExportedOutput:
        ids = np.full((len(rows), max(map(len, rows))), self._pad, np.int32)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        return self._run_arrays(ids, mask, key, options)

    def _run_arrays(
        self, ids: np.ndarray, mask: np.ndarray, key: jax.Array | None, options: dict[str, Any]
    ) -> ExportedOutput:
        count = len(ids)
        bad = (ids < 0) | (ids >= self._vocabulary)
        if bad.any():
            where = tuple(int(i) for i in np.argwhere(bad)[0])
            raise InputError(
                f"input_ids{list(where)} is {ids[where]}; expected 0..{self._vocabulary - 1}"
            )
        # What is hidden in all rows need not fit.
        length = max(1, int(np.max(np.nonzero(mask.any(axis=0))[0], initial=0)) + 1)
        if length > self.max_source_length:
            raise InputError(
                f"a source has {length} tokens, and the longest program takes "
                f"{self.max_source_length}; shorten it, or export with a longer --source-length"
            )
        values = self._values(options, count)
        keys = None if self._prng is None else np.asarray(self._key_data(key, count))
        # The longest first: rows of one length meet in one batch.
        order = np.argsort(-np.sum(mask, axis=1), kind="stable")
        largest = max(batch for batch, _ in self.shapes)
        found: list[Any] = [None] * count
        for start in range(0, count, largest):
            rows = order[start : start + largest]
            needed = int(np.max(np.nonzero(mask[rows].any(axis=0))[0], initial=0)) + 1
            batch, width = self._smallest(len(rows), needed)
            rows = np.concatenate([rows, np.repeat(rows[-1:], batch - len(rows))])
            fitted: list[Any] = [_fit(ids[rows], width, self._pad), _fit(mask[rows], width, 0)]
            fitted += [] if keys is None else [keys[rows]]
            shape = (batch, width)
            if shape not in self._jitted:
                self._jitted[shape] = jax.jit(self._call(shape))
            fitted += [value[rows] for value in values.values()]
            made = self._jitted[shape](self.params(batch), *fitted)
            made = [np.asarray(x).reshape(batch, self._returned, *x.shape[1:]) for x in made]
            for place, row in enumerate(rows):
                found[row] = [x[place] for x in made]
        parts = [np.concatenate([row[i] for row in found]) for i in range(3)]
        return ExportedOutput(parts[0][:, : int(parts[2].max())], parts[1], parts[2])

    def _smallest(self, rows: int, length: int) -> tuple[int, int]:
        fit = [(b, s) for b, s in self.shapes if b >= rows and s >= length]
        return min(fit, key=lambda shape: (shape[0] * shape[1], shape))

    # Inside somebody's own program ----------------------------------------------------------------

    def params(self, batch: int) -> tuple[jax.Array, ...]:
        """The weights on the device, as programs of this batch size take them.

        Made when first asked for, and kept: the first argument of `function`.

        Raises:
            InputError: there are no programs of this batch size.
            CheckpointError: the file's weights are not what the programs take.
        """
        entry = next((e for (b, _), e in self._entries.items() if b == batch), None)
        if entry is None:
            raise InputError(
                f"there are no programs for batches of {batch}; there are "
                f"{', '.join(map(str, sorted({b for b, _ in self.shapes})))}"
            )
        if entry["layout"] not in self._params:
            with jax.ensure_compile_time_eval():  # Arrays, also where a trace asks first.
                self._params[entry["layout"]] = self._prepared(self._layouts[entry["layout"]])
        return self._params[entry["layout"]]

    def _prepared(self, layout: Mapping[str, Any]) -> tuple[jax.Array, ...]:
        held = self._archive.tensors(WEIGHTS)
        for name, expected in self._weights.items():
            x = held.get(name)
            if x is None or (x.shape, x.dtype) != (expected.shape, expected.dtype):
                raise self._archive.damaged(ValueError(f"the weight {name} is not as expected"))
        made: list[jax.Array] = []
        if layout["made"]:
            program = self._raised(
                layout,
                [self._weights[name] for name in layout["reads"]],
                [_shaped(x) for x in layout["made"]],
                range(len(layout["reads"])),
            )
            made = list(jax.jit(program)(*(held[name] for name in layout["reads"])))
        for name in layout["leaves"]:
            if isinstance(name, str) and name not in self._placed:
                self._placed[name] = jax.device_put(held[name])
        return tuple(
            self._placed[leaf] if isinstance(leaf, str) else made[leaf] for leaf in layout["leaves"]
        )

    def function(self, batch: int, length: int) -> Callable[..., ExportedOutput]:
        """The program of one shape as a pure function, for `jit`, `scan`, `shard_map`, ...

        Under `vmap` it runs row after row of the mapped axis: a program's shapes are fixed.

        Returns:
            `f(params, input_ids, attention_mask=None, *, key=None, **numbers)`: `params` those
            of `params(batch)`; ids and mask `[batch, length]`; `key` as in `generate`; `numbers`
            out of `defaults`, scalars or `[batch]`, traced or not. Sequences are `[batch * R, T]`.

        Raises:
            InputError: there is no such program.
        """
        if (batch, length) not in self._entries:
            shapes = ", ".join(map(str, self.shapes))
            raise InputError(f"there is no program for {(batch, length)}; there are {shapes}")
        shape = (batch, length)

        def function(
            params: Sequence[jax.Array],
            input_ids: Any,
            attention_mask: Any = None,
            *,
            key: jax.Array | None = None,
            **numbers: Any,
        ) -> ExportedOutput:
            ids = jnp.asarray(input_ids, jnp.int32)
            mask = jnp.ones(shape, jnp.int32) if attention_mask is None else attention_mask
            mask = (jnp.asarray(mask) != 0).astype(jnp.int32)
            for name, x in (("input_ids", ids), ("attention_mask", mask)):
                if x.shape != shape:
                    raise InputError(
                        f"{name} must have the program's shape {list(shape)}; got {list(x.shape)}"
                    )
            for name in numbers:
                if name not in self.defaults:
                    raise InputError(self._not_adjustable(name))
            keys = [] if self._prng is None else [self._key_data(key, batch)]
            values = [
                jnp.broadcast_to(
                    jnp.asarray(numbers.get(name, default), ADJUSTABLE[name]), (batch,)
                )
                for name, default in self.defaults.items()
            ]
            call = self._call(shape)
            return ExportedOutput(*call(params, ids, mask, *keys, *values))

        return function

    def _call(self, shape: tuple[int, int]) -> Callable[..., Any]:
        """`call(params, ids, mask, [keys,] *values)` of one program."""
        if shape not in self._calls:
            arguments, program = self._program(shape)

            def call(params: Sequence[jax.Array], *rest: jax.Array) -> Any:
                given = [*params, *rest]
                if [(x.shape, x.dtype) for x in given] != [(x.shape, x.dtype) for x in arguments]:
                    raise InputError(
                        f"params of the program {shape} must be those of params({shape[0]})"
                    )
                return program(*given)

            self._calls[shape] = call
        return self._calls[shape]

    def _program(self, shape: tuple[int, int]) -> tuple[list[Any], Callable[..., Any]]:
        """The shapes of a program's arguments, and the program."""
        entry, (batch, _) = self._entries[shape], shape
        layout = self._layouts[entry["layout"]]
        inputs = [
            self._weights[leaf] if isinstance(leaf, str) else _shaped(layout["made"][leaf])
            for leaf in layout["leaves"]
        ]
        inputs += [jax.ShapeDtypeStruct(shape, np.int32)] * 2
        if self._prng is not None:
            data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=self._prng)))
            inputs.append(jax.ShapeDtypeStruct((batch, *data.shape), data.dtype))
        inputs += [jax.ShapeDtypeStruct((batch,), ADJUSTABLE[name]) for name in self.defaults]
        rows = batch * self._returned
        outputs = [
            jax.ShapeDtypeStruct((rows, self._capacity), np.int32),
            jax.ShapeDtypeStruct((rows,), np.float32),
            jax.ShapeDtypeStruct((rows,), np.int32),
        ]
        return inputs, self._raised(entry, inputs, outputs, entry["kept"])

    def _raised(
        self, entry: Mapping[str, Any], inputs: Any, outputs: Any, kept: Sequence[int]
    ) -> Callable[..., Any]:
        try:
            return raised(
                self._archive.part(entry["part"]),
                inputs,
                outputs,
                kept=kept,
                platform=self.platform,
                convention=self._convention,
            )
        except CheckpointError as error:
            raise CheckpointError(
                f"{self._archive.path} was exported by jax {self._jax}, and {error}; "
                f"export the model again"
            ) from None

    # What calls can change ------------------------------------------------------------------------

    def _values(self, options: Mapping[str, Any], rows: int) -> dict[str, np.ndarray]:
        """The numbers of a call, `[rows]` each, checked as `generate` checks them."""
        given, arrays = numbers.set_aside(options)
        exported = self.generation_config
        settings = exported.replace(**given)
        known = {*self.defaults, "max_length"}
        known |= {"min_new_tokens"} if "min_length" in known else set()
        for name in options:
            if name not in known and (
                name in arrays or getattr(settings, name, None) != getattr(exported, name, None)
            ):
                raise InputError(self._not_adjustable(name))
        numbers.check(settings, arrays, rows)
        for each in (settings, numbers.smallest(settings, arrays)):
            each.validate(self._target_vocabulary, 1)
        full = settings.resolved(1)
        assert full.max_length is not None
        if full.max_length > self._capacity:
            raise InputError(
                f"max_length is {full.max_length}, start token included, and the model was "
                f"exported for at most {self._capacity}"
            )
        values = {name: getattr(full, name) for name in self.defaults} | arrays
        values.setdefault("max_length", full.max_length)
        if "max_new_tokens" not in arrays:
            values["max_new_tokens"] = values["max_length"] - 1
        if "min_new_tokens" in arrays:
            least = arrays["min_new_tokens"]
            values["min_length"] = np.where(least > 0, least + 1, 0)
        return {
            name: np.broadcast_to(
                np.asarray(default if values[name] is None else values[name], ADJUSTABLE[name]),
                (rows,),
            )
            for name, default in self.defaults.items()
        }

    def _not_adjustable(self, name: str) -> str:
        value = getattr(self.generation_config.resolved(1), name, None)
        return (
            f"{name} was fixed at {value!r} when the model was exported; calls can change "
            f"{', '.join(self.defaults)}"
        ) + nearest(name, self.defaults)

    def _key_data(self, key: Any, rows: int) -> jax.Array:
        """The data of one key per row, `[rows, ...]` uint32."""
        if key is None:
            raise InputError("this search samples: pass a random key, key=jax.random.key(seed)")
        dtype = getattr(key, "dtype", None)
        if dtype == np.uint32:
            key = jax.random.wrap_key_data(jnp.asarray(key), impl=self._prng)
        elif dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
            raise InputError(f"key must be a random key such as jax.random.key(0); got {key!r}")
        if str(jax.random.key_impl(key)) != self._prng:
            raise InputError(
                f"key is of the kind {jax.random.key_impl(key)}; the model was exported for "
                f"{self._prng}: jax.random.key(seed, impl={self._prng!r})"
            )
        if key.ndim == 0:
            key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
        if key.shape != (rows,):
            raise InputError(f"key must be one key or one per row, [{rows}]; got {list(key.shape)}")
        return jax.random.key_data(key)

    def _tokenizer(self, side: str) -> Tokenizer:
        if side not in self._tokenizers:
            try:
                data = json.loads(self._archive.part(TOKENIZERS[side]))
                backend = tokenizers.Tokenizer.from_str(data["backend"])
                self._tokenizers[side] = Tokenizer(backend, data["config"])
            except KeyError:
                raise InputError(
                    f"{self._archive.path} was exported without tokenizers: it takes token ids, "
                    f"by generate"
                ) from None
            except Exception as error:  # The tokenizers library raises nothing narrower.
                raise self._archive.damaged(error) from None
        return self._tokenizers[side]


def _shaped(entry: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(entry["dtype"]))


def _fit(x: np.ndarray, width: int, value: int) -> np.ndarray:
    """`[B, length]` -> `[B, width]`: padded, or rid of columns that are hidden in all rows."""
    x = x[:, :width]
    return np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=value)
