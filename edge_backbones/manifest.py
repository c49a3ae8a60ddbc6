"""The bundle's manifest.json as typed structs; manifest.schema.json is generated from them (``make schema``).

Decoding is strict: unknown keys, missing keys and wrong types are refused with the path of the field. ``digest`` is the
SHA-256 of the manifest encoded with an empty ``digest``, so a changed byte anywhere in it is noticed.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import msgspec

from edge_backbones.errors import ManifestError
from edge_backbones.images import ImageConfig
from edge_backbones.spec import BackboneSpec, InputSpec, Precision

SCHEMA_VERSION = 6
MAX_MANIFEST_BYTES = 4 << 20

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
RelativePath = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
Flavour = Literal["openvino", "torchscript", "tensorrt", "tensorrt_rtx", "torch_tensorrt"]
Architecture = Annotated[str, msgspec.Meta(pattern="^sm_[0-9]{2,3}$")]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every struct of the manifest shares."""


class FileRecord(_Strict, frozen=True):
    """One file of the bundle; ``path`` is relative to the folder, with forward slashes."""

    path: RelativePath
    sha256: Sha256
    size: Annotated[int, msgspec.Meta(ge=0)]


class Source(_Strict, frozen=True):
    """Where the network came from.

    ``name``: a timm name, a hub id, a folder's name or a class name. ``weights``: ``module`` means those of a live
    module. ``weights_sha256``: of the checkpoint file, or of the module's tensors; ``seed``: of random weights.
    ``options``: numbers that the network was made with. ``config``: the library's own configuration, as JSON.
    ``preprocessing``: where the manifest's ``image`` was read, a phrase; ``preprocessing_notes``: what it does not repeat of
    that, a sentence each.
    """

    library: Literal["timm", "transformers", "torch"]
    name: str
    weights: Literal["pretrained", "checkpoint", "random", "module"]
    weights_sha256: Sha256 | None = None
    seed: int | None = None
    batch_norm_warmed: bool = False
    options: dict[str, int] = {}
    config: dict[str, Any] = {}
    preprocessing: str = ""
    preprocessing_notes: tuple[str, ...] = ()


class Gate(_Strict, frozen=True):
    """Bounds that every feature map must keep; None means not asked."""

    min_cosine: float | None = None
    min_sqnr_db: float | None = None
    max_relative: float | None = None

    def __str__(self) -> str:
        parts = [
            f"cosine >= {self.min_cosine:g}" if self.min_cosine is not None else "",
            f"SQNR >= {self.min_sqnr_db:g} dB" if self.min_sqnr_db is not None else "",
            f"relative error <= {self.max_relative:g}" if self.max_relative is not None else "",
        ]
        return " and ".join(part for part in parts if part) or "finite values"


class GraphRecord(_Strict, frozen=True):
    """One graph file. ``opset`` is None for TorchScript. ``excluded``: layers that int8 leaves as fp16 has them. ``gate``:
    what engines of it have to hold; None for the default of its precision."""

    format: Literal["onnx", "torchscript"]
    precision: Precision
    file: FileRecord
    opset: int | None = None
    excluded: tuple[str, ...] = ()
    gate: Gate | None = None


class GoldenRecord(_Strict, frozen=True):
    """golden.npz: input ``<case>/<input name>`` and fp32 map ``<case>/<stage>`` for every case."""

    file: FileRecord
    cases: tuple[str, ...]
    images: tuple[str, ...]


class CalibrationRecord(_Strict, frozen=True):
    """How the int8 ranges were found; the ranges themselves are in the file.

    ``chosen``: of ``auto``, the estimator of the tensors behind each output. ``images`` were counted; ``held_out`` of them
    decided, each on the counts of others. ``reused``: the ranges came from another build's calibration.json.
    """

    file: FileRecord
    method: Literal["auto", "max", "percentile", "entropy", "mse"]
    percentile: float
    chosen: dict[str, str]
    images: int
    held_out: int
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
    percentile: float
    chosen: dict[str, str]
    images: tuple[str, ...]
    held_out: int
    skipped: tuple[str, ...]
    silent: tuple[str, ...]
    factors: dict[str, tuple[float, ...]]
    ranges: dict[str, float]
    largest: dict[str, float]
    shifts: dict[str, tuple[float, ...]]
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
    dla_core: int | None = None
    driver: str | None = None
    multiprocessors: int | None = None
    profiles: tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...] = ()


