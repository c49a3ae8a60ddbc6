"""Write a Triton model repository for a bundle: folders that ``tritonserver --model-repository REPOSITORY`` serves.

::

    repository/
      resnet50/              the network
        config.pbtxt         names, shapes, dtypes, batches, instances, warm-up
        1/model.py           or model.plan, model.onnx
        1/bundle/            the bundle, for the Python backend
        warmup/golden_opt    golden samples, which the server computes before it says that it is ready
      resnet50_preprocess/   with an ensemble: photographs to the network's input
      resnet50_ensemble/     photographs to feature maps

Nothing here needs Triton. What the server runs is in :mod:`edge_backbones.integrations.triton_serving`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edge_backbones.bundle import storage, trust
from edge_backbones.bundle.manifest import EngineRecord, FileRecord, GraphRecord, Manifest
from edge_backbones.bundle.reader import Bundle, load_golden, read_current
from edge_backbones.engines import promises, registry, select
from edge_backbones.errors import EngineMismatchError, InputError
from edge_backbones.integrations import triton_config as configs
from edge_backbones.integrations.triton_config import Backend, Batch, Instances, Tensor
from edge_backbones.integrations.triton_repository import (
    VERSION,
    ModelFolder,
    TritonModel,
    publish,
    require_free,
    staged,
    write_model,
)
from edge_backbones.integrations.triton_serving import PREPROCESSING, Preprocessing
from edge_backbones.machine.devices import parse_device
from edge_backbones.option import Option, documented
from edge_backbones.reading import shortened
from edge_backbones.spec import Precision

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_CODE = '''"""Written by edge-backbones export-triton: {what}."""

from edge_backbones.integrations.triton_serving import {model} as TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
_MODEL = "The model"
_SERVER = "What the server does"


@documented
@dataclass(frozen=True, kw_only=True)
class TritonOptions:
    """Say what `export_triton` writes.

    Raises:
        InputError: An option is out of range, or two of them exclude each other.
    """

    backends: Annotated[
        tuple[Literal["auto", "tensorrt", "onnxruntime", "openvino", "python"], ...],
        Option(
            "Which backend of Triton runs the network. python: EdgeBackbone, for every engine, with all checks. tensorrt: a "
            "plan. onnxruntime, openvino: an ONNX graph. auto: tensorrt if the bundle has a plan of TensorRT, else python.",
            group=_MODEL,
        ),
    ] = ("auto",)
    engine: Annotated[
        str | None,
        Option(
            "Which engine to serve: a precision (int8), a flavour, or the name of one engine or the beginning of it. For "
            "onnxruntime and openvino: the precision of the graph, by default fp32.",
            group=_MODEL,
        ),
    ] = None
    name: Annotated[
        str | None,
        Option("The name of the model. By default that of the bundle's folder without .bundle.", group=_MODEL),
    ] = None
    stages: Annotated[
        tuple[str, ...] | None,
        Option("Which outputs clients may ask for. By default all. Not for tensorrt.", group=_MODEL),
    ] = None
    ensemble: Annotated[
        Literal["encoded", "rgb"] | None,
        Option(
            "Write an ensemble too, which takes photographs and preprocesses them as the network was trained. encoded: the "
            "bytes of image files. rgb: uint8 pixels.",
            group=_MODEL,
        ),
    ] = None
    reference: Annotated[
        bool,
        Option(
            "Let the Python backend open the bundle where it is. By default it is copied, so that the repository stands "
            "alone.",
            group=_MODEL,
        ),
    ] = False
    device: Annotated[
        str,
        Option(
            "Where instances run: cpu, cuda (one on each GPU) or cuda:1. auto: cuda for plans, and for python if the bundle "
            "has an engine for a GPU; else cpu.",
            group=_SERVER,
        ),
    ] = "auto"
    instances: Annotated[int, Option("How many instances run, on the CPU or on each GPU.", group=_SERVER, least=1)] = 1
    max_batch: Annotated[
        int | None,
        Option(
            "The largest batch, of one request or of several that the server joins. By default the bundle's.",
            group=_SERVER,
            least=1,
        ),
    ] = None
    threads: Annotated[int | None, Option("The most CPU threads of an instance.", group=_SERVER, least=1)] = None
    warmup: Annotated[bool, Option("Compute the golden samples before the model is ready.", group=_SERVER)] = True
    allow_host_code: Annotated[bool, Option("Allow code of the bundle to run.", has_flag=False)] = False
    overwrite: Annotated[bool, Option("Replace models of these names.", has_flag=False)] = False

    def __post_init__(self) -> None:
        if not self.backends or ("auto" in self.backends and len(self.backends) > 1):
            raise InputError(f"backends are auto alone or some of the others, got {', '.join(self.backends) or 'none'}")
        if self.name is not None:
            _require_name(self.name)
        for option in ("instances", "max_batch", "threads"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise InputError(f"{option} is at least 1, got {value}")
            if value is not None and value > configs.LARGEST:
                raise InputError(f"{option} is at most {configs.LARGEST}, got {value}")
        parse_device(self.device)


@dataclass(frozen=True)
class TritonExport:
    """Hold what `export_triton` wrote.

    Attributes:
        repository: The folder.
        models: Its new models.
        notes: Sentences for the user: what the server has to have, and what it does not check.
    """

    repository: Path
    models: tuple[TritonModel, ...]
    notes: tuple[str, ...]


def export_triton(
    path: str | os.PathLike[str], repository: str | os.PathLike[str], options: TritonOptions | None = None
) -> TritonExport:
    """Write a bundle into a Triton model repository, as a model for each backend that is asked for.

    The repository may hold other models. A model appears in it whole: after an error everything is as it was.

    Args:
        path: Folder of the bundle.
        repository: Folder of the repository. It is made if it does not exist.
        options: What is written.

    Returns:
        The models, and notes for the user.

    Raises:
        BundleError: A file of the bundle is damaged, or the repository cannot be written or has a model of that name.
        EngineMismatchError: The bundle has no engine that is meant, or none that may run.
        InputError: The bundle lacks a stage or a graph that is asked for, or an option does not fit the backend.
    """
    options = options or TritonOptions()
    target = Path(os.path.abspath(repository))
    if target.resolve().is_relative_to(Path(path).resolve()) or (target / storage.MANIFEST).is_file():
        raise InputError(f"{target} is a bundle or inside one, and a repository holds models: choose another folder")
    base = options.name or _require_name(re.sub(r"\.bundle$", "", Path(os.path.abspath(path)).name))

    def write(staging: Path, bundle: Bundle) -> tuple[list[ModelFolder], list[str]]:
        """Write the folders of the models into ``staging``."""
        admitted, _ = trust.admit(bundle)
        folders, notes = _planned(admitted, base, options)
        for folder in folders:
            require_free(target / folder.model.name, overwrite=options.overwrite)
        for folder in folders:
            shutil.rmtree(staging / folder.model.name, ignore_errors=True)
            write_model(folder, staging / folder.model.name, bundle)
        return folders, notes

    with staged(target, base) as staging:
        folders, notes = read_current(path, lambda bundle: write(staging, bundle))[1]
        storage.sync_tree(staging)
        publish(staging, target, [folder.model.name for folder in folders], overwrite=options.overwrite)
    notes += _left_behind(target, [folder.model.name for folder in folders])
    return TritonExport(target, tuple(folder.model for folder in folders), tuple(dict.fromkeys(notes)))


def _left_behind(repository: Path, written: Sequence[str]) -> list[str]:
    """Return notes about ensembles of an earlier export, which now hand their pictures to a new network."""
    old = [f"{name}_ensemble" for name in written if f"{name}_ensemble" not in written]
    return [
        f"{repository / name} was not written anew and prepares pictures for the model before: remove it, or export with "
        "--ensemble"
        for name in old
        if (repository / name).exists()
    ]


def _require_name(name: str) -> str:
    """Return a name that folders, URLs and Triton take alike; raise InputError for another."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{shortened(name, 120)!r} is no name for a model: use letters, digits, dots, dashes and underscores, 100 at "
            "most, as in --name resnet50"
        )
    return name


