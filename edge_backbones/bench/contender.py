"""The process of one contender in a comparison: it loads a network, and then takes a turn whenever it is asked to.

``python -m edge_backbones.bench.contender`` reads and writes JSON lines. It reads a `Task` and answers with a `Start`; then
it reads `Turn` lines and answers each with its `Calls`. If anything fails, the answer is ``{"failed": message}``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np

from edge_backbones.bench import energy
from edge_backbones.bundle.golden import GoldenSamples, full_batches
from edge_backbones.bundle.reader import Bundle, load_golden
from edge_backbones.engines.openvino.compile import compile_graph
from edge_backbones.engines.openvino.session import OpenVinoSession, load_library
from edge_backbones.errors import EdgeBackbonesError, InputError, first_line
from edge_backbones.images.fit import network_input
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.runtime.views import as_callers_see, reordered_outputs
from edge_backbones.spec import Precision
from edge_backbones.toolchain.artifacts import LoadedBackbone

Call: TypeAlias = Callable[[np.ndarray], Sequence[Any]]

_WARM_UP = 3


class Task(msgspec.Struct, kw_only=True):
    """What a contender runs.

    ``peer``: a name from `MAKERS`. ``engine``: the name of the bundle's engine, for the peer ``edge``. ``file``: the graph,
    for peers that run one. ``exact``: whether that graph has the bundle's weights. ``allow_host_code``: as in
    `EdgeBackbone.from_pretrained`.
    """

    peer: str
    bundle: str
    engine: str | None = None
    threads: int = 1
    device: str = "cpu"
    file: str | None = None
    exact: bool = True
    allow_host_code: bool = False


class Start(msgspec.Struct, kw_only=True):
    """How loading went.

    ``batch``: images per call. ``resident_mb``, ``device_mb``: the memory that loading and the first call added, in MB.
    """

    batch: int
    load_s: float
    first_call_ms: float
    resident_mb: float
    device_mb: float | None
    file_mb: float | None
    versions: dict[str, str]
    worst_cosine: float | None
    worst_sqnr_db: float | None


class Turn(msgspec.Struct, kw_only=True):
    """Request for a turn: call for at least ``seconds`` and at least ``calls`` times."""

    seconds: float
    calls: int


class Calls(msgspec.Struct, kw_only=True):
    """What a turn took.

    ``milliseconds``: of each call. ``stolen_share``: the share of machine time that other guests of the host took.
    ``joules``: of all calls together; None without a meter.
    """

    milliseconds: list[float]
    stolen_share: float
    joules: float | None


class Failed(msgspec.Struct, kw_only=True):
    """Answer of a contender that failed: its message."""

    failed: str


class Loaded(msgspec.Struct, kw_only=True):
    """A contender that is ready to be called.

    ``call``: takes an array as the bundle's engine does, and returns the feature maps in the bundle's order. ``exact``:
    whether the weights are the bundle's, so that the maps can be compared with its golden samples. ``reordered``: for each
    output whether it is NHWC and the golden samples are NCHW.
    """

    call: Call
    versions: dict[str, str]
    file: Path | None = None
    exact: bool = True
    reordered: Sequence[bool] = ()


# ---- the contenders


def edge(bundle: Bundle, task: Task) -> Loaded:
    """Load the bundle's own engine."""
    backbone = EdgeBackbone.from_pretrained(
        bundle.path,
        engine=task.engine,
        threads=task.threads if task.device == "cpu" else None,
        device=task.device,
        allow_host_code=task.allow_host_code,
    )
    record = next(e for e in bundle.manifest.engines if e.name == task.engine)

    def call(images: np.ndarray) -> Sequence[Any]:
        return backbone(images).feature_maps

    versions: dict[str, str] = {record.key.flavour: record.key.library_version}
    return Loaded(call=call, versions=versions, file=bundle.path / record.file.path)


def torch(bundle: Bundle, task: Task) -> Loaded:
    """Load the network in torch, in eager mode."""
    library, net = _network(bundle, task)
    return Loaded(call=_torch_call(library, net, bundle, task.device), versions=_version("torch"), exact=False)


def torch_compile(bundle: Bundle, task: Task) -> Loaded:
    """Load the network in torch and compile it with torch.compile."""
    library, net = _network(bundle, task)
    compiled = library.compile(net)
    return Loaded(call=_torch_call(library, compiled, bundle, task.device), versions=_version("torch"), exact=False)


def torchscript(bundle: Bundle, task: Task) -> Loaded:
    """Load the bundle's TorchScript file. Raises InputError if it has none, or if programs are not allowed."""
    graph = next((g for g in bundle.manifest.graphs if g.format == "torchscript"), None)
    if graph is None:
        raise InputError(f"{bundle.path} has no TorchScript file: build it without --no-torchscript")
    if not task.allow_host_code:
        raise InputError("the bundle's TorchScript file is a program: allow_host_code=True (--allow-host-code) runs it")
    library = _torch(task.threads)
    module = library.jit.load(bundle.path / graph.file.path, map_location=_torch_device(task.device))

    def call(images: np.ndarray) -> Sequence[Any]:
        with library.inference_mode():
            maps = module(library.from_numpy(images).to(_torch_device(task.device)))
            return [one.cpu().numpy() for one in (maps if isinstance(maps, (tuple, list)) else (maps,))]

    file, reordered = bundle.path / graph.file.path, reordered_outputs(bundle.manifest.backbone)
    return Loaded(call=call, versions=_version("torch"), file=file, reordered=reordered)


