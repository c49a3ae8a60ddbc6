"""Which engine of a bundle is taken on a GPU, and why others are passed over: decided from the manifest alone."""

from __future__ import annotations

import dataclasses
import itertools
import types
from pathlib import Path

import msgspec
import pytest

from edge_backbones.bundle.manifest import EngineKey, EngineRecord, FileRecord, GpuKey
from edge_backbones.deploy import compile as deployed
from edge_backbones.engines import registry
from edge_backbones.engines import select as session
from edge_backbones.engines.promises import DEFAULT_GATES
from edge_backbones.errors import EngineMismatchError, MissingDependencyError
from edge_backbones.machine.gpus import Gpu
from edge_backbones.machine.hosts import Host
from edge_backbones.machine.profiles import profile_of
from edge_backbones.parity_report import ParityReport, StageParity
from edge_backbones.spec import Precision

L4 = Gpu(
    index=0,
    name="NVIDIA L4",
    architecture="sm_89",
    memory_bytes=24 << 30,
    driver="13.0",
    multiprocessors=58,
    integrated=False,
)
HOST = Host("x86_64", (), "CPU", {"tensorrt": "10.3.0", "tensorrt_rtx": "1.7.1"}, L4)


def engine(precision="int8", *, measured=True, flavour="tensorrt", version="10.3.0", **gpu) -> EngineRecord:
    stage = StageParity(stage="s", cosine=1, sqnr_db=40, max_abs=0, relative=0, finite=True, passed=True)
    key = EngineKey(
        flavour=flavour,
        library_version=version,
        architecture="x86_64",
        cpu_features=(),
        device_name="NVIDIA L4",
        precision=Precision(precision),
        graph_sha256="0" * 64,
        gpu=GpuKey(**{"architectures": ("sm_89",), "multiprocessors": 58, **gpu}),
    )
    parity = ParityReport(
        precision=precision, gate=DEFAULT_GATES[Precision(precision)], stages=(stage,) if measured else ()
    )
    return EngineRecord(key=key, file=FileRecord(path="engines/e.plan", sha256="0" * 64, size=1), parity=parity)


def bundle_of(*engines: EngineRecord):
    backbone = types.SimpleNamespace(outputs=("s",))
    manifest = types.SimpleNamespace(engines=engines, graphs=(), backbone=backbone)
    return types.SimpleNamespace(path=Path("b.bundle"), manifest=manifest)


def chosen(*engines: EngineRecord, **options) -> EngineRecord:
    return session.choose_engine(bundle_of(*engines), HOST, device="cuda", **options)


def test_of_one_precision_the_closest_fit_is_taken_and_of_those_the_newest():
    exact, again = engine(), engine(profiles=(((1, 3, 8, 8),) * 3,))
    portable = engine(hardware_compatibility="ampere_plus", architectures=("sm_80",))
    lean, dla = engine(version_compatible=True), engine(dla_core=0)
    for others in ((portable, lean, dla), (dla, lean, portable)):
        assert chosen(*others, exact) is exact
        assert chosen(exact, *others) is exact
    assert chosen(exact, portable, again) is again
    assert chosen(portable, lean) is lean
    assert chosen(engine("fp16"), portable) is portable  # fewer bits first, all the same


def test_what_was_timed_side_by_side_is_chosen_by_speed():
    """int8 that is slower than fp16 on this GPU does not run because it has fewer bits."""
    int8, fp16 = (
        changed_record(engine(p), milliseconds=ms) for p, ms in ((Precision.INT8, 1.25), (Precision.FP16, 1.0))
    )
    assert chosen(int8, fp16) is fp16
    assert chosen(fp16, changed_record(int8, milliseconds=0.9)).key.precision == "int8"
    assert chosen(fp16, changed_record(int8, milliseconds=1.0)).key.precision == "int8"
    assert chosen(int8, fp16, engine="int8") is int8
    assert chosen(int8, fp16, engine(Precision.FP32)).key.precision == "int8"  # one that was not timed: no ranking


def test_of_two_libraries_tensorrt_is_taken_where_neither_was_timed():
    full, rtx = engine(), engine(flavour="tensorrt_rtx", version="1.7.1")
    assert chosen(full, rtx) is full
    assert chosen(rtx, full) is full
    assert chosen(full, rtx, engine="tensorrt_rtx") is rtx


