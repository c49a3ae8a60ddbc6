"""Draw PNG files: feature maps beside the input photograph, and the layers in which an error begins."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_backbones.errors import MissingDependencyError, visible

_CHANNELS_SHOWN = 4


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
    """Write a PNG: one row per stage, with the energy of all channels and the strongest ones.

    ``photograph``: uint8 (height, width, channels), as the network saw it. ``maps``: (channels, height, width) by stage.
    Energy is the root mean square over channels; a strong channel is one with a large variance over the map.
    """
    figure_class = _figure_class()
    rows, columns = len(maps), 2 + _CHANNELS_SHOWN
    figure = figure_class(figsize=(2.1 * columns, 2.35 * rows + 0.7), layout="constrained", facecolor="white")
    figure.suptitle(visible(title), fontsize=11, parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False)
    for row, (stage, feature_map) in zip(axes, maps.items(), strict=True):
        for axis in row:
            axis.set_axis_off()
        row[0].imshow(photograph if photograph.shape[2] == 3 else photograph[..., 0], cmap="gray")
        row[0].set_title(
            f"{visible(stage)}\n{' x '.join(str(n) for n in feature_map.shape)}",
            fontsize=9,
            loc="left",
            parse_math=False,
        )
        values = feature_map.astype(np.float64)  # squares of float16 overflow
        row[1].imshow(np.sqrt((values**2).mean(axis=0)), cmap="magma")
        row[1].set_title("energy of\nall channels", fontsize=9)
        strongest = np.argsort(values.reshape(len(values), -1).var(axis=1))[::-1][:_CHANNELS_SHOWN]
        for axis, channel in zip(row[2:], strongest, strict=False):
            axis.imshow(values[channel], cmap="viridis")
            axis.set_title(f"channel\n{channel}", fontsize=9)
    _save(figure, path)


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
