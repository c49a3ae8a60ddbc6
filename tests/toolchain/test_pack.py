"""Test that a packed bundle is small, runs, verifies, and compiles if it was packed with graphs."""

from __future__ import annotations

import json
import os
import tarfile

import numpy as np
import pytest

from edge_backbones import Bundle, BundleError, EdgeBackbone, EngineMismatchError, InputError, IntegrityError
from edge_backbones.cli import main as cli
from edge_backbones.deploy.compile import compile_bundle
from edge_backbones.deploy.pack import pack_bundle
from edge_backbones.deploy.verify import verify_bundle


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_a_device_needs_is_kept_and_gives_the_same_maps(cnn, tmp_path):
    small = tmp_path / "small.bundle"
    manifest = pack_bundle(cnn.bundle.path, small)
    (engine,) = cnn.bundle.manifest.engines
    assert files_in(small) == {"manifest.json", "golden.npz", engine.file.path}
    assert manifest == Bundle.open(small).manifest
    assert (manifest.engines, manifest.graphs, manifest.golden) == ((engine,), (), cnn.bundle.manifest.golden)
    verify_bundle(small)
    images = np.random.default_rng(0).standard_normal((3, 3, 64, 96)).astype(np.float32)
    with EdgeBackbone.from_pretrained(cnn.bundle.path) as whole, EdgeBackbone.from_pretrained(small) as packed:
        for expected, found in zip(whole(images).feature_maps, packed(images).feature_maps, strict=True):
            np.testing.assert_array_equal(found, expected)
    with pytest.raises(BundleError, match=r"graphs: none\. Compile in the bundle that it was packed of, .* --graphs"):
        compile_bundle(small)


def test_graphs_travel_without_engines_and_compile_on_the_device(cnn, tmp_path):
    jetson = tmp_path / "jetson.bundle"
    manifest = pack_bundle(cnn.bundle.path, jetson, graphs=True)
    assert files_in(jetson) == {"manifest.json", "golden.npz", "graphs/fp32.onnx"}
    assert manifest.engines == ()
    with pytest.raises(EngineMismatchError, match=f"Run: edge-backbones compile {jetson}"):
        EdgeBackbone.from_pretrained(jetson)
    compile_bundle(jetson)
    EdgeBackbone.from_pretrained(jetson, device="cpu").close()
    both = pack_bundle(cnn.bundle.path, tmp_path / "both.bundle", graphs=True, device="cpu")
    assert len(both.engines) == len(both.graphs) == 1
    assert not pack_bundle(cnn.bundle.path, tmp_path / "cuda.bundle", graphs=True, device="cuda").engines


def test_an_engine_is_packed_by_precision_flavour_and_the_beginning_of_its_name(cnn, tmp_path):
    (engine,) = cnn.bundle.manifest.engines
    for number, asked in enumerate(("fp32", "openvino", engine.name, engine.name[:-4])):
        assert pack_bundle(cnn.bundle.path, tmp_path / str(number), engine=asked).engines == (engine,)
    for asked, device, error, message in (
        ("int8", "auto", EngineMismatchError, "has no engine 'int8'"),
        (None, "cuda", EngineMismatchError, "runs on cpu, not on cuda"),
        ("fp32", "cuda", EngineMismatchError, "runs on cpu, not on cuda"),
        (None, "gpu", InputError, "device must be"),
    ):
        with pytest.raises(error, match=message):
            pack_bundle(cnn.bundle.path, tmp_path / "none", engine=asked, device=device)
    assert not (tmp_path / "none").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["robot.tar", "robot.tar.gz", "robot.tgz", "robot.bundle.tar"])
def test_a_tar_file_unpacks_to_a_bundle_and_is_the_same_every_time(cnn, tmp_path, name):
    file, again = tmp_path / name, tmp_path / "again"
    again.mkdir()
    pack_bundle(cnn.bundle.path, file)
    pack_bundle(cnn.bundle.path, again / name)
    with tarfile.open(file) as archive, tarfile.open(again / name) as other:
        assert [e.get_info() for e in archive.getmembers()] == [e.get_info() for e in other.getmembers()]
        archive.extractall(tmp_path / "out", filter="data")
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name == ("robot.bundle" if "bundle" in name else "robot")
    verify_bundle(folder)
    with pytest.raises(BundleError, match=f"{name} exists already"):
        pack_bundle(cnn.bundle.path, file)
    pack_bundle(cnn.bundle.path, file, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["again", "out", name])


