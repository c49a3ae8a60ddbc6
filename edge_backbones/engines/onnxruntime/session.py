"""Run a typed graph with ONNX Runtime on the CPU."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import numpy as np

from edge_backbones.bundle.onnx_gate import graph_fault
from edge_backbones.engines import exits, forks
from edge_backbones.engines.onnxruntime.library import load_library
from edge_backbones.engines.onnxruntime.options import session_options
from edge_backbones.engines.ports import Tensor, mismatches
from edge_backbones.errors import (
    EdgeBackbonesError,
    EngineMismatchError,
    InferenceError,
    InputError,
    first_line,
    refuse_lack,
)
from edge_backbones.reading import refusing
from edge_backbones.spec import BackboneSpec, InputSpec

_DTYPES = {
    "tensor(float)": "FLOAT",
    "tensor(float16)": "HALF",
    "tensor(bfloat16)": "BF16",
    "tensor(uint8)": "UINT8",
}


def library_version() -> str | None:
    """Return the version of ONNX Runtime, without importing it; None if it is not installed."""
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


class OnnxRuntimeSession:
    """Run a typed ONNX graph that ONNX Runtime compiles for this CPU when it loads it. Threads may share it.

    Args:
        graph: ONNX bytes.
        input: Input in the manifest.
        spec: Outputs in the manifest.
        threads: Most threads of one call, None as for `session_options`.

    Raises:
        EngineMismatchError: ONNX Runtime does not load the graph, or its inputs and outputs are not those of the
            manifest.
        MissingDependencyError: The library is not installed.
        InferenceError: A call failed, or was made in a forked child.
    """

    def __init__(
        self, graph: bytes | bytearray, *, input: InputSpec, spec: BackboneSpec, threads: int | None = None
    ) -> None:
        library = load_library()
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1, got {threads}")
        if fault := graph_fault(graph):
            raise EngineMismatchError(f"this graph is refused: {fault}. Build the bundle again")
        what = f"ONNX Runtime {library.__version__}"
        try:
            with exits.calls:
                session = library.InferenceSession(
                    bytes(graph), session_options(threads), providers=["CPUExecutionProvider"]
                )
        except EdgeBackbonesError:
            raise
        except Exception as error:  # ONNX Runtime has an exception type for every status
            refuse_lack(f"loading a graph with {what}", error)
            raise EngineMismatchError(
                f"{what} does not load this graph ({cause(error)}): choose another flavour"
            ) from error
        with refusing(
            lambda why: EngineMismatchError(f"the ports of this graph cannot be read ({why}): build it again")
        ):
            found = [_port(port, "INPUT") for port in session.get_inputs()]
            found += [_port(port, "OUTPUT") for port in session.get_outputs()]
        if wrong := mismatches(found, input, spec.outputs, spec):
            raise EngineMismatchError(f"the graph is not the one of this manifest: {'; '.join(wrong)}. Build it again")
        self._session: Any = session
        self._input, self._outputs = input.name, list(spec.outputs)
        self._refusal: EdgeBackbonesError = InputError("this EdgeBackbone was closed: open the bundle again")
        forks.abandon_in_children(self)

    def run(self, array: np.ndarray) -> list[np.ndarray]:
        """Return the outputs as described in `EngineSession`."""
        session = self._session
        if session is None:
            raise self._refusal
        try:
            with exits.calls:
                outputs: list[np.ndarray] = session.run(self._outputs, {self._input: array})
        except EdgeBackbonesError:
            raise
        except Exception as error:  # ONNX Runtime has an exception type for every status
            refuse_lack(f"running ONNX Runtime on {array.dtype} {array.shape}", error)
            raise InferenceError(f"ONNX Runtime failed on {array.dtype} {array.shape}: {cause(error)}") from error
        return outputs

    def close(self) -> None:
        """Release the graph as described in `EngineSession`."""
        self._session = None

    def abandon(self) -> None:
        """Keep the graph alive and refuse calls in a forked child, as described in `forks.Inherited`."""
        forks.keep_for_good(self._session)
        if self._session is not None:
            self._refusal = forks.refusal("ONNX Runtime")
        self.close()


def _port(port: Any, mode: Any) -> Tensor:
    sizes = tuple(size if isinstance(size, int) else -1 for size in port.shape)
    return Tensor(port.name, mode, _DTYPES.get(port.type, port.type), sizes)


def cause(error: BaseException) -> str:
    """Return why ONNX Runtime failed, without its status code: ``[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : ...``."""
    said = first_line(error)
    return said.split(" : ", 3)[-1] if said.startswith("[ONNXRuntimeError]") else said
