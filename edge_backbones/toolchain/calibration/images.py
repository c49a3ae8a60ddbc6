"""The calibration set: photographs, an .npz or an iterable of arrays become network inputs in one file on disk.

Images are decoded and preprocessed once, by the network's own data config, and spooled. Every later pass (batch-norm
warming, ranges, golden samples) reads slices of that file, so memory does not grow with the number of images.
"""

from __future__ import annotations

import hashlib
import math
import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from edge_backbones.errors import CalibrationError, InputError
from edge_backbones.images.config import ImageConfig
from edge_backbones.images.decode import decode, grouped, list_images, shown, why_no_images
from edge_backbones.images.fit import image_to_input, network_input, to_input
from edge_backbones.images.frames import as_array, as_frame
from edge_backbones.progress import Progress, no_progress
from edge_backbones.reading import in_short, shortened
from edge_backbones.spec import RGB_COLORS, InputSpec

ImageSource = str | os.PathLike[str] | Iterable[np.ndarray] | None
"""A folder of images (searched recursively), an .npz file, an iterable of arrays, or None for synthetic images.

Arrays are photographs (uint8, (height, width, channels) or a batch of them, of any size: preprocessed here; pictures of
Pillow too), or finished network inputs (float32 (channels, height, width) or a batch of them). An .npz holds one array
of either kind, the first axis counting images, or names it ``pixel_values`` or ``image``. For engines that take gray, nv12 or
yuyv frames, arrays may be such frames; those of three channels are RGB, for engines that take bgr frames too.
"""

_SYNTHETIC_IMAGES = 8
_LARGEST_IMAGE = 1 << 30  # bytes of one image of an .npz: 100 megapixels as float64 RGB are twice that
FEWEST_TO_HOLD_OUT = 8


@dataclass(frozen=True)
class ImageSet:
    """Network inputs on disk.

    Args:
        inputs: a memory map of shape (images, *shape of one input).
        names: a name for each image.
        reasons: why files were skipped, by name.
        blank: names of images of one colour.
        fingerprint: SHA-256 of all inputs.
    """

    inputs: np.ndarray
    names: tuple[str, ...]
    reasons: Mapping[str, str]
    blank: tuple[str, ...]
    fingerprint: str

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.names) or not len(self.names):
            raise ValueError(f"{len(self.inputs)} inputs and {len(self.names)} names do not agree")

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the files that are not among the images."""
        return tuple(self.reasons)

    def take(self, indices: Sequence[int]) -> np.ndarray:
        """Copy these images into one batch."""
        return np.stack([np.array(self.inputs[i]) for i in indices])

    def batches(self, size: int, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Copy these images, ``size`` at a time."""
        for start in range(0, len(indices), size):
            yield self.take(indices[start : start + size])


def gather_images(
    source: ImageSource, *, input: InputSpec, config: ImageConfig, spool: Path, progress: Progress = no_progress
) -> ImageSet:
    """Read every image of ``source`` into the file ``spool``, at the input's opt size.

    Where engines take frames, these are the inputs of the network behind: each image becomes a frame, which is preprocessed
    as the graph does it. A file that does not decode is skipped; the result has its name and the reason. Raises
    CalibrationError when nothing is left, or for an array that is neither a photograph nor an input of this network.
    """
    reasons: dict[str, str] = {}
    names: list[str] = []
    blank: list[str] = []
    digest = hashlib.sha256()
    network = input.of_network
    shape = network.opt_shape[1:]
    with spool.open("wb") as file:
        for name, given, is_file in _named_images(source, input, reasons, progress):
            array = _as_input(given, name, input, config, is_file=is_file)
            if input.frame is not None:
                array = network_input(array[None], config, input)[0]
            data = np.ascontiguousarray(array, network.dtype).reshape(shape)
            digest.update(data.data)
            file.write(data.data)  # tofile() does not say why a disk takes no more
            names.append(name)
            if _is_blank(data, network):
                blank.append(name)
    if not names:
        raise CalibrationError(_why_nothing(source, reasons))
    inputs = np.memmap(spool, dtype=network.dtype, mode="r", shape=(len(names), *shape))
    return ImageSet(inputs, tuple(names), reasons, tuple(blank), digest.hexdigest())


