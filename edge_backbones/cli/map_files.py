"""Write the feature maps of one image to a file or a folder, which is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_backbones.errors import InputError, needing
from edge_backbones.images.decode import shown
from edge_backbones.reading import why_not


def save_maps(path: Path, maps: Mapping[str, np.ndarray]) -> None:
    """Write one array per stage: a Zarr group (a folder) if ``path`` ends in .zarr, else an .npz file.

    Raises InputError if it cannot be written.
    """
    with writing(path), _replacing(path) as beside:
        if path.suffix == ".zarr":
            _save_zarr(beside, maps)
        else:
            _save_npz(beside, maps)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise InputError with the path and the reason where the system refuses to write it. A full disk names no file."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{shown(path)} cannot be written ({why_not(error)}): choose another folder with --out"
        ) from error


def require_format(format: str) -> None:
    """Raise MissingDependencyError if a library is missing that a format needs."""
    if format == "zarr":
        with needing("writing Zarr", "zarr"):
            import zarr  # noqa: F401


def _save_npz(path: Path, maps: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file.

    numpy.savez cannot be used: stages may have the names of its own arguments, ``file`` and ``allow_pickle``.
    """
    with zipfile.ZipFile(path, "w") as archive:
        for stage, feature_map in maps.items():
            with archive.open(f"{stage}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, feature_map, allow_pickle=False)


def _save_zarr(path: Path, maps: Mapping[str, np.ndarray]) -> None:
    """Write a Zarr group, with functions that zarr 2 (Python 3.10) and 3 have in common."""
    import zarr

    zarr.open_group(str(path), mode="w")
    for stage, feature_map in maps.items():
        values: Any = np.ascontiguousarray(feature_map)
        zarr.save_array(str(path), values, path=stage)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to, and put what was written there in its place."""
    beside = path.with_name(f".{path.name}.part")
    try:
        yield beside
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(beside, path)
    finally:
        if beside.is_dir():
            shutil.rmtree(beside, ignore_errors=True)
        else:
            beside.unlink(missing_ok=True)
