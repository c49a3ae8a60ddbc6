"""A bundle is signed on the workstation and gets its engines on the device: graphs, compilers and signatures together."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from edge_backbones import BuildOptions, Bundle, EdgeBackbone, build_bundle, compile_bundle, sign_bundle
from edge_backbones.bundle import trust, vouchers
from edge_backbones.bundle.writer import write_manifest
from edge_backbones.errors import EngineMismatchError, TrustError
from edge_backbones.spec import Precision

OPTIONS = {"weights": "random:0", "height": 32, "width": 64, "golden": 1, "torchscript": False}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Signed, as it leaves the workstation: with graphs and without an engine."""
    target = tmp_path_factory.mktemp("signed") / "net.bundle"
    precisions = (Precision.FP16, Precision.FP32)
    bundle = build_bundle("test_resnet", target, options=BuildOptions(**OPTIONS, precisions=precisions)).bundle
    for engine in bundle.manifest.engines:
        bundle = bundle.remove_engine(engine.name)
    key = ec.generate_private_key(ec.SECP256R1())
    pem, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    target.with_name("public.pem").write_bytes(public)
    target.with_name("private.pem").write_bytes(key.private_bytes(pem, private, serialization.NoEncryption()))
    sign_bundle(target, key=target.with_name("private.pem"))
    return target


@pytest.fixture
def bundle(built, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(trust, "MACHINE_KEYS", tmp_path / "etc")
    monkeypatch.setattr(vouchers, "MACHINE_STATE", tmp_path / "var")
    monkeypatch.setenv("HOME", str(tmp_path))
    return Path(shutil.copytree(built, tmp_path / "net.bundle"))


def test_engines_that_the_device_compiles_are_trusted_there_and_nowhere_else(bundle, built):
    key = built.with_name("public.pem")
    added = compile_bundle(bundle, in_process=True).engines
    assert len(added) == 2
    with EdgeBackbone.from_pretrained(bundle, trusted=key) as backbone:
        assert backbone.engine in {engine.name for engine in added}
        assert not any("signing" in reason for reason in backbone.passed_over.values())
    shutil.rmtree(bundle.parent / ".local")  # another machine
    with pytest.raises(EngineMismatchError) as caught:
        EdgeBackbone.from_pretrained(bundle, trusted=key)
    for engine in added:
        assert f"Not trusted: {engine.name}: was added after signing" in str(caught.value)
    assert len(compile_bundle(bundle, resume=True, in_process=True).engines) == 2
    assert compile_bundle(bundle, resume=True, in_process=True).engines == ()
    EdgeBackbone.from_pretrained(bundle, trusted=key).close()


def test_an_engine_is_compiled_on_the_spot_from_signed_graphs_only(bundle, built):
    key = built.with_name("public.pem")
    manifest = Bundle.open(bundle).manifest
    graphs = tuple(msgspec.structs.replace(graph, excluded=("stem",)) for graph in manifest.graphs)
    write_manifest(bundle, msgspec.structs.replace(manifest, graphs=graphs))
    with pytest.raises(
        TrustError, match=r"graphs\[0\]\.excluded was signed as \[\], and manifest\.json has \['stem'\]"
    ):
        EdgeBackbone.from_pretrained(bundle, engine="fp32", trusted=key, on_mismatch="compile")
    assert Bundle.open(bundle).manifest.engines == ()
    write_manifest(bundle, manifest)
    EdgeBackbone.from_pretrained(bundle, engine="fp32", trusted=key, on_mismatch="compile").close()


def test_a_machine_that_asks_for_signatures_compiles_nothing_else(bundle, built, tmp_path):
    (tmp_path / "etc").mkdir()
    shutil.copy(built.with_name("public.pem"), tmp_path / "etc")
    compile_bundle(bundle, precisions=(Precision.FP32,), in_process=True)
    shutil.rmtree(bundle / "signature")
    with pytest.raises(TrustError, match="is not signed"):
        compile_bundle(bundle, precisions=(Precision.FP16,), in_process=True)
