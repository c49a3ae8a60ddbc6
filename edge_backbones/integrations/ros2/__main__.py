"""Run ``python -m edge_backbones.integrations.ros2``."""

import sys

from edge_backbones.errors import MissingDependencyError

try:
    from edge_backbones.integrations.ros2.node import main
except MissingDependencyError as error:
    sys.exit(str(error))

sys.exit(main())
