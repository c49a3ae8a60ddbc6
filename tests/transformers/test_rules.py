"""Stage selection, attributes and outputs, each compared with what the installed transformers itself answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import ResNetBackbone, ResNetConfig, TimmBackbone, TimmBackboneConfig
from transformers.modeling_outputs import BackboneOutput as TransformersOutput

from edge_backbones.bundle.manifest import Source
from edge_backbones.errors import InputError
from edge_backbones.integrations.transformers import EdgeBackboneModule
from edge_backbones.runtime.backbone import BackboneOutput, EdgeBackbone
from edge_backbones.spec import BackboneSpec, InputSpec, ShapeRange, align_stages

NAMES = ["stem", "stage1", "stage2", "stage3", "stage4"]
CONFIG = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
CHANNELS = (8, 8, 16, 24, 32)


@dataclass(frozen=True)
class Row:
    """One row of the rules. ``better``: what we say where transformers trips over its own input."""

    what: str
    out_features: Any = None
    out_indices: Any = None
    stage_names: Any = tuple(NAMES)
    better: str | None = None


VALID = f"out_indices must be valid indices for stage_names {NAMES}, got "
ROWS = [
    Row("nothing"),
    Row("one index", out_indices=[2]),
    Row("all indices", out_indices=[0, 1, 2, 3, 4]),
    Row("tuple of indices", out_indices=(1, 2)),
    Row("the last, negative", out_indices=[-1]),
    Row("two negative", out_indices=[-2, -1]),
    Row("mixed signs", out_indices=[0, -1]),
    Row("the first, negative", out_indices=[-5]),
    Row("no index", out_indices=[]),
    Row("a bool", out_indices=[True]),
    Row("indices out of order", out_indices=[2, 1]),
    Row("negative indices out of order", out_indices=[-1, -2]),
    Row("an index twice", out_indices=[1, 1]),
    Row("an index twice with two signs", out_indices=[4, -1]),
    Row("too large", out_indices=[5]),
    Row("too small", out_indices=[-6], better=f"{VALID}[-6]"),
    Row("one of two too small", out_indices=[-7, -1], better=f"{VALID}[-7, -1]"),
    Row("an int", out_indices=3, better="out_indices must be a list, got <class 'int'>"),
    Row("a str among indices", out_indices=["a"], better=f"{VALID}['a']"),
    Row("one name", out_features=["stage2"]),
    Row("all names", out_features=list(NAMES)),
    Row("no name", out_features=[]),
    Row("tuple of names", out_features=("stage1",)),
    Row("a str", out_features="stage1"),
    Row("an unknown name", out_features=["x"]),
    Row("a name twice", out_features=["stage1", "stage1"]),
    Row("names out of order", out_features=["stage2", "stage1"]),
    Row("both, consistent", out_features=["stage1", "stage3"], out_indices=[1, 3]),
    Row("both, consistent, negative", out_features=["stage4"], out_indices=[-1]),
    Row("both, of different length", out_features=["stage1"], out_indices=[1, 2]),
    Row("both, different stages", out_features=["stage1"], out_indices=[2]),
    Row("no stage names", out_indices=[0], stage_names=None),
]


def outcome(function: Any, *arguments: Any) -> tuple[Any, ...]:
    """What a call returns, as lists, or the kind and words of what it raises."""
    try:
        features, indices = function(*arguments)
    except Exception as error:
        return type(error), str(error)
    return list(features), list(indices)


def transformers_answer(stage_names: Any, out_features: Any, out_indices: Any) -> Any:
    """Both releases align the stages of a configuration, in functions of different names."""
    config = ResNetConfig(**CONFIG)
    config.stage_names = None if stage_names is None else list(stage_names)
    if hasattr(config, "set_output_features_output_indices"):
        config.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        return config.out_features, config.out_indices
    from transformers.utils.backbone_utils import get_aligned_output_features_output_indices

    # As the constructor of a configuration calls it.
    return get_aligned_output_features_output_indices(out_features, out_indices, config.stage_names)


def refusal(answer: tuple[Any, ...]) -> bool:
    return isinstance(answer[0], type)


@pytest.mark.parametrize("row", ROWS, ids=[row.what for row in ROWS])
def test_a_selection_has_the_answer_of_transformers(row):
    theirs = outcome(transformers_answer, row.stage_names, row.out_features, row.out_indices)
    ours = outcome(align_stages, row.stage_names, row.out_features, row.out_indices)
    if row.better is not None:
        assert refusal(theirs)
        assert ours == (InputError, row.better)
    elif refusal(theirs):
        assert theirs[0] is ValueError
        assert ours == (InputError, theirs[1])
    else:
        assert ours == theirs


def test_the_rules_are_at_least_thirty():
    assert len(ROWS) >= 30


# ---- attributes and setters -----------------------------------------------------------------------------------------


class Engine:
    """Five maps of a resnet, made of the stage's number."""

    def run(self, array: np.ndarray) -> list[np.ndarray]:
        sizes = [8, 8, 4, 2, 1]
        return [
            np.full((len(array), channels, size, size), i, np.float32)
            for i, (channels, size) in enumerate(zip(CHANNELS, sizes, strict=True))
        ]

    def close(self) -> None:
        pass


