"""Compiling on a device: what is chosen for it, going on after an interruption, two at once, folders that take nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from edge_backbones import BuildOptions, Bundle, EdgeBackbone, build_bundle, compile_bundle, doctor, verify_bundle
from edge_backbones.bundle.writer import write_manifest
from edge_backbones.cli import main as cli
from edge_backbones.deploy import compile as module
from edge_backbones.deploy import parity, timing
from edge_backbones.engines import registry
from edge_backbones.engines import select as session
from edge_backbones.engines.compat import computed_in, has_units
from edge_backbones.engines.onnxruntime import compile as onnxruntime_compile
from edge_backbones.engines.openvino import compile as openvino_compile
from edge_backbones.engines.openvino import session as openvino_session
from edge_backbones.engines.openvino.compile import compile_graph
from edge_backbones.engines.tensorrt import flavour as tensorrt_flavour
from edge_backbones.engines.tensorrt.options import PlanOptions
from edge_backbones.errors import (
    BundleError,
    CompileError,
    EngineMismatchError,
    InferenceError,
    MissingDependencyError,
    OutOfMemoryError,
)
from edge_backbones.machine import child, hosts
from edge_backbones.machine.gpus import Gpu
from edge_backbones.machine.profiles import load_profile
from edge_backbones.parity_report import Gate, ParityError, ParityReport
from edge_backbones.spec import Precision
from edge_backbones.toolchain import build

pytestmark = pytest.mark.usefixtures("in_process")  # tests replace what is called there

OPTIONS = {"weights": "random:0", "height": 32, "width": 64, "golden": 1, "torchscript": False}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("device") / "net.bundle"
    precisions = (Precision.FP16, Precision.FP32)
    return build_bundle("test_resnet", target, options=BuildOptions(**OPTIONS, precisions=precisions)).bundle.path


@pytest.fixture
def bundle(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "net.bundle"))


def names(path: Path) -> list[str]:
    return sorted(engine.name for engine in Bundle.open(path).manifest.engines)


def test_what_was_compiled_is_left_out_and_the_rest_is_made(bundle):
    before = names(bundle)
    assert compile_bundle(bundle, resume=True).engines == ()
    fp16 = next(e for e in Bundle.open(bundle).manifest.engines if e.key.precision is Precision.FP16)
    Bundle.open(bundle).remove_engine(fp16.name)
    [added] = compile_bundle(bundle, resume=True).engines
    assert added.key.precision is Precision.FP16
    assert names(bundle) == before
    assert len(compile_bundle(bundle).engines) == 2  # without resume all are made again


def planted(monkeypatch, **milliseconds: float) -> list[list[str]]:
    """Latencies by precision; what was timed together."""
    together: list[list[str]] = []

    def measure(engines, input, *, gpu, progress):
        records = [opener.args[1] for opener in engines]
        together.append([record.key.precision.value for record in records])
        for opener in engines:
            opener().close()  # it loads
        return [timing.Times(milliseconds[record.key.precision.value], None) for record in records]

    monkeypatch.setattr(timing, "time_engines", measure)
    return together


def test_engines_of_a_device_are_timed_side_by_side_and_the_fastest_runs(bundle, monkeypatch):
    """A planted int8 (here fp16) that is slower than what it could have been: it is in the bundle, and does not run."""
    together, said = planted(monkeypatch, fp16=2.0, fp32=1.0), []
    added = compile_bundle(bundle, progress=lambda step, *_: said.append(step)).engines
    assert together == [["fp16", "fp32"]] or together == [["fp32", "fp16"]]
    assert {engine.key.precision: engine.milliseconds for engine in added} == {"fp16": 2.0, "fp32": 1.0}
    with EdgeBackbone.from_pretrained(bundle) as backbone:
        assert "-fp32-" in backbone.engine
        [(name, why)] = backbone.passed_over.items()
        assert ("-fp16-" in name, why) == (True, "takes 2.00 ms, the one that runs 1.00 ms")
    with EdgeBackbone.from_pretrained(bundle, engine="fp16") as backbone:
        assert list(backbone.passed_over.values()) == ["engine='fp16' was asked for"]
    assert said[-1] == "fp32 1.00 ms, fp16 2.00 ms (0.50x): runtimes take fp32 here"
    planted(monkeypatch, fp16=1.0, fp32=2.0)
    fp16 = next(engine for engine in Bundle.open(bundle).manifest.engines if engine.key.precision is Precision.FP16)
    compile_bundle(bundle, precisions=(Precision.FP16,))  # the other one is timed again beside it
    with EdgeBackbone.from_pretrained(bundle) as backbone:
        assert backbone.engine == fp16.name
    assert Bundle.open(bundle).remove_engine(fp16.name).manifest.engines[0].milliseconds == 2.0


def test_what_tensorrt_measured_goes_with_the_bundle_and_into_the_next_compilation(bundle, monkeypatch):
    """On a TensorRT that is made up: its plan is the engine of the CPU, its timing cache names what it was given."""
    given: list[bytes | None] = []

    def compile_for_gpu(graph, sha256, input, precision, *, options, **_):
        given.append(options.timing_cache)
        engine = compile_graph(bytes(graph()), precision, cache=None)
        measured = f"measured {len(given)}".encode()
        return dataclasses.replace(engine, timing_cache=measured, layers='{"Layers": []}')

    monkeypatch.setattr(tensorrt_flavour, "compile_engine", compile_for_gpu)
    monkeypatch.setattr(tensorrt_flavour.TensorRt, "check", lambda *_: None)
    added = compile_bundle(bundle, flavour="tensorrt").engines
    assert given == [None, b"measured 1"]  # the second precision starts from what the first has measured
    opened = Bundle.open(bundle)
    opened.check_files()
    caches = [bytes(opened.read(engine.timing_cache)) for engine in added]
    assert caches == [b"measured 1", b"measured 2"]
    for engine in added:
        assert engine.timing_cache.path.endswith(".cache")
        assert engine.layers.path.endswith(".layers.json")
        assert json.loads(opened.read(engine.layers)) == {"Layers": []}
    (bundle / added[1].timing_cache.path).write_bytes(b"damaged")
    compile_bundle(bundle, flavour="tensorrt", precisions=(added[0].key.precision,))
    assert given[2] == b"measured 1"  # a damaged one only costs time
    mine = PlanOptions(timing_cache=b"mine")
    compile_bundle(bundle, flavour="tensorrt", plan=mine)
    assert given[3:] == [b"mine", b"mine"]


RUN_APART = child.run_apart  # and not what the fixture puts there


@pytest.mark.skipif(os.name == "nt", reason="kill -9 is a POSIX matter")
def test_a_compilation_that_was_killed_goes_on_behind_what_it_finished(bundle):
    expected = names(bundle)
    for engine in Bundle.open(bundle).manifest.engines:
        Bundle.open(bundle).remove_engine(engine.name)
    with pytest.raises(
        CompileError, match=r"was compiling fp\d+ for openvino was killed.*--resume goes on with the rest"
    ):
        RUN_APART("apart_functions:second_engine_is_killed", (str(bundle),), {})
    [finished] = Bundle.open(bundle).manifest.engines
    Bundle.open(bundle).check_files()
    RUN_APART("edge_backbones.deploy.compile:compile_bundle", (str(bundle),), {"resume": True})
    assert names(bundle) == expected
    assert finished.name in names(bundle)
    assert finished.file in [engine.file for engine in Bundle.open(bundle).manifest.engines]


def test_a_compilation_without_memory_is_told_what_to_do(bundle, monkeypatch, capsys):
    def full(*_, **__):
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr(openvino_compile, "compile_graph", full)
    assert cli._run(["compile", str(bundle), "--flavour", "openvino", "--in-process"]) == 1
    told = capsys.readouterr().err
    step, refusal = told.strip().splitlines()
    assert step.startswith("compiling ")
    assert "compiling found no memory left (std::bad_alloc). Make room: add swap" in refusal


def test_a_disk_without_room_is_refused_before_the_work(bundle, monkeypatch):
    """And what is asked for is about what the engines take."""
    engines = sum(engine.file.size for engine in Bundle.open(bundle).manifest.engines)
    usage = shutil.disk_usage(bundle)
    compiled = []
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: usage._replace(free=engines))
        full.setattr(openvino_compile, "compile_graph", lambda *_, **__: compiled.append(1))
        with pytest.raises(BundleError, match=r"engines of about \d+ MB have to go to .*, and \d+ MB are free") as told:
            compile_bundle(bundle)
        assert not compiled
        assert compile_bundle(bundle, resume=True).engines == ()  # what is there already needs no room
    asked, left = (int(number) for number in re.findall(r"(\d+) MB", str(told.value)))
    assert left == round(engines / 1e6)
    assert engines / 1e6 < asked < 1.3 * engines / 1e6 + 3
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=(asked + 1) * 1_000_000))
    assert len(compile_bundle(bundle).engines) == 2


def test_a_damaged_engine_is_made_again(bundle):
    [first, _] = Bundle.open(bundle).manifest.engines
    (bundle / first.file.path).write_bytes(b"damaged")
    [added] = compile_bundle(bundle, resume=True).engines
    assert added.name == first.name
    Bundle.open(bundle).check_files()


READ_ONLY = """
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from edge_backbones import compile_bundle
from edge_backbones.engines.openvino import compile as compiler
from edge_backbones.errors import BundleError
compiled = []
compiler.compile_graph = lambda *_, **__: compiled.append(1)
try:
    compile_bundle(sys.argv[1], in_process=True)
