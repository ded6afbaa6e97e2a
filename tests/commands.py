"""The command line, called within a test's own process."""

from __future__ import annotations

from jax_encdec.cli import main


def call(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    code = main([str(a) for a in arguments])
    return code, *capsys.readouterr()


def refused(capsys, *arguments) -> str:
    """The one sentence with which the arguments are refused."""
    code, out, err = call(capsys, *arguments)
    assert code == 2, (out, err)
    assert not out
    assert err.startswith("jax-encdec: error: ")
    assert err.count("\n") == 1
    return err
