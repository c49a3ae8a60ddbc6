"""Feature maps of the golden images as pictures: the fp32 reference's, an engine's, and their difference."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from edge_backbones.bundle.manifest import Manifest
from edge_backbones.errors import MissingDependencyError
from edge_backbones.images.fit import seen_by_network
from edge_backbones.pictures import as_map, choose_view, palette, principal_colours

IMAGES_SHOWN = 4
# Larger pictures are averaged down to this many cells of a map and pixels of a photograph, to keep the page small.
_MAP_SIDE = 112
_PHOTOGRAPH_SIDE = 320
_COLOURS = 64  # of a picture of components


class Picture(NamedTuple):
    """An image as a data URI, its text for screen readers, and the values at the two ends of its colour scale."""

    uri: str
    alt: str
    low: float = 0.0
    high: float = 0.0


class StagePictures(NamedTuple):
    """One stage of one image: the energy of the fp32 reference, of the engine, and of their difference.

    ``principal``: the three principal components of the reference as red, green and blue. ``engine_principal``: the engine's
    map in the same colours. ``shape``: of the stage's output for one image. ``cells``: rows and columns of its map;
    ``shrunk`` if the pictures have fewer. ``relative``: |x - r| / |r|, the size of the difference beside the reference.
    Without an engine, what needs one is None.
    """

    stage: str
    shape: tuple[int, ...]
    cells: tuple[int, int]
    shrunk: bool
    principal: Picture
    reference: Picture
    engine_principal: Picture | None
    engine: Picture | None
    difference: Picture | None
    relative: float | None


class Figure(NamedTuple):
    """One golden image with the pictures of its stages, in their order; ``without_map`` names stages without a grid."""

    title: str
    photograph: Picture
    stages: list[StagePictures]
    without_map: list[str]


def draw_figures(
    manifest: Manifest,
    inputs: np.ndarray,
    references: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.ndarray],
    precision: str,
) -> list[Figure]:
    """Draw the first golden images and their feature maps.

    ``references`` and ``outputs`` hold the fp32 reference and the engine's outputs by stage, images along the first axis;
    ``outputs`` is empty where no engine ran. ``precision`` names the engine in the texts. Raises MissingDependencyError
    without the report extra.
    """
    _, height, width = manifest.input.batch_height_width(inputs.shape)
    names = manifest.golden.images if len(manifest.golden.images) == len(inputs) else range(len(inputs))
    spec = manifest.backbone
    drawn_figures = []
    for i, (title, image) in enumerate(zip(names, inputs[:IMAGES_SHOWN], strict=False)):
        drawn: list[StagePictures] = []
        left_out: list[str] = []
        for stage, layout, stride in zip(spec.out_features, spec.layouts, spec.strides, strict=True):
            grid = height // stride[0], width // stride[1]
            reference = as_map(references[stage][i].astype(np.float64), layout, grid)
            if reference is None:
                left_out.append(stage)
                continue
            actual = as_map(outputs[stage][i].astype(np.float64), layout, grid) if outputs else None
            drawn.append(_draw(stage, f"{stage} on {title}", references[stage][i].shape, reference, actual, precision))
        alt = f"input image {title}, as the network sees it"
        drawn_figures.append(Figure(str(title), Picture(_photograph(manifest, image), alt), drawn, left_out))
    return drawn_figures


def _draw(
    stage: str, what: str, shape: tuple[int, ...], reference: np.ndarray, actual: np.ndarray | None, precision: str
) -> StagePictures:
    """Draw one stage of one image; ``reference`` and ``actual`` are maps of shape (channels, rows, columns)."""
    energy = _energy(reference)
    low, high = float(energy.min()), float(energy.max())
    first = Picture(_map_png(energy, low, high, "magma"), f"fp32 reference: energy of {what}", low, high)
    view = choose_view(reference)
    principal = Picture(_colours_png(principal_colours(reference, view)), f"fp32 reference: components of {what}")
    same = second = third = relative = None
    if actual is not None:
        same = Picture(_colours_png(principal_colours(actual, view)), f"{precision} engine: components of {what}")
        error = actual - reference
        noise = _energy(error)
        most, length = float(noise.max()), float(np.linalg.norm(reference))
        relative = float(np.linalg.norm(error)) / length if length else None
        second = Picture(
            _map_png(_energy(actual), low, high, "magma"), f"{precision} engine: energy of {what}", low, high
        )
        third = Picture(_map_png(noise, 0, most, "viridis"), f"energy of the difference in {what}", 0, most)
    cells = energy.shape[0], energy.shape[1]
    return StagePictures(stage, shape, cells, max(cells) > _MAP_SIDE, principal, first, same, second, third, relative)


def _energy(values: np.ndarray) -> np.ndarray:
    """Return the root mean square over channels of a map (channels, rows, columns)."""
    energy: np.ndarray = np.sqrt((values**2).mean(axis=0))
    return energy


def _map_png(values: np.ndarray, low: float, high: float, colours: str) -> str:
    """Draw a map (rows, columns) as a PNG with one pixel per cell; NaN gets the lowest colour."""
    image = _pillow().fromarray(np.nan_to_num(values, nan=low, posinf=high, neginf=low).astype(np.float32))
    image = _shrink(image, _MAP_SIDE)
    span = high - low if high > low else 1.0
    levels = np.clip((np.asarray(image) - low) / span * 255, 0, 255).round().astype(np.uint8)
    indexed = _pillow().fromarray(levels).convert("P")
    indexed.putpalette(palette(colours).tobytes())
    return _data_uri(indexed, "png", optimize=True)


def _colours_png(colours: np.ndarray) -> str:
    """Draw colours (rows, columns, 3) as a PNG with one pixel per cell, and 64 different ones, which keeps it small."""
    image = _shrink(_pillow().fromarray(colours), _MAP_SIDE)
    return _data_uri(image.quantize(_COLOURS, method=_pillow().Quantize.MEDIANCUT), "png", optimize=True)


def _photograph(manifest: Manifest, image: np.ndarray) -> str:
    """Draw a golden input as a JPEG: undo the normalisation, and show it in grey unless it has three channels."""
    image = seen_by_network(image[None], manifest.image, manifest.input)[0]
    if manifest.input.name == "pixel_values":
        mean, std = (np.array(values) for values in (manifest.image.mean, manifest.image.std))
        image = image.transpose(1, 2, 0)[..., :: -1 if manifest.image.channel_order == "bgr" else 1]
        image = np.clip((image * std + mean) * 255, 0, 255).round()
    if image.shape[2] != 3:
        image = image.mean(axis=2)
    picture = _pillow().fromarray(image.astype(np.uint8))
    return _data_uri(_shrink(picture, _PHOTOGRAPH_SIDE), "jpeg", quality=88)


def _shrink(image: Any, side: int) -> Any:
    """Return a Pillow image scaled down so that no side is longer than ``side`` pixels."""
    factor = side / max(image.size)
    if factor >= 1:
        return image
    return image.resize([max(1, round(length * factor)) for length in image.size], _pillow().Resampling.BOX)


def _data_uri(image: Any, kind: str, **options: Any) -> str:
    """Encode a Pillow image as png or jpeg, in a URI that a page can hold."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError("drawing feature maps", "report") from error
    return Image


def colour_bars() -> dict[str, str]:
    """Return the colours of the two scales, energy and difference, as stops of a CSS gradient."""
    return {
        use: ", ".join("#" + bytes(colour).hex() for colour in palette(colours)[::17])
        for use, colours in (("energy", "magma"), ("difference", "viridis"))
    }
