"""The wheel as a device gets it: in an environment of its own, of the oldest Python, without torch.

JetPack 6 has Python 3.10: that is taken where the machine has one, else the Python that runs the tests. Nothing is skipped.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import zipfile
from email.parser import Parser
from pathlib import Path

import numpy as np
import openvino
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from build_scripts import device_install
from build_scripts.device_install import OLDEST, build_wheel, find_oldest_python
from edge_backbones import sign_bundle

LIMIT = 1_000_000
DEVICE = """
import json, sys
import numpy as np
from edge_backbones import EdgeBackbone

path, precision, out = sys.argv[1:]
with np.load(path + "/golden.npz") as golden, EdgeBackbone.from_pretrained(path, engine=precision) as backbone:
    maps = backbone(golden["opt/pixel_values"]).feature_maps
    np.savez(out, **dict(zip(backbone.out_features, maps)))
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def python(wheel, old_python, tmp_path_factory) -> str:
    """The Python of an environment that has the wheel and what it asks for, and nothing else."""
    folder = tmp_path_factory.mktemp("environment") / "env"
    run(old_python, "-m", "venv", str(folder))
    executable = str(folder / "bin" / "python")
    run(executable, "-m", "pip", "install", "--quiet", str(wheel))
    return executable


def run(*command: str, code: int = 0) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_python_that_does_not_start_is_passed_over(tmp_path, monkeypatch):
    """As with pyenv: its shim is first on the PATH and fails, the versions are elsewhere."""
    shims, elsewhere = tmp_path / "shims", tmp_path / "pyenv" / "versions"
    for path, script in {
        shims / f"python{OLDEST}": "echo 'command not found' >&2; exit 127",
        elsewhere / "3.10.1" / "bin" / f"python{OLDEST}": "echo 3.9",
        elsewhere / "3.10.2" / "bin" / f"python{OLDEST}": "exit 0",
        elsewhere / "3.10.3" / "bin" / f"python{OLDEST}": f"echo {OLDEST}",
    }.items():
        path.parent.mkdir(parents=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setattr(device_install, "_SYSTEM", ())
    monkeypatch.setenv("PATH", str(shims))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert find_oldest_python() == str(elsewhere / "3.10.3" / "bin" / f"python{OLDEST}")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "nothing"))
    assert find_oldest_python() is None
    uv = shims / "uv"
    uv.write_text(f"#!/bin/sh\necho {elsewhere}/3.10.3/bin/python{OLDEST}\n")
    uv.chmod(0o755)
    assert find_oldest_python() == str(elsewhere / "3.10.3" / "bin" / f"python{OLDEST}")


