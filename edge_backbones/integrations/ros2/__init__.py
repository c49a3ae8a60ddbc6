"""A lifecycle node of ROS 2: camera images in, feature maps with the image's stamp and frame_id out."""
