"""The example that runs a folder of photographs."""

from __future__ import annotations

import numpy as np

from edge_backbones import EdgeBackbone


def test_every_photograph_gets_its_own_maps(place, typed):
    lines = typed("folder")
    photographs = sorted((place / "samples" / "photographs").iterdir())
    assert sum(int(line.split()[0]) for line in lines) == len(photographs) == 40
    written = sorted((place / "samples" / "features").iterdir())
    assert [path.name for path in written] == [f"{path.name}.npz" for path in photographs]
    with EdgeBackbone.from_pretrained(place / "samples" / "features.bundle") as backbone:
        for index in (0, 7, 8, 39):
            expected = backbone(backbone.preprocess(photographs[index])).feature_maps
            with np.load(written[index]) as found:
                assert found.files == backbone.out_features
                for stage, one in zip(backbone.out_features, expected, strict=True):
                    np.testing.assert_allclose(found[stage], one[0], rtol=1e-3, atol=1e-3)
