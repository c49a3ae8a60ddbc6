"""Find the image files in a folder, and decode them to 8-bit pixels or refuse them with the reason.

A file is read as timm and transformers read it for training: Pillow decodes the first frame, and ``convert`` turns it into
RGB or grey. Transparency is dropped, and the colour stored behind it is kept. Colour profiles are not applied. Of 16 bits per
colour channel the upper 8 are kept. Unlike timm, photographs are turned upright first (EXIF).
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from edge_backbones.errors import InputError, MissingDependencyError
from edge_backbones.reading import in_short

if TYPE_CHECKING:
    from PIL import Image

# Pillow's names of the formats that are read, and the suffixes of each. Loaders of PostScript, Windows metafiles and rare
# formats are not used: they have the most security holes, and some start other programs.
_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "AVIF": (".avif", ".avifs"),
    "HEIF": (".heic", ".heics", ".heif", ".heifs", ".hif"),
    "JPEG2000": (".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "QOI": (".qoi",),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
}
IMAGE_SUFFIXES = frozenset(suffix for suffixes in _FORMATS.values() for suffix in suffixes)

_BROKEN = "does not decode as an image"
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_ORIENTATION = 0x0112  # of EXIF
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip


def list_images(folder: Path) -> list[Path]:
    """List the image files under a folder by their suffix, sorted; nothing is decoded yet.

    Hidden files and folders are left out (``._photo.jpg`` of macOS is no photograph). Linked folders are searched, each
    folder once. Broken links and folders that may not be read are in the list too: `open_image` gives the reason.
    """
    return sorted(path for path in _files(folder) if path.suffix.lower() in IMAGE_SUFFIXES or path.is_dir())


def looks_like_image(path: Path) -> bool:
    """Return whether a file is an image by its suffix, or else by how it begins. Without Pillow the suffix decides."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    if not path.is_file():  # a pipe could block
        return False
    try:
        from PIL import Image
    except ImportError:
        return False
    Image.init()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN and name != "TGA"]).close()
    except Image.DecompressionBombError:
        return True
    except Exception:  # not only UnidentifiedImageError: a broken file makes loaders raise anything
        return False
    return True


def why_no_images(folder: Path) -> str:
    """Return a sentence that says what a folder holds in which `list_images` finds nothing."""
    suffixes = Counter(path.suffix.lower() or "no suffix" for path in _files(folder))
    if not suffixes:
        return f"{shown(folder)} has no images: it is empty, or its files are hidden"
    kinds = ", ".join(f"{count} with {suffix}" for suffix, count in suffixes.most_common(3))
    return f"{shown(folder)} has no images: of its files, {kinds}; these are read: {' '.join(sorted(IMAGE_SUFFIXES))}"


def open_image(path: Path, channels: int = 3) -> Image.Image:
    """Decode a file upright (EXIF) as RGB, or as grey for one channel. Raises InputError with the file and the reason."""
    try:
        return decode(path, channels)
    except InputError as error:
        raise InputError(f"{shown(path)} {error}") from error


def decode(path: Path, channels: int) -> Image.Image:
    """Decode a file like `open_image`, but raise InputError with the reason alone, to be counted over many files."""
    require_reader(channels)
    try:
        file = path.open("rb")
    except OSError as error:
        link = f" (it is a link to {path.readlink()})" if path.is_symlink() else ""
        raise InputError(f"cannot be read: {error.strerror}{link}") from error
    with file, _pillow_refusals():
        return _decoded(file, path.suffix.lower(), channels)


def decode_bytes(data: bytes | memoryview, channels: int) -> Image.Image:
    """Decode the bytes of a file like `open_image`, except those of TGA. Raises InputError with the reason."""
    require_reader(channels)
    try:
        with _pillow_refusals():
            return _decoded(io.BytesIO(data), "", channels)
    except InputError as error:
        raise InputError(f"an image of {len(data)} bytes {error}") from error


def require_reader(channels: int) -> None:
    """Raise MissingDependencyError without Pillow, and InputError for a network that no image file is for."""
    try:
        from PIL import Image  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("reading image files", "images") from error
    if channels not in (1, 3):
        raise InputError(
            f"cannot be read: image files have 1 or 3 channels, this backbone takes {channels}: pass arrays instead"
        )


def as_decoded(image: Image.Image, channels: int) -> Image.Image:
    """Return a picture of Pillow as `open_image` gives that of a file: upright (EXIF), and RGB or grey for one channel.

    Raises InputError with the reason.
    """
    try:
        with _pillow_refusals():
            return _upright(image, channels)
    except InputError as error:
        raise InputError(f"a picture of Pillow {error}") from error


@contextlib.contextmanager
def _pillow_refusals() -> Iterator[None]:
    """Turn what Pillow raises for pixels that do not decode into InputError with the reason."""
    from PIL import Image

    with warnings.catch_warnings():
        # A large picture or odd EXIF is no reason to refuse pixels that decode, even where warnings are errors.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            yield
        except InputError:
            raise
        except Image.DecompressionBombError as error:
            size = str(error).partition(",")[0]
            raise InputError(
                f"is larger than Pillow reads: {size}: scale it down, or set PIL.Image.MAX_IMAGE_PIXELS in Python"
            ) from error
        except Exception as error:  # Pillow's decoders raise whatever a broken file makes them trip over
            raise InputError(f"{_BROKEN}: {in_short(error)}") from error


