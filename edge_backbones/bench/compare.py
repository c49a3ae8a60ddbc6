"""Time a bundle's engine against other libraries. Each contender has its own process, and they take turns.

A machine's speed changes within minutes. Ratios are therefore computed within a turn, where contenders ran seconds apart.
While one contender runs, the others are stopped with SIGSTOP, because thread pools that spin while they wait would take
cores from it. On a virtual machine the kernel counts the time that other guests took ("stolen" time); turns with more of it
than usual are left out.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from edge_backbones import cpus
from edge_backbones.bench import energy
from edge_backbones.bench.contender import Calls, Failed, Start, Task, Turn, load_network
from edge_backbones.bench.peers import (
    ON_CPU,
    PEERS,
    RUN_GRAPHS,
    is_engine,
    library_of,
    python_of,
    require_installed,
    what,
)
from edge_backbones.bench.results import FEWEST_TURNS, Comparison, MeasuredMachine, Measurement, ratio_of
from edge_backbones.bundle import trust
from edge_backbones.bundle.golden import full_batches
from edge_backbones.bundle.reader import Bundle, load_golden
from edge_backbones.engines import select
from edge_backbones.errors import EdgeBackbonesError, InferenceError, InputError, needing
from edge_backbones.images.decode import list_images, open_image
from edge_backbones.images.fit import image_to_input
from edge_backbones.machine import gpus, hosts
from edge_backbones.machine.devices import parse_device
from edge_backbones.machine.system import settings
from edge_backbones.option import Option, documented
from edge_backbones.progress import Progress, no_progress
from edge_backbones.spec import Precision

# Without SIGSTOP (Windows, macOS) the others block in a read, but their thread pools may go on spinning.
_STOPS = hasattr(os, "waitid")
_CALM = 0.02  # the largest share of stolen time in a turn that counts
_Answer = TypeVar("_Answer", bound=msgspec.Struct)


@documented
@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Say what is compared, and for how long.

    Raises:
        InputError: An option is out of range, or a peer does not run on this device.
    """

    engine: Annotated[
        str | None,
        Option("The engine, as for `EdgeBackbone.from_pretrained`.", has_flag=False),
    ] = None
    vs: Annotated[
        tuple[str, ...],
        Option(
            "What to compare with, each in a process of its own: torch, torch-compile, torchscript, onnxruntime; on the CPU "
            "openvino and nncf, in the number format that OpenVINO chooses, and openvino-f32 and nncf-f32, in fp32. A "
            "precision (bf16) means an engine of the bundle. By default torch,onnxruntime,openvino,openvino-f32.",
            group="Peers",
        ),
    ] = ("torch", "onnxruntime", "openvino", "openvino-f32")
    device: Annotated[
        str,
        Option("Where all of them run: cpu, cuda or cuda:1.", has_flag=False),
    ] = "cpu"
    threads: Annotated[
        int,
        Option("CPU threads of each. By default one per CPU that this process may use.", has_flag=False),
    ] = field(default_factory=cpus.usable)
    turns: Annotated[
        int,
        Option("How many turns each takes. From six on, noise can be told from a difference.", group="Timing", least=1),
    ] = 9
    seconds: Annotated[float, Option("How many seconds a turn takes at least.", group="Timing", least=0)] = 1.0
    calls: Annotated[
        int,
        Option("How many calls a turn makes at least.", has_flag=False),
    ] = 10
    images: Annotated[
        np.ndarray | None,
        Option(
            "Inputs that NNCF calibrates on, shape (images, *input). By default the golden samples.", has_flag=False
        ),
    ] = None
    pythons: Annotated[
        Mapping[str, str],
        Option(
            "NAME=PYTHON: the interpreter to run a peer with that is installed in another environment.",
            group="Peers",
        ),
    ] = field(default_factory=dict)
    patience: Annotated[
        float,
        Option("Seconds that a contender has to load, and to end a turn.", has_flag=False),
    ] = 900.0
    repository: Annotated[
        Path | None,
        Option("A git checkout whose commit is recorded.", has_flag=False),
    ] = None
    allow_host_code: Annotated[
        bool,
        Option(
            "Run programs inside the bundle (a TorchScript engine, the peer torchscript) and the code that a plan may carry.",
            has_flag=False,
        ),
    ] = False

    def __post_init__(self) -> None:
        known = (*PEERS, *Precision)
        if not set(self.vs) <= set(known) or len(set(self.vs)) != len(self.vs):
            raise InputError(f"--vs takes {', '.join(known)}, each once; got {', '.join(self.vs)}")
        on_cpu = [name for name in self.vs if name in ON_CPU]
        if parse_device(self.device)[0] == "auto":
            raise InputError("device 'auto' is not for a comparison: name it, as cpu, cuda or cuda:1")
        if self.device != "cpu" and on_cpu:
            raise InputError(f"{' and '.join(on_cpu)} run on the CPU, not on {self.device}: leave them out of --vs")
        runs_elsewhere = {"edge", *self.vs, *map(library_of, self.vs)} - set(Precision)
        if idle := sorted(self.pythons.keys() - runs_elsewhere):
            raise InputError(f"--peer-python {idle[0]} is for a peer, and --vs has {', '.join(self.vs)}: leave it out")
        if self.turns < 1 or self.calls < 1 or self.seconds < 0 or self.threads < 1:
            raise InputError(
                f"turns, calls and threads must be at least 1 and seconds at least 0, got {self.turns}, {self.calls}, "
                f"{self.threads} and {self.seconds}"
            )


