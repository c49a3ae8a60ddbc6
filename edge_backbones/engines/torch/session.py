"""TorchScript and exported programs, with or without TensorRT engines inside: the only runtime module that touches torch.

Such a file is a program, and torch runs what it says: open only what you trust. It needs no torch-tensorrt unless it holds
one of its engines; `torch_tensorrt` is then imported first, which brings the operator that runs them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import io
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from edge_backbones.engines import exits, forks
from edge_backbones.engines.batching import pieces
from edge_backbones.engines.gpu.arrays import DeviceArray, ForeignArray
from edge_backbones.errors import (
    EdgeBackbonesError,
    EngineMismatchError,
    InferenceError,
    InputError,
    MissingDependencyError,
    OutOfMemoryError,
    first_line,
    refuse_lack,
)
from edge_backbones.machine import gpus
from edge_backbones.spec import InputSpec

# What torch says when a file needs the class or the operator of torch_tensorrt and nobody has registered it.
_NEEDS_TORCH_TENSORRT = re.compile(r"classes\.tensorrt|tensorrt::|ops\.tensorrt|'tensorrt'")


def load_library() -> Any:
    """The torch module; raises MissingDependencyError with the command that installs it."""
    try:
        import torch
    except (ImportError, OSError, MemoryError) as error:  # OSError: a shared library of it is missing
        refuse_lack("loading torch", error)
        raise MissingDependencyError("the TorchScript engine (torch)", "build") from error
    return torch


def library_version() -> str | None:
    """torch's version, or None where it is not installed. Does not import it, which takes seconds."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_tensorrt_version() -> str | None:
    """The version of torch_tensorrt, or None where it is not installed. Does not import it."""
    for name in ("torch-tensorrt", "torch-tensorrt-rtx"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def load_torch_tensorrt(refusal: type[EdgeBackbonesError] = EngineMismatchError) -> Any:
    """The torch_tensorrt module; MissingDependencyError where it is not installed, ``refusal`` where it does not import.

    Without a driver it raises RuntimeError while it is imported, and with a TensorRT that it does not fit ImportError or
    OSError. A failed import leaves no part of it behind, nor the `tensorrt` that torch-tensorrt-rtx replaces by its own.
    """
    tensorrt = sys.modules.get("tensorrt")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("torch_tensorrt")
    except Exception as error:
        for name in [name for name in sys.modules if name.startswith("torch_tensorrt.")]:
            del sys.modules[name]
        if tensorrt is not None:
            sys.modules["tensorrt"] = tensorrt
        else:
            sys.modules.pop("tensorrt", None)
        if isinstance(error, ModuleNotFoundError) and error.name == "torch_tensorrt":
            raise MissingDependencyError("the torch_tensorrt engine", "torch-tensorrt") from error
        reason = gpus.no_gpu_reason()
        advice = (
            f"it needs an NVIDIA GPU: {reason}"
            if reason
            else "install the release that is made for this torch and the TensorRT that it asks for (pip check lists both)"
        )
        raise refusal(
            f"torch_tensorrt is installed and does not import ({type(error).__name__}: {cause(error)}): {advice}"
        ) from error


def require_gpu(device: str, refusal: type[EdgeBackbonesError] = EngineMismatchError) -> int:
    """The index in ``cuda`` or ``cuda:1``, after torch was asked for that GPU; raises ``refusal`` where it has none."""
    torch = load_library()
    index = int(device.partition(":")[2] or 0)
    reason = gpus.no_gpu_reason()
    if reason:
        raise refusal(f"{device} needs an NVIDIA GPU: {reason}")
    try:
        torch.cuda.get_device_properties(index)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        count = len(gpus.find_gpus())
        why = cause(error) if index < count else f"{count} GPUs are visible: pass a smaller index"
        raise refusal(f"torch {torch.__version__} does not serve {device}: {why}") from error
    return index


class TorchScriptSession:
    """A loaded TorchScript file (or exported program) on the CPU or on one GPU. Threads may share it.

    ``device``: ``cpu``, ``cuda`` or ``cuda:1``. Sizes other than the one that the module was traced at give what its code
    makes of them; parity on the golden samples tells. torch optimises a module in its first calls: they are slower.

    ``threads``: torch keeps their number per calling thread, so each call sets it and puts it back. A thread whose very
    first use of torch falls into such a call begins with that number, because torch hands the latest one on.

    Memory of a closed session stays with torch's allocator for the next one. Number formats of float32 arithmetic on a GPU
    (TF32) are those of the process, as torch.backends has them, where the file does not say otherwise.

    Raises EngineMismatchError for bytes that are no such program, for one that returns another number of maps, and for a
    GPU that is not there; MissingDependencyError without torch (or torch_tensorrt); InferenceError in a forked child of a
    process that has opened one.
    """

    def __init__(
        self,
        data: bytes | bytearray,
        *,
        input: InputSpec,
        outputs: Sequence[str],
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
            raise InputError(f"device must be cpu, cuda or cuda:<index>, got {device!r}")
        if threads is not None and threads < 1:
            raise InputError(f"threads must be at least 1, got {threads}")
        if _first_process() != os.getpid():
            raise forks.refusal("torch")
        torch = load_library()
        self._gpu = None if device == "cpu" else require_gpu(device)
        self._torch = torch
        self._device = torch.device("cpu" if self._gpu is None else f"cuda:{self._gpu}")
        self._input, self._outputs, self._threads = input, tuple(outputs), threads
        self._dtype = np.dtype(input.dtype)
        with exits.calls:
            module, returned = _load(torch, bytes(data), self._device)
        self._check_count(returned)
        if self._gpu is not None:
            torch.cuda.synchronize(self._gpu)  # weights came on the default stream; calls may use any
        self._module: Any = module
        self._is_abandoned = False
        forks.abandon_in_children(self)

    def run(self, array: np.ndarray) -> list[np.ndarray]:
        """As EngineSession has it, C-contiguous. On a GPU the arrays are copied there and back on torch's current stream."""
        self._check(array.dtype, array.shape)
        if not array.flags.writeable:
            array = array.copy()  # torch has no read-only tensors, and warns
        with self._running(f"{array.dtype} {array.shape}"):
            pixels = self._torch.from_numpy(array).to(self._device)
            maps = [feature_map.cpu() for feature_map in self._run(pixels)]
        return [feature_map.numpy() for feature_map in maps]

    def run_on_device(self, array: ForeignArray, stream: int) -> list[DeviceArray]:
        """Every output, in graph order, as new float32 arrays on the same GPU; enqueued on ``stream``, nothing waits.

        ``array``: of any batch from 1, the input's dtype, in C order, on this GPU; read in place and held as long as an
        output is, so nothing may write to it until ``stream`` is past this call. ``stream`` 0 is the default stream.
        The outputs are valid for work on ``stream``; DLPack makes other streams wait.
        """
        torch, gpu = self._torch, self._gpu
        name = self._input.name
        if gpu is None:
            raise InputError(f"{name} is on a GPU and this engine runs on the CPU: copy it to the host, or open cuda")
        if array.device not in (None, gpu):
            raise InputError(f"{name} is on cuda:{array.device}, this engine runs on cuda:{gpu}: copy it there first")
        if not array.contiguous:
            raise InputError(f"{name} of shape {array.shape} is not in C order: make it contiguous on the GPU first")
        self._check(array.dtype, array.shape)
        with self._running(f"{array.dtype} {array.shape} on the GPU"), torch.cuda.device(gpu):
            queue = _stream(torch, stream, gpu)
            with torch.cuda.stream(queue):
                if array.producer_stream is not None:
                    queue.wait_stream(_stream(torch, array.producer_stream, gpu))
                lent = DeviceArray(
                    array.pointer,
                    array.shape,
                    array.dtype,
                    device=gpu,
                    owner=array,
                    stream=stream,
                    synchronize=None,
                )
                pixels = torch.as_tensor(lent, device=self._device)
                if pixels.data_ptr() != array.pointer:  # torch asked CUDA where it is, and fetched it
                    raise InputError(f"{name} is on another GPU, this engine runs on cuda:{gpu}: copy it there first")
                maps = self._in_pieces(pixels)
                done = torch.cuda.Event()
                done.record(queue)
        return [self._device_array(feature_map, pixels, done, stream) for feature_map in maps]

    def close(self) -> None:
        self._module = None

    def abandon(self) -> None:
        """See forks.Inherited."""
        forks.keep_for_good(self._module)
        self._is_abandoned = self._is_abandoned or self._module is not None
        self.close()

    def _refusal(self) -> EdgeBackbonesError:
        if self._is_abandoned:
            return forks.refusal("torch")
        return InputError("this EdgeBackbone was closed: open the bundle again")

    def _check(self, dtype: np.dtype, shape: Sequence[int]) -> None:
        if self._module is None:
            raise self._refusal()
        if dtype != self._dtype:
            raise InputError(f"{self._input.name} of dtype {dtype} does not fit: this engine takes {self._dtype}")
        self._input.batch_height_width(shape)

    def _check_count(self, returned: int | None) -> None:
        if returned is not None and returned != len(self._outputs):
            raise EngineMismatchError(
                f"the program returns {returned} tensors, the manifest promises {list(self._outputs)}: build it again"
            )

    def _run(self, pixels: Any) -> list[Any]:
        """New contiguous float32 tensors on this device, none of which shares memory with another or the input."""
        module = self._module
        if module is None:  # closed by another thread since the call began
            raise self._refusal()
        returned = module(pixels)
        tensors = returned if isinstance(returned, (tuple, list)) else (returned,)
        self._check_count(len(tensors))
        taken, maps = {_memory(pixels)}, []
        for tensor in tensors:
            feature_map = tensor.to(self._torch.float32).contiguous()
            if _memory(feature_map) in taken:
                feature_map = feature_map.clone()
            taken.add(_memory(feature_map))
            maps.append(feature_map)
        return maps

    def _in_pieces(self, pixels: Any) -> list[Any]:
        count, sizes, torch = len(pixels), self._input.batch, self._torch
        if count in sizes:
            return self._run(pixels)
        ran = []
        for piece in pieces(count, sizes):
            images = pixels[piece.start : piece.start + piece.count]
            if piece.run > piece.count:
                images = torch.cat([images, images.new_zeros((piece.run - piece.count, *images.shape[1:]))])
            ran.append([feature_map[: piece.count] for feature_map in self._run(images)])
        return [torch.cat(maps) for maps in zip(*ran, strict=True)]

    def _device_array(self, tensor: Any, pixels: Any, done: Any, stream: int) -> DeviceArray:
        torch, gpu = self._torch, self._gpu
        assert gpu is not None

        def make_wait(consumer: int) -> None:
            other = _stream(torch, consumer, gpu)
            other.wait_event(done)
            tensor.record_stream(other)  # the allocator gives the memory away in the order of one stream only

        return DeviceArray(
            tensor.data_ptr(),
            tuple(tensor.shape),
            np.dtype(np.float32),
            device=gpu,
            owner=(tensor, pixels),
            stream=stream,
            synchronize=make_wait,
        )

    @contextlib.contextmanager
    def _running(self, what: str) -> Iterator[None]:
        torch, wanted = self._torch, self._threads if self._gpu is None else None
        before = None if wanted is None else torch.get_num_threads()
        if wanted is not None and before != wanted:
            torch.set_num_threads(wanted)
        try:
            with exits.calls, torch.inference_mode():
                yield
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"cuda:{self._gpu} has no memory left for {what}: {cause(error)}") from error
        except (RuntimeError, AssertionError, MemoryError, torch.jit.Error) as error:  # a guard of a program asserts
            refuse_lack(f"running torch on {what}", error)
            raise InferenceError(f"torch failed on {what}: {cause(error)}") from error
        finally:
            if wanted is not None and before != wanted:
                torch.set_num_threads(before)


@functools.cache
def _first_process() -> int:
    """The process that opened the first session. In its forked children the threads of OpenMP do not exist, and torch waits
    for them."""
    return os.getpid()


def _load(torch: Any, data: bytes, device: Any) -> tuple[Any, int | None]:
    """A callable, and the number of tensors that it returns where the file says it."""
    is_script = _is_torchscript(data)
    read = _read_torchscript if is_script else _read_exported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        try:
            try:
                return read(torch, data, device)
            except Exception as error:
                if not _NEEDS_TORCH_TENSORRT.search(str(error)):
                    raise
            load_torch_tensorrt()
            return read(torch, data, device)
        except EdgeBackbonesError:
            raise
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"{device} has no memory left for this program: {cause(error)}") from error
        except Exception as error:  # torch has a dozen types for what it cannot read
            refuse_lack(f"loading a program with torch {torch.__version__}", error)
            kind = "TorchScript" if is_script else "exported program"
            raise EngineMismatchError(
                f"torch {torch.__version__} does not load this {kind} ({cause(error)}): build or compile it again"
            ) from error


