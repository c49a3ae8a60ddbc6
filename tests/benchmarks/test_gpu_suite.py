"""The GPU suite without a GPU: which parts run in which order, what is kept, and what it says where something is missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import gpu_common, gpu_needs, gpu_parts, gpu_processes, gpu_results, gpu_suite, gpu_tasks
from benchmarks.gpu_common import MissingError
from benchmarks.gpu_needs import NOTHING_RUN
from benchmarks.gpu_parts import Bench, Row
from benchmarks.gpu_processes import Child, ChildError, PartFailedError, PartSlowError
from benchmarks.gpu_pytest import TESTS
from benchmarks.gpu_results import DONE, FAILED, NOT_RUN, ROOT, Part, Results
from benchmarks.gpu_targets import targets
from edge_backbones.machine import gpus

NO_DRIVER = "no NVIDIA driver (libcuda.so.1 is missing)"
H100 = gpus.Gpu(0, "NVIDIA H100 80GB HBM3", "sm_90", 85 << 30, "13.0", 132, False)
ORIN = gpus.Gpu(0, "Orin", "sm_87", 8 << 30, "12.6", 8, True)


def row(name, run=lambda bench, seconds: {"x": 1.5}, *, expected=1.0, limit=10.0, **more):
    return Row(name, expected, limit, run, **more)


def results_of(path, gpu=H100, **described):
    return Results(path / "gpu.json", {**gpu_processes.describe_machine(gpu, None), **described})


class Bed:
    """Runs suites of given rows, with their results in one place."""

    def __init__(self, path):
        self.path = path

    def run(self, *rows, gpu=H100, budget=100.0, again=False, **described):
        suite = gpu_suite.Suite(
            gpu=gpu,
            reason="",
            results=results_of(self.path, gpu, **described),
            bench_of=lambda found: Bench(found, self.path / "bundles", "code"),
            budget=budget,
            again=again,
        )
        self.code = suite.run(rows)
        return suite.parts

    def document(self):
        return json.loads((self.path / "gpu.json").read_text(encoding="utf-8"))


@pytest.fixture
def bed(tmp_path):
    return Bed(tmp_path)


def states(parts):
    return [(part.name, part.state) for part in parts]


# ---- a machine without a GPU


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(gpus, "no_gpu_reason", lambda: NO_DRIVER)


def test_every_part_is_listed_as_not_run(no_gpu, tmp_path, capsys):
    out = tmp_path / "here.json"
    assert gpu_suite.main(["--out", str(out)]) == NOTHING_RUN
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["device"] is None
    assert document["driver"] is None
    assert document["python"].startswith("3.")
    assert "numpy" in document["versions"]
    assert {"system", "code", "commit", "uncommitted_changes", "date"} <= document.keys()
    assert {part["state"] for part in document["parts"]} == {NOT_RUN}
    assert {part["reason"] for part in document["parts"]} == {NO_DRIVER}
    assert [part["name"] for part in document["parts"]] == [row.name for row in gpu_parts.rows()]
    assert capsys.readouterr().out == f"not run: {NO_DRIVER}\n"


def test_nothing_is_written_where_no_gpu_gives_a_name(no_gpu, capsys):
    folder = ROOT / "benchmarks" / "results"
    before = sorted(folder.iterdir())
    assert gpu_suite.main([]) == NOTHING_RUN
    assert sorted(folder.iterdir()) == before
    assert capsys.readouterr().out.count("\n") == 1


def test_a_gpu_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setattr(gpus, "no_gpu_reason", lambda: "")
    monkeypatch.setattr(gpus, "find_gpus", lambda: (H100,))
    out = tmp_path / "here.json"
    assert gpu_suite.main(["--device", "3", "--out", str(out)]) == NOTHING_RUN
    assert "there is no cuda:3, 1 GPUs are visible" in out.read_text(encoding="utf-8")


# ---- a machine that lacks libraries


@pytest.mark.parametrize("lacking", [("msgspec",), ("numpy",), ("numpy", "msgspec")])
@pytest.mark.parametrize(
    ("module", "arguments"),
    [("gpu_suite", []), ("gpu_suite", ["--only", "memory"]), ("gpu_tasks", ["ceilings", "{}"])],
)
def test_a_machine_without_numpy_or_msgspec_is_told_in_one_line(module, arguments, lacking):
    hidden = "; ".join(f"sys.modules[{name!r}] = None" for name in lacking)
    code = (
        f"import runpy, sys; {hidden}; "
        f"sys.argv[1:] = {arguments!r}; runpy.run_module('benchmarks.{module}', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == NOTHING_RUN, done.stderr
    verb = "is" if len(lacking) == 1 else "are"
    names = f"not run: {' and '.join(lacking)} {verb} missing: {sys.executable} -m pip install {' '.join(lacking)}"
    assert done.stdout.startswith(names)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


def test_what_is_missing_is_looked_for_without_an_import(monkeypatch):
    assert gpu_needs.what_is_missing() == ""
    assert gpu_needs.is_installed("json.decoder")
    assert not gpu_needs.is_installed("no_such_package.module")
    monkeypatch.setitem(sys.modules, "msgspec", None)
    assert not gpu_needs.is_installed("msgspec")


@pytest.mark.parametrize("cuda", ["13.0", None])
def test_a_torch_without_cuda_is_told_from_one_that_has_it(monkeypatch, tmp_path, cuda):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('it is not to be imported')", encoding="utf-8")
    text = f"__version__ = '2.11.0'\ncuda = {cuda!r}\n"
    (tmp_path / "torch" / "version.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    gpu_common.why_no_torch.cache_clear()
    try:
        assert gpu_common.why_no_torch() == ("" if cuda else "torch 2.11.0 was built without CUDA")
    finally:
        gpu_common.why_no_torch.cache_clear()


def test_what_cannot_run_is_known_before_anything_starts(monkeypatch, tmp_path):
    """A bare machine: no torch, no TensorRT, no cupy. The tests and the stand-in engine are left."""
    monkeypatch.setattr(gpu_parts, "why_no_torch", lambda: "torch is not installed")
    monkeypatch.setattr(gpu_parts, "is_installed", lambda name: False)

    def require_tensorrt(flavour):
        raise MissingError(f"{flavour} is not installed")

    monkeypatch.setattr(gpu_parts, "require_tensorrt", require_tensorrt)
    bench = Bench(H100, tmp_path, "code")
    can = [row.name for row in gpu_parts.rows() if not row.against(bench)]
    assert can == ["memory", "engines", "ceilings", "overhead-stand-in", "processes"]


def test_a_gpu_that_tensorrt_rtx_refuses(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_parts, "require_tensorrt", lambda flavour: None)
    answer = {
        "version": "1.7",
        "accepted": False,
        "diagnostics_names": ["UNSUPPORTED_CC"],
        "deserialise_log": "no sm_90",
    }
    assert gpu_tasks.rtx_refusal(answer) == "TensorRT-RTX 1.7 refuses this GPU (UNSUPPORTED_CC): no sm_90"
    assert gpu_tasks.rtx_refusal({**answer, "accepted": True}) == ""
    assert gpu_tasks.rtx_refusal({**answer, "diagnostics_names": ["MALFORMED_ENGINE"]}) == ""
    bench = Bench(H100, tmp_path, "code", {"rtx-answer": Part("rtx-answer", DONE, figures=answer)})
    against = {row.name: row.against(bench) for row in gpu_parts.rows()}
    assert "refuses this GPU" in against["overhead-tensorrt_rtx"]
    assert "refuses this GPU" in against["plan-tensorrt_rtx-resnet50-fp16"]
    assert against["overhead-tensorrt"] == against["rtx-answer"] == ""
    assert "resnet50-fp16.bundle is not in" in against["plan-tensorrt-resnet50-fp16"]
    old = Bench(gpus.Gpu(0, "T4", "sm_75", 16 << 30, "13.0", 40, False), tmp_path, "code")
    rows = {row.name: row for row in gpu_parts.rows()}
    assert rows["plan-tensorrt-resnet50-fp8"].against(old) == "sm_75 has no fp8, which came with sm_89"


# ---- the budget


def test_a_part_that_does_not_fit_is_passed_over_and_a_smaller_one_runs(bed):
    parts = bed.run(
        row("long", lambda bench, seconds: pytest.fail("it began"), expected=60.0),
        row("short", expected=20.0),
        budget=50.0,
    )
    assert states(parts) == [("long", NOT_RUN), ("short", DONE)]
    assert parts[0].reason == "it takes about 60 s, and 50 s of 50 s are left"
    assert bed.code == 0


def test_a_jetson_gets_more_time(bed, monkeypatch, tmp_path):
    given = []

    def run(bench, seconds):
        given.append(seconds)
        return {}

    bed.run(row("part", run), gpu=H100)
    bed.run(row("part", run), gpu=ORIN)
    assert given == [10.0, 40.0]
    assert states(bed.run(row("another", run, expected=30.0), gpu=ORIN)) == [("another", NOT_RUN)]  # 120 s do not fit
    monkeypatch.setattr(gpus, "no_gpu_reason", lambda: "")
    budgets = []
    monkeypatch.setattr(gpu_suite.Suite, "run", lambda self, rows: budgets.append(self.budget) or 0)
    before = signal.getsignal(signal.SIGTERM)
    try:
        for gpu in (H100, ORIN):
            monkeypatch.setattr(gpus, "find_gpus", lambda gpu=gpu: (gpu,))
            gpu_suite.main(["--out", str(tmp_path / "out.json")])
            gpu_suite.main(["--out", str(tmp_path / "out.json"), "--budget", "70"])  # what was said counts
    finally:
        signal.signal(signal.SIGTERM, before)
    assert budgets == [900, 70, 3600, 70]


def test_a_part_gets_its_limit_or_what_is_left(bed):
    given = []

    def run(bench, seconds):
        given.append(seconds)
        return {}

    bed.run(row("first", run, limit=30.0), row("second", run, limit=300.0), budget=100.0)
    assert given[0] == 30.0
    assert 99 < given[1] < 100


# ---- parts that go wrong


def test_parts_and_exit_codes(bed, capsys):
    def lacks(bench, seconds):
        raise MissingError("onnx is not installed")

    def fails(bench, seconds):
        raise ChildError("its process ended with -11")

    def breaks(bench, seconds):
        return {"x": 1 // 0}

    def half(bench, seconds):
        raise PartFailedError("one of two", {"x": 2})

    parts = bed.run(row("works"), row("lacks", lacks))
    assert states(parts) == [("works", DONE), ("lacks", NOT_RUN)]
    assert bed.code == 0
    assert bed.document()["parts"][0]["figures"] == {"x": 1.5}
    assert bed.document()["parts"][1]["reason"] == "onnx is not installed"
    assert bed.document()["device"]["architecture"] == "sm_90"
    parts = bed.run(row("fails", fails), row("breaks", breaks), row("half", half), row("works"))
    assert [part.state for part in parts] == [FAILED, FAILED, FAILED, DONE]
    assert [part.reason for part in parts[:3]] == [
        "its process ended with -11",
        "ZeroDivisionError: integer division or modulo by zero",
        "one of two",
    ]
    assert parts[2].figures == {"x": 2}
    assert bed.code == 1
    said = capsys.readouterr()
    assert "ZeroDivisionError" in said.err  # with its traceback, for the log
    table = [line.split() for line in said.out.splitlines() if line.startswith("half ")]
    assert table == [["half", "failed", "0.0", "one", "of", "two"]]
    bed.run(row("lacks", lacks))
    assert bed.code == NOTHING_RUN


def test_a_part_that_hangs_is_ended_and_what_it_had_is_kept(bed, monkeypatch):
    """A real process, with a child of its own."""
    code = "import json, time; print(json.dumps({'copy': 4300}), flush=True); time.sleep(600)"
    monkeypatch.setattr(gpu_processes, "command_of", lambda task, arguments: [sys.executable, "-c", code])
    start = time.monotonic()
    ceilings = row("ceilings", lambda bench, seconds: bench.ask("ceilings", seconds), limit=4.0)
    parts = bed.run(ceilings, row("next"))
    assert time.monotonic() - start < 60
    assert states(parts) == [("ceilings", FAILED), ("next", DONE)]
    assert parts[0].reason.startswith("ended after 4 s")
    assert parts[0].figures == {"copy": 4300}
    stored = json.loads((bed.path / "gpu" / "ceilings.json").read_text(encoding="utf-8"))
    assert stored["part"]["figures"] == {"copy": 4300}


def test_a_part_that_the_budget_ends_did_not_fail(bed):
    def slow(bench, seconds):
        raise PartSlowError("ended after 5 s in test_x", {"passed": 3})

    parts = bed.run(row("engines", slow, limit=500.0), budget=50.0)
    assert states(parts) == [("engines", NOT_RUN)]
    assert parts[0].reason == "the 50 s were over: ended after 5 s in test_x"
    assert parts[0].figures == {"passed": 3}
    assert bed.document()["parts"][0]["figures"] == {"passed": 3}
    assert not (bed.path / "gpu" / "engines.json").exists()


def test_a_process_that_dies_fails_its_part(bed, monkeypatch):
    code = "import os, sys; print('the driver said so', file=sys.stderr, flush=True); os.abort()"
    monkeypatch.setattr(gpu_processes, "command_of", lambda task, arguments: [sys.executable, "-c", code])
    (part,) = bed.run(row("ceilings", lambda bench, seconds: bench.ask("ceilings", seconds)))
    assert (part.state, part.reason) == (FAILED, f"the process ended with {-signal.SIGABRT}: the driver said so")


def test_an_interrupted_suite_ends_its_children_and_keeps_what_is_done(bed, monkeypatch):
    """A SIGTERM, as a machine that goes away sends it, while a part runs in a process."""
    held = []

    class Watched(Child):
        def read(self, seconds):
            held.append(self._process)
            os.kill(os.getpid(), signal.SIGTERM)
            return super().read(seconds)

    monkeypatch.setattr(gpu_parts, "Child", Watched)
    monkeypatch.setattr(
        gpu_processes, "command_of", lambda task, arguments: [sys.executable, "-c", "import time; time.sleep(600)"]
    )
    before = signal.signal(signal.SIGTERM, gpu_suite._interrupt)
    try:
        parts = bed.run(row("first"), row("second", lambda bench, seconds: bench.ask("any", 60)), row("third"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [process.returncode for process in held] == [-signal.SIGKILL]
    assert states(parts) == [("first", DONE), ("second", NOT_RUN), ("third", NOT_RUN)]
    assert bed.code == 130
    assert (bed.path / "gpu" / "first.json").exists()


# ---- going on where it stopped


def test_what_is_done_is_not_run_again(bed):
    ran = []

    def run(bench, seconds):
        ran.append(bench.gpu.name)
        return {"x": len(ran)}

    part = row("ceilings", run)
    assert bed.run(part)[0].figures == {"x": 1}
    (again,) = bed.run(part)
    assert (again.state, again.reason, again.figures) == (DONE, "in an earlier run", {"x": 1})
    assert bed.code == 0
    assert bed.document()["parts"][0]["figures"] == {"x": 1}
    assert bed.run(part, again=True)[0].figures == {"x": 2}
    assert bed.run(part, code="another")[0].figures == {"x": 3}
    assert bed.run(part, code="another", date="another", commit="another")[0].figures == {"x": 3}
    assert bed.run(part, versions={"torch": "3"})[0].figures == {"x": 4}
    assert bed.run(part, gpu=ORIN)[0].figures == {"x": 5}
    assert bed.run(part, gpu=ORIN, budget=0.0)[0].state == DONE  # nor does it take time


def test_another_card_of_the_same_model_does_as_well(bed):
    bed.run(row("ceilings"))
    other = gpus.Gpu(**{**vars(H100), "bus_address": "0000:3b:00.0"})
    assert bed.run(row("ceilings", lambda bench, seconds: pytest.fail("it ran")), gpu=other)[0].state == DONE


def test_what_failed_or_is_gone_is_run_again(bed):
    def fails(bench, seconds):
        raise PartFailedError("no")

    bed.run(row("part", fails))
    assert states(bed.run(row("part"))) == [("part", DONE)]
    made = bed.path / "plan"
    plan = row("plan", made=lambda bench: made)
    made.mkdir()
    bed.run(plan)
    made.rmdir()
    (part,) = bed.run(row("plan", lambda bench, seconds: {"again": 1}, made=lambda bench: made))
    assert part.figures == {"again": 1}
    (bed.path / "gpu" / "part.json").write_text('{"part": {"name"', encoding="utf-8")  # half a file
    assert bed.run(row("part", lambda bench, seconds: {"again": 2}))[0].figures == {"again": 2}
    (bed.path / "gpu" / "part.json").write_text("[1]", encoding="utf-8")
    assert bed.run(row("part", lambda bench, seconds: {"again": 3}))[0].figures == {"again": 3}


def test_the_revision_is_that_of_the_code(tmp_path):
    for folder in ("edge_backbones/engines", "benchmarks", "tests/gpu"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "benchmarks" / "one.py").write_text("a = 1\n", encoding="utf-8")
    first = gpu_results.code_revision(tmp_path)
    (tmp_path / "benchmarks" / "results.json").write_text("{}", encoding="utf-8")
    assert gpu_results.code_revision(tmp_path) == first
    (tmp_path / "edge_backbones" / "engines" / "two.py").write_text("b = 1\n", encoding="utf-8")
    assert gpu_results.code_revision(tmp_path) != first
    assert gpu_results.code_revision() == gpu_results.code_revision()


def test_the_name_of_the_document(monkeypatch, capsys):
    assert gpu_results.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert gpu_results.slug("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090"


# ---- which parts there are


def test_parts_are_chosen_by_the_beginning_of_their_names(capsys):
    names = [row.name for row in gpu_parts.chosen_rows(["contend-resnet50", "memory"])]
    assert names == ["memory", "contend-resnet50-1", "contend-resnet50-32"]  # in order of worth
    assert len(gpu_parts.chosen_rows([])) == len(gpu_parts.rows())
    with pytest.raises(SystemExit):
        gpu_suite.main(["--only", "memmory"])
    assert "there is no part 'memmory'; there are memory, arrays, engines" in capsys.readouterr().err
    assert gpu_suite.main(["--list", "--only", "roofline"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["roofline", "roofline-engines"]


def test_the_parts_that_need_no_tensorrt_fit_the_budget():
    table = gpu_parts.rows()
    names = [row.name for row in table]
    assert len(set(names)) == len(names)
    assert all(0 < row.expected < row.limit for row in table)
    first = table[: names.index("rtx-answer") + 1]
    assert sum(row.expected for row in first) <= gpu_suite.BUDGET
    files = {path.stem.removeprefix("test_gpu_") for path in TESTS.glob("test_*.py")}
    assert files - {"parity"} <= set(names)
    assert {"parity-torchscript", "parity-plans"} <= set(names)


def test_preparing_stops_afterwards(monkeypatch, tmp_path):
    from benchmarks import gpu_prepare

    made = []
    monkeypatch.setattr(gpu_prepare, "prepare", made.append)
    assert gpu_suite.main(["--prepare", str(tmp_path)]) == 0
    assert made == [tmp_path]


def test_graphs_are_made_in_a_process_whole_or_not_at_all(monkeypatch, tmp_path):
    bench = Bench(H100, tmp_path / "bundles", "code")
    outcomes = {"code": 0}

    def run_command(command, seconds, environment):
        folder = next(path for path in map(gpu_parts.Path, command) if path.parent == tmp_path)
        (folder / "one.bundle").mkdir(parents=True)
        return outcomes["code"], "some words\n"

    monkeypatch.setattr(gpu_parts, "run_command", run_command)
    for code, error in ((None, PartSlowError), (1, PartFailedError)):
        outcomes["code"] = code
        with pytest.raises(error, match="some words"):
            gpu_parts._prepare(bench, 5)
        assert list(tmp_path.iterdir()) == []
    outcomes["code"] = 0
    assert gpu_parts._prepare(bench, 5) == {"bundles": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["bundles"]


def test_a_plan_lies_where_it_is_timed(monkeypatch, tmp_path):
    bench = Bench(H100, tmp_path, "code")
    rows = {row.name: row for row in gpu_parts.rows()}
    bench.bundle("resnet50", "fp16").mkdir()
    (bench.bundle("resnet50", "fp16") / "graph").write_text("g", encoding="utf-8")
    plan = rows["plan-tensorrt-resnet50-fp16"]
    monkeypatch.setattr(Bench, "ask", lambda self, task, seconds, **more: {"seconds": 1.0})
    assert plan.run(bench, 5) == {"seconds": 1.0}
    assert (plan.made(bench) / "graph").is_file()
    compiled = gpu_parts._compiled_plans(bench, "resnet50")
    assert [(kind["kind"], kind["precision"], kind["graphed"]) for kind in compiled] == [
        ("tensorrt", "fp16", False),
        ("tensorrt", "fp16", True),
    ]

    def fails(self, task, seconds, **more):
        raise ChildError("no")

    monkeypatch.setattr(Bench, "ask", fails)
    with pytest.raises(ChildError):
        plan.run(bench, 5)
    assert not plan.made(bench).exists()
    assert list(plan.made(bench).parent.iterdir()) == []


# ---- targets


def test_targets_are_held_against_what_was_measured(bed, capsys):
    def overhead(us, target, kept, *places):
        memory = {"kept_bytes_per_call": kept, "largest_bytes_in_a_call": 900.0}
        return {"overhead_us": us, "target_us": target, **dict.fromkeys(places, memory)}

    def faster(times):
        return {"torch.compile max-autotune fp16": {"latency_ms": times, "pipelined_ms": 1.0}}

    both = {
        "call": overhead(18.0, 20, 0.0, "device_arrays", "host_arrays"),
        "graphed": overhead(7.0, 5, 3.0, "device_arrays"),
    }
    ours = {
        "tensorrt fp16 with CUDA graphs": faster(1.2),
        "torch eager fp16": faster(0.5),
        "tensorrt int8": faster(2.0),
    }
    figures = {
        "overhead-tensorrt": both,
        "overhead-torchscript": {"overhead_us": 3.0, "device_arrays": {}},
        "contend-all-resnet50-32": {"times_faster_than": ours},
        "contend-all-vit_small_patch16_224-1": {"times_faster_than": ours},
    }
    parts = [Part(name, DONE, figures=given) for name, given in figures.items()]
    found = targets([*parts, Part("overhead-tensorrt_rtx", NOT_RUN, "not installed")])
    assert [(target["what"], target["reached"]) for target in found] == [
        ("tensorrt, call: microseconds over the bare call", True),
        ("tensorrt, call: bytes that a call leaves behind (device arrays)", True),
        ("tensorrt, call: bytes that a call leaves behind (host arrays)", True),
        ("tensorrt, graphed: microseconds over the bare call", False),
        ("tensorrt, graphed: bytes that a call leaves behind (device arrays)", False),
        ("resnet50-32: tensorrt fp16 with CUDA graphs, times as fast as torch.compile max-autotune fp16", True),
    ]
    bed.run(*(row(name, lambda bench, seconds, given=given: given) for name, given in figures.items()))
    assert bed.document()["targets"] == found
    assert "microseconds over the bare call: 7, at most 5: MISSED" in capsys.readouterr().out
