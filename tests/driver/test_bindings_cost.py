"""What a call costs, with the real bindings below."""

from __future__ import annotations

from unittest import mock


def test_the_cost_of_a_call_is_measured_through_the_bindings(driver):
    from benchmarks import call_cost

    with mock.patch.object(call_cost, "microseconds", lambda call: call() is not None and 1.0):
        found = call_cost.measure(bindings=True)
    assert len(found) == 4
    assert set(found.values()) == {1.0}
    assert driver.calls("cuEventRecord") > 0


def test_cuda_core_is_measured_beside_the_bindings(driver):
    from benchmarks import cuda_core_cost

    with mock.patch.object(cuda_core_cost, "microseconds", lambda call: call() and 1.0):
        found = cuda_core_cost.calls()
    assert len(found) == 5
    assert driver.calls("cuEventRecord") > 1  # by both