def test_on_a_cpu_the_engine_with_most_of_its_instructions_is_taken():
    """An AVX2 engine beside one for AMX: both run on the newer machine, and the one that was compiled for it is faster."""
    features = ("avx2", "avx512f", "avx512_vnni", "amx_int8")
    host = Host("x86_64", features, "Xeon", {"openvino": "2026.4.1"})

    def of(*held: str, precision="int8", version="2026.4.1") -> EngineRecord:
        made = engine(precision, flavour="openvino", version=version)
        return changed_record(made, key=msgspec.structs.replace(made.key, cpu_features=held, gpu=None))

    plain, wide, whole = of("avx2"), of("avx2", "avx512f", "avx512_vnni"), of(*features)
    foreign = of("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8")
    for engines in itertools.permutations((plain, wide, whole, foreign)):
        assert session.choose_engine(bundle_of(*engines), host) is whole
    for engines in itertools.permutations((plain, wide, foreign)):
        assert session.choose_engine(bundle_of(*engines), host) is wide
    # Bits come first, and what was measured before both.
    assert session.choose_engine(bundle_of(of(*features, precision="fp32"), plain), host) is plain
    timed = [changed_record(e, milliseconds=ms) for e, ms in ((whole, 2.0), (plain, 1.0))]
    assert session.choose_engine(bundle_of(*timed), host) is timed[1]
    # Of two with the same instructions the newer.
    again = changed_record(whole, file=FileRecord(path="engines/again.blob", sha256="1" * 64, size=1))
    assert session.choose_engine(bundle_of(whole, again), host) is again


@pytest.mark.parametrize(
    ("asked", "device", "way"),
    [
        (None, "cpu", "Run: edge-backbones compile b.bundle --device cpu"),
        (None, "cuda", "Run: edge-backbones compile b.bundle (on the machine with that GPU)"),
        ("fp16", "cpu", "Run: edge-backbones compile b.bundle --precision fp16 --device cpu"),
        ("fp16", "cuda", "Run: edge-backbones compile b.bundle --precision fp16 (on the machine with that GPU)"),
        ("bf16", "cpu", "edge-backbones build MODEL b.bundle --precision fp16 --precision bf16 --overwrite"),
        ("fp8", "cuda", "edge-backbones build MODEL b.bundle --precision fp16 --precision fp8 --images FOLDER --overwrite"),
        ("openvino", "cpu", "Run: edge-backbones compile b.bundle --flavour openvino"),
        ("tensorrt_rtx", "cuda", "Run: edge-backbones compile b.bundle --flavour tensorrt_rtx (on the machine with "),
        ("torchscript", "cpu", "edge-backbones build MODEL b.bundle --precision fp16 --overwrite"),
        ("torch_tensorrt", "cuda", "edge-backbones build MODEL b.bundle --flavour torch_tensorrt --overwrite"),
        ("int9", "cpu", "Ask for one of these, or for a precision or a flavour: edge-backbones inspect b.bundle"),
    ],
)  # fmt: skip
def test_the_way_out_is_the_command_that_makes_what_was_asked_for(asked, device, way):
    """`compile` where the bundle holds the graph, `build` where it does not."""
    bundle = bundle_of(*[] if asked is None else [engine("int8")])
    bundle.manifest.graphs = (types.SimpleNamespace(format="onnx", precision=Precision.FP16, gate=None),)
    with pytest.raises(EngineMismatchError) as caught:
        session.choose_engine(bundle, HOST, asked, device=device)
    assert way in str(caught.value)


def test_an_engine_of_the_other_device_is_asked_for_there():
    with pytest.raises(
        EngineMismatchError, match=r"runs on cuda, not on cpu: ask for it there \(device='cuda', --device cuda\)"
    ):
        session.choose_engine(bundle_of(engine()), HOST, "tensorrt")


def test_why_the_others_were_passed_over_is_told():
    int8, fp16 = engine(Precision.INT8), engine(Precision.FP16)
    elsewhere, pending = engine(Precision.FP16, architectures=("sm_87",)), engine(Precision.BF16, measured=False)
    bundle = bundle_of(int8, fp16, elsewhere, pending)
    others = session.passed_over(bundle, session.choose_engine(bundle, HOST, device="cuda"), HOST, device="cuda")
    assert set(others) == {fp16.name, elsewhere.name, pending.name}
    assert others[fp16.name] == f"would run, and {int8.name} is preferred"
    assert others[elsewhere.name].startswith("compiled for sm_87; this GPU (NVIDIA L4) is sm_89")
    assert others[pending.name].startswith("was compiled ahead of time and never measured")


def changed_record(record: EngineRecord, **changes) -> EngineRecord:
    return msgspec.structs.replace(record, **changes)


