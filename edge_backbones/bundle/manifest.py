"""The bundle's manifest.json as typed structs; ``make schema`` writes manifest.schema.json from them.

Decoding is strict: unknown keys, missing keys, keys that occur twice, wrong types and numbers out of bounds are refused with
the path of the field. The file ends with ``"digest": "<64 hex digits>"``, a line break, ``}`` and a line break. The digest is
the SHA-256 of the bytes of the file without those 64 digits: a change of any byte is noticed, white space included.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from typing import Annotated, Any, Final, Literal

import msgspec

from edge_backbones.errors import CalibrationError, ManifestError
from edge_backbones.images.config import ImageConfig
from edge_backbones.parity_report import Cosine, Decibels, Gate, ParityReport, Share
from edge_backbones.reading import refusing
from edge_backbones.spec import BackboneSpec, InputSpec, Precision

SCHEMA_VERSION: Final = 8
OLDEST_VERSION: Final = 6
MAX_MANIFEST_BYTES = 4 << 20

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$", max_length=64)]  # "$" also matches before a line break
RelativePath = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
Word = Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
Case = Annotated[str, msgspec.Meta(pattern="^[a-z]+$", max_length=16)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]
Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
Milliseconds = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
Factor = Annotated[float, msgspec.Meta(gt=0, le=1e30)]
Shift = Annotated[float, msgspec.Meta(ge=-1e30, le=1e30)]
Percentile = Annotated[float, msgspec.Meta(gt=0, le=100)]
Axes = Annotated[tuple[Size, ...], msgspec.Meta(max_length=16)]
FlavourName = Annotated[str, msgspec.Meta(pattern="^[a-z][a-z0-9_]*$", max_length=40)]
"""Name of an engine library. A bundle may hold engines of libraries that this release does not know."""
Architecture = Annotated[str, msgspec.Meta(pattern="^sm_[0-9]{2,3}$", max_length=6)]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The options that all structs of the manifest share."""


class FileRecord(_Strict, frozen=True):
    """One file of the bundle; ``path`` is relative to the folder, with forward slashes."""

    path: RelativePath
    sha256: Sha256
    size: Bytes


USE_PROCESSOR = "prepare pixel_values with it"
"""The words of a note on a processor that a manifest's ``image`` does not repeat."""


class Source(_Strict, frozen=True):
    """Where the network came from.

    ``name``: a timm name, a hub id, the name of a folder or of a class. ``weights``: ``module`` for the weights of a live
    module. ``weights_sha256``: hash of the checkpoint file or of the module's tensors. ``seed``: seed of random weights.
    ``options``: numbers that the network was created with. ``config``: the library's own configuration, as JSON.
    ``preprocessing``: where the manifest's ``image`` was read, a phrase. ``preprocessing_notes``: what ``image`` does not
    repeat of it, a sentence each.
    """

    library: Literal["timm", "transformers", "torch"]
    name: Annotated[str, msgspec.Meta(max_length=1000)]
    weights: Literal["pretrained", "checkpoint", "random", "module"]
    weights_sha256: Sha256 | None = None
    seed: int | None = None
    batch_norm_warmed: bool = False
    options: dict[str, int] = {}
    config: dict[str, Any] = {}
    preprocessing: str = ""
    preprocessing_notes: tuple[str, ...] = ()

    @property
    def not_repeated(self) -> str:
        """Return the note that says why ``image`` cannot prepare photographs for the network; empty where it can."""
        return next((note for note in self.preprocessing_notes if USE_PROCESSOR in note), "")


class GraphRecord(_Strict, frozen=True):
    """One graph file.

    ``opset``: None for TorchScript. ``excluded``: layers that an int8 graph keeps in fp16. ``gate``: the bounds for engines
    of this graph, None for the default of its precision.
    """

    format: Literal["onnx", "torchscript"]
    precision: Precision
    file: FileRecord
    opset: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None = None
    excluded: tuple[str, ...] = ()
    gate: Gate | None = None


class GoldenRecord(_Strict, frozen=True):
    """The golden samples in golden.npz: per case the input ``<case>/<input name>`` and each fp32 output ``<case>/<output>``.

    ``images``: names of the images, in the order of the first axis.
    """

    file: FileRecord
    cases: Annotated[tuple[Case, ...], msgspec.Meta(min_length=1, max_length=16)]
    images: tuple[str, ...]


