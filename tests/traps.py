"""Bundles that a stranger made to read or write elsewhere, to end or hang a program, or to eat its memory.

`make` gives one: a bundle in ``place/net.bundle`` and, beside it, ``place/outside``, in which nothing may be read or written.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx

from edge_backbones.bundle.reader import Bundle
from edge_backbones.bundle.writer import record_bytes, write_manifest
from tests.graphs import bundle_with_graph, pooling_graph, with_graph

Trap = Callable[[Bundle, Path], object]
TRAPS: dict[str, tuple[Trap, str]] = {}
"""By name: what makes it of a good bundle (and the folder outside), and what an error has to say, as a pattern."""


def make(name: str, place: Path) -> Bundle:
    """The trap of that name; the bundle is as it was opened before it became one."""
    bundle = bundle_with_graph(place / "net.bundle")
    outside = place / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"-----BEGIN PRIVATE KEY----- ".ljust(4096, b"k"))
    TRAPS[name][0](bundle, outside)
    return bundle


def trap(said: str) -> Callable[[Trap], Trap]:
    def add(function: Trap) -> Trap:
        TRAPS[function.__name__] = function, said
        return function

    return add


def sealed(document: dict[str, Any], *, before: bytes = b"") -> bytes:
    """A manifest.json with the right digest, whatever it says. ``before``: what stands in front of the first key."""
    rest = {key: value for key, value in document.items() if key != "digest"}
    body = json.dumps({**rest, "digest": ""}, indent=2).encode() + b"\n"
    body = body.replace(b"{", b"{" + before, 1)
    return body[:-5] + b'"' + hashlib.sha256(body).hexdigest().encode() + body[-4:]


def document(bundle: Bundle) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle.path / "manifest.json").read_bytes())
    return found


def changed(bundle: Bundle, *keys: Any, to: Any) -> None:
    """Write another value into the manifest, with the right digest."""
    whole = inner = document(bundle)
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    (bundle.path / "manifest.json").write_bytes(sealed(whole))


def in_place_of(bundle: Bundle, path: str) -> Path:
    place = bundle.path / path
    place.unlink()
    return place


# ---- manifest.json --------------------------------------------------------------------------------------------------


@trap(r"net\.bundle/manifest\.json cannot be read: it is a link")
def manifest_is_a_link(bundle: Bundle, outside: Path) -> None:
    shutil.copy(bundle.path / "manifest.json", outside / "manifest.json")
    in_place_of(bundle, "manifest.json").symlink_to("../outside/manifest.json")


@trap(r"net\.bundle/manifest\.json cannot be read: it is no regular file")
def manifest_is_a_pipe(bundle: Bundle, outside: Path) -> None:
    os.mkfifo(in_place_of(bundle, "manifest.json"))


@trap(r"net\.bundle/manifest\.json cannot be read: it is a folder")
def manifest_is_a_folder(bundle: Bundle, outside: Path) -> None:
    in_place_of(bundle, "manifest.json").mkdir()


@trap(r"net\.bundle/manifest\.json cannot be read: it has 1099511627776 bytes, more than the 4194304 it may have")
def manifest_of_a_terabyte(bundle: Bundle, outside: Path) -> None:
    os.truncate(bundle.path / "manifest.json", 1 << 40)


@trap(r"net\.bundle/manifest\.json is not a valid manifest: RecursionError")
def manifest_is_deep(bundle: Bundle, outside: Path) -> None:
    deep = b'"source":' + b'{"config":' * 200_000 + b"1" + b"}" * 200_000 + b","
    (bundle.path / "manifest.json").write_bytes(b"{" + deep + b'"schema_version": 6}')


@trap(r"net\.bundle/manifest\.json is not a valid manifest: .*unknown field .*xxx \.\.\. ")
def manifest_with_a_long_key(bundle: Bundle, outside: Path) -> None:
    changed(bundle, "x" * 100_000, to=1)


@trap(r"net\.bundle/manifest\.json is not a valid manifest: a key comes twice")
def manifest_with_a_key_twice(bundle: Bundle, outside: Path) -> None:
    data = sealed(document(bundle), before=b'\n  "engines": [],')
    (bundle.path / "manifest.json").write_bytes(data)


@trap(r"net\.bundle/manifest\.json was changed after it was written")
def manifest_with_another_space(bundle: Bundle, outside: Path) -> None:
    path = bundle.path / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'": ', b'":  ', 1))


@trap(r"net\.bundle/manifest\.json is not a valid manifest: .*")
def manifest_is_not_utf8(bundle: Bundle, outside: Path) -> None:
    path = bundle.path / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b"average_pooling", b"average\xff\xfeooling", 1))


def bound(name: str, *keys: Any, to: Any, said: str) -> None:
    TRAPS[name] = lambda bundle, _: changed(bundle, *keys, to=to), rf"manifest\.json is not a valid manifest: .*{said}"


bound("channels_below_zero", "backbone", "channels", 0, to=-3, said=r"`\$\.backbone\.channels")
bound("channels_beyond_64_bits", "backbone", "channels", 0, to=10**400, said="")
bound("stride_of_zero", "backbone", "strides", 0, 0, to=0, said=r"`\$\.backbone\.strides")
bound("size_multiple_of_zero", "input", "size_multiple", to=0, said="size_multiple")
bound("file_of_negative_size", "golden", "file", "size", to=-1, said=r"golden\.file\.size")
bound("latency_of_zero", "engines", 0, "milliseconds", to=0, said="milliseconds")
bound("cosine_of_seven", "engines", 0, "parity", "stages", 0, "cosine", to=7, said="cosine")
bound("std_of_nearly_zero", "image", "std", to=[1e-300] * 3, said=r"not of pixels.*image")
bound("crop_of_nearly_zero", "image", "crop_pct", to=1e-300, said="crop_pct")
bound("a_million_stages", "backbone", "stage_names", to=["a"] * 100_000, said="stage_names")
bound("no_cases", "golden", "cases", to=[], said=r"golden\.cases")
bound("no_case_opt", "golden", "cases", to=["max"], said="lack the case 'opt'")
bound("a_case_that_is_a_path", "golden", "cases", to=["../opt"], said=r"golden\.cases")


@trap(r"manifest\.json is not a valid manifest: two engines are")
def engine_twice(bundle: Bundle, outside: Path) -> None:
    changed(bundle, "engines", to=document(bundle)["engines"] * 2)


@trap(r"manifest\.json is not a valid manifest: two graphs are 'onnx fp32'")
def graph_twice(bundle: Bundle, outside: Path) -> None:
    changed(bundle, "graphs", to=document(bundle)["graphs"] * 2)


@trap(r"manifest\.json is not a valid manifest: two files are at 'golden\.npz'")
def two_records_of_one_file(bundle: Bundle, outside: Path) -> None:
    changed(bundle, "graphs", 0, "file", "path", to="golden.npz")


@trap(r"manifest\.json names '\.\./outside/secret', which is not a plain path")
def path_that_climbs(bundle: Bundle, outside: Path) -> None:
    changed(bundle, "golden", "file", to=msgspec.to_builtins(record_bytes("../outside/secret", b"x")))


# ---- files ----------------------------------------------------------------------------------------------------------


@trap(r"net\.bundle/golden\.npz is a link, which may lead outside")
def golden_is_a_link(bundle: Bundle, outside: Path) -> None:
    shutil.move(bundle.path / "golden.npz", outside / "golden.npz")
    (bundle.path / "golden.npz").symlink_to("../outside/golden.npz")


@trap(r"net\.bundle/golden\.npz cannot be read: it is no regular file")
def golden_is_a_pipe(bundle: Bundle, outside: Path) -> None:
    os.mkfifo(in_place_of(bundle, "golden.npz"))


@trap(r"net\.bundle/engines/.* cannot be read: it is no regular file")
def engine_is_a_pipe(bundle: Bundle, outside: Path) -> None:
    os.mkfifo(in_place_of(bundle, bundle.manifest.engines[0].file.path))


@trap(r"net\.bundle/engines/.* (does not fit into the memory|cannot be read)")
def engine_of_half_a_petabyte(bundle: Bundle, outside: Path) -> None:
    path = bundle.path / bundle.manifest.engines[0].file.path
    for size in (1 << 49, 1 << 43):  # some file systems take less
        try:
            os.truncate(path, size)
        except OSError:
            continue
        changed(bundle, "engines", 0, "file", "size", to=size)
        return


def golden_of(bundle: Bundle, data: bytes) -> None:
    (bundle.path / "golden.npz").write_bytes(data)
    changed(bundle, "golden", "file", to=msgspec.to_builtins(record_bytes("golden.npz", data)))


def zipped(bundle: Bundle, *, change: Callable[[dict[str, bytes]], None], method: int = zipfile.ZIP_STORED) -> bytes:
    with zipfile.ZipFile(bundle.path / "golden.npz") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name.removesuffix("#"), data)
    return buffer.getvalue()


@trap(r"net\.bundle/golden\.npz does not hold .* opt/pixel_values is compressed")
def golden_is_a_bomb(bundle: Bundle, outside: Path) -> None:
    def blow(members: dict[str, bytes]) -> None:
        header = members["opt/pool4.npy"][:128].replace(b"(2, 3, 8, 12)", b"(2, 3, 999, 999)")
        members["opt/pool4.npy"] = header + bytes(2 * 3 * 999 * 999 * 4)

    golden_of(bundle, zipped(bundle, change=blow, method=zipfile.ZIP_DEFLATED))


@trap(r"net\.bundle/golden\.npz does not hold .*opt/pool4 is not a plain array")
def golden_is_a_pickle(bundle: Bundle, outside: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {outside}/ran",)

    def poison(members: dict[str, bytes]) -> None:
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": (1,)})
        members["opt/pool4.npy"] = buffer.getvalue() + pickle.dumps(Evil())

    golden_of(bundle, zipped(bundle, change=poison))


@trap(r"net\.bundle/golden\.npz does not hold .*'opt/extra' is in it twice, or is not promised")
def golden_holds_more(bundle: Bundle, outside: Path) -> None:
    golden_of(
        bundle, zipped(bundle, change=lambda members: members.update({"opt/extra.npy": members["opt/pool4.npy"]}))
    )


@trap(r"net\.bundle/golden\.npz does not hold .*'opt/pool4\.npy#?' is in it twice|'opt/pool4' is in it twice")
def golden_holds_a_name_twice(bundle: Bundle, outside: Path) -> None:
    data = (bundle.path / "golden.npz").read_bytes()
    end = data.index(b"PK\1\2")
    begin = data.index(b"opt/pool4.npy") - 30
    following = data.find(b"PK\3\4", begin + 4)
    member = data[begin : end if following < 0 else following]
    golden_of(bundle, data[:end] + member + data[end:])


@trap(r"net\.bundle/golden\.npz does not hold .*its shape \(99999999, 3, 8, 12\) asks for others")
def golden_lies_about_a_shape(bundle: Bundle, outside: Path) -> None:
    def lie(members: dict[str, bytes]) -> None:
        data = members["opt/pool4.npy"]
        members["opt/pool4.npy"] = data.replace(b"(2, 3, 8, 12), }       ", b"(99999999, 3, 8, 12), }")

    golden_of(bundle, zipped(bundle, change=lie))


@trap(
    r"net\.bundle/golden\.npz does not hold .*opt/pool4 has shape \(2, 3, 8, 12\), and the backbone returns NCHW with 5"
)
def channels_that_the_maps_lack(bundle: Bundle, outside: Path) -> None:
    changed(bundle, "backbone", "channels", 0, to=5)


# ---- graphs ---------------------------------------------------------------------------------------------------------


def graph_trap(name: str, said: str, change: Callable[[onnx.ModelProto], object]) -> None:
    def spring(bundle: Bundle, outside: Path) -> None:
        model = pooling_graph()
        change(model)
        with_graph(bundle, model.SerializeToString())

    TRAPS[name] = spring, rf"graphs/fp32\.onnx is refused: .*{said}"


def keep_outside(tensor: onnx.TensorProto, location: str, offset: int = 0) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": str(offset), "length": "12"}.items():
        tensor.external_data.add(key=key, value=value)


_OUTSIDE = "has its values outside of the graph"
graph_trap("graph_reads_a_file", _OUTSIDE, lambda m: keep_outside(m.graph.initializer[0], "../outside/secret"))
graph_trap(
    "graph_reads_a_branch's_file", _OUTSIDE, lambda m: keep_outside(m.graph.node[0].attribute[0].t, "/etc/passwd")
)
graph_trap("graph_reads_memory", _OUTSIDE, lambda m: keep_outside(m.graph.initializer[0], "*/_ORT_MEM_ADDR_/*", 4096))
graph_trap("graph_lies_about_a_weight", "asks for", lambda m: m.graph.initializer[0].dims.append(1 << 20))
graph_trap("graph_has_negative_sizes", "negative size", lambda m: m.graph.initializer[0].dims.append(-1))


@trap(r"graphs/fp32\.onnx is refused: ")
def graph_is_cut_off(bundle: Bundle, outside: Path) -> None:
    with_graph(bundle, pooling_graph().SerializeToString()[:-40])


@trap(r"graphs/fp32\.onnx is refused: ")
def graph_is_text(bundle: Bundle, outside: Path) -> None:
    with_graph(bundle, b"<?xml version='1.0'?><net><layers/></net>")


# ---- writers --------------------------------------------------------------------------------------------------------


@trap(r"\.net\.bundle\.lock is not the file that its writers take turns by; remove it")
def lock_is_a_link(bundle: Bundle, outside: Path) -> None:
    (bundle.path.parent / ".net.bundle.lock").symlink_to("outside/secret")


@trap(r"\.net\.bundle\.lock is not the file that its writers take turns by; remove it")
def lock_is_a_pipe(bundle: Bundle, outside: Path) -> None:
    os.mkfifo(bundle.path.parent / ".net.bundle.lock")


@trap(r"net\.bundle/engines is a link, which may lead outside")
def engines_is_a_link(bundle: Bundle, outside: Path) -> None:
    write_manifest(bundle.path, msgspec.structs.replace(bundle.manifest, engines=()))
    shutil.move(bundle.path / "engines", outside / "engines")
    (bundle.path / "engines").symlink_to("../outside/engines")


@trap("")
def a_link_to_somebodys_draft(bundle: Bundle, outside: Path) -> None:
    """No reader and no writer has to go there."""
    (outside / ".notes.writing-draft").write_text("mine")
    (bundle.path / "zz").symlink_to("../outside")
