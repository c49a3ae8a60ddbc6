"""The programs of docs/how-to/cpp.md and examples/cpp compile, and print what Python computes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from edge_backbones import EdgeBackbone
from tests.cpp_programs import cmake, configured, run
from tests.docs.snippets import snippets

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "cpp.md"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's program and the example, built by the page's CMakeLists.txt and by the example's."""
    folder = tmp_path_factory.mktemp("page")
    for name in ("main.cpp", "CMakeLists.txt"):
        (code,) = (found.code for found in snippets(PAGE) if f"title={name}" in found.classes)
        (folder / name).write_text(code)
    # The page's snippets of calls stand in a function behind the program: they have to compile.
    calls = "".join(
        found.code for found in snippets(PAGE) if found.language == "cpp" and "title=main.cpp" not in found.classes
    )
    body = calls.replace(
        'eb::Backbone::from_pretrained("resnet18.bundle", options)', "eb::Backbone::from_pretrained(path, options)"
    )
    with (folder / "main.cpp").open("a") as file:
        file.write(
            "\n[[maybe_unused]] static void calls(const char* path, std::vector<float>& pixels, const eb::Shape& shape) {\n"
            f"{body}}}\n"
        )
    with (folder / "CMakeLists.txt").open("a") as file:
        file.write(f"add_subdirectory({ROOT / 'examples' / 'cpp'} camera)\n")
    warnings = "-O1 -Wall -Wextra -Wpedantic -Wconversion -Werror"
    done = configured(folder, folder / "build", "-DCMAKE_BUILD_TYPE=", f"-DCMAKE_CXX_FLAGS={warnings}")
    assert done.returncode == 0, done.stderr
    done = run(cmake(), "--build", folder / "build", "--parallel", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "build"


def test_the_program_of_the_page_prints_the_means_of_python(built, bundles):
    path = bundles / "mobilenet.bundle"
    done = subprocess.run([built / "features", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    with EdgeBackbone.from_pretrained(path) as backbone:
        maps = backbone.run(np.full(backbone.input.opt_shape, 0.5, np.float32))
        assert first == f"{backbone.engine} takes {backbone.input.describe()}"
    assert [line.partition(" mean ")[0] for line in lines] == [
        f"{name} {values.shape}" for name, values in maps.items()
    ]
    means = [float(line.partition(" mean ")[2]) for line in lines]
    np.testing.assert_allclose(means, [values.mean(dtype=np.float64) for values in maps.values()], rtol=1e-4)
    refused = subprocess.run([built / "features", bundles], capture_output=True, text=True)
    assert (refused.returncode, refused.stderr.startswith("BundleError: ")) == (1, True)


def test_the_example_reads_frames_from_a_pipe(built, bundles):
    path = bundles / "nv12.bundle"
    frames = np.random.default_rng(0).integers(0, 256, (3, 72, 64, 1), np.uint8)
    data = frames.tobytes() + b"a cut frame"
    done = subprocess.run([built / "camera" / "camera", path], input=data, capture_output=True)
    assert done.returncode == 0, done.stderr
    with EdgeBackbone.from_pretrained(path) as backbone:
        vectors = [backbone(frame[None]).feature_maps[-1].astype(np.float64).mean(axis=(0, 2, 3)) for frame in frames]
    changes = [1 - vectors[0] @ v / np.linalg.norm(vectors[0]) / np.linalg.norm(v) for v in vectors]
    assert done.stdout.decode().splitlines() == [f"frame {i}: changed by {abs(c):.4f}" for i, c in enumerate(changes)]


def test_the_example_refuses_other_bundles_with_the_fix(built, bundles):
    done = subprocess.run(
        [built / "camera" / "camera", bundles / "resnet.bundle"], input="", capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "takes pixel_values: build one that takes frames (--input frame" in done.stderr