@pytest.fixture
def theirs() -> ResNetBackbone:
    return ResNetBackbone(ResNetConfig(**CONFIG, out_indices=[0, 1, 2, 3, -1])).eval()


@pytest.fixture
def ours(theirs) -> EdgeBackbone:
    spec = BackboneSpec(
        stage_names=tuple(NAMES),
        out_features=tuple(NAMES),
        out_indices=(0, 1, 2, 3, -1),
        channels=CHANNELS,
        strides=((4, 4), (4, 4), (8, 8), (16, 16), (32, 32)),
        num_features=CHANNELS,
        layouts=("NCHW",) * 5,
        has_attentions=getattr(theirs, "has_attentions", True),
    )
    fixed = ShapeRange.fixed
    input = InputSpec(name="pixel_values", channels=3, batch=fixed(2), height=fixed(32), width=fixed(32))
    source = Source(library="transformers", name="resnet", weights="random", seed=0, config=theirs.config.to_dict())
    return EdgeBackbone(spec, input, Engine(), source)


ATTRIBUTES = ("stage_names", "out_features", "out_indices", "channels", "num_features", "out_feature_channels")


def attributes(backbone: Any) -> dict[str, Any]:
    return {name: getattr(backbone, name) for name in ATTRIBUTES}


def test_attributes_are_those_of_the_same_backbone_in_transformers(ours, theirs):
    assert attributes(ours) == attributes(theirs)


SETTABLE = [row for row in ROWS if row.stage_names and (row.out_features is None or row.out_indices is None)]


@pytest.mark.parametrize("row", SETTABLE, ids=[row.what for row in SETTABLE])
def test_setters_narrow_as_transformers_does_and_a_refused_one_changes_nothing(ours, theirs, row):
    name = "out_features" if row.out_features is not None else "out_indices"
    wanted = getattr(row, name)
    before = attributes(ours)

    def set_on(backbone: Any) -> Any:
        setattr(backbone, name, wanted)
        return backbone.out_features, backbone.out_indices

    answer, expected = outcome(set_on, ours), outcome(set_on, theirs)
    if refusal(answer):
        assert refusal(expected)
        assert answer[0] is InputError
        assert attributes(ours) == before
        assert len(ours(np.zeros((2, 3, 32, 32), np.float32)).feature_maps) == 5
    else:
        assert answer == expected
        assert attributes(ours) == attributes(theirs)
        maps = ours(np.zeros((2, 3, 32, 32), np.float32)).feature_maps
        assert [int(m.flat[0]) for m in maps] == [i % 5 for i in ours.out_indices]
        assert [m.shape[1] for m in maps] == ours.channels


@pytest.mark.parametrize("name", ["out_features", "out_indices"])
def test_none_resets_to_the_last_stage(ours, theirs, name):
    for backbone in (ours, theirs):
        backbone.out_indices = [1]
        setattr(backbone, name, None)
    assert (ours.out_features, ours.out_indices) == (theirs.out_features, theirs.out_indices) == (["stage4"], [4])


def test_two_backbones_of_one_configuration_do_not_share_their_stages(ours):
    other = EdgeBackbone(ours._spec, ours.input, Engine(), ours._source)
    other.out_features = ["stage1"]
    assert ours.out_features == NAMES
    other.config.out_features.append("more")
    assert other.config.out_features == ["stage1"]


@pytest.mark.parametrize("name", ["out_features", "out_indices"])
@pytest.mark.parametrize("wanted", [1, 4])
def test_a_configuration_sets_the_stages_of_its_backbone(ours, theirs, name, wanted):
    """What transformers 5 does. In 4.44 the backbone does not follow, so that its own setter is the reference."""
    values = {"out_features": [NAMES[wanted]], "out_indices": [wanted - 5]}
    setattr(ours.config, name, values[name])
    setattr(theirs, name, values[name])
    assert attributes(ours) == attributes(theirs)
    assert [getattr(ours.config, key) for key in ("out_features", "out_indices", "stage_names")] == [
        theirs.out_features,
        theirs.out_indices,
        theirs.stage_names,
    ]
    (feature_map,) = ours(np.zeros((2, 3, 32, 32), np.float32)).feature_maps
    assert feature_map.shape[1] == theirs.channels[0]


