"""Draw feature maps beside their photograph, for files and for video, and the layers in which an error begins."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edge_backbones.errors import InputError, MissingDependencyError, visible

CHANNELS_SHOWN = 4
# In pixels. The coarse maps of 224 x 224 have whole cells in a tile: 168 = 3 x 56 = 6 x 28 = 12 x 14 = 24 x 7.
_TILE = 168
_TALLEST_TILE = 2 * _TILE
_GAP = 10
_MARGIN = 21
_WIDTH = 2 * _MARGIN + (2 + CHANNELS_SHOWN) * _TILE + (1 + CHANNELS_SHOWN) * _GAP
_HEAD, _CAPTION = 40, 28  # above and below the tiles of a stage
_LEGEND = 168
_WIDEST_PHOTOGRAPH = 300

_PAPER, _INK, _FAINT, _FAULT = (255, 255, 255), (31, 35, 40), (101, 109, 118), (192, 57, 43)
_UNKNOWN = np.array([150, 150, 150], np.uint8)  # a cell with NaN or infinity
_ENERGY, _CHANNEL = "magma", "viridis"

# What is chosen by statistics is chosen from at most about this many cells of a map.
_CELLS_SAMPLED = 16384
# Less than this share of the variance is rounding.
_NOTHING = 1e-10


class View(NamedTuple):
    """How the maps of a stage are drawn. Frames of a video that share it have colours that mean the same.

    ``channels``: those that are drawn, each with the two values at the ends of its colours. ``energy``: these values for the
    energy. ``mean`` (channels,) and ``components`` (3, channels) turn a cell into red, green and blue, each between the two
    values of ``spans``. ``explained``: the share of the variance that the three components hold.
    """

    channels: dict[int, tuple[float, float]]
    energy: tuple[float, float]
    mean: np.ndarray
    components: np.ndarray
    spans: list[tuple[float, float]]
    explained: float


def as_map(output: np.ndarray, layout: str, grid: tuple[int, int]) -> np.ndarray | None:
    """Return the map of one image as (channels, height, width); None for an output without positions in the image.

    ``output``: without the batch axis. Tokens are arranged in their ``grid`` (rows, columns); prefix tokens are dropped.
    """
    if layout == "NCHW" and output.ndim == 3:
        return output
    if layout == "NHWC" and output.ndim == 3:
        return output.transpose(2, 0, 1)
    cells = grid[0] * grid[1]
    if layout == "NLC" and output.ndim == 2 and 1 < cells <= len(output):
        return output[-cells:].reshape(*grid, -1).transpose(2, 0, 1)
    return None


def draw_feature_maps(
    path: Path,
    photograph: np.ndarray,
    maps: Mapping[str, np.ndarray],
    *,
    title: str,
) -> None:
    """Write the picture of `draw_frame` as a PNG file.

    ``photograph``: uint8 (height, width, channels), as the network saw it. ``maps``: (channels, height, width) by stage.
    """
    picture = _pillow().fromarray(draw_frame(photograph, maps, title=title))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def draw_frame(
    photograph: np.ndarray,
    maps: Mapping[str, np.ndarray],
    *,
    title: str,
    views: dict[str, View] | None = None,
) -> np.ndarray:
    """Draw a photograph and a row of tiles for each stage; return a uint8 RGB array (rows, columns, 3).

    A row shows the three leading principal components of all channels as red, green and blue, the energy (the root mean
    square over channels), and the channels that vary most and repeat each other least. NaN and infinity are grey.

    ``photograph``: uint8 (height, width, channels), as the network saw it. ``maps``: (channels, height, width) by stage.
    ``views``: for a video, a dictionary that is empty at first and is passed with every frame. It keeps the view of each
    stage, from the first frame in which anything varies, so that colours mean the same in all frames and do not flicker. The
    size depends on the photograph's shape and the number of maps only, and is even, as video encoders ask.

    Raises MissingDependencyError without the report extra, InputError for a view of another number of channels.
    """
    views = {} if views is None else views
    tile = _fitted(photograph, (_TALLEST_TILE, _TILE))
    head = max(tile[0], _LEGEND)
    row = _HEAD + tile[0] + _CAPTION
    height = _MARGIN + head + len(maps) * row + _MARGIN // 2
    canvas = _pillow().new("RGB", (_WIDTH, height + height % 2), _PAPER)
    _draw_head(canvas, photograph, head, title)
    for index, (stage, feature_map) in enumerate(maps.items()):
        if stage not in views or not views[stage].explained:
            views[stage] = choose_view(feature_map)
        elif len(feature_map) != len(views[stage].mean):
            raise InputError(
                f"{stage} has {len(feature_map)} channels, and its view is one of {len(views[stage].mean)} channels: "
                "begin with an empty dictionary of views"
            )
        _draw_stage(canvas, _MARGIN + head + index * row, tile, stage, feature_map, views[stage])
    return np.array(canvas)


# ---- what is worth drawing ------------------------------------------------------------------------------------------


def choose_view(feature_map: np.ndarray) -> View:
    """Choose channels, components and ranges of colours for a map (channels, height, width); equal maps have equal views."""
    step = int(np.ceil(np.sqrt(feature_map[0].size / _CELLS_SAMPLED)))
    values = feature_map[:, ::step, ::step].reshape(len(feature_map), -1).astype(np.float64)
    values = values[:, np.isfinite(values).all(axis=0)]
    if not values.shape[1]:
        values = np.zeros((len(values), 1))
    mean = values.mean(axis=1)
    centred = values - mean[:, None]
    # What is left of a constant channel is the rounding of its mean.
    centred[np.abs(centred).max(axis=1) <= 1e-6 * np.abs(mean)] = 0
    components, explained = _principal_components(centred)
    return View(
        {channel: _span(values[channel]) for channel in _different_channels(centred)},
        _span(_energy(values)),
        mean,
        components,
        [_span(component) for component in components @ centred],
        explained,
    )


def _principal_components(centred: np.ndarray) -> tuple[np.ndarray, float]:
    """Return three unit vectors (3, channels) and the share of the variance that they hold.

    ``centred``: (channels, cells). The largest weight of each vector is positive. Components that do not exist are zeros.
    """
    channels, cells = centred.shape
    gram = centred @ centred.T if channels <= cells else centred.T @ centred
    variances, vectors = np.linalg.eigh(gram)
    variances, vectors = variances[:-4:-1], vectors[:, :-4:-1]
    total = float(np.trace(gram))
    vectors = vectors[:, variances > _NOTHING * total]
    weights = (vectors if channels <= cells else centred @ vectors).T
    components = np.zeros((3, channels))
    for component, weight in zip(components, weights, strict=False):
        component[:] = weight / np.linalg.norm(weight) * np.sign(weight[np.argmax(np.abs(weight))])
    return components, float(variances.clip(0).sum()) / total if total else 0.0


def _different_channels(centred: np.ndarray) -> list[int]:
    """Return the channels of (channels, cells) that vary most and repeat each other least, at most `CHANNELS_SHOWN`.

    It is a QR decomposition with column pivoting: each is chosen by the variance that those before it do not explain. That
    is multiplied by its share of the channel's variance, or a strong near-twin of a channel would be chosen.
    """
    variances = np.einsum("cn,cn->c", centred, centred)
    least = _NOTHING * variances.max()
    unexplained = centred.copy()
    chosen: list[int] = []
    while len(chosen) < min(CHANNELS_SHOWN, len(centred)):
        left = np.einsum("cn,cn->c", unexplained, unexplained)
        left[left <= least] = 0
        left[chosen] = 0
        best = int(np.argmax(left**2 / np.maximum(variances, np.finfo(float).tiny)))
        if not left[best]:
            break
        direction = unexplained[best] / np.sqrt(left[best])
        unexplained -= np.outer(unexplained @ direction, direction)
        chosen.append(best)
    return chosen


def _energy(values: np.ndarray) -> np.ndarray:
    """Return the root mean square over the first axis, in float64: squares of float16 overflow."""
    wide = values.astype(np.float64)
    energy: np.ndarray = np.sqrt(np.einsum("c...,c...->...", wide, wide) / len(wide))
    return energy


def _span(values: np.ndarray) -> tuple[float, float]:
    """Return the first and the 99th percentile: single cells do not take all colours."""
    low, high = np.percentile(values, (1, 99))
    return float(low), float(high)


# ---- tiles ----------------------------------------------------------------------------------------------------------


def _scaled(values: np.ndarray, span: tuple[float, float]) -> np.ndarray:
    """Return values as uint8 levels between the two of ``span``; values that are all the same are in the middle."""
    low, high = span
    if not high > low:
        return np.full(values.shape, 128, np.uint8)
    levels: np.ndarray = (np.clip((values - low) * (255 / (high - low)), 0, 255) + 0.5).astype(np.uint8)
    return levels


def principal_colours(feature_map: np.ndarray, view: View) -> np.ndarray:
    """Return the components of each cell as red, green and blue: uint8 (rows, columns, 3). NaN and infinity are grey."""
    known, unknown = _known(feature_map)
    mixed = np.einsum("kc,chw->khw", view.components, known) - (view.components @ view.mean)[:, None, None]
    colours = np.stack([_scaled(one, span) for one, span in zip(mixed, view.spans, strict=True)], axis=2)
    colours[unknown] = _UNKNOWN
    return colours


def _known(feature_map: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a map without NaN and infinity, and which cells (rows, columns) had any; those are zeros."""
    unknown = ~np.isfinite(feature_map).all(axis=0)
    return np.where(unknown, 0, feature_map) if unknown.any() else feature_map, unknown


