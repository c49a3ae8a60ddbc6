"""Turn failures of TensorRT into errors of this package that say how to fix them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from edge_backbones.errors import CompileError

_IN_A_LAYER = re.compile(r"Error Code \d+: [\w ]+ \((.*?)\.? In \S+ at /", re.DOTALL)


_CONDITION = re.compile(r"^Assertion failed: .*?: (?=\S)|^.* && (?=\")", re.DOTALL)


_WAYS_OUT: tuple[tuple[str, str], ...] = (
    (r"HW-specific datatypes", "this architecture lacks a number format of the graph: leave the target out"),
    (r"libnvinfer_lean", "this installation has no lean runtime: leave version compatibility out"),
    (
        r"(?i)out ?of ?memory|OutOfMemory|memory allocation fail",
        "choose a smaller workspace, batch or size, or add swap",
    ),
    (r"(?i)no optimization profile", "the graph has sizes that no profile fixes"),
    (r"(?i)insufficient workspace|workspace.*(smaller|too small|exceeds)", "allow more workspace"),
    (
        r"(?i)cuda ?error|CUDA initialization|CUDA_SUCCESS",
        "the GPU or its driver did not answer: run edge-backbones doctor",
    ),
)


def made(thing: Any, what: str, log: Any) -> Any:
    """Return ``thing``; raise CompileError, with TensorRT's reason, if it is None.

    ``what``: its name, for the message.
    """
    if thing is None:
        raise CompileError(f"TensorRT did not make {what}: {log.last_error()}")
    return thing


@contextlib.contextmanager
def null_pointers_explained(log: Any) -> Iterator[None]:
    """Turn a TypeError of a constructor into a CompileError.

    If a constructor of TensorRT fails, pybind11 raises TypeError for the null pointer, and the log has the reason.
    """
    try:
        yield
    except TypeError as error:
        raise CompileError(f"TensorRT did not start: {log.last_error()} ({error})") from error


@contextlib.contextmanager
def refusals_explained(log: Any) -> Iterator[None]:
    """Turn the errors that the bindings raise for a setting into a CompileError."""
    try:
        yield
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        words = " ".join(str(error).split())
        raise CompileError(f"TensorRT does not take a setting of this plan ({words}): {log.last_error()}") from error


def cause(operation: str, text: str) -> str:
    """Return why the parser refused a node, in its own words, without C++ conditions and frames.

    For an unknown operation, the parser's text is ``false``, or that there is no plugin of that name.
    """
    if text.strip() in ("", "false") or "Plugin not found" in text:
        return f"no layer for {operation or 'a node'}"
    found = _IN_A_LAYER.search(text)  # the error of the layer says more than the error of the node
    said = found.group(1) if found else _CONDITION.sub("", text.strip().splitlines()[0]).strip('"')
    return f"{operation}: {said}".removeprefix(": ").rstrip(".")


def explained(message: str) -> str:
    """Return TensorRT's message, with a fix if one is known."""
    ways = [way for pattern, way in _WAYS_OUT if re.search(pattern, message)]
    return f"{message} ({ways[0]})" if ways else message
