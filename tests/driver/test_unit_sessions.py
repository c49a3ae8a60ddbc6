"""The sessions of tests/unit, over the stand-in for libcuda and the real bindings in the place of a GPU in Python."""

from __future__ import annotations

import importlib
import inspect
import itertools
from typing import Any

import pytest

from tests.driver.machine import DriverMachine
from tests.unit.engines.tensorrt import test_tensorrt_session as unit

pytestmark = pytest.mark.machine(version=13000)  # as the GPU in Python has it

MODULE = "tests.unit.engines.tensorrt.test_tensorrt_session"
# They look into the GPU in Python, or fake a part of it.
APART = {
    "test_an_array_of_another_gpu_is_refused",
    "test_close_goes_from_contexts_to_the_runtime_and_results_stay",
    # test_session.py asks the same of the driver.
    "test_a_call_inside_the_callers_own_capture_is_refused_and_leaves_nothing",
    "test_many_streams_in_turn_never_make_the_host_wait",
    "test_maps_that_other_streams_read_never_make_the_host_wait",
}


def cases_of(function: Any) -> list[dict[str, Any]]:
    """The arguments of a test, as its marks say."""
    marks = [mark for mark in getattr(function, "pytestmark", ()) if mark.name == "parametrize"]
    choices = []
    for mark in marks:
        names, values = mark.args
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        choices.append([dict(zip(names, (value if len(names) > 1 else (value,)), strict=True)) for value in values])
    return [{name: value for part in parts for name, value in part.items()} for parts in itertools.product(*choices)]


TESTS = {
    name: function
    for name, function in inspect.getmembers(unit, inspect.isfunction)
    if name.startswith("test_") and "machine" in inspect.signature(function).parameters and name not in APART
}


@pytest.mark.parametrize(("name", "case"), [(name, i) for name, f in TESTS.items() for i in range(len(cases_of(f)))])
def test_as_in_the_unit_tests(driver, name, case):
    module = importlib.import_module(MODULE)
    arguments = cases_of(getattr(module, name))[case]
    machine = DriverMachine(driver)
    streams = {module.STREAM: machine.stream, module.OTHER: machine.other}
    arguments = {key: streams.get(value, value) if type(value) is int else value for key, value in arguments.items()}
    module.STREAM, module.OTHER = machine.stream, machine.other
    with pytest.MonkeyPatch.context() as patch:
        if "monkeypatch" in inspect.signature(getattr(module, name)).parameters:
            arguments["monkeypatch"] = patch
        getattr(module, name)(machine, **arguments)
    assert machine.gpu.violations == []
