"""The C functions of edge_backbones.h from Python, as any language with a foreign function interface calls them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.uint8))
MOST_AXES = 8
_SIZES, _RANGE, _TEXT, _SIZE = ctypes.c_int64 * MOST_AXES, ctypes.c_int64 * 3, ctypes.c_char_p, ctypes.c_size_t


class _Sized(ctypes.Structure):
    """A struct that begins with its size."""

    def __init__(self, **values: Any) -> None:
        super().__init__(size=ctypes.sizeof(type(self)), **values)


class Options(_Sized):
    _fields_ = (
        ("size", _SIZE),
        ("engine", _TEXT),
        ("device", _TEXT),
        ("stages", ctypes.POINTER(_TEXT)),
        ("stage_count", _SIZE),
        ("threads", ctypes.c_int32),
        ("allow_host_code", ctypes.c_int32),
        ("accept_not_finite", ctypes.c_int32),
        ("signature_checked", ctypes.c_int32),
    )


class InputInfo(_Sized):
    _fields_ = (
        ("size", _SIZE),
        ("name", _TEXT),
        ("description", _TEXT),
        ("layout", _TEXT),
        ("dtype", ctypes.c_int32),
        ("axes", ctypes.c_int32),
        ("opt_shape", _SIZES),
        ("batch", _RANGE),
        ("height", _RANGE),
        ("width", _RANGE),
        ("multiple", ctypes.c_int64),
    )


class OutputInfo(_Sized):
    _fields_ = (
        ("size", _SIZE),
        ("name", _TEXT),
        ("layout", _TEXT),
        ("dtype", ctypes.c_int32),
        ("axes", ctypes.c_int32),
        ("channels", ctypes.c_int64),
        ("stride", ctypes.c_int64 * 2),
        ("shape", _SIZES),
        ("strides", _SIZES),
        ("bytes", _SIZE),
    )


class RefusalError(Exception):
    """A function returned a code: ``InputError: why``."""


class Library:
    """The shared library. Every method is the function of that name without ``eb_``, and raises RefusalError for a code."""

    def __init__(self, path: Path) -> None:
        self.functions = ctypes.CDLL(str(path))
        for name in ("eb_version", "eb_last_error", "eb_code_name"):
            getattr(self.functions, name).restype = _TEXT

    def text(self, function: str, *arguments: Any) -> str:
        return getattr(self.functions, function)(*arguments).decode()

    def call(self, function: str, *arguments: Any) -> None:
        code = getattr(self.functions, function)(*arguments)
        if code:
            raise RefusalError(f"{self.text('eb_code_name', code)}: {self.text('eb_last_error')}")
        assert self.text("eb_last_error") == ""

    def open(self, path: Path | str, **options: Any) -> Opened:
        stages = [name.encode() for name in options.pop("stages", ())]
        given = Options(
            **{key: value.encode() if isinstance(value, str) else value for key, value in options.items()},
            stages=(_TEXT * len(stages))(*stages) if stages else None,
            stage_count=len(stages),
        )
        handle = ctypes.c_uint64(77)
        try:
            self.call("eb_open", str(path).encode(), ctypes.byref(given), ctypes.byref(handle))
        except RefusalError:
            assert handle.value == 0
            raise
        return Opened(self, handle)


class Opened:
    """An open bundle."""

    def __init__(self, library: Library, handle: ctypes.c_uint64) -> None:
        self.library, self.handle = library, handle

    def close(self) -> None:
        self.library.call("eb_close", self.handle)

    def engine(self) -> tuple[str, str]:
        name, device = _TEXT(), _TEXT()
        self.library.call("eb_engine", self.handle, ctypes.byref(name), ctypes.byref(device))
        return (name.value or b"").decode(), (device.value or b"").decode()

    def input(self) -> InputInfo:
        info = InputInfo()
        self.library.call("eb_input", self.handle, ctypes.byref(info))
        return info

    def count(self) -> tuple[int, int]:
        outputs, stages = _SIZE(), _SIZE()
        self.library.call("eb_output_count", self.handle, ctypes.byref(outputs), ctypes.byref(stages))
        return outputs.value, stages.value

    def output(self, index: int, shape: Sequence[int] | None = None) -> OutputInfo:
        info = OutputInfo()
        sizes = None if shape is None else (ctypes.c_int64 * len(shape))(*shape)
        self.library.call("eb_output", self.handle, _SIZE(index), sizes, _SIZE(len(shape or ())), ctypes.byref(info))
        return info

    def outputs(self, shape: Sequence[int] | None = None) -> list[OutputInfo]:
        return [self.output(index, shape) for index in range(self.count()[0])]

    def run(self, array: np.ndarray, leave_out: Sequence[int] = ()) -> dict[str, np.ndarray]:
        """Return the maps as callers of EdgeBackbone see them."""
        described = self.outputs(array.shape)
        maps = {}
        for index, info in enumerate(described):
            dtype = DTYPES[info.dtype]
            if index not in leave_out:
                memory = np.full(info.bytes // dtype.itemsize, 7, dtype)
                strides = [stride * dtype.itemsize for stride in info.strides[: info.axes]]
                maps[info.name.decode()] = np.lib.stride_tricks.as_strided(memory, info.shape[: info.axes], strides)
        pointers = [
            None if i in leave_out else maps[info.name.decode()].ctypes.data for i, info in enumerate(described)
        ]
        self.run_at(array.ctypes.data, array.nbytes, array.shape, pointers, [info.bytes for info in described])
        return maps

    def run_at(
        self,
        pointer: int | None,
        nbytes: int,
        shape: Sequence[int],
        outputs: Sequence[int | None],
        sizes: Sequence[int],
        *stream: Any,
    ) -> None:
        """Run on memory by its addresses; with a stream on the GPU."""
        self.library.call(
            "eb_run_on_device" if stream else "eb_run",
            self.handle,
            ctypes.c_void_p(pointer),
            _SIZE(nbytes),
            (ctypes.c_int64 * len(shape))(*shape),
            _SIZE(len(shape)),
            (ctypes.c_void_p * len(outputs))(*outputs),
            (_SIZE * len(sizes))(*sizes),
            _SIZE(len(outputs)),
            *stream,
        )
