"""``edge-backbones build``: make a bundle from a model."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Literal

import typer

from edge_backbones.cli import console
from edge_backbones.cli.options import JsonFlag, height_width, integers, read_option, shape_range
from edge_backbones.errors import EdgeBackbonesError
from edge_backbones.progress import Progress
from edge_backbones.report.page import write_report
from edge_backbones.spec import Precision
from edge_backbones.toolchain.build import BuildOptions, build_bundle


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
    height, width = read_option("--size", height_width, size) or (None, None)
    options = BuildOptions(
        weights=weights,
        from_model=from_model,
        hidden_states=hidden_states,
        dataset_index=dataset_index,
        image=image_processor,
        num_channels=num_channels,
        output_stride=output_stride,
        out_indices=read_option("--out-indices", integers, out_indices),
        out_features=None if out_features is None else tuple(name.strip() for name in out_features.split(",")),
        input=input,
        batch=read_option("--batch", shape_range, batch),
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
    with console.Steps(as_json) as progress:
        result = build_bundle(model, bundle, images=images, options=options, overwrite=overwrite, progress=progress)
        written = _page_of(bundle, progress) if page else None
    if as_json:
        console.print_json(
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
        console.print_skipped(result.reasons)
    console.print_parity(result.reports)
    console.print_trials(result.bundle.manifest.decision)
    for note in (result.bundle.manifest.preprocessing, *result.notes):
        console.err.print(note, soft_wrap=True)
    console.out.print(f"wrote {bundle}" + ("" if written is None else f" and {written}"))


def _page_of(bundle: Path, progress: Progress) -> Path | None:
    """Write the report of a finished bundle and return its path; say on stderr why if that fails, and return None."""
    progress("writing the report", 0, None)
    try:
        return write_report(bundle)
    except (EdgeBackbonesError, OSError) as error:
        console.err.print(f"the bundle is done, its report is not: {error}", soft_wrap=True)
        return None


def _precisions(wanted: list[Wanted]) -> tuple[Precision, ...] | Literal["auto"]:
    if Wanted.AUTO not in wanted:
        return tuple(dict.fromkeys(Precision(one.value) for one in wanted))
    if len(wanted) > 1:
        raise typer.BadParameter("auto chooses among all: give it alone", param_hint="--precision")
    return "auto"
