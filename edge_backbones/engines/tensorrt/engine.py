"""Deserialise a plan with TensorRT, and check it against its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_backbones.bundle.onnx_gate import graph_fault
from edge_backbones.engines.base import ALLOW
from edge_backbones.engines.ports import Tensor, mismatches
from edge_backbones.engines.tensorrt import library as tensorrt_library
from edge_backbones.engines.tensorrt.kernels import Kernels
from edge_backbones.engines.tensorrt.library import TensorRtFlavour
from edge_backbones.engines.tensorrt.profiles import Profile, says_host_code, says_out_of_memory, uncovered
from edge_backbones.errors import EngineMismatchError, InferenceError, OutOfMemoryError
from edge_backbones.spec import BackboneSpec, InputSpec

DTYPES: dict[str, np.dtype] = {"FLOAT": np.dtype(np.float32), "HALF": np.dtype(np.float16)}
"""Dtypes of outputs, by TensorRT's names."""


@dataclass
class Engine:
    """Hold a deserialised plan. ``close`` drops ``handle`` and ``runtime``, and must come after every context is gone.

    Attributes:
        library: The TensorRT module.
        logger: Its logger.
        runtime: TensorRT's runtime, which must outlive ``handle``.
        handle: TensorRT's engine.
        input: Name of the input.
        outputs: Names of the outputs.
        output_dtypes: Their dtypes.
        profiles: Its optimisation profiles.
        kernels: Kernels that TensorRT-RTX compiled, kept for the next process; None for other libraries.
        reads_host_memory: Whether kernels may read page-locked host memory in place of a copy: the GPU is integrated.
    """

    library: Any
    logger: Any
    runtime: Any
    handle: Any
    input: str
    outputs: tuple[str, ...]
    output_dtypes: tuple[np.dtype, ...]
    profiles: tuple[Profile, ...]
    kernels: Kernels | None = None
    reads_host_memory: bool = False

    def new_context(self) -> Any:
        """Create an execution context, which takes its scratch memory from us, for the shape that it is set to.

        TensorRT-RTX compiles kernels for each shape at once: otherwise it would begin with fallback kernels, which nobody
        has measured, and replace them while it runs.
        """
        self.logger.clear()
        strategy = self.library.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(self.library, "DynamicShapesKernelSpecializationStrategy"):
            config = self.handle.create_runtime_config()
            config.dynamic_shapes_kernel_specialization_strategy = (
                self.library.DynamicShapesKernelSpecializationStrategy.EAGER
            )
            config.set_execution_context_allocation_strategy(strategy)
            if self.kernels is not None:
                self.kernels.use_in(config)
            context = self.handle.create_execution_context(config)
        else:
            context = self.handle.create_execution_context(strategy)
        if context is None:
            raise self.failure("TensorRT made no execution context")
        return context

    def check(self, done: Any, what: str, *values: object) -> None:
        """Raise InferenceError, with the reason in TensorRT's log, if a call returned False.

        ``what % values``: the request, for the message.
        """
        if not done:
            raise self.failure(f"TensorRT refused {what % values}")

    def failure(self, what: str) -> InferenceError:
        """Return an InferenceError with the reason in TensorRT's log, or an OutOfMemoryError if that is the reason."""
        log = self.logger.last_error()
        if says_out_of_memory(log):
            return OutOfMemoryError(
                f"{what}: {log}. Run smaller batches or fewer threads, or end what else uses this GPU"
            )
        return InferenceError(f"{what}: {log}")

    def close(self) -> None:
        """Release TensorRT's engine, then its runtime. Before that, keep the compiled kernels for the next process."""
        kernels, self.kernels = self.kernels, None  # two threads may close at once
        if kernels is not None:
            kernels.save()
        self.handle = None
        self.runtime = None