def _tiles(feature_map: np.ndarray, view: View) -> list[tuple[str, np.ndarray]]:
    """Return captions and uint8 colours (rows, columns, 3) of a stage's tiles, with one pixel per cell."""
    known, unknown = _known(feature_map)
    varies = f"{100 * view.explained:.0f} % of variance" if view.explained else "nothing varies"
    low, high = view.energy
    drawn = [
        (f"PCA: {varies}", principal_colours(feature_map, view)),
        (f"energy {low:.3g} to {high:.3g}", palette(_ENERGY)[_scaled(_energy(known), view.energy)]),
    ]
    drawn += [
        (f"channel {channel}", palette(_CHANNEL)[_scaled(known[channel], span)])
        for channel, span in view.channels.items()
    ]
    for _, tile in drawn[1:]:
        tile[unknown] = _UNKNOWN
    return drawn


def _enlarged(colours: np.ndarray, size: tuple[int, int]) -> Any:
    """Return a Pillow picture of ``size`` (rows, columns) in which all cells of ``colours`` have the same size.

    Cells are repeated until there are more pixels than needed, and these are averaged: cells keep their edges.
    """
    rows, columns = (-(-wanted // cells) for wanted, cells in zip(size, colours.shape, strict=False))
    picture = _pillow().fromarray(colours.repeat(rows, axis=0).repeat(columns, axis=1))
    return picture.resize(size[::-1], _pillow().Resampling.BOX)


def _fitted(photograph: np.ndarray, box: tuple[int, int]) -> tuple[int, int]:
    """Return the largest size (rows, columns) in the photograph's proportions that fits a box (rows, columns)."""
    height, width = photograph.shape[:2]
    factor = min(box[0] / height, box[1] / width)
    return max(1, round(height * factor)), max(1, round(width * factor))


# ---- the page -------------------------------------------------------------------------------------------------------


def _draw_head(canvas: Any, photograph: np.ndarray, head: int, title: str) -> None:
    """Draw the photograph, at most ``head`` pixels high, the title, and what the kinds of tiles mean."""
    height, width = photograph.shape[:2]
    pixels = photograph if photograph.shape[2] == 3 else photograph[..., :1].repeat(3, axis=2)
    size = _fitted(photograph, (head, _WIDEST_PHOTOGRAPH))
    picture = _pillow().fromarray(np.ascontiguousarray(pixels)).resize(size[::-1], _pillow().Resampling.LANCZOS)
    canvas.paste(picture, (_MARGIN, _MARGIN))
    left, right = _MARGIN + size[1] + 2 * _GAP, _WIDTH - _MARGIN
    _write(canvas, (left, _MARGIN - 4), title, room=right - left, size=20, bold=True)
    seen = f"left: what the network sees, {height} x {width} pixels"
    _write(canvas, (left, _MARGIN + 30), seen, room=right - left, colour=_FAINT)
    primary = np.repeat(np.eye(3, dtype=np.uint8) * 210, 32, axis=0)
    for index, (colours, meaning) in enumerate(
        (
            (primary, "PCA: the three principal components of all channels, as red, green and blue"),
            (palette(_ENERGY)[::3], "energy: the root mean square of all channels, from low to high"),
            (palette(_CHANNEL)[::3], "channels: those that vary most and repeat each other least, from low to high"),
        )
    ):
        top = _MARGIN + 66 + 28 * index
        bar = _pillow().fromarray(np.broadcast_to(colours[None], (14, len(colours), 3)).copy())
        canvas.paste(bar.resize((96, 14), _pillow().Resampling.NEAREST), (left, top + 3))
        _write(canvas, (left + 96 + _GAP, top), meaning, room=right - left - 96 - _GAP)


def _draw_stage(canvas: Any, top: int, tile: tuple[int, int], stage: str, feature_map: np.ndarray, view: View) -> None:
    """Draw a stage from the row ``top`` of the canvas on: its name, its tiles, and their names."""
    channels, rows, columns = feature_map.shape
    unknown = int((~np.isfinite(feature_map).all(axis=0)).sum())
    size = f"{channels} channel{'s' * (channels != 1)}, {rows} x {columns} cells"
    fault = f"{unknown} of {rows * columns} cells are not finite" if unknown else ""
    room = _WIDTH - 2 * _MARGIN - 2 * 16 - _length(size) - _length(fault)
    left = _MARGIN + 16 + _write(canvas, (_MARGIN, top + 14), stage, room=room, size=17, bold=True)
    left += 16 + _write(canvas, (left, top + 16), size, colour=_FAINT)
    _write(canvas, (left, top + 16), fault, colour=_FAULT)
    for index, (caption, colours) in enumerate(_tiles(feature_map, view)):
        left = _MARGIN + index * (_TILE + _GAP)
        canvas.paste(_enlarged(colours, tile), (left, top + _HEAD))
        _write(canvas, (left, top + _HEAD + tile[0] + 4), caption, room=_TILE, size=13)


def _write(
    canvas: Any,
    place: tuple[int, int],
    text: str,
    *,
    room: int = _WIDTH,
    size: int = 15,
    bold: bool = False,
    colour: tuple[int, int, int] = _INK,
) -> int:
    """Write a text to the right of and below ``place``, and return its width; leave out its middle if it exceeds ``room``."""
    from PIL import ImageDraw

    shown = kept = visible(text)
    while _length(shown, size, bold) > room and len(kept) > 1:
        kept = kept[: (len(kept) - 1) // 2] + kept[(len(kept) + 1) // 2 :]
        shown = f"{kept[: len(kept) // 2]}…{kept[len(kept) // 2 :]}"
    ImageDraw.Draw(canvas).text(place, shown, fill=colour, font=_font(size, bold))
    return _length(shown, size, bold)


def _length(text: str, size: int = 15, bold: bool = False) -> int:
    return int(np.ceil(_font(size, bold).getlength(text)))


@functools.cache
def _font(size: int, bold: bool) -> Any:
    """Return DejaVu Sans, which comes with matplotlib and has the letters of many languages."""
    try:
        from matplotlib import get_data_path
        from PIL import ImageFont
    except ImportError as error:
        raise MissingDependencyError("drawing pictures", "report") from error
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", name), size, layout_engine=ImageFont.Layout.BASIC)


def palette(colours: str) -> np.ndarray:
    """Return the 256 colours of a colour map of matplotlib as uint8 (256, 3); raise MissingDependencyError without it."""
    try:
        from matplotlib import colormaps
    except ImportError as error:
        raise MissingDependencyError("drawing pictures", "report") from error
    found: np.ndarray = colormaps[colours](np.arange(256), bytes=True)[:, :3]
    return found


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError("drawing pictures", "report") from error
    return Image


# ---- layers ---------------------------------------------------------------------------------------------------------


def draw_layers(path: Path, layers: Sequence[tuple[str, float]], *, origin: str, limit_db: float, title: str) -> None:
    """Write a PNG: one bar of SQNR per layer, the limit as a line, and the layer where the error begins in red.

    ``layers``: (name, SQNR in dB), from top to bottom. ``origin``: the name of the red layer. ``limit_db``: the gate's SQNR.
    """
    figure = _figure_class()(figsize=(8, 0.34 * len(layers) + 1.3), layout="constrained", facecolor="white")
    axis = figure.subplots()
    axis.barh(
        range(len(layers)),
        [sqnr_db for _, sqnr_db in layers],
        color=["#c0392b" if name == origin else "#7f8fa6" for name, _ in layers],
    )
    axis.set_yticks(range(len(layers)), [visible(name) for name, _ in layers], fontsize=8, parse_math=False)
    axis.invert_yaxis()
    axis.axvline(limit_db, color="black", linestyle="--", linewidth=1)
    axis.set_xlabel(f"SQNR in dB (dashed: the {limit_db:.1f} dB that the gate asks for)", fontsize=9)
    axis.set_title(visible(title), fontsize=10, loc="left", parse_math=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph .* missing from", UserWarning
        )  # drawn as a box: names have any letters
        figure.savefig(path, dpi=110)


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("drawing pictures", "report") from error
    return Figure