def onnxruntime(bundle: Bundle, task: Task) -> Loaded:
    """Load a graph in ONNX Runtime, on the CPU or with its CUDA provider."""
    from edge_backbones.engines.onnxruntime.library import onnxruntime as library

    options = library.SessionOptions()
    options.intra_op_num_threads = task.threads
    provider = "CPUExecutionProvider" if task.device == "cpu" else "CUDAExecutionProvider"
    if provider not in library.get_available_providers():
        raise InputError(f"this onnxruntime has no {provider}: pip install onnxruntime-gpu")
    graph = _graph_of(task)
    session = library.InferenceSession(graph, options, providers=[provider])
    names, input = list(bundle.manifest.backbone.outputs), bundle.manifest.input.name
    call = lambda images: session.run(names, {input: images})  # noqa: E731
    reordered = reordered_outputs(bundle.manifest.backbone)
    return Loaded(call=call, versions=_version("onnxruntime"), file=graph, exact=task.exact, reordered=reordered)


def openvino(bundle: Bundle, task: Task, hint: str | None = None) -> Loaded:
    """Load a graph in OpenVINO, for the latency of one call at a time.

    ``hint``: the number format to compute floats in, as OpenVINO names it. By default OpenVINO chooses, which is bf16 on
    CPUs with instructions for it.
    """
    library = load_library()
    graph = _graph_of(task)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": task.threads, "NUM_STREAMS": 1}
    if hint is not None:
        settings["INFERENCE_PRECISION_HINT"] = hint
    core = library.Core()
    model = core.compile_model(graph, "CPU", settings)
    request = model.create_infer_request()
    names = bundle.manifest.backbone.outputs
    ports = [next(i for i, port in enumerate(model.outputs) if name in port.get_names()) for name in names]

    def call(images: np.ndarray) -> Sequence[Any]:
        request.infer([images], share_inputs=True, share_outputs=True)
        return [request.get_output_tensor(port).data for port in ports]

    reordered = reordered_outputs(bundle.manifest.backbone)
    return Loaded(call=call, versions=_version("openvino"), file=graph, exact=task.exact, reordered=reordered)


def graph(bundle: Bundle, task: Task) -> Loaded:
    """Compile an ONNX file as an int8 engine of a bundle is compiled, and load it."""
    file = _graph_of(task)
    blob = compile_graph(file.read_bytes(), Precision.INT8, cache=None).data
    runtime = OpenVinoSession(bytearray(blob), outputs=bundle.manifest.backbone.outputs, threads=task.threads)
    reordered = reordered_outputs(bundle.manifest.backbone)
    return Loaded(call=runtime.run, versions=_version("openvino"), file=file, exact=task.exact, reordered=reordered)


MAKERS: dict[str, Callable[[Bundle, Task], Loaded]] = {
    "edge": edge,
    "torch": torch,
    "torch-compile": torch_compile,
    "torchscript": torchscript,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "openvino-f32": functools.partial(openvino, hint="f32"),
    "nncf": openvino,  # OpenVINO runs the model that NNCF wrote
    "nncf-f32": functools.partial(openvino, hint="f32"),
    "graph": graph,
}


def _graph_of(task: Task) -> Path:
    assert task.file is not None  # compare.py names the file of every peer that runs a graph
    return Path(task.file)


def _version(distribution: str) -> dict[str, str]:
    return {distribution: importlib.metadata.version(distribution)}


def _torch(threads: int) -> Any:
    import torch as library

    library.set_num_threads(threads)
    return library


def _torch_device(device: str) -> str:
    return "cuda:0" if device == "cuda" else device


def _network(bundle: Bundle, task: Task) -> tuple[Any, Any]:
    library = _torch(task.threads)
    return library, load_network(bundle).module.eval().to(_torch_device(task.device))


def load_network(bundle: Bundle) -> LoadedBackbone:
    """Load a bundle's network from its library, with random weights: weights do not change the speed."""
    from edge_backbones.toolchain.sources.base import SourceOptions
    from edge_backbones.toolchain.sources.load import load_source

    source, spec, input = bundle.manifest.source, bundle.manifest.backbone, bundle.manifest.input
    if source.library == "torch":
        raise InputError(f"{source.name} is a module of somebody's own, which {bundle.path} does not hold")
    described: Any = source.name
    if source.library == "transformers":
        import transformers

        described = transformers.AutoConfig.for_model(**source.config)
    options = SourceOptions(
        weights="random:0",
        num_channels=input.channels,
        img_size=(input.height.opt, input.width.opt),
        out_indices=spec.out_indices,
        hidden_states=bool(spec.hidden_states),
        output_stride=source.options.get("output_stride"),
        dataset_index=source.options.get("dataset_index", 0),
    )
    return load_source(described, options)


