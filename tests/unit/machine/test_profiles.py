"""Device profiles: what the files hold, who is recognised, and which builds are refused before they start."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from edge_backbones.engines.refusals import refusals
from edge_backbones.errors import InputError
from edge_backbones.machine.profiles import (
    FIRST_ARCHITECTURE,
    RTX_ARCHITECTURES,
    explain,
    list_profiles,
    load_profile,
    profile_of,
)
from edge_backbones.spec import InputSpec, Precision, ShapeRange

FOLDER = Path(__file__).parents[3] / "profiles"
FILES = sorted(FOLDER.glob("*.toml"))
ONE = ShapeRange.fixed(1)
SIDE = ShapeRange.fixed(224)
INPUT = InputSpec(name="pixel_values", channels=3, batch=ONE, height=SIDE, width=SIDE)
SOURCE = re.compile(r"NVIDIA|Datasheet|same page|^ours\b")


@dataclass(frozen=True)
class Detected:
    name: str
    architecture: str
    memory_bytes: int = 24 << 30
    integrated: bool = False


def orin(gib: float, name: str = "Orin") -> Detected:
    return Detected(name, "sm_87", int(gib * 2**30), integrated=True)


def test_the_devices_of_the_project_are_there_in_order():
    assert [profile.name for profile in list_profiles()] == [
        "cpu",
        "jetson-agx-orin",
        "jetson-orin-nano",
        "jetson-orin-nx",
        "jetson-thor",
        *("t4", "a100", "a10", "l4", "gh200", "h100", "h200", "b200"),
        *("rtx-30", "rtx-40", "rtx-50", "rtx-pro-blackwell"),
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_a_profile_of_its_name(path):
    profile = load_profile(path)
    assert profile.name == path.stem
    assert profile == load_profile(path.stem) == load_profile(str(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_figure_has_its_source_on_its_line(path):
    seen = 0
    for line in path.read_text().splitlines():
        match = re.fullmatch(r"(\w+) = (\"[^\"]*\"|[^#\"]*|\[[^\]#]*\])(?:\s+# (.*))?", line)
        if match is None or match[1] in ("name", "title", "device_names"):
            continue
        key, value, comment = match.groups()
        if re.search(r"\d", re.sub(r"\b(fp|bf|int)\d+\b", "", value)) or key in ("precisions", "dla"):
            assert comment, f"{path.name}: {line}: no source"
            assert SOURCE.search(comment), f"{path.name}: {line}: the comment names no source"
            seen += 1
    assert seen >= 3


@pytest.mark.parametrize("profile", list_profiles(), ids=lambda profile: profile.name)
def test_what_a_profile_says_agrees_with_itself(profile):
    assert profile.defaults.workspace_bytes is None or profile.defaults.workspace_bytes <= min(
        module.memory_gib * 2**30 / 4 for module in profile.modules
    )
    assert (profile.kind == "jetson") == profile.unified_memory
    assert ("tensorrt_rtx" in profile.flavours) == (profile.architecture in RTX_ARCHITECTURES)
    number = int((profile.architecture or "sm_999").removeprefix("sm_"))
    for precision, first in FIRST_ARCHITECTURE.items():
        assert (precision.value in profile.precisions) == (number >= first)
    if any(software.dla for software in profile.software):
        assert profile.dla_cores


@pytest.mark.parametrize("profile", list_profiles(), ids=lambda profile: profile.name)
def test_every_profile_explains_itself(profile):
    text = explain(profile)
    for words in (profile.name, profile.title, *profile.notes, *profile.pays.values(), *profile.flavours):
        assert words in text
    for module in profile.modules:
        assert f"{module.name}: {module.memory_gib:g} GiB" in text
        # Where no page of NVIDIA could be read, a figure is missing and nothing is said.
        assert module.bandwidth_gb_s is None or f"{module.bandwidth_gb_s:g} GB/s" in text
    assert text.count("GB/s") == sum(m.bandwidth_gb_s is not None for m in profile.modules) + str(profile.notes).count(
        "GB/s"
    )


def test_explaining_tells_dla_jetpack_and_defaults():
    text = explain(load_profile("jetson-orin-nx"))
    assert "8 GiB shared with the CPU, 102 GB/s, 1 DLA core\n" in text
    assert "TensorRT 10.3 to 10.7 on JetPack 6.1 to 6.2.2, with DLA\n" in text
    assert "defaults: batch 1..8 (best at 1), 224x224, workspace 1024 MiB\n" in text


def edited(tmp_path: Path, old: str, new: str, *, of: str = "t4") -> Path:
    text = (FOLDER / f"{of}.toml").read_text()
    assert text.count(old) == 1
    path = tmp_path / f"{of}.toml"
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('kind = "datacenter"', 'kind = "datacenter"\nwatts = 70', "unknown field `watts`"),
        ("memory_gib = 16", "memory_gb = 16", r"`memory_gb` - at `\$.modules\[.+\]`"),
        ("memory_gib = 16", "memory_gib = 0", r"\$.modules\[.+\].memory_gib"),
        ('kind = "datacenter"', 'kind = "cloud"', r"'cloud' - at `\$.kind`"),
        ('kind = "datacenter"', 'kind = "cpu"', "kind cpu and architecture sm_75"),
        ('"sm_75"', '"7.5"', r"\$.architecture"),
        ('"int8"]', '"int4"]', r"'int4' - at `\$.precisions"),
        ('"fp16", "int8"]', '"fp16"]', "pays has int8"),
        ('"tensorrt_rtx", ', '"TensorRT RTX", ', r"Expected `str` matching regex .* - at `\$.flavours"),
        ('"10.3 and later"', '"10.3+"', r"\$.software\[.+\].tensorrt"),
        ("opt = 8,", "opt = 80,", "1 <= min <= opt <= max"),
        ("size = 224", 'size = "224"', r"\$.defaults.size"),
        ('name = "t4"', 'name = "t5"', "its name is 't5', its file's 't4'"),
        ('title = "NVIDIA T4"', "title = ", "not a device profile: "),
    ],
)
def test_a_wrong_file_is_refused_with_file_and_field(tmp_path, old, new, complaint):
    path = edited(tmp_path, old, new)
    with pytest.raises(InputError, match=complaint) as caught:
        load_profile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gpu_without_memory_is_refused(tmp_path):
    text = (FOLDER / "t4.toml").read_text()
    head, tail = text.split("[[modules]]")
    (tmp_path / "t4.toml").write_text(head + "[[software]]" + tail.split("[[software]]")[1])
    with pytest.raises(InputError, match="a GPU needs at least one entry in modules"):
        load_profile(tmp_path / "t4.toml")


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.toml cannot be read: it does not exist"):
        load_profile(str(tmp_path / "none.toml"))
    with pytest.raises(InputError, match="cannot be read: it is a folder"):
        load_profile(tmp_path)
    (tmp_path / "big.toml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(InputError, match="cannot be read: it has 2097152 bytes, more than the 1048576 it may have"):
        load_profile(tmp_path / "big.toml")
    (tmp_path / "latin.toml").write_bytes('title = "é"'.encode("latin-1"))
    with pytest.raises(InputError, match="not a device profile"):
        load_profile(tmp_path / "latin.toml")


def test_a_profile_of_ones_own_works(tmp_path):
    path = tmp_path / "our-board.toml"
    path.write_text((FOLDER / "jetson-orin-nx.toml").read_text().replace('"jetson-orin-nx"', '"our-board"'))
    mine = load_profile(str(path))
    assert mine.name == "our-board"
    assert mine.dla_cores == 2
    assert mine not in list_profiles()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("orin-nano", "did you mean jetson-orin-nano"),
        ("Jetson AGX Orin", "did you mean jetson-agx-orin"),
        ("rtx30", "did you mean rtx-30"),
        ("h800", "did you mean h"),
        ("jetson-orin-nano-super", "did you mean jetson-orin-nano"),
        ("mi300x", "there are cpu, jetson-agx-orin"),
    ],
)
def test_an_unknown_name_is_answered_with_close_ones(name, hint):
    with pytest.raises(InputError, match=hint) as caught:
        load_profile(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("gpu", "board", "name"),
    [
        (None, "", "cpu"),
        (Detected("Tesla T4", "sm_75", 15 << 30), "", "t4"),
        (Detected("NVIDIA A10G", "sm_86"), "", "a10"),
        (Detected("NVIDIA A100-SXM4-80GB", "sm_80"), "", "a100"),
        (Detected("NVIDIA A100-PCIE-40GB", "sm_80"), "", "a100"),
        (Detected("NVIDIA L4", "sm_89"), "", "l4"),
        (Detected("NVIDIA H100 80GB HBM3", "sm_90"), "", "h100"),
        (Detected("NVIDIA H100 NVL", "sm_90"), "", "h100"),
        (Detected("NVIDIA H200", "sm_90", 140 << 30), "", "h200"),
        (Detected("NVIDIA H200 NVL", "sm_90", 140 << 30), "", "h200"),
        (Detected("NVIDIA H200 MIG 1g.18gb", "sm_90", 16 << 30), "", "h200"),
        (Detected("NVIDIA GH200 480GB", "sm_90", 95 << 30), "", "gh200"),
        (Detected("NVIDIA B200", "sm_100", 178 << 30), "", "b200"),
        (Detected("NVIDIA GB200", "sm_100", 184 << 30), "", "b200"),
        (Detected("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "sm_120", 95 << 30), "", "rtx-pro-blackwell"),
        (Detected("NVIDIA RTX PRO 6000 Blackwell Server Edition", "sm_120", 95 << 30), "", "rtx-pro-blackwell"),
        (Detected("NVIDIA RTX PRO 4000 Blackwell SFF Edition", "sm_120"), "", "rtx-pro-blackwell"),
        (Detected("NVIDIA GeForce RTX 3090", "sm_86"), "", "rtx-30"),
        (Detected("NVIDIA RTX A6000", "sm_86"), "", "rtx-30"),
        (Detected("NVIDIA GeForce RTX 4090 Laptop GPU", "sm_89"), "", "rtx-40"),
        (Detected("NVIDIA GeForce RTX 5090", "sm_120"), "", "rtx-50"),
        (orin(7.4), "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "jetson-orin-nano"),
        (orin(7.4), "NVIDIA Jetson Orin NX Engineering Reference Developer Kit", "jetson-orin-nx"),
        (orin(61.3, "Orin (nvgpu)"), "NVIDIA Jetson AGX Orin Developer Kit", "jetson-agx-orin"),
        (Detected("NVIDIA Thor", "sm_110", 122 << 30, integrated=True), "", "jetson-thor"),
        (orin(3.4), "", "jetson-orin-nano"),
        (orin(14.15), "some carrier board", "jetson-orin-nx"),
        (orin(29.9), "", "jetson-agx-orin"),
        (orin(61.3), "", "jetson-agx-orin"),
        # nothing here tells Orin Nano and Orin NX of 8 GB apart
        (orin(7.4), "", None),
        (Detected("NVIDIA L40S", "sm_89"), "", None),
        (Detected("NVIDIA A40", "sm_86"), "", None),
        (Detected("NVIDIA GeForce RTX 2080 Ti", "sm_75"), "", None),
        (Detected("NVIDIA H20", "sm_90"), "", None),
        (Detected("NVIDIA B300 SXM6 AC", "sm_103"), "", None),
        (Detected("NVIDIA GB10", "sm_121", integrated=True), "", None),
        (Detected("NVIDIA GeForce RTX 3090", "sm_86", integrated=True), "", None),
    ],
)
def test_a_detected_gpu_has_its_profile(gpu, board, name):
    found = profile_of(gpu, board=board)
    assert (found.name if found else None) == name


def fixed(*, batch: int = 1, height: int = 224) -> InputSpec:
    return msgspec.structs.replace(INPUT, batch=ShapeRange.fixed(batch), height=ShapeRange.fixed(height))


@pytest.mark.parametrize(
    ("device", "precision", "flavour", "more"),
    [
        ("cpu", "int8", "openvino", {}),
        ("cpu", "bf16", "openvino", {}),
        ("cpu", "fp32", "torchscript", {}),
        ("t4", "int8", "tensorrt", {}),
        ("t4", "fp32", "torchscript", {}),
        ("t4", "bf16", "torchscript", {}),
        ("t4", "fp16", "tensorrt_rtx", {"targets": ("sm_75",)}),
        ("l4", "fp8", "tensorrt_rtx", {}),
        ("l4", "fp8", "tensorrt_rtx", {"targets": ("sm_89", "sm_120")}),
        ("a10", "bf16", "tensorrt", {}),
        ("h100", "fp8", "tensorrt", {}),
        ("h200", "fp8", "tensorrt", {}),
        ("gh200", "int8", "tensorrt", {}),
        ("b200", "fp8", "tensorrt", {}),
        ("rtx-50", "fp8", "tensorrt_rtx", {"targets": ("sm_120",)}),
        ("rtx-pro-blackwell", "fp8", "tensorrt_rtx", {"targets": ("sm_120",)}),
        ("jetson-thor", "fp8", "tensorrt", {}),
        ("jetson-orin-nano", "int8", "tensorrt", {}),
        ("jetson-orin-nx", "int8", "tensorrt", {"dla_core": 1}),
        ("jetson-agx-orin", "fp16", "tensorrt", {"dla_core": 0, "input": fixed(batch=4096)}),
        ("jetson-agx-orin", "fp16", "tensorrt", {"dla_core": 0, "input": fixed(height=8192)}),
    ],
)
def test_what_can_work_is_not_refused(device, precision, flavour, more):
    options = {"input": INPUT, **more}
    assert refusals(load_profile(device), precision=Precision(precision), flavour=flavour, **options) == []


RANGED = msgspec.structs.replace(INPUT, batch=ShapeRange(min=1, opt=2, max=8), width=ShapeRange(min=64, opt=64, max=96))


@pytest.mark.parametrize(
    ("device", "precision", "flavour", "more", "reason"),
    [
        ("t4", "bf16", "tensorrt", {}, "bf16 needs sm_80 or newer and t4 is sm_75: choose fp16 or int8"),
        ("a100", "fp8", "tensorrt", {}, "fp8 needs sm_89 or newer and a100 is sm_80: choose fp16 or int8"),
        ("jetson-orin-nx", "fp8", "tensorrt", {}, "fp8 needs sm_89 or newer and jetson-orin-nx is sm_87"),
        (
            "h100",
            "fp16",
            "tensorrt_rtx",
            {},
            "and h100 is sm_90: use flavour tensorrt or torchscript or torch_tensorrt",
        ),
        ("jetson-agx-orin", "fp16", "tensorrt_rtx", {}, "jetson-agx-orin is sm_87: use flavour tensorrt"),
        ("jetson-thor", "fp16", "tensorrt_rtx", {}, "jetson-thor is sm_110: use flavour tensorrt"),
        (
            "cpu",
            "int8",
            "tensorrt",
            {},
            "tensorrt does not serve cpu: use flavour openvino or onnxruntime or torchscript",
        ),
        (
            "cpu",
            "int8",
            "tensorrt_rtx",
            {},
            "tensorrt_rtx does not serve cpu: use flavour openvino or onnxruntime or torchscript",
        ),
        ("l4", "int8", "openvino", {}, "openvino runs on CPUs and l4 is a GPU: use flavour tensorrt or tensorrt_rtx"),
        (
            "l4",
            "int8",
            "tensorrt_lean",
            {},
            "tensorrt_lean runs plans and compiles none: compile with flavour tensorrt",
        ),
        ("t4", "fp16", "tensorrt_rtx", {}, "t4 is one: name the target sm_75"),
        ("l4", "fp16", "tensorrt_rtx", {"targets": ("sm_86",)}, "does not run on l4: add the target sm_89"),
        (
            "l4",
            "fp16",
            "tensorrt_rtx",
            {"targets": ("sm_89", "sm_90")},
            "TensorRT-RTX does not compile for sm_90: choose among sm_75",
        ),
        (
            "l4",
            "fp8",
            "tensorrt_rtx",
            {"targets": ("sm_80", "sm_86", "sm_89")},
            "fp8 needs sm_89 or newer and the targets have sm_80, sm_86: leave those out",
        ),
        ("l4", "fp16", "tensorrt", {"targets": ("sm_89",)}, "tensorrt compiles for the GPU it finds: leave them out"),
        ("jetson-orin-nano", "int8", "tensorrt", {"dla_core": 0}, "jetson-orin-nano has none: leave it out"),
        ("jetson-thor", "int8", "tensorrt", {"dla_core": 0}, "jetson-thor has none: leave it out"),
        ("l4", "int8", "tensorrt", {"dla_core": 1}, "DLA core 1 was asked for and l4 has none"),
        (
            "jetson-orin-nx",
            "int8",
            "tensorrt",
            {"dla_core": 2},
            "core 2 does not exist: jetson-orin-nx has cores 0 to 1",
        ),
        ("jetson-orin-nx", "int8", "tensorrt", {"dla_core": -1}, "DLA core -1 does not exist"),
        ("jetson-agx-orin", "fp32", "tensorrt", {"dla_core": 0}, "DLA computes fp16 and int8, not fp32"),
        ("jetson-agx-orin", "bf16", "tensorrt", {"dla_core": 0}, "DLA computes fp16 and int8, not bf16"),
        ("jetson-agx-orin", "int8", "torch_tensorrt", {"dla_core": 0}, "torch_tensorrt compiles nothing for DLA"),
        (
            "jetson-agx-orin",
            "int8",
            "tensorrt",
            {"dla_core": 0, "input": RANGED},
            "DLA takes fixed shapes and this input has batch 1..8, width 64..96: give each one size",
        ),
        (
            "jetson-agx-orin",
            "int8",
            "tensorrt",
            {"dla_core": 0, "input": fixed(batch=4097)},
            "DLA takes batches of at most 4096, not 4097",
        ),
        (
            "jetson-agx-orin",
            "int8",
            "tensorrt",
            {"dla_core": 0, "input": fixed(height=8224)},
            "DLA takes sizes of at most 8192, not height 8224",
        ),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence_with_the_way_out(device, precision, flavour, more, reason):
    options = {"input": INPUT, **more}
    (only,) = refusals(load_profile(device), precision=Precision(precision), flavour=flavour, **options)
    assert reason in only
    assert ": " in only
    assert "\n" not in only


def test_every_reason_is_given_at_once():
    found = refusals(
        load_profile("jetson-agx-orin"), precision=Precision.FP8, flavour="tensorrt", input=RANGED, dla_core=7
    )
    assert [reason.split(":")[0] for reason in found] == [
        "fp8 needs sm_89 or newer and jetson-agx-orin is sm_87",
        "DLA core 7 does not exist",
        "DLA computes fp16 and int8, not fp8",
        "DLA takes fixed shapes and this input has batch 1..8, width 64..96",
    ]


def test_a_board_with_one_dla_core_says_so(tmp_path):
    path = tmp_path / "one.toml"
    text = (FOLDER / "jetson-orin-nx.toml").read_text()
    path.write_text(text.replace('"jetson-orin-nx"', '"one"').replace("dla_cores = 2", "dla_cores = 1"))
    (only,) = refusals(load_profile(path), precision=Precision.INT8, flavour="tensorrt", input=INPUT, dla_core=1)
    assert only == "DLA core 1 does not exist: one has core 0 alone"


def test_every_package_is_in_the_wheel():
    root = FOLDER.parent
    packages = msgspec.toml.decode((root / "pyproject.toml").read_bytes())["tool"]["setuptools"]["packages"]
    found = {".".join(file.parent.relative_to(root).parts) for file in (root / "edge_backbones").rglob("__init__.py")}
    assert found | {"edge_backbones.profiles_data"} == set(packages)
