"""Questions about manifests, machines and engines, with the answers of the Python package: every language is held to them.

``python -m tests.conformance.make_cases FILE`` writes them as JSON, for a test program of another language.
"""

from __future__ import annotations

import json
import random
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from build_scripts.fuzz_damage import damaged_bytes, damaged_document, sealed
from edge_backbones.bundle import manifest as manifests
from edge_backbones.bundle.manifest import EngineKey, EngineRecord, FileRecord, GpuKey, GraphRecord, Manifest
from edge_backbones.bundle.storage import place_of
from edge_backbones.cpus import cpu_quota
from edge_backbones.engines import compat, promises, registry, select
from edge_backbones.engines.tensorrt.plans import library_to_load
from edge_backbones.errors import EdgeBackbonesError, visible
from edge_backbones.machine import hosts
from edge_backbones.machine.devices import parse_device
from edge_backbones.machine.gpus import Gpu
from edge_backbones.machine.hosts import Host
from edge_backbones.parity_report import Gate, ParityReport, StageParity
from edge_backbones.reading import shortened
from edge_backbones.spec import Precision

GOLDEN = Path(__file__).parents[1] / "golden"
MANIFESTS = sorted(GOLDEN.glob("manifest.v*.json"))
Case = dict[str, Any]


def answered(case: Case) -> Any:
    """Return the answer of the Python package to one case."""
    try:
        return _ANSWERS[case["kind"]](case)
    except EdgeBackbonesError as error:
        return {"error": type(error).__name__, "message": str(error)}


def _manifest(case: Case) -> Manifest:
    found = manifests.decode(bytes.fromhex(case["manifest"]), "b.bundle/manifest.json")
    for record in found.files():
        place_of(Path("b.bundle"), record)
    return found


def _decoded(case: Case) -> Any:
    found = _manifest(case)
    return {
        "engines": [engine.name for engine in found.engines],
        "outputs": list(found.backbone.outputs),
        "describes": found.input.describe(),
    }


def _host(told: dict[str, Any]) -> Host:
    gpu = told["gpu"] and Gpu(index=0, memory_bytes=1, integrated=False, **told["gpu"])
    return Host(
        told["architecture"],
        tuple(told["cpu_features"]),
        told["device_name"],
        told["versions"],
        gpu,
        told["no_gpu"],
        told["jetson"],
    )


def _chosen(case: Case) -> Any:
    bundle: Any = types.SimpleNamespace(path=Path("b.bundle"), manifest=_manifest(case))
    host = _host(case["host"])
    answer: dict[str, Any] = {}
    for engine in bundle.manifest.engines:
        reasons = select.reasons_against(bundle, engine, host, engine.name, device="auto")
        answer.setdefault("reasons", {})[engine.name] = reasons
        answer.setdefault("loads", {})[engine.name] = library_to_load(engine.key, host)
    options: Any = {"device": case["place"], "allow_host_code": case["code"]}
    try:
        asked = select.full_name(bundle, case["engine"] or None)
        chosen = select.choose_engine(bundle, host, asked, **options)
        answer["chosen"] = chosen.name
        if over := select.passed_over(bundle, chosen, host, asked, **options):
            answer["passed_over"] = over
    except EdgeBackbonesError as error:
        answer["refusal"] = {"error": type(error).__name__, "message": str(error)}
    return answer


def _told(case: Case) -> Any:
    text = bytes.fromhex(case["text"]).decode()
    return {
        "visible": visible(text),
        "printable": text.isprintable(),
        "quoted": repr(text),
        "shortened": shortened(text, 20),
        "numbers": list(compat.numbers(text)),
    }


def _machine(case: Case) -> Any:
    features = hosts.cpu_features(case["cpuinfo"], case["architecture"])
    return {"features": list(features), "name": hosts.device_name(case["cpuinfo"])}


def _device(case: Case) -> Any:
    place, gpu = parse_device(case["device"])
    return {"place": place, "gpu": gpu}


_ANSWERS = {
    "manifest": _decoded,
    "choose": _chosen,
    "text": _told,
    "quota": lambda case: cpu_quota(Path(case["root"])),
    "machine": _machine,
    "device": _device,
}

# ------------------------------------------------------------------------------------------------------------ manifests


