"""Files of feature maps are there whole or not at all."""

from __future__ import annotations

import numpy as np
import pytest
import zarr

from edge_backbones.cli import map_files
from edge_backbones.cli.map_files import save_maps

MAPS = {"file": np.ones((2, 3), np.float32), "blocks.3": np.arange(6, dtype=np.float16).reshape(3, 2).T}


@pytest.mark.parametrize("format", ["npz", "zarr"])
def test_stages_of_any_name_and_layout_are_written(tmp_path, format):
    path = tmp_path / f"a.{format}"
    for _ in range(2):  # the second time it is replaced
        save_maps(path, MAPS)
        read = np.load(path) if format == "npz" else zarr.open_group(str(path), mode="r")
        for stage, values in MAPS.items():
            assert read[stage].dtype == values.dtype
            np.testing.assert_array_equal(read[stage][:], values)
        if format == "npz":
            read.close()
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(("format", "step"), [("npz", "_save_npz"), ("zarr", "_save_zarr")])
def test_a_failure_leaves_the_earlier_file_and_nothing_else(tmp_path, monkeypatch, format, step):
    path = tmp_path / f"a.{format}"
    save_maps(path, MAPS)
    write = getattr(map_files, step)

    def fail(beside, maps):
        write(beside, maps)
        raise KeyboardInterrupt

    monkeypatch.setattr(map_files, step, fail)
    with pytest.raises(KeyboardInterrupt):
        save_maps(path, {"other": np.zeros(2)})
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    read = np.load(path) if format == "npz" else zarr.open_group(str(path), mode="r")
    assert "file" in read
