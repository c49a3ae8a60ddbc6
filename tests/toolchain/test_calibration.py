"""Images from everywhere they may come from, refusals, small memory; and calibration.json, which is made of them."""

from __future__ import annotations

import json
import os
import tracemalloc
import types
import zipfile
from pathlib import Path

import msgspec
import networks
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from edge_backbones.bundle.manifest import CalibrationFile
from edge_backbones.errors import CalibrationError, InputError, QuantizationError
from edge_backbones.images.decode import open_image
from edge_backbones.images.fit import fit, to_input
from edge_backbones.parity_report import Gate
from edge_backbones.progress import no_progress
from edge_backbones.spec import Precision
from edge_backbones.toolchain.artifacts import ExportedGraph
from edge_backbones.toolchain.build import BuildResult, build_bundle
from edge_backbones.toolchain.calibration import calibrate as calibrate_module
from edge_backbones.toolchain.calibration import choose, ranges
from edge_backbones.toolchain.calibration.calibrate import Feed, calibrate, check_fits
from edge_backbones.toolchain.calibration.images import ImageSet, gather_images, halves, split_golden, weighted_sample
from edge_backbones.toolchain.export import export_onnx
from edge_backbones.toolchain.options import BuildOptions
from edge_backbones.toolchain.prepare import prepare

FLOATS = networks.input_spec(48, 64)
FRAMES = networks.input_spec(48, 64, name="image")


@pytest.fixture
def gather(tmp_path: Path):
    def gathered(source, input=FLOATS, config=networks.PLAIN, **options) -> ImageSet:
        return gather_images(source, input=input, config=config, spool=tmp_path / "spool", **options)

    return gathered


@pytest.fixture
def finished() -> np.ndarray:
    """Five network inputs."""
    return np.random.default_rng(0).standard_normal((5, 3, 48, 64)).astype(np.float32)


def preprocessed(photograph: np.ndarray, input=FLOATS) -> np.ndarray:
    pixels = fit(Image.fromarray(photograph), networks.PLAIN, 48, 64)[None]
    return pixels[0] if input.name == "image" else networks.normalised(pixels)[0]


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("input", [FLOATS, FRAMES])
def test_a_folder_is_read_in_order_with_the_folders_below(gather, photograph_folder, input):
    images = gather(photograph_folder, input)
    assert images.names == (*(f"{i}.jpg" for i in (1, 2, 4, 5, 7, 8)), *(f"more/{i}.png" for i in (0, 3, 6, 9)))
    assert images.skipped == ("broken.jpg",)
    assert images.inputs.dtype == input.dtype
    for name, array in zip(images.names, images.inputs, strict=True):
        pixels = fit(open_image(photograph_folder / name), networks.PLAIN, 48, 64)
        np.testing.assert_array_equal(array, to_input(pixels[None], networks.PLAIN, input)[0])


def test_a_file_that_does_not_decode_is_skipped_and_named(gather, tmp_path, photographs):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    Image.fromarray(photographs[0]).save(folder / "good.jpg")
    (folder / "half.jpg").write_bytes((folder / "good.jpg").read_bytes()[:5000])
    (folder / "sub" / "text.jpg").write_text("this is a text file")
    (folder / "notes.txt").write_text("not even named as an image")
    images = gather(folder)
    assert images.names == ("good.jpg",)
    assert images.skipped == ("half.jpg", "sub/text.jpg")
    assert images.reasons["half.jpg"].startswith("does not decode as an image: image file is truncated")
    assert images.reasons["sub/text.jpg"].startswith("does not decode as an image: it begins with b'this is")


