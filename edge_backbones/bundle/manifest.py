"""The bundle's manifest.json as typed structs; manifest.schema.json is generated from them (``make schema``).

Decoding is strict: unknown keys, missing keys, keys that come twice, wrong types and numbers out of bounds are refused with
the path of the field. The file ends with ``"digest": "<64 hex digits>"``, a line break, ``}`` and a line break. The digest is
the SHA-256 of the file's bytes without those 64, so a byte that changed anywhere in it is noticed, white space too.
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

SCHEMA_VERSION: Final = 6
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
Flavour = Literal["openvino", "torchscript", "tensorrt", "tensorrt_rtx", "torch_tensorrt"]
Architecture = Annotated[str, msgspec.Meta(pattern="^sm_[0-9]{2,3}$", max_length=6)]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every struct of the manifest shares."""


class FileRecord(_Strict, frozen=True):
    """One file of the bundle; ``path`` is relative to the folder, with forward slashes."""

    path: RelativePath
    sha256: Sha256
    size: Bytes


class Source(_Strict, frozen=True):
    """Where the network came from.

    ``name``: a timm name, a hub id, a folder's name or a class name. ``weights``: ``module`` means those of a live
    module. ``weights_sha256``: of the checkpoint file, or of the module's tensors; ``seed``: of random weights.
    ``options``: numbers that the network was made with. ``config``: the library's own configuration, as JSON.
    ``preprocessing``: where the manifest's ``image`` was read, a phrase; ``preprocessing_notes``: what it does not repeat of
    that, a sentence each.
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


class GraphRecord(_Strict, frozen=True):
    """One graph file. ``opset`` is None for TorchScript. ``excluded``: layers that int8 leaves as fp16 has them. ``gate``:
    what engines of it have to hold; None for the default of its precision."""

    format: Literal["onnx", "torchscript"]
    precision: Precision
    file: FileRecord
    opset: Annotated[int, msgspec.Meta(ge=1, le=1000)] | None = None
    excluded: tuple[str, ...] = ()
    gate: Gate | None = None


class GoldenRecord(_Strict, frozen=True):
    """golden.npz: input ``<case>/<input name>`` and fp32 map ``<case>/<stage>`` for every case."""

    file: FileRecord
    cases: Annotated[tuple[Case, ...], msgspec.Meta(min_length=1, max_length=16)]
    images: tuple[str, ...]


class CalibrationRecord(_Strict, frozen=True):
    """How the int8 ranges were found; the ranges themselves are in the file.

    ``chosen``: of ``auto``, the estimator of the tensors behind each output. ``images`` were counted; ``held_out`` of them
    decided, each on the counts of others. ``reused``: the ranges came from another build's calibration.json.
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
    """calibration.json: |x| thresholds by tensor, and what they hold for.

    Ranges are those of every tensor that int8 may quantise, so that another choice of layers needs no images.
    ``network_sha256``: of the fp32 graph, weights included. ``data_sha256``: of the network inputs. ``largest``: |x| by
    tensor, where fp8 clips: it has the range that int8 lacks. ``factors``: what each channel of a tensor is divided by
    before it is quantised; ranges are those of the quotients. ``shifts``: what int8 adds to the bias of a layer.
    ``large``: tensors that come near what fp16 can hold; None in files of before they were looked for on every image.
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


class GpuKey(_Strict, frozen=True):
    """What an engine asks of a GPU.

    ``architectures``: ``sm_87`` for compute capability 8.7, those that the plan was compiled for. ``hardware_compatibility``:
    which others run it, slower. ``version_compatible``: the lean runtime of its release runs it too, and newer ones with
    ``host_code``: a lean runtime is inside, which is code for the CPU. ``refittable``: weights can be replaced; ``stripped``:
    they have to be, before it runs. ``driver``: CUDA version of the driver that compiled it; ``multiprocessors``: of the GPU
    that kernels were timed on (modules of one name differ in it); None where no GPU took part. ``profiles``: input shapes
    (min, opt, max) of each optimisation profile.
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
    """Where engine bytes may run: everything that compat.py compares with the machine at hand.

    ``architecture`` and ``cpu_features`` are those of the CPU; ``gpu`` is None for an engine that runs on it.
    """

    flavour: Flavour
    library_version: Word
    architecture: Word
    cpu_features: Annotated[tuple[Word, ...], msgspec.Meta(max_length=64)]
    device_name: Word
    precision: Precision
    graph_sha256: Sha256
    gpu: GpuKey | None = None

    def __post_init__(self) -> None:
        words = (self.library_version, self.architecture, *self.cpu_features, self.device_name)
        if bad := [word for word in words if not word.isprintable()]:
            raise ValueError(f"{bad[0]!r} is no name of a library or a device")

    @property
    def name(self) -> str:
        """``openvino-2026.4.1-x86_64-avx512_vnni-int8-1b2c3d4e``: to be read, and by its hash different for every key.

        With a GPU the first architecture takes the place of the CPU's: ``tensorrt-10.3.0-sm_87-int8-1b2c3d4e``.
        """
        version = self.library_version.split("-")[0]
        device = "-".join([self.architecture, *self.cpu_features[-1:]])
        if self.gpu is not None:
            device = self.gpu.architectures[0]
        digest = hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:8]
        return f"{self.flavour}-{version}-{device}-{self.precision}-{digest}"

    def path(self, data: bytes | bytearray, suffix: str) -> str:
        """Where these engine bytes lie in a bundle; other bytes lie elsewhere, so that no file is ever overwritten."""
        return f"engines/{self.name}.{hashlib.sha256(data).hexdigest()[:8]}{suffix}"


