"""The report's first screen, what it says of a bundle, and the lines that it offers to paste."""

from __future__ import annotations

import contextlib
import io
import shlex
import shutil
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from edge_backbones.bench.results import Comparison, MeasuredMachine, Measurement, Ratio
from edge_backbones.bundle.manifest import Decision, EngineRecord, FileRecord, GpuKey, GraphRecord, Manifest, Trial
from edge_backbones.bundle.reader import Bundle
from edge_backbones.parity_report import Gate, ParityReport, StageParity
from edge_backbones.report import usage
from edge_backbones.report.summary import (
    Summary,
    decibels_in_words,
    is_meant,
    label,
    needs_of_device,
    shipped_trial,
    summarise,
    worst_stage,
)
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.spec import InputSpec, Precision, ShapeRange
from edge_backbones.testing import SPEC, NumpySession, make_bundle

GATE = Gate(min_cosine=0.98, min_sqnr_db=15)
FILE = FileRecord(path="engines/x.blob", sha256="0" * 64, size=2_000_000)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("summary") / "pool.bundle")


@pytest.fixture(scope="module")
def manifest(bundle: Bundle) -> Manifest:
    return bundle.manifest


def parity(*decibels: float | None, gate: Gate = GATE) -> ParityReport:
    """Of the stages pool4, pool8, ...; None for values that are not finite."""
    stages = tuple(
        StageParity(
            stage=f"pool{4 << index}", cosine=0.99, sqnr_db=0 if db is None else db, max_abs=0.1, relative=0.1,
            finite=db is not None, passed=db is not None and db >= (gate.min_sqnr_db or 0),
        )
        for index, db in enumerate(decibels)
    )  # fmt: skip
    return ParityReport(precision=Precision.INT8, gate=gate, stages=stages)


def engine(manifest: Manifest, report: ParityReport, precision: str = "int8", **key: Any) -> EngineRecord:
    """An engine for the CPU of the manifest's own, or with ``flavour="tensorrt"`` for a GPU."""
    if key.get("flavour", "").startswith("tensorrt"):
        key = {"gpu": GpuKey(architectures=("sm_89",)), "device_name": "RTX", **key}
    record = manifest.engines[0]
    milliseconds = key.pop("milliseconds", None)
    return replace(
        record,
        key=replace(record.key, precision=Precision(precision), **key),
        parity=report,
        milliseconds=milliseconds,
        file=replace(FILE, path=f"engines/{len(key)}{precision}.blob"),
    )


def screen(manifest: Manifest, *engines: EngineRecord, shown: EngineRecord | None = None, **changes: Any) -> Summary:
    comparisons = changes.pop("comparisons", ())
    name = changes.pop("name", "my net.bundle")
    changed = replace(manifest, engines=engines, **changes)
    return summarise(changed, name, shown=shown, comparisons=comparisons, manifest_bytes=5_000)


# ---- decibels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sqnr_db", "words"),
    [
        (26.08, "The error has 1/410 of the signal's energy, and 5.0 % of its size (RMS)."),
        (20.0, "The error has 1/100 of the signal's energy, and 10 % of its size (RMS)."),
        (9.3, "The error has 1/8.5 of the signal's energy, and 34 % of its size (RMS)."),
        (36.1, "The error has 1/4,100 of the signal's energy, and 1.6 % of its size (RMS)."),
        (120.0, "The error has less than 1/1,000,000 of the signal's energy, and 0.0001 % of its size (RMS)."),
        (0.0, "The error is as large as the signal, or larger."),
        (-3.0, "The error is as large as the signal, or larger."),
        (300.0, "There is no difference from fp32."),
    ],
)
def test_what_decibels_mean(sqnr_db, words):
    assert decibels_in_words(sqnr_db) == words


