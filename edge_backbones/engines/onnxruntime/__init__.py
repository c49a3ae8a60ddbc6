"""Run ONNX graphs on the CPU with ONNX Runtime."""
