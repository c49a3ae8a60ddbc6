"""``python benchmarks/accuracy_peers.py KIND GRAPH IMAGES OUT``: an fp32 graph quantised by another tool, and its maps.

A script by itself: it needs numpy and that tool, in an environment of its own where the tool asks for other releases.
IMAGES is an .npz with ``calibration`` and ``test`` (float32 NCHW); OUT gets one array per output of the graph, or, when it
is an .onnx, the quantised graph (ModelOpt only).
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # none of the tools reports anything
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]


def main() -> None:
    kind, graph, images, out = sys.argv[1:]
    data = np.load(images)
    if out.endswith(".onnx"):
        quantise_with_modelopt(Path(graph), data["calibration"], Path(out), kind.removeprefix("modelopt "))
        return
    with tempfile.TemporaryDirectory() as work:
        maps = KINDS[kind](Path(graph), data["calibration"], data["test"], Path(work))
    np.savez(out, **maps)


def by_onnxruntime(graph: Path, calibration: np.ndarray, test: np.ndarray, work: Path, method: str) -> dict:
    """Quantise with ONNX Runtime in the form that TensorRT takes: symmetric, weights per channel, biases in float."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.images: Iterator[np.ndarray] = iter(calibration)

        def get_next(self) -> dict | None:
            image = next(self.images, None)
            return None if image is None else {"pixel_values": image[None]}

    prepared, quantised = work / "prepared.onnx", work / "int8.onnx"
    quantization.quant_pre_process(graph, prepared, skip_symbolic_shape=True)
    quantization.quantize_static(
        prepared,
        quantised,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QInt8,
        weight_type=quantization.QuantType.QInt8,
        calibrate_method=getattr(quantization.CalibrationMethod, method),
        op_types_to_quantize=["Conv", "MatMul", "Gemm", "Add"],
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "CalibPercentile": 99.99,
        },
    )
    return run_onnxruntime(quantised, test)


def by_nncf(graph: Path, calibration: np.ndarray, test: np.ndarray, work: Path) -> dict:
    import nncf
    import openvino

    core = openvino.Core()
    model = core.read_model(graph)
    is_transformer = any(op.get_type_name() == "Softmax" for op in model.get_ops())
    quantised = nncf.quantize(
        model,
        nncf.Dataset([image[None] for image in calibration]),
        subset_size=len(calibration),
        model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
    )
    compiled = core.compile_model(quantised, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [port.get_any_name() for port in compiled.outputs]
    runs = [compiled(image[None]) for image in test]
    return {name: np.concatenate([np.array(run[i]) for run in runs]) for i, name in enumerate(names)}


def by_modelopt(graph: Path, calibration: np.ndarray, test: np.ndarray, work: Path, method: str) -> dict:
    quantised = work / "int8.onnx"
    quantise_with_modelopt(graph, calibration, quantised, method)
    return run_onnxruntime(quantised, test)


def quantise_with_modelopt(graph: Path, calibration: np.ndarray, out: Path, method: str) -> None:
    from modelopt.onnx.quantization import quantize

    quantize(
        onnx_path=str(graph),
        quantize_mode="int8",
        calibration_data={"pixel_values": calibration},
        calibration_method=method,
        calibration_eps=["cpu"],
        output_path=str(out),
        high_precision_dtype="fp32",
        log_level="ERROR",
    )


def run_onnxruntime(path: Path, test: np.ndarray) -> dict:
    """Run a graph in ONNX Runtime without fusions into integer kernels, so that the graph is judged and not a kernel."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    runs = [session.run(names, {"pixel_values": image[None]}) for image in test]
    return {name: np.concatenate([run[i] for run in runs]) for i, name in enumerate(names)}


KINDS = {
    "onnxruntime minmax": lambda *args: by_onnxruntime(*args, method="MinMax"),
    "onnxruntime percentile": lambda *args: by_onnxruntime(*args, method="Percentile"),
    "nncf": by_nncf,
    "modelopt max": lambda *args: by_modelopt(*args, method="max"),
    "modelopt entropy": lambda *args: by_modelopt(*args, method="entropy"),
}

if __name__ == "__main__":
    main()
