"""Compile a network with torch-tensorrt: TensorRT engines inside a TorchScript file or an exported program, for libtorch.

A program links or opens ``libtorchtrt_runtime.so`` and loads the file; the kernels are those of the GPU that compiled it.
Importing `torch_tensorrt` needs a driver. What a release takes is looked up in its signatures, because the options for
weak typing went away in 2.13. Number formats are in the network here (see :mod:`edge_backbones.toolchain.trace`).
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from edge_backbones.engines.torch.session import cause, load_torch_tensorrt, require_gpu
from edge_backbones.errors import CompileError, ExportError, InputError, first_line, root_cause
from edge_backbones.spec import BackboneSpec, InputSpec, Precision, ShapeRange
from edge_backbones.toolchain.trace import DTYPES, TypedModule, example_of, formatted, quiet

OutputFormat = Literal["torchscript", "exported_program"]
SUFFIXES: dict[OutputFormat, str] = {"torchscript": ".ts", "exported_program": ".pt2"}


def compile_torch_tensorrt(
    module: nn.Module,
    input: InputSpec,
    *,
    precision: Precision = Precision.FP32,
    output_format: OutputFormat = "torchscript",
    device: str = "cuda",
    workspace: int | None = None,
    level: int | None = None,
    allow_torch: bool = False,
    spec: BackboneSpec | None = None,
) -> bytes:
    """Compile ``module`` for the GPU ``device`` and return the file. What is in it returns a tuple of maps.

    Args:
        module: takes ``input`` and returns a tuple of tensors; it is moved to the GPU and back.
        input: the input and its sizes.
        precision: fp32, fp16 or bf16.
        output_format: what the file is.
        device: "cuda", or "cuda:1".
        workspace: bytes of scratch memory that a kernel may ask for; None leaves it to TensorRT.
        level: builder optimisation level, 0 to 5; None leaves it to TensorRT.
        allow_torch: run layers that TensorRT does not take in torch. A TorchScript file is a trace: with such layers it may
            hold for the usual size only, which parity shows.
        spec: the outputs, which say of which dtype and in which memory the maps are; None for float32 maps.

    Raises:
        MissingDependencyError: torch_tensorrt is not installed.
        CompileError: torch_tensorrt does not import (no driver, a TensorRT that does not fit), there is no GPU, the precision
            is int8 or fp8, or TensorRT refuses the network; with its words.
        ExportError: torch.export refuses the network.
        InputError: an option has a value that it cannot have.
    """
    if precision not in DTYPES:
        raise CompileError(
            f"torch_tensorrt compiles fp32, fp16 and bf16 here, not {precision}: compile the {precision} graph with "
            "--flavour tensorrt"
        )
    if output_format not in SUFFIXES:
        raise InputError(f"output_format must be {' or '.join(SUFFIXES)}, got {output_format!r}")
    if workspace is not None and workspace < 1:
        raise InputError(f"workspace must be at least 1 byte, got {workspace}")
    if level is not None and not 0 <= level <= 5:
        raise InputError(f"builder level must be 0 to 5, got {level}")
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError(
            "a TorchScript module cannot be given number formats: pass the nn.Module that it was traced from"
        )
    library = load_torch_tensorrt(CompileError)
    features = getattr(library, "ENABLED_FEATURES", None)
    if not getattr(features, "torch_tensorrt_runtime", True):
        raise CompileError(
            f"torch_tensorrt {library.__version__} came without libtorchtrt_runtime, and what it compiles cannot be saved: "
            "install a wheel, or build it with its C++ runtime"
        )
    target = torch.device(device if device == "cpu" else f"cuda:{require_gpu(device, CompileError)}")
    home = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    try:
        with quiet(), torch.no_grad():
            typed = module if precision is Precision.FP32 else TypedModule(module, DTYPES[precision])
            program = _export(formatted(typed, spec).to(target), input, target)
            options = _options(library.dynamo.compile, target, precision, workspace, level, allow_torch)
            described = _describe(library, input)
            try:
                compiled = library.dynamo.compile(program, arg_inputs=[described], **options)
                return _saved(library, compiled, input, described, output_format, target)
            except Exception as error:  # torch_tensorrt raises whatever its parts do: all mean "not this network"
                kept = "" if allow_torch else "; layers that TensorRT does not take may run in torch with allow_torch"
                raise CompileError(
                    f"torch_tensorrt {library.__version__} cannot compile this network in {precision}: "
                    f"{cause(error)}{kept}"
                ) from error
    finally:
        module.to(home)


def _export(module: nn.Module, input: InputSpec, device: torch.device) -> torch.export.ExportedProgram:
    # The exporter specialises a dynamic axis whose example size is 1.
    """Capture the network with torch.export, on the device. Raises ExportError."""
    batch = input.batch.opt if input.batch.is_fixed else max(2, input.batch.opt)
    axes = _dynamic_axes(input)
    try:
        return torch.export.export(
            module,
            (example_of(input, batch).to(device),),
            dynamic_shapes=(axes,) if axes else None,
            strict=False,
        )
    except Exception as error:  # torch.export raises dozens of types; all mean "not in this form"
        advice = "compile it for a fixed batch and size" if axes else "use the ONNX graph, with --flavour tensorrt"
        raise ExportError(
            f"the network cannot be exported with {input.describe()}: {first_line(root_cause(error))}; {advice}"
        ) from error


def _sizes(input: InputSpec) -> tuple[tuple[ShapeRange, int], ...]:
    """Return range and step of batch, height and width. A range begins and ends at a multiple of its step."""

    def aligned(sizes: ShapeRange, step: int) -> tuple[ShapeRange, int]:
        if sizes.is_fixed:
            return sizes, 1
        low, high = -(-sizes.min // step) * step, sizes.max // step * step
        return ShapeRange(min=low, opt=min(max(sizes.opt, low), high), max=high), step

    return (input.batch, 1), aligned(input.height, input.size_multiple), aligned(input.width, input.size_multiple)


def _dynamic_axes(input: InputSpec) -> dict[int, Any]:
    """Return torch.export's dimensions of the axes that are not fixed, by axis."""
    positions = (0, *input.size_axes)
    axes = {}
    for axis, name, (sizes, step) in zip(positions, ("batch", "height", "width"), _sizes(input), strict=True):
        if sizes.is_fixed:
            continue
        dimension: Any = torch.export.Dim(name, min=sizes.min // step, max=sizes.max // step)
        axes[axis] = dimension if step == 1 else step * dimension
    return axes


def _describe(library: Any, input: InputSpec) -> Any:
    """Return torch_tensorrt's own description of the input: a range of shapes, or a fixed shape."""
    dtype = getattr(torch, input.dtype)
    (batch, _), (height, _), (width, _) = _sizes(input)
    low, usual, high = (
        input.shape(getattr(batch, end), getattr(height, end), getattr(width, end)) for end in ("min", "opt", "max")
    )
    if low == high:
        return library.Input(shape=usual, dtype=dtype)
    return library.Input(min_shape=low, opt_shape=usual, max_shape=high, dtype=dtype, name=input.name)


def _options(
    compile: Callable[..., Any],
    device: torch.device,
    precision: Precision,
    workspace: int | None,
    level: int | None,
    allow_torch: bool,
) -> dict[str, Any]:
    """Return arguments for this release: some are always passed, others only where the release knows them."""
    asked: dict[str, Any] = {"device": device, "require_full_compilation": not allow_torch}
    if precision is Precision.FP32:
        asked["disable_tf32"] = True
    if workspace is not None:
        asked["workspace_size"] = workspace
    if level is not None:
        asked["optimization_level"] = level
    known = inspect.signature(compile).parameters
    missing = [name for name in asked if name not in known]
    if missing:
        raise CompileError(f"this torch_tensorrt does not know {', '.join(missing)}: use a release from 2.9 on")
    # Strongly typed since 2.11 by default and since 2.13 always; the Python runtime of old releases cannot be saved.
    only_in_some = {"use_explicit_typing": True, "use_python_runtime": False}
    return {**asked, **{name: value for name, value in only_in_some.items() if name in known}}


def _saved(
    library: Any, compiled: Any, input: InputSpec, described: Any, output_format: OutputFormat, device: torch.device
) -> bytes:
    """Save the compiled program in a temporary folder and return its bytes."""
    (batch, _), (height, _), (width, _) = _sizes(input)
    example = torch.zeros(input.shape(batch.opt, height.opt, width.opt), dtype=example_of(input, 1).dtype).to(device)
    # A trace needs a tensor. An exported program keeps its ranges where the release reads them off the description.
    reads_ranges = "dynamic_shapes" in inspect.signature(library.save).parameters
    given = described if output_format == "exported_program" and reads_ranges else example
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"engine{SUFFIXES[output_format]}"
        library.save(compiled, str(path), output_format=output_format, arg_inputs=[given])
        return path.read_bytes()