@pytest.mark.parametrize("scale", [0.3, 0.05, 0.004])
def test_the_words_hold_for_numbers(scale):
    """An error of a known share of a signal gives its own SQNR, whose words give that share back."""
    random = np.random.default_rng(0)
    signal, error = random.standard_normal((2, 10_000))
    error *= scale * np.linalg.norm(signal) / np.linalg.norm(error)
    sqnr_db = 10 * np.log10(float((signal**2).sum() / (error**2).sum()))
    words = decibels_in_words(sqnr_db)
    assert float(words.partition("and ")[2].partition(" %")[0]) == pytest.approx(100 * scale, rel=0.05)
    energy = float(words.partition("1/")[2].partition(" ")[0].replace(",", ""))
    assert energy == pytest.approx(1 / scale**2, rel=0.05)


# ---- verdict --------------------------------------------------------------------------------------------------------


def test_every_engine_passes(manifest):
    one = screen(manifest, engine(manifest, parity(30, 20)))
    assert (one.verdict.kind, one.verdict.word, one.verdict.commands) == ("good", "Pass", ())
    assert one.verdict.sentence == "int8 for OpenVINO holds its accuracy gate on every output."
    two = screen(manifest, engine(manifest, parity(30)), engine(manifest, parity(60), "fp16"))
    assert two.verdict.sentence == "All 2 engines hold their accuracy gates on every output."


def test_an_engine_fails(manifest):
    bad = engine(manifest, parity(30, 9.3))
    found = screen(manifest, engine(manifest, parity(60), "fp16", milliseconds=1.0), bad)
    assert (found.verdict.kind, found.verdict.word) == ("bad", "Fail")
    assert found.verdict.sentence.startswith(
        "int8 for OpenVINO is outside its accuracy gate. pool8 has 9.3 dB; the gate asks for cosine \u2265 0.98 and SQNR "
        "\u2265 15 dB."
    )
    assert found.verdict.commands == ("edge-backbones verify 'my net.bundle' --explain",)
    assert found.engine is bad  # its figures are shown, though another is faster
    assert found.tiles[0].text == "9.3 dB"


def test_several_fail(manifest):
    found = screen(manifest, engine(manifest, parity(9)), engine(manifest, parity(None), "fp16"))
    assert found.verdict.sentence.startswith(
        "2 of 2 engines are outside their accuracy gates. int8 for OpenVINO: pool4"
    )


def test_an_engine_for_a_gpu_that_fails_has_no_command_that_explains_it(manifest):
    found = screen(manifest, engine(manifest, parity(9), flavour="tensorrt"))
    assert found.verdict.commands == ()
    assert found.verdict.sentence.endswith("SQNR \u2265 15 dB.")


def test_values_that_are_not_finite(manifest):
    found = screen(manifest, engine(manifest, parity(30, None)))
    assert "pool8 has values that are not finite" in found.verdict.sentence
    assert (found.tiles[0].name, found.tiles[0].text, found.tiles[0].value) == (
        "worst stage: pool8",
        "not finite",
        None,
    )


def test_an_engine_is_not_measured(manifest):
    plan = engine(manifest, parity(), flavour="tensorrt_rtx")
    found = screen(manifest, plan)
    assert (found.verdict.kind, found.verdict.word) == ("open", "Not measured yet")
    assert found.verdict.sentence == "int8 for TensorRT-RTX. On its device, run:"
    assert found.verdict.commands == ("edge-backbones verify 'my net.bundle'",)
    assert [tile.text for tile in found.tiles[:2]] == ["not measured", "not timed"]
    assert "--device cuda" in found.tiles[1].commands[0]
    both = screen(manifest, engine(manifest, parity(30)), plan)
    assert (both.verdict.kind, both.verdict.word) == ("good", "Pass")
    assert both.verdict.sentence == (
        "int8 for OpenVINO holds its accuracy gate on every output. Not measured yet: int8 for TensorRT-RTX. On its "
        "device, run:"
    )
    assert both.verdict.commands == ("edge-backbones verify 'my net.bundle'",)


def test_there_is_no_engine(manifest):
    found = screen(manifest)
    assert (found.verdict.word, found.engine) == ("No engine yet", None)
    assert found.verdict.commands == ("edge-backbones compile 'my net.bundle'",)
    assert len(found.tiles) == 1


