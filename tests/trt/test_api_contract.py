"""Our code against NVIDIA's own bindings of every supported release: no name, argument or guard in it is a guess.

The bindings lie on stub libraries (``build_scripts/fetch_bindings.py``): what they have can be seen, nothing runs.
"""

from __future__ import annotations

import ast
import functools
import json
import re
from collections import deque
from pathlib import Path
from platform import machine
from textwrap import dedent
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest

from build_scripts.fetch_bindings import RELEASES, Release, fetch
from tests.trt.bindings import MODULE, OURS, ROOT, Api, Source, broken, read_api, run_with

RTX, LEAN = "tensorrt_rtx-1.7", "tensorrt_lean-11.4"
WEAKLY_TYPED = ("tensorrt-10.3", "tensorrt-10.13", "tensorrt-10.16")
BUILDERS = (*WEAKLY_TYPED, "tensorrt-11.4", RTX)
EVERYWHERE = (*BUILDERS, LEAN)
NEWER = tuple(release for release in EVERYWHERE if release != "tensorrt-10.3")

# The releases that each of our modules runs with.
MODULES = {
    "engines/tensorrt/library.py": EVERYWHERE,
    "engines/tensorrt/engine.py": EVERYWHERE,
    "engines/tensorrt/contexts.py": EVERYWHERE,
    "engines/tensorrt/slot.py": EVERYWHERE,
    "engines/tensorrt/session.py": EVERYWHERE,
    "engines/tensorrt/graphed.py": EVERYWHERE,
    "engines/tensorrt/kernels.py": (RTX,),
    "engines/tensorrt/compile.py": BUILDERS,
    "engines/tensorrt/requests.py": BUILDERS,
    "engines/tensorrt/dla.py": BUILDERS,
    "engines/tensorrt/messages.py": BUILDERS,
    "engines/tensorrt/needs.py": BUILDERS,
    "engines/tensorrt/options.py": BUILDERS,
}

PLAN = "edge_backbones/engines/ports.py"

