"""``python -m pytest benchmarks``: pytest-benchmark suites of the runtime's own steps, to look at while working on them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from benchmarks.networks import bundle_of
from build_scripts.photographs import photographs
from edge_backbones import EdgeBackbone
from edge_backbones.images.fit import fit, to_input

pytestmark = pytest.mark.benchmark(min_rounds=20, warmup=True, warmup_iterations=3)


@pytest.fixture(scope="module")
def bundle():
    return bundle_of("mobilenetv3_large_100")


@pytest.fixture(scope="module")
def backbone(bundle):
    with EdgeBackbone.from_pretrained(bundle, engine="int8", threads=2) as opened:
        yield opened


@pytest.fixture(scope="module")
def images(backbone):
    return np.random.default_rng(0).standard_normal(backbone.input.opt_shape).astype(np.float32)


def test_a_call(benchmark, backbone, images):
    output = benchmark(backbone, images)
    assert len(output.feature_maps) == len(backbone.out_features)


def test_the_bare_request(benchmark, backbone, images):
    request = backbone._engine._loaded.model.create_infer_request()
    benchmark(lambda: request.infer([images], share_inputs=True, share_outputs=True))


def test_opening_a_bundle(benchmark, bundle):
    benchmark(lambda: EdgeBackbone.from_pretrained(bundle, engine="int8", threads=2).close())


def test_a_camera_frame_to_an_input(benchmark, bundle, backbone):
    from edge_backbones import Bundle

    config = Bundle.open(bundle).manifest.image
    frame = photographs()["coffee"].resize((1920, 1080), Image.Resampling.BICUBIC)
    height, width = backbone.input.height.opt, backbone.input.width.opt
    array = benchmark(lambda: to_input(fit(frame, config, height, width)[None], config, backbone.input))
    assert array.shape == backbone.input.opt_shape
