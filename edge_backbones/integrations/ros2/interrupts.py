"""What Ctrl-C does to the node's program. Nothing here imports ROS."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

_SAME_KEY = 2.0  # seconds


class Interrupts:
    """Let SIGINT raise KeyboardInterrupt, and do nothing if it comes again at once.

    One Ctrl-C can be two signals: ``ros2 launch`` sends SIGINT to its nodes when its input is no terminal, and whoever
    signals the whole group of processes, as systemd does, has sent it to them already. The second one would break into the
    node's end. One that comes seconds later was meant: something hangs.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = -math.inf

    def install(self) -> None:
        """Handle SIGINT from now on."""
        _set(self.handle)

    def handle(self, number: int, frame: Any) -> None:
        """Raise KeyboardInterrupt, if the last signal was not just now."""
        if self._clock() - self._last > _SAME_KEY:
            self.begin_end()
            raise KeyboardInterrupt

    def begin_end(self) -> None:
        """Let signals of the next moment do nothing, because the program ends already."""
        self._last = self._clock()

    def end(self) -> None:
        """Ignore SIGINT from now on: Python's own end takes a moment too, and would die of it."""
        _set(signal.SIG_IGN)


def _set(handler: Any) -> None:
    """Set the handler of SIGINT. Python allows it in the main thread alone: elsewhere this does nothing."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)