def grouped(reasons: Mapping[str, str], most: int = 4) -> list[str]:
    """Sum up reasons by file name in a few lines: each reason with the first file and how many more files have it."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        group = re.sub(r"\d+", "0", reason)  # reasons that differ in numbers only are one
        groups.setdefault(group, []).append(name)
    ordered = sorted(groups.values(), key=len, reverse=True)
    most += len(ordered) == most + 1  # do not spend the last line on a single other reason
    lines = [
        f"{names[0]} {reasons[names[0]]}" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
        for names in ordered[:most]
    ]
    rest = sum(len(names) for names in ordered[most:])
    return [*lines, f"{rest} more files have other reasons"] if rest else lines


def shown(path: Path) -> str:
    r"""Return a path as text that can be printed and stored; bytes that are not UTF-8 become ``\udce9``."""
    return path.as_posix().encode("utf-8", "backslashreplace").decode()


def _files(folder: Path) -> Iterator[Path]:
    """Yield every file below a folder that is not hidden, also broken links and folders that may not be read."""
    root = Path(os.path.realpath(folder))
    waiting: list[Path] = [folder]
    linked: list[Path] = []
    seen: set[Path] = set()
    while waiting or linked:
        here = (waiting or linked).pop(0)  # links last: a folder that lies inside is then listed under its own path
        real = Path(os.path.realpath(here))
        if real in seen or (seen and root.is_relative_to(real)):
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError:
            yield here
            continue
        for entry in entries:
            path = here / entry.name
            if entry.name.startswith("."):
                continue
            if path.is_dir():
                (linked if entry.is_symlink() else waiting).append(path)
            elif path.is_file() or not path.exists():
                yield path


def _decoded(file: BinaryIO, suffix: str, channels: int) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    start = file.read(16)
    file.seek(0)
    if _brand(start) in _HEIF_BRANDS:
        _register_heif()
    Image.init()
    formats = [name for name in _FORMATS if name in Image.OPEN]
    if suffix not in _FORMATS["TGA"]:
        formats.remove("TGA")  # TGA has no signature: many other files look like one
    try:
        opened = Image.open(file, formats=formats)
    except UnidentifiedImageError:
        raise InputError(_why_unknown(file, start, formats)) from None
    with opened as image:
        return _upright(image, channels)


def _upright(image: Image.Image, channels: int) -> Image.Image:
    """Return an opened picture upright (EXIF), as RGB, or as grey for one channel."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        raise InputError(
            f"has pixels of more than 8 bits (mode {image.mode}), and only you know their range: save "
            "np.interp(pixels, (low, high), (0, 255)).astype('uint8') instead, low and high the same for all files"
        )
    image.load()
    turn = _TURNS.get(_orientation(image), "")
    colours = image.convert("RGB") if channels == 3 or image.mode == "LAB" else image
    pixels = colours.convert("RGB" if channels == 3 else "L")
    return pixels.transpose(Image.Transpose[turn]) if turn else pixels


def _orientation(image: Image.Image) -> int:
    """Return the orientation in EXIF. Pillow turns TIFF upright itself; not every release updates the EXIF then."""
    if image.format == "TIFF":
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF raises errors of many types; viewers show such a photograph as it is stored
        return 1


def _why_unknown(file: BinaryIO, start: bytes, formats: list[str]) -> str:
    """Return why Pillow does not identify a file, which its own error does not say."""
    from PIL import Image

    if not start:
        return f"{_BROKEN}: it is empty"
    if _brand(start) in _AVIF_BRANDS and "AVIF" not in Image.OPEN:
        return "is an AVIF image, which Pillow reads from 11.3 on: pip install 'Pillow>=11.3'"
    if _brand(start) in _HEIF_BRANDS and "HEIF" not in Image.OPEN:
        return "is a HEIC image, which Pillow reads with pillow-heif: pip install pillow-heif"
    for name in formats:
        factory, accepts = Image.OPEN[name]
        accepted = accepts is None or accepts(start)
        if isinstance(accepted, str):
            return f"{_BROKEN}: {accepted}"
        if accepted:
            file.seek(0)
            try:
                factory(file, "")
            except Exception as error:
                return f"{_BROKEN}: it is cut off, or a kind of {name} that Pillow does not read ({in_short(error)})"
    return f"{_BROKEN}: it begins with {start!r}, and no format that is read here does"


def _brand(start: bytes) -> bytes:
    """Return the brand of a file of the ISO base media format: ``heic``, ``avif``. Empty for other files."""
    return start[8:12] if start[4:8] == b"ftyp" else b""


def _register_heif() -> None:
    try:
        import pillow_heif
    except ModuleNotFoundError:
        return
    pillow_heif.register_heif_opener()