def _planned(bundle: Bundle, base: str, options: TritonOptions) -> tuple[list[ModelFolder], list[str]]:
    """Return the folders of all models, and the notes about them."""
    backends = _backends(bundle, options)
    folders, notes = [], []
    for backend in backends:
        name = _require_name(base if len(backends) == 1 else f"{base}_{backend}")
        network, said = _network(bundle, name, backend, options)
        folders.append(network)
        notes += said
        if options.ensemble is not None:
            folders += _with_preprocessing(bundle.manifest, network.model, options)
    return folders, notes


def _backends(bundle: Bundle, options: TritonOptions) -> list[Backend]:
    """Return the backends that are asked for; for auto the one that fits the bundle."""
    chosen: list[Backend] = [backend for backend in dict.fromkeys(options.backends) if backend != "auto"]
    if chosen:
        return chosen
    asked = select.full_name(bundle, options.engine)
    with contextlib.suppress(EngineMismatchError, InputError):
        _plan(bundle, asked)
        if parse_device(options.device)[0] != "cpu" and options.stages is None and options.threads is None:
            return ["tensorrt"]
    return ["python"]


def _network(bundle: Bundle, name: str, backend: Backend, options: TritonOptions) -> tuple[ModelFolder, list[str]]:
    """Return the folder of a network's model, and notes about it."""
    manifest, golden = bundle.manifest, load_golden(bundle)
    served: str
    if backend == "python":
        served, files, parameters, on_gpu = _python(bundle, options)
        notes = ["python: the server needs edge_backbones with the extra of the engine's library"]
        plan = None
    elif backend == "tensorrt":
        plan = _plan(bundle, select.full_name(bundle, options.engine))
        served, files, parameters, on_gpu = plan.name, {"model.plan": plan.file}, {}, True
        notes = _plan_notes(plan)
    else:
        graph, plan = _graph(bundle, backend, options.engine), None
        served, files, on_gpu = graph.file.path, {"model.onnx": graph.file}, False
        parameters = _threads_of(backend, options.threads)
        notes = [
            f"{backend}: the server checks neither hash nor parity of {graph.file.path}, and computes it as its release does"
        ]
    instances = _instances(backend, options, plan, on_gpu=on_gpu)
    batch = _batch(backend, manifest, options.max_batch)
    tensors = configs.output_tensors(manifest, golden, _stages(manifest, backend, options.stages))
    input = configs.input_tensor(manifest.input)
    warmups, samples = configs.warmups(manifest.input, golden, batch) if options.warmup else ([], {})
    config = configs.model_config(
        name, backend, batch, [input], tensors, instances=instances, parameters=parameters, warmup=warmups
    )  # fmt: skip
    folder = ModelFolder(
        TritonModel(name, backend, served, batch.most, _shown([input], batch), _shown(tensors, batch)), config
    )
    folder.files = {f"{VERSION}/{file}": data for file, data in files.items()}
    folder.files |= {f"warmup/{file}": data for file, data in samples.items()}
    folder.copies_bundle = backend == "python" and not options.reference
    return folder, notes


