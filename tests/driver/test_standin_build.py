"""The stand-in for libcuda is compiled where a compiler is, and never passed over."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from build_scripts.fetch_cuda import why_not_here
from tests.driver import build

pytestmark = pytest.mark.skipif(bool(why_not_here()), reason=why_not_here())


def test_the_library_has_the_name_that_programs_load(tmp_path):
    library = build.build(tmp_path)
    assert library == tmp_path / "libcuda.so.1"
    ask = "import ctypes, sys; version = ctypes.c_int(); cuda = ctypes.CDLL(sys.argv[1]); "
    ask += "print(cuda.cuDriverGetVersion(ctypes.byref(version)), version.value)"
    # In a process of its own: what is loaded here would be found by later tests.
    done = subprocess.run([sys.executable, "-c", ask, str(library)], capture_output=True, text=True, check=True)
    assert done.stdout == "0 12090\n"


def test_a_missing_compiler_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="needs a C compiler: install gcc or clang"):
        build.build(tmp_path)


def test_what_the_compiler_says_is_passed_on(monkeypatch, tmp_path):
    broken = tmp_path / "broken.c"
    broken.write_text("int f(void) { return nothing; }\n")
    monkeypatch.setattr(build, "SOURCES", [broken])
    with pytest.raises(RuntimeError, match="nothing"):
        build.build(tmp_path)