# What our code touches: class -> the releases that have it -> names.
TOUCHED: dict[str, dict[tuple[str, ...], str]] = {
    MODULE: {
        EVERYWHERE: "BuilderFlag DeviceType ExecutionContextAllocationStrategy HardwareCompatibilityLevel ILogger "
        "IProgressMonitor LayerInformationFormat MemoryPoolType ProfilingVerbosity Refitter Runtime",
        BUILDERS: "Builder EngineInspector NetworkDefinitionCreationFlag OnnxParser OnnxParserFlag OnnxParserRefitter",
        NEWER: "TilingOptimizationLevel",
        (RTX,): "ComputeCapability DynamicShapesKernelSpecializationStrategy",
        WEAKLY_TYPED: "IInt8EntropyCalibrator2",
    },
    "Builder": {
        BUILDERS: "build_serialized_network create_builder_config create_network create_optimization_profile num_DLA_cores"
    },
    "BuilderFlag": {
        EVERYWHERE: "EXCLUDE_LEAN_RUNTIME GPU_FALLBACK REFIT REFIT_IDENTICAL SPARSE_WEIGHTS STRIP_PLAN TF32 "
        "VERSION_COMPATIBLE",
        WEAKLY_TYPED: "FP16 INT8",
        (RTX,): "REQUIRE_USER_ALLOCATION",
    },
    "DataType": {EVERYWHERE: "itemsize name"},
    "DeviceType": {EVERYWHERE: "DLA"},
    "DynamicShapesKernelSpecializationStrategy": {(RTX,): "EAGER"},
    "EngineInspector": {BUILDERS: "get_engine_information"},
    "ExecutionContextAllocationStrategy": {EVERYWHERE: "USER_MANAGED"},
    "IBuilderConfig": {
        BUILDERS: "DLA_core add_optimization_profile builder_optimization_level can_run_on_DLA clear_flag "
        "create_timing_cache "
        "default_device_type get_timing_cache hardware_compatibility_level profiling_verbosity progress_monitor set_flag "
        "set_memory_pool_limit set_timing_cache",
        tuple(release for release in BUILDERS if release != "tensorrt-10.3"): "tiling_optimization_level",
        (RTX,): "num_compute_capabilities set_compute_capability",
        WEAKLY_TYPED: "int8_calibrator",
    },
    "ICudaEngine": {
        EVERYWHERE: "create_engine_inspector create_execution_context get_tensor_dtype get_tensor_mode "
        "get_tensor_name get_tensor_profile_shape get_tensor_shape num_io_tensors num_optimization_profiles",
        NEWER: "create_runtime_config",
    },
    "IExecutionContext": {
        EVERYWHERE: "execute_async_v3 get_tensor_shape infer_shapes set_device_memory set_input_shape "
        "set_optimization_profile_async set_tensor_address update_device_memory_size_for_shapes",
        (RTX,): "is_stream_capturable",
    },
    "ILayer": {BUILDERS: "get_input get_output name num_inputs num_outputs type"},
    "ILogger": {EVERYWHERE: "Severity log"},
    "ILogger.Severity": {EVERYWHERE: "ERROR INTERNAL_ERROR WARNING"},
    "INetworkDefinition": {BUILDERS: "get_input get_layer num_inputs num_layers"},
    "IOptimizationProfile": {EVERYWHERE: "set_shape"},
    "IProgressMonitor": {EVERYWHERE: "phase_finish phase_start step_complete"},
    "IInt8EntropyCalibrator2": {
        WEAKLY_TYPED: "get_batch get_batch_size read_calibration_cache write_calibration_cache"
    },
    "IRuntimeCache": {(RTX,): "deserialize serialize"},
    "IRuntimeConfig": {
        NEWER: "set_execution_context_allocation_strategy",
        (RTX,): "create_runtime_cache dynamic_shapes_kernel_specialization_strategy set_runtime_cache",
    },
    "ITensor": {BUILDERS: "dtype name shape"},
    "ITimingCache": {EVERYWHERE: "serialize"},
    "LayerInformationFormat": {EVERYWHERE: "JSON"},
    "LayerType": {BUILDERS: "name"},
    "MemoryPoolType": {EVERYWHERE: "WORKSPACE"},
    "NetworkDefinitionCreationFlag": {BUILDERS: "STRONGLY_TYPED"},
    "OnnxParser": {BUILDERS: "get_error num_errors parse set_flag"},
    "OnnxParserFlag": {("tensorrt-10.16", "tensorrt-11.4", RTX): "ADJUST_FOR_DLA"},
    "ParserError": {BUILDERS: "desc node_operator"},
    "ProfilingVerbosity": {EVERYWHERE: "DETAILED"},
    "OnnxParserRefitter": {BUILDERS: "refit_from_bytes"},
    "Refitter": {EVERYWHERE: "refit_cuda_engine"},
    "Runtime": {EVERYWHERE: "DLA_core deserialize_cuda_engine engine_host_code_allowed"},
    "TensorIOMode": {EVERYWHERE: "name"},
}

# Members that our code has as text only: compared with `.name`, or made from an option.
AS_TEXT: dict[str, dict[tuple[str, ...], str]] = {
    "ComputeCapability": {(RTX,): "SM80 SM86 SM89 SM120"},
    "HardwareCompatibilityLevel": {
        EVERYWHERE: "AMPERE_PLUS",
        NEWER: "SAME_COMPUTE_CAPABILITY",
    },
    "DataType": {EVERYWHERE: "FLOAT UINT8"},
    "LayerType": {BUILDERS: "CONSTANT SHAPE"},
    "TilingOptimizationLevel": {NEWER: "FAST FULL MODERATE"},
    "TensorIOMode": {EVERYWHERE: "INPUT OUTPUT"},
}

