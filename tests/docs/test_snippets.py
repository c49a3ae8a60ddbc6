"""The programs in the documents run; of those that need other hardware the imported names exist.

The page about C++, ROS 2 and Triton runs with stand-ins for the last two. All is in one file, so that bundles are built once.
"""

from __future__ import annotations

import ast
import importlib
import json
import sys
import types
from typing import Any

import numpy as np
import pytest

from edge_backbones import Bundle, EdgeBackbone, fit
from tests.docs.snippets import PAGES, ROOT, Snippet, name_of, snippets

# What makes a snippet small enough for a test: the network of the fixtures instead of a real one, fewer pixels.
SMALLER = {
    'weights="random:0", out_indices=(1, 2, 3, 4)': 'weights="random:0", out_indices=(1, 2, 3, 4), precisions="fp32"',
    '"resnet18", "my.bundle"': '"test_resnet", "my.bundle"',
    '"resnet18", out_indices=[2, 3]': '"test_resnet", out_indices=[2, 3]',
    'backbone="resnet18"': 'backbone="test_resnet"',
    "DetrConfig(backbone_config=backbone)": "DetrConfig(backbone_config=backbone, **SMALL)",
    "height=800, width=1088": "height=64, width=96, method='max'",
    "torch.randn(1, 3, 480, 640)": "torch.randn(1, 3, 64, 96)",
}
SMALL = {
    **dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 32),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    "num_queries": 5,
}
ALL = [snippet for page in PAGES for snippet in snippets(page) if snippet.language == "python"]
RUN = [snippet for snippet in ALL if "not-run" not in snippet.classes]
NOT_RUN = [snippet for snippet in ALL if "not-run" in snippet.classes]


def compiled(snippet: Snippet, code: str) -> Any:
    """Compile a snippet so that a traceback has its line in the page."""
    return compile("\n" * (snippet.line - 1) + code, snippet.page, "exec")


def smaller(code: str) -> str:
    for text, instead in SMALLER.items():
        code = code.replace(text, instead)
    return code


def test_there_are_snippets():
    assert len(RUN) > 10
    assert NOT_RUN


def test_every_replacement_is_of_something():
    everything = "\n".join(snippet.code for snippet in RUN)
    assert [text for text in SMALLER if text not in everything] == []


def tiny_detr() -> Any:
    """A DETR with the network of the fixtures, instead of the one of the model hub."""
    import torch
    from transformers import DetrConfig, DetrForObjectDetection, TimmBackboneConfig

    torch.manual_seed(0)
    backbone = TimmBackboneConfig(backbone="test_resnet", out_indices=[4])
    return DetrForObjectDetection(DetrConfig(backbone_config=backbone, **SMALL))


def bundle_of_detr() -> None:
    """Do what the tutorial does at the command line between its snippets."""
    from edge_backbones import BuildOptions, build_bundle

    options = BuildOptions(from_model=True, height=64, width=96, precisions="int8", method="max")
    build_bundle("my-detr", "detr.bundle", images="photographs", options=options)


@pytest.mark.parametrize("page", list(dict.fromkeys(snippet.page for snippet in RUN)))
def test_the_python_of_a_page_runs_from_top_to_bottom(page, workplace, monkeypatch):
    from transformers import DetrForObjectDetection

    of_folders = DetrForObjectDetection.from_pretrained

    def from_pretrained(name: str, **options: Any) -> Any:
        return tiny_detr() if name == "facebook/detr-resnet-50" else of_folders(name, **options)

    monkeypatch.setattr(DetrForObjectDetection, "from_pretrained", from_pretrained)
    names: dict[str, Any] = {"SMALL": SMALL, "__name__": "snippet"}
    for snippet in (snippet for snippet in RUN if snippet.page == page):
        if "replace_backbone" in snippet.code and (workplace / "my-detr").exists():
            bundle_of_detr()
        exec(compiled(snippet, smaller(snippet.code)), names)  # the point of the test


