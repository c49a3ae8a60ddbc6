"""What a device installs, for what does it for real: the wheel, and the oldest Python that it is for; and a small bundle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
OLDEST = "3.10"  # JetPack 6
_SYSTEM = ("/usr/bin", "/usr/local/bin")
_ASK = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"


def build_wheel(folder: Path) -> Path:
    """Build the project's wheel in ``folder``, from a copy, because setuptools leaves a folder named build behind."""
    source = folder / "source"
    for name in ("edge_backbones", "profiles"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True)
    shutil.rmtree(source)
    [wheel] = folder.glob("*.whl")
    return wheel


def find_oldest_python() -> str | None:
    """Return a Python 3.10 that starts and can create environments, from PATH, pyenv or uv; None if there is none."""
    return next((candidate for candidate in _candidates() if _is_oldest(candidate)), None)


def build_small(target: Path) -> Path:
    """Build a bundle of a small network, int8 and fp32, with engines for this CPU."""
    import numpy as np
    from skimage import data

    from edge_backbones import BuildOptions, build_bundle
    from edge_backbones.spec import Precision

    images = np.stack([data.astronaut()[y : y + 96, x : x + 96] for y in (0, 150, 300) for x in (0, 100, 200, 300)])
    options = BuildOptions(
        weights="random:0",
        precisions=(Precision.INT8, Precision.FP32),
        out_indices=(1, 2, 3, 4),
        height=64,
        width=96,
        torchscript=False,
    )
    return build_bundle("test_resnet", target, images=images, options=options, overwrite=True).bundle.path


def _candidates() -> Iterator[str]:
    name = f"python{OLDEST}"
    # Every one on the PATH: a version manager's shim may come first, and refuse to start.
    for folder in [*os.get_exec_path(), *_SYSTEM]:
        if found := shutil.which(name, path=folder):
            yield found
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from (str(path) for path in sorted(pyenv.glob(f"versions/{OLDEST}*/bin/{name}")))
    if uv := shutil.which("uv"):
        command = [uv, "python", "find", "--no-project", "--no-python-downloads", OLDEST]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        yield from done.stdout.split("\n")[:1] if done.returncode == 0 else []


def _is_oldest(python: str) -> bool:
    try:
        done = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return done.returncode == 0 and done.stdout.strip() == OLDEST
