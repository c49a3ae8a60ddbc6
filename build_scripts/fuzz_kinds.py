"""Every kind of file that a stranger may hand over: a good one to damage, and what reads it."""

from __future__ import annotations

import copy
import io
import json
import random
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from build_scripts.fuzz_damage import damaged_bytes, damaged_document, sealed
from edge_backbones.bench import results
from edge_backbones.bundle.manifest import CalibrationFile
from edge_backbones.bundle.onnx_gate import graph_fault
from edge_backbones.bundle.reader import Bundle, load_golden
from edge_backbones.bundle.writer import record_bytes
from edge_backbones.engines.openvino.session import OpenVinoSession, compile_model, read_model
from edge_backbones.engines.refusals import refusals
from edge_backbones.images.config import ImageConfig
from edge_backbones.machine.profiles import explain, load_profile
from edge_backbones.spec import Precision
from edge_backbones.testing import make_bundle
from edge_backbones.toolchain.calibration.calibrate import read_calibration

_PROFILES = ("jetson-agx-orin", "rtx-40", "cpu")
_MATRIX = b"""out = "bundles"
images = "photographs"
precisions = ["int8", "fp16"]
[[models]]
source = "resnet18"
name = "r"
[models.options]
out_indices = [1, 2]
weights = "random:0"
height = 64
width = 64
batch = { min = 1, opt = 2, max = 4 }
gates = { int8 = { min_sqnr_db = 12.0 } }
[[devices]]
profile = "cpu"
[[devices]]
profile = "rtx-40"
name = "card"
resource = "x"
"""


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    ``damaged``: returns the bytes of a case. ``use``: reads them, and may raise errors of ours.
    """

    damaged: Callable[[random.Random], bytes]
    use: Callable[[bytes], object]


def kinds(folder: Path) -> dict[str, Kind]:
    """Return every kind of file, with good ones in ``folder`` to damage."""
    bundle = make_bundle(folder / "net.bundle")
    return {
        "manifests": _manifests(bundle),
        "golden": _golden(bundle),
        "graphs": Kind(_graph_damage(), _use_graph),
        "blobs": _blobs(bundle),
        "profiles": _profiles(folder),
        "bench": _bench(),
        "calibration": _calibration(folder),
        "matrix": _matrix(folder),
    }


def _manifests(bundle: Bundle) -> Kind:
    from edge_backbones import EdgeBackbone

    place = bundle.path / "manifest.json"
    good = place.read_bytes()
    document = json.loads(good)

    def damage(draw: random.Random) -> bytes:
        if draw.random() < 0.3:
            return damaged_bytes(good, draw, text=True)
        return sealed(damaged_document(document, draw))

    def use(data: bytes) -> None:
        place.write_bytes(data)
        opened = Bundle.open(bundle.path)
        assert opened.manifest.preprocessing
        opened.check_files()
        load_golden(opened)
        with EdgeBackbone.from_pretrained(bundle.path) as backbone:
            shape = opened.manifest.input.opt_shape
            if max(shape) <= 4096:
                backbone(np.zeros(shape, opened.manifest.input.dtype))

    return Kind(damage, use)


def _golden(bundle: Bundle) -> Kind:
    place = bundle.path / "golden.npz"
    good = place.read_bytes()
    with np.load(place) as archive:
        arrays = dict(archive)

    def damage(draw: random.Random) -> bytes:
        if draw.random() < 0.6:
            return damaged_bytes(good, draw, text=draw.random() < 0.5)
        chosen = {key: array for key, array in arrays.items() if draw.random() < 0.9}
        for key in list(chosen):
            change = draw.randrange(12)
            if change < 3:
                chosen[key] = (chosen[key].astype(">f4"), chosen[key].T, chosen[key][..., :0])[change]
            elif change == 3:
                chosen[key] = np.zeros(draw.choice(((), (0,), (2,), (1,) * 20)), draw.choice(("f4", "u1", "c16", "S3")))
            elif change == 4:
                chosen[key[:-1]] = chosen.pop(key)
        buffer = io.BytesIO()
        (np.savez_compressed if draw.random() < 0.1 else np.savez)(buffer, **chosen)
        if draw.random() < 0.2:
            with zipfile.ZipFile(buffer, "a") as archive:
                archive.writestr(
                    draw.choice(("opt/extra.npy", "../x", "opt/pool4.npy/", "opt/pool4.npy#")),
                    b"x" * draw.randrange(99),
                )
        return buffer.getvalue()

    def use(data: bytes) -> None:
        place.write_bytes(data)
        record = msgspec.structs.replace(bundle.manifest.golden, file=record_bytes("golden.npz", data))
        load_golden(Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, golden=record)))

    return Kind(damage, use)


def _graph_damage() -> Callable[[random.Random], bytes]:
    from onnx import TensorProto, helper, numpy_helper

    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 16, 16])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 8, 8])
    weights = {
        "w": np.ones((4, 3, 3, 3), np.float32),
        "scale": np.array(0.1, np.float32),
        "zero": np.array(0, np.int8),
        "shape": np.array([1, 4, 8, 8], np.int64),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], "d"),
        helper.make_node("Conv", ["d", "w"], ["c"], "conv", strides=[2, 2], pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        helper.make_node("Constant", [], ["one"], "one", value=numpy_helper.from_array(np.ones(1, np.float32))),
        helper.make_node("Add", ["c", "one"], ["a"], "add"),
        helper.make_node("Reshape", ["a", "shape"], ["y"], "reshape"),
    ]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "net", [image], [result], tensors)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])
    good = model.SerializeToString()

    def damage(draw: random.Random) -> bytes:
        if draw.random() < 0.5:
            return damaged_bytes(good, draw, text=False)
        changed = copy.deepcopy(model)
        for _ in range(draw.choice((1, 1, 2))):
            tensor = draw.choice(changed.graph.initializer)
            node = draw.choice(changed.graph.node)
            match draw.randrange(8):
                case 0:
                    tensor.dims[:] = [
                        draw.choice((*tensor.dims, 0, 1, -1, 2**31, 2**62)) for _ in range(draw.randrange(6))
                    ]
                case 1:
                    tensor.data_type = draw.randrange(30)
                case 2:
                    tensor.raw_data = draw.randbytes(draw.choice((0, 1, 8, 432)))
                case 3:
                    tensor.data_location = TensorProto.EXTERNAL
                    for key, value in {
                        "location": draw.choice(("/etc/passwd", "*/_ORT_MEM_ADDR_/*")),
                        "offset": "64",
                    }.items():
                        tensor.external_data.add(key=key, value=value)
                case 4 if node.attribute:
                    one = draw.choice(node.attribute)
                    one.ints[:] = [draw.choice((-1, 0, 1, 3, 2**31, 2**62)) for _ in range(draw.randrange(5))]
                case 5 if node.input:
                    node.input[draw.randrange(len(node.input))] = draw.choice(("x", "w", "y", "shape", ""))
                case 6:
                    node.op_type = draw.choice(("Conv", "MatMul", "Reshape", "If", "Loop", "Tile", "Gather", "x"))
                case _:
                    raw = np.array([draw.choice((0, -1, 1, 4, 2**31, 2**62)) for _ in range(4)], np.int64).tobytes()
                    changed.graph.initializer[3].raw_data = raw
        return bytes(changed.SerializeToString())

    return damage


def _use_graph(data: bytes) -> None:
    if graph_fault(data) is None:
        compile_model(read_model(data))


def _blobs(bundle: Bundle) -> Kind:
    good = bytes(bundle.read(bundle.manifest.engines[0].file))
    text = max(good.find(b"<?xml"), 0)
    images = np.zeros(bundle.manifest.input.opt_shape, np.float32)

    def damage(draw: random.Random) -> bytes:
        head = good[:text] if draw.random() < 0.5 else b""
        return head + damaged_bytes(good[len(head) :], draw, text=draw.random() < 0.5)

    def use(data: bytes) -> None:
        session = OpenVinoSession(bytearray(data), outputs=bundle.manifest.backbone.outputs)
        try:
            session.run(images)
        finally:
            session.close()

    return Kind(damage, use)


def _profiles(folder: Path) -> Kind:
    place = Path(__file__).parents[1] / "profiles"
    good = {name: (place / f"{name}.toml").read_bytes() for name in _PROFILES}
    chosen = ["cpu"]
    input = make_bundle(folder / "profiled.bundle").manifest.input

    def damage(draw: random.Random) -> bytes:
        chosen[0] = draw.choice(_PROFILES)
        return damaged_bytes(good[chosen[0]], draw, text=True)

    def use(data: bytes) -> None:
        path = folder / f"{chosen[0]}.toml"
        path.write_bytes(data)
        profile = load_profile(path)
        explain(profile)
        refusals(profile, precision=Precision.INT8, flavour="tensorrt", input=input)

    return Kind(damage, use)


def comparison() -> results.Comparison:
    """Return a result of `edge-backbones bench` with two contenders that ran and one that did not."""
    machine = results.MeasuredMachine(
        name="m", architecture="x86_64", cpu_features=("avx2",), cores=2, memory_bytes=1 << 33, system="Linux",
        python="3.11", gpu=None, settings={"governor": "performance"}, commit=None,
    )  # fmt: skip
    ran = [
        results.Measurement(
            name=name, what="w", turns=(ms, ms * 1.1), median_ms=ms, fastest_ms=ms, p90_ms=ms, p99_ms=ms, jitter=0.1,
            calls=10, images_per_second=1e3 / ms, load_s=0.1, first_call_ms=9.0, resident_mb=50.0, file_mb=4.0,
        )
        for name, ms in (("engine", 5.0), ("torch", 9.0))
    ]  # fmt: skip
    missing = results.Measurement(name="nncf", what="w", missing="not installed")
    ratio = results.Ratio(name="torch", median=1.8, low=1.7, high=1.9, turns=6)
    return results.Comparison(
        bundle="b", engine="e", precision="int8", input_shape=(1, 3, 64, 64), threads=2, device="cpu", date="2026-11-30",
        machine=machine, measurements=(*ran, missing), ratios=(ratio,),
    )  # fmt: skip


def _bench() -> Kind:
    from edge_backbones.report.charts import compare_peers

    now = comparison()
    good = results.encode(now)

    def use(data: bytes) -> None:
        found = results.decode(data, "bench.json")
        compare_peers(found)
        results.regressions(now, found)
        results.encode(found)

    return Kind(lambda draw: damaged_bytes(good, draw, text=True), use)


def _calibration(folder: Path) -> Kind:
    names = [f"layer{i}" for i in range(4)]
    good = msgspec.json.encode(
        CalibrationFile(
            network_sha256="0" * 64, data_sha256="1" * 64, preprocessing=ImageConfig(mean=(0.5,) * 3, std=(0.25,) * 3),
            method="auto", percentile=99.99, chosen=dict.fromkeys(names, "max"), images=("a.jpg", "b.jpg"), held_out=1,
            skipped=(), silent=(), factors={names[0]: (1.0, 2.0)}, ranges=dict.fromkeys(names, 3.5),
            largest=dict.fromkeys(names, 4.5), shifts={names[1]: (-0.5, 0.25)}, large=(),
            centres={names[2]: 0.5}, rounding={names[3]: b"rounded"},
        )
    )  # fmt: skip
    path = folder / "calibration.json"

    def use(data: bytes) -> None:
        path.write_bytes(data)
        read_calibration(path)

    return Kind(lambda draw: damaged_bytes(good, draw, text=True), use)


def _matrix(folder: Path) -> Kind:
    from build_scripts.matrix_cells import build_options
    from build_scripts.matrix_tasks import read_matrix, tasks_of

    path = folder / "matrix.toml"

    def use(data: bytes) -> None:
        path.write_bytes(data)
        for task, _ in tasks_of(read_matrix(path), folder):
            build_options(task)

    return Kind(lambda draw: damaged_bytes(_MATRIX, draw, text=True), use)