except BundleError as error:
    print(error)
assert not compiled
assert compile_bundle(sys.argv[1], resume=True, in_process=True).engines == ()  # what is there needs no place to write
"""


@pytest.mark.skipif(sys.platform != "linux", reason="root is made to obey permissions by setpriv")
@pytest.mark.parametrize(
    ("closed", "expected"),
    [
        (".", r"cannot be written to \(Permission denied\): copy the bundle"),
        ("engines", r"engines cannot be written to \(Permission denied\): copy the bundle"),
        ("..", r"cannot be changed: .*\(Permission denied\).* mount that folder and not the bundle alone"),
    ],
)
def test_a_folder_that_takes_nothing_is_refused_before_the_work(bundle, closed, expected):
    obeying = ["setpriv", "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    folder = bundle / closed
    mode = folder.stat().st_mode
    folder.chmod(0o555)
    try:
        command = [*obeying, sys.executable, "-c", READ_ONLY, str(bundle)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        folder.chmod(mode)
    assert done.returncode == 0, done.stderr
    assert re.search(expected, done.stdout), done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_two_at_once_take_turns(bundle):
    expected = names(bundle)
    command = [sys.executable, "-m", "edge_backbones", "compile", str(bundle)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    assert names(bundle) == expected
    Bundle.open(bundle).check_files()


@pytest.mark.parametrize(
    ("gpu", "board", "versions", "expected"),
    [
        (None, "", ("openvino", "tensorrt"), ("openvino", "cpu")),
        (
            ("Orin", "sm_87", 7.4, True),
            "NVIDIA Jetson Orin Nano Developer Kit",
            ("tensorrt",),
            ("tensorrt", "jetson-orin-nano"),
        ),
        (("Orin", "sm_87", 61.4, True), "NVIDIA Jetson AGX Orin", ("openvino",), ("openvino", "cpu")),
        (("NVIDIA GeForce RTX 4090", "sm_89", 24, False), "", ("tensorrt_rtx",), ("tensorrt_rtx", "rtx-40")),
        (("NVIDIA H100 80GB HBM3", "sm_90", 80, False), "", ("tensorrt_rtx", "openvino"), ("openvino", "cpu")),
        (("NVIDIA B300", "sm_103", 270, False), "", ("tensorrt",), ("tensorrt", None)),
    ],
)
def test_what_serves_a_machine(monkeypatch, gpu, board, versions, expected):
    found = None
    if gpu is not None:
        name, architecture, gib, integrated = gpu
        found = Gpu(0, name, architecture, int(gib * 2**30), "13.0", 8, integrated)
    host = hosts.Host("aarch64", (), "cpu", dict.fromkeys(versions, "10.3.0"), found)
    monkeypatch.setattr(hosts, "this_host", lambda *_, **__: host)
    monkeypatch.setattr(module, "board_name", lambda: board)
    flavour, profile = module.flavour_here()
    assert (flavour, profile and profile.name) == expected


@pytest.mark.parametrize(
    ("flavour", "targets", "expected"),
    [
        ("tensorrt", (), "rtx-40"),
        ("tensorrt_rtx", ("sm_86", "sm_89"), "rtx-40"),
        ("tensorrt_rtx", ("sm_120",), None),  # for another machine
        ("tensorrt_rtx", (), None),  # for many
        ("openvino", (), None),
    ],
)
def test_the_profile_where_a_flavour_is_given(monkeypatch, flavour, targets, expected):
    found = Gpu(0, "NVIDIA GeForce RTX 4090", "sm_89", 24 << 30, "13.0", 128, False)
    monkeypatch.setattr(hosts, "this_host", lambda *_, **__: hosts.Host("x86_64", (), "cpu", {}, found))
    profile = module.profile_here(flavour, targets)
    assert (profile and profile.name) == expected
    monkeypatch.setattr(hosts, "this_host", lambda *_, **__: hosts.Host("x86_64", (), "cpu", {}))
    assert module.profile_here(flavour, targets) is None


def test_the_profile_of_the_board_holds_where_a_flavour_is_given_too(bundle, monkeypatch, capsys):
    seen = {}

    def compiled(*_, **options):
        seen.update(options)
        return module.CompileResult((), ())

    monkeypatch.setattr(module, "compile_bundle", compiled)
    monkeypatch.setattr(module, "profile_here", lambda *_: load_profile("jetson-orin-nano"))
    assert cli._run(["compile", str(bundle), "--flavour", "tensorrt", "--in-process"]) == 0
    assert (seen["flavour"], seen["profile"]) == ("tensorrt", "jetson-orin-nano")
    assert capsys.readouterr().err == ""
    assert cli._run(["compile", str(bundle), "--flavour", "tensorrt", "--profile", "t4", "--in-process"]) == 0
    assert seen["profile"] == "t4"


@pytest.mark.parametrize("tensorrt", [None, "8.6.2", "10.0.1", "10.3.0", "11.4.0"])
@pytest.mark.parametrize("rtx", [None, "1.7.1"])
@pytest.mark.parametrize("architecture", ["sm_87", "sm_89", "sm_90"])
def test_the_command_line_compiling_on_the_spot_and_the_doctor_agree(monkeypatch, tensorrt, rtx, architecture):
    """TensorRT 10.0 beside TensorRT-RTX on sm_89, say: who compiles for this GPU is decided in one place."""
    gpu = Gpu(0, "a GPU", architecture, 24 << 30, "13.0", 128, False)
    versions = {name: it for name, it in (("tensorrt", tensorrt), ("tensorrt_rtx", rtx)) if it}
    host = hosts.Host("x86_64", (), "cpu", versions, gpu)
    monkeypatch.setattr(hosts, "this_host", lambda *_, **__: host)
    monkeypatch.setattr(module, "board_name", lambda: "")
    makes_plans = tensorrt in ("10.3.0", "11.4.0")
    expected = "tensorrt" if makes_plans else "tensorrt_rtx" if rtx and architecture == "sm_89" else "openvino"
    assert module.flavour_here()[0] == expected

    asked = []
    monkeypatch.setattr(module, "compile_bundle", lambda path, **options: asked.append(options["flavour"]))
    session.compile_here("b.bundle", None, gpu=0)
    # Asked for the GPU where nothing compiles for it: TensorRT's own refusal says what is missing.
    assert asked == ["tensorrt" if expected == "openvino" else expected]

    machine = msgspec.structs.replace(doctor.look(), gpus=(gpu,), tensorrt=versions)
    assert (doctor.why_not_the_gpu(machine) == "") == (expected != "openvino")


def test_a_tensorrt_too_old_for_plans_is_passed_over(monkeypatch):
    """JetPack 6.0: the command line says what to upgrade, and compiles for the CPU where it can."""
    host = hosts.Host("aarch64", (), "cpu", {"tensorrt": "8.6.2", "openvino": "2026.4.1"}, ORIN, jetson=True)
    monkeypatch.setattr(hosts, "this_host", lambda *_, **__: host)
    flavour, profile = module.flavour_here()
    assert (flavour, profile.name) == ("openvino", "cpu")


def test_the_workspace_is_the_profiles_unless_another_is_said(bundle, monkeypatch):
    seen = []

    def stop(*_, options: PlanOptions, **__):
        seen.append(options.workspace)
        raise BundleError("far enough")

    monkeypatch.setattr(tensorrt_flavour, "compile_engine", stop)
    monkeypatch.setattr(tensorrt_flavour.TensorRt, "check", lambda *_: None)
    monkeypatch.setattr(module, "_refuse_elsewhere", lambda *_: None)
    for workspace in (None, 64 << 20):
        with pytest.raises(BundleError, match="far enough"):
            compile_bundle(
                bundle, flavour="tensorrt", profile="jetson-orin-nano", plan=PlanOptions(workspace=workspace)
            )
    assert seen == [512 << 20, 64 << 20]


def test_engines_are_removed_at_the_command_line(bundle):
    [first, second] = Bundle.open(bundle).manifest.engines
    command = [sys.executable, "-m", "edge_backbones", "remove", str(bundle)]
    done = subprocess.run([*command, first.name], capture_output=True, text=True, check=True)
    assert done.stdout == f"removed {first.name}\nleft: {second.name}\n"
    again = subprocess.run([*command, first.name], capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert f"has no engine '{first.name}'; its engines: {second.name}" in again.stderr


ORIN = Gpu(0, "Orin", "sm_87", int(7.4 * 2**30), "12.6", 8, True)


@pytest.mark.parametrize("has_openvino", [True, False])
@pytest.mark.parametrize(
    ("tensorrt", "way"),
    [
        ({}, "TensorRT is not usable (missing: JetPack's TensorRT has no Python package here): sudo apt install "),
        (
            {"tensorrt": "8.6.2"},
            "TensorRT is not usable (8.6.2): 10.3 is the oldest that engines are made with: upgrade",
        ),
    ],
)
def test_a_gpu_without_tensorrt_is_never_passed_over_in_silence(
    bundle, monkeypatch, capsys, has_openvino, tensorrt, way
):
    """JetPack without python3-libnvinfer, JetPack 6.0: the CPU engine where there can be one, and always the way to the
    GPU."""
    machine = doctor.look()
    libraries = {name: version for name, version in machine.libraries.items() if name != "openvino" or has_openvino}
    system = msgspec.structs.replace(machine.system, l4t="36.4.3", jetson=True, tensorrt_pythons=())
    seen = msgspec.structs.replace(machine, gpus=(ORIN,), tensorrt=tensorrt, libraries=libraries, system=system)
    monkeypatch.setattr(doctor, "look", lambda: seen)
    code = cli._run(["compile", str(bundle), "--precision", "fp16", "--in-process"])
    told = capsys.readouterr().err
    assert code == (0 if has_openvino else 1)
    assert f"Orin is here, and {way}" in told


def test_a_gpu_that_no_profile_knows_is_compiled_for_and_told(bundle, monkeypatch, capsys):
    monkeypatch.setattr(module, "flavour_here", lambda _: ("tensorrt", None))
    seen = {}

    def compiled(*_, **options):
        seen.update(options)
        return module.CompileResult((), ())

    monkeypatch.setattr(module, "compile_bundle", compiled)
    assert cli._run(["compile", str(bundle), "--in-process"]) == 0
    assert (seen["flavour"], seen["profile"]) == ("tensorrt", None)
    assert "no profile is known to be of this GPU" in capsys.readouterr().err


# ---- one precision that does not work, and engines that change hands


def gated(path: Path, **sqnr_db: float) -> None:
    """Gates by precision that the engines of this bundle have to pass when they are compiled again."""
    opened = Bundle.open(path)
    graphs = tuple(
        msgspec.structs.replace(g, gate=Gate(min_sqnr_db=sqnr_db.get(g.precision.value, 0.0)))
        for g in opened.manifest.graphs
    )
    write_manifest(path, msgspec.structs.replace(opened.manifest, graphs=graphs))


def test_a_precision_outside_its_gate_does_not_keep_the_others(bundle):
    for name in names(bundle):
        Bundle.open(bundle).remove_engine(name)
    gated(bundle, fp16=1000.0)
    said = []
    [added] = compile_bundle(bundle, progress=lambda step, *_: said.append(step)).engines
    assert added.key.precision is Precision.FP32
    assert any(re.search("leaving fp16 out: fp16 is outside its gate", step) for step in said)
    assert names(bundle) == [added.name]
    # What starts a robot goes on every time: an engine is there.
    assert compile_bundle(bundle, resume=True).engines == ()
    # Who asks for it by name is told by an error, and so is who gets nothing.
    with pytest.raises(ParityError, match="fp16 is outside its gate"):
        compile_bundle(bundle, precisions=(Precision.FP16,), resume=True)
    gated(bundle, fp16=1000.0, fp32=1000.0)
    with pytest.raises(ParityError, match="is outside its gate"):
        compile_bundle(bundle)
    assert names(bundle) == [added.name]


def test_what_was_left_out_is_told_where_there_are_no_steps_too(bundle, capsys):
    gated(bundle, fp16=1000.0)
    assert cli._run(["compile", str(bundle), "--flavour", "openvino", "--json"]) == 0
    told = capsys.readouterr()
    document = json.loads(told.out)
    assert [engine["key"]["precision"] for engine in document["engines"]] == ["fp32"]
    assert document["notes"][0].startswith("leaving fp16 out: fp16 is outside its gate")
    assert told.err.startswith("leaving fp16 out: fp16 is outside its gate")
    assert cli._run(["compile", str(bundle), "--flavour", "openvino"]) == 0
    assert capsys.readouterr().err.count("leaving fp16 out") == 1


def test_what_tensorrt_says_is_in_the_result_and_at_the_command_line(bundle, monkeypatch, capsys):
    """On a TensorRT that is made up: its plan is the engine of the CPU."""

    def compile_for_gpu(graph, sha256, input, precision, **_):
        engine = compile_graph(bytes(graph()), precision, cache=None)
        return dataclasses.replace(engine, notes=(f"TensorRT warned of {precision}", "it needed 1.0 GiB"))

    monkeypatch.setattr(tensorrt_flavour, "compile_engine", compile_for_gpu)
    monkeypatch.setattr(tensorrt_flavour.TensorRt, "check", lambda *_: None)
    gated(bundle, fp16=1000.0)
    said: list[str] = []
    result = compile_bundle(bundle, flavour="tensorrt", progress=lambda step, *_: said.append(step))
    assert [engine.key.precision for engine in result.engines] == [Precision.FP32]
    whole = "\n".join(result.notes)
    # Of a precision that is left out, too: it may be why.
    for expected in (
        "TensorRT warned of fp16",
        "TensorRT warned of fp32",
        "it needed 1.0 GiB",
        "leaving fp16 out: fp16 is",
    ):
        assert expected in whole
    assert set(result.notes) <= set(said)  # at once, too
    command = ["compile", str(bundle), "--flavour", "tensorrt"]
    assert cli._run([*command, "--json"]) == 0
    assert "TensorRT warned of fp32" in json.loads(capsys.readouterr().out)["notes"]
    assert cli._run(command) == 0
    told = capsys.readouterr().err
    assert told.count("TensorRT warned of fp32") == 1
    assert told.count("leaving fp16 out") == 1


def test_which_engine_runtimes_take_is_in_the_result(bundle, monkeypatch):
    planted(monkeypatch, fp16=2.0, fp32=1.0)
    assert compile_bundle(bundle).notes == ("fp32 1.00 ms, fp16 2.00 ms (0.50x): runtimes take fp32 here",)


# ---- a refusal says what helps, and what it says works when it is typed


@pytest.mark.parametrize("call", ["compile", "verify"])
@pytest.mark.parametrize(
    ("precision", "helps"),
    [("fp32", "computes it wrongly: install another release"), ("fp16", "fp16 rounds this network too coarsely")],
)
def test_no_image_is_to_blame_where_nothing_is_calibrated(bundle, call, precision, helps):
    gated(bundle, **{precision: 1000.0})
    if call == "verify":  # the gate is the one that the engine was compiled with
        opened = Bundle.open(bundle)
        hard = tuple(
            msgspec.structs.replace(e, parity=msgspec.structs.replace(e.parity, gate=Gate(min_sqnr_db=1000.0)))
            for e in opened.manifest.engines
        )
        write_manifest(bundle, msgspec.structs.replace(opened.manifest, engines=hard))
        helps = (
            f"It held its gate when it was compiled: compile it again with edge-backbones compile {bundle} "
            f"--flavour openvino --precision {precision}; edge-backbones verify {bundle} --explain finds the layer"
        )
    with pytest.raises(ParityError) as caught:
        if call == "compile":
            compile_bundle(bundle, precisions=(Precision(precision),))
        else:
            verify_bundle(bundle, engine=precision)
    assert helps in str(caught.value)
    for word in ("images", "--method", "calibrat"):
        assert word not in str(caught.value)


def test_the_command_for_a_graph_that_the_bundle_lacks_builds_it(bundle, photograph_folder):
    """`run --engine int8` of a bundle without such a graph: nothing that compiles would make it."""
    opened = Bundle.open(bundle)
    for refusal, call in (
        (EngineMismatchError, lambda: EdgeBackbone.from_pretrained(bundle, engine="int8")),
        (EngineMismatchError, lambda: verify_bundle(bundle, engine="int8")),
        (BundleError, lambda: compile_bundle(bundle, precisions=(Precision.INT8,))),
        (BundleError, lambda: compile_bundle(bundle, precisions=(Precision.FP16, Precision.INT8))),
        (BundleError, lambda: EdgeBackbone.from_pretrained(bundle, engine="int8", on_mismatch="compile")),
    ):
        with pytest.raises(refusal) as caught:
            call()
        [held] = {" ".join(f"--precision {g.precision}" for g in opened.manifest.graphs if g.format == "onnx")}
        command = f"build MODEL {bundle} {held} --precision int8 --images FOLDER --overwrite"
        assert f"edge-backbones {command}" in str(caught.value)
    typed = shlex.split(command.replace("MODEL", "test_resnet").replace("FOLDER", str(photograph_folder)))
    small = ["--size", "64x96", "--weights", "random:0", "--no-torchscript", "--no-report", "--golden", "2"]
    assert cli._run([*typed, *small]) == 0
    EdgeBackbone.from_pretrained(bundle, engine="int8").close()


def test_the_command_for_an_engine_that_the_bundle_lacks_compiles_its_graph(bundle):
    lacking = next(e for e in Bundle.open(bundle).manifest.engines if e.key.precision is Precision.FP16)
    Bundle.open(bundle).remove_engine(lacking.name)
    with pytest.raises(EngineMismatchError) as caught:
        EdgeBackbone.from_pretrained(bundle, engine="fp16")
    command = f"compile {bundle} --precision fp16"
    assert f"Run: edge-backbones {command}" in str(caught.value)
    assert cli._run(shlex.split(command)) == 0
    EdgeBackbone.from_pretrained(bundle, engine="fp16").close()


@pytest.mark.parametrize("flavour", [[], ["--flavour", "tensorrt"], ["--flavour", "tensorrt_rtx"]])
@pytest.mark.parametrize("gpu", [None, Gpu(0, "NVIDIA GeForce RTX 4090", "sm_89", 24 << 30, "13.0", 128, False)])
def test_an_engine_for_a_board_is_compiled_on_the_board(bundle, monkeypatch, capsys, gpu, flavour):
    """And nothing else is advised on a workstation, with a GPU of its own or without one."""
    no_gpu = "" if gpu else "no NVIDIA driver (libcuda.so.1 is missing)"
    host = hosts.Host("x86_64", (), "cpu", {"tensorrt": "10.3.0", "openvino": "2026.4.1"}, gpu, no_gpu)
    monkeypatch.setattr(hosts, "this_host", lambda *_, **__: host)
    assert cli._run(["compile", str(bundle), "--profile", "jetson-orin-nano", *flavour]) == 1
    told = " ".join(capsys.readouterr().err.split())
    here = "has NVIDIA GeForce RTX 4090, sm_89" if gpu else "has none (no NVIDIA driver (libcuda.so.1 is missing))"
    assert (
        f"engines for jetson-orin-nano are compiled on its own GPU, sm_87, and this machine {here}: copy {bundle} to the "
        f"device and run there: edge-backbones compile {bundle.name}"
    ) in told
    assert "use flavour" not in told
    assert "pip install" not in told
    assert "tensorrt_rtx" not in told


def test_a_graph_that_the_board_lacks_is_left_out_unless_it_was_asked_for(bundle, monkeypatch):
    opened = Bundle.open(bundle)
    as_fp8 = msgspec.structs.replace(opened.manifest.onnx_graph(Precision.FP32), precision=Precision.FP8)
    write_manifest(bundle, msgspec.structs.replace(opened.manifest, graphs=(as_fp8, *opened.manifest.graphs)))
    monkeypatch.setattr(tensorrt_flavour.TensorRt, "check", lambda *_: None)
    monkeypatch.setattr(module, "_refuse_elsewhere", lambda *_: None)
    monkeypatch.setattr(
        tensorrt_flavour,
        "compile_engine",
        lambda graph, _, __, precision, **___: compile_graph(bytes(graph()), precision, cache=None),
    )
    said = []
    options = {"flavour": "tensorrt", "profile": "jetson-orin-nano"}
    added = compile_bundle(bundle, **options, progress=lambda step, *_: said.append(step)).engines
    assert {engine.key.precision for engine in added} == {Precision.FP16, Precision.FP32}
    assert any("leaving fp8 out: fp8 needs sm_89 or newer and jetson-orin-nano is sm_87" in step for step in said)
    with pytest.raises(CompileError, match="fp8 needs sm_89"):
        compile_bundle(bundle, **options, precisions=(Precision.FP8,))


def test_engines_that_nobody_timed_are_timed_when_a_killed_compilation_goes_on(bundle, monkeypatch):
    opened = Bundle.open(bundle)
    untimed = tuple(msgspec.structs.replace(e, milliseconds=None) for e in opened.manifest.engines)
    write_manifest(bundle, msgspec.structs.replace(opened.manifest, engines=untimed))
    together = planted(monkeypatch, fp16=2.0, fp32=1.0)
    assert compile_bundle(bundle, resume=True).engines == ()
    assert [sorted(one) for one in together] == [["fp16", "fp32"]]
    assert compile_bundle(bundle, resume=True).engines == ()
    assert len(together) == 1
    with EdgeBackbone.from_pretrained(bundle) as backbone:
        assert "-fp32-" in backbone.engine


def test_an_engine_that_another_process_took_out_while_it_was_timed_is_no_failure(bundle, monkeypatch):
    before, said = names(bundle), []

    def measure(engines, input, *, gpu, progress):
        taken = next(name for name in before if "-fp16-" in name)
        Bundle.open(bundle).remove_engine(taken)
        return [timing.Times(1.0, None)] * len(engines)

    monkeypatch.setattr(timing, "time_engines", measure)
    [added] = compile_bundle(bundle, precisions=(Precision.FP32,), progress=lambda step, *_: said.append(step)).engines
    assert any(step.startswith("not timed: ") and "another process took" in step for step in said)
    assert names(bundle) == [added.name]


def test_two_whose_engines_differ_do_not_disturb_each_other(bundle, monkeypatch):
    """TensorRT's plans of one graph differ from run to run: each replaces the file that the other has just named."""

    def compile_one(graph, precision, **_):
        engine = compile_graph(graph, precision, cache=None)
        return dataclasses.replace(engine, data=engine.data + bytes([threading.get_ident() % 251]))

    monkeypatch.setattr(openvino_compile, "compile_graph", compile_one)
    monkeypatch.setattr(parity, "measure_engine", lambda key, *_, **__: passing(bundle, key.precision))
    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(compile_bundle, bundle) for _ in range(2)]
            assert all(len(one.result(120).engines) <= 2 for one in both)
        Bundle.open(bundle).check_files()