def test_a_configuration_refuses_the_stages_that_transformers_refuses(ours):
    with pytest.raises(ValueError, match="out_features must be a subset of stage_names"):
        ours.config.out_features = ["nope"]
    assert ours.out_features == NAMES


def test_backbone_type_and_has_attentions_are_those_of_transformers(ours, theirs):
    module = EdgeBackboneModule(ours)
    assert ours.backbone_type == theirs.backbone_type.value == "transformers"
    assert module.backbone_type is theirs.backbone_type
    assert module.has_attentions == ours.has_attentions == getattr(theirs, "has_attentions", True)
    module.config.out_indices = [1]
    assert (module.out_features, ours.out_features) == (["stage1"], ["stage1"])


def test_backbone_type_of_timm(build):
    options = {} if hasattr(transformers, "backbone_utils") else {"use_pretrained_backbone": False}
    theirs = TimmBackbone(TimmBackboneConfig(backbone="test_resnet", out_indices=[1, 3], **options)).eval()
    with EdgeBackbone.from_pretrained(build(theirs)) as backbone:
        assert backbone.backbone_type == theirs.backbone_type.value == "timm"
        assert EdgeBackboneModule(backbone).backbone_type is theirs.backbone_type
        assert backbone.has_attentions == getattr(theirs, "has_attentions", True)


def test_to_dict_is_a_configuration_that_transformers_reads(ours):
    ours.out_indices = [1, -1]
    config = ResNetConfig.from_dict(ours.to_dict())
    assert (config.out_features, config.out_indices) == (["stage1", "stage4"], [1, -1])
    assert ResNetBackbone(config).channels == ours.channels
    assert (ours.config.hidden_sizes, ours.config.to_dict()) == (config.hidden_sizes, ours.to_dict())


# ---- calls and outputs ----------------------------------------------------------------------------------------------


def test_calls_answer_as_those_of_transformers(ours, theirs):
    pixels = torch.zeros(2, 3, 32, 32)
    for arguments in ({}, {"return_dict": False}, {"return_dict": True}):
        with torch.no_grad():
            expected = theirs(pixels, **arguments)
        actual = ours(pixels, **arguments)
        assert isinstance(actual, tuple) == isinstance(expected, tuple)
        assert len(actual) == len(expected)
        assert [m.shape for m in actual[0]] == [tuple(m.shape) for m in expected[0]]
    filtered = ours.forward_with_filtered_kwargs(pixels, output_attentions=False, interpolate_pos_encoding=True)
    assert len(filtered.feature_maps) == 5
    assert len(ours.forward(pixels).feature_maps) == 5
    with pytest.raises(TypeError):
        ours(pixels, interpolate_pos_encoding=True)


def test_attention_weights_are_none_where_the_network_has_none_and_refused_elsewhere(ours, theirs):
    pixels = torch.zeros(2, 3, 32, 32)
    if getattr(theirs, "has_attentions", True):
        with pytest.raises(InputError, match="Cannot output attentions"):
            ours(pixels, output_attentions=True)
    else:
        assert theirs(pixels, output_attentions=True).attentions is None
        assert ours(pixels, output_attentions=True).attentions is None


@pytest.mark.parametrize("hidden", [None, (np.ones(3), np.ones(4))])
def test_outputs_behave_as_those_of_transformers(hidden):
    maps = (np.zeros((1, 2, 3, 3), np.float32), np.zeros((1, 4, 2, 2), np.float32))
    ours, theirs = BackboneOutput(maps, hidden), TransformersOutput(feature_maps=maps, hidden_states=hidden)
    assert isinstance(ours, dict)
    assert isinstance(theirs, dict)
    assert list(ours) == list(theirs)
    assert list(ours.keys()) == list(theirs.keys())
    assert len(ours) == len(theirs)
    assert ours.to_tuple() == theirs.to_tuple()
    assert ours[0] is theirs[0] is ours.feature_maps is ours["feature_maps"]
    assert ours[0:1] == theirs[0:1]
    assert ours[-1] is theirs[-1]
    assert ours.hidden_states is theirs.hidden_states is hidden
    assert ours.attentions is theirs.attentions is None
    assert ("hidden_states" in ours) == ("hidden_states" in theirs)
    assert ours.get("attentions") is None
    for absent in ("attentions", "cls_tokens"):
        for output in (ours, theirs):
            with pytest.raises(KeyError):
                output[absent]
    with pytest.raises(IndexError):
        ours[2]
    first, *rest = ours.to_tuple()
    assert first is maps
    assert len(rest) == len(theirs) - 1
    assert re.match(r"BackboneOutput\(feature_maps=\[\(1, 2, 3, 3\), \(1, 4, 2, 2\)\]", repr(ours))
