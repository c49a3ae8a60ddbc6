"""The report of a bundle: one HTML page that needs nothing beside it, for who asks what is inside and whether it is right.

What the page says comes from the bundle, from comparisons that were measured, and from one engine that is run here on the
golden samples. How it looks is in report.html.jinja. Names in a bundle are a stranger's text: the template escapes all.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edge_backbones.bench.results import Comparison, Measurement, Ratio
from edge_backbones.bundle import trust
from edge_backbones.bundle.manifest import (
    CalibrationFile,
    Decision,
    EngineRecord,
    GraphRecord,
    Manifest,
    decode_calibration,
)
from edge_backbones.bundle.reader import Bundle, load_golden
from edge_backbones.bundle.storage import write_beside_and_rename
from edge_backbones.engines import promises, registry
from edge_backbones.engines import select as session
from edge_backbones.engines.base import LoadOptions
from edge_backbones.errors import (
    EngineMismatchError,
    InferenceError,
    InputError,
    IntegrityError,
    MissingDependencyError,
    visible,
)
from edge_backbones.machine import child, hosts
from edge_backbones.parity_report import ParityReport
from edge_backbones.pictures import as_map
from edge_backbones.progress import Progress, no_progress
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.spec import Precision

_IMAGES_SHOWN = 4
_MAP_SIDE = (
    112  # cells of a drawn map, and pixels of a drawn photograph: larger ones are averaged, to keep the page small
)
_PHOTOGRAPH_SIDE = 320
_TENSORS_SHOWN = 10
_COLUMNS_SHOWN = 12
_LAYERS_SHOWN = 12
_BEST_COSINE = 1 - 1e-9  # of a bar: 1 itself has no place on a scale of nines

# Nodes that move data or change its format, and compute nothing.
_MOVERS = frozenset({
    "Cast", "Concat", "Constant", "ConstantOfShape", "DepthToSpace", "DequantizeLinear", "Expand", "Flatten", "Gather",
    "Identity", "Pad", "QuantizeLinear", "Range", "Reshape", "Shape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile",
    "Transpose", "Unsqueeze",
})  # fmt: skip
_PRECISIONS_OF_LAYERS = (Precision.INT8, Precision.FP8, Precision.FP16, Precision.BF16, Precision.FP32)


def write_report(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    comparisons: Sequence[Comparison] = (),
    engine: str | None = None,
) -> Path:
    """Write the report of a bundle as one HTML file; returns its path, by default ``<bundle>.report.html`` beside the folder.

    ``comparisons``: what edge-backbones bench measured of this bundle. ``engine``: whose feature maps are drawn, in the words
    of EdgeBackbone (default: the best that runs here); where it cannot run, the page says why and has the rest. The same
    input gives the same bytes. A file that is there already stays until the new one is complete.

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
    page = _render(opened, folder.name, comparisons, engine)
    try:
        write_beside_and_rename(target, page.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror}): choose another place with --out") from error
    return target