def _shown(tensors: Sequence[Tensor], batch: Batch) -> tuple[Tensor, ...]:
    """Return tensors with the dims that config.pbtxt says."""
    return tuple(Tensor(tensor.name, tensor.data_type, tuple(batch.dims(tensor.dims))) for tensor in tensors)


def _python(bundle: Bundle, options: TritonOptions) -> tuple[str, dict[str, bytes | FileRecord], dict[str, str], bool]:
    """Return what a model of the Python backend serves, its files and parameters, and whether it is for a GPU."""
    asked = select.full_name(bundle, options.engine)
    place, _ = parse_device(options.device)

    def reasons(record: EngineRecord) -> list[str]:
        code = select.code_reasons(record, asked, code=options.allow_host_code)
        return [*select.against_place(record, place), *code, *promises.reasons_against(bundle.manifest, record)]

    fitting = _servable(bundle, asked, reasons)
    where = "bundle"
    if options.reference:
        where = os.path.abspath(bundle.path)
        try:
            where.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where} is no text in UTF-8, which a configuration has to be: leave out --reference"
            ) from error
    parameters = {"bundle": where}
    if asked is not None:
        parameters["engine"] = asked
    if options.threads is not None:
        parameters["threads"] = str(options.threads)
    if options.allow_host_code:
        parameters["allow_host_code"] = "true"
    code = _CODE.format(what="the network of a bundle", model="BackboneModel").encode()
    on_gpu = any(engine.key.gpu is not None for engine in fitting)
    return ", ".join(engine.name for engine in fitting), {"model.py": code}, parameters, on_gpu


