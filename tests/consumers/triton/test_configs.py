"""Triton's own protobuf reads each config.pbtxt as what the manifest says, and its backends' rules about shapes are kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_backbones import Bundle
from edge_backbones.bundle.manifest import GpuKey
from edge_backbones.bundle.reader import load_golden
from edge_backbones.bundle.writer import record_bytes, write_manifest
from edge_backbones.errors import EngineMismatchError
from edge_backbones.integrations.triton import TritonOptions, export_triton
from tests.consumers.triton.server import WHERE_IT_RUNS, parsed

pytestmark = WHERE_IT_RUNS
TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "uint8": "TYPE_UINT8"}


def with_plan(bundle: Bundle, target: Path, **gpu: Any) -> Bundle:
    """A copy of a bundle that holds a plan of TensorRT: bytes that are none, and a record as a device would have made it."""
    shutil.copytree(bundle.path, target)
    (engine,) = (one for one in bundle.manifest.engines if one.key.precision == "fp32")
    shapes = (bundle.manifest.input.min_shape, bundle.manifest.input.opt_shape, bundle.manifest.input.max_shape)
    key = msgspec.structs.replace(
        engine.key,
        flavour="tensorrt",
        library_version="10.3.0",
        device_name="Orin",
        architecture="aarch64",
        cpu_features=(),
        gpu=GpuKey(**{"architectures": ("sm_87",), "profiles": (shapes,), **gpu}),
        computes_in=msgspec.UNSET,
    )
    data = b"stands for a plan"
    path = key.path(data, ".plan")
    (target / path).write_bytes(data)
    record = msgspec.structs.replace(
        engine, key=key, file=record_bytes(path, data), milliseconds=None, layers=None, timing_cache=None
    )
    write_manifest(target, msgspec.structs.replace(bundle.manifest, engines=(*bundle.manifest.engines, record)))
    return Bundle.open(target)


@pytest.fixture(scope="module")
def exported(bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every kind of model of every bundle, by name, as protobuf reads its configuration."""
    folder = tmp_path_factory.mktemp("repository")
    for name, bundle in bundles.items():
        planned = with_plan(bundle, folder / "planned" / f"{name}.bundle")
        backends = ("tensorrt", "onnxruntime", "openvino", "python")
        options = TritonOptions(backends=backends, engine="fp32", ensemble="encoded", instances=2)
        with pytest.raises(
            EngineMismatchError, match="is of OpenVINO, and Triton's TensorRT backend loads plans of Ten"
        ):
            export_triton(bundle.path, folder / "models", options)
        export_triton(planned.path, folder / "models", options)
    assert not list((folder / "models").glob(".*"))
    files = sorted((folder / "models").glob("*/config.pbtxt"))
    found = {config["name"]: config for config in parsed(*files)}
    assert sorted(found) == [file.parent.name for file in files]
    return found


def dims(entry: dict[str, Any]) -> list[int]:
    return [int(size) for size in entry["dims"]]


def varied(bundle: Bundle) -> set[str]:
    input = bundle.manifest.input
    return {axis for axis, sizes in (("H", input.height), ("W", input.width)) if not sizes.is_fixed}


@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime", "openvino", "python"])
@pytest.mark.parametrize("name", ["net", "camera", "sizes", "frames"])
def test_names_dims_and_dtypes_are_those_of_the_manifest(exported, bundles, name, backend):
    config, bundle = exported[f"{name}_{backend}"], bundles[name]
    manifest = bundle.manifest
    batch = manifest.input.batch
    most = config.get("max_batch_size", 0)
    if backend == "python":
        assert most == batch.max
    elif batch.is_fixed or backend == "openvino":
        assert most == 0
    else:
        assert most == batch.max
    first = [] if most else [batch.min if batch.is_fixed else -1]

    (input,) = config["input"]
    assert (input["name"], input["data_type"]) == (manifest.input.name, TYPES[manifest.input.dtype])
    sizes = dict(zip(manifest.input.layout, manifest.input.opt_shape, strict=True))
    expected = [-1 if axis in varied(bundle) else sizes[axis] for axis in manifest.input.layout[1:]]
    assert dims(input) == [*first, *expected]

    golden = load_golden(bundle).outputs["opt"]
    assert [output["name"] for output in config["output"]] == list(manifest.backbone.outputs)
    for output, described in zip(config["output"], manifest.backbone.described_outputs, strict=True):
        sizes = dict(zip(described.layout, golden[described.name].shape, strict=True))
        expected = [-1 if axis in varied(bundle) else sizes[axis] for axis in described.engine_layout[1:]]
        assert dims(output) == [*first, *expected]
        assert output["data_type"] == TYPES[manifest.backbone.map_dtype]

    kind = {"platform": "tensorrt_plan"} if backend == "tensorrt" else {"backend": backend}
    assert {key: config[key] for key in kind} == kind
    (group,) = config["instance_group"]
    assert group == {"count": 2, "kind": "KIND_GPU" if backend in ("tensorrt",) or on_gpu(config) else "KIND_CPU"}
    assert ("dynamic_batching" in config) == (most > 1)
    assert config["version_policy"] == {"latest": {"num_versions": 1}}
    assert not config["response_cache"].get("enable", False)
    for warmup in config["model_warmup"]:
        (tensor,) = warmup["inputs"].values()
        assert (len(dims(tensor)) == 3) == (most > 0)
        assert -1 not in dims(tensor)
        assert warmup["batch_size"] >= 1


