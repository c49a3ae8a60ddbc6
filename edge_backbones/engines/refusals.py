"""Find out from a device's profile why it could not run an engine, before minutes go into compiling it."""

from __future__ import annotations

from collections.abc import Sequence

from edge_backbones.engines import registry
from edge_backbones.machine.profiles import FIRST_ARCHITECTURE, RTX_ARCHITECTURES, DeviceProfile
from edge_backbones.spec import InputSpec, Precision

_DLA_LARGEST_BATCH = 4096
_DLA_LARGEST_SIZE = 8192


def refusals(
    profile: DeviceProfile,
    *,
    precision: Precision,
    flavour: str,
    input: InputSpec,
    dla_core: int | None = None,
    targets: Sequence[str] = (),
) -> list[str]:
    """Return why an engine cannot serve a device, one sentence with a fix each; empty if nothing speaks against it.

    What only the engine library knows (layers, memory) is not checked. Raises InputError for an unknown flavour.

    Args:
        profile: The device.
        precision: Precision of the graph.
        flavour: Library that compiles it.
        input: Sizes that the engine is compiled for.
        dla_core: DLA core that is asked for.
        targets: Architectures for TensorRT-RTX, empty for its default.
    """
    maker = registry.get(flavour)
    instead = " or ".join(name for name in profile.flavours if not _only_runs(name))
    if elsewhere := maker.against_profile(profile, instead):
        reasons = [elsewhere]
    else:
        reasons = maker.against_targets(profile, precision, targets)
        if maker.graph_format != "torchscript" and precision.value not in profile.precisions:
            reasons.append(_against_precision(profile, precision))
    if dla_core is None:
        return reasons
    count = profile.dla_cores
    if not count:
        return [
            *reasons,
            f"DLA core {dla_core} was asked for and {profile.name} has none: leave it out, and the GPU runs every layer",
        ]
    if not 0 <= dla_core < count:
        cores = "core 0 alone" if count == 1 else f"cores 0 to {count - 1}"
        reasons.append(f"DLA core {dla_core} does not exist: {profile.name} has {cores}")
    if not maker.has_dla:
        reasons.append(f"{flavour} compiles nothing for DLA: use flavour tensorrt")
    return reasons + against_dla(precision, input)


def _only_runs(flavour: str) -> bool:
    """Return whether an engine library compiles nothing at all."""
    found = registry.find(flavour)
    return found is not None and found.only_runs


def _against_precision(profile: DeviceProfile, precision: Precision) -> str:
    first = FIRST_ARCHITECTURE.get(precision)
    needs = f"{precision} needs sm_{first} or newer" if first else f"{precision} is not among what it computes"
    buildable = [precision.value for precision in Precision]
    instead = " or ".join(name for name in profile.pays if name in buildable) or "fp32"
    return f"{needs} and {profile.name} is {profile.architecture or 'a CPU'}: choose {instead}"


def against_rtx_targets(profile: DeviceProfile, precision: Precision, targets: Sequence[str]) -> list[str]:
    """Return why TensorRT-RTX cannot compile for these architectures, or why the device runs none of them."""
    reasons = []
    unknown = [target for target in targets if target not in RTX_ARCHITECTURES]
    if unknown:
        reasons.append(
            f"TensorRT-RTX does not compile for {', '.join(unknown)}: choose among {', '.join(RTX_ARCHITECTURES)}"
        )
    if targets and profile.architecture not in targets:
        reasons.append(
            f"an engine for {', '.join(targets)} does not run on {profile.name}: add the target {profile.architecture}"
        )
    if not targets and profile.architecture == "sm_75":
        reasons.append(
            f"TensorRT-RTX leaves sm_75 out of its portable engines and {profile.name} is one: name the target sm_75"
        )
    first = FIRST_ARCHITECTURE.get(precision, 0)
    # The precisions of the profile already cover the device's own architecture.
    late = [
        target
        for target in targets
        if target in RTX_ARCHITECTURES and target != profile.architecture and int(target.removeprefix("sm_")) < first
    ]
    if late:
        reasons.append(
            f"{precision} needs sm_{first} or newer and the targets have {', '.join(late)}: leave those out or choose "
            "another precision"
        )
    return reasons


def against_dla(precision: Precision, input: InputSpec) -> list[str]:
    """Return why no DLA core runs this precision or these sizes, one sentence with a fix each."""
    reasons = []
    if precision not in (Precision.FP16, Precision.INT8):
        reasons.append(f"DLA computes fp16 and int8, not {precision}: choose one of them, or leave dla_core out")
    axes = {"batch": input.batch, "height": input.height, "width": input.width}
    dynamic = [f"{name} {axis}" for name, axis in axes.items() if not axis.is_fixed]
    if dynamic:
        reasons.append(f"DLA takes fixed shapes and this input has {', '.join(dynamic)}: give each one size")
    if input.batch.max > _DLA_LARGEST_BATCH:
        reasons.append(
            f"DLA takes batches of at most {_DLA_LARGEST_BATCH}, not {input.batch.max}: choose a smaller one"
        )
    sizes = {"channels": input.channels, "height": input.height.max, "width": input.width.max}
    large = [f"{name} {size}" for name, size in sizes.items() if size > _DLA_LARGEST_SIZE]
    if large:
        reasons.append(
            f"DLA takes sizes of at most {_DLA_LARGEST_SIZE}, not {', '.join(large)}: choose a smaller input"
        )
    return reasons