def test_the_figures_are_of_the_engine_that_runs_here_then_of_the_fastest(manifest):
    slow = engine(manifest, parity(30), "fp32", milliseconds=9.0)
    fast = engine(manifest, parity(20), "int8", milliseconds=3.0)
    assert screen(manifest, slow, fast).engine is fast
    assert screen(manifest, slow, fast, shown=slow).engine is slow
    plan = engine(manifest, parity(), flavour="tensorrt")
    assert screen(manifest, plan, slow, shown=plan).engine is slow  # one with figures
    assert screen(manifest, plan, shown=plan).engine is plan


def test_the_worst_stage_is_the_one_that_fails(manifest):
    """A gate may be of the cosine alone: the output outside it counts, though another has fewer decibels."""
    report = parity(30, 20)
    stages = (replace(report.stages[0], passed=False), report.stages[1])
    assert worst_stage(engine(manifest, replace(report, stages=stages))).stage == "pool4"
    assert worst_stage(engine(manifest, report)).stage == "pool8"


# ---- speed ----------------------------------------------------------------------------------------------------------


def test_times_in_the_bundle_are_compared_with_fp32_of_the_same_library(manifest):
    int8, fp32 = (engine(manifest, parity(30), p, milliseconds=t) for p, t in (("int8", 2.0), ("fp32", 7.0)))
    other = engine(manifest, parity(30), "fp32", flavour="onnxruntime", milliseconds=9.0)
    tile = screen(manifest, other, int8, fp32, shown=int8).tiles[1]
    assert (tile.text, tile.value) == ("2.00 ms", 2.0)
    assert tile.meaning == "3.50x as fast as fp32 of OpenVINO (7.00 ms)."
    assert tile.name == "time of one call, batch 2"
    assert tile.commands == ()
    slower = screen(manifest, replace(int8, milliseconds=14.0), fp32, shown=replace(int8, milliseconds=14.0)).tiles[1]
    assert slower.meaning == "0.50x as fast as fp32 of OpenVINO (7.00 ms). It is slower."
    alone = screen(manifest, other, int8, shown=int8).tiles[1]
    assert alone.meaning == "fp32 of OpenVINO was not timed beside it. To compare:"
    assert screen(manifest, fp32).tiles[1].meaning == "This engine is the fp32 one."


def trial(precision: str, milliseconds: float | None, *blocks: str, passed: bool = True) -> Trial:
    return Trial(
        precision=Precision(precision), blocks=blocks, cosine=1, sqnr_db=30, passed=passed, milliseconds=milliseconds
    )


def test_times_of_a_build_that_tried_precisions(manifest):
    int8 = engine(manifest, parity(30))
    decision = Decision(sentence="", device_name=int8.key.device_name, trials=(trial("int8", 2.0), trial("fp32", 5.0)))
    tile = screen(manifest, int8, decision=decision).tiles[1]
    assert (tile.text, tile.meaning) == ("2.00 ms", "2.50x as fast as fp32 of OpenVINO (5.00 ms).")
    elsewhere = screen(manifest, int8, decision=replace(decision, device_name="another")).tiles[1]
    assert elsewhere.text == "not timed"


def test_the_trial_that_became_the_engine_is_the_one_with_its_layers_left_out(manifest):
    int8 = engine(manifest, parity(30))
    graph = GraphRecord(
        format="onnx", precision=Precision.INT8, file=FILE, opset=20, excluded=("layer1.0/Add#2", "layer3.1.conv2/Conv")
    )
    trials = (
        trial("int8", 1.0),
        trial("int8", 2.0, "op:Add"),
        trial("int8", 3.0, "op:Add", "layer3.1"),
        trial("int8", 4.0, "op:Add", "layer3.1", "layer3"),
        trial("int8", 5.0, "op:Add", "layer4.0"),
        trial("int8", 6.0, "op:Add", "layer3.1", passed=False),
        trial("fp16", 7.0),
    )
    decision = Decision(sentence="", device_name="", trials=trials[:3] + trials[4:])
    assert shipped_trial(decision, int8, replace(manifest, graphs=(graph,))) is trials[2]
    assert shipped_trial(decision, int8, replace(manifest, graphs=(replace(graph, excluded=()),))) is trials[0]
    assert shipped_trial(replace(decision, trials=()), int8, manifest) is None


