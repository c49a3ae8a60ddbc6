"""Where the C++ library lies, for build systems: ``python -m edge_backbones --cmakedir``.

It is header-only and a part of this package: docs/how-to/cpp.md.
"""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent / "cpp"
FLAGS = {"--includedir": "include", "--cmakedir": "cmake"}
"""Flags of ``python -m edge_backbones``, and the folder that each prints."""


def get_include() -> str:
    """Return the folder of the C++ headers: ``#include <edge_backbones/edge_backbones.hpp>`` is found in it."""
    return str(_FOLDER / "include")


def get_cmake_dir() -> str:
    """Return the folder of edge_backbones-config.cmake, for ``-Dedge_backbones_DIR`` or ``CMAKE_PREFIX_PATH``."""
    return str(_FOLDER / "cmake")


def folder_for(arguments: list[str]) -> str | None:
    """Return the folder that a command line asks for; None if it asks for something else."""
    if len(arguments) != 1 or arguments[0] not in FLAGS:
        return None
    return str(_FOLDER / FLAGS[arguments[0]])
