"""The C++ library over OpenVINO, in short: the program that ships with it measures the parity of a bundle.

One program is compiled, and only where a header changed. `make test-cpp` tests the rest of the library, with more networks.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from edge_backbones import Bundle, errors
from edge_backbones.deploy.verify import verify_bundle
from tests.cpp.conftest import build_networks
from tests.cpp_programs import program


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    build_networks(tmp_path, "mobilenet")
    return Bundle.open(tmp_path / "mobilenet.bundle")


def verified(bundle: Bundle) -> subprocess.CompletedProcess:
    return subprocess.run([program("verify"), bundle.path], capture_output=True, text=True, timeout=300)


def test_parity_in_cpp_is_that_of_the_manifest_until_a_file_is_damaged(bundle):
    done = verified(bundle)
    assert done.returncode == 0, done.stderr
    named = re.split(r"^parity of (\S+).*$", done.stdout, flags=re.MULTILINE)[1:]
    tables = dict(zip(named[::2], named[1::2], strict=True))
    engines = bundle.manifest.engines
    assert sorted(tables) == sorted(engine.name for engine in engines)
    assert len(engines) == 2
    for engine in engines:
        cosines = [float(found) for found in re.findall(r"\b[01]\.\d{6}\b", tables[engine.name])]
        assert cosines == pytest.approx([stage.cosine for stage in engine.parity.stages], abs=1e-6)
    assert "its signature was not checked" in done.stdout

    file = bundle.path / engines[0].file.path
    file.write_bytes(file.read_bytes()[:-1] + b"\0\1")
    with pytest.raises(errors.BundleError) as refused:
        verify_bundle(bundle.path)
    done = verified(bundle)
    assert done.returncode == 1
    assert str(refused.value) in done.stderr