def test_a_folder_without_a_single_good_image_is_refused(gather, tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(CalibrationError, match="images has no images"):
        gather(tmp_path / "images")
    (tmp_path / "images" / "broken.png").touch()
    with pytest.raises(CalibrationError, match=r"none of its 1 files is read: broken\.png does .*: it is empty$"):
        gather(str(tmp_path / "images"))
    for number in range(4):
        Image.new("I;16", (50, 40)).save(tmp_path / "images" / f"thermal {number}.png")
    reason = r"thermal 0\.png has pixels of more than 8 bits \(mode I;16\), .* \(and 3 more\); broken\.png does not"
    with pytest.raises(CalibrationError, match=rf"none of its 5 files is read: {reason}"):
        gather(str(tmp_path / "images"))


def test_a_name_that_is_not_utf8_can_be_stored(gather, tmp_path, photographs):
    (tmp_path / "images").mkdir()
    Image.fromarray(photographs[0]).save(Path(os.fsdecode(os.fsencode(tmp_path) + b"/images/caf\xe9.png")))
    images = gather(tmp_path / "images")
    assert images.names == ("caf\\udce9.png",)
    assert msgspec.json.decode(msgspec.json.encode(images.names)) == list(images.names)


def test_a_path_that_is_nothing_known_is_refused(gather, tmp_path):
    with pytest.raises(CalibrationError, match=r"missing is neither a folder of images nor an \.npz"):
        gather(tmp_path / "missing")
    (tmp_path / "x.jpg").touch()
    with pytest.raises(CalibrationError, match=r"x\.jpg is not an \.npz file"):
        gather(tmp_path / "x.jpg")


def test_progress_counts_files(gather, photograph_folder):
    calls = []
    gather(photograph_folder, progress=lambda *call: calls.append(call))
    assert calls[0] == ("reading images", 0, 11)
    assert calls[-1] == ("reading images", 11, 11)


# ---- arrays ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("input", [FLOATS, FRAMES])
def test_photographs_of_any_size_are_preprocessed(gather, photographs, input):
    images = gather(iter(photographs), input)
    assert images.names == ("array 0", "array 1", "array 2", "array 3")
    for actual, photograph in zip(images.inputs, photographs, strict=True):
        np.testing.assert_allclose(actual, preprocessed(photograph, input), rtol=0, atol=1e-6)


def test_a_photograph_of_one_row_is_one(gather):
    strip = np.random.default_rng(0).integers(0, 256, (1, 300, 3), dtype=np.uint8)
    np.testing.assert_allclose(gather([strip]).inputs[0], preprocessed(strip), rtol=0, atol=1e-6)


def test_pictures_of_pillow_are_preprocessed(gather, photographs):
    pictures = [Image.fromarray(photographs[0]), Image.fromarray(photographs[1][:48, :64])]
    expected = gather([np.asarray(picture) for picture in pictures]).fingerprint
    assert gather(pictures).fingerprint == expected


def test_a_photograph_of_the_right_size_is_not_resampled(gather, photographs):
    crop = networks.crops(photographs, 1, 48, 64)
    np.testing.assert_allclose(gather(crop).inputs, networks.normalised(crop), rtol=0, atol=1e-6)


def test_grey_photographs(gather, photographs):
    grey = [np.asarray(Image.fromarray(p).convert("L"))[..., None] for p in photographs[:2]]
    config = networks.ImageConfig(mean=(0.5,), std=(0.25,))
    spec = networks.input_spec(48, 64, channels=1)
    images = gather(grey, spec, config)
    for same in ([one[..., 0] for one in grey], [Image.fromarray(one[..., 0]) for one in grey]):
        assert gather(same, spec, config).fingerprint == images.fingerprint
    expected = fit(Image.fromarray(grey[0][..., 0]), config, 48, 64)[..., 0] / 255 / 0.25 - 2
    np.testing.assert_allclose(images.inputs[0, 0], expected, rtol=0, atol=1e-6)


def test_finished_inputs_are_taken_as_they_are(gather, finished):
    batches = (batch for batch in (finished[:2], finished[2:]))
    tensors = list(torch.from_numpy(finished))
    for source in (finished, list(finished), batches, finished.astype(np.float64), tensors, finished.tolist()):
        np.testing.assert_array_equal(gather(source).inputs, finished)


def bad_arrays():
    photograph = np.zeros((40, 50, 3), np.uint8)
    yield pytest.param(photograph[..., :1], id="grey for a colour network")
    yield pytest.param(photograph.transpose(2, 0, 1), id="channels first")
    yield pytest.param(photograph[:0], id="no rows")
    yield pytest.param("photo.jpg", id="a path")
    yield pytest.param(None, id="what a camera gives that fails")
    yield pytest.param(photograph[..., 0], id="without a channel axis")
    yield pytest.param(photograph.astype(np.int64), id="integers that are not bytes")
    yield pytest.param(photograph.astype(np.float32), id="pictures in floats")
    yield pytest.param(np.zeros((3, 48, 65), np.float32), id="another size")
    yield pytest.param(np.zeros((1, 1, 3, 48, 64), np.float32), id="five axes")
    yield pytest.param(np.zeros((3, 48, 64), np.complex64), id="complex numbers")
    yield pytest.param(np.array(["a"]), id="text")
    yield pytest.param(np.float32(1), id="a number")


@pytest.mark.parametrize("array", list(bad_arrays()))
def test_an_array_that_is_no_image_is_refused(gather, finished, array):
    """In the words of `fit`, and with what else is taken here."""
    with pytest.raises(InputError) as by_fit:
        fit(array, networks.PLAIN, 48, 64)
    with pytest.raises(CalibrationError) as refused:
        gather([finished[0], array])
    assert str(refused.value) == f"array 1: {by_fit.value}; or pass network inputs, float32 (3, 48, 64)"


def test_what_numpy_makes_no_array_of_is_refused(gather, finished):
    with pytest.raises(CalibrationError, match=r"array 1: numpy makes no array of this list: .*inhomogeneous"):
        gather([finished[0], [[1, 2], [3]]])
    with pytest.raises(CalibrationError, match=r"array 0: .* no array of this Tensor: .*tensor\.detach\(\)"):
        gather([torch.zeros(3, 48, 64, requires_grad=True)])
    with pytest.raises(CalibrationError, match=r'got mode P: pass picture\.convert\("RGB"\); or pass network inputs'):
        gather([Image.new("P", (64, 48))])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_refused(gather, finished, bad):
    finished[3, 1, 2, 3] = bad
    with pytest.raises(CalibrationError, match="array 3 has values that are not finite"):
        gather(finished)


def test_finished_inputs_are_no_camera_frames(gather, finished):
    with pytest.raises(
        CalibrationError, match=r"array 0: a frame is uint8 .* got float32 \(3, 48, 64\): its values go from"
    ):
        gather(finished, FRAMES)


def test_nothing_at_all_is_refused(gather):
    with pytest.raises(CalibrationError, match="the calibration iterable has no images"):
        gather([])


def test_four_channels_come_at_full_size_or_as_finished_inputs(gather):
    input, config = networks.input_spec(48, 64, channels=4), networks.ImageConfig(mean=(0.5,) * 4, std=(0.5,) * 4)
    assert gather(np.zeros((2, 48, 64, 4), np.uint8), input, config).inputs.shape == (2, 4, 48, 64)
    with pytest.raises(CalibrationError, match="4 channels cannot be resized"):
        gather([np.zeros((50, 64, 4), np.uint8)], input, config)


# ---- .npz -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_with_finished_inputs(gather, tmp_path, finished, save):
    save(tmp_path / "x.npz", anything=finished)
    np.testing.assert_array_equal(gather(tmp_path / "x.npz").inputs, finished)


@pytest.mark.parametrize("input", [FLOATS, FRAMES])
def test_npz_with_photographs(gather, tmp_path, photographs, input):
    crops = networks.crops(photographs, 3, 90, 110)
    np.savez(tmp_path / "x.npz", crops)
    for actual, crop in zip(gather(tmp_path / "x.npz", input).inputs, crops, strict=True):
        np.testing.assert_allclose(actual, preprocessed(crop, input), rtol=0, atol=1e-6)


def test_npz_with_a_named_array_among_others(gather, tmp_path, finished):
    np.savez(tmp_path / "x.npz", labels=np.arange(5), pixel_values=finished)
    np.testing.assert_array_equal(gather(tmp_path / "x.npz").inputs, finished)


def objects(path: Path, finished: np.ndarray) -> None:
    np.savez(path, np.array([{"code": print}] * 2, dtype=object))


def column_major(path: Path, finished: np.ndarray) -> None:
    np.savez(path, np.asfortranarray(finished))


def two_arrays(path: Path, finished: np.ndarray) -> None:
    np.savez(path, a=finished, b=finished)


def one_image(path: Path, finished: np.ndarray) -> None:
    np.savez(path, finished[0])


def not_a_zip(path: Path, finished: np.ndarray) -> None:
    path.write_bytes(b"PK but not really")


def no_array(path: Path, finished: np.ndarray) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("pixel_values.npy", b"not an array")


def cut_off(path: Path, finished: np.ndarray) -> None:
    np.savez(path, finished)
    path.write_bytes(path.read_bytes()[:20_000])


def short_array(path: Path, finished: np.ndarray) -> None:
    np.savez(path.with_suffix(".whole.npz"), finished)
    with zipfile.ZipFile(path.with_suffix(".whole.npz")) as whole, zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", whole.read("arr_0.npy")[:-100])


def flipped_bits(path: Path, finished: np.ndarray) -> None:
    np.savez(path, np.zeros((5, 48, 64, 3), np.uint8))
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)


