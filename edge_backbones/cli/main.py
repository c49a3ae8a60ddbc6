"""The command line: parse, one library call, exit code.

Exit codes: 0 done, 1 refused (one line on stderr says why), 2 usage, 3 a feature map is outside its parity gate, 4 slower
than stored results beyond noise, 130 interrupted. ``--json`` writes one JSON document to stdout and nothing else, for
refusals (1 and 3) too.
"""

from __future__ import annotations

import contextlib
import enum
import json
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal

from edge_backbones.engines import registry
from edge_backbones.errors import why_no_import

try:
    import msgspec
    import numpy as np
except ImportError as broken:
    sys.exit(f"edge-backbones: {why_no_import(broken)}")

from edge_backbones import __version__
from edge_backbones.bench.results import Comparison
from edge_backbones.bundle.manifest import Decision
from edge_backbones.bundle.reader import Bundle
from edge_backbones.errors import (
    CompileError,
    EdgeBackbonesError,
    InputError,
    MissingDependencyError,
    ResourceError,
    refuse_lack,
    visible,
)
from edge_backbones.parity_report import ParityError, ParityReport
from edge_backbones.spec import Precision, ShapeRange

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from rich.text import Text
except ImportError as missing_cli:
    sys.exit(f"edge-backbones: {MissingDependencyError('the command line', 'cli')} ({missing_cli.name} is missing)")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Vision backbones as verified bundles of compiled engines, behind the transformers backbone API.\n\n"
    "`build` makes a bundle from a model of timm or transformers, `run` gives the feature maps of a photograph.",
)


