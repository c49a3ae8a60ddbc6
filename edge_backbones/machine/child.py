"""Run native code in a process of its own, so that a crash is reported and the caller lives on.

Libraries that parse a graph or load an engine are written in C++: a hostile file or a fault of theirs ends the whole process.
Functions with :func:`apart` run in a new interpreter (not in a fork, which is unsafe in a process with threads). Results,
errors and progress are the same as in the caller's process.
"""

from __future__ import annotations

import _thread
import contextlib
import functools
import importlib
import marshal
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn, ParamSpec, TypeVar

from edge_backbones.errors import CompileError, EdgeBackbonesError, InferenceError
from edge_backbones.machine.system import HostMemory, gib, read_system
from edge_backbones.progress import Progress

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

_ROOM = "Make room: add swap, stop the desktop (sudo systemctl isolate multi-user.target)"
LESS_MEMORY = (
    f"{_ROOM}, or ask for less: --workspace 256, one --shapes, one --precision. The bundle holds what was finished before: "
    "--resume goes on with the rest"
)
OR_A_FAULT = "or the library has a fault"
"""The end of a hint that blames a hostile file first."""
_GRACE = 10.0  # seconds in which a process that was interrupted may end by itself
_READY = b"edge_backbones: the answers follow\n"  # start-up files of the user may print something before it

# The current folder is not searched for modules: anybody may write there.
_ROOT = str(Path(__file__).parents[2])
_MAIN = (
    "import marshal, sys; sys.path[:] = marshal.load(sys.stdin.buffer); "  # both are built in: no folder is searched for them
    "from edge_backbones.machine.child import serve; serve()"
)


class _Caller:
    """The process that started this one. ``tell`` sends it a message; None in a process that `run_apart` did not start."""

    tell: Callable[[str, Any], None] | None = None


class _OtherTraceback(Exception):  # noqa: N818
    """The traceback of an error in the other process that is not an EdgeBackbonesError."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def apart(
    refusal: type[CompileError] | type[InferenceError],
) -> Callable[[Callable[_Parameters, _Result]], Callable[_Parameters, _Result]]:
    """Decorate a function of a module to run in a process of its own, unless it is called with ``in_process=True``.

    The function needs the keywords ``in_process`` and ``progress``. Everything else that it takes, returns or raises must
    pickle. Raises ``refusal`` if the process ends without an answer, with what it was doing (:func:`doing`).
    """

    def wrap(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
        path = f"{function.__module__}:{function.__qualname__}"

        @functools.wraps(function)
        def either(*arguments: _Parameters.args, **options: _Parameters.kwargs) -> _Result:
            if options.get("in_process") or _Caller.tell is not None:  # it runs in such a process already
                return function(*arguments, **options)
            given: dict[str, Any] = {name: value for name, value in options.items() if name != "in_process"}
            progress = given.pop("progress", None)
            result: _Result = run_apart(path, arguments, given, progress=progress, refusal=refusal)
            return result

        return either

    return wrap


def doing(what: str, hint: str) -> None:
    """Tell the caller what this process does from now on, as in "was compiling int8 for openvino".

    The caller reports it with the ``hint`` if the process crashes. Does nothing in a process that `run_apart` did not start.
    """
    if _Caller.tell is not None:
        _Caller.tell("doing", (what, hint))


def run_apart(
    function: str,
    arguments: Sequence[Any],
    options: Mapping[str, Any],
    *,
    progress: Progress | None = None,
    refusal: type[EdgeBackbonesError] = CompileError,
) -> Any:
    """Call the function ``module:name`` in a new interpreter; return what it returns and raise what it raises.

    What it prints goes to stderr. An exception in this process while it waits (Ctrl-C, or one that ``progress`` raises)
    interrupts the other process, which then ends within seconds. It also ends when this process is gone. May be called from
    any thread.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        raise refusal("this program has no Python interpreter to start a process of its own with: pass in_process=True")
    memory, kills = read_system().memory, _kills_for_memory()
    what, hint = "was starting", "what it said is on stderr"
    isolated = ["-I"] if sys.flags.isolated else []
    # In a session of its own: Ctrl-C in a terminal reaches only this process, which passes it on.
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, *isolated, "-c", _MAIN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        try:
            with contextlib.suppress(BrokenPipeError):  # the process has ended: reading its answers shows that
                marshal.dump(_search_path(), process.stdin)
                pickle.dump((function, tuple(arguments), dict(options)), process.stdin)
                process.stdin.flush()
            while process.stdout.readline() not in (_READY, b""):
                pass
            while True:
                kind, value = _next_message(process.stdout)
                if kind == "progress" and progress is not None:
                    progress(*value)
                elif kind == "doing":
                    what, hint = value
                elif kind == "result":
                    return value
                elif kind == "error":
                    raise _with_cause(*value)
                elif kind == "ended":
                    code, for_memory = process.wait(), _kills_for_memory() > kills
                    raise refusal(_why(code, what, hint, memory, refusal, for_memory=for_memory))
        except BaseException:
            _stop(process)
            raise


