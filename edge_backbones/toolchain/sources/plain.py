"""Plain torch modules as a source: what cannot be read off them is described in a ModuleSource."""

from __future__ import annotations

from typing import get_args

import torch
from torch import nn

from edge_backbones.bundle.manifest import Source
from edge_backbones.errors import SourceError, first_line
from edge_backbones.spec import BackboneSpec, Layout
from edge_backbones.toolchain.artifacts import LoadedBackbone
from edge_backbones.toolchain.sources.base import SourceOptions, kept_stages, refuse_dataset_index, tensors_sha256
from edge_backbones.toolchain.sources.module_source import ModuleSource
from edge_backbones.toolchain.sources.modules import feature_maps, missing_arguments, plain_copy
from edge_backbones.toolchain.sources.processors import given, unknown


def load_plain(source: ModuleSource, options: SourceOptions) -> LoadedBackbone:
    """Copy the module, run it once and measure its outputs. Raises SourceError for a description that does not fit it."""
    refuse_dataset_index(options)
    if options.weights != "pretrained" or options.output_stride is not None or options.hidden_states:
        raise SourceError("weights, output_stride and hidden_states are not for a plain module: set them in the module")
    if options.num_channels not in (None, source.num_channels):
        raise SourceError(
            f"this ModuleSource takes {source.num_channels} channels, not {options.num_channels}: say it in one place"
        )
    stage_names = tuple(source.stage_names)
    if not stage_names or len(set(stage_names)) != len(stage_names):
        raise SourceError(f"stage_names must name every output once, got {list(stage_names)}")
    features, indices = kept_stages(stage_names, options, tuple(range(len(stage_names))))
    net = plain_copy(source.module)
    height, width = options.img_size or source.size
    given_image = options.image or given(source.image) or unknown(f"this ModuleSource of a {type(net).__name__}")
    preprocessing = given_image.for_channels(source.num_channels)
    image = torch.zeros(1, source.num_channels, height, width)
    try:
        with torch.no_grad():
            returned = net(image)
    except Exception as error:  # a user's module fails with whatever it trips over
        if missing := missing_arguments(net):
            raise SourceError(
                f"forward of this {type(net).__name__} needs {', '.join(missing)} besides the image: wrap it in a module "
                "whose forward takes the image alone"
            ) from error
        raise SourceError(
            f"this {type(net).__name__} does not run on images of {height}x{width} (height x width): "
            f"{first_line(error, typed=True)}"
        ) from error
    outputs = feature_maps(returned, stage_names)
    nchw: Layout = "NCHW"
    others = [axes for axes in source.layouts or () if axes not in get_args(Layout)]
    if others:
        raise SourceError(f"layouts {others} are unknown: {', '.join(get_args(Layout))} are known")
    layouts = tuple(source.layouts or [nchw] * len(stage_names))
    if len(outputs) != len(stage_names) or [len(axes) for axes in layouts] != [output.ndim for output in outputs]:
        shapes = [tuple(output.shape) for output in outputs]
        raise SourceError(f"this {type(net).__name__} returns {shapes}, not {', '.join(layouts)} for {stage_names}")
    channels = tuple(int(o.shape[axes.index("C")]) for o, axes in zip(outputs, layouts, strict=True))
    kept = [stage_names.index(feature) for feature in features]
    return LoadedBackbone(
        module=_Chosen(net, stage_names, kept, writes_input=image._version > 0).eval(),
        source=preprocessing.written_into(
            Source(library="torch", name=type(net).__name__, weights="module", weights_sha256=tensors_sha256(net))
        ),
        image_config=preprocessing.config,
        channels_in=source.num_channels,
        height=height,
        width=width,
        spec=BackboneSpec(
            stage_names=stage_names,
            out_features=features,
            out_indices=indices,
            channels=tuple(channels[i] for i in kept),
            strides=tuple(_strides(outputs[i], layouts[i], height, width) for i in kept),
            num_features=channels,
            layouts=tuple(layouts[i] for i in kept),
        ),
        image_differs=preprocessing.differs,
    )


class _Chosen(nn.Module):
    """Some outputs of a module, as float32 maps. A module that writes into its input gets an image of its own."""

    def __init__(self, net: nn.Module, stage_names: tuple[str, ...], chosen: list[int], *, writes_input: bool) -> None:
        super().__init__()
        self.net = net
        self.stage_names = stage_names
        self.chosen = chosen
        self.writes_input = writes_input

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = feature_maps(self.net(pixel_values.clone() if self.writes_input else pixel_values), self.stage_names)
        return tuple(outputs[i] for i in self.chosen)


def _strides(output: torch.Tensor, layout: Layout, height: int, width: int) -> tuple[int, int]:
    """Return input pixels per cell of a map, (vertical, horizontal); 1 for outputs without cells."""
    if "H" not in layout:
        return 1, 1
    cells = (int(output.shape[layout.index(axis)]) for axis in "HW")
    vertical, horizontal = (max(1, round(n / m)) for n, m in zip((height, width), cells, strict=True))
    return vertical, horizontal
