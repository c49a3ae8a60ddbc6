"""What TensorRT is asked for, on a library that is made up: settings that no machine without a GPU can carry out."""

from __future__ import annotations

import contextlib
import dataclasses
import struct
import threading
import types
import weakref
from typing import ClassVar

import pytest

from edge_backbones.engines.tensorrt import compile as tensorrt
from edge_backbones.engines.tensorrt import needs, requests
from edge_backbones.engines.tensorrt.compile import compile_plan
from edge_backbones.engines.tensorrt.dla import DlaCoverage, calibration_cache
from edge_backbones.engines.tensorrt.needs import Needs
from edge_backbones.engines.tensorrt.options import PlanOptions, Shapes
from edge_backbones.errors import CompileError, InputError
from edge_backbones.machine.gpus import Gpu
from edge_backbones.spec import InputSpec, Precision, ShapeRange
from tests.simulated_builder import GRAPH, Library

ORIN = Gpu(
    index=0, name="Orin", architecture="sm_87", memory_bytes=8 << 30, driver="12.6", multiprocessors=8, integrated=True
)


L4 = Gpu(0, "NVIDIA L4", "sm_89", 24 << 30, "13.0", 58, False)
T4 = Gpu(0, "Tesla T4", "sm_75", 16 << 30, "13.0", 40, False)


def input_spec(batch: ShapeRange | int = 1, width: int = 96) -> InputSpec:
    batch = batch if isinstance(batch, ShapeRange) else ShapeRange.fixed(batch)
    sizes = ShapeRange.fixed(64), ShapeRange.fixed(width)
    return InputSpec(name="pixel_values", channels=3, batch=batch, height=sizes[0], width=sizes[1])


class Context:
    """A CUDA context; ``entered``: on which GPU, in which thread."""

    entered: ClassVar[list[tuple[int, int]]] = []
    current: ClassVar[list[int]] = []

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        self.entered.append((self.device, threading.get_ident()))
        self.current.append(self.device)

    def __exit__(self, *exception):
        self.current.remove(self.device)


@pytest.fixture
def compiled(monkeypatch):
    log = types.SimpleNamespace(
        clear=lambda: None, last_error=lambda: "OutOfMemory (no further information)", warnings=[]
    )
    log.warnings = type("Warnings", (list,), {})()
    room = types.SimpleNamespace(available=7 << 30, swap=1 << 30)
    monkeypatch.setattr(needs, "read_system", lambda: types.SimpleNamespace(memory=room))
    monkeypatch.setattr(tensorrt, "logger_of", lambda library: log)
    monkeypatch.setattr(tensorrt, "open_memory", Context)
    Context.entered.clear()

    def compile(library, precision=Precision.FP16, input=None, gpu=ORIN, graph=GRAPH, flavour="tensorrt", **more):
        typing = {name: more.pop(name) for name in ("weak", "ranges") if name in more}
        found = () if gpu is None else (gpu,) * (gpu.index + 1)
        monkeypatch.setattr(tensorrt.gpus, "find_gpus", lambda: found)
        monkeypatch.setattr(requests, "load_library", lambda flavour: library)
        return compile_plan(
            graph,
            input or input_spec(),
            precision,
            flavour=flavour,
            options=PlanOptions(**more),
            gpu=0 if gpu is None else gpu.index,
            **typing,
        )

    return compile


def test_a_plain_plan_for_the_gpu_at_hand(compiled):
    library = Library()
    plan = compiled(library)
    assert plan.data == b"plan"
    assert plan.device_name == "Orin"
    assert plan.gpu.architectures == ("sm_87",)
    assert (plan.gpu.driver, plan.gpu.dla_core, plan.gpu.version_compatible) == ("12.6", None, False)
    assert plan.timing_cache == b"measured"
    assert plan.layers == '{"form": "JSON"}'
    assert plan.coverage is None
    assert library.asked["network"] == 2  # strongly typed, by the value that this release has for it
    assert library.asked["flags"] == set()
    assert library.asked["cleared"] == {"TF32"}
    (gpu, thread), (again, other), _ = Context.entered  # the last one reads the layers
    assert gpu == again == 0
    assert thread != other  # a context is current in one thread alone
    assert plan.gpu.multiprocessors == 8
    assert library.asked["config"].profiling_verbosity == library.ProfilingVerbosity.DETAILED
    assert library.asked["profiles"] == [("pixel_values", (1, 3, 64, 96), (1, 3, 64, 96), (1, 3, 64, 96))]
    # On the GPU: weights twice, and softmax with what it reads.
    assert plan.memory == Needs(host=(256 << 20) + int(3.5 * len(GRAPH)), device=2 * 8 * 27 * 4 + 64 * 96 * 4 * 16)


