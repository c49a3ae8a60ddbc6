"""The node as a program: one line in the place of a traceback if ROS 2 is missing. Nothing here imports ROS."""

from __future__ import annotations

import signal

from edge_backbones.errors import MissingDependencyError


def run(args: list[str] | None = None) -> int | str:
    """Run the node until Ctrl-C or SIGTERM; return the exit status, or why the node cannot run, for ``sys.exit``.

    ``args``: ``sys.argv`` by default.
    """
    try:
        from edge_backbones.integrations.ros2.node import main

        return main(args)
    except MissingDependencyError as error:
        return str(error)
    except KeyboardInterrupt:  # before the node began, or its end hangs
        return 128 + signal.SIGINT
