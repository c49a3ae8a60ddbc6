"""The programs in the documents run; of those that need other hardware the imported names exist.

All is in one file, so that bundles are built once.
"""

from __future__ import annotations

import ast
import importlib
from typing import Any

import pytest

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
