"""Look at the stages of a network before anything is built."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from edge_backbones.errors import needing
from edge_backbones.spec import BackboneSpec
from edge_backbones.toolchain.options import BuildOptions


@dataclass(frozen=True)
class Stages:
    """Hold what `list_stages` found.

    Attributes:
        spec: The backbone with every stage kept.
        height: Height of the input that strides were measured at.
        width: Its width.
        default: Index of the stage that a build keeps if none is named.
    """

    spec: BackboneSpec
    height: int
    width: int
    default: int


def list_stages(source: Any, options: BuildOptions | None = None) -> Stages:
    """Return every stage of a network: name, channels, stride and layout.

    The network is made with random weights, so that nothing is downloaded but the configuration of a model on a hub.

    Args:
        source: What `build_bundle` takes.
        options: The part that says which network: ``from_model``, ``num_channels``, ``output_stride``, ``height`` and
            ``width``.

    Returns:
        The stages, and the size of the input that strides were measured at.

    Raises:
        SourceError: There is no such network.
        MissingDependencyError: The ``build`` extra is not installed.
    """
    with needing("looking at a network", "build"):
        from edge_backbones.toolchain.sources.load import load_source

    wanted = (options or BuildOptions()).source_options()
    wanted = dataclasses.replace(wanted, weights="random:0", out_indices=None, out_features=None)
    loaded = load_source(source, wanted)
    default = list(loaded.spec.stage_names).index(loaded.spec.out_features[-1])
    if len(loaded.spec.out_features) < len(loaded.spec.stage_names):
        every = tuple(range(len(loaded.spec.stage_names)))
        loaded = load_source(source, dataclasses.replace(wanted, out_indices=every))
    return Stages(loaded.spec, loaded.height, loaded.width, default)
