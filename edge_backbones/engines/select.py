"""An engine that has been loaded, and the choice of the engine to load."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from edge_backbones.bundle.manifest import EngineKey, EngineRecord, Flavour
from edge_backbones.bundle.reader import Bundle
from edge_backbones.engines import compat, promises
from edge_backbones.engines.base import EngineSession
from edge_backbones.engines.gpu.memory import MemoryBackend
from edge_backbones.engines.openvino import session as openvino
from edge_backbones.engines.tensorrt import library as tensorrt_library
from edge_backbones.errors import CompileError, EngineMismatchError, InferenceError
from edge_backbones.machine import child, hosts
from edge_backbones.parity_report import ParityError
from edge_backbones.spec import BackboneSpec, InputSpec, Precision

# The order of engines that were not timed side by side: fewer bits first, they were let in by parity. No CPU computes
# in fp8: there it is fp32 with rounding in between.
_PREFERENCE = {
    "cpu": (Precision.INT8, Precision.FP16, Precision.BF16, Precision.FP32, Precision.FP8),
    "cuda": (Precision.INT8, Precision.FP8, Precision.FP16, Precision.BF16, Precision.FP32),
}
_FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt_rtx", "openvino", "torch_tensorrt", "torchscript")
CODE = ("torchscript", "torch_tensorrt")  # programs, which are run only for who asks for them and allows it
_ALLOW = "allow_host_code=True"
# What another process is asked to do. Compiling and verifying are not the runtime's own work: it imports neither.
COMPILE, VERIFY = "edge_backbones.deploy.compile:compile_here", "edge_backbones.deploy.verify:verify_bundle"


def choose_engine(
    bundle: Bundle,
    host: hosts.Host,
    engine: str | None = None,
    *,
    device: str = "cpu",
    allow_host_code: bool = False,
) -> EngineRecord:
    """The best engine of a bundle that can run on ``host``, on its CPU or (``device="cuda"``) on its GPU.

    ``engine`` narrows the choice to a precision (``"int8"``), a flavour (``"openvino"``) or a name as the manifest has
    it. Of those that were timed side by side the fastest is the best; fewest bits, where they were not. Raises
    EngineMismatchError with one reason per engine that was passed over.
    """
    fitting = fitting_engines(
        bundle,
        engine,
        lambda e: reasons_against(bundle, e, host, engine, device=device, code=allow_host_code),
        device=device,
    )
    order = _PREFERENCE[device]
    are_timed = all(found.milliseconds is not None for found in fitting)

    def rank(position_and_engine: tuple[int, EngineRecord]) -> tuple[Any, ...]:
        # As fast, or not timed: fewer bits first. Of one precision: the one that was compiled most closely for this device,
        # and of those the newest.
        position, found = position_and_engine
        gpu = found.key.gpu
        general = (
            ()
            if gpu is None
            else (gpu.hardware_compatibility != "none", gpu.version_compatible, gpu.dla_core is not None)
        )
        precision, flavour = order.index(found.key.precision), _FLAVOURS.index(found.key.flavour)
        latency = found.milliseconds if are_timed else 0
        return latency, precision, flavour, *general, -len(found.key.cpu_features), -position

    return min(enumerate(fitting), key=rank)[1]


def passed_over(
    bundle: Bundle,
    chosen: EngineRecord,
    host: hosts.Host,
    engine: str | None = None,
    *,
    device: str = "cpu",
    allow_host_code: bool = False,
) -> dict[str, str]:
    """Why `choose_engine` did not take each of the other engines, a phrase by name."""
    found = {}
    for other in (e for e in bundle.manifest.engines if e.name != chosen.name):
        reasons = [] if _is_meant(other, engine) else [f"engine={engine!r} was asked for"]
        reasons = reasons or reasons_against(bundle, other, host, engine, device=device, code=allow_host_code)
        if not reasons and None not in (other.milliseconds, chosen.milliseconds):
            reasons = [f"takes {other.milliseconds:.2f} ms, the one that runs {chosen.milliseconds:.2f} ms"]
        found[other.name] = "; ".join(reasons) or f"would run, and {chosen.name} is preferred"
    return found


def _is_meant(record: EngineRecord, engine: str | None) -> bool:
    return engine is None or engine in (record.key.precision.value, record.key.flavour, record.name)


def fitting_engines(
    bundle: Bundle, engine: str | None, reasons_against: Callable[[EngineRecord], list[str]], *, device: str = "cpu"
) -> list[EngineRecord]:
    """The engines that ``engine`` means and that nothing speaks against; raises EngineMismatchError when there is none."""
    engines = bundle.manifest.engines
    wanted = [e for e in engines if _is_meant(e, engine)]
    if not wanted:
        held = ", ".join(e.name for e in engines) or "none"
        asked = "an engine" if engine is None else f"engine {engine!r}"
        raise EngineMismatchError(f"{bundle.path} has no {asked}; it holds: {held}. {_advice(bundle, engine, device)}")
    reasons = {e.name: reasons_against(e) for e in wanted}
    fitting = [e for e in wanted if not reasons[e.name]]
    if not fitting:
        listed = "; ".join(f"{name}: {' and '.join(why)}" for name, why in reasons.items())
        to_allow = any(len(why) == 1 and _ALLOW in why[0] for why in reasons.values())
        advice = "" if to_allow else f" {_advice(bundle, engine, device)}"  # another engine would not be allowed either
        raise EngineMismatchError(f"no engine of {bundle.path} can run here. {listed}.{advice}")
    return fitting


def reasons_against(
    bundle: Bundle,
    engine: EngineRecord,
    host: hosts.Host,
    asked: str | None = None,
    *,
    device: str = "cpu",
    code: bool = False,
) -> list[str]:
    """Why an engine of a bundle is passed over on a device, one phrase each; empty when it may run.

    ``asked``: what was asked for by name. Programs (TorchScript) run only then, and only with ``code``, as does the runtime
    that a plan may carry. Its parity has to have been measured and to be inside the gate: see promises.reasons_against.
    """
    key = engine.key
    reasons = []
    runs_on = ("cpu", "cuda") if key.flavour == "torchscript" else ("cpu",) if key.gpu is None else ("cuda",)
    if device not in runs_on:
        reasons.append(
            f"runs on {runs_on[0]}, not on {device}: ask for it there (device={runs_on[0]!r}, --device {runs_on[0]})"
        )
    reasons += code_reasons(engine, asked, code=code)
    reasons += promises.reasons_against(bundle.manifest, engine)
    return reasons or compat.reasons_against(key, host)


def code_reasons(engine: EngineRecord, asked: str | None, *, code: bool) -> list[str]:
    """Why an engine that runs code on the CPU is passed over."""
    key = engine.key
    if key.flavour in CODE and not (code and asked in (key.flavour, engine.name)):
        return [
            f"is a program, which may do whatever its author wrote: it is run only when asked for by name, and with "
            f"{_ALLOW} (engine={key.flavour!r}; --engine {key.flavour} --allow-host-code)"
        ]
    if key.gpu is not None and key.gpu.host_code and not code:
        return [f"carries a runtime, which is code: it is run only with {_ALLOW} (--allow-host-code)"]
    return []


def measure_here(
    bundle: Bundle, engine: EngineRecord, host: hosts.Host, *, device: int | None, allow_host_code: bool = False
) -> None:
    """Verify an engine in a process of its own, unless this machine has done that or has compiled it.

    Raises EngineMismatchError for one that ends that process, fails or is outside its gate.
    """
    if promises.is_measured_here(bundle.manifest, engine, host):
        return
    options = {"engine": engine.name, "device": device or 0, "allow_host_code": allow_host_code}
    try:
        child.run_apart(VERIFY, (bundle.path,), options, refusal=InferenceError)
    except (InferenceError, ParityError) as error:
        raise EngineMismatchError(f"{engine.name} does not run here as its bundle says: {error}") from error


def compile_here(
    path: str | os.PathLike[str], engine: str | None, *, device: int | None, allow_host_code: bool = False
) -> None:
    """Add the engine that ``engine`` means (all precisions by default) to a bundle, for this machine's CPU or GPU ``device``.

    Raises what `edge_backbones.deploy.compile.compile_bundle` raises, and EngineMismatchError for an engine by its whole
    name, which is of one machine and release.
    """
    if engine is not None and engine not in (*Precision, *_FLAVOURS):
        raise EngineMismatchError(
            f"engine {engine!r} cannot be made here: its name is of the machine and the library that it was compiled with. "
            "Ask for its precision or flavour instead, as engine='int8'"
        )
    child.run_apart(
        COMPILE, (path, engine), {"device": device, "allow_host_code": allow_host_code}, refusal=CompileError
    )


def open_session(
    bundle: Bundle,
    engine: EngineRecord,
    *,
    threads: int | None = None,
    device: int | None = None,
    memory: MemoryBackend | None = None,
    cuda_graphs: bool = False,
    allow_host_code: bool = False,
) -> EngineSession:
    """Read, check and load one engine. ``device``: the GPU's index, None for the CPU; the rest as in EdgeBackbone."""
    manifest = bundle.manifest
    return load_engine(
        engine.key,
        bundle.read(engine.file),
        manifest.backbone,
        manifest.input,
        threads=threads,
        device=device,
        memory=memory,
        cuda_graphs=cuda_graphs,
        allow_host_code=allow_host_code,
        weights=weights_of(bundle, engine.key),
    )


