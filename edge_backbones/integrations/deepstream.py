"""Write what DeepStream's Gst-nvinfer needs to run the TensorRT plan of a bundle: the plan and a configuration file.

nvinfer scales whole frames to the network's size, computes ``net-scale-factor * (pixel - offset)`` in float32, one factor
for all channels and one offset for each, and hands the result to the engine as NCHW. What a bundle's preprocessing has
beyond that is refused, or is in the notes. The rules are those of NVIDIA's documentation and of the sources that DeepStream
ships (nvdsinfer_context_impl.cpp, nvdsinfer_conversion.cu, gstnvinfer_property_parser.cpp).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_backbones.bundle import trust
from edge_backbones.bundle.manifest import EngineRecord, Manifest
from edge_backbones.bundle.reader import Bundle, read_current
from edge_backbones.bundle.storage import explained, write_beside_and_rename
from edge_backbones.engines import promises, select
from edge_backbones.errors import BundleError, EngineMismatchError, InputError, visible
from edge_backbones.images.config import ImageConfig
from edge_backbones.spec import Precision

CONFIG = "config_infer.txt"
"""Name of the configuration file, for the property ``config-file-path`` of nvinfer."""

FIRST_LINE = "# Written by edge-backbones export-deepstream."
"""How our configuration files begin. Another file is not overwritten."""

_WHOLE_FRAMES, _NO_DECODER, _ON_GPU = 1, 100, 1
_NETWORK_MODE = {Precision.FP32: 0, Precision.INT8: 1, Precision.FP16: 2, Precision.BF16: 2, Precision.FP8: 2}
# NvBufSurfTransform_Inter, as the GPU reads it: its "super" filter averages, as box and Hamming do.
_FILTERS = {"nearest": 0, "bilinear": 1, "bicubic": 2, "box": 3, "hamming": 3, "lanczos": 4}


@dataclass(frozen=True, kw_only=True)
class DeepStreamFiles:
    """What `export_deepstream` wrote.

    ``engine``: name of the engine. ``notes``: sentences about what nvinfer does otherwise than the network's own
    preprocessing, and what the plan asks of the machine. They are in the configuration file too.
    """

    config: Path
    plan: Path
    engine: str
    notes: tuple[str, ...]


def export_deepstream(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    engine: str | None = None,
    unique_id: int = 1,
    one_std: bool = False,
    overwrite: bool = False,
) -> DeepStreamFiles:
    """Write a folder with a bundle's TensorRT plan and ``config_infer.txt``, which nvinfer reads.

    nvinfer attaches every output of the engine to the frames, as ``NvDsInferTensorMeta``; it interprets none.

    Args:
        path: Folder of the bundle.
        target: Folder to write; it is made if there is none.
        engine: The plan: a precision, or a name in the manifest or the beginning of one. Needed if there are several.
        unique_id: The id that the metadata of this nvinfer have in the pipeline.
        one_std: Normalise with the mean of the channels' standard deviations if they differ. nvinfer cannot do it exactly.
        overwrite: Replace what an earlier export wrote.

    Raises:
        BundleError: A file is damaged, or the target exists or cannot be written.
        EngineMismatchError: The bundle has no plan that nvinfer can load, or several that fit ``engine``.
        InputError: nvinfer cannot prepare frames for this bundle, or ``unique_id`` is negative.
    """
    if unique_id < 0:
        raise InputError(f"unique_id is 0 or more, got {unique_id}")
    folder = Path(target)
    if folder.resolve().is_relative_to(Path(path).resolve()):
        raise InputError(f"{folder} is the bundle itself or inside it, which stays as it is: choose another folder")
    if folder.exists() and not folder.is_dir():
        raise BundleError(f"{folder} is a file: choose the name of a folder")
    _require_free(folder / CONFIG, overwrite=overwrite)

    def export(bundle: Bundle) -> DeepStreamFiles:
        bundle, _ = trust.admit(bundle)
        record = _chosen(bundle, engine)
        notes = _notes(bundle.manifest, record, one_std=one_std)
        plan = folder / Path(record.file.path).name
        properties = nvinfer_properties(bundle.manifest, record, plan.name, unique_id=unique_id, one_std=one_std)
        text = _as_text(properties, (f"{bundle.path.name}, {record.name}", *notes))
        data = bundle.read(record.file)
        with explained(folder):
            write_beside_and_rename(plan, data)
            write_beside_and_rename(folder / CONFIG, text.encode())
        return DeepStreamFiles(config=folder / CONFIG, plan=plan, engine=record.name, notes=notes)

    return read_current(path, export)[1]


def _require_free(config: Path, *, overwrite: bool) -> None:
    """Raise BundleError unless ``config`` may be written: only a file that `export_deepstream` wrote is replaced."""
    if not os.path.lexists(config):
        return
    if not overwrite:
        raise BundleError(f"{config} exists: choose another folder or pass --overwrite (overwrite=True)")
    with explained(config):
        is_ours = config.is_file() and config.read_bytes().startswith(FIRST_LINE.encode())
    if not is_ours:
        raise BundleError(f"{config} was not written by export-deepstream and stays as it is: choose another folder")


def nvinfer_properties(
    manifest: Manifest, record: EngineRecord, plan: str, *, unique_id: int = 1, one_std: bool = False
) -> dict[str, str]:
    """Return the group ``[property]`` of nvinfer's configuration file for an engine of a manifest.

    ``plan``: path of the plan, relative to the file. Raises InputError if nvinfer cannot prepare frames for the bundle.
    """
    _refuse_input(manifest)
    input, image = manifest.input, manifest.image
    std = _one_std(image, allowed=one_std)
    in_order = image.mean[::-1] if image.channel_order == "bgr" else image.mean
    batch, height, width = _sizes(manifest, record)
    gpu = record.key.gpu
    properties = {
        "gpu-id": 0,
        "gie-unique-id": unique_id,
        "process-mode": _WHOLE_FRAMES,
        "network-type": _NO_DECODER,
        "output-tensor-meta": 1,
        "model-engine-file": plan,
        "network-mode": _NETWORK_MODE[record.key.precision],
        "batch-size": batch,
        "infer-dims": f"{input.channels};{height};{width}",
        "output-blob-names": ";".join(manifest.backbone.outputs),
        "model-color-format": 2 if input.channels == 1 else int(image.channel_order == "bgr"),
        "net-scale-factor": repr(1 / (255 * std)),
        "offsets": ";".join(repr(255 * mean) for mean in in_order),
        "maintain-aspect-ratio": int(image.crop_mode in ("border", "pad")),
        "symmetric-padding": int(image.crop_mode == "border"),
        "scaling-filter": _FILTERS[image.interpolation],
        "scaling-compute-hw": _ON_GPU,
    }
    if gpu is not None and gpu.dla_core is not None:
        properties |= {"enable-dla": 1, "use-dla-core": gpu.dla_core}
    return {key: str(value) for key, value in properties.items()}


def _chosen(bundle: Bundle, engine: str | None) -> EngineRecord:
    """Return the one plan that ``engine`` means and nvinfer can load; raise EngineMismatchError with the reasons."""
    name = select.full_name(bundle, engine)
    meant = [
        record
        for record in bundle.manifest.engines
        if name is None or name in (record.key.precision.value, record.key.flavour, record.name)
    ]
    reasons = {record.name: _reasons_against(bundle.manifest, record) for record in meant}
    fitting = [record for record in meant if not reasons[record.name]]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(record.name for record in fitting)
        raise EngineMismatchError(
            f"{bundle.path} has {len(fitting)} plans for nvinfer: name one with --engine: {names}"
        )
    listed = "; ".join(f"{name}: {' and '.join(why)}" for name, why in reasons.items()) or "it has no such engine"
    raise EngineMismatchError(
        f"{bundle.path} has no plan for nvinfer ({listed}). On the device, where DeepStream is: edge-backbones compile "
        f"{bundle.path} --flavour tensorrt"
    )


def _reasons_against(manifest: Manifest, record: EngineRecord) -> list[str]:
    """Return why nvinfer cannot load an engine, as phrases."""
    if record.key.flavour != "tensorrt":
        return [f"is of {record.key.flavour}, and nvinfer loads plans of TensorRT itself"]
    gpu, reasons = record.key.gpu, promises.reasons_against(manifest, record)
    if gpu is not None and gpu.stripped:
        reasons.append("has no weights, and nvinfer puts none in (it was compiled with --strip)")
    if gpu is not None and gpu.host_code:
        reasons.append("carries a runtime, which nvinfer does not allow (it was compiled with --embed-runtime)")
    return reasons


def _refuse_input(manifest: Manifest) -> None:
    """Raise InputError for an input that nvinfer cannot fill."""
    input, source = manifest.input, manifest.source
    if input.name != "pixel_values" or input.dtype != "float32":
        takes = input.describe().partition(" with any batch")[0]
        raise InputError(
            f"this bundle takes {input.name}, {takes}, and nvinfer writes float32 NCHW into every engine: build it with "
            "--input pixel_values --pixels float32, which are the defaults"
        )
    if input.channels not in (1, 3):
        raise InputError(f"this bundle takes {input.channels} channels, and nvinfer gives 1 (grey) or 3 (RGB, BGR)")
    if source.not_repeated:
        raise InputError(
            f"{source.not_repeated}, and nvinfer does not: prepare the tensors yourself, with Gst-nvdspreprocess and "
            "input-tensor-meta=1"
        )
    if odd := [name for name in manifest.backbone.outputs if ";" in name or not name.isprintable()]:
        raise InputError(f"the output {odd[0]!r} cannot be written into a list of names that ; separates")


def _one_std(image: ImageConfig, *, allowed: bool) -> float:
    """Return the standard deviation of all channels; raise InputError if they differ and a mean is not allowed."""
    mean = sum(image.std) / len(image.std)
    if len(set(image.std)) == 1:
        return image.std[0]
    if not allowed:
        raise InputError(
            f"the channels of this network have standard deviations of their own ({_listed(image.std)}), and nvinfer has "
            f"one factor for all: pass --one-std (one_std=True) to use their mean, {mean:.4g}, which changes the contrast "
            f"of a channel by up to {_worst(image):.1f} %"
        )
    return mean


def _worst(image: ImageConfig) -> float:
    """Return by how many percent the mean of the standard deviations changes the contrast of a channel at most."""
    mean = sum(image.std) / len(image.std)
    return max(abs(std / mean - 1) for std in image.std) * 100


def _sizes(manifest: Manifest, record: EngineRecord) -> tuple[int, int, int]:
    """Return the largest batch, and the height and width that nvinfer asks for: those of the first profile, which it uses."""
    gpu, input = record.key.gpu, manifest.input
    if gpu is not None and gpu.profiles:
        _, best, most = gpu.profiles[0]
        return most[0], best[2], best[3]
    return input.batch.max, input.height.opt, input.width.opt


def _notes(manifest: Manifest, record: EngineRecord, *, one_std: bool) -> tuple[str, ...]:
    """Return what nvinfer does otherwise than the network's own preprocessing, and what the plan asks of the machine."""
    _refuse_input(manifest)
    image, key = manifest.image, record.key
    _, height, width = _sizes(manifest, record)
    notes = [
        f"The plan is of TensorRT {key.library_version} for {key.device_name}: DeepStream loads it only with that release "
        "of TensorRT on that kind of GPU.",
        "nvinfer resizes with filters of NVIDIA's own, so pixels differ from those of the network's own preprocessing "
        f"({image.describe(height, width)}).",
    ]
    if one_std and len(set(image.std)) > 1:
        notes.append(
            f"Standard deviations are those of all channels ({_listed(image.std)} became "
            f"{_one_std(image, allowed=True):.4g}): the contrast of a channel is up to {_worst(image):.1f} % off."
        )
    if image.crop_mode == "center" or (
        image.crop_mode == "squash" and image.scaled_size(height, width) != (height, width)
    ):
        notes.append(
            "The network was trained on the centre of a picture, and nvinfer squeezes the whole frame into "
            f"{height}x{width}: cut the centre out in front of it, as nvvideoconvert src-crop=LEFT:TOP:WIDTH:HEIGHT does."
        )
    if image.short_edge or image.long_edge:
        notes.append("The network scales pictures to edges of its own, and nvinfer until they fill the input.")
    if image.crop_mode in ("border", "pad") and any(image.colours):
        notes.append(f"nvinfer pads with black, and the network with {'/'.join(map(str, image.colours))}.")
    if manifest.input.batch.min > 1:
        notes.append(f"The plan takes batches of {manifest.input.batch}, and nvinfer may have fewer frames.")
    layouts = {
        output.name: output.engine_layout for output in manifest.backbone.described_outputs if output.is_reordered
    }
    if layouts:
        names = ", ".join(f"{name} {layout}" for name, layout in layouts.items())
        notes.append(f"Tensors lie in memory as the engine writes them, channels last: {names}.")
    return tuple(notes)


def _listed(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _as_text(properties: Mapping[str, str], comments: tuple[str, ...]) -> str:
    """Return a configuration file. GLib, which reads it, knows comments on lines of their own alone."""
    lines = [f"# {visible(line)}" for line in comments]
    return "\n".join([FIRST_LINE, *lines, "[property]", *(f"{key}={value}" for key, value in properties.items()), ""])
