"""Count what became of the frames, keep the newest one, and sum up how long frames took. Nothing here imports ROS."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

_T = TypeVar("_T")
_WINDOW = 300  # ten seconds of most cameras
_MOST_REASONS = 50
_MOST_PUBLISHERS = 50


class Newest(Generic[_T]):
    """Hold one item for another thread: the newest. An item that was not taken yet is replaced."""

    def __init__(self) -> None:
        self._item: _T | None = None
        self._is_open = True
        self._changed = threading.Condition()

    def put(self, item: _T) -> bool:
        """Leave an item, and return whether it replaced one that nobody had taken."""
        with self._changed:
            replaced = self._item is not None
            self._item = item
            self._changed.notify()
        return replaced

    def take(self) -> _T | None:
        """Wait for an item, and take it; None once this is closed."""
        with self._changed:
            while self._item is None and self._is_open:
                self._changed.wait()
            item, self._item = self._item, None
            return item if self._is_open else None

    def close(self) -> bool:
        """Let `take` return None, now and from now on. Return whether an item was left that nobody had taken."""
        with self._changed:
            left, self._item = self._item is not None, None
            self._is_open = False
            self._changed.notify_all()
        return left


@dataclasses.dataclass
class Counts:
    """What became of the frames since the node was configured.

    Attributes:
        received: Frames that reached the node.
        lost: Frames that the camera has sent and the middleware did not deliver, as far as it numbers them.
        dropped: Frames that waited for the engine when a newer one came, or when the node was deactivated.
        refused: Frames that cannot be used: their encoding, their size.
        unread: Frames whose maps nobody has subscribed to. They are not computed.
        failed: Frames on which the engine or a publisher failed.
        published: Frames whose maps, or whose picture alone, were published.
    """

    received: int = 0
    lost: int = 0
    dropped: int = 0
    refused: int = 0
    unread: int = 0
    failed: int = 0
    published: int = 0


class Gaps:
    """Count the messages that are missing, by the numbers that a publisher gives them.

    The first number of a publisher, and one that is not above the last, begin anew: the publisher was started again.
    """

    def __init__(self) -> None:
        self._last: dict[Any, int] = {}

    def missing(self, publisher: Any, number: int | None) -> int:
        """Return how many messages are missing before this one; 0 if the middleware does not number messages."""
        if number is None:
            return 0
        if len(self._last) >= _MOST_PUBLISHERS and publisher not in self._last:
            self._last.clear()  # each start of a camera is another publisher
        last = self._last.get(publisher)
        self._last[publisher] = number
        return 0 if last is None or number <= last else number - last - 1


class Times(NamedTuple):
    """How long a frame took, in seconds: it waited for the engine, was decoded and prepared, run, and published."""

    wait: float
    prepare: float
    engine: float
    publish: float


class Latencies:
    """Hold the times of the last frames."""

    def __init__(self) -> None:
        self._times: deque[Times] = deque(maxlen=_WINDOW)

    def add(self, times: Times) -> None:
        """Add the times of a frame."""
        self._times.append(times)

    def summary(self) -> dict[str, float]:
        """Return milliseconds: the whole latency at the median and at 99 %, and each part's median. Empty without frames."""
        times = np.array(list(self._times)) * 1e3
        if not len(times):
            return {}
        whole = times.sum(axis=1)
        parts = zip(Times._fields, np.median(times, axis=0), strict=True)
        return {
            "latency_p50_ms": round(float(np.median(whole)), 3),
            "latency_p99_ms": round(float(np.percentile(whole, 99)), 3),
            **{f"{name}_p50_ms": round(float(value), 3) for name, value in parts},
        }


class Reasons:
    """Remember which reasons were told: each is told once, whatever the numbers in it are."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def is_new(self, reason: str) -> bool:
        """Return whether a reason was not told yet. It is from now on. After some dozens of reasons none is new."""
        kind = re.sub(r"\d+", "0", reason)
        if kind in self._told or len(self._told) >= _MOST_REASONS:
            return False
        self._told.add(kind)
        return True


class Status(NamedTuple):
    """What the diagnostics say: "OK", "WARN" or "ERROR", a sentence, and figures."""

    level: str
    message: str
    values: dict[str, str]


def status(
    counts: Counts,
    before: Counts,
    seconds: float,
    latencies: Latencies,
    told: Mapping[str, str],
    *,
    is_active: bool,
) -> Status:
    """Sum up what happened in the last ``seconds``, since the counts were those of ``before``.

    ``told``: what else is known, such as the engine's name and the last error.
    """
    new = {
        field.name: getattr(counts, field.name) - getattr(before, field.name) for field in dataclasses.fields(Counts)
    }
    rate = new["published"] / seconds if seconds > 0 else 0.0
    values = {
        **told,
        "rate_hz": f"{rate:.2f}",
        **{name: str(value) for name, value in latencies.summary().items()},
        **{name: str(value) for name, value in dataclasses.asdict(counts).items()},
    }
    if not is_active:
        return Status("OK", "inactive", values)
    if new["failed"]:
        return Status("ERROR", f"{new['failed']} frames failed: {told.get('last_error', '')}", values)
    if new["refused"]:
        return Status("WARN", f"{new['refused']} frames were refused: {told.get('last_error', '')}", values)
    if not new["received"]:
        return Status("WARN", "no frames came: look at the camera, its topic and its QoS", values)
    if new["unread"] and not new["published"]:
        return Status("OK", "nobody has subscribed to the maps: they are not computed", values)
    return Status(
        "OK",
        f"{rate:.1f} frames per second; {new['dropped']} came too fast, {new['lost']} were lost on the way",
        values,
    )
