"""The command line: exit codes, one line per refusal, JSON, files written. Builds are tested in tests/toolchain."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from edge_backbones.bundle.manifest import USE_PROCESSOR, Decision, EngineRecord, GraphRecord, Trial
from edge_backbones.bundle.reader import Bundle
from edge_backbones.bundle.writer import BundleWriter, record_bytes, record_file, write_manifest
from edge_backbones.cli import compile as compiling
from edge_backbones.cli import machine
from edge_backbones.cli import main as cli
from edge_backbones.cli.run import save_maps
from edge_backbones.doctor import Finding
from edge_backbones.errors import CompileError
from edge_backbones.installation import pip_install
from edge_backbones.parity_report import Gate
from edge_backbones.report.words import computed
from edge_backbones.spec import Precision
from edge_backbones.testing import make_bundle, pooled, pooling_input
from tests.simulated_builder import GRAPH


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "edge_backbones.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def refused(done: subprocess.CompletedProcess, code: int = 1) -> str:
    """The one line on stderr of a refusal, which is the last: lines before it are steps that were begun."""
    assert done.returncode == code, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    *steps, line = done.stderr.strip().splitlines()
    assert line.startswith("edge-backbones: ")
    assert not [step for step in steps if step.startswith("edge-backbones: ") or len(step) > 60], done.stderr
    return line


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("cli") / "pool.bundle", pooling_input(1))


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "noise.png"
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("command", [[], ["--help"], *([name, "--help"] for name in ("build", "run", "doctor"))])
def test_help_is_worth_reading(command):
    done = run(*command)
    assert "edge-backbones" in done.stdout + done.stderr
    assert done.returncode in (0, 2)


def test_version():
    assert run("--version").stdout.startswith("edge-backbones 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["build", "resnet18"],
        ["build", "resnet18", "x.bundle", "--out-indices", "a"],
        ["build", "resnet18", "x.bundle", "--batch", "4:2:1"],
        ["build", "resnet18", "x.bundle", "--size", "224x"],
        ["build", "resnet18", "x.bundle", "--precision", "int3"],
        ["run"],
    ],
)
def test_usage_errors_exit_with_2(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()


def test_int8_without_images_is_refused_before_anything_is_loaded(tmp_path):
    assert "--images FOLDER" in refused(run("build", "resnet18", tmp_path / "x.bundle"))
    assert list(tmp_path.iterdir()) == []


def test_inspect_shows_stages_and_engines(bundle):
    done = run("inspect", bundle.path)
    assert done.returncode == 0
    assert "pool4" in done.stdout
    assert "yes" in done.stdout
    assert bundle.manifest.preprocessing in done.stdout
    document = json.loads(run("inspect", bundle.path, "--json").stdout)
    assert document["manifest"]["backbone"]["out_features"] == ["pool4", "pool8"]
    assert document["reasons_against"] == {bundle.manifest.engines[0].name: []}


def test_inspect_says_in_which_format_an_engine_computes(tmp_path, capsys):
    made = make_bundle(tmp_path / "formats.bundle", pooling_input(1))
    assert cli._run(["inspect", str(made.path)]) == 0
    assert "computed in" not in capsys.readouterr().out  # of engines that say nothing of it
    (engine,) = made.manifest.engines
    parity = msgspec.structs.replace(engine.parity, precision=Precision.FP16)
    key = msgspec.structs.replace(engine.key, precision=Precision.FP16, computes_in="fp32")
    other = msgspec.structs.replace(engine, key=key, parity=parity)
    write_manifest(made.path, msgspec.structs.replace(made.manifest, engines=(engine, other)))
    assert cli._run(["inspect", str(made.path)]) == 0
    assert f"{other.name}: fp16, computed in fp32" in " ".join(capsys.readouterr().out.split())
    assert computed("int8", "bf16") == " with a bf16 rest"
    assert computed("int8", msgspec.UNSET) == ""


def test_inspect_counts_the_kernels_of_a_plan(tmp_path, capsys):
    made = make_bundle(tmp_path / "pool.bundle", pooling_input(1))
    names = ["_gemm_mha_v2_myl0_1", "__myl_Cast_myl0_2", "Reformatting CopyNode for Input Tensor 0 to conv", "conv"]
    layers = made.path / "engines" / "pool.layers.json"
    layers.write_text(json.dumps({"Layers": names}), encoding="utf-8")
    (engine,) = made.manifest.engines
    engine = msgspec.structs.replace(engine, layers=record_file(made.path, "engines/pool.layers.json"))
    write_manifest(made.path, msgspec.structs.replace(made.manifest, engines=(engine,)))
    assert cli._run(["inspect", str(made.path)]) == 0
    said = "4 kernels: 1 fused attention, 1 cast, 1 reformat or copy"
    assert said in " ".join(capsys.readouterr().out.split())
    assert cli._run(["inspect", str(made.path), "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)["kernels"]
    assert counts == {engine.name: {"kernels": 4, "attention": 1, "casts": 1, "copies": 1}}
    for damage in (lambda: layers.write_text("{}", encoding="utf-8"), layers.unlink):  # inspect goes on: verify tells
        damage()
        assert cli._run(["inspect", str(made.path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["kernels"] == {}


def changed(tmp_path: Path, **changes: object) -> Path:
    """The pooling bundle with another manifest, and with a file for each graph of it."""
    bundle = make_bundle(tmp_path / "pool.bundle", pooling_input(1))
    for graph in changes.get("graphs", ()):
        BundleWriter(bundle.path).add_file(graph.file.path, GRAPH)
    write_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, **changes))
    return bundle.path


def graph_of(precision: Precision) -> GraphRecord:
    path = f"graphs/{precision}.onnx"
    return GraphRecord(format="onnx", precision=precision, file=record_bytes(path, GRAPH), opset=17)


def test_inspect_of_graphs_alone_lists_them_and_says_how_to_compile(tmp_path):
    path = changed(tmp_path, engines=(), graphs=(graph_of(Precision.FP32), graph_of(Precision.INT8)))
    shown = run("inspect", path).stdout
    assert "runs here" not in shown
    lines = [line.split() for line in shown.splitlines()]
    assert ["int8", "onnx", "graphs/int8.onnx", "0.0", "kB"] in lines
    assert ["fp32", "onnx", "graphs/fp32.onnx", "0.0", "kB"] in lines
    assert f"no engine yet: compile one on the device: edge-backbones compile {path}" in shown


def test_inspect_of_engines_that_do_not_run_here_says_what_is_next(bundle, tmp_path):
    (engine,) = bundle.manifest.engines
    other = msgspec.structs.replace(engine, key=msgspec.structs.replace(engine.key, architecture="another"))
    path = changed(tmp_path, engines=(other,), graphs=(graph_of(Precision.FP32),))
    assert (
        f"no engine of it runs here: compile one on the device: edge-backbones compile {path}"
        in run("inspect", path).stdout
    )
    write_manifest(path, msgspec.structs.replace(bundle.manifest, engines=(other,)))
    shown = run("inspect", path).stdout
    assert "it has no ONNX graph" in shown
    assert "edge-backbones compile" not in shown.partition("no engine of it runs here")[2]


def test_inspect_names_sizes_and_times(bundle, tmp_path):
    (engine,) = bundle.manifest.engines
    row = next(line for line in run("inspect", bundle.path).stdout.splitlines() if line.startswith(engine.name))
    assert f"{engine.file.size / 1e3:.1f} kB" in row
    assert "not timed" in row
    trial = Trial(precision=Precision.FP32, blocks=(), cosine=1.0, sqnr_db=99.0, passed=True, milliseconds=1.25)
    decision = Decision(sentence="", device_name=engine.key.device_name, trials=(trial,))
    path = changed(tmp_path, decision=decision)
    assert "1.25 (when built)" in run("inspect", path).stdout
    replace = msgspec.structs.replace
    twin = replace(engine, key=replace(engine.key, device_name="another"), milliseconds=2.5)
    write_manifest(path, replace(bundle.manifest, engines=(engine, twin)))
    shown = run("inspect", path).stdout
    assert f"parity of {engine.name} with fp32 torch" in shown
    assert f"parity of {twin.name} with fp32 torch" in shown
    assert "2.50" in shown


def test_verify_measures_again(bundle):
    done = run("verify", bundle.path)
    assert done.returncode == 0
    assert "is whole and right" in done.stdout
    (report,) = json.loads(run("verify", bundle.path, "--json").stdout)["parity"]
    assert [stage["passed"] for stage in report["stages"]] == [True, True]


def test_verify_measures_every_engine_though_one_fails(tmp_path):
    """With two gates that nothing passes: both are told, and the engine between them that nobody measured is let in."""
    bundle = make_bundle(tmp_path / "pool.bundle")
    (made,) = bundle.manifest.engines
    blob = bytes(bundle.read(made.file))

    def add(precision, gate, *, measured):
        path = f"graphs/{precision}.onnx"
        file = BundleWriter(bundle.path).add_file(path, GRAPH)
        graph = GraphRecord(format="onnx", precision=precision, file=file, gate=gate)
        manifest = Bundle.open(bundle.path).manifest
        write_manifest(bundle.path, msgspec.structs.replace(manifest, graphs=(*manifest.graphs, graph)))
        key = msgspec.structs.replace(made.key, precision=precision, graph_sha256=graph.file.sha256)
        parity = msgspec.structs.replace(made.parity, precision=precision, gate=gate)
        if not measured:
            parity = msgspec.structs.replace(parity, stages=())
        path = key.path(blob, ".blob")
        record = EngineRecord(key=key, file=record_bytes(path, blob), parity=parity)
        return bundle.add_engine(record, {path: blob})

    impossible = Gate(min_sqnr_db=299)
    add(Precision.FP16, impossible, measured=True)
    add(Precision.BF16, Gate(min_sqnr_db=40), measured=False)
    add(Precision.INT8, impossible, measured=True)

    done = run("verify", bundle.path, "--json")
    assert done.returncode == 3
    document = json.loads(done.stdout)
    assert [report["precision"] for report in document["parity"]] == ["fp16", "int8"]
    assert "fp16 is outside its gate (SQNR >= 299 dB)" in document["message"]
    assert "int8 is outside its gate" in document["message"]
    measured = {e.key.precision: e.parity.measured for e in Bundle.open(bundle.path).manifest.engines}
    assert measured[Precision.BF16]


def test_run_writes_arrays_and_a_picture(bundle, photo, tmp_path):
    done = run("run", bundle.path, photo, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "pool4 3x8x12" in done.stdout
    with np.load(tmp_path / "out" / "noise.npz") as features:
        assert {name: features[name].shape for name in features.files} == {"pool4": (3, 8, 12), "pool8": (3, 4, 6)}
        assert np.isfinite(features["pool4"]).all()
        np.testing.assert_allclose(
            pooled(np.repeat(np.repeat(features["pool4"][None], 4, 2), 4, 3))[1][0], features["pool8"], atol=1e-4
        )
    with Image.open(tmp_path / "out" / "noise.png") as picture:
        assert picture.size[0] > 400


def test_run_says_that_it_cannot_repeat_the_processor(photo, tmp_path):
    bundle = make_bundle(tmp_path / "odd.bundle", pooling_input(1))
    source = msgspec.structs.replace(
        bundle.manifest.source, preprocessing_notes=(f"OddProcessor turns pictures: {USE_PROCESSOR}",)
    )
    write_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, source=source))
    done = run("run", bundle.path, photo, "--out", tmp_path / "out")
    assert done.returncode == 0
    assert "not what the network gives after its own processor: OddProcessor turns pictures" in done.stderr


def test_run_takes_a_folder_and_speaks_json(bundle, photo, tmp_path):
    done = run("run", bundle.path, photo.parent, "--out", tmp_path, "--no-picture", "--json")
    (entry,) = json.loads(done.stdout)
    assert entry["shapes"] == {"pool4": [3, 8, 12], "pool8": [3, 4, 6]}
    assert not list(tmp_path.glob("*.png"))


def test_run_never_overwrites_an_image(bundle, photo, tmp_path):
    own = tmp_path / "own.png"
    own.write_bytes(photo.read_bytes())
    assert f"{own} is one of the images and would be overwritten" in refused(
        run("run", bundle.path, own, "--out", tmp_path)
    )
    assert own.read_bytes() == photo.read_bytes()


def test_images_of_one_name_get_files_of_their_own(bundle, photo, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "a.jpg", "b.png"):
        with Image.open(photo) as image:
            image.save(folder / name)
    assert run("run", bundle.path, folder, "--out", tmp_path / "out", "--no-picture").returncode == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.jpg.npz", "a.png.npz", "b.npz"]


def test_brackets_in_names_and_fixes_are_shown_as_they_are(photo, tmp_path):
    folder = tmp_path / "v[/bold]1.bundle"
    make_bundle(folder, pooling_input(1))
    done = run("verify", folder)
    assert done.returncode == 0, done.stderr
    assert str(folder) in done.stdout


def test_run_refuses_what_is_not_an_image(bundle, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not a picture")
    assert f"{broken} does not decode as an image" in refused(run("run", bundle.path, broken, "--out", tmp_path / "o"))
    assert "has no images" in refused(run("run", bundle.path, (tmp_path / "empty").mkdir() or tmp_path / "empty"))
    assert "does not exist" in refused(run("run", bundle.path, tmp_path / "nothing.jpg"))
    said = refused(run("run", bundle.path, tmp_path))
    assert f"{tmp_path}: none of its 1 files is read: {broken} does not decode as an image: it begins with" in said


def test_run_skips_the_broken_files_of_a_folder_with_the_reason(bundle, photo, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "z.png"):
        (folder / name).write_bytes(photo.read_bytes())
    (folder / "empty.jpg").touch()
    for name in ("thermal 1.png", "thermal 2.png"):
        Image.new("I;16", (20, 10)).save(folder / name)
    arguments = ("run", bundle.path, folder, "--out", tmp_path / "out", "--no-picture")
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.npz", "z.npz"]
    step, head, *reasons = done.stderr.splitlines()
    assert step == "running"
    assert head == "3 files were skipped:"
    assert reasons[0].startswith(f"  {folder}/thermal 1.png has pixels of more than 8 bits")
    assert reasons[0].endswith("(and 1 more)")
    assert reasons[1:] == [f"  {folder}/empty.jpg does not decode as an image: it is empty"]
    entries = {Path(entry["image"]).name: entry for entry in json.loads(run(*arguments, "--json").stdout)}
    assert "features" in entries["a.png"]
    assert entries["empty.jpg"]["skipped"] == "does not decode as an image: it is empty"


def test_damaged_bundles_are_refused_in_one_line(tmp_path):
    bundle = make_bundle(tmp_path / "b.bundle")
    engine = bundle.path / bundle.manifest.engines[0].file.path
    data = bytearray(engine.read_bytes())
    data[100] ^= 1
    engine.write_bytes(data)
    assert f"{engine} was changed" in refused(run("verify", bundle.path))
    document = json.loads(run("verify", bundle.path, "--json").stdout)
    assert document["error"] == "IntegrityError"
    assert run("verify", bundle.path, "--json").returncode == 1
    assert "is not a bundle" in refused(run("inspect", tmp_path / "nothing"))


def test_compile_says_when_there_is_no_graph(bundle):
    assert "has no graph to compile" in refused(run("compile", bundle.path))


def test_doctor_names_every_extra_that_is_missing():
    done = run("doctor")
    assert done.returncode == 0
    assert "OpenVINO" in done.stdout
    findings = json.loads(run("doctor", "--json").stdout)
    topics = {finding["topic"]: finding for finding in findings}
    assert topics["run on the CPU (OpenVINO)"]["ok"]
    assert all(finding["ok"] or finding["found"] for finding in findings)
    code = (
        "import importlib.metadata as m, sys\n"
        "def missing(name): raise m.PackageNotFoundError(name)\n"
        "m.version = missing\n"
        "from edge_backbones.doctor import judge, look\n"
        "from edge_backbones.machine.gpus import Gpu\n"
        "import msgspec\n"
        "gpu = Gpu(0, 'NVIDIA H100', 'sm_90', 80 << 30, '13.0', 132, False)\n"
        "print([f.fix for f in judge(msgspec.structs.replace(look(), gpus=(gpu,))) if not f.ok])"
    )
    fixes = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for extra in ("cpu", "images", "report", "build", "tensorrt"):
        assert pip_install(extra) in fixes


def test_a_pipe_sees_one_plain_line_per_step(bundle):
    assert run("verify", bundle.path).stderr.splitlines() == ["checking files", "verifying fp32"]
    assert run("verify", bundle.path, "--json").stderr == ""


def test_quiet_and_verbose_work_before_and_behind_the_name_of_a_command(bundle):
    for arguments in (["-q", "verify", bundle.path], ["verify", bundle.path, "--quiet"]):
        done = run(*arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for arguments in (
        ["-v", "verify", bundle.path],
        ["verify", "-v", bundle.path],
        ["-v", "verify", "-v", bundle.path],
    ):
        lines = run(*arguments).stderr.splitlines()
        assert lines[0].startswith("versions: Python 3.")
        assert f"numpy {np.__version__}" in lines[0]
        assert sum(line.startswith("versions: ") for line in lines) == 1
        assert any(re.fullmatch(r"verifying fp32: \d+\.\d s", line) for line in lines), lines
    assert "is not a bundle" in refused(run("-q", "verify", bundle.path / "nothing"))
    assert "exclude each other" in run("-q", "verify", bundle.path, "-v").stderr


def test_doctor_shows_the_whole_install_command():
    code = (
        "import importlib.metadata as m, sys\n"
        "def missing(name): raise m.PackageNotFoundError(name)\n"
        "m.version = missing\n"
        "import edge_backbones.cli.main as cli\n"
        "from edge_backbones.cli import console\n"
        "console.out.width = 200\n"
        "sys.exit(cli._run(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert pip_install("cpu") in done.stdout


def test_an_interrupt_that_a_library_swallows_ends_the_next_step():
    code = """
