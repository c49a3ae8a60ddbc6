"""Feature maps of the golden images as pictures: the fp32 reference, an engine's, and their difference."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from edge_backbones.bundle.manifest import Manifest
from edge_backbones.errors import MissingDependencyError
from edge_backbones.pictures import as_map

IMAGES_SHOWN = 4
_MAP_SIDE = (
    112  # cells of a drawn map, and pixels of a drawn photograph: larger ones are averaged, to keep the page small
)
_PHOTOGRAPH_SIDE = 320


class Picture(NamedTuple):
    """``uri``: the image itself. ``low`` to ``high``: what its colours span. ``relative``: of a difference, |x - r| / |r|."""

    uri: str
    alt: str
    low: float = 0.0
    high: float = 0.0


class StagePictures(NamedTuple):
    stage: str
    shape: tuple[int, ...]
    cells: tuple[int, int]
    shrunk: bool
    reference: Picture
    engine: Picture | None
    difference: Picture | None
    relative: float | None


class Figure(NamedTuple):
    """One image with its maps, in stage order."""

    title: str
    photograph: Picture
    stages: list[StagePictures]
    without_map: list[str]


def draw_figures(
    manifest: Manifest, samples: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], precision: str
) -> list[Figure]:
    inputs = samples[manifest.input.name]
    _, height, width = manifest.input.batch_height_width(inputs.shape)
    names = manifest.golden.images if len(manifest.golden.images) == len(inputs) else range(len(inputs))
    spec = manifest.backbone
    drawn_figures = []
    for i, (title, image) in enumerate(zip(names, inputs[:IMAGES_SHOWN], strict=False)):
        drawn: list[StagePictures] = []
        left_out: list[str] = []
        for stage, layout, stride in zip(spec.out_features, spec.layouts, spec.strides, strict=True):
            grid = height // stride[0], width // stride[1]
            reference = as_map(samples[stage][i].astype(np.float64), layout, grid)
            if reference is None:
                left_out.append(stage)
                continue
            actual = as_map(outputs[stage][i].astype(np.float64), layout, grid) if outputs else None
            drawn.append(_draw(stage, f"{stage} on {title}", samples[stage][i].shape, reference, actual, precision))
        alt = f"input image {title}, as the network sees it"
        drawn_figures.append(Figure(str(title), Picture(_photograph(manifest, image), alt), drawn, left_out))
    return drawn_figures


def _draw(
    stage: str, what: str, shape: tuple[int, ...], reference: np.ndarray, actual: np.ndarray | None, precision: str
) -> StagePictures:
    energy = _energy(reference)
    low, high = float(energy.min()), float(energy.max())
    first = Picture(_map_png(energy, low, high, "magma"), f"fp32 reference: energy of {what}", low, high)
    second = third = relative = None
    if actual is not None:
        error = actual - reference
        noise = _energy(error)
        most, length = float(noise.max()), float(np.linalg.norm(reference))
        relative = float(np.linalg.norm(error)) / length if length else None
        second = Picture(
            _map_png(_energy(actual), low, high, "magma"), f"{precision} engine: energy of {what}", low, high
        )
        third = Picture(_map_png(noise, 0, most, "viridis"), f"energy of the difference in {what}", 0, most)
    cells = energy.shape[0], energy.shape[1]
    return StagePictures(stage, shape, cells, max(cells) > _MAP_SIDE, first, second, third, relative)


def _energy(values: np.ndarray) -> np.ndarray:
    """Root mean square over channels."""
    energy: np.ndarray = np.sqrt((values**2).mean(axis=0))
    return energy


def _map_png(values: np.ndarray, low: float, high: float, colours: str) -> str:
    """A map as a PNG with one pixel per cell; a value that is not finite has the lowest colour."""
    image = _pillow().fromarray(np.nan_to_num(values, nan=low, posinf=high, neginf=low).astype(np.float32))
    image = _shrink(image, _MAP_SIDE)
    span = high - low if high > low else 1.0
    levels = np.clip((np.asarray(image) - low) / span * 255, 0, 255).round().astype(np.uint8)
    indexed = _pillow().fromarray(levels).convert("P")
    indexed.putpalette(_palette(colours).tobytes())
    return _data_uri(indexed, "png", optimize=True)


def _photograph(manifest: Manifest, image: np.ndarray) -> str:
    """A golden input as a JPEG: normalisation undone, grey where it has not three channels."""
    if manifest.input.name == "pixel_values":
        mean, std = (np.array(values) for values in (manifest.image.mean, manifest.image.std))
        image = image.transpose(1, 2, 0)[..., :: -1 if manifest.image.channel_order == "bgr" else 1]
        image = np.clip((image * std + mean) * 255, 0, 255).round()
    if image.shape[2] != 3:
        image = image.mean(axis=2)
    picture = _pillow().fromarray(image.astype(np.uint8))
    return _data_uri(_shrink(picture, _PHOTOGRAPH_SIDE), "jpeg", quality=88)


def _shrink(image: Any, side: int) -> Any:
    factor = side / max(image.size)
    if factor >= 1:
        return image
    return image.resize([max(1, round(length * factor)) for length in image.size], _pillow().Resampling.BOX)


def _data_uri(image: Any, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError("drawing feature maps", "report") from error
    return Image


def _palette(colours: str) -> np.ndarray:
    """256 colours as uint8 (256, 3)."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError("drawing feature maps", "report") from error
    found: np.ndarray = matplotlib.colormaps[colours](np.arange(256), bytes=True)[:, :3]
    return found


def colour_bars() -> dict[str, str]:
    """The stops of each scale's colour bar, as CSS."""
    return {
        use: ", ".join("#" + bytes(colour).hex() for colour in _palette(colours)[::17])
        for use, colours in (("energy", "magma"), ("difference", "viridis"))
    }