def _servable(
    bundle: Bundle, asked: str | None, reasons_against: Callable[[EngineRecord], list[str]]
) -> list[EngineRecord]:
    """Return the engines that are asked for and that nothing speaks against; raise EngineMismatchError if there is none."""
    engines = bundle.manifest.engines
    meant = [one for one in engines if asked in (None, one.key.precision.value, one.key.flavour, one.name)]
    if not meant:
        held = ", ".join(one.name for one in engines) or "none"
        what = "engine" if asked is None else f"engine {asked!r}"
        raise EngineMismatchError(
            f"{bundle.path} has no {what}; it holds: {held}. Run: edge-backbones compile {bundle.path}"
        )
    reasons = {one.name: reasons_against(one) for one in meant}
    if not any(why == [] for why in reasons.values()):
        listed = "; ".join(f"{name}: {' and '.join(why)}" for name, why in reasons.items())
        raise EngineMismatchError(f"no engine of {bundle.path} can be served so. {listed}")
    return [one for one in meant if not reasons[one.name]]


def _plan(bundle: Bundle, asked: str | None) -> EngineRecord:
    """Return the plan that Triton's TensorRT backend may serve. Raises EngineMismatchError with the reasons against each."""
    fitting = _servable(bundle, asked, lambda record: _against_plan(bundle.manifest, record))
    places = sorted({f"{e.key.device_name}, TensorRT {e.key.library_version}" for e in fitting})
    if len(places) > 1:
        raise InputError(
            f"{bundle.path} has plans for several devices ({'; '.join(places)}): choose one with --engine, as in --engine "
            f"{fitting[0].name}"
        )
    times = select.comparable_times(fitting)
    return min(fitting, key=lambda record: (times.get(record.name, 0.0), record.key.precision.info.bits))


def _against_plan(manifest: Manifest, record: EngineRecord) -> list[str]:
    """Return why Triton's TensorRT backend cannot serve an engine, as phrases."""
    key, backend = record.key, "Triton's TensorRT backend"
    if key.gpu is None or key.flavour != "tensorrt":
        what = registry.title_of(key.flavour)
        return [f"is of {what}, and {backend} loads plans of TensorRT alone: --backend python serves it"]
    if key.gpu.stripped:
        return [f"was written without weights, which {backend} does not put in: compile it without --strip"]
    return promises.reasons_against(manifest, record)


def _plan_notes(plan: EngineRecord) -> list[str]:
    notes = [
        f"tensorrt: the plan loads on {plan.key.device_name} with a Triton release that has TensorRT "
        f"{plan.key.library_version}; the server checks neither its hash nor its parity"
    ]
    if plan.key.gpu is not None and plan.key.gpu.host_code:
        notes.append(
            "tensorrt: the plan carries a runtime: tritonserver --backend-config=tensorrt,version-compatible=true loads it"
        )
    return notes


def _graph(bundle: Bundle, backend: Backend, asked: str | None) -> GraphRecord:
    """Return the ONNX graph of the precision that is asked for; that in fp32, or the first, if none is."""
    graphs = {graph.precision: graph for graph in bundle.manifest.graphs if graph.format == "onnx"}
    held = ", ".join(graphs) or "none"
    if asked is not None and asked not in set(Precision):
        raise InputError(f"{backend} serves a graph: engine is its precision ({', '.join(Precision)}), got {asked!r}")
    if backend == "onnxruntime":
        graphs.pop(Precision.BF16, None)  # it has no convolution in bf16
    wanted = [Precision.FP32, *graphs] if asked is None else [Precision(asked)]
    found = next((graphs[precision] for precision in wanted if precision in graphs), None)
    if found is None:
        what = "ONNX graph" if asked is None else f"ONNX graph in {asked}"
        why = (
            "; ONNX Runtime has no convolution in bf16" if backend == "onnxruntime" and asked in (None, "bf16") else ""
        )
        raise InputError(
            f"{bundle.path} has no {what} for {backend}; it holds: {held}{why}. Choose another with --engine, or use "
            "--backend python"
        )
    return found


def _threads_of(backend: Backend, threads: int | None) -> dict[str, str]:
    """Return the parameter of a backend that limits its threads."""
    names = {"onnxruntime": "intra_op_thread_count", "openvino": "INFERENCE_NUM_THREADS"}
    return {} if threads is None else {names[backend]: str(threads)}


def _instances(backend: Backend, options: TritonOptions, plan: EngineRecord | None, *, on_gpu: bool) -> Instances:
    """Return where a model runs. ``on_gpu``: what auto means."""
    place, gpu = parse_device(options.device)
    if (backend, place) == ("openvino", "cuda"):
        raise InputError(f"device is {options.device}, and Triton's OpenVINO backend runs on the CPU: use --device cpu")
    if (backend, place) == ("tensorrt", "cpu"):
        raise InputError("device is cpu, and a plan runs on a GPU: use --device cuda, or --backend python")
    on_gpu = place == "cuda" or (place == "auto" and on_gpu)
    if options.threads is not None and on_gpu:
        raise InputError(
            f"threads={options.threads} is for models on the CPU, and this one runs on a GPU: leave it out, or use "
            "--device cpu"
        )
    key = None if plan is None else plan.key.gpu
    return Instances(
        options.instances,
        on_gpu,
        gpu if ":" in options.device else None,
        profiles=1 if key is None else max(1, len(key.profiles)),
        dla_core=None if key is None else key.dla_core,
    )