@pytest.mark.parametrize("snippet", NOT_RUN, ids=lambda snippet: f"{snippet.page}:{snippet.line}")
def test_a_snippet_that_is_not_run_says_why_and_imports_what_exists(snippet):
    assert snippet.reason, f"{snippet.page}:{snippet.line} needs data-reason"
    tree = ast.parse(snippet.code)
    compiled(snippet, snippet.code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("edge_backbones", "torch"):
            module = importlib.import_module(node.module or "")
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_check_finds_what_does_not_exist():
    snippet = Snippet("page.md", 1, "python", frozenset({"not-run"}), "why", "from edge_backbones import Nothing")
    with pytest.raises(AssertionError):
        test_a_snippet_that_is_not_run_says_why_and_imports_what_exists(snippet)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_fence_has_a_language(page):
    assert [snippet.line for snippet in snippets(page) if not snippet.language] == []
    assert page.is_relative_to(ROOT / "docs")


PAGE = ROOT / "docs" / "tutorials" / "other-programs.md"


def program(title: str, containing: str = "") -> str:
    """The text of a code block of the page."""
    (code,) = (s.code for s in snippets(PAGE) if f"title={title}" in s.classes and containing in s.code)
    return code


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


class Message:
    """A message of ROS 2: fields as keyword arguments."""

    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


class Float32MultiArray(Message):
    def __init__(self) -> None:
        super().__init__(layout=Message(dim=[]), data=None)


class Node:
    """Keeps what a node publishes, by topic."""

    def __init__(self, name: str) -> None:
        self.published: dict[str, list[Any]] = {}
        self.callbacks: dict[str, Any] = {}

    def create_publisher(self, kind: type, topic: str, depth: int) -> Any:
        messages = self.published.setdefault(topic, [])
        return types.SimpleNamespace(publish=messages.append)

    def create_subscription(self, kind: type, topic: str, callback: Any, depth: int) -> None:
        self.callbacks[topic] = callback


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8"])
def test_the_node_publishes_what_the_backbone_returns(workplace, monkeypatch, encoding):
    stand_in(monkeypatch, "rclpy")
    stand_in(monkeypatch, "rclpy.node", Node=Node)
    stand_in(monkeypatch, "sensor_msgs.msg", Image=Message)
    stand_in(monkeypatch, "std_msgs.msg", Float32MultiArray=Float32MultiArray, MultiArrayDimension=Message)
    for package in ("sensor_msgs", "std_msgs"):
        stand_in(monkeypatch, package)
    names: dict[str, Any] = {"__name__": "backbone_node"}
    exec(compile(program("backbone_node.py"), "backbone_node.py", "exec"), names)

    frame = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    step = 120 * 3 + 24  # rows may be padded
    rows = np.zeros((90, step), np.uint8)
    rows[:, : 120 * 3] = (frame if encoding == "rgb8" else frame[..., ::-1]).reshape(90, -1)
    node = names["BackboneNode"]("camera.bundle")
    node.callbacks["image"](Message(height=90, width=120, step=step, encoding=encoding, data=rows.tobytes()))

    with EdgeBackbone.from_pretrained("camera.bundle") as backbone:
        pixels = fit(frame, Bundle.open("camera.bundle").manifest.image, 224, 224)
        expected = backbone.run(pixels[None])
    assert [topic.removeprefix("features/") for topic in node.published] == list(expected)
    for (message,), feature_map in zip(node.published.values(), expected.values(), strict=True):
        shape = tuple(dimension.size for dimension in message.layout.dim)
        np.testing.assert_array_equal(np.asarray(message.data, np.float32).reshape(shape), feature_map)
        assert message.layout.dim[0].stride == feature_map.size
    node.backbone.close()


def test_the_model_of_triton_answers_with_every_stage(workplace, monkeypatch):
    stand_in(
        monkeypatch,
        "triton_python_backend_utils",
        Tensor=lambda name, values: (name, values),
        InferenceResponse=dict,
        get_input_tensor_by_name=lambda request, name: types.SimpleNamespace(as_numpy=lambda: request[name]),
    )
    names: dict[str, Any] = {}
    exec(compile(program("models/backbone/1/model.py"), "model.py", "exec"), names)
    config = {"input": [{"name": "image"}], "parameters": {"bundle": {"string_value": "camera.bundle"}}}
    model = names["TritonPythonModel"]()
    model.initialize({"model_config": json.dumps(config)})
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), np.uint8)
    (answer,) = model.execute([{"image": images}])
    for name, values in model.backbone.run(images).items():
        np.testing.assert_array_equal(answer[name], values)
    model.finalize()


def test_the_configuration_of_triton_names_the_input_of_the_page():
    text = program("models/backbone/config.pbtxt")
    assert 'name: "image" data_type: TYPE_UINT8' in text
    assert [line.split('"')[1] for line in text.splitlines() if "TYPE_FP32" in line] == [
        "layer1",
        "layer2",
        "layer3",
        "layer4",
    ]
