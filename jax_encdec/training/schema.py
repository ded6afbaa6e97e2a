"""What the training configuration's dataclasses say about themselves: keys, types, help texts.

A key is a field; its help is the string literal under the field; its annotation says what a value
may be. `checked` takes values of TOML files and of Python, `parsed` the words of a command line.
Both say what was expected and what was there. None is spelled "none" in files and on the command
line. Nothing here needs JAX.

Annotations understood: bool, int, float, str, Literal[...], tuple[X, ...], a dataclass (and tuples
of it), `Options`, and unions of these, None included.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import textwrap
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal

from jax_encdec.errors import ConfigError, nearest

Scalar = bool | int | float | str
Options = tuple[tuple[str, Scalar], ...]
"""Named values, as pairs so that they hash; a table in TOML, NAME=VALUE on the command line."""

NONE = "none"


@dataclass(frozen=True, kw_only=True)
class Key:
    """One field of a configuration's dataclass."""

    name: str
    annotation: Any
    default: Any
    """`dataclasses.MISSING` where the key must be given."""
    help: str
    secret: bool
    """Never written to a file."""


@cache
def keys(cls: type) -> Mapping[str, Key]:
    """The keys of a dataclass, by name, in the order of its fields."""
    hints, helps = typing.get_type_hints(cls), _helps(cls)
    found: dict[str, Key] = {}
    above = ""
    for field in dataclasses.fields(cls):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found[field.name] = Key(
            name=field.name,
            annotation=hints[field.name],
            default=default,
            help=helps.get(field.name) or (f"as {above}" if above else ""),
            secret=bool(field.metadata.get("secret")),
        )
        above = field.name if field.name in helps else above
    return found


def check_fields(instance: Any) -> None:
    """Check every field of a frozen dataclass against its annotation, lists becoming tuples.

    Raises:
        ConfigError: naming the field, what was expected and what was there.
    """
    for key in keys(type(instance)).values():
        where = f"{type(instance).__name__}.{key.name}"
        value = checked(key.annotation, getattr(instance, key.name), where)
        object.__setattr__(instance, key.name, value)


def checked(annotation: Any, value: Any, where: str) -> Any:
    """`value`, of a TOML file or of Python, as the annotation wants it.

    Integers pass as floats, lists as tuples, one string as a tuple of it, mappings as dataclasses
    and `Options`, "none" as None where there is None.

    Raises:
        ConfigError: it is something else; `where` names it.
    """
    if value in (None, NONE) and type(None) in _options(annotation):
        return None
    for option in _options(annotation):
        found = _as(option, value, where)
        if found is not _REFUSED:
            return found
    names = [x for option in _options(annotation) for x in _literals(option)]
    hint = nearest(value, names) if isinstance(value, str) else ""
    raise ConfigError(f"{where} must be {expected(annotation)}; got {value!r}{hint}")


def parsed(annotation: Any, words: Sequence[str], where: str) -> Any:
    """The words given to a flag (or the text after `--set a.b=`) as the annotation wants it.

    Several values of a tuple are several words, or one TOML array; those that are numbers may also
    be joined by commas. Dataclasses are written as TOML, `Options` as NAME=VALUE words.

    Raises:
        ConfigError: they are something else; `where` names the flag.
    """
    words = list(words)
    if words == [NONE] and type(None) in _options(annotation):
        return None
    for option in _options(annotation):
        found = _read(option, words, where)
        if found is not _REFUSED:
            return checked(annotation, found, where)
    return checked(annotation, words[0] if len(words) == 1 else tuple(words), where)


def expected(annotation: Any) -> str:
    """What values an annotation takes, in words."""
    return " or ".join(_name(option) for option in _options(annotation))


def metavar(annotation: Any) -> str:
    """What stands for the value of a flag in a help text."""
    shown = {bool: "true|false", int: "N", float: "X", str: "TEXT", Options: "NAME=VALUE"}
    found = []
    for option in _options(annotation):
        if option in shown:
            found.append(shown[option])
        elif typing.get_origin(option) is tuple:
            found.append(metavar(typing.get_args(option)[0]))
        elif option is not type(None):
            found.append("|".join(_literals(option)) or "{...}")
    return "|".join(dict.fromkeys(found))


def takes_several(annotation: Any) -> bool:
    """Whether a flag of this annotation may be followed by more than one word."""
    return any(typing.get_origin(option) is tuple for option in _options(annotation))


def is_switch(annotation: Any) -> bool:
    """Whether a flag of this annotation may stand without a word after it, as true."""
    return bool in _options(annotation)


# Values ------------------------------------------------------------------------------------------

_REFUSED = object()
_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def _options(annotation: Any) -> tuple[Any, ...]:
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if union and annotation != Scalar else (annotation,)


def _literals(option: Any) -> tuple[str, ...]:
    return typing.get_args(option) if typing.get_origin(option) is Literal else ()


