"""CUDA's bindings are fetched once, and what hinders it has a fix."""

from __future__ import annotations

import pytest

from build_scripts import fetch_cuda


def test_a_release_is_fetched_once(monkeypatch, tmp_path):
    fetched = []
    monkeypatch.setattr(fetch_cuda, "install", lambda packages, place: fetched.append((packages, place.name)))
    for _ in range(2):
        assert fetch_cuda.fetch("cuda-12", tmp_path) == tmp_path / "cuda-12"
    assert fetched == [(("cuda-bindings==12.9.10",), "cuda-12")]
    monkeypatch.setitem(fetch_cuda._WHEELS, "cuda-12", ("cuda-bindings==12.9.11",))
    fetch_cuda.fetch("cuda-12", tmp_path)
    assert len(fetched) == 2


def test_what_broke_off_is_fetched_again(monkeypatch, tmp_path):
    def breaks_off(packages, place):
        (place / "half.py").touch()
        raise RuntimeError("no network")

    monkeypatch.setattr(fetch_cuda, "install", breaks_off)
    with pytest.raises(RuntimeError, match="no network"):
        fetch_cuda.fetch("cuda-core", tmp_path)
    monkeypatch.setattr(fetch_cuda, "install", lambda packages, place: None)
    assert not (fetch_cuda.fetch("cuda-core", tmp_path) / "half.py").exists()


def test_pycuda_needs_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch_cuda.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"pycuda==2026\.1 needs a C\+\+ compiler: .*apt install g\+\+"):
        fetch_cuda.fetch("pycuda", tmp_path)


def test_the_settings_of_pycudas_build_are_python(tmp_path):
    fetch_cuda._configure(tmp_path, (tmp_path / "include",), tmp_path / "lib")
    settings: dict[str, object] = {}
    exec((tmp_path / "siteconf.py").read_text(), settings)
    assert settings["CUDA_INC_DIR"] == [str(tmp_path / "include")]
    assert settings["CUDA_ENABLE_CURAND"] is False


def test_another_system_is_told_why_not(monkeypatch, capsys):
    monkeypatch.setattr(fetch_cuda.sys, "platform", "darwin")
    monkeypatch.setattr(fetch_cuda.sys, "argv", ["fetch_cuda"])
    fetch_cuda.main()
    assert capsys.readouterr().out == (
        "libcuda.so.1 is the driver of Linux, this is darwin: tests/driver does not run here\n"
    )
