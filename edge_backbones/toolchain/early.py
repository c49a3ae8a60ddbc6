"""Refuse a build that cannot succeed, in the first second: before torch, timm or transformers are imported."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from edge_backbones.bundle.writer import check_target
from edge_backbones.errors import BundleError, CalibrationError, CompileError, SourceError
from edge_backbones.images.decode import list_images, why_no_images
from edge_backbones.machine import gpus
from edge_backbones.reading import why_not_made
from edge_backbones.toolchain.options import BuildOptions
from edge_backbones.toolchain.sources import names


def check_build(source: Any, target: str | Path, images: Any, options: BuildOptions, *, overwrite: bool) -> None:
    """Raise the error that a build with these arguments would end with, as far as that shows without any library.

    Raises SourceError for the model and its weights, CalibrationError for the images and the calibration, BundleError for
    the target, CompileError for an engine that needs a GPU.
    """
    if "torch_tensorrt" in options.flavours and not gpus.find_gpus():
        raise CompileError(f"torch_tensorrt compiles on the GPU that will run the engine: {gpus.no_gpu_reason()}")
    if images is None and options.needs_ranges and options.calibration is None:
        raise CalibrationError("int8 needs calibration images: pass a folder of photographs (--images FOLDER)")
    if isinstance(source, (str, os.PathLike)):
        names.refuse(str(source))
    check_weights(options.weights)
    check_target(target, overwrite=overwrite)
    if why := why_not_made(target):
        raise BundleError(f"{target} cannot be written: {why}: choose another place")
    if isinstance(images, (str, os.PathLike)):
        check_images(Path(images))
    if options.calibration is not None and not Path(options.calibration).exists():
        raise CalibrationError(f"{options.calibration} does not exist: pass a calibration.json, or a bundle with int8")
    image = options.image
    if isinstance(image, (str, os.PathLike)) and not Path(image).exists():
        raise SourceError(
            f"{image} does not exist: --image-processor (image=) takes the folder of an image processor, or its file"
        )


def check_weights(weights: str) -> None:
    """Raise SourceError for weights that are neither pretrained, random:SEED nor a file that exists."""
    kind, _, seed = weights.partition(":")
    if kind == "random":
        if not (seed.isdecimal() and int(seed) < 2**63):
            raise SourceError(f"random weights need a seed, as in random:0; got {weights!r}")
    elif weights != "pretrained" and not Path(weights).is_file():
        raise SourceError(f"weights {weights!r} are neither 'pretrained', 'random:SEED' nor a file that exists")


def check_images(path: Path) -> None:
    """Raise CalibrationError for a path that holds no images: a folder without any, or a file that is no .npz."""
    if path.is_dir():
        if not list_images(path):
            raise CalibrationError(why_no_images(path))
    elif not path.exists():
        raise CalibrationError(f"{path} does not exist: it is neither a folder of images nor an .npz file")
    elif path.suffix != ".npz":
        raise CalibrationError(f"{path} is not an .npz file: pass a folder of images or an .npz with one array")
