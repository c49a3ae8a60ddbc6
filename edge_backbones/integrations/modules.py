"""An engine as an ``nn.Module`` without parameters, and the check that it may replace another module."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.dlpack import from_dlpack

from edge_backbones.bundle.reader import Bundle, load_golden
from edge_backbones.difference import relative_error
from edge_backbones.errors import ClientMismatchError, InputError, first_line
from edge_backbones.runtime.backbone import EdgeBackbone

_SAME_WEIGHTS = 0.1  # relative difference: half precision and TF32 stay far below, other weights far above


class EngineModule(nn.Module):
    """Base class of modules that run an engine on tensors; subclasses decide how the feature maps are returned.

    It has no parameters, buffers or state: ``state_dict()`` is empty, and modules around it train as before. Maps have the
    floating dtype and the device of the input. An engine on the CPU copies tensors of another device there and back; an
    engine on the GPU takes and returns CUDA tensors without a copy. There values are not checked: one beyond float16 becomes
    infinite where the engine takes float16. An engine has no gradient: an input that requires one
    raises InputError. Copies (``copy.deepcopy``) share the engine.

    ``pickle`` and ``torch.save`` write the path of the bundle, not the bundle: ``torch.load(file, weights_only=False)``
    opens the bundle again, and raises BundleError if it is not there. To pass a model on, save its ``state_dict()`` and the
    bundle, and replace the backbone again.
    """

    def __init__(self, backbone: EdgeBackbone) -> None:
        super().__init__()
        self.backbone = backbone

    def infer(self, pixel_values: torch.Tensor, **arguments: Any) -> dict[str, tuple[Any, ...]]:
        """Call the backbone, and return the fields of its output as tensors (None stays None)."""
        if pixel_values.requires_grad and torch.is_grad_enabled():
            raise InputError("an engine has no gradient: pass pixel_values.detach(), or run under torch.no_grad()")
        values = pixel_values.detach().resolve_neg()
        dtype = values.dtype if values.is_floating_point() else torch.float32
        if self.backbone.device == "cpu":
            # numpy has no bfloat16. The backbone casts to the engine's dtype and refuses values beyond it.
            values = values.cpu().float() if values.dtype == torch.bfloat16 else values.cpu()
        elif values.is_floating_point():
            # An engine on a GPU takes nothing but its own dtype, in C order. Nobody waits there to check values.
            values = values.to(getattr(torch, self.backbone.input.dtype)).contiguous()
        output = self.backbone(values, **arguments)

        def tensor(array: Any) -> Any:
            return None if array is None else from_dlpack(array).to(device=pixel_values.device, dtype=dtype)

        return {name: tuple(tensor(array) for array in arrays) for name, arrays in output.items()}

    def extra_repr(self) -> str:
        """Describe the engine when the module is printed."""
        return repr(self.backbone)


def open_for_client(
    path: str | os.PathLike[str],
    original: nn.Module,
    run: Callable[[torch.Tensor, Any], Sequence[torch.Tensor]],
    stages: Sequence[str] | None,
    *,
    engine: str | None,
    threads: int | None,
    same_weights: bool,
    check_finite: bool,
    allow_host_code: bool,
) -> EdgeBackbone:
    """Open a bundle with the stages that a client reads, after checking that ``original`` gives the same maps.

    ``run(pixel_values, source)`` returns the maps that the client reads now. ``stages``: their names; None if they have no
    names, and then the bundle's maps are compared in order. ``same_weights``: values must agree too, not just sizes.
    ``original`` keeps its train or eval mode. Raises ClientMismatchError with the reason.
    """
    bundle = Bundle.open(path)
    spec, input = bundle.manifest.backbone, bundle.manifest.input
    wanted = list(spec.out_features) if stages is None else list(stages)
    if input.name != "pixel_values":
        raise ClientMismatchError(
            f"{bundle.path} takes camera frames ({input.describe()}) and a client passes pixel_values: "
            "build it with input='pixel_values'"
        )
    missing = [stage for stage in wanted if stage not in spec.out_features]
    if missing:
        raise ClientMismatchError(
            f"the client reads the stages {wanted} and {bundle.path} holds {list(spec.out_features)}: "
            f"build it again with out_features={wanted}"
        )
    golden = load_golden(bundle)
    references = golden.outputs["opt"]
    # The golden image with the strongest map is compared: on a black frame all weights look alike.
    strongest = int(np.argmax([np.linalg.norm(one) for one in references[wanted[-1]]])) if wanted else 0
    chosen = slice(strongest, strongest + 1)
    images = torch.from_numpy(golden.inputs["opt"][chosen])
    try:
        with _in_eval_mode(original), torch.no_grad():
            maps = [m.float().cpu().numpy() for m in run(_as_of(original, images), bundle.manifest.source)]
    except Exception as error:  # a backbone may raise anything for a size that it cannot take
        raise ClientMismatchError(
            f"the client's own backbone does not take the images of {bundle.path} ({input.describe()}): {first_line(error)}"
        ) from error
    _check_maps(bundle.path, maps, [references[stage][chosen] for stage in wanted], wanted, same_weights)
    backbone = EdgeBackbone.from_pretrained(
        path, engine=engine, threads=threads, check_finite=check_finite, allow_host_code=allow_host_code
    )
    backbone.out_features = wanted
    return backbone


def _check_maps(
    path: Path, maps: list[np.ndarray], expected: list[np.ndarray], stages: list[str], same_weights: bool
) -> None:
    shapes = [m.shape[1:] for m in maps]
    if len(maps) != len(expected) or shapes != [e.shape[1:] for e in expected]:
        raise ClientMismatchError(
            f"channels or strides differ: for the same image the client's backbone gives maps of {_sizes(shapes)}, "
            f"{path} of {_sizes([e.shape[1:] for e in expected])}: build the bundle from the client's own backbone"
        )
    for stage, actual, reference in zip(stages, maps, expected, strict=True) if same_weights else ():
        difference = relative_error(actual, reference)
        if not difference <= _SAME_WEIGHTS:
            raise ClientMismatchError(
                f"the weights differ: {stage} of {path} is {difference:.2g} (relative) away from the client's own "
                "backbone: build the bundle from this client, or pass same_weights=False to exchange it on purpose"
            )


def _sizes(shapes: Sequence[Sequence[int]]) -> str:
    return ", ".join("x".join(str(n) for n in shape) for shape in shapes) or "none"


def _as_of(module: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return images in the dtype and on the device of a module's weights."""
    weight = next((p for p in module.parameters() if p.is_floating_point()), images)
    return images.to(device=weight.device, dtype=weight.dtype)


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
