"""OpenVINO on the CPU: the only runtime module that touches it.

Precision is in the graph, so the library is told to compute in it (f32 where the graph has floats) instead of choosing
bf16 by itself on CPUs that have it. An engine is what ``CompiledModel.export_model`` wrote, byte for byte.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_backbones.errors import (
    CompileError,
    EngineMismatchError,
    InferenceError,
    InputError,
    MissingDependencyError,
    first_line,
)
from edge_backbones.onnx_gate import graph_fault
from edge_backbones.reading import refusing, shortened
from edge_backbones.runtime import forks

if TYPE_CHECKING:
    import openvino


def load_library() -> Any:
    """The openvino module; raises MissingDependencyError with the command that installs it."""
    try:
        import openvino
    except ImportError as error:
        raise MissingDependencyError("the CPU engine (OpenVINO)", "cpu") from error
    return openvino


def library_version() -> str | None:
    """OpenVINO's full version, or None where it is not installed."""
    try:
        return str(load_library().get_version())
    except MissingDependencyError:
        return None


def core() -> Any:
    """The one Core of this process, kept for good. Raises InferenceError in a forked child of the process that made it.

    A forked child cannot make a Core of its own either: all Cores of a process share the threads of engines that were
    closed, and a child that is handed one of these waits for it for ever.

    The Core is kept because its CPU plugin gives the thread that makes it a stack for signals (sigaltstack, openvino pull
    request 11894) and unmaps that stack when it goes. Of two plugins that go first come, first gone, the thread is left with
    a stack that is not there, and the next signal, Ctrl-C too, ends the process.
    """
    made, process = _core()
    if process != os.getpid():
        raise forks.refusal("OpenVINO")
    return made


@functools.cache
def _core() -> tuple[Any, int]:
    made = load_library().Core()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: forks.keep_for_good(made))
    return made, os.getpid()


def settings(threads: int | None) -> dict[str, Any]:
    """Plugin settings for compiling and for loading: one stream, low latency, no precision of the library's own."""
    chosen: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    return chosen if threads is None else {**chosen, "INFERENCE_NUM_THREADS": threads}


def read_model(graph: bytes) -> openvino.Model:
    """An ONNX file as OpenVINO has it; CompileError with OpenVINO's words, or for a graph that it is not given."""
    fault = graph_fault(graph)
    if fault is not None:
        raise CompileError(f"this graph is given to no library: {fault}")
    openvino = load_library()
    try:
        return core().read_model(graph, b"")
    except RuntimeError as error:
        raise CompileError(f"OpenVINO {openvino.get_version()} cannot read this graph: {cause(error)}") from error


def compile_model(model: openvino.Model) -> bytes:
    """Compile for this CPU and return the blob; CompileError with OpenVINO's words."""
    openvino = load_library()
    try:
        exported = core().compile_model(model, "CPU", settings(None)).export_model()
    except RuntimeError as error:
        raise CompileError(f"OpenVINO {openvino.get_version()} cannot compile this graph: {cause(error)}") from error
    return bytes(exported) if isinstance(exported, bytes) else bytes(exported.getvalue())


