"""What torch_tensorrt is asked, release by release, and what becomes of its refusals.

It needs a driver to be imported. In its place stand modules with the signatures of three of its releases, which compile
nothing and record what they are told; the number formats, sizes and maps in the file that comes out are real.
"""

from __future__ import annotations

import sys
import types
import warnings
from dataclasses import dataclass, field
from typing import Any

import networks
import numpy as np
import pytest
import torch
from torch import nn

from edge_backbones.engines.torch.session import TorchScriptSession, load_torch_tensorrt
from edge_backbones.errors import CompileError, EngineMismatchError, ExportError, InputError, MissingDependencyError
from edge_backbones.machine import gpus
from edge_backbones.spec import Precision
from edge_backbones.toolchain.prepare import prepare
from edge_backbones.toolchain.torch_tensorrt import compile_torch_tensorrt

NO_DRIVER = (
    "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from "
    "http://www.nvidia.com/Download/index.aspx"
)


@dataclass
class Recorded:
    """What the module was told. ``refuse``: what compiling raises."""

    options: dict[str, Any] = field(default_factory=dict)
    program: Any = None
    input: Any = None
    save: dict[str, Any] = field(default_factory=dict)
    refuse: Exception | None = None


class Input:
    """torch_tensorrt.Input: either a shape or all three of min, opt and max."""

    def __init__(self, *args: Any, **options: Any) -> None:
        assert not args
        assert ("shape" in options) != all(f"{end}_shape" in options for end in ("min", "opt", "max"))
        assert set(options) <= {"shape", "min_shape", "opt_shape", "max_shape", "dtype", "name"}
        self.options = options


