"""Define what an engine library has to provide, and what an engine is.

To add a library, write a `Flavour` object in a folder of its own and add a row to registry.py.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from edge_backbones.bundle.manifest import EngineKey, GraphRecord
from edge_backbones.bundle.reader import Bundle
from edge_backbones.installation import pip_install
from edge_backbones.machine.hosts import Host
from edge_backbones.machine.profiles import DeviceProfile
from edge_backbones.progress import Progress
from edge_backbones.spec import BackboneSpec, InputSpec, Precision

if TYPE_CHECKING:
    from edge_backbones.engines.gpu.arrays import DeviceArray
    from edge_backbones.engines.gpu.dlpack import ForeignArray
    from edge_backbones.engines.gpu.memory import MemoryBackend
    from edge_backbones.engines.tensorrt.options import PlanOptions

ALLOW = "allow_host_code=True (--allow-host-code)"
COMPILE = "run edge-backbones compile here"


class EngineSession(Protocol):
    """Run one loaded engine. Several threads may call ``run`` at once."""

    def run(self, array: np.ndarray) -> list[np.ndarray]:
        """Return every output of the engine, in graph order, as new arrays that the caller owns.

        They are C-contiguous, in the layout and dtype that the engine has (`BackboneSpec.described_outputs`).

        ``array`` is C-contiguous and has the input's dtype. Its shape is one that the engine takes without splitting or
        filling.
        """
        ...

    def close(self) -> None:
        """Release the engine. Do not call it while another thread is in ``run``. Closing twice is fine."""
        ...


@runtime_checkable
class DeviceSession(EngineSession, Protocol):
    """Run a loaded engine that also takes arrays in GPU memory, and leaves its outputs there."""

    def run_on_device(self, array: ForeignArray, stream: int) -> Sequence[DeviceArray]:
        """Enqueue one call on ``stream`` (a CUDA stream handle), and return the outputs in graph order without waiting."""
        ...


class GraphedCall(Protocol):
    """Replay one call of an engine that was recorded as a CUDA graph. Every replay overwrites ``outputs``."""

    @property
    def outputs(self) -> Sequence[Any]:
        """Return the outputs, in graph order."""
        ...

    def __call__(self) -> Sequence[Any]:
        """Enqueue the recorded call, on the stream that it was recorded for; from and to the host, wait for it too."""
        ...


@runtime_checkable
class GraphedSession(DeviceSession, Protocol):
    """Run a loaded engine whose calls can be recorded as CUDA graphs."""

    def graphed(self, array: ForeignArray, stream: int) -> GraphedCall:
        """Record a call that reads the memory of ``array`` on ``stream`` (a CUDA stream handle)."""
        ...

    def graphed_on_host(self, array: np.ndarray) -> GraphedCall:
        """Record a call that reads an array of ``input_buffer``, with the copies to and from the GPU."""
        ...

    def input_buffer(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return an array of zeros for inputs of this shape, which ``run`` reads without a copy on the host."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Say how an engine is loaded.

    Attributes:
        gpu: Index of the GPU, None for the CPU.
        threads: Most CPU threads. None for the library's choice among the CPUs that this process may use.
        memory: Library that manages GPU memory, None for the first that is installed.
        allow_host_code: Run engines that are programs, and runtimes inside plans.
        weights: ONNX graph that holds the weights of a plan without weights.
    """

    gpu: int | None = None
    threads: int | None = None
    memory: MemoryBackend | None = None
    allow_host_code: bool = False
    weights: bytes | bytearray | None = None


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """Say how an engine is compiled.

    Attributes:
        gpu: Index of the GPU to compile on.
        plan: Options of TensorRT, None for its defaults.
        cache: Folder of engines that were compiled before, None for no cache.
        rest: Number format in which an int8 engine computes what is not int8, one of `Flavour.rests`; None for fp32.
    """

    gpu: int = 0
    plan: PlanOptions | None = None
    cache: Path | None = None
    rest: Precision | None = None


@dataclass(frozen=True)
class CompiledEngine:
    """Hold the bytes of an engine, and the key that says where they may run.

    Attributes:
        data: The engine's bytes, never empty.
        key: Library, machine, precision and graph that the engine is compiled for.
        suffix: Suffix of the engine's file in the bundle.
        from_cache: Whether an earlier compilation made it.
        layers: The library's description of the engine's layers, as JSON.
        timing_cache: Kernel times that TensorRT measured.
        notes: Sentences for the user.
    """

    data: bytes
    key: EngineKey
    suffix: str
    from_cache: bool
    layers: str | None = None
    timing_cache: bytes | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("an engine cannot be empty")


class LayerTime(NamedTuple):
    """Say how long one layer of an engine takes.

    Attributes:
        name: Name that the library gives it, which starts with the graph's own where it has kept that.
        kind: The library's word for what it does, ``Convolution``.
        kernel: The library's name of the code that ran, which often names the number format.
        milliseconds: Time in one call.
    """

    name: str
    kind: str
    kernel: str
    milliseconds: float


