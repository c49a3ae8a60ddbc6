"""export_triton: what is written, what is refused with both values and a fix, and that nothing is left half-written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_backbones.bundle.manifest import EngineRecord, GpuKey, GraphRecord
from edge_backbones.bundle.reader import Bundle
from edge_backbones.bundle.writer import record_bytes, write_manifest
from edge_backbones.cli.main import _run
from edge_backbones.errors import BundleError, EdgeBackbonesError, EngineMismatchError, InputError, IntegrityError
from edge_backbones.integrations import triton
from edge_backbones.integrations.triton import TritonOptions, export_triton
from edge_backbones.spec import Precision, ShapeRange
from edge_backbones.testing import make_bundle, pooling_input
from tests.graphs import pooling_graph


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """The pooling backbone with graphs in fp32 and bf16; batches of 1 to 4."""
    bundle = make_bundle(tmp_path / "pool.bundle", pooling_input(ShapeRange(min=1, opt=2, max=4)))
    graphs = []
    (bundle.path / "graphs").mkdir()
    for precision in (Precision.FP32, Precision.BF16):
        data = pooling_graph().SerializeToString()
        file = record_bytes(f"graphs/{precision}.onnx", data)
        (bundle.path / file.path).write_bytes(data)
        graphs.append(GraphRecord(format="onnx", precision=precision, file=file, opset=17))
    write_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, graphs=tuple(graphs)))
    return Bundle.open(bundle.path)


def with_plan(bundle: Bundle, flavour: str = "tensorrt", device: str = "Orin", **gpu: Any) -> Bundle:
    """The bundle with a plan, bytes that are none, and a record as a device would have made it."""
    engine = bundle.manifest.engines[0]
    key = msgspec.structs.replace(
        engine.key, flavour=flavour, library_version="10.3.0", device_name=device, architecture="aarch64",
        cpu_features=(), gpu=GpuKey(**{"architectures": ("sm_87",), **gpu}), computes_in=msgspec.UNSET,
    )  # fmt: skip
    data = f"stands for a plan of {device}".encode()
    path = key.path(data, ".plan")
    (bundle.path / path).write_bytes(data)
    record = EngineRecord(key=key, file=record_bytes(path, data), parity=engine.parity)
    write_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, engines=(*bundle.manifest.engines, record)))
    return Bundle.open(bundle.path)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def text(repository: Path, name: str) -> str:
    return (repository / name / "config.pbtxt").read_text(encoding="ascii")


def test_a_python_model_stands_alone(bundle, tmp_path):
    written = export_triton(bundle.path, tmp_path / "models")
    (model,) = written.models
    assert (model.name, model.backend, model.max_batch_size) == ("pool", "python", 4)
    assert model.serves == bundle.manifest.engines[0].name
    copied = files(tmp_path / "models" / "pool" / "1" / "bundle")
    assert copied == files(bundle.path)
    Bundle.open(tmp_path / "models/pool/1/bundle").check_files()
    assert 'string_value: "bundle"' in text(tmp_path / "models", "pool")
    assert "kind: KIND_CPU" in text(tmp_path / "models", "pool")
    assert os.listdir(tmp_path / "models") == ["pool"]


def test_a_signature_is_copied(bundle, tmp_path):
    (bundle.path / "signature").mkdir()
    (bundle.path / "signature" / "model.sig").write_bytes(b"signed")
    export_triton(bundle.path, tmp_path / "models")
    assert (tmp_path / "models/pool/1/bundle/signature/model.sig").read_bytes() == b"signed"


def test_a_referenced_bundle_is_named_by_its_whole_path(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export_triton("pool.bundle", "models", TritonOptions(reference=True, name="x", warmup=False, threads=2))
    assert sorted(files(tmp_path / "models")) == ["x/1/model.py", "x/config.pbtxt"]
    assert f'string_value: "{tmp_path}/pool.bundle"' in text(tmp_path / "models", "x")
    assert 'key: "threads"' in text(tmp_path / "models", "x")


def test_several_backends_are_several_models(bundle, tmp_path):
    options = TritonOptions(backends=("python", "onnxruntime", "openvino"), ensemble="rgb", name="a", threads=3)
    written = export_triton(bundle.path, tmp_path / "models", options)
    of_each = ("", "_preprocess", "_ensemble")
    names = [f"a_{backend}{what}" for backend in options.backends for what in of_each]
    assert [model.name for model in written.models] == names
    assert sorted(os.listdir(tmp_path / "models")) == sorted(names)
    assert (tmp_path / "models/a_openvino/1/model.onnx").read_bytes() == pooling_graph().SerializeToString()
    assert 'key: "intra_op_thread_count"' in text(tmp_path / "models", "a_onnxruntime")
    assert 'key: "INFERENCE_NUM_THREADS"' in text(tmp_path / "models", "a_openvino")
    assert json.loads((tmp_path / "models/a_python_preprocess/1/preprocessing.json").read_bytes())["threads"] == 3
    assert list((tmp_path / "models/a_python_ensemble/1").iterdir()) == []


def test_stages_narrow_the_outputs_in_the_order_of_the_bundle(bundle, tmp_path):
    options = TritonOptions(backends=("onnxruntime",), stages=("pool8",))
    (model,) = export_triton(bundle.path, tmp_path / "models", options).models
    assert [output.name for output in model.outputs] == ["pool8"]
    options = TritonOptions(stages=("pool8", "pool4"), name="both")
    (model,) = export_triton(bundle.path, tmp_path / "models", options).models
    assert [output.name for output in model.outputs] == ["pool4", "pool8"]


def test_auto_is_tensorrt_where_there_is_a_plan(bundle, tmp_path):
    planned = with_plan(bundle, host_code=True)
    written = export_triton(planned.path, tmp_path / "models")
    assert written.models[0].backend == "tensorrt"
    assert (tmp_path / "models/pool/1/model.plan").read_bytes() == b"stands for a plan of Orin"
    assert any("TensorRT 10.3.0" in note for note in written.notes)
    assert any("version-compatible=true" in note for note in written.notes)
    for name, options in {
        "cpu": {"device": "cpu"},
        "stage": {"stages": ("pool8",)},
        "int": {"engine": "openvino"},
    }.items():
        (model,) = export_triton(planned.path, tmp_path / "models", TritonOptions(name=name, **options)).models
        assert model.backend == "python"
    with pytest.raises(EngineMismatchError, match="carries a runtime, which is code"):
        export_triton(planned.path, tmp_path / "models", TritonOptions(backends=("python",), name="x", device="cuda"))
    allowed = TritonOptions(backends=("python",), name="x", allow_host_code=True)
    export_triton(planned.path, tmp_path / "models", allowed)
    assert 'key: "allow_host_code"' in text(tmp_path / "models", "x")
    assert "kind: KIND_GPU" in text(tmp_path / "models", "x")


def test_the_plan_of_one_device_is_chosen_by_its_bits_and_several_devices_by_the_user(bundle, tmp_path):
    planned = with_plan(with_plan(bundle), device="T4")
    with pytest.raises(
        InputError, match=r"plans for several devices \(Orin, TensorRT 10.3.0; T4, .*choose one with --engine"
    ):
        export_triton(planned.path, tmp_path / "models", TritonOptions(backends=("tensorrt",)))
    name = planned.manifest.engines[2].name
    chosen = TritonOptions(backends=("tensorrt",), engine=name, name="t4")
    assert export_triton(planned.path, tmp_path / "models", chosen).models[0].serves == name


@pytest.mark.parametrize(
    ("options", "kind", "said"),
    [
        ({"stages": ("pool4", "pool99")}, InputError, "stages pool99 are not in this bundle, which holds pool4, pool8"),
        ({"stages": ()}, InputError, r"stages \(none\) are not in"),
        ({"engine": "int8"}, EngineMismatchError, "has no engine 'int8'; it holds: openvino"),
        ({"device": "cuda"}, EngineMismatchError, "can be served so.*runs on cpu, not on cuda"),
        ({"backends": ("tensorrt",)}, EngineMismatchError, "is of OpenVINO, and Triton's TensorRT backend loads plans"),
        ({"backends": ("onnxruntime",), "engine": "int8"}, InputError, "has no ONNX graph in int8 for onnx.*holds: fp32"),
        ({"backends": ("onnxruntime",), "engine": "bf16"}, InputError, "ONNX Runtime has no convolution in bf16"),
        ({"backends": ("openvino",), "engine": "openvino"}, InputError, "engine is its precision .*got 'openvino'"),
        ({"backends": ("openvino",), "device": "cuda"}, InputError, "OpenVINO backend runs on the CPU: use --device cpu"),
        ({"backends": ("openvino",), "max_batch": 2}, InputError, "is given every batch as it comes: leave it out"),
        ({"backends": ("onnxruntime",), "max_batch": 5}, InputError, "max_batch=5 does not fit: .* batches of 1..4"),
        ({"backends": ("onnxruntime",), "device": "cuda", "threads": 2}, InputError, "threads=2 is for models on the CPU"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_is_left(bundle, tmp_path, options, kind, said):
    with pytest.raises(kind, match=said):
        export_triton(bundle.path, tmp_path / "models", TritonOptions(**options))
    assert sorted(os.listdir(tmp_path)) == ["pool.bundle"]


@pytest.mark.parametrize(
    ("gpu", "options", "said"),
    [
        (
            {"flavour": "tensorrt_rtx"},
            {},
            "is of TensorRT-RTX, and Triton's TensorRT backend loads plans of TensorRT alone",
        ),
        ({"stripped": True}, {}, "was written without weights"),
        ({}, {"stages": ("pool8",)}, "has to be told of every output of a plan"),
        ({}, {"device": "cpu"}, "a plan runs on a GPU: use --device cuda, or --backend python"),
        ({}, {"threads": 1}, "threads=1 is for models on the CPU"),
    ],
)
def test_a_plan_that_triton_cannot_load_is_refused(bundle, tmp_path, gpu, options, said):
    planned = with_plan(bundle, **gpu)
    with pytest.raises(EdgeBackbonesError, match=said):
        export_triton(planned.path, tmp_path / "models", TritonOptions(backends=("tensorrt",), **options))
    assert not (tmp_path / "models").exists()


def test_a_plan_that_was_never_measured_is_refused(bundle, tmp_path):
    planned = with_plan(bundle)
    first, plan = planned.manifest.engines
    parity = msgspec.structs.replace(plan.parity, stages=())
    engines = (first, msgspec.structs.replace(plan, parity=parity))
    write_manifest(planned.path, msgspec.structs.replace(planned.manifest, engines=engines))
    with pytest.raises(EngineMismatchError, match="never measured"):
        export_triton(planned.path, tmp_path / "models", TritonOptions(backends=("tensorrt",)))


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a b", "é", "a\nb", "x" * 101, "-a"])
def test_strange_names_are_refused(name):
    with pytest.raises(InputError, match="is no name for a model: use letters"):
        TritonOptions(name=name)


def test_a_folder_with_a_strange_name_needs_a_name(bundle, tmp_path):
    bundle.path.rename(tmp_path / "my pool.bundle")
    with pytest.raises(InputError, match=r"'my pool' is no name for a model.*--name resnet50"):
        export_triton(tmp_path / "my pool.bundle", tmp_path / "models")
    export_triton(tmp_path / "my pool.bundle", tmp_path / "models", TritonOptions(name="pool"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backends": ("auto", "python")}, "auto alone or some of the others, got auto, python"),
        ({"backends": ()}, "got none"),
        ({"instances": 0}, "instances is at least 1, got 0"),
        ({"max_batch": 0}, "max_batch is at least 1"),
        ({"threads": -1}, "threads is at least 1"),
        ({"max_batch": 2**31}, "max_batch is at most 2147483647, got 2147483648"),
        ({"device": "gpu"}, "device must be"),
    ],
)
def test_options_out_of_range(options, said):
    with pytest.raises(InputError, match=said):
        TritonOptions(**options)


def test_a_repository_is_no_bundle_and_not_inside_one(bundle, tmp_path):
    for place in (bundle.path, bundle.path / "models"):
        with pytest.raises(InputError, match="is a bundle or inside one"):
            export_triton(bundle.path, place)
    make_bundle(tmp_path / "other.bundle")
    with pytest.raises(InputError, match="is a bundle or inside one"):
        export_triton(bundle.path, tmp_path / "other.bundle")
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="file is a file, and a repository is a folder"):
        export_triton(bundle.path, tmp_path / "file")


def test_a_model_that_is_there_stays_unless_it_is_overwritten(bundle, tmp_path):
    repository = tmp_path / "models"
    export_triton(bundle.path, repository)
    before = files(repository)
    with pytest.raises(BundleError, match=r"pool exists already: choose another --name, or pass --overwrite"):
        export_triton(bundle.path, repository, TritonOptions(stages=("pool8",)))
    assert files(repository) == before
    export_triton(bundle.path, repository, TritonOptions(stages=("pool8",), overwrite=True, warmup=False))
    assert "pool4" not in text(repository, "pool")
    assert not (repository / "pool" / "warmup").exists()
    assert os.listdir(repository) == ["pool"]


def test_what_export_triton_did_not_write_is_not_overwritten(bundle, tmp_path):
    repository = tmp_path / "models"
    overwrite = TritonOptions(overwrite=True)
    (repository / "pool").mkdir(parents=True)
    (repository / "pool" / "config.pbtxt").write_text('name: "pool"\n')
    with pytest.raises(BundleError, match="is no model that export-triton wrote and will not be overwritten"):
        export_triton(bundle.path, repository, overwrite)
    (repository / "pool" / "config.pbtxt").unlink()
    (repository / "pool").rmdir()
    export_triton(bundle.path, repository)
    (repository / "pool" / "2").mkdir()
    (repository / "pool" / "2" / "model.py").touch()
    with pytest.raises(BundleError, match=r"holds 2, 2/model\.py, which export-triton did not write"):
        export_triton(bundle.path, repository, overwrite)
    assert (repository / "pool" / "2" / "model.py").exists()


def test_models_of_others_in_the_repository_stay(bundle, tmp_path):
    (tmp_path / "models" / "theirs").mkdir(parents=True)
    export_triton(bundle.path, tmp_path / "models")
    assert sorted(os.listdir(tmp_path / "models")) == ["pool", "theirs"]


def test_a_damaged_file_leaves_the_repository_as_it_was(bundle, tmp_path):
    repository = tmp_path / "models"
    export_triton(bundle.path, repository)
    before = files(repository)
    golden = bundle.path / "golden.npz"
    golden.write_bytes(golden.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=r"golden\.npz"):
        export_triton(bundle.path, repository, TritonOptions(overwrite=True))
    (engine,) = (bundle.path / "engines").iterdir()
    assert files(repository) == before
    assert os.listdir(repository) == ["pool"]
    assert engine.exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("overwrite", [False, True])
def test_models_appear_all_or_none(bundle, tmp_path, monkeypatch, overwrite, error):
    repository = tmp_path / "models"
    options = TritonOptions(ensemble="rgb", overwrite=overwrite)
    if overwrite:
        export_triton(bundle.path, repository, TritonOptions(ensemble="rgb", stages=("pool8",)))
    before = files(repository) if overwrite else {}
    publish = triton.publish

    def failing(staging: Path, target: Path, names: list[str], **how: Any) -> None:
        third = 0

        def fail(call: Callable[..., Any]) -> Callable[..., Any]:
            def moved(*paths: Any) -> Any:
                nonlocal third
                third += 1
                if third == 3:
                    raise error
                return call(*paths)

            return moved

        with monkeypatch.context() as patch:
            if overwrite:
                from edge_backbones.bundle import storage

                patch.setattr(storage, "exchange", fail(storage.exchange))
            else:
                patch.setattr(Path, "rename", fail(Path.rename))
            publish(staging, target, names, **how)

    monkeypatch.setattr(triton, "publish", failing)
    with pytest.raises((BundleError, KeyboardInterrupt)):
        export_triton(bundle.path, repository, options)
    assert (files(repository) if repository.exists() else {}) == before
    assert sorted(os.listdir(tmp_path)) == (["models", "pool.bundle"] if overwrite else ["pool.bundle"])
    assert not overwrite or len(os.listdir(repository)) == 3


@pytest.mark.parametrize("is_mounted", [False, True])
def test_a_server_that_looks_meanwhile_sees_no_other_folder(bundle, tmp_path, monkeypatch, is_mounted):
    """Triton takes hidden folders for models too, and does not start if one of them cannot be loaded."""
    (tmp_path / "disk" / "models").mkdir(parents=True)
    repository = tmp_path / "models"
    repository.symlink_to(tmp_path / "disk" / "models")
    publish, rename, seen = triton.publish, Path.rename, []

    def looking(staging: Path, *given: Any, **how: Any) -> None:
        seen.append([path.name for path in repository.iterdir() if path.is_dir()])
        assert (staging / "pool" / "config.pbtxt").is_file()
        publish(staging, *given, **how)

    def moved(path: Path, target: Path) -> Path:
        if is_mounted and path.parent.parent != target.parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(path), None, str(target))
        return rename(path, target)

    monkeypatch.setattr(triton, "publish", looking)
    monkeypatch.setattr(Path, "rename", moved)
    export_triton(bundle.path, repository)
    (folders,) = seen
    assert [name[:14] for name in folders] == ([".pool.building"] if is_mounted else [])
    assert os.listdir(repository) == ["pool"]
    assert os.listdir(tmp_path / "disk") == ["models"]


def test_an_ensemble_of_an_earlier_export_is_named(bundle, tmp_path):
    assert not any("ensemble" in note for note in export_triton(bundle.path, tmp_path / "models").notes)
    both = TritonOptions(ensemble="rgb", overwrite=True)
    for _ in range(2):
        assert not any("ensemble" in note for note in export_triton(bundle.path, tmp_path / "models", both).notes)
    *_, note = export_triton(bundle.path, tmp_path / "models", TritonOptions(overwrite=True)).notes
    assert note.startswith(f"{tmp_path / 'models' / 'pool_ensemble'} was not written anew")


def test_ensembles_that_cannot_be_are_refused(bundle, tmp_path):
    source = msgspec.structs.replace(
        bundle.manifest.source, preprocessing_notes=("the processor does more: prepare pixel_values with it",)
    )
    write_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, source=source))
    with pytest.raises(InputError, match="prepare pixel_values with it: an ensemble cannot; leave out --ensemble"):
        export_triton(bundle.path, tmp_path / "models", TritonOptions(ensemble="rgb"))


def test_the_command_says_what_it_wrote_and_how_to_serve_it(bundle, tmp_path, capsys):
    assert _run(["export-triton", str(bundle.path), str(tmp_path / "models"), "--ensemble", "encoded"]) == 0
    said = capsys.readouterr()
    assert "pool: python, batches up to 4, pixel_values FP32[3, 32, 48] -> pool4 FP32[3, 8, 12]" in said.out
    assert f"serve it: tritonserver --model-repository {tmp_path / 'models'}" in said.out
    assert "the server needs edge_backbones" in said.err
    assert _run(["export-triton", str(bundle.path), str(tmp_path / "models")]) == 1
    assert "exists already: choose another --name, or pass --overwrite" in capsys.readouterr().err
    typed = (
        "--overwrite",
        "--stages",
        "pool8",
        "--json",
        "--backend",
        "python",
        "--backend",
        "openvino",
        "--name",
        "a",
    )
    assert _run(["export-triton", str(bundle.path), str(tmp_path / "models"), *typed]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(model["name"], [one["name"] for one in model["outputs"]]) for model in found["models"]] == [
        ("a_python", ["pool8"]),
        ("a_openvino", ["pool8"]),
    ]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("--backend", "onnx"), "onnx"),
        (("--name", "a b"), "is no name for a model"),
        (("--instances", "0"), "--instances"),
        (("--device", "gpu"), "A GPU is called cuda"),
        (("--ensemble", "jpeg"), "jpeg"),
    ],
)
def test_wrong_usage(bundle, tmp_path, capsys, typed, said):
    assert _run(["export-triton", str(bundle.path), str(tmp_path / "models"), *typed]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
