"""What C++ refuses, in the words of Python: damaged bundles, engines for other machines, inputs that do not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from build_scripts.fuzz_damage import sealed
from edge_backbones import Bundle, EdgeBackbone, errors
from edge_backbones.bundle.reader import load_golden
from tests.cpp.conftest import maps_of


@pytest.fixture
def copy(bundles: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles / "resnet.bundle", tmp_path / "copy.bundle"))


def edited(path: Path, edit: Callable[[dict], None]) -> None:
    document = json.loads((path / "manifest.json").read_bytes())
    edit(document)
    (path / "manifest.json").write_bytes(sealed(document))


def refusal_of_python(path: Path | str, **options) -> dict[str, str]:
    with pytest.raises(errors.EdgeBackbonesError) as refused:
        EdgeBackbone.from_pretrained(path, **options).close()
    return {"error": type(refused.value).__name__, "message": str(refused.value)}


def both_refuse(ask, path: Path | str, **options) -> dict[str, str]:
    (answer,) = ask({"bundle": str(path), "options": options})
    python = {name: value for name, value in options.items() if name != "stages"}
    assert answer["refusal"] == refusal_of_python(path, **python)
    return answer["refusal"]


def engine_file(path: Path) -> Path:
    with EdgeBackbone.from_pretrained(path) as backbone:
        name = backbone.engine
    return path / next(e.file.path for e in Bundle.open(path).manifest.engines if e.name == name)


def test_an_engine_of_another_release_or_machine(copy, ask):
    def other(document: dict) -> None:
        document["engines"][0]["key"]["library_version"] = "2020.1"
        document["engines"][1]["key"]["architecture"] = "riscv64"

    edited(copy, other)
    said = both_refuse(ask, copy)["message"]
    assert "compiled with openvino 2020.1; here" in said
    assert "compiled for riscv64; this machine is" in said
    assert "edge-backbones compile" in said


def test_a_cpu_without_the_instructions(copy, ask):
    edited(copy, lambda document: document["engines"][0]["key"].update(cpu_features=["avx2", "avx1024"]))
    assert "compiled for a CPU with avx1024" in both_refuse(ask, copy, engine="int8")["message"]


def test_a_plan_for_a_gpu(copy, ask):
    gpu = {"architectures": ["sm_87"], "driver": "12.6", "multiprocessors": 16}
    edited(copy, lambda document: document["engines"][0]["key"].update(flavour="unheard_of", gpu=gpu))
    (answer,) = ask({"bundle": str(copy)})
    with EdgeBackbone.from_pretrained(copy) as backbone:
        assert answer["description"]["passed_over"] == dict(backbone.passed_over)
    edited(copy, lambda document: document["engines"][0]["key"].update(flavour="tensorrt", cpu_features=[]))
    (answer,) = ask({"bundle": str(copy), "options": {"engine": "tensorrt"}})
    said = answer["refusal"]["message"]
    assert "needs tensorrt, which this program was built without: add COMPONENTS TensorRT to find_package" in said
    assert "needs an NVIDIA GPU: " in said


def test_a_gate_that_was_not_kept(copy, ask):
    edited(copy, lambda document: document["engines"][1]["parity"]["stages"][0].update(relative=0.5))
    assert "was outside its gate" in both_refuse(ask, copy, engine="fp32")["message"]


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing", "link", "folder", "pipe"])
def test_a_damaged_engine(damage, copy, ask):
    file = engine_file(copy)
    data = file.read_bytes()
    file.unlink()
    match damage:
        case "changed":
            file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "truncated":
            file.write_bytes(data[:-1])
        case "link":
            (copy / "elsewhere").write_bytes(data)
            file.symlink_to(copy / "elsewhere")
        case "folder":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
    both_refuse(ask, copy)


def test_bytes_that_are_no_engine(copy, ask):
    import hashlib

    file = engine_file(copy)
    data = b"no blob" * 100
    file.write_bytes(data)

    def rename(document: dict) -> None:
        for engine in document["engines"]:
            if engine["file"]["path"] == str(file.relative_to(copy)):
                engine["file"].update(sha256=hashlib.sha256(data).hexdigest(), size=len(data))

    edited(copy, rename)
    (answer,) = ask({"bundle": str(copy)})
    assert answer["refusal"]["error"] == "EngineMismatchError"
    assert "does not load this engine" in answer["refusal"]["message"]
    assert "run edge-backbones compile on this machine" in answer["refusal"]["message"]


def test_an_engine_whose_ports_are_not_those_of_the_manifest(copy, ask):
    edited(copy, lambda document: document["backbone"].update(channels=[513]))
    both_refuse(ask, copy)


def test_no_bundle(tmp_path, copy, ask, monkeypatch):
    file = tmp_path / "file"
    file.write_text("x")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", file, tmp_path / "empty", copy / "manifest.json", "", f"{tmp_path}//empty/./"):
        both_refuse(ask, path)


@pytest.mark.parametrize("damage", ["digest", "text", "link", "large", "leaves"])
def test_a_damaged_manifest(damage, copy, ask):
    manifest = copy / "manifest.json"
    text = manifest.read_bytes()
    match damage:
        case "digest":
            manifest.write_bytes(text.replace(b"resnet18", b"resnet19"))
        case "text":
            manifest.write_bytes(text[:100])
            (answer,) = ask({"bundle": str(copy)})
            assert answer["refusal"]["error"] == "ManifestError"
            return
        case "link":
            manifest.rename(copy / "other.json")
            manifest.symlink_to(copy / "other.json")
        case "large":
            manifest.write_bytes(text + b" " * (4 << 20))
        case "leaves":
            edited(copy, lambda document: document["golden"]["file"].update(path="../golden.npz"))
    both_refuse(ask, copy)


@pytest.mark.parametrize(
    "options",
    [
        {"device": "gpu"},
        {"device": "cuda", "threads": 2},
        {"threads": -1},
        {"engine": "fp8"},
        {"engine": "nobody"},
        {"engine": "torchscript"},
        {"engine": "openvino-"},
        {"device": "cuda"},
    ],
)
def test_options_that_cannot_be_met(options, copy, ask):
    both_refuse(ask, copy, **options)


@pytest.mark.parametrize("stages", [["layer1"], ["nobody"], ["layer4", "layer4"], ["layer4", "layer1"]])
def test_stages_that_the_bundle_does_not_hold(stages, copy, ask):
    (answer,) = ask({"bundle": str(copy), "options": {"stages": stages}})
    with EdgeBackbone.from_pretrained(copy) as backbone, pytest.raises(errors.InputError) as refused:
        backbone.out_features = stages
    assert answer["refusal"] == {"error": "InputError", "message": str(refused.value)}


def test_inputs_that_do_not_fit(copy, ask, call):
    good = np.zeros((1, 3, 64, 64), np.float32)
    bad = [
        np.zeros((1, 3, 64, 65), np.float32),
        np.zeros((1, 4, 64, 64), np.float32),
        np.zeros((0, 3, 64, 64), np.float32),
        np.zeros((3, 64, 64), np.float32),
        np.zeros((1, 3, 64, 64), np.uint8),
    ]
    with_nan = np.zeros((5, 3, 64, 64), np.float32)
    with_nan[0, 0, 0, :2] = np.nan
    with_nan[1:, 2, 3, 4] = -np.inf
    calls = [call(array) for array in (*bad, with_nan)]
    calls += [call(good, mode) for mode in ("too_few", "too_small", "on_device", "no_such_map")]
    (answer,) = ask({"bundle": str(copy), "calls": [*calls, call(good, null=True), call(good)]})
    *refused, accepted = answer["results"]
    assert {result["error"] for result in refused} == {"InputError"}
    with EdgeBackbone.from_pretrained(copy) as backbone:
        for array, result in zip(bad, refused[: len(bad)], strict=True):
            with pytest.raises(errors.InputError) as python:
                backbone(array)
            assert result["message"] == str(python.value)
        with pytest.raises(errors.InputError) as python:
            backbone(with_nan)
        same = str(python.value).partition(": replace them")[0]
        assert refused[len(bad)]["message"].partition(": replace them")[0] == same
    said = [result["message"] for result in refused[len(bad) + 1 :]]
    assert said[0] == "0 output tensors do not fit: pass one for each of ['layer4']"
    assert said[1] == "memory for float32 (1,) does not fit layer4, which is float32 (1, 512, 2, 2)"
    assert "one for each of" in said[2]
    assert said[3] == "there is no map 'nobody': this backbone returns ['layer4']"
    assert "null pointer" in said[4]
    assert maps_of(accepted)["layer4"].shape == (1, 512, 2, 2)


def test_values_that_are_not_finite_pass_if_that_is_asked_for(copy, ask, call):
    array = np.full((1, 3, 64, 64), np.nan, np.float32)
    (answer,) = ask({"bundle": str(copy), "options": {"check_finite": False}, "calls": [call(array)]})
    assert "maps" in answer["results"][0]


def test_a_user_who_asks_for_signatures_is_refused_what_was_not_checked(copy, ask, tmp_path):
    keys = tmp_path / "home" / ".config" / "edge_backbones" / "trusted"
    keys.mkdir(parents=True)
    environment = {"HOME": str(tmp_path / "home")}
    trusting = {"bundle": str(copy), "options": {"signature_checked": True}}
    refused, opened = ask({"bundle": str(copy)}, trusting, env=environment)
    said = f"{keys} asks for signed bundles, and the C++ library checks no signatures: run edge-backbones verify {copy}"
    assert refused["refusal"]["error"] == "BundleError"
    assert refused["refusal"]["message"].startswith(said)
    assert "description" in opened


def golden_cases(path: Path) -> list[bytes]:
    """Return damaged golden.npz files: cut, extended, with bytes changed in headers, and with other arrays."""
    import io

    data = (path / "golden.npz").read_bytes()
    arrays = dict(np.load(io.BytesIO(data)))
    found = [
        data,
        data[:-1],
        data[:40],
        b"",
        data + b"x",
        data.replace(b"<f4", b"<f8", 1),
        data.replace(b"'fortran_order': False", b"'fortran_order': True ", 1),
    ]
    for at in (0, 4, 6, 8, 14, 18, 22, 26, 28, 30, 60, 66, 68, 70, 80, 100):
        found.append(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    name = next(name for name in arrays if name.endswith("layer4"))
    for change in (
        {name: arrays[name][:1]},
        {name: arrays[name][..., 0]},
        {"opt/extra": arrays[name]},
        {name: arrays[name].astype(np.float16)},
        {name: np.asfortranarray(arrays[name])},
    ):
        contents = io.BytesIO()
        np.savez(contents, **{**arrays, **change})
        found.append(contents.getvalue())
    packed = io.BytesIO()
    np.savez_compressed(packed, **arrays)
    return [*found, packed.getvalue()]


def test_golden_samples_are_refused_where_python_refuses_them(copy, tmp_path, ask):
    import hashlib

    requests, expected = [], []
    for number, data in enumerate(golden_cases(copy)):
        path = tmp_path / f"golden{number}.bundle"
        path.mkdir()
        shutil.copy(copy / "manifest.json", path)
        (path / "golden.npz").write_bytes(data)
        digest = hashlib.sha256(data).hexdigest()
        edited(path, lambda document: document["golden"]["file"].update(sha256=digest, size=len(data)))  # noqa: B023
        requests.append({"bundle": str(path), "golden": True})
        try:
            load_golden(Bundle.open(path))
            expected.append(True)
        except errors.IntegrityError:
            expected.append(False)
    answers = ask(*requests)
    assert [answer.get("cases") == ["opt"] for answer in answers] == expected
    assert {answer["refusal"]["error"] for answer in answers if "refusal" in answer} == {"IntegrityError"}
    assert 1 < sum(expected) < len(expected)


def test_the_program_fails_as_python_does(copy, verify_program, tmp_path):
    def verify(*arguments: str | Path) -> subprocess.CompletedProcess:
        return subprocess.run([verify_program, *arguments], capture_output=True, text=True)

    assert verify().returncode == verify(copy, "--nothing").returncode == 2
    nowhere = verify(tmp_path / "nowhere")
    assert (nowhere.returncode, nowhere.stderr.startswith("BundleError: ")) == (1, True)
    (copy / "calibration.json").write_text("x")
    assert "IntegrityError" in verify(copy).stderr
    shutil.rmtree(copy)


def test_the_program_says_which_engine_is_outside_its_gate(copy, verify_program):
    def strict(document: dict) -> None:
        for graph in document["graphs"]:
            graph["gate"] = {"min_cosine": 1.001}

    edited(copy, strict)
    done = subprocess.run([verify_program, copy], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "FAIL" in done.stdout
    assert "is outside its gate (cosine >= 1.001): layer4 has cosine" in done.stderr
