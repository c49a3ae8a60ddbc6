"""``edge-backbones export-triton``: write a Triton model repository for a bundle."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from edge_backbones.cli import completion, console
from edge_backbones.cli.options import Form, completing, takes, usage
from edge_backbones.cli.shared import AllowHostCode, BundleArgument, JsonFlag, check_device, names
from edge_backbones.integrations.triton import TritonOptions, export_triton
from edge_backbones.integrations.triton_config import Tensor
from edge_backbones.integrations.triton_repository import TritonModel


@takes(
    TritonOptions,
    backends=Form(flag="backend"),
    engine=Form(short="e", complete=completion.engines),
    name=Form(short="n"),
    stages=Form(type=str | None, read=names, metavar="LIST"),
    device=Form(short="d", read=check_device, metavar="DEVICE", complete=completing("auto", "cpu", "cuda")),
    threads=Form(short="t"),
)
def export(
    bundle: BundleArgument,
    repository: Annotated[
        Path,
        typer.Argument(
            help="The folder of the model repository; other models in it stay.", metavar="REPO", show_default=False
        ),
    ],
    *,
    given: dict[str, Any],
    allow_host_code: AllowHostCode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace models of the same names.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Write a bundle into a Triton model repository.

    The server that runs the Python backend needs this package and the library of the engine.

    Example: **edge-backbones export-triton resnet50.bundle models --ensemble encoded**

    Example: **edge-backbones export-triton resnet50.bundle models --backend onnxruntime --engine int8**
    """
    with usage():
        options = TritonOptions(**given, allow_host_code=allow_host_code, overwrite=overwrite)
    written = export_triton(bundle, repository, options)
    if as_json:
        found = {"repository": str(written.repository), "models": written.models, "notes": written.notes}
        console.print_json(found)
        return
    for model in written.models:
        console.out.print(f"wrote {repository / model.name}: {_described(model)}", soft_wrap=True)
    for note in written.notes:
        console.err.print(note, soft_wrap=True)
    console.out.print(f"serve it: tritonserver --model-repository {shlex.quote(str(repository))}", soft_wrap=True)


def _described(model: TritonModel) -> str:
    """Return one line about a model: its backend, its batch, what goes in and what comes out."""
    batch = f"batches up to {model.max_batch_size}, " if model.max_batch_size else ""
    taken, given = (", ".join(map(_tensor, tensors)) for tensors in (model.inputs, model.outputs))
    return f"{model.backend}, {batch}{taken} -> {given}"


def _tensor(tensor: Tensor) -> str:
    return f"{tensor.name} {tensor.data_type.removeprefix('TYPE_')}{list(tensor.dims)}"