def release(version: str) -> tuple[types.ModuleType, Recorded]:
    """A module with what `compile_torch_tensorrt` touches of 2.9, 2.11 or 2.14, whose engines are torch's own code."""
    module, dynamo, told = types.ModuleType("torch_tensorrt"), types.ModuleType("torch_tensorrt.dynamo"), Recorded()

    def compiled(program: Any, arg_inputs: Any, options: dict[str, Any]) -> Any:
        assert isinstance(program, torch.export.ExportedProgram)
        told.program, (told.input,), told.options = program, arg_inputs, options
        if told.refuse is not None:
            raise told.refuse
        warnings.warn("`use_explicit_typing` is deprecated.", DeprecationWarning, stacklevel=2)
        return program.module()

    def with_weak_typing(
        exported_program: Any, inputs: Any = None, *, arg_inputs: Any = None, kwarg_inputs: Any = None, device: Any = None,
        disable_tf32: bool = False, enabled_precisions: Any = (torch.float32,), workspace_size: int = 0,
        require_full_compilation: bool = False, min_block_size: int = 5, optimization_level: int | None = None,
        use_python_runtime: bool = False, use_explicit_typing: bool = False, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if use_explicit_typing:
            assert set(enabled_precisions) == {torch.float32}  # as 2.11 asserts
        assert not kwargs
        given = {
            "device": device, "disable_tf32": disable_tf32, "workspace_size": workspace_size,
            "require_full_compilation": require_full_compilation, "optimization_level": optimization_level,
            "use_python_runtime": use_python_runtime, "use_explicit_typing": use_explicit_typing,
        }  # fmt: skip
        return compiled(exported_program, arg_inputs, given)

    def strongly_typed(
        exported_program: Any, inputs: Any = None, *, arg_inputs: Any = None, kwarg_inputs: Any = None, device: Any = None,
        disable_tf32: bool = False, workspace_size: int = 0, require_full_compilation: bool = False,
        min_block_size: int = 5, optimization_level: int | None = None, use_python_runtime: bool = False,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        assert not kwargs  # the real one takes and forgets them
        given = {
            "device": device, "disable_tf32": disable_tf32, "workspace_size": workspace_size,
            "require_full_compilation": require_full_compilation, "optimization_level": optimization_level,
            "use_python_runtime": use_python_runtime,
        }  # fmt: skip
        return compiled(exported_program, arg_inputs, given)

    def write(compiled: Any, file_path: str, output_format: str, arg_inputs: Any, reads_ranges: bool) -> None:
        told.save = {"output_format": output_format, "arg_inputs": arg_inputs}
        (given,) = arg_inputs
        if output_format == "torchscript":
            torch.jit.save(torch.jit.trace(compiled, arg_inputs), file_path)  # an Input cannot be traced with
            return
        assert output_format == "exported_program"
        assert isinstance(given, Input if reads_ranges else torch.Tensor)
        torch.export.save(told.program, file_path)

    def save_with_ranges(
        module: Any, file_path: str = "", *, extra_files: Any = None, output_format: str = "exported_program",
        inputs: Any = None, arg_inputs: Any = None, kwarg_inputs: Any = None, retrace: bool = True,
        pickle_protocol: int = 2, dynamic_shapes: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        assert not kwargs
        write(module, file_path, output_format, arg_inputs, reads_ranges=True)

    def save_without(
        module: Any, file_path: str = "", *, output_format: str = "exported_program", inputs: Any = None,
        arg_inputs: Any = None, kwarg_inputs: Any = None, retrace: bool = False,
    ) -> None:  # fmt: skip
        write(module, file_path, output_format, arg_inputs, reads_ranges=False)

    dynamo.compile = strongly_typed if version.startswith("2.14") else with_weak_typing
    module.dynamo, module.Input, module.__version__ = dynamo, Input, version
    module.save = save_without if version.startswith("2.9") else save_with_ranges
    module.ENABLED_FEATURES = types.SimpleNamespace(torch_tensorrt_runtime=True)
    return module, told


@pytest.fixture
def install(monkeypatch):
    def installed(version: str) -> Recorded:
        module, told = release(version)
        monkeypatch.setitem(sys.modules, "torch_tensorrt", module)
        return told

    return installed


@pytest.fixture(scope="module")
def cnn():
    loaded = networks.trained_like("test_resnet", out_indices=(1, 4))
    spec = networks.input_spec((64, 96, 160), (64, 64, 128), batch=(1, 1, 8), size_multiple=32)
    return loaded, prepare(loaded, spec)


@pytest.fixture(scope="module")
def camera():
    loaded = networks.trained_like("test_efficientnet", out_indices=(1, 3))
    return loaded, prepare(loaded, networks.input_spec(64, 96, batch=2, name="image"))


def compile_here(prepared, **options) -> bytes:
    """On the CPU: the modules that stand in for torch_tensorrt compile for any device."""
    return compile_torch_tensorrt(prepared.module, prepared.input, device="cpu", **options)


def opened(data: bytes, prepared) -> TorchScriptSession:
    return TorchScriptSession(data, input=prepared.input, outputs=prepared.spec.outputs)


# ---- what it is asked -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.9.0", "2.11.0", "2.14.0"])
@pytest.mark.parametrize("output_format", ["torchscript", "exported_program"])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.BF16])
def test_a_file_of_every_form_and_precision_computes_the_network(install, cnn, version, output_format, precision):
    loaded, prepared = cnn
    told = install(version)
    data = compile_here(prepared, precision=precision, output_format=output_format)
    images = np.random.default_rng(0).standard_normal((1, 3, 96, 64), dtype=np.float32)
    bound = {Precision.FP32: 1e-5, Precision.FP16: 0.01, Precision.BF16: 0.05}[precision]
    session = opened(data, prepared)
    # A libtorch program takes what the file returns, without this package in between.
    assert {feature_map.dtype for feature_map in session._module(torch.from_numpy(images))} == {torch.float32}
    for actual, expected in zip(session.run(images), networks.maps_of(loaded.module, images), strict=True):
        assert networks.relative(actual, expected) < bound
    dtype = {Precision.FP32: torch.float32, Precision.FP16: torch.float16, Precision.BF16: torch.bfloat16}[precision]
    convolutions = [node for node in told.program.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    assert {node.meta["val"].dtype for node in convolutions} == {dtype}


def test_number_formats_are_never_flags(install, cnn):
    _, prepared = cnn
    device = torch.device("cpu")
    told = install("2.11.0")
    compile_here(prepared, precision=Precision.FP16, workspace=1 << 30, level=3)
    assert told.options == {
        "device": device, "disable_tf32": False, "workspace_size": 1 << 30, "require_full_compilation": True,
        "optimization_level": 3, "use_python_runtime": False, "use_explicit_typing": True,
    }  # fmt: skip
    told = install("2.14.0")
    compile_here(prepared, precision=Precision.FP32, allow_torch=True)
    assert told.options == {
        "device": device, "disable_tf32": True, "workspace_size": 0, "require_full_compilation": False,
        "optimization_level": None, "use_python_runtime": False,
    }  # fmt: skip


def test_ranges_become_one_profile_and_steps_stay_in_the_program(install, cnn):
    _, prepared = cnn
    told = install("2.14.0")
    data = compile_here(prepared, output_format="exported_program")
    assert told.input.options == {
        "min_shape": (1, 3, 64, 64), "opt_shape": (1, 3, 96, 64), "max_shape": (8, 3, 160, 128),
        "dtype": torch.float32, "name": "pixel_values",
    }  # fmt: skip
    assert told.save["arg_inputs"] == [told.input]
    session = opened(data, prepared)
    for shape in [(1, 3, 64, 64), (8, 3, 160, 128), (3, 3, 128, 96)]:
        images = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
        expected = networks.maps_of(prepared.module, images)
        for actual, reference in zip(session.run(images), expected, strict=True):
            assert networks.relative(actual, reference) < 1e-5


def test_ends_of_a_range_are_moved_to_the_step(install):
    loaded = networks.trained_like("test_resnet", out_indices=(1,))
    spec = networks.input_spec((33, 64, 127), 64, size_multiple=32)
    told = install("2.11.0")
    compile_here(prepare(loaded, spec))
    shapes = [told.input.options[f"{end}_shape"] for end in ("min", "opt", "max")]
    assert shapes == [(1, 3, 64, 64), (1, 3, 64, 64), (1, 3, 96, 64)]


def test_camera_frames_are_uint8_channels_last(install, camera, photographs):
    loaded, prepared = camera
    told = install("2.14.0")
    data = compile_here(prepared, precision=Precision.FP16)
    assert told.input.options == {"shape": (2, 64, 96, 3), "dtype": torch.uint8}
    (example,) = told.save["arg_inputs"]
    assert (example.shape, example.dtype) == ((2, 64, 96, 3), torch.uint8)
    frames = networks.crops(photographs, 2, 64, 96)
    expected = networks.maps_of(loaded.module, networks.normalised(frames, loaded.image_config))
    for actual, reference in zip(opened(data, prepared).run(frames), expected, strict=True):
        assert networks.relative(actual, reference) < 0.01


def test_the_network_is_left_as_it_was(install, cnn):
    _, prepared = cnn
    install("2.14.0")
    before = {name: value.clone() for name, value in prepared.module.state_dict().items()}
    compile_here(prepared, precision=Precision.FP16)
    after = prepared.module.state_dict()
    assert list(after) == list(before)
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())


# ---- an installation that does not import ---------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A torch_tensorrt on disk that puts its own `tensorrt` in place, as the real one does, and then runs ``code``."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    mine = types.ModuleType("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", mine)

    def write(code: str) -> types.ModuleType:
        folder = tmp_path / "torch_tensorrt"
        folder.mkdir()
        (folder / "__init__.py").write_text("from torch_tensorrt import _proxy, _features\n")
        (folder / "_proxy.py").write_text("import sys, types\nsys.modules['tensorrt'] = types.ModuleType('tensorrt')\n")
        (folder / "_features.py").write_text(code)
        return mine

    return write


IMPORT_FAILURES = {
    "no driver": (f"raise RuntimeError({NO_DRIVER!r})", "RuntimeError: Found no NVIDIA driver on your system"),
    "another TensorRT": (
        "raise ModuleNotFoundError(\"No module named 'tensorrt_rtx_bindings.plugin'\", name='tensorrt_rtx_bindings.plugin')",
        "ModuleNotFoundError: No module named 'tensorrt_rtx_bindings.plugin'",
    ),
    "no library": (
        "import ctypes\nctypes.CDLL('libnvinfer_that_is_not_there.so.10')",
        "OSError: libnvinfer_that_is_not_there.so.10: cannot open shared object file",
    ),
    "a warning": (
        "import warnings\nwarnings.warn('old')\nraise ValueError('no such option')",
        "ValueError: no such option",
    ),
}


@pytest.mark.parametrize("failure", IMPORT_FAILURES)
def test_an_import_that_fails_is_a_compile_error_with_the_reason(package, monkeypatch, cnn, failure):
    monkeypatch.setattr(gpus, "no_gpu_reason", lambda: "no NVIDIA driver (libcuda.so.1 is missing)")
    code, said = IMPORT_FAILURES[failure]
    mine = package(code)
    for _ in range(2):  # what is left of the first attempt must not change the second
        with pytest.raises(CompileError) as caught:
            compile_here(cnn[1])
        assert f"is installed and does not import ({said}" in str(caught.value)
        assert "it needs an NVIDIA GPU: no NVIDIA driver (libcuda.so.1 is missing)" in str(caught.value)
    assert sys.modules["tensorrt"] is mine
    assert not [name for name in sys.modules if name.startswith("torch_tensorrt")]


def test_with_a_gpu_the_advice_is_about_versions(package, monkeypatch):
    monkeypatch.setattr(gpus, "no_gpu_reason", lambda: "")
    package(IMPORT_FAILURES["another TensorRT"][0])
    with pytest.raises(EngineMismatchError, match=r"install the release that is made for this torch .*pip check"):
        load_torch_tensorrt()


def test_without_it_the_message_is_the_install_command(monkeypatch, cnn):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'edge-backbones\[torch-tensorrt\]'"):
        compile_here(cnn[1])


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_without_a_gpu_nothing_is_compiled(install, monkeypatch, cnn):
    install("2.14.0")
    monkeypatch.setattr(gpus, "no_gpu_reason", lambda: "no NVIDIA driver (libcuda.so.1 is missing)")
    with pytest.raises(CompileError, match="cuda needs an NVIDIA GPU: no NVIDIA driver"):
        compile_torch_tensorrt(cnn[1].module, cnn[1].input)


def test_what_tensorrt_refuses_carries_its_words(install, cnn):
    told = install("2.11.0")
    told.refuse = AssertionError("trace of many lines\n\nNot all ops are supported: aten.col2im")
    with pytest.raises(CompileError, match=r"2\.11\.0 cannot compile this network in fp16: Not all ops .* allow_torch"):
        compile_here(cnn[1], precision=Precision.FP16)
    with pytest.raises(CompileError) as caught:
        compile_here(cnn[1], allow_torch=True)
    assert "allow_torch" not in str(caught.value)


def test_a_build_without_the_runtime_is_refused(install, cnn):
    install("2.14.0")
    sys.modules["torch_tensorrt"].ENABLED_FEATURES.torch_tensorrt_runtime = False
    with pytest.raises(CompileError, match="came without libtorchtrt_runtime"):
        compile_here(cnn[1])


def test_a_release_that_lacks_an_option_is_refused(install, cnn):
    install("2.14.0")
    sys.modules["torch_tensorrt"].dynamo.compile = lambda exported_program, *, arg_inputs, device: None
    with pytest.raises(CompileError, match="does not know require_full_compilation, disable_tf32"):
        compile_here(cnn[1])


class _FixedSize(nn.Module):
    def forward(self, x):
        if x.shape[2] > 100:
            return (x * 2,)
        return (x + 1,)


def test_a_network_that_fixes_its_size_is_an_export_error(install):
    install("2.14.0")
    spec = networks.input_spec((64, 96, 160), 64)
    with pytest.raises(
        ExportError, match=r"cannot be exported with float32 NCHW .*; compile it for a fixed batch and size"
    ):
        compile_torch_tensorrt(_FixedSize().eval(), spec, device="cpu")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": Precision.INT8}, CompileError, "fp32, fp16 and bf16 here, not int8"),
        ({"output_format": "aot_inductor"}, InputError, "must be torchscript or exported_program, got 'aot_inductor'"),
        ({"workspace": 0}, InputError, "workspace must be at least 1 byte, got 0"),
        ({"level": 6}, InputError, "builder level must be 0 to 5, got 6"),
    ],
)
def test_what_is_asked_wrongly_is_refused_before_anything_is_imported(monkeypatch, cnn, options, error, message):
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(error, match=message):
        compile_here(cnn[1], **options)


def test_a_torchscript_module_is_refused(install):
    install("2.14.0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        module = torch.jit.trace(nn.Identity(), torch.zeros(1))
    with pytest.raises(InputError, match=r"pass the nn\.Module that it was traced from"):
        compile_torch_tensorrt(module, networks.input_spec(64, 64), device="cpu")
