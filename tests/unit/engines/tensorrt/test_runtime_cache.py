"""The file with the kernels that TensorRT-RTX compiled: bounded, written whole, and never an obstacle."""

from __future__ import annotations

import dataclasses
import os
import stat
import threading

import pytest

from edge_backbones.engines.tensorrt import runtime_cache
from edge_backbones.machine.gpus import Gpu

GPU = Gpu(0, "NVIDIA GeForce RTX 4090", "sm_89", 24 << 30, "13.0", 128, False)
KERNELS = b"kernels" * 1000


@pytest.fixture
def path(tmp_path):
    return runtime_cache.path_of("ab" * 32, "1.7.1.116", GPU, folder=tmp_path / "rtx")


def test_a_file_is_named_after_what_it_depends_on(path, tmp_path, monkeypatch):
    assert path.name == f"1.7.1.116-sm_89-nvidia-geforce-rtx-4090-cuda13-{'ab' * 16}.rtxcache"
    changes = [
        ("cd" * 32, "1.7.1.116", GPU),
        ("ab" * 32, "1.8.0.1", GPU),
        ("ab" * 32, "1.7.1.116", dataclasses.replace(GPU, architecture="sm_120")),
        ("ab" * 32, "1.7.1.116", dataclasses.replace(GPU, name="NVIDIA L4")),
        ("ab" * 32, "1.7.1.116", dataclasses.replace(GPU, driver="12.9")),
    ]
    others = {runtime_cache.path_of(*change, folder=tmp_path / "rtx") for change in changes}
    assert len(others | {path}) == len(changes) + 1
    same = runtime_cache.path_of(
        "ab" * 32, "1.7.1.116", dataclasses.replace(GPU, index=3, driver="13.2"), folder=path.parent
    )
    assert same == path
    hostile = runtime_cache.path_of(
        "ab" * 32, "../../1", dataclasses.replace(GPU, name="../../x/\0é" * 50), folder=tmp_path
    )
    assert hostile.parent == tmp_path
    assert len(hostile.name) < 200
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert tmp_path in runtime_cache.path_of("ab" * 32, "1", GPU).parents or os.name != "posix"
    assert not (tmp_path / "rtx").exists()


@pytest.mark.parametrize("data", [KERNELS, bytearray(KERNELS), memoryview(KERNELS), b""])
def test_what_was_kept_comes_back(path, data):
    assert runtime_cache.read(path) == (None, "")  # nothing was kept yet, which needs no note
    assert runtime_cache.write(path, data) == ""
    assert runtime_cache.read(path) == (bytes(data), "")
    assert runtime_cache.write(path, b"more") == ""
    assert runtime_cache.read(path) == (b"more", "")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: flip(content, 3),
        lambda content: flip(content, 40),
        lambda content: flip(content, len(content) - 1),
        lambda content: b"\0" * len(content),
    ],
)
def test_a_damaged_file_is_deleted_with_a_note(path, damage):
    runtime_cache.write(path, KERNELS)
    path.write_bytes(damage(path.read_bytes()))
    data, note = runtime_cache.read(path)
    assert data is None
    assert note == f"{path} was deleted: it is damaged. TensorRT-RTX compiles its kernels again"
    assert not path.exists()
    assert runtime_cache.write(path, KERNELS) == ""
    assert runtime_cache.read(path) == (KERNELS, "")


def test_size_is_bounded_before_memory_is_taken(path, monkeypatch):
    runtime_cache.write(path, KERNELS)
    monkeypatch.setattr(runtime_cache, "LARGEST_FILE", len(KERNELS))
    assert runtime_cache.read(path) == (KERNELS, "")
    assert "at most 0 MiB are kept" in runtime_cache.write(path, KERNELS + b"x")
    assert runtime_cache.read(path) == (KERNELS, "")  # the old one stays
    with path.open("ab") as file:
        file.truncate(1 << 33)  # takes no room on disk
    data, note = runtime_cache.read(path)
    assert data is None
    assert "it has 8.0 GiB" in note
    assert not path.exists()


def test_the_least_recently_used_files_make_room(path, monkeypatch):
    monkeypatch.setattr(runtime_cache, "LARGEST_FOLDER", 3 * (len(KERNELS) + 100))
    paths = [path.with_name(f"{number}.rtxcache") for number in range(4)]
    for number, one in enumerate(paths[:3]):
        runtime_cache.write(one, KERNELS)
        os.utime(one, (number, number))
    assert runtime_cache.read(paths[0])[0] == KERNELS  # used just now
    (path.parent / "another.file").write_bytes(KERNELS)
    assert runtime_cache.write(paths[3], KERNELS) == ""
    assert [one.exists() for one in paths] == [True, False, True, True]
    assert (path.parent / "another.file").exists()


@pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")
def test_a_file_that_others_may_have_written_is_not_read(path, monkeypatch):
    runtime_cache.write(path, KERNELS)
    for mode in (0o620, 0o602, 0o666):
        path.chmod(mode)
        data, note = runtime_cache.read(path)
        assert data is None
        assert f"others may write it (0{mode:o}). Delete it" in note
        assert path.exists()
    path.chmod(0o644)
    assert runtime_cache.read(path) == (KERNELS, "")
    owner = path.stat().st_uid
    monkeypatch.setattr(runtime_cache.os, "geteuid", lambda: owner + 1)
    assert ("belongs to another user" in runtime_cache.read(path)[1]) == (owner != 0)  # root's may be read
    monkeypatch.undo()
    link = path.with_name("link.rtxcache")
    link.symlink_to(path)
    assert "links are not followed" in runtime_cache.read(link)[1]


def test_a_folder_that_takes_no_files_costs_a_note(path, tmp_path):
    (tmp_path / "rtx").write_text("a file where the folder would be", encoding="utf-8")
    assert "cannot be written" in runtime_cache.write(path, KERNELS)
    data, note = runtime_cache.read(path)
    assert data is None
    assert "cannot be read" in note
    folder = tmp_path / "folder.rtxcache"
    folder.mkdir()
    assert "cannot be read (it is a folder)" in runtime_cache.read(folder)[1]
    assert "cannot be written" in runtime_cache.write(folder, KERNELS)


def test_readers_find_a_whole_file_while_others_write(path):
    contents = [bytes([number]) * (1 << 16) for number in range(4)]
    runtime_cache.write(path, contents[0])
    done, seen = threading.Event(), set()

    def write(content):
        while not done.is_set():
            assert runtime_cache.write(path, content) == ""

    writers = [threading.Thread(target=write, args=(content,)) for content in contents[:2]]
    for writer in writers:
        writer.start()
    try:
        for _ in range(100):
            seen.add(runtime_cache.read(path))
    finally:
        done.set()
        for writer in writers:
            writer.join()
    assert seen <= {(content, "") for content in contents}