@pytest.mark.parametrize(
    ("layer", "block", "meant"),
    [
        ("layer1.0.conv1/Conv", "layer1.0", True),
        ("layer1.0/Add", "layer1.0", True),
        ("layer1.01.conv1/Conv", "layer1.0", False),
        ("layer1.0/Add#2", "op:Add", True),
        ("layer1.0/Add", "op:Conv", False),
    ],
)
def test_layers_of_blocks(layer, block, meant):
    assert is_meant(layer, block) is meant


def comparison(record: EngineRecord, *ratios: Ratio) -> Comparison:
    peers = tuple(
        Measurement(name=ratio.name, what=f"{ratio.name} on the fp32 graph", median_ms=4 * ratio.median)
        for ratio in ratios
    )
    return Comparison(
        bundle="pool.bundle", engine=record.name, precision="int8", input_shape=(2, 3, 32, 48), threads=2, device="cpu",
        date="2026-11-30",
        machine=MeasuredMachine(
            name="a processor", architecture="x86_64", cpu_features=(), cores=2, memory_bytes=8 << 30, system="Linux",
            python="3.11", gpu=None, settings={}, commit=None,
        ),
        measurements=(Measurement(name="edge", what="this", median_ms=4.0), *peers), ratios=ratios,
    )  # fmt: skip


def test_what_bench_measured_comes_before_what_is_stored(manifest):
    int8 = engine(manifest, parity(30), milliseconds=3.0)
    torch = Ratio(name="torch", median=9.0, low=8.0, high=9.5)
    openvino = Ratio(name="openvino-f32", median=2.5, low=2.25, high=2.75)
    nncf = Ratio(name="nncf", median=1.25, low=1.2, high=1.3)
    tile = screen(manifest, int8, comparisons=[comparison(int8, torch, nncf, openvino)]).tiles[1]
    assert (tile.text, tile.value) == ("4.00 ms", 4.0)
    assert tile.meaning == (
        "2.50x as fast as fp32 (openvino-f32 on the fp32 graph), 2.25x to 2.75x with 95 % confidence."
    )
    assert tile.aside == "Timed by bench on a processor, 2 threads, 2026-11-30."
    only = screen(manifest, int8, comparisons=[comparison(int8, nncf, torch)]).tiles[1]
    assert only.meaning.startswith("9.00x as fast as fp32 (torch on the fp32 graph)")
    none = screen(manifest, int8, comparisons=[comparison(int8, nncf)]).tiles[1]
    assert none.meaning == "No fp32 peer ran beside it."
    tie = Ratio(name="openvino-f32", median=1.02, low=0.97, high=1.07)
    assert screen(manifest, int8, comparisons=[comparison(int8, tie)]).tiles[1].meaning == (
        "A tie with fp32 (openvino-f32 on the fp32 graph): 1.02x (0.97 to 1.07)."
    )
    other = engine(manifest, parity(30), "fp16")
    assert screen(manifest, int8, comparisons=[comparison(other, openvino)]).tiles[1].text == "3.00 ms"


