"""Comparisons: what the figures mean, contenders that fail, meters; with made-up contenders for known figures."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import msgspec
import numpy as np
import pytest

from edge_backbones.bench import energy
from edge_backbones.bench.compare import CompareOptions, calm_turns, compare, read_images, this_machine
from edge_backbones.bench.results import Comparison, Ratio, decode, encode, median_bounds, ratio_of, regressions
from edge_backbones.errors import EngineMismatchError, InferenceError, InputError
from edge_backbones.machine.gpus import Gpu
from edge_backbones.machine.system import settings
from edge_backbones.testing import make_bundle, pooling_input

# ---- what the figures mean


@pytest.mark.parametrize("count", [6, 9, 12, 15, 30])
def test_the_bounds_hold_the_median_nineteen_times_in_twenty(count):
    random = np.random.default_rng(count)
    low, high = median_bounds(count)
    samples = np.sort(random.lognormal(0.3, 0.5, (20_000, count)), axis=1)
    inside = (samples[:, low] <= math.exp(0.3)) & (math.exp(0.3) <= samples[:, high])
    assert 0.95 <= inside.mean() <= 0.999
    assert count < 9 or (low, high) != (0, count - 1)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_turns_are_bounded_by_all_of_them(count):
    assert median_bounds(count) == (0, count - 1)


def test_ratios_are_taken_within_turns():
    """The machine is twice as slow in every second turn, and the ratio does not see it."""
    speed = np.array([1, 2] * 5)
    ratio = ratio_of("torch", tuple(30.0 * speed), tuple(10.0 * speed))
    assert (ratio.median, ratio.low, ratio.high) == (3, 3, 3)
    assert ratio.is_ranked
    noise = np.array([0.8, 1.3, 0.9, 1.2, 0.7, 1.1, 1.0, 0.95, 1.05])
    assert not ratio_of("torch", tuple(10 * noise), (10.0,) * 9).is_ranked
    assert ratio_of("torch", (12.0,) * 6, (10.0,) * 6).is_ranked
    assert not ratio_of("torch", (12.0,) * 5, (10.0,) * 5).is_ranked  # five turns do not say so with 95 % confidence


@pytest.mark.parametrize(
    ("stolen", "kept"),
    [
        ([0.0, 0.01, 0.0], [0, 1, 2]),
        ([0.3, 0.0, 0.2, 0.01, 0.0], [1, 3, 4]),
        ([0.5, 0.4, 0.3, 0.2], [2, 3]),
        ([0.5] * 6, [0, 1, 2, 3, 4, 5]),  # six can be ranked, the calmer three could not
        ([0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.8], [1, 2, 3, 4, 5, 6]),
        ([0.9], [0]),
    ],
)
def test_turns_that_other_guests_disturbed_do_not_count(stolen, kept):
    assert calm_turns(stolen) == kept


# ---- made-up contenders

CONTENDER = """#!{python}
import json, os, sys
from pathlib import Path
pids = Path({folder!r})
task = json.loads(sys.stdin.readline())
behaviour = json.loads(os.environ["BEHAVIOUR"])[task["peer"]]
if "refuse" in behaviour:
    print(json.dumps({{"failed": behaviour["refuse"]}}), flush=True)
    sys.exit()
(pids / str(os.getpid())).touch()
start = dict(batch=2, load_s=1, first_call_ms=2, resident_mb=3, device_mb=None, file_mb=4, versions={{"made-up": "1"}},
             worst_cosine=1, worst_sqnr_db=50)
print(json.dumps(start), flush=True)
for number, line in enumerate(sys.stdin):
    for other in pids.iterdir():
        status = Path("/proc", other.name, "stat")
        if other.name != str(os.getpid()) and status.exists():
            state = status.read_text().rpartition(")")[2].split()[0]
            if state not in "TZ":
                print(json.dumps({{"failed": f"{{other.name}} was {{state}} meanwhile"}}), flush=True)
    if behaviour.get("hangs_at") == number:
        print("waiting for a lock", file=sys.stderr, flush=True)
        sys.stdin.readline()
    if behaviour.get("dies_at") == number:
        print("a fault of its own", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 9)
    ms = behaviour["ms"][number]
    print(json.dumps(dict(milliseconds=[ms] * 10, stolen_share=behaviour.get("stolen", [0] * 99)[number],
                          joules=behaviour.get("joules"))), flush=True)
