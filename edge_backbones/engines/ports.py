"""Compare the inputs and outputs of an engine with those in its manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edge_backbones.spec import BackboneSpec, InputSpec, ShapeRange

Shape = tuple[int, ...]
_DTYPES = {"float32": "FLOAT", "float16": "HALF", "uint8": "UINT8"}  # TensorRT's names


@dataclass(frozen=True)
class Tensor:
    """Describe an input or output as the engine reports it.

    ``dtype`` is TensorRT's name (``FLOAT``). In ``shape``, -1 stands for an axis of variable size; None for an unknown
    shape.
    """

    name: str
    mode: Literal["INPUT", "OUTPUT"]
    dtype: str
    shape: Shape | None = None


def mismatches(
    tensors: Iterable[Tensor], input: InputSpec, outputs: Sequence[str], spec: BackboneSpec | None = None
) -> list[str]:
    """Return where an engine's inputs and outputs differ from the manifest's, one phrase each; empty if they match.

    Args:
        tensors: Inputs and outputs of the engine.
        input: Input in the manifest.
        outputs: Names of the outputs in the manifest.
        spec: Outputs in the manifest, to compare their shapes and dtypes; None to compare names, and dtypes with float32.
    """
    found = list(tensors)
    inputs = [tensor for tensor in found if tensor.mode == "INPUT"]
    returned = [tensor for tensor in found if tensor.mode == "OUTPUT"]
    reasons = []
    if [tensor.name for tensor in inputs] != [input.name]:
        reasons.append(f"it takes {[tensor.name for tensor in inputs]}, the manifest says [{input.name!r}]")
    else:
        if inputs[0].dtype != _DTYPES[input.dtype]:
            reasons.append(f"its input is {inputs[0].dtype}, the manifest says {_DTYPES[input.dtype]}")
        if not _takes(inputs[0].shape, input):
            reasons.append(f"it takes {_shown(inputs[0].shape)}, the manifest says {_sizes(input)}")
    if sorted(tensor.name for tensor in returned) != sorted(outputs):
        reasons.append(f"it returns {[tensor.name for tensor in returned]}, the manifest promises {list(outputs)}")
    elif spec is not None:
        shapes = {tensor.name: tensor.shape for tensor in returned}
        reasons += _wrong_shapes(shapes, input, spec)
    promised = _DTYPES["float32" if spec is None else spec.map_dtype]
    odd = [f"{tensor.name} {tensor.dtype}" for tensor in returned if tensor.dtype != promised]
    if odd:
        reasons.append(f"it returns {', '.join(odd)}, the manifest promises {promised}")
    return reasons


def _takes(shape: Shape | None, input: InputSpec) -> bool:
    """Return whether each axis is variable, or has the one size that the manifest allows."""
    if shape is None:
        return True
    promised = zip(input.min_shape, input.max_shape, strict=True)
    return len(shape) == 4 and all(
        size == -1 or size == least == most for size, (least, most) in zip(shape, promised, strict=True)
    )


def _sizes(input: InputSpec) -> str:
    batch, height, width = str(input.batch), str(input.height), str(input.width)
    if input.frame is not None:
        axes = [batch, *map(str, input.frame.shape)]
    elif input.layout == "NCHW":
        axes = [batch, str(input.channels), height, width]
    else:
        axes = [batch, height, width, str(input.channels)]
    return f"({', '.join(axes)})"


def _shown(shape: Shape | None) -> str:
    return f"({', '.join('any' if size == -1 else str(size) for size in shape or ())})"


def _wrong_shapes(shapes: Mapping[str, Shape | None], input: InputSpec, spec: BackboneSpec) -> list[str]:
    """Return outputs whose shape does not match the manifest, one phrase each.

    Layout, channels, batch and (through the stride) height and width are compared.
    """
    reasons = []
    for name, _, layout, channels, strides, _ in spec.described_outputs:
        shape = shapes[name]
        if shape is None:
            continue
        promise = f"{layout} with {channels} channels and batch {input.batch}"
        fits = len(shape) == len(layout)
        if fits:
            sizes = dict(zip(layout, shape, strict=True))
            fits = sizes["C"] in (-1, channels)
            fits = fits and (sizes["N"] == -1 or input.batch.min == sizes["N"] == input.batch.max)
            if fits and strides is not None and "H" in sizes:
                promise += f", strides {strides[0]} and {strides[1]} of {input.height} x {input.width} pixels"
                fits = _explains(input.height, sizes["H"], strides[0]) and _explains(
                    input.width, sizes["W"], strides[1]
                )
        if not fits:
            reasons.append(f"{name} has shape {_shown(shape)}, the manifest promises {promise}")
    return reasons


def _explains(pixels: ShapeRange, cells: int, stride: int) -> bool:
    """Return whether a map of ``cells`` cells can have this stride, by the build's rules; variable sizes always can."""
    if cells == -1 or not pixels.is_fixed:
        return True
    left = pixels.max - cells * stride  # padding adds up to one cell; without it, up to two are lost
    return -stride < left < 2 * stride or (cells > 0 and stride == max(1, round(pixels.max / cells)))