def test_every_setting_reaches_the_builder(compiled):
    library = Library()
    sizes = {"height": ShapeRange.fixed(64), "width": ShapeRange.fixed(96)}
    plan = compiled(
        library,
        gpu=L4,
        input=input_spec(ShapeRange(min=1, opt=4, max=8)),
        profiles=(Shapes(batch=ShapeRange.fixed(1), **sizes), Shapes(batch=ShapeRange(min=2, opt=4, max=8), **sizes)),
        workspace=1 << 28,
        level=5,
        hardware_compatibility="ampere_plus",
        version_compatible=True,
        refit=True,
        sparse=True,
    )
    asked = library.asked
    assert asked["workspace"] == (library.MemoryPoolType.WORKSPACE, 1 << 28)
    assert asked["config"].builder_optimization_level == 5
    assert asked["config"].hardware_compatibility_level == library.HardwareCompatibilityLevel.AMPERE_PLUS
    assert asked["flags"] == {"VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", "REFIT", "SPARSE_WEIGHTS"}
    assert [shapes[1][0] for shapes in asked["profiles"]] == [1, 2]
    assert (plan.gpu.hardware_compatibility, plan.gpu.version_compatible, plan.gpu.refittable) == (
        "ampere_plus",
        True,
        True,
    )
    assert not plan.gpu.host_code
    library = Library()
    embedding = compiled(library, version_compatible=True, embed_runtime=True)
    assert embedding.gpu.host_code
    assert library.asked["host_code"]  # to read its layers
    assert embedding.layers == '{"form": "JSON"}'
    assert library.asked["flags"] == {"VERSION_COMPATIBLE"}


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize("index", [0, 2])
def test_layers_are_read_on_the_gpu_that_was_asked_for(compiled, monkeypatch, flavour, index):
    """Without its context, the engine would be loaded on whatever GPU the caller's thread has current."""
    library, seen = Library(rtx=flavour == "tensorrt_rtx"), []
    read = library.Runtime.deserialize_cuda_engine

    def deserialize(*given):
        seen.extend(Context.current[-1:])
        return read(*given)

    monkeypatch.setattr(library.Runtime, "deserialize_cuda_engine", deserialize)
    plan = compiled(library, gpu=dataclasses.replace(L4, index=index), flavour=flavour)
    assert plan.layers == '{"form": "JSON"}'
    assert seen == [index]
    assert Context.current == []  # the caller's own context is back


def test_layers_for_other_gpus_are_not_read(compiled, monkeypatch):
    library = Library(rtx=True)
    monkeypatch.setattr(library.Runtime, "deserialize_cuda_engine", lambda *_: pytest.fail("loaded"))
    assert compiled(library, gpu=L4, flavour="tensorrt_rtx", targets=("sm_86", "sm_120")).layers is None
    assert library.asked["targets"] == ["SM86", "SM120"]
    assert compiled(library, gpu=None, flavour="tensorrt_rtx", targets=("sm_89",)).layers is None
    assert Context.entered == []


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"strip": True}, {"REFIT_IDENTICAL", "STRIP_PLAN"}),  # with REFIT, kernels may depend on no weight
        ({"strip": True, "refit": True}, {"REFIT", "STRIP_PLAN"}),
        ({"refit": True}, {"REFIT"}),
    ],
)
def test_a_stripped_plan_takes_its_own_weights_alone_unless_refitting_is_asked_for(compiled, options, flags):
    library = Library()
    plan = compiled(library, **options)
    assert library.asked["flags"] == flags
    assert plan.gpu.stripped == bool(options.get("strip"))
    assert plan.gpu.refittable == bool(options.get("refit"))
    assert (plan.layers is None) == plan.gpu.stripped  # without weights it is not loaded


@pytest.mark.parametrize("level", ["fast", "moderate", "full"])
def test_tiling_is_asked_for_where_the_release_has_it(compiled, level):
    library = Library(tiles=True)
    compiled(library, tiling=level)
    assert library.asked["config"].tiling_optimization_level == library.TilingOptimizationLevel[level.upper()]
    library = Library(tiles=True)
    compiled(library)
    assert not hasattr(library.asked["config"], "tiling_optimization_level")  # what TensorRT does by default
    with pytest.raises(
        CompileError, match=r"tensorrt 10\.3\.0 has no tiling, which came with TensorRT 10\.8: leave it out"
    ):
        compiled(Library(), tiling=level)


def test_a_timing_cache_of_another_gpu_is_left(compiled):
    library = Library()
    compiled(library, timing_cache=b"of this GPU")
    assert library.asked["caches"] == [b"of this GPU"]
    library = Library()
    compiled(library, timing_cache=b"of another GPU")
    assert library.asked["caches"] == [b"of another GPU", b""]


