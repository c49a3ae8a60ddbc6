"""A TensorRT in Python that compiles nothing and notes what it was asked for."""

from __future__ import annotations

import enum
import types

GRAPH = bytes.fromhex("080a 3a00 42021011")  # the smallest ONNX model: IR version 10, an empty graph, opset 17


class Tensor:
    def __init__(self, name, shape, itemsize=4):
        self.name, self.shape = name, shape
        self.dtype = types.SimpleNamespace(itemsize=itemsize)


class Layer:
    def __init__(self, name, kind, inputs, outputs):
        self.name, self._inputs, self._outputs = name, inputs, outputs
        self.type = types.SimpleNamespace(name=kind)
        self.num_inputs, self.num_outputs = len(inputs), len(outputs)

    def get_input(self, index):
        return self._inputs[index]

    def get_output(self, index):
        return self._outputs[index]


class Library(types.SimpleNamespace):
    """As much of TensorRT 10.3 as a compilation touches; ``asked`` is everything that it was told.

    ``rtx=True`` makes it TensorRT-RTX.
    """

    def __init__(self, **changes):
        self.asked: dict = {"flags": set()}
        asked = self.asked
        pixels, weight = Tensor("pixel_values", (-1, 3, 64, 96)), Tensor("w", (8, 3, 3, 3))
        conv, softmax = Tensor("conv", (-1, 8, 64, 96)), Tensor("soft", (-1, 8, 64, 96))
        self.tensors = {tensor.name: tensor for tensor in (pixels, weight, conv, softmax)}
        layers = [
            Layer("weight", "CONSTANT", [], [weight]),
            Layer("conv", "CONVOLUTION", [pixels, weight], [conv]),
            Layer("softmax", "SOFTMAX", [conv], [softmax]),
        ]
        network = types.SimpleNamespace(
            num_layers=3, get_layer=layers.__getitem__, num_inputs=1, get_input=lambda index: pixels
        )

        class Config:
            def set_flag(self, flag):
                asked["flags"].add(flag.name)

            def clear_flag(self, flag):
                asked.setdefault("cleared", set()).add(flag.name)

            def set_memory_pool_limit(self, pool, size):
                if size == 1 << 28 and changes.get("picky"):
                    raise TypeError("set_memory_pool_limit(): incompatible function arguments")
                asked["workspace"] = (pool, size)

            def add_optimization_profile(self, profile):
                asked["profiles"].append(profile.shapes)
                return len(asked["profiles"]) - 1

            def create_timing_cache(self, data):
                return types.SimpleNamespace(data=data)

            def set_timing_cache(self, cache, ignore_mismatch):
                assert ignore_mismatch is False  # what another GPU measured is not for this one
                asked.setdefault("caches", []).append(cache.data)
                return cache.data != b"of another GPU"

            def set_compute_capability(self, capability, index):
                asked.setdefault("targets", []).append(capability.name)
                return True

            def get_timing_cache(self):
                return types.SimpleNamespace(serialize=lambda: memoryview(b"measured"))

            def can_run_on_DLA(self, layer):
                half = asked["network"] != 0 or "FP16" in asked["flags"]  # DLA runs nothing in fp32
                return half and layer.name not in changes.get("not_on_dla", ("softmax",))

        class Profile:
            def set_shape(self, name, least, usual, most):
                self.shapes = (name, least, usual, most)

        class Builder:
            num_DLA_cores = 2

            def __init__(self, log):
                self.config = Config()

            def create_network(self, flags):
                asked["network"] = flags
                return network

            def create_builder_config(self):
                asked["config"] = self.config
                asked["profiles"] = []
                return self.config

            def create_optimization_profile(self):
                return Profile()

            def build_serialized_network(self, network, config):
                return memoryview(b"plan") if changes.get("builds", True) else None

        class Runtime:
            def __init__(self, log):
                pass

            engine_host_code_allowed = False

            def deserialize_cuda_engine(self, plan):
                asked["host_code"] = self.engine_host_code_allowed
                inspector = types.SimpleNamespace(get_engine_information=lambda form: f'{{"form": "{form.name}"}}')
                return (
                    types.SimpleNamespace(create_engine_inspector=lambda: inspector)
                    if changes.get("loads", True)
                    else None
                )

        def flags(name, members):
            return enum.IntEnum(name, {member: index for index, member in enumerate(members.split())})

        names = (
            "INT8 FP16 VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME REFIT REFIT_IDENTICAL STRIP_PLAN SPARSE_WEIGHTS GPU_FALLBACK "
            "TF32"
        )
        if changes.get("tiles"):  # since 10.8
            self.TilingOptimizationLevel = flags("TilingOptimizationLevel", "NONE FAST MODERATE FULL")
        if changes.get("rtx"):  # the names by which TensorRT-RTX is recognised
            names += " REQUIRE_USER_ALLOCATION"
            self.ComputeCapability = flags("ComputeCapability", "NONE CURRENT SM75 SM80 SM86 SM89 SM120")
        super().__init__(
            __version__="10.3.0",
            Builder=Builder,
            Runtime=Runtime,
            EngineInspector=object,
            IProgressMonitor=object,
            IInt8EntropyCalibrator2=object,
            OnnxParser=lambda network, log: types.SimpleNamespace(
                parse=lambda graph: True, set_flag=lambda flag: asked.setdefault("parser", []).append(flag.name)
            ),
            OnnxParserFlag=flags("OnnxParserFlag", changes.get("parser_flags", "NATIVE_INSTANCENORM")),
            BuilderFlag=flags("BuilderFlag", changes.get("flags", names)),
            NetworkDefinitionCreationFlag=flags("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH STRONGLY_TYPED"),
            HardwareCompatibilityLevel=flags("HardwareCompatibilityLevel", "NONE AMPERE_PLUS"),
            ProfilingVerbosity=flags("ProfilingVerbosity", "NONE DETAILED"),
            MemoryPoolType=flags("MemoryPoolType", "WORKSPACE"),
            DeviceType=flags("DeviceType", "GPU DLA"),
            LayerInformationFormat=flags("LayerInformationFormat", "ONELINE JSON"),
        )