def golden_frames(source: ImageSource, names: Sequence[str], *, input: InputSpec, config: ImageConfig) -> np.ndarray:
    """Read some images of ``source`` again, by the names that `gather_images` gave them, as frames that engines take."""
    wanted, found = set(names), {}
    for name, given, is_file in _named_images(source, input, {}, no_progress):
        if name in wanted:
            found[name] = _as_input(given, name, input, config, is_file=is_file)
        if len(found) == len(wanted):
            break
    if missing := wanted - found.keys():
        raise CalibrationError(f"{min(missing)} was there and is gone: leave the images alone while a bundle is built")
    return np.ascontiguousarray(np.stack([found[name] for name in names]))


def split_golden(count: int, golden: int) -> tuple[list[int], list[int]]:
    """Return the indices of images to calibrate on, and of golden images: parity is measured on those.

    Golden images are evenly spaced. They are not calibrated on, where at least as many are left.
    """
    golden = min(golden, count)
    chosen = sorted({round(i * (count - 1) / max(1, golden - 1)) for i in range(golden)})
    rest = [i for i in range(count) if i not in chosen]
    return (rest if len(rest) >= golden else list(range(count))), chosen


def _is_blank(image: np.ndarray, input: InputSpec) -> bool:
    axes = tuple(axis - 1 for axis in input.size_axes)  # of one image
    return bool((image.max(axis=axes) == image.min(axis=axes)).all())