def test_dla_says_what_it_runs_before_anything_is_compiled(compiled):
    library = Library()
    plan = compiled(library, dla_core=1)
    assert plan.coverage == DlaCoverage(2, ("softmax",))
    assert str(plan.coverage) == "DLA runs 1 of 2 layers; the GPU 1 (softmax)"
    assert library.asked["flags"] == {"GPU_FALLBACK"}
    assert library.asked["config"].DLA_core == 1
    assert library.asked["config"].default_device_type == library.DeviceType.DLA
    assert plan.gpu.dla_core == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dla_core": 2}, "there is no DLA core 2 here, which has 2"),
        ({"dla_core": 0, "gpu_fallback": False}, r"the GPU 1 \(softmax\): allow them there"),
        ({"dla_core": 0, "precision": Precision.BF16}, "DLA computes fp16 and int8, not bf16"),
        (
            {"dla_core": 0, "input": input_spec(ShapeRange(min=1, opt=2, max=4))},
            "DLA takes fixed shapes and this input has batch 1..4",
        ),
        ({"dla_core": 0, "input": input_spec(5000)}, "DLA takes batches of at most 4096, not 5000"),
        ({"targets": ("sm_89",)}, "for the GPU at hand, sm_87 here, not for sm_89"),
        ({"precision": Precision.FP8}, "sm_87 has no fp8, which came with sm_89"),
        ({"hardware_compatibility": "same_compute_capability"}, "has no hardware compatibility"),
        ({"dla_core": 0, "input": input_spec(width=8200)}, "DLA takes sizes of at most 8192, not width 8200"),
        ({"workspace": 7 << 30}, "needs 7.0 GiB at least and Orin has, beside what runs, 7.0 GiB.*end what else runs"),
        ({"workspace": 25 << 30, "gpu": L4}, "needs 25.0 GiB at least and NVIDIA L4 has 24.0 GiB"),
        ({"hardware_compatibility": "ampere_plus"}, r"no hardware compatibility on JetPack \(Orin\): leave it out"),
        (
            {"hardware_compatibility": "ampere_plus", "gpu": T4},
            "begins with sm_80, and Tesla T4 is sm_75: leave it out",
        ),
        ({"weak": True}, "weak typing is for fp16 and int8 on a DLA core, and this is fp16 without one"),
        (
            {"weak": True, "dla_core": 0, "strip": True},
            "fp16 on this DLA is compiled from the fp32 graph: leave strip out",
        ),
        ({"weak": True, "dla_core": 0, "ranges": {"conv": 1.0}}, "ranges are for int8 .*this is fp16 with it"),
        ({"dla_core": 0, "precision": Precision.INT8, "ranges": {"conv": 1.0}}, "and this is int8 without it"),
        ({"dla_core": 0, "precision": Precision.INT8, "weak": True}, "and this is int8 with it"),
    ],
)
def test_what_cannot_be_is_refused(compiled, options, message):
    with pytest.raises(CompileError, match=message):
        compiled(Library(), **options)


@pytest.mark.parametrize(
    ("gpu", "host", "device", "message"),
    [
        (
            L4,
            9 << 30,
            1,
            r"needs 9\.0 GiB and this machine has, beside what runs, 8\.0 GiB with its swap: end what else",
        ),
        (None, 9 << 30, 0, r"needs 9\.0 GiB and this machine"),  # TensorRT-RTX
        (ORIN, 5 << 30, 4 << 30, r"needs 9\.0 GiB and this machine"),  # one memory for both
        (
            ORIN,
            1,
            (7 << 30) + (1 << 29),
            r"needs 7\.5 GiB at least and Orin has, beside what runs, 7\.0 GiB",
        ),  # no swap
        (L4, 8 << 30, 24 << 30, None),
        (ORIN, 4 << 30, 4 << 30, None),
        (None, 8 << 30, 0, None),
    ],
)
def test_memory_that_cannot_suffice_is_refused(monkeypatch, gpu, host, device, message):
    room = types.SimpleNamespace(available=7 << 30, swap=1 << 30)
    monkeypatch.setattr(needs, "read_system", lambda: types.SimpleNamespace(memory=room))
    refused = contextlib.nullcontext() if message is None else pytest.raises(CompileError, match=message)
    with refused:
        needs.refuse_for_memory(Needs(host, device), gpu)
    monkeypatch.setattr(needs, "read_system", lambda: types.SimpleNamespace(memory=None))  # not Linux
    needs.refuse_for_memory(Needs(1 << 60, 0), None)


def test_the_bytes_of_a_graph_are_gone_before_anything_is_built(compiled, monkeypatch):
    """A function that reads them is called once; nobody holds what it returned when the builder begins."""
    library, alive, read = Library(), [], []

    class Bytes(bytearray):
        pass

    def reads():
        graph = Bytes(GRAPH)
        read.append(weakref.ref(graph))
        return graph

    def build(*_):
        alive.extend(one for one in read if one() is not None)
        return memoryview(b"plan")

    monkeypatch.setattr(library.Builder, "build_serialized_network", build)
    assert compiled(library, graph=reads).data == b"plan"
    assert (len(read), alive) == (1, [])


