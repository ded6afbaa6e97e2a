"""A guard: runs the command line on a crafted input in a forked child with limits, and watches it.

`Guard` starts one server, which imports the package, and forks a child for each `run`. The child
gets 2 s of CPU time and 512 MB of address space beyond what the start took, may write no byte into
a file, and an audit hook notes whatever it does to the world: files opened for writing, made or
removed, processes, sockets, modules imported, pickles looking up names. `Result` says what
happened; `harmless` asserts that it was a refusal and nothing else.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pickle
import resource
import selectors
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

CPU_SECONDS = 2
MEMORY = 512 << 20
_WALL_SECONDS = 60  # for a child that sleeps, or waits for a pipe
_PREFIX = "jax-encdec: error: "

_WORLD = (
    "os.", "shutil.", "subprocess.", "socket.", "pty.", "ctypes.", "tempfile.", "webbrowser.",
    "urllib.", "ftplib.", "smtplib.", "fcntl.", "mmap.", "signal.", "pickle.", "marshal.", "import",
    "sqlite3.", "syslog.", "code.", "sys.set", "cpython.run", "exec", "compile", "builtins.input",
)  # fmt: skip
"""Audit events of what a reader of files has no business to do, by how they begin."""
_READING = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.getxattr", "sys.setrecursion")


class Result(NamedTuple):
    """What a child did."""

    code: int
    """Exit code; less a signal's number if one killed it."""
    out: str
    err: str
    events: list[str]
    """What the audit hook noted."""
    cpu: float
    """Seconds of CPU time, user and system."""
    memory: int
    """Bytes of address space beyond the start, at most."""
    resident: int
    """Bytes of memory in use beyond the start, at most."""

    @property
    def sentence(self) -> str:
        """What was said on standard error, the command's name left out."""
        return self.err.removeprefix(_PREFIX).removesuffix("\n")


