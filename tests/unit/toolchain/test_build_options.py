"""BuildOptions without a build: names of number formats are as good as the formats."""

from __future__ import annotations

import pytest

from edge_backbones import BuildOptions, Gate, InputError, Precision


def test_names_are_precisions():
    gate = Gate(min_cosine=0.9)
    named = BuildOptions(precisions=("int8", "fp16"), gates={"int8": gate})
    assert named == BuildOptions(precisions=(Precision.INT8, Precision.FP16), gates={Precision.INT8: gate})
    assert all(type(precision) is Precision for precision in (*named.precisions, *named.wanted, *named.gates))
    assert named.needs_ranges


def test_auto_stays_a_word():
    assert BuildOptions(precisions="auto").precisions == "auto"


@pytest.mark.parametrize("options", [{"precisions": ("int7",)}, {"gates": {"int7": Gate(min_cosine=0.9)}}])
def test_an_unknown_name_is_refused_with_the_known_ones(options):
    with pytest.raises(InputError, match="'int7' is not a valid Precision: choose among fp32, fp16, bf16, int8, fp8"):
        BuildOptions(**options)


@pytest.mark.parametrize("precisions", [(), ("int8", Precision.INT8)])
def test_each_is_wanted_once(precisions):
    with pytest.raises(InputError, match="each once"):
        BuildOptions(precisions=precisions)


def test_one_name_stands_for_a_tuple_of_it():
    one = BuildOptions(precisions="int8", out_features="layer4", exclude="layer1", flavours="torch_tensorrt")
    assert (one.precisions, one.wanted) == ((Precision.INT8,), (Precision.INT8,))
    assert (one.out_features, one.exclude, one.flavours) == (("layer4",), ("layer1",), ("torch_tensorrt",))


@pytest.mark.parametrize("flavours", ["openvino", ("torchscript", "tensorrt")])
def test_a_build_makes_no_engine_of_another_flavour(flavours):
    with pytest.raises(
        InputError, match=r"flavours are torchscript and torch_tensorrt, got .*: edge-backbones compile"
    ):
        BuildOptions(flavours=flavours)


def test_formats_of_maps_and_pixels():
    assert (BuildOptions().maps, BuildOptions().pixels) == ((), "float32")
    assert BuildOptions(maps="float16").maps == ("float16",)
    assert BuildOptions(maps=("channels-last", "float16"), pixels="float16").maps == ("channels-last", "float16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maps": "nhwc"}, "maps are float16 and channels-last, got nhwc: choose among these"),
        ({"maps": ("float16", "bf16", "int8")}, "maps are float16 and channels-last, got bf16, int8: choose"),
        ({"pixels": "uint8"}, "pixels must be float32 or float16, got 'uint8'"),
        (
            {"pixels": "float16", "input": "image"},
            "pixels is float16, and input is image, which is uint8: leave",
        ),
    ],
)
def test_formats_that_do_not_exist_or_mean_nothing_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        BuildOptions(**options)