def test_a_driver_older_than_the_library_is_told_before_anything_is_made(compiled, monkeypatch):
    monkeypatch.setattr(requests, "against_driver", lambda flavour, driver: f"too old: CUDA {driver}")
    with pytest.raises(CompileError, match=r"too old: CUDA 12\.6"):
        compiled(None)


def test_the_tensorrt_of_jetpack_6_0_is_told_before_anything_is_made_of_it(compiled, monkeypatch):
    monkeypatch.setattr(requests, "is_jetson", lambda: True)
    old = types.SimpleNamespace(__version__="8.6.2")
    with pytest.raises(CompileError, match=r"tensorrt 8\.6\.2 is too old: 10\.3 is the oldest .*JetPack 6\.2"):
        compiled(old)


def test_a_setting_that_the_bindings_do_not_take_is_told(compiled):
    with pytest.raises(CompileError, match=r"does not take a setting of this plan.*incompatible function arguments"):
        compiled(Library(picky=True), workspace=1 << 28)
    with pytest.raises(InputError, match=r"below 2\*\*63, got 18446744073709551616"):
        PlanOptions(workspace=1 << 64)


def test_int8_on_the_dla_of_jetpack_6_takes_ranges(compiled):
    library = Library()
    plan = compiled(library, precision=Precision.INT8, weak=True, dla_core=0, ranges={"conv": 2.5, "elsewhere": 1.0})
    assert plan.coverage == DlaCoverage(2, ("softmax",))  # asked for with int8 and fp16 allowed
    assert library.asked["network"] == 0  # weakly typed
    assert library.asked["flags"] == {"INT8", "FP16", "GPU_FALLBACK"}
    calibrator = library.asked["config"].int8_calibrator
    assert calibrator.get_batch(["pixel_values"]) is None  # it has no images: all that it knows is in the cache
    cache = calibrator.read_calibration_cache()
    assert cache == b"TRT-100300-EntropyCalibration2\nconv: " + struct.pack(">f", 2.5 / 127).hex().encode() + b"\n"
    with pytest.raises(CompileError, match="none of the calibrated tensors is in this graph"):
        compiled(Library(), precision=Precision.INT8, weak=True, dla_core=0, ranges={"elsewhere": 1.0, "conv": 0.0})
    newer = Library(flags="VERSION_COMPATIBLE GPU_FALLBACK TF32")
    with pytest.raises(CompileError, match="has no weak typing left"):
        compiled(newer, precision=Precision.INT8, weak=True, dla_core=0, ranges={"conv": 1.0})


@pytest.mark.parametrize("fallback", [True, False])
def test_fp16_on_the_dla_of_jetpack_6_is_a_flag_of_the_builder(compiled, fallback):
    library = Library(not_on_dla=("softmax",) if fallback else ())
    plan = compiled(library, weak=True, dla_core=1, gpu_fallback=fallback)
    assert library.asked["network"] == 0  # weakly typed
    assert library.asked["flags"] == ({"FP16", "GPU_FALLBACK"} if fallback else {"FP16"})
    assert not hasattr(library.asked["config"], "int8_calibrator")
    assert plan.coverage == DlaCoverage(2, ("softmax",) if fallback else ())
    newer = Library(flags="VERSION_COMPATIBLE GPU_FALLBACK TF32")
    with pytest.raises(CompileError, match="has no weak typing left: compile the typed fp16 graph"):
        compiled(newer, weak=True, dla_core=0)


@pytest.mark.parametrize("weak", [True, False])
def test_a_dla_core_that_would_run_nothing_is_refused(compiled, weak):
    with pytest.raises(
        CompileError, match=r"DLA runs 0 of 2 layers; the GPU 2 \(conv, softmax\), which is all.*leave --dla-core out"
    ):
        compiled(Library(not_on_dla=("conv", "softmax")), weak=weak, dla_core=0)


def test_a_calibration_cache_is_what_tensorrt_writes():
    # Its entropy calibration takes the middle of the last of 2048 bins: for values up to 1 it writes 3c010a14.
    up_to_one = calibration_cache("10.3.0", {"input_1:0": 2048.5 / 2048})
    assert up_to_one == b"TRT-100300-EntropyCalibration2\ninput_1:0: 3c010a14\n"
    assert calibration_cache("10.13.3.9", {}).startswith(b"TRT-101303-")


def test_a_failed_build_says_why_and_what_to_do(compiled):
    with pytest.raises(CompileError, match=r"cannot compile this graph: OutOfMemory .*choose a smaller workspace"):
        compiled(Library(builds=False))


def test_a_plan_that_does_not_load_is_left_to_parity(compiled):
    assert compiled(Library(loads=False)).layers is None