def load(
    library: Any,
    data: bytearray,
    flavour: TensorRtFlavour,
    input: InputSpec,
    outputs: Sequence[str],
    allow_host_code: bool,
    dla_core: int | None,
    weights: bytes | bytearray | None,
    spec: BackboneSpec | None,
) -> Engine:
    """Deserialise a plan and check its inputs, outputs and profiles against the manifest.

    Args:
        library: The TensorRT module.
        data: The plan's bytes.
        flavour: Name of the library.
        input: Input in the manifest.
        outputs: Names of the outputs in the manifest.
        allow_host_code: Allow the runtime that a plan may carry.
        dla_core: DLA core to run on.
        weights: ONNX graph with the weights of a plan without weights.
        spec: Outputs in the manifest, to compare their shapes too.

    Raises:
        EngineMismatchError: The plan does not load, or is not the one of the manifest.
        OutOfMemoryError: It does not fit into the GPU's memory.
    """
    logger = tensorrt_library.logger_of(library)
    logger.clear()
    try:
        runtime = library.Runtime(logger)
    except TypeError as error:  # pybind11 raises it for a null pointer
        raise EngineMismatchError(f"{flavour} cannot start: {logger.last_error()}") from error
    if allow_host_code:
        if not hasattr(runtime, "engine_host_code_allowed"):
            raise EngineMismatchError(f"allow_host_code: {flavour} {library.__version__} runs no plan with host code")
        runtime.engine_host_code_allowed = True
    if dla_core is not None:
        runtime.DLA_core = dla_core
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        log = logger.last_error()
        if says_out_of_memory(log):
            raise OutOfMemoryError(f"the plan does not fit into the memory of this GPU: {log}")
        hint = "run edge-backbones compile on this machine"
        if not allow_host_code and (flavour == "tensorrt_lean" or says_host_code(log)):
            hint = f"if the plan carries a lean runtime and you trust it, pass {ALLOW}; else {hint}"
        raise EngineMismatchError(f"{flavour} {library.__version__} does not load this plan ({log}): {hint}")
    try:
        if weights is not None:
            _refit(library, engine, weights, flavour)
        profiles = _agreed_profiles(engine, input, outputs, spec)
    except BaseException:
        engine = None  # must go before its runtime
        raise
    dtypes = tuple(DTYPES[engine.get_tensor_dtype(name).name] for name in outputs)
    return Engine(library, logger, runtime, engine, input.name, tuple(outputs), dtypes, profiles)


def _refit(library: Any, engine: Any, graph: bytes | bytearray, flavour: TensorRtFlavour) -> None:
    """Give a plan without weights the weights of its ONNX graph."""
    logger = tensorrt_library.logger_of(library)
    fault = graph_fault(graph)
    if fault is not None:
        raise EngineMismatchError(f"the graph with the weights is refused: {fault}")
    if not hasattr(library, "OnnxParserRefitter"):
        raise EngineMismatchError(f"{flavour} takes no weights from a graph: compile the plan without --strip")
    try:
        refitter = library.Refitter(engine, logger)
        parser = library.OnnxParserRefitter(refitter, logger)
    except TypeError as error:  # pybind11 raises it for a null pointer
        raise EngineMismatchError(f"{flavour} cannot refit this plan: {logger.last_error()}") from error
    if not parser.refit_from_bytes(bytes(graph)) or not refitter.refit_cuda_engine():
        raise EngineMismatchError(
            f"{flavour} does not take the weights of this graph ({logger.last_error()}): compile the plan again"
        )


def _agreed_profiles(
    engine: Any, input: InputSpec, outputs: Sequence[str], spec: BackboneSpec | None
) -> tuple[Profile, ...]:
    """Return the optimisation profiles of a plan. Raises EngineMismatchError if it is not the one of the manifest."""
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    tensors = [
        Tensor(
            name,
            engine.get_tensor_mode(name).name,
            engine.get_tensor_dtype(name).name,
            tuple(engine.get_tensor_shape(name)),
        )
        for name in names
    ]
    wrong = mismatches(tensors, input, outputs, spec)
    if wrong:
        raise EngineMismatchError(f"the plan is not the one of this manifest: {'; '.join(wrong)}. Build it again")
    profiles = _profiles(engine, input.name)
    missing = uncovered(profiles, input)
    if missing:
        raise EngineMismatchError(
            f"the plan has no optimisation profile for {missing}, which the manifest promises "
            f"({'; '.join(map(str, profiles))}): compile it again"
        )
    return profiles


def _profiles(engine: Any, input: str) -> tuple[Profile, ...]:
    """Return the optimisation profiles of a plan, one without bounds if its shape is fixed."""
    shape = tuple(engine.get_tensor_shape(input))
    if -1 not in shape:
        return (Profile(0, shape, shape, shape),)
    bounds = [engine.get_tensor_profile_shape(input, i) for i in range(engine.num_optimization_profiles)]
    return tuple(Profile(i, *(tuple(bound) for bound in bounds[i])) for i in range(len(bounds)))