# The class of what has this name, where neither its origin nor its annotation tells.
RECEIVERS = {
    "builder": "Builder",
    "cache": "IRuntimeCache",
    "self._cache": "IRuntimeCache",
    "config": "IBuilderConfig",
    "options": "IRuntimeConfig",
    "context": "IExecutionContext",
    "memory.aside": "IExecutionContext",
    "engine": "ICudaEngine",
    "get_error": "ParserError",
    "handle": "ICudaEngine",
    "layer": "ILayer",
    "importlib.import_module": MODULE,
    "library": MODULE,
    "load_library": MODULE,
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "runtime": "Runtime",
    "strategies": "ExecutionContextAllocationStrategy",
    "tensor": "ITensor",
    **dict.fromkeys(
        (
            "array",
            "bound_to",
            "buffer",
            "card",
            "field",
            "gpu",
            "inner",
            "log",
            "logger",
            "outer",
            "output",
            "part",
            "piece",
            "shapes",
            "size",
            "slot",
            "slots",
        ),
        OURS,
    ),
}


@functools.cache
def api(release: Release) -> Api:
    return read_api(release)


def here(names: tuple[str, ...]) -> list[Api]:
    """The releases of these names that have wheels for this Python."""
    return [api(release) for release in RELEASES if str(release) in names and not release.why_not_here()]


def read(text: str) -> Source:
    return Source(dedent(text), here(EVERYWHERE), RECEIVERS, given=("made",), computed=tuple(AS_TEXT), ours=our_names())


def broken_in(source: Source, names: tuple[str, ...]) -> list[str]:
    releases = here(names)
    return broken(source, releases, complete=len(releases) == len(names))


@functools.cache
def our_names() -> set[str]:
    """What objects of ours, of Python and of numpy have."""
    names = {name for one in (str, bytes, list, dict, deque, float, np.ndarray, np.dtype, Thread) for name in dir(one)}
    for path in (ROOT / "edge_backbones").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
                names |= {ast.unparse(target).removeprefix("self.") for target in targets}
    return names


@functools.cache
def source(module: str) -> Source:
    return read((ROOT / "edge_backbones" / module).read_text(encoding="utf-8"))


@pytest.fixture(params=RELEASES, ids=str)
def release(request: pytest.FixtureRequest) -> Release:
    if why := request.param.why_not_here():
        pytest.skip(why)
    return request.param


def names_of(table: dict[str, dict[tuple[str, ...], str]]) -> set[tuple[str, str]]:
    return {(owner, name) for owner, expected in table.items() for texts in expected.values() for name in texts.split()}


# ---- our code -------------------------------------------------------------------------------------------------------


def test_a_release_has_what_the_tables_say(release: Release) -> None:
    bindings = api(release)
    for table in (TOUCHED, AS_TEXT):
        for owner, expected in table.items():
            names = {name: str(release) in releases for releases, texts in expected.items() for name in texts.split()}
            assert {name: bindings.member(owner, name) is not None for name in names} == names, owner


def test_the_tables_are_what_our_code_touches() -> None:
    touched = {(touch.owner, touch.name) for module in MODULES for touch in source(module).touches}
    assert sorted(touched - names_of(TOUCHED)) == []
    if len(here(EVERYWHERE)) == len(EVERYWHERE):  # a name that is written as text is known by the releases that have it
        assert sorted(names_of(TOUCHED) - touched) == []

    trees = [source(module).tree for module in MODULES] + [ast.parse((ROOT / PLAN).read_text(encoding="utf-8"))]
    texts = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    plain = {text.upper().replace("_", "") for text in texts if isinstance(text, str)}
    assert [name for _, name in sorted(names_of(AS_TEXT)) if name.replace("_", "") not in plain] == []


@pytest.mark.parametrize("module", MODULES)
def test_no_release_answers_our_code_with_an_error(module: str) -> None:
    found = broken_in(source(module), MODULES[module])
    assert not found, "\n".join(found)


