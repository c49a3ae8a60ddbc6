"""The models of Triton's Python backend that `export_triton` writes: the network of a bundle, and its preprocessing.

Triton imports a model.py of one line, which imports a class from here. It needs numpy and msgspec, and the engine library of
the bundle; the preprocessing of image files needs Pillow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_backbones.errors import EdgeBackbonesError, InputError, ManifestError, first_line
from edge_backbones.images.config import ImageConfig
from edge_backbones.images.decode import require_reader
from edge_backbones.integrations.triton_config import to_engine_layout
from edge_backbones.reading import refusing
from edge_backbones.runtime import preprocess
from edge_backbones.runtime.backbone import EdgeBackbone
from edge_backbones.spec import InputSpec

PREPROCESSING = "preprocessing.json"
Outputs = Mapping[str, np.ndarray]


class Preprocessing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The file of a preprocessing model: how pictures become the input of the network."""

    image: ImageConfig
    input: InputSpec
    threads: int | None = None


class _Model:
    """What both models have: how they begin, and how they answer.

    ``initialize`` and ``execute`` are called by Triton, one after the other: an instance has a process of its own.
    """

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open what the model needs. The server logs the reason of a refusal, in one line, and the model is not ready."""
        import triton_python_backend_utils as triton  # there is no such module outside of Triton

        self._triton: Any = triton
        try:
            self._open(args, json.loads(args["model_config"]))
        except EdgeBackbonesError as error:
            raise triton.TritonModelException(str(error)) from None

    def _open(self, args: Mapping[str, str], config: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _input_of(self, request: Any, name: str) -> np.ndarray:
        array: np.ndarray = self._triton.get_input_tensor_by_name(request, name).as_numpy()
        return array

    def _response(self, outcome: Outputs | Exception, asked: Sequence[str]) -> Any:
        """Return the response to one request: its outputs, or why there are none."""
        if isinstance(outcome, Exception):
            # An error that is no refusal of the library is a bug, and its type says more than its text.
            text = str(outcome) if isinstance(outcome, EdgeBackbonesError) else first_line(outcome, typed=True)
            kinds = self._triton.TritonError
            kind = kinds.INVALID_ARG if isinstance(outcome, InputError) else kinds.INTERNAL
            return self._triton.InferenceResponse(error=kinds(text, kind))
        tensors = [self._triton.Tensor(name, values) for name, values in outcome.items() if name in asked]
        return self._triton.InferenceResponse(tensors)


class BackboneModel(_Model):
    """Answer with the outputs of a bundle's engine, as `EdgeBackbone` computes them."""

    def _open(self, args: Mapping[str, str], config: Mapping[str, Any]) -> None:
        given = {key: value["string_value"] for key, value in config["parameters"].items()}
        # A bundle in the repository has a relative path, and an absolute path stays as it is.
        bundle = Path(args["model_repository"], args["model_version"], given["bundle"])
        on_gpu, threads = args["model_instance_kind"] == "GPU", given.get("threads")
        self._backbone = EdgeBackbone.from_pretrained(
            bundle,
            engine=given.get("engine"),
            device=f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu",
            threads=None if threads is None else int(threads),
            allow_host_code=given.get("allow_host_code") == "true",
        )
        spec = self._backbone._spec
        self._input = config["input"][0]["name"]
        asked = {self._input, *(output["name"] for output in config["output"])}
        if missing := sorted(asked - {self._backbone.input.name, *spec.outputs}):
            raise InputError(
                f"config.pbtxt names {', '.join(missing)}, and {bundle} has the input {self._backbone.input.name} and the "
                f"outputs {', '.join(spec.outputs)}: run edge-backbones export-triton again, with --overwrite"
            )
        self._axes = {output.name: to_engine_layout(output) for output in spec.described_outputs if output.is_reordered}

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return a response to each request. Requests for images of one size run as one batch."""
        outcomes: dict[int, Outputs | Exception] = {}
        together: dict[tuple[int, ...], list[int]] = {}
        inputs: dict[int, np.ndarray] = {}
        for index, request in enumerate(requests):
            try:
                inputs[index] = self._input_of(request, self._input)
                together.setdefault(inputs[index].shape[1:], []).append(index)
            except Exception as error:  # Triton answers all requests with an error that leaves this function
                outcomes[index] = error
        for indices in together.values():
            ran = self._run_together([inputs[index] for index in indices])
            outcomes.update(zip(indices, ran, strict=True))
        return [
            self._response(outcomes[index], request.requested_output_names()) for index, request in enumerate(requests)
        ]

    def _run_together(self, batches: Sequence[np.ndarray]) -> list[Outputs | Exception]:
        """Return the outputs of each of several batches, or the exception that it alone raises."""
        if len(batches) == 1:
            return [self._run(batches[0])]
        joined = self._run(np.concatenate(batches))
        if isinstance(joined, Exception):  # one of them is to blame: the others get their outputs
            return [self._run(batch) for batch in batches]
        ends = np.cumsum([len(batch) for batch in batches])
        return [
            {name: values[end - len(batch) : end] for name, values in joined.items()}
            for batch, end in zip(batches, ends, strict=True)
        ]

    def _run(self, batch: np.ndarray) -> Outputs | Exception:
        """Return the outputs of a batch in the layout of the engine, which is in C order: nothing is copied for it."""
        try:
            outputs = self._backbone.run(batch)
        except Exception as error:
            return error
        return {
            name: values.transpose(self._axes[name]) if name in self._axes else values
            for name, values in outputs.items()
        }

    def finalize(self) -> None:
        """Release the engine."""
        self._backbone.close()


class PreprocessingModel(_Model):
    """Answer with the input that a network takes, of photographs: image files, or RGB pixels."""

    def _open(self, args: Mapping[str, str], config: Mapping[str, Any]) -> None:
        file = Path(args["model_repository"], args["model_version"], PREPROCESSING)
        with refusing(
            lambda why: ManifestError(f"{file} cannot be read: {why}; run edge-backbones export-triton again")
        ):
            self._how = msgspec.json.decode(file.read_bytes(), type=Preprocessing)
        self._input = config["input"][0]["name"]
        if config["input"][0]["data_type"] == "TYPE_STRING":
            require_reader(self._how.input.channels)  # now, and not for every request

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return a response to each request."""
        return [self._response(self._prepared(request), [self._how.input.name]) for request in requests]

    def _prepared(self, request: Any) -> Outputs | Exception:
        how = self._how
        try:
            pictures = self._input_of(request, self._input)
            if pictures.dtype == np.object_:
                files = list(pictures.ravel())
                values = preprocess.prepare_encoded(files, how.image, how.input, threads=how.threads)
            else:
                color = "gray" if how.input.channels == 1 else "rgb"
                values = preprocess.prepare(list(pictures), how.image, how.input, color=color, threads=how.threads)
        except Exception as error:  # Triton answers all requests with an error that leaves `execute`
            return error
        return {how.input.name: values}
