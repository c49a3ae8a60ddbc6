"""Small parts of the C++ library."""

from __future__ import annotations

import subprocess

from tests.cpp_programs import program


def test_checks_in_cpp():
    done = subprocess.run([program("units")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