def weights_of(bundle: Bundle, key: EngineKey) -> bytearray | None:
    """The graph whose weights a plan lacks that was written without; None for every other engine."""
    if key.gpu is None or not key.gpu.stripped:
        return None
    graph = bundle.manifest.onnx_graph(key.precision)
    if graph is None or graph.file.sha256 != key.graph_sha256:
        raise EngineMismatchError(
            f"{key.name} has no weights, and {bundle.path} not the graph that they are in: compile it again"
        )
    return bundle.read(graph.file)


def load_engine(
    key: EngineKey,
    data: bytearray,
    spec: BackboneSpec,
    input: InputSpec,
    *,
    threads: int | None = None,
    device: int | None = None,
    memory: MemoryBackend | None = None,
    cuda_graphs: bool = False,
    allow_host_code: bool = False,
    weights: bytes | bytearray | None = None,
) -> EngineSession:
    """Load engine bytes by their key; ``weights`` as in TensorRtSession.

    Raises EngineMismatchError for bytes that are no engine of that kind or have other inputs and outputs than ``input`` and
    ``spec`` say, and for a program (TorchScript) without ``allow_host_code``.
    """
    if key.flavour == "openvino":
        return openvino.OpenVinoSession(data, outputs=spec.outputs, threads=threads, input=input, spec=spec)
    if key.flavour in CODE:
        if not allow_host_code:
            raise EngineMismatchError(f"{key.name} is a program, and it is run only with {_ALLOW} (--allow-host-code)")
        from edge_backbones.engines.torch import (
            session as torchscript,  # what a CPU engine does not need is not imported for it
        )

        place = "cpu" if device is None else f"cuda:{device}"
        return torchscript.TorchScriptSession(data, input=input, outputs=spec.outputs, device=place, threads=threads)
    wrong = compat.reasons_in_plan(key, data)
    if wrong:
        raise EngineMismatchError(f"{key.name}: {' and '.join(wrong)}")
    from edge_backbones.engines.tensorrt import session as tensorrt

    flavour = compat.flavour_to_load(key, this_machine(None))
    return tensorrt.TensorRtSession(
        data,
        flavour=cast(tensorrt_library.TensorRtFlavour, flavour),
        input=input,
        outputs=spec.outputs,
        device=device or 0,
        memory=memory,
        cuda_graphs=cuda_graphs,
        allow_host_code=allow_host_code,
        dla_core=None if key.gpu is None else key.gpu.dla_core,
        weights=weights,
        spec=spec,
    )


