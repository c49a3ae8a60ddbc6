"""The models of the Python backend over a stand-in for Triton's module: batches, layouts, and errors of one request alone."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from edge_backbones import EdgeBackbone
from edge_backbones.images.config import ImageConfig
from edge_backbones.integrations.triton import TritonOptions, export_triton
from edge_backbones.integrations.triton_serving import BackboneModel, Preprocessing, PreprocessingModel
from edge_backbones.spec import BackboneSpec, InputSpec, ShapeRange
from edge_backbones.testing import SPEC, NumpySession, make_bundle, pooled, pooling_input
from tests.imports import require_import_without


class TritonError(Exception):
    INVALID_ARG, INTERNAL = "invalid argument", "internal"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        super().__init__(message)
        self.code = code


class TritonModelException(Exception):
    pass


class Tensor:
    def __init__(self, name: str, values: np.ndarray) -> None:
        assert values.flags.c_contiguous  # Triton would copy it
        self.name, self.values = name, values

    def as_numpy(self) -> np.ndarray:
        return self.values


class Response:
    def __init__(self, output_tensors: Any = (), error: TritonError | None = None) -> None:
        self.outputs = {tensor.name: tensor.values for tensor in output_tensors}
        self.error = error


class Request:
    def __init__(self, asked: list[str], **inputs: np.ndarray) -> None:
        self.asked, self.inputs = asked, inputs

    def requested_output_names(self) -> list[str]:
        return self.asked


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    def tensor_of(request: Request, name: str) -> Tensor:
        return Tensor(name, request.inputs[name])

    module = types.SimpleNamespace(
        TritonError=TritonError, TritonModelException=TritonModelException, Tensor=Tensor, InferenceResponse=Response,
        get_input_tensor_by_name=tensor_of,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    return module


def arguments(model: Path, kind: str = "CPU", **config: Any) -> dict[str, str]:
    return {
        "model_config": json.dumps(config), "model_repository": str(model), "model_version": "1",
        "model_instance_kind": kind, "model_instance_device_id": "1",
    }  # fmt: skip


def configured(parameters: dict[str, str], outputs: tuple[str, ...] = ("pool4", "pool8")) -> dict[str, Any]:
    return {
        "input": [{"name": "pixel_values"}],
        "output": [{"name": name} for name in outputs],
        "parameters": {key: {"string_value": value} for key, value in parameters.items()},
    }


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    make_bundle(tmp_path / "pool.bundle", pooling_input(ShapeRange(min=1, opt=2, max=4)))
    export_triton(tmp_path / "pool.bundle", tmp_path / "models")
    return tmp_path / "models"


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def of_session(session: Any, spec: BackboneSpec = SPEC, input: InputSpec | None = None) -> BackboneModel:
    """A model over a session instead of a bundle's engine."""
    model = BackboneModel()
    backbone = EdgeBackbone(spec, input or session.input, session)

    class FromPretrained(EdgeBackbone):
        @classmethod
        def from_pretrained(cls, *_: Any, **__: Any) -> EdgeBackbone:  # type: ignore[override]
            return backbone

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edge_backbones.integrations.triton_serving.EdgeBackbone", FromPretrained)
        model.initialize(arguments(Path("nowhere"), **configured({"bundle": "bundle"}, spec.outputs)))
    return model


def test_a_model_opens_its_bundle_and_answers(repository):
    model = BackboneModel()
    model.initialize(
        arguments(repository / "pool", **configured({"bundle": "bundle", "threads": "1", "engine": "fp32"}))
    )
    images = noise(3, 3, 32, 48)
    (response,) = model.execute([Request(["pool8", "pool4"], pixel_values=images)])
    assert response.error is None
    for name, expected in zip(("pool4", "pool8"), pooled(images), strict=True):
        np.testing.assert_allclose(response.outputs[name], expected, rtol=1e-5, atol=1e-6)
    model.finalize()
    (response,) = model.execute([Request(["pool4"], pixel_values=images)])
    assert "closed" in str(response.error)


@pytest.mark.parametrize(
    ("parameters", "kind", "outputs", "said"),
    [
        ({"bundle": "elsewhere"}, "CPU", ("pool4",), "is not a bundle: there is no such folder"),
        ({"bundle": "bundle", "engine": "int8"}, "CPU", ("pool4",), "has no engine 'int8'"),
        ({"bundle": "bundle"}, "GPU", ("pool4",), "openvino"),
        ({"bundle": "bundle"}, "CPU", ("pool4", "pool99"), "config.pbtxt names pool99, and"),
    ],
)
def test_a_refusal_is_the_librarys_one_line(repository, parameters, kind, outputs, said):
    with pytest.raises(TritonModelException) as refused:
        BackboneModel().initialize(arguments(repository / "pool", kind, **configured(parameters, outputs)))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_a_damaged_engine_is_refused(repository):
    (engine,) = (repository / "pool/1/bundle/engines").iterdir()
    data = bytearray(engine.read_bytes())
    data[-1] ^= 1
    engine.write_bytes(data)
    with pytest.raises(TritonModelException, match="was changed: SHA-256"):
        BackboneModel().initialize(arguments(repository / "pool", **configured({"bundle": "bundle"})))


