"""Run engines with OpenVINO on the CPU. Of the runtime, only this module touches OpenVINO.

The engine's key says in which number format OpenVINO computes (``EngineKey.computes_in``). OpenVINO's own choice would be
bf16 for every graph, on CPUs that have it. It chooses kernels when it loads an engine, so the format is set there too. An
engine is exactly the bytes that ``CompiledModel.export_model`` wrote.
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

from edge_backbones import cpus
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
    """Return the openvino module. Raises MissingDependencyError, with the command that installs it, if it is missing."""
    try:
        with _without_telemetry():
            import openvino
            from openvino import Core  # noqa: F401  # a folder named openvino, on sys.path, can be imported too
    except (ImportError, OSError, MemoryError) as error:
        refuse_lack("loading OpenVINO", error)
        raise MissingDependencyError("the CPU engine (OpenVINO)", "cpu") from error
    return openvino


_TELEMETRY = "openvino_telemetry"
_turns = threading.RLock()


@contextlib.contextmanager
def _without_telemetry() -> Iterator[None]:
    """Import openvino inside the block without its telemetry package.

    OpenVINO falls back to a stub if ``openvino_telemetry`` is not installed, so that package is hidden inside the
    block. With it, the import contacts an analytics host, forks for that and writes to the home folder. After the
    block, a program can import the package as usual.
    """
    with _turns:  # otherwise a second thread would take the first one's None for the original module
        before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == _TELEMETRY}
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
        try:
            yield
        finally:
            del sys.modules[_TELEMETRY]
            sys.modules.update(before)


def library_version() -> str | None:
    """Return OpenVINO's full version; None if it is not installed."""
    try:
        return str(load_library().get_version())
    except MissingDependencyError:
        return None


