"""The node of edge_backbones as a package of ROS 2: the executable ``backbone``, a launch file and parameters."""