def passing(path: Path, precision: Precision) -> ParityReport:
    return next(e.parity for e in Bundle.open(path).manifest.engines if e.key.precision is precision)


def test_an_engine_of_the_bundle_that_was_here_before_is_refused(bundle, tmp_path, monkeypatch):
    """A bundle that is replaced while an engine of it is compiled would run the old network."""
    options = BuildOptions(**{**OPTIONS, "weights": "random:1"}, precisions=(Precision.FP32,))

    def compile_one(graph, precision, **_):
        build_bundle("test_resnet", bundle, options=options, overwrite=True)
        return compile_graph(graph, precision, cache=None)

    monkeypatch.setattr(openvino_compile, "compile_graph", compile_one)
    with pytest.raises(BundleError, match=r"was built anew since .* was begun: compile it again"):
        compile_bundle(bundle, precisions=(Precision.FP32,))
    opened = Bundle.open(bundle)
    opened.check_files()
    assert {e.key.graph_sha256 for e in opened.manifest.engines} <= {g.file.sha256 for g in opened.manifest.graphs}


def test_an_engine_that_fails_when_it_is_measured_keeps_no_other_back(bundle, monkeypatch):
    measure = parity.measure_engine

    def fails(key, *rest, **more):
        if key.precision is Precision.FP16:
            raise OutOfMemoryError("cuda:0 has no 3.0 GB left")
        return measure(key, *rest, **more)

    monkeypatch.setattr(parity, "measure_engine", fails)
    said = []
    [added] = compile_bundle(bundle, progress=lambda step, *_: said.append(step)).engines
    assert added.key.precision is Precision.FP32
    assert "leaving fp16 out: cuda:0 has no 3.0 GB left" in said
    with pytest.raises(OutOfMemoryError):
        compile_bundle(bundle, precisions=(Precision.FP16,))


