"""Check what a compilation asks of TensorRT before it starts: GPU, release, architectures, input sizes and options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from edge_backbones.engines.refusals import against_dla
from edge_backbones.engines.tensorrt.library import against_driver, against_release, load_library
from edge_backbones.engines.tensorrt.options import PlanOptions, Shapes
from edge_backbones.engines.tensorrt.profiles import Profile, uncovered
from edge_backbones.errors import CompileError
from edge_backbones.machine import gpus
from edge_backbones.machine.profiles import FIRST_ARCHITECTURE
from edge_backbones.machine.system import is_jetson
from edge_backbones.spec import InputSpec, Precision

PlanFlavour = Literal["tensorrt", "tensorrt_rtx"]
InputShapes: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]"

_RTX_DEFAULT = ("sm_80", "sm_86", "sm_89", "sm_120")


def has_weak_typing(flavour: PlanFlavour) -> bool:
    """Return whether this library can still choose number formats itself.

    TensorRT 10 can, and DLA on JetPack 6 needs it.
    """
    return hasattr(load_library(flavour).BuilderFlag, "INT8")


def shapes_of(input: InputSpec, shapes: Shapes) -> InputShapes:
    """Return the input shapes (min, opt, max) of one optimisation profile."""
    sizes = (shapes.batch, shapes.height, shapes.width)
    least, usual, most = (input.shape(*(getattr(size, which) for size in sizes)) for which in ("min", "opt", "max"))
    return least, usual, most


def resolve_request(
    input: InputSpec, precision: Precision, flavour: PlanFlavour, options: PlanOptions, gpu: int, *, weak: bool
) -> tuple[Any, gpus.Gpu | None, tuple[str, ...], tuple[Shapes, ...]]:
    """Return the library, the GPU, the architectures and the profiles of a plan.

    Args:
        input: As for `compile_plan`.
        precision: As for `compile_plan`.
        flavour: As for `compile_plan`.
        options: As for `compile_plan`.
        gpu: As for `compile_plan`.
        weak: As for `compile_plan`.

    Returns:
        The TensorRT module, the GPU (None if TensorRT-RTX needs none), the architectures, and the sizes of every profile.

    Raises:
        CompileError: They do not fit each other.
        MissingDependencyError: The library is not installed.
    """
    card = _find_gpu(flavour, gpu)
    if card is not None and flavour == "tensorrt" and (old := against_driver(flavour, card.driver)):
        raise CompileError(old)
    library = load_library(flavour)
    version = str(library.__version__)
    # JetPack 6.0 has TensorRT 8.6, which lacks names that are used below.
    if old := against_release(flavour, version, jetson=is_jetson()):
        raise CompileError(f"{flavour} {version} is too old: {old}")
    targets = _targets(library, flavour, precision, options, card)
    profiles = _profiles(input, options)
    _refuse(library, flavour, options, input, profiles, precision, card, weak=weak)
    return library, card, targets, profiles


def _find_gpu(flavour: PlanFlavour, gpu: int) -> gpus.Gpu | None:
    """Return the GPU to compile on; None if TensorRT-RTX compiles without one."""
    found = gpus.find_gpus()
    if 0 <= gpu < len(found):
        return found[gpu]
    if flavour == "tensorrt":  # without a driver, its Builder would end the process
        reason = gpus.no_gpu_reason() or f"this machine has {len(found)} GPUs, cuda:{gpu} is none of them"
        raise CompileError(f"TensorRT compiles on the GPU that will run the plan: {reason}")
    return None


def _targets(
    library: Any, flavour: PlanFlavour, precision: Precision, options: PlanOptions, card: gpus.Gpu | None
) -> tuple[str, ...]:
    """Return the architectures that the plan will run on."""
    if flavour == "tensorrt":
        assert card is not None  # _find_gpu raises if there is none
        if options.targets not in ((), (card.architecture,)):
            raise CompileError(
                f"TensorRT compiles for the GPU at hand, {card.architecture} here, not for {', '.join(options.targets)}: "
                "copy the bundle to that device and run edge-backbones compile there"
            )
        targets: tuple[str, ...] = (card.architecture,)
    else:
        known = _rtx_architectures(library)
        targets = options.targets or tuple(t for t in _RTX_DEFAULT if _has(t, precision) and t in known)
        unknown = [target for target in targets if target not in known]
        if unknown:
            raise CompileError(
                f"TensorRT-RTX {library.__version__} does not compile for {', '.join(unknown)}; it knows {', '.join(known)}. "
                "Jetson and datacenter GPUs need TensorRT (--flavour tensorrt), on the device itself"
            )
    old = [target for target in targets if not _has(target, precision)]
    if old:
        raise CompileError(
            f"{', '.join(old)} has no {precision}, which came with sm_{FIRST_ARCHITECTURE[precision]}: leave it out, or "
            "compile int8 or fp16"
        )
    return targets


def _rtx_architectures(library: Any) -> tuple[str, ...]:
    """Return the architectures that this release of TensorRT-RTX compiles for."""
    names = [name for name in library.ComputeCapability.__members__ if re.fullmatch(r"SM\d+", name)]
    return tuple(f"sm_{name.removeprefix('SM')}" for name in names)


def _has(architecture: str, precision: Precision) -> bool:
    """Return whether an architecture computes in a precision."""
    return int(architecture.removeprefix("sm_")) >= FIRST_ARCHITECTURE.get(precision, 0)


def _profiles(input: InputSpec, options: PlanOptions) -> tuple[Shapes, ...]:
    """Return the input sizes of every optimisation profile, which together must hold all sizes of the input."""
    whole = Shapes(batch=input.batch, height=input.height, width=input.width)
    for shapes in options.profiles:
        for axis in ("batch", "height", "width"):
            inner, outer = getattr(shapes, axis), getattr(whole, axis)
            if not outer.min <= inner.min <= inner.max <= outer.max:
                raise CompileError(
                    f"a profile asks for {axis} {inner}, the graph has {outer}: build the bundle for more sizes"
                )
    profiles = options.profiles or (whole,)
    numbered = [Profile(number, *shapes_of(input, shapes)) for number, shapes in enumerate(profiles)]
    missing = uncovered(numbered, input)
    if missing:
        raise CompileError(
            f"no profile holds {missing[0]}, and the bundle promises {input.min_shape} to {input.max_shape}: add a profile "
            "for it, or build a bundle with fewer sizes"
        )
    return profiles


def _refuse(
    library: Any,
    flavour: PlanFlavour,
    options: PlanOptions,
    input: InputSpec,
    profiles: Sequence[Shapes],
    precision: Precision,
    card: gpus.Gpu | None,
    *,
    weak: bool,
) -> None:
    """Raise CompileError for options that this library lacks or would ignore."""
    name = f"{flavour} {library.__version__}"
    if flavour == "tensorrt_rtx":
        ignored = {
            "version compatibility": options.version_compatible,
            "hardware compatibility": options.hardware_compatibility != "none",
            "sparse weights": options.sparse,
            "DLA core": options.dla_core is not None,
            "timing cache": options.timing_cache is not None,
        }
        asked = [what for what, wanted in ignored.items() if wanted]
        if asked:
            raise CompileError(
                f"{name} has no {' and no '.join(asked)}: leave it out, or use TensorRT (--flavour tensorrt)"
            )
        if (options.refit or options.strip) and not gpus.find_gpus():
            raise CompileError(
                f"{name} compiles refittable and stripped plans on a machine with a GPU only ({gpus.no_gpu_reason()})"
            )
    if options.tiling != "none" and tiling_level(library, options.tiling) is None:
        raise CompileError(f"{name} has no tiling, which came with TensorRT 10.8: leave it out, or use a newer release")
    if (
        options.hardware_compatibility != "none"
        and compatibility_level(library, options.hardware_compatibility) is None
    ):
        raise CompileError(
            f"{name} has no hardware compatibility {options.hardware_compatibility!r}: use a newer release"
        )
    if options.hardware_compatibility != "none" and card is not None and card.integrated:
        raise CompileError(
            f"TensorRT has no hardware compatibility on JetPack ({card.name}): leave it out, and compile on each device"
        )
    if (
        options.hardware_compatibility == "ampere_plus"
        and card is not None
        and not _has(card.architecture, Precision.BF16)
    ):
        raise CompileError(
            f"hardware compatibility ampere_plus begins with sm_80, and {card.name} is {card.architecture}: leave it out"
        )
    if options.dla_core is not None:
        for shapes in profiles:
            sizes = {"batch": shapes.batch, "height": shapes.height, "width": shapes.width}
            if reasons := against_dla(precision, msgspec.structs.replace(input, **sizes)):
                raise CompileError("; ".join(reasons))
    if weak and options.strip:
        raise CompileError(
            f"a stripped plan takes its weights from the graph of its precision, and {precision} on this DLA is compiled "
            "from the fp32 graph: leave strip out"
        )
    if weak and (options.dla_core is None or precision not in (Precision.FP16, Precision.INT8)):
        raise CompileError(
            f"weak typing is for fp16 and int8 on a DLA core, and this is {precision} "
            f"{'without one' if options.dla_core is None else 'on one'}: compile the typed graph"
        )


def compatibility_level(library: Any, wanted: str) -> Any:
    """Return the library's constant for a hardware compatibility; None if this release lacks it."""
    return getattr(library.HardwareCompatibilityLevel, wanted.upper(), None)


def tiling_level(library: Any, wanted: str) -> Any:
    """Return the library's constant for a tiling optimisation; None if this release lacks it."""
    return getattr(getattr(library, "TilingOptimizationLevel", None), wanted.upper(), None)