class CalibrationRecord(_Strict, frozen=True):
    """How the int8 ranges were found. The ranges themselves are in the file.

    ``chosen``: by output, the estimator that ``auto`` chose for the tensors behind it. ``images``: how many images the ranges
    come from. ``held_out``: how many of them chose the estimator, each on ranges from other images. ``skipped``: files that
    could not be read. ``reused``: the ranges come from the calibration.json of another build.
    """

    file: FileRecord
    method: Literal["auto", "max", "percentile", "entropy", "mse"]
    percentile: Percentile
    chosen: dict[str, str]
    images: Count
    held_out: Count
    skipped: tuple[str, ...]
    reused: bool = False


class CalibrationFile(_Strict, frozen=True):
    """calibration.json: the range of each tensor, and the network and the images that it holds for.

    ``ranges``: by tensor, the |x| where int8 clips. Every tensor that int8 may quantise has one, so another choice of layers
    needs no images. ``largest``: by tensor, the |x| where fp8 clips: the largest value. ``network_sha256``: hash of the fp32
    graph with its weights. ``data_sha256``: hash of the network's inputs. ``factors``: what each channel of a tensor is
    divided by before it is quantised; the ranges are those of the quotients. ``centres``: what int8 subtracts from a tensor
    before it is quantised; the range of the difference has the name of the tensor and ``.centred``. ``shifts``: what int8
    adds to the bias of a layer. ``rounding``: by weight, what int8 adds to the nearest numbers (packed by `optq.pack`);
    files of earlier releases have none. ``silent``: tensors that are zero on every image. ``large``: tensors with values
    near the limit of fp16; None in files of releases that did not look for them on every image.
    """

    network_sha256: Sha256
    data_sha256: Sha256
    preprocessing: ImageConfig
    method: Literal["auto", "max", "percentile", "entropy", "mse"]
    percentile: Percentile
    chosen: dict[str, str]
    images: tuple[str, ...]
    held_out: Count
    skipped: tuple[str, ...]
    silent: tuple[str, ...]
    factors: dict[str, tuple[Factor, ...]]
    ranges: dict[str, Share]
    largest: dict[str, Share]
    shifts: dict[str, tuple[Shift, ...]]
    large: tuple[str, ...] | None = None
    centres: dict[str, Shift] = {}
    rounding: dict[str, bytes] = {}


class GpuKey(_Strict, frozen=True):
    """What an engine requires of a GPU.

    ``architectures``: those that the plan was compiled for, ``sm_87`` for compute capability 8.7. ``hardware_compatibility``:
    which other architectures run it, more slowly. ``version_compatible``: the lean runtime of the same release runs it too,
    and newer releases run it with ``host_code``. ``host_code``: the plan holds a lean runtime, which is code for the CPU.
    ``refittable``: the weights can be replaced by others. ``stripped``: the plan has no weights; before it runs, those of its
    graph are put in.
    ``driver``: the CUDA version of the driver that compiled it. ``multiprocessors``: how many the GPU has on which kernels
    were timed (modules of one name differ in it). Both are None if no GPU took part. ``profiles``: input shapes (min, opt,
    max) of each optimisation profile.
    """

    architectures: Annotated[tuple[Architecture, ...], msgspec.Meta(min_length=1)]
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    version_compatible: bool = False
    host_code: bool = False
    refittable: bool = False
    stripped: bool = False
    dla_core: Annotated[int, msgspec.Meta(ge=0, le=64)] | None = None
    driver: str | None = None
    multiprocessors: Size | None = None
    profiles: tuple[tuple[Axes, Axes, Axes], ...] = ()