def halves(indices: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return two halves of the images, to judge on one what the other shows. Too few images are both halves."""
    if len(indices) < FEWEST_TO_HOLD_OUT:
        return list(indices), list(indices)
    return list(indices[::2]), list(indices[1::2])


def weighted_sample(indices: Sequence[int], furthest: Iterable[int], count: int) -> dict[int, float]:
    """Choose at most ``count`` images; return how many images each represents, by index: a sample in two strata.

    Half of them are the images that ``furthest`` names most often. They have the largest values, which clipping changes
    most and an even sample would miss, and represent themselves. Evenly spaced others represent the rest.
    """
    if len(indices) <= count:
        return dict.fromkeys(indices, 1.0)
    known = set(indices)
    often = Counter(index for index in furthest if index in known)
    extremes = [index for index, _ in often.most_common(count // 2)]
    rest = [index for index in indices if index not in extremes]
    spaced = [rest[i * len(rest) // (count - len(extremes))] for i in range(count - len(extremes))]
    weights = {**dict.fromkeys(extremes, 1.0), **dict.fromkeys(spaced, len(rest) / len(spaced))}
    return dict(sorted(weights.items()))


def _named_images(
    source: ImageSource, input: InputSpec, reasons: dict[str, str], progress: Progress
) -> Iterator[tuple[str, object, bool]]:
    """Yield every image with a name for reports, and whether it is a decoded file. Skipped files go into ``reasons``."""
    step = "reading images"
    if source is None:
        for index, pixels in enumerate(_synthetic(input)):
            yield f"synthetic {index}", pixels, False
        return
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.is_dir():
            if input.channels not in (1, 3):
                raise CalibrationError(
                    f"image files have 1 or 3 channels, the network takes {input.channels}: pass an .npz"
                )
            files = list_images(path)
            for done, file in enumerate(files):
                progress(step, done, len(files))
                name = shown(file.relative_to(path))
                try:
                    image = decode(file, input.channels)
                except InputError as error:
                    reasons[name] = str(error)
                    continue
                yield name, image, True
            progress(step, len(files), len(files))
            return
        if not path.is_file():
            raise CalibrationError(f"{path} is neither a folder of images nor an .npz file")
        if path.suffix != ".npz":
            raise CalibrationError(f"{path} is not an .npz file: pass a folder of images or an .npz with one array")
        arrays: Iterable[np.ndarray] = _npz_rows(path)
    elif isinstance(source, np.ndarray):
        arrays = [source]
    else:
        arrays = source
    index = 0
    for given in arrays:
        try:
            array = as_array(given)
        except InputError as error:
            raise CalibrationError(f"array {index}: {error}") from error
        for one in array if array.ndim == 4 else [given]:
            progress(step, index, None)
            yield f"array {index}", one, False
            index += 1


def _as_input(given: object, name: str, input: InputSpec, config: ImageConfig, *, is_file: bool) -> np.ndarray:
    """Check one photograph or finished input, and return it as an input of the graph.

    What the caller passes at the size of the network is not resized. Files always are.
    """
    array, frame = as_array(given), input.frame
    if frame is not None and frame.color not in RGB_COLORS and array.dtype == np.uint8:
        own = array[..., None] if array.ndim == 2 else array
        if own.shape == frame.shape:
            return own
    expected, takes_floats = input.opt_shape[1:], input.name == "pixel_values"
    if takes_floats and array.dtype.kind == "f" and array.shape == expected:
        if not np.isfinite(array).all():
            raise CalibrationError(f"{name} has values that are not finite: leave it out")
        largest = float(np.abs(array).max(initial=0))
        if largest > np.finfo(input.dtype).max:
            raise CalibrationError(
                f"{name} has values up to {largest:.3g}, and the input is {input.dtype}: leave it out"
            )
        return array
    try:
        picture = as_frame(given, input.channels)
    except InputError as error:
        inputs = f"; or pass network inputs, float32 {expected}" if takes_floats else ""
        raise CalibrationError(f"{name}: {error}{inputs}") from error
    pixels = np.asarray(picture)
    if frame is None and not is_file and pixels.shape[:2] == (input.height.opt, input.width.opt):
        finished: np.ndarray = to_input(np.atleast_3d(pixels)[None], config, input)[0]
        return finished
    if input.channels not in (1, 3):
        raise CalibrationError(
            f"photographs of {input.channels} channels cannot be resized here: pass them at full size"
        )
    return image_to_input(picture, config, input)


def _npz_rows(path: Path) -> Iterator[np.ndarray]:
    """Yield the images of an .npz one by one, without holding the array in memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if name.endswith(".npy")]
            named = [name for name in members if name in ("pixel_values.npy", "image.npy")]
            if len(named or members) != 1:
                raise CalibrationError(
                    f"{path} holds {shortened(str(members), 200)}: it needs one array, or one named pixel_values or image"
                )
            with archive.open((named or members)[0]) as file:
                shape, dtype = _npy_header(file)
                if len(shape) != 4:
                    said = shortened(str(shape), 100)
                    raise CalibrationError(f"{path} holds an array of shape {said}: its first axis must count images")
                size = math.prod(shape[1:]) * dtype.itemsize
                if not 0 < size <= _LARGEST_IMAGE or min(shape) < 0:
                    raise CalibrationError(
                        f"{path} holds an array of shape {shortened(str(shape), 100)}, not of images"
                    )
                for _ in range(shape[0]):
                    yield np.frombuffer(file.read(size), dtype).reshape(shape[1:])
    except CalibrationError:
        raise
    except Exception as error:  # what zipfile, zlib and numpy's header parser raise on garbage has no common base
        raise CalibrationError(f"{path} cannot be read as .npz: {in_short(error)}") from error


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Read shape and dtype of the .npy that starts here. Raises ValueError for pickled and column-major arrays."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if fortran_order or dtype.hasobject:
        raise ValueError("arrays of objects or in column-major order are not read")
    return shape, dtype


def _synthetic(input: InputSpec) -> Iterator[np.ndarray]:
    """Yield seeded images with the 1/f spectrum of photographs, for fp32 and fp16 builds without images."""
    height, width = input.height.opt, input.width.opt
    if input.frame is not None:
        height, width = input.frame.height, input.frame.width
    random = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf
    for _ in range(_SYNTHETIC_IMAGES):
        spectrum = np.fft.rfft2(random.standard_normal((input.channels, height, width))) / frequency
        image = np.fft.irfft2(spectrum, s=(height, width))
        image = image / (3 * image.std(axis=(1, 2), keepdims=True)) + 0.5
        yield np.clip(255 * image, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def _why_nothing(source: ImageSource, reasons: Mapping[str, str]) -> str:
    if not isinstance(source, (str, os.PathLike)):
        return "the calibration iterable has no images"
    if not Path(source).is_dir():
        return f"{source} has no images"
    if not reasons:
        return why_no_images(Path(source))
    return f"{shown(Path(source))}: none of its {len(reasons)} files is read: {'; '.join(grouped(reasons))}"
