"""``edge-backbones compile`` and ``remove``: add engines to a bundle, and take engines out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from edge_backbones import doctor
from edge_backbones.bundle.manifest import Flavour
from edge_backbones.bundle.reader import Bundle
from edge_backbones.cli import console
from edge_backbones.cli.options import (
    AllowHostCode,
    BundleArgument,
    GpuOption,
    InProcess,
    JsonFlag,
    read_option,
    shape_range,
)
from edge_backbones.deploy import compile as deploy
from edge_backbones.engines.tensorrt.compile import PlanOptions, Shapes
from edge_backbones.errors import CompileError, InputError
from edge_backbones.machine import gpus
from edge_backbones.machine.child import LESS_MEMORY
from edge_backbones.machine.system import default_cache
from edge_backbones.spec import Precision


def compile_(
    bundle: BundleArgument,
    precision: Annotated[
        list[Precision] | None, typer.Option(help="Only these graphs; all by default.", show_default=False)
    ] = None,
    flavour: Annotated[
        Flavour | None,
        typer.Option(
            help="openvino: this CPU. tensorrt: this GPU. tensorrt_rtx: the GPUs of --target, without one here. "
            "torchscript, torch_tensorrt: programs for torch. By default what serves this machine: its GPU, else its CPU.",
            show_default=False,
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            help="A device of `edge-backbones profiles`: leave out what it cannot run, and keep to its workspace. Found "
            "by itself where an engine is for the GPU of this machine.",
            show_default=False,
        ),
    ] = None,
    gpu: GpuOption = 0,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Architecture for tensorrt_rtx, sm_89; repeat for several.", show_default=False),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--shapes",
            help="BATCHxHEIGHTxWIDTH that kernels are chosen for, each MIN:OPT:MAX or one number: 1x224x224, 1:4:8x224x224; "
            "repeat for several optimisation profiles. One with every size by default.",
            show_default=False,
        ),
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(min=1, help="MiB of scratch memory that a kernel may use.", show_default=False)
    ] = None,
    level: Annotated[
        int | None,
        typer.Option(min=0, max=5, help="Builder optimisation level: 5 searches longest.", show_default=False),
    ] = None,
    hardware_compatibility: Annotated[
        Literal["none", "ampere_plus", "same_compute_capability"],
        typer.Option(help="GPUs beside this model that run the plan, slower."),
    ] = "none",
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="The lean runtime of the same release runs the plan too.")
    ] = False,
    embed_runtime: Annotated[
        bool,
        typer.Option("--embed-runtime", help="Carry the lean runtime, which is code: newer TensorRT runs it too."),
    ] = False,
    refit: Annotated[bool, typer.Option("--refit", help="Weights can be replaced later.")] = False,
    strip: Annotated[bool, typer.Option("--strip", help="Write the plan without weights, to be refitted.")] = False,
    sparse: Annotated[bool, typer.Option("--sparse", help="Use 2:4 sparse weights.")] = False,
    dla_core: Annotated[
        int | None, typer.Option(min=0, help="Compile for this core of the Jetson's DLA.", show_default=False)
    ] = None,
    gpu_fallback: Annotated[bool, typer.Option(help="Layers that DLA cannot run go to the GPU.")] = True,
    timing_cache: Annotated[
        Path | None, typer.Option(help="The .cache of an earlier compilation: saves time.", show_default=False)
    ] = None,
    allow_host_code: AllowHostCode = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on: leave out what was compiled before for this machine.")
    ] = False,
    in_process: InProcess = False,
    as_json: JsonFlag = False,
) -> None:
    """Add engines to a bundle, each verified first. Needs no torch. Ctrl-C stops and leaves the bundle as it was."""
    if timing_cache is not None and not timing_cache.is_file():
        raise InputError(f"{timing_cache} does not exist: --timing-cache is a .cache file of an earlier compilation")
    chosen: Flavour
    if flavour is not None:
        chosen = flavour
        found = deploy.profile_here(chosen, target or (), gpu)
    else:
        chosen, found = deploy.flavour_here(gpu)
        if chosen == "openvino":
            _refuse_cpu_for_want_of_tensorrt()
        elif chosen == "tensorrt_rtx" and not target and found is not None and found.architecture is not None:
            target = [found.architecture]
    if found is None and profile is None and (flavour is None or (chosen == "tensorrt" and gpus.find_gpus())):
        console.err.print(
            "no profile is known to be of this GPU: compiling without its limits (--profile NAME or FILE.toml)"
        )
    profile = profile or (None if found is None else found.name)
    plan = PlanOptions(
        profiles=tuple(one for text in shapes or () if (one := read_option("--shapes", _shapes, text))),
        targets=tuple(target or ()),
        workspace=None if workspace is None else workspace << 20,
        level=level,
        hardware_compatibility=hardware_compatibility,
        version_compatible=version_compatible,
        embed_runtime=embed_runtime,
        refit=refit,
        strip=strip,
        sparse=sparse,
        dla_core=dla_core,
        gpu_fallback=gpu_fallback,
        timing_cache=None if timing_cache is None else timing_cache.read_bytes(),
    )
    steps = console.Steps(as_json, aloud="leaving ")  # at once, because an error may follow
    with _memory_told(), steps as progress:
        result = deploy.compile_bundle(
            bundle,
            precisions=None if not precision else tuple(precision),
            flavour=chosen,
            plan=plan,
            profile=profile,
            device=gpu,
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
        console.out.print(f"added {engine.file.path} ({engine.file.size / 1e6:.1f} MB{speed}{later})")


@contextlib.contextmanager
def _memory_told() -> Iterator[None]:
    """Turn a MemoryError (C++ libraries raise it too) into a CompileError that says how to use less memory."""
    try:
        yield
    except MemoryError as error:
        said = f" ({error})" if str(error) else ""
        raise CompileError(f"compiling found no memory left{said}. {LESS_MEMORY}") from error


def _refuse_cpu_for_want_of_tensorrt() -> None:
    """Say why this machine's GPU is not compiled for; raise CompileError if OpenVINO is missing too."""
    machine = doctor.look()
    if why := doctor.why_not_the_gpu(machine):
        if "openvino" not in machine.libraries:
            raise CompileError(why)
        console.err.print(f"compiling for the CPU: {why}", soft_wrap=True)


def remove(
    bundle: BundleArgument,
    engines: Annotated[
        list[str], typer.Argument(help="Names of engines, as `inspect` shows them.", show_default=False)
    ],
) -> None:
    """Remove engines from a bundle. Programs that have opened them keep them."""
    opened = Bundle.open(bundle)
    for engine in engines:
        opened = opened.remove_engine(engine)
        console.out.print(f"removed {engine}; left: {', '.join(e.name for e in opened.manifest.engines) or 'none'}")


def _shapes(text: str) -> Shapes:
    """Read BATCHxHEIGHTxWIDTH, each one number or MIN:OPT:MAX; raise ValueError for anything else."""
    parts = text.lower().split("x")
    if len(parts) != 3:
        raise ValueError(f"{text!r} is not BATCHxHEIGHTxWIDTH")
    batch, height, width = map(shape_range, parts)
    return Shapes(batch=batch, height=height, width=width)