def test_a_plan_with_a_runtime_of_its_own_is_passed_over_unless_allowed():
    embedded, plain = engine(version_compatible=True, host_code=True), engine("fp16")
    assert chosen(embedded, plain) is plain
    assert chosen(embedded, plain, allow_host_code=True) is embedded
    with pytest.raises(
        EngineMismatchError, match="carries a runtime, which is code: it is run only with allow_host_code"
    ):
        chosen(embedded)


def test_what_was_never_measured_is_passed_over():
    pending = engine(measured=False)
    assert chosen(pending, engine("fp32")).key.precision == "fp32"
    with pytest.raises(EngineMismatchError, match=r"never measured: run edge-backbones verify.*compile b.bundle"):
        chosen(pending)


def test_compiling_on_the_spot_is_for_the_gpu_at_hand(monkeypatch, in_process):
    asked = []
    profiles = {"tensorrt": profile_of(L4)}
    monkeypatch.setattr(deployed, "compile_bundle", lambda path, **options: asked.append(options))
    monkeypatch.setattr(deployed, "profile_here", lambda flavour, targets, device: profiles.get(flavour))
    only_rtx = Host("x86_64", (), "CPU", {"tensorrt_rtx": "1.7.1"}, changed(L4, architecture="sm_120"))
    for machine, engine, gpu in (
        (HOST, "int8", 0),
        (only_rtx, None, 0),
        (dataclasses.replace(HOST, gpu=None), None, None),
    ):
        monkeypatch.setattr(registry, "this_machine", lambda gpu, machine=machine: machine)
        session.compile_here("b.bundle", engine, gpu=gpu)
    with pytest.raises(EngineMismatchError, match=r"cannot be made here: its name is of the machine.*engine='int8'"):
        session.compile_here("b.bundle", "tensorrt-10.3.0-sm_87-int8-0a1b2c3d", gpu=0)
    assert [(o["flavour"], o["precisions"], getattr(o["plan"], "targets", ()), o["profile"]) for o in asked] == [
        ("tensorrt", ("int8",), (), "l4"),
        ("tensorrt_rtx", None, ("sm_120",), None),
        ("openvino", None, (), None),
    ]


def test_compiling_on_the_spot_needs_no_profiles(monkeypatch, in_process):
    """Python 3.10 without the cli extra has no TOML reader."""

    def unreadable(*_):
        raise MissingDependencyError("reading device profiles on this Python", "cli")

    asked = []
    monkeypatch.setattr(deployed, "compile_bundle", lambda path, **options: asked.append(options))
    monkeypatch.setattr(deployed, "profile_here", unreadable)
    monkeypatch.setattr(registry, "this_machine", lambda gpu: HOST)
    session.compile_here("b.bundle", "tensorrt_rtx", gpu=0)
    assert [(o["flavour"], getattr(o["plan"], "targets", ()), o["profile"]) for o in asked] == [
        ("tensorrt_rtx", ("sm_89",), None)
    ]


def changed(gpu: Gpu, **changes) -> Gpu:
    return Gpu(**{**vars(gpu), **changes})


def test_a_stripped_plan_wants_the_graph_that_it_was_made_of():
    stripped = engine(stripped=True).key
    graph = types.SimpleNamespace(file=types.SimpleNamespace(sha256="1" * 64))
    bundle = types.SimpleNamespace(path=Path("b"), manifest=types.SimpleNamespace(onnx_graph=lambda precision: graph))
    with pytest.raises(EngineMismatchError, match="has no weights, and b not the graph that they are in"):
        session.weights_of(bundle, stripped)
    assert session.weights_of(bundle, msgspec.structs.replace(stripped, gpu=None)) is None
    bundle.read = lambda file: bytearray(b"graph")
    graph.file.sha256 = stripped.graph_sha256
    assert session.weights_of(bundle, stripped) == b"graph"


def on_cpu(precision="int8", **changes) -> EngineRecord:
    """Return an engine of OpenVINO for any x86_64 CPU."""
    made = engine(precision, flavour="openvino", version="2026.4.1")
    return changed_record(made, key=msgspec.structs.replace(made.key, gpu=None), **changes)


WITH_OPENVINO = dataclasses.replace(HOST, versions={**HOST.versions, "openvino": "2026.4.1"})


