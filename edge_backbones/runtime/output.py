"""The output of a call, in the form of transformers without torch."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

_Map = TypeVar("_Map")


class BackboneOutput(dict[str, tuple[Any, ...]], Generic[_Map]):
    """Hold the output of a call, like ``transformers.modeling_outputs.BackboneOutput`` without torch.

    ``feature_maps`` is a tuple of arrays in stage order: numpy arrays, or DeviceArrays if the input was on the
    GPU. For type checkers they are numpy arrays, unless the input is a `DeviceArray`: they cannot see where a tensor of
    another library lies. As in transformers, fields that are None are not keys; ``output[0]``, ``output["feature_maps"]``
    and ``output.feature_maps`` are the same; iterating yields the keys.
    """

    def __init__(
        self,
        feature_maps: tuple[_Map, ...],
        hidden_states: tuple[_Map | None, ...] | None = None,
        attentions: None = None,
        cls_tokens: tuple[_Map, ...] | None = None,
    ) -> None:
        fields = {
            "feature_maps": feature_maps,
            "hidden_states": hidden_states,
            "attentions": attentions,
            "cls_tokens": cls_tokens,
        }
        super().__init__({name: value for name, value in fields.items() if value is not None})

    @property
    def feature_maps(self) -> tuple[_Map, ...]:
        """Return one array per chosen stage: NCHW, or as ``EdgeBackbone.layouts`` says."""
        return super().__getitem__("feature_maps")

    @property
    def hidden_states(self) -> tuple[_Map | None, ...] | None:
        """Return one array per layer or stage of the network; None if none were asked for.

        If only some were asked for, the others are None.
        """
        return self.get("hidden_states")

    @property
    def attentions(self) -> None:
        """Return None: a compiled engine has no attention weights."""

    @property
    def cls_tokens(self) -> tuple[_Map, ...] | None:
        """Return a (batch, channels) array per chosen stage, for networks that return class tokens beside their maps."""
        return self.get("cls_tokens")

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are not None."""
        return tuple(self.values())

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __repr__(self) -> str:
        fields = (f"{name}=[{', '.join(str(a.shape) for a in arrays)}]" for name, arrays in self.items())
        return f"BackboneOutput({', '.join(fields)})"
