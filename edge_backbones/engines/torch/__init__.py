"""Run TorchScript files and programs of torch-tensorrt with torch."""