def compare(path: str | Path, options: CompareOptions | None = None, *, progress: Progress = no_progress) -> Comparison:
    """Time a bundle's engine and its peers, and return the comparison.

    A peer that is not installed or that fails is in the result with its message. Raises BundleError and EngineMismatchError
    if no engine of the bundle can run here, InferenceError if the engine itself fails.
    """
    options = options or CompareOptions()
    for name, python in options.pythons.items():
        if shutil.which(python) is None:
            raise InputError(f"--peer-python {name}={python}: there is no such program")
    bundle, _ = trust.admit(Bundle.open(path))
    code = options.allow_host_code
    host, place, _ = select.machine_for(bundle, options.device)
    choose = functools.partial(select.choose_engine, bundle, host, device=place, allow_host_code=code)
    engine = choose(select.full_name(bundle, options.engine))
    with tempfile.TemporaryDirectory(prefix="edge-backbones-bench-") as work:
        tasks: dict[str, Task] = {}
        absent: dict[str, Measurement] = {}
        graph: _Graph | None = None
        quantised: Path | None = None
        for name in ("edge", *options.vs):
            try:
                require_installed(name, options.pythons)
                if name in RUN_GRAPHS:
                    graph = graph or _fp32_graph(bundle, Path(work), progress)
                file = graph.file if graph is not None and name in RUN_GRAPHS else None
                if library_of(name) == "nncf":
                    file = quantised = quantised or _nncf_graph(bundle, file, options, Path(work), progress)
                chosen = choose(name) if is_engine(name) else engine
            except EdgeBackbonesError as error:
                absent[name] = Measurement(name=name, what=what(name, name), missing=str(error))
            else:
                tasks[name] = Task(
                    peer="edge" if is_engine(name) else name,
                    bundle=str(bundle.path),
                    engine=chosen.name,
                    threads=options.threads,
                    device=options.device,
                    file=None if file is None else str(file),
                    exact=graph is None or graph.exact,
                    allow_host_code=options.allow_host_code,
                )
        measured = {**absent, **measure(tasks, options, progress=progress)}
    ours = measured["edge"]
    return Comparison(
        bundle=bundle.path.name,
        engine=engine.name,
        precision=engine.key.precision.value,
        input_shape=bundle.manifest.input.opt_shape,
        threads=options.threads,
        device=options.device,
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        machine=this_machine(repository=options.repository),
        measurements=tuple(measured[name] for name in ("edge", *options.vs)),
        ratios=tuple(
            ratio_of(name, measured[name].turns, ours.turns) for name in options.vs if not measured[name].missing
        ),
    )


