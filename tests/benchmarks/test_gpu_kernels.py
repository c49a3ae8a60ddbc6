"""The kernels of the GPU suite without a GPU: their PTX is assembled for every architecture, and interpreted."""

from __future__ import annotations

import ctypes
import re
import shutil
import struct
import subprocess
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu_kernels, gpu_standin
from benchmarks.gpu_common import pooling_input
from benchmarks.gpu_kernels import PTX, DriverKernels
from edge_backbones.errors import DeviceError
from edge_backbones.machine import gpus

MASKS = {"u32": (1 << 32) - 1, "u64": (1 << 64) - 1}
FORMATS = {"u64": ctypes.c_uint64, "u32": ctypes.c_uint32, "f32": ctypes.c_float}


class Thread:
    """One thread of a kernel in PTX, over the memory of this process; it knows the instructions that our kernels have."""

    def __init__(self, kernel: str, arguments: dict[str, float], special: dict[str, int]) -> None:
        body = kernel[kernel.index("{") + 1 :]
        lines = [line.split("//")[0].strip() for line in body.splitlines()]
        self.code = [line.rstrip(";") for line in lines if line and not line.startswith((".reg", "}"))]
        self.labels = {line[:-1]: i for i, line in enumerate(self.code) if line.endswith(":")}
        self.values: dict[str, float] = {**arguments, **special}
        self.steps = 0

    def run(self) -> None:
        at = 0
        while True:
            line = self.code[at]
            at += 1
            if line.endswith(":"):
                continue
            self.steps += 1
            assert self.steps < 100_000, "it does not end"
            guarded = re.fullmatch(r"@(%p\d+) (.+)", line)
            if guarded and not self.values[guarded[1]]:
                continue
            name, _, rest = (guarded[2] if guarded else line).partition(" ")
            if name == "ret":
                return
            if name == "bra":
                at = self.labels[rest]
                continue
            self.do(name, [part.strip() for part in rest.split(",")])

    def value(self, name: str) -> float:
        if re.fullmatch(r"0f[0-9A-F]{8}", name):
            return struct.unpack(">f", bytes.fromhex(name[2:]))[0]
        return int(name) if name.isdigit() else self.values[name]

    def address(self, operand: str) -> int:
        register, _, offset = operand.strip("[]").partition("+")
        return int(self.values[register]) + int(offset or 0)

    def do(self, name: str, operands: list[str]) -> None:
        operation, *_, kind = name.split(".")
        target = operands[0]
        if operation == "st":
            FORMATS[kind].from_address(self.address(target)).value = self.value(operands[1])
            return
        if operation == "ld" and ".global." in name:
            self.values[target] = FORMATS[kind].from_address(self.address(operands[1])).value
            return
        if operation == "ld":
            self.values[target] = self.values[operands[1].strip("[]")]
            return
        if target == "%t3" and operands[1] == "%globaltimer":
            self.values["%globaltimer"] += 1000
        a, *others = (self.value(operand) for operand in operands[1:])
        results = {
            "mov": lambda: a,
            "cvta": lambda: a,
            "add": lambda: a + others[0],
            "sub": lambda: a - others[0],
            "mul": lambda: a * others[0],
            "mad": lambda: a * others[0] + others[1],
            "div": lambda: a // others[0],
            "setp": lambda: {"ge": a >= others[0], "lt": a < others[0], "eq": a == others[0]}[name.split(".")[1]],
        }
        found = results[operation]()
        if kind == "f32":
            found = float(np.float32(found))
        elif operation != "setp":
            found = int(found) & MASKS["u64" if ".wide." in name else kind]
        self.values[target] = found


