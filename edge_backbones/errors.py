"""Every error that this package raises on purpose, as a tree.

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

from edge_backbones.installation import pip_install


class EdgeBackbonesError(Exception):
    """Base class of all errors of this package. It can be pickled, so it can leave a worker process.

    Messages are stored as `visible` shows them, because they quote names from bundles that strangers may have written.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(_visible_message(arg) if isinstance(arg, str) else arg for arg in args))

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[EdgeBackbonesError], args: tuple[Any, ...], attributes: dict[str, Any]) -> EdgeBackbonesError:
    """Make an error from its message without its constructor, which may take other arguments."""
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(attributes)
    return error


class MissingDependencyError(EdgeBackbonesError, ImportError):
    """A library of an optional extra is not installed. ``fix``: how to install it if pip cannot."""

    def __init__(self, what: str, extra: str, *, fix: str = "") -> None:
        super().__init__(f"{what}: {fix}" if fix else f"{what} needs the '{extra}' extra: {pip_install(extra)}")
        self.extra = extra


class BrokenLibraryError(EdgeBackbonesError, ImportError):
    """An installed library cannot be imported: it was built for another processor or another Python."""

    def __init__(self, cause: ImportError) -> None:
        super().__init__(
            f"an installed library is not for this machine ({platform.machine()}, Python {platform.python_version()}): "
            f"{' '.join(str(cause).split())[:200]}. An environment is made on the machine that runs it, not copied: python3 "
            f"-m venv ENV, and {pip_install('cli', 'ENV/bin/pip')}"
        )


class SourceError(EdgeBackbonesError):
    """The model, its stages or its weights cannot be loaded as asked."""


class HubUnreachableError(SourceError):
    """Pretrained weights were asked for and the model hub did not answer."""


class ExportError(EdgeBackbonesError):
    """The network cannot be exported in the asked form."""


class CalibrationError(EdgeBackbonesError):
    """Calibration data is missing, cannot be read, or would give a useless range."""


class QuantizationError(EdgeBackbonesError):
    """A typed graph cannot be made from this graph and these ranges."""


class CompileError(EdgeBackbonesError):
    """An engine library refused a graph."""


class BundleError(EdgeBackbonesError):
    """A bundle cannot be read or written."""


class ManifestError(BundleError):
    """manifest.json does not follow the bundle format."""


class IntegrityError(BundleError):
    """A file of a bundle is missing, truncated, changed or outside the folder."""


class TrustError(BundleError):
    """A bundle is not signed by a trusted key or was changed since, or a key cannot be used."""


class EngineMismatchError(EdgeBackbonesError):
    """No engine of a bundle can run on this machine."""


class ClientMismatchError(EdgeBackbonesError):
    """A bundle cannot replace a model's backbone. The model is unchanged."""


class InferenceError(EdgeBackbonesError):
    """A loaded engine failed while it ran."""


class ResourceError(InferenceError):
    """This process ran out of memory, threads or file descriptors. The bundle and its engine are intact.

    ``doing``: what failed. ``lack``: what ran out: "memory", "threads" or "file descriptors". ``said``: the message of the
    library or the system.
    """

    def __init__(self, doing: str, lack: str, said: str) -> None:
        super().__init__(f"{doing} failed because this process has no {lack} left ({said}): {_MORE[lack]}")
        self.lack = lack


class DeviceError(InferenceError):
    """A call of CUDA failed."""


class OutOfMemoryError(DeviceError):
    """Device memory ran out."""


class InputError(EdgeBackbonesError, ValueError):
    """An argument cannot be used: an input array, a stage selection, an option."""


def visible(text: str) -> str:
    r"""Return a text from an untrusted source as one line that is safe to print in a terminal.

    Control characters (``\x1b``, ``\n``), characters that change the writing direction (``\u202e``) and invisible ones become
    escapes. So do bytes of a file name that are not UTF-8 (``\udce9``). Letters of every language stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if _is_unseen(c) else c for c in text)


def _visible_message(text: str) -> str:
    # torch's DataLoader raises the error of a worker again, with the worker's traceback in its text. Its lines are kept.
    if text.startswith("Caught ") and "\nOriginal Traceback (most recent call last):\n" in text:
        return "\n".join(map(visible, text.split("\n")))
    return visible(text)


def _is_unseen(character: str) -> bool:
    # Zero-width joiners are part of words in Persian, Hindi and other languages.
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in "\u200c\u200d"


def first_line(error: BaseException, *, typed: bool = False) -> str:
    """Return the first informative line of an exception's text, to quote it in a message.

    Headings, which end with a colon, are skipped. With ``typed`` the name of the exception's type comes first. It always
    does for an exception without a text, and for a KeyError, whose text is only the key.
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
# Messages of C++, glibc, torch and Python. glibc's "cannot allocate memory in static TLS block" means something else.
_WORDS = {
    "memory": re.compile(
        r"std::bad_alloc|bad allocation|Cannot allocate memory|can't allocate memory|[Nn]ot enough memory"
        r"|failed to map segment from shared object(?!: Operation not permitted)"
    ),
    "threads": re.compile(r"Resource temporarily unavailable|can't start new thread"),
    "file descriptors": re.compile(r"Too many open files"),
}


def refuse_lack(doing: str, error: BaseException) -> None:
    """Raise ResourceError if the type, number or text of ``error`` shows that this process ran out of a resource."""
    if isinstance(error, MemoryError):
        raise ResourceError(doing, "memory", first_line(error)) from error
    if isinstance(error, OSError) and error.errno in _NUMBERS:
        raise ResourceError(doing, _NUMBERS[error.errno], error.strerror or str(error)) from error
    for lack, words in _WORDS.items():
        if found := words.search(str(error)):
            raise ResourceError(doing, lack, found.group()) from error


def why_no_import(error: ImportError) -> EdgeBackbonesError:
    """Return the error for a failed import of an installed library: ResourceError or BrokenLibraryError."""
    try:
        refuse_lack("importing a library", error)
    except ResourceError as lack:
        return lack
    return BrokenLibraryError(error)


@contextlib.contextmanager
def needing(what: str, extra: str) -> Iterator[None]:
    """Turn the failed import of a library that is not installed into MissingDependencyError, which names ``extra``.

    A folder of the library's name in the working directory, such as a clone of its sources, is not the library.
    """
    try:
        yield
    except ImportError as error:
        # Nothing can be imported from a mere folder, which Python takes for a package without a file.
        if isinstance(error, ModuleNotFoundError) or (error.name and error.path is None):
            raise MissingDependencyError(f"{what} ({error.name} is not installed)", extra) from error
        raise


@contextlib.contextmanager
def lack_told(doing: str) -> Iterator[None]:
    """Turn any error in the block that is caused by a lack of memory, threads or file descriptors into ResourceError."""
    try:
        yield
    except EdgeBackbonesError:
        raise
    except (MemoryError, OSError, RuntimeError, ImportError) as error:
        refuse_lack(doing, error)
        raise


def root_cause(error: BaseException) -> BaseException:
    """Return the first exception of a chain of ``raise ... from``; exporters wrap it several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
