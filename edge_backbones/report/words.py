"""Numbers and names in the words of the report."""

from __future__ import annotations

from typing import Any

FLAVOURS = {
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
    "tensorrt_rtx": "TensorRT-RTX",
    "torch_tensorrt": "Torch-TensorRT",
    "torchscript": "TorchScript",
}


def times(sizes: Any) -> str:
    return " \u00d7 ".join(str(size) for size in sizes)


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def fixed(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}"


def signs(text: object) -> str:
    return str(text).replace(">=", "\u2265").replace("<=", "\u2264")


def yes_or_no(value: bool) -> str:
    return "yes" if value else "no"