class OpenVinoSession:
    """A loaded CPU engine. Threads may share it: every call borrows an infer request of its own."""

    def __init__(self, blob: bytearray, *, outputs: Sequence[str], threads: int | None = None) -> None:
        openvino = load_library()
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1, got {threads}")
        try:
            tensor = openvino.Tensor(np.frombuffer(blob, np.uint8), shared_memory=True)
            model = core().import_model(tensor, "CPU", settings(threads))
        except (RuntimeError, UnicodeDecodeError) as error:  # bytes of a damaged blob are in the text of some errors
            raise EngineMismatchError(
                f"OpenVINO {openvino.get_version()} does not load this engine ({cause(error)}): "
                "run edge-backbones compile on this machine"
            ) from error
        # A port may have several names: an engine merges tensors that are the same.
        with refusing(
            lambda why: EngineMismatchError(f"the outputs of this engine have no names ({why}): compile it again")
        ):
            names = [next(iter(port.get_names() & set(outputs)), port.get_any_name()) for port in model.outputs]
        if sorted(names) != sorted(outputs):
            raise EngineMismatchError(
                f"the engine returns {names}, the manifest promises {list(outputs)}: build it again"
            )
        self._blob = blob  # weights in the model may point into it
        self._tensor = openvino.Tensor
        self._model: Any = model
        self._ports = [names.index(name) for name in outputs]
        shapes = [model.outputs[port].partial_shape for port in self._ports]
        self._shapes = None if any(s.is_dynamic for s in shapes) else [tuple(s.to_shape()) for s in shapes]
        self._idle: deque[_Request] = deque()
        self._is_abandoned = False
        forks.abandon_in_children(self)

    def run(self, array: np.ndarray) -> list[np.ndarray]:
        model = self._model
        if model is None and self._is_abandoned:
            raise forks.refusal("OpenVINO")
        if model is None:
            raise InputError("this EdgeBackbone was closed: open the bundle again")
        try:
            try:
                request = self._idle.pop()
            except IndexError:
                request = _Request(model.create_infer_request())
            outputs = self._run(request, array)
        except RuntimeError as error:
            raise InferenceError(f"OpenVINO failed on {array.dtype} {array.shape}: {cause(error)}") from error
        if self._model is not None:  # and not after an error: a request that failed is not trusted again
            self._idle.append(request)
        return outputs

    def _run(self, request: _Request, array: np.ndarray) -> list[np.ndarray]:
        # OpenVINO reads and writes the arrays in place and keeps no reference to them: they must outlive the inference.
        request.handle.set_input_tensor(self._tensor(array, shared_memory=True))
        if self._shapes is not None and (not request.outputs or _references(request.outputs) != request.unshared):
            request.outputs = [np.empty(shape, np.float32) for shape in self._shapes]
            request.unshared = _references(request.outputs)
            for port, output in zip(self._ports, request.outputs, strict=True):
                request.handle.set_output_tensor(port, self._tensor(output, shared_memory=True))
        try:
            request.handle.start_async(share_inputs=True)  # infer() would also wrap every output in a dictionary
        finally:
            request.handle.wait()  # interrupted or not: until it is done OpenVINO writes to the arrays
        if self._shapes is None:
            return [request.handle.get_output_tensor(port).data.copy() for port in self._ports]
        return list(request.outputs)

    def close(self) -> None:
        self._model = None
        self._idle.clear()
        self._blob = bytearray()

    def abandon(self) -> None:
        """See forks.Inherited."""
        forks.keep_for_good([self._model, self._blob, *self._idle])
        self._is_abandoned = self._is_abandoned or self._model is not None
        self.close()


@dataclass
class _Request:
    """An infer request and the arrays that it writes to, which are replaced once a caller holds one of them.

    ``unshared``: their reference counts while nobody else does. A view or a DLPack export counts as holding.
    """

    handle: Any
    outputs: list[np.ndarray] = field(default_factory=list)
    unshared: list[int] = field(default_factory=list)


def _references(arrays: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]


_FRAMES = re.compile(
    r"(?:Caught exception: )?Exception from \S+:\d+:"
    r"|Check '.*' failed at \S+:\d+:"
    r"|While validating (?:ONNX )?node '.*?'(?: with friendly_name '.*?')?:"
    r"|FrontEnd API failed with \w+:"
    r"|Shape inference input shapes \{.*\}"
    r"|\[CPU\] (?=Cannot|Could)"
)
"""What stands around the cause: where in OpenVINO's sources the error passed, and the condition in C++ that was false."""
_FAILED = re.compile(r"^-- (\S+?)(?:-\d+)? with a message:\n(.*?)(?=^-- \S+ with a message:|^Summary:|\Z)", re.M | re.S)
_NODE = re.compile(r"While validating ONNX node '<Node\(\w+\): (.*?)>'")
_UNKNOWN = re.compile(r"^-- No conversion rule found for operations: (.*)$", re.M)


def cause(error: BaseException) -> str:
    """Why OpenVINO refused, in its own words and on one line, without the frames of C++ and the links around them.

    Its ONNX reader reports every operation that it has no rule for, and every node that its rule refused: all are named.
    """
    text = str(error)
    unknown = [re.sub(r"-\d+$", "", name) for found in _UNKNOWN.findall(text) for name in found.strip().split(", ")]
    reasons = [f"no conversion rule for {', '.join(unknown)}"] if unknown else []
    for operation, message in _FAILED.findall(text):
        node = _NODE.search(message)
        reasons.append(f"{operation}{f' {node.group(1)!r}' if node else ''}: {_without_frames(message)}")
    return shortened("; ".join(reasons) or _without_frames(text) or first_line(error), 500)


def _without_frames(text: str) -> str:
    lines = [line for line in _FRAMES.sub(" ", text).splitlines() if "://" not in line]
    said = " ".join(" ".join(lines).split()).rstrip(".")
    return "out of memory (std::bad_alloc)" if said == "std::bad_alloc" else said
