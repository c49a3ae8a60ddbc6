"""Read a network's own preprocessing off an image processor of transformers or a data configuration of timm.

A processor is believed by its pixels, not by its options. Its transform is written down as an ImageConfig, both are run on
test pictures, and only an ImageConfig that gives the same pixels counts as the processor's. Where there is none, a note
names the processor and the largest difference.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from edge_backbones.bundle.manifest import USE_PROCESSOR, Source
from edge_backbones.errors import SourceError, first_line
from edge_backbones.images.config import ImageConfig
from edge_backbones.images.fit import fit, network_input
from edge_backbones.spec import InputSpec, ShapeRange
from edge_backbones.toolchain.sources.base import IMAGENET, read_json

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_WHAT = "an image processor's configuration"
_OF_A_PROCESSOR = (
    "image_processor_type",
    "feature_extractor_type",
    "image_mean",
    "do_normalize",
    "do_rescale",
    "do_resize",
)
SAME_PIXELS = 1.01
"""Grey levels: torchvision and Pillow round apart by one."""

_PIL_FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
_PROBES = ((0.45, 0.38), (1.1, 1.7), (1.9, 1.2))
"""(rows, columns) of the test pictures, times the side that a processor scales to: smaller, landscape and portrait."""

_LARGEST_SIDE = 8192  # pixels of a test picture: memory grows with their square
_CANVAS_STEP = 32  # deepest stride of detection backbones
_WARP_FROM = 384  # ConvNextImageProcessor crops below this size and squashes from it on


@dataclass(frozen=True)
class Preprocessing:
    """An ImageConfig and where it comes from.

    Args:
        config: how frames become the network's input.
        size: (height, width) that the source makes, None where that depends on the picture.
        read_from: a phrase for people.
        notes: what the ImageConfig does not repeat of the source, a sentence each.
        differs: why frames cannot be prepared by it, empty where they can.
    """

    config: ImageConfig
    size: tuple[int, int] | None
    read_from: str
    notes: tuple[str, ...] = ()
    differs: str = ""

    @property
    def usual_size(self) -> tuple[int, int] | None:
        """(height, width) that a network is built for by default: the processor's own.

        Where its size depends on the picture, one that holds every landscape picture.
        """
        short, long = self.config.short_edge, self.config.long_edge
        if self.size is None and short is not None and long is not None:
            return -(-short // _CANVAS_STEP) * _CANVAS_STEP, -(-long // _CANVAS_STEP) * _CANVAS_STEP
        return self.size

    def written_into(self, source: Source) -> Source:
        """Return the record of a source with the place where its preprocessing was read."""
        return msgspec.structs.replace(source, preprocessing=self.read_from, preprocessing_notes=self.notes)

    def for_channels(self, channels: int) -> Preprocessing:
        """Return it for a network of other channels, each of which gets the mean over the processor's channels."""
        own = len(self.config.mean)
        if own == channels:
            return self
        mean, std = ((sum(values) / len(values),) * channels for values in (self.config.mean, self.config.std))
        note = f"mean and std are for {own} channels, this network takes {channels}: their average serves each of them"
        config = msgspec.structs.replace(self.config, mean=mean, std=std, channel_order="rgb")
        return dataclasses.replace(self, config=config, notes=(*self.notes, note))


def unknown(what: str) -> Preprocessing:
    """Return ImageNet's preprocessing, for a source that says nothing of its own."""
    note = (
        f"{what} says nothing of its preprocessing: ImageNet's mean and std are taken. If it was trained otherwise, pass "
        "image= a processor, a timm configuration or an ImageConfig (--image-processor FOLDER)"
    )
    return Preprocessing(IMAGENET, None, "ImageNet's defaults", (note,))


