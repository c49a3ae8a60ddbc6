"""Compute feature maps of frames that a C++ program has in shared memory, where they lie, and put the maps there too.

Needs a bundle that takes frames of the camera's size (`--input frame --frame 480x640`), the extra `cpu` and Linux.

    build/camera /camera 480 640 &
    python examples/shared_memory/backbone.py frames.bundle /camera

No frame is copied: the array that the backbone gets is a view of the shared memory. A bundle that takes other input works
too, and its preprocessing reads the frame there. segment.hpp says how the two programs share the memory.
"""

import argparse
import fcntl
import math
import mmap
import os
import sys
import time
from contextlib import contextmanager

import numpy as np

from edge_backbones import EdgeBackbone, EdgeBackbonesError

MAGIC, VERSION, SLOTS = 0x3153454741424545, 1, 3
MAP_BYTE, CAMERA_LIVES, BACKBONE_LIVES = 3, 4, 5
HEADER = np.dtype(
    [
        *(("magic", "<u8"), ("version", "<u4"), ("slots", "<u4")),
        *(("height", "<u4"), ("width", "<u4"), ("channels", "<u4"), ("ended", "<u4")),
        *(("frames_offset", "<u8"), ("frame_pitch", "<u8"), ("map_offset", "<u8"), ("map_bytes", "<u8")),
        *(("newest", "<u8"), ("slot", [("number", "<u8"), ("checksum", "<u8")], SLOTS)),
        *(("map_of", "<u8"), ("map_checksum", "<u8"), ("map_shape", "<u4", 4)),
    ]
)
PAUSE = 0.001


class SegmentError(Exception):
    """The shared memory cannot be used; the text is one line."""


class Segment:
    """The shared memory of a camera, mapped for as long as this process lives. One thread may use it."""

    # multiprocessing.shared_memory would do the mapping. But before Python 3.13, which has track=False, a process that opens
    # a segment removes it from the system when it ends, although the segment is the camera's.
    def __init__(self, name: str) -> None:
        try:
            self._file = os.open(f"/dev/shm/{name.removeprefix('/')}", os.O_RDWR | os.O_CLOEXEC)  # noqa: S108
        except OSError as error:
            raise SegmentError(f"there is no shared memory {name} ({error.strerror}): start the camera first") from None
        size = os.fstat(self._file).st_size
        if size < HEADER.itemsize:
            raise SegmentError(f"{name} has {size} bytes, a header has {HEADER.itemsize}: the camera has not begun")
        self._memory = mmap.mmap(self._file, size)
        self.header = np.ndarray((), HEADER, self._memory)
        found = self.header
        if found["magic"] != MAGIC:
            raise SegmentError(f"{name} begins with {int(found['magic']):#x}, not {MAGIC:#x}: it is not of the camera")
        if (found["version"], found["slots"]) != (VERSION, SLOTS):
            raise SegmentError(
                f"{name} has version {found['version']} and {found['slots']} slots, this program reads {VERSION} and "
                f"{SLOTS}: build the camera of the same release"
            )
        self.shape = tuple(int(found[key]) for key in ("height", "width", "channels"))
        frames = int(found["frames_offset"]), int(found["frame_pitch"]), math.prod(self.shape)
        needed = max(frames[0] + SLOTS * frames[1], int(found["map_offset"]) + int(found["map_bytes"]))
        if needed > size or frames[2] > frames[1] or not frames[2]:
            raise SegmentError(
                f"{name} has {size} bytes, and what its header says needs {needed}, for frames {self.shape}"
            )
        self.frames = [np.ndarray(self.shape, np.uint8, self._memory, frames[0] + i * frames[1]) for i in range(SLOTS)]
        self._map_place = int(found["map_offset"]), int(found["map_bytes"])
        if not self._try_lock(BACKBONE_LIVES):
            raise SegmentError(f"another backbone.py reads {name}: end it first")

    @property
    def camera_lives(self) -> bool:
        """Return whether the camera's process is there: it holds a lock, which the kernel frees when a process ends."""
        if self._try_lock(CAMERA_LIVES):
            self._unlock(CAMERA_LIVES)
            return False
        return True

    @contextmanager
    def frame(self, after: int):
        """Give the number of the newest frame and a view of it, uint8 (height, width, channels).

        The camera does not write to it inside the block. Gives None if there is no frame with a number above ``after``.
        """
        newest = int(self.header["newest"])
        numbers = self.header["slot"]["number"].tolist()
        slot = numbers.index(newest) if newest > after and newest in numbers else None
        # The camera may have taken the slot meanwhile. It may also have died in the middle of a frame: that has number 0.
        if slot is None or not self._try_lock(slot):
            yield None
            return
        try:
            is_whole = int(self.header["slot"]["number"][slot]) == newest
            yield (newest, self.frames[slot]) if is_whole else None
        finally:
            self._unlock(slot)

    def write_map(self, number: int, frame_sum: int, feature_map: np.ndarray) -> None:
        """Copy a map, float32 NCHW, to where the camera reads it. ``frame_sum``: the sum of the bytes of its frame."""
        offset, room = self._map_place
        if feature_map.nbytes > room:
            raise SegmentError(
                f"the map has {feature_map.nbytes} bytes, and its place {room}: camera --map-bytes {feature_map.nbytes}"
            )
        fcntl.lockf(self._file, fcntl.LOCK_EX, 1, MAP_BYTE)
        try:
            self.header["map_of"] = 0  # who dies in between leaves no map that is half of one and half of another
            np.copyto(np.ndarray(feature_map.shape, np.float32, self._memory, offset), feature_map)
            self.header["map_checksum"], self.header["map_shape"] = frame_sum, feature_map.shape
            self.header["map_of"] = number
        finally:
            self._unlock(MAP_BYTE)

    def _try_lock(self, byte: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except OSError:
            return False
        return True

    def _unlock(self, byte: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)


def run(backbone: EdgeBackbone, segment: Segment) -> int:
    """Answer the newest frame until the camera ends; return how many frames were answered."""
    takes_frames = backbone.input.frame is not None and backbone.input.frame.shape == segment.shape
    count = last = 0
    while True:
        ended = bool(segment.header["ended"])  # before the newest frame is looked for: none comes after it
        with segment.frame(after=last) as found:
            if found is not None:
                last, frame = found
                maps = backbone(frame if takes_frames else backbone.preprocess(frame)).feature_maps
                segment.write_map(last, int(frame.sum(dtype=np.uint64)), np.asarray(maps[-1], np.float32))
                count += 1
        if found is None:
            if ended and last == int(segment.header["newest"]):
                return count
            if not segment.camera_lives:
                raise SegmentError(f"the camera died behind frame {int(segment.header['newest'])}: start it again")
            time.sleep(PAUSE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("name", help="the name of the shared memory: /camera")
    arguments = parser.parse_args()
    try:
        with EdgeBackbone.from_pretrained(arguments.bundle) as backbone:
            print(f"answered {run(backbone, Segment(arguments.name))} frames")
    except KeyboardInterrupt:
        sys.exit(130)
    except (SegmentError, EdgeBackbonesError) as error:
        sys.exit(f"backbone.py: {error}")


if __name__ == "__main__":
    main()
