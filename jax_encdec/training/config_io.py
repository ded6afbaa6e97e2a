"""TrainingConfig in and out: one TOML file, `--set section.key=value`, and a flag for every key.

    config = load("run.toml", overrides=("run.steps=2000", "optimizer.learning_rate=3e-4"))
    open("copy.toml", "w").write(to_toml(config))        # load(copy.toml) == config

Later words win over earlier ones, and all of them over the file. A key's own name will do where
only one section has it (`learning_rate`). What is wrong is said with the file and line, or the
flag, it came from; an unknown key with the one nearest to it.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jax_encdec.errors import ConfigError, nearest
from jax_encdec.training.config import TrainingConfig
from jax_encdec.training.schema import (
    NONE,
    Key,
    Options,
    checked,
    is_switch,
    keys,
    made,
    metavar,
    parsed,
    takes_several,
)

_MAX_FILE = 1_000_000


class Override(NamedTuple):
    """A value that replaces the file's: a full key, the words it was given as, and where."""

    key: str
    words: tuple[str, ...]
    where: str


# In ----------------------------------------------------------------------------------------------


def load(
    source: str | Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str | Override] = (),
) -> TrainingConfig:
    """Read a configuration.

    Args:
        source: a TOML file, or tables by section, or None for the defaults.
        overrides: "section.key=value", in order, the last one of a key wins; or `Override`.

    Raises:
        ConfigError: the file is missing or no TOML, a key is unknown, or a value cannot be had.
    """
    file, text = None, ""
    if isinstance(source, str | Path):
        file = Path(source)
        text = _read(file)
        tables = _parse(text, str(file))
    else:
        tables = source or {}
    values: dict[str, dict[str, Any]] = {}
    for section, key, value in _entries(tables, file, text):
        where = f"{section}.{key.name}"
        if file is not None:
            where = f"{_place(file, text, section, key.name)}: {where}"
        values.setdefault(section, {})[key.name] = checked(key.annotation, value, where)
    settings = [_setting(o) if isinstance(o, str) else o for o in overrides]
    for override in settings:
        section, _, name = override.key.partition(".")
        annotation = all_keys()[override.key].annotation
        value = parsed(annotation, override.words, override.where)
        values.setdefault(section, {})[name] = value
    flagged = {override.key.partition(".")[0] for override in settings}
    sections = {}
    for section, part in keys(TrainingConfig).items():
        try:
            sections[section] = made(part.annotation, values.get(section, {}), section)
        except ConfigError as error:
            origin = f"{file}: " if file is not None and section not in flagged else ""
            raise ConfigError(f"{origin}{error}") from None
    return TrainingConfig(**sections)


def _read(file: Path) -> str:
    from jax_encdec.hub import read_bytes  # here, because it needs NumPy

    content = read_bytes(file, _MAX_FILE)
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{file}, line {line} is not UTF-8 (byte 0x{content[error.start]:02x})"
        ) from None


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        raise ConfigError(f"{where} is not valid TOML: {str(error)[:200]}") from None


def _entries(
    tables: Mapping[str, Any], file: Path | None, text: str
) -> Iterator[tuple[str, Key, Any]]:
    """Every key of the tables, known ones only."""
    sections = keys(TrainingConfig)
    for section, table in tables.items():
        if section not in sections:
            where = _place(file, text, None, section) if file else "the configuration"
            hint = nearest(section, sections)
            if section in short_names():
                hint = f"; it belongs into [{short_names()[section].partition('.')[0]}]"
            raise ConfigError(
                f"{where} has no section {section!r}{hint or f'; sections are {_list(sections)}'}"
            )
        if not isinstance(table, Mapping):
            raise ConfigError(
                f"{file or 'the configuration'}: {section} must be a table; got {table!r}"
            )
        known = keys(sections[section].annotation)
        for name, value in table.items():
            if name not in known:
                where = f"{_place(file, text, section, name)}: " if file else ""
                raise ConfigError(f"{where}{_unknown(section, name)}")
            yield section, known[name], value