def _name(option: Any) -> str:
    if option is type(None):
        return repr(NONE)
    if option == Options:
        return "a table of options"
    if option == Scalar:
        return "true, false, a number or a string"
    if literals := _literals(option):
        return ", ".join(map(repr, literals))
    if typing.get_origin(option) is tuple:
        return f"a list, each {expected(typing.get_args(option)[0])}"
    if dataclasses.is_dataclass(option):
        return f"a table of {', '.join(keys(typing.cast(type, option)))}"
    return _WORDS[option]


def _as(option: Any, value: Any, where: str) -> Any:
    if option is type(None):
        return _REFUSED
    if option == Scalar:
        return _scalar(value)
    if option == Options:
        return _pairs(value, where)
    if option is bool:
        return value if isinstance(value, bool) else _REFUSED
    if option is int:
        return int(value) if _is(value, Integral) else _REFUSED
    if option is float:
        return float(value) if _is(value, Real) and math.isfinite(value) else _REFUSED
    if option is str:
        return value if isinstance(value, str) else _REFUSED
    if literals := _literals(option):
        return value if isinstance(value, str) and value in literals else _REFUSED
    if typing.get_origin(option) is tuple:
        item = typing.get_args(option)[0]
        if item is str and isinstance(value, str):
            value = (value,)
        if not isinstance(value, list | tuple):
            return _REFUSED
        return tuple(checked(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if isinstance(value, option):
        return value
    return made(option, value, where) if isinstance(value, Mapping) else _REFUSED


def made(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass from a table of its keys' values.

    Raises:
        ConfigError: a key is unknown, missing, or has a value it cannot have.
    """
    known = keys(cls)
    for name in values:
        if name not in known:
            raise ConfigError(f"{where} has no key {name!r}{nearest(name, known)}")
    for key in known.values():
        if key.default is dataclasses.MISSING and key.name not in values:
            raise ConfigError(f"{where} lacks the key {key.name!r}")
    given = {n: checked(known[n].annotation, v, f"{where}.{n}") for n, v in values.items()}
    try:
        return cls(**given)
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if where in text else f"{where}: {text}") from None


def _is(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _scalar(value: Any) -> Any:
    if isinstance(value, bool | str) or _is(value, Integral):
        return value
    return float(value) if _is(value, Real) and math.isfinite(value) else _REFUSED


def _pairs(value: Any, where: str) -> Any:
    if isinstance(value, Mapping):
        value = tuple(value.items())
    if not isinstance(value, list | tuple):
        return _REFUSED
    pairs = {}
    for pair in value:
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            return _REFUSED
        pairs[pair[0]] = checked(Scalar, pair[1], f"{where}.{pair[0]}")
    return tuple(sorted(pairs.items()))


# Words of a command line -------------------------------------------------------------------------


def _read(option: Any, words: list[str], where: str) -> Any:
    """What the words say if they are meant for this option; `_REFUSED` if they cannot be."""
    if option == Options:
        toml = _toml(words)
        if isinstance(toml, dict):
            return toml
        pairs = [word.partition("=") for word in words]
        if not all(equals for _, equals, _ in pairs):
            raise ConfigError(f"{where} must be written as NAME=VALUE; got {' '.join(words)!r}")
        return {name: _word(value) for name, _, value in pairs}
    if typing.get_origin(option) is tuple:
        item = typing.get_args(option)[0]
        toml = _toml(words)
        if isinstance(toml, list):
            return toml
        if dataclasses.is_dataclass(item):
            return [toml] if isinstance(toml, dict) else _REFUSED
        if item is not str:
            words = [word for part in words for word in part.split(",") if word]
        items = [_read(item, [word], where) for word in words]
        return _REFUSED if _REFUSED in items else items
    if len(words) != 1:
        return _REFUSED
    word = words[0]
    if option is str or word in _literals(option):
        return word
    if option is bool:
        return {"true": True, "false": False}.get(word.lower(), _REFUSED)
    if option in (int, float):
        try:
            return option(word)
        except ValueError:
            return _REFUSED
    return _word(word) if option == Scalar else _REFUSED


def _word(word: str) -> Any:
    for option in (bool, int, float):
        if (found := _read(option, [word], "")) is not _REFUSED:
            return found
    return word


def _toml(words: list[str]) -> Any:
    if len(words) != 1 or not words[0].startswith(("[", "{")):
        return None
    try:
        return tomllib.loads(f"x = {words[0]}")["x"]
    except tomllib.TOMLDecodeError:
        return None


# Help --------------------------------------------------------------------------------------------


def _helps(cls: type) -> dict[str, str]:
    """The string literals under the fields; none where the source is not at hand."""
    helps: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError, SyntaxError):
            continue
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                helps[field.target.id] = " ".join(below.value.value.split())
    return helps
