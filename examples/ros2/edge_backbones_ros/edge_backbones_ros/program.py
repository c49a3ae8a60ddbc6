"""The program of the executable ``backbone``: the node of edge_backbones.integrations.ros2."""

from __future__ import annotations

import sys


def main() -> int | str:
    """Run the node until Ctrl-C or SIGTERM; return the exit status, or why it cannot run."""
    try:
        from edge_backbones.integrations.ros2.program import run
    except ModuleNotFoundError as error:
        if error.name != "edge_backbones":
            raise
        return (
            f"edge_backbones is not installed for {sys.executable}: activate the environment that has it, in the shell that "
            "starts the node"
        )
    except KeyboardInterrupt:
        return 130
    return run()