def core() -> Any:
    """Return the one Core of this process, which is kept for good.

    Raises InferenceError in a forked child of the process that created it. Such a child cannot create a Core of its own
    either: all Cores of a process share the threads of closed engines, and a child that gets one of these threads waits
    for it forever.

    The Core is kept because its CPU plugin gives the thread that creates it a signal stack (sigaltstack, OpenVINO pull
    request 11894), and unmaps that stack when it is destroyed. If two plugins are destroyed in the order of their
    creation, the thread keeps a stack that no longer exists, and the next signal, even Ctrl-C, ends the process.
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


_HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}


def settings(threads: int | None, computes_in: str = "fp32") -> dict[str, Any]:
    """Return plugin settings for compiling and loading: one stream, low latency, and the format to compute in.

    ``threads``: Most CPU threads, None for OpenVINO's choice. ``computes_in``: ``fp32``, ``fp16`` or ``bf16``, for what the
    graph has in float32. Nodes of int8, and of a type that the graph gives explicitly and the CPU has, keep their format.

    Threads are not pinned to cores. OpenVINO would pin those of every engine to the same cores, from the first one on, and
    two engines that are called at the same time would share one core while others are idle.
    """
    chosen: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": _HINTS[computes_in],
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    return chosen if threads is None else {**chosen, "INFERENCE_NUM_THREADS": threads}


def most_threads(threads: int | None) -> int | None:
    """Return how many threads OpenVINO may use, None for its own choice. ``threads``: what the user asked for, if anything.

    OpenVINO chooses for a single stream: one thread per core, of one socket, and of the fast cores of a hybrid CPU. It keeps
    to the affinity mask but not to the quota of a cgroup, so under a limit the smaller number counts.
    """
    limit = cpus.limit() if threads is None else None
    return threads if limit is None else min(limit, _own_choice())


@functools.cache
def _own_choice() -> int:
    """Return the number of threads that OpenVINO chooses here, read from a model that does nothing."""
    openvino = load_library()
    pixels = openvino.opset13.parameter([1], np.float32)
    with exits.calls:
        model = openvino.Model([openvino.opset13.relu(pixels)], [pixels], "nothing")
        compiled = core().compile_model(model, "CPU", settings(None))
    return int(compiled.get_property("INFERENCE_NUM_THREADS"))


def read_model(graph: bytes) -> openvino.Model:
    """Read an ONNX file into an OpenVINO model.

    Raises CompileError, with OpenVINO's words, if OpenVINO refuses the graph or the graph is not safe to pass to it.
    """
    fault = graph_fault(graph)
    if fault is not None:
        raise CompileError(f"this graph is refused: {fault}")
    openvino = load_library()
    try:
        with exits.calls:
            return core().read_model(graph, b"")
    except RuntimeError as error:
        raise CompileError(f"OpenVINO {openvino.get_version()} cannot read this graph: {cause(error)}") from error


def computes_in_fp16() -> bool:
    """Return whether OpenVINO has kernels for fp16 on this CPU."""
    return "FP16" in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def compile_model(model: openvino.Model, computes_in: str = "fp32") -> bytes:
    """Compile a model for this CPU and return the blob. Raises CompileError with OpenVINO's words.

    ``computes_in``: as for `settings`.
    """
    openvino = load_library()
    try:
        with exits.calls:
            exported = core().compile_model(model, "CPU", settings(most_threads(None), computes_in)).export_model()
    except RuntimeError as error:
        raise CompileError(f"OpenVINO {openvino.get_version()} cannot compile this graph: {cause(error)}") from error
    return bytes(exported) if isinstance(exported, bytes) else bytes(exported.getvalue())


class OpenVinoSession:
    """Run a loaded CPU engine. Threads may share it: every call borrows an infer request of its own.

    Args:
        blob: The engine's bytes, kept in use as long as the session.
        outputs: Names of the outputs, in the order in which ``run`` returns them.
        threads: Most CPU threads, None for `most_threads`.
        input: Input in the manifest, to compare with the engine's.
        spec: Outputs in the manifest, to compare with the engine's.
        computes_in: Number format, as for `settings`. It has to be the one that the engine was compiled with.

    Raises:
        EngineMismatchError: OpenVINO does not load the engine, or its inputs and outputs are not those of the manifest.
        MissingDependencyError: OpenVINO is not installed.
    """

    def __init__(
        self,
        blob: bytearray,
        *,
        outputs: Sequence[str],
        threads: int | None = None,
        input: InputSpec | None = None,
        spec: BackboneSpec | None = None,
        computes_in: str = "fp32",
    ) -> None:
        openvino = load_library()
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1, got {threads}")
        try:
            tensor = openvino.Tensor(np.frombuffer(blob, np.uint8), shared_memory=True)
            with exits.calls:
                model = core().import_model(tensor, "CPU", settings(most_threads(threads), computes_in))
        except EdgeBackbonesError:
            raise
        except Exception as error:  # of many types; the text of some holds bytes of the damaged blob
            refuse_lack(f"loading an engine with OpenVINO {openvino.get_version()}", error)
            raise EngineMismatchError(
                f"OpenVINO {openvino.get_version()} does not load this engine ({cause(error)}): "
                "run edge-backbones compile on this machine"
            ) from error
        wanted = "" if input is None else input.name
        with refusing(
            lambda why: EngineMismatchError(f"the ports of this engine cannot be read ({why}): compile it again")
        ):
            # A port may have several names, because OpenVINO merges equal tensors.
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
        dtypes = [np.dtype(model.outputs[port].element_type.to_dtype()) for port in self._ports]
        self._forms = (
            None
            if any(shape.is_dynamic for shape in shapes)
            else [(tuple(shape.to_shape()), dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        )
        self._idle: deque[_Request] = deque()
        self._requests: weakref.WeakSet[_Request] = weakref.WeakSet()  # idle ones and those in calls
        self._refusal: EdgeBackbonesError | None = None
        self._ended: _Loaded | None = None
        forks.abandon_in_children(self)
        exits.end_with_process(self)

    def run(self, array: np.ndarray) -> list[np.ndarray]:
        """Return the outputs as described in `EngineSession`.

        Raises InputError after ``close``, and InferenceError if OpenVINO fails or this is a forked child.
        """
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
                self._requests.discard(request)  # although the traceback may keep it alive
                raise
        except (RuntimeError, MemoryError) as error:
            refuse_lack(f"running OpenVINO on {array.dtype} {array.shape}", error)
            raise InferenceError(f"OpenVINO failed on {array.dtype} {array.shape}: {cause(error)}") from error
        if self._keeps_requests:  # not reached after an error: a request that failed is never used again
            self._idle.append(request)
        return outputs

    def _new_request(self, loaded: _Loaded) -> _Request:
        with exits.calls:
            request = _Request(loaded.model.create_infer_request(), loaded)
            self._requests.add(request)
        return request

    def _run(self, request: _Request, array: np.ndarray) -> list[np.ndarray]:
        """Run one inference. The outputs are the request's arrays, or copies if their shapes vary."""
        # OpenVINO uses the arrays in place and keeps no reference to them, so they must outlive the inference.
        request.handle.set_input_tensor(self._tensor(array, shared_memory=True))
        if self._forms is not None and (not request.outputs or _references(request.outputs) != request.unshared):
            request.outputs = [np.empty(shape, dtype) for shape, dtype in self._forms]
            request.unshared = _references(request.outputs)
            for port, output in zip(self._ports, request.outputs, strict=True):
                request.handle.set_output_tensor(port, self._tensor(output, shared_memory=True))
        try:
            request.handle.start_async(share_inputs=True)  # infer() would also put every output into a dictionary
        finally:
            request.handle.wait()  # even if interrupted: OpenVINO writes to the arrays until it is done
        if self._forms is None:
            return [request.handle.get_output_tensor(port).data.copy() for port in self._ports]
        return list(request.outputs)

    def close(self) -> None:
        """Release the engine as described in `EngineSession`."""
        self._loaded, self._keeps_requests = None, False
        self._idle.clear()

    def abandon(self) -> None:
        """Keep the engine alive and refuse calls in a forked child, as described in `forks.Inherited`."""
        forks.keep_for_good([self._loaded, self._ended, *self._idle])
        if self._loaded is not None:
            self._refusal = forks.refusal("OpenVINO")
        self.close()

    def end(self) -> None:
        """Refuse calls because the process ends, as described in `exits.Called`."""
        if self._loaded is not None:  # release nothing, because destroying a request runs C++ too
            self._ended, self._loaded = self._loaded, None
            self._refusal = exits.refusal()

    def is_called(self) -> bool:
        """Return whether a thread is in a call, as described in `exits.Called`."""
        return len(self._idle) < len(self._requests)


