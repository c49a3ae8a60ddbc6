"""``AutoEdgeBackbone``: AutoBackbone's two constructors, giving a compiled backbone that is built when it is first asked for.

It loads the network to know its content, so it needs the ``build`` extra; a device opens a finished bundle with
:class:`EdgeBackbone` instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

import edge_backbones
from edge_backbones.errors import BundleError, CalibrationError, InputError, MissingDependencyError
from edge_backbones.images.decode import list_images
from edge_backbones.machine.profiles import DeviceProfile, load_profile
from edge_backbones.machine.system import default_cache
from edge_backbones.progress import Progress, no_progress
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.spec import Precision
from edge_backbones.toolchain.artifacts import LoadedBackbone
from edge_backbones.toolchain.build import BuildOptions, build_bundle

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

    from edge_backbones.toolchain.calibration.images import ImageSource

CACHE_LIMIT_BYTES = 16 << 30
_CHOOSE_THE_NETWORK = (
    "weights",
    "from_model",
    "num_channels",
    "output_stride",
    "out_indices",
    "out_features",
    "image",
    "cache",
)
_BY_CONTENT = ("calibration", "profile", "exclude", "gates")
"""Files, sets and mappings: what they hold, however it is written."""


class AutoEdgeBackbone:
    """``transformers.AutoBackbone`` for engines.

    >>> backbone = AutoEdgeBackbone.from_pretrained("resnet50", out_indices=[1, 2, 3, 4])   # doctest: +SKIP
    >>> backbone(pixel_values).feature_maps                                                 # doctest: +SKIP

    Both constructors return an :class:`EdgeBackbone`. The bundle behind it is kept under ``cache`` (the user's cache folder
    by default) and found again by its content: weights, configuration, stages, options, what is in the files that the
    options name, calibration images and the release of this package. The least recently used are deleted above 16 GB.
    Arguments:

    ``engine``: the precision, ``"fp32"``, ``"fp16"`` or ``"int8"``, which needs ``images`` to calibrate on. ``images`` and
    ``options`` as in :func:`build_bundle`; stages that are given here replace those of ``options``. ``threads``: CPU
    threads of the engine. ``progress``: called while a bundle is built.

    Raises what :func:`build_bundle` raises; in particular ParityError, and then nothing is kept.
    """

    def __init__(self) -> None:
        raise InputError(
            "AutoEdgeBackbone is made with AutoEdgeBackbone.from_pretrained(name_or_path) or .from_config(config)"
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        engine: str = "fp32",
        out_indices: Sequence[int] | None = None,
        out_features: Sequence[str] | None = None,
        images: ImageSource = None,
        options: BuildOptions | None = None,
        cache: str | os.PathLike[str] | None = None,
        threads: int | None = None,
        progress: Progress = no_progress,
        use_pretrained_backbone: bool = True,
        use_timm_backbone: bool | None = None,
    ) -> EdgeBackbone:
        """A timm name, a hub id, or a local ``save_pretrained`` folder; the stages as in transformers.

        ``use_timm_backbone`` is accepted and has no effect: a name of timm means timm, as in transformers 5.
        ``use_pretrained_backbone=False`` means seeded random weights.
        """
        options = options or BuildOptions()
        if not use_pretrained_backbone and options.weights == "pretrained":
            options = dataclasses.replace(options, weights="random:0")
        source = pretrained_model_name_or_path
        return _open(source, engine, out_indices, out_features, images, options, cache, threads, progress)

    @classmethod
    def from_config(
        cls,
        config: PreTrainedConfig,
        *,
        engine: str = "fp32",
        out_indices: Sequence[int] | None = None,
        out_features: Sequence[str] | None = None,
        images: ImageSource = None,
        options: BuildOptions | None = None,
        cache: str | os.PathLike[str] | None = None,
        threads: int | None = None,
        progress: Progress = no_progress,
    ) -> EdgeBackbone:
        """A configuration; weights are random as with AutoBackbone, but seeded, unless ``options.weights`` is a file."""
        options = options or BuildOptions()
        if options.weights == "pretrained":
            options = dataclasses.replace(options, weights="random:0")
        return _open(config, engine, out_indices, out_features, images, options, cache, threads, progress)


def _open(
    source: str | os.PathLike[str] | PreTrainedConfig | nn.Module,
    engine: str,
    out_indices: Sequence[int] | None,
    out_features: Sequence[str] | None,
    images: ImageSource,
    options: BuildOptions,
    cache: str | os.PathLike[str] | None,
    threads: int | None,
    progress: Progress,
) -> EdgeBackbone:
    if engine not in [precision.value for precision in Precision]:
        raise InputError(f"engine must be one of {', '.join(p.value for p in Precision)}; got {engine!r}")
    if Precision(engine).is_calibrated and images is None and options.calibration is None:
        raise CalibrationError(f"{engine} needs calibration images: pass images=FOLDER, or engine='fp16'")
    if out_indices is not None or out_features is not None:
        options = dataclasses.replace(
            options,
            out_indices=None if out_indices is None else tuple(out_indices),
            out_features=None if out_features is None else tuple(out_features),
        )
    options = dataclasses.replace(options, precisions=(Precision(engine),))
    progress("loading the network", 0, None)
    try:
        from edge_backbones.toolchain.sources.load import load_source
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"building a bundle ({error.name} is not installed)", "build") from error
    profile = None if options.profile is None else load_profile(options.profile)
    loaded = load_source(source, options.source_options(profile))
    folder = (default_cache() if cache is None else Path(cache)) / "bundles"
    path = folder / f"{_content_key(loaded, options, profile, images)}.bundle"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            build_bundle(loaded, path, images=images, options=options, progress=progress)
        except BundleError:
            if not path.exists():  # else another process was faster
                raise
        _forget_oldest(folder, keep=path)
    with contextlib.suppress(OSError):
        os.utime(path)
    # Another release of the engine library, or a cache shared by several machines: the engine is made or measured anew.
    return EdgeBackbone.from_pretrained(path, engine=engine, threads=threads, on_mismatch="compile")


def _content_key(
    loaded: LoadedBackbone, options: BuildOptions, profile: DeviceProfile | None, images: ImageSource
) -> str:
    """The same for everything that makes the same bundle, wherever its files lie; another for everything else."""
    from edge_backbones.toolchain.calibration.calibrate import read_calibration
    from edge_backbones.toolchain.sources.base import tensors_sha256

    # What chose the network is in the loaded network; what is left says what is made of it.
    by_value = vars(options).keys() - {*_CHOOSE_THE_NETWORK, *_BY_CONTENT}
    rest: dict[str, Any] = {name: repr(getattr(options, name)) for name in by_value}
    rest["calibration"] = None if options.calibration is None else read_calibration(options.calibration)
    rest["profile"] = profile
    rest["exclude"] = sorted(set(options.exclude))
    rest["gates"] = {precision.value: gate for precision, gate in options.gates.items()}
    content: list[Any] = [
        edge_backbones.__version__,
        tensors_sha256(loaded.module),
        msgspec.to_builtins([msgspec.structs.replace(loaded.source, name=""), loaded.spec, loaded.image_config]),
        [loaded.channels_in, loaded.height, loaded.width],
        rest,
        _images_sha256(images),
    ]
    return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()


def _images_sha256(images: ImageSource) -> str:
    digest = hashlib.sha256()
    if images is None:
        return "synthetic"
    if isinstance(images, (str, os.PathLike)):
        path = Path(images)
        for file in list_images(path) if path.is_dir() else [path]:
            if not path.is_dir() and not file.is_file():
                raise CalibrationError(f"images {str(images)!r} are neither a folder nor a file")
            digest.update(os.fsencode(file.relative_to(path) if path.is_dir() else "") + b"\n")
            with contextlib.suppress(OSError):  # a file that cannot be read: the build skips it with the reason
                digest.update(file.read_bytes())
        return digest.hexdigest()
    if not isinstance(images, (Sequence, np.ndarray)):
        raise CalibrationError(
            f"images of type {type(images).__name__} can be read only once: pass a list, an array or a folder"
        )
    for image in images:
        array = np.ascontiguousarray(image)
        digest.update(f"{array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _forget_oldest(folder: Path, keep: Path) -> None:
    """Delete the least recently used bundles above the limit. An engine that is running was read into memory."""
    sizes = {
        path: (path.stat().st_mtime, sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))
        for path in folder.glob("*.bundle")
    }
    total = 0
    for path, (_, size) in sorted(sizes.items(), key=lambda item: item[1][0], reverse=True):
        total += size
        if total > CACHE_LIMIT_BYTES and path != keep:
            shutil.rmtree(path, ignore_errors=True)