def broken_compression(path: Path, finished: np.ndarray) -> None:
    np.savez_compressed(path, np.arange(5 * 48 * 64 * 3).astype(np.uint8).reshape(5, 48, 64, 3))
    data = bytearray(path.read_bytes())
    data[150:250] = b"\xff" * 100
    path.write_bytes(data)


def encrypted(path: Path, finished: np.ndarray) -> None:
    np.savez(path, finished)
    data = bytearray(path.read_bytes())
    data[6] |= 1  # the flag of the local header, and that of the directory below
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)


def no_images(path: Path, finished: np.ndarray) -> None:
    np.savez(path, finished[:0])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (objects, "cannot be read as .npz: arrays of objects"),
        (column_major, "cannot be read as .npz: .*column-major"),
        (two_arrays, r"holds \['a.npy', 'b.npy'\]: it needs one array"),
        (one_image, r"holds an array of shape \(3, 48, 64\): its first axis must count images"),
        (not_a_zip, "cannot be read as .npz: File is not a zip"),
        (no_array, "cannot be read as .npz: the magic string"),
        (cut_off, "cannot be read as .npz"),
        (short_array, "cannot be read as .npz"),
        (flipped_bits, "cannot be read as .npz: Bad CRC"),
        (broken_compression, "cannot be read as .npz"),
        (encrypted, "cannot be read as .npz: .*encrypted"),
        (no_images, "has no images"),
    ],
)
def test_an_npz_of_something_else_is_refused(gather, tmp_path, finished, write, message):
    write(tmp_path / "x.npz", finished)
    with pytest.raises(CalibrationError, match=rf"x\.npz {message}"):
        gather(tmp_path / "x.npz")


