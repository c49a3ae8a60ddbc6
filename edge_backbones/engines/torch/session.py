"""Run TorchScript files and exported programs, with or without TensorRT engines inside.

Of the runtime, only this module touches torch. Such a file is a program, and torch does what it says: open only files
that you trust. Only a file with TensorRT engines inside needs torch-tensorrt. `torch_tensorrt` is then imported first,
because it registers the operator that runs them.
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

from edge_backbones import cpus
from edge_backbones.engines import exits, forks
from edge_backbones.engines.batching import pieces
from edge_backbones.engines.gpu.arrays import DeviceArray
from edge_backbones.engines.gpu.dlpack import ForeignArray
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
from edge_backbones.spec import FloatType, InputSpec

# Text in torch's error if a file needs a class or an operator of torch_tensorrt that is not registered.
_NEEDS_TORCH_TENSORRT = re.compile(r"classes\.tensorrt|tensorrt::|ops\.tensorrt|'tensorrt'")


def load_library() -> Any:
    """Return the torch module. Raises MissingDependencyError, with the command that installs it, if it is missing."""
    try:
        import torch
        from torch import jit  # noqa: F401  # a folder named torch, on sys.path, can be imported too
    except (ImportError, OSError, MemoryError) as error:  # OSError if one of its shared libraries is missing
        refuse_lack("loading torch", error)
        raise MissingDependencyError("the TorchScript engine (torch)", "build") from error
    return torch


def library_version() -> str | None:
    """Return the version of torch; None if it is not installed. It is not imported, because that takes seconds."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def torch_tensorrt_version() -> str | None:
    """Return the version of torch_tensorrt, without importing it; None if it is not installed."""
    for name in ("torch-tensorrt", "torch-tensorrt-rtx"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def load_torch_tensorrt(refusal: type[EdgeBackbonesError] = EngineMismatchError) -> Any:
    """Return the torch_tensorrt module.

    Raises MissingDependencyError if it is not installed, and ``refusal`` if it cannot be imported: without a driver its
    import raises RuntimeError, and with a TensorRT that it does not fit ImportError or OSError. A failed import leaves
    no part of it in ``sys.modules``, and puts back the `tensorrt` that torch-tensorrt-rtx replaces by its own.
    """
    tensorrt = sys.modules.get("tensorrt")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library = importlib.import_module("torch_tensorrt")
            if not hasattr(library, "__version__"):  # a folder named torch_tensorrt, on sys.path, can be imported too
                raise ModuleNotFoundError("a folder is not the library", name="torch_tensorrt")
            return library
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
    """Return the GPU index in ``cuda`` or ``cuda:1``. Raises ``refusal`` if torch cannot use that GPU."""
    torch = load_library()
    index = int(device.partition(":")[2] or 0)
    reason = gpus.no_gpu_reason()
    if reason:
        raise refusal(f"{device} needs an NVIDIA GPU: {reason}")
    try:
        torch.cuda.get_device_properties(index)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA raises AssertionError
        count = len(gpus.find_gpus())
        why = cause(error) if index < count else f"{count} GPUs are visible: pass a smaller index"
        raise refusal(f"torch {torch.__version__} does not serve {device}: {why}") from error
    return index


class TorchScriptSession:
    """Run a loaded TorchScript file (or exported program) on the CPU or on one GPU. Threads may share it.

    Sizes other than the one that the module was traced at give whatever its code computes; the parity on golden samples
    shows whether that is right. torch optimises a module in its first calls, which are slower.

    torch keeps the number of threads per calling thread, so each call sets it and restores it. A thread that uses torch
    for the first time during such a call starts with that number, because torch passes the latest one on.

    torch's allocator keeps the memory of a closed session for the next one. On a GPU, float32 arithmetic (TF32 or not)
    follows the process's settings in torch.backends, unless the file sets its own.

    Args:
        data: The program's bytes.
        input: Input in the manifest.
        outputs: Names of the outputs, in the order in which the program returns them.
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        threads: Most CPU threads of one call. None for torch's own number, or for the CPUs that this process may use if
            these are fewer.
        map_dtype: numpy's name of the dtype of the outputs in the manifest.

    Raises:
        EngineMismatchError: torch does not load the bytes, the program returns another number of tensors, or the GPU is
            not there.
        MissingDependencyError: torch (or torch_tensorrt) is not installed.
        InferenceError: This is a forked child of a process that has opened such a session, or a call failed.
    """

    def __init__(
        self,
        data: bytes | bytearray,
        *,
        input: InputSpec,
        outputs: Sequence[str],
        device: str = "cpu",
        threads: int | None = None,
        map_dtype: FloatType = "float32",
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
        self._input, self._outputs = input, tuple(outputs)
        self._threads, self._limit = threads, cpus.limit()
        self._dtype, self._map_dtype = np.dtype(input.dtype), np.dtype(map_dtype)
        with exits.calls:
            module, returned = _load(torch, bytes(data), self._device)
        self._check_count(returned)
        if self._gpu is not None:
            torch.cuda.synchronize(self._gpu)  # weights were copied on the default stream; calls may use another
        self._module: Any = module
        self._is_abandoned = False
        forks.abandon_in_children(self)

    def run(self, array: np.ndarray) -> list[np.ndarray]:
        """Return the outputs as described in `EngineSession`.

        On a GPU, the arrays are copied there and back on torch's current stream.
        """
        self._check(array.dtype, array.shape)
        if not array.flags.writeable:
            array = array.copy()  # torch has no read-only tensors and would warn
        with self._running(f"{array.dtype} {array.shape}"):
            pixels = self._torch.from_numpy(array).to(self._device)
            maps = [feature_map.cpu() for feature_map in self._run(pixels)]
        return [feature_map.numpy() for feature_map in maps]

    def run_on_device(self, array: ForeignArray, stream: int) -> list[DeviceArray]:
        """Enqueue one call on ``stream`` and return its outputs without waiting.

        The outputs are new arrays on the same GPU, in graph order. ``array`` has any batch size from 1 and the
        input's dtype, and is in C order on this GPU. It is read in place and kept as long as an output, so nothing may
        write to it until ``stream`` is past this call. ``stream`` 0 is the default stream. The outputs are valid for
        work on ``stream``; DLPack makes other streams wait.

        Raises InputError for an array that does not fit, OutOfMemoryError and InferenceError.
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
                if pixels.data_ptr() != array.pointer:  # torch has copied it from another GPU
                    raise InputError(f"{name} is on another GPU, this engine runs on cuda:{gpu}: copy it there first")
                maps = self._in_pieces(pixels)
                done = torch.cuda.Event()
                done.record(queue)
        return [self._device_array(feature_map, pixels, done, stream) for feature_map in maps]

    def close(self) -> None:
        """Release the module as described in `EngineSession`."""
        self._module = None

    def abandon(self) -> None:
        """Keep the module alive and refuse calls in a forked child, as described in `forks.Inherited`."""
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
        """Return new contiguous tensors on this device that share no memory with each other or the input."""
        module = self._module
        if module is None:  # another thread has closed it since the call began
            raise self._refusal()
        returned = module(pixels)
        tensors = returned if isinstance(returned, (tuple, list)) else (returned,)
        self._check_count(len(tensors))
        taken, maps = {_memory(pixels)}, []
        for tensor in tensors:
            feature_map = tensor.to(getattr(self._torch, self._map_dtype.name)).contiguous()
            if _memory(feature_map) in taken:
                feature_map = feature_map.clone()
            taken.add(_memory(feature_map))
            maps.append(feature_map)
        return maps

    def _in_pieces(self, pixels: Any) -> list[Any]:
        """Run a tensor of any batch size in pieces that the engine takes, and join the outputs."""
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
        """Return a DeviceArray over a tensor. ``done``: event behind the work that writes it."""
        torch, gpu = self._torch, self._gpu
        assert gpu is not None

        def make_wait(consumer: int) -> None:
            other = _stream(torch, consumer, gpu)
            other.wait_event(done)
            tensor.record_stream(other)  # otherwise the allocator reuses the memory in the order of one stream only

        return DeviceArray(
            tensor.data_ptr(),
            tuple(tensor.shape),
            self._map_dtype,
            device=gpu,
            owner=(tensor, pixels),
            stream=stream,
            synchronize=make_wait,
        )

    @contextlib.contextmanager
    def _running(self, what: str) -> Iterator[None]:
        """Set the number of threads inside the block, and turn torch's errors into typed ones.

        ``what``: the input, for messages.
        """
        torch, wanted, before = self._torch, None, None
        if self._gpu is None and (self._threads or self._limit):
            before = torch.get_num_threads()
            wanted = self._threads or min(before, self._limit or before)
        if before != wanted:
            torch.set_num_threads(wanted)
        try:
            with exits.calls, torch.inference_mode():
                yield
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(f"cuda:{self._gpu} has no memory left for {what}: {cause(error)}") from error
        # Guards of a program raise AssertionError.
        except (RuntimeError, AssertionError, MemoryError, torch.jit.Error) as error:
            refuse_lack(f"running torch on {what}", error)
            raise InferenceError(f"torch failed on {what}: {cause(error)}") from error
        finally:
            if before != wanted:
                torch.set_num_threads(before)


@functools.cache
def _first_process() -> int:
    """Return the id of the process that opened the first session.

    In its forked children the threads of OpenMP do not exist, and torch would wait for them.
    """
    return os.getpid()


def _load(torch: Any, data: bytes, device: Any) -> tuple[Any, int | None]:
    """Return a callable program, and the number of tensors that it returns if the file says so."""
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
        except Exception as error:  # torch raises a dozen types for files that it cannot read
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
    """Return whether the bytes are TorchScript. Exported programs are zip files too, but have no ``code`` folder."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return any("/code/" in name for name in archive.namelist())
    except Exception as error:  # zipfile raises several types for files that it cannot read
        raise EngineMismatchError(
            f"these {len(data)} bytes are neither TorchScript nor an exported program ({error}): build or compile it again"
        ) from error


def _memory(tensor: Any) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _stream(torch: Any, stream: int, gpu: int) -> Any:
    """Return torch's object for a stream handle. 0 and 1 are the legacy default stream."""
    return torch.cuda.default_stream(gpu) if stream in (0, 1) else torch.cuda.ExternalStream(stream, device=gpu)


def cause(error: BaseException) -> str:
    """Return why torch failed, in its own words: the first sentence of the last line.

    torch writes a trace before the cause and advice after it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines or isinstance(error, KeyError):
        return first_line(error)
    return lines[-1].removeprefix("RuntimeError: ").split(". ")[0].rstrip(".")