@pytest.mark.parametrize("module", MODULES)
def test_pointers_are_ints(module: str) -> None:
    # Signatures say int, or SupportsInt: a numpy integer or a stream object passes in some releases only.
    loose = [
        f"{touch}: {ast.unparse(argument)}"
        for touch in source(module).touches
        if touch.how == "called"
        for name in ("memory", "stream", "stream_handle")
        for argument in source(module).arguments(touch, name)
        if not source(module).is_int(argument)
    ]
    assert not loose, "\n".join(loose)


def test_networks_are_made_with_flags_of_the_enum() -> None:
    # Numbers mean something else in each release; test_our_functions_... looks at what _network_flags gives.
    calls = [touch for module in MODULES for touch in source(module).touches if touch.name == "create_network"]
    assert calls
    assert [call.arguments for call in calls if not (call.arguments or ("",))[0].startswith("_network_flags(")] == []


BEHAVIOUR = """
import json, sys
from edge_backbones.engines.tensorrt.library import FLAVOURS, library_version, load_library, logger_of

flavour = sys.argv[1]
for other in FLAVOURS:  # real ones of this environment stay out
    sys.modules[other] = sys.modules[other + "_libs"] = None
    if other != flavour:
        sys.modules[other + "_bindings"] = None
library = load_library(flavour)
log = logger_of(library)
assert log is logger_of(library) and isinstance(log, library.ILogger)
log.log(library.ILogger.Severity.INTERNAL_ERROR, "the\\n  reason")
log.log(library.ILogger.Severity.WARNING, "a warning")
log.log(library.ILogger.Severity.INFO, "nothing")
found = {"log": [log.last_error(), *log.warnings], "versions": {name: library_version(name) for name in FLAVOURS}}

sys.modules["tensorrt"] = library  # torch-tensorrt-rtx does this
found["in its place"] = {name: library_version(name) for name in FLAVOURS}

if flavour != "tensorrt_lean":
    from edge_backbones.engines.tensorrt import compile as tensorrt
    found["flags"] = [tensorrt._network_flags(library, weak=weak) for weak in (False, True)]
    if hasattr(library.BuilderFlag, "INT8"):
        from edge_backbones.engines.tensorrt import dla
        calibrator = dla._calibrator(library, b"scales")
        found["calibrator"] = [calibrator.get_algorithm().name, calibrator.read_calibration_cache().decode()]
if flavour == "tensorrt_rtx":  # the one that needs no GPU to begin
    from edge_backbones.errors import CompileError
    from edge_backbones.spec import InputSpec, Precision, ShapeRange
    one = ShapeRange.fixed(8)
    try:
        input = InputSpec(name="x", channels=3, batch=one, height=one, width=one)
        tensorrt.compile_plan(b"", input, Precision.FP32, flavour=flavour)
    except CompileError as error:
        found["compile"] = str(error)
try:
    library.Runtime(log)
except TypeError as error:
    found["null"] = str(error)
print(json.dumps(found))
"""


def test_our_functions_with_a_library_of_each_release(release: Release) -> None:
    found = json.loads(run_with(release, ["-W", "error", "-c", BEHAVIOUR, release.flavour]))
    assert found["log"] == ["the reason", "a warning"]
    nothing = dict.fromkeys(("tensorrt", "tensorrt_rtx", "tensorrt_lean"))
    assert found["versions"] == {**nothing, release.flavour: release.version}
    # An RTX library under the name of TensorRT is none; the others are not told apart from it, and need not be.
    assert found["in its place"][release.flavour] == release.version
    assert (found["in its place"]["tensorrt"] is None) == (release.flavour == "tensorrt_rtx")
    if str(release) in BUILDERS:
        # The value of STRONGLY_TYPED: 1 beside EXPLICIT_BATCH, 0 since that is gone.
        calibrator = ["ENTROPY_CALIBRATION_2", "scales"] if str(release) in WEAKLY_TYPED else None
        assert found.get("calibrator") == calibrator
        assert found["flags"] == [2 if str(release) in WEAKLY_TYPED else 1, 0]
    # A null pointer comes as a TypeError of pybind11, and has to leave as our error.
    assert "nullptr" in found["null"]
    assert release.flavour != "tensorrt_rtx" or found["compile"]


