"""Every kind of image file is read as other tools read it, or refused with the true reason and a fix that works."""

from __future__ import annotations

import io
import os
import re
import struct
import sys
import types
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edge_backbones.errors import InputError
from edge_backbones.images import decode as image_files
from edge_backbones.images.decode import IMAGE_SUFFIXES, decode, grouped, list_images, open_image, why_no_images

SAVED = (
    ".jpg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".tif", ".bmp", ".gif", ".avif", ".jp2", ".ppm", ".qoi", ".tga"
)  # fmt: skip


@pytest.fixture
def pixels(photographs) -> np.ndarray:
    return photographs[0][:60, :90]


def write_png(path: Path, samples: np.ndarray, colour_type: int) -> None:
    """A PNG of 16 bits per channel, which Pillow reads and does not write in colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows, columns = samples.shape[:2]
    header = struct.pack(">IIBBBBB", columns, rows, 16, colour_type, 0, 0, 0)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    )


# ---- formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SAVED)
def test_every_format_is_read_and_a_truncated_one_refused(tmp_path, pixels, suffix):
    path = tmp_path / f"x{suffix.upper()}"
    Image.fromarray(pixels).save(path)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    assert list_images(tmp_path) == [path]
    np.testing.assert_array_equal(np.asarray(open_image(path)), expected)
    content = path.read_bytes()
    for part in (20, len(content) // 2, len(content) * 19 // 20):
        path.write_bytes(content[:part])
        with pytest.raises(InputError, match=r"does not decode as an image: (?!.*<_io)"):
            open_image(path)


def test_the_suffixes_are_all_that_pillow_knows_for_these_formats():
    Image.init()
    known = {suffix for suffix, name in Image.registered_extensions().items() if name in (*image_files._FORMATS, "MPO")}
    assert known <= IMAGE_SUFFIXES
    for suffix in IMAGE_SUFFIXES & Image.registered_extensions().keys():
        assert Image.registered_extensions()[suffix] in (*image_files._FORMATS, "MPO")


@pytest.mark.parametrize("kind", ["eps", "ico", "psd-like", "pdf"])
def test_other_loaders_of_pillow_never_see_a_file(tmp_path, pixels, kind):
    content = io.BytesIO()
    if kind == "psd-like":
        content.write(b"8BPS\0\1" + bytes(40))
    else:
        Image.fromarray(pixels).save(content, kind)
    path = tmp_path / "photo.jpg"
    path.write_bytes(content.getvalue())
    with pytest.raises(InputError, match="no format that is read here does") as refused:
        open_image(path)
    assert repr(content.getvalue()[:16]) in str(refused.value)


def test_the_content_counts_not_the_suffix(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "x.png")
    np.testing.assert_array_equal(np.asarray(open_image((tmp_path / "x.png").rename(tmp_path / "x.jpg"))), pixels)
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path, "tga")  # a format without a signature: its suffix alone tells
    with pytest.raises(InputError, match="does not decode as an image: it begins with"):
        open_image(path)


@pytest.mark.parametrize("name", ["photo.heic", "renamed.jpg"])
def test_heic_is_refused_with_the_package_that_reads_it(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(InputError, match=f"{name} is a HEIC image, .* pip install pillow-heif$"):
        open_image(tmp_path / name)


def test_heic_is_read_once_the_package_is_there(tmp_path, monkeypatch, pixels):
    """A stand-in for pillow-heif: what it registers reads the file."""

    def opener(file, name):
        return Image.open(io.BytesIO(file.read()[24:]), formats=["PNG"])

    def register_heif_opener() -> None:
        Image.register_open("HEIF", opener, lambda start: start[4:12] == b"ftypheic")

    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register_heif_opener))
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "png")
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + content.getvalue())
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "x.heic")), pixels)


def test_avif_is_refused_with_the_pillow_that_reads_it(tmp_path, monkeypatch):
    Image.init()
    monkeypatch.setattr(Image, "OPEN", {name: loader for name, loader in Image.OPEN.items() if name != "AVIF"})
    (tmp_path / "x.avif").write_bytes(b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(100))
    with pytest.raises(InputError, match=r"x\.avif is an AVIF image, .* pip install 'Pillow>=11\.3'$"):
        open_image(tmp_path / "x.avif")


# ---- pixels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "name"),
    [("I;16", "x.png"), ("I;16", "x.tif"), ("I;16B", "x.tif"), ("I", "x.tif"), ("F", "x.tif"), ("I;16", "x.jp2")],
)
def test_more_than_8_bits_of_grey_are_refused_and_the_fix_works(tmp_path, mode, name):
    values = np.random.default_rng(0).integers(500, 40_000, (30, 50))
    dtype = {"I": np.int32, "F": np.float32, "I;16B": ">u2"}.get(mode, np.uint16)
    Image.fromarray(values.astype(dtype)).save(tmp_path / name)
    with pytest.raises(InputError, match=r"has pixels of more than 8 bits \(mode (I|F)") as refused:
        open_image(tmp_path / name)
    (code,) = re.findall(r"save (.*) instead", str(refused.value))
    with Image.open(tmp_path / name) as image:
        scaled = eval(code, {"np": np, "pixels": np.asarray(image), "low": 1000, "high": 30_000})
    Image.fromarray(scaled).save(tmp_path / "fixed.png")
    expected = np.clip((values - 1000) / 29_000 * 255, 0, 255)
    assert np.abs(np.asarray(open_image(tmp_path / "fixed.png", 1)) - expected).max() <= 1


@pytest.mark.parametrize("channels", [3, 4])
def test_16_bits_of_colour_keep_the_upper_8(tmp_path, channels):
    samples = np.random.default_rng(0).integers(0, 65536, (20, 30, channels)).astype(np.uint16)
    write_png(tmp_path / "x.png", samples, {3: 2, 4: 6}[channels])
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "x.png")), samples[..., :3] >> 8)


def test_the_colour_stored_behind_transparency_counts(tmp_path, pixels):
    """As timm and transformers read files."""
    alpha = np.random.default_rng(0).integers(0, 2, (*pixels.shape[:2], 1), dtype=np.uint8) * 255
    Image.fromarray(np.concatenate([pixels, alpha], 2)).save(tmp_path / "x.png")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "x.png")), pixels)
    grey = np.concatenate([pixels[..., :1], alpha], 2)
    Image.fromarray(grey).save(tmp_path / "la.png")
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "la.png", 1)), grey[..., 0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("transparency", [bytes(range(256)), 3])
def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path, pixels, transparency, channels):
    palette = Image.fromarray(pixels).quantize(32)
    palette.save(tmp_path / "x.png", transparency=transparency)
    colours = np.array(palette.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(palette)]
    read = np.asarray(open_image(tmp_path / "x.png", channels))
    if channels == 3:
        np.testing.assert_array_equal(read, colours)
    else:
        assert np.abs(read - colours @ (0.299, 0.587, 0.114)).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_every_colour_mode_is_read(tmp_path, pixels, mode, channels):
    """Compared with the photograph itself: as far as grey, 1 bit or a palette keeps it."""
    image = Image.fromarray(pixels)
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    else:
        image = image.quantize(256) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "x.tif")
    read = np.asarray(open_image(tmp_path / "x.tif", channels)).astype(float)
    assert read.shape == (pixels.shape if channels == 3 else pixels.shape[:2])
    grey = pixels @ (0.299, 0.587, 0.114)
    keeps_colour = mode not in ("1", "L", "LA")
    wanted = pixels if channels == 3 and keeps_colour else np.repeat(grey[..., None], 3, 2) if channels == 3 else grey
    allowed = 40 if mode == "1" else 12
    assert abs(read.mean() - wanted.mean()) < allowed
    if mode != "1":
        assert np.abs(read - wanted).mean() < allowed


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".tif", ".apng", ".avif"])
def test_of_several_frames_the_first_is_read(tmp_path, suffix):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ((250, 0, 0), (0, 0, 250), (0, 250, 0))]
    frames[0].save(tmp_path / f"x{suffix}", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / f"x{suffix}") as image:
        assert image.n_frames == 3
    read = np.asarray(open_image(tmp_path / f"x{suffix}")).astype(int)
    assert np.abs(read - (250, 0, 0)).max() < 10


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg", ".avif"])
@pytest.mark.parametrize(("orientation", "corner"), [(1, (0, 0)), (3, (-1, -1)), (6, (0, -1)), (8, (-1, 0))])
def test_every_format_is_turned_upright_once(tmp_path, suffix, orientation, corner):
    """The first stored pixel is bright; EXIF says which corner of the upright picture it is."""
    stored = np.zeros((32, 48, 3), np.uint8)
    stored[:16, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    for options in ({}, {"compression": "tiff_lzw"}, {"compression": "jpeg"}) if suffix == ".tif" else ({},):
        Image.fromarray(stored).save(tmp_path / f"x{suffix}", exif=exif, **options)
        upright = np.asarray(open_image(tmp_path / f"x{suffix}"))
        assert upright.shape == ((48, 32, 3) if orientation in (6, 8) else (32, 48, 3))
        bright = {at for at in ((0, 0), (0, -1), (-1, 0), (-1, -1)) if upright[at][0] > 128}
        assert bright == {corner}


@pytest.mark.parametrize("junk", [b"XXXXXXXX", b"MM\0*\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"])
def test_exif_that_cannot_be_parsed_is_no_reason_to_refuse(tmp_path, pixels, junk):
    path, exif = tmp_path / "x.jpg", Image.Exif()
    exif[0x0112] = 1
    Image.fromarray(pixels).save(path, exif=exif)
    content = path.read_bytes()
    start = content.index(b"Exif\0\0") + 6
    path.write_bytes(content[:start] + junk + content[start + len(junk) :])
    assert open_image(path).size == (90, 60)


def test_a_panorama_is_read_and_what_pillow_refuses_has_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for columns in (10, 50, 150):
        Image.new("RGB", (columns, 15), (9, 9, 9)).save(tmp_path / f"{columns}.png")
    before = list(warnings.filters)
    assert open_image(tmp_path / "50.png").size == (50, 15)
    Image.new("RGB", (100, 15)).save(tmp_path / "100.png")
    assert open_image(tmp_path / "100.png").size == (100, 15)  # Pillow warns, which is an error here
    assert warnings.filters == before
    with pytest.raises(InputError, match=r"2250 pixels\) exceeds limit of 2000 pixels: scale it down, or set PIL"):
        open_image(tmp_path / "150.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert open_image(tmp_path / "150.png").size == (150, 15)


# ---- files that are none --------------------------------------------------------------------------------------------


def test_the_reason_is_that_of_the_file(tmp_path, monkeypatch):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("this is a text file, as many are")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to("/nowhere/photo.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    for name, reason in (
        ("empty.jpg", "does not decode as an image: it is empty"),
        (
            "text.jpg",
            "does not decode as an image: it begins with b'this is a text f', and no format that is read here does",
        ),
        ("folder.jpg", "cannot be read: Is a directory"),
        ("missing.jpg", "cannot be read: No such file or directory"),
        ("link.jpg", "cannot be read: No such file or directory (it is a link to /nowhere/photo.jpg)"),
        ("loop.jpg", f"cannot be read: Too many levels of symbolic links (it is a link to {tmp_path}/loop.jpg)"),
    ):
        with pytest.raises(InputError) as alone:
            decode(tmp_path / name, 3)
        assert str(alone.value) == reason
        with pytest.raises(InputError) as named:
            open_image(tmp_path / name)
        assert str(named.value) == f"{tmp_path / name} {reason}"

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)  # root may read everything
    with pytest.raises(InputError, match=r"empty\.jpg cannot be read: Permission denied$"):
        open_image(tmp_path / "empty.jpg")


def test_a_kind_of_tiff_that_pillow_does_not_read_is_no_unknown_format(tmp_path):
    entries = {256: 4, 257: 4, 258: 64, 259: 1, 262: 1, 273: 8, 277: 1, 278: 4, 279: 128, 339: 3}  # float64
    content = b"II*\0" + struct.pack("<I", 8 + 128) + bytes(128) + struct.pack("<H", len(entries))
    content += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items()) + bytes(4)
    (tmp_path / "depth.tif").write_bytes(content)
    with pytest.raises(InputError, match=r"a kind of TIFF that Pillow does not read \(unknown pixel mode\)"):
        open_image(tmp_path / "depth.tif")


# ---- folders --------------------------------------------------------------------------------------------------------


def relative(paths: list[Path], folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


def test_hidden_files_are_left_out(tmp_path):
    for folder in ("", ".thumbnails", "__MACOSX", ".hidden/deep"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name in ("a.jpg", "._a.jpg", ".b.png", ".thumbnails/c.jpg", "__MACOSX/._a.jpg", ".hidden/deep/d.jpg"):
        (tmp_path / name).touch()
    assert relative(list_images(tmp_path), tmp_path) == ["a.jpg"]
    assert relative(list_images(tmp_path / ".hidden"), tmp_path) == [".hidden/deep/d.jpg"]  # asked for by name


def test_links_are_followed_and_no_folder_is_read_twice(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside / "real" / "deep", outside / "more"):
        folder.mkdir(parents=True)
    for file in (inside / "1.jpg", inside / "real" / "2.jpg", inside / "real/deep/3.jpg", outside / "4.jpg"):
        file.touch()
    (outside / "more" / "5.jpg").touch()
    for link, target in (
        ("another.jpg", outside / "4.jpg"),  # a link to a file is a file
        ("a link", inside / "real"),
        ("b outside", outside),
        ("c outside again", outside),
        ("d up", tmp_path),
        ("e root", "/"),
        ("f itself", "f itself"),
        ("g broken", "/nowhere"),
        ("h broken.jpg", "/nowhere/h.jpg"),
    ):
        (inside / link).symlink_to(target)
    (outside / "more" / "back").symlink_to(outside)
    (outside / "more" / "home").symlink_to(inside)
    expected = [
        "1.jpg", "another.jpg", "b outside/4.jpg", "b outside/more/5.jpg", "h broken.jpg", "real/2.jpg", "real/deep/3.jpg",
    ]  # fmt: skip
    assert relative(list_images(inside), inside) == expected
    (tmp_path / "link to all").symlink_to(inside)
    assert relative(list_images(tmp_path / "link to all"), tmp_path / "link to all") == expected


def test_a_folder_that_may_not_be_read_is_no_silent_hole(tmp_path, monkeypatch):
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "a.jpg").touch()
    scandir = os.scandir

    def guarded(path):
        if Path(path).name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    assert relative(list_images(tmp_path), tmp_path) == ["a.jpg", "lost+found"]
    with pytest.raises(InputError, match=r"lost\+found cannot be read: "):
        open_image(tmp_path / "lost+found")


def test_a_folder_without_images_says_what_it_has(tmp_path):
    assert why_no_images(tmp_path) == f"{tmp_path} has no images: it is empty, or its files are hidden"
    for name in ("1.CR2", "2.cr2", "notes.txt", "README"):
        (tmp_path / name).touch()
    assert list_images(tmp_path) == []
    said = why_no_images(tmp_path)
    assert "has no images: of its files, 2 with .cr2, 1 with " in said
    assert ".jpg" in said


def test_a_name_that_is_not_utf8_is_shown(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg"))
    path.touch()
    with pytest.raises(InputError) as refused:
        open_image(path)
    assert str(refused.value).encode().endswith(b"caf\\udce9.jpg does not decode as an image: it is empty")


def test_reasons_are_summed_up_in_a_few_lines():
    reasons = {f"{i}.jpg": f"is truncated ({i} bytes)" for i in range(30)}
    assert grouped(reasons) == ["0.jpg is truncated (0 bytes) (and 29 more)"]
    reasons |= {f"{letter}.png": f"fails by {letter}" for letter in "abcdefg"}
    lines = grouped(reasons)
    assert lines[1:] == [*(f"{letter}.png fails by {letter}" for letter in "abc"), "4 more files have other reasons"]
    assert grouped(dict(list(reasons.items())[:34]))[-1] == "d.png fails by d"
    assert grouped({}) == []
