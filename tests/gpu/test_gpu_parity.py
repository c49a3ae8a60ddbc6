"""Feature maps of real networks, by every kind of engine, against the same network in fp32 on the CPU."""

from __future__ import annotations

import shutil

import gpu_engines
import numpy as np
import pytest

from benchmarks import gpu_common, gpu_prepare
from edge_backbones.machine.gpus import find_gpus

SIZES = ((96, 96), (64, 160))  # one of them not square
BATCHES = (1, 32)


def reference(model, out_size):
    """A network with trained-like statistics, its input and its fp32 maps on the CPU; the module is prepared for export."""
    import torch

    from edge_backbones.toolchain.prepare import prepare

    batch, height, width = out_size
    loaded = gpu_common.trained_like(model)
    prepared = prepare(loaded, gpu_common.fixed_input(batch, height, width))
    images = np.random.default_rng(0).standard_normal((batch, 3, height, width)).astype(np.float32)
    with torch.inference_mode():
        expected = [m.numpy() for m in loaded.module(torch.from_numpy(images))]
    return prepared, images, expected


def check(session, prepared, images, expected, precision):
    """Through EdgeBackbone; every map inside the gate that bundles of this precision have."""
    from edge_backbones import EdgeBackbone
    from edge_backbones.deploy.parity import compare
    from edge_backbones.engines.promises import DEFAULT_GATES

    with EdgeBackbone(prepared.spec, prepared.input, session, device="cuda") as backbone:
        maps = backbone(images).feature_maps
    stages = [
        compare(name, reference_map, actual, DEFAULT_GATES[precision])
        for name, reference_map, actual in zip(prepared.spec.out_features, expected, maps, strict=True)
    ]
    assert all(stage.passed for stage in stages), stages


def sizes_of(model):
    return ((160, 160),) if "vit" in model else SIZES


CASES = [
    pytest.param(model, (batch, *size), id=f"{model}-{batch}x{size[0]}x{size[1]}")
    for model in gpu_prepare.PARITY_MODELS
    for batch in BATCHES
    for size in sizes_of(model)
]


@gpu_engines.needs("torchscript", "timm")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("model", "shape"), CASES)
def test_torchscript(gpu, model, shape, precision):
    from edge_backbones.engines.torch.session import TorchScriptSession
    from edge_backbones.spec import Precision
    from edge_backbones.toolchain.trace import trace_torchscript

    prepared, images, expected = reference(model, shape)
    data = trace_torchscript(prepared.module, prepared.input, Precision(precision))
    session = TorchScriptSession(data, input=prepared.input, outputs=prepared.spec.outputs, device=f"cuda:{gpu}")
    check(session, prepared, images, expected, Precision(precision))


@gpu_engines.needs("torch_tensorrt", "timm")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("model", "shape"), CASES)
def test_torch_tensorrt(gpu, model, shape, precision):
    from edge_backbones.engines.torch.session import TorchScriptSession
    from edge_backbones.spec import Precision
    from edge_backbones.toolchain.torch_tensorrt import compile_torch_tensorrt

    prepared, images, expected = reference(model, shape)
    data = compile_torch_tensorrt(prepared.module, prepared.input, precision=Precision(precision), device=f"cuda:{gpu}")
    session = TorchScriptSession(data, input=prepared.input, outputs=prepared.spec.outputs, device=f"cuda:{gpu}")
    check(session, prepared, images, expected, Precision(precision))


@pytest.mark.parametrize("flavour", gpu_engines.each(("tensorrt", "tensorrt_rtx")))
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("model", gpu_prepare.PARITY_MODELS)
def test_plans_of_prepared_bundles(gpu, bundles, tmp_path, flavour, model, precision):
    """Compiled on this GPU for a range of sizes and for batches from 1 to 32; golden maps are those of the fp32 network."""
    from edge_backbones import Bundle, EdgeBackbone, compile_bundle
    from edge_backbones.bundle.reader import load_golden
    from edge_backbones.deploy.parity import compare
    from edge_backbones.machine.profiles import FIRST_ARCHITECTURE

    needed = FIRST_ARCHITECTURE.get(precision, 0)
    if int(find_gpus()[gpu].architecture.removeprefix("sm_")) < needed:
        pytest.skip(f"{find_gpus()[gpu].name} has no {precision}, which came with sm_{needed}")
    if flavour == "tensorrt_rtx" and gpu_engines.rtx_refusal(gpu):
        pytest.skip(gpu_engines.rtx_refusal(gpu))
    if bundles is None or not (bundles / f"parity-{model}-{precision}.bundle").is_dir():
        pytest.skip(f"parity-{model}-{precision}.bundle was not prepared: benchmarks.gpu_suite --prepare")
    folder = tmp_path / "copy.bundle"
    shutil.copytree(bundles / f"parity-{model}-{precision}.bundle", folder)
    (record,) = compile_bundle(folder, flavour=flavour, gpu=gpu).engines
    assert record.parity.passed  # golden batches, at the smallest, usual and largest size
    golden = load_golden(Bundle.open(folder))
    for case in golden.cases:
        with EdgeBackbone.from_pretrained(folder, engine=record.name, device=f"cuda:{gpu}") as backbone:
            images = golden.inputs[case]
            for batch in BATCHES:
                maps = backbone(np.resize(images, (batch, *images.shape[1:]))).feature_maps
                for stage, actual in zip(backbone.out_features, maps, strict=True):
                    expected = golden.outputs[case][stage]
                    measured = compare(
                        stage, np.resize(expected, (batch, *expected.shape[1:])), actual, record.parity.gate
                    )
                    assert measured.passed, (case, batch, measured)