class _Console(Console):
    """Prints each text on a line of its own, as `visible` shows it: most hold names out of bundles."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(visible(o) if isinstance(o, str) else o for o in objects), **options)


class _Table(Table):
    """Its title and its cells are texts as `_Console` prints them."""

    def __init__(self, *headers: str, title: str | None = None, **options: Any) -> None:
        super().__init__(*headers, title=None if title is None else visible(title), **options)

    def add_row(self, *cells: Any, **options: Any) -> None:
        super().add_row(*(visible(c) if isinstance(c, str) else c for c in cells), **options)


# click's UsageError, which newer releases of typer carry inside and older ones import
_UsageError: Any = typer.BadParameter.__base__
# No markup and no emoji: paths and messages may hold brackets and colons.
_out = _Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
_err = _Console(stderr=True, highlight=False, markup=False, emoji=False)

_EXIT_PARITY = 3
_EXIT_SLOWER = 4

JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
BundleArgument = Annotated[Path, typer.Argument(help="A bundle folder.", show_default=False)]
EngineOption = Annotated[
    str | None,
    typer.Option(help="Precision, flavour or name of one engine; the best that fits by default.", show_default=False),
]
GpuOption = Annotated[int, typer.Option(min=0, help="Which GPU, for engines that need one.")]
AllowHostCode = Annotated[
    bool,
    typer.Option(
        "--allow-host-code",
        help="Run code of the bundle: TorchScript, or the runtime inside a version-compatible plan. Only for a bundle that "
        "you trust as you trust a program.",
    ),
]
InProcess = Annotated[
    bool,
    typer.Option("--in-process", help="Start no process of its own, which would report what ended it: for a debugger."),
]


# Typer takes a Literal where there is one value, and where there may be several an Enum only.
class Wanted(str, enum.Enum):
    AUTO = "auto"
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"


class TorchFlavour(str, enum.Enum):
    TORCHSCRIPT = "torchscript"
    TORCH_TENSORRT = "torch_tensorrt"


def _known_flavour(name: str | None) -> str | None:
    """Refuse a name of no engine library: those of other packages are found when they are asked for."""
    if name is not None:
        from edge_backbones.engines import registry

        if registry.find(name) is None:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(registry.names())}")
    return name


@app.command()
def build(
    model: Annotated[
        str,
        typer.Argument(
            help="A timm name (resnet50, resnet50.a1_in1k), a hub id (microsoft/resnet-50), a folder that "
            "save_pretrained wrote, or a config.json of transformers.",
            show_default=False,
        ),
    ],
    bundle: Annotated[Path, typer.Argument(help="The bundle folder to write.", show_default=False)],
    images: Annotated[
        Path | None,
        typer.Option(help="Photographs to calibrate with and to verify on: a folder, or an .npz.", show_default=False),
    ] = None,
    out_indices: Annotated[
        str | None,
        typer.Option(help="Stages to keep, by index: 1,2,3,4 or -2,-1. The last one by default.", show_default=False),
    ] = None,
    out_features: Annotated[
        str | None, typer.Option(help="Stages to keep, by name: layer1,layer4.", show_default=False)
    ] = None,
    precision: Annotated[
        list[Wanted] | None,
        typer.Option(
            help="fp32, fp16, bf16, int8 or fp8; repeat for several. auto: the fastest of fp32, fp16 and int8 on this "
            "machine whose feature maps pass.  "
            "[default: int8]"
        ),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            help="pretrained, random:SEED, or a checkpoint: .safetensors, or .pth / .ckpt without code. Prefixes (module., "
            "model., backbone. ...) and training checkpoints are understood: EMA weights go first, then a teacher."
        ),
    ] = "pretrained",
    input: Annotated[
        Literal["pixel_values", "image"],
        typer.Option(help="pixel_values: float NCHW, normalised. image: uint8 NHWC camera frames."),
    ] = "pixel_values",
    batch: Annotated[
        str | None, typer.Option(help="Batch size, or MIN:OPT:MAX.  [default: that of --profile, or 1]")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="HxW, or HxW:HxW:HxW as min:opt:max. The network's own by default.", show_default=False),
    ] = None,
    from_model: Annotated[
        bool, typer.Option("--from-model", help="MODEL is a whole model, such as DETR: take the backbone inside it.")
    ] = False,
    hidden_states: Annotated[
        bool, typer.Option("--hidden-states", help="Also return every hidden state, for output_hidden_states=True.")
    ] = False,
    dataset_index: Annotated[int, typer.Option(min=0, help="The expert of a VitPose that has several.")] = 0,
    image_processor: Annotated[
        Path | None,
        typer.Option(
            help="The preprocessing, where MODEL comes with none: the folder of an image processor of transformers, or its "
            "preprocessor_config.json.",
            show_default=False,
        ),
    ] = None,
    num_channels: Annotated[
        int | None,
        typer.Option(min=1, help="Channels of the input image. The network's own by default.", show_default=False),
    ] = None,
    output_stride: Annotated[
        int | None, typer.Option(help="8 or 16: dilate the last stages (where timm can).", show_default=False)
    ] = None,
    method: Annotated[
        Literal["auto", "max", "percentile", "entropy", "mse"] | None,
        typer.Option(help="Range estimator of int8. auto: per stage, the one with the least noise.  [default: auto]"),
    ] = None,
    percentile: Annotated[
        float | None, typer.Option(help="What percentile keeps inside the range.  [default: 99.99]")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Ranges from this calibration.json or bundle, for the same network.", show_default=False),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers that int8 leaves in fp16: a module (blocks.0), a pattern (*.mlp.fc2), op:Add, stage:layer4; "
            "repeat for several.",
            show_default=False,
        ),
    ] = None,
    fallback: Annotated[
        bool, typer.Option(help="Where int8 fails its gate, leave the noisiest blocks in fp16 until it holds.")
    ] = True,
    golden: Annotated[int, typer.Option(min=1, help="Images that parity is measured on.")] = 4,
    torchscript: Annotated[bool, typer.Option(help="Also write the frozen TorchScript module.")] = True,
    profile: Annotated[
        str | None,
        typer.Option(
            help="The device it is for, of `edge-backbones profiles`: refuse what it cannot run, take its usual batch.",
            show_default=False,
        ),
    ] = None,
    flavour: Annotated[
        list[TorchFlavour] | None,
        typer.Option(
            help="Engines for libtorch beside OpenVINO's; repeat for both. Those of TensorRT: edge-backbones compile.",
            show_default=False,
        ),
    ] = None,
    program: Annotated[
        Literal["torchscript", "exported_program"],
        typer.Option(help="What torch_tensorrt writes: for torch.jit.load, or for torch.export.load."),
    ] = "torchscript",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing bundle, once the new one is verified.")
    ] = False,
    page: Annotated[
        bool,
        typer.Option("--report/--no-report", help="Write <bundle>.report.html, a page to look at, beside the bundle."),
    ] = True,
    as_json: JsonFlag = False,
) -> None:
    """Build a bundle: load, fold, export, calibrate, compile, verify. Nothing is written unless every stage passes.

    Example: **edge-backbones build resnet50 resnet50.bundle --images photos/ --out-indices 1,2,3,4**
    """
    from edge_backbones.toolchain.build import BuildOptions, build_bundle

    height, width = (None, None) if size is None else _sizes(size)
    options = BuildOptions(
        weights=weights,
        from_model=from_model,
        hidden_states=hidden_states,
        dataset_index=dataset_index,
        image=image_processor,
        num_channels=num_channels,
        output_stride=output_stride,
        out_indices=None if out_indices is None else _integers(out_indices, "--out-indices"),
        out_features=None if out_features is None else tuple(name.strip() for name in out_features.split(",")),
        input=input,
        batch=None if batch is None else _range(batch, "--batch"),
        height=height,
        width=width,
        precisions=_precisions(precision or [Wanted.INT8]),
        method=method,
        percentile=percentile,
        calibration=calibration,
        exclude=tuple(exclude or ()),
        fallback=fallback,
        golden=golden,
        torchscript=torchscript,
        flavours=tuple(one.value for one in flavour or ()),
        program=program,
        profile=profile,
    )
    with _Steps(as_json) as progress:
        result = build_bundle(model, bundle, images=images, options=options, overwrite=overwrite, progress=progress)
        written = _page_of(bundle, progress) if page else None
    if as_json:
        _print_json(
            {
                "bundle": str(bundle),
                "report": None if written is None else str(written),
                "parity": result.reports,
                "skipped": result.skipped,
                "reasons": result.reasons,
                "preprocessing": result.bundle.manifest.preprocessing,
                "notes": result.notes,
                "decision": result.bundle.manifest.decision,
            }
        )
        return
    if result.skipped:
        _print_skipped(result.reasons)
    _print_parity(result.reports)
    _print_trials(result.bundle.manifest.decision)
    for note in (result.bundle.manifest.preprocessing, *result.notes):
        _err.print(note, soft_wrap=True)
    _out.print(f"wrote {bundle}" + ("" if written is None else f" and {written}"))


def _page_of(bundle: Path, progress: Callable[[str, int, int | None], None]) -> Path | None:
    """The report of a bundle that is finished, with or without it."""
    from edge_backbones.report.page import write_report

    progress("writing the report", 0, None)
    try:
        return write_report(bundle)
    except (EdgeBackbonesError, OSError) as error:
        _err.print(f"the bundle is done, its report is not: {error}", soft_wrap=True)
        return None


@app.command(name="compile")
def compile_(
    bundle: BundleArgument,
    precision: Annotated[
        list[Precision] | None, typer.Option(help="Only these graphs; all by default.", show_default=False)
    ] = None,
    flavour: Annotated[
        str | None,
        typer.Option(
            callback=_known_flavour,
            metavar="FLAVOUR",
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
    from edge_backbones.deploy.compile import compile_bundle, flavour_here, profile_here
    from edge_backbones.engines.tensorrt.options import PlanOptions
    from edge_backbones.machine import gpus
    from edge_backbones.machine.system import default_cache

    if timing_cache is not None and not timing_cache.is_file():
        raise InputError(f"{timing_cache} does not exist: --timing-cache is a .cache file of an earlier compilation")
    chosen: str
    if flavour is not None:
        chosen = flavour
        found = profile_here(chosen, target or (), gpu)
    else:
        chosen, found = flavour_here(gpu)
        if chosen == "openvino":
            _refuse_cpu_for_want_of_tensorrt()
        elif chosen == "tensorrt_rtx" and not target and found is not None and found.architecture is not None:
            target = [found.architecture]
    if found is None and profile is None and (flavour is None or (chosen == "tensorrt" and gpus.find_gpus())):
        _err.print("no profile is known to be of this GPU: compiling without its limits (--profile NAME or FILE.toml)")
    profile = profile or (None if found is None else found.name)
    plan = PlanOptions(
        profiles=tuple(_shapes(text) for text in shapes or ()),
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
    said: list[str] = []
    with _memory_told(), _Steps(as_json) as steps:

        def progress(step: str, done: int, total: int | None) -> None:
            if step.startswith("leaving "):  # now, because an error may follow, and for logs, which have no steps
                said.append(step)
                _err.print(step, soft_wrap=True)
            steps(step, done, total)

        result = compile_bundle(
            bundle,
            precisions=None if not precision else tuple(precision),
            flavour=chosen,
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
        _print_json({**document, "engines": result.engines, "notes": result.notes})
        return
    for note in result.notes:
        if note not in said:
            _err.print(note, soft_wrap=True)
    if not result.engines:
        _out.print(f"nothing was added: what runs here is in {bundle}")
        return
    _print_parity([engine.parity for engine in result.engines])
    for engine in result.engines:
        later = "" if engine.parity.measured else f", to be measured on the device: edge-backbones verify {bundle}"
        speed = "" if engine.milliseconds is None else f", {engine.milliseconds:.2f} ms"
        _out.print(f"added {engine.file.path} ({engine.file.size / 1e6:.1f} MB{speed}{later})")


@contextlib.contextmanager
def _memory_told() -> Iterator[None]:
    """An allocation that fails is a MemoryError, of libraries in C++ too; that it failed helps nobody."""
    try:
        yield
    except MemoryError as error:
        from edge_backbones.machine.child import LESS_MEMORY

        said = f" ({error})" if str(error) else ""
        raise CompileError(f"compiling found no memory left{said}. {LESS_MEMORY}") from error


def _refuse_cpu_for_want_of_tensorrt() -> None:
    """A machine with a GPU that gets an engine for its CPU: said, and without OpenVINO too what is missing is TensorRT."""
    from edge_backbones.doctor import look, why_not_the_gpu

    machine = look()
    if why := why_not_the_gpu(machine):
        if "openvino" not in machine.libraries:
            raise CompileError(why)
        _err.print(f"compiling for the CPU: {why}", soft_wrap=True)


@app.command()
def remove(
    bundle: BundleArgument,
    engines: Annotated[
        list[str], typer.Argument(help="Names of engines, as `inspect` shows them.", show_default=False)
    ],
) -> None:
    """Take engines out of a bundle. Programs that have opened them keep them."""
    opened = Bundle.open(bundle)
    for engine in engines:
        opened = opened.remove_engine(engine)
        _out.print(f"removed {engine}; left: {', '.join(e.name for e in opened.manifest.engines) or 'none'}")


@app.command()
def sign(
    bundle: BundleArgument,
    key: Annotated[
        Path | None,
        typer.Option(help="The private key: PEM, ECDSA on P-256, P-384 or P-521.", show_default=False),
    ] = None,
    passphrase_file: Annotated[
        Path | None,
        typer.Option(
            help="The key's passphrase, first line of this file. Asked for on a terminal.", show_default=False
        ),
    ] = None,
    certificate: Annotated[
        list[Path] | None,
        typer.Option(help="The key's certificate; repeat for those between it and the root.", show_default=False),
    ] = None,
    sigstore: Annotated[
        bool,
        typer.Option("--sigstore", help="Sign with an OpenID login instead of a key. Goes to Sigstore's public log."),
    ] = False,
    sigstore_config: Annotated[
        Path | None, typer.Option(help="Another Sigstore: its client trust config, JSON.", show_default=False)
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Sign a bundle with OpenSSF Model Signing, once its files are whole. Engines that a device adds later do not break it.

    Example: **edge-backbones sign resnet50.bundle --key private.pem**, and on the device **edge-backbones verify
    resnet50.bundle --key public.pem**. Keys are made with **openssl ecparam -name prime256v1 -genkey -noout -out
    private.pem** and **openssl ec -in private.pem -pubout -out public.pem**.
    """
    from edge_backbones.bundle import signing

    passphrase = None
    if passphrase_file is not None:
        passphrase = signing.read_passphrase(passphrase_file)
    elif key is not None and sys.stdin.isatty() and signing.has_passphrase(key):
        passphrase = typer.prompt(f"passphrase of {key}", hide_input=True, err=True).encode()
    signer = signing.sign_bundle(
        bundle,
        key=key,
        passphrase=passphrase,
        certificates=certificate or (),
        sigstore=sigstore,
        trust_config=sigstore_config,
    )
    if as_json:
        _print_json({"bundle": str(bundle), "signature": str(bundle / signing.SIGNATURE), "signer": signer})
        return
    _out.print(f"signed {bundle} with {signer}: {bundle / signing.SIGNATURE}")


