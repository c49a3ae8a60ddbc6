"""Native work in a process of its own: what kills that process is reported, and the caller lives on.

Libraries that parse a graph or load an engine are C++: a file that was made to harm them, or a fault of theirs, ends the
whole process. Functions with :func:`apart` run in a fresh interpreter (never a fork, which a process with threads cannot
survive), and give the same result, the same errors and the same progress as in the caller's own process.
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
from edge_backbones.machine.system import Memory, gib, read_system
from edge_backbones.progress import Progress

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

_ROOM = "Make room: add swap, stop the desktop (sudo systemctl isolate multi-user.target)"
LESS_MEMORY = (
    f"{_ROOM}, or ask for less: --workspace 256, one --shapes, one --precision. The bundle holds what was finished before: "
    "--resume goes on with the rest"
)
OR_A_FAULT = "or the library has a fault"
"""What an explanation of a death by a hostile file ends in."""
_GRACE = 10.0  # seconds in which a process that was interrupted may end by itself
_READY = b"edge_backbones: the answers follow\n"  # whatever a start-up file of the user prints comes before it

# The current folder is not searched for modules: anybody may have written there.
_ROOT = str(Path(__file__).parents[2])
_MAIN = (
    "import marshal, sys; sys.path[:] = marshal.load(sys.stdin.buffer); "  # both are built in, and so searched for nowhere
    "from edge_backbones.machine.child import serve; serve()"
)


class _Caller:
    """``tell``: in a process of its own, what sends a message to the process that started it; None anywhere else."""

    tell: Callable[[str, Any], None] | None = None


class _OtherTraceback(Exception):  # noqa: N818
    """Where an error that is not one of ours was raised in the other process."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def apart(
    refusal: type[CompileError] | type[InferenceError],
) -> Callable[[Callable[_Parameters, _Result]], Callable[_Parameters, _Result]]:
    """Make a function of a module run in a process of its own, unless it is called with ``in_process=True``.

    The function has the keywords ``in_process`` and ``progress``; everything else that it takes, returns or raises has to
    pickle. Raises ``refusal`` when that process ends without an answer, with what it was doing (:func:`doing`).
    """

    def wrap(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
        path = f"{function.__module__}:{function.__qualname__}"

        @functools.wraps(function)
        def either(*arguments: _Parameters.args, **options: _Parameters.kwargs) -> _Result:
            if options.get("in_process") or _Caller.tell is not None:  # no process of its own within one
                return function(*arguments, **options)
            given: dict[str, Any] = {name: value for name, value in options.items() if name != "in_process"}
            progress = given.pop("progress", None)
            result: _Result = run_apart(path, arguments, given, progress=progress, refusal=refusal)
            return result

        return either

    return wrap


def doing(what: str, hint: str) -> None:
    """Say what this process does from now on, as in "was compiling int8 for openvino": its caller reports that, and the
    ``hint``, if the process ends over it. Does nothing outside a process of its own."""
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
    """Call a function, named as ``module:name``, in a fresh interpreter; return what it returns and raise what it raises.

    What it prints goes to stderr. An exception in this process while it waits, Ctrl-C or one of ``progress``, interrupts
    the other process, which ends within seconds; it ends too when this process is gone. May be called from any thread.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        raise refusal("this program has no Python interpreter to start a process of its own with: pass in_process=True")
    memory, kills = read_system().memory, _kills_for_memory()
    what, hint = "was starting", "what it said is on stderr"
    isolated = ["-I"] if sys.flags.isolated else []
    # In a session of its own: a terminal's Ctrl-C reaches this process only, which passes it on.
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
            with contextlib.suppress(BrokenPipeError):  # it has ended, which the first answer shows
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
    """Where the other process finds the modules that this one has found."""
    found = [entry for entry in sys.path if entry]
    return found if _ROOT in found else [_ROOT, *found]


def _with_cause(error: BaseException, where: str) -> BaseException:
    if not isinstance(error, EdgeBackbonesError):
        error.__cause__ = _OtherTraceback(where)
    return error


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the other process: it is interrupted when its input ends, and killed when that does not help."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was left to write cannot be written any more
                pipe.close()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE + 5)
    finally:
        process.kill()


def serve() -> NoReturn:
    """Run the one function that the caller asks for, and send it what comes of it. For `run_apart`."""
    lock, stopped = threading.Lock(), threading.Event()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print to stdout
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have had ignored

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
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # from here on nothing is to be interrupted
        tell("result", result)
    except BaseException as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        where = traceback.format_exc()
        with contextlib.suppress(BrokenPipeError):  # the caller has gone
            try:
                tell("error", (error, where))
            except (pickle.PicklingError, TypeError, AttributeError):
                tell("error", (RuntimeError(f"{type(error).__name__}: {error}"), where))
    os._exit(0)  # what libraries do on their way out cannot spoil what has been sent


def _stop_with_the_caller(stopped: threading.Event) -> None:
    """Interrupt this process when its caller closes the pipe or is gone; end it when that does not help."""
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
    memory: Memory | None,
    refusal: type[EdgeBackbonesError],
    *,
    for_memory: bool,
) -> str:
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
    if name == "SIGABRT":  # what an allocation that fails in C++ ends in
        return f"{start} ended by SIGABRT: {hint}, or memory ran out. {less}"
    debug = "in_process=True (--in-process) lets a debugger see it"
    return f"{start} ended by {name}: {hint}. {whole}; {debug}"


def _kills_for_memory(vmstat: Path = Path("/proc/vmstat")) -> int:
    """How many processes the kernel has ended for lack of memory; 0 where it does not count them."""
    try:
        found = re.search(r"^oom_kill (\d+)$", vmstat.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return 0
    return int(found.group(1)) if found else 0