def _read_torchscript(torch: Any, data: bytes, device: Any) -> tuple[Any, int | None]:
    module = torch.jit.load(io.BytesIO(data), map_location=device).eval()
    returned = next(iter(module.graph.outputs())).type()
    return module, len(returned.elements()) if returned.kind() == "TupleType" else None


def _read_exported(torch: Any, data: bytes, device: Any) -> tuple[Any, int | None]:
    program = torch.export.load(io.BytesIO(data))
    return program.module().to(device), len(program.graph_signature.user_outputs)


def _is_torchscript(data: bytes) -> bool:
    """TorchScript and exported programs are both zip files; the first has its code in a folder."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return any("/code/" in name for name in archive.namelist())
    except Exception as error:  # zipfile has several types for what it cannot read
        raise EngineMismatchError(
            f"these {len(data)} bytes are neither TorchScript nor an exported program ({error}): build or compile it again"
        ) from error


def _memory(tensor: Any) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _stream(torch: Any, stream: int, gpu: int) -> Any:
    """torch's object for a stream handle; 0 and 1 are the legacy default stream."""
    return torch.cuda.default_stream(gpu) if stream in (0, 1) else torch.cuda.ExternalStream(stream, device=gpu)


def cause(error: BaseException) -> str:
    """Why torch failed, in its own words: it puts a trace before the cause and advice behind it, so this is the first
    sentence of the last line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or isinstance(error, KeyError):
        return first_line(error)
    return lines[-1].removeprefix("RuntimeError: ").split(". ")[0].rstrip(".")