import contextlib, signal
from edge_backbones.cli import console
before = signal.getsignal(signal.SIGINT)
try:
    with console.Steps(quiet=True) as progress:
        progress("exporting", 0, None)
        with contextlib.suppress(BaseException):  # as some code of torch does
            signal.raise_signal(signal.SIGINT)
        print("went on")
        progress("calibrating", 0, None)
        print("and on")
except KeyboardInterrupt:
    print("interrupted", signal.getsignal(signal.SIGINT) is before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["went on", "interrupted True"]


def test_a_library_that_breaks_in_the_middle_is_told_in_one_line(monkeypatch, capsys):
    def breaks(*_, **__):
        import_error = ImportError("pydantic_core/_pydantic_core.so: wrong ELF class: ELFCLASS32")
        raise import_error

    monkeypatch.setattr(cli, "app", breaks)
    assert cli._run(["doctor"]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "an installed library is not for this machine" in line
    assert "pydantic_core" in line


def test_stages_are_saved_under_any_name(tmp_path):
    maps = {
        name: np.full((1, 2, 2), i, np.float32) for i, name in enumerate(("file", "allow_pickle", "arr_0", "a.0/b"))
    }
    save_maps(tmp_path / "maps.npz", maps)
    with np.load(tmp_path / "maps.npz", allow_pickle=False) as saved:
        assert saved.files == list(maps)
        for name, feature_map in maps.items():
            np.testing.assert_array_equal(saved[name], feature_map)


def test_report_and_remove_speak_json(tmp_path):
    bundle = make_bundle(tmp_path / "pool.bundle")
    (engine,) = bundle.manifest.engines
    page = tmp_path / "new" / "page.html"
    document = json.loads(run("report", bundle.path, "-o", page, "--json").stdout)
    assert document == {"bundle": str(bundle.path), "report": str(page)}
    assert page.is_file()
    document = json.loads(run("remove", bundle.path, engine.name, "-j").stdout)
    assert document == {"bundle": str(bundle.path), "removed": [engine.name], "left": []}
    document = json.loads(run("remove", bundle.path, engine.name, "-j").stdout)
    assert document["message"].endswith(f"has no engine {engine.name!r}; its engines: none")
    assert f"{bundle.path} has no engine; it holds: none. " in refused(run("verify", bundle.path))


def test_what_is_absent_and_not_needed_is_not_called_ok(monkeypatch, capsys):
    findings = [
        Finding(topic="a", ok=True, found="here"),
        Finding(topic="b", ok=True, found="not installed", absent=True),
        Finding(topic="c", ok=False, found="missing", fix="do this"),
    ]
    monkeypatch.setattr(machine, "judge", lambda _: findings)
    monkeypatch.setattr(machine, "look", lambda: None)
    assert cli._run(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok  a: here", "--  b: not installed", "!!  c: missing", "    to do: do this"
    ]  # fmt: skip


def test_a_refusal_that_was_said_already_is_not_said_again(monkeypatch, capsys, tmp_path):
    """One graph is left out with its reason, nothing else is there, and the call ends with the same error."""
    bundle = make_bundle(tmp_path / "pool.bundle")

    def leaves_all_out(*_, progress, **__):
        progress("leaving fp32 out: it has no form here", 0, None)
        raise CompileError("it has no form here")

    monkeypatch.setattr(compiling.deploy, "compile_bundle", leaves_all_out)
    command = ["compile", str(bundle.path), "--flavour", "openvino"]
    assert cli._run(command) == 1
    said = capsys.readouterr().err
    assert said.count("it has no form here") == 1
    assert said.endswith("edge-backbones: nothing was added: every graph was left out\n")
    assert cli._run([*command, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["message"] == "it has no form here"


def test_remove_checks_every_name_before_it_removes_one(tmp_path):
    bundle = make_bundle(tmp_path / "pool.bundle")
    (engine,) = bundle.manifest.engines
    assert "has no engine 'nothing'" in refused(run("remove", bundle.path, "openvino", "nothing"))
    assert len(Bundle.open(bundle.path).manifest.engines) == 1
    done = run("remove", bundle.path, "openvino", engine.name, "--json")
    assert json.loads(done.stdout) == {"bundle": str(bundle.path), "removed": [engine.name], "left": []}
    again = make_bundle(tmp_path / "again.bundle")
    assert "has neither engines nor graphs now" in run("remove", again.path, "open").stderr


def test_options_that_mean_nothing_here_are_usage_errors(bundle):
    for arguments, said in (
        (
            ["compile", bundle.path, "--flavour", "openvino", "--shapes", "1x32x48"],
            "--shapes: OpenVINO has no such option",
        ),
        (
            ["compile", bundle.path, "-f", "openvino", "--workspace", "9", "--refit"],
            "--workspace and --refit: OpenVINO",
        ),
        (["compile", bundle.path, "-f", "onnxruntime", "--target", "sm_89"], "choose --flavour tensorrt_rtx"),
        (["compile", bundle.path, "-f", "tensorrt", "--device", "cpu"], "compiles for cuda, and --device is cpu"),
        (["sign", bundle.path, "--key", "k.pem", "--sigstore-config", "x"], "x is for --sigstore"),
        (["verify", bundle.path, "--picture", "x.png"], "x.png is what --explain draws"),
        (["bench", bundle.path, "--images", "photos"], "photos is what nncf calibrates with"),
        (["build", "resnet18", "x", "--output-stride", "5"], "output_stride must be 8, 16 or 32, got 5"),
    ):
        done = run(*arguments)
        assert (done.returncode, said in " ".join(done.stderr.split())) == (2, True), done.stderr
    assert "there is nothing to explain" in run("verify", bundle.path, "--explain").stdout