def test_what_is_not_timed_has_the_commands_that_time_it(manifest):
    int8, fp16 = engine(manifest, parity(30)), engine(manifest, parity(60), "fp16")
    assert screen(manifest, int8, name="net.bundle").tiles[1].commands == (
        "edge-backbones bench net.bundle --out net.bench.json",
        "edge-backbones report net.bundle --bench net.bench.json",
    )
    quoted = screen(manifest, int8, fp16, shown=int8, name="a; rm -rf x.bundle").tiles[1].commands
    assert [shlex.split(one) for one in quoted] == [
        ["edge-backbones", "bench", "a; rm -rf x.bundle", "--engine", "int8", "--out", "a; rm -rf x.bench.json"],
        ["edge-backbones", "report", "a; rm -rf x.bundle", "--bench", "a; rm -rf x.bench.json"],
    ]
    twice = engine(manifest, parity(30), flavour="onnxruntime")
    assert " --engine openvino " in screen(manifest, int8, twice, shown=int8).tiles[1].commands[0]
    third = engine(manifest, parity(60), "fp16")
    assert f" --engine {int8.name} " in screen(manifest, int8, twice, third, shown=int8).tiles[1].commands[0]


def test_the_commands_run_when_they_are_typed(bundle, tmp_path, monkeypatch):
    """In the folder around the bundle; the timing itself is stubbed."""
    from typer.testing import CliRunner

    from edge_backbones.cli import bench as bench_command
    from edge_backbones.cli.main import app

    shutil.copytree(bundle.path, tmp_path / "net.bundle")
    record = bundle.manifest.engines[0]
    tile = screen(bundle.manifest, record, name="net.bundle").tiles[1]
    ratio = Ratio(name="openvino-f32", median=2.5, low=2.25, high=2.75)
    monkeypatch.setattr(bench_command, "compare", lambda *_, **__: comparison(record, ratio))
    monkeypatch.chdir(tmp_path)
    for command in tile.commands:
        words = shlex.split(command)
        assert words[0] == "edge-backbones"
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, result.output
    assert "2.50x as fast as fp32" in (tmp_path / "net.bundle.report.html").read_text(encoding="utf-8")


# ---- size -----------------------------------------------------------------------------------------------------------


def test_the_size_on_the_device_is_what_runs_there(bundle, tmp_path):
    """The engine runs from a folder that holds what the page counts, and nothing else."""
    manifest = bundle.manifest
    record = manifest.engines[0]
    files, needed = needs_of_device(manifest, record)
    for file in ("manifest.json", *files):
        (tmp_path / "net.bundle" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(bundle.path / file, tmp_path / "net.bundle" / file)
    with EdgeBackbone.from_pretrained(tmp_path / "net.bundle") as backbone:
        assert len(backbone(np.zeros((2, 3, 32, 48), np.float32)).feature_maps) == 2
    size = (bundle.path / "manifest.json").stat().st_size
    tile = summarise(manifest, "net", shown=record, comparisons=(), manifest_bytes=size).tiles[2]
    on_device = sum(path.stat().st_size for path in (tmp_path / "net.bundle").rglob("*") if path.is_file())
    assert tile.value == on_device == needed + size
    everything = sum(file.size for file in manifest.files()) + size
    assert f"the whole folder has {everything / 1e3:.1f} kB" in tile.meaning


def test_a_plan_without_weights_needs_its_graph_too(manifest):
    plan = engine(manifest, parity(30), flavour="tensorrt")
    assert plan.key.gpu is not None
    stripped = replace(plan, key=replace(plan.key, gpu=replace(plan.key.gpu, stripped=True)))
    file = FileRecord(path="graphs/int8.onnx", sha256=plan.key.graph_sha256, size=7_000_000)
    graph = GraphRecord(format="onnx", precision=Precision.INT8, file=file, opset=20)
    changed = replace(manifest, graphs=(graph,), engines=(stripped,))
    assert needs_of_device(changed, stripped) == ([stripped.file.path, "graphs/int8.onnx"], 9_000_000)
    assert needs_of_device(changed, plan) == ([plan.file.path], 2_000_000)
    tile = summarise(changed, "n", shown=stripped, comparisons=(), manifest_bytes=0).tiles[2]
    assert tile.meaning.startswith("The engine, the graph with its weights and manifest.json;")


def test_labels(manifest):
    assert label(engine(manifest, parity(), "bf16", flavour="tensorrt_rtx")) == "bf16 for TensorRT-RTX"
    assert label(engine(manifest, parity(), flavour="of_a_package")) == "int8 for of_a_package"


# ---- the snippet ----------------------------------------------------------------------------------------------------


def run(lines: tuple[str, ...]) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile("\n".join(lines), "<pasted>", "exec"), {})
    return said.getvalue()


