"""Compile ONNX graphs to OpenVINO blobs for the CPU, and run them."""