# ---- an ARM CPU: nobody knows beforehand which library is faster


@pytest.fixture
def arm(monkeypatch):
    """This machine, called aarch64."""
    monkeypatch.setattr(hosts.platform, "machine", lambda: "aarch64")


def by_library(path: Path) -> list[tuple[str, str]]:
    keys = [engine.key for engine in Bundle.open(path).manifest.engines if engine.key.architecture == "aarch64"]
    return sorted((key.flavour, key.precision.value) for key in keys)


def test_on_an_arm_cpu_both_libraries_compile_and_the_faster_engine_runs(bundle, arm, monkeypatch, capsys):
    def measure(engines, input, *, gpu, progress):
        found = []
        for opener in engines:
            opener().close()  # it loads
            key = opener.args[1].key
            found.append(timing.Times(1.0 if (key.flavour, key.precision) == ("onnxruntime", "fp16") else 2.0, None))
        return found

    monkeypatch.setattr(timing, "time_engines", measure)
    assert cli._run(["compile", str(bundle), "--device", "cpu"]) == 0
    both = [(library, precision) for library in ("onnxruntime", "openvino") for precision in ("fp16", "fp32")]
    assert by_library(bundle) == both
    assert "runtimes take onnxruntime-" in capsys.readouterr().err
    with EdgeBackbone.from_pretrained(bundle) as backbone:
        assert backbone.engine.startswith("onnxruntime-")
        assert "-fp16-" in backbone.engine
    compiled = []
    monkeypatch.setattr(openvino_compile, "compile_graph", lambda *_, **__: compiled.append(1))
    assert cli._run(["compile", str(bundle), "--device", "cpu", "--resume"]) == 0
    assert not compiled


