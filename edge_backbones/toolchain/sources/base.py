"""What the loaders share: the options, the model hub, checkpoints, seeds, and random weights that are worth measuring."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import load_file
from torch import nn

from edge_backbones.errors import HubUnreachableError, InputError, SourceError, first_line
from edge_backbones.images.config import ImageConfig
from edge_backbones.reading import read_file, refusing
from edge_backbones.spec import align_stages
from edge_backbones.toolchain.sources.checkpoints import flat_tensors

if TYPE_CHECKING:
    from edge_backbones.toolchain.artifacts import LoadedBackbone

_HUB_TIMEOUT_S = 5.0
_ASLEEP, _AWAKE = 1e-3, 0.05  # scale of a residual branch: untrained, and woken
_TABLE_STD = 0.02  # what most networks start their position embeddings with
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
_MAX_JSON_BYTES = 16 << 20  # configurations with a label for each of 20,000 classes have 2 MB
OFFLINE_ADVICE = "pass a local file (--weights model.safetensors) or seeded random weights (--weights random:0)"
IMAGENET = ImageConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_SMALL_FILES = ["config.json", "preprocessor_config.json", "processor_config.json"]


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Say how to make the network. Fields that `BuildOptions` has too mean the same.

    Attributes:
        img_size: Height and width; None for the network's own, or ``default_size`` for one that has none (convolutional
            networks of transformers).
        default_size: Height and width of such networks.
    """

    weights: str = "pretrained"
    num_channels: int | None = None
    img_size: tuple[int, int] | None = None
    default_size: int = 224
    output_stride: int | None = None
    out_indices: tuple[int, ...] | None = None
    out_features: tuple[str, ...] | None = None
    hidden_states: bool = False
    dataset_index: int = 0
    image: Any = None
    from_model: bool = False


class SourceLoader(Protocol):
    """Loads one kind of source. Other packages register theirs in the entry point group ``edge_backbones.sources``.

    The loaders of this package are asked first, then the registered ones. Record ``library="torch"`` in the
    ``LoadedBackbone.source`` of a kind that is neither timm's nor transformers'.
    """

    def matches(self, source: Any) -> bool:
        """Return whether this loader takes ``source``: text, a path or any object. Quick; raises nothing for other kinds."""
        ...

    def load(self, source: Any, options: SourceOptions) -> LoadedBackbone:
        """Load a source that matches, in eval mode and without changing it.

        ``options.image`` is None or a :class:`~edge_backbones.toolchain.sources.processors.Preprocessing`. Raises
        SourceError for a source or options that it cannot load.
        """
        ...


def kept_stages(
    stage_names: tuple[str, ...], options: SourceOptions, default: tuple[int, ...]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return names and indices (as given) of the stages to keep; ``default`` when the options name none."""
    indices, features = options.out_indices, options.out_features
    if indices is None and features is None:
        indices = default
    kept = align_stages(stage_names, None if features is None else list(features), indices)
    if not kept[0]:
        raise InputError(f"no stage is kept: choose at least one of {list(stage_names)}")
    return kept


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a configuration that may be a stranger's: a regular file of bounded size that holds one object.

    ``what`` says what it should be, for the SourceError that names the file.
    """
    with refusing(lambda why: SourceError(f"{path} is not {what}: {why}")):
        content = json.loads(read_file(path, limit=_MAX_JSON_BYTES))
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}")
    return content


def refuse_dataset_index(options: SourceOptions) -> None:
    """Raise InputError for a dataset_index: for every network without experts."""
    if options.dataset_index != 0:
        raise InputError(
            f"dataset_index chooses an expert and this network has none: leave {options.dataset_index} out"
        )