@app.command()
def verify(
    bundle: BundleArgument,
    engine: EngineOption = None,
    key: Annotated[
        list[Path] | None,
        typer.Option(
            help="Refuse a bundle that is not signed by this public key (PEM), or under this certificate; a folder of them, "
            "or repeat: one is enough.",
            show_default=False,
        ),
    ] = None,
    sigstore_identity: Annotated[
        str | None,
        typer.Option(help="Refuse a bundle that this e-mail address or workflow did not sign.", show_default=False),
    ] = None,
    sigstore_issuer: Annotated[
        str | None,
        typer.Option(help="Who vouches for it, as https://accounts.google.com.", show_default=False),
    ] = None,
    sigstore_config: Annotated[
        Path | None, typer.Option(help="Another Sigstore: its client trust config, JSON.", show_default=False)
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Where a gate fails, find the layer in which the error is born.")
    ] = False,
    picture: Annotated[Path, typer.Option(help="Where the picture of the explanation goes.")] = Path("explanation.png"),
    gpu: GpuOption = 0,
    allow_host_code: AllowHostCode = False,
    in_process: InProcess = False,
    as_json: JsonFlag = False,
) -> None:
    """Check the signature where one is asked for, every file of a bundle, and measure parity again through the real runtime.

    An engine that was compiled ahead of time for this GPU is measured for the first time, and may run from then on."""
    from edge_backbones.bundle.trust import SigstoreIdentity
    from edge_backbones.deploy.verify import verify_bundle

    if (sigstore_identity is None) != (sigstore_issuer is None) or (sigstore_config and sigstore_identity is None):
        raise InputError(
            "Sigstore's signatures are of somebody, by an issuer: pass --sigstore-identity and --sigstore-issuer"
        )
    identity = None
    if sigstore_identity is not None and sigstore_issuer is not None:
        identity = SigstoreIdentity(sigstore_identity, sigstore_issuer, sigstore_config)
    try:
        with _Steps(as_json) as steps:

            def progress(step: str, done: int, total: int | None) -> None:
                if step.startswith("passing "):
                    _err.print(step, soft_wrap=True)
                steps(step, done, total)

            reports = verify_bundle(
                bundle,
                engine=engine,
                gpu=gpu,
                allow_host_code=allow_host_code,
                trusted=key or None,
                sigstore=identity,
                in_process=in_process,
                progress=progress,
            )
    except ParityError as error:
        if not explain:
            raise
        _explain(bundle, engine, gpu, picture, error, as_json, in_process)
        raise typer.Exit(_EXIT_PARITY) from None
    if as_json:
        _print_json({"bundle": str(bundle), "parity": reports})
        return
    _print_parity(reports)
    _out.print(f"{bundle} is whole and right" + (", and signed as asked" if key or identity else ""))