# ---- the tests' own eyes: what they must find, and what they must let pass -------------------------------------------

FROM_11 = ("tensorrt-11.4", RTX)
FAULTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "a flag that is gone": (
        """
        def f(library, config):
            config.set_flag(library.BuilderFlag.FP16)
        """,
        "BuilderFlag.FP16 (read): {} lacks it",
        FROM_11,
    ),
    "a guard elsewhere in the function": (
        """
        def f(library, config):
            if hasattr(library.BuilderFlag, "FP16"):
                print("it is there")
            config.set_flag(library.BuilderFlag.FP16)
        """,
        "BuilderFlag.FP16 (read): {} lacks it",
        FROM_11,
    ),
    "a guard of something else": (
        """
        def f(library, image):
            return library.BuilderFlag.FP16 if hasattr(image, "__dlpack__") else None
        """,
        "BuilderFlag.FP16 (read): {} lacks it",
        FROM_11,
    ),
    "the wrong branch": (
        """
        def f(library):
            return None if hasattr(library.BuilderFlag, "FP16") else library.BuilderFlag.FP16
        """,
        "BuilderFlag.FP16 (read): {} lacks it",
        FROM_11,
    ),
    "a guard that asks for another name": (
        """
        def f(engine):
            if hasattr(engine, "device_memory_size_v2"):
                return engine.device_memory_size
        """,
        "ICudaEngine.device_memory_size (read): {} lacks it",
        FROM_11,
    ),
    "one caller without the guard": (
        """
        def _f(library):
            return library.ComputeCapability.SM89

        def g(library, flavour):
            return _f(library) if flavour == "tensorrt_rtx" else None

        def h(library):
            return _f(library)
        """,
        "library.ComputeCapability (read): {} lacks it",
        (*WEAKLY_TYPED, "tensorrt-11.4"),
    ),
    "an enum by another name": (
        """
        def f(library):
            flags = library.NetworkDefinitionCreationFlag
            return 1 << int(flags.EXPLICIT_BATCH)
        """,
        "NetworkDefinitionCreationFlag.EXPLICIT_BATCH (read): {} lacks it",
        FROM_11,
    ),
    "the result of a call": (
        """
        def f(library, log):
            loaded = library.Runtime(log).deserialize_cuda_engine(b"")
            return loaded.num_bindings
        """,
        "ICudaEngine.num_bindings (read): {} lacks it",
        BUILDERS,
    ),
    "a name as text": (
        """
        def f(library):
            wanted = {"SAME_COMPUTE_CAPABILITY": True}
            return [getattr(library.HardwareCompatibilityLevel, name) for name in wanted]
        """,
        "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY (read): {} lacks it",
        ("tensorrt-10.3",),
    ),
    "a missing argument": (
        """
        class Session:
            def f(self):
                self._context.set_tensor_address("x")
        """,
        "IExecutionContext.set_tensor_address (called): {} takes (name, memory)",
        BUILDERS,
    ),
    "an argument too many, with several signatures": (
        """
        def f(engine):
            engine.create_execution_context(1, 2)
        """,
        "ICudaEngine.create_execution_context (called): {}",
        BUILDERS,
    ),
    "a keyword that nobody knows": (
        """
        def f(context, stream):
            context.execute_async_v3(stream=stream)
        """,
        "IExecutionContext.execute_async_v3 (called): {} takes (stream_handle)",
        BUILDERS,
    ),
    "a method with too few parameters": (
        """
        def f(library):
            class Monitor(library.IProgressMonitor):
                def step_complete(self, step): ...
        """,
        "IProgressMonitor.step_complete (overridden): {} takes (phase_name, step)",
        BUILDERS,
    ),
    "a property that cannot be set": (
        """
        def f(engine):
            engine.num_io_tensors = 3
        """,
        "ICudaEngine.num_io_tensors (set): {} does not let it be set",
        BUILDERS,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_release_lacks_is_found(fault: str) -> None:
    text, message, releases = FAULTS[fault]
    found = [re.sub(r"^line \d+: ", "", line) for line in broken_in(read(text), BUILDERS)]
    expected = [message.format(one.release) for one in here(releases)]
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True)), found


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("x.set_tensor_address('y', 3)", "what has .set_tensor_address here? x"),
        ("ours.set_tensor_address('y', 3)", "what has .set_tensor_address here? ours"),
        ("x.y.num_io_tensors", "what has .num_io_tensors here? x.y"),
        ("hasattr(x, 'device_memory_size_v2')", "what has .device_memory_size_v2 here? x"),
        ("hasattr(library, 'ComputeCapabilty')", "library.ComputeCapabilty (asked): no release has it"),
        ("getattr(library.BuilderFlag, x)", "which names of BuilderFlag? getattr(library.BuilderFlag, x)"),
    ],
)
def test_what_cannot_be_told_is_found(expression: str, message: str) -> None:
    found = read(f"def f(library, x, ours: dict):\n    return {expression}")
    (problem,) = broken(found, here(EVERYWHERE))
    assert message in problem