def _next_message(answers: IO[bytes]) -> tuple[str, Any]:
    try:
        kind, value = pickle.load(answers)  # noqa: S301
    except (EOFError, pickle.UnpicklingError):  # in the middle of a message, perhaps
        return "ended", None
    return kind, value


def _search_path() -> list[str]:
    """Return the module search path for the other process: that of this process without the current folder."""
    found = [entry for entry in sys.path if entry]
    return found if _ROOT in found else [_ROOT, *found]


def _with_cause(error: BaseException, where: str) -> BaseException:
    if not isinstance(error, EdgeBackbonesError):
        error.__cause__ = _OtherTraceback(where)
    return error


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the other process: the end of its input interrupts it; after a while it is killed."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # a pipe may hold data that cannot be written any more
                pipe.close()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE + 5)
    finally:
        process.kill()


def serve() -> NoReturn:
    """Run the function that the caller names and send it the result or the error. Only `run_apart` calls this."""
    lock, stopped = threading.Lock(), threading.Event()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print to stdout
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have made it ignored

    def tell(kind: str, value: Any) -> None:
        message = pickle.dumps((kind, value))
        with lock:
            answers.write(message)
            answers.flush()

    def progress(step: str, done: int, total: int | None) -> None:
        if stopped.is_set():  # some libraries catch everything, KeyboardInterrupt too
            raise KeyboardInterrupt
        tell("progress", (step, done, total))

    path, arguments, options = pickle.load(sys.stdin.buffer)  # noqa: S301
    answers.write(_READY)
    _Caller.tell = tell
    threading.Thread(target=_stop_with_the_caller, args=(stopped,), daemon=True).start()
    try:
        module, _, name = path.partition(":")
        function = getattr(importlib.import_module(module), name)
        result = function(*arguments, **options, in_process=True, progress=progress)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the result must not be interrupted
        tell("result", result)
    except BaseException as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        where = traceback.format_exc()
        with contextlib.suppress(BrokenPipeError):  # the caller has gone
            try:
                tell("error", (error, where))
            except (pickle.PicklingError, TypeError, AttributeError):
                tell("error", (RuntimeError(f"{type(error).__name__}: {error}"), where))
    os._exit(0)  # skip the clean-up of libraries, which may crash: the answer has been sent


def _stop_with_the_caller(stopped: threading.Event) -> None:
    """Interrupt this process when its caller closes the pipe or is gone; end it if it does not stop."""
    while os.read(0, 1):  # not sys.stdin, whose lock a thread must not hold when Python ends
        pass
    stopped.set()
    main = threading.main_thread().ident
    if hasattr(signal, "pthread_kill") and main is not None:
        signal.pthread_kill(main, signal.SIGINT)
    else:
        _thread.interrupt_main()
    time.sleep(_GRACE)
    os._exit(1)


def _why(
    code: int,
    what: str,
    hint: str,
    memory: HostMemory | None,
    refusal: type[EdgeBackbonesError],
    *,
    for_memory: bool,
) -> str:
    """Return why a process ended without an answer. ``code``: its exit code. ``for_memory``: the kernel ended a process."""
    start = f"the process that {what}"
    whole = "The bundle is whole and holds what was finished before"
    less = LESS_MEMORY if issubclass(refusal, CompileError) else f"{_ROOM}. {whole}"
    if code >= 0:
        return f"{start} ended with exit code {code} and no answer: {hint}. {whole}"
    if -code == getattr(signal, "SIGKILL", None):
        room = "" if memory is None else f", {gib(memory.available)} of {gib(memory.total)} available before"
        reason = (
            "by the system, for lack of memory" if for_memory else "(SIGKILL), as the system does for lack of memory"
        )
        return f"{start} was killed {reason}{room}. {less}"
    name = signal.Signals(-code).name
    if name in ("SIGTERM", "SIGHUP", "SIGINT"):
        return f"{start} was ended from outside ({name}). {whole}"
    if name == "SIGABRT":  # a failed allocation in C++ ends so too
        return f"{start} ended by SIGABRT: {hint}, or memory ran out. {less}"
    debug = "in_process=True (--in-process) lets a debugger see it"
    return f"{start} ended by {name}: {hint}. {whole}; {debug}"


def _kills_for_memory(vmstat: Path = Path("/proc/vmstat")) -> int:
    """Return how many processes the kernel has ended for lack of memory; 0 if it does not count them."""
    try:
        found = re.search(r"^oom_kill (\d+)$", vmstat.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return 0
    return int(found.group(1)) if found else 0