class Gpu:
    """A libcuda whose launches are interpreted. It has the functions that the kernels call."""

    def __init__(self) -> None:
        self.streams: list[int] = []
        self.loaded = 0

    def cuCtxGetCurrent(self, context):
        context._obj.value = 0xC0
        return 0

    def cuModuleLoadData(self, module, image):
        assert image.decode() == PTX
        self.loaded += 1
        module._obj.value = 1
        return 0

    def cuModuleGetFunction(self, function, module, name):
        names = [name.encode() for name in kernels_of(PTX)]
        function._obj.value = 1 + names.index(name)
        return 0

    def cuGetErrorName(self, code, name):
        name._obj.value = b"CUDA_ERROR_INVALID_VALUE"
        return 0

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, parameters, extra):
        if not gx.value:
            return 1
        assert (gy.value, gz.value, by.value, bz.value, shared.value, extra) == (1, 1, 1, 1, 0, None)
        text = list(kernels_of(PTX).values())[function.value - 1]
        declared = re.findall(r"\.param \.(\w+) (\w+)", text)
        assert len(declared) == len(parameters)
        arguments = {
            name: FORMATS[kind].from_address(pointer).value
            for (kind, name), pointer in zip(declared, parameters, strict=True)
        }
        for block in range(gx.value):
            for thread in range(bx.value):
                special = {"%ctaid.x": block, "%ntid.x": bx.value, "%tid.x": thread, "%globaltimer": 0}
                Thread(text, arguments, special).run()
        self.streams.append(stream.value)
        return 0


def kernels_of(text: str) -> dict[str, str]:
    """The kernels in a text of PTX, by name."""
    parts = re.split(r"(?=\.visible \.entry )", text)[1:]
    return {re.match(r"\.visible \.entry (\w+)", part)[1]: part for part in parts}


@pytest.fixture
def gpu(monkeypatch):
    made = Gpu()
    monkeypatch.setattr(gpus, "load_driver", lambda: made)
    return made