# ---- synthetic images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("input", [FLOATS, FRAMES, networks.input_spec(47, 33)])
def test_synthetic_images_are_reproducible_and_look_like_photographs(gather, input):
    images = gather(None, input)
    first = np.array(images.inputs)
    np.testing.assert_array_equal(first, gather(None, input).inputs)
    assert len(np.unique(first.reshape(len(first), -1), axis=0)) == len(first) == 8
    pixels = first if input.name == "image" else first.transpose(0, 2, 3, 1) * networks.PLAIN.std + networks.PLAIN.mean
    pixels = pixels / (255 if input.name == "image" else 1)
    assert 0.4 < pixels.mean() < 0.6
    assert 0.1 < pixels.std() < 0.4
    neighbours = np.corrcoef(pixels[:, :, 1:].ravel(), pixels[:, :, :-1].ravel())[0, 1]
    assert neighbours > 0.6  # white noise has 0


# ---- what comes out -------------------------------------------------------------------------------------------------


def test_batches_hold_every_image_once(gather, finished):
    images = gather(finished)
    batches = list(images.batches(2, [4, 0, 3]))
    assert [len(batch) for batch in batches] == [2, 1]
    np.testing.assert_array_equal(np.concatenate(batches), finished[[4, 0, 3]])


def test_a_taken_batch_is_a_copy(gather, finished):
    images = gather(finished)
    images.take([0])[:] = 0
    np.testing.assert_array_equal(images.inputs, finished)


