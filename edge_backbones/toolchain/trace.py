"""Trace a network as TorchScript in fp32, fp16 or bf16. The number formats are in the code, as in a typed ONNX graph.

There is no compile step from a TorchScript file to an engine: the frozen file is the engine. What
`torch.jit.optimize_for_inference` makes of it cannot be saved and is not faster either (its convolutions change layout
around every call), and torch compiles a module by itself in its first calls wherever it is loaded.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from edge_backbones.engines.torch.session import cause
from edge_backbones.errors import ExportError
from edge_backbones.spec import BackboneSpec, InputSpec, Precision

DTYPES: dict[Precision, torch.dtype] = {p: getattr(torch, p.info.torch_type) for p in Precision if p.info.torch_type}

_TENSOR = torch.Tensor
# Where the arithmetic is, and nothing is summed that half precision could not hold: engines add up in fp32 inside.
_IN_HALF = frozenset[Any]({
    functional.conv1d, functional.conv2d, functional.conv3d, functional.conv_transpose1d, functional.conv_transpose2d,
    functional.conv_transpose3d, functional.linear, functional.scaled_dot_product_attention, torch.matmul, torch.mm,
    torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, _TENSOR.matmul, _TENSOR.mm, _TENSOR.bmm, _TENSOR.addmm,
    _TENSOR.baddbmm, _TENSOR.__matmul__, _TENSOR.__rmatmul__,
})  # fmt: skip
# Normalisations, softmax and sums, as in typed ONNX graphs: an engine may keep their intermediate values in their type.
_IN_FULL = frozenset[Any]({
    functional.batch_norm, functional.group_norm, functional.instance_norm, functional.layer_norm,
    functional.local_response_norm, functional.normalize, functional.softmax, functional.log_softmax, torch.softmax,
    torch.log_softmax, torch.batch_norm, torch.group_norm, torch.layer_norm, torch.norm, torch.sum, torch.mean, torch.var,
    torch.std, torch.var_mean, torch.prod, torch.cumsum, torch.exp, torch.log, torch.pow, torch.rsqrt, torch.sqrt,
    _TENSOR.softmax, _TENSOR.log_softmax, _TENSOR.norm, _TENSOR.sum, _TENSOR.mean, _TENSOR.var, _TENSOR.std, _TENSOR.prod,
    _TENSOR.cumsum, _TENSOR.exp, _TENSOR.log, _TENSOR.pow, _TENSOR.__pow__, _TENSOR.rsqrt, _TENSOR.sqrt,
    torch.linalg.vector_norm, *([functional.rms_norm] if hasattr(functional, "rms_norm") else []),
})  # fmt: skip


class FormattedModule(nn.Module):
    """A module that returns its maps in the dtype and the memory that a bundle's engines have."""

    def __init__(self, module: nn.Module, spec: BackboneSpec) -> None:
        super().__init__()
        self.module = module
        self.dtype: torch.dtype = getattr(torch, spec.map_dtype)
        self.moved = [output.is_reordered for output in spec.described_outputs]
        self.train(module.training)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the module; returns its maps, NHWC where they lie in channels-last memory."""
        maps = []
        for feature_map, moved in zip(self.module(pixels), self.moved, strict=True):
            cast = feature_map.to(self.dtype)
            maps.append(cast.permute(0, 2, 3, 1).contiguous() if moved else cast)
        return tuple(maps)


def formatted(module: nn.Module, spec: BackboneSpec | None) -> nn.Module:
    """Return a module that returns its maps as the engines of ``spec`` do; the module itself if nothing changes.

    ``spec``: the outputs of the module; None for float32 in the layout that the module gives.
    """
    if spec is None or (spec.map_dtype == "float32" and not spec.channels_last):
        return module
    return FormattedModule(module, spec)


class TypedModule(nn.Module):
    """A module with convolutions and matrix products in ``dtype``. Its maps are float32 in any case.

    torch.autocast does the same, but differently on each device: what it writes into a trace on the CPU (normalisation of
    half values with fp32 weights) a GPU refuses. This is the same everywhere.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype
        self.train(module.training)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the module; returns its maps as float32."""
        with _Casts(self.dtype):
            maps = self.module(pixels)
        return tuple(feature_map.float() for feature_map in maps)


class _Casts(TorchFunctionMode):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _IN_HALF:
            args, kwargs = _cast(args, self._dtype), _cast(kwargs, self._dtype)
        elif func in _IN_FULL:
            args, kwargs = _cast(args, torch.float32), _cast(kwargs, torch.float32)
        return func(*args, **kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return arguments with every float tensor as ``dtype``, those in lists and dicts too."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(item, dtype) for item in value)
    if isinstance(value, Mapping):
        return {name: _cast(item, dtype) for name, item in value.items()}
    return value


def trace_torchscript(
    module: nn.Module, input: InputSpec, precision: Precision, spec: BackboneSpec | None = None
) -> bytes:
    """Trace ``module`` at its usual size in fp32, fp16 or bf16, freeze it, and return the file.

    What is in the file returns a tuple of maps: float32 in the layout that the module gives, or as `formatted` says. fp32
    convolutions stay fp32 on a GPU, where torch rounds their factors to TF32 by default: the trace forbids that. Raises
    ExportError for a module that cannot be traced, and for int8 and fp8, which TorchScript has no operators for.
    """
    if precision not in DTYPES:
        raise ExportError(
            f"TorchScript has no {precision}: choose one of {', '.join(map(str, DTYPES))}, or compile the {precision} graph "
            "with --flavour openvino, tensorrt or tensorrt_rtx"
        )
    typed = module if precision is Precision.FP32 else TypedModule(module, DTYPES[precision])
    typed = formatted(typed, spec)
    file = io.BytesIO()
    try:
        with (
            warnings.catch_warnings(),
            torch.no_grad(),
            torch.backends.cudnn.flags(enabled=True, allow_tf32=False),
        ):
            warnings.simplefilter("ignore")  # torch deprecates TorchScript and warns of every Python branch in a trace
            traced = torch.jit.trace(typed, example_of(input), check_trace=False)  # type: ignore[no-untyped-call]
            torch.jit.save(torch.jit.freeze(traced.eval()), file)  # type: ignore[no-untyped-call]
    except Exception as error:  # the network's own code runs, and fails with whatever it trips over
        raise ExportError(
            f"the network cannot be traced as TorchScript in {precision} ({cause(error)}): use the ONNX graph "
            "(--no-torchscript)"
        ) from error
    return file.getvalue()


def example_of(input: InputSpec, batch: int | None = None) -> torch.Tensor:
    """Return reproducible values of the input's usual shape and dtype, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shape = input.shape(batch or input.batch.opt, input.height.opt, input.width.opt)
    if input.dtype == "uint8":
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return torch.randn(shape, generator=generator).to(getattr(torch, input.dtype))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence libraries that warn and log about their own internals. Errors are raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
