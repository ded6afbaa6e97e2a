"""The optimizer: which leaf is updated how, and the update of a whole tree.

`make_optimizer(config, model, total_steps)` assigns every parameter to a group once, by path; the
result is a hashable value with optax's `init` and `update`. Its state is a plain dict: the number
of updates so far, and one nested dict per statistic, laid out like the parameters with untrained
leaves left out. A step takes one pass over each leaf, clipping included.

A group that is frozen until step N keeps zero moments until then, and its clock starts at N:
warm-up, schedule and bias correction count from there. All of it follows from the one counter, so
that a resumed run is the same run.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jax_encdec import layers
from jax_encdec.encoder_decoder import EncoderDecoderModel
from jax_encdec.errors import ConfigError, InputError, nearest
from jax_encdec.layers import Param, flatten
from jax_encdec.pair_params import model_params
from jax_encdec.training import schedules, updates
from jax_encdec.training.optimizer_config import Group, OptimizerConfig
from jax_encdec.training.presets import PRESETS, resolve

__all__ = ["PRESETS", "Group", "LeafReport", "Optimizer", "OptimizerConfig", "make_optimizer"]

Path = tuple[str, ...]
State = dict[str, Any]
"""`count`, int32, and the statistics: `mu`, `nu`, `row`, `column`, as the optimizer has them."""

DEFAULT = "default"
"""What logs call the parameters of no group."""


@dataclass(frozen=True)
class LeafReport:
    """What becomes of one leaf of the parameter tree."""

    path: str
    shape: tuple[int, ...]
    group: str
    """Name of its group; "" for a leaf that is carried along and never trained."""
    decays: bool
    trained: bool
    frozen_steps: int


@dataclass(frozen=True)
class _Leaf:
    """A trained leaf: its declaration, the index of its group, whether weight decay applies."""

    param: Param
    group: int
    decays: bool


def make_optimizer(
    config: OptimizerConfig, model: EncoderDecoderModel, total_steps: int
) -> Optimizer:
    """Assign every parameter of `model` to a group and return the optimizer.

    Args:
        config: what to do; see `OptimizerConfig`.
        model: whose parameters it will update.
        total_steps: number of updates of the whole run, where linear and cosine schedules end.

    Raises:
        ConfigError: a pattern matches nothing, the two names of a tied leaf fall into different
            groups, nothing is left to train, or an option is not of this optimizer.
    """
    if not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1:
        raise ConfigError(f"total_steps must be a whole number of at least 1; got {total_steps!r}")
    if config.name == "adafactor" and (config.b1 or config.b2):
        raise ConfigError(
            "adafactor keeps no first moment, and its second one's decay follows from the step: "
            "leave b1 and b2 out"
        )
    optimizer = Optimizer(resolve(config), model, total_steps)
    if not optimizer._leaves:
        raise ConfigError("nothing is left to train: every parameter is frozen for good")
    return optimizer


@dataclass(frozen=True)
class Optimizer:
    """An `optax.GradientTransformation` that knows its model; made by `make_optimizer`."""

    config: OptimizerConfig
    """With every field filled in."""
    model: EncoderDecoderModel
    total_steps: int

    # What is trained, and how ---------------------------------------------------------------------

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups in order, the last one of the parameters that none of them names."""
        return (*self.config.groups, Group(pattern="*", name=DEFAULT))

    @cached_property
    def _assigned(self) -> dict[Path, int]:
        """The index of the group of every leaf that may be trained."""
        declared = flatten(model_params(self.model.config))
        return _assign(self.groups, declared, self.model.config.aliases())

    @cached_property
    def _leaves(self) -> dict[Path, _Leaf]:
        declared = flatten(model_params(self.model.config))
        return {
            path: _Leaf(declared[path], group, updates.decays(path, declared[path]))
            for path, group in self._assigned.items()
            if self.groups[group].frozen_steps >= 0
        }

    @property
    def trained(self) -> dict[str, Any]:
        """A tree of booleans like the parameters: False for leaves that are never updated."""
        declared = flatten(model_params(self.model.config))
        return unflatten_dict({path: path in self._leaves for path in declared})

    def describe(self) -> tuple[LeafReport, ...]:
        """What becomes of every leaf, in the tree's order."""
        rows = []
        for path, param in flatten(model_params(self.model.config)).items():
            group = self.groups[self._assigned[path]] if path in self._assigned else None
            leaf = self._leaves.get(path)
            rows.append(
                LeafReport(
                    path="/".join(path),
                    shape=param.shape,
                    group="" if group is None else group.label,
                    decays=leaf is not None and leaf.decays and self._decay(leaf.group) > 0,
                    trained=leaf is not None,
                    frozen_steps=-1 if group is None else group.frozen_steps,
                )
            )
        return tuple(rows)

    def rates(self, step: int) -> dict[str, float]:
        """By group, the rate of the update that takes state `step` to `step + 1`."""
        used = sorted({leaf.group for leaf in self._leaves.values()})
        return {self.groups[i].label: float(self._rate(i, step, np)) for i in used}

    def _rate(self, index: int, step: Any, xp: ModuleType) -> Any:
        group, config = self.groups[index], self.config
        peak = config.learning_rate if group.learning_rate is None else group.learning_rate
        assert peak is not None
        peak *= group.factor
        if config.divide_by_sqrt_hidden:
            peak /= math.sqrt(self.model.config.decoder_trunk.hidden)
        warmup = config.warmup_steps if group.warmup_steps is None else group.warmup_steps
        own = step - group.frozen_steps
        value = schedules.rate(
            str(group.schedule or config.schedule),
            peak,
            int(warmup or 0),
            self.total_steps - group.frozen_steps,
            xp.maximum(own, 0),
            xp,
        )
        return xp.where(own >= 0, value, 0.0) if group.frozen_steps else value

    def _decay(self, index: int) -> float:
        own = self.groups[index].weight_decay
        return float((self.config.weight_decay if own is None else own) or 0.0)

    # State ----------------------------------------------------------------------------------------

    def declare(self) -> State:
        """The state as a tree of `layers.Param`: the shape and logical axes of every array."""
        state: dict[str, dict[Path, Param]] = {}
        for path, leaf in self._leaves.items():
            for name, param in updates.declare(str(self.config.name), leaf.param).items():
                state.setdefault(name, {})[path] = param
        return {"count": Param((), ())} | {n: unflatten_dict(t) for n, t in state.items()}

    def init(self, params: Any) -> State:
        """The state before the first update: zeros, float32; only the shapes of `params` count."""
        self._check(flatten(params), "params")
        zeros = layers.tree_map(lambda p: jnp.zeros(p.shape, jnp.float32), self.declare())
        return zeros | {"count": jnp.zeros((), jnp.int32)}

    # The update -----------------------------------------------------------------------------------

    def gradient_norm(self, grads: Any, state: State) -> jax.Array:
        """The norm that is clipped, float32: of the leaves that are trained at this step."""
        flat = flatten(grads)
        squares: dict[int, list[jax.Array]] = {}
        for path, leaf in self._leaves.items():
            squares.setdefault(leaf.group, []).append(_sum_of_squares(flat[path]))
        total = jnp.zeros((), jnp.float32)
        for index, terms in squares.items():
            thawed = self._thawed(index, state["count"])
            part = sum(terms[1:], terms[0])
            total += part if thawed is None else jnp.where(thawed, part, 0.0)
        return jnp.sqrt(total)

    def update(self, grads: Any, state: State, params: Any) -> tuple[Any, State]:
        """Optax's interface: what to add to `params`, zero where nothing is trained."""
        flat, given = flatten(params), flatten(grads)
        changes, state = self._changes(given, state, flat)
        return unflatten_dict(
            {
                path: changes[path].astype(leaf.dtype) if path in changes else jnp.zeros_like(leaf)
                for path, leaf in flat.items()
            }
        ), state

    def apply(self, grads: Any, state: State, params: Any) -> tuple[Any, State]:
        """One update: the new parameters and state.

        Args:
            grads: like `params`, any floating dtype; leaves that are never trained may be absent.
            state: of `init` or the update before.
            params: nested dict; leaves that are not trained come back as they are.
        """
        flat, given = flatten(params), flatten(grads)
        changes, state = self._changes(given, state, flat)
        return unflatten_dict(
            {
                path: (leaf.astype(jnp.float32) + changes[path]).astype(leaf.dtype)
                if path in changes
                else leaf
                for path, leaf in flat.items()
            }
        ), state

    def _changes(
        self, grads: Mapping[Path, Any], state: State, params: Mapping[Path, Any]
    ) -> tuple[dict[Path, jax.Array], State]:
        self._check(params, "params")
        self._check(grads, "gradients")
        count, name = state["count"], str(self.config.name)
        old = {key: flatten(tree) for key, tree in state.items() if key != "count"}
        new: dict[str, dict[Path, jax.Array]] = {key: {} for key in old}
        scale = self._clip_scale(grads, state)
        changes = {}
        used = {leaf.group for leaf in self._leaves.values()}
        clocks = {index: self._clock(index, count) for index in used}
        rates = {index: self._rate(index, count, jnp) for index in used}
        for path, leaf in self._leaves.items():
            g, p = grads[path].astype(jnp.float32), params[path].astype(jnp.float32)
            before = {key: tree[path] for key, tree in old.items() if path in tree}
            g = g if scale is None else g * scale
            way, after = updates.direction(name, leaf.param, clocks[leaf.group], g, p, before)
            decay = self._decay(leaf.group) if leaf.decays else 0.0
            change = -rates[leaf.group] * (way + decay * p if decay else way)
            thawed = clocks[leaf.group].thawed
            changes[path] = change if thawed is None else jnp.where(thawed, change, 0.0)
            for key, x in after.items():
                new[key][path] = x
        return changes, {"count": count + 1} | {k: unflatten_dict(t) for k, t in new.items()}

    def _clip_scale(self, grads: Mapping[Path, Any], state: State) -> jax.Array | None:
        if not self.config.clip_norm:
            return None
        norm = self.gradient_norm(unflatten_dict(dict(grads)), state)
        return self.config.clip_norm / jnp.maximum(norm, self.config.clip_norm)

    def _thawed(self, index: int, count: jax.Array) -> jax.Array | None:
        frozen = self.groups[index].frozen_steps
        return count >= frozen if frozen else None

    def _clock(self, index: int, count: jax.Array) -> updates.Clock:
        own = jnp.maximum(count - self.groups[index].frozen_steps, 0) + 1
        c = self.config
        return updates.Clock(
            number=own.astype(jnp.float32),
            thawed=self._thawed(index, count),
            b1=float(c.b1 or 0),
            b2=float(c.b2 or 0),
            eps=float(c.eps or 0),
        )

    def _check(self, flat: Mapping[Path, Any], what: str) -> None:
        for path, leaf in self._leaves.items():
            got = tuple(flat[path].shape) if path in flat else None
            if got != leaf.param.shape:
                raise InputError(
                    f"the optimizer was made for another model: {what} should have "
                    f"{'/'.join(path)} of shape {leaf.param.shape}; got {got}"
                )


