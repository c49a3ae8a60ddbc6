"""OpenVINO on the CPU: the only runtime module that touches it.

Precision is in the graph, so the library is told to compute in it (f32 where the graph has floats) instead of choosing
bf16 by itself on CPUs that have it. An engine is what ``CompiledModel.export_model`` wrote, byte for byte.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edge_backbones.bundle.onnx_gate import graph_fault
from edge_backbones.engines import exits, forks
from edge_backbones.engines.ports import Shape, Tensor, mismatches
from edge_backbones.errors import (
    CompileError,
    EdgeBackbonesError,
    EngineMismatchError,
    InferenceError,
    InputError,
    MissingDependencyError,
    first_line,
    refuse_lack,
    visible,
)
from edge_backbones.reading import refusing, shortened
from edge_backbones.spec import BackboneSpec, InputSpec

if TYPE_CHECKING:
    import openvino


def load_library() -> Any:
    """The openvino module; raises MissingDependencyError with the command that installs it."""
    try:
        with _without_telemetry():
            import openvino
    except (ImportError, OSError, MemoryError) as error:
        refuse_lack("loading OpenVINO", error)
        raise MissingDependencyError("the CPU engine (OpenVINO)", "cpu") from error
    return openvino


_TELEMETRY = "openvino_telemetry"
_turns = threading.RLock()


@contextlib.contextmanager
def _without_telemetry() -> Iterator[None]:
    """Import openvino in the block: it takes the stub that it carries for where ``openvino_telemetry`` is not installed.

    With that package the import looks up an analytics host, forks for it and writes to the home folder. Behind the block a
    program imports the package as if nothing had been.
    """
    with _turns:  # of two threads, the second would take the None of the first for what was there before
        before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == _TELEMETRY}
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
        try:
            yield
        finally:
            del sys.modules[_TELEMETRY]
            sys.modules.update(before)


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
        with exits.calls:
            return core().read_model(graph, b"")
    except RuntimeError as error:
        raise CompileError(f"OpenVINO {openvino.get_version()} cannot read this graph: {cause(error)}") from error


def compile_model(model: openvino.Model) -> bytes:
    """Compile for this CPU and return the blob; CompileError with OpenVINO's words."""
    openvino = load_library()
    try:
        with exits.calls:
            exported = core().compile_model(model, "CPU", settings(None)).export_model()
    except RuntimeError as error:
        raise CompileError(f"OpenVINO {openvino.get_version()} cannot compile this graph: {cause(error)}") from error
    return bytes(exported) if isinstance(exported, bytes) else bytes(exported.getvalue())


