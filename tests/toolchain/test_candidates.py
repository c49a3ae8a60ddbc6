"""Ranges that are chosen, blocks that int8 is kept away from, and the engine that is shipped in the end."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import networks
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_backbones.bundle.reader import Bundle, load_golden
from edge_backbones.deploy import compile as compiling
from edge_backbones.deploy import timing
from edge_backbones.deploy.compile import compile_bundle
from edge_backbones.deploy.parity import compare, excess_noise
from edge_backbones.engines.compat import has_units
from edge_backbones.errors import CalibrationError, QuantizationError
from edge_backbones.machine import hosts
from edge_backbones.parity_report import Gate, ParityError
from edge_backbones.report.summary import shipped_trial
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.spec import Precision
from edge_backbones.toolchain import candidates
from edge_backbones.toolchain.build import build_bundle
from edge_backbones.toolchain.calibration.choose import Fold, choose_ranges, correct_biases
from edge_backbones.toolchain.calibration.noise import Sample, blocks_to_exclude, noise_of_blocks
from edge_backbones.toolchain.calibration.ranges import METHODS, collect_magnitudes, find_ranges
from edge_backbones.toolchain.export import export_onnx
from edge_backbones.toolchain.options import BuildOptions
from edge_backbones.toolchain.prepare import prepare
from edge_backbones.toolchain.quantize.placement import quantized_layers, select_layers, tensors_to_calibrate
from edge_backbones.toolchain.quantize.typed_graph import write_typed_graph

SMALL = {
    "weights": "random:0",
    "cache": None,
    "batch": 2,
    "height": 64,
    "width": 96,
    "out_indices": (1, 2, 4),
    "torchscript": False,
    "golden": 2,
}


def db(noise: float) -> float:
    return float(-10 * np.log10(noise))


class Case:
    """test_resnet with the statistics of a trained net: its graph, what its activations were, and images beside those."""

    def __init__(self, folder: Path, photographs: list[np.ndarray]) -> None:
        self.folder = folder
        loaded = networks.trained_like("test_resnet", out_indices=(1, 2, 4))
        self.graph = export_onnx(prepare(loaded, networks.input_spec(64, 96, batch=(1, 2, 4))), folder / "fp32.onnx")
        images = networks.normalised(networks.crops(photographs, 20, 64, 96))
        self.images = images
        self.held_out = [Sample(images[12:16], np.ones(4)), Sample(images[16:20], np.ones(4))]
        self.counted = [images[:4], images[4:8], images[8:12]]
        self.magnitudes = self.count(images[:12])

    def count(self, images: np.ndarray) -> dict:
        return collect_magnitudes(self.graph.path, tensors_to_calibrate(self.graph), [images])

    def noise(self, ranges: dict[str, float], excluded: frozenset[str] = frozenset(), shifts=None) -> dict[str, float]:
        """The reference: the typed graph node by node in ONNX Runtime, in float64 over all images at once."""
        path = self.folder / "reference.onnx"
        write_typed_graph(
            self.graph, precision=Precision.INT8, path=path, ranges=ranges, excluded=excluded, shifts=shifts, half=False
        )
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        found = []
        for file in (self.graph.path, path):
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            found.append(session.run(None, {"pixel_values": self.images[12:]}))
        return {
            output: networks.relative(actual, expected) ** 2
            for output, expected, actual in zip(self.graph.spec.outputs, *found, strict=True)
        }


@pytest.fixture(scope="module")
def case(tmp_path_factory, photographs) -> Case:
    return Case(tmp_path_factory.mktemp("case"), photographs)


# ---- ranges ---------------------------------------------------------------------------------------------------------


def test_the_estimator_of_each_stage_is_the_one_with_the_least_noise(case):
    fold = Fold(case.magnitudes, case.held_out)
    ranges, chosen = choose_ranges(case.graph, [fold], percentile=99.9, work=case.folder)
    assert list(chosen) == ["layer1", "layer2", "layer4"]
    options = {method: find_ranges(case.magnitudes, method=method, percentile=99.9) for method in METHODS}
    # The first stage depends on nothing that is decided elsewhere.
    alone = {method: case.noise(options[method])["layer1"] for method in METHODS}
    assert chosen["layer1"] == min(alone, key=lambda method: alone[method])
    assert max(alone.values()) > 1.02 * min(alone.values())  # else there was nothing to choose
    together = case.noise(ranges)
    assert together["layer1"] == pytest.approx(min(alone.values()), rel=0.02)
    worst = {output: max(case.noise(options[method])[output] for method in METHODS) for output in chosen}
    assert all(together[output] < worst[output] for output in chosen)
    for layer in quantized_layers(case.graph):
        assert ranges[layer.tensor] in {option[layer.tensor] for option in options.values()}


def test_each_fold_is_judged_by_the_counts_of_the_other(case):
    """The choice is that of the noise of both folds together, the ranges those of all images."""
    halves = [case.images[:10], case.images[10:]]
    counts = [case.count(half) for half in halves]
    folds = [Fold(counts[0], [Sample(halves[1], np.ones(10))]), Fold(counts[1], [Sample(halves[0], np.ones(10))])]
    ranges, chosen = choose_ranges(case.graph, folds, percentile=99.9, work=case.folder)

    expected, noise = run(case.graph.path, case.images), dict.fromkeys(METHODS, 0.0)
    for method in METHODS:
        for index, of_half in enumerate(counts):
            path = case.folder / "fold.onnx"
            options = find_ranges(of_half, method=method, percentile=99.9)
            write_typed_graph(case.graph, precision=Precision.INT8, path=path, ranges=options, half=False)
            other = slice(10, None) if index == 0 else slice(10)
            difference = run(path, case.images[other])[0].astype(np.float64) - expected[0][other]
            noise[method] += float((difference**2).sum())
    assert chosen["layer1"] == min(noise, key=lambda method: noise[method])
    together = {method: find_ranges(case.count(case.images), method=method, percentile=99.9) for method in METHODS}
    for layer in quantized_layers(case.graph):
        assert ranges[layer.tensor] in {option[layer.tensor] for option in together.values()}


def test_images_count_as_many_times_as_they_stand_for(case):
    ranges = find_ranges(case.magnitudes)
    weights = np.array([3.0, 1.0, 0.0, 2.0])
    weighted = noise_of_blocks(case.graph, ranges, [Sample(case.images[:4], weights)], excluded=(), work=case.folder)
    repeated = case.images[[0, 0, 0, 1, 3, 3]]
    plain = noise_of_blocks(case.graph, ranges, [Sample(repeated, np.ones(6))], excluded=(), work=case.folder)
    for block, of_block in plain.items():
        assert weighted[block] == pytest.approx(of_block, rel=1e-3)


def run(path: Path, images: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"pixel_values": images})


# ---- biases ---------------------------------------------------------------------------------------------------------


def coarse(case: Case) -> dict[str, float]:
    """Ranges so wide that rounding is biased: what a ReLU leaves mostly falls to zero."""
    return {tensor: 8 * threshold for tensor, threshold in find_ranges(case.magnitudes, method="max").items()}


def test_corrected_biases_give_every_channel_its_mean(case):
    ranges = coarse(case)
    shifts = correct_biases(case.graph, ranges, case.counted, case.held_out, work=case.folder)
    layers = {layer.name: layer.result for layer in quantized_layers(case.graph) if layer.op_type == "Conv"}
    assert shifts.keys() == layers.keys()

    def means(path: Path) -> dict[str, np.ndarray]:
        model = onnx.load(path)
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in layers.values())
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        values = session.run(list(layers.values()), {"pixel_values": np.concatenate(case.counted)})
        return {name: value.mean(axis=(0, 2, 3)) for name, value in zip(layers, values, strict=True)}

    expected = means(case.graph.path)
    off: dict[str, dict[str, float]] = {}
    for kind, added in (("plain", {}), ("corrected", shifts)):
        path = case.folder / f"{kind}.onnx"
        write_typed_graph(case.graph, precision=Precision.INT8, path=path, ranges=ranges, shifts=added, half=False)
        off[kind] = {name: float(np.abs(mean - expected[name]).max()) for name, mean in means(path).items()}
    assert sum(off["corrected"].values()) < 0.6 * sum(off["plain"].values())
    first, second, *_ = layers  # those behind them converge with more corrections
    assert all(off["corrected"][name] < 0.05 * off["plain"][name] for name in (first, second))


def test_corrected_biases_lower_the_noise_or_are_left_alone(case):
    plain, fine = case.noise(coarse(case)), find_ranges(case.magnitudes, method="mse")
    shifts = correct_biases(case.graph, coarse(case), case.counted, case.held_out, work=case.folder)
    corrected = case.noise(coarse(case), shifts=shifts)
    assert sum(map(db, corrected.values())) > sum(map(db, plain.values())) + 1.0
    kept = correct_biases(case.graph, fine, case.counted, case.held_out, work=case.folder)
    assert sum(map(db, case.noise(fine, shifts=kept).values())) > sum(map(db, case.noise(fine).values())) - 0.05


# ---- blocks ---------------------------------------------------------------------------------------------------------


def test_noises_of_blocks_add_up_to_that_of_the_graph(case):
    ranges = find_ranges(case.magnitudes)
    noise = noise_of_blocks(case.graph, ranges, case.held_out, excluded=(), work=case.folder)
    layers = quantized_layers(case.graph)
    assert list(noise) == list(dict.fromkeys(layer.block for layer in layers))
    for output, whole in case.noise(ranges).items():
        assert db(sum(of_block[output] for of_block in noise.values())) == pytest.approx(db(whole), abs=1.0)
    alone = frozenset(layer.name for layer in layers if layer.block != "layer2.0")
    for output, expected in case.noise(ranges, alone).items():
        assert noise["layer2.0"][output] == pytest.approx(expected, rel=0.02, abs=1e-12)


def test_without_the_chosen_blocks_the_noise_is_what_was_asked(case):
    ranges = find_ranges(case.magnitudes)
    noise = noise_of_blocks(case.graph, ranges, case.held_out, excluded=(), work=case.folder)
    before = case.noise(ranges)
    out = blocks_to_exclude(noise, {"layer1": 1.0, "layer2": 1.0, "layer4": 3.0})
    assert 0 < len(out) < len(noise)
    excluded = frozenset(layer.name for layer in quantized_layers(case.graph) if layer.block in out)
    assert case.noise(ranges, excluded)["layer4"] < before["layer4"] / 3 * 1.2


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8),
    st.tuples(st.floats(1, 1e4), st.floats(1, 1e4)),
)
def test_blocks_are_excluded_until_every_output_is_quiet_and_no_further(noises, excess):
    noise = {f"block{i}": {"a": a, "b": b} for i, (a, b) in enumerate(noises)}
    asked = dict(zip("ab", excess, strict=True))

    def quiet(out: list[str]) -> bool:
        return all(
            sum(of[o] for name, of in noise.items() if name not in out)
            <= sum(of[o] for of in noise.values()) / asked[o]
            for o in "ab"
        )

    out = blocks_to_exclude(noise, asked)
    assert len(set(out)) == len(out)
    assert quiet(out) or len(out) == len(noise)
    assert not out or not quiet(out[:-1])


@given(st.floats(-0.9, 3), st.floats(1e-3, 2), st.integers(0, 2))
def test_excess_is_above_one_exactly_where_the_gate_fails(across, along, which):
    reference = np.zeros(3)
    reference[0] = 1.0
    actual = np.array([1.0 + across, along, 0.0])
    gate = (Gate(min_sqnr_db=6.0), Gate(max_relative=0.5), Gate(min_cosine=0.8))[which]
    stage = compare("stage", reference, actual, gate)
    excess = excess_noise(stage, gate)
    assert excess == 1.0 if stage.passed else excess > 1.0


def test_excess_of_what_is_not_finite_or_never_allowed_has_no_end():
    stage = compare("stage", np.ones(3), np.array([1.0, np.nan, 1.0]), Gate())
    assert excess_noise(stage, Gate()) == np.inf
    stage = compare("stage", np.ones(3), np.array([1.0, 1.0, 2.0]), Gate())
    assert excess_noise(stage, Gate(min_cosine=1.0)) == excess_noise(stage, Gate(max_relative=0.0)) == np.inf


# ---- layers by name -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("layer1.0.conv1/Conv", 1),
        ("layer1.0", 3),
        ("layer1", 3),
        ("*.conv2", 4),
        ("op:Add", 4),
        ("stage:layer2", 4),
        ("layer*", 16),
        ("op:Conv", 14),
    ],
)
def test_layers_are_named_by_module_type_and_stage(case, pattern, count):
    layers = quantized_layers(case.graph)
    assert len(layers) == 18
    found = select_layers(layers, [pattern])
    assert len(found) == count, sorted(found)
    ranges = find_ranges(case.magnitudes)
    path = case.folder / "excluded.onnx"
    write_typed_graph(case.graph, precision=Precision.INT8, path=path, ranges=ranges, excluded=found)
    graph = onnx.load(path).graph
    dequantized = {output for node in graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    quantized = {node.name for node in graph.node if dequantized.intersection(node.input)}
    assert quantized == {layer.name for layer in layers} - found


@pytest.mark.parametrize("pattern", ["layer9", "op:Gemm", "stage:stem", "", "layer1.0.conv1/Relu"])
def test_a_pattern_that_means_nothing_is_refused(case, pattern):
    with pytest.raises(QuantizationError, match="means no layer that int8 quantises; there are ") as refusal:
        select_layers(quantized_layers(case.graph), ["layer1", pattern])
    assert "\n" not in str(refusal.value)


# ---- builds ---------------------------------------------------------------------------------------------------------


def test_a_gate_that_int8_fails_costs_as_many_blocks_as_it_takes(photograph_folder, tmp_path, monkeypatch):
    asked: list[dict[str, float]] = []
    monkeypatch.setattr(
        candidates,
        "blocks_to_exclude",
        lambda noise, excess: asked.append(excess) or blocks_to_exclude(noise, excess),
    )
    gate = Gate(min_sqnr_db=25.0)
    options = BuildOptions(**SMALL, gates={Precision.INT8: gate})
    result = build_bundle("test_resnet", tmp_path / "mixed.bundle", images=photograph_folder, options=options)
    manifest = result.bundle.manifest
    first, *_, last = manifest.decision.trials
    assert {times > 1 for times in asked[0].values()} == {True, False}  # maps inside the gate cost nothing
    assert min(times for times in asked[0].values() if times > 1) > 1.25
    assert (first.passed, first.blocks, last.passed) == (False, (), True)
    # What is decided is decided by the graph as it is written; its engine is a little better.
    assert min(stage.sqnr_db for stage in result.reports[0].stages) > last.sqnr_db >= 25.0 > first.sqnr_db
    assert all(trial.milliseconds > 0 for trial in manifest.decision.trials)
    record = manifest.onnx_graph(Precision.INT8)
    assert record.excluded
    assert last.blocks[0] == "op:Add"  # the skip branches go first
    one_fewer = [trial for trial in manifest.decision.trials if trial.blocks == last.blocks[:-1]]
    assert [trial.passed for trial in one_fewer] == [False]
    without_skips = {name.partition("/")[0] for name in record.excluded if "/Add" not in name}
    assert all(any(layer.startswith(block) for block in last.blocks) for layer in without_skips)
    graph = onnx.load(result.bundle.path / record.file.path).graph
    assert any(node.op_type == "QuantizeLinear" for node in graph.node)  # not simply fp16
    assert result.notes == (manifest.decision.sentence,)
    count = len(last.blocks)
    assert result.notes[0].startswith("all-int8 missed its gate (")
    assert f"; with {count} block{'s' * (count > 1)} in fp16 (op:Add" in result.notes[0]
    assert ") it passes" in result.notes[0]
    golden = load_golden(result.bundle)
    with EdgeBackbone.from_pretrained(result.bundle.path) as backbone:
        for stage, feature_map in backbone.run(golden.inputs["opt"]).items():
            for one, expected in zip(feature_map, golden.outputs["opt"][stage], strict=True):
                assert networks.relative(one, expected) < 10 ** (-25 / 20)

    with pytest.raises(ParityError, match=r"int8 is outside its gate \(SQNR >= 25 dB\)"):
        build_bundle(
            "test_resnet",
            tmp_path / "strict.bundle",
            images=photograph_folder,
            options=BuildOptions(**SMALL, gates={Precision.INT8: gate}, fallback=False),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["mixed.bundle"]


def test_fp8_outside_its_gate_is_loosened_like_int8(photograph_folder, tmp_path):
    gates = {Precision.FP8: Gate(min_sqnr_db=25.0), Precision.INT8: Gate(min_sqnr_db=25.0)}
    options = BuildOptions(**{**SMALL, "precisions": (Precision.FP8, Precision.INT8)}, gates=gates)
    result = build_bundle("test_resnet", tmp_path / "mixed.bundle", images=photograph_folder, options=options)
    manifest = result.bundle.manifest
    trials = {p: [t for t in manifest.decision.trials if t.precision is p] for p in (Precision.FP8, Precision.INT8)}
    assert trials[Precision.FP8][0].sqnr_db < 25.0 <= trials[Precision.FP8][-1].sqnr_db
    assert len(trials[Precision.FP8][-1].blocks) > len(trials[Precision.INT8][-1].blocks)  # three bits are fewer
    assert result.notes[0].count(") it passes") == 2
    for of_precision in trials.values():
        one_fewer = [trial for trial in of_precision if trial.blocks == of_precision[-1].blocks[:-1]]
        assert [trial.passed for trial in one_fewer] == [False]
    for precision in trials:
        record = manifest.onnx_graph(precision)
        assert record.excluded
        nodes = onnx.load(result.bundle.path / record.file.path).graph.node
        assert any(node.op_type == "QuantizeLinear" for node in nodes)  # not simply fp16
    with pytest.raises(ParityError, match=r"fp8 is outside its gate \(SQNR >= 25 dB\)"):
        build_bundle(
            "test_resnet",
            tmp_path / "strict.bundle",
            images=photograph_folder,
            options=BuildOptions(**{**SMALL, "precisions": (Precision.FP8,)}, gates=gates, fallback=False),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["mixed.bundle"]


def test_a_gate_that_nothing_quantised_can_hold_is_given_up(photograph_folder, tmp_path):
    options = BuildOptions(**SMALL, gates={Precision.INT8: Gate(min_sqnr_db=250.0)})
    with pytest.raises(ParityError, match=r"outside its gate \(SQNR >= 250 dB\)"):
        build_bundle("test_resnet", tmp_path / "x.bundle", images=photograph_folder, options=options)
    assert list(tmp_path.iterdir()) == []


def planted(monkeypatch: pytest.MonkeyPatch, **milliseconds: float) -> None:
    """Latencies by precision, in the order that engines are tried: fp32, fp16, int8, int8 without skips, and so on."""

    def measure(engines, input, *, progress):
        without = milliseconds.get("without", milliseconds["int8"])
        found = [milliseconds["fp32"], milliseconds["fp16"], milliseconds["int8"], *[without] * (len(engines) - 3)]
        return [timing.Times(time, None) for time in found]

    monkeypatch.setattr(candidates, "time_engines", measure)
    monkeypatch.setattr(candidates, "can_win", lambda precision: precision is not Precision.BF16)


@pytest.mark.parametrize(
    ("times", "shipped", "words"),
    [
        (
            {"fp32": 5.0, "fp16": 4.0, "int8": 4.5},
            "fp16",
            "int8 is 0.89x fp16 here; fp16 4.00 ms, int8 4.50 ms, int8 without its skip branches 4.50 ms, fp32 5.00",
        ),
        ({"fp32": 3.0, "fp16": 4.0, "int8": 30.0, "without": 31}, "fp32", "int8 is 0.10x fp32 here"),
        (
            {"fp32": 5.0, "fp16": 4.0, "int8": 1.0, "without": 1.2},
            "int8",
            "int8 1.00 ms, int8 without its skip branches 1.20 ms, fp16 4.00 ms, fp32 5.00 ms: shipping int8",
        ),
        # As fast, within what timing can tell: the more accurate one, int8 only where it is faster than the others.
        (
            {"fp32": 5.0, "fp16": 4.0, "int8": 1.0, "without": 1.02},
            "int8 without its skip branches",
            "dB more accurate",
        ),
        ({"fp32": 5.0, "fp16": 1.01, "int8": 1.0, "without": 1.02}, "fp16", "fp16 is as fast as int8 here and "),
        ({"fp32": 1.0, "fp16": 1.01, "int8": 1.02}, "fp32", "int8 is 0.98x fp32 here; fp32 1.00 ms"),
        ({"fp32": 5.0, "fp16": 1.04, "int8": 1.0, "without": 1.1}, "int8", "int8 1.00 ms, fp16 1.04 ms, int8 without"),
    ],
)
def test_auto_ships_the_fastest_that_passes(photograph_folder, tmp_path, monkeypatch, times, shipped, words):
    planted(monkeypatch, **times)
    options = BuildOptions(**SMALL, precisions="auto")
    result = build_bundle("test_resnet", tmp_path / "auto.bundle", images=photograph_folder, options=options)
    manifest = result.bundle.manifest
    assert [engine.key.precision for engine in manifest.engines] == [shipped.split()[0]]
    assert manifest.engines[0].milliseconds is None  # there is nothing to choose from
    # The graphs of int8 and fp16 stay, for devices that weigh them anew.
    assert {graph.precision for graph in manifest.graphs} == {"int8", "fp16", shipped.split()[0]}
    record = manifest.onnx_graph(Precision(shipped.split()[0]))
    assert {name.partition("/")[2] for name in record.excluded} == ({"Add"} if "skip" in shipped else set())
    assert words in manifest.decision.sentence
    assert manifest.decision.sentence.endswith(f": shipping {shipped}")
    assert [trial.precision for trial in manifest.decision.trials] == ["fp32", "fp16", "int8", "int8"]
    assert [trial.blocks for trial in manifest.decision.trials] == [(), (), (), ("op:Add",)]
    result.bundle.check_files()


def test_auto_does_without_int8_that_cannot_pass(photograph_folder, tmp_path, monkeypatch):
    planted(monkeypatch, fp32=5.0, fp16=4.0, int8=1.0)
    options = BuildOptions(**SMALL, precisions="auto", fallback=False, gates={Precision.INT8: Gate(min_sqnr_db=90)})
    result = build_bundle("test_resnet", tmp_path / "auto.bundle", images=photograph_folder, options=options)
    assert [engine.key.precision for engine in result.bundle.manifest.engines] == ["fp16"]
    assert "int8 without its skip branches is outside its gate (layer1 has cosine" in result.notes[0]
    assert result.notes[0].endswith("shipping fp16")


@pytest.mark.skipif(
    not has_units(Precision.BF16, hosts.this_host({}).cpu_features), reason="this CPU has no bf16 instructions"
)
@pytest.mark.parametrize(
    ("times", "shipped", "computes_in", "words"),
    [  # fp32, bf16, int8, int8 without skips, and both with a bf16 rest
        ((5.0, 2.0, 2.5, 2.6, 2.4, 2.5), "bf16", "bf16", "int8 with a bf16 rest is 0.83x bf16 here; bf16 2.00 ms"),
        ((5.0, 5.1, 6.0, 6.0, 6.0, 6.0), "fp32", None, "fp32 5.00 ms, bf16 5.10 ms"),
        ((5.1, 5.0, 6.0, 6.0, 6.0, 6.0), "fp32", None, "fp32 is as fast as bf16 here and "),
        ((5.0, 3.0, 2.5, 2.6, 1.0, 1.2), "int8 with a bf16 rest", "bf16", "int8 with a bf16 rest 1.00 ms"),
        ((5.0, 3.0, 1.0, 1.2, 0.99, 1.2), "int8", None, "int8 is as fast as int8 with a bf16 rest here"),
        (
            (5.0, 3.0, 2.5, 2.6, 1.2, 1.0),
            "int8 without its skip branches with a bf16 rest",
            "bf16",
            "int8 without its skip branches with a bf16 rest 1.00 ms",
        ),
    ],
)
def test_auto_weighs_bf16_where_the_cpu_has_it(
    photograph_folder, tmp_path, monkeypatch, times, shipped, computes_in, words
):
    def measure(engines, input, *, progress):
        return [timing.Times(time, None) for time, _ in zip(times, engines, strict=True)]

    def less_accurate(candidate):  # how accurate a bf16 rest is beside an fp32 rest is a matter of the network
        return exact(candidate) - 0.1 * (candidate.engine.key.computes_in == "bf16")

    exact = candidates._worst_sqnr
    monkeypatch.setattr(candidates, "time_engines", measure)
    monkeypatch.setattr(candidates, "_worst_sqnr", less_accurate)
    monkeypatch.setattr(candidates, "can_win", lambda precision: precision is not Precision.FP16)
    options = BuildOptions(**SMALL, precisions="auto")
    result = build_bundle("test_resnet", tmp_path / "auto.bundle", images=photograph_folder, options=options)
    manifest = result.bundle.manifest
    (engine,) = manifest.engines
    assert engine.key.precision == shipped.split()[0]
    assert (engine.key.computes_in if isinstance(engine.key.computes_in, str) else None) == computes_in
    assert words in manifest.decision.sentence
    assert manifest.decision.sentence.endswith(f": shipping {shipped}")
    trials = manifest.decision.trials
    assert [trial.precision for trial in trials] == ["fp32", "fp16", "bf16", *["int8"] * 4]
    assert [trial.milliseconds for trial in trials] == [times[0], None, *times[1:]]  # fp32 in disguise is not timed
    assert {graph.precision for graph in manifest.graphs} == {"int8", "fp16", "bf16", shipped.split()[0]}
    assert (
        shipped_trial(manifest.decision, engine, manifest).milliseconds == min(times)
        or "as fast" in words
        or (shipped == "fp32")
    )
    with EdgeBackbone.from_pretrained(result.bundle.path) as backbone:
        assert set(backbone.run(np.zeros(manifest.input.opt_shape, np.float32))) == set(manifest.backbone.outputs)


@pytest.mark.skipif(
    not has_units(Precision.BF16, hosts.this_host({}).cpu_features), reason="this CPU has no bf16 instructions"
)
@pytest.mark.parametrize(("times", "computes_in"), [((2.0, 1.0), "bf16"), ((1.0, 2.0), None)])
def test_int8_that_was_asked_for_gets_the_faster_rest(photograph_folder, tmp_path, monkeypatch, times, computes_in):
    def measure(engines, input, *, progress):
        return [timing.Times(time, None) for time, _ in zip(times, engines, strict=True)]

    monkeypatch.setattr(candidates, "time_engines", measure)
    options = BuildOptions(**SMALL, precisions="int8")
    result = build_bundle("test_resnet", tmp_path / "int8.bundle", images=photograph_folder, options=options)
    (engine,) = result.bundle.manifest.engines
    assert (engine.key.computes_in if isinstance(engine.key.computes_in, str) else None) == computes_in
    assert result.bundle.manifest.decision is None


@pytest.mark.skipif(
    not has_units(Precision.BF16, hosts.this_host({}).cpu_features), reason="this CPU has no bf16 instructions"
)
def test_compiling_again_leaves_one_int8_engine_whichever_rest_wins(photograph_folder, tmp_path, monkeypatch):
    path = tmp_path / "int8.bundle"
    build_bundle("test_resnet", path, images=photograph_folder, options=BuildOptions(**SMALL, precisions="int8"))
    names = set()
    for times in ((1.0, 2.0), (2.0, 1.0), (1.0, 2.0)):

        def measure(engines, input, *, progress, times=times):
            return [timing.Times(time, None) for time, _ in zip(times, engines, strict=True)]

        monkeypatch.setattr(compiling, "time_engines", measure)
        compile_bundle(path, in_process=True)
        (engine,) = Bundle.open(path).manifest.engines
        assert [file.name for file in (path / "engines").iterdir()] == [Path(engine.file.path).name]
        names.add(engine.name)
    assert len(names) == 2


@pytest.mark.parametrize(
    ("computed", "expected"),
    [
        ({Precision.BF16}, {"fp32", "bf16", "int8", "fp8"}),
        ({Precision.FP16}, {"fp32", "fp16", "int8", "fp8"}),
        (set(), {"fp32", "int8", "fp8"}),
    ],
)
def test_half_precision_cannot_win_where_it_is_computed_in_fp32(monkeypatch, computed, expected):
    monkeypatch.setattr(candidates, "computes_in", lambda p: p if p in computed else Precision.FP32)
    assert {precision.value for precision in Precision if candidates.can_win(precision)} == expected


def test_a_network_without_bf16_is_weighed_without_it(monkeypatch):
    def refuse(*_):
        raise QuantizationError("the graph has GroupNormalization")

    monkeypatch.setattr(candidates, "make_candidate", refuse)
    assert candidates.bf16_candidates(None, Gate(min_sqnr_db=27)) == []


def fake(precision: Precision, milliseconds: float, *, passed: bool, blocks=(), computes_in=None) -> SimpleNamespace:
    key = SimpleNamespace(computes_in=computes_in)
    return SimpleNamespace(
        precision=precision,
        milliseconds=milliseconds,
        passed=passed,
        blocks=blocks,
        engine=SimpleNamespace(key=key),
    )


INT8_OUTSIDE = fake(Precision.INT8, 2.0, passed=False)


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (
            fake(Precision.INT8, 2.6, passed=True, blocks=("op:Add",)),
            "the gate cost 1.30x: skip branches are computed in fp32",
        ),
        (
            fake(Precision.INT8, 2.6, passed=True, blocks=("op:Add", "a", "b"), computes_in="bf16"),
            "the gate cost 1.30x: skip branches and 2 blocks are computed in bf16",
        ),
        (fake(Precision.INT8, 3.0, passed=True, blocks=("a",)), "the gate cost 1.50x: 1 block is computed in fp32"),
        (fake(Precision.BF16, 3.0, passed=True), "the gate cost 1.50x: int8 2.00 ms is outside"),
        (fake(Precision.INT8, 2.05, passed=True, blocks=("a",)), ""),  # as fast
        (fake(Precision.INT8, 1.5, passed=True, blocks=("a",)), ""),
    ],
)
def test_what_a_gate_costs_in_time_is_said(best, expected):
    assert candidates.cost_of_gate([INT8_OUTSIDE, best], best) == expected
    assert candidates.cost_of_gate([best], best) == ""


def test_engines_take_turns_and_none_is_left_open(monkeypatch):
    events: list[tuple[str, str]] = []
    clock = iter(range(10**6))

    class Session:
        def __init__(self, name):
            self.name = name
            events.append(("open", self.name))

        def run(self, images):
            assert images.shape == (2, 3, 64, 96)
            next(clock)  # one more tick for each call ...
            if self.name == "slow":
                next(clock)  # ... and of this one two
            return []

        def close(self):
            events.append(("close", self.name))

    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock) * 1e-3)
    monkeypatch.setattr(timing, "_ROUNDS", 7)
    engines = [functools.partial(Session, name) for name in ("fast", "slow")]
    steps = []
    figures = timing.time_engines(
        engines, networks.input_spec(64, 96, batch=2), progress=lambda *step: steps.append(step)
    )
    assert steps[-1] == ("timing", 7, 7)
    assert [times.call for times in figures] == pytest.approx([2.0, 3.0])
    assert [times.pipelined for times in figures] == [None, None]
    turn = [("open", "fast"), ("close", "fast"), ("open", "slow"), ("close", "slow")]
    assert events == turn * (len(events) // 4)
    assert len(events) > 12


# ---- ranges of another build ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(photograph_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated")
    return build_bundle(
        "test_resnet", folder / "net.bundle", images=photograph_folder, options=BuildOptions(**SMALL, method="mse")
    )


def rebuilt(calibrated, target: Path, images, **options):
    options = {**SMALL, "calibration": calibrated.bundle.path, **options}
    return build_bundle("test_resnet", target, images=images, options=BuildOptions(**options))


def test_ranges_serve_another_choice_of_layers(calibrated, photograph_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "edge_backbones.toolchain.calibration.ranges.collect_magnitudes", lambda *_, **__: pytest.fail("counted again")
    )
    result = rebuilt(calibrated, tmp_path / "net.bundle", photograph_folder, exclude=("layer1", "op:Add"))
    old, new = (json.loads((b.path / "calibration.json").read_bytes()) for b in (calibrated.bundle, result.bundle))
    assert new == old
    record = result.bundle.manifest.calibration
    assert (record.reused, record.method) == (True, "mse")
    assert not calibrated.bundle.manifest.calibration.reused
    assert {name.partition("/")[2] for name in result.bundle.manifest.onnx_graph(Precision.INT8).excluded} >= {"Add"}
    graph = onnx.load(result.bundle.path / "graphs" / "int8.onnx").graph
    adds = [node for node in graph.node if node.op_type == "Add"]
    assert not any("dequantized" in name for node in adds for name in node.input)


def test_a_checkpoint_needs_no_images_where_there_are_ranges(photograph_folder, tmp_path):
    from safetensors.torch import save_file

    loaded = networks.trained_like("test_resnet", out_indices=(4,))
    state = {key.removeprefix("net."): value for key, value in loaded.module.state_dict().items()}
    save_file({**state, "fc.weight": state["conv1.0.weight"].new_zeros(1000, 96)}, tmp_path / "net.safetensors")
    options = {**SMALL, "weights": str(tmp_path / "net.safetensors")}
    first = build_bundle(
        "test_resnet", tmp_path / "first.bundle", images=photograph_folder, options=BuildOptions(**options)
    )
    again = build_bundle(
        "test_resnet",
        tmp_path / "again.bundle",
        options=BuildOptions(
            **options, calibration=first.bundle.path / "calibration.json", gates={Precision.INT8: Gate(min_cosine=1e-6)}
        ),
    )
    graphs = [(bundle.path / "graphs" / "int8.onnx").read_bytes() for bundle in (first.bundle, again.bundle)]
    assert graphs[0] == graphs[1]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"weights": "random:1"}, "network_sha256"),
        ({"width": 64}, "network_sha256"),
        ({"out_indices": (1, 2, 3)}, "network_sha256"),
        ({"method": "max"}, "method is mse there and max here"),
    ],
)
def test_ranges_of_something_else_are_refused_with_the_field(calibrated, photograph_folder, tmp_path, options, field):
    with pytest.raises(CalibrationError, match=rf"does not fit: .*{field}.*calibrate again") as refusal:
        rebuilt(calibrated, tmp_path / "x.bundle", photograph_folder, **options)
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [("data_sha256", "0" * 64), ("preprocessing", {"mean": [0.4] * 3}), ("percentile", 99.0)],
)
def test_every_field_is_compared(calibrated, photograph_folder, tmp_path, field, value):
    path = tmp_path / "calibration.json"
    content = json.loads((calibrated.bundle.path / "calibration.json").read_bytes())
    content[field] = {**content[field], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(content))
    options = {"percentile": 99.99} if field == "percentile" else {}
    with pytest.raises(CalibrationError, match=f"does not fit: {field} is "):
        rebuilt(calibrated, tmp_path / "x.bundle", photograph_folder, calibration=path, **options)
    assert [file.name for file in tmp_path.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize("content", ["", "{}", "[1]", "\xff", '{"ranges": {"a": "b"}}'])
def test_what_is_no_calibration_file_is_refused(photograph_folder, tmp_path, content):
    path = tmp_path / "calibration.json"
    path.write_text(content, encoding="latin-1")
    options = BuildOptions(**SMALL, calibration=path)
    with pytest.raises(CalibrationError, match=r"calibration\.json is not a calibration\.json"):
        build_bundle("test_resnet", tmp_path / "x.bundle", images=photograph_folder, options=options)
    with pytest.raises(CalibrationError, match=r"missing\.json does not exist"):
        build_bundle("test_resnet", tmp_path / "x.bundle", options=BuildOptions(calibration=tmp_path / "missing.json"))


def test_a_bundle_without_ranges_and_a_damaged_one_are_refused(cnn, calibrated, tmp_path):
    with pytest.raises(CalibrationError, match="was built without int8 and has no ranges"):
        build_bundle("test_resnet", tmp_path / "x.bundle", options=BuildOptions(calibration=cnn.bundle.path))
    damaged = Path(shutil.copytree(calibrated.bundle.path, tmp_path / "damaged.bundle"))
    content = json.loads((damaged / "calibration.json").read_bytes())
    content["ranges"] = {name: 2 * value for name, value in content["ranges"].items()}
    (damaged / "calibration.json").write_text(json.dumps(content))
    with pytest.raises(Exception, match=r"calibration\.json"):
        build_bundle("test_resnet", tmp_path / "x.bundle", options=BuildOptions(calibration=damaged))


def test_corrected_biases_are_shipped(calibrated, photograph_folder, tmp_path):
    """Whatever calibration.json says of biases is in the graph, but for layers that int8 leaves alone."""
    path = tmp_path / "calibration.json"
    content = json.loads((calibrated.bundle.path / "calibration.json").read_bytes())
    content["shifts"] = {"layer2.0.conv1/Conv": [0.5] * 48, "layer1.0.conv1/Conv": [0.5] * 32}
    path.write_text(json.dumps(content))

    def biases(bundle: Path) -> dict[str, np.ndarray]:
        graph = onnx.load(bundle / "graphs" / "int8.onnx").graph
        stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        return {n.name: stored[n.input[2]].astype(np.float32) for n in graph.node if n.op_type == "Conv"}

    plain = biases(calibrated.bundle.path)
    options = {"calibration": path, "gates": {Precision.INT8: Gate(min_cosine=1e-6)}, "exclude": ("layer1",)}
    shifted = biases(rebuilt(calibrated, tmp_path / "net.bundle", photograph_folder, **options).bundle.path)
    moved = {
        name: shifted[name] - plain[name] for name in plain if not np.allclose(shifted[name], plain[name], atol=1e-2)
    }
    assert list(moved) == ["layer2.0.conv1/Conv"]
    np.testing.assert_allclose(moved["layer2.0.conv1/Conv"], 0.5, atol=5e-3)


# ---- what the user is told ------------------------------------------------------------------------------------------


def test_blank_images_and_silent_tensors_are_named(tmp_path):
    images = np.zeros((3, 64, 96, 3), np.uint8)
    options = BuildOptions(**{**SMALL, "golden": 1}, gates={Precision.INT8: Gate(min_cosine=1e-6)})
    result = build_bundle("test_resnet", tmp_path / "x.bundle", images=images, options=options)
    notes = " | ".join(result.notes)
    assert "3 images are of one colour (array 0 first)" in notes
    assert "only 2 images: the ranges were chosen on those that they were counted on" in notes
    graph = onnx.load(result.bundle.path / "graphs" / "int8.onnx").graph
    used = {node.input[1] for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    scales = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name in used]
    assert scales
    assert all(np.isfinite(scale).all() and (scale > 0).all() for scale in scales)


def test_one_image_is_enough_and_said(photographs, tmp_path):
    images = networks.crops(photographs, 1, 64, 96)
    options = BuildOptions(**{**SMALL, "golden": 1}, gates={Precision.INT8: Gate(min_cosine=1e-6)})
    result = build_bundle("test_resnet", tmp_path / "x.bundle", images=images, options=options)
    assert any(note.startswith("only 1 images") for note in result.notes)