def _explain(
    bundle: Path, engine: str | None, gpu: int, picture: Path, error: ParityError, as_json: bool, in_process: bool
) -> None:
    from edge_backbones.pictures import draw_layers
    from edge_backbones.toolchain.explain_bundle import explain_bundle

    with _Steps(as_json) as progress:
        found = explain_bundle(bundle, engine=engine, gpu=gpu, in_process=in_process, progress=progress)
    drawn = [one for one in found if one.layers]
    files = [picture if len(drawn) == 1 else picture.with_stem(f"{picture.stem}.{one.precision}") for one in drawn]
    for one, file in zip(drawn, files, strict=True):
        layers = [(layer.name, layer.sqnr_db) for layer in one.layers]
        title = f"{bundle.name}, {one.precision}: {one.stage} is outside its gate; {one.cause}, {one.born}"
        draw_layers(file, layers, born=one.born, limit_db=one.limit_db, title=title)
    if as_json:
        document = {"parity": error.reports, "explanations": found, "pictures": [str(file) for file in files]}
        _print_json({"error": type(error).__name__, "message": str(error), **document})
        return
    _print_parity(error.reports)
    for one in found:
        table = _Table("layer" if one.cause == "engine" else "block alone", title=one.stage, title_justify="left")
        table.add_column("SQNR dB", justify="right")
        for layer in one.layers:
            style = "red" if layer.name == one.born else ""
            table.add_row(Text(visible(layer.name), style=style), Text(f"{layer.sqnr_db:.1f}", style=style))
        _out.print(table)
        _out.print(one.sentence)
    for file in files:
        _out.print(f"drew {file}")