def _torch_call(library: Any, net: Any, bundle: Bundle, device: str) -> Call:
    """Return a function that calls a torch network. For a bundle that takes camera frames, numpy normalises them first."""
    config, input, place = bundle.manifest.image, bundle.manifest.input, _torch_device(device)

    def call(images: np.ndarray) -> Sequence[Any]:
        with library.inference_mode():
            maps = net(library.from_numpy(network_input(images, config, input)).to(place))
            return [one.cpu().numpy() for one in maps]

    return call


# ---- one process


def main() -> None:
    """Answer the requests on standard input until it ends."""
    with _answers() as answer:
        requests = sys.stdin.buffer
        try:
            task = msgspec.json.decode(requests.readline(), type=Task)
            call, images, start = _start(task)
            answer(start)
            for line in requests:
                answer(_take_turn(call, images, msgspec.json.decode(line, type=Turn)))
        except (KeyboardInterrupt, BrokenPipeError):
            return
        except Exception as error:  # a library may raise anything; its message becomes the answer
            known = isinstance(error, EdgeBackbonesError)
            answer(Failed(failed=first_line(error, typed=not known)))


@contextlib.contextmanager
def _answers() -> Iterator[Callable[[msgspec.Struct], None]]:
    """Yield a function that writes an answer to standard output. What libraries print goes to standard error."""
    channel = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(channel, "wb") as file:

        def answer(what: msgspec.Struct) -> None:
            file.write(msgspec.json.encode(what) + b"\n")
            file.flush()

        yield answer


def _start(task: Task) -> tuple[Call, np.ndarray, Start]:
    bundle = Bundle.open(task.bundle)
    golden = load_golden(bundle)
    input = bundle.manifest.input
    images = np.random.default_rng(0).integers(0, 256, input.opt_shape).astype(input.dtype)
    if input.dtype != "uint8":
        images = (images / 128 - 1).astype(input.dtype)
    device, resident = energy.device_memory_mb(task.device), _resident_mb()  # the first query starts the driver
    begin = time.perf_counter()
    loaded = MAKERS[task.peer](bundle, task)
    load_s = time.perf_counter() - begin
    begin = time.perf_counter()
    loaded.call(images)
    first_call_ms = 1e3 * (time.perf_counter() - begin)
    after = energy.device_memory_mb(task.device)
    start = Start(
        batch=input.batch.opt,
        load_s=load_s,
        first_call_ms=first_call_ms,
        resident_mb=_resident_mb() - resident,
        device_mb=None if device is None or after is None else after - device,
        file_mb=None if loaded.file is None else _size_mb(loaded.file),
        versions=loaded.versions,
        worst_cosine=None,
        worst_sqnr_db=None,
    )
    if loaded.exact:
        start.worst_cosine, start.worst_sqnr_db = _parity(loaded, bundle, golden)
    return loaded.call, images, start


def _parity(loaded: Loaded, bundle: Bundle, golden: GoldenSamples) -> tuple[float, float]:
    """Return the worst cosine and SQNR (dB) of any feature map, over the golden samples at opt size."""
    from edge_backbones.deploy.parity import compare
    from edge_backbones.parity_report import Gate

    spec, images, references = bundle.manifest.backbone, golden.inputs["opt"], golden.outputs["opt"]
    found = []
    for chosen in full_batches(len(images), bundle.manifest.input.batch.opt):
        maps = dict(zip(spec.outputs, as_callers_see(loaded.call(images[chosen]), loaded.reordered), strict=False))
        for name in spec.out_features:
            for index, actual in zip(chosen, maps[name], strict=True):
                found.append(compare(name, references[name][index], np.asarray(actual), Gate()))
    return min(one.cosine for one in found), min(one.sqnr_db for one in found)


def _take_turn(call: Call, images: np.ndarray, turn: Turn) -> Calls:
    for _ in range(_WARM_UP):
        call(images)
    milliseconds: list[float] = []
    stolen, total = stolen_ticks()
    with energy.metered() as meter:
        begin = time.perf_counter()
        while len(milliseconds) < turn.calls or time.perf_counter() - begin < turn.seconds:
            start = time.perf_counter()
            call(images)
            milliseconds.append(1e3 * (time.perf_counter() - start))
    stolen_after, total_after = stolen_ticks()
    share = (stolen_after - stolen) / max(1, total_after - total)
    return Calls(milliseconds=milliseconds, stolen_share=share, joules=meter.joules)


def stolen_ticks() -> tuple[int, int]:
    """Return the clock ticks that other guests of the host took from this machine, and all ticks; zeros outside Linux."""
    try:
        ticks = [int(value) for value in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    except OSError:
        return 0, 0
    return ticks[7], sum(ticks)


def _resident_mb() -> float:
    """Return the resident memory of this process in MB."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:  # outside Linux only the peak is known
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def _size_mb(path: Path) -> float:
    """Return the size of a file in MB, with the weights that lie beside an OpenVINO model."""
    beside = path.with_suffix(".bin")
    files = [path, beside] if path.suffix == ".xml" and beside.exists() else [path]
    return sum(file.stat().st_size for file in files) / 1e6


if __name__ == "__main__":
    main()
