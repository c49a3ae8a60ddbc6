"""AutoEdgeBackbone: AutoBackbone's constructors over a cache of bundles that is keyed by content."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import ResNetBackbone, ResNetConfig, TimmBackboneConfig

from edge_backbones import AutoEdgeBackbone, BuildOptions, auto
from edge_backbones.bundle.manifest import CalibrationFile
from edge_backbones.engines import promises, select
from edge_backbones.errors import CalibrationError, InputError, SourceError
from edge_backbones.images.config import ImageConfig
from edge_backbones.machine import child, profiles
from edge_backbones.parity_report import Gate
from edge_backbones.spec import Precision

SMALL = {"embedding_size": 16, "hidden_sizes": [32, 48, 64, 80], "depths": [1, 1, 1, 1]}
OPTIONS = BuildOptions(height=64, width=96, torchscript=False, golden=2, cache=None)


def config(**changes: Any) -> ResNetConfig:
    return ResNetConfig(**{**SMALL, "out_indices": [1, -1], **changes})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[ResNetBackbone, Path]:
    """A backbone as ``save_pretrained`` writes it, with statistics like those of a trained one."""
    torch.manual_seed(0)
    backbone = ResNetBackbone(config(out_indices=[4])).eval()
    for norm in backbone.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
    folder = tmp_path_factory.mktemp("saved") / "resnet"
    backbone.save_pretrained(folder)
    return backbone, folder


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The bundles that are really built during a test."""
    built: list[Path] = []
    original = auto.build_bundle

    def counting(source: Any, target: Path, **arguments: Any) -> Any:
        built.append(target)
        return original(source, target, **arguments)

    monkeypatch.setattr(auto, "build_bundle", counting)
    return built


def bundles(cache: Path) -> set[Path]:
    return set((cache / "bundles").glob("*.bundle"))


def test_a_folder_runs_as_the_backbone_in_it_and_is_built_once(saved, cache, builds):
    reference, folder = saved
    reference.out_indices = [2, 4]
    pixels = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        expected = reference(pixels).feature_maps
    for _ in range(2):
        with AutoEdgeBackbone.from_pretrained(folder, out_indices=[2, 4], options=OPTIONS, cache=cache) as backbone:
            assert backbone.out_features == ["stage2", "stage4"]
            assert backbone.channels == [48, 80]
            for actual, wanted in zip(backbone(pixels).feature_maps, expected, strict=True):
                assert np.linalg.norm(actual - wanted.numpy()) <= 1e-3 * np.linalg.norm(wanted.numpy())
    assert len(builds) == 1
    copied = shutil.copytree(folder, cache / "elsewhere" / "renamed")
    AutoEdgeBackbone.from_pretrained(folder, out_indices=[1], options=OPTIONS, cache=cache).close()
    assert len(builds) == 2, "other stages are another bundle"
    AutoEdgeBackbone.from_pretrained(copied, out_features=["stage1"], options=OPTIONS, cache=cache).close()
    assert len(builds) == 2, "the same content under another name, its stage chosen by name"
    with AutoEdgeBackbone.from_pretrained(folder, out_indices=[-4], options=OPTIONS, cache=cache) as backbone:
        assert (backbone.out_indices, backbone.out_features) == ([-4], ["stage1"])
    assert len(builds) == 2, "the same stage, counted from the end"


def test_a_configuration_is_seeded_and_left_alone(cache, builds):
    chosen = config()
    before = chosen.to_dict()
    with AutoEdgeBackbone.from_config(chosen, options=OPTIONS, cache=cache) as first:
        maps = first(np.ones((1, 3, 64, 96), np.float32)).feature_maps
        assert first.out_indices == [1, -1]
    with AutoEdgeBackbone.from_config(config(), options=OPTIONS, cache=cache) as second:
        for a, b in zip(maps, second(np.ones((1, 3, 64, 96), np.float32)).feature_maps, strict=True):
            np.testing.assert_array_equal(a, b)
    assert len(builds) == 1
    assert chosen.to_dict() == before


