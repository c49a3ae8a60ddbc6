"""Every error that this package raises on purpose.

::

    EdgeBackbonesError
    ├── MissingDependencyError
    ├── BrokenLibraryError
    ├── SourceError
    │   └── HubUnreachableError
    ├── ExportError
    ├── CalibrationError
    ├── QuantizationError
    ├── CompileError
    ├── ParityError (parity_report.py)
    ├── BundleError
    │   ├── ManifestError
    │   ├── IntegrityError
    │   └── TrustError
    ├── EngineMismatchError
    ├── ClientMismatchError
    ├── InferenceError
    │   ├── ResourceError
    │   └── DeviceError
    │       └── OutOfMemoryError
    └── InputError

A message says what was wrong with both values and how to fix it, in one line. Anything else that escapes from this
package (AttributeError, a bare RuntimeError of a library...) is a bug.
"""

from __future__ import annotations

import contextlib
import errno
import platform
import re
import unicodedata
from collections.abc import Iterator
from typing import Any


class EdgeBackbonesError(Exception):
    """Base class: catch it to catch every refusal of this package. It pickles, so that it comes out of a worker process.

    Texts are stored as `visible` shows them: messages quote names out of bundles, which strangers chose.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(_visible_message(arg) if isinstance(arg, str) else arg for arg in args))

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[EdgeBackbonesError], args: tuple[Any, ...], attributes: dict[str, Any]) -> EdgeBackbonesError:
    """An error with its message, past the constructor, which may make the message of other arguments."""
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(attributes)
    return error


class MissingDependencyError(EdgeBackbonesError, ImportError):
    """A library of an optional extra is not installed. ``fix``: what installs it where pip does not."""

    def __init__(self, what: str, extra: str, *, fix: str = "") -> None:
        pip = f"{what} needs the '{extra}' extra: pip install 'edge-backbones[{extra}]'"
        super().__init__(f"{what}: {fix}" if fix else pip)
        self.extra = extra


class BrokenLibraryError(EdgeBackbonesError, ImportError):
    """An installed library does not load: its binary part is for another processor or another Python."""

    def __init__(self, cause: ImportError) -> None:
        super().__init__(
            f"an installed library is not for this machine ({platform.machine()}, Python {platform.python_version()}): "
            f"{' '.join(str(cause).split())[:200]}. An environment is made on the machine that runs it, not copied: python3 "
            "-m venv ENV, and ENV/bin/pip install 'edge-backbones[cli]'"
        )


class SourceError(EdgeBackbonesError):
    """The model, its stages or its weights cannot be loaded as asked."""


class HubUnreachableError(SourceError):
    """Pretrained weights were asked for and the model hub did not answer."""


class ExportError(EdgeBackbonesError):
    """The network cannot be exported in the asked form."""


class CalibrationError(EdgeBackbonesError):
    """Calibration data that is missing, unreadable or would give a useless range."""


class QuantizationError(EdgeBackbonesError):
    """A typed graph cannot be made from this graph and these ranges."""


class CompileError(EdgeBackbonesError):
    """An engine library refused a graph."""


class BundleError(EdgeBackbonesError):
    """A bundle cannot be read or written."""


class ManifestError(BundleError):
    """manifest.json is not what the format says."""


class IntegrityError(BundleError):
    """A file of a bundle is missing, truncated, changed or outside the folder."""


class TrustError(BundleError):
    """A bundle is not signed by a key that is trusted here, or is not what was signed; a key that cannot be used."""


class EngineMismatchError(EdgeBackbonesError):
    """No engine of a bundle can run on this machine."""


class ClientMismatchError(EdgeBackbonesError):
    """A bundle cannot take the place of a model's backbone, which was left as it was."""


class InferenceError(EdgeBackbonesError):
    """A loaded engine failed while it ran."""


class ResourceError(InferenceError):
    """This process ran out of memory, threads or file descriptors: the bundle is as good as before, and so is its engine.

    ``doing``: what failed. ``lack``: what ran out: memory, threads or file descriptors. ``said``: the words of the
    library or of the system.
    """

    def __init__(self, doing: str, lack: str, said: str) -> None:
        super().__init__(f"{doing} failed because this process has no {lack} left ({said}): {_MORE[lack]}")
        self.lack = lack


