"""The preprocessing of a network: how a picture gets the size of the input, and how pixels are normalised."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

_MOST_EDGE = 1 << 20
_MOST_PIXEL = 1e6  # the limit of mean, std and 1 / std; pixels lie in 0..1
_LEAST_CROP = 0.01
_MOST_CROP = 4.0  # above 1 the scaled picture is smaller than the input and gets a border


class ImageConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The preprocessing that a network was trained with: how a picture is resized and how its pixels are normalised.

    ``mean`` and ``std``: one value per channel of the picture (RGB for three), for pixels scaled to 0..1. The values of a
    processor that scales pixels otherwise are converted. ``channel_order``: ``bgr`` if the network takes the channels
    reversed; they are reversed last, after normalisation.

    ``crop_mode``, for an input of height x width:

    - ``center``: scale the picture until it covers the input divided by ``crop_pct``, and cut out the centre.
    - ``squash``: scale both sides to the input divided by ``crop_pct``, whatever their ratio, and cut out the centre.
    - ``border``: scale the picture until it fits inside, and put it in the centre.
    - ``pad``: scale the picture until it fits inside, and put it in the top left corner, as detection models do.

    ``short_edge`` and ``long_edge`` are for ``border`` and ``pad``. The short side is scaled to ``short_edge`` pixels, but
    the long side to at most ``long_edge``. A picture that is then larger than the input is scaled until it fits inside.
    Without both the picture always fills the input. ``size_multiple``: scaled sides are rounded up to a multiple of it.
    ``fill``: the colour around the picture.

    ``sampling``: with ``antialias`` the filter grows as the picture shrinks, as in Pillow. Otherwise the filter keeps its
    width and ``bicubic`` is that of torch and OpenCV (a = -0.75); pixels lie at the ``centres`` of their cells, or the
    outermost ones at the ``corners`` (torch's ``align_corners``). ``arithmetic``: the library whose integer arithmetic is
    repeated bit for bit (they differ by a grey level or two), or ``float`` for one that rounds once, at the end.
    ``rounding``: the library whose rules round the scaled sides and the position of crops and borders.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    channel_order: Literal["rgb", "bgr"] = "rgb"
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = "bicubic"
    sampling: Literal["antialias", "centres", "corners"] = "antialias"
    arithmetic: Literal["pillow", "torchvision", "float"] = "pillow"
    crop_pct: float = 0.875
    crop_mode: Literal["center", "squash", "border", "pad"] = "center"
    short_edge: int | None = None
    long_edge: int | None = None
    size_multiple: int = 1
    fill: Literal["black", "mean"] | None = None
    rounding: Literal["timm", "transformers", "transformers_pil", "paddle"] = "timm"

    def __post_init__(self) -> None:
        finite = all(math.isfinite(value) for value in (*self.mean, *self.std))
        if len(self.mean) != len(self.std) or not self.mean or not finite or min(self.std) <= 0:
            raise ValueError(f"mean {self.mean} and std {self.std} need one finite value per channel, std above 0")
        if not (
            max(map(abs, self.mean)) <= _MOST_PIXEL and 1 / _MOST_PIXEL <= min(self.std) <= max(self.std) <= _MOST_PIXEL
        ):
            raise ValueError(f"mean {self.mean} and std {self.std} are not of pixels in 0..1")
        if not _LEAST_CROP <= self.crop_pct <= _MOST_CROP:
            raise ValueError(f"crop_pct must be in [{_LEAST_CROP}, {_MOST_CROP}], got {self.crop_pct}")
        edges = (1 if edge is None else edge for edge in (self.short_edge, self.long_edge, self.size_multiple))
        if not all(1 <= edge <= _MOST_EDGE for edge in edges):
            raise ValueError(
                f"short_edge, long_edge and size_multiple must be 1 to {_MOST_EDGE}, "
                f"got {self.short_edge}, {self.long_edge} and {self.size_multiple}"
            )
        if (self.short_edge or self.long_edge) and self.crop_mode not in ("border", "pad"):
            raise ValueError(f"short_edge and long_edge are for crop_mode border and pad, not {self.crop_mode}")

    @property
    def colours(self) -> tuple[int, ...]:
        """Return the colour around the picture, 0..255 per channel.

        By default it is the mean for ``border`` and ``pad``, which normalisation turns into 0, and black otherwise.
        """
        fill = self.fill or ("mean" if self.crop_mode in ("border", "pad") else "black")
        return tuple(round(min(1.0, max(0.0, mean)) * 255) if fill == "mean" else 0 for mean in self.mean)

    def describe(self, height: int, width: int) -> str:
        """Return one line that says how a picture is preprocessed for an input of height x width."""
        size, scaled = f"{height}x{width}", self.scaled_size(height, width)
        edges = [
            f"{name} side to {'at most ' if name == 'long' and self.short_edge else ''}{edge}"
            for name, edge in (("short", self.short_edge), ("long", self.long_edge))
            if edge is not None
        ]
        if self.size_multiple > 1:
            edges.append(f"sides up to multiples of {self.size_multiple}")
        inside = f"{', '.join(edges)}, inside {size}" if edges else f"scaled to fit inside {size}"
        if self.crop_mode == "squash":
            how = f"both sides to {'x'.join(map(str, scaled))}"
        elif self.crop_mode == "center":
            how = (
                f"short side to {min(scaled)}" if scaled[0] == scaled[1] else f"scaled to cover {scaled[0]}x{scaled[1]}"
            )
        else:
            how = f"{inside}, {'in the top left corner' if self.crop_mode == 'pad' else 'in the centre'}"
        if self.crop_mode in ("squash", "center") and (scaled != (height, width) or self.crop_mode == "center"):
            how += f", centre {size}"
        plain = {"antialias": "", "centres": " without antialiasing", "corners": " with aligned corners"}[self.sampling]
        arithmetic = {"pillow": "", "torchvision": " of torchvision", "float": " in floating point"}[self.arithmetic]
        filter = f"{self.interpolation}{plain}{arithmetic}"
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        order = (
            {"rgb": "RGB", "bgr": "BGR"}[self.channel_order] if len(self.mean) == 3 else f"{len(self.mean)} channels"
        )
        return f"{how} ({filter}), {order}, mean {mean}, std {std} of pixels in 0..1"

    def scaled_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and the width of the input divided by ``crop_pct``."""
        return math.floor(height / self.crop_pct), math.floor(width / self.crop_pct)