def test_an_instance_on_a_gpu_opens_the_bundle_on_that_gpu(monkeypatch):
    asked: dict[str, Any] = {}

    def from_pretrained(path: Path, **options: Any) -> EdgeBackbone:
        asked.update(options, path=path)
        return EdgeBackbone(SPEC, pooling_input(), NumpySession(pooling_input()))

    monkeypatch.setattr(EdgeBackbone, "from_pretrained", from_pretrained)
    given = {"bundle": "/somewhere/else.bundle", "threads": "3", "allow_host_code": "true", "engine": "fp16"}
    BackboneModel().initialize(arguments(Path("/models/pool"), "GPU", **configured(given)))
    assert asked == {
        "path": Path("/somewhere/else.bundle"), "engine": "fp16", "device": "cuda:1", "threads": 3, "allow_host_code": True,
    }  # fmt: skip
    BackboneModel().initialize(arguments(Path("/models/pool"), **configured({"bundle": "bundle"})))
    assert asked == {
        "path": Path("/models/pool/1/bundle"), "engine": None, "device": "cpu", "threads": None, "allow_host_code": False,
    }  # fmt: skip


def test_requests_of_one_size_run_as_one_batch_and_each_gets_its_own():
    sizes = {"height": ShapeRange(min=32, opt=32, max=64), "width": ShapeRange.fixed(48), "size_multiple": 32}
    input = InputSpec(name="pixel_values", channels=3, batch=ShapeRange(min=1, opt=4, max=8), **sizes)
    session = NumpySession(input)
    model = of_session(session)
    batches = [noise(count, 3, height, 48) for count, height in ((2, 32), (1, 64), (1, 32), (3, 32))]
    responses = model.execute([Request(["pool4", "pool8"], pixel_values=images) for images in batches])
    assert session.batches == [6, 1]
    for response, images in zip(responses, batches, strict=True):
        for name, expected in zip(("pool4", "pool8"), pooled(images), strict=True):
            np.testing.assert_array_equal(response.outputs[name], expected)


def test_one_request_is_not_copied():
    seen: list[np.ndarray] = []

    class Session(NumpySession):
        def run(self, array: np.ndarray) -> list[np.ndarray]:
            seen.append(array)
            return super().run(array)

    images = noise(2, 3, 32, 48)
    of_session(Session(pooling_input(2))).execute([Request(["pool4"], pixel_values=images)])
    assert np.shares_memory(seen[0], images)


def test_the_error_of_one_request_is_its_own():
    session = NumpySession(pooling_input(ShapeRange(min=1, opt=4, max=8)))
    model = of_session(session)
    spoilt = noise(1, 3, 32, 48)
    spoilt[0, 0, 0, 0] = np.inf
    good = noise(2, 3, 32, 48)
    inputs = [good, spoilt, noise(1, 3, 32, 32), good]
    responses = model.execute([Request(["pool4"], pixel_values=images) for images in inputs])
    missing = model.execute([Request(["pool4"], other=good), Request(["pool4"], pixel_values=good)])
    assert [response.error is None for response in responses] == [True, False, False, True]
    assert "1 infinite in sample 0" in str(responses[1].error)
    assert "does not fit: this engine takes" in str(responses[2].error)
    assert {response.error.code for response in responses[1:3]} == {TritonError.INVALID_ARG}
    np.testing.assert_array_equal(responses[3].outputs["pool4"], pooled(good)[0])
    assert str(missing[0].error) == "KeyError: 'pixel_values'"
    assert missing[0].error.code == TritonError.INTERNAL
    assert missing[1].error is None


def test_an_engine_that_fails_says_what_and_the_next_request_runs():
    class Session(NumpySession):
        fails = True

        def run(self, array: np.ndarray) -> list[np.ndarray]:
            if self.fails:
                raise RuntimeError("the engine\nbroke")
            return super().run(array)

    session = Session(pooling_input(2))
    model = of_session(session)
    images = noise(2, 3, 32, 48)
    first = model.execute([Request(["pool4"], pixel_values=images)] * 2)
    assert {str(response.error) for response in first} == {"RuntimeError: the engine"}
    session.fails = False
    (second,) = model.execute([Request(["pool4"], pixel_values=images)])
    assert second.error is None


def test_maps_in_channels_last_memory_are_answered_without_a_copy():
    spec = msgspec.structs.replace(SPEC, channels_last=True)

    class Session(NumpySession):
        def run(self, array: np.ndarray) -> list[np.ndarray]:
            return [np.ascontiguousarray(values.transpose(0, 2, 3, 1)) for values in super().run(array)]

    model = of_session(Session(pooling_input(ShapeRange(min=1, opt=2, max=4))), spec)
    batches = [noise(2, 3, 32, 48), noise(1, 3, 32, 48)]
    for response, images in zip(
        model.execute([Request(["pool4", "pool8"], pixel_values=images) for images in batches]), batches, strict=True
    ):
        for values, expected in zip(response.outputs.values(), pooled(images), strict=True):
            np.testing.assert_array_equal(values, expected.transpose(0, 2, 3, 1))


