"""Bundles inside the models of other libraries: transformers, torchvision, segmentation_models_pytorch. Needs torch."""