def given(image: Any) -> Preprocessing | None:
    """Read what the user passed as ``image=``.

    That is a processor of transformers, the folder or the file of one, a data configuration of timm, or an ImageConfig.
    Raises SourceError for anything else.
    """
    if image is None or isinstance(image, Preprocessing):
        return image
    if isinstance(image, ImageConfig):
        return Preprocessing(image, None, "the ImageConfig given")
    if isinstance(image, (str, Path)):
        return _given_path(Path(image).expanduser())
    if hasattr(image, "mean") and hasattr(image, "input_size") and hasattr(image, "to_dict"):  # timm's PretrainedCfg
        image = image.to_dict()
    if isinstance(image, Mapping):
        if "mean" in image and "std" in image:
            return of_timm(image, "the timm configuration given")
        if any(key in image for key in _OF_A_PROCESSOR):
            return of_processor(_instance(dict(image), "the configuration given"), "given")
    image = getattr(image, "image_processor", image)  # a processor of text and images
    if callable(image) and (
        hasattr(image, "image_mean") or hasattr(image, "do_rescale") or hasattr(image, "data_config")
    ):
        return of_processor(image, "given")
    raise SourceError(
        f"image= takes an image processor of transformers, a timm configuration (with mean and std) or an ImageConfig; got "
        f"a {type(image).__name__}"
    )


def _given_path(path: Path) -> Preprocessing:
    """Read the processor in a file or a folder. Raises SourceError where there is none."""
    if path.is_file():
        return of_processor(_instance(read_json(path, _WHAT), str(path)), f"in {path.name}")
    found = read_processor(path) if path.is_dir() else None
    if found is None:
        raise SourceError(
            f"{path} holds no image processor: pass the folder with {' or '.join(PROCESSOR_FILES)}, or one of these files"
        )
    return found


def read_processor(folder: Path) -> Preprocessing | None:
    """Read the image processor that was saved beside a model, None where the folder has none.

    Raises SourceError for a file that is no processor's configuration.
    """
    for name in PROCESSOR_FILES:
        path = folder / name
        if not path.is_file():
            continue
        content = read_json(path, _WHAT)
        content = content.get("image_processor", content)  # one file for the processors of text and images
        if isinstance(content, dict) and any(key in content for key in _OF_A_PROCESSOR):
            return of_processor(_instance(content, str(path)), f"in {name}")
    return None


def _instance(content: dict[str, Any], where: str) -> Any:
    """Return the processor that a configuration describes; its bare values where this transformers has no such class."""
    import transformers

    name = str(content.get("image_processor_type") or content.get("feature_extractor_type") or "")
    name = name.replace("FeatureExtractor", "ImageProcessor")
    stem = name.removesuffix("Fast").removesuffix("Pil")
    if name == "TimmWrapperImageProcessor":
        return SimpleNamespace(data_config=content.get("data_config") or content.get("pretrained_cfg") or {})
    for known in dict.fromkeys((name, stem, f"{stem}Fast", f"{stem}Pil")):
        kind = getattr(transformers, known, None) if known else None
        if kind is None or not hasattr(kind, "from_dict"):
            continue
        try:
            return kind.from_dict(dict(content))
        except ImportError:  # a back end is not installed: another class may do without
            continue
        except Exception as error:  # a processor's constructor trips over values in its own way
            raise SourceError(f"{where} is not a {known}'s configuration: {first_line(error, typed=True)}") from error
    return SimpleNamespace(**{**content, "image_processor_type": name or "an image processor"})


def of_timm(config: Mapping[str, Any], read_from: str) -> Preprocessing:
    """Read a data configuration of timm, as ``timm.data.resolve_data_config`` or ``pretrained_cfg`` has it."""
    try:
        mean, std = (tuple(float(value) for value in config[key]) for key in ("mean", "std"))
        _, height, width = config.get("input_size") or (3, None, None)
        size = None if height is None or width is None else (int(height), int(width))
        image = ImageConfig(
            mean=mean,
            std=std,
            interpolation=_timm_filter(str(config.get("interpolation") or "bilinear")),  # type: ignore[arg-type]
            crop_pct=float(config.get("crop_pct") or IMAGENET.crop_pct),
            crop_mode=config.get("crop_mode") or "center",
        )
        msgspec.convert(msgspec.to_builtins(image), ImageConfig)  # a crop mode that is unknown here
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"{read_from} is no data configuration of timm: {first_line(error)}") from error
    return Preprocessing(image, size, read_from)