def test_the_fingerprint_is_that_of_the_content(gather, finished):
    prints = {gather(source).fingerprint for source in (finished, list(finished), finished.astype(np.float64))}
    assert len(prints) == 1
    finished[0, 0, 0, 0] += 1
    assert gather(finished).fingerprint not in prints


@pytest.mark.parametrize("kind", ["photographs", "finished"])
def test_memory_does_not_grow_with_the_number_of_images(gather, kind):
    random = np.random.default_rng(0)

    def stream():
        for _ in range(400):
            if kind == "photographs":
                yield random.integers(0, 256, (150, 200, 3), dtype=np.uint8)
            else:
                yield random.standard_normal((3, 48, 64), dtype=np.float32)

    tracemalloc.start()
    try:
        images = gather(stream())
        total = sum(float(batch.mean()) for batch in images.batches(8, range(400)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.isfinite(total)
    assert len(images.names) == 400
    assert images.inputs.nbytes > 14e6
    assert peak < 3e6


@given(count=st.integers(1, 500), golden=st.integers(1, 60))
def test_golden_images_are_spread_and_held_out_where_enough_are_left(count, golden):
    calibrating, chosen = split_golden(count, golden)
    assert len(chosen) == min(golden, count)
    assert chosen == sorted(set(chosen))
    assert set(chosen) | set(calibrating) <= set(range(count))
    assert chosen[0] == 0
    if len(chosen) > 1:
        assert chosen[-1] == count - 1
        steps = np.diff(chosen)
        assert steps.max() - steps.min() <= 2
    if count - len(chosen) >= len(chosen):
        assert sorted(chosen + calibrating) == list(range(count))
    else:
        assert calibrating == list(range(count))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 100])
def test_halves_share_no_image_where_there_are_enough(count):
    indices = [3 * i for i in range(count)]
    one, other = halves(indices)
    assert sorted({*one, *other}) == indices
    assert set(one).isdisjoint(other) == (count >= 8)


def test_images_that_reach_far_stand_for_themselves_and_others_for_the_rest():
    indices = list(range(100, 200))
    furthest = [150] * 5 + [199] * 4 + [101] * 3 + [7] * 9 + [120] * 2 + [130]
    weights = weighted_sample(indices, furthest, 8)
    assert len(weights) == 8
    assert sum(weights.values()) == pytest.approx(100)
    assert [index for index, weight in weights.items() if weight == 1.0] == [101, 120, 150, 199]
    rest = [index for index, weight in weights.items() if weight == 24.0]
    assert len(rest) == 4
    assert max(np.diff(rest)) < 30  # spread over all of them
    assert weighted_sample(indices, furthest, 100) == dict.fromkeys(indices, 1.0)
    assert sum(weighted_sample(indices, [], 7).values()) == pytest.approx(100)


# ---- what becomes of them -------------------------------------------------------------------------------------------

METHODS = ("max", "percentile", "entropy", "mse", "auto")
NETWORKS = {"test_resnet": (64, 96, (1, 2, 4)), "test_vit": (160, 160, (0, 1))}


@pytest.fixture(scope="module", params=NETWORKS)
def graphs(request, tmp_path_factory) -> dict[int, ExportedGraph]:
    """One network at several fixed batch sizes."""
    height, width, indices = NETWORKS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    loaded = networks.trained_like(request.param, out_indices=indices)
    inputs = {batch: networks.input_spec(height, width, batch=batch) for batch in (1, 2, 4, 8)}
    return {batch: export_onnx(prepare(loaded, one), folder / f"{batch}.onnx") for batch, one in inputs.items()}


