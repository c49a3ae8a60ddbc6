"""Nothing is sent, looked up, forked or left behind by a process that opens, runs, inspects or compiles a bundle."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import edge_backbones
from edge_backbones.testing import make_bundle

ROOT = Path(__file__).parents[2]
PACKAGE = Path(edge_backbones.__file__).parent

# Python tells its hooks of every look-up, connection, new process and file that is opened for writing.
WATCH = """
import json, os, sys
seen = []
NAMES = ("socket.", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.exec", "subprocess.Popen", "os.mkdir")
def watch(event, arguments):
    if event.startswith(NAMES):
        seen.append(f"{event} {arguments}")
    elif event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        seen.append(f"write {arguments[0]}")
sys.addaudithook(watch)
"""
SAY = "\nsys.stdout.flush(); os.write(3, json.dumps(seen).encode())"


def run(code: str, *arguments: object, home: Path, folder: Path) -> list[str]:
    """What a script did, in a home that is empty and that it may write to."""
    home.mkdir(exist_ok=True)
    kept = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV")
    environment = {name: os.environ[name] for name in kept if name in os.environ}  # no CI, no switch of telemetry
    environment |= {"HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    reader, writer = os.pipe()
    script = WATCH + code + SAY.replace("3,", f"{writer},")
    whole = [sys.executable, "-c", script, *map(str, arguments)]
    with os.fdopen(reader, "rb") as answer:
        done = subprocess.run(
            whole,
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment,
            pass_fds=[writer],
            timeout=120,
            check=False,
        )
        os.close(writer)
        assert done.returncode == 0, done.stderr
        return json.loads(answer.read())


def command(*arguments: str) -> str:
    return f"""
from edge_backbones.cli.main import app
arguments = [argument.replace("BUNDLE", sys.argv[1]) for argument in {arguments!r}]
assert not app(arguments, standalone_mode=False)
"""


OPEN = """
import numpy as np
from edge_backbones import EdgeBackbone
with EdgeBackbone.from_pretrained(sys.argv[1]) as backbone:
    backbone(np.zeros(backbone.input.opt_shape, np.float32))
"""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="file descriptors are not passed on there")


@pytest.fixture
def path(tmp_path) -> Path:
    return make_bundle(tmp_path / "pool.bundle").path


@pytest.mark.parametrize(
    "code",
    [
        "import edge_backbones",
        OPEN,
        command("inspect", "BUNDLE"),
        command("verify", "BUNDLE", "--in-process"),
        command("doctor", "BUNDLE"),
    ],
    ids=["import", "open and call", "inspect", "verify", "doctor"],
)
def test_nothing_is_sent_or_written(path, tmp_path, code):
    folder, home = tmp_path / "here", tmp_path / "home"
    folder.mkdir()
    # torch, where doctor or a library imports it, looks for CUDA with ldconfig; what was measured is noted in the cache
    events = [event for event in run(code, path, home=home, folder=folder) if "ldconfig" not in event]
    assert [event for event in events if f"{home / '.cache'}" not in event] == []
    assert list(folder.iterdir()) == []
    written = {file.relative_to(home).parent.as_posix() for file in home.rglob("*") if file.is_file()}
    assert written == ({".cache/edge_backbones/measured"} if "verify" in code else set())


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_the_kernel_sees_no_socket_either(path, tmp_path):
    """Libraries in C++ tell no hook of Python."""
    log = tmp_path / "log"
    trace = ["strace", "-f", "-qq", "-o", str(log), "-e", "trace=socket,connect,sendto,fork,vfork,execve"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*trace, sys.executable, "-c", "import sys" + OPEN, path],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if "ptrace" in done.stderr:
        pytest.skip("this system lets nobody trace")
    assert done.returncode == 0, done.stderr
    calls = [line.split(None, 1)[1] for line in log.read_text().splitlines()]
    assert [call for call in calls if not call.startswith("execve") and "exited" not in call] == []
    assert len([call for call in calls if call.startswith("execve")]) == 1


BOTH = """
import openvino_telemetry
{first}
from edge_backbones.engines.openvino.session import load_library
load_library()
import openvino.tools.ovc.telemetry_utils as used
assert used.tm.__name__ == "openvino.tools.ovc.telemetry_stub", used.tm
assert sys.modules["openvino_telemetry"] is openvino_telemetry
"""


def test_a_program_that_uses_the_telemetry_of_openvino_itself_keeps_it(tmp_path):
    """Whether it was imported before or is imported later: it is what the program would have had."""
    before = BOTH.replace("{first}", "")
    later = """
from edge_backbones.engines.openvino.session import load_library
load_library()
assert "openvino_telemetry" not in sys.modules
import openvino_telemetry
from openvino_telemetry.main import Telemetry
assert openvino_telemetry.Telemetry is Telemetry
"""
    for code in (before, later):
        assert run(code, home=tmp_path / "home", folder=tmp_path) == []


def test_threads_that_load_openvino_at_once_leave_nothing_hidden(tmp_path):
    code = """
import threading
from edge_backbones.engines.openvino import session as openvino
threads = [threading.Thread(target=openvino.load_library) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert "openvino_telemetry" not in sys.modules
import openvino_telemetry
"""
    assert run(code, home=tmp_path / "home", folder=tmp_path) == []


def test_a_failed_import_of_openvino_hides_nothing():
    from edge_backbones.engines.openvino import session as openvino

    before = sys.modules.get("openvino_telemetry", "nothing")
    with pytest.raises(ZeroDivisionError), openvino._without_telemetry():
        assert sys.modules["openvino_telemetry"] is None
        raise ZeroDivisionError
    assert sys.modules.get("openvino_telemetry", "nothing") is before


IMPORTERS = {
    "openvino": {"engines/openvino/session.py", "bench/nncf_graph.py"},
    "onnxruntime": {"engines/onnxruntime/library.py"},
}


def test_libraries_that_report_are_imported_in_one_place_each():
    found: dict[str, set[str]] = {library: set() for library in IMPORTERS}
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for_checkers = {
            child
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            for child in ast.walk(node)
        }
        for node in ast.walk(tree):
            if node in for_checkers:
                continue
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
                names += [str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)]
            for name in names:
                if name.partition(".")[0] in found:
                    found[name.partition(".")[0]].add(file.relative_to(PACKAGE).as_posix())
    assert found == IMPORTERS
