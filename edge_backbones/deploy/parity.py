"""Measure how accurate an engine is: compare its feature maps, from the real runtime, with the fp32 golden samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from edge_backbones.bundle.golden import GoldenSamples
from edge_backbones.bundle.manifest import EngineKey
from edge_backbones.bundle.reader import Bundle
from edge_backbones.difference import reference_norm, relative_error, usual_norm
from edge_backbones.engines import select
from edge_backbones.engines.base import LoadOptions
from edge_backbones.engines.promises import is_inside
from edge_backbones.engines.select import load_engine
from edge_backbones.engines.tensorrt.profiles import Profile, choose_profile
from edge_backbones.parity_report import Gate, ParityError, ParityReport, StageParity
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.spec import BackboneSpec, InputSpec, Precision

_MAX_SQNR_DB = 300.0  # of equal maps, because JSON has no infinity


def measure_parity(
    backbone: EdgeBackbone,
    golden: GoldenSamples,
    precision: Precision,
    gate: Gate,
    profiles: Sequence[Profile] = (),
) -> ParityReport:
    """Run every golden case through a backbone, and report the worst image of each output.

    If an image's reference map is (nearly) zero, as for a black frame, its error is compared with the usual norm of
    that output.

    Args:
        backbone: The engine to measure.
        golden: Arrays by ``case/name``: the images of every case, and the reference of every output, shape (batch,
            ...).
        precision: Precision to report.
        gate: Bounds that every output has to keep.
        profiles: The engine's optimisation profiles. Each has kernels of its own, so every profile that takes a case's
            size is run.

    Returns:
        The figures of every output, and whether they keep the gate.
    """
    worst: dict[str, StageParity] = {}
    for case in golden.cases:
        images, references = golden.inputs[case], golden.outputs[case]
        for batch in _batches(images.shape, profiles):
            chosen = np.arange(batch) % len(images)
            for output, actual in backbone.run(images[chosen]).items():
                usual = usual_norm(references[output])
                for actual_image, i in zip(actual, chosen, strict=True):
                    measured = compare(output, references[output][i], actual_image, gate, usual=usual)
                    worst[output] = _worse(worst.get(output, measured), measured)
    return ParityReport(precision=precision, gate=gate, stages=tuple(worst.values()))


def _batches(shape: Sequence[int], profiles: Sequence[Profile]) -> list[int]:
    """Return the batch of a case, plus one batch for every other profile that takes its size."""

    def taken(batch: int) -> Profile | None:
        asked = (batch, *shape[1:])
        return choose_profile(profiles, asked) if any(profile.holds(asked) for profile in profiles) else None

    found = [shape[0]]
    for profile in profiles:
        least, usual, most = profile.min[0], profile.opt[0], profile.max[0]
        if not any(taken(batch) is profile for batch in found):
            found += [n for n in (usual, most, *range(least, most)) if taken(n) is profile][:1]
    return found


def measure_engine(
    key: EngineKey,
    data: bytes | bytearray,
    spec: BackboneSpec,
    input: InputSpec,
    golden: GoldenSamples,
    gate: Gate,
    *,
    options: LoadOptions | None = None,
) -> ParityReport:
    """Load raw engine bytes and measure them with `measure_parity`.

    Args:
        key: What the engine was compiled for.
        data: The engine's bytes.
        spec: Outputs that the engine promises.
        input: Input that the engine takes.
        golden: As for `measure_parity`.
        gate: As for `measure_parity`.
        options: How the engine is loaded.

    Returns:
        As for `measure_parity`.
    """
    engine = load_engine(key, bytearray(data), spec, input, options)
    shapes = () if key.gpu is None else key.gpu.profiles
    profiles = [Profile(number, *of_one) for number, of_one in enumerate(shapes)]
    with EdgeBackbone(spec, input, engine) as backbone:
        return measure_parity(backbone, golden, key.precision, gate, profiles)


def require(report: ParityReport, *others: ParityReport, advice: Callable[[ParityReport], str]) -> ParityReport:
    """Return the first report if all of them passed.

    Raises ParityError with the stages that failed. ``advice`` returns a sentence for each failed report, which fits its
    precision and the call that measured it.
    """
    failed = [one for one in (report, *others) if not one.passed]
    if failed:
        found = "; ".join(f"{one.precision} is outside its gate ({one.gate}): {one.failures()}" for one in failed)
        ways = dict.fromkeys(advice(one) for one in failed)
        raise ParityError(f"{found}. {'. '.join(ways)}", *failed)
    return report


def advice_on_building(report: ParityReport, library: str = "openvino") -> str:
    """Return advice for an engine that is outside its gate while a bundle is built.

    ``library``: pip's name of the library that compiled it. For fp32 the calibration images cannot be at fault: there
    are no ranges, and ONNX Runtime has checked the graph before.
    """
    if report.precision is Precision.FP32:
        return (
            f"The graph is right in ONNX Runtime, so {library} computes it wrongly: install another release "
            f"(pip install --upgrade {library})"
        )
    if report.precision is Precision.FP16:  # it has 11 significant bits and reaches 65504
        finite = all(stage.finite for stage in report.stages)
        why = "fp16 rounds this network too coarsely" if finite else "its values are beyond what fp16 holds, 65504"
        return f"{why}: choose --precision {'fp32' if finite else 'bf16'} or --precision {'bf16' if finite else 'fp32'}"
    if report.precision is Precision.BF16:
        return "bf16 has 8 bits, which are too few for this network: choose --precision fp16 or --precision fp32"
    return (
        "Use more or other calibration images (--images), another range estimator (--method max), or another precision "
        "(--precision fp16)"
    )


def compare(stage: str, expected: np.ndarray, actual: np.ndarray, gate: Gate, *, usual: float = 0.0) -> StageParity:
    """Compare one map with its reference, in float64.

    A map with NaN or infinity fails.

    Args:
        stage: Name of the output.
        expected: The reference, shape without the batch axis.
        actual: The map of the engine, same shape.
        gate: Bounds that the figures have to keep.
        usual: Usual norm of this output, as in `relative_error`. All figures use it where the reference is (nearly)
            zero.

    Returns:
        The figures, and whether they keep the gate.
    """
    relative = relative_error(actual, expected, usual=usual)
    if not math.isfinite(relative):
        return StageParity(stage=stage, cosine=0, sqnr_db=0, max_abs=0, relative=0, finite=False, passed=False)
    reference, value = expected.astype(np.float64).ravel(), actual.astype(np.float64).ravel()
    difference = value - reference
    norm = float(np.linalg.norm(reference))
    if reference_norm(norm, usual) == norm > 0:
        length = float(np.linalg.norm(value))
        cosine = float(reference @ value) / (norm * length) if length else 0.0
    else:
        # As if the noise were orthogonal to a map of the usual norm.
        cosine = 1 / math.sqrt(1 + relative**2) if relative < 1 else 0.0
    sqnr_db = min(20 * math.log10(1 / relative), _MAX_SQNR_DB) if relative else _MAX_SQNR_DB
    passed = is_inside(gate, cosine=cosine, sqnr_db=sqnr_db, relative=relative)
    return StageParity(
        stage=stage,
        cosine=cosine,
        sqnr_db=sqnr_db,
        max_abs=float(np.abs(difference).max()),
        relative=relative,
        finite=True,
        passed=passed,
    )


def allowed_noise(gate: Gate) -> float:
    """Return the relative noise power |x - r|^2 / |r|^2 that a gate allows.

    Noise that is orthogonal to the signal gives the cosine 1 / sqrt(1 + noise).
    """
    bounds = [math.inf]
    if gate.min_sqnr_db is not None:
        bounds.append(10 ** (-gate.min_sqnr_db / 10))
    if gate.max_relative is not None:
        bounds.append(gate.max_relative**2)
    if gate.min_cosine is not None:
        bounds.append(_across(gate.min_cosine))
    return min(bounds)


def excess_noise(stage: StageParity, gate: Gate) -> float:
    """Return how many times more noise power an output has than its gate allows, at least 1.

    The worst figure counts. Infinite for a map that is not finite.
    """
    if not stage.finite:
        return math.inf
    asked = [1.0]
    if gate.min_sqnr_db is not None:
        asked.append(_ratio(10 ** (-stage.sqnr_db / 10), 10 ** (-gate.min_sqnr_db / 10)))
    if gate.max_relative is not None:
        asked.append(_ratio(stage.relative**2, gate.max_relative**2))
    if gate.min_cosine is not None:
        asked.append(_ratio(_across(stage.cosine), _across(gate.min_cosine)))
    return max(asked)


def _across(cosine: float) -> float:
    """Return the relative power of orthogonal noise that gives this cosine."""
    return 1 / cosine**2 - 1 if cosine > 0 else math.inf


def _ratio(measured: float, allowed: float) -> float:
    if measured <= 0 or measured == allowed:
        return 1.0
    return measured / allowed if allowed > 0 else math.inf


def _worse(a: StageParity, b: StageParity) -> StageParity:
    """Return the worse of each figure, so that a good image cannot hide a bad one."""
    return StageParity(
        stage=a.stage,
        cosine=min(a.cosine, b.cosine),
        sqnr_db=min(a.sqnr_db, b.sqnr_db),
        max_abs=max(a.max_abs, b.max_abs),
        relative=max(a.relative, b.relative),
        finite=a.finite and b.finite,
        passed=a.passed and b.passed,
    )


def measure_in_bundle(
    bundle: Bundle,
    key: EngineKey,
    data: bytes | bytearray,
    golden: GoldenSamples,
    gate: Gate,
    gpu: int | None,
    *,
    code: bool = False,
) -> ParityReport:
    """Measure an engine of a bundle with `measure_engine`.

    A plan without weights takes them from the bundle's graph.

    Args:
        bundle: Where the engine belongs.
        key: What the engine was compiled for.
        data: The engine's bytes.
        golden: As for `measure_parity`.
        gate: As for `measure_parity`.
        gpu: Index of the GPU, None for the CPU.
        code: Allow engines that are programs, and runtimes inside plans.

    Returns:
        As for `measure_parity`.
    """
    options = LoadOptions(gpu=gpu, allow_host_code=code, weights=select.weights_of(bundle, key))
    return measure_engine(key, data, bundle.manifest.backbone, bundle.manifest.input, golden, gate, options=options)