@app.command()
def run(
    bundle: BundleArgument,
    source: Annotated[Path, typer.Argument(help="An image, or a folder of images.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where <image>.npz and <image>.png go.")] = Path("features"),
    engine: EngineOption = None,
    device: Annotated[str, typer.Option(help="Where it runs: cpu, cuda or cuda:1.")] = "cpu",
    allow_host_code: AllowHostCode = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.", show_default=False)] = None,
    picture: Annotated[bool, typer.Option(help="Draw the feature maps.")] = True,
    as_json: JsonFlag = False,
) -> None:
    """Feature maps of photographs: an .npz with one array per stage, and a picture of them.

    Files of a folder that do not decode are skipped with the reason.
    """
    from edge_backbones.images.decode import decode, grouped, list_images, open_image, shown, why_no_images
    from edge_backbones.images.fit import fit, to_input
    from edge_backbones.pictures import as_map, draw_feature_maps
    from edge_backbones.runtime.backbone import EdgeBackbone

    if not source.exists():
        raise InputError(f"{source} does not exist")
    files = list_images(source) if source.is_dir() else [source]
    if not files:
        raise InputError(why_no_images(source))
    targets = _feature_files(files, source if source.is_dir() else source.parent, out)
    config = Bundle.open(bundle).manifest.image
    written: list[dict[str, Any]] = []
    reasons: dict[str, str] = {}
    with (
        EdgeBackbone.from_pretrained(
            bundle, engine=engine, device=device, threads=threads, allow_host_code=allow_host_code
        ) as backbone,
        _Steps(as_json) as progress,
    ):
        for done, (file, (features, drawing)) in enumerate(zip(files, targets, strict=True)):
            progress("running", done, len(files))
            spec = backbone.input
            if source.is_dir():
                try:
                    image = decode(file, spec.channels)
                except InputError as error:
                    reasons[shown(file)] = str(error)
                    continue
            else:
                image = open_image(file, spec.channels)
            photograph = fit(image, config, spec.height.opt, spec.width.opt)
            maps = backbone(to_input(photograph[None], config, spec)).feature_maps
            by_stage = {stage: m[0] for stage, m in zip(backbone.out_features, maps, strict=True)}
            features.parent.mkdir(parents=True, exist_ok=True)
            _save_maps(features, by_stage)
            drawable = {}
            for (stage, m), layout, stride in zip(by_stage.items(), backbone.layouts, backbone.strides, strict=True):
                drawn = as_map(m, layout, (spec.height.opt // stride[0], spec.width.opt // stride[1]))
                if drawn is not None:
                    drawable[stage] = drawn
            if picture and drawable:
                draw_feature_maps(drawing, photograph, drawable, title=f"{Path(bundle).name}: {shown(Path(file.name))}")
            shapes = {stage: list(m.shape) for stage, m in by_stage.items()}
            written.append({"image": shown(file), "features": shown(features), "shapes": shapes})
        progress("running", len(files), len(files))
    if not written:
        raise InputError(f"{shown(source)}: none of its {len(reasons)} files is read: {'; '.join(grouped(reasons))}")
    if as_json:
        _print_json([*written, *({"image": name, "skipped": reason} for name, reason in reasons.items())])
        return
    if reasons:
        _print_skipped(reasons)
    for entry in written:
        stages = ", ".join(f"{stage} {'x'.join(map(str, shape))}" for stage, shape in entry["shapes"].items())
        _out.print(f"{entry['features']}: {stages}")


@app.command()
def inspect(bundle: BundleArgument, as_json: JsonFlag = False) -> None:
    """What is in a bundle, and which of its engines run on this machine. Reads the manifest only."""
    from edge_backbones.engines import promises

    manifest = Bundle.open(bundle).manifest
    on_gpu = any(engine.key.gpu is not None for engine in manifest.engines)
    host = registry.this_machine(0 if on_gpu else None)
    reasons = {engine.name: registry.reasons_against(engine.key, host) for engine in manifest.engines}
    for engine in manifest.engines:
        reasons[engine.name] += promises.reasons_against(manifest, engine)
    if as_json:
        _print_json({"manifest": manifest, "reasons_against": reasons})
        return
    source, spec = manifest.source, manifest.backbone
    weights = {"random": f"random weights, seed {source.seed}", "pretrained": "pretrained weights"}.get(
        source.weights, f"weights with SHA-256 {(source.weights_sha256 or '')[:12]}..."
    )
    _out.print(f"{bundle}: {source.name} of {source.library}, {weights}")
    _out.print(f"input {manifest.input.name}: {manifest.input.describe()}, engine batch {manifest.input.batch}")
    _out.print(manifest.preprocessing)
    for note in source.preprocessing_notes:
        _out.print(note)
    stages = _Table("index", "stage", "channels", "stride", "layout", title="feature maps", title_justify="left")
    for row in zip(spec.out_indices, spec.out_features, spec.channels, spec.strides, spec.layouts, strict=True):
        index, name, channels, (vertical, horizontal), layout = row
        stride = str(vertical) if vertical == horizontal else f"{vertical}x{horizontal}"
        stages.add_row(str(index), name, str(channels), stride, layout)
    _out.print(stages)
    if spec.extras:
        extras = _Table("output", "channels", "layout", title="other outputs", title_justify="left")
        for extra in spec.extras:
            extras.add_row(extra.name, str(extra.channels), extra.layout)
        _out.print(extras)
    engines = _Table("engine", "MB", "ms", "runs here", title="engines", title_justify="left")
    for engine in manifest.engines:
        why = reasons[engine.name]
        speed = "" if engine.milliseconds is None else f"{engine.milliseconds:.2f}"
        megabytes = f"{engine.file.size / 1e6:.1f}"
        engines.add_row(engine.name, megabytes, speed, "yes" if not why else "no: " + "; ".join(why))
    _out.print(engines)
    _print_parity([engine.parity for engine in manifest.engines])
    if manifest.calibration is not None:
        record = manifest.calibration
        estimator = f"percentile {record.percentile:g}" if record.method == "percentile" else record.method
        chosen = ", ".join(f"{stage} by {method}" for stage, method in record.chosen.items())
        _out.print(
            f"calibrated by {estimator} on {record.images} images, {len(record.skipped)} skipped"
            + (f": {chosen}" if chosen else "")
        )
    _print_trials(manifest.decision)
    if manifest.decision is not None:
        _out.print(manifest.decision.sentence)
    _out.print(f"built {manifest.provenance.created}")


@app.command()
def profiles(
    name: Annotated[
        str | None,
        typer.Argument(help="One device; all by default. A .toml of your own works too.", show_default=False),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Devices that engines are compiled for: what they have, which library serves them, which precisions pay."""
    from edge_backbones.machine.gpus import find_gpus
    from edge_backbones.machine.profiles import explain, list_profiles, load_profile, profile_of
    from edge_backbones.machine.system import board_name

    found = list_profiles() if name is None else (load_profile(name),)
    if as_json:
        _print_json(found)
        return
    if name is not None:
        for line in explain(found[0]).splitlines():
            _out.print(line)
        return
    table = _Table("profile", "GPU", "GiB", "GB/s", "pays")
    for profile in found:
        memory = [module.memory_gib for module in profile.modules]
        speed = [module.bandwidth_gb_s for module in profile.modules if module.bandwidth_gb_s is not None]
        table.add_row(profile.name, profile.architecture or "", _span(memory), _span(speed), ", ".join(profile.pays))
    _out.print(table)
    here = profile_of(next(iter(find_gpus()), None), board=board_name())
    _out.print(f"this machine: {here.name if here else 'a GPU that no profile describes'}")
    _out.print("what each has, takes and likes: edge-backbones profiles NAME")


@app.command()
def doctor(
    bundle: Annotated[
        Path | None, typer.Argument(help="Say which of its engines run here; exit code 1 if none.", show_default=False)
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """What this machine can build and run, and what to do about the rest."""
    from edge_backbones.doctor import judge, judge_engines, look

    opened = None if bundle is None else Bundle.open(bundle)
    machine = look()
    engines = [] if opened is None else judge_engines(machine, opened)
    findings = [*judge(machine), *engines]
    if as_json:
        _print_json(findings)
    else:
        for finding in findings:  # lines, not a table: a command that is to be copied must not be cut
            mark = ("ok", "green") if finding.ok else ("--", "yellow")
            topic, found, fix = map(visible, (finding.topic, finding.found, finding.fix))
            _out.print(Text.assemble(mark, "  ", (topic, "bold"), ": ", found), soft_wrap=True)
            if fix:
                _out.print(Text.assemble("    to do: ", (fix, "cyan")), soft_wrap=True)
    if opened is not None and not any(finding.ok for finding in engines):
        raise typer.Exit(1)


def _span(sizes: Sequence[float]) -> str:
    ends = sorted({min(sizes), max(sizes)}) if sizes else []
    return " to ".join(f"{size:g}" for size in ends)


def _feature_files(files: list[Path], root: Path, out: Path) -> list[tuple[Path, Path]]:
    """Where the features and the picture of each image go: a.npz and a.png, or a.jpg.npz beside a.png.npz of one name."""
    stems = Counter(file.with_suffix("") for file in files)
    targets = []
    for file in files:
        base = out / file.relative_to(root)
        base = base.with_suffix("") if stems[file.with_suffix("")] == 1 else base
        targets.append((base.with_name(base.name + ".npz"), base.with_name(base.name + ".png")))
    images = {file.resolve() for file in files}
    lost = [path for pair in targets for path in pair if path.resolve() in images]
    if lost:
        raise InputError(f"{lost[0]} is one of the images and would be overwritten: choose another folder with --out")
    return targets


@app.command()
def bench(
    bundle: BundleArgument,
    vs: Annotated[
        str | None,
        typer.Option(
            help="Peers, each alone in its process: torch, torch-compile, torchscript, onnxruntime, openvino, nncf (the last "
            "two on the CPU only). By default torch,onnxruntime,openvino.",
            show_default=False,
        ),
    ] = None,
    engine: EngineOption = None,
    device: Annotated[str, typer.Option(help="Where everybody runs: cpu, cuda or cuda:1.")] = "cpu",
    allow_host_code: AllowHostCode = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all by default.", show_default=False)] = None,
    turns: Annotated[int, typer.Option(min=1, help="Turns of each; from six on noise is told from difference.")] = 9,
    seconds: Annotated[float, typer.Option(min=0, help="How long a turn takes at least.")] = 1.0,
    images: Annotated[
        Path | None,
        typer.Option(help="Photographs that nncf calibrates on; golden samples by default.", show_default=False),
    ] = None,
    peer_python: Annotated[
        list[str] | None,
        typer.Option(help="NAME=PYTHON: the interpreter of a peer that lives elsewhere.", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results, as JSON.", show_default=False)] = None,
    against: Annotated[
        Path | None, typer.Option(help="Earlier results: exit code 4 where ground was lost.", show_default=False)
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Time a bundle's engine and its peers side by side: alternating turns, ratios with their bounds.

    Example: edge-backbones bench resnet50.bundle --vs torch,onnxruntime,nncf --out today.json"""
    from edge_backbones.bench.compare import CompareOptions, compare, read_images
    from edge_backbones.bench.results import encode, read, regressions

    pythons = dict(entry.partition("=")[::2] for entry in peer_python or ())
    vs = vs if vs is not None else "torch,onnxruntime,openvino" if device == "cpu" else "torch,onnxruntime"
    before = None if against is None else read(against)
    options: dict[str, Any] = {} if threads is None else {"threads": threads}
    chosen = CompareOptions(
        engine=engine,
        vs=tuple(name.strip() for name in vs.split(",") if name.strip()),
        device=device,
        turns=turns,
        seconds=seconds,
        images=None if images is None else read_images(images, Bundle.open(bundle)),
        pythons=pythons,
        allow_host_code=allow_host_code,
        **options,
    )
    with _Steps(as_json) as progress:
        result = compare(bundle, chosen, progress=progress)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(encode(result))
    lost = [] if before is None else regressions(result, before)
    if as_json:
        _print_json({"comparison": result, "regressions": lost})
    else:
        _print_comparison(result)
        for phrase in lost:
            _err.print(f"slower than before: {phrase}", soft_wrap=True)
        if before is not None and not lost:
            _out.print(f"no ground lost since {before.date}")
    if lost:
        raise typer.Exit(_EXIT_SLOWER)


@app.command()
def report(
    bundle: BundleArgument,
    out: Annotated[
        Path | None, typer.Option(help="The page; <bundle>.report.html by default.", show_default=False)
    ] = None,
    bench_results: Annotated[
        list[Path] | None,
        typer.Option("--bench", help="Results of `bench --out` to show; repeat for several.", show_default=False),
    ] = None,
    engine: EngineOption = None,
) -> None:
    """One HTML page of a bundle: its feature maps beside fp32, parity, where int8 is, how fast, where from."""
    from edge_backbones.bench.results import read
    from edge_backbones.report.page import write_report

    comparisons = [read(file) for file in bench_results or ()]
    _out.print(f"wrote {write_report(bundle, out, comparisons=comparisons, engine=engine)}")


def _show_version(asked: bool) -> None:
    if asked:
        _out.print(f"edge-backbones {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: run a command and turn every outcome into an exit code."""
    sys.exit(_run(sys.argv[1:]))


def _run(arguments: list[str]) -> int:
    try:
        return app(arguments, prog_name="edge-backbones", standalone_mode=False) or 0
    except ParityError as error:
        if "--json" not in arguments:
            _print_parity(error.reports, console=_err)
        return _refuse(arguments, error, _EXIT_PARITY, parity=error.reports)
    except EdgeBackbonesError as error:
        return _refuse(arguments, error, 1)
    except (OSError, MemoryError) as error:
        try:
            refuse_lack("this command", error)
        except ResourceError as lack:
            return _refuse(arguments, lack, 1)
        return _refuse(arguments, error, 1)
    except ImportError as error:  # not of an extra, which is said in words
        missing = isinstance(error, ModuleNotFoundError)
        return _refuse(arguments, error if missing else why_no_import(error), 1)
    except _UsageError as error:
        error.show()
        return int(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _err.print("interrupted: no bundle was changed")
        return 130


def _refuse(arguments: list[str], error: BaseException, code: int, **details: Any) -> int:
    message = " ".join(str(error).split()) or type(error).__name__
    if "--json" in arguments:
        _print_json({"error": type(error).__name__, "message": message, **details})
    else:
        _err.print(f"edge-backbones: {message}", soft_wrap=True)
    return code


class _Steps:
    """Progress on a terminal: a line per step with its elapsed time. Quiet elsewhere.

    Ctrl-C is remembered from step to step: some libraries catch everything, KeyboardInterrupt too.
    """

    def __init__(self, quiet: bool) -> None:
        self._bars = Progress(
            SpinnerColumn(finished_text="[green]*[/]"),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            console=_err,
            disable=quiet or not _err.is_terminal,
        )
        self._task: Any = None
        self._step = ""
        self._interrupted = False
        self._before: Any = None

    def __enter__(self) -> Callable[[str, int, int | None], None]:
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        self._bars.start()
        return self._progress

    def _interrupt(self, *_: Any) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def _progress(self, step: str, done: int, total: int | None) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        if step != self._step:
            self._finish()
            self._step, self._task = step, self._bars.add_task(visible(step), total=total, count="")
        self._bars.update(self._task, completed=done, total=total, count=f"{done}/{total}" if total else "")

    def _finish(self) -> None:
        if self._task is not None:
            task = self._bars.tasks[self._bars.task_ids.index(self._task)]
            total = task.total or 1
            self._bars.update(self._task, completed=total, total=total)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)
        if kind is None:
            self._finish()
        self._bars.stop()


def _print_parity(reports: Iterable[ParityReport], console: Console | None = None) -> None:
    for report in reports:
        if not report.measured:
            continue
        title = f"parity of {report.precision} with fp32 torch, worst golden image; gate: {report.gate}"
        table = _Table("stage", title=title, title_justify="left")
        for column in ("cosine", "SQNR dB", "relative error", "max |difference|", ""):
            table.add_column(column, justify="right")
        for s in report.stages:
            figures = (f"{s.cosine:.6f}", f"{s.sqnr_db:.1f}", f"{s.relative:.1e}", f"{s.max_abs:.3g}")
            table.add_row(s.stage, *(figures if s.finite else ("not finite",) * 4), _verdict(s.passed))
        (console or _out).print(table)


def _verdict(passed: bool) -> Text:
    return Text("pass", style="green") if passed else Text("FAIL", style="red")


_COSTS = (
    ("SQNR dB", "worst_sqnr_db"), ("images/s", "images_per_second"), ("load s", "load_s"), ("first call ms", "first_call_ms"),
    ("MB", "resident_mb"), ("device MB", "device_mb"), ("file MB", "file_mb"), ("J/image", "joules"),
)  # fmt: skip


def _print_comparison(result: Comparison) -> None:
    """How fast, and at what cost, a row per contender; then in words what tables cannot say."""
    shape = "x".join(str(size) for size in result.input_shape)
    title = f"{result.engine} on {result.machine.name}, {result.threads} threads, input {shape}, {result.device}"
    ratios = {ratio.name: ratio for ratio in result.ratios}
    shown = [m for m in result.measurements if not m.missing]
    speed = _Table("", title=title, title_justify="left")
    for column in ("ms", "times ours", "p90 ms", "p99 ms", "jitter"):
        speed.add_column(column, justify="right", no_wrap=True)
    for m in shown:
        ratio = ratios.get(m.name)
        told = "1" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        jitter = "" if m.jitter is None else f"{m.jitter:.0%}"
        speed.add_row(m.name, _figure(m.median_ms), told, _figure(m.p90_ms), _figure(m.p99_ms), jitter)
    measured = [(head, field) for head, field in _COSTS if any(getattr(m, field) is not None for m in shown)]
    cost = _Table("")
    for head, _ in measured:
        cost.add_column(head, justify="right", no_wrap=True)
    for m in shown:
        cost.add_row(m.name, *(_figure(getattr(m, field)) for _, field in measured))
    _out.print(speed)
    _out.print(cost)
    for m in shown:
        versions = ", ".join(f"{name} {version.partition('-')[0]}" for name, version in m.versions.items())
        _out.print(f"{m.name}: {m.what} ({versions})")
    for m in result.measurements:
        if m.missing:
            _out.print(f"{m.name} did not run: {m.missing}")
    unranked = [ratio.name for ratio in result.ratios if not ratio.is_ranked]
    if unranked:
        _out.print(f"Not ranked against {', '.join(unranked)}: the difference is within the noise of this machine.")


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _print_trials(decision: Decision | None) -> None:
    """What the build tried, parity against latency."""
    if decision is None:
        return
    table = _Table("engine", title=f"tried on {decision.device_name}", title_justify="left")
    for column in ("cosine", "SQNR dB", "ms", ""):
        table.add_column(column, justify="right")
    for trial in decision.trials:
        without = f" without {len(trial.blocks)} blocks" if trial.blocks else ""
        milliseconds = "" if trial.milliseconds is None else f"{trial.milliseconds:.2f}"
        table.add_row(
            f"{trial.precision}{without}",
            f"{trial.cosine:.4f}",
            f"{trial.sqnr_db:.1f}",
            milliseconds,
            _verdict(trial.passed),
        )
    _out.print(table)


def _precisions(wanted: list[Wanted]) -> tuple[Precision, ...] | Literal["auto"]:
    if Wanted.AUTO not in wanted:
        return tuple(dict.fromkeys(Precision(one.value) for one in wanted))
    if len(wanted) > 1:
        raise typer.BadParameter("auto chooses among all: give it alone", param_hint="--precision")
    return "auto"


def _save_maps(path: Path, maps: Mapping[str, Any]) -> None:
    """Write an .npz file. Stages may have names that numpy.savez takes for its own arguments: ``file``, ``allow_pickle``."""
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        for stage, feature_map in maps.items():
            with archive.open(f"{stage}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, feature_map, allow_pickle=False)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(msgspec.to_builtins(value), indent=2) + "\n")


def _print_skipped(reasons: Mapping[str, str]) -> None:
    from edge_backbones.images.decode import grouped

    _err.print(f"{len(reasons)} {'file was' if len(reasons) == 1 else 'files were'} skipped:")
    for line in grouped(reasons):
        _err.print(f"  {line}", soft_wrap=True)


def _integers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of integers such as 1,2,3", param_hint=option) from None


def _range(text: str, option: str) -> ShapeRange:
    try:
        parts = [int(part) for part in text.split(":")]
        if len(parts) not in (1, 3):
            raise ValueError("one number, or three as MIN:OPT:MAX")
        return ShapeRange(min=parts[0], opt=parts[len(parts) // 2], max=parts[-1])
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a size or MIN:OPT:MAX: {error}", param_hint=option) from None


def _sizes(text: str) -> tuple[ShapeRange, ShapeRange]:
    pairs = [part.lower().split("x") for part in text.split(":")]
    if any(len(pair) != 2 for pair in pairs):
        raise typer.BadParameter(f"{text!r} is not HxW or HxW:HxW:HxW", param_hint="--size")
    heights, widths = (":".join(pair[axis] for pair in pairs) for axis in (0, 1))
    return _range(heights, "--size"), _range(widths, "--size")


def _shapes(text: str) -> Any:
    from edge_backbones.engines.tensorrt.options import Shapes

    parts = text.lower().split("x")
    if len(parts) != 3:
        raise typer.BadParameter(f"{text!r} is not BATCHxHEIGHTxWIDTH", param_hint="--shapes")
    batch, height, width = (_range(part, "--shapes") for part in parts)
    return Shapes(batch=batch, height=height, width=width)


if __name__ == "__main__":
    main()
