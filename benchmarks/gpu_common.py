"""What the modules of the GPU suite share: constants, the error for what is missing, and the networks."""

from __future__ import annotations

import functools
import importlib.util
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_needs import is_installed  # isort: skip (it ends the program where numpy or msgspec is missing)

import numpy as np

from benchmarks.gpu_kernels import on_standin
from edge_backbones.errors import MissingDependencyError

TENSORRT = ("tensorrt", "tensorrt_rtx")
# Kept stages by network; the first is measured always, the others while time is left.
MODELS = {
    "resnet50": (1, 2, 3, 4),
    "mobilenetv3_large_100": (0, 1, 2, 3, 4),
    "vit_small_patch16_224": (2, 5, 8, 11),
}
SIZE = 224
PIPELINED = 20
BATCHES = (1, 32)
LARGEST_BATCH = 32


def patience(gpu: Any) -> float:
    """Return how many times as long as on a server something may take; ``gpu``: as the driver describes it, or None.

    A Jetson compiles and copies several times slower.
    """
    return 4.0 if gpu is not None and gpu.integrated else 1.0


class MissingError(Exception):
    """Something that a part needs is missing, such as a library or time: the part is not run."""


@functools.cache
def why_no_torch() -> str:
    """Return why torch cannot use a GPU here, without importing it; empty if it should be able to."""
    if not is_installed("torch"):
        return "torch is not installed"
    if on_standin():
        return "the driver is a stand-in, which torch cannot use"
    spec = importlib.util.find_spec("torch")
    folders = (spec.submodule_search_locations if spec is not None else None) or ()
    for folder in map(Path, folders):
        if (folder / "version.py").is_file():
            version = runpy.run_path(str(folder / "version.py"))
            if version.get("cuda") is None:
                return f"torch {version.get('__version__')} was built without CUDA"
    return ""


def require_torch() -> None:
    """Raise MissingError if torch cannot use a GPU here."""
    if reason := why_no_torch():
        raise MissingError(reason)


def require_tensorrt(flavour: str) -> Any:
    """Return TensorRT's module. Raises MissingError if it is not installed."""
    from edge_backbones.engines.tensorrt.library import load_library

    if on_standin():
        raise MissingError(f"the driver is a stand-in, which {flavour} cannot use")
    try:
        return load_library(flavour)  # type: ignore[arg-type]
    except MissingDependencyError as error:
        raise MissingError(str(error)) from error


def trained_like(model: str, out_indices: Sequence[int] | None = None, seed: int = 0) -> Any:
    """Return a timm backbone (LoadedBackbone) with seeded weights and batch norms like those of a trained network.

    Untouched batch norm (mean 0, variance 1, scale 1) would hide a wrong fold, and its activations grow from block to
    block as in no trained network.
    """
    import torch

    from edge_backbones.toolchain.sources.base import SourceOptions
    from edge_backbones.toolchain.sources.timm import load_timm

    indices = None if out_indices is None else tuple(out_indices)
    loaded = load_timm(model, SourceOptions(weights=f"random:{seed}", out_indices=indices))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in loaded.module.modules():
            if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm) and norm.track_running_stats:
                norm.running_mean.normal_(0, 0.3, generator=generator)
                norm.running_var.uniform_(0.5, 2, generator=generator)
                norm.weight.uniform_(-0.3, 1.4, generator=generator)
                norm.bias.normal_(0, 0.3, generator=generator)
    return loaded


def fixed_input(batch: int, height: int, width: int) -> Any:
    from edge_backbones.spec import InputSpec, ShapeRange

    return InputSpec(
        name="pixel_values",
        channels=3,
        batch=ShapeRange.fixed(batch),
        height=ShapeRange.fixed(height),
        width=ShapeRange.fixed(width),
    )


def pooling_input(largest: int = 256, batch: tuple[int, int, int] = (1, 2, LARGEST_BATCH)) -> Any:
    """Return the input of the pooling backbone: 1 to 32 images of 32 to ``largest`` pixels in steps of 8.

    ``batch``: smallest, usual and largest.
    """
    from edge_backbones.spec import InputSpec, ShapeRange

    size = ShapeRange(min=32, opt=64, max=largest)
    return InputSpec(
        name="pixel_values",
        channels=3,
        batch=ShapeRange(min=batch[0], opt=batch[1], max=batch[2]),
        height=size,
        width=size,
        size_multiple=8,
    )


def pooling_onnx(bundles: Path | None = None) -> bytes:
    """Return the ONNX graph of the pooling backbone of edge_backbones.testing, for any batch and size."""
    if bundles is not None and (bundles / "pooling.onnx").is_file():
        return (bundles / "pooling.onnx").read_bytes()
    try:
        from onnx import TensorProto, helper
    except ModuleNotFoundError as error:
        raise MissingError("onnx is not installed, and --bundles has no pooling.onnx") from error
    stages = (("pool4", 4), ("pool8", 8))
    nodes = [
        helper.make_node("AveragePool", ["pixel_values"], [stage], kernel_shape=[k, k], strides=[k, k])
        for stage, k in stages
    ]
    axes = ["batch", 3, "height", "width"]
    inputs = [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, axes)]
    outputs = [
        helper.make_tensor_value_info(stage, TensorProto.FLOAT, ["batch", 3, f"height{k}", f"width{k}"])
        for stage, k in stages
    ]
    graph = helper.make_graph(nodes, "average_pooling", inputs, outputs)
    model: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()
    return model


def convolved_pooling_onnx() -> bytes:
    """Return the ONNX graph of the pooling backbone as convolutions: a graph with weights, whose maps are known.

    Each output channel averages the patch of its own input channel; the weights of the other channels are 0.
    """
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ModuleNotFoundError as error:
        raise MissingError("onnx is not installed") from error
    nodes, weights, outputs = [], [], []
    for stage, k in (("pool4", 4), ("pool8", 8)):
        weight = np.zeros((3, 3, k, k), np.float32)
        weight[range(3), range(3)] = 1 / k**2
        weights.append(numpy_helper.from_array(weight, f"{stage}_weight"))
        nodes.append(helper.make_node("Conv", ["pixel_values", f"{stage}_weight"], [stage], strides=[k, k], name=stage))
        shape: list[str | int | None] = ["batch", 3, f"height{k}", f"width{k}"]
        outputs.append(helper.make_tensor_value_info(stage, TensorProto.FLOAT, shape))
    axes: list[str | int | None] = ["batch", 3, "height", "width"]
    inputs = [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, axes)]
    graph = helper.make_graph(nodes, "convolved_pooling", inputs, outputs, weights)
    model: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()
    return model


def pooling_module() -> Any:
    """Return the pooling backbone in torch."""
    import torch

    class Pooling(torch.nn.Module):
        def forward(self, pixels: Any) -> Any:
            return tuple(torch.nn.functional.avg_pool2d(pixels, k) for k in (4, 8))

    return Pooling().eval()


def cosine(expected: Sequence[np.ndarray], actual: Sequence[np.ndarray]) -> float:
    """Return the smallest cosine over all maps; NaN for values that are not finite."""
    found = []
    for reference, value in zip(expected, actual, strict=True):
        a, b = (array.astype(np.float64).ravel() for array in (reference, value))
        found.append(float(a @ b / np.sqrt((a @ a) * (b @ b))))
    return float(np.min(found))  # NaN where one of them is
