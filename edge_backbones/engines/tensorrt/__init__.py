"""Compile graphs to plans with TensorRT or TensorRT-RTX, and run them."""