class DeviceError(InferenceError):
    """A call of CUDA failed."""


class OutOfMemoryError(DeviceError):
    """Device memory ran out."""


class InputError(EdgeBackbonesError, ValueError):
    """An input array or a stage selection that the engine cannot take."""


def visible(text: str) -> str:
    r"""Show a text of a stranger on one line: a terminal obeys none of it, and no letter of it moves or hides others.

    Characters that control (``\x1b``, ``\n``), that turn the direction of writing (``\u202e``) or that cannot be seen become
    escapes, and so do bytes of a file name that are not UTF-8 (``\udce9``). Letters of every language stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if _is_unseen(c) else c for c in text)


def _visible_message(text: str) -> str:
    # The DataLoader of torch makes the error of a worker anew, with the worker's traceback in its text: those lines stay.
    if text.startswith("Caught ") and "\nOriginal Traceback (most recent call last):\n" in text:
        return "\n".join(map(visible, text.split("\n")))
    return visible(text)


def _is_unseen(character: str) -> bool:
    # Joiners are part of words in Persian, Hindi and others.
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\u200c\u200d"


def first_line(error: BaseException, *, typed: bool = False) -> str:
    """The first line of an exception's text that says something, for a message of ours.

    A heading, which ends with a colon, is skipped for what it announces. With ``typed`` the name of the type stands in
    front; it always does for an exception without a text, and for a KeyError, whose text is the bare key.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if not line.endswith(":")), "".join(lines[:1]))
    if typed or not said or isinstance(error, KeyError):
        return ": ".join(filter(None, (type(error).__name__, said)))
    return said


_MORE = {
    "memory": "stop other programs, or raise its limit (ulimit -v, docker run --memory, systemd MemoryMax=)",
    "threads": "raise its limit of threads, or of memory for their stacks (ulimit -u, ulimit -v, docker run --pids-limit, "
    "systemd TasksMax=)",
    "file descriptors": "raise its limit (ulimit -n, docker run --ulimit nofile=, systemd LimitNOFILE=), or close files",
}
_NUMBERS = {
    errno.ENOMEM: "memory",
    errno.EAGAIN: "threads",
    errno.EMFILE: "file descriptors",
    errno.ENFILE: "file descriptors",
}
# Words of C++, glibc, torch and Python. glibc's "cannot allocate memory in static TLS block" is another matter.
_WORDS = {
    "memory": re.compile(
        r"std::bad_alloc|bad allocation|Cannot allocate memory|can't allocate memory|[Nn]ot enough memory"
        r"|failed to map segment from shared object(?!: Operation not permitted)"
    ),
    "threads": re.compile(r"Resource temporarily unavailable|can't start new thread"),
    "file descriptors": re.compile(r"Too many open files"),
}


def refuse_lack(doing: str, error: BaseException) -> None:
    """Raise ResourceError if ``error`` says, by its type, number or text, that this process ran out of something."""
    if isinstance(error, MemoryError):
        raise ResourceError(doing, "memory", first_line(error)) from error
    if isinstance(error, OSError) and error.errno in _NUMBERS:
        raise ResourceError(doing, _NUMBERS[error.errno], error.strerror or str(error)) from error
    for lack, words in _WORDS.items():
        if found := words.search(str(error)):
            raise ResourceError(doing, lack, found.group()) from error


def why_no_import(error: ImportError) -> EdgeBackbonesError:
    """The error for a library that is installed and cannot be imported: for lack of resources, or because it does not fit."""
    try:
        refuse_lack("importing a library", error)
    except ResourceError as lack:
        return lack
    return BrokenLibraryError(error)


@contextlib.contextmanager
def lack_told(doing: str) -> Iterator[None]:
    """Turn what a lack of memory, threads or file descriptors raises in the block into ResourceError."""
    try:
        yield
    except EdgeBackbonesError:
        raise
    except (MemoryError, OSError, RuntimeError, ImportError) as error:
        refuse_lack(doing, error)
        raise


def root_cause(error: BaseException) -> BaseException:
    """The first exception of a chain of ``raise ... from``: exporters wrap it in headings and advice, twice over."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