"""


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Compare contenders that behave as told."""
    bundle = make_bundle(tmp_path / "pool.bundle", pooling_input(2))
    (tmp_path / "pids").mkdir()
    python = tmp_path / "contender"
    python.write_text(CONTENDER.format(python=sys.executable, folder=str(tmp_path / "pids")))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)

    def run(behaviour, **options) -> Comparison:
        monkeypatch.setenv("BEHAVIOUR", json.dumps(behaviour))
        names = [name for name in behaviour if name != "edge"]
        pythons = {name: str(python) for name in behaviour}
        return compare(bundle.path, CompareOptions(vs=tuple(names), pythons=pythons, seconds=0, **options))

    return run


def measurement(result: Comparison, name: str):
    return next(m for m in result.measurements if m.name == name)


def test_a_comparison_says_who_is_faster_and_by_how_much(made_up):
    noise = [9, 11, 10, 12, 8, 10.5, 9.5, 11.5, 8.5]
    result = made_up({"edge": {"ms": [10] * 9, "joules": 2}, "torch": {"ms": [35] * 9}, "torch-compile": {"ms": noise}})
    ratios = {ratio.name: ratio for ratio in result.ratios}
    assert ratios["torch"] == Ratio(name="torch", median=3.5, low=3.5, high=3.5, turns=9)
    assert ratios["torch-compile"].median == 1
    assert not ratios["torch-compile"].is_ranked
    edge = measurement(result, "edge")
    assert (edge.median_ms, edge.p99_ms, edge.jitter, edge.calls) == (10, 10, 0, 90)
    assert edge.images_per_second == 200  # two images a call
    assert edge.joules == 9 * 2 / (90 * 2)
    assert measurement(result, "torch").joules is None
    assert measurement(result, "torch-compile").jitter == pytest.approx((12 - 8) / 10)
    assert [m.name for m in result.measurements] == ["edge", "torch", "torch-compile"]
    assert result.input_shape == (2, 3, 32, 48)


def test_turns_are_shared_and_disturbed_ones_are_left_out(made_up):
    result = made_up(
        {
            "edge": {"ms": [10, 99, 10, 10, 10], "stolen": [0, 0, 0, 0, 0.4]},
            "torch": {"ms": [20, 20, 20, 20, 88], "stolen": [0, 0.5, 0, 0, 0]},
        },
        turns=5,
    )
    assert measurement(result, "edge").turns == (10, 10, 10)
    assert measurement(result, "torch").turns == (20, 20, 20)


def test_a_peer_that_fails_is_in_the_result_with_its_message(made_up):
    result = made_up(
        {
            "edge": {"ms": [10] * 5},
            "torch": {"ms": [20] * 5, "dies_at": 2},
            "torch-compile": {"refuse": "no such operation"},
            "torchscript": {"ms": [30] * 5},
        },
        turns=5,
    )
    assert measurement(result, "torch").missing == "torch ended (killed by SIGKILL): a fault of its own"
    assert measurement(result, "torch-compile").missing == "no such operation"
    assert measurement(result, "torch").median_ms is None
    assert [ratio.name for ratio in result.ratios] == ["torchscript"]


def test_a_peer_that_hangs_is_given_up(made_up):
    behaviour = {"edge": {"ms": [10] * 2}, "torch": {"ms": [20] * 2, "hangs_at": 1}, "torchscript": {"ms": [30] * 2}}
    result = made_up(behaviour, turns=2, patience=3)
    assert measurement(result, "torch").missing == "torch did not answer within 3 s: waiting for a lock"
    assert [ratio.name for ratio in result.ratios] == ["torchscript"]