def _timm_filter(name: str) -> str:
    return "bilinear" if name == "random" else name


def of_processor(processor: Any, where: str) -> Preprocessing:
    """Read the transform of an image processor of transformers, and compare it with the processor itself on test pictures.

    ``where``: how it was found, for people: "in preprocessor_config.json".
    """
    timm_config = getattr(processor, "data_config", None)
    if isinstance(timm_config, Mapping):  # TimmWrapperImageProcessor
        return of_timm(timm_config, f"TimmWrapperImageProcessor {where}")
    name = str(getattr(processor, "image_processor_type", None) or type(processor).__name__)
    read_from = f"{name} {where}"
    try:
        first, size = _written(processor)
        largest = max(first.short_edge or 0, first.long_edge or 0, *(size or (0, 0)))
        if largest > _LARGEST_SIDE:
            raise ValueError(f"a side of {largest} pixels, at most {_LARGEST_SIDE} are taken")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise SourceError(f"{read_from} has values that are no transform: {first_line(error)}") from error
    if not callable(processor):
        note = f"this transformers has no class {name}: its transform is taken from its values and was not compared with it"
        return Preprocessing(first, size, read_from, (note,))
    return _compared(processor, name, Preprocessing(first, size, read_from))


def _written(processor: Any) -> tuple[ImageConfig, tuple[int, int] | None]:
    """Return a processor's options as an ImageConfig, and the size that it makes, None where that depends on the picture."""

    def option(name: str) -> Any:
        return getattr(processor, name, None)

    mean, std = _normalisation(processor)
    resample = option("resample")
    on_torchvision = option("backend") == "torchvision" or type(processor).__name__.endswith("Fast")
    squash = ImageConfig(
        mean=mean,
        std=std,
        channel_order="bgr" if option("do_flip_channel_order") else "rgb",
        interpolation="bilinear" if resample is None else _PIL_FILTERS[int(resample)],  # type: ignore[arg-type]
        arithmetic="torchvision" if on_torchvision else "pillow",
        crop_mode="squash",
        crop_pct=1.0,
        rounding="paddle" if option("resize_short") else "transformers",
    )
    sides = {"shortest_edge": int(option("resize_short"))} if option("resize_short") else _sides(option("size"))
    crop = _pair(option("crop_size")) if option("do_center_crop") else None
    frame = crop or (_pair(option("pad_size")) if option("do_pad") else None)
    short, long = sides.get("shortest_edge"), sides.get("longest_edge")
    if option("do_resize") is False or not sides:
        return squash, frame
    if short and not long and crop is None and option("crop_pct"):  # ConvNextImageProcessor
        if short >= _WARP_FROM:
            return squash, (short, short)
        return msgspec.structs.replace(squash, crop_mode="center", crop_pct=float(option("crop_pct"))), (short, short)
    if short and not long and crop is not None:
        return msgspec.structs.replace(squash, crop_mode="center", crop_pct=_share(min(crop), short)), crop
    if short or long:
        where = {"crop_mode": "pad"} if crop is None else {"crop_mode": "border", "fill": "black"}
        multiple = int(option("size_divisor") or 1)
        return msgspec.structs.replace(squash, **where, short_edge=short, long_edge=long, size_multiple=multiple), frame
    if "max_height" in sides:
        return msgspec.structs.replace(squash, crop_mode="pad"), frame or (sides["max_height"], sides["max_width"])
    height, width = sides["height"], sides["width"]
    share = 1.0 if crop is None else _share(crop[0], height)
    return msgspec.structs.replace(squash, crop_pct=share), crop or (height, width)


