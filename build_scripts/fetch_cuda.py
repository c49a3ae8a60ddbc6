"""NVIDIA's CUDA bindings of both releases, cuda.core and pycuda, importable on a machine without a GPU.

    python -m build_scripts.fetch_cuda [folder]

Each lies in a folder of its own. tests/driver puts them on the Python path of a process that has a stand-in for libcuda.so.1.
"""

from __future__ import annotations

import shutil
import sys
import tarfile
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

from build_scripts.fetch_bindings import default_folder, install, run

# By folder. cuda.core reads the folder of the toolkit through cuda-pathfinder.
_WHEELS = {
    "cuda-12": ("cuda-bindings==12.9.10",),
    "cuda-13": ("cuda-bindings==13.5.0",),
    "cuda-core": ("cuda-core==1.2.2", "cuda-pathfinder==1.9.1"),
}
CUDA_RELEASES = ("cuda-12", "cuda-13")
FOLDERS = (*_WHEELS, "pycuda")

_PYCUDA = "pycuda==2026.1"
_PYTOOLS = ("pytools==2026.1.1", "siphash24==1.9", "platformdirs==4.14.8")  # pycuda's arrays need them
_HEADERS = "nvidia-cuda-runtime==13.0.96"  # cuda.h
_PROFILER = """\
    /* Three functions of CUDA that pycuda wraps, and the wheel with cuda.h does not declare. */
    #include <cuda.h>
    typedef enum CUoutput_mode_enum { CU_OUT_KEY_VALUE_PAIR = 0, CU_OUT_CSV = 1 } CUoutput_mode;
    extern "C" CUresult cuProfilerInitialize(const char *configuration, const char *output, CUoutput_mode mode);
    extern "C" CUresult cuProfilerStart(void);
    extern "C" CUresult cuProfilerStop(void);
"""


def why_not_here() -> str:
    """Return why this machine cannot run tests over a stand-in for libcuda; empty if it can."""
    return "" if sys.platform.startswith("linux") else f"libcuda.so.1 is the driver of Linux, this is {sys.platform}"


def fetch(name: str, folder: Path) -> Path:
    """Return a folder to put on a Python path; fill it if it is not there. Raises RuntimeError with the fix."""
    place = folder / name
    packages = _WHEELS.get(name, (_PYCUDA, _HEADERS, *_PYTOOLS))
    marker = "\n".join(packages)
    if (place / ".complete").is_file() and (place / ".complete").read_text(encoding="utf-8") == marker:
        return place
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    if name == "pycuda":
        _build_pycuda(place)
    else:
        install(packages, place)
    (place / ".complete").write_text(marker, encoding="utf-8")
    return place


def _build_pycuda(place: Path) -> None:
    """Build pycuda, of which there are no wheels, against a libcuda that is empty."""
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError(f"{_PYCUDA} needs a C++ compiler: install g++ or clang (apt install g++)")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        install((_HEADERS,), work / "headers")
        header = next((work / "headers").rglob("cuda.h"), None)
        if header is None:
            raise RuntimeError(f"{_HEADERS} has no cuda.h: its layout has changed")
        (work / "include").mkdir()
        (work / "include" / "cudaProfiler.h").write_text(textwrap.dedent(_PROFILER), encoding="utf-8")
        (work / "empty.c").write_text("", encoding="utf-8")
        run(
            [
                compiler,
                "-shared",
                "-fPIC",
                "-Wl,-soname,libcuda.so.1",
                "-x",
                "c",
                "-o",
                f"{work}/libcuda.so",
                f"{work}/empty.c",
            ]
        )
        run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", "pycuda",
             "--dest", str(work), _PYCUDA])  # fmt: skip
        with tarfile.open(next(work.glob("pycuda-*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
        source = next(path for path in work.glob("pycuda-*") if path.is_dir())
        _configure(source, (header.parent, work / "include"), work)
        install((str(source),), place, "--no-build-isolation")
        install(_PYTOOLS, place)


def _configure(source: Path, includes: Sequence[Path], libraries: Path) -> None:
    """Write the settings of pycuda's build: the driver alone, and no optimisation, which would take most of the time."""
    settings = {
        "USE_SHIPPED_BOOST": True,
        "CUDA_TRACE": False,
        "CUDA_ENABLE_GL": False,
        "CUDA_ENABLE_CURAND": False,
        "CUDA_INC_DIR": [str(include) for include in includes],
        "CUDADRV_LIB_DIR": [str(libraries)],
        "CUDADRV_LIBNAME": ["cuda"],
        "CXXFLAGS": ["-O0", "-g0", "-w"],
        # Linkers leave out a library that has nothing to give.
        "LDFLAGS": ["-Wl,--no-as-needed", f"-L{libraries}", "-lcuda"],
    }
    lines = [f"{name} = {value!r}\n" for name, value in settings.items()]
    (source / "siteconf.py").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else default_folder()
    if why := why_not_here():
        print(f"{why}: tests/driver does not run here")
        return
    try:
        for name in FOLDERS:
            fetch(name, folder)
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
