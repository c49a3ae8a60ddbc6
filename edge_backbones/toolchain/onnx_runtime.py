"""ONNX Runtime without its telemetry: ``from edge_backbones.toolchain.onnx_runtime import onnxruntime``, here and
nowhere else.

From release 1.29 on it reports which graphs it opens (names, hashes, sizes) to its maker, from threads of its own, and keeps
an identifier of the device in the home folder. Nobody who builds a bundle asked for that.
"""

from __future__ import annotations

import os

__all__ = ["onnxruntime"]

# Read once, when the library starts. It stays set, so that child processes are quiet too; a value of the user's wins.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime

onnxruntime.disable_telemetry_events()  # the program may have imported it before, with telemetry
