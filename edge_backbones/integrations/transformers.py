"""Replace the backbone of a transformers model by a bundle: DETR, Mask2Former, UperNet, DPT and models built like them.

::

    model = DetrForObjectDetection.from_pretrained("facebook/detr-resnet-50").eval()
    build_bundle(model, "detr-backbone.bundle", images="photographs", options=BuildOptions(from_model=True))
    replace_backbone(model, "detr-backbone.bundle")     # model(pixel_values=...) as before

Needs torch and transformers (4.44 or newer) beside the engine library.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BackboneOutput

from edge_backbones.bundle.manifest import Source
from edge_backbones.errors import ClientMismatchError
from edge_backbones.integrations.clients import find_backbone, is_backbone
from edge_backbones.integrations.modules import EngineModule, open_for_client
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.runtime.config import BackboneConfig

_BEFORE_5_1 = importlib.util.find_spec("transformers.backbone_utils") is None
_BACKBONE_TYPES: Any = importlib.import_module(
    "transformers.utils.backbone_utils" if _BEFORE_5_1 else "transformers.backbone_utils"
).BackboneType


@dataclass
class BackboneOutputWithTokens(BackboneOutput):  # type: ignore[misc]
    """transformers' BackboneOutput and the class token of each stage, as DINOv3 returns it."""

    cls_tokens: tuple[torch.Tensor, ...] | None = None


class EdgeBackboneModule(EngineModule):
    """A compiled backbone as the ``nn.Module`` that transformers' models expect.

    It answers like ``AutoBackbone.from_pretrained(...)``: ``channels``, ``out_features`` and ``out_indices`` (narrowing
    when set), ``stage_names``, ``num_features``, ``config``, ``backbone_type``, ``has_attentions``,
    ``forward_with_filtered_kwargs``. ``as_list``: return a plain list of maps, as timm's feature extractors do. See
    :class:`EngineModule` for dtypes, devices, gradients and saving.
    """

    def __init__(self, backbone: EdgeBackbone, *, as_list: bool = False) -> None:
        super().__init__(backbone)
        self.as_list = as_list

    @property
    def stage_names(self) -> list[str]:
        """Names of all stages of the network."""
        return self.backbone.stage_names

    @property
    def out_features(self) -> list[str]:
        """Names of the stages that a call returns; setting them narrows the output."""
        return self.backbone.out_features

    @out_features.setter
    def out_features(self, out_features: list[str] | None) -> None:
        self.backbone.out_features = out_features

    @property
    def out_indices(self) -> list[int]:
        """Indices of the stages that a call returns; setting them narrows the output."""
        return self.backbone.out_indices

    @out_indices.setter
    def out_indices(self, out_indices: Sequence[int] | None) -> None:
        self.backbone.out_indices = out_indices  # type: ignore[assignment]

    @property
    def channels(self) -> list[int]:
        """Channels of each returned map."""
        return self.backbone.channels

    @property
    def num_features(self) -> list[int]:
        """Channels of each stage of the network, as transformers counts them."""
        return self.backbone.num_features

    @property
    def out_feature_channels(self) -> dict[str, int]:
        """Channels of each returned map, by stage name."""
        return self.backbone.out_feature_channels

    @property
    def config(self) -> BackboneConfig:
        """The configuration that transformers' models read."""
        return self.backbone.config

    @property
    def has_attentions(self) -> bool:
        """Whether the network could return attention weights."""
        return self.backbone.has_attentions

    @property
    def backbone_type(self) -> Any:
        """The enum of transformers: TIMM or TRANSFORMERS."""
        return _BACKBONE_TYPES(self.backbone.backbone_type)

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        dataset_index: torch.Tensor | None = None,
        **ignored: Any,
    ) -> Any:
        """Return a BackboneOutput of transformers; a tuple with ``return_dict=False``, a list of maps with ``as_list``.

        Hidden states that the bundle does not hold are None, because some models of transformers 5 always ask for them
        and do not use them. Raises InputError for a size, a stage or an index that the engine was not built for.
        """
        output = self.infer(
            pixel_values,
            output_hidden_states=output_hidden_states if self.backbone.has_hidden_states else None,
            output_attentions=output_attentions,
            dataset_index=None if dataset_index is None else dataset_index.cpu(),
        )
        if self.as_list:
            return list(output["feature_maps"])
        if return_dict is False:
            return tuple(output.values())
        output_class = BackboneOutputWithTokens if "cls_tokens" in output else BackboneOutput
        return output_class(**output)  # type: ignore[arg-type]

    def forward_with_filtered_kwargs(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module; arguments that an engine does not know are ignored."""
        return self(*args, **kwargs)


def replace_backbone(
    model: nn.Module,
    bundle: str | os.PathLike[str],
    *,
    engine: str | None = None,
    threads: int | None = None,
    same_weights: bool = True,
    check_finite: bool = True,
    allow_host_code: bool = False,
) -> nn.Module:
    """Replace a model's backbone by a bundle, and return the original backbone.

    First the model's own backbone runs on an image from the bundle: the number of maps, their channels and their sizes must
    be those of the bundle, and with ``same_weights`` their values too. ``engine``, ``threads``, ``check_finite`` and
    ``allow_host_code`` are those of :meth:`EdgeBackbone.from_pretrained`. If an error is raised, the model is unchanged.

    Afterwards ``model.state_dict()`` and ``save_pretrained`` hold the model without its backbone. For ``torch.save`` of the
    whole model see :class:`EngineModule`.

    Raises SourceError when the model has no backbone, or several; ClientMismatchError when the bundle does not fit, with
    the reason; BundleError and EngineMismatchError as ``from_pretrained``.
    """
    original: Any = find_backbone(model).module
    as_list = not is_backbone(original) or getattr(original, "as_list", False)
    needs_tokens = False

    def run(pixel_values: torch.Tensor, source: Source) -> Sequence[torch.Tensor]:
        nonlocal needs_tokens
        expert = source.options.get("dataset_index")
        arguments = {} if expert is None else {"dataset_index": torch.tensor([expert], device=pixel_values.device)}
        output = original(pixel_values, **arguments)
        needs_tokens = getattr(output, "cls_tokens", None) is not None
        maps = getattr(output, "feature_maps", output)
        return list(maps.values()) if isinstance(maps, dict) else list(maps)

    backbone = open_for_client(
        bundle,
        original,
        run,
        _stages(original),
        engine=engine,
        threads=threads,
        same_weights=same_weights,
        check_finite=check_finite,
        allow_host_code=allow_host_code,
    )
    if needs_tokens and not backbone.has_cls_tokens:
        raise ClientMismatchError(
            f"the client reads class tokens, which {bundle} does not hold: build it from this client's own backbone"
        )
    engine_module = EdgeBackboneModule(backbone, as_list=as_list).train(original.training)
    for parent in list(model.modules()):
        for name in [name for name, child in parent._modules.items() if child is original]:
            setattr(parent, name, engine_module)  # a module may be registered under several names
    return original  # type: ignore[no-any-return]


def _stages(original: Any) -> list[str]:
    """Return the names of the stages that a forward returns. A TimmBackbone's ``out_features`` ignore its setter."""
    extractor = getattr(original, "_backbone", original)
    info = getattr(extractor, "feature_info", None)
    if info is None:
        return list(original.out_features)
    names = [str(stage["module"]) for stage in info.info]
    return [names[i] for i in sorted(i % len(names) for i in info.out_indices)]