def test_an_engine_that_fails_ends_the_comparison_and_every_process(made_up, tmp_path):
    with pytest.raises(InferenceError, match=r"edge ended \(killed by SIGKILL\): a fault of its own"):
        made_up({"torch": {"ms": [20] * 5}, "edge": {"ms": [10] * 5, "dies_at": 1}}, turns=5)
    for pid in (tmp_path / "pids").iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.name), 0)


# ---- the real thing


def test_the_engine_is_measured_and_peers_that_cannot_run_say_why(tmp_path):
    bundle = make_bundle(tmp_path / "pool.bundle")
    seen = []
    options = CompareOptions(vs=("nncf", "torchscript"), turns=2, seconds=0, calls=5, threads=1)
    result = compare(bundle.path, options, progress=lambda *step: seen.append(step))
    edge = measurement(result, "edge")
    assert edge.calls in (5, 10)  # a turn that other guests disturbed does not count
    assert 0 < edge.fastest_ms <= edge.median_ms <= edge.p90_ms <= edge.p99_ms
    assert edge.worst_sqnr_db > 100
    assert edge.load_s > 0
    assert edge.resident_mb > 1
    assert edge.file_mb == pytest.approx(bundle.manifest.engines[0].file.size / 1e6)
    assert measurement(result, "nncf").missing.startswith("not installed: pip install nncf")
    assert "no TorchScript file" in measurement(result, "torchscript").missing
    assert result.ratios == ()
    assert result.engine == bundle.manifest.engines[0].name
    assert seen[-1] == ("measuring", 2, 2)
    assert decode(encode(result), "here") == result


