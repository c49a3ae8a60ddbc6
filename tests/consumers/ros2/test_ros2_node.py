"""The node of ROS 2 between a camera and a reader: maps to the last bit, drops, errors, other bundles, the end."""

from __future__ import annotations

import base64
import io
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image

from edge_backbones import Bundle, EdgeBackbone
from edge_backbones.images.camera import frame_spec, from_rgb
from tests.consumers.ros2.conftest import FRAME, STAGES
from tests.traps import changed

ROWS, COLUMNS = FRAME
PICTURE = np.random.default_rng(0).integers(0, 256, (ROWS // 6, COLUMNS // 6, 3), np.uint8).repeat(6, 0).repeat(6, 1)
GREY = PICTURE[..., 1]
ALPHA = np.full((ROWS, COLUMNS, 1), 7, np.uint8)
YUYV = from_rgb(PICTURE, frame_spec(ROWS, COLUMNS, "yuyv"))
NV12 = from_rgb(PICTURE, frame_spec(ROWS, COLUMNS, "nv12"))

# The encoding of ROS, the pixels that are sent, those that the backbone is given, and their colour.
ENCODINGS = {
    "rgb8": (PICTURE, PICTURE, "rgb"),
    "bgr8": (PICTURE[..., ::-1], PICTURE, "rgb"),
    "rgba8": (np.concatenate([PICTURE, ALPHA], 2), PICTURE, "rgb"),
    "bgra8": (np.concatenate([PICTURE[..., ::-1], ALPHA], 2), PICTURE, "rgb"),
    "mono8": (GREY, GREY, "gray"),
    "yuv422_yuy2": (YUYV, YUYV, "yuyv"),
    "yuyv": (YUYV, YUYV, "yuyv"),
    "nv12": (NV12, NV12, "nv12"),
}


def padded(pixels: np.ndarray, extra: int = 8) -> tuple[np.ndarray, int]:
    """Return the rows of an image with bytes that mean nothing behind each, and the bytes of a row."""
    rows = np.ascontiguousarray(pixels).reshape(len(pixels), -1)
    return np.pad(rows, ((0, 0), (0, extra)), constant_values=255), rows.shape[1] + extra


def fields_of(encoding: str, step: int) -> dict:
    return {"encoding": encoding, "height": ROWS, "width": COLUMNS, "step": step}


def expected(bundle, pixels, color="rgb") -> dict[str, np.ndarray]:
    with EdgeBackbone.from_pretrained(bundle, threads=1) as backbone:
        prepared = backbone.preprocess(pixels) if color is None else backbone.preprocess(pixels, color=color)
        return backbone.run(prepared)


def assert_equal(maps, wanted, stages=STAGES) -> None:
    assert list(maps) == stages
    for stage in stages:
        np.testing.assert_array_equal(maps[stage], wanted[stage])
        assert np.abs(maps[stage]).max() > 0


def activate(robot, topic="image", stages=STAGES) -> None:
    """Bring a node up that was started without autostart, and connect to it."""
    assert robot.do("transition", label="configure") == {"success": True, "state": "inactive"}
    assert robot.do("transition", label="activate") == {"success": True, "state": "active"}
    robot.do("read", stages=stages)
    robot.do("connect", topic=topic)


def wait_for(robot, **counts) -> None:
    """Wait until the diagnostics have these counts."""
    for _ in range(100):
        said = robot.do("diagnostics")
        if all(said[name] == str(count) for name, count in counts.items()):
            return
    pytest.fail(f"{counts} did not come, the last diagnostics are {said}")


@pytest.mark.parametrize("kind", ["pixels", "image"])
def test_maps_of_every_encoding_are_the_backbones_own(robot, start_node, bundles, kind):
    start_node(bundle=str(bundles / kind), autostart=True)
    robot.do("read", stages=STAGES)
    robot.do("connect")
    for encoding, (sent, given, color) in ENCODINGS.items():
        rows, step = padded(sent)
        maps = robot.maps(rows, **fields_of(encoding, step))
        assert_equal(maps, expected(bundles / kind, given, color))
    said = robot.do("diagnostics")
    assert (said["published"], said["refused"], said["failed"]) == ("8", "0", "0")
    assert said["engine"].startswith("openvino-")
    assert said["name"] == "edge_backbone: frames"
    assert float(said["latency_p99_ms"]) >= float(said["latency_p50_ms"]) > 0


@pytest.mark.parametrize("format", ["jpeg", "png"])
def test_compressed_images_are_decoded_as_files_are(robot, start_node, bundles, format):
    start_node(bundle=str(bundles / "image"), transport="compressed", autostart=True)
    robot.do("read", stages=STAGES)
    robot.do("connect", topic="image/compressed")
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, format)
    data = np.frombuffer(file.getvalue(), np.uint8)
    maps = robot.maps(data, topic="image/compressed", format=f"bgr8; {format} compressed bgr8")
    assert_equal(maps, expected(bundles / "image", Image.open(file), color=None))
    robot.do("throw", topic="image/compressed", file=robot.file(data[: len(data) // 3]), format=format)
    wait_for(robot, refused=1)
    assert_equal(robot.maps(data, topic="image/compressed", format=format), maps)


def test_a_bundle_of_frames_takes_them_as_they_are_and_nothing_else(robot, start_node, bundles):
    node = start_node(bundle=str(bundles / "nv12"))
    activate(robot)
    maps = robot.maps(NV12, **fields_of("nv12", COLUMNS))
    assert_equal(maps, expected(bundles / "nv12", NV12, "nv12"))
    robot.do("throw", file=robot.file(PICTURE), **fields_of("rgb8", COLUMNS * 3))
    wait_for(robot, refused=1)
    smaller = {"encoding": "nv12", "height": ROWS - 2, "width": COLUMNS, "step": COLUMNS}
    robot.do("throw", file=robot.file(NV12[:-3]), **smaller)
    wait_for(robot, refused=2)
    assert_equal(robot.maps(NV12, **fields_of("nv12", COLUMNS)), maps)
    assert "takes nv12 frames of 90x120 (BT.601, limited range) as they are, and this one is rgb of 90x120" in node.log
    assert "and this one is nv12 of 88x120" in node.log


def test_images_that_cannot_be_used_are_counted_and_told_once(robot, start_node, bundles):
    node = start_node(bundle=str(bundles / "image"), autostart=True)
    robot.do("read", stages=STAGES)
    robot.do("connect")
    bad = {
        "bayer_rggb8": "DebayerNode",
        "mono16": "more than 8 bits",
        "yuv422": "cv_bridge",
        "rgb8": "the message has 100",
    }
    for refused, encoding in enumerate([*bad, *bad], start=1):
        robot.do("throw", file=robot.file(PICTURE.ravel()[:100]), **fields_of(encoding, COLUMNS * 3))
        wait_for(robot, refused=refused)
    assert_equal(robot.maps(PICTURE, **fields_of("rgb8", COLUMNS * 3)), expected(bundles / "image", PICTURE))
    for word in bad.values():
        assert node.log.count(word) == 1
    assert len(node.log.splitlines()) == 1 + len(bad)
    assert robot.do("state") == {"state": "active"}


def test_frames_that_come_too_fast_are_dropped_and_counted(robot, start_node, bundles):
    # Without resends the middleware loses most of such images on its own: its shared memory is smaller than one.
    start_node(bundle=str(bundles / "pixels"), reliability="reliable", autostart=True)
    robot.do("read", stages=STAGES)
    robot.do("connect")
    large = PICTURE.repeat(8, 0).repeat(8, 1)  # takes longer to resize than to send
    fields = {"encoding": "rgb8", "height": ROWS * 8, "width": COLUMNS * 8, "step": COLUMNS * 8 * 3}
    done = robot.do("burst", file=robot.file(large), count=100, pause=0.0, **fields)
    diagnostics = robot.do("diagnostics")
    counted = ("received", "lost", "dropped", "refused", "unread", "failed", "published")
    said = {name: int(diagnostics[name]) for name in counted}
    assert said["dropped"] + said["lost"] > 0 < said["published"]
    assert said["received"] == said["published"] + said["dropped"]
    # Frames that the middleware lost behind the last one that came have no number yet.
    behind = done["sent"] - said["received"] - said["lost"]
    assert 0 <= behind < done["sent"] / 2
    assert done["came_back"] == sorted(set(done["came_back"]))
    assert said["failed"] == said["refused"] == 0


def test_the_lifecycle_goes_round(robot, start_node, bundles):
    node = start_node(bundle=str(bundles / "image"))
    assert robot.do("state") == {"state": "unconfigured"}
    activate(robot)
    first = robot.maps(PICTURE, **fields_of("rgb8", COLUMNS * 3))
    assert robot.do("transition", label="deactivate") == {"success": True, "state": "inactive"}
    robot.do("throw", file=robot.file(PICTURE), **fields_of("rgb8", COLUMNS * 3))
    said = robot.do("diagnostics")
    assert (said["message"], said["received"]) == ("inactive", "1")
    assert robot.do("transition", label="activate") == {"success": True, "state": "active"}
    robot.do("connect")
    assert_equal(robot.maps(PICTURE, **fields_of("rgb8", COLUMNS * 3)), first)
    assert robot.do("transition", label="deactivate")["success"]
    assert robot.do("transition", label="cleanup") == {"success": True, "state": "unconfigured"}
    assert robot.do("reload") == {"success": False, "message": "the node is not configured: configure it instead"}
    assert robot.do("transition", label="configure") == {"success": True, "state": "inactive"}
    assert robot.do("transition", label="activate") == {"success": True, "state": "active"}
    robot.do("connect")
    assert_equal(robot.maps(PICTURE, **fields_of("rgb8", COLUMNS * 3)), first)
    assert robot.do("transition", label="shutdown") == {"success": True, "state": "finalized"}
    assert node.end() == 0


def test_what_cannot_be_configured_is_one_line_and_the_node_stays_unconfigured(robot, start_node, bundles, tmp_path):
    foreign = tmp_path / "foreign"
    shutil.copytree(bundles / "image", foreign)
    changed(Bundle.open(foreign), "engines", 0, "key", "library_version", to="2020.1.0")
    node = start_node()
    given = {
        "parameter bundle is empty": {"bundle": ""},
        "nothing.bundle": {"bundle": str(tmp_path / "nothing.bundle")},
        "2020.1.0": {"bundle": str(foreign)},
        "'layer9'": {"bundle": str(bundles / "image"), "stages": ["layer9"]},
        "['layer1'] are not compiled": {"stages": ["layer1"]},
        "edge_backbones_msgs": {"stages": ["layer4"], "output": "auto"},
        "topics is all": {"output": "multi_array", "topics": "all"},
        "set transport to raw": {"topics": "each", "transport": "compressed", "bundle": str(bundles / "nv12")},
    }
    for count, (word, parameters) in enumerate(given.items(), start=1):
        assert robot.do("set", **parameters)["reasons"] == [""] * len(parameters)
        assert robot.do("transition", label="configure") == {"success": False, "state": "unconfigured"}
        lines = node.log.splitlines()
        assert len(lines) == count
        assert "[ERROR]" in lines[-1]
        assert "not configured: " in lines[-1]
        assert word in lines[-1]
    robot.do("set", transport="raw", stages=["layer4", "layer2"], bundle=str(bundles / "image"))
    activate(robot, stages=["layer2", "layer4"])
    chosen = ["layer2", "layer4"]
    maps = robot.maps(PICTURE, stages=chosen, **fields_of("rgb8", COLUMNS * 3))
    assert_equal(maps, expected(bundles / "image", PICTURE), chosen)


def test_values_that_a_parameter_may_not_have_are_refused(robot, start_node):
    start_node()
    reasons = robot.do("set", transport="jpeg", threads=-1, picture_rate="fast", device="auto")["reasons"]
    assert reasons == [
        "parameter transport is raw or compressed, got 'jpeg'",
        "parameter threads is a whole number from 0, got -1: 0 is the default",
        "parameter picture_rate is a number from 0 to 1000, got 'fast': 0 turns it off",
        "",
    ]


def test_another_bundle_takes_over_between_two_frames_or_not_at_all(robot, start_node, bundles, tmp_path):
    start_node(bundle=str(bundles / "image"), autostart=True)
    robot.do("read", stages=STAGES)
    robot.do("connect")
    fields = fields_of("rgb8", COLUMNS * 3)
    before, after = expected(bundles / "image", PICTURE), expected(bundles / "other", PICTURE)
    for bundle, word in ((tmp_path / "nothing.bundle", "nothing.bundle"), (bundles / "fewer", "are not compiled")):
        robot.do("set", bundle=str(bundle))
        answer = robot.do("reload")
        assert not answer["success"]
        assert word in answer["message"]
        assert_equal(robot.maps(PICTURE, **fields), before)
    robot.do("set", bundle=str(bundles / "other"))
    answer = robot.do("reload")
    assert answer["success"]
    assert answer["message"].startswith("other, engine openvino-")
    assert_equal(robot.maps(PICTURE, **fields), after)
    assert robot.do("diagnostics")["bundle"] == "other"


def test_maps_that_nobody_reads_are_not_computed(robot, start_node, bundles):
    start_node(bundle=str(bundles / "image"), autostart=True)
    robot.do("connect")
    robot.do("throw", file=robot.file(PICTURE), **fields_of("rgb8", COLUMNS * 3))
    wait_for(robot, unread=1, published=0)
    robot.do("read", stages=["layer4"])
    robot.do("connect")
    maps = robot.maps(PICTURE, stages=["layer4"], **fields_of("rgb8", COLUMNS * 3))
    assert_equal(maps, expected(bundles / "image", PICTURE), ["layer4"])


STAND_IN = '''
"""edge_backbones_msgs as it is for who makes a message, and a text for the middleware: colcon generates the real one."""
import base64, json
from std_msgs.msg import String

type(String).__import_type_support__()  # rclpy would do that for the class of the publisher alone

class _Kind(type(String)):
    def __instancecheck__(cls, one):
        return isinstance(one, String)

class FeatureMap:
    def __init__(self, name, layout, dtype):
        self.name, self.layout, self.dtype = name, layout, dtype

class FeatureMaps(metaclass=_Kind):
    def __new__(cls, header, engine, maps):
        fields = [
            {**vars(one), "shape": list(one.shape), "strides": list(one.strides),
             "data": base64.b64encode(one.data).decode()}
            for one in maps
        ]
        header = {"sec": header.stamp.sec, "frame_id": header.frame_id}
        return String(data=json.dumps({"header": header, "engine": engine, "maps": fields}))
'''


def test_one_topic_can_hold_all_stages_in_our_own_message(robot, start_node, bundles, tmp_path):
    (tmp_path / "edge_backbones_msgs").mkdir()
    (tmp_path / "edge_backbones_msgs" / "__init__.py").touch()
    (tmp_path / "edge_backbones_msgs" / "msg.py").write_text(STAND_IN)
    node = start_node(bundle=str(bundles / "image"), topics="all", output="auto", stages=["layer2", "layer4"])
    assert robot.do("transition", label="configure")["success"], node.log
    assert robot.do("transition", label="activate")["success"]
    robot.do("read_stand_in")
    robot.do("connect")
    robot.do("throw", file=robot.file(PICTURE), **fields_of("rgb8", COLUMNS * 3))
    message = robot.do("stand_in")
    assert message["header"] == {"sec": 1001, "frame_id": "camera_1"}
    assert message["engine"].startswith("openvino-")
    wanted = expected(bundles / "image", PICTURE)
    assert [one["name"] for one in message["maps"]] == ["layer2", "layer4"]
    for one in message["maps"]:
        values = np.frombuffer(base64.b64decode(one["data"]), one["dtype"]).reshape(one["shape"])
        np.testing.assert_array_equal(values, wanted[one["name"]])
        assert (one["layout"], one["strides"]) == ("NCHW", list(values.strides))


def test_people_see_a_picture_of_the_maps(robot, start_node, bundles, tmp_path):
    start_node(bundle=str(bundles / "pixels"), picture_rate=50, autostart=True)
    robot.do("look")
    robot.do("connect")
    robot.do("throw", file=robot.file(PICTURE), **fields_of("rgb8", COLUMNS * 3))
    out = tmp_path / "picture.npy"
    said = robot.do("picture", out=str(out))
    drawn = np.load(out)
    assert said == {"encoding": "rgb8", "step": drawn.shape[1] * 3}
    assert drawn.shape[0] > 3 * 100  # a row of tiles for each stage
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 100


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_node_in_good_order(robot, start_node, bundles, number):
    node = start_node(bundle=str(bundles / "image"), autostart=True)
    robot.do("read", stages=STAGES)
    robot.do("connect")
    robot.maps(PICTURE, **fields_of("rgb8", COLUMNS * 3))
    assert node.end(number) == 0, node.log
    (line,) = node.log.splitlines()
    assert "configured: image, engine openvino-" in line


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("pause", [0, 0.01, 0.1, 0.3])
def test_signals_that_follow_do_not_disturb_the_end(robot, start_node, bundles, first, pause):
    """``ros2 launch`` sends SIGINT to a node that may have had it from the terminal or from systemd."""
    node = start_node(bundle=str(bundles / "image"), autostart=True)
    robot.do("connect")
    node._process.send_signal(first)
    for _ in range(3):
        time.sleep(pause)
        node._process.send_signal(signal.SIGINT)
    assert node._process.wait(timeout=60) == 0, node.log
    (line,) = node.log.splitlines()
    assert "configured: image, engine openvino-" in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_node_while_it_starts(start_node, bundles, tmp_path, number):
    """The messages are imported while the node is configured: these here wait for the end of ROS."""
    (tmp_path / "edge_backbones_msgs").mkdir()
    (tmp_path / "edge_backbones_msgs" / "__init__.py").touch()
    waiting = f"import os, rclpy, time\nos.kill(os.getpid(), {int(number)})\nwhile rclpy.ok():\n    time.sleep(0.01)\n"
    (tmp_path / "edge_backbones_msgs" / "msg.py").write_text(waiting + STAND_IN)
    node = start_node(bundle=str(bundles / "image"), output="auto", topics="all", autostart=True)
    assert node._process.wait(timeout=60) == 0, node.log
    assert "not configured" not in node.log


def test_a_start_that_is_neither_true_nor_false_is_refused(robot, start_node, bundles):
    node = start_node(bundle=str(bundles / "image"), autostart=1)
    assert robot.do("state") == {"state": "unconfigured"}
    (line,) = node.log.splitlines()
    assert "not configured: parameter autostart is true or false, got 1" in line


def test_an_image_that_waits_when_the_node_is_deactivated_is_counted(robot, start_node, bundles):
    start_node(bundle=str(bundles / "image"), reliability="reliable", autostart=True)
    robot.do("read", stages=STAGES)
    robot.do("connect")
    large = PICTURE.repeat(8, 0).repeat(8, 1)
    fields = {"encoding": "rgb8", "height": ROWS * 8, "width": COLUMNS * 8, "step": COLUMNS * 8 * 3}
    for _ in range(4):
        robot.do("throw", file=robot.file(large), **fields)
    assert robot.do("transition", label="deactivate")["success"]
    said = robot.do("diagnostics")
    assert int(said["received"]) == int(said["published"]) + int(said["dropped"])
