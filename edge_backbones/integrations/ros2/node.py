"""The lifecycle node. Importing this module needs rclpy and the messages of ROS 2.

The executor's thread receives images and leaves the newest one for a thread of the node, which computes and publishes. So a
camera that is faster than the engine makes no queue, and services answer while a frame is computed.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import threading
import time
from typing import Any

from edge_backbones.errors import EdgeBackbonesError, InputError, MissingDependencyError, first_line
from edge_backbones.integrations.ros2 import maps as messages
from edge_backbones.integrations.ros2.figures import Counts, Gaps, Latencies, Newest, Reasons, Status, Times, status
from edge_backbones.integrations.ros2.interrupts import Interrupts
from edge_backbones.integrations.ros2.maps import NamedMap, topics_of
from edge_backbones.integrations.ros2.options import DEFAULTS, DESCRIPTIONS, Options
from edge_backbones.integrations.ros2.pipeline import Pipeline

try:
    import rclpy
    import sensor_msgs.msg
    import std_msgs.msg
    import std_srvs.srv
    from rcl_interfaces.msg import ParameterDescriptor, SetParametersResult
    from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
    from rclpy.clock import Clock, ClockType
    from rclpy.executors import ExternalShutdownException
    from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
    from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
    from rclpy.task import Future
except ImportError as error:
    raise MissingDependencyError(
        f"the ROS 2 node ({error.name or error} cannot be imported)",
        "",
        fix="source /opt/ros/DISTRIBUTION/setup.bash in a shell whose Python has edge_backbones too, or pip install "
        "ros-rclpy ros-sensor-msgs ros-std-msgs ros-std-srvs ros-lifecycle-msgs ros-rmw-fastrtps-cpp ros-rmw-implementation",
    ) from error

try:
    import diagnostic_msgs.msg as diagnostic_types
except ImportError:  # then diagnostics are JSON
    diagnostic_types = None

_MESSAGES = {"tensor_list": "isaac_ros_tensor_list_interfaces.msg", "feature_maps": "edge_backbones_msgs.msg"}


@dataclasses.dataclass
class _Waiting:
    """An image message, and when it came."""

    message: Any
    came: float


class BackboneNode(LifecycleNode):
    """Compute the feature maps of a camera's images, with one engine of a bundle.

    Subscribes to ``image`` (or ``image/compressed``) while it is active. Publishes ``~/features/STAGE`` for each stage, or
    ``~/features`` with all of them; ``~/picture`` for people; ``/diagnostics``. The service ``~/reload`` changes to the
    bundle that the parameters name now. Maps carry the stamp and the frame_id of their image. `Options` lists the parameters.

    The parameters are read when the node is configured. ``bundle``, ``engine``, ``device``, ``threads`` and ``trusted`` are
    read by ``~/reload`` too.
    """

    def __init__(self, node_name: str = "edge_backbone", **options: Any) -> None:
        super().__init__(node_name, **options)
        for name, default in DEFAULTS.items():
            # Options checks types and values, and its messages say what a value may be.
            descriptor = ParameterDescriptor(description=DESCRIPTIONS[name], dynamic_typing=True)
            self.declare_parameter(name, default, descriptor)
        self.add_on_set_parameters_callback(self._check_parameters)
        self.counts = Counts()
        self._options = Options()
        self._pipeline: Pipeline | None = None
        self._in_use = threading.Lock()  # of the pipeline
        self._opening: threading.Thread | None = None
        self._clear()
        # While a bundle is opened, the other callbacks of a group wait: so the service has one of its own. It lives as
        # long as the node, because it may have to answer after a cleanup.
        group = MutuallyExclusiveCallbackGroup()
        self.create_service(std_srvs.srv.Trigger, "~/reload", self._on_reload, callback_group=group)

    def _clear(self) -> None:
        """Forget what belongs to one configuration."""
        self._publishers_of: dict[str, Any] = {}
        self._header: Any = None
        self._picture: Any = None
        self._next_picture = 0.0
        self._types: Any = None
        self._kind = ""
        self._subscription: Any = None
        self._worker: threading.Thread | None = None
        self._newest: Newest[_Waiting] = Newest()
        self._timer: Any = None
        self._diagnostics: Any = None
        self._latencies, self._reasons, self._gaps = Latencies(), Reasons(), Gaps()
        self.counts = Counts()
        self._before, self._reported = dataclasses.replace(self.counts), time.monotonic()
        self._last_error = ""

    # ---- lifecycle ----------------------------------------------------------------------------------------------

    def on_configure(self, state: Any) -> Any:
        """Open the bundle and create publishers. If something cannot work, log one line and stay unconfigured."""
        try:
            self._configure(Options.of(self._values()))
        except EdgeBackbonesError as error:
            self._release()
            self.get_logger().error(f"not configured: {error}")
            return TransitionCallbackReturn.FAILURE
        except Exception as error:  # rclpy would hide it, and enter the state of an error without a word
            self._release()
            if self.context.ok():  # else a signal has ended ROS meanwhile
                self.get_logger().error(f"not configured: {first_line(error, typed=True)}")
            return TransitionCallbackReturn.FAILURE
        assert self._pipeline is not None
        backbone = self._pipeline.backbone
        self.get_logger().info(
            f"configured: {self._pipeline.name}, engine {backbone.engine} on {backbone.device}, stages "
            f"{', '.join(self._pipeline.stages)} as {self._kind}"
        )
        return super().on_configure(state)

    def on_activate(self, state: Any) -> Any:
        """Subscribe to the images, and begin to compute."""
        done = super().on_activate(state)
        self._newest = Newest()
        self._worker = threading.Thread(target=self._work, args=(self._newest,), name="edge_backbone", daemon=True)
        self._worker.start()
        compressed = self._options.transport == "compressed"
        kind = sensor_msgs.msg.CompressedImage if compressed else sensor_msgs.msg.Image
        topic = "image/compressed" if compressed else "image"
        self._subscription = self.create_subscription(kind, topic, self._on_image, _profile(self._options.reliability))
        return done

    def on_deactivate(self, state: Any) -> Any:
        """Unsubscribe, and finish the frame at hand."""
        self._stop()
        return super().on_deactivate(state)

    def on_cleanup(self, state: Any) -> Any:
        """Close the engine, and remove the publishers."""
        self._release()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: Any) -> Any:
        """Close the engine, whatever the state."""
        self._release()
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: Any) -> Any:
        """Close the engine, and go back to the beginning."""
        self._release()
        return TransitionCallbackReturn.SUCCESS

    def start(self) -> bool:
        """Configure and activate the node; return whether it is active."""
        success = TransitionCallbackReturn.SUCCESS
        return bool(self.trigger_configure() == success and self.trigger_activate() == success)

    def close(self) -> None:
        """Finish the frame at hand, and close the engine. The node can then be destroyed, in any state."""
        if self._opening is not None:
            self._opening.join()
        self._release()

    def _configure(self, options: Options) -> None:
        self._clear()
        self._options = options
        self._kind, self._types = _message_types(options.output)
        if self._kind == "multi_array" and options.topics == "all":
            raise InputError(
                "a Float32MultiArray holds one map, and topics is all: set topics to each, or output to feature_maps"
            )
        self._pipeline = Pipeline.open(options)
        profile = _profile(options.output_reliability)
        if options.topics == "all":
            kind = self._class_of_maps()
            self._publishers_of[""] = self.create_lifecycle_publisher(kind, "~/features", profile)
        else:
            for stage, topic in topics_of(self._pipeline.stages).items():
                kind = self._class_of_maps()
                self._publishers_of[stage] = self.create_lifecycle_publisher(kind, f"~/features/{topic}", profile)
        if self._kind == "multi_array":
            self._header = self.create_lifecycle_publisher(std_msgs.msg.Header, "~/header", profile)
        if options.picture_rate:
            self._picture = self.create_lifecycle_publisher(sensor_msgs.msg.Image, "~/picture", profile)
        if options.diagnostics_period:
            self._diagnostics = self._create_diagnostics()
            # Also where time is simulated and stands still.
            clock = Clock(clock_type=ClockType.STEADY_TIME)
            self._timer = self.create_timer(options.diagnostics_period, self._report, clock=clock)

    def _class_of_maps(self) -> Any:
        name = {"tensor_list": "TensorList", "feature_maps": "FeatureMaps", "multi_array": "Float32MultiArray"}
        return getattr(self._types, name[self._kind])

    def _create_diagnostics(self) -> Any:
        if diagnostic_types is None:
            return self.create_publisher(std_msgs.msg.String, "~/diagnostics", 1)
        return self.create_publisher(diagnostic_types.DiagnosticArray, "/diagnostics", 1)

    def _stop(self) -> None:
        """Receive no more images, and wait for the frame at hand."""
        if self._subscription is not None:
            self.destroy_subscription(self._subscription)
            self._subscription = None
        if self._newest.close():
            self.counts.dropped += 1
        if self._worker is not None:
            self._worker.join()
            self._worker = None

    def _release(self) -> None:
        """Close the engine, and remove what a configuration has created."""
        self._stop()
        for publisher in (*self._publishers_of.values(), self._header, self._picture):
            if publisher is not None:
                self.destroy_lifecycle_publisher(publisher)
        if self._timer is not None:
            self.destroy_timer(self._timer)
        if self._diagnostics is not None:
            self.destroy_publisher(self._diagnostics)
        with self._in_use:
            if self._pipeline is not None:
                self._pipeline.close()
            self._pipeline = None
        self._clear()

    # ---- frames -------------------------------------------------------------------------------------------------

    def _on_image(self, message: Any, info: Any) -> None:
        """Leave an image for the worker. An older one that still waits is dropped."""
        self.counts.received += 1
        publisher = info.get("publisher_gid")
        name = publisher.get("data") if isinstance(publisher, dict) else publisher
        self.counts.lost += self._gaps.missing(str(name), info.get("publication_sequence_number"))
        if self._newest.put(_Waiting(message, time.monotonic())):
            self.counts.dropped += 1

    def _work(self, newest: Newest[_Waiting]) -> None:
        """Compute the newest image again and again, until there is an end of them. Runs in a thread of its own."""
        while (waiting := newest.take()) is not None:
            try:
                self._compute(waiting)
            except InputError as error:
                self.counts.refused += 1
                self._tell("a frame is refused", str(error))
            except Exception as error:  # of the engine or of the middleware: the next frame may go well
                if not self.context.ok():
                    return
                self.counts.failed += 1
                self._tell("a frame failed", first_line(error, typed=not isinstance(error, EdgeBackbonesError)))

    def _compute(self, waiting: _Waiting) -> None:
        began = time.monotonic()
        message, draws = waiting.message, self._draws_now()
        read = [stage for stage, publisher in self._publishers_of.items() if self._is_read(publisher)]
        if not read and not draws:
            self.counts.unread += 1
            return
        with self._in_use:
            pipeline = self._pipeline
            if pipeline is None:
                return
            prepared = pipeline.prepare(message)
            ready = time.monotonic()
            maps = pipeline.run(prepared)
            ran = time.monotonic()
            self._publish_maps(message.header, maps, read, pipeline.backbone.engine)
            self.counts.published += 1
            if read:
                done = time.monotonic()
                self._latencies.add(Times(began - waiting.came, ready - began, ran - ready, done - ran))
            if draws:
                self._publish_picture(message.header, prepared, maps, pipeline)

    def _is_read(self, publisher: Any) -> bool:
        return self._options.publish == "all" or publisher.get_subscription_count() > 0

    def _publish_maps(self, header: Any, maps: list[NamedMap], read: list[str], engine: str) -> None:
        if self._header is not None and read:
            self._header.publish(header)
        for name in read:
            chosen = [one for one in maps if name in ("", one.stage)]
            self._publishers_of[name].publish(self._message_of(header, chosen, engine))

    def _message_of(self, header: Any, maps: list[NamedMap], engine: str) -> Any:
        if self._kind == "tensor_list":
            return messages.tensor_list(self._types, header, maps)
        if self._kind == "feature_maps":
            return messages.feature_maps(self._types, header, maps, engine)
        return messages.multi_array(self._types, maps[0])

    def _draws_now(self) -> bool:
        due = self._picture is not None and time.monotonic() >= self._next_picture
        return due and self._picture.get_subscription_count() > 0

    def _publish_picture(self, header: Any, prepared: Any, maps: list[NamedMap], pipeline: Pipeline) -> None:
        self._next_picture = time.monotonic() + 1 / self._options.picture_rate
        try:
            drawn = pipeline.draw(prepared, maps, f"{pipeline.name}: {pipeline.backbone.engine}")
        except MissingDependencyError as error:
            self._next_picture = float("inf")
            self._tell("no pictures", str(error))
            return
        if drawn is not None:
            self._picture.publish(messages.picture(sensor_msgs.msg, header, drawn))

    def _tell(self, what: str, reason: str) -> None:
        """Log a reason once; diagnostics repeat the last one."""
        self._last_error = reason
        if self._reasons.is_new(f"{what}: {reason}"):
            self.get_logger().warning(f"{what}: {reason} (said once)")

    # ---- another bundle -----------------------------------------------------------------------------------------

    async def _on_reload(self, request: Any, response: Any) -> Any:
        """Open the bundle that the parameters name now, and change to it between two frames.

        It must have the stages that are published. If it cannot be opened the old one stays.
        """
        before = self._pipeline
        if before is None:
            response.success, response.message = False, "the node is not configured: configure it instead"
            return response
        opened: Future = Future(executor=self.executor)
        opened.add_done_callback(lambda _: None)  # schedules work, so that the executor wakes and goes on here
        self._opening = threading.Thread(target=self._open, args=(opened, before.stages), name="edge_backbone_reload")
        self._opening.start()
        made = await opened
        if isinstance(made, Exception):
            known = isinstance(made, EdgeBackbonesError)
            response.success, response.message = False, first_line(made, typed=not known)
            self.get_logger().error(f"not reloaded, {before.name} goes on: {response.message}")
            return response
        with self._in_use:
            gone = self._pipeline is not before
            if not gone:
                self._pipeline = made
        (made if gone else before).close()
        if gone:
            response.success, response.message = False, "the node was cleaned up meanwhile: configure it instead"
            return response
        self._latencies = Latencies()
        response.success = True
        response.message = f"{made.name}, engine {made.backbone.engine} on {made.backbone.device}"
        self.get_logger().info(f"reloaded: {response.message}")
        return response

    def _open(self, opened: Future, stages: list[str]) -> None:
        """Open a bundle in a thread of its own; the result is a Pipeline or an exception."""
        try:
            now = Options.of(self._values())
            # The other parameters belong to the configuration: topics stay as they are.
            kept = {name: getattr(now, name) for name in ("bundle", "engine", "device", "threads", "trusted")}
            opened.set_result(Pipeline.open(dataclasses.replace(self._options, **kept), stages))
        except Exception as error:
            opened.set_result(error)

    # ---- parameters and diagnostics -----------------------------------------------------------------------------

    def _values(self) -> dict[str, Any]:
        return {name: self.get_parameter(name).value for name in DEFAULTS}

    def _check_parameters(self, changed: list[Any]) -> Any:
        try:
            Options.of({**self._values(), **{one.name: one.value for one in changed if one.name in DEFAULTS}})
        except InputError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)

    def _report(self) -> None:
        """Publish diagnostics."""
        pipeline, now = self._pipeline, time.monotonic()
        if pipeline is None:
            return
        backbone = pipeline.backbone
        told = {"bundle": pipeline.name, "engine": backbone.engine, "device": backbone.device}
        if self._last_error:
            told["last_error"] = self._last_error
        counts = dataclasses.replace(self.counts)
        is_active = self._worker is not None
        said = status(counts, self._before, now - self._reported, self._latencies, told, is_active=is_active)
        self._before, self._reported = counts, now
        self._diagnostics.publish(self._diagnostic(said))

    def _diagnostic(self, said: Status) -> Any:
        name = f"{self.get_fully_qualified_name().lstrip('/')}: frames"
        if diagnostic_types is None:
            text = json.dumps({"level": said.level, "name": name, "message": said.message, "values": said.values})
            return std_msgs.msg.String(data=text)
        one = diagnostic_types.DiagnosticStatus(name=name, message=said.message, hardware_id=said.values["device"])
        one.level = getattr(diagnostic_types.DiagnosticStatus, said.level)
        one.values = [diagnostic_types.KeyValue(key=key, value=value) for key, value in said.values.items()]
        message = diagnostic_types.DiagnosticArray(status=[one])
        message.header.stamp = self.get_clock().now().to_msg()
        return message


def _profile(reliability: str) -> QoSProfile:
    """Return a QoS that keeps the last message alone."""
    policy = ReliabilityPolicy.RELIABLE if reliability == "reliable" else ReliabilityPolicy.BEST_EFFORT
    return QoSProfile(history=HistoryPolicy.KEEP_LAST, depth=1, reliability=policy)


def _message_types(output: str) -> tuple[str, Any]:
    """Return the kind of message, and the module of its classes. Raises InputError if it cannot be imported."""
    if output == "multi_array":
        return output, std_msgs.msg
    reasons = []
    for kind, module in _MESSAGES.items():
        if output in ("auto", kind):
            try:
                return kind, importlib.import_module(module)
            except ImportError:
                reasons.append(module.partition(".")[0])
    raise InputError(
        f"output is {output}, and {' and '.join(reasons)} cannot be imported: build edge_backbones_msgs of examples/ros2 "
        "with colcon and source its setup.bash, or set output to multi_array"
    )


def main(args: list[str] | None = None) -> int:
    """Run the node until Ctrl-C or SIGTERM, which is the end of the program: SIGINT is ignored then.

    ``args``: those of ``ros2 run``, ``sys.argv`` by default.
    """
    interrupts = Interrupts()
    interrupts.install()
    rclpy.init(args=args)
    node: BackboneNode | None = None
    try:
        node = BackboneNode()
        if node.get_parameter("autostart").value is not False:  # configuring refuses what is not true or false
            node.start()
        if rclpy.ok():
            rclpy.spin(node)
    except (KeyboardInterrupt, ExternalShutdownException):
        pass  # asked for
    except Exception:
        if rclpy.ok():
            raise
        # A signal has ended ROS while the node started, and whatever uses ROS then fails.
    finally:
        interrupts.begin_end()
        if node is not None:
            node.close()
            node.destroy_node()
        rclpy.try_shutdown()
        interrupts.end()
    return 0