def damaged_manifests(count: int) -> Iterator[Case]:
    """Yield manifests as they are, with damaged values under a right digest, and with damaged bytes."""
    for path in MANIFESTS:
        yield {"kind": "manifest", "manifest": path.read_bytes().hex()}
    draw = random.Random(20261130)
    readable = [path for path in MANIFESTS if path.stem >= "manifest.v6"]
    documents = [json.loads(path.read_bytes()) for path in readable]
    for number in range(count):
        document = draw.choice(documents)
        match number % 4:
            case 0 | 1:
                data = sealed(damaged_document(document, draw))
            case 2:
                data = resealed(damaged_bytes(draw.choice(readable).read_bytes(), draw, text=True))
            case _:
                data = damaged_bytes(draw.choice(readable).read_bytes(), draw, text=True)
        yield {"kind": "manifest", "manifest": data.hex()}


def resealed(data: bytes) -> bytes:
    """Give bytes that end as a manifest does the right digest."""
    import hashlib

    end = re.search(rb'"digest": "([0-9a-f]{64})"\n}\n\Z', data)
    if end is None:
        return data
    before, after = data[: end.start(1)], data[end.end(1) :]
    return before + hashlib.sha256(before + after).hexdigest().encode() + after


def edited_manifests() -> Iterator[Case]:
    """Yield manifests with one value that is just inside or just outside of what the format allows."""
    document = json.loads(MANIFESTS[-1].read_bytes())
    engine, gpu = ("engines", 0), ("engines", 1, "key", "gpu")
    long_number = 10**300
    edits: list[tuple[tuple[Any, ...], Any]] = [
        (("source", "seed"), 2**70),
        (("source", "seed"), 10**400),
        (("source", "seed"), 5.0),
        (("source", "options"), {"a": 10**30, "b": True}),
        (("source", "options"), {"a": 10**30}),
        (("source", "config"), {"deep": [[[{"a": None}]]], "big": 10**350, "text": "ä\u0000"}),
        (("source", "name"), "n" * 1000),
        (("source", "name"), "ä" * 1001),
        (("golden", "cases"), ["opt", "min\n"]),
        (("golden", "cases"), ["opt\n"]),
        (("golden", "cases"), ["opt", "opt"]),
        (("input", "channels"), 1 << 24),
        (("input", "channels"), -0),
        ((*engine, "file", "size"), 1 << 50),
        ((*engine, "file", "size"), (1 << 50) + 1),
        ((*engine, "file", "path"), "engines/ä.blob"),
        ((*engine, "file", "path"), "engines/\u200b.blob"),
        ((*engine, "file", "path"), "a/./b"),
        ((*engine, "file", "path"), "/a"),
        ((*engine, "file", "path"), "a//b"),
        ((*engine, "file", "path"), "C:b"),
        ((*engine, "file", "path"), "a\\b"),
        ((*engine, "file", "sha256"), "0" * 63 + "\n"),
        ((*engine, "milliseconds"), 0),
        ((*engine, "milliseconds"), 1e9),
        ((*engine, "milliseconds"), 1e-300),
        ((*engine, "milliseconds"), long_number),
        ((*engine, "parity", "stages", 0, "max_abs"), long_number),
        ((*engine, "parity", "stages", 0, "max_abs"), 10**400),
        ((*engine, "parity", "stages", 0, "cosine"), 1.001),
        ((*engine, "parity", "stages", 0, "cosine"), 1.0011),
        ((*engine, "parity", "stages", 0, "cosine"), True),
        ((*engine, "key", "flavour"), "mine_2"),
        ((*engine, "key", "flavour"), "mine\n"),
        ((*engine, "key", "flavour"), "Mine"),
        ((*engine, "key", "device_name"), "ä" * 100),
        ((*engine, "key", "device_name"), "a\x1b"),
        ((*engine, "key", "device_name"), "a\u2028"),
        ((*engine, "key", "device_name"), 'a "quoted" \\ name'),
        ((*engine, "key", "computes_in"), None),
        ((*engine, "key", "computes_in"), "bf16"),
        ((*engine, "key", "library_version"), "2026.4.1-1-abc"),
        ((*gpu, "architectures"), ["sm_87\n"]),
        ((*gpu, "architectures"), ["sm_1200"]),
        ((*gpu, "architectures"), []),
        ((*gpu, "driver"), '\x00\x1f\b\t\n\f\r"\\/\x7fä\u2028'),
        ((*gpu, "profiles"), [[[1, 3, 2, 2], [1, 3, 2, 2], [2, 3, 2, 2]]]),
        ((*gpu, "profiles"), [[[1, 3, 2, 2], [1, 3, 2, 2]]]),
        ((*gpu, "multiprocessors"), 0),
        ((*gpu, "dla_core"), 65),
        (("image", "crop_pct"), 4),
        (("image", "crop_pct"), 4.01),
        (("image", "std"), [1e-7, 1, 1]),
        (("image", "mean"), [0.5]),
        (("image", "short_edge"), 5),
        (("image", "size_multiple"), 0),
        (("backbone", "out_indices"), [-1]),
        (("backbone", "out_indices"), [2**70]),
        (("backbone", "hidden_states"), ["nobody"]),
        (("calibration",), None),
        (("decision",), None),
        (("provenance", "versions"), {"a": 1}),
        (("digest2",), ""),
    ]
    for path, value in edits:
        changed = json.loads(json.dumps(document))
        inner: Any = changed
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = value
        yield {"kind": "manifest", "manifest": sealed(changed).hex()}