ENCODED = {"name": "photograph", "data_type": "TYPE_STRING"}


def preprocessing(folder: Path, channels: int = 3) -> PreprocessingModel:
    image = ImageConfig(mean=(0.5,) * channels, std=(0.25,) * channels)
    input = msgspec.structs.replace(pooling_input(), channels=channels)
    (folder / "1").mkdir()
    how = Preprocessing(image=image, input=input)
    (folder / "1" / "preprocessing.json").write_bytes(msgspec.json.encode(how))
    model = PreprocessingModel()
    model.initialize(arguments(folder, input=[ENCODED]))
    return model


def test_photographs_become_what_the_backbone_would_make_of_them(tmp_path):
    make_bundle(tmp_path / "pool.bundle")
    model = preprocessing(tmp_path)
    random = np.random.default_rng(0)
    drawn = [random.integers(0, 256, (size, 90, 3), np.uint8) for size in (70, 60)]
    files = []
    for index, picture in enumerate(drawn):
        files.append(tmp_path / f"{index}.png")
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees
        Image.fromarray(picture).save(files[-1], exif=exif)
    data = np.array([[file.read_bytes()] for file in files], object)
    pixels = np.stack([drawn[0]] * 2)
    with EdgeBackbone.from_pretrained(tmp_path / "pool.bundle") as backbone:
        expected = backbone.preprocess(files), backbone.preprocess(list(pixels))
    responses = model.execute([Request([], photograph=data), Request([], photograph=pixels)])
    for response, values in zip(responses, expected, strict=True):
        np.testing.assert_array_equal(response.outputs["pixel_values"], values)


def test_grey_pictures(tmp_path):
    model = preprocessing(tmp_path, channels=1)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 70, 90, 1), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[0, ..., 0]).save(file, "PNG")
    first, second = model.execute(
        [Request([], photograph=pixels), Request([], photograph=np.array([[file.getvalue()]], object))]
    )
    np.testing.assert_array_equal(first.outputs["pixel_values"], second.outputs["pixel_values"])
    assert first.outputs["pixel_values"].shape == (1, 1, 32, 48)


def test_a_picture_that_does_not_decode_is_an_error_of_its_request_alone(tmp_path):
    model = preprocessing(tmp_path)
    pixels = np.zeros((1, 40, 60, 3), np.uint8)
    bad = np.array([[b""], [b"GIF89a"]], object)
    first, second = model.execute([Request([], photograph=bad), Request([], photograph=pixels)])
    assert str(first.error).startswith("images[0]: an image of 0 bytes does not decode as an image: it is empty")
    assert first.error.code == TritonError.INVALID_ARG
    assert second.error is None


def test_a_damaged_preprocessing_file_is_refused(tmp_path):
    preprocessing(tmp_path)
    file = tmp_path / "1" / "preprocessing.json"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(TritonModelException, match=r"preprocessing\.json cannot be read: .*export-triton again"):
        PreprocessingModel().initialize(arguments(tmp_path, input=[ENCODED]))


def test_a_server_without_pillow_refuses_image_files_and_takes_pixels(tmp_path, monkeypatch):
    preprocessing(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(TritonModelException, match=r"reading image files .*needs the 'images' extra"):
        PreprocessingModel().initialize(arguments(tmp_path, input=[ENCODED]))
    PreprocessingModel().initialize(arguments(tmp_path, input=[{**ENCODED, "data_type": "TYPE_UINT8"}]))


def test_what_is_written_as_model_py_is_these_classes(tmp_path):
    make_bundle(tmp_path / "pool.bundle")
    export_triton(tmp_path / "pool.bundle", tmp_path / "models", TritonOptions(ensemble="rgb"))
    for name, kind in (("pool", BackboneModel), ("pool_preprocess", PreprocessingModel)):
        names: dict[str, Any] = {}
        exec((tmp_path / "models" / name / "1" / "model.py").read_text(), names)
        assert names["TritonPythonModel"] is kind
    assert (tmp_path / "models/pool/1/model.py").read_text() == (
        '"""Written by edge-backbones export-triton: the network of a bundle."""\n\n'
        "from edge_backbones.integrations.triton_serving import BackboneModel as TritonPythonModel\n\n"
        '__all__ = ["TritonPythonModel"]\n'
    )


@pytest.mark.parametrize("module", ["triton", "triton_serving"])
def test_neither_the_export_nor_the_server_needs_an_extra(module):
    libraries = [
        "torch",
        "timm",
        "transformers",
        "onnx",
        "onnxruntime",
        "openvino",
        "PIL",
        "typer",
        "google",
        "tritonclient",
    ]
    require_import_without(f"edge_backbones.integrations.{module}", libraries)
