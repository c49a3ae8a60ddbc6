"""A command in a process of its own: what kills it is told, where it would take the caller along without a word."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edge_backbones.errors import CompileError
from edge_backbones.system import Memory, gib, read_system

_FORWARDED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


LESS_MEMORY = (
    "Make room: add swap, stop the desktop (sudo systemctl isolate multi-user.target), or ask for less: --workspace 256, one "
    "--shapes, one --precision. The bundle holds what was finished before: --resume goes on with the rest"
)


# As for the command itself, the current folder is not searched for libraries.
_ROOT = str(Path(__file__).parents[1])
_MAIN = "import sys; sys.path[:] = [*{!r}, *filter(None, sys.path), {!r}]; from edge_backbones.cli import main; main()"
_COMMAND = (sys.executable, "-c", _MAIN.format([_ROOT] if sys.path[:1] == [_ROOT] else [], _ROOT))  # first for -m alone


def run(arguments: Sequence[str], command: Sequence[str] = _COMMAND) -> int:
    """Run ``edge-backbones`` with these arguments and return its exit code; what it prints is printed.

    Ctrl-C and termination are passed on, once. Raises CompileError when the process was killed or crashed, with what is
    known of why. For the main thread: it takes over these signals meanwhile.
    """
    memory, kills = read_system().memory, _kills_for_memory()
    # In a session of its own: Ctrl-C would reach it twice otherwise, from the terminal and from here.
    whole = [*command, *arguments]
    with subprocess.Popen(whole, start_new_session=True) as process, _forwarding(process):  # noqa: S603
        code = process.wait()
    if code >= 0:
        return code
    if -code in _FORWARDED:
        return 128 - code
    raise CompileError(_why(-code, memory, for_memory=_kills_for_memory() > kills))


@contextlib.contextmanager
def _forwarding(process: subprocess.Popen[bytes]) -> Iterator[None]:
    def forward(number: int, _: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _why(number: int, memory: Memory | None, *, for_memory: bool) -> str:
    if number != getattr(signal, "SIGKILL", None):
        name = signal.Signals(number).name
        if name == "SIGABRT":  # what an allocation that fails in C++ ends in
            return f"compiling crashed in a library (SIGABRT), which may be for lack of memory. {LESS_MEMORY}"
        return (
            f"compiling crashed in a library ({name}); the bundle holds what was finished before. Try another "
            "--precision, and edge-backbones doctor; with --in-process the crash is this process's, for a debugger"
        )
    room = "" if memory is None else f", {gib(memory.available)} of {gib(memory.total)} available before"
    reason = "by the system, for lack of memory" if for_memory else "(SIGKILL), as the system does for lack of memory"
    return f"compiling was killed {reason}{room}. {LESS_MEMORY}"


def _kills_for_memory(vmstat: Path = Path("/proc/vmstat")) -> int:
    """How many processes the kernel has ended for lack of memory; 0 where it does not count them."""
    try:
        found = re.search(r"^oom_kill (\d+)$", vmstat.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return 0
    return int(found.group(1)) if found else 0