def _unknown(section: str, name: str) -> str:
    known = keys(keys(TrainingConfig)[section].annotation)
    hint = nearest(name, known)
    homes = [full for full in all_keys() if full.endswith(f".{name}")]
    if not hint and homes:
        hint = f"; there is {homes[0]!r}"
    return f"there is no key {f'{section}.{name}'!r}{hint or f'; [{section}] has {_list(known)}'}"


def _list(names: Any) -> str:
    return ", ".join(names)


def _setting(text: str) -> Override:
    """What `--set section.key=value` says."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set takes section.key=value; got {text!r}")
    key = full_key(name.strip())
    return Override(key, (value.strip(),), key)


def full_key(name: str) -> str:
    """The section and key that a name stands for; dashes are underscores.

    Raises:
        ConfigError: there is no such key, or several sections have one of that name.
    """
    plain = name.replace("-", "_")
    if plain in all_keys():
        return plain
    if plain in short_names():
        return short_names()[plain]
    section, dot, key = plain.partition(".")
    if dot and section in keys(TrainingConfig):
        raise ConfigError(_unknown(section, key))
    homes = [full for full in all_keys() if full.endswith(f".{plain}")]
    if len(homes) > 1:
        raise ConfigError(f"{name!r} may be {' or '.join(map(repr, homes))}; say which")
    hint = nearest(plain, [*all_keys(), *short_names()])
    raise ConfigError(f"there is no key {name!r}{hint}")


@cache
def all_keys() -> Mapping[str, Key]:
    """Every key under its full name, `section.key`."""
    return {
        f"{section}.{name}": key
        for section, part in keys(TrainingConfig).items()
        for name, key in keys(part.annotation).items()
    }


@cache
def short_names() -> Mapping[str, str]:
    """Names of keys that only one section has, and the full names they stand for."""
    return dict(_short(list(all_keys())))


def _short(full_names: Sequence[str]) -> Iterator[tuple[str, str]]:
    names = [full.partition(".")[2] for full in full_names]
    for full, name in zip(full_names, names, strict=True):
        if names.count(name) == 1 and name not in _SAY_LITTLE:
            yield name, full


_SAY_LITTLE = ("config", "name", "path", "resume")
"""Names that mean something else, or nothing, without their section."""

_HEADER = re.compile(r"\s*\[\s*\"?([\w-]+)\"?\s*(?:\.\s*\"?([\w-]+)\"?\s*)?\]")


def _place(file: Path, text: str, section: str | None, name: str) -> str:
    """The file, and the line that a key (or with no section, a table) stands in, if it is found."""
    here = None
    for number, line in enumerate(text.split("\n"), 1):
        if header := _HEADER.match(line):
            here = header[1]
            if (section is None and here == name) or (here == section and header[2] == name):
                return f"{file}, line {number}"
            continue
        bare = re.escape(name)
        own = section == here and re.match(rf"\s*[\"']?{bare}[\"']?\s*[.=]", line)
        dotted = here is None and re.match(rf"\s*{re.escape(section or '')}\s*\.\s*{bare}\b", line)
        if own or (section and dotted):
            return f"{file}, line {number}"
    return str(file)


# Out ---------------------------------------------------------------------------------------------


def to_toml(config: TrainingConfig) -> str:
    """The configuration as TOML that `load` reads back as an equal one.

    Every key is there but those that are None by default and still None, and secrets.

    Raises:
        ConfigError: a text holds what is not Unicode.
    """
    lines = []
    for section, part in keys(TrainingConfig).items():
        lines += [f"[{section}]"]
        values = getattr(config, section)
        for key in keys(part.annotation).values():
            value = getattr(values, key.name)
            if key.secret or (value is None and key.default is None):
                continue
            if value == () and key.default == ():
                continue
            lines.append(f"{key.name} = {_toml(value, key.annotation)}")
        lines.append("")
    text = "\n".join(lines)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError("a text of the configuration is not Unicode; no file holds it") from None
    return text


def save(config: TrainingConfig, file: str | Path) -> None:
    """Write the configuration, whole or not at all."""
    from jax_encdec.hub import write_bytes

    write_bytes(Path(file), to_toml(config).encode("utf-8"))


def _toml(value: Any, annotation: Any = None) -> str:
    if value is None:
        return f'"{NONE}"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _string(value)
    if annotation == Options:
        return _table(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = keys(type(value)).values()
        pairs = [(key.name, getattr(value, key.name)) for key in fields]
        changed = [pair for pair, key in zip(pairs, fields, strict=True) if pair[1] != key.default]
        return _table(changed)
    assert isinstance(value, tuple)
    items = [_toml(item) for item in value]
    if any(item.startswith("{") for item in items):
        return "[\n" + "".join(f"    {item},\n" for item in items) + "]"
    return f"[{', '.join(items)}]"


def _table(pairs: Sequence[tuple[str, Any]]) -> str:
    inside = ", ".join(f"{_name(name)} = {_toml(value)}" for name, value in pairs)
    return f"{{ {inside} }}" if inside else "{}"


def _name(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _string(name)


def _string(text: str) -> str:
    """A basic string, all that it may not hold as it is by its number."""
    plain = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\u{ord(m[0]):04X}", plain) + '"'


# Flags -------------------------------------------------------------------------------------------

_SECTION_HELP = {
    "model": "what is trained: a saved pair (path), or two checkpoints (encoder, decoder)",
    "data": "files of pairs, and how they become batches",
    "optimizer": "rates, schedules, and parameters that differ",
    "execution": "devices, precision, memory",
    "run": "how long, where to, how often",
    "evaluation": "generation and scores; none: as the model's generation_config.json says",
}


class Flag(argparse.Action):
    """Append what a flag says to the namespace's `overrides`, in order."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, key: str, **options: Any):
        super().__init__(option_strings, "overrides", **options)
        self.key = key

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Called by argparse where the flag stands."""
        words = tuple(values) if isinstance(values, list) else (values,)
        found = Override(self.key, words, str(option_string))
        namespace.overrides = [*(namespace.overrides or ()), found]


class _Set(argparse.Action):
    """`--set section.key=value`, between the flags and of their kind."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        namespace.overrides = [*(namespace.overrides or ()), _setting(values)]


