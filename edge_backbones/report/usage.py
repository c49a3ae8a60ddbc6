"""Lines of Python that run a bundle, to paste."""

from __future__ import annotations

from edge_backbones.bundle.manifest import EngineRecord, Manifest


def snippet(manifest: Manifest, name: str, engine: EngineRecord | None) -> tuple[str, ...]:
    """Return the lines of a program that gives the feature maps of one camera frame.

    ``name``: of the bundle's folder, which the program opens from the folder around it. ``engine``: the one that the
    program is for; on a GPU it asks for the GPU.
    """
    frame, channels = manifest.input.frame, manifest.input.channels
    device = "" if engine is None or engine.key.gpu is None else ', device="cuda"'
    colours = "RGB" if channels == 3 else "grey" if channels == 1 else f"{channels} channels"
    shape = (480, 640, channels) if frame is None else frame.shape
    colours = colours if frame is None else frame.color
    # Double quotes, as in the documentation, where the name allows.
    path = f'"{repr(name)[1:-1]}"' if repr(name).startswith("'") and '"' not in name else repr(name)
    return (
        "import numpy as np",
        "from edge_backbones import EdgeBackbone",
        "",
        f"frame = np.zeros({shape}, np.uint8)  # your camera's frame, {colours}",
        f"with EdgeBackbone.from_pretrained({path}{device}) as backbone:",
        f"    maps = backbone({'backbone.preprocess(frame)' if frame is None else 'frame'}).feature_maps",
        "    for stage, feature_map in zip(backbone.out_features, maps):",
        "        print(stage, feature_map.shape)",
    )