def calibrated(graph: ExportedGraph, photographs: list[np.ndarray], work: Path, method: str) -> CalibrationFile:
    """On nine images, of which the last is the loudest."""
    height, width, batch = graph.input.height.opt, graph.input.width.opt, graph.input.batch.opt
    crops = networks.normalised(networks.crops(photographs, 9, height, width))
    crops[8] *= 3
    images = gather_images(crops, input=graph.input, config=networks.PLAIN, spool=work / "spool")
    feed = Feed(images, list(range(9)), batch, fill=True)
    options = {"percentile": 99.9, "config": networks.PLAIN, "work": work, "progress": no_progress}
    return calibrate(graph, feed, method=method, **options)[0]


@pytest.mark.parametrize("method", METHODS)
def test_calibration_does_not_depend_on_the_batch_size(graphs, photographs, tmp_path, method):
    found = [calibrated(graph, photographs, tmp_path, method) for graph in graphs.values()]
    for one in found[1:]:
        assert msgspec.structs.replace(one, network_sha256=found[0].network_sha256) == found[0]  # to the last bit


def test_the_same_images_give_the_same_bytes(graphs, photographs, tmp_path):
    first, second = (msgspec.json.encode(calibrated(graphs[4], photographs, tmp_path, "auto")) for _ in range(2))
    assert first == second


def test_another_percentile_is_refused_where_ranges_may_depend_on_it(graphs, photographs, tmp_path):
    found = calibrated(graphs[1], photographs, tmp_path, "auto")

    def check(percentile: float | None) -> None:
        check_fits(found, graph=graphs[1], config=networks.PLAIN, images=None, method=None, percentile=percentile)

    check(None)
    check(99.9)
    with pytest.raises(CalibrationError, match=r"percentile is 99\.9 there and 99\.5 here; calibrate again"):
        check(99.5)


def test_what_some_images_showed_is_judged_on_others(graphs, photographs, tmp_path, monkeypatch):
    """Equalisation, ranges and biases alike: a choice that is judged on its own images always looks good."""
    graph = graphs[4]
    height, width = graph.input.height.opt, graph.input.width.opt
    crops = networks.normalised(networks.crops(photographs, 9, height, width))
    numbers = {image.tobytes(): number for number, image in enumerate(crops)}
    counted: dict[int, set[int]] = {}
    judged: list[tuple[str, set[int], set[int]]] = []

    def of(batches) -> set[int]:
        return {numbers[np.ascontiguousarray(image).tobytes()] for batch in batches for image in batch}

    def meant(samples) -> set[int]:
        return of([sample.images[sample.weights > 0] for sample in samples])

    def collect(path, tensors, batches, **options):
        batches = list(batches)
        found = ranges.collect_magnitudes(path, tensors, batches, **options)
        counted[id(found)] = of(batches)
        return found

    def factors(graph, batches, held_out, **options):
        judged.append(("factors", of(batches), meant(held_out)))
        return choose.choose_factors(graph, batches, held_out, **options)

    def estimators(graph, folds, **options):
        judged.extend(("ranges", counted[id(fold.magnitudes)], meant(fold.held_out)) for fold in folds)
        return choose.choose_ranges(graph, folds, **options)

    def biases(graph, found, batches, held_out, **options):
        judged.append(("biases", of(batches), meant(held_out)))
        return choose.correct_biases(graph, found, batches, held_out, **options)

    spied = {"choose_factors": factors, "choose_ranges": estimators, "correct_biases": biases}
    monkeypatch.setattr(calibrate_module, "choose", types.SimpleNamespace(**{**vars(choose), **spied}))
    monkeypatch.setattr(
        calibrate_module, "ranges", types.SimpleNamespace(**{**vars(ranges), "collect_magnitudes": collect})
    )
    images = gather_images(crops, input=graph.input, config=networks.PLAIN, spool=tmp_path / "spool")
    feed = Feed(images, list(range(9)), graph.input.batch.opt, fill=True)
    steps: dict[str, tuple[int, int | None]] = {}

    def progress(step, done, total):
        steps[step] = done, total

    options = {"percentile": 99.9, "config": networks.PLAIN, "work": tmp_path, "progress": progress}
    calibrate(graph, feed, method="auto", **options)
    assert {"calibrating", "choosing ranges", "correcting biases"} <= steps.keys()
    assert not {step: ended for step, ended in steps.items() if ended[1] is not None and ended[0] != ended[1]}
    assert [what for what, _, _ in judged] == ["factors", "ranges", "ranges", "biases"]
    for what, showed, judges in judged:
        assert showed, what
        assert judges, what
        assert not showed & judges, what
    folds = [(showed, judges) for what, showed, judges in judged if what == "ranges"]
    assert set.union(*(showed for showed, _ in folds)) == set(range(9))
    assert set.union(*(judges for _, judges in folds)) == set(range(9))


