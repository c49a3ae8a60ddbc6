"""TorchScript as an engine: what torch computes eagerly, for every size, from many threads, and in half precision."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import networks
import numpy as np
import pytest
import torch
from torch import nn

from edge_backbones.engines.gpu.arrays import from_foreign
from edge_backbones.engines.gpu.dlpack import ForeignArray
from edge_backbones.engines.torch import session as torchscript
from edge_backbones.engines.torch.session import TorchScriptSession
from edge_backbones.errors import (
    EngineMismatchError,
    ExportError,
    InferenceError,
    InputError,
    MissingDependencyError,
    OutOfMemoryError,
)
from edge_backbones.machine import gpus
from edge_backbones.spec import Precision
from edge_backbones.toolchain.export import export_torchscript
from edge_backbones.toolchain.prepare import prepare
from edge_backbones.toolchain.trace import TypedModule, trace_torchscript

ROUNDING = 1e-5
SQUARES = networks.input_spec((32, 64, 128), (32, 96, 160), batch=(1, 2, 4), size_multiple=32)

needs_gpu = pytest.mark.skipif(not gpus.find_gpus(), reason=gpus.no_gpu_reason())


class Case:
    """A network, prepared and exported as the build does it."""

    def __init__(self, folder, name: str, spec, **options) -> None:
        self.loaded = networks.trained_like(name, **options)
        self.prepared = prepare(self.loaded, spec)
        export_torchscript(self.prepared, folder / "fp32.ts")
        self.input, self.outputs = spec, self.prepared.spec.outputs
        self.data = (folder / "fp32.ts").read_bytes()

    def open(self, data: bytes | None = None, **options) -> TorchScriptSession:
        return TorchScriptSession(
            self.data if data is None else data, input=self.input, outputs=self.outputs, **options
        )


@pytest.fixture(scope="module")
def cnn(tmp_path_factory) -> Case:
    return Case(tmp_path_factory.mktemp("cnn"), "test_resnet", SQUARES, out_indices=(1, 2, 4))


@pytest.fixture(scope="module")
def camera(tmp_path_factory) -> Case:
    spec = networks.input_spec(64, 96, batch=2, name="image")
    return Case(tmp_path_factory.mktemp("camera"), "test_vit", spec, img_size=(64, 96), out_indices=(0, 5))


def saved(module: nn.Module, example: torch.Tensor) -> bytes:
    file = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        torch.jit.save(torch.jit.trace(module.eval(), example), file)
    return file.getvalue()


def pixels(batch: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 3, height, width), dtype=np.float32)


# ---- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 64, 96), (1, 32, 160), (4, 128, 32), (3, 96, 96)])
def test_maps_are_those_of_the_network_at_every_size(cnn, shape):
    images = pixels(*shape)
    maps = cnn.open().run(images)
    for actual, expected in zip(maps, networks.maps_of(cnn.loaded.module, images), strict=True):
        assert actual.dtype == np.float32
        assert actual.flags.c_contiguous
        assert networks.relative(actual, expected) < ROUNDING


def test_camera_frames_go_in_as_they_are(camera, photographs):
    frames = networks.crops(photographs, 2, 64, 96)
    expected = networks.maps_of(camera.loaded.module, networks.normalised(frames, camera.loaded.image_config))
    frames.setflags(write=False)
    for actual, reference in zip(camera.open().run(frames), expected, strict=True):
        assert networks.relative(actual, reference) < ROUNDING


def test_outputs_belong_to_the_caller(cnn):
    session, images = cnn.open(), pixels(2, 64, 96)
    first = session.run(images)
    kept = [feature_map.copy() for feature_map in first]
    session.run(pixels(2, 64, 96, seed=1))
    for feature_map, before in zip(first, kept, strict=True):
        np.testing.assert_array_equal(feature_map, before)
        feature_map.fill(np.nan)
    for feature_map, before in zip(session.run(images), kept, strict=True):
        np.testing.assert_array_equal(feature_map, before)
    session.close()
    assert all(np.isnan(feature_map).all() for feature_map in first)


class _Aliases(nn.Module):
    """The input itself, the same tensor twice, a transposed view, and a double."""

    def forward(self, x):
        y = x * 2
        return x, y, y, y.transpose(2, 3), y.double()


def test_outputs_share_memory_with_nothing():
    images = pixels(1, 4, 6)
    spec = networks.input_spec(4, 6)
    session = TorchScriptSession(saved(_Aliases(), torch.from_numpy(images)), input=spec, outputs="abcde")
    maps = session.run(images)
    everything = [images, *maps]
    for i, one in enumerate(everything):
        assert not any(np.shares_memory(one, other) for other in everything[i + 1 :])
    assert all(one.flags.c_contiguous and one.dtype == np.float32 for one in maps)
    np.testing.assert_array_equal(maps[0], images)
    np.testing.assert_array_equal(maps[3], (images * 2).transpose(0, 1, 3, 2))


def test_threads_never_mix_outputs(cnn):
    session = cnn.open()
    batches = [pixels(1 + i % 3, 32 * (1 + i % 2), 64, seed=i) for i in range(12)]
    expected = [networks.maps_of(cnn.loaded.module, images) for images in batches]
    start = threading.Barrier(4)

    def work(worker: int) -> list[tuple[int, list[np.ndarray]]]:
        start.wait()
        return [(i, session.run(batches[i])) for _ in range(3) for i in range(worker, len(batches), 4)]

    with ThreadPoolExecutor(4) as pool:
        results = [result for worker in pool.map(work, range(4)) for result in worker]
    assert len(results) == 36
    for i, maps in results:
        for actual, reference in zip(maps, expected[i], strict=True):
            assert networks.relative(actual, reference) < ROUNDING


def test_threads_are_set_for_the_call_and_put_back(cnn):
    during = []
    before = torch.get_num_threads()
    session = cnn.open(threads=before + 1)
    module = session._module
    session._module = lambda x: during.append(torch.get_num_threads()) or module(x)
    session.run(pixels(1, 32, 32))
    assert during == [before + 1]
    assert torch.get_num_threads() == before
    with pytest.raises(InputError, match="does not fit"):
        session.run(pixels(1, 33, 32))
    assert torch.get_num_threads() == before


# ---- half precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "cosine"), [(Precision.FP16, 0.9999), (Precision.BF16, 0.999)])
@pytest.mark.parametrize("name", ["cnn", "camera"])
def test_half_precision_stays_near_and_returns_float32(request, name, precision, cosine):
    case: Case = request.getfixturevalue(name)
    data = trace_torchscript(case.prepared.module, case.input, precision)
    if case.input.name == "image":
        images = np.random.default_rng(0).integers(0, 256, case.input.opt_shape).astype(np.uint8)
    else:
        images = pixels(2, 64, 96)
    session = case.open(data)
    assert {feature_map.dtype for feature_map in session._module(torch.from_numpy(images))} == {torch.float32}
    for reference, actual in zip(case.open().run(images), session.run(images), strict=True):
        product = float((reference.astype(np.float64) * actual).sum())
        assert product / (np.linalg.norm(reference) * np.linalg.norm(actual)) > cosine
        assert not np.array_equal(reference, actual)
    assert len(data) < 0.75 * len(case.data)  # weights are stored in half precision


def test_a_dynamic_module_in_half_precision_takes_other_sizes(cnn):
    session = cnn.open(trace_torchscript(cnn.prepared.module, cnn.input, Precision.FP16))
    images = pixels(3, 128, 32)
    for actual, reference in zip(session.run(images), cnn.open().run(images), strict=True):
        assert networks.relative(actual, reference) < 0.01


def dtypes_of(module: nn.Module, example: torch.Tensor) -> dict[str, set[torch.dtype]]:
    """Types of the tensors that go into every operator of an exported program."""
    program = torch.export.export(module, (example,), strict=False)
    found: dict[str, set[torch.dtype]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function":
            values = [argument.meta["val"] for argument in node.all_input_nodes]
            found.setdefault(node.target.__name__, set()).update(v.dtype for v in values if isinstance(v, torch.Tensor))
    return found


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        tokens = self.norm(self.stem(x).flatten(2).transpose(1, 2))
        query = self.linear(tokens)
        attention = (query @ query.transpose(-1, -2)).softmax(-1)
        return ((attention @ query + tokens).pow(2).mean(1),)


def test_arithmetic_is_in_half_and_norms_softmax_and_sums_are_not():
    found = dtypes_of(TypedModule(_Block().eval(), torch.float16), torch.zeros(1, 3, 16, 16))
    half, full = {torch.float16}, {torch.float32}
    assert (found["conv2d.default"], found["linear.default"], found["matmul.default"]) == (half, half, half)
    assert (found["layer_norm.default"], found["softmax.int"]) == (full, full)
    assert (found["pow.Tensor_Scalar"], found["mean.dim"]) == (full, full)


def test_fp32_convolutions_say_that_they_are_not_tf32(cnn):
    data = trace_torchscript(cnn.prepared.module, cnn.input, Precision.FP32)
    session = cnn.open(data)
    convolutions = session._module.graph.findAllNodes("aten::_convolution")
    assert convolutions
    assert not any(next(reversed(list(node.inputs()))).toIValue() for node in convolutions)
    images = pixels(2, 64, 96)
    for actual, reference in zip(session.run(images), cnn.open().run(images), strict=True):
        np.testing.assert_array_equal(actual, reference)


def test_what_torchscript_has_no_operators_for_is_refused(cnn):
    with pytest.raises(ExportError, match=r"TorchScript has no int8: choose one of fp32, fp16, bf16"):
        trace_torchscript(cnn.prepared.module, cnn.input, Precision.INT8)


class _NotTraceable(nn.Module):
    def forward(self, x):
        return {"a": x, 1: x}


def test_a_module_that_cannot_be_traced_is_an_export_error():
    with pytest.raises(ExportError, match="cannot be traced as TorchScript in fp32"):
        trace_torchscript(_NotTraceable().eval(), networks.input_spec(8, 8), Precision.FP32)


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["empty", "text", "first half", "index flipped", "other zip"])
def test_damaged_bytes_are_a_mismatch(cnn, damage):
    data = cnn.data
    other = io.BytesIO()
    np.savez(other, a=np.zeros(3))
    wrong = {
        "empty": b"",
        "text": b"not a program",
        "first half": data[: len(data) // 2],
        "index flipped": data[:-200] + bytes(byte ^ 255 for byte in data[-200:-100]) + data[-100:],
        "other zip": other.getvalue(),
    }
    with pytest.raises(EngineMismatchError, match="build or compile it again"):
        cnn.open(wrong[damage])


def test_another_number_of_maps_is_a_mismatch(cnn):
    with pytest.raises(EngineMismatchError, match=r"returns 3 tensors, the manifest promises \['one'\]"):
        TorchScriptSession(cnn.data, input=cnn.input, outputs=["one"])


def test_inputs_that_do_not_fit_are_refused_before_torch_sees_them(cnn):
    session = cnn.open()
    with pytest.raises(InputError, match="float64 does not fit: this engine takes float32"):
        session.run(pixels(1, 32, 32).astype(np.float64))
    with pytest.raises(InputError, match="does not fit: this engine takes float32 NCHW"):
        session.run(pixels(1, 256, 32))
    with pytest.raises(InputError, match="threads must be at least 1, got 0"):
        cnn.open(threads=0)
    with pytest.raises(InputError, match="device must be cpu, cuda or cuda:<index>, got 'gpu'"):
        cnn.open(device="gpu")


class _OneSize(nn.Module):
    def forward(self, x):
        return (x + torch.ones(1, 3, 8, 8),)


def test_a_failure_while_it_runs_is_an_inference_error_and_the_session_lives():
    spec = networks.input_spec((8, 8, 16), 8)
    session = TorchScriptSession(saved(_OneSize(), torch.zeros(1, 3, 8, 8)), input=spec, outputs=["a"])
    with pytest.raises(
        InferenceError, match=r"torch failed on float32 \(1, 3, 16, 8\): The size of tensor a"
    ) as caught:
        session.run(pixels(1, 16, 8))
    assert "\n" not in str(caught.value)
    images = pixels(1, 8, 8)
    np.testing.assert_array_equal(session.run(images)[0], images + 1)


def test_a_closed_session_says_so(cnn):
    session = cnn.open()
    session.close()
    session.close()
    with pytest.raises(InputError, match="was closed: open the bundle again"):
        session.run(pixels(1, 32, 32))


def test_without_torch_the_message_is_the_install_command(cnn, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'edge-backbones\[build\]'"):
        cnn.open()


def test_the_version_is_known_without_importing_torch():
    code = (
        "import sys; from edge_backbones.engines.torch import session as torchscript; print(torchscript.library_version()); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, torchscript.library_version()), done.stderr
    assert torchscript.library_version() == torch.__version__.partition("+")[0] or "+" in torchscript.library_version()


def test_a_gpu_that_is_not_there_is_a_mismatch_with_the_reason(cnn, monkeypatch):
    monkeypatch.setattr(gpus, "no_gpu_reason", lambda: "no NVIDIA driver (libcuda.so.1 is missing)")
    with pytest.raises(EngineMismatchError, match=r"cuda:1 needs an NVIDIA GPU: no NVIDIA driver"):
        cnn.open(device="cuda:1")


def test_a_torch_that_does_not_serve_the_gpu_is_a_mismatch(cnn, monkeypatch):
    def refuse(index):
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(gpus, "no_gpu_reason", lambda: "")
    monkeypatch.setattr(gpus, "find_gpus", lambda: ("one",))
    monkeypatch.setattr(torch.cuda, "get_device_properties", refuse)
    with pytest.raises(EngineMismatchError, match="does not serve cuda: Torch not compiled with CUDA enabled"):
        cnn.open(device="cuda")
    with pytest.raises(EngineMismatchError, match="does not serve cuda:3: 1 GPUs are visible"):
        cnn.open(device="cuda:3")


def test_an_array_on_a_gpu_is_refused_by_an_engine_on_the_cpu(cnn):
    array = ForeignArray(4096, (1, 3, 32, 32), np.dtype(np.float32), 0, True, owner=None)
    with pytest.raises(InputError, match="is on a GPU and this engine runs on the CPU"):
        cnn.open().run_on_device(array, 0)


# ---- exported programs, and files that hold engines of torch_tensorrt ------------------------------------------------


def test_an_exported_program_runs_too(cnn):
    batch = torch.export.Dim("batch", min=1, max=4)
    program = torch.export.export(
        cnn.prepared.module, (torch.zeros(2, 3, 64, 96),), dynamic_shapes=({0: batch},), strict=False
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    session = cnn.open(file.getvalue())
    images = pixels(3, 64, 96)
    for actual, expected in zip(session.run(images), networks.maps_of(cnn.loaded.module, images), strict=True):
        assert networks.relative(actual, expected) < ROUNDING
    with pytest.raises(InferenceError, match=r"torch failed on float32 \(1, 3, 32, 96\)"):
        session.run(pixels(1, 32, 96))
    with pytest.raises(EngineMismatchError, match="returns 3 tensors"):
        TorchScriptSession(file.getvalue(), input=cnn.input, outputs=["one"])


def test_a_file_with_an_engine_asks_for_torch_tensorrt(cnn, monkeypatch):
    def load(file, map_location):
        raise RuntimeError(
            "Unknown type name '__torch__.torch.classes.tensorrt.Engine':\n  File \"code/__torch__.py\", line 4\n"
        )

    monkeypatch.setattr(torch.jit, "load", load)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'edge-backbones\[torch-tensorrt\]'"):
        cnn.open()


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_a_gpu_computes_the_same(cnn, precision):
    session = cnn.open(trace_torchscript(cnn.prepared.module, cnn.input, precision), device="cuda")
    images = pixels(2, 64, 96)
    for actual, expected in zip(session.run(images), networks.maps_of(cnn.loaded.module, images), strict=True):
        assert networks.relative(actual, expected) < (1e-3 if precision is Precision.FP32 else 0.01)


@needs_gpu
@pytest.mark.parametrize("batch", [1, 2, 6])
def test_arrays_on_a_gpu_go_in_and_come_out_without_a_copy(cnn, batch):
    session = cnn.open(trace_torchscript(cnn.prepared.module, cnn.input, Precision.FP32), device="cuda:0")
    images = pixels(batch, 64, 96)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        tensor = torch.from_numpy(images).cuda()
        arrays = session.run_on_device(from_foreign(tensor, stream=stream.cuda_stream), stream.cuda_stream)
    maps = [torch.from_dlpack(array).cpu().numpy() for array in arrays]  # read on the default stream
    for actual, expected in zip(maps, networks.maps_of(cnn.loaded.module, images), strict=True):
        assert networks.relative(actual, expected) < 1e-3


@needs_gpu
def test_memory_that_runs_out_on_a_gpu_is_named_and_the_session_lives(cnn):
    session = cnn.open(device="cuda")
    torch.cuda.set_per_process_memory_fraction(1e-9)
    try:
        torch.cuda.empty_cache()
        with pytest.raises(OutOfMemoryError, match="has no memory left for"):
            session.run(pixels(4, 128, 160))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(session.run(pixels(1, 32, 32))) == 3