class Guard:
    """A server that forks children; `run` is answered when the child is gone."""

    def __init__(self, *warm: list[str]) -> None:
        """Start; `warm` are command lines whose modules are imported before any is forked."""
        quiet = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        quiet["MALLOC_ARENA_MAX"] = "1"  # else each thread reserves 64 MB that nobody asked for
        quiet["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # it would be written to
        self._server = subprocess.Popen(
            [sys.executable, "-W", "error", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | quiet | {"JAX_PLATFORMS": "cpu", "TQDM_DISABLE": "1"},
            text=True,
        )
        for arguments in warm:
            self._ask({"warm": arguments})

    def run(self, arguments: list[str], folder: Path, *, mode: str = "main") -> Result:
        """Run `jax-encdec ARGUMENTS` in `folder`; mode "unpickle": Python's own pickle;
        mode "free": files may be written."""
        return Result(**self._ask({"run": arguments, "folder": str(folder), "mode": mode}))

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the server is gone"
        return json.loads(answer)

    def close(self) -> None:
        """Stop the server."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(30)
        self._server.stdout.close()


def snapshot(folder: Path) -> dict[str, tuple[int, ...]]:
    """Every entry below a folder with its kind, size and time of change."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in [".", *folders, *files]:
            status = os.lstat(path := os.path.join(place, name))
            found[path] = (status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns)
    return found


# In the server -----------------------------------------------------------------------------------


def _serve() -> None:
    import jax_encdec.cli
    from jax_encdec.convert.tables import table_of
    from jax_encdec.families import FAMILIES

    for name in jax_encdec.cli.COMMANDS:
        importlib.import_module(f"jax_encdec.cli.{name}")
    # What would be imported, or compiled, when first needed.
    for family in FAMILIES.values():
        table_of(family())  # type: ignore[call-arg]
    for name in ("cp437", "utf_16_be", "utf_16_le", "utf_32_be", "utf_32_le"):
        importlib.import_module(f"encodings.{name}")
    for line in sys.stdin:
        question = json.loads(line)
        if "warm" in question:
            answer = _forked(question["warm"], "/", "warm")
            for name in answer.pop("modules", []):
                with contextlib.suppress(ImportError):
                    importlib.import_module(name)
        else:
            answer = _forked(question["run"], question["folder"], question["mode"])
        print(json.dumps(answer), flush=True)


def _forked(arguments: list[str], folder: str, mode: str) -> dict[str, Any]:
    assert len(os.listdir("/proc/self/task")) == 1, "forking needs a process of one thread"
    pipes = {name: os.pipe() for name in ("out", "err", "report")}
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(pipes["out"][1], 1)
            os.dup2(pipes["err"][1], 2)
            _child(arguments, folder, mode, pipes["report"][1])
        finally:
            os._exit(70)
    for _, write in pipes.values():
        os.close(write)
    texts = _drained({name: read for name, (read, _) in pipes.items()}, child)
    _, status, usage = os.wait4(child, 0)
    report = json.loads(texts["report"] or "{}")
    return {
        "code": os.waitstatus_to_exitcode(status),
        "out": texts["out"].decode(errors="replace"),
        "err": texts["err"].decode(errors="replace"),
        "events": report.get("events", ["no report: the child was killed"]),
        "cpu": usage.ru_utime + usage.ru_stime,
        "memory": report.get("memory", -1),
        "resident": report.get("resident", -1),
    } | ({"modules": report.get("modules", [])} if mode == "warm" else {})


def _drained(pipes: dict[str, int], child: int) -> dict[str, bytes]:
    """Everything that comes out of the pipes until they are closed, or the child is killed."""
    texts = dict.fromkeys(pipes, b"")
    ends = time.monotonic() + _WALL_SECONDS
    with selectors.DefaultSelector() as selector:
        for name, pipe in pipes.items():
            selector.register(pipe, selectors.EVENT_READ, name)
        while selector.get_map():
            ready = selector.select(max(0.0, ends - time.monotonic()))
            if not ready:
                os.kill(child, signal.SIGKILL)
                ends = time.monotonic() + _WALL_SECONDS
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                texts[key.data] += data
                if not data:
                    selector.unregister(key.fd)
                    os.close(key.fd)
    return texts


def _child(arguments: list[str], folder: str, mode: str, report: int) -> None:
    from jax_encdec.cli import main

    before = _memory()
    modules = set(sys.modules)
    events: list[str] = []
    watching = True

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if not watching:
            return
        if event == "open":
            flags = args[2] if isinstance(args[2], int) else 0
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
                events.append(f"open for writing {args[0]!r}")
        elif event.startswith(_WORLD) and event not in _READING:
            events.append(f"{event} {str(args)[:200]}")

    if mode != "warm":
        os.chdir(folder)
        for kind, limit in (
            (resource.RLIMIT_AS, before["VmSize"] + MEMORY),
            (resource.RLIMIT_CPU, CPU_SECONDS),
            (resource.RLIMIT_FSIZE, resource.RLIM_INFINITY if mode == "free" else 0),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(kind, (limit, limit))
        sys.addaudithook(audit)
    try:
        if mode == "unpickle":
            with open(arguments[0], "rb") as file:
                pickle.load(file)
            code = 0
        else:
            code = main(arguments)
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    watching = False
    after = _memory()
    if children := Path(f"/proc/self/task/{os.getpid()}/children").read_text():
        events.append(f"processes {children}")
    found = {
        "events": events,
        "memory": after["VmPeak"] - before["VmSize"],
        "resident": after["VmHWM"] - before["VmRSS"],
        "modules": sorted(set(sys.modules) - modules) if mode == "warm" else [],
    }
    os.write(report, json.dumps(found).encode())
    os._exit(code)


def _memory() -> dict[str, int]:
    """Bytes of address space and of memory in use, now and at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines if line.startswith("Vm"))
    return {name: int(value.split()[0]) << 10 for name, value in pairs}


if __name__ == "__main__":
    _serve()