@pytest.mark.parametrize(
    ("shape", "side"), [((2, 3, 8, 16), 4), ((1, 3, 16, 8), 8), ((1, 2, 6, 10), 2), ((2, 3, 5, 7), 1)]
)
def test_pooling_in_ptx(gpu, shape, side):
    """Through the parameters as they are handed to the driver: values, and no byte beside them."""
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    batch, channels, height, width = shape
    expected = values.reshape(batch, channels, height // side, side, width // side, side).mean(axis=(3, 5))
    found = np.full(expected.size + 300, 7, np.float32)
    kernels = DriverKernels()
    for _ in range(2):
        kernels.pool(values.ctypes.data, found.ctypes.data, shape, side, 0x5000)
    np.testing.assert_allclose(found[: expected.size], expected.ravel(), rtol=1e-5, atol=1e-6)
    assert (found[expected.size :] == 7).all()
    assert gpu.streams == [0x5000, 0x5000]
    assert gpu.loaded == 1


def test_waiting_in_ptx_ends(gpu):
    DriverKernels().spin(0.5, 0x5000)
    assert gpu.streams == [0x5000]


def test_turns_in_ptx(gpu):
    numbers = np.array([0, 0, 9], np.uint32)
    kernels = DriverKernels()
    for mine, expected in ((0, [1, 0, 9]), (1, [2, 0, 9]), (3, [4, 1, 9]), (4, [5, 1, 9])):
        kernels.turn(numbers.ctypes.data, mine, 0x5000)
        assert numbers.tolist() == expected


def test_what_the_driver_refuses_is_told(gpu):
    with pytest.raises(DeviceError, match="cuLaunchKernel failed: CUDA_ERROR_INVALID_VALUE"):
        DriverKernels().pool(0, 0, (0, 3, 8, 8), 4, 0)


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_87", "sm_90", "sm_100", "sm_120"])
def test_ptx_is_assembled_for_every_architecture(tmp_path, architecture):
    packages = Path(sysconfig.get_path("purelib"))
    found = [*packages.glob("triton/backends/nvidia/bin/ptxas*"), *filter(None, [shutil.which("ptxas")])]
    if not found:
        pytest.skip("triton, whose wheels for Linux carry NVIDIA's assembler, is not made for this platform")
    (tmp_path / "kernels.ptx").write_text(PTX, encoding="utf-8")
    for assembler in found:
        command = [str(assembler), f"-arch={architecture}", "-o", str(tmp_path / "out"), str(tmp_path / "kernels.ptx")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


# ---- the engine over them


class Recorded:
    """Kernels that are noted and not run."""

    def __init__(self) -> None:
        self.pooled: list[tuple] = []
        self.capturing = False

    def pool(self, source, target, shape, side, stream):
        self.pooled.append((source, target, tuple(shape), side, stream))

    def is_capturing(self, stream):
        return self.capturing


@pytest.fixture
def engine(monkeypatch):
    """An engine, what it said, and its kernels."""
    recorded, said = Recorded(), []
    monkeypatch.setattr(gpu_standin, "kernels", lambda: recorded)
    logger = type("Logger", (), {"log": lambda self, severity, text: said.append(text)})()
    plan = gpu_standin.plan_of(pooling_input(64, (1, 1, 1)), pooling_input(64, (2, 4, 8)))
    return gpu_standin.Runtime(logger).deserialize_cuda_engine(plan), said, recorded


def test_an_engine_keeps_the_rules_of_tensorrt(engine):
    opened, said, recorded = engine
    context = opened.create_execution_context(gpu_standin.ExecutionContextAllocationStrategy.USER_MANAGED)
    assert not context.set_input_shape("pixel_values", (2, 3, 32, 32))
    assert "outside optimisation profile 0" in said[-1]
    assert context.set_optimization_profile_async(1, 0)
    assert not context.set_optimization_profile_async(2, 0)
    assert context.infer_shapes() == ["pixel_values"]
    assert not context.execute_async_v3(0x5000)
    assert "no address" in said[-1]
    assert context.set_input_shape("pixel_values", (2, 3, 32, 32))
    assert context.infer_shapes() == []
    assert context.get_tensor_shape("pool8") == (2, 3, 4, 4)
    assert not context.set_tensor_address("pool4", 0x1001)
    for number, name in enumerate(("pixel_values", "pool4", "pool8"), 1):
        assert context.set_tensor_address(name, number * 0x1000)
    assert not context.execute_async_v3(0x5000)
    assert "bytes of scratch memory" in said[-1]
    needed = context.update_device_memory_size_for_shapes()
    assert needed == 4 * 2 * 3 * 8 * 8
    assert opened.get_device_memory_size_for_profile_v2(1) == opened.device_memory_size_v2 > needed
    context.set_device_memory(0x9000, needed)
    recorded.capturing = True
    assert not context.execute_async_v3(0x5000)
    assert "capturing" in said[-1]
    recorded.capturing = False
    assert context.execute_async_v3(0x5000)
    assert recorded.pooled == [
        (0x1000, 0x2000, (2, 3, 32, 32), 4, 0x5000),
        (0x1000, 0x9000, (2, 3, 32, 32), 4, 0x5000),
        (0x9000, 0x3000, (2, 3, 8, 8), 2, 0x5000),
    ]
    recorded.capturing = True
    assert context.execute_async_v3(0x5000)


def test_an_engine_describes_its_tensors(engine):
    opened, _, _ = engine
    names = [opened.get_tensor_name(i) for i in range(opened.num_io_tensors)]
    assert sorted(names) == ["pixel_values", "pool4", "pool8"]
    assert [opened.get_tensor_mode(name).name for name in names].count("INPUT") == 1
    assert opened.get_tensor_shape("pixel_values") == (-1, 3, -1, -1)
    assert opened.num_optimization_profiles == 2
    assert opened.get_tensor_profile_shape("pixel_values", 1)[2] == (8, 3, 64, 64)


def test_a_plan_that_is_none_is_refused():
    said = []
    logger = type("Logger", (), {"log": lambda self, severity, text: said.append(text)})()
    for data in (b"", b"{}", b'{"magic": 1}', b"\xff\x00", b"[]"):
        assert gpu_standin.Runtime(logger).deserialize_cuda_engine(data) is None
    assert len(said) == 5


def test_this_process_has_no_stand_in_for_libcuda():
    assert not gpu_kernels.on_standin()
