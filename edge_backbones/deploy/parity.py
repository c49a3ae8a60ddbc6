"""How right an engine is: every feature map, through the real runtime, against the fp32 golden samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from edge_backbones.bundle.golden import GoldenSamples
from edge_backbones.bundle.manifest import EngineKey
from edge_backbones.bundle.reader import Bundle
from edge_backbones.difference import reference_norm, relative_error, usual_norm
from edge_backbones.engines import select as session
from edge_backbones.engines.base import LoadOptions
from edge_backbones.engines.promises import is_inside
from edge_backbones.engines.select import load_engine
from edge_backbones.engines.tensorrt.profiles import Profile, choose_profile
from edge_backbones.parity_report import Gate, ParityError, ParityReport, StageParity
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.spec import BackboneSpec, InputSpec, Precision

_MAX_SQNR_DB = 300.0  # equal maps: JSON has no infinity


def measure_parity(
    backbone: EdgeBackbone,
    golden: GoldenSamples,
    precision: Precision,
    gate: Gate,
    profiles: Sequence[Profile] = (),
) -> ParityReport:
    """Run every golden case; the worst image of all cases counts for each output of the engine.

    An image whose reference map is (nearly) zero, as that of a black frame may be, is judged by what the others have there.
    ``profiles``: of the engine, each with kernels of its own: every one that takes a case's size is run.
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
    """The batch that there is, and one for each profile that it leaves out."""

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
    """Do the same for raw engine bytes, which are loaded as ``options`` say."""
    engine = load_engine(key, bytearray(data), spec, input, options)
    shapes = () if key.gpu is None else key.gpu.profiles
    profiles = [Profile(number, *of_one) for number, of_one in enumerate(shapes)]
    with EdgeBackbone(spec, input, engine) as backbone:
        return measure_parity(backbone, golden, key.precision, gate, profiles)


def require(report: ParityReport, *others: ParityReport, advice: Callable[[ParityReport], str]) -> ParityReport:
    """The first report; raises ParityError, which names the stages, for those that did not pass. ``advice``: a sentence for
    each of them, which fits its precision and the call that measured it."""
    failed = [one for one in (report, *others) if not one.passed]
    if failed:
        found = "; ".join(f"{one.precision} is outside its gate ({one.gate}): {one.failures()}" for one in failed)
        ways = dict.fromkeys(advice(one) for one in failed)
        raise ParityError(f"{found}. {'. '.join(ways)}", *failed)
    return report


def advice_on_building(report: ParityReport, library: str = "openvino") -> str:
    """What helps where an engine that is built is outside its gate. ``library``: what compiled it, as pip calls it.

    fp32 has no ranges, and ONNX Runtime has checked its graph by then: no image is to blame.
    """
    if report.precision is Precision.FP32:
        return (
            f"The graph is right in ONNX Runtime, so {library} computes it wrongly: install another release "
            f"(pip install --upgrade {library})"
        )
    if report.precision is Precision.FP16:  # 11 bits, and at most 65504
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
    """Compare one map with its reference, in float64. ``usual``: as in `relative_error`; all figures follow it."""
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
        cosine = 1 / math.sqrt(1 + relative**2) if relative < 1 else 0.0  # the noise counts as across a usual map
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
    """|x - r|^2 / |r|^2 that a gate lets pass; noise across the signal has cosine 1 / sqrt(1 + noise)."""
    bounds = [math.inf]
    if gate.min_sqnr_db is not None:
        bounds.append(10 ** (-gate.min_sqnr_db / 10))
    if gate.max_relative is not None:
        bounds.append(gate.max_relative**2)
    if gate.min_cosine is not None:
        bounds.append(_across(gate.min_cosine))
    return min(bounds)


def excess_noise(stage: StageParity, gate: Gate) -> float:
    """How many times more noise an output has than its gate allows, by the figure that is worst; 1 where it passes."""
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
    return 1 / cosine**2 - 1 if cosine > 0 else math.inf


def _ratio(measured: float, allowed: float) -> float:
    if measured <= 0 or measured == allowed:
        return 1.0
    return measured / allowed if allowed > 0 else math.inf


def _worse(a: StageParity, b: StageParity) -> StageParity:
    """Figure by figure, so that no image hides behind another."""
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
    """The same for an engine of a bundle; a plan that was written without weights gets them from the bundle's graph."""
    options = LoadOptions(gpu=gpu, allow_host_code=code, weights=session.weights_of(bundle, key))
    return measure_engine(key, data, bundle.manifest.backbone, bundle.manifest.input, golden, gate, options=options)
