"""Build the stand-in for NVIDIA's driver: libcuda.so.1, from libcuda/*.c.

python -m tests.driver.build FOLDER
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

SOURCES = sorted((Path(__file__).parent / "libcuda").glob("*.c"))
FLAGS = (
    "-std=gnu11",
    "-O1",
    "-g",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-pthread",
)


def build(folder: Path) -> Path:
    """Compile the stand-in into a folder and return its path. Raises RuntimeError with what the compiler says."""
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError("the stand-in for libcuda needs a C compiler: install gcc or clang (apt install gcc)")
    library = folder / "libcuda.so.1"
    command = [compiler, *FLAGS, f"-Wl,-soname,{library.name}", "-o", str(library), *map(str, SOURCES), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return library


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
