"""The configuration file for DeepStream's nvinfer says what the manifest says, and what it cannot say is refused.

nvinfer itself is imitated by the formula of its documentation: scale * (pixel - offset), planes in the engine's order.
"""

from __future__ import annotations

import configparser
import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_backbones.bundle.manifest import USE_PROCESSOR
from edge_backbones.bundle.reader import Bundle
from edge_backbones.bundle.writer import write_manifest
from edge_backbones.cli import main as cli
from edge_backbones.errors import BundleError, EngineMismatchError, InputError, IntegrityError
from edge_backbones.images.config import ImageConfig
from edge_backbones.images.fit import to_input
from edge_backbones.integrations.deepstream import CONFIG, export_deepstream
from edge_backbones.spec import FrameSpec, ShapeRange
from edge_backbones.testing import make_bundle, pooling_input
from tests.plans import PLAN, with_plan

HALF = ImageConfig(mean=(0.5, 0.45, 0.4), std=(0.25,) * 3, crop_mode="squash", crop_pct=1.0, interpolation="bilinear")
IMAGENET = ImageConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def changed(bundle: Bundle, **fields: Any) -> Bundle:
    write_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, **fields))
    return Bundle.open(bundle.path)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle of a network that nvinfer can prepare frames for, with a plan."""
    made = make_bundle(tmp_path / "net.bundle", pooling_input(ShapeRange(min=1, opt=2, max=4)))
    return with_plan(changed(made, image=HALF))


def properties(folder: Path) -> dict[str, str]:
    """What the file says, read by Python's own parser."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string((folder / CONFIG).read_text(encoding="utf-8"))
    assert parser.sections() == ["property"]
    return dict(parser["property"])


def as_nvinfer(said: dict[str, str], image: np.ndarray) -> np.ndarray:
    """Prepare an RGB image, uint8 (height, width, channels), of the network's size as nvinfer does; float32 CHW."""
    offsets = np.array([float(value) for value in said["offsets"].split(";")], np.float32)
    in_order = image[..., ::-1] if said["model-color-format"] == "1" else image
    assert image.shape[2] == (1 if said["model-color-format"] == "2" else 3)
    values = np.float32(said["net-scale-factor"]) * (in_order.astype(np.float32) - offsets)
    return values.transpose(2, 0, 1)


def test_the_file_says_what_the_manifest_says(bundle, tmp_path):
    written = export_deepstream(bundle.path, tmp_path / "out")
    said, manifest = properties(tmp_path / "out"), bundle.manifest
    assert written.config == tmp_path / "out" / CONFIG
    assert written.plan.read_bytes() == PLAN
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([CONFIG, written.plan.name])
    assert said["model-engine-file"] == written.plan.name
    assert said["infer-dims"] == f"3;{manifest.input.height.opt};{manifest.input.width.opt}"
    assert said["batch-size"] == str(manifest.input.batch.max)
    assert said["output-blob-names"].split(";") == list(manifest.backbone.outputs)
    assert (said["network-type"], said["output-tensor-meta"]) == ("100", "1")
    assert (said["process-mode"], said["gie-unique-id"], said["network-mode"]) == ("1", "1", "2")
    assert (said["maintain-aspect-ratio"], said["symmetric-padding"], said["scaling-filter"]) == ("0", "0", "1")
    comments = [line for line in written.config.read_text().splitlines() if line.startswith("#")]
    assert any("TensorRT 10.3.0 for Orin" in line for line in comments)
    assert [f"# {note}" for note in written.notes] == comments[-len(written.notes) :]


@pytest.mark.parametrize("channel_order", ["rgb", "bgr"])
def test_pixels_are_normalised_as_the_network_wants_them(bundle, tmp_path, channel_order):
    image = msgspec.structs.replace(HALF, channel_order=channel_order)
    bundle = changed(bundle, image=image)
    export_deepstream(bundle.path, tmp_path / "out")
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    expected = to_input(picture[None], image, bundle.manifest.input)[0]
    np.testing.assert_allclose(as_nvinfer(properties(tmp_path / "out"), picture), expected, atol=1e-5)