# -------------------------------------------------------------------------------------------------------------- engines

_FLAVOURS = (*registry.ROWS, "openvino", "tensorrt", "unheard_of")
_VERSIONS = ("2026.4.1", "10.3.0", "10.3.0.26", "10.16.1", "1.7.1", "x", "11.0")
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "asimdhp")
_NAMES = ("NVIDIA L4", "Orin", "Xeon")
_DRIVERS = ("12.6", "13.0", "x")
_ARCHITECTURES = ("sm_87", "sm_89", "sm_90")
_GATES = (
    Gate(),
    Gate(min_cosine=0.9),
    Gate(max_relative=0.5, min_sqnr_db=3.25),
    Gate(min_cosine=-0.5),
    Gate(max_relative=2.0),
)


def _some(draw: random.Random, values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(value for value in values if draw.random() < 0.4)


def _gpu_key(draw: random.Random) -> GpuKey:
    return GpuKey(
        architectures=tuple(draw.sample(_ARCHITECTURES, draw.choice((1, 1, 2)))),
        hardware_compatibility=draw.choice(("none", "none", "ampere_plus", "same_compute_capability")),
        version_compatible=draw.random() < 0.3,
        host_code=draw.random() < 0.3,
        stripped=draw.random() < 0.2,
        dla_core=draw.choice((None, None, 1)),
        driver=draw.choice((None, *_DRIVERS)),
        multiprocessors=draw.choice((None, 58, 16)),
    )


def _parity(draw: random.Random, outputs: tuple[str, ...], precision: Precision) -> ParityReport:
    def stage(name: str) -> StageParity:
        good = draw.random() < 0.85
        return StageParity(
            stage=name,
            cosine=0.99995 if good else draw.uniform(-1, 1),
            sqnr_db=40.123456 if good else draw.uniform(-5, 20),
            max_abs=draw.choice((0.0, 1e-7, 12345.678, 0.25)),
            relative=5e-4 if good else draw.uniform(0, 3),
            finite=draw.random() < 0.97,
            passed=draw.random() < 0.95,
        )

    names = list(outputs) if draw.random() < 0.9 else ["other"]
    draw.shuffle(names)
    own = draw.choice(_GATES) if draw.random() < 0.15 else promises.DEFAULT_GATES[precision]
    told = precision if draw.random() < 0.95 else Precision.FP8
    return ParityReport(precision=told, gate=own, stages=tuple(map(stage, names)) if draw.random() < 0.93 else ())


def _engine(draw: random.Random, number: int, outputs: tuple[str, ...]) -> EngineRecord:
    flavour = draw.choice(_FLAVOURS)
    precision = draw.choice(list(Precision))
    on_cpu = flavour in ("openvino", "onnxruntime", "torchscript")
    key = EngineKey(
        flavour=flavour,
        library_version=draw.choice(_VERSIONS),
        architecture=draw.choice(("x86_64", "x86_64", "aarch64")),
        cpu_features=_some(draw, _FEATURES) if on_cpu else (),
        device_name=draw.choice(_NAMES),
        precision=precision,
        graph_sha256=f"{number:064x}",
        gpu=None if draw.random() < (0.95 if on_cpu else 0.08) else _gpu_key(draw),
        **({"computes_in": draw.choice(("fp32", "fp16", "bf16"))} if draw.random() < 0.3 else {}),
    )
    timed = draw.random() < 0.7
    return EngineRecord(
        key=key,
        file=FileRecord(path=f"engines/{number}", sha256="0" * 64, size=1),
        parity=_parity(draw, outputs, precision),
        milliseconds=draw.choice((1.5, 2.25, 0.123456)) if timed else None,
        pipelined_milliseconds=draw.choice((None, 1.0, 0.5)) if key.gpu else None,
    )


def _graph(draw: random.Random, precision: Precision, format: Any = "onnx") -> GraphRecord:
    file = FileRecord(path=f"graphs/{format}.{precision}", sha256="1" * 64, size=2)
    return GraphRecord(
        format=format, precision=precision, file=file, gate=draw.choice(_GATES) if draw.random() < 0.3 else None
    )


def choices(count: int) -> Iterator[Case]:
    """Yield bundles of random engines, machines, and what a user asks for."""
    draw = random.Random(7)
    base = manifests.decode(MANIFESTS[-1].read_bytes())
    for _ in range(count):
        engines = [_engine(draw, number, base.backbone.outputs) for number in range(draw.choice((0, 1, 2, 3, 5, 8)))]
        graphs = [_graph(draw, precision) for precision in Precision if draw.random() < 0.5]
        if draw.random() < 0.3:
            graphs.append(_graph(draw, Precision.FP32, "torchscript"))
        made = msgspec.structs.replace(base, engines=tuple(engines), graphs=tuple(graphs))
        names = [engine.name for engine in engines]
        asked = ["", "", "", *Precision, *registry.ROWS, "nobody", "tensorrt-1", "openvino-"]
        asked += [name[: draw.choice((len(name), len(name) - 3, 30))] for name in names] * 3
        host = {
            "architecture": draw.choice(("x86_64", "x86_64", "x86_64", "aarch64")),
            "cpu_features": [feature for feature in _FEATURES if draw.random() < 0.8],
            "device_name": draw.choice(_NAMES),
            "versions": {name: draw.choice(_VERSIONS) for name in registry.ROWS if draw.random() < 0.75},
            "gpu": (
                draw.random() < 0.75
                and {
                    "name": draw.choice(_NAMES),
                    "architecture": draw.choice(_ARCHITECTURES),
                    "driver": draw.choice(_DRIVERS[:2]),
                    "multiprocessors": draw.choice((58, 16)),
                }
            )
            or None,
            "no_gpu": draw.choice(("", "no NVIDIA driver (libcuda.so.1 is missing)")),
            "jetson": draw.random() < 0.2,
        }
        yield {
            "kind": "choose",
            "manifest": manifests.encode(made).hex(),
            "host": host,
            "engine": str(draw.choice(asked)),
            "place": draw.choice(("auto", "cpu", "cuda")),
            "code": draw.random() < 0.4,
        }


# --------------------------------------------------------------------------------------------------------------- others


def others() -> Iterator[Case]:
    """Yield texts, devices and descriptions of CPUs."""
    texts = (
        "",
        "layer4",
        "a\nb\t\x1b[2J",
        "it's",
        'say "it\'s"',
        "Größe 日本\u3000",
        "\u202e\u200c\u200d\U000e0041",
        "x" * 20,
    )
    for text in (*texts, "ä" * 21, "0123456789" * 4, "10.3.0.26", "1234567890123", "v", "\U0001f469\u200d\U0001f680"):
        yield {"kind": "text", "text": text.encode().hex()}
    for device in (
        "auto",
        "cpu",
        "cuda",
        "cuda:0",
        "cuda:12",
        "cuda:1234",
        "cuda:",
        "cuda:x",
        "gpu",
        "",
        "cuda:-1",
        "CPU",
    ):
        yield {"kind": "device", "device": device}
    cpuinfo = "processor\t: 0\nmodel name\t:  Some  CPU \nflags\t\t: fpu avx2 amx_int8 avx512f\nflags\t: avx_vnni\n"
    for architecture in ("x86_64", "AMD64", "aarch64"):
        yield {"kind": "machine", "cpuinfo": cpuinfo, "architecture": architecture}
        yield {"kind": "machine", "cpuinfo": "Features\t: fp asimd i8mm asimdhp\n", "architecture": architecture}
        yield {"kind": "machine", "cpuinfo": "nothing", "architecture": architecture}


def all_cases(manifest_count: int = 600, choice_count: int = 500) -> list[Case]:
    """Return every case, the same ones each time."""
    return [*damaged_manifests(manifest_count), *edited_manifests(), *choices(choice_count), *others()]


if __name__ == "__main__":
    written = [{"case": case, "answer": answered(case)} for case in all_cases()]
    Path(sys.argv[1]).write_text(json.dumps(written), encoding="utf-8")
