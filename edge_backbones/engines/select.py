"""Choose the engine of a bundle that runs on a machine, and load it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from edge_backbones.bundle.manifest import EngineKey, EngineRecord
from edge_backbones.bundle.reader import Bundle
from edge_backbones.engines import promises, registry
from edge_backbones.engines.base import ALLOW, EngineSession, LoadOptions
from edge_backbones.errors import CompileError, EngineMismatchError, InferenceError
from edge_backbones.machine import child
from edge_backbones.machine.devices import Place, parse_device
from edge_backbones.machine.hosts import Host
from edge_backbones.parity_report import ParityError
from edge_backbones.spec import BackboneSpec, InputSpec, Precision

# Order of engines that were not timed side by side: fewer bits first, because each of them passed its parity gate. No CPU
# computes in fp8: it computes fp32 and rounds in between.
_PREFERENCE = {
    "cpu": (Precision.INT8, Precision.FP16, Precision.BF16, Precision.FP32, Precision.FP8),
    "cuda": (Precision.INT8, Precision.FP8, Precision.FP16, Precision.BF16, Precision.FP32),
}
# Functions that run in a child process. They are named by text, because the runtime imports neither of their modules.
COMPILE, VERIFY = "edge_backbones.deploy.compile:compile_here", "edge_backbones.deploy.verify:verify_bundle"


def choose_engine(
    bundle: Bundle,
    host: Host,
    engine: str | None = None,
    *,
    device: Place = "cpu",
    allow_host_code: bool = False,
) -> EngineRecord:
    """Return the best engine of a bundle that can run on ``host``.

    If all of them were timed side by side, the fastest is the best; otherwise the one with the fewest bits. An engine
    for the GPU is better than one for the CPU.

    Args:
        bundle: The bundle.
        host: The machine.
        engine: Narrow the choice to a precision (``"int8"``), a flavour (``"openvino"``) or a name in the manifest.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"`` for both.
        allow_host_code: Allow engines that are programs, and runtimes inside plans.

    Raises:
        EngineMismatchError: No engine can run; the message has a reason for each.
    """
    fitting = fitting_engines(
        bundle,
        engine,
        lambda e: reasons_against(bundle, e, host, engine, device=device, code=allow_host_code),
        device=device,
    )
    if device == "auto":  # the CPU's engines and the GPU's were not timed against each other
        fitting = [found for found in fitting if found.key.gpu is not None] or fitting
        device = "cpu" if fitting[0].key.gpu is None else "cuda"
    order, flavours = _PREFERENCE[device], list(registry.ROWS)
    times = comparable_times(fitting)

    def rank(position_and_engine: tuple[int, EngineRecord]) -> tuple[Any, ...]:
        # Equally fast or not timed: fewer bits first. Within a precision: the engine that is most specific to this device,
        # then the newest.
        position, found = position_and_engine
        gpu = found.key.gpu
        general = (
            ()
            if gpu is None
            else (gpu.hardware_compatibility != "none", gpu.version_compatible, gpu.dla_core is not None)
        )
        precision = order.index(found.key.precision)
        flavour = flavours.index(found.key.flavour) if found.key.flavour in flavours else len(flavours)
        return times.get(found.name, 0.0), precision, flavour, *general, -len(found.key.cpu_features), -position

    return min(enumerate(fitting), key=rank)[1]


def comparable_times(engines: Sequence[EngineRecord]) -> dict[str, float]:
    """Return the milliseconds by which engines are compared, by name; empty if they were not all timed.

    On a GPU it is the time of pipelined calls there: copies to and from the host would hide what the engines differ by, and
    programs that care for speed leave arrays on the GPU.
    """
    for times in (
        {engine.name: engine.pipelined_milliseconds for engine in engines},
        {engine.name: engine.milliseconds for engine in engines},
    ):
        found = {name: time for name, time in times.items() if time is not None}
        if len(found) == len(times):
            return found
    return {}


def passed_over(
    bundle: Bundle,
    chosen: EngineRecord,
    host: Host,
    engine: str | None = None,
    *,
    device: Place = "cpu",
    allow_host_code: bool = False,
) -> dict[str, str]:
    """Return why `choose_engine` did not choose each of the other engines, as a phrase by name.

    Args:
        bundle: The bundle.
        chosen: What `choose_engine` returned.
        host: The machine.
        engine: As for `choose_engine`.
        device: As for `choose_engine`.
        allow_host_code: As for `choose_engine`.
    """
    found, runnable = {}, [chosen]
    for other in (e for e in bundle.manifest.engines if e.name != chosen.name):
        reasons = [] if _is_meant(other, engine) else [f"engine={engine!r} was asked for"]
        reasons = reasons or reasons_against(bundle, other, host, engine, device=device, code=allow_host_code)
        found[other.name] = "; ".join(reasons) or f"would run, and {chosen.name} is preferred"
        if not reasons and (other.key.gpu is None) == (chosen.key.gpu is None):
            runnable.append(other)
    times = comparable_times(runnable)  # of all at once, as choose_engine compares them
    slower = [other.name for other in runnable[1:] if times]
    return found | {
        name: f"takes {times[name]:.2f} ms, the one that runs {times[chosen.name]:.2f} ms" for name in slower
    }


def _is_meant(record: EngineRecord, engine: str | None) -> bool:
    return engine is None or engine in (record.key.precision.value, record.key.flavour, record.name)


def fitting_engines(
    bundle: Bundle, engine: str | None, reasons_against: Callable[[EngineRecord], list[str]], *, device: Place = "cpu"
) -> list[EngineRecord]:
    """Return the engines that ``engine`` asks for and that nothing speaks against.

    Raises EngineMismatchError if there is none.

    Args:
        bundle: The bundle.
        engine: As for `choose_engine`.
        reasons_against: Returns why an engine cannot run, as phrases.
        device: As for `choose_engine`, for the advice in the message.
    """
    engines = bundle.manifest.engines
    wanted = [e for e in engines if _is_meant(e, engine)]
    if not wanted:
        held = ", ".join(e.name for e in engines) or "none"
        asked = "engine" if engine is None else f"engine {engine!r}"
        raise EngineMismatchError(f"{bundle.path} has no {asked}; it holds: {held}. {_advice(bundle, engine, device)}")
    reasons = {e.name: reasons_against(e) for e in wanted}
    fitting = [e for e in wanted if not reasons[e.name]]
    if not fitting:
        listed = "; ".join(f"{name}: {' and '.join(why)}" for name, why in reasons.items())
        to_allow = any(len(why) == 1 and "allow_host_code=True" in why[0] for why in reasons.values())
        # If code is not allowed, a newly compiled engine would not be allowed either.
        advice = "" if to_allow else f" {_advice(bundle, engine, device)}"
        raise EngineMismatchError(f"no engine of {bundle.path} can run here. {listed}.{advice}")
    return fitting


def reasons_against(
    bundle: Bundle,
    engine: EngineRecord,
    host: Host,
    asked: str | None = None,
    *,
    device: Place = "cpu",
    code: bool = False,
) -> list[str]:
    """Return why an engine of a bundle cannot run on a device, one phrase each; empty if it can.

    Its parity must have been measured inside its gate: see promises.reasons_against.

    Args:
        bundle: The bundle.
        engine: The engine's record.
        host: The machine.
        asked: Name that the user asked for. Programs (TorchScript) run only if it names them.
        device: As for `choose_engine`.
        code: Allow engines that are programs, and runtimes inside plans.
    """
    reasons = [*against_place(engine, device), *code_reasons(engine, asked, code=code)]
    reasons += promises.reasons_against(bundle.manifest, engine)
    return reasons or registry.reasons_against(engine.key, host)


def against_place(engine: EngineRecord, device: Place) -> list[str]:
    """Return why an engine does not run on a kind of device, as one phrase; empty if it does."""
    flavour = registry.find(engine.key.flavour)
    if flavour is None or device == "auto" or device in flavour.devices:
        return []
    place = flavour.devices[0]
    return [f"runs on {place}, not on {device}: ask for it there (device={place!r}, --device {place})"]


def machine_for(bundle: Bundle, device: str) -> tuple[Host, Place, int]:
    """Return this machine as the engines of a bundle see it on a device, the kind of that device and the GPU's index.

    ``auto`` looks at GPU 0 if an engine of the bundle is for a GPU. Raises InputError for text that names no device.
    """
    place, gpu = parse_device(device)
    needs_gpu = place == "cuda" or (place == "auto" and any(e.key.gpu is not None for e in bundle.manifest.engines))
    return registry.this_machine(gpu if needs_gpu else None), place, gpu


def device_for(bundle: Bundle, device: str, engine: str | None = None, *, allow_host_code: bool = False) -> str:
    """Return the device that ``auto`` stands for, for a bundle on this machine; any other device as it is.

    Raises what `choose_engine` raises.
    """
    host, place, gpu = machine_for(bundle, device)
    if place != "auto":
        return device
    chosen = choose_engine(bundle, host, full_name(bundle, engine), device=place, allow_host_code=allow_host_code)
    return "cpu" if chosen.key.gpu is None else f"cuda:{gpu}"


def full_name(bundle: Bundle, engine: str | None) -> str | None:
    """Return what ``engine`` stands for: a precision, a flavour and a full name as they are, a prefix as the full name.

    Raises EngineMismatchError for a prefix of several names.
    """
    names = [record.name for record in bundle.manifest.engines]
    if engine is None or engine in set(Precision) or registry.find(engine) is not None or engine in names:
        return engine
    meant = [name for name in names if engine and name.startswith(engine)]
    if len(meant) > 1:
        raise EngineMismatchError(
            f"{engine!r} begins the names of {len(meant)} engines of {bundle.path}: {', '.join(meant)}. Type more of one"
        )
    return meant[0] if meant else engine


def named(bundle: Bundle, name: str) -> EngineRecord:
    """Return the engine whose name is or begins with ``name``. Raises EngineMismatchError if it is none, or several."""
    engines = bundle.manifest.engines
    meant = [e for e in engines if e.name == name] or [e for e in engines if name and e.name.startswith(name)]
    if len(meant) != 1:
        held = ", ".join(e.name for e in meant or engines) or "none"
        if meant:
            raise EngineMismatchError(f"{name!r} begins the names of {len(meant)} engines of {bundle.path}: {held}")
        raise EngineMismatchError(f"{bundle.path} has no engine {name!r}; its engines: {held}")
    return meant[0]


def reasons_by_name(bundle: Bundle, host: Host) -> dict[str, list[str]]:
    """Return why each engine of a bundle would not run on ``host``, by its name; an empty list for one that would.

    Each is judged as if it was asked for by name, without ``allow_host_code``.
    """
    found = {}
    for engine in bundle.manifest.engines:
        found[engine.name] = reasons_against(bundle, engine, host, engine.name, device="auto")
    return found


def code_reasons(engine: EngineRecord, asked: str | None, *, code: bool) -> list[str]:
    """Return why an engine that runs code on the CPU cannot run: it was not asked for by name, or code is not allowed."""
    key = engine.key
    flavour = registry.find(key.flavour)
    if flavour is not None and flavour.is_program and not (code and asked in (key.flavour, engine.name)):
        return [
            f"is a program, which may do whatever its author wrote: it is run only when asked for by name, and with "
            f"allow_host_code=True (engine={key.flavour!r}; --engine {key.flavour} --allow-host-code)"
        ]
    if key.gpu is not None and key.gpu.host_code and not code:
        return [f"carries a runtime, which is code: it is run only with {ALLOW}"]
    return []


def measure_here(
    bundle: Bundle, engine: EngineRecord, host: Host, *, gpu: int | None, allow_host_code: bool = False
) -> None:
    """Verify an engine in a child process, unless this machine has already verified or compiled it.

    Args:
        bundle: The bundle.
        engine: The engine's record.
        host: This machine.
        gpu: Index of the GPU, None for the CPU.
        allow_host_code: Allow engines that are programs, and runtimes inside plans.

    Raises:
        EngineMismatchError: The engine crashes that process, fails or is outside its gate.
    """
    if promises.is_measured_here(bundle.manifest, engine, host):
        return
    device = "cpu" if gpu is None else f"cuda:{gpu}"
    options = {"engine": engine.name, "device": device, "allow_host_code": allow_host_code}
    try:
        child.run_apart(VERIFY, (bundle.path,), options, refusal=InferenceError)
    except (InferenceError, ParityError) as error:
        raise EngineMismatchError(f"{engine.name} does not run here as its bundle says: {error}") from error


def compile_here(
    path: str | os.PathLike[str], engine: str | None, *, gpu: int | None, allow_host_code: bool = False
) -> None:
    """Compile the engines that ``engine`` asks for on this machine, and add them to a bundle.

    A child process does it. Raises what `edge_backbones.deploy.compile.compile_bundle` raises.

    Args:
        path: Folder of the bundle.
        engine: A precision, a flavour, or None for all precisions.
        gpu: Index of the GPU, None for the CPU.
        allow_host_code: Allow engines that are programs, and runtimes inside plans.

    Raises:
        EngineMismatchError: ``engine`` is an engine's full name, which belongs to one machine and one release.
    """
    if engine is not None and engine not in set(Precision) and registry.find(engine) is None:
        raise EngineMismatchError(
            f"engine {engine!r} cannot be made here: its name is of the machine and the library that it was compiled with. "
            "Ask for its precision or flavour instead, as engine='int8'"
        )
    child.run_apart(COMPILE, (path, engine), {"gpu": gpu, "allow_host_code": allow_host_code}, refusal=CompileError)


def open_session(bundle: Bundle, engine: EngineRecord, options: LoadOptions | None = None) -> EngineSession:
    """Read, check and load one engine of a bundle."""
    spec, input = bundle.manifest.backbone, bundle.manifest.input
    options = dataclasses.replace(options or LoadOptions(), weights=weights_of(bundle, engine.key))
    return load_engine(engine.key, bundle.read(engine.file), spec, input, options)


def weights_of(bundle: Bundle, key: EngineKey) -> bytearray | None:
    """Return the graph that holds the weights of a plan without weights; None for every other engine.

    Raises EngineMismatchError if the bundle lacks that graph.
    """
    if key.gpu is None or not key.gpu.stripped:
        return None
    graph = bundle.manifest.onnx_graph(key.precision)
    if graph is None or graph.file.sha256 != key.graph_sha256:
        raise EngineMismatchError(
            f"{key.name} has no weights, and {bundle.path} not the graph that they are in: compile it again"
        )
    return bundle.read(graph.file)


def load_engine(
    key: EngineKey, data: bytearray, spec: BackboneSpec, input: InputSpec, options: LoadOptions | None = None
) -> EngineSession:
    """Load engine bytes with the library that their key names.

    Args:
        key: What the engine was compiled for.
        data: The engine's bytes. The session may keep and use this memory.
        spec: Outputs that the engine has to have.
        input: Input that the engine has to take.
        options: How to load it.

    Raises:
        EngineMismatchError: The bytes are no engine of that library, its inputs and outputs are not those of ``input``
            and ``spec``, or it is a program and ``allow_host_code`` is False.
        InputError: The flavour is unknown.
    """
    return registry.get(key.flavour).load(key, data, spec, input, options or LoadOptions())


def _advice(bundle: Bundle, engine: str | None, device: Place) -> str:
    """Return the command that makes the engine that was asked for, if none fits."""
    graphs = [(graph.format, graph.precision.value) for graph in bundle.manifest.graphs]
    command = f"Run: edge-backbones compile {bundle.path}"
    where = " (on the machine with that GPU)" if device == "cuda" else ""
    if engine in set(Precision):
        if ("onnx", engine) not in graphs:
            return way_to_build(bundle, [Precision(engine)])
        command += f" --precision {engine}"
    elif engine is not None and (flavour := registry.find(engine)) is not None:
        if flavour.graph_format == "torchscript" and ("torchscript", "fp32") not in graphs:
            return way_to_build(bundle, ())
        on_gpu = "" if "cpu" in flavour.devices else " (on the machine with that GPU)"
        return f"Run: {flavour.way_to_compile(bundle.path)}{on_gpu}"
    elif engine is not None and bundle.manifest.engines:
        return f"Ask for one of these, or for a precision or a flavour: edge-backbones inspect {bundle.path}"
    # On a machine with a GPU, the command compiles for the GPU unless the CPU is named.
    return command + (" --device cpu" if device == "cpu" else where)


def way_to_build(bundle: Bundle, precisions: Sequence[Precision]) -> str:
    """Return the command that rebuilds a bundle with graphs of these precisions, beside those that it has."""
    held = [graph.precision for graph in bundle.manifest.graphs if graph.format == "onnx"]
    wanted = list(dict.fromkeys([*held, *precisions]))
    asked = " ".join(f"--precision {precision}" for precision in wanted)
    images = " --images FOLDER" if any(precision.is_calibrated for precision in wanted) else ""
    return (
        f"A graph is made where the network is: edge-backbones build MODEL {bundle.path} {asked}{images} --overwrite, on the "
        "workstation and with the options that it was built with"
    )
