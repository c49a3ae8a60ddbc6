"""Flags of the command line: they stay as recorded in tests/golden/cli_flags.json, and what is typed reaches the library.

A flag that is new or gone on purpose is recorded with ``python -m tests.unit.cli.test_cli_flags``.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import subprocess
import sys
import types
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.main import get_command

from edge_backbones.bench.compare import CompareOptions
from edge_backbones.bundle.reader import Bundle
from edge_backbones.cli import bench, build, options, triton
from edge_backbones.cli import compile as compiling
from edge_backbones.cli.main import COMMANDS, _run, app
from edge_backbones.engines.tensorrt.options import PlanOptions, Shapes
from edge_backbones.errors import InputError
from edge_backbones.integrations.triton import TritonOptions
from edge_backbones.option import options_of
from edge_backbones.spec import Precision, ShapeRange
from edge_backbones.toolchain.options import BuildOptions

GOLDEN = Path(__file__).parents[2] / "golden" / "cli_flags.json"


def plain(value: Any) -> Any:
    """Return a default as it is typed."""
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def takes(annotation: Any) -> str:
    """Return the name of the type of one value, or its choices."""
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "|".join(member.value for member in annotation)
    parts = [part for part in typing.get_args(annotation) if part is not types.NoneType]
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(parts)
    return takes(parts[0]) if parts else annotation.__name__


def flags() -> dict[str, dict[str, str]]:
    """Return what each command takes, by command and by the names of each option or argument."""
    found: dict[str, dict[str, str]] = {}
    group = get_command(app)
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        hints = typing.get_type_hints(command.callback, include_extras=True)
        found[name] = {}
        for parameter in command.params:
            annotation, info = typing.get_args(hints[parameter.name])
            words = [parameter.param_type_name, takes(annotation), f"default {plain(parameter.default)!r}"]
            if info.min is not None or info.max is not None:
                words.append(f"from {info.min} to {info.max}")
            if parameter.nargs == -1 or getattr(parameter, "multiple", False):
                words.append("repeats")
            if parameter.required:
                words.append("required")
            found[name][" ".join((*parameter.opts, *parameter.secondary_opts))] = ", ".join(words)
    return found


def test_every_flag_is_as_it_was_recorded():
    assert flags() == json.loads(GOLDEN.read_text(encoding="utf-8"))


# Fields of an options dataclass that are no flags of their own.
NOT_FLAGS = {
    BuildOptions: {
        "height": "--size holds height and width",
        "width": "--size holds height and width",
        "gates": "a gate has three bounds for each precision: programs set them",
        "cache": "the command line always uses the cache of the user",
    },
    PlanOptions: {},
    CompareOptions: {
        "engine": "the flag that several commands share",
        "device": "the flag that several commands share",
        "threads": "the flag that several commands share",
        "allow_host_code": "the flag that several commands share",
        "images": "the flag names a folder, the field holds inputs of the bundle's graph",
        "calls": "--seconds says how long a turn takes; programs that test this package set a number of calls",
        "patience": "a limit of time for a peer that hangs",
        "repository": "benchmarks of this repository record their commit",
    },
    TritonOptions: {
        "allow_host_code": "the flag that several commands share",
        "overwrite": "the flag stands behind the arguments, as that of pack does",
    },
}
COMMAND_OF = {
    BuildOptions: build.build,
    PlanOptions: compiling.compile_,
    CompareOptions: bench.bench,
    TritonOptions: triton.export,
}


@pytest.mark.parametrize("declared", NOT_FLAGS)
def test_every_field_is_a_flag_or_has_a_reason_not_to_be(declared):
    explained = {name for name, (_, option) in options_of(declared).items() if option.has_flag}
    fields = {field.name for field in dataclasses.fields(declared)}
    assert explained | set(NOT_FLAGS[declared]) == fields
    assert not explained & set(NOT_FLAGS[declared])
    made = [flag.parameter.name for _, flag in options._flags(declared, {})]
    assert len(made) == len(explained)
    taken = inspect.signature(COMMAND_OF[declared]).parameters
    assert "given" not in taken
    assert len(taken) >= len(made)


def test_every_flag_has_a_help_text_that_is_a_sentence():
    group = get_command(app)
    for name in COMMANDS:
        for parameter in group.get_command(None, name).params:
            text = parameter.help
            assert text, f"{name} {parameter.opts}"
            assert text[0].isupper() or text.startswith("NAME="), text
            assert text.endswith("."), text


class Asked(Exception):
    """What a command asked of the library."""


@pytest.fixture
def ask(monkeypatch):
    """Run a command up to its library call; return the options of that call, or the exit code without one."""

    def stop(*_, options=None, plan=None, **__):
        raise Asked(options if plan is None else plan)

    def stop_compare(_, chosen, **__):
        raise Asked(chosen)

    monkeypatch.setattr(build, "build_bundle", stop)
    monkeypatch.setattr(compiling.deploy, "compile_bundle", stop)
    monkeypatch.setattr(compiling.deploy, "profile_here", lambda *_: None)
    monkeypatch.setattr(Bundle, "open", lambda _: None)
    monkeypatch.setattr(bench, "compare", stop_compare)

    def run(*arguments: object):
        try:
            return _run([*map(str, arguments)])
        except Asked as asked:
            return asked.args[0]

    return run


def test_a_build_without_flags_has_the_defaults_of_the_library(ask):
    assert ask("build", "resnet18", "x.bundle") == BuildOptions()


def test_what_is_typed_for_a_build_reaches_the_library(ask):
    typed = (
        "--weights random:1 --from-model --num-channels 4 --output-stride 8 --out-indices=-2,-1 --out-features a,b "
        "--hidden-states --dataset-index 2 --image-processor here --input image --batch 1:4:8 --size 32x48:64x96:96x144 "
        "--precision int8 --precision fp16 --precision int8 --method percentile --percentile 99 --calibration c.json "
        "--exclude blocks.0 --exclude *.fc2 --no-fallback --profile t4 --golden 7 --flavour torch_tensorrt "
        "--flavour torchscript --program exported_program"
    )
    assert ask("build", "resnet18", "x.bundle", *typed.split()) == BuildOptions(
        weights="random:1",
        from_model=True,
        num_channels=4,
        output_stride=8,
        out_indices=(-2, -1),
        out_features=("a", "b"),
        hidden_states=True,
        dataset_index=2,
        image=Path("here"),
        input="image",
        batch=ShapeRange(min=1, opt=4, max=8),
        height=ShapeRange(min=32, opt=64, max=96),
        width=ShapeRange(min=48, opt=96, max=144),
        precisions=(Precision.INT8, Precision.FP16),
        method="percentile",
        percentile=99.0,
        calibration=Path("c.json"),
        exclude=("blocks.0", "*.fc2"),
        fallback=False,
        profile="t4",
        golden=7,
        flavours=("torch_tensorrt", "torchscript"),
        program="exported_program",
    )
    assert ask("build", "resnet18", "x.bundle", "--precision", "auto").precisions == "auto"
    assert not ask("build", "resnet18", "x.bundle", "--no-torchscript").torchscript


def test_what_is_typed_for_a_compilation_reaches_the_library(ask, tmp_path):
    cache = tmp_path / "x.cache"
    cache.write_bytes(b"timings")
    compiled = ("compile", "x.bundle", "--flavour", "tensorrt_rtx")
    assert ask(*compiled) == PlanOptions()
    typed = (
        "--shapes 1x224x256 --shapes 1:4:8x64x96 --target sm_89 --target sm_120 --workspace 3 --level 5 --tiling full "
        "--hardware-compatibility ampere_plus --version-compatible --embed-runtime --refit --strip --sparse --dla-core 1 "
        "--no-gpu-fallback --timing-cache"
    )

    def shapes(batch, height, width):
        sides = {"height": ShapeRange.fixed(height), "width": ShapeRange.fixed(width)}
        return Shapes(batch=batch, **sides)

    assert ask(*compiled, *typed.split(), cache) == PlanOptions(
        profiles=(shapes(ShapeRange.fixed(1), 224, 256), shapes(ShapeRange(min=1, opt=4, max=8), 64, 96)),
        targets=("sm_89", "sm_120"),
        workspace=3 << 20,
        level=5,
        tiling="full",
        hardware_compatibility="ampere_plus",
        version_compatible=True,
        embed_runtime=True,
        refit=True,
        strip=True,
        sparse=True,
        dla_core=1,
        gpu_fallback=False,
        timing_cache=b"timings",
    )
    assert ask(*compiled, "--timing-cache", tmp_path / "nothing") == 1


def test_what_is_typed_for_a_comparison_reaches_the_library(ask, monkeypatch):
    def same(one: CompareOptions, other: CompareOptions) -> bool:
        return dataclasses.replace(one, images=None) == dataclasses.replace(other, images=None)

    monkeypatch.setattr(Bundle, "open", lambda _: None)
    monkeypatch.setattr(bench.select, "device_for", lambda _, device, *__, **___: device.replace("auto", "cpu"))
    assert same(ask("bench", "x.bundle"), CompareOptions())
    assert ask("bench", "x.bundle", "--device", "cuda").vs == ("torch", "onnxruntime")
    images = np.zeros((1, 2))
    monkeypatch.setattr(bench, "read_images", lambda *_: images)
    typed = (
        "--vs openvino,,nncf --engine int8 --threads 3 --turns 7 --seconds 0.5 --peer-python nncf=py "
        "--peer-python openvino=p --allow-host-code --images photos"
    )
    asked = ask("bench", "x.bundle", *typed.split())
    assert asked.images is images
    expected = CompareOptions(
        vs=("openvino", "nncf"),
        engine="int8",
        threads=3,
        turns=7,
        seconds=0.5,
        pythons={"nncf": "py", "openvino": "p"},
        allow_host_code=True,
    )
    assert same(asked, expected)


def test_what_is_typed_for_a_model_repository_reaches_the_library(monkeypatch):
    asked = []

    def stop(*arguments: Any) -> None:
        asked.append(arguments)
        raise InputError("enough")

    monkeypatch.setattr(triton, "export_triton", stop)
    typed = (
        "--backend python --backend openvino --engine int8 --name n --stages a,b --ensemble rgb --reference --device cuda:1 "
        "--instances 2 --max-batch 3 --threads 4 --no-warmup --allow-host-code --overwrite"
    )
    assert _run(["export-triton", "x.bundle", "models", *typed.split()]) == 1
    assert _run(["export-triton", "x.bundle", "models"]) == 1
    options = TritonOptions(
        backends=("python", "openvino"),
        engine="int8",
        name="n",
        stages=("a", "b"),
        ensemble="rgb",
        reference=True,
        device="cuda:1",
        instances=2,
        max_batch=3,
        threads=4,
        warmup=False,
        allow_host_code=True,
        overwrite=True,
    )
    paths = Path("x.bundle"), Path("models")
    assert asked == [(*paths, options), (*paths, TritonOptions())]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", "x", "y", "--precision", "auto", "--precision", "int8"], "--precision: auto chooses among all"),
        (["build", "x", "y", "--batch", "a"], "--batch: 'a' is not a size or MIN:OPT:MAX"),
        (["build", "x", "y", "--size", "a"], "--size: 'a' is not HxW"),
        (["build", "x", "y", "--out-indices", "a"], "--out-indices: 'a' is not a list of integers"),
        (["compile", "x", "--shapes", "1x2"], "--shapes: '1x2' is not BATCHxHEIGHTxWIDTH"),
        (["compile", "x", "--level", "6"], "--level"),
    ],
)
def test_a_usage_error_names_the_option(ask, capsys, arguments, said):
    assert ask(*arguments) == 2
    assert said in capsys.readouterr().err


def test_a_value_that_the_options_of_the_library_never_take_is_a_usage_error(ask, capsys):
    with pytest.raises(InputError):
        BuildOptions(golden=3, percentile=101)
    assert ask("build", "x", "y", "--percentile", "101") == 2
    assert "percentile in (0, 100]" in capsys.readouterr().err


def test_commands_are_imported_when_they_are_used():
    code = (
        "import sys\n"
        "from edge_backbones.cli.main import _run\n"
        "def loaded(): return {name for name in sys.modules if name.startswith('edge_backbones')}\n"
        "extras = ('torch timm transformers onnx onnxruntime openvino tensorrt tensorrt_rtx cuda matplotlib jinja2 PIL '\n"
        "          'cryptography model_signing pynvml psutil av cv2 zarr').split()\n"
        "def heavy(): return sys.modules.keys() & extras\n"
        "_run(['--version'])\n"
        "assert not any(name.startswith(('edge_backbones.toolchain', 'edge_backbones.engines')) for name in loaded())\n"
        "for arguments in (['--help'], ['build', '--help'], ['compile', '--help'], ['bench', '--help'], ['run', '--help'],\n"
        "    ['nonsense']):\n"
        "    _run(arguments)\n"
        "    assert not heavy(), heavy()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(flags(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
