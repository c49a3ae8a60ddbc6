"""Put the preprocessing of a network into the graph: from a camera's frame to normalised pixels.

Resizing with any filter is one product with a constant matrix along rows and one along columns. A resized pixel reads few
pixels, so most of such a matrix is 0. It is cut into blocks, and each is multiplied with the pixels that it reads. Rows and
columns that the crop drops are not read at all.

The weights, the order of the two products and the rounding are those of `edge_backbones.images.fit`, and so are the pixels,
bit for bit, wherever that computes with integers. It is done in float32, whatever the precision of the network is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx.compose
import torch
from torch import nn
from torch.nn import functional

from edge_backbones.images.camera import yuv_to_rgb
from edge_backbones.images.config import ImageConfig
from edge_backbones.images.fit import Placement, placement, widths_first
from edge_backbones.images.resample import Block, Method, blocks
from edge_backbones.spec import YUV_COLORS, FrameSpec, InputSpec
from edge_backbones.toolchain.artifacts import PreparedBackbone

# Resized pixels in a block, along rows and along columns. Small blocks multiply fewer zeros, and each is an operation more.
_ACROSS, _DOWN = 16, 56
_COARSE = 1 << 10  # the coarse part of a weight is a multiple of its inverse: 11 bits, which TF32 holds


def with_frames(network: PreparedBackbone, config: ImageConfig, input: InputSpec) -> PreparedBackbone:
    """Return the module that engines are made of: a prepared network, behind what is done with frames if ``input`` has any.

    ``network`` takes ``input.of_network``.
    """
    if input.frame is None:
        return network
    return dataclasses.replace(network, module=FromFrame(network.module, config, input).eval(), input=input)


class FromFrame(nn.Module):
    """A network that takes frames: uint8, of the shape that ``input.frame`` says.

    ``net`` takes normalised float32 NCHW; None leaves it out, and the result is its input.
    """

    def __init__(self, net: nn.Module | None, config: ImageConfig, input: InputSpec) -> None:
        super().__init__()
        assert input.frame is not None  # the caller asks first
        read = _what_is_read(input.frame, config, input)
        self.net = net
        self.planes = _Planes(input.frame, read)
        source = input.frame.height, input.frame.width
        self.resize = _Resize(read, Method.of(config), by_rows=widths_first(source, read.placed.size, config))
        self.normalise = _Normalise(config, input, read.placed)

    def forward(self, frame: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Return what the network makes of uint8 frames (batch, rows, columns, bytes)."""
        pixel_values: torch.Tensor = self.normalise(self.resize(self.planes(frame)))
        return pixel_values if self.net is None else self.net(pixel_values)  # type: ignore[no-any-return]


class _Read(NamedTuple):
    """What of a frame is read: the rectangle ``rows`` and ``columns``, by the blocks ``down`` and ``across``.

    There are no blocks where the frame has its size already.
    """

    placed: Placement
    down: list[Block]
    across: list[Block]
    rows: slice
    columns: slice


def _what_is_read(frame: FrameSpec, config: ImageConfig, input: InputSpec) -> _Read:
    placed = placement((frame.height, frame.width), config, input.height.opt, input.width.opt)
    down: list[Block] = []
    across: list[Block] = []
    rows, columns = placed.rows, placed.columns
    if placed.size != (frame.height, frame.width):
        method = Method.of(config)
        down = blocks(frame.height, placed.size[0], rows, method, _DOWN)
        across = blocks(frame.width, placed.size[1], columns, method, _ACROSS)
        rows, columns = _hull(down), _hull(across)
    tall, wide = _shared(frame)
    return _Read(placed, down, across, _aligned(rows, tall), _aligned(columns, wide))


