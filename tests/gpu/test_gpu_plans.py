"""Plans of every form that TensorRT writes: each runs, and computes what the plain one computes."""

from __future__ import annotations

import json
from typing import Any

import gpu_engines
import pytest

from benchmarks import gpu_common

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "at the lowest level": {"level": 0},
    "hardware-compatible": {"hardware_compatibility": "ampere_plus"},
    "version-compatible": {"version_compatible": True},
    "with a runtime inside": {"version_compatible": True, "embed_runtime": True},
    "refittable": {"refit": True},
    "stripped": {"strip": True},
    "stripped and refittable": {"strip": True, "refit": True},
    "sparse": {"sparse": True},
}


def compiled(gpu: int, **options):
    from edge_backbones.engines.tensorrt.compile import compile_plan
    from edge_backbones.engines.tensorrt.options import PlanOptions
    from edge_backbones.spec import Precision

    return compile_plan(
        graph_for(options),
        gpu_common.pooling_input(512),
        Precision.FP32,
        flavour="tensorrt",
        options=PlanOptions(**options),
        gpu=gpu,
    )


def graph_for(options) -> bytes:
    """Return a graph with weights for a plan that loses or replaces them."""
    weighted = options.get("strip") or options.get("refit")
    return gpu_common.convolved_pooling_onnx() if weighted else gpu_common.pooling_onnx()


def run(plan, gpu: int, flavour: str = "tensorrt", **options) -> None:
    from edge_backbones import EdgeBackbone
    from edge_backbones.engines.tensorrt.session import TensorRtSession
    from edge_backbones.testing import SPEC

    input = gpu_common.pooling_input(512)
    data = bytearray(plan.data)
    session = TensorRtSession(data, flavour=flavour, input=input, outputs=SPEC.outputs, gpu=gpu, **options)
    with EdgeBackbone(SPEC, input, session, device=f"cuda:{gpu}") as backbone:
        for batch in (1, 5):
            images = gpu_engines.pictures(batch)
            gpu_engines.assert_pooled(backbone(images).feature_maps, images)


@gpu_engines.needs("tensorrt")
@pytest.mark.parametrize("form", list(FORMS))
def test_a_plan_of_every_form_runs(gpu, form):
    from edge_backbones.machine import gpus

    options = FORMS[form]
    described = gpus.find_gpus()[gpu]
    if options.get("hardware_compatibility") and (described.integrated or int(described.architecture[3:]) < 80):
        pytest.skip(f"{described.name} has no hardware compatibility")
    plan = compiled(gpu, **options)
    weights = graph_for(options) if plan.gpu.stripped else None
    run(plan, gpu, allow_host_code=plan.gpu.host_code, weights=weights)
    assert plan.timing_cache
    if not plan.gpu.stripped:
        assert json.loads(plan.layers)["Layers"]


@gpu_engines.needs("tensorrt")
def test_a_runtime_inside_a_plan_is_not_run_unasked(gpu):
    from edge_backbones.errors import EngineMismatchError

    plan = compiled(gpu, version_compatible=True, embed_runtime=True)
    with pytest.raises(EngineMismatchError, match="allow_host_code=True"):
        run(plan, gpu)


@gpu_engines.needs("tensorrt")
def test_a_timing_cache_is_taken_and_one_that_is_none_is_left(gpu):
    first = compiled(gpu)
    for cache in (first.timing_cache, b"not a cache"):
        run(compiled(gpu, timing_cache=cache), gpu)


@gpu_engines.needs("tensorrt", "tensorrt_lean")
def test_the_lean_runtime_runs_a_version_compatible_plan(gpu):
    run(compiled(gpu, version_compatible=True), gpu, flavour="tensorrt_lean")
