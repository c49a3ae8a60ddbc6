"""``edge-backbones compile`` and ``remove``: add engines to a bundle, and take engines out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from edge_backbones import doctor
from edge_backbones.bundle.reader import Bundle
from edge_backbones.cli import completion, console
from edge_backbones.cli.options import Form, takes, usage
from edge_backbones.cli.shared import AllowHostCode, BundleArgument, DeviceOption, InProcess, JsonFlag, shape_range
from edge_backbones.deploy import compile as deploy
from edge_backbones.engines import registry, select
from edge_backbones.engines.tensorrt.options import PlanOptions, Shapes
from edge_backbones.errors import CompileError, EdgeBackbonesError, InputError
from edge_backbones.machine import gpus
from edge_backbones.machine.child import LESS_MEMORY
from edge_backbones.machine.devices import Place, parse_device
from edge_backbones.machine.profiles import load_profile
from edge_backbones.machine.system import default_cache
from edge_backbones.parity_report import ParityError
from edge_backbones.spec import Precision


def _shapes(texts: list[str]) -> tuple[Shapes, ...]:
    """Read texts such as 1:4:8x224x224, BATCHxHEIGHTxWIDTH; raise ValueError for anything else."""
    found = []
    for text in texts:
        parts = text.lower().split("x")
        if len(parts) != 3:
            raise ValueError(f"{text!r} is not BATCHxHEIGHTxWIDTH")
        batch, height, width = map(shape_range, parts)
        found.append(Shapes(batch=batch, height=height, width=width))
    return tuple(found)


def _timing_cache(file: Path) -> bytes:
    """Return the content of a timing cache; raise InputError if there is no such file."""
    if not file.is_file():
        raise InputError(f"{file} does not exist: --timing-cache is a .cache file of an earlier compilation")
    return file.read_bytes()


def _known_flavour(name: str | None) -> str | None:
    """Refuse a name of no engine library; libraries of other packages are found too."""
    if name is not None and registry.find(name) is None:
        raise typer.BadParameter(
            f"{name!r} is not one of {', '.join(n for n in registry.names() if not registry.get(n).only_runs)}"
        )
    return name


_FLAGS = {"profiles": "shapes", "targets": "target"}  # of options that have another name here


@takes(
    PlanOptions,
    profiles=Form(
        flag=_FLAGS["profiles"],
        type=list[str] | None,
        read=_shapes,
        metavar="BATCHxHEIGHTxWIDTH",
        help="Each part is a number or MIN:OPT:MAX, as in 1x224x224 or 1:4:8x224x224.",
    ),
    targets=Form(flag=_FLAGS["targets"], metavar="ARCHITECTURE"),
    workspace=Form(read=lambda mib: mib << 20, metavar="MIB"),
    timing_cache=Form(type=Path | None, read=_timing_cache, metavar="FILE"),
)
def compile_(
    bundle: BundleArgument,
    *,
    precision: Annotated[
        list[Precision] | None,
        typer.Option(
            "--precision",
            "-p",
            metavar="NAME",
            help=f"Compile only the graph of this precision: {', '.join(Precision)}. Repeat for several.",
            show_default=False,
        ),
    ] = None,
    flavour: Annotated[
        str | None,
        typer.Option(
            "--flavour",
            "-f",
            callback=_known_flavour,
            metavar="FLAVOUR",
            autocompletion=completion.flavours,
            help="The engine library. openvino, onnxruntime: for this CPU. tensorrt: for this GPU. tensorrt_rtx: for the "
            "GPUs of --target, which need not be here. torchscript, torch_tensorrt: programs for torch. By default the one "
            "that serves this machine's GPU, else its CPU; on an ARM CPU both openvino and onnxruntime.",
            show_default=False,
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="DEVICE",
            autocompletion=completion.device_profiles,
            help="The device to compile for: a name that `edge-backbones profiles` lists, or a .toml file. What it cannot "
            "run is left out, and its workspace is the default. For the GPU of this machine it is found by itself.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out the engines that were compiled for this machine before.")
    ] = False,
    given: dict[str, Any],
    allow_host_code: AllowHostCode = False,
    in_process: InProcess = False,
    as_json: JsonFlag = False,
) -> None:
    """Compile engines for a bundle, usually on the device that will run them. Each is verified before it is added.

    Needs no torch. Ctrl-C stops and leaves the bundle as it was.

    Example: **edge-backbones compile resnet50.bundle --precision int8**
    """
    with usage():
        plan = PlanOptions(**given)
    Bundle.open(bundle)  # what is no bundle is refused before the machine is looked at
    place, gpu = parse_device(device)
    if flavour is not None and not registry.get(flavour).takes_plan_options:
        _refuse_plan_options(flavour, plan)
    chosen, plan, profile = _for_device(flavour, plan, profile, place, gpu)
    steps = console.Steps(as_json, aloud="leaving ")  # at once, because an error may follow
    with _told_once(steps, as_json), _memory_explained(), steps as progress:
        result = deploy.compile_bundle(
            bundle,
            precisions=tuple(precision) if precision else None,
            flavour=chosen,
            rivals=registry.get(chosen).rivals(registry.this_machine(None)) if flavour is None else (),
            plan=plan,
            profile=profile,
            gpu=gpu,
            allow_host_code=allow_host_code,
            resume=resume,
            cache=default_cache(),
            in_process=in_process,
            progress=progress,
        )
    if as_json:
        document = {"bundle": str(bundle), "flavour": chosen, "profile": profile}
        console.print_json({**document, "engines": result.engines, "notes": result.notes})
        return
    for note in result.notes:
        if note not in steps.said:
            console.err.print(note, soft_wrap=True)
    if not result.engines:
        console.out.print(f"nothing was added: what runs here is in {bundle}")
        return
    console.print_parity([engine.parity for engine in result.engines])
    for engine in result.engines:
        later = "" if engine.parity.measured else f", to be measured on the device: edge-backbones verify {bundle}"
        speed = "" if engine.milliseconds is None else f", {engine.milliseconds:.2f} ms"
        if engine.pipelined_milliseconds is not None:
            speed += f", {engine.pipelined_milliseconds:.2f} ms on the GPU alone"
        console.out.print(f"added {engine.file.path} ({engine.file.size / 1e6:.1f} MB{speed}{later})")


@contextlib.contextmanager
def _told_once(steps: console.Steps, as_json: bool) -> Iterator[None]:
    """End with the exit code of an error whose message was printed already, when its graph was left out."""
    try:
        yield
    except EdgeBackbonesError as error:
        if as_json or not any(said.endswith(str(error)) for said in steps.said):
            raise
        console.print_error("edge-backbones: nothing was added: every graph was left out")
        raise typer.Exit(console.EXIT_PARITY if isinstance(error, ParityError) else 1) from None


def _refuse_plan_options(flavour: str, plan: PlanOptions) -> None:
    """Raise a usage error for options of TensorRT that were typed for another library."""
    flags = [f"--{_FLAGS.get(option, option).replace('_', '-')}" for option in plan.changed()]
    if flags:
        wanted = "tensorrt_rtx" if plan.targets else "tensorrt"
        raise typer.BadParameter(
            f"{' and '.join(flags)}: {registry.get(flavour).title} has no such option: leave it out, or choose --flavour "
            f"{wanted}",
            param_hint="--flavour",
        )


def _for_device(
    flavour: str | None, plan: PlanOptions, profile: str | None, place: Place, gpu: int
) -> tuple[str, PlanOptions, str | None]:
    """Fill in what was not typed: the flavour that serves this machine, its targets and its profile.

    Says on stderr if this machine has a GPU that is not compiled for, or whose profile is not known.
    """
    if flavour is not None:
        chosen, found = flavour, deploy.profile_here(flavour, plan.targets, gpu)
        if place not in ("auto", *registry.get(chosen).devices):
            on = " or ".join(registry.get(chosen).devices)
            raise typer.BadParameter(
                f"{chosen} compiles for {on}, and --device is {place}: leave one of them out", param_hint="--flavour"
            )
    elif place == "cpu":
        chosen, found = registry.serving(registry.this_machine(None)).name, load_profile("cpu")
    else:
        chosen, found = deploy.flavour_here(gpu)
        maker = registry.get(chosen)
        if "cpu" in maker.devices:
            _refuse_cpu_for_want_of_tensorrt(asked=place == "cuda")
        elif maker.takes_targets and not plan.targets and found is not None and found.architecture is not None:
            plan = dataclasses.replace(plan, targets=(found.architecture,))
    if (
        found is None
        and profile is None
        and (flavour is None or (registry.get(chosen).needs_own_gpu and gpus.find_gpus()))
    ):
        console.err.print(
            "no profile is known to be of this GPU: compiling without its limits (--profile NAME or FILE.toml)"
        )
    return chosen, plan, profile or (None if found is None else found.name)


@contextlib.contextmanager
def _memory_explained() -> Iterator[None]:
    """Turn a MemoryError (C++ libraries raise it too) into a CompileError that says how to use less memory."""
    try:
        yield
    except MemoryError as error:
        said = f" ({error})" if str(error) else ""
        raise CompileError(f"compiling found no memory left{said}. {LESS_MEMORY}") from error


def _refuse_cpu_for_want_of_tensorrt(*, asked: bool) -> None:
    """Say why this machine's GPU is not compiled for.

    Raises CompileError if the GPU was asked for, or if no library for the CPU is there instead.
    """
    machine = doctor.look()
    why = doctor.why_not_the_gpu(machine)
    if asked:
        raise CompileError(f"nothing here compiles for the GPU: {why or gpus.no_gpu_reason()}")
    if why:
        if "openvino" not in machine.libraries:
            raise CompileError(why)
        console.err.print(f"compiling for the CPU: {why}", soft_wrap=True)


def remove(
    bundle: BundleArgument,
    engines: Annotated[
        list[str],
        typer.Argument(
            metavar="ENGINE...",
            autocompletion=completion.engine_names,
            help="Names of engines, as `edge-backbones inspect` shows them, or the beginnings of names.",
            show_default=False,
        ),
    ],
    as_json: JsonFlag = False,
) -> None:
    """Remove engines from a bundle. Programs that have opened them keep them.

    Example: **edge-backbones remove resnet50.bundle openvino-2026.0.0-x86_64-avx512_vnni-int8**
    """
    opened = Bundle.open(bundle)
    names = list(dict.fromkeys(select.named(opened, engine).name for engine in engines))  # all, before any is removed
    for name in names:
        opened = opened.remove_engine(name)
        if not as_json:
            console.out.print(f"removed {name}")
    left = [engine.name for engine in opened.manifest.engines]
    if as_json:
        console.print_json({"bundle": str(bundle), "removed": names, "left": left})
        return
    console.out.print(f"left: {', '.join(left) or 'none'}")
    if not left and not opened.manifest.graphs:
        console.err.print(f"{bundle} has neither engines nor graphs now: nothing runs it any more", soft_wrap=True)