def add_flags(parser: argparse.ArgumentParser, only: Collection[str] = ()) -> None:
    """Add `--set` and a flag for every key, or for `only` some; they fill `args.overrides`."""
    parser.add_argument(
        "--set",
        action=_Set,
        dest="overrides",
        metavar="SECTION.KEY=VALUE",
        help="any key; also its flag below, or the key's own name where only one section has it: "
        "--learning-rate",
    )
    short = {full: name for name, full in _short([k for k in all_keys() if _wanted(k, only)])}
    for section, part in keys(TrainingConfig).items():
        wanted = [k for k in keys(part.annotation).values() if _wanted(f"{section}.{k.name}", only)]
        if not wanted:
            continue
        group = parser.add_argument_group(f"[{section}]", _SECTION_HELP[section])
        for key in wanted:
            full = f"{section}.{key.name}"
            shown = f"--{section}.{key.name.replace('_', '-')}"
            names = [f"--{full}"]
            if full in short:
                names += [f"--{key.name}", f"--{key.name.replace('_', '-')}"]
            hidden = [name for name in dict.fromkeys(names) if name != shown]
            how = _how(key)
            group.add_argument(shown, key=full, help=_help(key).replace("%", "%%"), **how)
            if hidden:
                group.add_argument(*hidden, key=full, help=argparse.SUPPRESS, **how)


def _wanted(full: str, only: Collection[str]) -> bool:
    return not only or full in only


def _how(key: Key) -> dict[str, Any]:
    nargs = "?" if is_switch(key.annotation) else "+" if takes_several(key.annotation) else None
    const = "true" if nargs == "?" else None
    return {"action": Flag, "nargs": nargs, "const": const, "metavar": metavar(key.annotation)}


def _help(key: Key) -> str:
    text = key.help.rstrip(".")
    if not text[1:2].isupper():
        text = text[:1].lower() + text[1:]
    if key.default in (None, "", ()):
        return text
    shown = key.default if isinstance(key.default, tuple) else (key.default,)
    return f"{text} (default: {' '.join(_toml(value).strip(chr(34)) for value in shown)})"
