"""Name the node, which is edge_backbones.integrations.ros2, for ``ros2 run`` and ``ros2 launch``."""

from pathlib import Path

from setuptools import find_packages, setup

NAME = "edge_backbones_ros"

setup(
    name=NAME,
    version="0.1.0",
    packages=find_packages(),
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{NAME}"]),
        (f"share/{NAME}", ["package.xml"]),
        # Not a script or an entry point: setuptools writes the path of colcon's Python into these, and edge_backbones is
        # often in another environment.
        (f"lib/{NAME}", ["scripts/backbone"]),
        (f"share/{NAME}/launch", [str(file) for file in Path("launch").glob("*.launch.py")]),
        (f"share/{NAME}/config", [str(file) for file in Path("config").glob("*.yaml")]),
    ],
    install_requires=["setuptools", "edge-backbones"],
    zip_safe=True,
    maintainer="edge_backbones developers",
    description="A lifecycle node that turns a camera's images into feature maps of a vision backbone",
    license="Apache-2.0",
)