class EngineRecord(_Strict, frozen=True):
    """One compiled engine, and the parity that let it into the bundle.

    ``milliseconds``: median of a call at opt batch and size, timed in turns with every other engine of the bundle that the
    machine runs; None where there was none to compare it with. Runtimes take the fastest. ``layers``: what TensorRT says of
    its layers, as JSON. ``timing_cache``: with it the same engine is compiled faster.
    """

    key: EngineKey
    file: FileRecord
    parity: ParityReport
    milliseconds: Milliseconds | None = None
    layers: FileRecord | None = None
    timing_cache: FileRecord | None = None

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def files(self) -> tuple[FileRecord, ...]:
        return tuple(file for file in (self.file, self.layers, self.timing_cache) if file is not None)


class Trial(_Strict, frozen=True):
    """One graph that was tried: the worst of its outputs, and its engine's latency (median, batch opt) where it was timed.

    The outputs are of the graph as it is written, signed as TensorRT asks: a CPU engine may be better (see its own parity).
    ``blocks``: those that int8 leaves as fp16 has them.
    """

    precision: Precision
    blocks: tuple[str, ...]
    cosine: Cosine
    sqnr_db: Decibels
    passed: bool
    milliseconds: Milliseconds | None = None


class BlockNoise(_Strict, frozen=True):
    """What quantising one block alone does to every output: ``sqnr_db`` of each, on calibration images."""

    block: str
    sqnr_db: dict[str, Decibels]


class Decision(_Strict, frozen=True):
    """Why this engine and no other, in one sentence, and what was tried on which device.

    ``sensitivity``: the blocks, loudest first, where a gate asked which of them to leave in half.
    """

    sentence: str
    device_name: str
    trials: tuple[Trial, ...]
    sensitivity: tuple[BlockNoise, ...] = ()


class Provenance(_Strict, frozen=True):
    """When and with what the graphs were built."""

    created: str
    versions: dict[str, str]


class Manifest(_Strict, frozen=True):
    """The whole of manifest.json."""

    schema_version: Literal[6]
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
        for file in self.files():  # an engine of TorchScript is the graph's file
            if by_path.setdefault(file.path, file) != file:
                raise ValueError(f"two files are at {file.path!r}")
        if "opt" not in self.golden.cases:
            raise ValueError("the golden samples lack the case 'opt'")

    def files(self) -> tuple[FileRecord, ...]:
        """Every file that the bundle must hold."""
        calibration = () if self.calibration is None else (self.calibration.file,)
        graphs, engines = (g.file for g in self.graphs), (file for e in self.engines for file in e.files)
        return (*graphs, *engines, self.golden.file, *calibration)

    @property
    def preprocessing(self) -> str:
        """What is done to a picture before the network sees it, and where that was read, in one line."""
        height, width = self.input.height.opt, self.input.width.opt
        read_from = f"; read from {self.source.preprocessing}" if self.source.preprocessing else ""
        return f"preprocessing: {self.image.describe(height, width)}{read_from}"

    def onnx_graph(self, precision: Precision) -> GraphRecord | None:
        """The ONNX graph of a precision, if the bundle has it."""
        return next((g for g in self.graphs if g.format == "onnx" and g.precision == precision), None)


_DIGEST = re.compile(rb'  "digest": "([0-9a-f]{64})"\n}\n')
_KEYS = re.compile(rb'"(?:[^"\\]|\\.)*"(\s*:)?')


def encode(manifest: Manifest) -> bytes:
    """Indented JSON with the digest filled in. Raises ManifestError for what `decode` would refuse."""
    # As a reader will have it: a whole number given for a float is written without a point and read with one.
    with refusing(lambda why: ManifestError(f"this manifest cannot be written: {why}")):
        manifest = msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest)
    body = msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(manifest, digest="")), indent=2) + b"\n"
    end = b'"\n}\n'
    return body[: -len(end)] + hashlib.sha256(body).hexdigest().encode() + end


def decode(data: bytes | bytearray, source: str = "manifest.json") -> Manifest:
    """Parse and check; raises ManifestError that names ``source`` and the field that is wrong."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"{source} has {len(data)} bytes, more than the {MAX_MANIFEST_BYTES} a manifest may have")
    with refusing(
        lambda why: ManifestError(f"{source} is not a valid manifest: {why}; restore it or build the bundle again")
    ):
        version = msgspec.json.decode(data, type=_Version).schema_version
        if version != SCHEMA_VERSION:
            raise ManifestError(
                f"{source} has schema_version {version}, this release reads {SCHEMA_VERSION}: "
                + ("upgrade edge-backbones" if version > SCHEMA_VERSION else "build the bundle again")
            )
        manifest = msgspec.json.decode(data, type=Manifest)
        # Readers take the first or the last of two keys: they would not read the same.
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
    """Parse a calibration.json; raises CalibrationError that names ``source`` and the field that is wrong."""
    with refusing(lambda why: CalibrationError(f"{source} is not a calibration.json: {why}; calibrate again")):
        return msgspec.json.decode(data, type=CalibrationFile)