@pytest.mark.parametrize("milliseconds", [None, 0.1])
def test_auto_takes_the_gpu_where_an_engine_is_for_it(milliseconds):
    """Engines of the CPU and of the GPU were not timed against each other: a figure of the one says nothing of the other."""
    cpu, gpu = on_cpu(milliseconds=milliseconds), engine("fp16")
    slow = changed_record(engine("fp32"), milliseconds=9.0)
    for engines in itertools.permutations((cpu, gpu)):
        assert session.choose_engine(bundle_of(*engines), WITH_OPENVINO, device="auto") is gpu
    assert session.choose_engine(bundle_of(cpu, slow), WITH_OPENVINO, device="auto") is slow
    assert session.choose_engine(bundle_of(cpu, gpu), WITH_OPENVINO, "int8", device="auto") is cpu
    over = session.passed_over(bundle_of(cpu, slow), slow, WITH_OPENVINO, device="auto")
    assert over == {cpu.name: f"would run, and {slow.name} is preferred"}


def test_auto_takes_the_cpu_where_no_engine_fits_the_gpu():
    cpu, unmeasured, other = on_cpu(), engine(measured=False), engine(architectures=("sm_87",))
    assert session.choose_engine(bundle_of(unmeasured, other, cpu), WITH_OPENVINO, device="auto") is cpu
    over = session.passed_over(bundle_of(unmeasured, other, cpu), cpu, WITH_OPENVINO, device="auto")
    assert "never measured" in over[unmeasured.name]
    assert "sm_87" in over[other.name]
    with pytest.raises(EngineMismatchError, match="never measured"):
        session.choose_engine(bundle_of(unmeasured), WITH_OPENVINO, device="auto")


def test_the_gpu_is_looked_for_only_if_it_may_be_needed(monkeypatch):
    looked = []
    monkeypatch.setattr(registry, "this_machine", lambda gpu: looked.append(gpu) or HOST)
    for device, engines in (
        ("auto", [on_cpu()]),
        ("auto", [on_cpu(), engine()]),
        ("cpu", [engine()]),
        ("cuda:2", [on_cpu()]),
    ):
        session.machine_for(bundle_of(*engines), device)
    assert looked == [None, 0, None, 2]


def test_the_beginning_of_one_name_stands_for_it():
    int8, fp32 = on_cpu(), on_cpu("fp32")
    bundle = bundle_of(int8, fp32)
    for unchanged in (None, "int8", "openvino", int8.name, "tensorrt", "resnet", ""):
        assert session.full_name(bundle, unchanged) == unchanged
    assert session.full_name(bundle, int8.name[:-3]) == int8.name
    with pytest.raises(EngineMismatchError, match=f"'openv' begins the names of 2 engines .*{fp32.name}. Type more"):
        session.full_name(bundle, "openv")


def test_engines_on_a_gpu_are_compared_by_their_time_there():
    """Copies of 193 MB hide 1 ms of engine: the one that is faster on the GPU runs."""
    times = {"int8": (21.0, 0.9), "fp16": (20.5, 1.4)}
    engines = [
        msgspec.structs.replace(engine(precision), milliseconds=call, pipelined_milliseconds=alone)
        for precision, (call, alone) in times.items()
    ]
    for order in itertools.permutations(engines):
        bundle = bundle_of(*order)
        chosen = session.choose_engine(bundle, HOST, device="cuda")
        assert chosen.key.precision is Precision.INT8
        why = session.passed_over(bundle, chosen, HOST, device="cuda")
        assert list(why.values()) == ["takes 1.40 ms, the one that runs 0.90 ms"]
    untimed = [msgspec.structs.replace(one, pipelined_milliseconds=None) for one in engines[:1]] + engines[1:]
    assert session.choose_engine(bundle_of(*untimed), HOST, device="cuda").key.precision is Precision.FP16
    assert session.comparable_times([engine("fp32"), engines[0]]) == {}


def test_why_the_others_were_passed_over_is_told_by_the_times_that_decided():
    engines = [
        msgspec.structs.replace(engine(precision), milliseconds=call, pipelined_milliseconds=alone)
        for precision, call, alone in (("fp32", 5.0, 2.0), ("fp16", 6.0, 1.0), ("int8", 7.0, None))
    ]
    bundle = bundle_of(*engines)
    taken = session.choose_engine(bundle, HOST, device="cuda")
    assert taken == engines[0]
    assert session.passed_over(bundle, taken, HOST, device="cuda") == {
        engines[1].name: "takes 6.00 ms, the one that runs 5.00 ms",
        engines[2].name: "takes 7.00 ms, the one that runs 5.00 ms",
    }
    bundle = bundle_of(*engines[:2], changed_record(engines[2], milliseconds=None))
    taken = session.choose_engine(bundle, HOST, device="cuda")
    reasons = session.passed_over(bundle, taken, HOST, device="cuda")
    assert set(reasons.values()) == {f"would run, and {taken.name} is preferred"}
