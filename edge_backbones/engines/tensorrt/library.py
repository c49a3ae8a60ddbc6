"""Finding TensorRT: the full library, the RTX one or the lean runtime, and the log in which they give their reasons.

Releases are told apart by what they have, never by a version string: names that are gone in TensorRT 11 and TensorRT-RTX
(weak typing, `EXPLICIT_BATCH`), or came in between (`device_memory_size_v2`), are looked for on the module.
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
"""Of TensorRT, for plans: strongly typed networks, and what else compiling takes for granted."""
FROM_JETPACK = (
    "sudo apt install python3-libnvinfer, in an environment made by /usr/bin/python3 -m venv --system-site-packages ENV "
    "(JetPack has it, pip has not)"
)

_EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx", "tensorrt_lean": "tensorrt"}
_loggers: dict[str, Any] = {}
_making = threading.Lock()


def load_library(flavour: TensorRtFlavour) -> Any:
    """The module of a flavour; raises MissingDependencyError with the command that installs it, on a Jetson JetPack's.

    Importing needs no GPU and no driver. Making a Runtime or a Builder of `tensorrt` or `tensorrt_lean` without a driver
    ends the process: ask :func:`edge_backbones.machine.gpus.find_gpus` first.
    """
    reason = "not installed"
    # `tensorrt_rtx` re-exports `tensorrt_rtx_bindings`, which is all that some installations have.
    for name in (flavour, f"{flavour}_bindings"):
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            if error.name != name:
                reason = f"installed, and cannot be loaded: {str(error).splitlines()[-1]}"
                break
            continue
        # torch-tensorrt-rtx puts TensorRT-RTX in the place of `tensorrt`.
        if hasattr(module, "ComputeCapability") == (flavour == "tensorrt_rtx"):
            return module
    from edge_backbones.machine.system import is_jetson  # the bindings of every release are asked without msgspec

    fix = FROM_JETPACK if flavour == "tensorrt" and is_jetson() else ""
    raise MissingDependencyError(f"the {flavour} engine ({reason})", _EXTRAS[flavour], fix=fix)


def library_version(flavour: TensorRtFlavour) -> str | None:
    """The library's version, or None where it cannot be imported."""
    try:
        return str(load_library(flavour).__version__)
    except MissingDependencyError:
        return None


def against_release(flavour: TensorRtFlavour, version: str, *, jetson: bool) -> str:
    """Why plans are not made with this release of TensorRT, with the way out; empty if they are."""
    if flavour != "tensorrt" or tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= OLDEST:
        return ""
    way = "to JetPack 6.2 or newer" if jetson else "with pip install --upgrade tensorrt"
    return f"10.3 is the oldest that engines are made with: upgrade {way}"


def against_driver(flavour: TensorRtFlavour, driver: str) -> str:
    """Why a driver that serves CUDA ``driver`` is too old for the installed library, with the way out; empty if it is not.

    Only wheels say which CUDA they were made with. Under an older driver a Runtime is dead, and using it ends the process.
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
    """The one logger of a library in this process: TensorRT keeps the first that it is given and warns about others.

    An ``ILogger`` with ``last_error() -> str`` of the calling thread, ``clear()``, and ``warnings``, the latest texts.
    Messages of threads that TensorRT starts itself count for every caller.
    """
    with _making:
        name = library.__name__
        if name not in _loggers:
            _loggers[name] = _make_logger(library)
        return _loggers[name]


def _make_logger(library: Any) -> Any:
    severities = library.ILogger.Severity
    errors = (severities.INTERNAL_ERROR, severities.ERROR)

    class Log(library.ILogger):  # type: ignore[misc,name-defined]
        """A failure is a None or a False in TensorRT, and its reason stands only here."""

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
            """Forget what this thread was told, before a call whose failure is to be explained."""
            mine = threading.get_ident()
            kept = [entry for entry in self.errors if entry[0] != mine]
            self.errors.clear()
            self.errors.extend(kept)

        def last_error(self) -> str:
            """The last error of this thread, or the last of any."""
            mine = [message for thread, message in self.errors if thread == threading.get_ident()]
            texts = mine or [message for _, message in self.errors]
            return " ".join(texts[-1].split()) if texts else f"{library.__name__} logged no error"

    return Log()