def measure(
    tasks: Mapping[str, Task], options: CompareOptions, *, progress: Progress = no_progress
) -> dict[str, Measurement]:
    """Time contenders in alternating turns, and return their measurements by name.

    ``options``: only ``turns``, ``seconds``, ``calls``, ``patience`` and ``pythons`` are read. A contender that fails is in
    the result with its message. Raises the error of the first contender: without it there is nothing to compare with.
    """
    first = next(iter(tasks))
    measured: dict[str, Measurement] = {}
    turns: dict[str, list[Calls]] = {}
    with contextlib.ExitStack() as stack:
        contenders: dict[str, _Contender] = {}

        def give_up(name: str, error: EdgeBackbonesError) -> None:
            if name == first:
                raise error
            turns.pop(name, None)
            measured[name] = Measurement(name=name, what=what(name, tasks[name].peer), missing=str(error))

        for name, task in tasks.items():
            progress(f"loading {name}", 0, None)
            try:
                contenders[name] = stack.enter_context(
                    _running(task, python_of(task.peer, options.pythons), options.patience)
                )
                turns[name] = []
            except EdgeBackbonesError as error:
                give_up(name, error)
        turn = Turn(seconds=options.seconds, calls=options.calls)
        for number in range(options.turns):
            progress("measuring", number, options.turns)
            for name in list(turns) if number % 2 == 0 else list(reversed(turns)):
                try:
                    turns[name].append(contenders[name].ask(turn, Calls))
                except InferenceError as error:
                    give_up(name, error)
        progress("measuring", options.turns, options.turns)
    kept = calm_turns([max(turns[name][number].stolen_share for name in turns) for number in range(options.turns)])
    for name, taken in turns.items():
        calm = [taken[number] for number in kept]
        measured[name] = _measurement(name, what(name, tasks[name].peer), contenders[name].start, calm)
    return measured


def read_images(folder: Path, bundle: Bundle, count: int = 64) -> np.ndarray:
    """Return the first ``count`` images of a folder as inputs of a bundle at its opt size, shape (images, *input)."""
    manifest, files = bundle.manifest, list_images(folder)[:count]
    if not files:
        raise InputError(f"{folder} holds no image files")
    input = manifest.input
    return np.stack([image_to_input(open_image(file, input.channels), manifest.image, input) for file in files])


# ---- contenders


class _Contender:
    """The process of one contender. It is stopped between its turns."""

    def __init__(self, process: subprocess.Popen[bytes], log: IO[bytes], name: str, patience: float) -> None:
        self._process = process
        self._log = log
        self._name = name
        self._patience = patience
        self.start: Start

    def ask(self, question: msgspec.Struct, answer: type[_Answer]) -> _Answer:
        """Send a request and return the answer. Raises InferenceError if the process fails, ends or takes too long."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._let_run()
        is_late = threading.Event()

        def give_up() -> None:
            is_late.set()
            self._process.kill()

        timer = threading.Timer(self._patience, give_up)
        timer.daemon = True  # Ctrl-C may arrive before the try statement
        timer.start()
        try:
            self._process.stdin.write(msgspec.json.encode(question) + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        finally:
            timer.cancel()
        if not line:
            code = self._process.wait()
            if is_late.is_set():
                raise InferenceError(f"{self._name} did not answer within {self._patience:g} s: {self._last_words()}")
            raise InferenceError(f"{self._name} ended ({_ending(code)}): {self._last_words()}")
        self._stop()
        with contextlib.suppress(msgspec.ValidationError):
            raise InferenceError(msgspec.json.decode(line, type=Failed).failed)
        return msgspec.json.decode(line, type=answer)

    def _let_run(self) -> None:
        if _STOPS and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)

    def _stop(self) -> None:
        if _STOPS and self._process.poll() is None:
            self._process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # wait until it is stopped

    def end(self) -> None:
        """Kill the process and close its pipes."""
        self._process.kill()  # a stopped process ignores other signals
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


@contextlib.contextmanager
def _running(task: Task, python: str, patience: float) -> Iterator[_Contender]:
    """Start a contender and wait until it has loaded; kill it at the end. Raises InferenceError with its message."""
    command = [python, "-m", "edge_backbones.bench.contender"]
    # Another interpreter must not see our paths: it would import modules that were compiled for this one.
    ours = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)} if python == sys.executable else {}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **ours},
        )
        contender = _Contender(process, log, task.peer, patience)
        try:
            contender.start = contender.ask(task, Start)
            yield contender
        finally:
            contender.end()


class _Graph(NamedTuple):
    file: Path
    exact: bool  # whether it has the weights of the bundle


def _fp32_graph(bundle: Bundle, work: Path, progress: Progress) -> _Graph:
    """Return the bundle's fp32 graph. If it has none, export the network again, with random weights."""
    held = bundle.manifest.onnx_graph(Precision.FP32)
    if held is not None:
        return _Graph(bundle.path / held.file.path, exact=True)
    progress("exporting the network in fp32", 0, None)
    with needing("exporting the network in fp32", "build"):
        from edge_backbones.toolchain.export import export_onnx
        from edge_backbones.toolchain.frame import with_frames
        from edge_backbones.toolchain.prepare import prepare
    loaded, input = load_network(bundle), bundle.manifest.input
    prepared = with_frames(prepare(loaded, input.of_network), bundle.manifest.image, input)
    return _Graph(export_onnx(prepared, work / "fp32.onnx").path, exact=False)


