"""Hold the configuration of a backbone, as in transformers."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from edge_backbones.errors import InputError
from edge_backbones.spec import BackboneSpec, align_stages

_OF_THE_STAGES = ("stage_names", "out_features", "out_indices", "channels", "num_features")


class BackboneConfig:
    """Hold the configuration that the network came with, and the stages that its backbone returns.

    It is ``backbone.config``. As in transformers, setting ``out_features`` or ``out_indices`` narrows the backbone, by
    the rules of :attr:`EdgeBackbone.out_features`. ``stage_names``, ``channels`` and ``num_features`` follow from the
    compiled stages and cannot be set. Every other attribute (``hidden_size``, ``patch_size``, ...) is a plain value.
    """

    def __init__(self, spec: BackboneSpec, source: Mapping[str, Any]) -> None:
        plain = {key: value for key, value in source.items() if key not in _OF_THE_STAGES}
        self.__dict__.update(copy.deepcopy(plain))
        self._spec = spec
        self._chosen = tuple(range(len(spec.out_features)))
        self._out_indices = list(spec.out_indices)

    @property
    def stage_names(self) -> list[str]:
        """Return the names of all stages of the network."""
        return list(self._spec.stage_names)

    @property
    def out_features(self) -> list[str]:
        """Return the names of the stages that a call returns."""
        return [self._spec.out_features[i] for i in self._chosen]

    @out_features.setter
    def out_features(self, out_features: Sequence[str] | None) -> None:
        self._choose(*align_stages(self._spec.stage_names, out_features=out_features))

    @property
    def out_indices(self) -> list[int]:
        """Return the indices into ``stage_names`` of the stages that a call returns, as given."""
        return list(self._out_indices)

    @out_indices.setter
    def out_indices(self, out_indices: Sequence[int] | None) -> None:
        self._choose(*align_stages(self._spec.stage_names, out_indices=out_indices))

    @property
    def channels(self) -> list[int]:
        """Return the number of channels of each returned map."""
        return [self._spec.channels[i] for i in self._chosen]

    @property
    def num_features(self) -> list[int]:
        """Return the number of channels of every stage of the network."""
        return list(self._spec.num_features)

    def to_dict(self) -> dict[str, Any]:
        """Return a copy as plain values.

        If the bundle was built from transformers, ``Config.from_dict`` of that library takes it.
        """
        plain = {key: value for key, value in vars(self).items() if key not in ("_spec", "_chosen", "_out_indices")}
        return {**copy.deepcopy(plain), **{key: getattr(self, key) for key in _OF_THE_STAGES}}

    def __getattr__(self, name: str) -> Any:  # declared for type checkers: the source defines the attributes
        raise AttributeError(f"this configuration has no {name!r}: the source of the bundle has none")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BackboneConfig) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"BackboneConfig({', '.join(f'{key}={value!r}' for key, value in self.to_dict().items())})"

    def _choose(self, wanted: tuple[str, ...], indices: tuple[int, ...]) -> None:
        """Choose stages by name; raise InputError for one that is not compiled."""
        missing = [name for name in wanted if name not in self._spec.out_features]
        if missing:
            raise InputError(
                f"stages {missing} are not compiled into this bundle, which holds {list(self._spec.out_features)}: "
                "build it again with these out_features"
            )
        self._chosen = tuple(self._spec.out_features.index(name) for name in wanted)
        self._out_indices = list(indices)


def selected(hidden_states: bool | int | Sequence[int], count: int) -> set[int]:
    """Return which of ``count`` hidden states are asked for, by the rules of transformers' ``output_hidden_states``."""
    if isinstance(hidden_states, bool):
        return set(range(count))
    indices = [hidden_states] if isinstance(hidden_states, int) else hidden_states
    return {i % count for i in indices if -count <= i < count}
