"""``AutoEdgeBackbone``: the two constructors of transformers' AutoBackbone; the bundle is built when it is first needed.

It loads the network to find its bundle by content, so it needs the ``build`` extra. A device opens a finished bundle with
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
from edge_backbones.errors import BundleError, CalibrationError, InputError, needing
from edge_backbones.images.decode import list_images
from edge_backbones.machine.profiles import DeviceProfile, load_profile
from edge_backbones.machine.system import default_cache
from edge_backbones.progress import Progress, no_progress
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.spec import Precision
from edge_backbones.toolchain.artifacts import LoadedBackbone
from edge_backbones.toolchain.build import build_bundle
from edge_backbones.toolchain.options import BuildOptions

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
_STAGES_AS_GIVEN = ("out_indices", "out_features", "_out_indices", "_out_features")
_BY_CONTENT = ("calibration", "profile", "exclude", "gates")
"""Options whose content counts, not how they are written: files, sets and mappings."""


class AutoEdgeBackbone:
    """``transformers.AutoBackbone`` for engines.

    >>> backbone = AutoEdgeBackbone.from_pretrained("resnet50", out_indices=[1, 2, 3, 4])   # doctest: +SKIP
    >>> backbone(pixel_values).feature_maps                                                 # doctest: +SKIP

    Both constructors return an :class:`EdgeBackbone`. Its bundle is kept in ``cache`` (by default the user's cache folder)
    and found again by content: weights, configuration, stages, options, the files that the options name, calibration images
    and the release of this package. Above 16 GB the least recently used bundles are deleted.

    ``engine`` is the precision, such as ``"fp32"``, ``"fp16"`` or ``"int8"``; int8 and fp8 need ``images`` to calibrate on.
    ``images`` and ``options`` are those of :func:`build_bundle`; stages that are given here replace those of ``options``.
    ``threads``: CPU threads of the engine. ``progress``: called while a bundle is built.

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
        """Open or build the backbone of a timm name, a hub id, or a local ``save_pretrained`` folder.

        ``out_indices`` and ``out_features`` choose stages as in transformers. ``use_timm_backbone`` has no effect: a name of
        timm means timm, as in transformers 5. ``use_pretrained_backbone=False`` means seeded random weights.
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
        """Open or build the backbone of a configuration. Weights are random (seeded) unless ``options.weights`` is a file."""
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
    with needing("building a bundle", "build"):
        from edge_backbones.toolchain.sources.load import load_source
    profile = None if options.profile is None else load_profile(options.profile)
    loaded = load_source(source, options.source_options(profile))
    folder = (default_cache() if cache is None else Path(cache)) / "bundles"
    path = folder / f"{_content_key(loaded, options, profile, images)}.bundle"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            build_bundle(loaded, path, images=images, options=options, progress=progress)
        except BundleError:
            if not path.exists():  # if it exists, another process built it meanwhile
                raise
        _forget_oldest(folder, keep=path)
    with contextlib.suppress(OSError):
        os.utime(path)
    # After an update of the engine library, or from a cache that machines share, the engine is compiled or measured again.
    backbone = EdgeBackbone.from_pretrained(path, engine=engine, threads=threads, on_mismatch="compile")
    backbone.out_indices = list(loaded.spec.out_indices)  # as given: the bundle may be built for 4 instead of -1
    return backbone


def _content_key(
    loaded: LoadedBackbone, options: BuildOptions, profile: DeviceProfile | None, images: ImageSource
) -> str:
    """Return the hash of everything that decides what a bundle holds. Where files lie does not count, only their content."""
    from edge_backbones.toolchain.calibration.calibrate import read_calibration
    from edge_backbones.toolchain.sources.base import tensors_sha256

    # The options that chose the network count through the loaded network; the others say what is built from it.
    by_value = vars(options).keys() - {*_CHOOSE_THE_NETWORK, *_BY_CONTENT}
    rest: dict[str, Any] = {name: repr(getattr(options, name)) for name in by_value}
    rest["calibration"] = None if options.calibration is None else read_calibration(options.calibration)
    rest["profile"] = profile
    rest["exclude"] = sorted(set(options.exclude))
    rest["gates"] = {precision.value: gate for precision, gate in options.gates.items()}
    # A stage that is counted from the end (-1) is the same stage. transformers' own configuration repeats how it was given.
    config = {key: value for key, value in loaded.source.config.items() if key not in _STAGES_AS_GIVEN}
    source = msgspec.structs.replace(loaded.source, name="", config=config)
    count = len(loaded.spec.stage_names)
    spec = msgspec.structs.replace(loaded.spec, out_indices=tuple(i % count for i in loaded.spec.out_indices))
    content: list[Any] = [
        edge_backbones.__version__,
        tensors_sha256(loaded.module),
        msgspec.to_builtins([source, spec, loaded.image_config]),
        [loaded.channels_in, loaded.height, loaded.width],
        rest,
        _images_sha256(images),
    ]
    return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()


def _images_sha256(images: ImageSource) -> str:
    """Return the hash of calibration images. Raises CalibrationError for an iterable that can be read only once."""
    digest = hashlib.sha256()
    if images is None:
        return "synthetic"
    if isinstance(images, (str, os.PathLike)):
        path = Path(images)
        for file in list_images(path) if path.is_dir() else [path]:
            if not path.is_dir() and not file.is_file():
                raise CalibrationError(f"images {str(images)!r} are neither a folder nor a file")
            digest.update(os.fsencode(file.relative_to(path) if path.is_dir() else "") + b"\n")
            with contextlib.suppress(OSError):  # the build skips a file that cannot be read, and says why
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
    """Delete the least recently used bundles above the limit. Running engines are in memory and lose nothing."""
    sizes = {
        path: (path.stat().st_mtime, sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))
        for path in folder.glob("*.bundle")
    }
    total = 0
    for path, (_, size) in sorted(sizes.items(), key=lambda item: item[1][0], reverse=True):
        total += size
        if total > CACHE_LIMIT_BYTES and path != keep:
            shutil.rmtree(path, ignore_errors=True)