@pytest.mark.parametrize(
    "text",
    [
        """
        def f(library):
            if hasattr(library.BuilderFlag, "FP16"):
                return library.BuilderFlag.FP16
        """,
        """
        def f(library):
            flags = library.BuilderFlag
            return flags.FP16 if hasattr(flags, "FP16") else None
        """,
        """
        def f(library):
            if not hasattr(library.BuilderFlag, "FP16"):
                return None
            return library.BuilderFlag.INT8
        """,
        """
        def f(library):
            return hasattr(library, "ComputeCapability") and library.ComputeCapability.SM89
        """,
        """
        def f(engine):
            return getattr(engine, "device_memory_size", 0)
        """,
        """
        def f(context, stream):
            ask = getattr(context, "is_stream_capturable", None)
            return ask is None or ask(stream)
        """,
        """
        def f(library, flavour):
            if flavour != "tensorrt_rtx":
                return None
            return library.ComputeCapability.SM89
        """,
        """
        def _f(library):
            return library.ComputeCapability.SM89

        def g(library, flavour):
            return _f(library) if flavour == "tensorrt_rtx" else None
        """,
        """
        def f(library, image: np.ndarray):
            return library.BuilderFlag.REFIT if hasattr(image, "shape") else library.BuilderFlag.STRIP_PLAN
        """,
    ],
)
def test_what_is_guarded_passes(text: str) -> None:
    found = read(text)
    assert found.touches
    assert broken_in(found, EVERYWHERE) == []


@pytest.mark.parametrize(
    ("argument", "fine"), [("int(x)", True), ("stream", True), ("x", False), ("x.ptr", False), ("handle", False)]
)
def test_a_pointer_that_may_be_no_int_is_found(argument: str, fine: bool) -> None:
    found = read(f"def f(context, x, stream: int, handle: int | None):\n    context.execute_async_v3({argument})")
    (touch,) = (touch for touch in found.touches if touch.name == "execute_async_v3")
    assert [found.is_int(one) for one in found.arguments(touch, "stream_handle")] == [fine]


# ---- fetching them --------------------------------------------------------------------------------------------------


def test_the_releases_are_those_that_are_fetched() -> None:
    assert tuple(map(str, RELEASES)) == EVERYWHERE


def test_no_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="needs a C compiler"):
        fetch(RELEASES[0], tmp_path / "bindings")
    assert not (tmp_path / "bindings").exists()


def test_a_python_without_wheels_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.version_info", SimpleNamespace(minor=14))
    missing = [str(release) for release in RELEASES if "this is 3.14" in release.why_not_here()]
    assert missing == [name for name in WEAKLY_TYPED if not (name == "tensorrt-10.3" and machine() != "x86_64")]
