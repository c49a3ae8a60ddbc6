"""Parity figures against formulas written out in float64, and what must never pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
from msgspec import structs

from edge_backbones.bundle.golden import GoldenSamples
from edge_backbones.bundle.reader import Bundle, load_golden
from edge_backbones.deploy.parity import advice_on_building, compare, measure_parity
from edge_backbones.engines.promises import DEFAULT_GATES
from edge_backbones.engines.tensorrt.profiles import Profile
from edge_backbones.errors import IntegrityError
from edge_backbones.parity_report import Gate, ParityReport, StageParity
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.spec import BackboneSpec, InputSpec, Precision, ShapeRange
from edge_backbones.testing import SPEC, NumpySession, pooled, pooling_input

OPEN = Gate()


def maps(seed: int = 0, shape=(4, 5, 6)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("noise", [1e-6, 1e-3, 0.1, 3.0])
def test_figures_are_the_textbook_ones(noise):
    expected = 7 * maps(0) + 2
    actual = (expected + noise * maps(1)).astype(np.float32)
    pairs = [(float(r), float(x)) for r, x in zip(expected.ravel(), actual.ravel(), strict=True)]
    signal, power = math.fsum(r * r for r, _ in pairs), math.fsum((r - x) ** 2 for r, x in pairs)
    dot, length = math.fsum(r * x for r, x in pairs), math.fsum(x * x for _, x in pairs)
    figures = compare("stage", expected, actual, OPEN)
    assert figures.stage == "stage"
    assert figures.cosine == pytest.approx(dot / math.sqrt(signal * length), rel=1e-12)
    assert figures.sqnr_db == pytest.approx(10 * math.log10(signal / power), rel=1e-9)
    assert figures.relative == pytest.approx(math.sqrt(power / signal), rel=1e-9)
    assert figures.max_abs == pytest.approx(max(abs(r - x) for r, x in pairs), rel=1e-12)
    assert figures.finite
    assert figures.passed


def test_large_values_do_not_overflow():
    expected = np.full((1, 2, 2), 3e38, np.float32)
    figures = compare("stage", expected, expected * np.float32(0.5), OPEN)
    assert (figures.cosine, figures.relative) == (pytest.approx(1), pytest.approx(0.5))


def test_equal_maps_are_perfect_in_finite_numbers():
    figures = compare("stage", maps(), maps(), Gate(min_cosine=1 - 1e-12, min_sqnr_db=200, max_relative=0))
    assert (figures.sqnr_db, figures.relative, figures.max_abs, figures.passed) == (300, 0, 0, True)


@pytest.mark.parametrize(
    ("gate", "passed"),
    [
        (Gate(min_cosine=0.99), True),
        (Gate(min_cosine=0.9999), False),
        (Gate(min_sqnr_db=19.9), True),
        (Gate(min_sqnr_db=20.1), False),
        (Gate(max_relative=0.101), True),
        (Gate(max_relative=0.099), False),
        (Gate(min_cosine=0.9, min_sqnr_db=10, max_relative=0.099), False),
    ],
)
def test_each_bound_of_a_gate_counts(gate, passed):
    expected = np.zeros((1, 1, 2), np.float32)
    expected[0, 0, 0] = 1
    actual = expected.copy()
    actual[0, 0, 1] = 0.1  # orthogonal: 20 dB, relative 0.1, cosine 0.995
    assert compare("stage", expected, actual, gate).passed is passed


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["actual", "expected"])
def test_values_that_are_not_finite_never_pass(bad, side):
    arrays = {"expected": maps(), "actual": maps()}
    arrays[side][1, 2, 3] = bad
    figures = compare("stage", **arrays, gate=OPEN)
    assert not figures.finite
    assert not figures.passed
    assert (figures.cosine, figures.sqnr_db, figures.max_abs, figures.relative) == (0, 0, 0, 0)


def test_another_shape_never_passes():
    assert not compare("stage", maps(), maps(shape=(4, 6, 5)), OPEN).passed
    assert not compare("stage", maps(shape=(1, 5, 6)), maps(shape=(4, 5, 6)), OPEN).passed  # would broadcast


@pytest.mark.parametrize("gate", DEFAULT_GATES.values())
def test_a_dead_reference_is_matched_by_zeros_only(gate):
    zeros = np.zeros((2, 3, 3), np.float32)
    assert compare("stage", zeros, zeros, gate).passed
    assert not compare("stage", zeros, maps(shape=(2, 3, 3)), gate).passed


@pytest.mark.parametrize("gate", DEFAULT_GATES.values())
def test_zeros_for_a_live_reference_do_not_pass(gate):
    assert not compare("stage", maps(), np.zeros_like(maps()), gate).passed


@pytest.mark.parametrize("gate", DEFAULT_GATES.values())
@pytest.mark.parametrize("reference", [0.0, 1e-9])
def test_a_black_frame_is_judged_by_what_the_other_images_have(gate, reference):
    """Relative to nothing any rounding is infinite: it is compared with a usual map."""
    black, usual = np.full((2, 3, 3), reference, np.float32), 5.0
    noise = maps(shape=(2, 3, 3))
    noise /= np.linalg.norm(noise)
    near = compare("stage", black, black + 1e-5 * usual * noise, gate, usual=usual)
    assert near.passed
    assert near.relative == pytest.approx(1e-5, rel=1e-3)
    assert near.sqnr_db == pytest.approx(100, abs=0.1)
    assert near.cosine == pytest.approx(1 / math.sqrt(1 + 1e-10))
    assert not compare("stage", black, black + 0.5 * usual * noise, gate, usual=usual).passed
    weak = 1e-3 * usual * noise  # weak, and a map all the same
    assert compare("stage", weak, 1.5 * weak, gate, usual=usual).relative == pytest.approx(0.5, rel=1e-5)


# ---- over images and cases ------------------------------------------------------------------------------------------


class Scripted:
    """A session that answers with the maps it was given, in order of the calls."""

    def __init__(self, answers: list[list[np.ndarray]]) -> None:
        self.answers = answers

    def run(self, array: np.ndarray) -> list[np.ndarray]:
        return self.answers.pop(0)

    def close(self) -> None:
        pass


def measured(golden: GoldenSamples, answers: list[list[np.ndarray]], gate: Gate):
    sizes = ShapeRange(min=1, opt=8, max=16)
    input = InputSpec(name="pixel_values", channels=1, batch=ShapeRange(min=1, opt=1, max=8), height=sizes, width=sizes)
    spec = BackboneSpec(
        stage_names=("a", "b"),
        out_features=("a", "b"),
        out_indices=(0, 1),
        channels=(4, 4),
        strides=((1, 1), (1, 1)),
        num_features=(4, 4),
        layouts=("NCHW", "NCHW"),
    )
    return measure_parity(EdgeBackbone(spec, input, Scripted(answers)), golden, Precision.INT8, gate)


def test_the_worst_image_of_all_cases_counts_figure_by_figure():
    one, two = maps(0, (3, 4, 5, 6)), maps(1, (2, 4, 7, 7))
    inputs = {"max": np.zeros((2, 1, 9, 9), np.float32), "opt": np.zeros((3, 1, 8, 8), np.float32)}
    golden = GoldenSamples("pixel_values", inputs, {"max": {"a": two, "b": two}, "opt": {"a": one, "b": one}})
    off_one, off_two = one.copy(), two.copy()
    off_one[2] *= 3  # largest relative error, cosine stays 1
    off_two[0] += 0.9 * maps(2, (4, 7, 7))  # smallest cosine
    report = measured(golden, [[off_two, two], [off_one, one]], Gate(min_cosine=0.9, max_relative=1))
    a, b = report.stages
    worst_one, worst_two = compare("a", one[2], off_one[2], OPEN), compare("a", two[0], off_two[0], OPEN)
    assert worst_two.cosine < 0.9 < worst_one.cosine
    assert worst_one.relative > 1 > worst_two.relative
    assert (a.cosine, a.relative) == (worst_two.cosine, worst_one.relative)
    assert (a.sqnr_db, a.max_abs) == (worst_one.sqnr_db, max(worst_one.max_abs, worst_two.max_abs))
    assert not a.passed
    assert b.passed
    assert not report.passed
    assert report.failures().startswith("a has cosine")


def test_one_bad_image_in_the_middle_is_not_hidden_by_good_ones():
    good = maps(0, (3, 4, 5, 6))
    inputs = {"opt": np.zeros((3, 1, 8, 8), np.float32)}
    golden = GoldenSamples("pixel_values", inputs, {"opt": {"a": good, "b": good}})
    bad = good.copy()
    bad[1, 0, 0, 0] = np.nan
    report = measured(golden, [[good, bad]], OPEN)
    assert [stage.passed for stage in report.stages] == [True, False]
    assert report.failures() == "b has values that are not finite"


def test_golden_samples_that_lack_a_stage_are_refused(cnn):
    manifest = cnn.bundle.manifest
    golden = structs.replace(manifest.golden, cases=("opt", "max"))
    promising = Bundle(cnn.bundle.path, structs.replace(manifest, golden=golden))
    with pytest.raises(
        IntegrityError, match=r"golden\.npz does not .*: it lacks max/pixel_values, max/blocks\.1, max/"
    ):
        load_golden(promising)


def test_every_optimisation_profile_is_measured():
    """Each has kernels of its own: an engine that is wrong in one of them is an engine that is wrong."""
    input = pooling_input(ShapeRange(min=1, opt=2, max=8))
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 48)).astype(np.float32)
    references = dict(zip(SPEC.outputs, pooled(images), strict=True))
    golden = GoldenSamples("pixel_values", {"opt": images}, {"opt": references})
    shapes = [[(batch, 3, 32, 48) for batch in span] for span in ((1, 1, 1), (1, 2, 4), (1, 2, 8), (2, 2, 2))]
    profiles = [Profile(number, *span) for number, span in enumerate(shapes)]
    large = Profile(4, (1, 3, 64, 64), (1, 3, 64, 64), (1, 3, 64, 64))  # no golden image has its size

    class Wrong(NumpySession):
        def run(self, array):
            return [m * (1.1 if len(array) == self.wrong_at else 1.0) for m in super().run(array)]

    def measured(wrong_at, *profiles):
        session = Wrong(input)
        session.wrong_at = wrong_at
        with EdgeBackbone(SPEC, input, session) as backbone:
            report = measure_parity(backbone, golden, Precision.FP32, Gate(max_relative=1e-3), profiles)
        return report.passed, session.batches

    assert measured(None) == (True, [2])
    assert measured(None, *profiles, large) == (True, [2, 1, 4, 8])  # 2 falls to the last one, which holds nothing else
    for batch in (1, 4, 8):
        assert measured(batch, *profiles)[0] is False
        assert measured(batch)[0] is True
    # One whose usual, largest and smallest batches fall to others is measured in between.
    gap = [
        Profile(i, *[(n, 3, 32, 48) for n in span])
        for i, span in enumerate(((1, 1, 1), (8, 8, 8), (1, 8, 8), (2, 2, 2)))
    ]
    assert measured(None, *gap) == (True, [2, 1, 8, 3])
    assert measured(None, profiles[2]) == (True, [2])


@pytest.mark.parametrize(
    ("precision", "finite", "says", "never"),
    [
        (
            "fp32",
            True,
            "torch computes it wrongly: install another release (pip install --upgrade torch)",
            "--precision",
        ),
        ("fp16", True, "fp16 rounds this network too coarsely: choose --precision fp32 or --precision bf16", "images"),
        ("fp16", False, "beyond what fp16 holds, 65504: choose --precision bf16 or --precision fp32", "images"),
        ("bf16", True, "choose --precision fp16 or --precision fp32", "images"),
        ("int8", True, "calibration images (--images), another range estimator (--method max)", "bf16"),
        ("fp8", True, "calibration images (--images), another range estimator (--method max)", "bf16"),
    ],
)
def test_advice_fits_the_precision_that_failed(precision, finite, says, never):
    """No image and no range decides what fp32, fp16 and bf16 compute."""
    stage = StageParity(stage="s", cosine=0, sqnr_db=0, max_abs=9, relative=1, finite=finite, passed=False)
    report = ParityReport(precision=Precision(precision), gate=Gate(min_cosine=0.99), stages=(stage,))
    advice = advice_on_building(report, library="torch")
    assert says in advice
    assert never not in advice.replace("pip install --upgrade", "")