def _nncf_graph(bundle: Bundle, graph: Path | None, options: CompareOptions, work: Path, progress: Progress) -> Path:
    """Quantise an fp32 graph with NNCF, in a process of its own, and return the OpenVINO model."""
    python = options.pythons.get("nncf", sys.executable)
    progress("quantising with NNCF", 0, None)
    input = bundle.manifest.input
    images, batch = options.images, input.batch.opt
    if images is None:
        images = load_golden(bundle).inputs["opt"]
    images = np.concatenate([images[chosen] for chosen in full_batches(len(images), batch)])
    np.savez(work / "images.npz", images=images.reshape(-1, *input.opt_shape))
    out = work / "nncf.xml"
    script = str(Path(__file__).with_name("nncf_graph.py"))
    done = subprocess.run(  # noqa: S603
        [python, script, str(graph), str(work / "images.npz"), str(out)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise InferenceError(f"NNCF failed: {lines[-1] if lines else _ending(done.returncode)}")
    return out


def _ending(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


# ---- turns


def calm_turns(stolen: Sequence[float]) -> list[int]:
    """Return the numbers of the turns that count, in order; ``stolen`` is the share of stolen time in each turn.

    Turns with little stolen time count. At least the calmer half does, and at least `FEWEST_TURNS` if there are as many.
    """
    calmest = sorted(range(len(stolen)), key=lambda number: stolen[number])
    half = (len(stolen) + 1) // 2
    least = half if len(stolen) < FEWEST_TURNS else max(half, FEWEST_TURNS)
    return sorted(number for place, number in enumerate(calmest) if place < least or stolen[number] <= _CALM)


def _measurement(name: str, what: str, start: Start, turns: Sequence[Calls]) -> Measurement:
    calls = np.concatenate([np.array(turn.milliseconds) for turn in turns])
    median = float(np.median(calls))
    p10, p90, p99 = (float(value) for value in np.percentile(calls, (10, 90, 99)))
    joules: Any = [turn.joules for turn in turns]
    return Measurement(
        name=name,
        what=what,
        versions=start.versions,
        turns=tuple(statistics.median(turn.milliseconds) for turn in turns),
        median_ms=median,
        fastest_ms=float(calls.min()),
        p90_ms=p90,
        p99_ms=p99,
        jitter=(p90 - p10) / median,
        calls=len(calls),
        images_per_second=1e3 * start.batch / median,
        load_s=start.load_s,
        first_call_ms=start.first_call_ms,
        resident_mb=start.resident_mb,
        device_mb=start.device_mb,
        file_mb=start.file_mb,
        joules=None if None in joules else sum(joules) / (len(calls) * start.batch),
        worst_cosine=start.worst_cosine,
        worst_sqnr_db=start.worst_sqnr_db,
    )


# ---- the machine, and the settings that decide its speed


def this_machine(*, root: Path = Path("/"), repository: Path | None = None) -> MeasuredMachine:
    """Describe this machine for a result. ``repository``: a git checkout whose commit is recorded."""
    host = hosts.this_host({})
    gpu_clocks: dict[str, str] = {}
    try:
        gpu = next((f"{g.name} ({g.architecture}), driver for CUDA {g.driver}" for g in gpus.find_gpus()), None)
        gpu_clocks = energy.gpu_settings()
    except EdgeBackbonesError as error:
        gpu = str(error)
    return MeasuredMachine(
        name=host.device_name,
        architecture=host.architecture,
        cpu_features=host.cpu_features,
        cores=os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0,
        system=platform.platform(),
        python=platform.python_version(),
        gpu=gpu,
        settings={**settings(root), **gpu_clocks},
        commit=None if repository is None else _commit(repository),
    )


def _commit(repository: Path) -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