def test_a_network_for_grey_pictures_gets_one_channel(bundle, tmp_path):
    image = ImageConfig(mean=(0.3,), std=(0.2,), crop_mode="squash", crop_pct=1.0)
    bundle = changed(bundle, image=image, input=msgspec.structs.replace(bundle.manifest.input, channels=1))
    export_deepstream(bundle.path, tmp_path / "out")
    said = properties(tmp_path / "out")
    assert (said["model-color-format"], said["infer-dims"]) == ("2", "1;32;48")
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 1), np.uint8)
    expected = to_input(picture[None], image, bundle.manifest.input)[0]
    np.testing.assert_allclose(as_nvinfer(said, picture), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("precision", "mode"), [("fp32", "0"), ("int8", "1"), ("fp16", "2"), ("bf16", "2"), ("fp8", "2")]
)
def test_the_precision_is_the_plans(bundle, tmp_path, precision, mode):
    bundle = with_plan(changed(bundle, engines=()), precision=precision)
    export_deepstream(bundle.path, tmp_path / "out")
    assert properties(tmp_path / "out")["network-mode"] == mode


@pytest.mark.parametrize(
    ("mode", "said"), [("squash", ("0", "0")), ("center", ("0", "0")), ("pad", ("1", "0")), ("border", ("1", "1"))]
)
def test_the_shape_of_a_picture_is_kept_where_the_network_keeps_it(bundle, tmp_path, mode, said):
    bundle = changed(bundle, image=msgspec.structs.replace(HALF, crop_mode=mode))
    written = export_deepstream(bundle.path, tmp_path / "out")
    found = properties(tmp_path / "out")
    assert (found["maintain-aspect-ratio"], found["symmetric-padding"]) == said
    notes = " ".join(written.notes)
    assert ("src-crop=LEFT:TOP:WIDTH:HEIGHT" in notes) == (mode == "center")
    assert ("nvinfer pads with black, and the network with 128/115/102" in notes) == (mode in ("pad", "border"))


def test_what_else_differs_is_in_the_notes(bundle, tmp_path):
    image = msgspec.structs.replace(HALF, crop_mode="pad", fill="black", short_edge=800, long_edge=1333)
    batches = msgspec.structs.replace(bundle.manifest.input, batch=ShapeRange(min=2, opt=2, max=4))
    backbone = msgspec.structs.replace(bundle.manifest.backbone, channels_last=True)
    written = export_deepstream(changed(bundle, image=image, input=batches, backbone=backbone).path, tmp_path / "out")
    notes = " ".join(written.notes)
    assert "edges of its own" in notes
    assert "takes batches of 2..4, and nvinfer may have fewer" in notes
    assert "channels last: pool4 NHWC, pool8 NHWC" in notes
    assert "pads with black, and the network" not in notes
    cropped = changed(bundle, image=msgspec.structs.replace(HALF, crop_pct=0.9))
    assert "cut the centre out" in " ".join(export_deepstream(cropped.path, tmp_path / "cropped").notes)
    assert len(export_deepstream(changed(bundle, image=HALF).path, tmp_path / "plain").notes) == 2


def test_the_first_profile_is_what_nvinfer_runs(bundle, tmp_path):
    profiles = (((1, 3, 32, 48), (2, 3, 64, 96), (8, 3, 128, 192)), ((16, 3, 32, 48),) * 3)
    bundle = with_plan(changed(bundle, engines=()), profiles=profiles, dla_core=1)
    export_deepstream(bundle.path, tmp_path / "out", unique_id=7)
    said = properties(tmp_path / "out")
    assert (said["batch-size"], said["infer-dims"], said["gie-unique-id"]) == ("8", "3;64;96", "7")
    assert (said["enable-dla"], said["use-dla-core"]) == ("1", "1")