class Small(nn.Module):
    """Three convolutions, no batch norm: nothing is learnt from the images. The first writes values of about a thousand."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.second, self.third = nn.Conv2d(3, 16, 3, stride=2), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)
        with torch.no_grad():
            for conv, scale in ((self.first, 200), (self.second, 1e-4), (self.third, 0.1)):
                conv.weight.copy_(scale * torch.randn(conv.weight.shape, generator=generator))
                conv.bias.normal_(0, 0.1, generator=generator)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.third(torch.relu(self.second(torch.relu(self.first(x))))),)


def built(target: Path, images: np.ndarray | None, **options) -> BuildResult:
    precisions = options.get("precisions", (Precision.INT8,))
    options = {
        "cache": None,
        "torchscript": False,
        "golden": 2,
        "gates": {p: Gate(min_cosine=1e-6) for p in precisions},
        **options,
    }
    return build_bundle(networks.hand_made(Small()), target, images=images, options=BuildOptions(**options))


def calibration_of(result: BuildResult) -> CalibrationFile:
    return msgspec.json.decode((result.bundle.path / "calibration.json").read_bytes(), type=CalibrationFile)


@pytest.fixture(scope="module")
def quiet(photographs) -> np.ndarray:
    return networks.normalised(networks.crops(photographs, 24, 64, 96))


@pytest.fixture(scope="module")
def int8(quiet, tmp_path_factory) -> BuildResult:
    return built(tmp_path_factory.mktemp("int8") / "net.bundle", quiet, method="mse")


def test_int8_ranges_serve_fp8_without_images(int8, tmp_path):
    result = built(tmp_path / "fp8.bundle", None, precisions=(Precision.FP8,), calibration=int8.bundle.path)
    found = calibration_of(result)
    assert found == calibration_of(int8)
    graph = onnx.load(result.bundle.path / "graphs" / "fp8.onnx").graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    scales = {
        n.input[1].removesuffix(".scale.half"): stored[n.input[1]] for n in graph.node if n.op_type == "QuantizeLinear"
    }
    assert scales.keys() == found.largest.keys()
    for name, scale in scales.items():
        assert found.ranges[name] < found.largest[name] <= 448 * float(scale) <= 1.001 * found.largest[name]


def test_parity_on_synthetic_images_is_said(int8, quiet, tmp_path):
    said = "there were ranges but no images: parity was measured"
    again = built(tmp_path / "without.bundle", None, calibration=int8.bundle.path)
    assert [note for note in again.notes if note.startswith(said)]
    again = built(tmp_path / "with.bundle", quiet, calibration=int8.bundle.path)
    assert not [note for note in (*int8.notes, *again.notes) if note.startswith(said)]


@pytest.mark.parametrize("method", METHODS)
def test_few_images_are_said(int8, quiet, tmp_path, method):
    result = built(tmp_path / "net.bundle", quiet[:1], method=method)
    notes = " | ".join(result.notes)
    assert "only 1 images: " in notes
    assert "1 of the 1 golden images were calibrated on too" in notes
    assert not [note for note in int8.notes if "golden" in note or note.startswith("only")]


def test_golden_images_that_an_earlier_build_calibrated_on_are_said(int8, quiet, tmp_path):
    result = built(tmp_path / "net.bundle", quiet, calibration=int8.bundle.path, golden=6)
    assert any(note.startswith("4 of the 6 golden images were calibrated on too") for note in result.notes)


@pytest.fixture
def one_loud(quiet, monkeypatch) -> np.ndarray:
    """One image of 24 drives values beyond fp16; it is none of the eight that are run again and again."""
    monkeypatch.setattr("edge_backbones.toolchain.calibration.calibrate._PIXELS", 0)
    calibrating = split_golden(24, 2)[0]
    assert 13 in calibrating
    assert 13 not in weighted_sample(calibrating, (), 8)
    images = quiet.copy()
    images[13] *= 100
    return images


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.INT8])
def test_one_loud_image_is_enough_to_keep_a_tensor_in_fp32(int8, quiet, one_loud, tmp_path, precision):
    result = built(tmp_path / "loud.bundle", one_loud, precisions=(precision,))
    assert any("come near what fp16 can hold" in note for note in result.notes)
    graphs = [onnx.load(result.bundle.path / "graphs" / f"{precision}.onnx").graph]
    if precision is Precision.INT8:
        assert len(calibration_of(result).large) >= 2  # what the first convolution and its relu write
        again = built(tmp_path / "again.bundle", None, calibration=result.bundle.path)
        assert any("come near what fp16 can hold" in note for note in again.notes)
        graphs.append(onnx.load(again.bundle.path / "graphs" / "int8.onnx").graph)
    for graph in graphs:
        assert first_weight(graph) == onnx.TensorProto.FLOAT
    quiet_one = built(tmp_path / "quiet.bundle", quiet, precisions=(precision,))
    assert (
        first_weight(onnx.load(quiet_one.bundle.path / "graphs" / f"{precision}.onnx").graph)
        == onnx.TensorProto.FLOAT16
    )


def first_weight(graph: onnx.GraphProto) -> int:
    """The type that the first convolution computes in: that of its bias."""
    conv = next(node for node in graph.node if node.op_type == "Conv")
    (bias,) = (tensor for tensor in graph.initializer if tensor.name == conv.input[2])
    return bias.data_type


def test_a_calibration_of_before_the_large_tensors_were_kept_is_read(int8, one_loud, tmp_path):
    """They are looked for then, on the images that come with it."""
    content = json.loads((int8.bundle.path / "calibration.json").read_bytes())
    del content["large"]
    content["data_sha256"] = calibration_of(built(tmp_path / "loud.bundle", one_loud)).data_sha256
    (tmp_path / "calibration.json").write_text(json.dumps(content))
    result = built(tmp_path / "net.bundle", one_loud, calibration=tmp_path / "calibration.json")
    assert any("come near what fp16 can hold" in note for note in result.notes)


@pytest.mark.parametrize(
    "options",
    [{"method": "max"}, {"percentile": 99.0}, {"calibration": Path("calibration.json")}, {"exclude": ("nonsense",)}],
)
@pytest.mark.parametrize("precisions", [(Precision.FP16,), (Precision.FP32, Precision.BF16)])
def test_options_of_int8_are_refused_where_nothing_reads_them(quiet, tmp_path, options, precisions):
    (name,) = options
    advice = f"^{name} is of int8 and fp8, and {', '.join(precisions)} is what is built: leave {name} out, or add"
    with pytest.raises(InputError, match=advice):
        built(tmp_path / "x.bundle", quiet, precisions=precisions, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_percentile_is_refused_with_a_method_that_has_none():
    with pytest.raises(InputError, match=r"percentile is 99\.0, which method mse does not read"):
        BuildOptions(method="mse", percentile=99.0)
    assert BuildOptions(percentile=99.0).method is None


def test_an_exclude_pattern_that_means_nothing_is_refused_by_a_build(quiet, tmp_path):
    with pytest.raises(QuantizationError, match="exclude 'nonsense' means no layer"):
        built(tmp_path / "x.bundle", quiet, exclude=("nonsense",))
    assert list(tmp_path.iterdir()) == []
