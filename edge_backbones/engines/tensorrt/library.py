"""Find TensorRT (the full library, the RTX one or the lean runtime), and collect the errors that it logs.

What a release can do is looked up on its module, never derived from a version string. Some names are gone in TensorRT
11 and TensorRT-RTX (weak typing, `EXPLICIT_BATCH`), others were added in between (`device_memory_size_v2`).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import re
import threading
from collections import deque
from typing import Any, Literal

from edge_backbones.errors import MissingDependencyError

TensorRtFlavour = Literal["tensorrt", "tensorrt_rtx", "tensorrt_lean"]
FLAVOURS: tuple[TensorRtFlavour, ...] = ("tensorrt", "tensorrt_rtx", "tensorrt_lean")

OLDEST = (10, 3)
"""Oldest release of TensorRT that can compile plans: it has strongly typed networks and all that compiling needs."""
FROM_JETPACK = (
    "sudo apt install python3-libnvinfer, in an environment made by /usr/bin/python3 -m venv --system-site-packages ENV "
    "(JetPack has it, pip has not)"
)

_EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx", "tensorrt_lean": "tensorrt"}
_loggers: dict[str, Any] = {}
_making = threading.Lock()


def load_library(flavour: TensorRtFlavour) -> Any:
    """Return the module of a flavour.

    Importing it needs no GPU and no driver. But without a driver, creating a Runtime or a Builder of `tensorrt` or
    `tensorrt_lean` ends the process: call :func:`edge_backbones.machine.gpus.find_gpus` first.

    Raises MissingDependencyError with the command that installs it; on a Jetson, the command for JetPack.
    """
    reason = "not installed"
    # `tensorrt_rtx` re-exports `tensorrt_rtx_bindings`. Some installations have only the bindings.
    for name in (flavour, f"{flavour}_bindings"):
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            if error.name != name:
                reason = f"installed, and cannot be loaded: {str(error).splitlines()[-1]}"
                break
            continue
        # A folder of that name on sys.path, such as that of the library's sources, can be imported too.
        if not hasattr(module, "Runtime"):
            continue
        # torch-tensorrt-rtx registers TensorRT-RTX as `tensorrt`, so check which library this is.
        if hasattr(module, "ComputeCapability") == (flavour == "tensorrt_rtx"):
            return module
    from edge_backbones.machine.system import is_jetson  # imported here, because tests use this module without msgspec

    fix = FROM_JETPACK if flavour == "tensorrt" and is_jetson() else ""
    raise MissingDependencyError(f"the {flavour} engine ({reason})", _EXTRAS[flavour], fix=fix)


def library_version(flavour: TensorRtFlavour) -> str | None:
    """Return the library's version; None if it cannot be imported."""
    try:
        return str(load_library(flavour).__version__)
    except MissingDependencyError:
        return None


def against_release(flavour: TensorRtFlavour, version: str, *, jetson: bool) -> str:
    """Return why this release cannot compile plans, with a fix; empty if it can."""
    if flavour != "tensorrt" or tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= OLDEST:
        return ""
    way = "to JetPack 6.2 or newer" if jetson else "with pip install --upgrade tensorrt"
    return f"10.3 is the oldest that engines are made with: upgrade {way}"


def against_driver(flavour: TensorRtFlavour, driver: str) -> str:
    """Return why a driver for CUDA ``driver`` is too old for the installed library, with a fix; empty if it is not.

    Only wheels say which CUDA they were built with. With an older driver, a Runtime does not work, and using it ends
    the process.
    """
    wheel, served = flavour.replace("_", "-"), int(driver.partition(".")[0])
    made_with = [cuda for cuda in range(11, 20) if _is_installed(wheel, cuda)]
    if not made_with or min(made_with) <= served:
        return ""
    return (
        f"{flavour} here was made with CUDA {min(made_with)}, and the driver serves CUDA {driver}: update the driver, or "
        f"install {wheel}-cu{served}"
    )


def _is_installed(wheel: str, cuda: int) -> bool:
    for part in ("", "-bindings", "-libs"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(f"{wheel}-cu{cuda}{part}")
            return True
    return False


def logger_of(library: Any) -> Any:
    """Return the one logger of a library in this process: TensorRT keeps its first logger and warns about others.

    It is an ``ILogger`` with ``last_error() -> str`` for the calling thread, ``clear()``, and ``warnings`` with the
    latest texts. Messages from TensorRT's own threads count for every caller.
    """
    with _making:
        name = library.__name__
        if name not in _loggers:
            _loggers[name] = _make_logger(library)
        return _loggers[name]


def _make_logger(library: Any) -> Any:
    """Create the logger of a library."""
    severities = library.ILogger.Severity
    errors = (severities.INTERNAL_ERROR, severities.ERROR)

    class Log(library.ILogger):  # type: ignore[misc,name-defined]
        """Keep TensorRT's latest errors and warnings: its calls return None or False, and only the log has the reason."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: deque[tuple[int, str]] = deque(maxlen=32)
            self.warnings: deque[str] = deque(maxlen=32)

        def log(self, severity: Any, message: str) -> None:
            if severity in errors:
                self.errors.append((threading.get_ident(), message))
            elif severity == severities.WARNING:
                self.warnings.append(message)

        def clear(self) -> None:
            """Forget the errors of this thread, before a call whose failure is to be explained."""
            mine = threading.get_ident()
            kept = [entry for entry in self.errors if entry[0] != mine]
            self.errors.clear()
            self.errors.extend(kept)

        def last_error(self) -> str:
            """Return the last error of this thread; if there is none, the last of any thread."""
            mine = [message for thread, message in self.errors if thread == threading.get_ident()]
            texts = mine or [message for _, message in self.errors]
            return " ".join(texts[-1].split()) if texts else f"{library.__name__} logged no error"

    return Log()
