"""A plain torch module with a description. Importing this needs no torch, so that the class is public everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_backbones.spec import Layout

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class ModuleSource:
    """A plain ``nn.Module`` and what cannot be read off it.

    Args:
        module: takes float32 NCHW and returns one float tensor per name in ``stage_names``: a dict or dataclass with these
            names (others in it are left out), or tensors in that order. Nested tuples, lists and dicts are read depth
            first, and None is left out.
        stage_names: a name for every output.
        size: (height, width) that it is made for.
        num_channels: channels of its input.
        layouts: the axes of each output, NCHW by default.
        image: the preprocessing that it was trained with: an image processor of transformers, the folder of one, a data
            configuration of timm, or an ImageConfig. Without one ImageNet's is taken, and the build says so.
    """

    module: nn.Module
    stage_names: Sequence[str]
    size: tuple[int, int] = (224, 224)
    num_channels: int = 3
    layouts: Sequence[Layout] | None = None
    image: Any = None
