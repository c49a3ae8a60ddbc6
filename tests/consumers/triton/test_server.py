"""A real Triton server serves what export-triton wrote: feature maps equal those of EdgeBackbone to the last bit."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_backbones import Bundle, EdgeBackbone
from edge_backbones.integrations.triton import TritonOptions, export_triton
from tests.consumers.triton.server import WHERE_IT_RUNS, Call, Server, ask, serving

pytestmark = WHERE_IT_RUNS
PROTOCOLS = ("http", "grpc")


@pytest.fixture(scope="module")
def repository(bundles: dict[str, Bundle], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "models"
    export_triton(bundles["net"].path, folder, TritonOptions(engine="int8", ensemble="encoded", threads=1))
    export_triton(bundles["camera"].path, folder, TritonOptions(ensemble="rgb", threads=1, instances=2))
    export_triton(bundles["sizes"].path, folder, TritonOptions(reference=True, threads=1, stages=("layer2", "layer4")))
    export_triton(bundles["frames"].path, folder, TritonOptions(ensemble="encoded", warmup=False))
    export_triton(bundles["net"].path, folder, TritonOptions(name="damaged"))
    for engine in (folder / "damaged/1/bundle/engines").iterdir():
        data = bytearray(engine.read_bytes())
        data[len(data) // 2] ^= 1
        engine.write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(repository, tmp_path_factory.mktemp("server")) as running:
        yield running
        assert running.is_alive(), running.said()[-4000:]


def expected(bundle: Bundle, images: np.ndarray, engine: str | None = None) -> dict[str, np.ndarray]:
    with EdgeBackbone.from_pretrained(bundle.path, engine=engine, threads=1) as backbone:
        return backbone.run(images)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape[0]).standard_normal(shape).astype(np.float32)


def assert_same(answer: object, maps: dict[str, np.ndarray]) -> None:
    assert isinstance(answer, dict), answer
    assert sorted(answer) == sorted(maps)
    for name, values in maps.items():
        assert answer[name].dtype == values.dtype
        np.testing.assert_array_equal(answer[name], values)


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def pictures(count: int, height: int = 150, width: int = 220) -> list[np.ndarray]:
    random = np.random.default_rng(7)
    return [random.integers(0, 256, (height + 10 * i, width, 3), np.uint8) for i in range(count)]


def test_every_model_but_the_damaged_one_is_ready(server):
    names = (
        "net",
        "net_preprocess",
        "net_ensemble",
        "camera",
        "camera_preprocess",
        "camera_ensemble",
        "sizes",
        "frames",
    )
    assert [name for name in names if not server.is_ready(name)] == []
    assert not server.is_ready("damaged")
    assert server.models()["damaged"] == "UNAVAILABLE"


def test_the_log_has_the_reason_against_a_damaged_engine_in_one_line(server):
    (line,) = [line for line in server.said().splitlines() if "failed to load 'damaged' version 1" in line]
    assert ".blob" in line
    assert "copy the bundle again or build it again" in line


@pytest.mark.parametrize("batch", [1, 3])
def test_maps_equal_those_of_edge_backbone(server, bundles, tmp_path, batch):
    images = noise(batch, 3, 64, 96)
    maps = expected(bundles["net"], images, "int8")
    groups = ask(server, tmp_path, *([Call("net", {"pixel_values": images}, protocol=name)] for name in PROTOCOLS))
    for (answer,) in groups:
        assert_same(answer, maps)


def test_a_client_gets_the_outputs_that_it_asks_for(server, bundles, tmp_path):
    images = noise(1, 3, 64, 96)
    ((answer,),) = ask(server, tmp_path, [Call("net", {"pixel_values": images}, ["layer3", "layer1"])])
    maps = expected(bundles["net"], images, "int8")
    assert_same(answer, {name: maps[name] for name in ("layer1", "layer3")})


def test_images_in_float16_and_channels_last_maps(server, bundles, tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (1, 64, 96, 3), np.uint8)
    maps = {name: values.transpose(0, 2, 3, 1) for name, values in expected(bundles["camera"], images).items()}
    for (answer,) in ask(server, tmp_path, *([Call("camera", {"image": images}, protocol=name)] for name in PROTOCOLS)):
        assert_same(answer, maps)
        assert all(values.dtype == np.float16 for values in answer.values())


def test_sizes_vary_and_the_bundle_stays_where_it_is(server, bundles, tmp_path):
    for shape in ((2, 3, 64, 160), (2, 3, 128, 96), (1, 3, 96, 128)):
        images = noise(*shape)
        maps = expected(bundles["sizes"], images)
        ((answer,),) = ask(server, tmp_path, [Call("sizes", {"pixel_values": images}, protocol="grpc")])
        assert_same(answer, {name: maps[name] for name in ("layer2", "layer4")})


def test_many_clients_at_once_each_get_their_own_maps(server, bundles, tmp_path):
    batches = [noise(count, 3, 64, 96) for count in (1, 2, 3, 1, 2)]
    spoilt = noise(1, 3, 64, 96)
    spoilt[0, 0, 5, 5] = np.nan
    calls = [Call("net", {"pixel_values": images}) for images in (*batches, spoilt)]
    (answers,) = ask(server, tmp_path, calls)
    for answer, images in zip(answers[:-1], batches, strict=True):
        assert isinstance(answer, dict), answer
        for name, values in expected(bundles["net"], images, "int8").items():
            np.testing.assert_allclose(answer[name], values, rtol=1e-5, atol=1e-5)
    assert "1 NaN in sample 0" in answers[-1]


def test_an_ensemble_takes_image_files(server, bundles, tmp_path, photographs):
    files = sorted(photographs.iterdir())[:2]
    drawn = [tmp_path / "a.png", tmp_path / "b.png"]
    for file, picture in zip(drawn, pictures(2), strict=True):
        file.write_bytes(png(picture))
    with EdgeBackbone.from_pretrained(bundles["net"].path, engine="int8", threads=1) as backbone:
        for chosen in (files[:1], [*files, drawn[0]], drawn):
            maps = backbone.run(backbone.preprocess(chosen))
            data = np.array([[file.read_bytes()] for file in chosen], object)
            for (answer,) in ask(
                server, tmp_path, *([Call("net_ensemble", {"photograph": data}, protocol=name)] for name in PROTOCOLS)
            ):
                assert_same(answer, maps)


def test_an_ensemble_takes_pixels(server, bundles, tmp_path):
    (picture,) = pictures(1)
    with EdgeBackbone.from_pretrained(bundles["camera"].path, threads=1) as backbone:
        maps = backbone.run(backbone.preprocess(picture))
    ((answer,),) = ask(server, tmp_path, [Call("camera_ensemble", {"photograph": picture[None]})])
    assert_same(answer, {name: values.transpose(0, 2, 3, 1) for name, values in maps.items()})


def test_frames_of_a_camera(server, bundles, tmp_path):
    frame = np.random.default_rng(2).integers(0, 256, (1, 180, 160, 1), np.uint8)
    ((answer,),) = ask(server, tmp_path, [Call("frames", {"frame": frame})])
    with EdgeBackbone.from_pretrained(bundles["frames"].path) as backbone:
        assert_same(answer, backbone.run(frame))


def test_requests_that_do_not_fit_are_answered_and_the_server_lives(server, tmp_path):
    images = noise(1, 3, 64, 96)
    groups = ask(
        server,
        tmp_path,
        [Call("net", {"pixel_values": images}, ["layer9"])],
        [Call("net", {"pixel_values": images.astype(np.float64)})],
        [Call("net", {"pixel_values": noise(1, 3, 64, 64)})],
        [Call("net", {"pixel_values": noise(5, 3, 64, 96)})],
        [Call("sizes", {"pixel_values": noise(1, 3, 64, 97)})],
        [Call("net_ensemble", {"photograph": np.array([[b"no image"]], object)})],
        [Call("camera_ensemble", {"photograph": np.zeros((1, 4, 4, 4), np.uint8)})],
    )
    said = (
        "unexpected inference output 'layer9'", "expects 'FP32'", "unexpected shape", "batch-size must be <= 4",
        "pixel_values of shape (1, 3, 64, 97) does not fit", "images[0]: an image of 8 bytes does not decode as an image",
        "unexpected shape",
    )  # fmt: skip
    for (answer,), words in zip(groups, said, strict=True):
        assert isinstance(answer, str), words
        assert words in answer
    ((answer,),) = ask(server, tmp_path, [Call("net", {"pixel_values": images})])
    assert isinstance(answer, dict)


def test_the_golden_samples_are_computed_before_a_model_is_ready(server):
    warmed = {line.split("instance ")[1] for line in server.said().splitlines() if "is running warmup sample" in line}
    samples = {text.split("_0_")[0] + ":" + text.split("'")[1] for text in warmed}
    assert samples == {
        "net:golden opt", "camera:golden opt", "sizes:golden min", "sizes:golden opt", "sizes:golden max",
    }  # fmt: skip
    assert len(warmed) == len(samples) + 1  # camera has two instances