def test_the_wheel_is_small_and_for_every_machine(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size < LIMIT
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        [metadata] = [name for name in names if name.endswith(".dist-info/METADATA")]
        asked = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist") or []
    assert {name.partition("/")[0] for name in names if "dist-info" not in name} == {"edge_backbones"}
    assert all(
        name.endswith((".py", ".toml", ".json", ".jinja", ".txt", "py.typed", ".hpp", ".h", ".cpp", ".cmake"))
        for name in names
        if "dist-info" not in name
    )
    for needed in (
        "bundle/manifest.schema.json",
        "cpp/cmake/components/openvino.cmake",
        "cpp/cmake/edge_backbones-config-version.cmake",
        "cpp/cmake/edge_backbones-config.cmake",
        "cpp/include/edge_backbones/edge_backbones.hpp",
        "cpp/tools/verify.cpp",
        "profiles_data/jetson-orin-nano.toml",
        "report/report.html.jinja",
        "toolchain/sources/timm_networks.txt",
        "py.typed",
    ):
        assert f"edge_backbones/{needed}" in names
    always = sorted(line.partition(">")[0].strip() for line in asked if "extra ==" not in line)
    assert always == ["msgspec", "numpy"]


def test_the_runtime_alone_brings_numpy_and_msgspec(python, wheel):
    listed = {
        row["name"].lower() for row in json.loads(run(python, "-m", "pip", "list", "--format=json").splitlines()[0])
    }
    assert listed - {"pip", "setuptools"} == {"edge-backbones", "numpy", "msgspec"}
    run(python, "-c", "import edge_backbones; edge_backbones.EdgeBackbone, edge_backbones.Bundle")
    told = run(python, "-m", "edge_backbones", "doctor", code=1)
    assert f"pip install '{wheel}[cli]'" in told
    assert len(told.strip().splitlines()) == 1


def test_feature_maps_without_torch(python, wheel, bundle, tmp_path):
    told = run(python, "-c", DEVICE, str(bundle), "fp32", str(tmp_path / "x.npz"), code=1)
    assert f"pip install '{wheel}[cpu]'" in told
    # The engines of a bundle are of one release of OpenVINO.
    run(python, "-m", "pip", "install", "--quiet", f"openvino=={openvino.__version__.partition('-')[0]}")
    with np.load(bundle / "golden.npz") as golden:
        for precision, least in (("fp32", 0.999999), ("int8", 0.98)):
            out = tmp_path / f"{precision}.npz"
            loaded = json.loads(run(python, "-c", DEVICE, str(bundle), precision, str(out)).splitlines()[-1])
            assert not {"torch", "timm", "transformers", "onnx", "onnxruntime"} & set(loaded)
            with np.load(out) as maps:
                assert len(maps.files) == 4
                for stage in maps.files:
                    ours, reference = maps[stage].ravel().astype(np.float64), golden[f"opt/{stage}"].ravel()
                    assert ours @ reference / np.linalg.norm(ours) / np.linalg.norm(reference) > least


def test_compile_and_doctor_without_torch(python, wheel, bundle):
    """On the device: engines made from the bundle's graphs, verified, and the doctor's word on them."""
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[cli,cpu]")
    told = json.loads(run(python, "-m", "edge_backbones", "compile", str(bundle), "--json"))
    assert (told["flavour"], told["profile"]) == ("openvino", "cpu")
    assert [engine["key"]["precision"] for engine in told["engines"]] == ["int8", "fp32"]
    assert "nothing was added" in run(python, "-m", "edge_backbones", "compile", str(bundle), "--resume")
    findings = json.loads(run(python, "-m", "edge_backbones", "doctor", str(bundle), "--json"))
    assert sum(finding["topic"].startswith("engine ") and finding["ok"] for finding in findings) == 2
    missing = {finding["topic"]: finding["fix"] for finding in findings if not finding["ok"]}
    assert missing["build bundles"] == f"pip install '{wheel}[build]'"


def test_a_signature_is_checked_with_cryptography_alone(old_python, wheel, bundle, tmp_path):
    signed, private, public = tmp_path / "signed.bundle", tmp_path / "private.pem", tmp_path / "public.pem"
    shutil.copytree(bundle, signed)
    key, pem = ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    sign_bundle(signed, key=private)
    run(old_python, "-m", "venv", str(tmp_path / "env"))
    executable = str(tmp_path / "env" / "bin" / "python")
    code = (
        "from edge_backbones import Bundle; from edge_backbones.bundle.trust import admit; "
        f"print(admit(Bundle.open({str(signed)!r}), {str(public)!r})[1])"
    )
    run(executable, "-m", "pip", "install", "--quiet", str(wheel))
    advice = run(executable, "-c", code, code=1).strip().rpartition(": ")[2]
    run(executable, "-m", *shlex.split(advice), "--quiet")  # the advice works when typed
    assert run(executable, "-c", code).strip() == "{}"
    listed = json.loads(run(executable, "-m", "pip", "list", "--format=json").splitlines()[0])
    extra = {row["name"].lower() for row in listed} - {"pip", "setuptools", "edge-backbones", "numpy", "msgspec"}
    assert extra - {"typing_extensions"} == {"cryptography", "cffi", "pycparser"}