def _sum_of_squares(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(x.astype(jnp.float32)))


# Groups -------------------------------------------------------------------------------------------


def _assign(
    groups: tuple[Group, ...], declared: Mapping[Path, Param], aliases: Mapping[Path, Path]
) -> dict[Path, int]:
    """The index of each trainable leaf's group.

    Raises:
        ConfigError: a required pattern matches nothing, or a tied leaf belongs to two groups.
    """
    names: dict[Path, list[str]] = {
        path: ["/".join(path)] for path, param in declared.items() if param.trained
    }
    for alias, path in aliases.items():
        if path in names:
            names[path].append("/".join(alias))
    known = [name for both in names.values() for name in both]
    for group in groups:
        for pattern in group.patterns:
            if group.required and not any(_matches(pattern, name) for name in known):
                raise ConfigError(_unmatched(group, pattern, known, declared))
    assigned = {}
    for path, both in names.items():
        found = [
            next(i for i, g in enumerate(groups) if any(_matches(p, name) for p in g.patterns))
            for name in both
        ]
        for name, index in zip(both, found, strict=True):
            if index != found[0]:
                raise ConfigError(
                    f"{both[0]} and {name} are one tied parameter, but fall into the optimizer "
                    f"groups {groups[found[0]].label!r} and {groups[index].label!r}; put a group "
                    f"before them whose pattern names both, such as "
                    f"{'*/' + '/'.join(path[1:])!r}"
                )
        assigned[path] = found[0]
    return assigned


def _matches(pattern: str, name: str) -> bool:
    """Whether the pattern names this path or a folder above it."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}/*")


def _unmatched(
    group: Group, pattern: str, known: Iterable[str], declared: Mapping[Path, Param]
) -> str:
    carried = ["/".join(path) for path, param in declared.items() if not param.trained]
    if any(_matches(pattern, name) for name in carried):
        return (
            f"optimizer group {group.label!r}: {pattern!r} matches only parameters that are "
            f"carried along and never trained"
        )
    folders = {"/".join(name.split("/")[:i]) for name in known for i in range(1, 9)}
    hint = nearest(pattern.removesuffix("/*"), sorted(folders | set(known)))
    top = ", ".join(sorted({name.split("/")[0] for name in known}))
    return (
        f"optimizer group {group.label!r}: {pattern!r} matches no parameter"
        f"{hint or f'; paths begin with {top}'}"
    )
