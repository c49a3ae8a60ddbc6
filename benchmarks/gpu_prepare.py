"""Bundles that ``make gpu`` compiles, built where the workstation's libraries are installed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_common import LARGEST_BATCH, MODELS, SIZE, pooling_onnx, trained_like
from benchmarks.gpu_targets import PRECISIONS

PARITY_MODELS = ("mobilenetv3_small_050", "test_resnet", "test_vit")


def prepare(
    folder: Path,
    *,
    parity: Sequence[str] = PARITY_MODELS,
    benchmark: Sequence[str] = tuple(MODELS),
    precisions: Sequence[str] = ("fp32", "fp16", "bf16", "int8", "fp8"),
) -> None:
    """Build bundles without engines: typed graphs for TensorRT, and golden samples of the fp32 network.

    For parity, int8 and fp8 keep noisy blocks in fp16 until the gate holds. Bundles that are timed are quantised in
    full, or left out if a network with random weights then misses its gate. Such weights do not compress: resnet50
    takes 47 MB in fp16 and 24 MB in int8.
    """
    from build_scripts.photographs import write_crops
    from edge_backbones import BuildOptions
    from edge_backbones.spec import Precision, ShapeRange

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pooling.onnx").write_bytes(pooling_onnx())
    size = ShapeRange(min=64, opt=96, max=160)
    usual: dict[str, Any] = {
        "weights": "random:0",
        "batch": ShapeRange(min=1, opt=1, max=LARGEST_BATCH),
        "torchscript": False,
    }
    with tempfile.TemporaryDirectory() as photographs:
        write_crops(Path(photographs), 36)
        for model in parity:
            # A transformer has one size; other networks get a range of them.
            sides = (160, 160) if "vit" in model else (size, size)
            for precision in precisions:
                options = BuildOptions(
                    **usual, height=sides[0], width=sides[1], precisions=(Precision(precision),), golden=2
                )
                _build(trained_like(model), folder / f"parity-{model}-{precision}.bundle", photographs, options)
        for model in benchmark:
            for precision in PRECISIONS:
                options = BuildOptions(
                    **usual,
                    height=SIZE,
                    width=SIZE,
                    out_indices=MODELS.get(model),
                    precisions=(Precision(precision),),
                    fallback=False,
                    golden=1,
                )
                _build(model, folder / f"{model}-{precision}.bundle", photographs, options)


def _build(source: Any, target: Path, photographs: str, options: Any) -> None:
    import msgspec

    from edge_backbones import build_bundle
    from edge_backbones.bundle.writer import write_manifest
    from edge_backbones.parity_report import ParityError

    try:
        bundle = build_bundle(source, target, images=photographs, options=options, overwrite=True).bundle
    except ParityError as error:
        print(f"{target.name} is left out: {error}", flush=True)
        return
    # The CPU's engines are as large as the graphs, and nobody runs them there.
    shutil.rmtree(bundle.path / "engines")
    write_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, engines=()))
    total = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target.name}: {total / 1e6:.1f} MB", flush=True)