def test_different_standard_deviations_are_refused_or_their_mean_is_used(bundle, tmp_path):
    bundle = changed(bundle, image=IMAGENET)
    with pytest.raises(
        InputError, match=r"\(0\.229 0\.224 0\.225\).*one factor for all: pass --one-std .*0\.226.*1\.3 %"
    ):
        export_deepstream(bundle.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    written = export_deepstream(bundle.path, tmp_path / "out", one_std=True)
    said = properties(tmp_path / "out")
    assert float(said["net-scale-factor"]) == pytest.approx(1 / (255 * 0.226))
    assert "0.229 0.224 0.225 became 0.226): the contrast of a channel is up to 1.3 % off" in " ".join(written.notes)
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    expected = to_input(picture[None], IMAGENET, bundle.manifest.input)[0]
    ratio = as_nvinfer(said, picture) / expected
    np.testing.assert_allclose(
        ratio, np.broadcast_to(np.array(IMAGENET.std)[:, None, None] / 0.226, ratio.shape), rtol=1e-4
    )


FRAME = FrameSpec(height=90, width=120, color="nv12")


@pytest.mark.parametrize(
    ("input", "said"),
    [
        ({"name": "image"}, r"takes image, uint8 NHWC \(batch, 32, 48, 3\), and nvinfer .*--input pixel_values"),
        ({"name": "frame", "frame": FRAME}, r"takes frame, .*nvinfer writes float32 NCHW"),
        ({"pixel_dtype": "float16"}, r"takes pixel_values, float16 NCHW.*--pixels float32"),
    ],
)  # fmt: skip
def test_an_input_that_nvinfer_cannot_fill_is_refused(bundle, tmp_path, input, said):
    bundle = changed(bundle, input=msgspec.structs.replace(bundle.manifest.input, **input))
    with pytest.raises(InputError, match=said):
        export_deepstream(bundle.path, tmp_path / "out")


def test_a_network_of_more_channels_or_a_processor_of_its_own_is_refused(bundle, tmp_path):
    image = ImageConfig(mean=(0.5,) * 4, std=(0.5,) * 4)
    four = changed(bundle, image=image, input=msgspec.structs.replace(bundle.manifest.input, channels=4))
    with pytest.raises(InputError, match=r"takes 4 channels, and nvinfer gives 1 \(grey\) or 3"):
        export_deepstream(four.path, tmp_path / "out")
    note = f"Its processor cuts tiles: {USE_PROCESSOR}"
    source = msgspec.structs.replace(bundle.manifest.source, preprocessing_notes=(note,))
    with pytest.raises(InputError, match=r"cuts tiles.*Gst-nvdspreprocess"):
        export_deepstream(changed(four, image=HALF, input=bundle.manifest.input, source=source).path, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"flavour": "tensorrt_rtx"}, "is of tensorrt_rtx, and nvinfer loads plans of TensorRT itself"),
        ({"stripped": True}, r"has no weights, and nvinfer puts none in"),
        ({"host_code": True, "version_compatible": True}, "carries a runtime, which nvinfer does not allow"),
    ],
)
def test_a_plan_that_nvinfer_cannot_load_is_refused(bundle, tmp_path, options, said):
    bundle = with_plan(changed(bundle, engines=()), **options)
    with pytest.raises(EngineMismatchError, match=f"{said}.*edge-backbones compile .* --flavour tensorrt"):
        export_deepstream(bundle.path, tmp_path / "out")


def test_an_engine_without_measured_parity_is_refused(bundle, tmp_path):
    (record,) = [engine for engine in bundle.manifest.engines if engine.key.flavour == "tensorrt"]
    unmeasured = msgspec.structs.replace(record, parity=msgspec.structs.replace(record.parity, stages=()))
    with pytest.raises(EngineMismatchError, match="has no plan for nvinfer"):
        export_deepstream(changed(bundle, engines=(unmeasured,)).path, tmp_path / "out")


