"""Export a prepared backbone: write the fp32 ONNX graph and frozen TorchScript, record golden samples, check against them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxscript.optimizer import optimize
from torch import nn

from edge_backbones.bundle.golden import GoldenSamples, full_batches
from edge_backbones.difference import relative_error, usual_norm
from edge_backbones.errors import ExportError, SourceError, first_line, root_cause
from edge_backbones.images.config import ImageConfig
from edge_backbones.images.fit import network_input
from edge_backbones.runtime.views import as_callers_see, reordered_outputs
from edge_backbones.spec import BackboneSpec, InputSpec, Precision, ShapeRange
from edge_backbones.toolchain.artifacts import OPSET, ExportedGraph, LoadedBackbone, PreparedBackbone
from edge_backbones.toolchain.frame import FrameFront, FromFrame
from edge_backbones.toolchain.layer_names import name_nodes
from edge_backbones.toolchain.trace import example_of, quiet, trace_torchscript

_MAX_RELATIVE_ERROR = 1e-3
_ANY_SIZE = 2**31  # bytes; a graph is limited to that


def export_onnx(prepared: PreparedBackbone, path: Path) -> ExportedGraph:
    """Write the fp32 graph: its input is named as ``prepared.input``, its outputs as the kept stages.

    No paths of this machine are inside. Raises ExportError with the exporter's first words, and with the advice to build for
    a fixed size where the network's code fixes it.
    """
    input, spec = prepared.input, prepared.spec
    try:
        model = _model_of(prepared.module, input, spec.outputs)
    except Exception as error:  # torch.export raises dozens of types; all mean "not in this form"
        advice = _fixed(input) or "this architecture has no ONNX form here"
        if found := _SPECIALISED.search(str(error)):
            raise ExportError(
                f"this network is of a fixed size: its code computes with the {found['axis']} {found['size']} and the bundle "
                f"is asked for {input.describe()}; {advice}"
            ) from error
        raise ExportError(
            f"the network cannot be exported with {input.describe()}: {_cause(error)}; {advice}"
        ) from error
    try:
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, path)
    except OSError:  # a full disk: the graph is as good
        raise
    except Exception as error:  # the checker, shape inference and protobuf (over 2 GiB) have no common base
        raise ExportError(f"the exported graph is not valid ONNX, or over 2 GiB: {error}") from error
    names = [output.name for output in model.graph.output]
    if names != list(spec.outputs):
        raise ExportError(f"the exported graph returns {names} instead of {list(spec.outputs)}")
    return ExportedGraph(path, spec, input)


def export_front(config: ImageConfig, input: InputSpec) -> FrameFront:
    """Export what a graph does with frames before the network: its output is called ``pixel_values``."""
    return FrameFront(_model_of(FromFrame(None, config, input).eval(), input, ["pixel_values"]), input)


def _model_of(module: nn.Module, input: InputSpec, outputs: Sequence[str]) -> onnx.ModelProto:
    """Export a module whose only input is ``input``. Raises whatever torch raises."""
    axes = _dynamic_axes(input)
    # The exporter specialises a dynamic axis whose example size is 1.
    batch = max(2, input.batch.opt) if not input.batch.is_fixed else input.batch.opt
    with quiet(), torch.no_grad():
        # Left to itself torch.onnx falls back on a draft that leaves out what the code says of sizes: a transformer
        # of fixed size would become a graph with dynamic axes that runs at one size only.
        dynamic_shapes = (axes,) if axes else None
        captured = torch.export.export(module, (example_of(input, batch),), dynamic_shapes=dynamic_shapes, strict=False)
        program = torch.onnx.export(
            captured,
            dynamo=True,
            opset_version=OPSET,
            input_names=[input.name],
            output_names=list(outputs),
            verbose=False,
            custom_translation_table={torch.ops.aten.col2im.default: _fold},
        )
    assert program is not None  # only dynamo=False returns None
    # Whatever depends on no image is computed here, at any size: standardised weights (int8 quantises constants
    # only), tables of relative positions. The exporter itself leaves tensors above 8192 numbers to the engine.
    optimize(program.model, input_size_limit=_ANY_SIZE, output_size_limit=_ANY_SIZE)
    name_nodes(program.model.graph)
    model = program.model_proto
    _strip_debug_information(model)
    return model


def _cause(error: Exception) -> str:
    """Return why torch refused, in its own words: the first line of the first exception in the chain.

    Where that is a heading above violated constraints, it is the first constraint.
    """
    first = root_cause(error)
    violated = re.search(r"^Constraints violated .*\n\s*- (.*?)(?:\. |\n|$)", str(first))
    said = violated.group(1) if violated else first_line(first)
    return said.partition(" For more information")[0].rstrip(". ")


def export_torchscript(prepared: PreparedBackbone, path: Path) -> None:
    """Write the module traced and frozen. It returns a tuple in stage order."""
    path.write_bytes(trace_torchscript(prepared.module, prepared.input, Precision.FP32, prepared.spec))


def golden_cases(images: np.ndarray, input: InputSpec) -> dict[str, np.ndarray]:
    """Return the images by case: ``opt``, and for an input of variable size ``min`` and ``max``.

    For the smallest size they are cropped, for the largest they are continued as in a mirror.
    """
    cases = {"opt": images}
    if not (input.height.is_fixed and input.width.is_fixed):
        cases["min"] = _resized(images, input, input.height.min, input.width.min)
        cases["max"] = _resized(images, input, input.height.max, input.width.max)
    return cases


def _resized(images: np.ndarray, input: InputSpec, height: int, width: int) -> np.ndarray:
    """Crop or mirror images to this size."""
    padding = [(0, 0)] * 4
    for axis, size in zip(input.size_axes, (height, width), strict=True):
        images = images.take(range(min(size, images.shape[axis])), axis=axis)
        padding[axis] = (0, size - images.shape[axis])
    return np.ascontiguousarray(np.pad(images, padding, mode="symmetric"))


def golden_samples(loaded: LoadedBackbone, input: InputSpec, cases: Mapping[str, np.ndarray]) -> GoldenSamples:
    """Run the network as it was loaded, unfolded and unexported, and return the golden samples.

    ``cases`` are inputs in the engine's own form: normalised NCHW, or uint8 NHWC, which is normalised here in numpy.
    Raises SourceError when the network does not take one of these sizes, or when one of its maps is not finite.
    """
    outputs: dict[str, dict[str, np.ndarray]] = {}
    for case, array in cases.items():
        pixel_values = np.array(network_input(array, loaded.image_config, input))  # a copy: networks may write into it
        try:
            with torch.no_grad():
                maps = loaded.module(torch.from_numpy(pixel_values))
        except Exception as error:  # a network fails with whatever it trips over
            size = "x".join(str(n) for n in pixel_values.shape[2:])
            advice = "" if case == "opt" else f"; {_fixed(input)}"
            raise SourceError(
                f"the network does not take images of {size} (height x width): {first_line(error)}{advice}"
            ) from error
        outputs[case] = {}
        for stage, feature_map in zip(loaded.spec.outputs, maps, strict=True):
            values = feature_map.numpy().copy()
            unsound = [i for i, one in enumerate(values) if not np.isfinite(one).all()]
            if unsound:
                raise SourceError(
                    f"{stage} of the network itself is not finite on image {unsound[0] + 1} of {len(values)} golden images "
                    f"({case} size): it overflows or divides by zero there; leave such images out, or repair the network"
                )
            outputs[case][stage] = values
    return GoldenSamples(input.name, cases, outputs)


def check_range(golden: GoldenSamples, spec: BackboneSpec) -> None:
    """Raise SourceError for a reference that the dtype of the maps cannot hold: values too large, or nearly all too small."""
    if spec.map_dtype == "float32":
        return
    most, advice = float(np.finfo(spec.map_dtype).max), "build float32 maps (without --maps float16)"
    for maps in golden.outputs.values():
        for stage, values in maps.items():
            largest = float(np.abs(values).max(initial=0))
            if largest > most:
                raise SourceError(
                    f"{stage} reaches {largest:.3g} on the golden images, and {spec.map_dtype} maps hold {most:g}: {advice}"
                )
            usual = usual_norm(values)
            lost = max(relative_error(one.astype(spec.map_dtype), one, usual=usual) for one in values)
            if lost > _MAX_RELATIVE_ERROR:
                raise SourceError(
                    f"{stage} reaches {largest:.3g} alone on the golden images, and {spec.map_dtype} rounds so small values "
                    f"by {lost:.1e} relative, at most {_MAX_RELATIVE_ERROR:g} is allowed: {advice}"
                )


def zero_stages(golden: GoldenSamples, stages: Sequence[str]) -> list[str]:
    """Name the stages whose reference maps are zero on every golden image: parity says nothing of their values."""
    return [stage for stage in stages if not any(maps[stage].any() for maps in golden.outputs.values())]


def check_onnx(graph: ExportedGraph, golden: GoldenSamples) -> None:
    """Run the graph in ONNX Runtime on every golden sample; raises ExportError naming the stage that is off."""
    from edge_backbones.engines.onnxruntime.library import onnxruntime
    from edge_backbones.engines.onnxruntime.options import session_options

    quiet_options = session_options()
    quiet_options.log_severity_level = 4  # what goes wrong is raised as well
    try:
        session = onnxruntime.InferenceSession(graph.path, quiet_options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        raise ExportError(f"ONNX Runtime does not load the exported graph: {first_line(error)}") from error
    for case in sorted(golden.cases, key=lambda case: (case != "opt", case)):
        _check_maps(
            f"ONNX graph ({case} size)",
            lambda array: session.run(None, {graph.input.name: array}),
            graph.spec.outputs,
            graph.input.batch.max if graph.input.batch.is_fixed else 1,
            graph.input,
            golden.inputs[case],
            golden.outputs[case],
        )


def check_torchscript(path: Path, prepared: PreparedBackbone, golden: GoldenSamples) -> None:
    """Load the file and run it on the golden samples of the size it was traced at; raises ExportError as above."""
    reordered = reordered_outputs(prepared.spec)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        module = torch.jit.load(path)  # type: ignore[no-untyped-call]
        _check_maps(
            "TorchScript module",
            lambda array: as_callers_see([m.numpy() for m in module(torch.from_numpy(array))], reordered),
            prepared.spec.outputs,
            prepared.input.batch.opt,
            prepared.input,
            golden.inputs["opt"],
            golden.outputs["opt"],
        )


def _check_maps(
    what: str,
    run: Callable[[np.ndarray], Sequence[np.ndarray]],
    stages: Sequence[str],
    batch: int,
    input: InputSpec,
    images: np.ndarray,
    references: Mapping[str, np.ndarray],
) -> None:
    """Compare the fp32 maps of one case, ``batch`` images at a time; the last batch is filled from the beginning."""
    height, width = (images.shape[axis] for axis in input.size_axes)
    opt = f"{input.height.opt}x{input.width.opt}"
    other_size = ""
    if (size := f"{height}x{width}") != opt:  # the graph was right at the usual size, which is checked first
        other_size = (
            f"the exported {what} is right on images of {opt} and not on {size}: the network keeps a table (a mask, a grid) "
            f"for the size that it saw; {_fixed(input)}"
        )
    for chosen in full_batches(len(images), batch):
        try:
            maps = run(images[chosen])
        except Exception as error:  # the exceptions of ONNX Runtime and torch have no common base
            if other_size:
                raise ExportError(other_size) from error
            shape = list(images[chosen].shape)
            raise ExportError(f"the exported {what} does not run on {shape}: {first_line(error)}") from error
        for stage, actual in zip(stages, maps, strict=True):
            expected = references[stage][chosen]
            if not np.isfinite(actual).all():
                raise ExportError(f"the exported {what} is wrong: its {stage} is not finite, and the network's is")
            differences = [
                relative_error(one, reference, usual=usual_norm(references[stage]))
                for one, reference in zip(actual, expected, strict=True)
            ]
            if not max(differences) <= _MAX_RELATIVE_ERROR:
                if other_size:
                    raise ExportError(other_size)
                raise ExportError(
                    f"the exported {what} is wrong: {stage} differs from the network by {max(differences):.1e} relative, "
                    f"at most {_MAX_RELATIVE_ERROR:g} is allowed"
                )


# How torch.export says that the code of a network made a constant of an axis that was to vary.
_SPECIALISED = re.compile(
    r"marked (?:\d+\*)?(?P<axis>batch|height|width)\S* as dynamic but your code specialized it to be a constant "
    r"\((?P<size>\d+)\)"
)


def _fixed(input: InputSpec) -> str:
    """Return the advice for what runs at one size or batch only; "" when both are fixed already."""
    batch, height, width = input.batch.opt, input.height.opt, input.width.opt
    fixed = []
    if not input.batch.is_fixed:
        fixed.append(("batch", f"--batch {batch}", f"batch={batch}"))
    if not (input.height.is_fixed and input.width.is_fixed):
        fixed.append(("size", f"--size {height}x{width}", f"height={height}, width={width}"))
    if not fixed:
        return ""
    names, options, arguments = zip(*fixed, strict=True)
    return f"build it for a fixed {' and '.join(names)}: {' '.join(options)} ({', '.join(arguments)})"


def _fold(
    patches: Any, output_size: Sequence[int], kernel: Sequence[int], dilation: Sequence[int], padding: Sequence[int],
    stride: Sequence[int],
) -> Any:  # fmt: skip
    """Translate ``torch.nn.functional.fold`` to a ConvTranspose that only adds up: TensorRT has no Col2Im."""
    from onnxscript import opset20 as op

    pixels = int(np.prod(kernel))
    channels = int(patches.shape[1]) // pixels
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    cells = [(n + 2 * p - span) // s + 1 for n, p, span, s in zip(output_size, padding, spans, stride, strict=True)]
    rest = [n + 2 * p - span - (c - 1) * s
            for n, p, span, c, s in zip(output_size, padding, spans, cells, stride, strict=True)]  # fmt: skip
    weight = np.tile(np.eye(pixels, dtype=np.float32).reshape(pixels, 1, *kernel), (channels, 1, 1, 1))
    shape = np.array([0, channels * pixels, *cells])
    return op.ConvTranspose(
        op.Reshape(patches, op.Constant(value=onnx.numpy_helper.from_array(shape))),  # type: ignore[arg-type]
        op.Constant(value=onnx.numpy_helper.from_array(weight)),
        group=channels,
        kernel_shape=list(kernel),
        strides=list(stride),
        dilations=list(dilation),
        pads=[*padding, *padding],
        output_padding=rest,
    )


def _dynamic_axes(input: InputSpec) -> dict[int, Any]:
    """Return torch.export's dimensions of the axes that are not fixed, by axis. Sizes go in steps of ``size_multiple``."""

    def dimension(name: str, sizes: ShapeRange, step: int) -> Any:
        if step == 1:
            return torch.export.Dim(name, min=sizes.min, max=sizes.max)
        return step * torch.export.Dim(name, min=-(-sizes.min // step), max=sizes.max // step)

    height, width = input.size_axes
    axes = {0: ("batch", input.batch, 1)}
    axes[height] = ("height", input.height, input.size_multiple)
    axes[width] = ("width", input.width, input.size_multiple)
    return {axis: dimension(name, sizes, step) for axis, (name, sizes, step) in axes.items() if not sizes.is_fixed}


def _strip_debug_information(model: onnx.ModelProto) -> None:
    """Remove source lines and paths of this machine: no engine reads them, and they would differ between machines."""
    del model.metadata_props[:]
    model.doc_string = ""
    graph = model.graph
    del graph.metadata_props[:]
    for item in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]
