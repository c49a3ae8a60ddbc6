"""Run ``python -m edge_backbones.integrations.ros2``."""

import sys

from edge_backbones.integrations.ros2.program import run

sys.exit(run())