@pytest.mark.parametrize("name", ["net.bundle", 'it\'s a "net"', "b\u00fcndel", "back\\slash"])
def test_the_snippet_runs_when_it_is_pasted(bundle, tmp_path, monkeypatch, name):
    shutil.copytree(bundle.path, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    said = run(usage.snippet(bundle.manifest, name, bundle.manifest.engines[0]))
    assert said.splitlines() == ["pool4 (1, 3, 8, 12)", "pool8 (1, 3, 4, 6)"]


def fed(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """What the snippet gives to the backbone for a frame of one colour."""
    given = []

    class Recorder(EdgeBackbone):
        def __call__(self, images: np.ndarray) -> Any:
            given.append(images)
            return type("Output", (), {"feature_maps": (images,)})

    opened = Recorder(SPEC, manifest.input, NumpySession(manifest.input), image=manifest.image)
    monkeypatch.setattr(EdgeBackbone, "from_pretrained", lambda *_, **__: opened)
    lines = usage.snippet(manifest, "net.bundle", None)
    at = next(index for index, line in enumerate(lines) if line.startswith("frame = "))
    channels = manifest.input.channels
    run((*lines[: at + 1], f"frame[...] = np.array([10, 200, 90][:{channels}], np.uint8)", *lines[at + 1 :]))
    return given[0]


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_the_snippet_preprocesses_as_the_network_was_trained(manifest, monkeypatch, order):
    from edge_backbones.images.fit import fit, to_input

    image = replace(manifest.image, channel_order=order, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.75))
    changed = replace(manifest, image=image)
    frame = np.zeros((480, 640, 3), np.uint8) + np.array([10, 200, 90], np.uint8)
    expected = to_input(fit(frame, image, 32, 48)[None], image, manifest.input)
    found = fed(changed, monkeypatch)
    assert (found.dtype, found.shape) == (np.float32, expected.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_snippet_gives_frames_to_a_graph_that_takes_them(manifest, monkeypatch):
    fixed = ShapeRange.fixed
    taking = InputSpec(name="image", channels=3, batch=fixed(1), height=fixed(32), width=fixed(48))
    found = fed(replace(manifest, input=taking), monkeypatch)
    assert (found.dtype, found.shape) == (np.uint8, (1, 32, 48, 3))
    assert found[0, 3, 3].tolist() == [10, 200, 90]


def test_the_snippet_asks_for_the_gpu_where_the_engine_needs_one(manifest):
    plan = engine(manifest, parity(), flavour="tensorrt")
    assert 'with EdgeBackbone.from_pretrained("n", device="cuda") as backbone:' in usage.snippet(manifest, "n", plan)
    assert 'with EdgeBackbone.from_pretrained("n") as backbone:' in usage.snippet(manifest, "n", None)


def test_the_largest_figures_of_a_manifest_have_words(manifest):
    """What a stranger's manifest may hold at most does not break the words."""
    report = parity(1e4, -1e4, gate=Gate())
    found = screen(manifest, engine(manifest, report))
    assert found.tiles[0].text == "-10000.0 dB"
    assert "as large as the signal, or larger" in found.tiles[0].meaning
    assert "exact" in screen(manifest, engine(manifest, parity(1e4, gate=Gate()))).tiles[0].text


def test_of_two_trials_that_differ_in_the_rest_the_engines_own_is_found(manifest):
    plain, bf16 = trial("int8", 2.0), replace(trial("int8", 1.0), computes_in="bf16")
    decision = Decision(sentence="", device_name="", trials=(plain, bf16))
    assert shipped_trial(decision, engine(manifest, parity(30)), manifest) is plain
    assert shipped_trial(decision, engine(manifest, parity(30), computes_in="bf16"), manifest) is bf16
