"""Place layers on a Jetson's deep-learning accelerator (DLA), and choose number formats for it with weak typing.

TensorRT 10 (JetPack 6) still has weak typing, and its DLA compiler is documented and shown by NVIDIA with it alone: FP16 or
INT8 is a flag of the builder, and the graph is fp32.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_backbones.engines.tensorrt.options import PlanOptions
from edge_backbones.errors import CompileError


@dataclass(frozen=True)
class DlaCoverage:
    """Count the layers that a DLA core can run, as TensorRT reports before compiling.

    ``layers``: all layers that compute. ``refused``: names of those that the GPU has to run.
    """

    layers: int
    refused: tuple[str, ...]

    def __str__(self) -> str:
        some = f" ({', '.join(self.refused[:5])}{', ...' if len(self.refused) > 5 else ''})" if self.refused else ""
        return f"DLA runs {self.layers - len(self.refused)} of {self.layers} layers; the GPU {len(self.refused)}{some}"


def place_on_dla(library: Any, network: Any, config: Any, options: PlanOptions) -> DlaCoverage:
    """Configure a plan to run on a DLA core, and return which layers it can run.

    Args:
        library: The TensorRT module.
        network: The network whose layers are placed.
        config: Configuration that is changed.
        options: Options of the plan, with ``dla_core`` set.

    Raises:
        CompileError: The core can run no layer at all, or not all of them while ``options.gpu_fallback`` is off.
    """
    core = options.dla_core
    assert core is not None  # callers check it
    config.default_device_type = library.DeviceType.DLA
    config.DLA_core = core
    if options.gpu_fallback:
        config.set_flag(library.BuilderFlag.GPU_FALLBACK)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    computing = [layer for layer in layers if layer.type.name not in ("CONSTANT", "SHAPE")]
    refused = tuple(layer.name for layer in computing if not config.can_run_on_DLA(layer))
    coverage = DlaCoverage(len(computing), refused)
    if refused and not options.gpu_fallback:
        raise CompileError(f"{coverage}: allow them there (gpu_fallback=True), or leave --dla-core out")
    if len(refused) == len(computing):  # such a plan would name the core in its key, and keep it idle
        raise CompileError(f"{coverage}, which is all of them: leave --dla-core out")
    return coverage


def type_weakly(library: Any, network: Any, config: Any, ranges: Mapping[str, float] | None) -> None:
    """Configure weak typing: tensors in ``ranges`` may be computed in int8, everything else in fp16.

    Args:
        library: The TensorRT module.
        network: The fp32 network.
        config: Configuration that is changed.
        ranges: Thresholds of |x| by tensor name; None for fp16 alone.

    Raises:
        CompileError: TensorRT has no weak typing, or no tensor has a range.
    """
    if not hasattr(library.BuilderFlag, "INT8"):
        typed = "fp16" if ranges is None else "int8"
        raise CompileError(f"TensorRT {library.__version__} has no weak typing left: compile the typed {typed} graph")
    config.set_flag(library.BuilderFlag.FP16)
    if ranges is None:
        return
    config.set_flag(library.BuilderFlag.INT8)
    tensors = [network.get_input(index) for index in range(network.num_inputs)]
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        tensors += [layer.get_output(i) for i in range(layer.num_outputs)]
    known = {tensor.name: ranges[tensor.name] for tensor in tensors if ranges.get(tensor.name, 0) > 0}
    if not known:
        raise CompileError("none of the calibrated tensors is in this graph: calibrate again for it")
    config.int8_calibrator = _calibrator(library, calibration_cache(str(library.__version__), known))


def calibration_cache(version: str, ranges: Mapping[str, float]) -> bytes:
    """Return a calibration table, as TensorRT of this version would write it.

    Each range / 127 is written as the hexadecimal digits of a big-endian float32. TensorRT ignores a table of another
    version or algorithm.
    """
    major, minor, patch = map(int, version.split(".")[:3])
    lines = [f"TRT-{major * 10000 + minor * 100 + patch}-EntropyCalibration2"]
    lines += [f"{name}: {struct.pack('>f', value / 127).hex()}" for name, value in ranges.items()]
    return "\n".join([*lines, ""]).encode()


def _calibrator(library: Any, cache: bytes) -> Any:
    """Return a calibrator for TensorRT that only reads the table in ``cache``."""

    class Calibrator(library.IInt8EntropyCalibrator2):  # type: ignore[misc,name-defined]
        """Hand over a finished calibration table; DLA needs this kind of calibrator."""

        def get_batch_size(self) -> int:
            return 1

        def get_batch(self, names: Sequence[str]) -> None:
            return None

        def read_calibration_cache(self) -> bytes:
            return cache

        def write_calibration_cache(self, cache: bytes) -> None:
            pass

    return Calibrator()
