"""benchmarks.call_cost runs on a machine without a GPU."""

from __future__ import annotations

from benchmarks import call_cost
from edge_backbones.machine import gpus


def test_what_a_call_costs_can_be_measured_without_a_gpu(monkeypatch):
    """benchmarks.call_cost: its stand-ins answer everything that a session asks, and it leaves no stand-in behind."""
    before = gpus.find_gpus
    monkeypatch.setattr(call_cost, "microseconds", lambda call: call() is not None and 1.0)
    assert call_cost.measure() == {
        "backbone(array on the GPU)": 1.0,
        "backbone.graphed(array on the GPU)()": 1.0,
        "backbone(array of input_buffer)": 1.0,
        "backbone.graphed(array of input_buffer)()": 1.0,
    }
    assert gpus.find_gpus is before