class _Loaded(NamedTuple):
    """Hold a model and the bytes that its weights may point into. Python releases the last field of a tuple first."""

    blob: bytearray
    model: Any


def _name(port: Any, wanted: str) -> str:
    """Return the name of a port: ``wanted`` if that is one of its names."""
    names: set[str] = port.get_names()
    return wanted if wanted in names or not names else str(port.get_any_name())


def _form(port: Any) -> tuple[str, Shape | None]:
    """Return the dtype and shape of a port, as in `Tensor`."""
    dtype, shape = port.get_element_type().get_type_name(), port.get_partial_shape()
    sizes = None if shape.rank.is_dynamic else tuple(-1 if d.is_dynamic else d.get_length() for d in shape)
    return _DTYPES.get(dtype, dtype), sizes


_DTYPES = {"f32": "FLOAT", "f16": "HALF", "bf16": "BF16", "u8": "UINT8"}


@dataclass(eq=False)
class _Request:
    """Hold an infer request and the arrays that it writes to, which are replaced once a caller holds one of them.

    ``unshared``: the arrays' reference counts while no caller holds them. A view or a DLPack export counts as holding.
    ``loaded``: the model of the request, kept while the request runs even if the engine is closed meanwhile.
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
"""Text around the cause: places in OpenVINO's sources, and the C++ condition that was false."""
_FAILED = re.compile(r"^-- (\S+?)(?:-\d+)? with a message:\n(.*?)(?=^-- \S+ with a message:|^Summary:|\Z)", re.M | re.S)
_NODE = re.compile(r"While validating ONNX node '<Node\(\w+\): (.*?)>'")
_UNKNOWN = re.compile(r"^-- No conversion rule found for operations: (.*)$", re.M)


def cause(error: BaseException) -> str:
    """Return why OpenVINO refused, in its own words on one line, without C++ frames and links.

    Its ONNX reader reports every operation that it does not know and every node that it refused; all are named.
    """
    text = str(error)
    unknown = [re.sub(r"-\d+$", "", name) for found in _UNKNOWN.findall(text) for name in found.strip().split(", ")]
    reasons = [f"no conversion rule for {', '.join(unknown)}"] if unknown else []
    for operation, message in _FAILED.findall(text):
        node = _NODE.search(message)
        reasons.append(f"{operation}{f' {node.group(1)!r}' if node else ''}: {_without_frames(message)}")
    # Escape before shortening, because escapes are longer than the characters that they replace.
    return shortened(visible("; ".join(reasons) or _without_frames(text) or first_line(error)), 500)


def _without_frames(text: str) -> str:
    lines = [line for line in _FRAMES.sub(" ", text).splitlines() if "://" not in line]
    message = " ".join(" ".join(lines).split()).rstrip(".")
    return "out of memory (std::bad_alloc)" if message == "std::bad_alloc" else message