class EngineKey(_Strict, frozen=True):
    """Where an engine may run: everything that compat.py compares with the machine.

    ``architecture`` and ``cpu_features``: those of the CPU. ``gpu``: None for an engine that runs on the CPU.
    ``computes_in``: number format in which an engine of OpenVINO computes what its graph has in floating point. It is
    absent from the engines of other libraries, and from those that earlier releases compiled. Of fp32 and int8 engines it
    is absent where it is fp32.
    """

    flavour: FlavourName
    library_version: Word
    architecture: Word
    cpu_features: Annotated[tuple[Word, ...], msgspec.Meta(max_length=64)]
    device_name: Word
    precision: Precision
    graph_sha256: Sha256
    gpu: GpuKey | None = None
    # Unset it is not encoded: engines of earlier releases keep their names, which hold a hash of the key.
    computes_in: Literal["fp32", "fp16", "bf16"] | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        words = (self.flavour, self.library_version, self.architecture, *self.cpu_features, self.device_name)
        if bad := [word for word in words if not word.isprintable()]:
            raise ValueError(f"{bad[0]!r} is no name of a library or a device")

    @property
    def name(self) -> str:
        """Return a readable name, different for every key: ``openvino-2026.4.1-x86_64-avx512_vnni-int8-1b2c3d4e``.

        For a GPU its first architecture takes the place of the CPU's: ``tensorrt-10.3.0-sm_87-int8-1b2c3d4e``.
        """
        version = self.library_version.split("-")[0]
        device = "-".join([self.architecture, *self.cpu_features[-1:]])
        if self.gpu is not None:
            device = self.gpu.architectures[0]
        digest = hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:8]
        return f"{self.flavour}-{version}-{device}-{self.precision}-{digest}"

    def path(self, data: bytes | bytearray, suffix: str) -> str:
        """Return the path of an engine's bytes in a bundle. Other bytes have another path, so no file is overwritten."""
        return f"engines/{self.name}.{hashlib.sha256(data).hexdigest()[:8]}{suffix}"


