"""Define the options of a build."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from edge_backbones.engines import promises
from edge_backbones.errors import InputError
from edge_backbones.images.camera import frame_spec
from edge_backbones.machine.system import default_cache
from edge_backbones.option import Option, documented
from edge_backbones.parity_report import Gate
from edge_backbones.spec import Color, FloatType, FrameSpec, Matrix, Precision, Range, ShapeRange, precisions_of

if TYPE_CHECKING:
    from edge_backbones.machine.profiles import DeviceProfile
    from edge_backbones.toolchain.sources.base import SourceOptions

Method = Literal["auto", "max", "percentile", "entropy", "mse"]
METHODS = get_args(Method)
PROGRAMS = ("torchscript", "exported_program")
MAPS = ("float16", "channels-last")
INPUTS = ("pixel_values", "image", "frame")
_AUTO = (Precision.FP32, Precision.FP16, Precision.INT8)  # and bf16, if this CPU has it: see candidates.py
_MOST_PIXELS = 1 << 24  # of a side: what a manifest holds
OF_CALIBRATED = ("method", "percentile", "calibration", "exclude")
"""Options that mean nothing to other precisions."""


@documented
@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Say what to build: which network and stages, for which input, with which engines.

    Sizes may be ranges. ``build_bundle`` compiles engines for this machine's CPU, and those for libtorch that
    ``flavours`` asks for; ``compile_bundle`` adds others to the finished bundle.

    Raises:
        InputError: An option is out of range, or means nothing beside the others.
    """

    weights: Annotated[
        str,
        Option(
            "Where the weights come from: pretrained, random:SEED, or a checkpoint file (.safetensors, or .pth / .ckpt "
            "without code). Prefixes of names such as module. or backbone. are removed. Of a training checkpoint the EMA "
            "weights are preferred, then those of a teacher.",
            group="Network",
        ),
    ] = "pretrained"
    from_model: Annotated[
        bool, Option("The model is a whole one, such as DETR: take the backbone inside it.", group="Network")
    ] = False
    num_channels: Annotated[
        int | None, Option("How many channels the input has. By default as the network has.", group="Network", least=1)
    ] = None
    output_stride: Annotated[
        int | None,
        Option(
            "Dilate the last stages so that no stride is larger than this: 8 or 16. Only some networks of timm can.",
            group="Network",
        ),
    ] = None
    out_indices: Annotated[
        tuple[int, ...] | None,
        Option("Which stages to keep, by index, such as 1,2,3,4 or -2,-1. By default the last one."),
    ] = None
    out_features: Annotated[tuple[str, ...] | None, Option("Which stages to keep, by name, such as layer1,layer4.")] = (
        None
    )
    hidden_states: Annotated[
        bool, Option("Return every hidden state too, for output_hidden_states=True.", group="Network")
    ] = False
    dataset_index: Annotated[
        int, Option("Which expert to take of a ViTPose network that has several.", group="Network", least=0)
    ] = 0
    image: Annotated[
        Any,
        Option(
            "The preprocessing, for a model that comes with none: the folder of an image processor of transformers, or its "
            "preprocessor_config.json.",
            group="Network",
            in_python="Or the processor itself, a data configuration of timm, or an `ImageConfig`.",
        ),
    ] = None
    input: Annotated[
        Literal["pixel_values", "image", "frame"],
        Option(
            "What the engine takes. pixel_values: float NCHW, normalised. image: uint8 NHWC, RGB, at the network's size; the "
            "graph normalises. frame: whole frames of a camera; the graph converts, crops, resizes and normalises them too.",
            group="Input",
        ),
    ] = "pixel_values"
    frame: Annotated[
        tuple[int, int] | None,
        Option(
            "Height and width of the camera's frames, for input frame. A bundle takes frames of one size.",
            group="Input",
        ),
    ] = None
    color: Annotated[
        Color | None,
        Option(
            "How the camera stores a pixel, for input frame: rgb (the default), bgr as OpenCV has it, gray, nv12 as "
            "hardware decoders and Jetson cameras have it, or yuyv (YUY2) as USB cameras have it.",
            group="Input",
        ),
    ] = None
    yuv_matrix: Annotated[
        Matrix | None,
        Option(
            "The standard of nv12 and yuyv frames. By default bt709 for 720 rows or more, else bt601.",
            group="Input",
        ),
    ] = None
    yuv_range: Annotated[
        Range | None,
        Option(
            "The luma of nv12 and yuyv frames: 16 to 235 (limited, the default) or 0 to 255 (full).",
            group="Input",
        ),
    ] = None
    pixels: Annotated[
        FloatType,
        Option(
            "Dtype of pixel_values: float32, or float16, which halves what is copied to a GPU. Frames are uint8 anyway.",
            group="Input",
        ),
    ] = "float32"
    maps: Annotated[
        tuple[Literal["float16", "channels-last"], ...],
        Option(
            "What the feature maps are: float16 instead of float32, channels-last memory (the strides of torch's "
            "channels_last) instead of channels-first, or both. Shapes stay (batch, channels, height, width).",
        ),
    ] = ()
    batch: Annotated[
        int | ShapeRange | None,
        Option(
            "How many images one call takes: a number, or a range MIN:OPT:MAX. By default what suits the device of the "
            "profile, else 1.",
            group="Input",
        ),
    ] = None
    height: Annotated[
        int | ShapeRange | None,
        Option(
            "Height of the input. By default what the network's preprocessing makes, else the network's own, else that of "
            "the profile.",
            has_flag=False,
        ),
    ] = None
    width: Annotated[int | ShapeRange | None, Option("Width of the input, given with the height.", has_flag=False)] = (
        None
    )
    precisions: Annotated[
        tuple[Precision | str, ...] | Literal["auto"],
        Option(
            "Number format of the engine, one engine each. auto: the fastest of fp32, bf16, fp16 and int8 on this "
            "machine that passes its accuracy gate. By default int8."
        ),
    ] = (Precision.INT8,)
    method: Annotated[
        Method | None,
        Option(
            "How to find the range of values of each tensor. auto, the default, takes for each stage the method that leaves "
            "it the least noise.",
            group="int8 and fp8",
        ),
    ] = None
    percentile: Annotated[
        float | None,
        Option(
            "How many percent of a tensor's values method percentile keeps inside the range. By default 99.99.",
            group="int8 and fp8",
        ),
    ] = None
    calibration: Annotated[
        Path | None,
        Option(
            "Take the ranges from this calibration.json, or from the bundle that holds it, instead of calibrating. It must "
            "be of the same network.",
            group="int8 and fp8",
        ),
    ] = None
    exclude: Annotated[
        tuple[str, ...],
        Option(
            "Layers to leave in fp16: a module (blocks.0), a pattern (*.mlp.fc2), op:Add or stage:layer4.",
            group="int8 and fp8",
        ),
    ] = ()
    fallback: Annotated[
        bool,
        Option(
            "If int8 or fp8 misses the accuracy gate, leave the noisiest blocks in fp16 until it passes.",
            group="int8 and fp8",
        ),
    ] = True
    gates: Annotated[
        Mapping[Precision, Gate],
        Option("Accuracy gates that replace the default ones, by precision.", has_flag=False),
    ] = field(default_factory=dict)
    profile: Annotated[
        str | Path | None,
        Option(
            "The device that the bundle is for: a name that `edge-backbones profiles` lists, or a .toml file. What it cannot "
            "run is refused, and its usual batch is the default."
        ),
    ] = None
    golden: Annotated[int, Option("How many images the accuracy of each engine is measured on.", least=1)] = 4
    torchscript: Annotated[
        bool, Option("Write the network as a TorchScript program too, for libtorch.", group="Engines for libtorch")
    ] = True
    flavours: Annotated[
        tuple[Literal["torchscript", "torch_tensorrt"], ...],
        Option(
            "Engines for libtorch to make besides those of OpenVINO. Engines of TensorRT are made by "
            "`edge-backbones compile`.",
            group="Engines for libtorch",
        ),
    ] = ()
    program: Annotated[
        Literal["torchscript", "exported_program"],
        Option(
            "What torch_tensorrt writes: a program for torch.jit.load, or one for torch.export.load.",
            group="Engines for libtorch",
        ),
    ] = "torchscript"
    cache: Annotated[
        Path | None, Option("Folder of engines that were compiled before; None for no cache.", has_flag=False)
    ] = field(default_factory=default_cache)

    def __post_init__(self) -> None:
        if self.input not in INPUTS:
            raise InputError(f"input must be {', '.join(map(repr, INPUTS[:-1]))} or {INPUTS[-1]!r}, got {self.input!r}")
        for option in ("out_features", "exclude", "flavours", "maps"):  # one name stands for a tuple of it
            if isinstance(value := getattr(self, option), str):
                object.__setattr__(self, option, (value,))
        if unknown := set(self.flavours) - {"torchscript", "torch_tensorrt"}:
            raise InputError(
                f"flavours are torchscript and torch_tensorrt, got {', '.join(sorted(unknown))}: edge-backbones compile "
                "adds engines of other libraries to a finished bundle"
            )
        self._check_formats()
        if self.precisions != "auto":
            object.__setattr__(self, "precisions", precisions_of(self.precisions))
        object.__setattr__(self, "gates", dict(zip(precisions_of(self.gates), self.gates.values(), strict=True)))
        if self.precisions != "auto" and (not self.precisions or len(set(self.precisions)) != len(self.precisions)):
            raise InputError(
                f"precisions must be 'auto' or at least one of {', '.join(Precision)}, each once; got {self.precisions}"
            )
        if self.method not in (None, *METHODS) or not (self.percentile is None or 0 < self.percentile <= 100):
            raise InputError(
                f"method must be {', '.join(METHODS)} and percentile in (0, 100]; got {self.method!r} and {self.percentile}"
            )
        if self.percentile is not None and self.method not in (None, "auto", "percentile"):
            raise InputError(
                f"percentile is {self.percentile}, which method {self.method} does not read: leave one out"
            )
        for option in OF_CALIBRATED:
            if not self.needs_ranges and getattr(self, option) not in (None, ()):
                raise InputError(
                    f"{option} is of int8 and fp8, and {', '.join(self.wanted)} is what is built: leave {option} out, or "
                    "add --precision int8"
                )
        for size in (self.batch, self.height, self.width):
            if isinstance(size, int) and size < 1:
                raise InputError(f"batch, height and width must be at least 1, got {size}")
        if self.output_stride not in (None, 8, 16, 32):
            raise InputError(f"output_stride must be 8, 16 or 32, got {self.output_stride}")
        if "torchscript" in self.flavours and not self.torchscript:
            raise InputError("flavour torchscript is the file graphs/fp32.ts: leave torchscript=True")
        if self.program not in PROGRAMS:
            raise InputError(f"program must be {' or '.join(PROGRAMS)}, got {self.program!r}")
        if self.program != PROGRAMS[0] and "torch_tensorrt" not in self.flavours:
            raise InputError(
                f"program {self.program} is of flavour torch_tensorrt, which is not built: add it, or leave it"
            )
        for precision, gate in self.gates.items():
            if not promises.refuses_zeros(gate):
                raise InputError(
                    f"the gate of {precision} asks for {gate}, which a map of zeros passes: give it a bound such as "
                    "Gate(min_cosine=0.9)"
                )
        if self.golden < 1:
            raise InputError(f"golden must be at least 1 image, got {self.golden}")
        if (self.height is None) != (self.width is None):
            raise InputError(f"height and width go together, got {self.height} and {self.width}")

    def _check_formats(self) -> None:
        """Raise InputError for formats of the input and of the maps that do not exist or mean nothing."""
        if unknown := [name for name in self.maps if name not in MAPS]:
            raise InputError(f"maps are {' and '.join(MAPS)}, got {', '.join(map(str, unknown))}: choose among these")
        if self.pixels not in get_args(FloatType):
            raise InputError(f"pixels must be {' or '.join(get_args(FloatType))}, got {self.pixels!r}")
        if self.input != "pixel_values" and self.pixels != "float32":
            raise InputError(
                f"pixels is {self.pixels}, and input is {self.input}, which is uint8: leave pixels out, or build for "
                "pixel_values"
            )
        self._check_frame()

    def _check_frame(self) -> None:
        """Raise InputError for a frame without its size, for what is said of frames without one, and for odd values."""
        if self.input != "frame":
            said = [name for name in ("frame", "color", "yuv_matrix", "yuv_range") if getattr(self, name) is not None]
            if said:
                raise InputError(
                    f"{' and '.join(said)} {'is' if len(said) == 1 else 'are'} of input frame, and input is {self.input}: "
                    "add input='frame' (--input frame)"
                )
            return
        if self.frame is None:
            raise InputError("input is frame, and their size is not given: add frame=(1080, 1920) (--frame 1080x1920)")
        try:
            height, width = map(operator.index, self.frame)
        except (TypeError, ValueError):
            height, width = 0, 0
        if not (1 <= height <= _MOST_PIXELS and 1 <= width <= _MOST_PIXELS):
            raise InputError(
                f"frame is the (height, width) of the camera's frames, such as (1080, 1920), each side 1 to {_MOST_PIXELS} "
                f"pixels, got {self.frame}"
            )
        object.__setattr__(self, "frame", (height, width))
        for name, kind in (("color", Color), ("yuv_matrix", Matrix), ("yuv_range", Range)):
            if (value := getattr(self, name)) not in (None, *get_args(kind)):
                raise InputError(f"{name} must be {' or '.join(get_args(kind))}, got {value!r}")
        if not all(size is None or as_range(size).is_fixed for size in (self.height, self.width)):
            raise InputError(
                f"frames are resized to one size, and height is {self.height}, width {self.width}: give each one number"
            )
        assert self.frame_spec is not None  # it checks itself

    @property
    def frame_spec(self) -> FrameSpec | None:
        """The frames that the engine takes; None for another input."""
        if self.frame is None:
            return None
        return frame_spec(*self.frame, self.color or "rgb", self.yuv_matrix, self.yuv_range)

    @property
    def wanted(self) -> tuple[Precision, ...]:
        """The precisions that are tried."""
        return _AUTO if self.precisions == "auto" else precisions_of(self.precisions)

    @property
    def needs_ranges(self) -> bool:
        """Whether a wanted precision needs ranges, which are found on calibration images."""
        return any(precision.is_calibrated for precision in self.wanted)

    @property
    def opt_size(self) -> tuple[int, int] | None:
        """The usual (height, width) that the user asks for; None if he leaves it open."""
        if self.height is None or self.width is None:
            return None
        return as_range(self.height).opt, as_range(self.width).opt

    def source_options(self, profile: DeviceProfile | None = None) -> SourceOptions:
        """The part that says how to make the network; ``profile``: of the device that it is for."""
        from edge_backbones.toolchain.sources.base import SourceOptions

        return SourceOptions(
            **({} if profile is None else {"default_size": profile.defaults.size}),
            weights=self.weights,
            from_model=self.from_model,
            num_channels=self.num_channels,
            img_size=self.opt_size,
            output_stride=self.output_stride,
            out_indices=self.out_indices,
            out_features=self.out_features,
            hidden_states=self.hidden_states,
            dataset_index=self.dataset_index,
            image=self.image,
        )


def as_range(size: int | ShapeRange) -> ShapeRange:
    """Return the range of one size; a range as it is."""
    return size if isinstance(size, ShapeRange) else ShapeRange.fixed(size)