def _normalisation(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and std for pixels in 0..1, whatever a processor scales its pixels to."""
    scale = (
        float(getattr(processor, "rescale_factor", None) or 1 / 255) if getattr(processor, "do_rescale", True) else 1.0
    )
    offset = 1.0 if getattr(processor, "rescale_offset", False) else 0.0  # pixels are scaled to -1..1
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if not getattr(processor, "do_normalize", mean is not None) or mean is None or std is None:
        mean, std = [0.0] * 3, [1.0] * 3
    values = [
        [float(v) for v in ([values] * 3 if isinstance(values, (int, float)) else values)] for values in (mean, std)
    ]
    unit = 255 * scale
    if abs(unit - 1) < 1e-6:  # as given: 1/255 is not exact
        unit = 1.0
    return tuple((m + offset) / unit for m in values[0]), tuple(s / unit for s in values[1])


def _sides(size: Any) -> dict[str, int]:
    """Return a processor's ``size`` as sides by name, from all forms that releases of transformers have written."""
    if size is None:
        return {}
    if isinstance(size, int):
        return {"height": size, "width": size}
    if isinstance(size, (list, tuple)):
        return {"height": int(size[0]), "width": int(size[-1])}
    content = (
        dict(size) if isinstance(size, Mapping) else {k: v for k, v in vars(size).items() if not k.startswith("_")}
    )
    return {name: int(value) for name, value in content.items() if value is not None}


def _pair(size: Any) -> tuple[int, int] | None:
    sides = _sides(size)
    if "shortest_edge" in sides:
        return sides["shortest_edge"], sides["shortest_edge"]
    return (sides["height"], sides["width"]) if {"height", "width"} <= sides.keys() else None


def _share(crop: int, side: int) -> float:
    """Return the crop_pct with which an input of ``crop`` pixels is scaled to ``side`` exactly, in spite of rounding."""
    share = crop / side
    return share if int(crop / share) == side else float(np.nextafter(share, 0))


# ---- The comparison ---------------------------------------------------------------------------------------------------


def _compared(processor: Any, name: str, written: Preprocessing) -> Preprocessing:
    """Find the ImageConfig that gives a processor's pixels, by trying.

    Where there is none, it stays as it is written, and a note says what it leaves out.
    """
    first, size = written.config, written.size
    resizes = getattr(processor, "do_resize", None) is not False
    edge = first.short_edge or first.long_edge or min(size or (224, 224))
    pictures = [_picture(int(edge * rows), int(edge * columns), step=1 if resizes else 64) for rows, columns in _PROBES]
    try:
        theirs = [pixels_of(processor, picture) for picture in pictures]
    except Exception as error:  # a processor that asks for more than a picture trips over it in its own way
        cause = first_line(error, typed=True)
        note = f"{name} takes more than a photograph ({cause}): {USE_PROCESSOR}, its pixels were not compared"
        return dataclasses.replace(written, notes=(note,))
    padded = bool(getattr(processor, "do_pad", False)) and resizes

    def is_same(config: ImageConfig) -> bool:
        compared = False
        for picture, pixels in zip(pictures, theirs, strict=True):
            levels = difference(config, picture, pixels, size)
            if levels is not None and levels > SAME_PIXELS:
                return False
            compared = compared or levels is not None
        return compared

    same = next(filter(is_same, _variants(first, padded=padded)), None)
    config, notes, differs = same or first, [], ""
    if same is None:
        found = (difference(first, p, t, size) for p, t in zip(pictures, theirs, strict=True))
        levels = max((levels for levels in found if levels is not None), default=None)
        by = "in their size" if levels is None else f"by up to {levels:.0f} grey levels"
        differs = f"{name} transforms pictures in a way that cannot be repeated here (results differ {by})"
        notes.append(f"{differs}: {USE_PROCESSOR}")
    others = [
        f"{p.height}x{p.width} to {t.shape[1]}x{t.shape[2]}"
        for p, t in zip(pictures, theirs, strict=True)
        if not _fits(config, t.shape[1:], size)
    ]
    if not resizes:
        notes.append(f"{name} does not resize: build it for the size of your camera's frames (--size HxW)")
    elif others:
        notes.append(
            f"{name} gives every picture a size of its own ({', '.join(others)}), a bundle has one: build it for the size "
            "that it gives your camera's frames (--size HxW)"
        )
    return dataclasses.replace(written, config=config, notes=tuple(notes), differs=differs)


def _variants(first: ImageConfig, *, padded: bool) -> Iterator[ImageConfig]:
    """Yield what options do not say, as the code of processors has it.

    That is other integers, reversed channels, other sampling, other rounding, and for ``padded`` ones where the picture is.
    """
    ways = [first]
    if padded and first.crop_mode == "squash":
        ways.append(msgspec.structs.replace(first, crop_mode="border", fill="black"))
        ways.append(msgspec.structs.replace(first, crop_mode="pad"))
    for way, order, sampling, rounding, arithmetic in itertools.product(
        ways,
        (first.channel_order, "bgr" if first.channel_order == "rgb" else "rgb"),
        ("antialias", "centres", "corners"),
        (first.rounding, *(one for one in ("transformers", "transformers_pil", "paddle") if one != first.rounding)),
        (first.arithmetic, *(one for one in ("pillow", "torchvision", "float") if one != first.arithmetic)),
    ):
        yield msgspec.structs.replace(
            way, channel_order=order, sampling=sampling, rounding=rounding, arithmetic=arithmetic
        )


def _picture(rows: int, columns: int, *, step: int = 1) -> Image.Image:
    """Make a test picture with what photographs have: slopes, edges, noise, and other values in each channel.

    Its sides are multiples of ``step``.
    """
    rows, columns = max(step, rows // step * step), max(step, columns // step * step)
    random = np.random.default_rng(rows)
    down, across = np.mgrid[:rows, :columns]
    slope = np.stack([across / columns, down / rows, 1 - across / columns], axis=-1)
    stripes = ((down // 9 + across // 13) % 2)[..., None] * np.array([0.3, 0.15, 0.2])
    noise = random.normal(0, 0.05, (rows, columns, 3))
    return Image.fromarray(np.clip(255 * (0.7 * slope + stripes + noise), 0, 255).astype(np.uint8))


def pixels_of(processor: Any, picture: Image.Image) -> np.ndarray:
    """Run a processor on one picture: float32 (channels, rows, columns). Raises ValueError for pixels of another form."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # "resample was ignored" and the like
    try:
        values = processor(images=picture, return_tensors="pt")["pixel_values"]
    finally:
        logging.disable(before)
    array = np.asarray(values[0] if isinstance(values, (list, tuple)) else values, np.float32)
    while array.ndim > 3:
        array = array[0]
    if array.ndim != 3:
        raise ValueError(f"pixel_values of shape {array.shape}")
    return array


def difference(
    config: ImageConfig, picture: Image.Image, pixels: np.ndarray, size: tuple[int, int] | None
) -> float | None:
    """Return the largest difference, in grey levels, between a processor's pixels and ours for the same picture.

    ``pixels``: float (channels, rows, columns). ``size``: (height, width) of the network's input, None for one as large as
    ``pixels``; pixels that are smaller than it are compared where the picture is. Returns None where they cannot be compared,
    because the processor has made another size.
    """
    made = pixels.shape[1:]
    if config.crop_mode == "squash" and config.crop_pct == 1:
        size = made  # a bundle for this size does the same
    elif not _fits(config, made, size):
        return None
    height, width = size or made
    frame = fit(picture, config, height, width)
    channels = len(config.mean)
    axes = ShapeRange.fixed(1), ShapeRange.fixed(height), ShapeRange.fixed(width)
    spec = InputSpec(name="image", channels=channels, batch=axes[0], height=axes[1], width=axes[2])
    ours = network_input(frame[None], config, spec)[0, :, : made[0], : made[1]]
    std = np.array(config.std[::-1] if config.channel_order == "bgr" else config.std, np.float32)
    return float(np.abs((ours - pixels) * (255 * std)[:, None, None]).max())


def _fits(config: ImageConfig, made: tuple[int, ...], size: tuple[int, int] | None) -> bool:
    """Return whether a network's input of ``size`` holds what a processor has ``made``: (rows, columns)."""
    if size is None:
        return config.crop_mode == "pad"
    return made == size or (config.crop_mode == "pad" and made[0] <= size[0] and made[1] <= size[1])