def _batch(backend: Backend, manifest: Manifest, asked: int | None) -> Batch:
    """Return the batch of a model; raise InputError for one that its graph does not take."""
    takes = manifest.input.batch
    if asked is not None and backend != "python":
        if takes.is_fixed or backend == "openvino":
            why = f"takes batches of {takes}" if takes.is_fixed else "is given every batch as it comes"
            raise InputError(f"max_batch={asked} does not fit: the {backend} model {why}: leave it out")
        if asked not in takes:
            raise InputError(f"max_batch={asked} does not fit: the graph takes batches of {takes}: choose one of them")
    return configs.batch_of(backend, manifest.input, asked)


def _stages(manifest: Manifest, backend: Backend, asked: Sequence[str] | None) -> Sequence[str]:
    """Return the names of the outputs; raise InputError for one that the bundle does not have."""
    outputs = manifest.backbone.outputs
    if asked is None:
        return outputs
    missing = [name for name in asked if name not in outputs]
    if missing or not asked:
        raise InputError(
            f"stages {', '.join(missing) or '(none)'} are not in this bundle, which holds {', '.join(outputs)}: choose among "
            "these, or build it again with --out-features"
        )
    if backend == "tensorrt" and set(asked) != set(outputs):
        raise InputError(
            f"stages are {', '.join(asked)}, and Triton's TensorRT backend has to be told of every output of a plan "
            f"({', '.join(outputs)}): leave out --stages; a client gets the outputs that it asks for"
        )
    return asked


def _with_preprocessing(manifest: Manifest, network: TritonModel, options: TritonOptions) -> list[ModelFolder]:
    """Return the folders of a network's preprocessing and of the ensemble of both."""
    pictures, channels = options.ensemble or "encoded", manifest.input.channels
    if manifest.source.not_repeated:
        raise InputError(f"{manifest.source.not_repeated}: an ensemble cannot; leave out --ensemble")
    if pictures == "encoded" and channels not in (1, 3):
        raise InputError(f"image files have 1 or 3 channels, and this network takes {channels}: use --ensemble rgb")
    if taken := {configs.PICTURES, configs.PREPARED} & {output.name for output in network.outputs}:
        raise InputError(
            f"an output is called {taken.pop()!r}, as a tensor of the ensemble is: leave it out of --stages"
        )
    names = [_require_name(f"{network.name}_{what}") for what in ("preprocess", "ensemble")]
    batch = _batch_of(network, manifest)
    picture = configs.picture_tensor(pictures, channels)
    input = configs.input_tensor(manifest.input)
    outputs = [Tensor(one.name, one.data_type, one.dims[not batch.most :]) for one in network.outputs]
    how = Preprocessing(image=manifest.image, input=manifest.input, threads=options.threads)
    config = configs.model_config(
        names[0], "python", batch, [picture], [input], instances=Instances(options.instances, on_gpu=False),
        parameters={}, batches=False,
    )  # fmt: skip
    code = _CODE.format(what="photographs to the input of a network", model="PreprocessingModel").encode()
    files: dict[str, bytes | FileRecord] = {
        f"{VERSION}/model.py": code,
        f"{VERSION}/{PREPROCESSING}": msgspec.json.format(msgspec.json.encode(how), indent=2),
    }
    shown = _shown([picture], batch)
    preprocessing = TritonModel(names[0], "python", manifest.preprocessing, batch.most, shown, network.inputs)
    both = f"{names[0]}, {network.name}"
    ensemble = TritonModel(names[1], "ensemble", both, batch.most, shown, network.outputs)
    config_of_both = configs.ensemble_config(names[1], names[0], network.name, batch, picture, input, outputs)
    return [ModelFolder(preprocessing, config, files), ModelFolder(ensemble, config_of_both)]


def _batch_of(network: TritonModel, manifest: Manifest) -> Batch:
    return Batch(network.max_batch_size, network.inputs[0].dims[0] if not network.max_batch_size else -1)
