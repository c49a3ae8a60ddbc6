"""Golden samples in memory and as golden.npz, and the writer of new bundles that puts them there."""

from __future__ import annotations

import io

import msgspec
import numpy as np
import pytest

from edge_backbones.bundle.golden import GoldenSamples, full_batches
from edge_backbones.bundle.manifest import SCHEMA_VERSION, Manifest
from edge_backbones.bundle.reader import Bundle, load_golden
from edge_backbones.bundle.writer import BundleWriter, new_bundle, record_file
from edge_backbones.errors import ManifestError
from edge_backbones.spec import ShapeRange
from edge_backbones.testing import SPEC, make_bundle, pooled, pooling_input

FIXED = ("schema_version", "digest")


def samples(*cases: str) -> GoldenSamples:
    inputs, outputs = {}, {}
    for number, case in enumerate(cases):
        images = np.random.default_rng(number).standard_normal((2, 3, 32, 48)).astype(np.float32)
        inputs[case], outputs[case] = images, dict(zip(SPEC.out_features, pooled(images), strict=True))
    return GoldenSamples("pixel_values", inputs, outputs)


def test_samples_come_back_as_they_were_written():
    written = samples("opt", "max")
    assert written.cases == ("max", "opt")
    read = GoldenSamples.decode(written.encode(), written.cases, pooling_input(), SPEC)
    assert read.cases == written.cases
    assert read.input_name == "pixel_values"
    for case in written.cases:
        np.testing.assert_array_equal(read.inputs[case], written.inputs[case])
        assert list(read.outputs[case]) == list(SPEC.outputs)
        for name, values in written.outputs[case].items():
            np.testing.assert_array_equal(read.outputs[case][name], values)


def test_numpy_reads_the_file_too():
    with np.load(io.BytesIO(samples("opt").encode())) as arrays:
        assert sorted(arrays) == ["opt/pixel_values", "opt/pool4", "opt/pool8"]


def test_samples_of_another_size_are_refused_by_case():
    larger = msgspec.structs.replace(pooling_input(), height=ShapeRange.fixed(64))
    with pytest.raises(ValueError, match=r"^opt/pixel_values of shape \(2, 3, 32, 48\) does not fit"):
        GoldenSamples.decode(samples("opt").encode(), ("opt",), larger, SPEC)


@pytest.mark.parametrize(
    ("count", "batch", "expected"),
    [(4, 2, [[0, 1], [2, 3]]), (3, 2, [[0, 1], [2, 0]]), (1, 4, [[0, 0, 0, 0]]), (2, 5, [[0, 1, 0, 1, 0]])],
)
def test_the_last_batch_is_filled_from_the_beginning(count, batch, expected):
    assert [chosen.tolist() for chosen in full_batches(count, batch)] == expected


def test_a_writer_records_what_it_writes_and_what_lies_there(tmp_path):
    first = make_bundle(tmp_path / "first.bundle")
    fields = {name: getattr(first.manifest, name) for name in Manifest.__struct_fields__ if name not in FIXED}
    [engine] = first.manifest.engines
    with new_bundle(tmp_path / "second.bundle") as folder:
        writer = BundleWriter(folder)
        assert writer.add_file(engine.file.path, first.read(engine.file)) == engine.file
        (folder / "graphs").mkdir()
        (folder / "graphs" / "fp32.onnx").write_bytes(b"written by somebody else")
        assert writer.add_file("graphs/fp32.onnx") == record_file(folder, "graphs/fp32.onnx")
        golden = writer.add_golden(load_golden(first), first.manifest.golden.images)
        assert golden == first.manifest.golden
        assert writer.finish(**fields).schema_version == SCHEMA_VERSION
    second = Bundle.open(tmp_path / "second.bundle")
    assert second.manifest == first.manifest
    second.check_files()


def test_a_writer_refuses_what_no_reader_takes(tmp_path):
    bundle = make_bundle(tmp_path / "pool.bundle")
    fields = {name: getattr(bundle.manifest, name) for name in Manifest.__struct_fields__ if name not in FIXED}
    golden = msgspec.structs.replace(bundle.manifest.golden, cases=("opt", "../opt"))
    with pytest.raises(ManifestError, match="cannot be written"):
        BundleWriter(bundle.path).finish(**{**fields, "golden": golden})
    assert Bundle.open(bundle.path).manifest == bundle.manifest