def test_damage_is_found_while_packing_and_leaves_the_old_target(cnn, tmp_path_factory, copy_of):
    damaged = Bundle.open(copy_of(cnn))
    (engine,) = damaged.manifest.engines
    target = tmp_path_factory.mktemp("packed") / "small.bundle"
    pack_bundle(cnn.bundle.path, target)
    before = (target / "manifest.json").read_bytes()
    place = damaged.path / engine.file.path
    data = place.read_bytes()
    place.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(IntegrityError, match="was changed"):
        pack_bundle(damaged.path, target, overwrite=True)
    assert (target / "manifest.json").read_bytes() == before
    with pytest.raises(BundleError, match="exists already"):
        pack_bundle(cnn.bundle.path, target)


def test_the_command_says_how_much_smaller_it_is(cnn, tmp_path, capsys):
    out = tmp_path / "small.bundle"
    assert cli._run(["pack", str(cnn.bundle.path), str(out)]) == 0
    assert f"wrote {out}: " in capsys.readouterr().out
    assert cli._run(["pack", str(cnn.bundle.path), str(out), "--overwrite", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["bytes"] < said["bytes_before"]
    size = sum(os.path.getsize(out / name) for name in files_in(out) - {"manifest.json"})
    assert said["bytes"] == size
    assert cli._run(["pack", str(cnn.bundle.path), str(out)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_a_bundle_is_not_packed_onto_or_into_itself(cnn, copy_of):
    path = copy_of(cnn)
    before = files_in(path)
    for target in (path, path / "inside", path / ".." / path.name, path / "inside.tar"):
        with pytest.raises(InputError, match="is the bundle itself or inside it"):
            pack_bundle(path, target, overwrite=True)
    assert files_in(path) == before


@pytest.mark.parametrize("content", [b"\x89PNG photograph", b"", "tar"])
def test_a_file_that_holds_no_bundle_is_not_overwritten(cnn, tmp_path, content):
    file = tmp_path / "photos.tar"
    if content == "tar":
        (tmp_path / "a.txt").write_text("mine")
        with tarfile.open(file, "w") as archive:
            archive.add(tmp_path / "a.txt", "a.txt")
    else:
        file.write_bytes(content)
    before = file.read_bytes()
    with pytest.raises(BundleError, match="is no tar file with a bundle and will not be overwritten"):
        pack_bundle(cnn.bundle.path, file, overwrite=True)
    assert file.read_bytes() == before
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(BundleError, match=r"folder\.tar is not a file, and the name is one of a tar file"):
        pack_bundle(cnn.bundle.path, tmp_path / "folder.tar", overwrite=True)


def test_graphs_that_are_not_there_cannot_be_packed(cnn, tmp_path):
    small = tmp_path / "small.bundle"
    pack_bundle(cnn.bundle.path, small)
    for options in ({}, {"engine": "fp32"}, {"device": "cuda"}):
        with pytest.raises(BundleError, match="has no ONNX graph to keep: pack the bundle that it was packed of"):
            pack_bundle(small, tmp_path / "again.bundle", graphs=True, **options)


def test_the_command_wants_the_name_of_a_tar_file_for_tar(cnn, tmp_path, capsys):
    assert cli._run(["pack", str(cnn.bundle.path), str(tmp_path / "r.zip"), "--tar"]) == 2
    assert "r.zip.tar, .tar.gz or .tgz" in capsys.readouterr().err
    assert cli._run(["pack", str(cnn.bundle.path), str(tmp_path / "r.tgz")]) == 0
    assert tarfile.is_tarfile(tmp_path / "r.tgz")
    assert "is a folder (tar -xf unpacks one" in _refused(capsys, "inspect", tmp_path / "r.tgz")


def _refused(capsys, *arguments):
    capsys.readouterr()
    assert cli._run([str(argument) for argument in arguments]) == 1
    return capsys.readouterr().err