def test_of_several_plans_one_is_named(bundle, tmp_path):
    bundle = with_plan(bundle, precision="int8")
    with pytest.raises(
        EngineMismatchError, match=r"has 2 plans for nvinfer: name one with --engine: tensorrt-.*, tensorrt-"
    ):
        export_deepstream(bundle.path, tmp_path / "out")
    for engine in ("int8", "tensorrt-10.3.0-sm_87-int8"):
        written = export_deepstream(bundle.path, tmp_path / "out", engine=engine, overwrite=True)
        assert "int8" in written.engine
        assert properties(tmp_path / "out")["network-mode"] == "1"
    with pytest.raises(EngineMismatchError, match="it has no such engine"):
        export_deepstream(bundle.path, tmp_path / "other", engine="fp8")
    with pytest.raises(EngineMismatchError, match=r"openvino-.*nvinfer loads plans of TensorRT"):
        export_deepstream(bundle.path, tmp_path / "other", engine="openvino")


def test_what_was_written_is_replaced_only_on_demand(bundle, tmp_path):
    export_deepstream(bundle.path, tmp_path / "out")
    with pytest.raises(BundleError, match=r"exists: choose another folder or pass --overwrite"):
        export_deepstream(bundle.path, tmp_path / "out")
    export_deepstream(bundle.path, tmp_path / "out", unique_id=2, overwrite=True)
    assert properties(tmp_path / "out")["gie-unique-id"] == "2"
    config = tmp_path / "own" / CONFIG
    config.parent.mkdir()
    config.write_text("[property]\n# by hand\n")
    with pytest.raises(BundleError, match="was not written by export-deepstream and stays as it is"):
        export_deepstream(bundle.path, config.parent, overwrite=True)
    assert [path.name for path in config.parent.iterdir()] == [CONFIG]
    assert config.read_text() == "[property]\n# by hand\n"
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="is a file: choose the name of a folder"):
        export_deepstream(bundle.path, tmp_path / "file")
    with pytest.raises(InputError, match="is the bundle itself or inside it"):
        export_deepstream(bundle.path, bundle.path / "deepstream")
    with pytest.raises(InputError, match="unique_id is 0 or more, got -1"):
        export_deepstream(bundle.path, tmp_path / "out", unique_id=-1)


def test_a_damaged_plan_is_not_copied(bundle, tmp_path):
    (record,) = [engine for engine in bundle.manifest.engines if engine.key.flavour == "tensorrt"]
    (bundle.path / record.file.path).write_bytes(PLAN[::-1])
    with pytest.raises(IntegrityError):
        export_deepstream(bundle.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_of_strangers_stay_in_their_line(bundle, tmp_path):
    (record,) = [engine for engine in bundle.manifest.engines if engine.key.flavour == "tensorrt"]
    strange = bundle.path.with_name("net\n[property]\nmodel-engine-file=other.bundle")
    bundle.path.rename(strange)
    export_deepstream(strange, tmp_path / "out")
    assert properties(tmp_path / "out")["model-engine-file"] == Path(record.file.path).name


def test_the_command_prints_what_was_written_and_the_notes(bundle, tmp_path, capsys):
    assert cli._run(["export-deepstream", str(bundle.path), str(tmp_path / "out"), "--unique-id", "3"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"wrote {tmp_path / 'out' / CONFIG} and tensorrt-10.3.0-sm_87-fp16")
    assert "The plan is of TensorRT 10.3.0 for Orin" in printed.err
    assert properties(tmp_path / "out")["gie-unique-id"] == "3"
    assert cli._run(["export-deepstream", str(bundle.path), str(tmp_path / "out"), "--overwrite", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert hashlib.sha256(Path(said["plan"]).read_bytes()).digest() == hashlib.sha256(PLAN).digest()
    assert len(said["notes"]) == 2
    assert cli._run(["export-deepstream", str(bundle.path), str(tmp_path / "out")]) == 1
    assert "pass --overwrite" in capsys.readouterr().err