def _render(bundle: Bundle, name: str, comparisons: Sequence[Comparison], engine: str | None) -> str:
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError("writing a report", "report") from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_visible
    )
    environment.filters.update(mb=_mb, fixed=_fixed, times=_times, flavour=_title, signs=_signs)
    source = resources.files("edge_backbones.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    manifest = bundle.manifest
    golden = load_golden(bundle)
    images, references = golden.inputs["opt"], golden.outputs["opt"]
    host = _this_host(bundle)
    reasons = _reasons(bundle, host)
    shown, outputs, why = _run_here(bundle, host, images[:_IMAGES_SHOWN], reasons, engine)
    return environment.from_string(source).render(
        name=name,
        manifest=manifest,
        weights=_weights(manifest),
        bytes=sum(file.size for file in manifest.files()),
        sized=[*(e.file for e in manifest.engines), *(g.file for g in manifest.graphs)],
        stages=_stages(manifest, references),
        engines=[(e, _sentence(e), reasons[e.name], _parity_bars(e.parity)) for e in manifest.engines],
        shown=shown,
        why=why,
        figures=_figures(manifest, images, references, outputs, "fp32" if shown is None else shown.key.precision.value),
        colours=_gradients(),
        image_count=len(images),
        calibration=_calibration(bundle),
        layers=_layers(bundle),
        trade=_trade(manifest.decision),
        comparisons=[_comparison(one) for one in comparisons],
        gpu_facts=[(e.name, _gpu_facts(e)) for e in manifest.engines if e.key.gpu is not None],
    )


def _visible(value: Any) -> Any:
    """What the template prints: names of a stranger, but for the markup that its own macros return."""
    return visible(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


# ---- what the bundle is ---------------------------------------------------------------------------------------------


class _Stage(NamedTuple):
    number: int
    name: str
    shape: tuple[int, ...]
    channels: int
    stride: str
    layout: str


def _stages(manifest: Manifest, references: Mapping[str, np.ndarray]) -> list[_Stage]:
    spec = manifest.backbone
    return [
        _Stage(index, name, references[name].shape[1:], channels, _times(dict.fromkeys(stride)), layout)
        for index, name, channels, stride, layout in zip(
            spec.out_indices, spec.out_features, spec.channels, spec.strides, spec.layouts, strict=True
        )
    ]


def _weights(manifest: Manifest) -> str:
    source = manifest.source
    known = {"random": f"random weights (seed {source.seed})", "pretrained": "pretrained weights"}
    words = known.get(source.weights, f"weights of a {source.weights}")
    return words + (", batch norm warmed on images" if source.batch_norm_warmed else "")


def _sentence(engine: EngineRecord) -> str:
    """One engine: what it is, where it runs, how large, and how right."""
    key = engine.key
    feature = f" with {key.cpu_features[-1]}" if key.cpu_features and key.gpu is None else ""
    place = f"{key.architecture}{feature}" if key.gpu is None else ", ".join(key.gpu.architectures)
    device = f" ({key.device_name})" if key.device_name else ""
    library = f"{_title(key.flavour)} {key.library_version.partition('-')[0]}"
    start = f"{key.precision} for {library} on {place}{device}, {_mb(engine.file.size)}"
    report = engine.parity
    if not report.measured:
        return f"{start}; compiled ahead of time and not measured yet: run edge-backbones verify on its device."
    worst = min(report.stages, key=lambda stage: (stage.finite, stage.sqnr_db))
    verdict = "within its gate" if report.passed else "OUTSIDE its gate"
    figure = f"{worst.sqnr_db:.1f} dB" if worst.finite else "values that are not finite"
    return f"{start}; {verdict} ({_signs(report.gate)}): its worst output is {worst.stage} with {figure}."


def _gpu_facts(engine: EngineRecord) -> list[tuple[str, str]]:
    gpu = engine.key.gpu
    assert gpu is not None
    facts = {
        "TensorRT": engine.key.library_version,
        "compiled for": ", ".join(gpu.architectures),
        "kernels timed on": engine.key.device_name
        + (f" ({gpu.multiprocessors} multiprocessors)" if gpu.multiprocessors else ""),
        "driver's CUDA": gpu.driver or "no GPU took part",
        "runs on other GPUs": gpu.hardware_compatibility.replace("_", " "),
        "version compatible": _yes(gpu.version_compatible) + (", carries host code" if gpu.host_code else ""),
        "weights": "stripped" if gpu.stripped else "refittable" if gpu.refittable else "inside",
        "DLA core": "none" if gpu.dla_core is None else str(gpu.dla_core),
        "optimisation profiles": "; ".join(" to ".join(_times(shape) for shape in shapes) for shapes in gpu.profiles),
    }
    return [(fact, value) for fact, value in facts.items() if value]


# ---- feature maps ---------------------------------------------------------------------------------------------------


def _this_host(bundle: Bundle) -> hosts.Host:
    """The GPU is looked for where an engine needs one: that takes a while."""
    on_gpu = any(engine.key.gpu is not None for engine in bundle.manifest.engines)
    return registry.this_machine(0 if on_gpu else None)


def _reasons(bundle: Bundle, host: hosts.Host) -> dict[str, list[str]]:
    """Why each engine cannot run on this machine; nothing for one that can."""
    return {
        e.name: session.reasons_against(bundle, e, host, e.name, device="cpu" if e.key.gpu is None else "cuda")
        for e in bundle.manifest.engines
    }


def _run_here(
    bundle: Bundle, host: hosts.Host, images: np.ndarray, reasons: Mapping[str, Sequence[str]], engine: str | None
) -> tuple[EngineRecord | None, dict[str, np.ndarray], str]:
    """The engine that was run, every output of it by name, and why there is none."""
    if engine is not None:
        session.fitting_engines(bundle, engine, lambda _: [])  # refuses a name that means none of them
    for device in ("cpu",) if host.gpu is None else ("cuda", "cpu"):
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
    """Every output of one engine by name. In a process of its own: this machine may never have run that engine."""
    del in_process, progress  # child.apart has read them
    child.doing(f"was running {record.name}", "the engine is hostile or damaged, or the library has a fault")
    bundle = Bundle.open(path)
    spec, input = bundle.manifest.backbone, bundle.manifest.input
    opened = session.open_session(bundle, record, LoadOptions(gpu=gpu))
    with EdgeBackbone(spec, input, opened, device="cpu" if gpu is None else "cuda") as backbone:
        return backbone.run(images)


def _title(flavour: str) -> str:
    """Return the name of an engine library for people; an unknown one keeps its name."""
    found = registry.find(flavour)
    return flavour if found is None else found.title


class _Picture(NamedTuple):
    """``uri``: the image itself. ``low`` to ``high``: what its colours span. ``relative``: of a difference, |x - r| / |r|."""

    uri: str
    alt: str
    low: float = 0.0
    high: float = 0.0


class _StagePictures(NamedTuple):
    stage: str
    shape: tuple[int, ...]
    cells: tuple[int, int]
    shrunk: bool
    reference: _Picture
    engine: _Picture | None
    difference: _Picture | None
    relative: float | None


class _Figure(NamedTuple):
    """One image with its maps, in stage order."""

    title: str
    photograph: _Picture
    stages: list[_StagePictures]
    without_map: list[str]


def _figures(
    manifest: Manifest,
    inputs: np.ndarray,
    references: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    precision: str,
) -> list[_Figure]:
    _, height, width = manifest.input.batch_height_width(inputs.shape)
    names = manifest.golden.images if len(manifest.golden.images) == len(inputs) else range(len(inputs))
    spec = manifest.backbone
    figures = []
    for i, (title, image) in enumerate(zip(names, inputs[:_IMAGES_SHOWN], strict=False)):
        drawn: list[_StagePictures] = []
        left_out: list[str] = []
        for stage, layout, stride in zip(spec.out_features, spec.layouts, spec.strides, strict=True):
            grid = height // stride[0], width // stride[1]
            reference = as_map(references[stage][i].astype(np.float64), layout, grid)
            if reference is None:
                left_out.append(stage)
                continue
            actual = as_map(outputs[stage][i].astype(np.float64), layout, grid) if outputs else None
            drawn.append(_draw(stage, f"{stage} on {title}", references[stage][i].shape, reference, actual, precision))
        alt = f"input image {title}, as the network sees it"
        figures.append(_Figure(str(title), _Picture(_photograph(manifest, image), alt), drawn, left_out))
    return figures


def _draw(
    stage: str, what: str, shape: tuple[int, ...], reference: np.ndarray, actual: np.ndarray | None, precision: str
) -> _StagePictures:
    energy = _energy(reference)
    low, high = float(energy.min()), float(energy.max())
    first = _Picture(_map_png(energy, low, high, "magma"), f"fp32 reference: energy of {what}", low, high)
    second = third = relative = None
    if actual is not None:
        error = actual - reference
        noise = _energy(error)
        most, length = float(noise.max()), float(np.linalg.norm(reference))
        relative = float(np.linalg.norm(error)) / length if length else None
        second = _Picture(
            _map_png(_energy(actual), low, high, "magma"), f"{precision} engine: energy of {what}", low, high
        )
        third = _Picture(_map_png(noise, 0, most, "viridis"), f"energy of the difference in {what}", 0, most)
    cells = energy.shape[0], energy.shape[1]
    return _StagePictures(stage, shape, cells, max(cells) > _MAP_SIDE, first, second, third, relative)


def _energy(values: np.ndarray) -> np.ndarray:
    """Root mean square over channels."""
    energy: np.ndarray = np.sqrt((values**2).mean(axis=0))
    return energy


def _map_png(values: np.ndarray, low: float, high: float, colours: str) -> str:
    """A map as a PNG with one pixel per cell; a value that is not finite has the lowest colour."""
    image = _pillow().fromarray(np.nan_to_num(values, nan=low, posinf=high, neginf=low).astype(np.float32))
    image = _shrink(image, _MAP_SIDE)
    span = high - low if high > low else 1.0
    levels = np.clip((np.asarray(image) - low) / span * 255, 0, 255).round().astype(np.uint8)
    indexed = _pillow().fromarray(levels).convert("P")
    indexed.putpalette(_palette(colours).tobytes())
    return _data_uri(indexed, "png", optimize=True)


def _photograph(manifest: Manifest, image: np.ndarray) -> str:
    """A golden input as a JPEG: normalisation undone, grey where it has not three channels."""
    if manifest.input.name == "pixel_values":
        mean, std = (np.array(values) for values in (manifest.image.mean, manifest.image.std))
        image = image.transpose(1, 2, 0)[..., :: -1 if manifest.image.channel_order == "bgr" else 1]
        image = np.clip((image * std + mean) * 255, 0, 255).round()
    if image.shape[2] != 3:
        image = image.mean(axis=2)
    picture = _pillow().fromarray(image.astype(np.uint8))
    return _data_uri(_shrink(picture, _PHOTOGRAPH_SIDE), "jpeg", quality=88)


def _shrink(image: Any, side: int) -> Any:
    factor = side / max(image.size)
    if factor >= 1:
        return image
    return image.resize([max(1, round(length * factor)) for length in image.size], _pillow().Resampling.BOX)


def _data_uri(image: Any, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError("drawing feature maps", "report") from error
    return Image


def _palette(colours: str) -> np.ndarray:
    """256 colours as uint8 (256, 3)."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError("drawing feature maps", "report") from error
    found: np.ndarray = matplotlib.colormaps[colours](np.arange(256), bytes=True)[:, :3]
    return found


def _gradients() -> dict[str, str]:
    """The stops of each scale's colour bar, as CSS."""
    return {
        use: ", ".join("#" + bytes(colour).hex() for colour in _palette(colours)[::17])
        for use, colours in (("energy", "magma"), ("difference", "viridis"))
    }


# ---- parity ---------------------------------------------------------------------------------------------------------


class _Bar(NamedTuple):
    """A bar and the line that it has to pass, as shares of the axis."""

    length: float
    line: float | None = None


class _StageBars(NamedTuple):
    sqnr: _Bar
    cosine: _Bar


def _parity_bars(report: ParityReport) -> list[_StageBars]:
    """Noise on a scale of dB, where a bound of the relative error has its place too; cosine on a scale of nines."""
    if not report.measured:
        return []
    gate = report.gate
    asked_db = [gate.min_sqnr_db] if gate.min_sqnr_db is not None else []
    asked_db += [-20 * math.log10(gate.max_relative)] if gate.max_relative else []
    asked_nines = [] if gate.min_cosine is None else [_nines(gate.min_cosine)]
    decibels = _bars([s.sqnr_db if s.finite else 0.0 for s in report.stages], max(asked_db, default=None))
    cosines = _bars([_nines(s.cosine) if s.finite else 0.0 for s in report.stages], max(asked_nines, default=None))
    return [_StageBars(sqnr, cosine) for sqnr, cosine in zip(decibels, cosines, strict=True)]


def _nines(cosine: float) -> float:
    """0.99 is 2, 0.999 is 3."""
    return -math.log10(1 - min(max(cosine, 0.0), _BEST_COSINE))


def _bars(values: Sequence[float], line: float | None = None) -> list[_Bar]:
    end = max([*values, line or 0.0]) * 1.04 or 1.0
    at = None if line is None else max(line, 0.0) / end
    return [_Bar(max(value, 0.0) / end, at) for value in values]


# ---- calibration ----------------------------------------------------------------------------------------------------


class _Calibration(NamedTuple):
    """``columns``: (low, high, how many ranges lie between). ``widest``: (tensor, range, largest value seen)."""

    file: CalibrationFile
    columns: list[tuple[float, float, int]]
    widest: list[tuple[str, float, float | None]]


class _Point(NamedTuple):
    number: int
    x: float
    y: float
    passed: bool


class _Trade(NamedTuple):
    """Trials as points between 0 and 1: right is slower, up is more accurate."""

    points: list[_Point]
    milliseconds: float
    least_db: float
    most_db: float


def _trade(decision: Decision | None) -> _Trade | None:
    """None where fewer than two engines were timed: that is no curve."""
    trials = enumerate(() if decision is None else decision.trials, start=1)
    timed = [(number, trial, trial.milliseconds) for number, trial in trials if trial.milliseconds is not None]
    if len(timed) < 2:
        return None
    slowest = max(milliseconds for *_, milliseconds in timed) or 1.0
    decibels = [trial.sqnr_db for _, trial, _ in timed]
    least, most = min(decibels), max(decibels)
    points = [
        _Point(number, milliseconds / slowest, (trial.sqnr_db - least) / ((most - least) or 1.0), trial.passed)
        for number, trial, milliseconds in timed
    ]
    return _Trade(points, slowest, least, most)


def _calibration(bundle: Bundle) -> _Calibration | None:
    record = bundle.manifest.calibration
    if record is None:
        return None
    file = decode_calibration(bundle.read(record.file), str(bundle.path / record.file.path))
    widest = sorted(file.ranges.items(), key=lambda item: (-item[1], item[0]))[:_TENSORS_SHOWN]
    columns = _columns([value for value in file.ranges.values() if 0 < value < math.inf])
    return _Calibration(file, columns, [(name, value, file.largest.get(name)) for name, value in widest])


def _columns(values: Sequence[float]) -> list[tuple[float, float, int]]:
    """A histogram in equal parts of octaves, as fine as _COLUMNS_SHOWN columns allow."""
    for parts in (8, 4, 2, 1):
        counts = Counter(math.floor(parts * math.log2(value)) for value in values)
        if counts and (parts == 1 or max(counts) - min(counts) < _COLUMNS_SHOWN):
            powers = range(min(counts), max(counts) + 1)
            return [(2 ** (i / parts), 2 ** ((i + 1) / parts), counts[i]) for i in powers]
    return []


# ---- layers ---------------------------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """``products``: multiply-adds of one image. ``format``: what it computes in."""

    name: str
    op: str
    format: str
    products: int


class _Layers(NamedTuple):
    """``formats``: (format, layers, share of the multiply-adds). ``outside``: the largest that are not in the few bits that
    the graph is named for."""

    precision: str
    layers: list[_Layer]
    formats: list[tuple[str, int, float]]
    products: int
    outside: list[_Layer]


def _layers(bundle: Bundle) -> _Layers | str:
    """The layers of the graph with the fewest bits, in order; or why there is nothing to tell."""
    found = (bundle.manifest.onnx_graph(precision) for precision in _PRECISIONS_OF_LAYERS)
    record = next((graph for graph in found if graph is not None), None)
    if record is None:
        return "This bundle holds no ONNX graph to look into."
    try:
        layers = _read_layers(bundle, record)
    except MissingDependencyError as error:
        return f"Not shown: {error}."
    products = sum(layer.products for layer in layers)
    formats = []
    for one in ("int8", "fp8", "fp16", "bf16", "fp32"):
        of_one = [layer for layer in layers if layer.format == one]
        if of_one:
            formats.append((one, len(of_one), sum(layer.products for layer in of_one) / max(products, 1)))
    few = record.precision.value
    outside = [layer for layer in layers if layer.products and few in ("int8", "fp8") and layer.format != few]
    outside.sort(key=lambda layer: -layer.products)
    return _Layers(few, layers, formats, products, outside[:_LAYERS_SHOWN])


def _read_layers(bundle: Bundle, record: GraphRecord) -> list[_Layer]:
    try:
        import onnx
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingDependencyError("reading the layers of a graph", "build") from error
    input = bundle.manifest.input
    try:
        model = onnx.load_from_string(bytes(bundle.read(record.file)))
        for size, axis in zip(input.opt_shape, model.graph.input[0].type.tensor_type.shape.dim, strict=True):
            axis.dim_value = size
        for output in model.graph.output:  # sizes of a dynamic graph: they follow from those of the input
            output.type.tensor_type.ClearField("shape")
        del model.graph.value_info[:]
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except (DecodeError, ValueError, IndexError, onnx.shape_inference.InferenceError) as error:
        raise IntegrityError(
            f"{bundle.path / record.file.path} is not a graph of this bundle: {error}; build the bundle again"
        ) from error
    types = {weight.name: weight.data_type for weight in graph.initializer}
    shapes = {weight.name: tuple(weight.dims) for weight in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
        shapes[value.name] = tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim)
    halves = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}
    dequantized = {output for node in graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    layers = []
    for node in graph.node:
        operands = [name for name in node.input if name]
        if node.op_type in _MOVERS or not operands:
            continue
        product = node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        if product and all(name in dequantized for name in operands[:2]):
            number_format = record.precision.value
        else:
            number_format = halves.get(types.get(operands[0], 0), "fp32")
        count = 0
        if product:
            data, weight, result = (shapes.get(name, ()) for name in (*operands[:2], node.output[0]))
            count = _products(node.op_type, data, weight, result) // input.batch.opt
        layers.append(_Layer(node.name, node.op_type, number_format, count))
    return layers


def _products(op: str, data: tuple[int, ...], weight: tuple[int, ...], result: tuple[int, ...]) -> int:
    """Multiply-adds of a node, from the shapes of its two operands and of its result."""
    if op == "Conv":
        return math.prod(result) * math.prod(weight[1:])
    if op == "ConvTranspose":
        return math.prod(data) * math.prod(weight[1:])
    return math.prod(result) * data[-1] if data else 0


# ---- comparisons ----------------------------------------------------------------------------------------------------

# Head, field of a Measurement, digits, and whether it is drawn as a bar: of those less is better.
_COLUMNS = (
    ("median ms", "median_ms", 2, True),
    ("file MB", "file_mb", 1, True),
    ("fastest ms", "fastest_ms", 2, False),
    ("p90 ms", "p90_ms", 2, False),
    ("p99 ms", "p99_ms", 2, False),
    ("jitter", "jitter", 2, False),
    ("images / s", "images_per_second", 1, False),
    ("memory MB", "resident_mb", 0, False),
    ("device MB", "device_mb", 0, False),
    ("load s", "load_s", 2, False),
    ("first call ms", "first_call_ms", 1, False),
    ("J / image", "joules", 3, False),
    ("worst cosine", "worst_cosine", 4, False),
    ("worst SQNR dB", "worst_sqnr_db", 1, False),
)


class _Cell(NamedTuple):
    value: float | None
    text: str
    length: float | None


class _Peers(NamedTuple):
    """``rows``: measurement, how it compares, one cell per head."""

    source: Comparison
    heads: list[str]
    bars: list[bool]
    rows: list[tuple[Measurement, str, list[_Cell]]]
    missing: list[Measurement]


def _comparison(comparison: Comparison) -> _Peers:
    ran = [m for m in comparison.measurements if not m.missing]
    columns = [column for column in _COLUMNS if any(getattr(m, column[1]) is not None for m in ran)]
    most = {field: max((getattr(m, field) or 0 for m in ran), default=0) for _, field, _, _ in columns}
    ratios = {ratio.name: ratio for ratio in comparison.ratios}
    rows = []
    for measurement in ran:
        cells = []
        for _, field, digits, is_bar in columns:
            value = getattr(measurement, field)
            length = value / most[field] if is_bar and value is not None and most[field] > 0 else None
            cells.append(_Cell(value, "" if value is None else f"{value:.{digits}f}", length))
        words = "this engine" if measurement is comparison.measurements[0] else _in_words(ratios.get(measurement.name))
        rows.append((measurement, words, cells))
    missing = [m for m in comparison.measurements if m.missing]
    return _Peers(comparison, [head for head, _, _, _ in columns], [drawn for _, _, _, drawn in columns], rows, missing)


def _in_words(ratio: Ratio | None) -> str:
    if ratio is None:
        return "not compared"
    figures = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    if not ratio.is_ranked:
        return f"{figures}: the machine does not tell which is faster"
    return f"{figures}, {'slower' if ratio.median > 1 else 'faster'} than this engine"


# ---- words ----------------------------------------------------------------------------------------------------------


def _times(sizes: Any) -> str:
    return " \u00d7 ".join(str(size) for size in sizes)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _fixed(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}"


def _signs(text: object) -> str:
    return str(text).replace(">=", "\u2265").replace("<=", "\u2264")


def _yes(value: bool) -> str:
    return "yes" if value else "no"
