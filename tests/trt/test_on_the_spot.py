"""An engine that the bundle lacks is made where it is asked for: `on_mismatch="compile"` and `compile` on a simulated GPU.

TensorRT-RTX compiles for real; what runs its plan, and all of the full TensorRT, is simulated. Plans are run by numpy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json

import numpy as np
import pytest

from edge_backbones import Bundle, EdgeBackbone, compile_bundle, verify_bundle
from edge_backbones.engines.tensorrt import compile as builder
from edge_backbones.engines.tensorrt import library as tensorrt_library
from edge_backbones.engines.tensorrt import requests, session
from edge_backbones.engines.tensorrt.options import PlanOptions
from edge_backbones.errors import EngineMismatchError, MissingDependencyError
from edge_backbones.machine import gpus, hosts
from edge_backbones.parity_report import ParityError
from edge_backbones.testing import NumpySession, pooled
from tests.simulated_builder import Library
from tests.simulated_tensorrt import NumpyTensorRt, plan_of, shapes

pytestmark = pytest.mark.usefixtures("in_process")  # tests replace what is called there

FLAVOURS = ["tensorrt", "tensorrt_rtx"]
real_library = tensorrt_library.load_library


class Device:
    """A machine with one GPU and one TensorRT. ``compiled``: how often it compiled; ``gain``: what its kernels are off by."""

    def __init__(self, monkeypatch, flavour: str) -> None:
        self.compiled, self.gain = 0, 1.0
        self.described = gpus.Gpu(0, "NVIDIA L4", "sm_89", 24 << 30, "13.0", 60, False)
        simulated, is_rtx = NumpyTensorRt(None), flavour == "tensorrt_rtx"
        for module in (gpus, hosts):
            monkeypatch.setattr(module, "no_gpu_reason", lambda: "")
            monkeypatch.setattr(module, "find_gpus", lambda: (self.described,))
        compiler = real_library(flavour) if is_rtx else simulated

        def plan() -> bytes:
            return bytes(plan_of(shapes(2, 2, 2), gain=self.gain))

        def read(data: bytes) -> dict:
            assert not is_rtx or data[:4] == b"vtrt"  # the real one
            return json.loads(plan() if is_rtx else data)

        def load(asked: str):
            if asked != flavour:
                raise MissingDependencyError(f"the {asked} engine", asked)
            return simulated

        def load_compiler(asked: str):
            load(asked)
            self.compiled += 1
            return compiler

        if is_rtx:
            simulated.__version__ = compiler.__version__
        else:
            asked = Library()
            for name, value in vars(asked).items():
                if not hasattr(simulated, name):
                    setattr(simulated, name, value)
            monkeypatch.setattr(asked.Builder, "build_serialized_network", lambda *_: memoryview(plan()))
            monkeypatch.setattr(builder, "_layers", lambda *_: None)

        class Session(NumpySession):
            def __init__(self, data, *, input, **_) -> None:
                super().__init__(input)
                self.gain = read(bytes(data))["gain"]

            def run(self, array):
                return [np.float32(self.gain) * feature_map for feature_map in super().run(array)]

        monkeypatch.setattr(session, "TensorRtSession", Session)
        monkeypatch.setattr(builder, "open_memory", lambda gpu: contextlib.nullcontext())
        monkeypatch.setattr(tensorrt_library, "load_library", load)
        monkeypatch.setattr(requests, "load_library", load_compiler)


@pytest.fixture(params=FLAVOURS)
def device(request, monkeypatch):
    made = Device(monkeypatch, request.param)
    made.flavour = request.param
    return made


def files(bundle: Bundle) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in bundle.path.rglob("*") if path.is_file()}


def test_what_the_bundle_lacks_is_compiled_measured_kept_and_run(bundle, device):
    before = files(bundle)
    with pytest.raises(EngineMismatchError, match=r"runs on cpu, not on cuda.*edge-backbones compile"):
        EdgeBackbone.from_pretrained(bundle.path, device="cuda")
    assert files(bundle) == before

    images = np.random.default_rng(1).standard_normal(bundle.manifest.input.opt_shape).astype(np.float32)
    with EdgeBackbone.from_pretrained(bundle.path, device="cuda", on_mismatch="compile") as backbone:
        assert backbone.device == "cuda:0"
        made = backbone.engine
        for actual, expected in zip(backbone(images).feature_maps, pooled(images), strict=True):
            np.testing.assert_array_equal(actual, expected)
    grown = Bundle.open(bundle.path)
    grown.check_files()
    record = next(engine for engine in grown.manifest.engines if engine.name == made)
    assert (record.key.flavour, record.key.gpu.architectures) == (device.flavour, ("sm_89",))
    assert record.parity.measured
    assert record.parity.passed
    assert len(grown.manifest.engines) == 2  # that of the CPU stays

    # The next one finds it, whatever it would do otherwise.
    device.compiled = 0
    for way in ("raise", "compile"):
        with EdgeBackbone.from_pretrained(bundle.path, device="cuda", on_mismatch=way) as backbone:
            assert backbone.engine == made
    assert device.compiled == 0
    assert [report.passed for report in verify_bundle(bundle.path, engine=device.flavour)] == [True]


def test_another_gpu_gets_an_engine_of_its_own(bundle, device):
    EdgeBackbone.from_pretrained(bundle.path, device="cuda", on_mismatch="compile").close()
    device.described = dataclasses.replace(device.described, name="NVIDIA A10", architecture="sm_86")
    with pytest.raises(EngineMismatchError, match=r"compiled for sm_89; this GPU \(NVIDIA A10\) is sm_86"):
        EdgeBackbone.from_pretrained(bundle.path, device="cuda")
    with EdgeBackbone.from_pretrained(bundle.path, device="cuda", on_mismatch="compile") as backbone:
        other = backbone.engine
        (reason,) = [why for name, why in backbone.passed_over.items() if "sm_89" in name]
        assert "this GPU (NVIDIA A10) is sm_86" in reason
    engines = {e.name: e.key.gpu.architectures for e in Bundle.open(bundle.path).manifest.engines if e.key.gpu}
    assert sorted(engines.values()) == [("sm_86",), ("sm_89",)]
    assert engines[other] == ("sm_86",)


def test_an_engine_that_computes_wrongly_is_not_kept(bundle, device):
    before, device.gain = files(bundle), 1.01
    with pytest.raises(ParityError, match=r"fp32 is outside its gate.*pool4"):
        EdgeBackbone.from_pretrained(bundle.path, device="cuda", on_mismatch="compile")
    plan = PlanOptions(targets=("sm_89",)) if device.flavour == "tensorrt_rtx" else None
    with pytest.raises(ParityError, match="fp32 is outside its gate"):
        compile_bundle(bundle.path, flavour=device.flavour, plan=plan)
    assert files(bundle) == before
