"""The seam between this package and the engine libraries: what each of them gives, and what an engine is.

To add a library, write one object of `Flavour` in a room of its own and one row in registry.py.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np

from edge_backbones.bundle.manifest import EngineKey, GraphRecord
from edge_backbones.bundle.reader import Bundle
from edge_backbones.machine.hosts import Host
from edge_backbones.machine.profiles import DeviceProfile
from edge_backbones.progress import Progress
from edge_backbones.spec import BackboneSpec, InputSpec, Precision

if TYPE_CHECKING:
    from edge_backbones.engines.gpu.arrays import DeviceArray, ForeignArray
    from edge_backbones.engines.gpu.memory import MemoryBackend
    from edge_backbones.engines.tensorrt.options import PlanOptions

ALLOW = "allow_host_code=True (--allow-host-code)"
COMPILE = "run edge-backbones compile here"


class EngineSession(Protocol):
    """One loaded engine. Several threads may call ``run`` at once."""

    def run(self, array: np.ndarray) -> list[np.ndarray]:
        """Return every output of the engine, in graph order, as new float32 arrays that the caller owns.

        ``array`` is C-contiguous, of the input's dtype and of a shape that the engine takes as it is.
        """
        ...

    def close(self) -> None:
        """Release the engine. Do not call it while another thread is in ``run``; closing twice is fine."""
        ...


@runtime_checkable
class DeviceSession(EngineSession, Protocol):
    """A loaded engine that also takes arrays in GPU memory, and leaves its outputs there."""

    def run_on_device(self, array: ForeignArray, stream: int) -> Sequence[DeviceArray]:
        """Enqueue one call on ``stream`` (a CUDA stream handle) and return the outputs, in graph order, without waiting."""
        ...


class GraphedCall(Protocol):
    """One call of an engine that was recorded as a CUDA graph. ``outputs`` are overwritten by every call."""

    outputs: Sequence[DeviceArray]

    def __call__(self) -> Sequence[DeviceArray]:
        """Enqueue the recorded call on the stream that it was recorded for."""
        ...


@runtime_checkable
class GraphedSession(DeviceSession, Protocol):
    """A loaded engine whose calls can be recorded as CUDA graphs."""

    def graphed(self, array: ForeignArray, stream: int) -> GraphedCall:
        """Record a call that reads the memory of ``array``."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How an engine is loaded.

    ``gpu``: index of the GPU, None for the CPU. ``threads``: most CPU threads, None for the library's own choice.
    ``memory``: library that manages GPU memory. ``cuda_graphs``: replay each input shape as one CUDA graph.
    ``allow_host_code``: run engines that are programs, and runtimes inside plans. ``weights``: the ONNX graph that a plan
    without weights takes them from.
    """

    gpu: int | None = None
    threads: int | None = None
    memory: MemoryBackend | None = None
    cuda_graphs: bool = False
    allow_host_code: bool = False
    weights: bytes | bytearray | None = None


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """How an engine is compiled.

    ``gpu``: index of the GPU that it is compiled on. ``plan``: options of TensorRT, None for its defaults. ``cache``: folder
    of engines that were compiled before, None for none.
    """

    gpu: int = 0
    plan: PlanOptions | None = None
    cache: Path | None = None


@dataclass(frozen=True)
class CompiledEngine:
    """Raw engine bytes of one flavour, and the key that says where they may run.

    ``suffix``: of the file in the bundle. ``from_cache``: not compiled now. ``layers``: the library's description of its
    layers, as JSON. ``timing_cache``: what TensorRT measured. ``notes``: sentences for the user.
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


class Flavour(abc.ABC):
    """One engine library.

    ``name``: as in engine keys and ``--flavour``. ``title``: for people. ``extra``: of ``pip install 'edge-backbones[...]'``.
    ``devices``: where its engines run: ``"cpu"``, ``"cuda"`` or both. ``graph_format``: the graphs of a bundle that its
    engines
    are compiled from; None where the build compiles them from the network itself. ``graph_is_engine``: the library compiles
    a graph each time it loads it, so the graph's file is the engine. ``is_program``: its engines are code that may do
    whatever
    its author wrote; they run only for who asks for them by name and allows it. ``has_dla``: it compiles for DLA cores.
    """

    name: str
    title: str
    extra: str
    devices: ClassVar[tuple[Literal["cpu", "cuda"], ...]] = ("cpu",)
    graph_format: ClassVar[Literal["onnx", "torchscript"] | None] = "onnx"
    graph_is_engine: ClassVar[bool] = False
    is_program: ClassVar[bool] = False
    has_dla: bool = False

    @abc.abstractmethod
    def version(self) -> str | None:
        """Return the version of the library that is installed here, or None."""

    @abc.abstractmethod
    def reasons_against(self, key: EngineKey, host: Host) -> list[str]:
        """Return why an engine with this key cannot run on ``host``, one phrase each with the way out; empty if it can."""

    @abc.abstractmethod
    def load(
        self, key: EngineKey, data: bytearray, spec: BackboneSpec, input: InputSpec, options: LoadOptions
    ) -> EngineSession:
        """Load engine bytes.

        Raises EngineMismatchError for bytes that are no engine of this library, or whose inputs and outputs are not those of
        ``input`` and ``spec``; MissingDependencyError without the library.
        """

    @abc.abstractmethod
    def compile(
        self, bundle: Bundle, graph: GraphRecord, options: CompileOptions, progress: Progress
    ) -> CompiledEngine:
        """Compile one graph of a bundle for this machine. Raises CompileError and MissingDependencyError."""

    def check(self, graph: GraphRecord, input: InputSpec, options: CompileOptions) -> None:  # noqa: B027
        """Raise CompileError for what this library cannot compile, before any work is done. Most find out by compiling."""

    def source_graph(self, bundle: Bundle, graph: GraphRecord, options: CompileOptions) -> GraphRecord:
        """Return the graph that the engine of ``graph`` is compiled from: itself, unless the library needs another."""
        return graph

    def serves(self, host: Host) -> bool:
        """Return whether engines for ``host`` are compiled with this library when the user names none."""
        return False

    def against_profile(self, profile: DeviceProfile) -> str:
        """Return why this library does not serve a device, as a sentence with the way out; empty if it does."""
        if self.name in profile.flavours:
            return ""
        return f"{self.name} does not serve {profile.name}: use flavour {profile.compilers}"

    def against_targets(self, profile: DeviceProfile, precision: Precision, targets: Sequence[str]) -> list[str]:
        """Return why engines for these GPU architectures do not serve a device; ``targets``: as in PlanOptions."""
        if targets:
            return [f"targets are for tensorrt_rtx and {self.name} compiles for the GPU it finds: leave them out"]
        return []

    def install(self, host: Host) -> str:
        """Return the command that installs the library on ``host``."""
        return f"pip install 'edge-backbones[{self.extra}]'"

    def remedy(self) -> str:
        """Return what makes an engine that fits this machine, as the end of a sentence."""
        return COMPILE

    def way_to_compile(self, bundle: Path, options: str = "") -> str:
        """Return the command that makes an engine of this library; ``options``: more of its flags."""
        return f"edge-backbones compile {bundle} --flavour {self.name}{options}"

    def default_options(self, host: Host) -> CompileOptions:
        """Return the options that suit ``host`` when an engine is compiled on the spot, without a command."""
        return CompileOptions()
