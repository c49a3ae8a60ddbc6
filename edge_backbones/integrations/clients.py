"""Find the backbone inside a model, by its interface rather than by a list of model classes.

A backbone of transformers (and :class:`~edge_backbones.integrations.transformers.EdgeBackboneModule`) answers
``forward_with_filtered_kwargs``; a feature extractor of timm carries ``feature_info``. DETR and its relatives unwrap
transformers' TimmBackbone and keep timm's feature extractor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edge_backbones.errors import SourceError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Place:
    """A submodule of a client, and the path that leads to it."""

    path: str
    module: nn.Module


def is_backbone(module: Any) -> bool:
    """Return whether a module has the backbone interface of transformers."""
    return hasattr(module, "forward_with_filtered_kwargs") and hasattr(module, "out_features")


def is_timm_module(module: Any) -> bool:
    """Return whether a module is a feature extractor or a whole network of timm."""
    return hasattr(module, "feature_info") and not is_backbone(module)


def find_backbone(client: nn.Module) -> Place:
    """Return the one outermost backbone inside a client. Raises SourceError if there is none, or more than one."""
    found: list[Place] = []
    for path, module in client.named_modules():
        if not path or any(path.startswith(f"{place.path}.") for place in found):
            continue
        is_extractor = is_timm_module(module) and not isinstance(module.feature_info, list)
        if is_backbone(module) or is_extractor:
            found.append(Place(path, module))
    if not found:
        raise SourceError(
            f"no backbone was found inside this {type(client).__name__}: it must hold a backbone of transformers "
            "(AutoBackbone) or a timm feature extractor as a submodule"
        )
    if len(found) > 1:
        paths = ", ".join(place.path for place in found)
        raise SourceError(f"this {type(client).__name__} holds several backbones ({paths}): pass the part with one")
    return found[0]
