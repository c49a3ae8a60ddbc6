"""manifest.json: strict, versioned, tamper-evident, and readable by other languages through its schema."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from build_scripts.write_schema import schema_text
from edge_backbones import parity_report
from edge_backbones.bundle import manifest
from edge_backbones.errors import ManifestError
from edge_backbones.spec import FrameSpec, InputSpec

GOLDEN = Path(__file__).parents[2] / "golden" / "manifest.v6.json"
WITH_FORMATS = GOLDEN.with_name("manifest.v7.json")
WITH_FRAMES = GOLDEN.with_name("manifest.v8.json")
SCHEMA = Path(manifest.__file__).with_name("manifest.schema.json")


@pytest.fixture(scope="module")
def document() -> dict:
    return json.loads(GOLDEN.read_bytes())


def with_digest(document: dict) -> bytes:
    """The document as a writer that means it would store it."""
    parsed = msgspec.convert({**document, "digest": ""}, manifest.Manifest)
    return manifest.encode(parsed)


def test_golden_manifest_is_read_and_written_to_the_same_bytes():
    data = WITH_FRAMES.read_bytes()
    assert manifest.encode(manifest.decode(data)) == data


def test_a_manifest_of_the_version_before_is_read_and_knows_no_frames():
    before, now = (manifest.decode(path.read_bytes()) for path in (WITH_FORMATS, WITH_FRAMES))
    assert (before.schema_version, before.input.frame) == (7, None)
    assert now.input == InputSpec(
        name="frame",
        channels=3,
        batch=before.input.batch,
        height=before.input.height,
        width=before.input.width,
        frame=FrameSpec(height=1080, width=1920, color="nv12", matrix="bt709"),
    )


def test_a_manifest_of_the_first_version_that_is_read_is_written_as_the_newest():
    old, new = (manifest.decode(path.read_bytes()) for path in (GOLDEN, WITH_FORMATS))
    assert (old.schema_version, old.backbone.map_dtype, old.backbone.channels_last) == (6, "float32", False)
    assert (new.schema_version, new.backbone.map_dtype, new.backbone.channels_last) == (7, "float16", True)
    assert (old.input.dtype, new.input.dtype) == ("float32", "float16")
    written = manifest.decode(manifest.encode(old))
    assert written.schema_version == 8
    assert msgspec.structs.replace(written, schema_version=6, digest=old.digest) == old


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5])
def test_a_manifest_of_an_older_version_is_refused_with_the_way_out(version):
    with pytest.raises(
        ManifestError, match=f"schema_version {version}, this release reads 6 to 8: build the bundle again"
    ):
        manifest.decode(GOLDEN.with_name(f"manifest.v{version}.json").read_bytes())


def test_schema_file_is_up_to_date():
    assert SCHEMA.read_text(encoding="utf-8") == schema_text(), "run: make schema"


@pytest.mark.parametrize("path", [GOLDEN, WITH_FORMATS, WITH_FRAMES], ids=lambda path: path.stem)
def test_golden_manifest_satisfies_the_schema(path):
    jsonschema.validate(json.loads(path.read_bytes()), json.loads(SCHEMA.read_bytes()))


@pytest.mark.parametrize("level", ["", "backbone", "input", "golden"])
def test_unknown_keys_are_refused_by_name(document, level):
    changed = json.loads(json.dumps(document))
    (changed[level] if level else changed)["surprise"] = 1
    with pytest.raises(ManifestError, match="surprise"):
        manifest.decode(json.dumps(changed).encode())
    with pytest.raises(jsonschema.ValidationError, match="surprise"):
        jsonschema.validate(changed, json.loads(SCHEMA.read_bytes()))


def test_preprocessing_of_other_channels_is_refused(document):
    changed = json.loads(json.dumps(document))
    changed["image"]["mean"], changed["image"]["std"] = [0.5], [0.5]
    with pytest.raises(ManifestError, match="the input has 3 channels, and mean and std are of 1"):
        manifest.decode(json.dumps(changed).encode())


def test_missing_keys_are_refused_by_name(document):
    changed = {key: value for key, value in document.items() if key != "backbone"}
    with pytest.raises(ManifestError, match="backbone"):
        manifest.decode(json.dumps(changed).encode())


@pytest.mark.parametrize(("version", "advice"), [(9, "upgrade edge-backbones"), (0, "build the bundle again")])
def test_other_schema_versions_are_refused_with_the_way_out(document, version, advice):
    with pytest.raises(ManifestError, match=f"schema_version {version}, this release reads 6 to 8: {advice}"):
        manifest.decode(json.dumps({**document, "schema_version": version}).encode())


def test_an_edited_value_breaks_the_digest(document):
    edited = json.loads(json.dumps(document))
    edited["backbone"]["channels"][0] += 1
    with pytest.raises(ManifestError, match="digest differs"):
        manifest.decode(json.dumps(edited).encode())
    manifest.decode(with_digest(edited))


def test_an_oversized_manifest_is_refused_unread():
    with pytest.raises(ManifestError, match="more than the"):
        manifest.decode(b" " * (manifest.MAX_MANIFEST_BYTES + 1))


@given(st.binary(max_size=200))
def test_random_bytes_give_a_manifest_error(data):
    with pytest.raises(ManifestError):
        manifest.decode(data)


@given(st.data())
def test_every_flipped_byte_is_noticed(data):
    original = GOLDEN.read_bytes()
    position = data.draw(st.integers(0, len(original) - 1))
    bit = data.draw(st.integers(0, 7))
    flipped = bytearray(original)
    flipped[position] ^= 1 << bit
    with pytest.raises(ManifestError):
        manifest.decode(bytes(flipped))


def test_engine_name_says_flavour_version_architecture_feature_precision(document):
    engine = manifest.decode(GOLDEN.read_bytes()).engines[0]
    assert engine.name.startswith("openvino-2026.4.1-x86_64-avx512_vnni-int8-")
    other = msgspec.structs.replace(engine.key, cpu_features=("avx2", "avx512_vnni"))
    assert other.name != engine.name
    assert engine.key.path(b"a", ".blob") != engine.key.path(b"b", ".blob")


def test_failures_name_stage_and_figures():
    stage = parity_report.StageParity(
        stage="layer4", cosine=0.5, sqnr_db=3.21, max_abs=2.0, relative=0.7, finite=True, passed=False
    )
    broken = msgspec.structs.replace(stage, stage="layer1", finite=False)
    fine = msgspec.structs.replace(stage, stage="layer2", passed=True)
    report = parity_report.ParityReport(
        precision="int8", gate=parity_report.Gate(min_cosine=0.98), stages=(fine, broken, stage)
    )
    assert not report.passed
    assert report.failures() == (
        "layer1 has values that are not finite; layer4 has cosine 0.5000, SQNR 3.2 dB, relative error 7.00e-01, "
        "max |difference| 2"
    )