def test_int8_is_built_from_the_images_that_are_given(cache, builds, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (6, 80, 100, 3), dtype=np.uint8)
    options = BuildOptions(**{**vars(OPTIONS), "weights": "random:3"})
    timm_config = TimmBackboneConfig(backbone="test_resnet", out_indices=[2])
    with AutoEdgeBackbone.from_config(timm_config, engine="int8", images=images, options=options, cache=cache) as b:
        assert b.out_features == ["layer2"]
    AutoEdgeBackbone.from_config(timm_config, engine="int8", images=list(images), options=options, cache=cache).close()
    assert len(builds) == 1, "the same images in another container"
    images[0] += 1
    AutoEdgeBackbone.from_config(timm_config, engine="int8", images=images, options=options, cache=cache).close()
    assert len(builds) == 2, "other images"
    with pytest.raises(CalibrationError, match="int8 needs calibration images"):
        AutoEdgeBackbone.from_config(timm_config, engine="int8", cache=cache)
    with pytest.raises(CalibrationError, match="can be read only once: pass a list"):
        AutoEdgeBackbone.from_config(timm_config, engine="int8", images=iter(images), options=options, cache=cache)
    with pytest.raises(CalibrationError, match="neither a folder nor a file"):
        AutoEdgeBackbone.from_config(timm_config, engine="int8", images=tmp_path / "none", options=options, cache=cache)


class Asked(Exception):
    """Instead of a build: the bundle that would have been built."""


@pytest.fixture
def key(tmp_path, monkeypatch):
    """The name of the bundle that these options mean."""

    def stop(source: Any, target: Path, **_: Any) -> Any:
        raise Asked(target.name)

    monkeypatch.setattr(auto, "build_bundle", stop)

    def asked(engine: str = "int8", images: Any = None, **changes: Any) -> str:
        options = BuildOptions(**{**vars(OPTIONS), **changes})
        with pytest.raises(Asked) as caught:
            AutoEdgeBackbone.from_config(config(), engine=engine, images=images, options=options, cache=tmp_path)
        return str(caught.value)

    return asked


def ranges(**changes: Any) -> bytes:
    """A calibration.json."""
    found = {
        "network_sha256": "0" * 64, "data_sha256": "1" * 64, "preprocessing": ImageConfig(mean=(0.5,) * 3, std=(0.5,) * 3),
        "method": "max", "percentile": 99.99, "chosen": {}, "images": ("a.jpg",), "held_out": 0, "skipped": (), "silent": (),
        "factors": {}, "ranges": {"x": 1.0}, "largest": {"x": 1.0}, "shifts": {},
    }  # fmt: skip
    return msgspec.json.encode(CalibrationFile(**{**found, **changes}))