def test_ctrl_c_leaves_no_process_behind(tmp_path):
    bundle = make_bundle(tmp_path / "pool.bundle")
    code = """
        import sys
        from edge_backbones.bench.compare import CompareOptions, compare
        def progress(step, done, total):
            if done == 1: print("now", flush=True)
        compare(sys.argv[1], CompareOptions(vs=(), turns=500, seconds=0.05), progress=progress)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(bundle.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with process:
        assert process.stdout.readline() == b"now\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) != 0
    deadline = time.monotonic() + 10
    while Path(f"/proc/{children[0]}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vs": ("tensorflow",)}, r"--vs takes torch, torch-compile.*got tensorflow"),
        ({"vs": ("torch", "torch")}, "each once; got torch, torch"),
        ({"turns": 0}, "at least 1"),
        ({"seconds": -1}, "at least 0"),
        ({"threads": 0}, "at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        CompareOptions(**options)


def test_an_engine_that_the_bundle_lacks_is_refused(tmp_path):
    bundle = make_bundle(tmp_path / "pool.bundle")
    with pytest.raises(EngineMismatchError, match="has no engine 'int8'"):
        compare(bundle.path, CompareOptions(engine="int8", vs=()))
    with pytest.raises(InputError, match="device must be 'auto', 'cpu', 'cuda' or 'cuda:<index>', got 'gpu'"):
        compare(bundle.path, CompareOptions(device="gpu", vs=()))
    with pytest.raises(EngineMismatchError, match="runs on cpu, not on cuda"):
        compare(bundle.path, CompareOptions(device="cuda", vs=()))
    with pytest.raises(InputError, match="holds no image files"):
        read_images(tmp_path, bundle)


# ---- results


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Comparison:
    bundle = make_bundle(tmp_path_factory.mktemp("bench") / "pool.bundle")
    return compare(bundle.path, CompareOptions(vs=(), turns=1, seconds=0, calls=1))


def with_ratio(result: Comparison, low: float, median: float, high: float) -> Comparison:
    return msgspec.structs.replace(result, ratios=(Ratio(name="torch", median=median, low=low, high=high),))


def test_ground_is_lost_when_the_bounds_do_not_overlap(result):
    then = with_ratio(result, 3.8, 4, 4.2)
    assert regressions(with_ratio(result, 3.5, 3.7, 3.9), then) == []
    assert regressions(with_ratio(result, 5, 5, 5), then) == []
    (phrase,) = regressions(with_ratio(result, 3, 3.2, 3.4), then)
    assert phrase.startswith("torch takes 3.20 times our time (3.00 to 3.40), 4.00 (3.80 to 4.20) on ")


def test_results_without_a_peer_in_common_are_not_called_equal(result):
    then = with_ratio(result, 3.8, 4, 4.2)
    few = msgspec.structs.replace(then, ratios=(msgspec.structs.replace(then.ratios[0], turns=2),))
    for now, before, said in (
        (result, then, "the peers are none now, .* are torch"),
        (few, then, "the peers are none now, .* are torch"),
        (then, few, "the peers are torch now, .* are none, each with fewer than 6 turns"),
        (then, result, "the peers are torch now, .* are none"),
    ):
        with pytest.raises(InputError, match=f"nothing can be compared: {said}"):
            regressions(now, before)


def test_results_of_something_else_are_not_compared(result):
    for change in ({"threads": 99}, {"bundle": "other"}, {"input_shape": (1, 3, 8, 8)}, {"precision": "int8"}):
        with pytest.raises(InputError, match=f"the results differ in {next(iter(change))}"):
            regressions(result, msgspec.structs.replace(result, **change))


@pytest.mark.parametrize("data", [b"", b"{}", b"not json", b'{"bundle": 1}'])
def test_a_file_that_is_no_result_is_named(data):
    with pytest.raises(InputError, match=r"old\.json is not a result of edge-backbones bench"):
        decode(data, "old.json")


# ---- the machine, from recorded trees


def tree(root: Path, files: dict[str, str]) -> Path:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_cpu_packages_are_added_up_and_their_counters_wrap(tmp_path):
    folder = "sys/class/powercap/intel-rapl:"
    files = {
        f"{folder}0/energy_uj": "9000000\n",
        f"{folder}0/max_energy_range_uj": "10000000\n",
        f"{folder}0:0/energy_uj": "5000000\n",  # the cores of package 0, in it already
        f"{folder}0:0/max_energy_range_uj": "10000000\n",
        f"{folder}1/name": "package-1\n",
        f"{folder}2/name": "psys\n",  # the whole platform, the packages in it
        f"{folder}2/energy_uj": "0\n",
        f"{folder}2/max_energy_range_uj": "90000000\n",
        f"{folder}1/energy_uj": "1000000\n",
        f"{folder}1/max_energy_range_uj": "10000000\n",
    }
    with energy.metered(tree(tmp_path, files)) as meter:
        assert meter.joules is None
        changed = {f"{folder}0/energy_uj": "500000\n", f"{folder}1/energy_uj": "3500000\n"}
        tree(tmp_path, {**changed, f"{folder}2/energy_uj": "9000000\n"})
    assert meter.joules == pytest.approx(1.5 + 2.5)


def test_the_board_of_a_jetson_is_metered_by_its_input_rail(tmp_path):
    folder = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/"
    files = {
        f"{folder}in1_label": "VDD_CPU_GPU_CV\n",
        f"{folder}in1_input": "5000\n",
        f"{folder}curr1_input": "9000\n",
        f"{folder}in2_label": "VDD_IN\n",
        f"{folder}in2_input": "5000\n",
        f"{folder}curr2_input": "2000\n",
        "sys/class/powercap/intel-rapl:0/energy_uj": "1\n",
        "sys/class/powercap/intel-rapl:0/max_energy_range_uj": "2\n",
    }
    root = tree(tmp_path, files)
    assert energy.board_power(root)() == 10
    begin = time.perf_counter()
    with energy.metered(root) as meter:
        time.sleep(0.2)
    inside = time.perf_counter() - begin
    assert 10 * 0.2 <= meter.joules <= 10 * inside


def test_a_board_without_an_input_rail_is_the_sum_of_its_rails(tmp_path):
    first, second = (f"sys/bus/i2c/drivers/ina3221/1-004{n}/hwmon/hwmon{n + 3}/" for n in (0, 1))  # AGX Orin's
    rails = {
        f"{first}in1": ("VDD_GPU_SOC", "20000", "500"),
        f"{first}in2": ("VDD_CPU_CV", "20000", "250"),
        f"{first}in3": ("VIN_SYS_5V0", "5000", "800"),
        f"{first}in7": ("sum of shunt voltages", "760", "1"),
        f"{second}in1": ("NC", "20000", "9"),
        f"{second}in2": ("VDDQ_VDD2_1V8AO", "5000", "100"),
    }
    files = {}
    for place, (label, volts, amperes) in rails.items():
        current = "/curr".join(place.rsplit("/in", 1))
        files |= {f"{place}_label": label, f"{place}_input": volts, f"{current}_input": amperes}
    assert energy.board_power(tree(tmp_path, files))() == 10 + 5 + 4 + 0.5
    files = {"proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\x00", **files}
    files |= {"sys/class/hwmon/hwmon1/name": "ina238\n", "sys/class/hwmon/hwmon1/power1_input": "30500000\n"}
    assert energy.board_power(tree(tmp_path, files))() == 30.5  # Thor's monitor of what comes in at the plug


class Nvml:
    """nvidia-ml-py on a machine with two GPUs, in an order that is not CUDA's."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
    GPUS: ClassVar = {b"0000:02:00.0": "first in CUDA", b"0000:01:00.0": "second in CUDA"}

    class NVMLError(Exception):
        pass

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByPciBusId(self, address):
        if address not in self.GPUS:
            raise self.NVMLError("not found")
        return self.GPUS[address]

    def nvmlDeviceGetMemoryInfo(self, gpu):
        return SimpleNamespace(used={"first in CUDA": 3e9, "second in CUDA": 5e9}[gpu])

    def nvmlDeviceGetClockInfo(self, gpu, clock):
        return {("first in CUDA", 1): 1410, ("first in CUDA", 2): 1593}[gpu, clock]

    def nvmlDeviceGetMaxClockInfo(self, gpu, clock):
        return 1980

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu):
        raise self.NVMLError("not supported")