def this_machine(device: int | None) -> hosts.Host:
    """This machine with its engine libraries, and the GPU ``device`` where one is meant."""
    return hosts.this_host(installed_versions(), device=device)


class installed_versions(Mapping[str, str]):
    """Version of every engine library that can be imported here, by flavour. A library is looked at when it is asked for:
    TensorRT takes a second to import, and a bundle for the CPU does not need it."""

    def __init__(self) -> None:
        self._found: dict[str, str | None] = {}

    def __getitem__(self, flavour: str) -> str:
        if flavour not in self._found:
            self._found[flavour] = _library_version(flavour)
        version = self._found[flavour]
        if version is None:
            raise KeyError(flavour)
        return version

    def __iter__(self) -> Iterator[str]:
        flavours = ("openvino", *tensorrt_library.FLAVOURS, *CODE)
        return iter([flavour for flavour in flavours if self.get(flavour) is not None])

    def __len__(self) -> int:
        return len(list(iter(self)))


def _library_version(flavour: str) -> str | None:
    if flavour == "openvino":
        return openvino.library_version()
    if flavour in tensorrt_library.FLAVOURS:
        return tensorrt_library.library_version(flavour)
    if flavour in CODE:
        from edge_backbones.engines.torch import session as torchscript

        return torchscript.library_version() if flavour == "torchscript" else torchscript.torch_tensorrt_version()
    return None


def _advice(bundle: Bundle, engine: str | None, device: str) -> str:
    """The command that makes the engine that was asked for, or none fits."""
    graphs = [(graph.format, graph.precision.value) for graph in bundle.manifest.graphs]
    command = f"Run: edge-backbones compile {bundle.path}"
    where = "" if device == "cpu" else " (on the machine with that GPU)"
    if engine in set(Precision):
        if ("onnx", engine) not in graphs:
            return way_to_build(bundle, [Precision(engine)])
        command += f" --precision {engine}"
    elif engine in _FLAVOURS:
        if engine == "torch_tensorrt":
            return f"Run: edge-backbones build MODEL {bundle.path} --flavour torch_tensorrt --overwrite{where}"
        if engine == "torchscript" and (engine, "fp32") not in graphs:
            return way_to_build(bundle, ())
        where = "" if engine in ("openvino", "torchscript") else " (on the machine with that GPU)"
        return f"{command} --flavour {engine}{where}"
    elif engine is not None and bundle.manifest.engines:
        return f"Ask for one of these, or for a precision or a flavour: edge-backbones inspect {bundle.path}"
    # On a machine with a GPU the command serves that, unless it is told.
    return command + (" --flavour openvino" if device == "cpu" else where)


def way_to_build(bundle: Bundle, precisions: Sequence[Precision]) -> str:
    """The command that builds a bundle anew, with graphs of these precisions beside its own and its TorchScript module."""
    held = [graph.precision for graph in bundle.manifest.graphs if graph.format == "onnx"]
    wanted = list(dict.fromkeys([*held, *precisions]))
    asked = " ".join(f"--precision {precision}" for precision in wanted)
    images = " --images FOLDER" if any(precision.is_calibrated for precision in wanted) else ""
    return (
        f"A graph is made where the network is: edge-backbones build MODEL {bundle.path} {asked}{images} --overwrite, on the "
        "workstation and with the options that it was built with"
    )