def test_a_build_on_an_arm_cpu_makes_engines_of_both_libraries(arm, monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "time_engines", lambda engines, *_, **__: [timing.Times(2.0, None) for _ in engines])
    options = BuildOptions(**OPTIONS, precisions=(Precision.FP32,))
    result = build_bundle("test_resnet", tmp_path / "net.bundle", options=options)
    assert by_library(result.bundle.path) == [("onnxruntime", "fp32"), ("openvino", "fp32")]
    assert len(result.reports) == 2
    assert any("runtimes take" in note for note in result.notes)

    def broken(*_, **__):
        raise CompileError("the child process died")

    monkeypatch.setattr(build, "compile_bundle", broken)
    result = build_bundle("test_resnet", tmp_path / "other.bundle", options=options)
    assert by_library(result.bundle.path) == [("openvino", "fp32")]
    assert "no engines of onnxruntime were added: the child process died" in result.notes


def test_who_names_a_library_gets_that_one_alone_on_an_arm_cpu(bundle, arm):
    assert cli._run(["compile", str(bundle), "--flavour", "openvino"]) == 0
    assert {library for library, _ in by_library(bundle)} == {"openvino"}


def test_opening_on_an_arm_cpu_compiles_with_both_libraries(bundle, arm):
    with EdgeBackbone.from_pretrained(bundle, engine="fp32", on_mismatch="compile"):
        pass
    assert by_library(bundle) == [("onnxruntime", "fp32"), ("openvino", "fp32")]


