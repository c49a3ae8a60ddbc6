"""The report of a bundle: one HTML file without links to others, which shows what is inside and whether it is right.

Its content comes from the bundle, from comparisons that ``edge-backbones bench`` measured, and from one engine that runs here
on the golden samples. Its looks are in report.html.jinja. Names in a bundle are a stranger's text: the template escapes them.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edge_backbones.bench.results import Comparison
from edge_backbones.bundle import trust
from edge_backbones.bundle.manifest import EngineRecord, GraphRecord, Manifest
from edge_backbones.bundle.reader import Bundle, load_golden
from edge_backbones.bundle.storage import MANIFEST, write_beside_and_rename
from edge_backbones.engines import promises, registry
from edge_backbones.engines import select as session
from edge_backbones.engines.base import LayerTime, LoadOptions
from edge_backbones.errors import (
    EngineMismatchError,
    InferenceError,
    InputError,
    MissingDependencyError,
    first_line,
    needing,
    visible,
)
from edge_backbones.machine import child, hosts
from edge_backbones.machine.devices import Place
from edge_backbones.progress import Progress, no_progress
from edge_backbones.reading import why_not
from edge_backbones.report import charts, figures, layers, summary, usage
from edge_backbones.report.words import computed, fixed, megabytes, signs, times, yes_or_no
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.spec import Precision

_LAYERS_TIMED = 10


def write_report(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    comparisons: Sequence[Comparison] = (),
    engine: str | None = None,
    time_layers: bool = False,
) -> Path:
    """Write the report of a bundle as one HTML file and return its path.

    ``out`` is the file, by default ``<bundle>.report.html`` beside the folder. ``comparisons``: results of ``edge-backbones
    bench`` for this bundle. ``engine``: the engine whose feature maps are drawn, as in EdgeBackbone.from_pretrained; by
    default the best that runs here. If it cannot run, the page says why and has everything else. ``time_layers``: run that
    engine some more, and show the time of each of its layers. Without that, the same input gives the same bytes. An existing
    file stays until the new one is complete.

    Raises BundleError for a damaged bundle, EngineMismatchError for an engine that it does not hold, InputError for a place
    that cannot be written, MissingDependencyError without the report extra.
    """
    opened, _ = trust.admit(Bundle.open(bundle))
    folder = Path(os.path.abspath(bundle))
    target = folder.with_name(f"{folder.name}.report.html") if out is None else Path(out)
    if target.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"{target} is inside {folder}, which holds what its manifest names: write the report beside it"
        )
    page = _render(opened, folder.name, comparisons, engine, time_layers=time_layers)
    try:
        write_beside_and_rename(target, page.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise InputError(f"{target} cannot be written ({why_not(error)}): choose another place with --out") from error
    return target


def _render(
    bundle: Bundle, name: str, comparisons: Sequence[Comparison], engine: str | None, *, time_layers: bool
) -> str:
    """Return the page of a bundle as HTML; ``name`` is that of its folder."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError("writing a report", "report") from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_visible
    )
    environment.filters.update(mb=megabytes, fixed=fixed, times=times, flavour=registry.title_of, signs=signs)
    source = resources.files("edge_backbones.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    manifest = bundle.manifest
    golden = load_golden(bundle)
    images, references = golden.inputs["opt"], golden.outputs["opt"]
    host = _this_host(bundle)
    reasons = _reasons(bundle, host)
    shown, outputs, why = _run_here(bundle, host, images[: figures.IMAGES_SHOWN], reasons, engine)
    in_process = shown is not None and promises.is_measured_here(manifest, shown, host)
    found_layers = layers.list_layers(bundle)
    manifest_bytes = (bundle.path / MANIFEST).stat().st_size
    screen = summary.summarise(manifest, name, shown=shown, comparisons=comparisons, manifest_bytes=manifest_bytes)
    return environment.from_string(source).render(
        name=name,
        quoted=shlex.quote(name),
        manifest=manifest,
        weights=_weights(manifest),
        screen=screen,
        headline="" if screen.engine is None else summary.label(screen.engine),
        extra=_extra(screen.engine),
        snippet=usage.snippet(manifest, name, screen.engine),
        sized=[*(e.file for e in manifest.engines), *(g.file for g in manifest.graphs)],
        stages=_stages(manifest, references),
        engines=[
            (e, summary.label(e), _sentence(e), reasons[e.name], charts.chart_parity(e.parity))
            for e in manifest.engines
        ],
        shown=shown,
        why=why,
        figures=figures.draw_figures(
            manifest, images, references, outputs, "fp32" if shown is None else shown.key.precision.value
        ),
        colours=figures.colour_bars(),
        image_count=len(images),
        calibration=charts.chart_calibration(bundle, {} if isinstance(found_layers, str) else found_layers.writers),
        layers=found_layers,
        noise=_noise_of_layers(bundle, found_layers, images[:1], in_process=in_process),
        times=_times_of_layers(bundle, shown, images, asked=time_layers, in_process=in_process),
        descriptions=[(e, described) for e in manifest.engines if (described := layers.describe_plan(bundle, e))],
        trade=charts.chart_trials(manifest.decision),
        comparisons=[charts.compare_peers(one) for one in comparisons],
        gpu_facts=[(e.name, _gpu_facts(e)) for e in manifest.engines if e.key.gpu is not None],
    )


def _extra(engine: EngineRecord | None) -> str:
    """Return the extra of this package that an engine needs; empty without an engine, or for an unknown library."""
    flavour = None if engine is None else registry.find(engine.key.flavour)
    return "" if flavour is None else flavour.extra


def _visible(value: Any) -> Any:
    """Escape control characters in a text of the bundle; leave the markup that the template's own macros return."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


# ---- what the bundle is ---------------------------------------------------------------------------------------------


class _Stage(NamedTuple):
    """A row of the table of stages; ``shape`` is without the batch."""

    number: int
    name: str
    shape: tuple[int, ...]
    channels: int
    stride: str
    layout: str


def _stages(manifest: Manifest, references: Mapping[str, np.ndarray]) -> list[_Stage]:
    """Return the rows of the table of stages."""
    spec = manifest.backbone
    return [
        _Stage(index, name, references[name].shape[1:], channels, times(dict.fromkeys(stride)), layout)
        for index, name, channels, stride, layout in zip(
            spec.out_indices, spec.out_features, spec.channels, spec.strides, spec.layouts, strict=True
        )
    ]


def _weights(manifest: Manifest) -> str:
    """Say where the weights come from."""
    source = manifest.source
    known = {"random": f"random weights (seed {source.seed})", "pretrained": "pretrained weights"}
    words = known.get(source.weights, f"weights of a {source.weights}")
    return words + (", batch norm warmed on images" if source.batch_norm_warmed else "")


def _sentence(engine: EngineRecord) -> str:
    """Say in one sentence what an engine is, where it runs, how large it is, and how accurate."""
    key = engine.key
    feature = f" with {key.cpu_features[-1]}" if key.cpu_features and key.gpu is None else ""
    place = f"{key.architecture}{feature}" if key.gpu is None else ", ".join(key.gpu.architectures)
    device = f" ({key.device_name})" if key.device_name else ""
    library = f"{registry.title_of(key.flavour)} {key.library_version.partition('-')[0]}"
    what = f"{key.precision}{computed(key.precision, key.computes_in)}"
    start = f"{what} for {library} on {place}{device}, {megabytes(engine.file.size)}"
    report = engine.parity
    if not report.measured:
        return f"{start}; compiled ahead of time and not measured yet: run edge-backbones verify on its device."
    worst = min(report.stages, key=lambda stage: (stage.finite, stage.sqnr_db))
    verdict = "within its gate" if report.passed else "OUTSIDE its gate"
    figure = f"{worst.sqnr_db:.1f} dB" if worst.finite else "values that are not finite"
    return f"{start}; {verdict} ({signs(report.gate)}): its worst output is {worst.stage} with {figure}."


def _gpu_facts(engine: EngineRecord) -> list[tuple[str, str]]:
    """Return what is known of an engine for a GPU, as pairs of a name and a value."""
    gpu = engine.key.gpu
    assert gpu is not None
    facts = {
        "TensorRT": engine.key.library_version,
        "compiled for": ", ".join(gpu.architectures),
        "kernels timed on": engine.key.device_name
        + (f" ({gpu.multiprocessors} multiprocessors)" if gpu.multiprocessors else ""),
        "driver's CUDA": gpu.driver or "no GPU took part",
        "runs on other GPUs": gpu.hardware_compatibility.replace("_", " "),
        "version compatible": yes_or_no(gpu.version_compatible) + (", carries host code" if gpu.host_code else ""),
        "weights": "stripped" if gpu.stripped else "refittable" if gpu.refittable else "inside",
        "DLA core": "none" if gpu.dla_core is None else str(gpu.dla_core),
        "optimisation profiles": "; ".join(" to ".join(times(shape) for shape in shapes) for shapes in gpu.profiles),
    }
    return [(fact, value) for fact, value in facts.items() if value]


# ---- feature maps ---------------------------------------------------------------------------------------------------


def _this_host(bundle: Bundle) -> hosts.Host:
    """Return this machine. Its GPU is looked for only if an engine needs one, since that takes a while."""
    on_gpu = any(engine.key.gpu is not None for engine in bundle.manifest.engines)
    return registry.this_machine(0 if on_gpu else None)


def _reasons(bundle: Bundle, host: hosts.Host) -> dict[str, list[str]]:
    """Return why each engine cannot run on this machine, by its name; an empty list for one that can."""
    return session.reasons_by_name(bundle, host)


def _run_here(
    bundle: Bundle, host: hosts.Host, images: np.ndarray, reasons: Mapping[str, Sequence[str]], engine: str | None
) -> tuple[EngineRecord | None, dict[str, np.ndarray], str]:
    """Run the best engine for this machine, or the one that is asked for, on images.

    Returns the engine and its outputs by name; if none can run, None, no outputs, and a sentence that says why. Raises
    EngineMismatchError for an ``engine`` that the bundle does not hold.
    """
    engine = session.full_name(bundle, engine)
    if engine is not None:
        session.fitting_engines(bundle, engine, lambda _: [])  # raises for a name that no engine has
    places: tuple[Place, ...] = ("cpu",) if host.gpu is None else ("cuda", "cpu")
    for device in places:
        try:
            record = session.choose_engine(bundle, host, engine, device=device)
        except EngineMismatchError:
            continue
        here = promises.is_measured_here(bundle.manifest, record, host)
        try:
            gpu = 0 if device == "cuda" else None
            return record, run_engine(bundle.path, record, gpu, images, in_process=here), ""
        except (EngineMismatchError, InferenceError, MissingDependencyError) as error:
            return None, {}, f"{record.name} failed here: {error}"
    asked = "No engine of this bundle runs" if engine is None else f"No engine that {engine!r} means runs"
    listed = "".join(f" {name}: {' and '.join(why)}." for name, why in reasons.items() if why)
    return None, {}, f"{asked} on the machine that wrote this page.{listed}"


@child.apart(InferenceError)
def run_engine(
    path: Path,
    record: EngineRecord,
    gpu: int | None,
    images: np.ndarray,
    *,
    in_process: bool = False,
    progress: Progress = no_progress,
) -> dict[str, np.ndarray]:
    """Run one engine and return its outputs by name.

    It runs in a process of its own, since this machine may never have run it; with ``in_process`` in this one. Raises
    InferenceError if it fails or ends its process.
    """
    del in_process, progress  # child.apart has read them
    child.doing(f"was running {record.name}", "the engine is hostile or damaged, or the library has a fault")
    bundle = Bundle.open(path)
    spec, input = bundle.manifest.backbone, bundle.manifest.input
    opened = session.open_session(bundle, record, LoadOptions(gpu=gpu))
    with EdgeBackbone(spec, input, opened, device="cpu" if gpu is None else "cuda") as backbone:
        return backbone.run(images)


# ---- layers ---------------------------------------------------------------------------------------------------------


def _noise_of_layers(
    bundle: Bundle, found: layers.Layers | str, image: np.ndarray, *, in_process: bool
) -> list[tuple[str, float]] | str:
    """Return the SQNR in dB at each layer that multiplies, on one golden image, or a sentence that says why not."""
    if isinstance(found, str):
        return found
    fp32 = bundle.manifest.onnx_graph(Precision.FP32)
    if found.graph.precision is Precision.FP32:
        return "The graph is the fp32 reference itself: it has no error to show."
    if not found.graph.precision.is_calibrated and fp32 is None:
        return (
            f"{found.precision} layers are compared with the fp32 graph, which needs a build with --precision fp32 too."
        )
    try:
        return measure_noise(bundle.path, found.graph, fp32, image, in_process=in_process)
    except (InferenceError, MissingDependencyError) as error:
        return f"Not measured: {error}."


@child.apart(InferenceError)
def measure_noise(
    path: Path,
    graph: GraphRecord,
    plain: GraphRecord | None,
    image: np.ndarray,
    *,
    in_process: bool = False,
    progress: Progress = no_progress,
) -> list[tuple[str, float]]:
    """Return the name of each layer of a graph that multiplies, and the SQNR in dB there.

    It runs in a process of its own, as `run_engine` does. Raises InferenceError if it fails, MissingDependencyError without
    the libraries of the workstation.
    """
    del in_process, progress  # child.apart has read them
    child.doing("was measuring the error of layers", "the graph is hostile or damaged, or the library has a fault")
    with needing("measuring the error of layers", "build"):
        from edge_backbones.toolchain.explain import layer_noise
    try:
        other = None if plain is None else path / plain.file.path
        return [(layer.name, layer.sqnr_db) for layer in layer_noise(path / graph.file.path, image, plain=other)]
    except (RuntimeError, ValueError, KeyError) as error:  # ONNX Runtime's own errors are RuntimeErrors
        raise InferenceError(f"ONNX Runtime cannot run {graph.file.path}: {first_line(error)}") from error


class _Times(NamedTuple):
    """How long the layers of an engine take: ``layers`` in the order in which they ran, and the ``slowest`` of them.

    ``why``: why there are none, a sentence. ``command``: what to type for them.
    """

    layers: list[LayerTime]
    slowest: list[LayerTime]
    total: float
    why: str = ""
    command: str = ""


def _times_of_layers(
    bundle: Bundle, shown: EngineRecord | None, images: np.ndarray, *, asked: bool, in_process: bool
) -> _Times | None:
    """Return the times of the layers of the engine that runs here, or how to get them; None if nothing can tell."""
    name = shlex.quote(Path(os.path.abspath(bundle.path)).name)
    nothing = _Times([], [], 0.0)
    if shown is None:
        return None
    flavour = registry.find(shown.key.flavour)
    if flavour is None or not flavour.times_layers:
        return None
    if not asked:
        return nothing._replace(
            why="Not timed. To time them on this machine:", command=f"edge-backbones report {name} --time-layers"
        )
    try:
        found = time_layers_of(bundle.path, shown, images[: bundle.manifest.input.batch.opt], in_process=in_process)
    except (InferenceError, MissingDependencyError) as error:
        return nothing._replace(why=f"Not timed: {error}.")
    slowest = sorted(found, key=lambda layer: -layer.milliseconds)[:_LAYERS_TIMED]
    return _Times(found, slowest, sum(layer.milliseconds for layer in found))


@child.apart(InferenceError)
def time_layers_of(
    path: Path,
    record: EngineRecord,
    images: np.ndarray,
    *,
    in_process: bool = False,
    progress: Progress = no_progress,
) -> list[LayerTime]:
    """Run an engine and return the time of each of its layers, in a process of its own as `run_engine` does."""
    del in_process, progress  # child.apart has read them
    child.doing(
        f"was timing the layers of {record.name}", "the engine is hostile or damaged, or the library has a fault"
    )
    bundle = Bundle.open(path)
    batch = bundle.manifest.input.batch.opt
    filled = images[np.arange(batch) % len(images)]
    return registry.get(record.key.flavour).time_layers(bundle.read(record.file), filled, record.key)
