"""NVIDIA's Python bindings of the TensorRT releases that are supported, importable on a machine without TensorRT.

    python -m build_scripts.fetch_bindings [folder]

Each release lies in a folder of its own. The libraries under the bindings are stubs: every class, argument and enum of a
release can be looked at, and nothing runs. tests/trt/test_api_contract.py holds our code against them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from edge_backbones.engines.tensorrt.library import TensorRtFlavour


@dataclass(frozen=True)
class Release:
    """One release of a flavour; its wheels are for Python 3.``oldest`` to 3.``newest`` on ``machines``."""

    flavour: TensorRtFlavour
    release: str
    package: str
    version: str
    oldest: int
    newest: int
    machines: tuple[str, ...] = ("x86_64", "aarch64")

    def __str__(self) -> str:
        return f"{self.flavour}-{self.release}"

    def why_not_here(self) -> str:
        """Return why this Python cannot import a release; empty if it can."""
        if not sys.platform.startswith("linux") or os.uname().machine not in self.machines:
            return (
                f"{self} has wheels for Linux on {' and '.join(self.machines)} only, this is {sysconfig.get_platform()}"
            )
        if not self.oldest <= sys.version_info.minor <= self.newest:
            return (
                f"{self} has wheels for Python 3.{self.oldest} to 3.{self.newest}, this is 3.{sys.version_info.minor}"
            )
        return ""


# JetPack 6, JetPack 7, the last with weak typing, the newest. Nothing runs, so any CUDA does.
RELEASES = (
    Release("tensorrt", "10.3", "tensorrt-cu12-bindings", "10.3.0", 10, 12, ("x86_64",)),
    Release("tensorrt", "10.13", "tensorrt-cu13-bindings", "10.13.3.9", 10, 13),
    Release("tensorrt", "10.16", "tensorrt-cu13-bindings", "10.16.1.11", 10, 13),
    Release("tensorrt", "11.4", "tensorrt-cu13-bindings", "11.4.0.106", 10, 14),
    Release("tensorrt_rtx", "1.7", "tensorrt-rtx-cu13-bindings", "1.7.1.116", 10, 14),
    Release("tensorrt_lean", "11.4", "tensorrt-lean-cu13-bindings", "11.4.0.106", 10, 14),
)

# Every C function that any of the bindings links to. Made with a null pointer, a Runtime or a Builder is a TypeError.
_STUBS = "".join(
    f"void *{function}(void) {{ return 0; }}\n"
    for function in (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "getBuilderPluginRegistry",
        "getNvOnnxParserVersion",
        "getPluginRegistry",
        "initLibNvInferPlugins",
    )
)
_LIBRARY_NAME = re.compile(rb"\0(lib(?:nvinfer|nvonnxparser|tensorrt)\w*\.so\.\d+)(?=\0)")


def default_folder() -> Path:
    """Return a folder beside the packages of this Python, because the wheels are for its release."""
    return Path(sys.prefix) / "bindings"


def fetch(release: Release, folder: Path) -> Path:
    """Return the folder to put on a Python path; download it if it is not there. Raises RuntimeError with the fix."""
    place, marker = folder / str(release), f"{release.package}=={release.version}\n{_STUBS}"
    if (place / ".complete").is_file() and (place / ".complete").read_text(encoding="utf-8") == marker:
        return place
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise RuntimeError(
            f"{release} needs a C compiler for its stub libraries: install gcc or clang (apt install gcc)"
        )
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    install((f"{release.package}=={release.version}",), place, "--only-binary", ":all:")
    names = {
        name.decode()
        for extension in place.glob("*_bindings/*.so")
        for name in _LIBRARY_NAME.findall(extension.read_bytes())
    }
    if not names:
        raise RuntimeError(f"the wheel of {release} links to no library of TensorRT: its layout has changed")
    (place / "stubs").mkdir()
    (place / "stubs.c").write_text(_STUBS, encoding="utf-8")
    for name in sorted(names):
        output = str(place / "stubs" / name)
        run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", output, str(place / "stubs.c")])
    (place / ".complete").write_text(marker, encoding="utf-8")
    return place


def install(packages: Sequence[str], place: Path, *options: str) -> None:
    """Put packages into a folder, without what they ask for. Raises RuntimeError with what pip says."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-compile",
    ]
    run([*pip, *options, "--target", str(place), *packages])


def run(command: Sequence[str]) -> None:
    """Run a command. Raises RuntimeError with what it says when it fails."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}".rstrip())


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else default_folder()
    here = [release for release in RELEASES if not release.why_not_here()]
    with ThreadPoolExecutor(max_workers=4) as pool:
        try:
            list(pool.map(lambda release: fetch(release, folder), here))
        except RuntimeError as error:
            sys.exit(str(error))
    for release in RELEASES:
        if why := release.why_not_here():
            print(f"{why}: its API contract is not tested here")


if __name__ == "__main__":
    main()
