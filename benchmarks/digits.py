"""Networks trained to convergence on real images that an installed package carries: scikit-learn's handwritten digits.

``python -m benchmarks.digits`` trains what is not in .cache/digits yet. Random weights say nothing of accuracy: their
activations have no outliers and their classes no margins.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional

from benchmarks.common import ROOT

CACHE = ROOT / ".cache" / "digits"
SIZE = 32  # pixels; the digits are 8 x 8 and are enlarged
TEST = 597
SEEDS = (0, 1, 2)

# Epochs and the largest learning rate, at which test accuracy no longer rises, and pixels. Those that are timed run on images
# of 224 pixels: efficientnet_b0 that has seen 32 alone passes on every error there many times larger.
TRAINING = {
    "resnet18": (12, 2e-3, SIZE),
    "mobilenetv3_small_100": (30, 4e-3, SIZE),
    "convnext_atto": (24, 1e-3, SIZE),
    "vit_small": (30, 1e-3, SIZE),
    "mobilenetv3_large_100": (20, 4e-3, SIZE),
    "efficientnet_b0": (8, 2e-3, 64),
}
STAGES = {  # of those whose accuracy is measured; the others are timed
    "resnet18": (1, 2, 3, 4),
    "mobilenetv3_small_100": (1, 2, 3, 4),
    "convnext_atto": (0, 1, 2, 3),
    "vit_small": (1, 3, 5),
}


def make(name: str) -> Any:
    """Return the untrained network: three channels, 32 x 32, ten classes."""
    if name == "vit_small":
        return VisionTransformer(
            img_size=SIZE, patch_size=8, embed_dim=192, depth=6, num_heads=3, num_classes=10,
            class_token=False, global_pool="avg",
        )  # fmt: skip
    return timm.create_model(name, num_classes=10)


@functools.cache
def images(size: int = SIZE) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return training images and labels, then test images and labels.

    Images are float32 (count, 3, size, size) from -1 to 1, labels int64.
    """
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    pixels = torch.from_numpy(data.images[order]).float()[:, None] / 8 - 1
    pixels = functional.interpolate(pixels, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    digits = torch.from_numpy(data.target[order]).long()
    return pixels[TEST:], digits[TEST:], pixels[:TEST], digits[:TEST]


def trained(name: str, seed: int) -> Any:
    """Return the trained network in eval mode."""
    with torch.random.fork_rng(devices=[]):
        net = make(name)
    net.load_state_dict(torch.load(checkpoint(name, seed), weights_only=True))
    return net.eval()


def checkpoint(name: str, seed: int) -> Path:
    """Return the file with the trained weights; train them if it is not there."""
    path = CACHE / f"{name}.{seed}.pt"
    if not path.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = make(name)
            train(net, f"{name}, seed {seed}", *TRAINING[name])
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), path)
    return path


def image_folder(count: int, side: int) -> Path:
    """Return a folder of ``count`` training images as PNG files, enlarged to ``side`` x ``side``."""
    folder = CACHE / f"images_{count}_{side}"
    if len(list(folder.glob("*.png"))) != count:
        folder.mkdir(parents=True, exist_ok=True)
        pixels, _, _, _ = images()
        for index, image in enumerate(((pixels[:count, 0] + 1) * 127.5).round().to(torch.uint8).numpy()):
            enlarged = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
            enlarged.convert("RGB").save(folder / f"{index:03d}.png", compress_level=1)
    return folder


def train(net: nn.Module, name: str, epochs: int, rate: float, size: int) -> None:
    """Train with AdamW and one cycle of the learning rate; images are shifted, turned and scaled a little."""
    pixels, digits, _, _ = images(size)
    torch.set_num_threads(1)  # networks this small: threads would wait for each other, and add up in another order
    batch = 64
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.05)
    steps = len(pixels) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, epochs=epochs, steps_per_epoch=steps)
    for epoch in range(epochs):
        net.train()
        order, total = torch.randperm(len(pixels)), 0.0
        for step in range(steps):
            chosen = order[step * batch : (step + 1) * batch]
            loss = functional.cross_entropy(net(moved(pixels[chosen])), digits[chosen])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        print(f"{name}: epoch {epoch + 1} of {epochs}, loss {total / steps:.4f}", flush=True)


def moved(pixels: torch.Tensor) -> torch.Tensor:
    """Turn each image by up to 10 degrees, scale it by up to 10 % and shift it by up to two pixels."""
    count = len(pixels)
    angle, scale = (torch.rand(count) - 0.5) * 0.35, 1 + (torch.rand(count) - 0.5) * 0.2
    shift = (torch.rand(count, 2) - 0.5) * (8 / pixels.shape[-1])
    cosine, sine = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [torch.stack([cosine, -sine, shift[:, 0]], 1), torch.stack([sine, cosine, shift[:, 1]], 1)]
    grid = functional.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    return functional.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def logits(net: Any, feature_map: np.ndarray) -> torch.Tensor:
    """Return the logits of the network's own head for its last feature map (NCHW)."""
    tensor = torch.from_numpy(np.ascontiguousarray(feature_map))
    if isinstance(net, VisionTransformer):
        tensor = net.norm(tensor.flatten(2).transpose(1, 2))
    with torch.no_grad():
        return net.forward_head(tensor)  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=TRAINING, default=list(STAGES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    arguments = parser.parse_args()
    for name in arguments.only:
        _, _, size = TRAINING[name]
        _, _, pixels, digits = images(size)
        for seed in arguments.seeds:
            started = time.perf_counter()
            net = trained(name, seed)
            with torch.no_grad():
                right = float((net(pixels).argmax(1) == digits).float().mean())
            print(f"{name}, seed {seed}: top-1 {right:.4f} on {TEST} images, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
