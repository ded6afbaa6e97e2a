"""The `jax-encdec` command: one module per subcommand, each with `add_parser` and `run`.

The modules import what is heavy only when they run, so that `--help` answers at once. Whatever a
user can cause ends in one sentence on standard error and an exit code: 2 for bad input, 130 when
interrupted, 141 when the reader of a pipe has gone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax_encdec
from jax_encdec.errors import EncDecError, InputError, nearest

COMMANDS = ("demo", "train", "evaluate", "plan", "generate", "export", "inspect", "convert")
PROGRAM = "jax-encdec"
_MAX_MESSAGE = 2000


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `InputError` where argparse prints its usage and exits."""

    later: Callable[[Parser], None] | None = None
    """Adds the options of a command that has many; called only when that command is."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, allow_abbrev=False, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As argparse's, once all options are there."""
        if self.later is not None:
            add, self.later = self.later, None
            add(self)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Refuse the command line in one sentence."""
        raise InputError(message.replace("the following arguments are required", "missing"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; `argv` defaults to the process's own."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _show_warning
        try:
            code = _run(arguments)
            sys.stdout.flush()  # A pipe that broke must show here, not while Python exits.
            return code
        except EncDecError as error:
            return _fail(str(error))
        except KeyboardInterrupt as error:
            print(": ".join([PROGRAM, "interrupted", *map(str, error.args)]), file=sys.stderr)
            return 130
        except BrokenPipeError:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except OSError as error:
            file = f"{error.filename}: " if error.filename else ""
            return _fail(f"{file}{error.strerror or error}")


def hub_parser() -> argparse.ArgumentParser:
    """The options that say how a hub repository is had, as a parent of commands that take one."""
    parser = Parser(add_help=False)
    group = parser.add_argument_group("hub repositories")
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit (default: main)")
    group.add_argument(
        "--token",
        help="for repositories that ask for one (default: HF_TOKEN, or `hf auth login`'s)",
    )
    group.add_argument("--cache-dir", metavar="DIR", help="where downloads are kept")
    group.add_argument("--offline", action="store_true", help="use the cache, download nothing")
    return parser


def hub_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `hub.resolve` that the options of `hub_parser` stand for."""
    return {
        "revision": args.revision,
        "token": args.token,
        "cache_dir": args.cache_dir,
        "local_files_only": args.offline,
    }


def _run(arguments: list[str]) -> int:
    parser = Parser(
        prog=PROGRAM,
        description="Any pretrained encoder, any pretrained decoder, one model, in pure JAX.",
        epilog=f"`{PROGRAM} COMMAND --help` shows a command's options.",
    )
    parser.add_argument("--version", action="version", version=jax_encdec.__version__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    modules = {name: importlib.import_module(f"jax_encdec.cli.{name}") for name in COMMANDS}
    for module in modules.values():
        module.add_parser(subparsers)
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    if not arguments[0].startswith("-") and arguments[0] not in modules:
        hint = nearest(arguments[0], modules) or f"; commands are {', '.join(modules)}"
        raise InputError(f"there is no command {arguments[0]!r}{hint}")
    args, unknown = parser.parse_known_args(arguments)
    command = subparsers.choices.get(args.command, parser)
    if unknown:
        raise InputError(_unknown(unknown, command))
    if args.command is None:
        raise InputError(f"name a command: {', '.join(modules)}")
    return modules[args.command].run(args)


def _unknown(arguments: list[str], parser: argparse.ArgumentParser) -> str:
    flags = [argument.split("=")[0] for argument in arguments if argument.startswith("-")]
    if not flags:
        return (
            f"unexpected argument {arguments[0]!r}; arguments that belong together must stand side "
            f"by side"
        )
    known = [option for action in parser._actions for option in action.option_strings]
    hint = nearest(flags[0], known) or f"; `{parser.prog} --help` lists the options"
    return f"unknown option {flags[0]!r}{hint}"


def _fail(message: str) -> int:
    print(f"{PROGRAM}: error: {_line(message)}", file=sys.stderr)
    return 2


def _line(message: str) -> str:
    """One line of bounded length, whatever a file's names and values hold."""
    line = " ".join(message.split())
    if len(line) <= _MAX_MESSAGE:
        return line
    return f"{line[: _MAX_MESSAGE // 2]} ... {line[-_MAX_MESSAGE // 2 :]}"


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    print(f"{PROGRAM}: warning: {_line(str(message))}", file=sys.stderr)