def test_x86_64_stays_with_one_library(bundle):
    assert cli._run(["compile", str(bundle), "--device", "cpu"]) == 0
    assert {engine.key.flavour for engine in Bundle.open(bundle).manifest.engines} == {"openvino"}


@pytest.mark.parametrize(
    ("missing", "title", "extra"), [("openvino", "OpenVINO", "cpu"), ("onnxruntime", "ONNX Runtime", "onnxruntime")]
)
def test_the_library_that_is_not_installed_is_named_with_its_extra(bundle, arm, monkeypatch, missing, title, extra):
    monkeypatch.setattr(type(registry.get(missing)), "version", lambda self: None)
    here = registry.serving(registry.this_machine(None))
    assert here.name != missing
    result = compile_bundle(bundle, flavour=here.name, rivals=here.rivals(registry.this_machine(None)))
    assert {library for library, _ in by_library(bundle)} == {here.name}
    [note] = [note for note in result.notes if "not installed" in note]
    assert note.startswith(f"{title} may be faster on this CPU, and is not installed: pip install")
    assert f"[{extra}]" in note


def test_without_either_library_the_first_one_is_asked_for(bundle, arm, monkeypatch):
    for name in ("openvino", "onnxruntime"):
        monkeypatch.setattr(type(registry.get(name)), "version", lambda self: None)
    monkeypatch.setattr(openvino_session, "library_version", lambda: None)
    with pytest.raises(MissingDependencyError, match="compiling the CPU engine"):
        compile_bundle(bundle, rivals=("onnxruntime",))