def test_a_calibration_is_known_by_what_is_in_it(key, tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "elsewhere" / "second.json"
    second.parent.mkdir()
    for path in (first, second):
        path.write_bytes(ranges())
    before = key(calibration=first)
    assert key(calibration=second) == before
    second.write_bytes(msgspec.json.format(ranges(), indent=4))  # written in another way
    assert key(calibration=second) == before
    first.write_bytes(ranges(ranges={"x": 2.0}))  # changed where it lies
    assert key(calibration=first) != before
    with pytest.raises(CalibrationError, match=r"none\.json cannot be read"):
        key(calibration=tmp_path / "none.json")


def test_a_profile_is_known_by_what_is_in_it(key, tmp_path):
    shipped = Path(profiles.__file__).parents[2] / "profiles" / "cpu.toml"
    first, second = tmp_path / "cpu.toml", tmp_path / "elsewhere" / "cpu.toml"
    second.parent.mkdir()
    for path in (first, second):
        path.write_bytes(shipped.read_bytes())
    named = key("fp32", profile="cpu")
    assert key("fp32", profile=first) == key("fp32", profile=str(second)) == named
    assert key("fp32") != named
    first.write_text(re.sub(r"size = \d+", "size = 96", shipped.read_text()))
    assert key("fp32", profile=first) != named


def test_a_profile_gives_its_size_to_a_network_that_knows_none(tmp_path):
    mine = tmp_path / "cpu.toml"
    shipped = Path(profiles.__file__).parents[2] / "profiles" / "cpu.toml"
    mine.write_text(re.sub(r"size = \d+", "size = 96", shipped.read_text()))
    options = BuildOptions(**{**vars(OPTIONS), "height": None, "width": None, "profile": mine})
    with AutoEdgeBackbone.from_config(config(), options=options, cache=tmp_path) as backbone:
        assert backbone.input.opt_shape == (1, 3, 96, 96)


def test_the_order_in_which_options_are_written_means_nothing(key):
    images = np.zeros((2, 64, 96, 3), np.uint8)
    gates = {Precision.FP16: Gate(min_cosine=0.9), Precision.INT8: Gate(min_sqnr_db=10)}
    one = key(images=images, exclude=("stem", "op:Add"), gates=gates)
    assert key(images=images, exclude=("op:Add", "stem", "stem"), gates=dict(reversed(gates.items()))) == one
    others = [
        key(images=images, exclude=("stem",), gates=gates),
        key(images=images, exclude=("stem", "op:Add"), gates={**gates, Precision.INT8: Gate(min_sqnr_db=11)}),
        key(images=images, exclude=("stem", "op:Add"), gates=gates, golden=1),
        key(images=images, exclude=("stem", "op:Add"), gates=gates, fallback=False),
        key(images=images + np.uint8(1), exclude=("stem", "op:Add"), gates=gates),
        key(images=images[::-1][:1], exclude=("stem", "op:Add"), gates=gates),
    ]
    assert len({one, *others}) == 1 + len(others)


def test_images_are_known_by_what_is_in_them(key, tmp_path):
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", np.zeros((2, 64, 96, 3), np.uint8))
    before = key(images=tmp_path / "a.npz")
    assert key(images=str(tmp_path / "b.npz")) == before
    np.savez(tmp_path / "b.npz", np.ones((2, 64, 96, 3), np.uint8))
    assert key(images=tmp_path / "b.npz") != before


def test_an_engine_of_another_release_is_compiled_again_from_the_bundle(cache, builds, monkeypatch):
    AutoEdgeBackbone.from_config(config(out_indices=[3]), options=OPTIONS, cache=cache).close()
    assert len(builds) == 1
    from edge_backbones.engines import registry

    monkeypatch.setattr(registry, "reasons_against", _first_time_refused(registry.reasons_against))
    with AutoEdgeBackbone.from_config(config(out_indices=[3]), options=OPTIONS, cache=cache) as backbone:
        assert backbone.channels == [64]
    assert len(builds) == 1


def test_an_engine_that_this_machine_has_not_measured_is_measured_in_a_process_of_its_own(
    tmp_path, builds, monkeypatch
):
    """A cache that several machines share. What it has built itself is opened at once."""
    run_apart, asked = child.run_apart, []

    def verified(function, *arguments, **options):
        asked.append(function)
        return run_apart(function, *arguments, **options)

    monkeypatch.setattr(child, "run_apart", verified)
    AutoEdgeBackbone.from_config(config(out_indices=[3]), options=OPTIONS, cache=tmp_path).close()
    assert (len(builds), asked) == (1, [])
    (tmp_path / "id").write_text("another machine")
    monkeypatch.setattr(promises, "_MACHINE_ID", tmp_path / "id")
    AutoEdgeBackbone.from_config(config(out_indices=[3]), options=OPTIONS, cache=tmp_path).close()
    assert (len(builds), asked) == (1, [select.VERIFY])


def _first_time_refused(original: Any) -> Any:
    calls: list[int] = []

    def reasons(*arguments: Any) -> Any:
        calls.append(1)
        return ["built with another release"] if len(calls) == 1 else original(*arguments)

    return reasons


def test_the_least_recently_used_bundles_make_room(cache, monkeypatch):
    monkeypatch.setattr(auto, "CACHE_LIMIT_BYTES", 1)
    AutoEdgeBackbone.from_config(config(out_indices=[0]), options=OPTIONS, cache=cache).close()
    (kept,) = bundles(cache)
    with AutoEdgeBackbone.from_config(config(out_indices=[0]), options=OPTIONS, cache=cache) as backbone:
        assert backbone.out_features == ["stem"]
    assert bundles(cache) == {kept}


def test_refusals_leave_no_bundle(tmp_path):
    with pytest.raises(InputError, match=r"AutoEdgeBackbone\.from_pretrained"):
        AutoEdgeBackbone()
    with pytest.raises(InputError, match="engine must be one of fp32, fp16, bf16, int8, fp8; got 'int4'"):
        AutoEdgeBackbone.from_config(config(), engine="int4", cache=tmp_path)
    with pytest.raises(SourceError, match="no model 'resnet81'"):
        AutoEdgeBackbone.from_pretrained("resnet81", cache=tmp_path)
    with pytest.raises(InputError, match="out_indices must be valid indices"):
        AutoEdgeBackbone.from_config(config(), out_indices=[9], options=OPTIONS, cache=tmp_path)
    assert not bundles(tmp_path)


def test_the_words_of_transformers_are_understood(cache):
    arguments = {"use_pretrained_backbone": False, "use_timm_backbone": True, "options": OPTIONS, "cache": cache}
    with AutoEdgeBackbone.from_pretrained("test_resnet", out_indices=(1,), **arguments) as backbone:
        assert backbone.out_features == ["layer1"]


def test_an_image_that_cannot_be_read_does_not_stop_the_key(tmp_path):
    """The build skips it, with the reason."""
    (tmp_path / "a.jpg").write_bytes(b"some bytes")
    (tmp_path / "link.jpg").symlink_to(tmp_path / ".later")
    before = auto._images_sha256(tmp_path)
    assert auto._images_sha256(tmp_path) == before
    (tmp_path / ".later").write_bytes(b"a photograph")
    assert auto._images_sha256(tmp_path) != before
