"""Keep the kernels that TensorRT-RTX compiles while an engine runs first, from one process to the next."""

from __future__ import annotations

import hashlib
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from edge_backbones.engines.tensorrt import runtime_cache
from edge_backbones.machine.gpus import Gpu

_PAUSE = 30.0  # seconds between two writes, so that an engine that meets many shapes does not write all the time


class Kernels:
    """Hold the runtime cache of one engine, which all its execution contexts share. Threads may share it.

    A cache that cannot be read or written costs time and nothing else: a RuntimeWarning says why.

    Args:
        plan: The plan's bytes.
        library_version: Release of TensorRT-RTX.
        gpu: GPU that runs the plan.
        folder: Folder of the files; None for the one in the user's cache.
    """

    def __init__(self, plan: bytes | bytearray, library_version: str, gpu: Gpu, *, folder: Path | None = None) -> None:
        digest = hashlib.sha256(plan).hexdigest()
        self.path = runtime_cache.path_of(digest, library_version, gpu, folder=folder)
        # Reentrant, because garbage collection may release the last context of a closed engine while this thread holds it.
        self._lock = threading.RLock()
        self._cache: Any = None
        self._kept = b""
        self._next = 0.0

    def use_in(self, options: Any) -> None:
        """Make the execution contexts of an ``IRuntimeConfig`` use the cache."""
        with self._lock:
            if self._cache is None:
                cache = options.create_runtime_cache()
                kept, note = runtime_cache.read(self.path)
                _tell(note)
                if kept is not None and cache.deserialize(kept):  # it refuses what another GPU or release has written
                    self._kept = hashlib.sha256(kept).digest()
                self._cache = cache
        options.set_runtime_cache(self._cache)

    def save_soon(self) -> None:
        """Write the cache if the last time is long enough ago. Call it after a shape has run that is new."""
        if time.monotonic() >= self._next:
            self.save()

    def save(self) -> None:
        """Write the cache if it holds more than the file."""
        if self._cache is None:
            return
        with self._lock:
            self._next = time.monotonic() + _PAUSE
            compiled = bytes(self._cache.serialize() or b"")  # None if TensorRT-RTX fails
            digest = hashlib.sha256(compiled).digest()
            if compiled and digest != self._kept:
                self._kept = digest
                _tell(runtime_cache.write(self.path, compiled))


def _tell(note: str) -> None:
    if note:
        warnings.warn(note, RuntimeWarning, stacklevel=2)