def test_what_one_library_refuses_the_other_compiles(bundle, arm, monkeypatch):
    """OpenVINO computes wrongly, or ONNX Runtime lacks the package that rewrites graphs."""

    def wrong(*_, **__):
        raise CompileError("it computes wrongly")

    def lacking(*_, **__):
        raise MissingDependencyError("compiling an fp16 graph for ONNX Runtime", "onnxruntime")

    monkeypatch.setattr(onnxruntime_compile, "rewrite", lacking)
    result = compile_bundle(bundle, rivals=("onnxruntime",))
    assert by_library(bundle) == [("onnxruntime", "fp32"), ("openvino", "fp16"), ("openvino", "fp32")]
    assert any(re.match("leaving fp16 out for ONNX Runtime: .*onnxruntime", note) for note in result.notes)
    monkeypatch.setattr(openvino_compile, "compile_graph", wrong)
    result = compile_bundle(bundle, precisions=("fp32",), rivals=("onnxruntime",))
    assert [engine.key.flavour for engine in result.engines] == ["onnxruntime"]
    assert "leaving fp32 out for OpenVINO: it computes wrongly" in result.notes
    # A precision that was named and that neither compiles is an error, whatever was added.
    with pytest.raises(CompileError, match="it computes wrongly"):
        compile_bundle(bundle, precisions=("fp16", "fp32"), rivals=("onnxruntime",))


