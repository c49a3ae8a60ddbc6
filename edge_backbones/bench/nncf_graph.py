"""Quantise an ONNX file with NNCF: ``python nncf_graph.py GRAPH IMAGES.npz OUT.xml``.

This file needs nncf, openvino and numpy but not edge_backbones, because NNCF may be installed in another environment.
"""

import sys

import numpy as np


def main() -> None:
    """Quantise the graph that the command line names."""
    graph, images, out = sys.argv[1:]
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # keeps both libraries from sending usage data
    import nncf
    import openvino

    model = openvino.Core().read_model(graph)
    is_transformer = any(op.get_type_name() == "Softmax" for op in model.get_ops())
    with np.load(images) as archive:
        batches = list(archive["images"])
    quantised = nncf.quantize(
        model,
        nncf.Dataset(batches),
        subset_size=len(batches),
        model_type=nncf.ModelType.TRANSFORMER if is_transformer else None,
    )
    openvino.save_model(quantised, out, compress_to_fp16=False)


if __name__ == "__main__":
    main()