class Flavour(abc.ABC):
    """Describe one engine library: how it loads and compiles engines, and on which machines they run.

    Attributes:
        name: Name in engine keys and for ``--flavour``.
        title: Name for people.
        extra: Extra of ``pip install 'edge-backbones[...]'`` that installs the library.
        devices: Where its engines run: ``"cpu"``, ``"cuda"`` or both.
        graph_format: Format of the graphs that its engines are compiled from; None if only a build compiles them, from
            the network itself.
        graph_is_engine: Whether the library compiles a graph each time it loads it, so that the graph's file is the
            engine.
        is_program: Whether its engines are code that may do whatever its author wrote. Such an engine runs only for a
            user who asks for it by name and allows it.
        has_dla: Whether it compiles for DLA cores.
        needs_own_gpu: Whether it compiles on the GPU that will run the engine, and for no other.
        takes_targets: Whether it compiles for the GPU architectures in ``PlanOptions.targets``, without such a GPU.
        takes_plan_options: Whether it reads `PlanOptions`, which are refused for every other library.
        package: Name of the library for pip.
        refusal: Why no engine of it is compiled from a bundle's graphs; empty if engines are.
        only_runs: Whether it compiles nothing at all, in a build neither.
        times_layers: Whether ``time_layers`` works.
    """

    name: str
    title: str
    extra: str
    package: str
    devices: ClassVar[tuple[Literal["cpu", "cuda"], ...]] = ("cpu",)
    graph_format: ClassVar[Literal["onnx", "torchscript"] | None] = "onnx"
    graph_is_engine: ClassVar[bool] = False
    is_program: ClassVar[bool] = False
    has_dla: bool = False
    needs_own_gpu: bool = False
    takes_targets: bool = False
    takes_plan_options: ClassVar[bool] = False
    refusal: ClassVar[str] = ""
    only_runs: ClassVar[bool] = False
    times_layers: ClassVar[bool] = False

    @abc.abstractmethod
    def version(self) -> str | None:
        """Return the version of the library that is installed here; None if it is not."""

    @abc.abstractmethod
    def reasons_against(self, key: EngineKey, host: Host) -> list[str]:
        """Return why an engine with this key cannot run on ``host``, one phrase with a fix each; empty if it can."""

    @abc.abstractmethod
    def load(
        self, key: EngineKey, data: bytearray, spec: BackboneSpec, input: InputSpec, options: LoadOptions
    ) -> EngineSession:
        """Load an engine.

        Args:
            key: What the engine was compiled for.
            data: The engine's bytes. The session may keep and use this memory.
            spec: Outputs that the engine has to have.
            input: Input that the engine has to take.
            options: How to load it.

        Returns:
            The session that runs it.

        Raises:
            EngineMismatchError: The bytes are no engine of this library, or its inputs and outputs are not those of
                ``input`` and ``spec``.
            MissingDependencyError: The library is not installed.
        """

    @abc.abstractmethod
    def compile(
        self, bundle: Bundle, graph: GraphRecord, options: CompileOptions, progress: Progress
    ) -> CompiledEngine:
        """Compile one graph of a bundle for this machine.

        Args:
            bundle: The bundle that holds the graph.
            graph: The graph's record.
            options: How to compile it.
            progress: Gets every step.

        Returns:
            The compiled engine.

        Raises:
            CompileError: The library refuses the graph.
            MissingDependencyError: The library is not installed.
        """

    def time_layers(self, data: bytearray, images: np.ndarray, key: EngineKey | None = None) -> list[LayerTime]:
        """Run an engine and return the time of each of its layers, in the order in which they ran.

        Args:
            data: The engine's bytes.
            images: An input of a shape that the engine takes.
            key: What the engine was compiled for; None for an engine that computes in fp32.

        Raises:
            InferenceError: The engine fails.
            NotImplementedError: The library cannot tell: ``times_layers`` is false.
        """
        raise NotImplementedError(f"{self.title} does not tell the time of single layers")

    def profiler(self, file: str) -> str:
        """Return the library's own command that times the layers of an engine on its device; empty if there is none.

        ``file``: Path of the engine's file.
        """
        return ""

    def check(self, graph: GraphRecord, input: InputSpec, options: CompileOptions) -> None:  # noqa: B027
        """Raise CompileError for a graph that this library is known not to compile.

        By default there is nothing to check.
        """

    def source_graph(self, bundle: Bundle, graph: GraphRecord, options: CompileOptions) -> GraphRecord:
        """Return the graph that the engine of ``graph`` is compiled from.

        It is ``graph`` itself, unless the library needs another.
        """
        return graph

    def rests(self, precision: Precision, input: InputSpec) -> tuple[Precision, ...]:
        """Return number formats other than fp32 in which an engine could compute what is not int8 on this machine.

        An engine with each of them is compiled too, and the fastest that holds its gate is kept.
        """
        return ()

    def serves(self, host: Host) -> bool:
        """Return whether this library compiles for ``host`` if the user names no flavour."""
        return False

    def rivals(self, host: Host) -> tuple[str, ...]:
        """Return the names of libraries that may be faster than this one on ``host``.

        If the user names no flavour, their engines are compiled too, and timed beside those of this library.
        """
        return ()

    def against_profile(self, profile: DeviceProfile, instead: str) -> str:
        """Return why this library cannot compile for a device, as a sentence with a fix; empty if it can.

        ``instead``: The libraries that can, as in "tensorrt or torch_tensorrt".
        """
        return (
            f"{self.name} does not serve {profile.name}: use flavour {instead}"
            if self.name not in profile.flavours
            else ""
        )

    def against_targets(self, profile: DeviceProfile, precision: Precision, targets: Sequence[str]) -> list[str]:
        """Return why engines for these GPU architectures do not run on a device; ``targets`` as in PlanOptions."""
        if targets:
            return [f"targets are for tensorrt_rtx and {self.name} compiles for the GPU it finds: leave them out"]
        return []

    def install(self, host: Host) -> str:
        """Return the command that installs the library on ``host``."""
        return pip_install(self.extra)

    def remedy(self) -> str:
        """Return how to get an engine that fits this machine, as the end of a sentence."""
        return COMPILE

    def way_to_compile(self, bundle: Path, options: str = "") -> str:
        """Return the command that compiles an engine of this library; ``options`` are more flags for it."""
        return f"edge-backbones compile {bundle} --flavour {self.name}{options}"