@pytest.fixture(scope="module")
def built_int8(tmp_path_factory, photograph_folder) -> Path:
    target = tmp_path_factory.mktemp("int8") / "net.bundle"
    options = BuildOptions(**OPTIONS, precisions=(Precision.INT8,))
    return build_bundle("test_resnet", target, images=photograph_folder, options=options).bundle.path


@pytest.mark.skipif(
    not has_units(Precision.BF16, hosts.this_host({}).cpu_features), reason="this CPU has no bf16 instructions"
)
@pytest.mark.parametrize(
    ("milliseconds", "fails", "expected"),
    [((2.0, 1.0), False, "bf16"), ((1.0, 2.0), False, "fp32"), ((2.0, 1.0), True, "fp32")],
    ids=["faster", "slower", "outside its gate"],
)
def test_what_is_not_int8_is_computed_in_the_faster_format_inside_the_gate(
    built_int8, tmp_path, monkeypatch, milliseconds, fails, expected
):
    path = Path(shutil.copytree(built_int8, tmp_path / "net.bundle"))
    for name in names(path):
        Bundle.open(path).remove_engine(name)
    tried: list[str] = []

    def measure(bundle, key, *rest, **more):
        tried.append(computed_in(key))
        if fails and tried[-1] == "bf16":
            raise InferenceError("no engine that runs")
        return measured(bundle, key, *rest, **more)

    measured = module.measure_in_bundle
    monkeypatch.setattr(module, "measure_in_bundle", measure)
    monkeypatch.setattr(
        module,
        "time_engines",
        lambda engines, *_, **__: [timing.Times(one, None) for one, _ in zip(milliseconds, engines, strict=True)],
    )
    [engine] = compile_bundle(path, precisions=(Precision.INT8,)).engines
    assert computed_in(engine.key) == expected
    assert tried == ["fp32", "bf16"]
    assert names(path) == [engine.name]  # the other one is not in the bundle
    with EdgeBackbone.from_pretrained(path) as backbone:
        assert backbone.engine == engine.name
