"""Say what a backbone takes and returns, and choose its stages, with the attributes of transformers' BackboneMixin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from edge_backbones.bundle.manifest import Source
from edge_backbones.runtime.config import BackboneConfig
from edge_backbones.spec import BackboneSpec, FloatType, InputSpec


class BackboneDescription:
    """Hold the attributes of an `EdgeBackbone`, whose docstring explains the arguments. Nothing here needs the engine."""

    def __init__(
        self,
        spec: BackboneSpec,
        input: InputSpec,
        source: Source | None,
        device: str,
        engine_name: str,
        passed_over: Mapping[str, str],
    ) -> None:
        self._spec = spec
        self._input = input
        self._source = source
        self._device = device
        self._engine_name = engine_name
        self._passed_over = dict(passed_over)
        self._config = BackboneConfig(spec, {} if source is None else source.config)

    @property
    def input(self) -> InputSpec:
        """Return the name, dtype, layout and sizes that the engine takes."""
        return self._input

    @property
    def device(self) -> str:
        """Return where the engine runs: ``cpu`` or ``cuda:0``. Outputs are where the input of their call was."""
        return self._device

    @property
    def engine(self) -> str:
        """Return the chosen engine's name in the manifest; empty for an engine that is not from a bundle."""
        return self._engine_name

    @property
    def passed_over(self) -> dict[str, str]:
        """Return why each other engine of the bundle does not run here, by name."""
        return dict(self._passed_over)

    @property
    def stage_names(self) -> list[str]:
        """Return the names of all stages of the network, compiled or not."""
        return list(self._spec.stage_names)

    @property
    def out_features(self) -> list[str]:
        """Return the names of the stages that a call returns. Set it to a subset of the compiled stages."""
        return self._config.out_features

    @out_features.setter
    def out_features(self, out_features: Sequence[str] | None) -> None:
        self._config.out_features = out_features  # type: ignore[assignment]

    @property
    def out_indices(self) -> list[int]:
        """Return the indices into ``stage_names`` of the stages that a call returns. Set it to a subset.

        They are as given: -1 stays -1.
        """
        return self._config.out_indices

    @out_indices.setter
    def out_indices(self, out_indices: Sequence[int] | None) -> None:
        self._config.out_indices = out_indices  # type: ignore[assignment]

    @property
    def channels(self) -> list[int]:
        """Return the number of channels of each returned map."""
        return self._config.channels

    @property
    def strides(self) -> list[tuple[int, int]]:
        """Return how many input pixels one cell of each returned map covers, as (vertical, horizontal)."""
        return [self._spec.strides[i] for i in self._config._chosen]

    @property
    def layouts(self) -> list[str]:
        """Return the axes of each returned map.

        ``NCHW`` for most networks, ``NHWC`` or ``NLC`` (tokens) if the source has it.
        """
        return [self._spec.layouts[i] for i in self._config._chosen]

    @property
    def map_dtype(self) -> FloatType:
        """Return the dtype of feature maps and of every other output."""
        return self._spec.map_dtype

    @property
    def channels_last(self) -> bool:
        """Return whether NCHW maps lie in channels-last memory, as torch's ``channels_last`` format."""
        return self._spec.channels_last

    @property
    def num_features(self) -> list[int]:
        """Return the number of channels of every stage of the network, in the order of ``stage_names``."""
        return list(self._spec.num_features)

    @property
    def out_feature_channels(self) -> dict[str, int]:
        """Return the number of channels of every stage of the network, by name."""
        return dict(zip(self._spec.stage_names, self._spec.num_features, strict=True))

    @property
    def has_cls_tokens(self) -> bool:
        """Return whether a call returns the class token of each stage."""
        return bool(self._spec.cls_tokens)

    @property
    def has_hidden_states(self) -> bool:
        """Return whether a call can return hidden states."""
        return bool(self._spec.hidden_states)

    @property
    def has_attentions(self) -> bool:
        """Return whether the source network can return attention weights.

        An engine never returns them: a call that asks for them raises InputError if this is True.
        """
        return self._spec.has_attentions

    @property
    def backbone_type(self) -> Literal["timm", "transformers"]:
        """Return transformers' ``BackboneType`` of the network: ``timm`` for a network of timm, else ``transformers``."""
        is_timm = self._source is not None and (
            self._source.library == "timm" or self._source.config.get("model_type") == "timm_backbone"
        )
        return "timm" if is_timm else "transformers"

    @property
    def config(self) -> BackboneConfig:
        """Return the source's configuration (``hidden_size``, ``patch_size``, ...).

        Its ``out_features`` are this backbone's.
        """
        return self._config

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain values, with the stages that are chosen now.

        See :meth:`BackboneConfig.to_dict`.
        """
        return self._config.to_dict()

    def __repr__(self) -> str:
        return (
            f"EdgeBackbone(out_features={self.out_features}, channels={self.channels}, input={self._input.describe()})"
        )