class OpenVinoSession:
    """A loaded CPU engine. Threads may share it: every call borrows an infer request of its own.

    ``input`` and ``spec``: what a manifest says of the engine. Raises EngineMismatchError for one whose ports are others.
    """

    def __init__(
        self,
        blob: bytearray,
        *,
        outputs: Sequence[str],
        threads: int | None = None,
        input: InputSpec | None = None,
        spec: BackboneSpec | None = None,
    ) -> None:
        openvino = load_library()
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1, got {threads}")
        try:
            tensor = openvino.Tensor(np.frombuffer(blob, np.uint8), shared_memory=True)
            with exits.calls:
                model = core().import_model(tensor, "CPU", settings(threads))
        except EdgeBackbonesError:
            raise
        except Exception as error:  # of many types: bytes of a damaged blob are in the text of some
            refuse_lack(f"loading an engine with OpenVINO {openvino.get_version()}", error)
            raise EngineMismatchError(
                f"OpenVINO {openvino.get_version()} does not load this engine ({cause(error)}): "
                "run edge-backbones compile on this machine"
            ) from error
        wanted = "" if input is None else input.name
        with refusing(
            lambda why: EngineMismatchError(f"the ports of this engine cannot be read ({why}): compile it again")
        ):
            # A port may have several names: an engine merges tensors that are the same.
            names = [next(iter(port.get_names() & set(outputs)), port.get_any_name()) for port in model.outputs]
            inputs = [Tensor(_name(port, wanted), "INPUT", *_form(port)) for port in model.inputs]
            made = [Tensor(name, "OUTPUT", *_form(port)) for name, port in zip(names, model.outputs, strict=True)]
        if sorted(names) != sorted(outputs):
            raise EngineMismatchError(
                f"the engine returns {names}, the manifest promises {list(outputs)}: build it again"
            )
        if input is not None and (wrong := mismatches([*inputs, *made], input, outputs, spec)):
            raise EngineMismatchError(f"the engine is not the one of this manifest: {'; '.join(wrong)}. Build it again")
        self._tensor = openvino.Tensor
        self._loaded: _Loaded | None = _Loaded(blob, model)
        self._keeps_requests = True
        self._ports = [names.index(name) for name in outputs]
        shapes = [model.outputs[port].partial_shape for port in self._ports]
        self._shapes = None if any(s.is_dynamic for s in shapes) else [tuple(s.to_shape()) for s in shapes]
        self._idle: deque[_Request] = deque()
        self._requests: weakref.WeakSet[_Request] = weakref.WeakSet()  # those in calls too: a call costs nothing more
        self._refusal: EdgeBackbonesError | None = None
        self._ended: _Loaded | None = None
        forks.abandon_in_children(self)
        exits.end_with_process(self)

    def run(self, array: np.ndarray) -> list[np.ndarray]:
        loaded = self._loaded
        if loaded is None:
            raise self._refusal or InputError("this EdgeBackbone was closed: open the bundle again")
        try:
            try:
                request = self._idle.pop()
            except IndexError:
                request = self._new_request(loaded)
            try:
                outputs = self._run(request, array)
            except BaseException:
                self._requests.discard(request)  # the traceback may keep it
                raise
        except (RuntimeError, MemoryError) as error:
            refuse_lack(f"running OpenVINO on {array.dtype} {array.shape}", error)
            raise InferenceError(f"OpenVINO failed on {array.dtype} {array.shape}: {cause(error)}") from error
        if self._keeps_requests:  # and not after an error: a request that failed is not trusted again
            self._idle.append(request)
        return outputs

    def _new_request(self, loaded: _Loaded) -> _Request:
        with exits.calls:
            request = _Request(loaded.model.create_infer_request(), loaded)
            self._requests.add(request)
        return request

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
        self._loaded, self._keeps_requests = None, False
        self._idle.clear()

    def abandon(self) -> None:
        """See forks.Inherited."""
        forks.keep_for_good([self._loaded, self._ended, *self._idle])
        if self._loaded is not None:
            self._refusal = forks.refusal("OpenVINO")
        self.close()

    def end(self) -> None:
        """See exits.Called."""
        if self._loaded is not None:  # nothing is released: a thread that destroys a request is in C++ too
            self._ended, self._loaded = self._loaded, None
            self._refusal = exits.refusal()

    def is_called(self) -> bool:
        """See exits.Called."""
        return len(self._idle) < len(self._requests)


class _Loaded(NamedTuple):
    """A model, and the bytes that weights in it may point into. The last field of a tuple goes first."""

    blob: bytearray
    model: Any


def _name(port: Any, wanted: str) -> str:
    """The name of a port; ``wanted`` where that is one of several."""
    names: set[str] = port.get_names()
    return wanted if wanted in names or not names else str(port.get_any_name())


def _form(port: Any) -> tuple[str, Shape | None]:
    """The dtype and the shape of a port, as Tensor has them."""
    dtype, shape = port.get_element_type().get_type_name(), port.get_partial_shape()
    sizes = None if shape.rank.is_dynamic else tuple(-1 if d.is_dynamic else d.get_length() for d in shape)
    return _DTYPES.get(dtype, dtype), sizes


_DTYPES = {"f32": "FLOAT", "f16": "HALF", "bf16": "BF16", "u8": "UINT8"}


@dataclass(eq=False)
class _Request:
    """An infer request and the arrays that it writes to, which are replaced once a caller holds one of them.

    ``unshared``: their reference counts while nobody else does. A view or a DLPack export counts as holding.
    ``loaded``: what the request computes with, kept while it runs, though the engine is closed meanwhile.
    """

    handle: Any
    loaded: _Loaded
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
    # Escapes are longer than what they stand for: they come first.
    return shortened(visible("; ".join(reasons) or _without_frames(text) or first_line(error)), 500)


def _without_frames(text: str) -> str:
    lines = [line for line in _FRAMES.sub(" ", text).splitlines() if "://" not in line]
    said = " ".join(" ".join(lines).split()).rstrip(".")
    return "out of memory (std::bad_alloc)" if said == "std::bad_alloc" else said
