"""Start the node::

ros2 launch edge_backbones_ros backbone.launch.py bundle:=/bundles/net.bundle image:=/camera/image_raw
"""

from pathlib import Path

from ament_index_python.packages import get_package_share_directory
from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode
from launch_ros.parameter_descriptions import ParameterValue

PARAMETERS = str(Path(get_package_share_directory("edge_backbones_ros")) / "config" / "backbone.yaml")


def generate_launch_description() -> LaunchDescription:
    """Declare the arguments that differ from robot to robot; the others are in the file of parameters."""
    bundle, image = LaunchConfiguration("bundle"), LaunchConfiguration("image")
    node = LifecycleNode(
        package="edge_backbones_ros",
        executable="backbone",
        name="edge_backbone",
        namespace=LaunchConfiguration("namespace"),
        # Later ones replace earlier ones: a file needs the parameters alone that differ.
        parameters=[PARAMETERS, LaunchConfiguration("parameters"), {"bundle": ParameterValue(bundle, value_type=str)}],
        remappings=[("image", image), ("image/compressed", [image, "/compressed"])],
        output="screen",
    )
    return LaunchDescription(
        [
            DeclareLaunchArgument("bundle", description="Folder of the bundle"),
            DeclareLaunchArgument("image", default_value="image", description="Topic of the camera's images"),
            DeclareLaunchArgument("namespace", default_value="", description="Namespace of the node"),
            DeclareLaunchArgument("parameters", default_value=PARAMETERS, description="File of parameters that differ"),
            node,
        ]
    )
