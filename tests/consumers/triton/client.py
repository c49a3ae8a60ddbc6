"""Ask a Triton server, or parse configurations, in the environment that has tritonclient: a program that the tests start.

``client.py ask JSON``: each call is {"protocol", "url", "model", "inputs": {name: file.npy}, "outputs": [...] or null, "to":
file.npz}. Calls of one group run at the same time. The answers are printed as JSON, one list of {"error"} for each group.
``client.py parse FILE...`` prints what Triton's own protobuf reads in each config.pbtxt.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np

TYPES = {"float32": "FP32", "float16": "FP16", "uint8": "UINT8", "float64": "FP64", "object": "BYTES"}


def ask(call: dict) -> dict:
    import tritonclient.grpc as grpc
    import tritonclient.http as http
    from tritonclient.utils import InferenceServerException

    library = {"http": http, "grpc": grpc}[call["protocol"]]
    client = library.InferenceServerClient(call["url"])
    inputs = []
    for name, file in call["inputs"].items():
        array = np.load(file, allow_pickle=True)
        tensor = library.InferInput(name, list(array.shape), TYPES[array.dtype.name])
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    outputs = None if call["outputs"] is None else [library.InferRequestedOutput(name) for name in call["outputs"]]
    try:
        result = (
            client.infer(call["model"], inputs, outputs=outputs, client_timeout=60)
            if library is grpc
            else (client.infer(call["model"], inputs, outputs=outputs))
        )
    except InferenceServerException as error:
        return {"error": error.message()}
    answer = result.get_response(as_json=True) if library is grpc else result.get_response()
    np.savez(call["to"], **{output["name"]: result.as_numpy(output["name"]) for output in answer["outputs"]})
    return {"error": None}


def parse(file: str) -> dict:
    from google.protobuf import json_format, text_format
    from tritonclient.grpc import model_config_pb2

    with open(file) as opened:
        config = text_format.Parse(opened.read(), model_config_pb2.ModelConfig())
    return json_format.MessageToDict(config, preserving_proto_field_name=True)


def main() -> None:
    what, *arguments = sys.argv[1:]
    if what == "parse":
        print(json.dumps([parse(file) for file in arguments]))
        return
    answers = []
    for group in json.loads(arguments[0]):
        with ThreadPoolExecutor(len(group)) as pool:
            answers.append(list(pool.map(ask, group)))
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