def test_nvml_is_asked_for_the_gpu_that_cuda_means(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    gpus = tuple(Gpu(i, "NVIDIA L4", "sm_89", 24 << 30, "13.0", 58, False, f"0000:0{2 - i}:00.0") for i in (0, 1))
    monkeypatch.setattr(energy.gpus, "find_gpus", lambda: gpus)
    assert [energy.device_memory_mb(name) for name in ("cuda", "cuda:0", "cuda:1")] == [3000, 3000, 5000]
    clocks = {"GPU MHz now": "1410", "GPU MHz at most": "1980", "GPU memory MHz now": "1593"}
    assert energy.gpu_settings() == clocks
    assert clocks.items() <= this_machine().settings.items()
    monkeypatch.setattr(energy.gpus, "find_gpus", lambda: (dataclasses.replace(gpus[0], bus_address="0000:00:00.0"),))
    assert energy.device_memory_mb("cuda") is None  # a Jetson's, which NVML does not have
    assert energy.gpu_settings() == {}


def test_a_machine_without_a_meter_guesses_nothing(tmp_path):
    with energy.metered(tmp_path) as meter:
        pass
    assert meter.joules is None
    assert energy.device_memory_mb("cpu") is None


def test_what_decides_the_speed_is_recorded(tmp_path):
    files = {
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "729600\n",
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\x00",
        "var/lib/nvpmodel/status": "pmode:0001\n",
    }
    assert settings(tree(tmp_path, files)) == {
        "cpu governor": "schedutil",
        "cpu MHz now": "730",
        "Jetson": "NVIDIA Jetson Orin Nano Developer Kit",
        "Jetson power mode": "1",
    }
    assert settings(tmp_path / "nothing") == {}
    assert this_machine(repository=tmp_path).commit is None