class EngineRecord(_Strict, frozen=True):
    """One compiled engine and its parity with fp32.

    ``milliseconds``: median latency of a call at opt batch and size, timed in turns with every other engine of the bundle
    that the machine runs; None if there was no other. ``pipelined_milliseconds``: the same for calls on a GPU that are
    enqueued one after the other, with inputs and outputs there; None on a CPU. Runtimes take the fastest engine, by the
    second figure where there is one. ``layers``: TensorRT's description of the layers, as JSON. ``timing_cache``: TensorRT's
    timing cache, with which the engine is compiled again faster.
    """

    key: EngineKey
    file: FileRecord
    parity: ParityReport
    milliseconds: Milliseconds | None = None
    pipelined_milliseconds: Milliseconds | None = None
    layers: FileRecord | None = None
    timing_cache: FileRecord | None = None

    @property
    def name(self) -> str:
        """Return the name of the engine's key."""
        return self.key.name

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Return the files that the engine consists of."""
        return tuple(file for file in (self.file, self.layers, self.timing_cache) if file is not None)


class Trial(_Strict, frozen=True):
    """One graph that the build tried: the figures of its worst output, and the latency of its engine if it was timed.

    ``cosine`` and ``sqnr_db`` are the engine's; for int8 those of the graph as it is written, with the signed activations
    that TensorRT requires. An int8 engine may be better, see its own parity. ``blocks``: those that int8 keeps in fp16.
    ``milliseconds``: median at batch opt. ``computes_in``: as in the engine's key.
    """

    precision: Precision
    blocks: tuple[str, ...]
    cosine: Cosine
    sqnr_db: Decibels
    passed: bool
    milliseconds: Milliseconds | None = None
    computes_in: Literal["fp32", "fp16", "bf16"] | msgspec.UnsetType = msgspec.UNSET


class BlockNoise(_Strict, frozen=True):
    """The noise of quantising one block alone. ``sqnr_db``: by output, on calibration images."""

    block: str
    sqnr_db: dict[str, Decibels]


class Decision(_Strict, frozen=True):
    """Why the build chose these engines, in one sentence, and what it tried on which device.

    ``sensitivity``: the noise of each block, noisiest first, if the build had to choose blocks that stay in fp16.
    """

    sentence: str
    device_name: str
    trials: tuple[Trial, ...]
    sensitivity: tuple[BlockNoise, ...] = ()


class Provenance(_Strict, frozen=True):
    """When the graphs were built, and with which versions of Python and of libraries."""

    created: str
    versions: dict[str, str]


class Manifest(_Strict, frozen=True):
    """The whole of manifest.json. ``digest``: the last field of the file, the SHA-256 of its other bytes.

    ``schema_version``: 8; 7 in files of releases that knew no frames; 6 in files of those that knew neither other formats of
    maps and pixels nor times on a GPU.
    """

    schema_version: Literal[6, 7, 8]
    backbone: BackboneSpec
    input: InputSpec
    image: ImageConfig
    source: Source
    graphs: tuple[GraphRecord, ...]
    engines: tuple[EngineRecord, ...]
    golden: GoldenRecord
    calibration: CalibrationRecord | None
    decision: Decision | None
    provenance: Provenance
    digest: str = ""

    def __post_init__(self) -> None:
        graphs = [f"{graph.format} {graph.precision}" for graph in self.graphs]
        for what, names in (
            ("engines", [e.name for e in self.engines]),
            ("graphs", graphs),
            ("cases", self.golden.cases),
        ):
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f"two {what} are {twice[0]!r}")
        by_path: dict[str, FileRecord] = {}
        for file in self.files():  # a TorchScript engine is the same file as its graph
            if by_path.setdefault(file.path, file) != file:
                raise ValueError(f"two files are at {file.path!r}")
        if "opt" not in self.golden.cases:
            raise ValueError("the golden samples lack the case 'opt'")
        if len(self.image.mean) != self.input.channels:
            raise ValueError(
                f"the input has {self.input.channels} channels, and mean and std are of {len(self.image.mean)}"
            )

    def files(self) -> tuple[FileRecord, ...]:
        """Return every file that the bundle must hold."""
        calibration = () if self.calibration is None else (self.calibration.file,)
        graphs, engines = (g.file for g in self.graphs), (file for e in self.engines for file in e.files)
        return (*graphs, *engines, self.golden.file, *calibration)

    @property
    def preprocessing(self) -> str:
        """Return one line that says how a picture is preprocessed and where that was read."""
        height, width = self.input.height.opt, self.input.width.opt
        read_from = f"; read from {self.source.preprocessing}" if self.source.preprocessing else ""
        where = "" if self.input.frame is None else f" in the graph, of {self.input.frame}"
        return f"preprocessing{where}: {self.image.describe(height, width)}{read_from}"

    def onnx_graph(self, precision: Precision) -> GraphRecord | None:
        """Return the ONNX graph of a precision, or None if the bundle has none."""
        return next((g for g in self.graphs if g.format == "onnx" and g.precision == precision), None)


_DIGEST = re.compile(rb'  "digest": "([0-9a-f]{64})"\n}\n')
_KEYS = re.compile(rb'"(?:[^"\\]|\\.)*"(\s*:)?')


def encode(manifest: Manifest) -> bytes:
    """Return indented JSON with the digest filled in. Raises ManifestError for a manifest that `decode` would refuse."""
    # Make of the values what a reader makes of them: an int in a float field is written without a point and read with one.
    with refusing(lambda why: ManifestError(f"this manifest cannot be written: {why}")):
        manifest = msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest)
    manifest = msgspec.structs.replace(manifest, schema_version=SCHEMA_VERSION, digest="")
    body = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
    end = b'"\n}\n'
    return body[: -len(end)] + hashlib.sha256(body).hexdigest().encode() + end


def decode(data: bytes | bytearray, source: str = "manifest.json") -> Manifest:
    """Parse and check a manifest; raise ManifestError that names ``source`` and the wrong field."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"{source} has {len(data)} bytes, more than the {MAX_MANIFEST_BYTES} a manifest may have")
    with refusing(
        lambda why: ManifestError(f"{source} is not a valid manifest: {why}; restore it or build the bundle again")
    ):
        version = msgspec.json.decode(data, type=_Version).schema_version
        if not OLDEST_VERSION <= version <= SCHEMA_VERSION:
            raise ManifestError(
                f"{source} has schema_version {version}, this release reads {OLDEST_VERSION} to {SCHEMA_VERSION}: "
                + ("upgrade edge-backbones" if version > SCHEMA_VERSION else "build the bundle again")
            )
        manifest = msgspec.json.decode(data, type=Manifest)
        # Of two equal keys, some readers take the first and others the last: they would read different manifests.
        if _count_keys(data) != _count_keys(msgspec.json.encode(msgspec.json.decode(data))):
            raise ValueError("a key comes twice in one object")
    found = _DIGEST.search(data, len(data) - _DIGEST_BYTES)
    if found is None or hashlib.sha256(data[: found.start(1)] + data[found.end(1) :]).hexdigest() != manifest.digest:
        raise ManifestError(
            f"{source} was changed after it was written (its digest differs): restore it or build the bundle again"
        )
    return manifest


class _Version(msgspec.Struct):
    schema_version: Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]


_DIGEST_BYTES = len('  "digest": ""\n}\n') + 64


def _count_keys(data: bytes | bytearray) -> int:
    return sum(1 for found in _KEYS.finditer(data) if found.group(1))


def decode_calibration(data: bytes | bytearray, source: str) -> CalibrationFile:
    """Parse a calibration.json; raise CalibrationError that names ``source`` and the wrong field."""
    with refusing(lambda why: CalibrationError(f"{source} is not a calibration.json: {why}; calibrate again")):
        return msgspec.json.decode(data, type=CalibrationFile)
