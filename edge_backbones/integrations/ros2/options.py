"""The parameters of the node, and what their values mean. Nothing here imports ROS."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_type_hints

from edge_backbones.errors import InputError

Transport = Literal["raw", "compressed"]
Topics = Literal["each", "all"]
Publish = Literal["subscribed", "all"]
Wanted = Literal["auto", "tensor_list", "feature_maps", "multi_array"]
Reliability = Literal["best_effort", "reliable"]

_HIGHEST_RATE = 1000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The values of the node's parameters. A parameter's description is what ``ros2 param describe`` prints."""

    bundle: Annotated[str, "Folder of the bundle."] = ""
    engine: Annotated[str, "Precision, flavour or name of the engine. Empty: the best that runs here."] = ""
    device: Annotated[str, "Where the engine runs: auto, cpu, cuda or cuda:1."] = "auto"
    threads: Annotated[int, "Most CPU threads of the engine and of the preprocessing. 0: all CPUs of the process."] = 0
    trusted: Annotated[str, "PEM file or folder of keys of which one must have signed the bundle. Empty: none."] = ""
    stages: Annotated[tuple[str, ...], "Stages that are published. Empty: all of the bundle."] = ()
    transport: Annotated[Transport, "raw: image is a sensor_msgs/Image. compressed: image/compressed is used."] = "raw"
    output: Annotated[
        Wanted, "tensor_list, feature_maps or multi_array; auto: the first of them that is installed."
    ] = "auto"
    topics: Annotated[Topics, "each: one topic for each stage. all: one topic for all of them."] = "each"
    publish: Annotated[Publish, "subscribed: compute and publish what somebody reads. all: every stage."] = "subscribed"
    reliability: Annotated[Reliability, "Of the images: best_effort or reliable."] = "best_effort"
    output_reliability: Annotated[Reliability, "Of the maps: best_effort or reliable."] = "reliable"
    picture_rate: Annotated[float, "Most pictures of the maps per second, while somebody reads them. 0: none."] = 1.0
    diagnostics_period: Annotated[float, "Seconds from one diagnostics message to the next. 0: none."] = 1.0
    autostart: Annotated[bool, "Configure and activate when the program starts."] = False

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Options:
        """Check the values of parameters. Raises InputError with the parameter, its value, and what it may be."""
        return cls(**{name: _CHECKS[name](name, values[name]) for name in DESCRIPTIONS})


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"parameter {name} is a text, got {value!r}: put it into quotes")
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if value is None:  # ROS has no type for an empty list, and gives none
        return ()
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(one, str) for one in value):
        raise InputError(f"parameter {name} is a list of texts, got {value!r}: write ['layer3', 'layer4']")
    return tuple(one for one in value if one)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError(f"parameter {name} is a whole number from 0, got {value!r}: 0 is the default")
    return value


def _number(name: str, value: Any) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0 <= value <= _HIGHEST_RATE:
        raise InputError(f"parameter {name} is a number from 0 to {_HIGHEST_RATE:g}, got {value!r}: 0 turns it off")
    return float(value)


def _switch(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"parameter {name} is true or false, got {value!r}")
    return value


def _choice(kind: Any) -> Any:
    choices = get_args(kind)

    def check(name: str, value: Any) -> str:
        if value not in choices:
            raise InputError(f"parameter {name} is {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}")
        return str(value)

    return check


_CHECKS = {
    **dict.fromkeys(("bundle", "engine", "device", "trusted"), _text),
    "stages": _texts,
    "threads": _whole,
    "transport": _choice(Transport),
    "output": _choice(Wanted),
    "topics": _choice(Topics),
    "publish": _choice(Publish),
    **dict.fromkeys(("reliability", "output_reliability"), _choice(Reliability)),
    **dict.fromkeys(("picture_rate", "diagnostics_period"), _number),
    "autostart": _switch,
}
DESCRIPTIONS: dict[str, str] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Options, include_extras=True).items()
}
"""What each parameter is for, by name."""

DEFAULTS: dict[str, Any] = {
    # A ROS parameter that is an empty list has no type: one empty text stands for it.
    field.name: [""] if field.default == () else field.default
    for field in dataclasses.fields(Options)
}
"""The value of each parameter that is not given."""
