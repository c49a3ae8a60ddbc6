"""The attributes of a backbone: the names and types of transformers, and stages that can be set."""

from __future__ import annotations

import re

import msgspec
import numpy as np
import pytest

from edge_backbones.bundle.manifest import Source
from edge_backbones.errors import InputError
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.testing import SPEC, NumpySession, pooled, pooling_input


def over_numpy(source: Source | None = None, *, has_attentions: bool = False) -> EdgeBackbone:
    spec = msgspec.structs.replace(SPEC, has_attentions=has_attentions)
    return EdgeBackbone(spec, pooling_input(2), NumpySession(pooling_input(2)), source)


def pixels() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, 32, 48)).astype(np.float32)


def test_attributes_have_the_names_and_types_of_transformers():
    backbone = over_numpy()
    assert backbone.stage_names == ["pool2", "pool4", "pool8"]
    assert backbone.out_features == ["pool4", "pool8"]
    assert backbone.out_indices == [1, 2]
    assert backbone.channels == [3, 3]
    assert backbone.strides == [(4, 4), (8, 8)]
    assert backbone.num_features == [3, 3, 3]
    assert backbone.out_feature_channels == {"pool2": 3, "pool4": 3, "pool8": 3}
    assert backbone.to_dict()["out_indices"] == [1, 2]


def test_setters_narrow_and_widen_within_the_compiled_stages():
    backbone = over_numpy()
    images = pixels()
    backbone.out_features = ["pool8"]
    assert (backbone.out_indices, backbone.channels, backbone.strides) == ([2], [3], [(8, 8)])
    (only,) = backbone(images).feature_maps
    np.testing.assert_array_equal(only, pooled(images)[1])
    backbone.out_indices = [1, -1]
    assert backbone.out_features == ["pool4", "pool8"]
    backbone.out_features = None
    assert backbone.out_features == ["pool8"]


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        (
            "out_features",
            ["pool2"],
            "stages ['pool2'] are not compiled into this bundle, which holds ['pool4', 'pool8']",
        ),
        ("out_indices", [0, 1], "stages ['pool2'] are not compiled"),
        ("out_features", ["nope"], "out_features must be a subset of stage_names"),
        ("out_indices", [2, 1], "out_indices must be in the same order as stage_names"),
        ("out_indices", 1, "out_indices must be a list"),
    ],
)
def test_a_failed_setter_changes_nothing(attribute, value, message):
    backbone = over_numpy()
    with pytest.raises(InputError, match=re.escape(message)):
        setattr(backbone, attribute, value)
    assert backbone.out_features == ["pool4", "pool8"]
    assert len(backbone(pixels()).feature_maps) == 2


@pytest.mark.parametrize(
    ("library", "config", "expected"),
    [
        ("timm", {}, "timm"),
        ("transformers", {"model_type": "timm_backbone"}, "timm"),
        ("transformers", {"model_type": "resnet"}, "transformers"),
        ("torch", {}, "transformers"),
    ],
)
def test_backbone_type_and_has_attentions_are_those_of_transformers(library, config, expected):
    source = Source(library=library, name="pool", weights="random", config=config)
    for has_attentions in (True, False):
        backbone = over_numpy(source, has_attentions=has_attentions)
        assert (backbone.backbone_type, backbone.has_attentions) == (expected, has_attentions)
    assert over_numpy().backbone_type == "transformers"