def on_gpu(config: dict[str, Any]) -> bool:
    """The stand-in plan is a GPU's engine too, which the Python backend prefers."""
    return config.get("backend") == "python"


@pytest.mark.parametrize("name", ["net", "camera", "sizes", "frames"])
@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime", "openvino", "python"])
def test_an_ensemble_leads_photographs_to_the_maps_of_its_network(exported, name, backend):
    network = exported[f"{name}_{backend}"]
    before, both = (exported[f"{name}_{backend}_{what}"] for what in ("preprocess", "ensemble"))
    assert both["platform"] == "ensemble"
    assert both["output"] == network["output"]
    assert before["input"] == both["input"]
    assert before["output"] == network["input"]
    assert {config.get("max_batch_size", 0) for config in (network, before, both)} == {network.get("max_batch_size", 0)}
    first, second = both["ensemble_scheduling"]["step"]
    assert (first["model_name"], second["model_name"]) == (before["name"], network["name"])
    (picture,), (input,) = both["input"], network["input"]
    assert first["input_map"] == {picture["name"]: picture["name"]}
    assert first["output_map"][input["name"]] == second["input_map"][input["name"]]
    assert second["output_map"] == {output["name"]: output["name"] for output in network["output"]}


def test_a_plan_says_its_profiles_and_its_core(bundles, tmp_path):
    shapes = ((1, 3, 64, 96), (2, 3, 64, 96), (4, 3, 64, 96))
    planned = with_plan(bundles["net"], tmp_path / "net.bundle", profiles=(shapes, shapes), dla_core=1)
    export_triton(planned.path, tmp_path / "models", TritonOptions(device="cuda:1"))  # auto is the plan
    (config,) = parsed(tmp_path / "models" / "net" / "config.pbtxt")
    assert config["platform"] == "tensorrt_plan"
    assert config["instance_group"] == [
        {
            "count": 1,
            "kind": "KIND_GPU",
            "gpus": [1],
            "profile": ["0", "1"],
            "secondary_devices": [{"device_id": "1"}],  # KIND_NVDLA is the first of the enum, which JSON leaves out
        }
    ]
    assert (tmp_path / "models/net/1/model.plan").read_bytes() == b"stands for a plan"


@pytest.mark.parametrize("name", ["net", "camera", "sizes", "frames"])
def test_a_graph_has_the_shapes_that_onnx_runtimes_backend_asks_for(exported, bundles, name):
    """The backend compares outputs exactly, -1 for an axis without a number, and asks for -1 where Triton makes batches."""
    import onnxruntime

    graph = bundles[name].manifest.onnx_graph("fp32")
    session = onnxruntime.InferenceSession(bundles[name].path / graph.file.path)
    config = exported[f"{name}_onnxruntime"]
    for entries, nodes in ((config["input"], session.get_inputs()), (config["output"], session.get_outputs())):
        assert [entry["name"] for entry in entries] == [node.name for node in nodes]
        for entry, node in zip(entries, nodes, strict=True):
            shape = [size if isinstance(size, int) else -1 for size in node.shape]
            assert shape == ([-1] if config.get("max_batch_size") else []) + dims(entry)


@pytest.mark.parametrize("name", ["net", "camera", "sizes", "frames"])
def test_a_graph_has_the_shapes_that_openvinos_backend_asks_for(exported, bundles, name):
    import openvino

    graph = bundles[name].manifest.onnx_graph("fp32")
    model = openvino.Core().read_model(bundles[name].path / graph.file.path)
    config = exported[f"{name}_openvino"]
    for entries, ports in ((config["input"], model.inputs), (config["output"], model.outputs)):
        assert [entry["name"] for entry in entries] == [port.get_any_name() for port in ports]
        for entry, port in zip(entries, ports, strict=True):
            for size, own in zip(dims(entry), port.get_partial_shape(), strict=True):
                if own.is_static:
                    assert own.get_length() == size
                else:
                    assert own.get_max_length() == -1 or own.get_min_length() < size < own.get_max_length()


def test_strange_texts_arrive_as_they_are(tmp_path):
    from edge_backbones.integrations.triton_config import render

    texts = [
        "plain",
        'quo"te',
        "back\\slash",
        "line\nbreak\ttab",
        "é 漢 🚀",
        "\\n",
        "\x00\x7f",
        "'",
        'a\\"b',
        "{}[]<>#;,:",
    ]
    parameters = [{"key": text, "value": {"string_value": text}} for text in texts]
    outputs = [{"name": text, "dims": [-1, 3]} for text in texts]
    file = tmp_path / "config.pbtxt"
    file.write_text(render({"name": "x", "parameters": parameters, "output": outputs}), encoding="ascii")
    (config,) = parsed(file)
    assert config["parameters"] == {text: {"string_value": text} for text in texts}
    assert [output["name"] for output in config["output"]] == texts
