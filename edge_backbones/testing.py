"""Test doubles for programs that use this package: a small bundle and a session, without a download or torch.

Their backbone is average pooling, so every expected value is known: stage ``pool4`` is the input averaged over 4 x 4
pixels, ``pool8`` over 8 x 8.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_backbones.bundle.golden import GoldenSamples
from edge_backbones.bundle.manifest import EngineRecord, Provenance, Source
from edge_backbones.bundle.reader import Bundle
from edge_backbones.bundle.writer import BundleWriter, new_bundle
from edge_backbones.deploy.parity import compare
from edge_backbones.engines.openvino.compile import engine_key
from edge_backbones.engines.openvino.session import compile_model, load_library
from edge_backbones.engines.promises import DEFAULT_GATES
from edge_backbones.images.config import ImageConfig
from edge_backbones.parity_report import ParityReport
from edge_backbones.spec import BackboneSpec, InputSpec, Precision, ShapeRange

SPEC = BackboneSpec(
    stage_names=("pool2", "pool4", "pool8"),
    out_features=("pool4", "pool8"),
    out_indices=(1, 2),
    channels=(3, 3),
    strides=((4, 4), (8, 8)),
    num_features=(3, 3, 3),
    layouts=("NCHW", "NCHW"),
)


def pooling_input(batch: ShapeRange | int = 2, height: int = 32, width: int = 48) -> InputSpec:
    """Return the input of the pooling backbone: float32 NCHW of fixed height and width."""
    batch = batch if isinstance(batch, ShapeRange) else ShapeRange.fixed(batch)
    sizes = ShapeRange.fixed(height), ShapeRange.fixed(width)
    return InputSpec(name="pixel_values", channels=3, batch=batch, height=sizes[0], width=sizes[1])


def pooled(pixel_values: np.ndarray) -> list[np.ndarray]:
    """Compute the pooling backbone in numpy: float32 NCHW maps of pool4 and pool8."""
    batch, channels, height, width = pixel_values.shape
    return [
        pixel_values.reshape(batch, channels, height // k, k, width // k, k).mean(axis=(3, 5)).astype(np.float32)
        for k in (4, 8)
    ]


class NumpySession:
    """An EngineSession in numpy. ``batches`` records the batch size of every call."""

    def __init__(self, input: InputSpec) -> None:
        self.input = input
        self.batches: list[int] = []
        self.closed = False

    def run(self, array: np.ndarray) -> list[np.ndarray]:
        """Return the maps of a batch; raise AssertionError for a batch that the input does not allow."""
        if len(array) not in self.input.batch:
            raise AssertionError(f"batch {len(array)} is outside {self.input.batch}")
        self.batches.append(len(array))
        return pooled(array)

    def close(self) -> None:
        """Note that the session was closed."""
        self.closed = True


def make_bundle(target: Path, input: InputSpec | None = None) -> Bundle:
    """Write a bundle of the pooling backbone with an engine for this CPU. Needs OpenVINO and nothing else."""
    input = input or pooling_input()
    graph = b"the pooling backbone has no ONNX graph"
    blob = _pooling_blob(input)
    key = engine_key(graph, Precision.FP32)
    images = np.random.default_rng(0).standard_normal((2, *input.opt_shape[1:])).astype(np.float32)
    maps = dict(zip(SPEC.out_features, pooled(images), strict=True))
    gate = DEFAULT_GATES[Precision.FP32]
    stages = tuple(compare(stage, feature_map, feature_map, gate) for stage, feature_map in maps.items())
    with new_bundle(target) as folder:
        writer = BundleWriter(folder)
        engine = EngineRecord(
            key=key,
            file=writer.add_file(key.path(blob, ".blob"), blob),
            parity=ParityReport(precision=Precision.FP32, gate=gate, stages=stages),
        )
        samples = GoldenSamples(input.name, {"opt": images}, {"opt": maps})
        writer.finish(
            backbone=SPEC,
            input=input,
            image=ImageConfig(mean=(0.5,) * 3, std=(0.25,) * 3),
            source=Source(library="timm", name="average_pooling", weights="random", seed=0),
            graphs=(),
            engines=(engine,),
            golden=writer.add_golden(samples, images=("noise 0", "noise 1")),
            calibration=None,
            decision=None,
            provenance=Provenance(created="2026-01-01T00:00:00+00:00", versions={}),
        )
    return Bundle.open(target)


def _pooling_blob(input: InputSpec) -> bytes:
    openvino = load_library()
    ops = openvino.opset13
    batch = openvino.Dimension(input.batch.min, input.batch.max)
    parameter = ops.parameter(openvino.PartialShape([batch, *input.opt_shape[1:]]), np.float32, name="pixel_values")
    results = []
    for stage, k in zip(SPEC.out_features, (4, 8), strict=True):
        pool = ops.avg_pool(parameter, [k, k], [0, 0], [0, 0], [k, k], exclude_pad=True)
        pool.output(0).get_tensor().set_names({stage})
        results.append(ops.result(pool))
    return compile_model(openvino.Model(results, [parameter], "average_pooling"))
