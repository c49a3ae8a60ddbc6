"""Engines in the workers of torch's DataLoader, and TorchScript in forked children. Each case is a script of its own, which
is killed if it hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from edge_backbones.testing import make_bundle

ROOT = Path(__file__).parents[2]

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def run(folder: Path, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(code), encoding="utf-8")
    return subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )


LOADER = """
    import sys
    import numpy as np
    import torch
    from torch.utils.data import DataLoader, Dataset
    from edge_backbones import EdgeBackbone
    from edge_backbones.testing import pooled

    class Features(Dataset):
        def __init__(self, backbone):
            self.backbone = backbone

        def __len__(self):
            return 8

        def __getitem__(self, index):
            image = np.full((1, 3, 32, 48), index, np.float32)
            return torch.from_numpy(self.backbone(image).feature_maps[0][0])

    def main(path, context):
        backbone = EdgeBackbone.from_pretrained(path)
        backbone(np.zeros((2, 3, 32, 48), np.float32))
        loader = DataLoader(Features(backbone), batch_size=4, num_workers=2, multiprocessing_context=context)
        for maps in loader:
            print([float(m[0, 0, 0]) for m in maps])

    if __name__ == "__main__":
        main(*sys.argv[1:])
"""


@needs_fork
def test_a_loader_whose_workers_are_forked_is_refused(tmp_path):
    path = make_bundle(tmp_path / "b.bundle").path
    done = run(tmp_path, LOADER, path, "fork")
    assert done.returncode == 1
    assert done.stdout == ""
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith(
            "edge_backbones.errors.InferenceError: OpenVINO was started in the process that this one was forked from"
        )
    )
    assert "Caught InferenceError in DataLoader worker process 0" in done.stderr


def test_a_loader_whose_workers_are_spawned_runs_an_engine_in_each(tmp_path):
    path = make_bundle(tmp_path / "b.bundle").path
    done = run(tmp_path, LOADER, path, "spawn")
    assert done.stdout == "[0.0, 1.0, 2.0, 3.0]\n[4.0, 5.0, 6.0, 7.0]\n", done.stderr


@needs_fork
def test_torchscript_in_a_forked_child_is_refused(tmp_path):
    """OpenMP's threads are not copied: torch would wait for them in the first convolution."""
    done = run(
        tmp_path,
        """
        import io, os, sys, warnings
        import numpy as np
        import torch
        from edge_backbones.engines.torch.session import TorchScriptSession
        from edge_backbones.testing import pooling_input

        warnings.simplefilter("ignore")
        torch.set_num_threads(2)
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.Conv2d(64, 64, 3)).eval()
        image, file = np.ones((2, 3, 32, 48), np.float32), io.BytesIO()
        torch.jit.save(torch.jit.trace(network, torch.from_numpy(image)), file)

        def open_session():
            return TorchScriptSession(file.getvalue(), input=pooling_input(), outputs=["out"])

        session = open_session()
        before = session.run(image)[0]
        child = os.fork()
        if child == 0:
            for attempt in (lambda: session.run(image), open_session):
                try:
                    attempt()
                except Exception as error:
                    print(type(error).__name__, error)
            session.close()
            session = None
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        np.testing.assert_allclose(session.run(image)[0], before, rtol=1e-5)
        """,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(
        line.startswith("InferenceError torch was started in the process that this one was forked") for line in lines
    )


@pytest.mark.parametrize("ending", ["pass", "sys.exit(0)"])
def test_a_process_ends_while_threads_run_torchscript(tmp_path, ending):
    """A thread that comes back from C++ when Python is gone would end it with SIGABRT."""
    done = run(
        tmp_path,
        f"""
        import io, sys, threading, warnings
        import numpy as np
        import torch
        from edge_backbones import EdgeBackbonesError
        from edge_backbones.engines.torch.session import TorchScriptSession
        from edge_backbones.spec import InputSpec, ShapeRange

        one = ShapeRange.fixed
        spec = InputSpec(name="pixel_values", channels=3, batch=one(4), height=one(256), width=one(256))
        images = np.ones((4, 3, 256, 256), np.float32)
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.save(torch.jit.trace(torch.nn.Conv2d(3, 16, 5), torch.from_numpy(images)), file)
        session = TorchScriptSession(file.getvalue(), input=spec, outputs=["map"])
        begun = threading.Barrier(4)

        def work():
            session.run(images)
            begun.wait()
            try:
                while True:
                    session.run(images)
            except EdgeBackbonesError:
                pass

        for _ in range(3):
            threading.Thread(target=work, daemon=True).start()
        begun.wait()
        {ending}
        """,
    )
    assert (done.returncode, done.stderr) == (0, "")
