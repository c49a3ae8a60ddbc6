"""The rest of the robot: a camera, a reader of feature maps, and a person at the command line, in one program for rclpy.

It reads a command from each line of its input, and answers with a line of JSON. It runs with the Python of .venv/ros2, which
has no pytest's plugins of ours: tests start it with `conftest.Robot`.
"""

from __future__ import annotations

import array
import json
import sys
import time
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import SetParameters
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CompressedImage, Image
from std_msgs.msg import Float32MultiArray, Header, String
from std_srvs.srv import Trigger

NODE = "/edge_backbone"
_PATIENCE = 60.0
_LAST = QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=1, reliability=ReliabilityPolicy.RELIABLE)


class Robot(Node):
    """Each method without an underscore is a command, with the command's other fields as arguments."""

    def __init__(self) -> None:
        super().__init__("robot")
        self._cameras: dict[str, Any] = {}
        self._maps: dict[str, Any] = {}
        self._headers: list[Any] = []
        self._arrived: dict[str, int] = {}
        self._readers: dict[str, Any] = {}
        self._status: list[Any] = []
        self._pictures: list[Any] = []
        self._texts: list[Any] = []
        self._sent = 0
        self.create_subscription(DiagnosticArray, "/diagnostics", lambda m: self._status.extend(m.status), 10)

    def _wait(self, until: Any, what: str) -> None:
        end = time.monotonic() + _PATIENCE
        while not until():
            rclpy.spin_once(self, timeout_sec=0.02)
            if time.monotonic() > end:
                raise TimeoutError(f"waited {_PATIENCE} s for {what}")

    def _camera(self, kind: str) -> Any:
        if kind not in self._cameras:
            message = CompressedImage if kind == "image/compressed" else Image
            self._cameras[kind] = self.create_publisher(message, kind, _LAST)
        return self._cameras[kind]

    def read(self, stages: list[str]) -> None:
        """Subscribe to the maps of stages, and to their headers."""
        for stage in stages:

            def keep(message: Any, stage: str = stage) -> None:
                self._maps[stage] = message
                self._arrived[stage] = self._arrived.get(stage, 0) + 1

            topic = f"{NODE}/features/{stage}"
            self._readers[stage] = self.create_subscription(Float32MultiArray, topic, keep, _LAST)
        topic = f"{NODE}/header"
        self._readers["header"] = self.create_subscription(Header, topic, self._headers.append, 100)

    def connect(self, topic: str = "image") -> None:
        """Wait until the node takes images, and its maps arrive here."""
        camera = self._camera(topic)
        names = [reader.topic_name for reader in self._readers.values()]
        self._wait(lambda: camera.get_subscription_count() > 0, "the node's subscription")
        self._wait(lambda: all(self.count_publishers(name) > 0 for name in names), "the node's publishers")
        for _ in range(10):  # the node learns of our subscriptions in its own time
            rclpy.spin_once(self, timeout_sec=0.05)

    def _message(self, file: str, fields: dict[str, Any], topic: str) -> Any:
        data = array.array("B", np.load(file).tobytes())
        message = (CompressedImage if topic == "image/compressed" else Image)(data=data, **fields)
        self._sent += 1
        message.header.stamp.sec, message.header.stamp.nanosec = 1000 + self._sent, 5
        message.header.frame_id = f"camera_{self._sent}"
        return message

    def send(self, file: str, out: str, stages: list[str], topic: str = "image", **fields: Any) -> dict[str, Any]:
        """Send an image, wait for the maps of stages, write them to ``out``, and return their header."""
        message = self._message(file, fields, topic)
        self._headers.clear()
        self._maps.clear()
        self._camera(topic).publish(message)
        self._wait(lambda: self._headers and set(stages) <= set(self._maps), "maps")
        maps = {}
        for stage in stages:
            layout = self._maps[stage].layout.dim
            assert [one.label for one in layout] == list("NCHW")
            assert layout[0].stride == np.prod([one.size for one in layout])
            maps[stage] = np.asarray(self._maps[stage].data, np.float32).reshape([one.size for one in layout])
        np.savez(out, **maps)
        header = self._headers[-1]
        same = header.stamp == message.header.stamp and header.frame_id == message.header.frame_id
        return {"header_is_kept": same}

    def throw(self, file: str, topic: str = "image", **fields: Any) -> None:
        """Send an image, and wait for nothing."""
        self._camera(topic).publish(self._message(file, fields, topic))

    def burst(self, file: str, count: int, pause: float, **fields: Any) -> dict[str, Any]:
        """Send images one after the other; return the stamps of what came back, until nothing more comes."""
        self._headers.clear()
        first = self._sent + 1
        for _ in range(count):
            self._camera("image").publish(self._message(file, fields, "image"))
            rclpy.spin_once(self, timeout_sec=pause)
        end = time.monotonic() + 2
        while time.monotonic() < end:
            rclpy.spin_once(self, timeout_sec=0.05)
        return {"sent": count, "came_back": [header.stamp.sec - 1000 - first for header in self._headers]}

    def diagnostics(self) -> dict[str, Any]:
        """Return the next diagnostics but one: they are of a time after the command."""
        self._status.clear()
        self._wait(lambda: len(self._status) > 1, "diagnostics")
        one = self._status[-1]
        values = {value.key: value.value for value in one.values}
        return {"level": one.level[0], "name": one.name, "message": one.message, **values}

    def read_stand_in(self) -> None:
        """Subscribe to the maps of all stages, in the stand-in of our message: a text."""
        reader = self.create_subscription(String, f"{NODE}/features", self._texts.append, _LAST)
        self._readers["features"] = reader

    def stand_in(self) -> dict[str, Any]:
        """Return the last text."""
        self._wait(lambda: self._texts, "maps")
        found: dict[str, Any] = json.loads(self._texts.pop().data)
        return found

    def look(self) -> None:
        """Subscribe to the picture."""
        self.create_subscription(Image, f"{NODE}/picture", self._pictures.append, 1)

    def picture(self, out: str) -> dict[str, Any]:
        """Wait for a picture, and write it to ``out``."""
        self._wait(lambda: self._pictures, "a picture")
        message = self._pictures.pop()
        np.save(out, np.frombuffer(message.data, np.uint8).reshape(message.height, message.width, 3))
        return {"encoding": message.encoding, "step": message.step}

    def _ask(self, kind: Any, name: str, request: Any) -> Any:
        client = self.create_client(kind, f"{NODE}/{name}")
        self._wait(client.service_is_ready, f"the service {name}")
        answer = client.call_async(request)
        self._wait(answer.done, f"an answer of {name}")
        self.destroy_client(client)
        return answer.result()

    def transition(self, label: str) -> dict[str, Any]:
        """Ask for a transition of the lifecycle; return whether it went well, and the state."""
        request = ChangeState.Request()
        request.transition.label = label
        went_well = self._ask(ChangeState, "change_state", request).success
        return {"success": went_well, "state": self.state()["state"]}

    def state(self) -> dict[str, Any]:
        """Return the state of the lifecycle."""
        return {"state": self._ask(GetState, "get_state", GetState.Request()).current_state.label}

    def set(self, **values: Any) -> dict[str, Any]:
        """Set parameters; return why not, for each."""
        request = SetParameters.Request()
        request.parameters = [Parameter(name, value=value).to_parameter_msg() for name, value in values.items()]
        return {"reasons": [one.reason for one in self._ask(SetParameters, "set_parameters", request).results]}

    def reload(self) -> dict[str, Any]:
        """Call ~/reload."""
        answer = self._ask(Trigger, "reload", Trigger.Request())
        return {"success": answer.success, "message": answer.message}


def main() -> None:
    rclpy.init()
    robot = Robot()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(robot, command.pop("do"))(**command) or {}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    robot.destroy_node()
    rclpy.try_shutdown()


if __name__ == "__main__":
    main()
