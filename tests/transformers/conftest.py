"""Bundles of the small clients' backbones, each built once for the whole run: treat them as read-only."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import clients
import pytest
import torch

from edge_backbones import BuildOptions, build_bundle
from edge_backbones.spec import Precision

FP32 = BuildOptions(precisions=(Precision.FP32,), torchscript=False, golden=2, cache=None)


@pytest.fixture(scope="session")
def client_of() -> Callable[[str], clients.Client]:
    """A client by its name in ``clients.CLIENTS``; all who ask get the same one: swap in a copy of its model."""
    return functools.cache(lambda name: clients.CLIENTS[name]())


@pytest.fixture(scope="session")
def bundle_of(
    client_of: Callable[[str], clients.Client], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """The fp32 bundle of a client's backbone, for the client's batch and image size."""

    @functools.cache
    def built(name: str, **options: object) -> Path:
        client = client_of(name)
        settings = dataclasses.replace(
            FP32,
            from_model=True,
            batch=client.batch * max(client.frames, 1),
            height=client.height,
            width=client.width,
            dataset_index=client.dataset_index,
            **options,
        )
        return build_bundle(client.model, tmp_path_factory.mktemp(name) / "b.bundle", options=settings).bundle.path

    return built


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An fp32 bundle of any source, by default for two images of 64 x 96; random weights for what has none."""

    def built(source: object, **options: object) -> Path:
        settings = {"batch": 2, "height": 64, "width": 96, **options}
        if not isinstance(source, torch.nn.Module):
            settings.setdefault("weights", "random:0")
        target = tmp_path_factory.mktemp("bundle") / "b.bundle"
        return build_bundle(source, target, options=dataclasses.replace(FP32, **settings)).bundle.path

    return built