class EngineKey(_Strict, frozen=True):
    """Where engine bytes may run: everything that compat.py compares with the machine at hand.

    ``architecture`` and ``cpu_features`` are those of the CPU; ``gpu`` is None for an engine that runs on it.
    """

    flavour: Flavour
    library_version: str
    architecture: str
    cpu_features: tuple[str, ...]
    device_name: str
    precision: Precision
    graph_sha256: Sha256
    gpu: GpuKey | None = None

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


class StageParity(_Strict, frozen=True):
    """A feature map (or other output) against its fp32 reference over all golden samples; the worst case counts.

    ``cosine`` of the flattened maps, ``sqnr_db`` = 10 log10(|r|^2 / |r - x|^2), ``max_abs`` = max |r - x|,
    ``relative`` = |r - x| / |r| (Frobenius). A value that is not finite is stored as ``finite = False`` and zeros.
    """

    stage: str
    cosine: float
    sqnr_db: float
    max_abs: float
    relative: float
    finite: bool
    passed: bool


class ParityReport(_Strict, frozen=True):
    """Every output of one engine, measured through the real runtime on the golden samples.

    Without ``stages`` it is still to be measured: the engine was compiled ahead of time for a GPU that was not there.
    """

    precision: Precision
    gate: Gate
    stages: tuple[StageParity, ...]

    @property
    def measured(self) -> bool:
        return bool(self.stages)

    @property
    def passed(self) -> bool:
        return self.measured and all(stage.passed for stage in self.stages)

    def failures(self) -> str:
        """One phrase per failing stage, with its figures."""
        return "; ".join(
            f"{stage.stage} has cosine {stage.cosine:.4f}, SQNR {stage.sqnr_db:.1f} dB, relative error "
            f"{stage.relative:.2e}, max |difference| {stage.max_abs:.3g}"
            if stage.finite
            else f"{stage.stage} has values that are not finite"
            for stage in self.stages
            if not stage.passed
        )


class EngineRecord(_Strict, frozen=True):
    """One compiled engine, and the parity that let it into the bundle.

    ``milliseconds``: median of a call at opt batch and size, timed in turns with every other engine of the bundle that the
    machine runs; None where there was none to compare it with. Runtimes take the fastest. ``layers``: what TensorRT says of
    its layers, as JSON. ``timing_cache``: with it the same engine is compiled faster.
    """

    key: EngineKey
    file: FileRecord
    parity: ParityReport
    milliseconds: float | None = None
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
    cosine: float
    sqnr_db: float
    passed: bool
    milliseconds: float | None = None


class BlockNoise(_Strict, frozen=True):
    """What quantising one block alone does to every output: ``sqnr_db`` of each, on calibration images."""

    block: str
    sqnr_db: dict[str, float]


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


def encode(manifest: Manifest) -> bytes:
    """Indented JSON with the digest filled in."""
    # As a reader will have it: a whole number given for a float is written without a point and read with one.
    manifest = msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest)
    digest = _digest(manifest)
    return msgspec.json.format(msgspec.json.encode(msgspec.structs.replace(manifest, digest=digest)), indent=2) + b"\n"


def decode(data: bytes) -> Manifest:
    """Parse and check; raises ManifestError with the field that is wrong."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise ManifestError(
            f"manifest.json has {len(data)} bytes, more than the {MAX_MANIFEST_BYTES} a manifest may have"
        )
    try:
        version = msgspec.json.decode(data, type=_Version).schema_version
        if version != SCHEMA_VERSION:
            raise ManifestError(
                f"manifest.json has schema_version {version}, this release reads {SCHEMA_VERSION}: "
                + ("upgrade edge-backbones" if version > SCHEMA_VERSION else "build the bundle again")
            )
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ManifestError(
            f"manifest.json is not a valid manifest: {error}; restore it or build the bundle again"
        ) from error
    if manifest.digest != _digest(manifest):
        raise ManifestError(
            "manifest.json was changed after it was written (its digest differs): build the bundle again"
        )
    return manifest


class _Version(msgspec.Struct):
    schema_version: int


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(manifest, digest=""))).hexdigest()
