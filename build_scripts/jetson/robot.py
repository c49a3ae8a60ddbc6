"""An application on a robot, to start from: frames in, feature maps out, new engines without a restart.

::

    python robot.py /bundles/net.bundle --device cuda

SIGHUP takes up what the bundle holds now, after `edge-backbones compile` has added an engine, say. A process of its own
verifies it first: it reads every file, runs the engine on the golden samples and compares every feature map. Frames go on
meanwhile. Whatever becomes of that process, a crash inside an engine library too, the engine in use goes on and one line says
why. SIGTERM ends after the frame at hand.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from edge_backbones import EdgeBackbone, verify_bundle
from edge_backbones.errors import EdgeBackbonesError


def frames(backbone: EdgeBackbone) -> Iterator[np.ndarray]:
    """The camera: here noise that the bundle takes, about 30 times a second. Put yours in its place."""
    rng, input = np.random.default_rng(0), backbone.input
    frame = rng.integers(0, 256, input.opt_shape, dtype=np.uint8)
    while True:
        time.sleep(1 / 30)
        yield frame if input.dtype == "uint8" else (frame / np.float32(255)).astype(np.float32)


class RefusedError(Exception):
    """A new bundle cannot take the place of the one in use."""


@dataclass
class Check:
    """A process that verifies the bundle, while this one goes on with the engine in use.

    An engine library parses what a stranger may have written. If it crashes, hangs or takes all memory, then in there.
    """

    process: subprocess.Popen[bytes]
    output: IO[bytes]
    patience: float
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def start(cls, bundle: str, device: str, patience: float) -> Check:
        output = tempfile.TemporaryFile()  # noqa: SIM115  # a pipe could be filled by a talkative library
        command = [sys.executable, __file__, bundle, "--device", device, "--verify"]
        # In a session of its own: Ctrl-C would reach it from the terminal as well.
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        return cls(process, output, patience)

    def result(self) -> str | None:
        """The name of the engine that passed, or None while the process works. Raises RefusedError. Call it until either."""
        code = self.process.poll()
        if code is None and time.monotonic() - self.began < self.patience:
            return None
        self.output.seek(max(0, self.output.seek(0, os.SEEK_END) - 4096))
        lines = self.output.read().decode(errors="replace").strip().splitlines() or ["it gave no reason"]
        self.end()
        if code is None:
            raise RefusedError(f"verifying the new bundle took longer than {self.patience:g} s (--patience)")
        if code < 0:
            name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
            raise RefusedError(f"verifying the new bundle ended in {name}")
        if code > 0:
            raise RefusedError(lines[-1])
        return lines[-1]

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.output.close()


def verify(bundle: str, device: str) -> str:
    """Measure the engine that this machine would take, on the golden samples; return its name."""
    with contextlib.suppress(OSError):  # if memory runs out, the kernel ends this process and not the robot
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    with contextlib.suppress(OSError):
        os.nice(10)  # frames come first
    with EdgeBackbone.from_pretrained(bundle, device=device) as backbone:
        engine = backbone.engine
    verify_bundle(bundle, engine=engine)
    return engine


def take_up(bundle: str, device: str, engine: str, old: EdgeBackbone, frame: np.ndarray) -> EdgeBackbone:
    """Open an engine that was verified, and run it once. Raises RefusedError when its stages are not those of ``old``."""
    new = EdgeBackbone.from_pretrained(bundle, device=device, engine=engine)
    try:
        for what in ("out_features", "channels", "strides"):
            before, now = getattr(old, what), getattr(new, what)
            if before != now:
                raise RefusedError(
                    f"the {what} of the new bundle are {now}, and this application works with {before}: restart it to change"
                )
        new(frame)  # refuses another size or dtype
    except BaseException:
        new.close()
        raise
    return new


def one_line(error: BaseException | str) -> str:
    """The text of an error for a log: one line, without characters that steer a terminal."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)[:1000]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two lines about the latency")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds that verifying a new bundle may take")
    parser.add_argument("--verify", action="store_true", help="verify the bundle, say which engine would run, and end")
    given = parser.parse_args()
    try:
        if given.verify:
            print(verify(given.bundle, given.device), flush=True)
        else:
            serve(given.bundle, given.device, given.every, given.patience)
    except (EdgeBackbonesError, OSError, MemoryError) as error:
        sys.exit(one_line(error))


def serve(bundle: str, device: str, every: float, patience: float) -> None:
    """Run frame after frame, until SIGTERM or Ctrl-C."""
    asked: set[str] = set()
    signal.signal(signal.SIGTERM, lambda *_: asked.add("end"))
    signal.signal(signal.SIGINT, lambda *_: asked.add("end"))
    signal.signal(signal.SIGHUP, lambda *_: asked.add("open"))

    backbone = EdgeBackbone.from_pretrained(bundle, device=device)
    print(f"{backbone.engine}: {', '.join(backbone.out_features)}", flush=True)
    check: Check | None = None
    milliseconds: list[float] = []
    told = time.monotonic()
    for frame in frames(backbone):
        begin = time.perf_counter()
        backbone(frame).feature_maps  # noqa: B018  # what drives the robot goes here
        milliseconds.append(1e3 * (time.perf_counter() - begin))
        if time.monotonic() - told > every:
            median, p99 = np.percentile(milliseconds, (50, 99))
            print(f"{len(milliseconds)} frames: median {median:.2f} ms, p99 {p99:.2f} ms", flush=True)
            milliseconds, told = [], time.monotonic()
        if "end" in asked:
            break
        try:
            if check is None and "open" in asked:
                asked.remove("open")
                check = Check.start(bundle, device, patience)
            engine = None if check is None else check.result()
            if engine is not None:
                check = None
                old, backbone = backbone, take_up(bundle, device, engine, backbone, frame)
                old.close()
                print(f"changed to {engine}", flush=True)
        except Exception as error:  # whatever the new bundle is, the robot goes on
            check = None
            print(f"serving on with the engine in use: {one_line(error)}", flush=True)
    if check is not None:
        check.end()
    backbone.close()


if __name__ == "__main__":
    main()