def _aligned(of: range, step: int) -> slice:
    """Return the smallest slice that holds a range and begins and ends at multiples of ``step``."""
    return slice(of.start // step * step, -(-of.stop // step) * step)


def _hull(of: list[Block]) -> range:
    return range(min(block.read.start for block in of), max(block.read.stop for block in of))


def _shared(frame: FrameSpec) -> tuple[int, int]:
    """Return how many (rows, columns) of pixels share U and V."""
    return (2 if frame.color == "nv12" else 1), (2 if frame.color in YUV_COLORS else 1)


class _Planes(nn.Module):
    """Cut out what is read of a frame, and bring it to float32 (batch, channels, rows, columns): RGB, BGR or grey."""

    of_u: torch.Tensor
    of_v: torch.Tensor
    added: torch.Tensor

    def __init__(self, frame: FrameSpec, read: _Read) -> None:
        super().__init__()
        self._frame, self._rows, self._columns = frame, read.rows, read.columns
        if frame.color in YUV_COLORS:
            self._luma, factors, added = yuv_to_rgb(frame)
            self.register_buffer("of_u", torch.tensor(factors[None, :, 0, None, None], dtype=torch.float32))
            self.register_buffer("of_v", torch.tensor(factors[None, :, 1, None, None], dtype=torch.float32))
            self.register_buffer("added", torch.tensor(added[None, :, None, None], dtype=torch.float32))

    def forward(self, frame: torch.Tensor) -> torch.Tensor:
        values = frame.float()  # first of all: TensorRT takes uint8 as an input, and computes nothing in it
        if self._frame.color not in YUV_COLORS:
            return values[:, self._rows, self._columns].permute(0, 3, 1, 2)
        luma, chroma = self._luma_and_chroma(values)
        batch, rows, columns = luma.shape
        # No matrix product: a GPU would compute that with 10 bits, and these sums are exact in float32.
        colours = chroma[:, None, :, :, 0] * self.of_u + chroma[:, None, :, :, 1] * self.of_v + self.added
        tall, wide = _shared(self._frame)
        bright = (luma * self._luma).reshape(batch, 1, rows // tall, tall, columns // wide, wide)
        pixels = (bright + colours[:, :, :, None, :, None]).reshape(batch, 3, rows, columns)
        return _whole_levels(pixels)

    def _luma_and_chroma(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return luma (batch, rows, columns), and U and V with one pair for the pixels that share it."""
        rows, columns = self._rows, self._columns
        if self._frame.color == "nv12":
            luma = values[:, rows, columns, 0]
            start = self._frame.height
            chroma = values[:, start + rows.start // 2 : start + rows.stop // 2, columns, 0]
        else:
            luma, chroma = values[:, rows, columns, 0], values[:, rows, columns, 1]
        return luma, chroma.reshape(chroma.shape[0], chroma.shape[1], -1, 2)


class _Resize(nn.Module):
    """Resize and crop float32 NCHW: products with the blocks along rows, then along columns, or the other way round."""

    def __init__(self, read: _Read, method: Method, *, by_rows: bool) -> None:
        super().__init__()
        kind = _ExactProduct if method.rounds_between else _Product  # whole levels go in, and come out
        self.across = nn.ModuleList(kind(block.weights, _moved(block.read, read.columns), 3) for block in read.across)
        self.down = nn.ModuleList(kind(block.weights.T, _moved(block.read, read.rows), 2) for block in read.down)
        self._is_exact, self._by_rows = method.rounds_between, by_rows

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        if not self.across:
            return planes
        for products, axis in ((self.across, 3), (self.down, 2))[:: 1 if self._by_rows else -1]:
            planes = torch.cat([product(planes) for product in products], dim=axis)
        return planes if self._is_exact else _whole_levels(planes)


class _Product(nn.Module):
    """The product of a block's weights with the pixels that it reads: along rows (axis 3) or columns (axis 2)."""

    weights: torch.Tensor

    def __init__(self, weights: np.ndarray, read: slice, axis: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float32))
        self._read, self._axis = read, axis

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        return self._times(self._pixels(planes), self.weights)

    def _pixels(self, planes: torch.Tensor) -> torch.Tensor:
        return planes[..., self._read] if self._axis == 3 else planes[:, :, self._read]

    def _times(self, pixels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return pixels @ weights if self._axis == 3 else weights @ pixels


class _ExactProduct(_Product):
    """Such a product of whole levels, rounded to whole levels again.

    Weights are multiples of 2**-22, too many bits for an exact sum in float32. In two parts of half the bits, each sum is
    exact: in any order, and where a GPU multiplies in TF32.
    """

    fine: torch.Tensor

    def __init__(self, weights: np.ndarray, read: slice, axis: int) -> None:
        coarse = np.rint(weights * _COARSE) / _COARSE
        super().__init__(coarse, read, axis)
        self.register_buffer("fine", torch.tensor(weights - coarse, dtype=torch.float32))

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        pixels = self._pixels(planes)
        coarse, fine = self._times(pixels, self.weights), self._times(pixels, self.fine)
        whole = torch.floor(coarse)
        return torch.clamp(whole + torch.floor(coarse - whole + fine + 0.5), 0, 255)


def _moved(read: slice, whole: slice) -> slice:
    return slice(read.start - whole.start, read.stop - whole.start)


def _whole_levels(values: torch.Tensor) -> torch.Tensor:
    """Round to grey levels, ties up, and clip them to 0..255."""
    return torch.clamp(torch.floor(values + 0.5), 0, 255)


class _Normalise(nn.Module):
    """Normalise float32 NCHW of 0..255, add the border, and bring channels into the network's order.

    For a network that wants three channels, a grey picture becomes three.
    """

    mean: torch.Tensor
    std: torch.Tensor
    border: torch.Tensor | None
    order: torch.Tensor | None

    def __init__(self, config: ImageConfig, input: InputSpec, placed: Placement) -> None:
        super().__init__()
        assert input.frame is not None
        channels = len(config.mean)
        given = list(range(channels))[:: -1 if input.frame.color == "bgr" else 1]  # which channel each plane is
        wanted = list(range(channels))[:: -1 if config.channel_order == "bgr" else 1]
        mean, std, colours = (
            torch.tensor(values, dtype=torch.float32)[given][None, :, None, None]
            for values in (config.mean, config.std, config.colours)
        )
        self.register_buffer("mean", 255 * mean)
        self.register_buffer("std", 255 * std)
        order = [given.index(channel) for channel in wanted]
        self.register_buffer("order", torch.tensor(order) if order != sorted(order) else None, persistent=False)
        height, width = input.height.opt, input.width.opt
        inside = slice(placed.top, placed.top + len(placed.rows)), slice(placed.left, placed.left + len(placed.columns))
        self._padding = inside[1].start, width - inside[1].stop, inside[0].start, height - inside[0].stop
        border = None
        if any(self._padding):
            border = ((colours - self.mean) / self.std).expand(1, channels, height, width).clone()
            border[:, :, inside[0], inside[1]] = 0
        self.register_buffer("border", border)

    def forward(self, levels: torch.Tensor) -> torch.Tensor:
        pixel_values = (levels - self.mean) / self.std
        if self.border is not None:
            pixel_values = functional.pad(pixel_values, self._padding) + self.border
        if self.order is not None:
            pixel_values = pixel_values.index_select(1, self.order)
        return pixel_values


@dataclass(frozen=True)
class FrameFront:
    """What a graph does with frames before the network, as ONNX: takes ``input``, returns ``pixel_values``.

    Networks are exported, calibrated and typed without it. It goes in front of every graph that is compiled or shipped.
    """

    model: onnx.ModelProto
    input: InputSpec

    def put_before(self, path: Path) -> None:
        """Make the graph in this file begin with it. The file is replaced."""
        graph = onnx.load(path)
        named = onnx.compose.add_prefix(self.model, "frame/", rename_inputs=False, rename_outputs=False)
        # Its operators are the same in all opsets that graphs are written in.
        named.opset_import[0].version = next(one.version for one in graph.opset_import if one.domain == "")
        named.ir_version = graph.ir_version
        onnx.save(onnx.compose.merge_models(named, graph, [("pixel_values", "pixel_values")]), path)
