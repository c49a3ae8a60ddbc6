"""The times of single layers that OpenVINO tells."""

from __future__ import annotations

import numpy as np
import pytest

from edge_backbones.engines import registry
from edge_backbones.errors import InferenceError
from edge_backbones.testing import make_bundle


def test_layers_have_names_kernels_and_times(tmp_path):
    bundle = make_bundle(tmp_path / "net.bundle")
    data = bundle.read(bundle.manifest.engines[0].file)
    found = registry.get("openvino").time_layers(data, np.zeros((2, 3, 32, 48), np.float32))
    assert {layer.kind for layer in found} >= {"AvgPool"}
    assert all(0 < layer.milliseconds < 60_000 and layer.name and layer.kernel for layer in found)
    assert len({layer.name for layer in found}) == len(found)


def test_bytes_that_are_no_engine_are_refused():
    with pytest.raises(InferenceError, match="OpenVINO cannot time the layers of this engine"):
        registry.get("openvino").time_layers(bytearray(b"no engine at all"), np.zeros((2, 3, 32, 48), np.float32))


def test_other_libraries_say_that_they_cannot():
    with pytest.raises(NotImplementedError, match="TorchScript does not tell the time of single layers"):
        registry.get("torchscript").time_layers(bytearray(), np.zeros(1))


def test_tensorrt_has_a_command_of_its_own():
    assert (
        registry.get("tensorrt").profiler("a.plan") == "trtexec --loadEngine=a.plan --dumpProfile --separateProfileRun"
    )
    assert registry.get("tensorrt_rtx").profiler("a.plan") == ""
    assert registry.get("openvino").profiler("a.blob") == ""