def random_seed(weights: str) -> int | None:
    """Return the seed in ``random:SEED``, None for weights that are not random. Raises SourceError for a bad seed."""
    kind, _, seed = weights.partition(":")
    if kind != "random":
        return None
    if not (seed.isdecimal() and int(seed) < 2**63):
        raise SourceError(f"random weights need a seed, as in random:0; got {weights!r}")
    return int(seed)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with torch's random numbers at ``seed``, and put them back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def wake_residual_branches(net: nn.Module) -> None:
    """Give a small value to what training starts at zero, in place: scales of residual branches, tables of positions.

    timm initialises the last norm of a residual branch to 0, and layer scales start at 1e-6 everywhere. Left so, the
    branch's convolutions would be folded into zeros, and parity would be measured on a network without them. Large weights
    would measure chaos instead: random branches pass on rounding errors that trained ones damp. The same network always gets
    the same values.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, module in net.named_modules():
            for name, parameter in module.named_parameters(path, recurse=False):
                largest = float(parameter.abs().max()) if parameter.numel() else 1.0
                scales_a_norm = isinstance(module, _NORMS) and name.endswith("weight")
                scales_a_branch = name.endswith(("gamma", "gain"))
                is_tiny_constant = parameter.ndim <= 1 and 0 < largest == float(parameter.abs().min())
                if (scales_a_norm or scales_a_branch or is_tiny_constant) and largest < _ASLEEP:
                    parameter.fill_(_AWAKE)
                elif parameter.ndim > 1 and largest == 0:  # positions, class tokens
                    parameter.normal_(std=_TABLE_STD, generator=generator)


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of a file without running code in it; those in nested dicts by their dotted path.

    Raises SourceError naming the file, and the classes in a pickle that torch would have to import.
    """
    if not path.is_file():
        raise SourceError(f"weights {str(path)!r} are neither 'pretrained', 'random:SEED' nor a file that exists")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm's training script stores its arguments
                content = torch.load(path, map_location="cpu", weights_only=True)
        tensors = flat_tensors(content)
        if not tensors:
            raise TypeError("it holds no state dict")
    except Exception as error:  # unpickling and safetensors errors have no common base
        cause = first_line(error).partition(". ")[0]
        classes = _classes(path)
        if classes:
            cause = f"it is a pickle with {', '.join(classes)} in it"
        raise SourceError(
            f"{path} cannot be read as a checkpoint ({cause}): save it as .safetensors, "
            "or as a plain state dict with torch.save"
        ) from error
    return tensors


def _classes(path: Path) -> list[str]:
    """Name the classes and functions that a pickle of torch would import; none for a file that is no such pickle."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a damaged file, or one of something else
        return []
    return sorted(name for name in found if name != "argparse.Namespace")


def tensors_sha256(net: nn.Module) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of all weights and buffers of a module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def hub_answers() -> bool:
    """Ask the model hub with one short request, because the hub library itself retries for a minute before it gives up."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        from huggingface_hub import get_session

        if get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT_S).status_code >= 400:
            return False  # a proxy that answers in the hub's place
    except Exception as error:  # the HTTP library behind the session changes between releases
        logging.getLogger(__name__).debug("the model hub does not answer: %s", error)
        return False
    return True


def hub_folder(repository: str) -> Path:
    """Return configuration and weights of a hub repository as a local folder: from the hub, or from its cache.

    Raises HubUnreachableError when the hub does not answer and the cache does not hold them, SourceError when the hub
    knows no such repository.
    """
    from huggingface_hub import snapshot_download

    offline = not hub_answers()
    try:
        for weights in ("*.safetensors*", "*.bin*"):
            patterns = [*_SMALL_FILES, weights]
            folder = Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=offline))
            if (folder / "config.json").is_file() and any(folder.glob(weights)):
                return folder
    except Exception as error:  # HTTP, validation and cache errors have no common base
        if not offline and any("Repository" in kind.__name__ for kind in type(error).__mro__):
            raise SourceError(
                f"the model hub has no {repository!r}, or it is private or gated: {first_line(error)}"
            ) from error
        if not offline and "Validation" in type(error).__name__:
            raise SourceError(f"{repository!r} is not a hub id: {first_line(error)}") from error
        raise HubUnreachableError(
            f"the model hub does not answer and {repository} is not in its cache: "
            "connect once, or pass the folder of a local copy"
        ) from error
    if offline:
        raise HubUnreachableError(
            f"the model hub does not answer and its cache lacks the weights of {repository}: "
            "connect once, or pass the folder of a local copy"
        )
    raise SourceError(f"{repository} on the model hub has no config.json with weights (.safetensors or .bin)")
