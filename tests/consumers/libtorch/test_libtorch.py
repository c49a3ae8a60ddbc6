"""TorchScript graphs in C++ with libtorch, out of the wheel of torch: parity, equality with Python, refusals."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from edge_backbones import BuildOptions, Bundle, EdgeBackbone, build_bundle
from edge_backbones.bundle.writer import record_file, write_manifest
from edge_backbones.deploy.compile import compile_bundle
from tests.cpp_programs import cmake, configured, run

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("libtorch")
    done = configured(HERE, folder, "-DCMAKE_BUILD_TYPE=")
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(cmake(), "--build", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run_torchscript"


@pytest.fixture(scope="session")
def bundle(tmp_path_factory) -> Path:
    """A small network, not square, with its TorchScript graph and an engine of it."""
    import timm

    torch.manual_seed(0)
    net = timm.create_model("test_resnet", features_only=True, out_indices=(1, 2, 3)).eval()
    folder = tmp_path_factory.mktemp("bundle") / "small.bundle"
    build_bundle(net, folder, options=BuildOptions(height=64, width=96, precisions=("fp32",), batch=2))
    compile_bundle(folder, flavour="torchscript", allow_host_code=True)
    return folder


def ran(program: Path, *words: str | Path) -> subprocess.CompletedProcess:
    return run(program, *words)


def refusal(program: Path, *words: str | Path) -> str:
    done = ran(program, *words)
    assert done.returncode == 1, done.stdout
    return done.stderr.strip()


def changed(bundle: Path, target: Path, data: bytes) -> Path:
    """Write a copy of a bundle whose TorchScript graph has other bytes, with a manifest that says so."""
    shutil.copytree(bundle, target)
    manifest = Bundle.open(target).manifest
    (engine,) = (one for one in manifest.engines if one.key.flavour == "torchscript")
    (target / engine.file.path).write_bytes(data)
    file = record_file(target, engine.file.path)
    engines = [msgspec.structs.replace(one, file=file) if one is engine else one for one in manifest.engines]
    graphs = [msgspec.structs.replace(one, file=file) if one.file.path == file.path else one for one in manifest.graphs]
    write_manifest(target, msgspec.structs.replace(manifest, engines=tuple(engines), graphs=tuple(graphs)))
    return target


def test_parity_is_that_of_the_manifest(program, bundle):
    done = ran(program, bundle, "--allow")
    assert done.returncode == 0, done.stderr
    (engine,) = (one for one in Bundle.open(bundle).manifest.engines if one.key.flavour == "torchscript")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in lines] == [stage.stage for stage in engine.parity.stages]
    for (_, cosine, _), stage in zip(lines, engine.parity.stages, strict=True):
        assert abs(float(cosine) - stage.cosine) < 1e-6


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_maps_equal_those_of_python(batch, program, bundle, tmp_path):
    array = np.random.default_rng(batch).standard_normal((batch, 3, 64, 96)).astype(np.float32)
    array.tofile(tmp_path / "pixels")
    done = ran(program, bundle, "--allow", "--threads", "1", "--input", tmp_path / "pixels", str(batch), "64", "96")
    assert done.returncode == 0, done.stderr
    with EdgeBackbone.from_pretrained(bundle, engine="torchscript", allow_host_code=True, threads=1) as backbone:
        for _ in range(3):
            expected = backbone.run(array)
    for name, values in expected.items():
        found = np.fromfile(tmp_path / f"pixels.{name}", np.float32).reshape(values.shape)
        np.testing.assert_array_equal(found, values)


def test_a_program_runs_only_if_it_is_named_and_allowed(program, bundle):
    for words in ((), ("--engine", "fp32")):
        said = refusal(program, bundle, *words)
        assert said.startswith("EngineMismatchError: ")
        assert "is a program, which may do whatever its author wrote: it is run only when asked for by name" in said


def test_a_forked_child_is_refused(program, bundle):
    done = ran(program, bundle, "--allow", "--threads", "2", "--fork")
    assert (done.returncode, done.stderr.partition(" that this")[0]) == (
        0,
        "InferenceError: torch was started in the process",
    )


def test_on_a_gpu_it_is_refused(program, bundle):
    said = refusal(program, bundle, "--allow", "--device", "cuda")
    assert said.startswith("EngineMismatchError: torchscript-")
    assert "runs on the CPU in C++ programs, and device is cuda: ask for device cpu" in said


def test_damaged_programs_are_refused_in_one_line(program, bundle, tmp_path):
    said = refusal(program, changed(bundle, tmp_path / "damaged.bundle", b"PK" + bytes(200)), "--allow")
    assert said.startswith(
        f"EngineMismatchError: torch {torch.__version__.partition('+')[0]} does not load this TorchScript ("
    )
    assert said.endswith("): build or compile it again")
    assert "\n" not in said


class Two(torch.nn.Module):
    """Returns two tensors."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


class Picky(torch.nn.Module):
    """Fails on small batches."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert x.size(0) > 99, "only large batches"
        return x, x, x


def scripted(tmp_path: Path, module: torch.nn.Module) -> bytes:
    """Return a module as TorchScript."""
    torch.jit.save(torch.jit.script(module), str(tmp_path / "module.ts"))
    return (tmp_path / "module.ts").read_bytes()


@pytest.mark.filterwarnings("ignore")  # torch deprecates TorchScript
def test_a_program_with_other_outputs_is_refused(program, bundle, tmp_path):
    said = refusal(program, changed(bundle, tmp_path / "other.bundle", scripted(tmp_path, Two())), "--allow")
    assert said.startswith("EngineMismatchError: the program returns 2 tensors, the manifest promises ['")


@pytest.mark.filterwarnings("ignore")
def test_an_error_of_the_program_is_an_inference_error(program, bundle, tmp_path):
    said = refusal(program, changed(bundle, tmp_path / "other.bundle", scripted(tmp_path, Picky())), "--allow")
    assert said.startswith("InferenceError: torch failed on float32 (2, 3, 64, 96): ")
    assert "only large batches" in said
