"""What TensorRT says when it fails, made into errors of ours with the way out."""

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
    if thing is None:
        raise CompileError(f"TensorRT did not make {what}: {log.last_error()}")
    return thing


@contextlib.contextmanager
def null_pointers_explained(log: Any) -> Iterator[None]:
    """A constructor of TensorRT that fails is a TypeError of pybind, for the null pointer it got; the log has the reason."""
    try:
        yield
    except TypeError as error:
        raise CompileError(f"TensorRT did not start: {log.last_error()} ({error})") from error


@contextlib.contextmanager
def refusals_explained(log: Any) -> Iterator[None]:
    """What the bindings raise for a setting that they do not take."""
    try:
        yield
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        words = " ".join(str(error).split())
        raise CompileError(f"TensorRT does not take a setting of this plan ({words}): {log.last_error()}") from error


def cause(operation: str, text: str) -> str:
    """Why the parser refused a node, in its own words, without the conditions in C++ and the frames around them.

    Its text for an operation that it has no importer for is ``false``, or that there is no plugin of that name.
    """
    if text.strip() in ("", "false") or "Plugin not found" in text:
        return f"no layer for {operation or 'a node'}"
    found = _IN_A_LAYER.search(text)  # the layer that it made of the node says more than the node itself
    said = found.group(1) if found else _CONDITION.sub("", text.strip().splitlines()[0]).strip('"')
    return f"{operation}: {said}".removeprefix(": ").rstrip(".")


def explained(message: str) -> str:
    """TensorRT's words, with a way out where one is known."""
    ways = [way for pattern, way in _WAYS_OUT if re.search(pattern, message)]
    return f"{message} ({ways[0]})" if ways else message
