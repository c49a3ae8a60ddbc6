"""Run a compiled engine through the API of transformers' backbones, without torch or transformers.

Input and output are numpy arrays, or arrays of any library on the GPU.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Generic, Literal, TypeVar, overload

import numpy as np

from edge_backbones.bundle import trust
from edge_backbones.bundle.manifest import Source
from edge_backbones.engines import base
from edge_backbones.engines.batching import run_in_pieces
from edge_backbones.engines.gpu.arrays import DeviceArray, from_foreign, is_on_gpu, stream_pointer
from edge_backbones.engines.gpu.memory import MemoryBackend
from edge_backbones.errors import InputError, lack_told, refuse_lack
from edge_backbones.images.config import ImageConfig
from edge_backbones.runtime.config import selected
from edge_backbones.runtime.description import BackboneDescription
from edge_backbones.runtime.in_flight import in_order, require_some
from edge_backbones.runtime.inputs import batched, half_is_finite, host_array, refuse_not_finite
from edge_backbones.runtime.opening import Origin, open_engine, reopen
from edge_backbones.runtime.views import as_callers_see, reordered_outputs
from edge_backbones.spec import BackboneSpec, Color, InputSpec

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


class EdgeBackbone(BackboneDescription):
    """Call a compiled backbone like a transformers backbone.

    >>> with EdgeBackbone.from_pretrained("resnet50.bundle") as backbone:   # doctest: +SKIP
    ...     maps = backbone(pixel_values).feature_maps                      # (batch, 256, 56, 56), ...

    Input: normalised ``pixel_values``, float (16, 32 or 64 bits), shape (batch, channels, height, width). They are cast
    to float32, or to float16 for a bundle built with ``pixels="float16"``. For a bundle built with ``input="image"``: RGB
    images of the network's size, uint8, shape (batch, height, width, channels). For one built with ``input="frame"``: what
    the camera delivers, uint8, shape (batch, rows, columns, bytes), which ``input.frame`` describes; the last axis may be
    left out if it is 1. Of a single image or frame, the batch axis may be left out. Pass a numpy array
    or any CPU array that supports DLPack, such as a ``torch.Tensor``. An engine on a GPU also takes arrays on that GPU
    that support DLPack or ``__cuda_array_interface__``. Those must have exactly the engine's dtype and be in C order. A
    TensorRT engine also takes rows at a pitch.

    Batch: any size from 1. A batch that the engine takes runs in one piece. A smaller batch is filled up with zeros,
    and the filling is cut off the result. A larger batch runs in pieces, and the results are joined. Always
    ``len(feature_map) == len(pixel_values)``.

    Output: C-contiguous float32 arrays that the caller owns. For a bundle built with ``maps="float16"`` they are
    float16. For one built with ``maps="channels-last"``, NCHW maps have the strides of channels-last memory, so
    ``torch.from_numpy`` makes channels_last tensors of them. No later call writes to an array while the caller holds it
    or a view of it. Memory that the caller has released is reused, so a loop over frames allocates nothing.

    On the GPU: a call only enqueues work on ``stream`` and returns. It reads the input in place, after the work that is
    on ``stream`` now; nothing may write to the input until ``stream`` is past the call. The output is DeviceArrays on
    the same GPU, valid for work on ``stream``. ``torch.from_dlpack(feature_map)``, ``cupy.from_dlpack`` and the like
    share its memory, make their own stream wait, and keep the memory until they are gone. A later call writes to it only
    then, behind the work that is on those streams at its time, and the host does not wait for that. So a stream that maps
    were passed to must live until the call after they are gone. A call on a stream that is being captured is refused.

    Values: NaN and infinity in a host array raise InputError, because an engine may turn them into features that look
    normal (OpenVINO's ReLU turns NaN into 0). Open the bundle with ``check_finite=False`` to skip the check. uint8
    frames and arrays on the GPU are not checked.

    Threads: several threads may call at the same time; each call has memory of its own. Do not set stages or call
    ``close`` while another thread is in a call.

    Processes: ``pickle`` carries a backbone to a child that is started with spawn, which opens the bundle again from
    the same folder. A forked child cannot use an engine of its parent: every call there raises InferenceError.

    Copies (``copy.copy`` and ``copy.deepcopy``) choose their own stages and share one engine. ``close`` on any of them
    closes the engine for all. An engine that nobody closes is released with its last copy.

    Attributes (``out_features``, ``channels``, ``config``, ...) are those of `BackboneDescription`.

    Use `from_pretrained` to open a bundle. The constructor is for an engine that is loaded already.

    Args:
        spec: Stages and outputs of the engine.
        input: Input that the engine takes.
        engine: The loaded engine.
        source: Where the network is from, for `config` and `backbone_type`.
        device: Where the engine runs: ``"cpu"`` or ``"cuda:0"``.
        engine_name: Name of the engine in its manifest.
        passed_over: Why each other engine of the bundle does not run here, by name.
        check_finite: Raise InputError for NaN and infinity in host arrays.
        image: How photographs become the input, for `preprocess`.
    """

    def __init__(
        self,
        spec: BackboneSpec,
        input: InputSpec,
        engine: base.EngineSession,
        source: Source | None = None,
        *,
        device: str = "cpu",
        engine_name: str = "",
        passed_over: Mapping[str, str] | None = None,
        check_finite: bool = True,
        image: ImageConfig | None = None,
    ) -> None:
        super().__init__(spec, input, source, device, engine_name, passed_over or {})
        self._engine = engine
        self._on_device = engine if isinstance(engine, base.DeviceSession) else None
        self._checks_values = check_finite and input.dtype != "uint8"
        self._is_float32 = input.dtype == "float32"
        self._reordered = reordered_outputs(spec)
        self._origin: Origin | None = None
        self._image = image
        self._cls_tokens = tuple(spec.outputs.index(name) for name in spec.cls_tokens)
        self._hidden_states = tuple(spec.outputs.index(name) for name in spec.hidden_states)
        self._usual = (np.dtype(input.dtype), input.opt_shape)
        self._known_shapes: set[tuple[int, ...]] = set()  # those of arrays on the GPU that fitted

    @classmethod
    @lack_told("opening a bundle")
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        engine: str | None = None,
        device: str = "auto",
        threads: int | None = None,
        memory: MemoryBackend | None = None,
        allow_host_code: bool = False,
        on_mismatch: Literal["raise", "compile"] = "raise",
        check_finite: bool = True,
        trusted: trust.Trusted | None = None,
    ) -> EdgeBackbone:
        """Open a bundle with the best engine that fits this machine.

        An engine runs only if the manifest says that its parity was measured and is inside its gate, and if its inputs
        and outputs match the manifest. Files are checked against the manifest when they are read.

        Args:
            path: Folder of the bundle.
            engine: Narrow the choice to a precision (``"int8"``), a flavour (``"openvino"``), or one engine's name or the
                beginning of it.
            device: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``. ``"auto"`` is the first GPU if an engine of the bundle runs on
                it, else the CPU.
            threads: Most CPU threads of a call. By default the engine's library chooses, from the CPUs that this process
                may use: its affinity mask and the CPU quotas of its cgroups (containers) count.
            memory: Library that manages GPU memory; None for cuda-bindings, or pycuda if that is missing.
            allow_host_code: Run engines that are programs: TorchScript, and the CPU code that a version-compatible plan
                may carry. They can do whatever their author wrote.
            on_mismatch: ``"compile"`` compiles, verifies and adds an engine if none in the bundle runs here, which
                takes seconds to minutes. It also verifies an engine once if this machine has neither compiled nor
                verified it. Both happen in child processes. ``"raise"`` does neither.
            check_finite: Raise InputError for NaN and infinity in host arrays. The check reads the input once and takes
                less than 1 % of a call of mobilenetv3_large_100 on one image of 224 x 224.
            trusted: PEM file of a public key, several of them, or a folder of them. One of these keys must have signed
                the bundle (see :mod:`edge_backbones.bundle.trust`). If the machine or the user has such a folder, the
                bundle must be signed too. Engines added after signing are skipped unless this machine made them.

        Returns:
            The opened backbone.

        Raises:
            BundleError: The bundle is damaged.
            TrustError: The bundle is not signed as asked (a BundleError).
            EngineMismatchError: Nothing in the bundle can run here.
            InputError: ``device`` or ``on_mismatch`` is not one of the above, or an option is for another device.
            ResourceError: Memory, threads or file descriptors ran out.
            InferenceError: This is a forked child whose parent has opened an engine of the same library.
            CompileError: With ``on_mismatch="compile"``, a compilation failed. `compile_bundle` says what else it raises.
        """
        if on_mismatch not in ("raise", "compile"):
            raise InputError(f"on_mismatch must be 'raise' or 'compile', got {on_mismatch!r}")

        load = base.LoadOptions(threads=threads, memory=memory, allow_host_code=allow_host_code)
        opened = open_engine(path, engine, load, device=device, compiles=on_mismatch == "compile", trusted=trusted)
        manifest, key = opened.manifest, opened.record.key
        backbone = cls(
            manifest.backbone,
            manifest.input,
            opened.session,
            manifest.source,
            device=opened.device,
            engine_name=opened.record.name,
            passed_over=opened.passed_over,
            check_finite=check_finite,
            image=manifest.image,
        )
        options = {
            "engine": key.precision.value if engine is None else engine,
            "device": opened.device,
            "threads": threads,
            "memory": memory,
            "allow_host_code": allow_host_code,
            "on_mismatch": on_mismatch,
            "check_finite": check_finite,
            "trusted": trust.absolute(trusted),
        }
        graph = key.precision.value, key.graph_sha256
        backbone._origin = Origin(os.path.realpath(path), options, graph, manifest.input)
        return backbone

    def preprocess(
        self,
        images: Any,
        *,
        color: Color = "rgb",
        processor: Callable[..., Any] | None = None,
    ) -> np.ndarray:
        """Turn photographs or camera frames into the input of this backbone, as the network was trained.

        >>> maps = backbone(backbone.preprocess("photo.jpg")).feature_maps   # doctest: +SKIP

        The bundle records how: it resizes, crops and normalises as `edge-backbones run` and the calibration do. Frames
        may have any size. If the engine takes several sizes, they get the one that it is optimised for.

        Arrays need numpy alone, except for the few ways to resize that are Pillow's. Files and pictures need Pillow.
        Several threads may call this at the same time. One call uses at most the threads that `from_pretrained` was given.

        Args:
            images: One image, or a list or tuple of images, whose sizes may differ. An image is the path of a file, a
                picture of Pillow, or a uint8 frame of shape (height, width, 3), values 0..255: a numpy array or a tensor
                on the CPU that supports DLPack. Files and pictures are turned upright (EXIF) and converted to RGB.
            color: How frames store a pixel: ``"rgb"``; ``"bgr"`` as OpenCV has it; ``"gray"``, whose shape is
                (height, width) or (height, width, 1); ``"nv12"``, (height * 3 / 2, width); or ``"yuyv"``, (height, width,
                2). The last two are read as BT.709 for 720 rows or more, else as BT.601, in limited range, unless the
                bundle says otherwise.
            processor: Image processor of transformers that prepares the images instead. It is called with
                ``return_tensors="np"``.

        Returns:
            Array of shape (images, channels, height, width), normalised, float32 or what ``input.dtype`` says. For a bundle
            built with ``input="image"``: uint8 (images, height, width, channels). For one built with ``input="frame"``:
            frames of its size and colours; pictures of other sizes are scaled to cover one, and the centre is cut out. A
            single frame that fits as it is shares its memory with the result.

        Raises:
            InputError: An image or an option cannot be used. The message has the fix. Also if the bundle does not know the
                network's own preprocessing, and if the backbone is not from a bundle.
            MissingDependencyError: Pillow is needed and not installed.
            ResourceError: Memory or threads ran out.
        """
        from edge_backbones.runtime import preprocess  # only who prepares images waits for this import

        if processor is not None:
            return preprocess.process(images, processor, self._input, color=color)
        if self._image is None:
            raise InputError(
                "this backbone is not from a bundle and does not know the preprocessing of its network: open one with "
                "EdgeBackbone.from_pretrained, or pass image=ImageConfig(...) to EdgeBackbone"
            )
        if self._source is not None and self._source.not_repeated:
            raise InputError(f"{self._source.not_repeated}: preprocess(images, processor=processor) calls it")
        threads = None if self._origin is None else self._origin.options["threads"]
        return preprocess.prepare(images, self._image, self._input, color=color, threads=threads)

    @overload
    def __call__(
        self,
        pixel_values: DeviceArray,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        return_dict: Literal[True] | None = None,
        *,
        dataset_index: Any = None,
        stream: Any = None,
    ) -> BackboneOutput[DeviceArray]: ...

    @overload
    def __call__(
        self,
        pixel_values: DeviceArray,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        *,
        return_dict: Literal[False],
        dataset_index: Any = None,
        stream: Any = None,
    ) -> tuple[tuple[DeviceArray, ...], ...]: ...

    @overload
    def __call__(
        self,
        pixel_values: Any,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        return_dict: Literal[True] | None = None,
        *,
        dataset_index: Any = None,
        stream: Any = None,
    ) -> BackboneOutput[np.ndarray]: ...

    @overload
    def __call__(
        self,
        pixel_values: Any,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        *,
        return_dict: Literal[False],
        dataset_index: Any = None,
        stream: Any = None,
    ) -> tuple[tuple[np.ndarray, ...], ...]: ...

    def __call__(
        self,
        pixel_values: Any,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        *,
        dataset_index: Any = None,
        stream: Any = None,
    ) -> BackboneOutput | tuple[tuple[Any, ...], ...]:
        """Return the feature maps of the chosen stages. The class docstring describes input and output.

        Args:
            pixel_values: The images.
            output_hidden_states: True for all hidden states, an index or several for those: the others are None, and an
                index out of range selects nothing. The bundle must be built with hidden states.
            output_attentions: Refused with InputError if the source network could return them, ignored otherwise.
            return_dict: False returns a tuple of the fields that are not None: ``(feature_maps,)`` or ``(feature_maps,
                hidden_states)``, followed by class tokens.
            dataset_index: Expert of VitPose. It is compiled into the engine, so only the index that the bundle was
                built for is accepted.
            stream: For input on the GPU: the CUDA stream to work on, as an int, as a stream of torch, cupy, pycuda or
                cuda-bindings, or as anything with ``__cuda_stream__``. None for the default stream.

        Returns:
            The output, or a tuple of its fields.

        Raises:
            InputError: The engine cannot take the input or return what was asked (a ValueError); the message says what
                it can.
            InferenceError: The engine failed.
        """
        if output_attentions and self._spec.has_attentions:
            raise InputError("Cannot output attentions: a compiled backbone holds feature maps only")
        if output_hidden_states and not self._hidden_states:
            raise InputError(
                "Cannot output hidden states: build the bundle again with hidden_states=True (--hidden-states)"
            )
        if dataset_index is not None:
            self._check_dataset_index(dataset_index)
        try:
            outputs = self._run(pixel_values, stream)
            if self._reordered:
                outputs = as_callers_see(outputs, self._reordered)
            output = self._output(outputs, output_hidden_states)
        except MemoryError as error:
            refuse_lack(f"a call of this backbone, which takes {self._input.describe()},", error)
            raise
        return output.to_tuple() if return_dict is False else output

    def _output(
        self, outputs: Sequence[Any], output_hidden_states: bool | int | Sequence[int] | None
    ) -> BackboneOutput:
        """Return the chosen stages of a call's outputs."""
        feature_maps = tuple([outputs[i] for i in self._config._chosen])  # a generator is a Python call for each map
        hidden_states = None
        if output_hidden_states:
            states = [outputs[i] for i in self._hidden_states]
            chosen = selected(output_hidden_states, len(states))
            hidden_states = tuple(state if i in chosen else None for i, state in enumerate(states))
        cls_tokens = tuple(outputs[self._cls_tokens[i]] for i in self._config._chosen) if self._cls_tokens else None
        return BackboneOutput(feature_maps, hidden_states, cls_tokens=cls_tokens)

    forward = __call__

    def forward_with_filtered_kwargs(self, *args: Any, **kwargs: Any) -> Any:
        """Call the backbone without the keyword arguments that it does not know, as transformers' backbones do."""
        known = ("pixel_values", "output_hidden_states", "output_attentions", "return_dict", "dataset_index", "stream")
        return self(*args, **{key: value for key, value in kwargs.items() if key in known})

    def map(
        self, frames: Iterable[Any], in_flight: int = 2, *, stream: Any = None, **options: Any
    ) -> Iterator[BackboneOutput]:
        """Call the backbone on every frame and yield the outputs in order, with several frames in flight.

        While the caller works on one output or reads the next frame, up to ``in_flight`` calls run in threads of their own,
        each with memory of its own. So copies to and from a GPU overlap with its work, and reading frames overlaps with
        inference. Frames are taken one by one, in the caller's thread, only as outputs are asked for: at most ``in_flight``
        frames are taken and not yielded. A source that writes every frame into one buffer has to yield copies.

        An error of a call is raised in the place of its output and ends the iteration; an error of ``frames`` comes behind
        the outputs of the frames before it. Ctrl-C and leaving the loop wait for the calls that run.

        Frames on the GPU are enqueued on ``stream`` one after the other, because such a call does not wait anyway.

        Args:
            frames: What ``__call__`` takes, one for each call: an image or a batch.
            in_flight: Most frames that are worked on at once.
            stream: As for ``__call__``.
            options: ``output_hidden_states`` and ``return_dict``, as for ``__call__``.

        Raises:
            InputError: ``in_flight`` is less than 1, or as for ``__call__``.
            InferenceError: As for ``__call__``.
        """
        require_some(in_flight)
        if stream is not None:
            return (self(frame, stream=stream, **options) for frame in frames)
        return in_order(functools.partial(self.__call__, **options), frames, in_flight)

    def run(self, pixel_values: Any, *, stream: Any = None) -> dict[str, Any]:
        """Return every output of the engine by name: feature maps, class tokens and hidden states, whatever is chosen."""
        outputs = self._run(pixel_values, stream)
        if self._reordered:
            outputs = as_callers_see(outputs, self._reordered)
        return dict(zip(self._spec.outputs, outputs, strict=True))

    def graphed(self, pixel_values: Any, *, stream: Any = None) -> Callable[[], BackboneOutput]:
        """Record a call on the memory of ``pixel_values`` as one CUDA graph, and return a function that replays it.

        The function returns the same output every time: the next call overwrites its maps. One thread at a time may call
        it. It does not check values for NaN and infinity. It needs a TensorRT engine and a batch that the engine takes.

        GPU memory: write a frame there on ``stream``, then call the function. It enqueues on ``stream``, without copying
        or allocating. The memory must be at a multiple of 256 bytes, and ``stream`` a stream that is no default one.

        Host memory: pass an array of `input_buffer` and no stream. Write a frame there, then call the function. It copies
        the frame to the GPU and the maps back, waits, and returns numpy arrays in page-locked memory.

        Raises InputError for what cannot be recorded.
        """
        engine = self._engine
        if not isinstance(engine, base.GraphedSession):
            raise InputError(f"no CUDA graph on {self._device}: open a TensorRT engine")
        call: base.GraphedCall
        if isinstance(pixel_values, np.ndarray):
            if stream is not None:
                raise InputError("stream= is for arrays on the GPU: leave it out for an array of input_buffer")
            self._input.batch_height_width(pixel_values.shape)
            call = engine.graphed_on_host(pixel_values)
        else:
            if not is_on_gpu(pixel_values):
                raise InputError("a CUDA graph reads an array on the GPU, or one of backbone.input_buffer(): pass such")
            pointer = stream_pointer(stream)
            array = from_foreign(pixel_values, stream=pointer)
            self._input.batch_height_width(array.shape)
            call = engine.graphed(array, pointer)
        outputs = as_callers_see(call.outputs, self._reordered) if self._reordered else call.outputs
        output = self._output(outputs, None)

        def replay() -> BackboneOutput:
            call()
            return output

        return replay

    def input_buffer(
        self, batch: int | None = None, *, height: int | None = None, width: int | None = None
    ) -> np.ndarray:
        """Return an array of zeros for inputs of this backbone, to write frames into again and again.

        For an engine on a GPU it is in page-locked memory, and a call with it, or with a part of it that is in C order,
        saves a copy. A GPU that shares the memory of the CPU, as on Jetson, reads it in place. On a CPU it is an ordinary
        array.

        Args:
            batch: Number of images; None for the one that the engine is optimised for. So are height and width.
            height: Pixels.
            width: Pixels.

        Raises:
            InputError: The engine does not take such an input.
        """
        sizes = (self._input.batch.opt, self._input.height.opt, self._input.width.opt)
        asked = (batch, height, width)
        shape = self._input.shape(*(size if given is None else given for given, size in zip(asked, sizes, strict=True)))
        self._input.batch_height_width(shape)
        if isinstance(self._engine, base.GraphedSession):
            return self._engine.input_buffer(shape)
        return np.zeros(shape, self._input.dtype)

    def close(self) -> None:
        """Release the engine, for every copy of this backbone.

        Returned arrays stay valid. A later call of the backbone or a copy raises InputError.
        """
        self._engine.close()

    def __copy__(self) -> EdgeBackbone:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._config = copy.deepcopy(self._config)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> EdgeBackbone:
        memo[id(self)] = twin = copy.copy(self)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        if self._origin is None:
            raise InputError(
                f"{self!r} is not from a bundle and cannot be pickled: write a bundle, and pickle what from_pretrained opens"
            )
        return reopen, (type(self), self._origin, self._config)

    def __enter__(self) -> EdgeBackbone:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_dataset_index(self, dataset_index: Any) -> None:
        """Raise InputError for an expert of VitPose that the bundle was not built for."""
        built_for = None if self._source is None else self._source.options.get("dataset_index")
        asked = {int(index) for index in np.ravel(np.asarray(dataset_index))}
        if built_for is not None and asked != {built_for}:
            raise InputError(
                f"dataset_index {sorted(asked)} does not fit: this bundle was built for {built_for}; "
                "build another with --dataset-index"
            )

    def _run(self, pixel_values: Any, stream: Any) -> Sequence[Any]:
        """Return every output of the engine, in graph order, for an input on the host or on the GPU."""
        # Fast path for the input that a robot passes on every frame. After an inference the CPU's caches are cold, and a
        # few hundred lines of Python take a tenth of a millisecond.
        usual = type(pixel_values) is np.ndarray and (pixel_values.dtype, pixel_values.shape) == self._usual
        if usual and stream is None and pixel_values.flags.carray:
            if self._checks_values and not (
                math.isfinite(np.vdot(pixel_values, pixel_values)) if self._is_float32 else half_is_finite(pixel_values)
            ):
                refuse_not_finite(pixel_values, self._input)
            return self._engine.run(pixel_values)
        if not isinstance(pixel_values, np.ndarray) and is_on_gpu(pixel_values):
            return self._run_on_gpu(pixel_values, stream)
        if stream is not None:
            raise InputError(f"stream= is for arrays on the GPU, and {self._input.name} is not there: leave it out")
        array = host_array(pixel_values, self._input)
        sizes = self._input.batch
        count = self._input.batch_height_width(array.shape)[0]
        if self._checks_values and not (
            math.isfinite(np.vdot(array, array)) if self._is_float32 else half_is_finite(array)
        ):
            refuse_not_finite(array, self._input)
        if count in sizes:
            return self._engine.run(array)
        return run_in_pieces(self._engine.run, array, sizes)

    def _run_on_gpu(self, values: Any, stream: Any) -> Sequence[Any]:
        """Check an array on the GPU and enqueue a call on it."""
        engine = self._on_device
        if engine is None:
            advice = (
                "copy it there" if self._device != "cpu" else "open the bundle with device='cuda', or copy it there"
            )
            raise InputError(
                f"{self._input.name} is on a GPU, this engine on {self._device} takes arrays on the host: {advice}"
            )
        pointer = stream_pointer(stream)
        array = from_foreign(values, stream=pointer)
        if len(array.shape) != 4 and self._input.name != "pixel_values":
            array = dataclasses.replace(array, shape=batched(array.shape, self._input))
        if array.shape not in self._known_shapes:
            self._input.batch_height_width(array.shape)
            self._known_shapes.add(array.shape)
        return engine.run_on_device(array, pointer)
