"""Estimate the memory that compiling a plan needs, and refuse what cannot succeed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_backbones.engines.tensorrt.options import PlanOptions, Shapes
from edge_backbones.errors import CompileError
from edge_backbones.machine import gpus
from edge_backbones.machine.system import gib, read_system

# Host memory that a compilation takes: that of the process with the library, and a multiple of the graph. With
# TensorRT-RTX 1.7 a graph of 94 MB took 0.52 GB in all, one of 377 MB 1.36 GB (tests/trt/test_compile_memory.py).
_HOST_BASE = 256 << 20
_HOST_PER_GRAPH = 3.5


@dataclass(frozen=True)
class Needs:
    """Hold how many bytes a compilation needs: ``host`` of the CPU's memory, ``device`` of the GPU's.

    ``device`` is a lower bound. On a Jetson both are taken from one memory.
    """

    host: int
    device: int

    def __str__(self) -> str:
        gpu = f", and at least {gib(self.device)} of the GPU's" if self.device else ""
        return f"about {gib(self.host)}{gpu}"


def memory_needs(
    network: Any, graph_bytes: int, profiles: Sequence[Shapes], options: PlanOptions, *, on_gpu: bool
) -> Needs:
    """Return the memory that compiling needs. ``on_gpu``: the compilation runs kernels.

    On the host: what was measured, for the size of the graph. On the GPU: the weights of network and plan, the workspace,
    and the widest layer, where an axis of variable size counts as the largest batch if it is the first, and as 1 elsewhere.
    """
    host = _HOST_BASE + int(_HOST_PER_GRAPH * graph_bytes)
    if not on_gpu:
        return Needs(host, 0)
    batch = max(shapes.batch.max for shapes in profiles)
    weights, widest = 0, 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        bytes_out = sum(_tensor_bytes(tensor, batch) for tensor in outputs)
        if layer.type.name == "CONSTANT":
            weights += bytes_out
        else:
            widest = max(widest, bytes_out + sum(_tensor_bytes(tensor, batch) for tensor in inputs))
    return Needs(host, 2 * weights + widest + (options.workspace or 0))


def refuse_for_memory(needs: Needs, card: gpus.Gpu | None) -> None:
    """Raise CompileError if the memory of this machine cannot suffice. ``card``: the GPU, if the compilation uses one.

    On a Jetson, CPU and GPU share what is free. Only the CPU's part can be swapped out.
    """
    memory = read_system().memory
    if card is not None:
        shared = memory is not None and card.integrated
        room = min(card.memory_bytes, memory.available) if memory is not None and shared else card.memory_bytes
        if needs.device > room:
            has = "has, beside what runs," if shared else "has"
            raise CompileError(
                f"this compilation needs {gib(needs.device)} at least and {card.name} {has} {gib(room)}: choose a smaller "
                "batch or size, a smaller workspace, or end what else runs"
            )
    if memory is None:
        return
    needed = needs.host + (needs.device if card is not None and card.integrated else 0)
    room = memory.available + memory.swap
    if needed > room:
        raise CompileError(
            f"this compilation needs {gib(needed)} and this machine has, beside what runs, {gib(room)} with its swap: end "
            "what else runs, add swap, or build a smaller network"
        )


def _tensor_bytes(tensor: Any, batch: int) -> int:
    if tensor is None or len(tensor.shape) < 0:
        return 0
    sizes = [(batch if axis == 0 else 1) if size < 0 else size for axis, size in enumerate(tensor.shape)]
    return int(np.prod(sizes, dtype=np.int64)) * max(1, int(tensor.dtype.itemsize))
