"""Time the layers of a CPU engine with OpenVINO's own counters."""

from __future__ import annotations

import numpy as np

from edge_backbones.engines import exits
from edge_backbones.engines.base import LayerTime
from edge_backbones.engines.openvino.session import cause, core, load_library, most_threads, settings
from edge_backbones.errors import InferenceError, refuse_lack

_WARM_UP, _CALLS = 3, 30
_OF_FUSION = "/WithoutBiases"  # what OpenVINO adds to the name of a layer whose bias it keeps apart


def time_layers(blob: bytearray, images: np.ndarray, computes_in: str = "fp32") -> list[LayerTime]:
    """Return the layers of an engine that took time, in the order in which they ran.

    Each figure is the shortest of several calls, which other programs of the machine disturb least. ``images``: an input
    that the engine takes. ``computes_in``: as for `settings`. Raises InferenceError if OpenVINO fails.
    """
    openvino = load_library()
    shortest: dict[str, float] = {}
    kinds: dict[str, tuple[str, str]] = {}
    try:
        tensor = openvino.Tensor(np.frombuffer(blob, np.uint8), shared_memory=True)
        with exits.calls:
            model = core().import_model(
                tensor, "CPU", {**settings(most_threads(None), computes_in), "PERF_COUNT": True}
            )
            request = model.create_infer_request()
        request.set_input_tensor(openvino.Tensor(np.ascontiguousarray(images), shared_memory=True))
        for call in range(_WARM_UP + _CALLS):
            request.infer()
            if call < _WARM_UP:
                continue
            for layer in request.profiling_info:
                kinds[layer.node_name] = layer.node_type, layer.exec_type
                taken = 1e3 * layer.real_time.total_seconds()
                shortest[layer.node_name] = min(taken, shortest.get(layer.node_name, taken))
    except (RuntimeError, MemoryError) as error:
        refuse_lack("timing the layers of an engine with OpenVINO", error)
        raise InferenceError(f"OpenVINO cannot time the layers of this engine: {cause(error)}") from error
    return [
        LayerTime(name=name.removesuffix(_OF_FUSION), kind=kinds[name][0], kernel=kinds[name][1], milliseconds=taken)
        for name, taken in shortest.items()
        if taken > 0
    ]
