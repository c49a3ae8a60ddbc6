"""Signatures: made and read as the upstream tool does, what is refused and in which words, and what a device may add."""

from __future__ import annotations

import base64
import datetime
import json
import os
import pickle
import random
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import model_signing
import msgspec
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from edge_backbones import EdgeBackbone, sign_bundle, verify_bundle
from edge_backbones.bundle import signing, trust, vouchers
from edge_backbones.bundle.manifest import EngineRecord
from edge_backbones.bundle.reader import Bundle
from edge_backbones.bundle.writer import new_bundle, record_bytes, record_file, write_manifest
from edge_backbones.cli import main as cli
from edge_backbones.errors import (
    EngineMismatchError,
    InputError,
    IntegrityError,
    MissingDependencyError,
    TrustError,
)
from edge_backbones.installation import pip_install
from edge_backbones.spec import Precision
from edge_backbones.testing import make_bundle, pooled

ENGINES_OF = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}


def write_pair(folder: Path, name: str, key, passphrase: bytes | None = None) -> tuple[Path, Path]:
    pem, raw = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    hidden = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    private, public = folder / f"{name}.private.pem", folder / f"{name}.pem"
    private.write_bytes(key.private_bytes(pem, raw, hidden))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Path:
    """alice's, bob's, one of every other kind, and one with a passphrase."""
    folder = tmp_path_factory.mktemp("keys")
    for name, curve in {"alice": ENGINES_OF["P-256"], "bob": ENGINES_OF["P-256"], **ENGINES_OF}.items():
        write_pair(folder, name, ec.generate_private_key(curve))
    write_pair(folder, "secp256k1", ec.generate_private_key(ec.SECP256K1()))
    write_pair(folder, "Ed25519", ed25519.Ed25519PrivateKey.generate())
    write_pair(folder, "RSA", rsa.generate_private_key(65537, 2048))
    write_pair(folder, "hidden", ec.generate_private_key(ec.SECP256R1()), b"correct horse")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("made") / "pool.bundle").path


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch) -> Path:
    """A machine and a user that trust nobody yet."""
    monkeypatch.setattr(trust, "MACHINE_KEYS", tmp_path / "etc/trusted")
    monkeypatch.setattr(vouchers, "MACHINE_STATE", tmp_path / "var")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def bundle(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "pool.bundle"))


@pytest.fixture
def signed(bundle, keys) -> Path:
    sign_bundle(bundle, key=keys / "alice.private.pem")
    return bundle


def refusal(path: Path, trusted: object, kind: type[Exception] = TrustError) -> str:
    with pytest.raises(kind) as caught:
        EdgeBackbone.from_pretrained(path, trusted=trusted)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def upstream(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "model_signing", *map(str, arguments)], capture_output=True, text=True)


def upstream_takes(folder: Path, public: Path) -> bool:
    try:
        config = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=public)
        config.verify(folder / "manifest.json", folder / "model.sig")
    except Exception:
        return False
    return True


def rewrite(path: Path, **changes: object) -> None:
    write_manifest(path, msgspec.structs.replace(Bundle.open(path).manifest, **changes))


def another_engine(path: Path, **changes: object) -> EngineRecord:
    """The bundle's engine as another library would have made it: other bytes under another name."""
    [engine] = Bundle.open(path).manifest.engines
    key = msgspec.structs.replace(engine.key, device_name="made here")
    file = record_bytes(key.path(b"made here", ".blob"), (path / engine.file.path).read_bytes())
    return msgspec.structs.replace(engine, key=key, file=file, **changes)


def add(path: Path, engine: EngineRecord) -> None:
    source = Bundle.open(path).manifest.engines[0].file.path
    Bundle.open(path).add_engine(engine, {engine.file.path: (path / source).read_bytes()})


# The upstream tool


def test_the_upstream_tool_takes_what_is_signed_here(signed, keys):
    given = ("verify", "key", signed / "signature/manifest.json", "--signature", signed / "signature/model.sig")
    done = upstream(*given, "--public_key", keys / "alice.pem")
    assert (done.returncode, done.stdout.strip()) == (0, "Verification succeeded"), done.stderr
    assert upstream(*given, "--public_key", keys / "bob.pem").returncode == 1


def test_what_the_upstream_tool_signs_is_taken_here(bundle, keys):
    (bundle / "signature").mkdir()
    shutil.copy(bundle / "manifest.json", bundle / "signature")
    given = ("sign", "key", bundle / "signature/manifest.json", "--signature", bundle / "signature/model.sig")
    done = upstream(*given, "--private_key", keys / "alice.private.pem")
    assert done.returncode == 0, done.stderr
    EdgeBackbone.from_pretrained(bundle, trusted=keys / "alice.pem").close()


@pytest.mark.parametrize("curve", ENGINES_OF)
def test_every_curve_of_the_specification(bundle, keys, curve):
    sign_bundle(bundle, key=keys / f"{curve}.private.pem")
    assert upstream_takes(bundle / "signature", keys / f"{curve}.pem")
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 48)).astype(np.float32)
    with EdgeBackbone.from_pretrained(bundle, trusted=keys / f"{curve}.pem") as backbone:
        for ours, expected in zip(backbone(images).feature_maps, pooled(images), strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_nothing_changed_is_taken_here_that_the_upstream_tool_refuses(signed, keys, tmp_path):
    """Bytes of the signature, of what is in its payload, and of the manifest, changed one or several at a time."""
    folder, chance = signed / "signature", random.Random(0)
    whole = {name: (folder / name).read_bytes() for name in ("manifest.json", "model.sig")}
    document = json.loads(whole["model.sig"])
    said = []
    for turn in range(300):
        name = ("model.sig", "payload", "manifest.json")[turn % 3]
        data = bytearray(base64.b64decode(document["dsseEnvelope"]["payload"]) if name == "payload" else whole[name])
        for _ in range(chance.choice((1, 1, 4))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        for file, before in whole.items():
            (folder / file).write_bytes(bytes(data) if file == name else before)
        if name == "payload":
            envelope = {**document["dsseEnvelope"], "payload": base64.b64encode(data).decode()}
            (folder / "model.sig").write_text(json.dumps({**document, "dsseEnvelope": envelope}))
        try:
            trust.admit(Bundle.open(signed), keys / "alice.pem")
        except TrustError as error:
            said.append(str(error))
        else:
            assert upstream_takes(folder, keys / "alice.pem")
    assert len(said) > 250
    assert all(len(line.splitlines()) == 1 for line in said)


def test_checking_a_key_loads_no_sigstore_and_asks_the_network_nothing(signed, keys):
    code = f"""
import sys
asked = []
sys.addaudithook(lambda event, _: asked.append(event) if event.startswith("socket.") else None)
from edge_backbones.bundle import trust
from edge_backbones.bundle.reader import Bundle
trust.admit(Bundle.open({str(signed)!r}), {str(keys / "alice.pem")!r})
print(asked, [name for name in ("model_signing", "sigstore", "tuf", "requests", "OpenSSL") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[] []", done.stderr


# What is refused


def test_a_bundle_without_a_signature(bundle, keys):
    said = refusal(bundle, keys / "alice.pem")
    assert f"{bundle} is not signed (signature/model.sig is missing)" in said
    assert str(keys / "alice.pem") in said


def test_a_signature_that_was_removed(signed, keys):
    (signed / "signature/model.sig").unlink()
    assert "is not signed" in refusal(signed, keys / "alice.pem")


def test_another_key(signed, keys):
    said = refusal(signed, [keys / "bob.pem", keys / "P-384.pem"])
    assert "is signed with key " in said
    assert "bob.pem" in said
    assert "P-384.pem" in said
    EdgeBackbone.from_pretrained(signed, trusted=[keys / "bob.pem", keys / "alice.pem"]).close()  # one is enough


def test_a_key_that_only_calls_itself_by_the_name_of_a_trusted_one(signed, bundle, keys):
    sign_bundle(signed, key=keys / "bob.private.pem")
    document = json.loads((signed / "signature/model.sig").read_bytes())
    key = serialization.load_pem_public_key((keys / "alice.pem").read_bytes())
    document["verificationMaterial"]["publicKey"]["hint"] = signing.key_hint(key)
    (signed / "signature/model.sig").write_text(json.dumps(document))
    assert "was changed: it is no signature by key" in refusal(signed, keys / "alice.pem")


def test_the_signature_of_another_bundle(signed, keys, tmp_path):
    other = make_bundle(tmp_path / "other.bundle").path
    source = msgspec.structs.replace(Bundle.open(other).manifest.source, name="max_pooling")
    rewrite(other, source=source)
    shutil.copytree(signed / "signature", other / "signature")
    said = refusal(other, keys / "alice.pem")
    assert "source.name was signed as 'average_pooling', and manifest.json has 'max_pooling'" in said


def test_an_older_manifest_under_a_newer_signature(signed, keys):
    rewrite(signed, provenance=msgspec.structs.replace(Bundle.open(signed).manifest.provenance, created="newer"))
    older = (signed / "signature/manifest.json").read_bytes()
    sign_bundle(signed, key=keys / "alice.private.pem")
    (signed / "signature/manifest.json").write_bytes(older)
    assert "signs another manifest, of SHA-256 " in refusal(signed, keys / "alice.pem")


def test_an_older_bundle_that_is_signed_does_not_lend_its_signature_to_a_newer_one(signed, keys):
    rewrite(signed, provenance=msgspec.structs.replace(Bundle.open(signed).manifest.provenance, created="newer"))
    said = refusal(signed, keys / "alice.pem")
    assert "provenance.created was signed as '2026-01-01T00:00:00+00:00', and manifest.json has 'newer'" in said


def test_golden_samples_that_were_swapped(signed, keys):
    golden = dict(np.load(signed / "golden.npz"))
    golden["opt/pool4"] *= 2
    np.savez(signed / "golden.npz", **golden)
    with pytest.raises(IntegrityError, match=r"golden\.npz"):
        verify_bundle(signed, trusted=keys / "alice.pem", in_process=True)
    record = Bundle.open(signed).manifest.golden
    rewrite(signed, golden=msgspec.structs.replace(record, file=record_file(signed, "golden.npz")))
    with pytest.raises(TrustError, match=r"golden\.file\.sha256 was signed as"):
        verify_bundle(signed, trusted=keys / "alice.pem", in_process=True)


def test_a_gate_that_was_loosened(signed, keys):
    [engine] = Bundle.open(signed).manifest.engines
    loose = msgspec.structs.replace(engine.parity, gate=msgspec.structs.replace(engine.parity.gate, max_relative=None))
    rewrite(signed, engines=(msgspec.structs.replace(engine, parity=loose),))
    assert f"Not trusted: {engine.name}: was added after signing" in refusal(
        signed, keys / "alice.pem", EngineMismatchError
    )


@pytest.mark.parametrize("name", ["signature/model.sig", "signature/manifest.json"])
@pytest.mark.parametrize("trap", ["fifo", "folder", "link", "huge", "empty", "deep", "null"])
def test_files_that_are_no_signature(signed, keys, name, trap):
    path = signed / name
    held = path.read_bytes()
    path.unlink()
    if trap == "fifo":
        os.mkfifo(path)
    elif trap == "folder":
        path.mkdir()
    elif trap == "link":
        (signed / "elsewhere").write_bytes(held)
        path.symlink_to(signed / "elsewhere")
    elif trap == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 32)
    else:
        path.write_bytes({"empty": b"", "deep": b"[" * 100_000, "null": b"null"}[trap])
    said = refusal(signed, keys / "alice.pem")
    assert name in said
    assert {"fifo": "it is no regular file", "huge": "has 4294967296 bytes, more than the "}.get(trap, "") in said


def test_a_signature_folder_elsewhere(signed, keys):
    (signed / "signature").rename(signed / "elsewhere")
    (signed / "signature").symlink_to("elsewhere")
    assert "is a link" in refusal(signed, keys / "alice.pem")
    with pytest.raises(TrustError, match="cannot be written"):
        sign_bundle(signed, key=keys / "alice.private.pem")
    assert "is a link" in trust.vouch(Bundle.open(signed), another_engine(signed))


# What a device may add


def test_an_engine_that_was_slipped_in_is_passed_over_with_the_reason(signed, keys):
    engine = another_engine(signed, milliseconds=0.001)
    add(signed, engine)
    with EdgeBackbone.from_pretrained(signed, trusted=keys / "alice.pem") as backbone:
        assert backbone.engine != engine.name
        assert "was added after signing, and not by this machine" in backbone.passed_over[engine.name]
    with EdgeBackbone.from_pretrained(signed) as backbone:  # nobody asks
        assert "added after signing" not in "".join(backbone.passed_over.values())


def test_an_engine_that_this_machine_made_is_taken(signed, keys):
    old, engine = Bundle.open(signed).manifest.engines[0], another_engine(signed)
    assert trust.vouch(Bundle.open(signed), engine) == ""
    add(signed, engine)
    timed = msgspec.structs.replace(engine, milliseconds=1.0)
    Bundle.open(signed).add_engine(timed, {})
    Bundle.open(signed).remove_engine(old.name)
    with EdgeBackbone.from_pretrained(signed, trusted=keys / "alice.pem") as backbone:
        assert backbone.engine == engine.name
    assert upstream_takes(signed / "signature", keys / "alice.pem")
    forged = msgspec.structs.replace(timed, parity=msgspec.structs.replace(timed.parity, precision=Precision.INT8))
    Bundle.open(signed).add_engine(forged, {})
    assert "not by this machine" in refusal(signed, keys / "alice.pem", EngineMismatchError)


def test_the_word_of_another_machine_counts_for_nothing(signed, keys, machine):
    engine = another_engine(signed)
    trust.vouch(Bundle.open(signed), engine)
    add(signed, engine)
    key = machine / "home/.local/state/edge_backbones/device.key"
    assert (key.stat().st_mode & 0o777, key.stat().st_size) == (0o600, 32)
    for change, reason in (
        (lambda: key.write_bytes(bytes(32)), "is not the key that vouched for it"),
        (lambda: key.write_bytes(bytes(31)), "has 31 bytes, not 32"),
        (lambda: key.chmod(0o644), "can be read or written by others (0644)"),
        (key.unlink, "no device.key in "),
        (lambda: key.symlink_to(keys / "alice.pem"), "cannot be read"),
    ):
        change()
        _, refused = trust.admit(Bundle.open(signed), keys / "alice.pem")
        assert reason in refused[engine.name]


def test_the_machines_key_serves_where_there_is_a_folder_for_it(signed, keys, machine):
    (machine / "var").mkdir()
    engine = another_engine(signed)
    assert trust.vouch(Bundle.open(signed), engine) == ""
    add(signed, engine)
    assert (machine / "var/device.key").is_file()
    assert not (machine / "home").exists()
    assert trust.admit(Bundle.open(signed), keys / "alice.pem")[1] == {}


def test_what_is_said_of_one_bundle_counts_for_no_other(signed, keys):
    """Signed again, as a newer bundle: what was measured on the samples of the older one has to be measured anew."""
    engine = another_engine(signed)
    trust.vouch(Bundle.open(signed), engine)
    rewrite(signed, provenance=msgspec.structs.replace(Bundle.open(signed).manifest.provenance, created="newer"))
    sign_bundle(signed, key=keys / "alice.private.pem")
    add(signed, engine)
    assert engine.name in trust.admit(Bundle.open(signed), keys / "alice.pem")[1]


def test_nothing_is_vouched_for_in_a_bundle_that_is_not_what_was_signed(signed, keys):
    rewrite(signed, source=msgspec.structs.replace(Bundle.open(signed).manifest.source, name="evil"))
    assert "source.name was signed as" in trust.vouch(Bundle.open(signed), another_engine(signed))
    assert not list((signed / "signature").glob("*.local"))


def test_a_key_that_cannot_be_made_is_told_and_the_engine_is_not_trusted(signed, keys, machine):
    (machine / "home").write_text("a file")
    assert "this machine cannot vouch for it" in trust.vouch(Bundle.open(signed), another_engine(signed))


def test_an_engine_signed_unmeasured_is_trusted_once_this_machine_has_measured_it(bundle, keys):
    [engine] = Bundle.open(bundle).manifest.engines
    unmeasured = msgspec.structs.replace(engine, parity=msgspec.structs.replace(engine.parity, stages=()))
    rewrite(bundle, engines=(unmeasured,))
    sign_bundle(bundle, key=keys / "alice.private.pem")
    shutil.copytree(bundle, forged := bundle.with_name("forged.bundle"))
    verify_bundle(bundle, trusted=keys / "alice.pem", in_process=True)
    EdgeBackbone.from_pretrained(bundle, trusted=keys / "alice.pem").close()
    rewrite(forged, engines=(engine,))  # says that it was measured, and it was not measured here
    assert engine.name in refusal(forged, keys / "alice.pem", EngineMismatchError)
    rewrite(forged, engines=(another_engine(bundle), unmeasured))
    told = trust.vouch(Bundle.open(forged), engine, instead_of=another_engine(bundle))
    assert "not by this machine" in told


def test_many_processes_that_need_the_key_first_get_one(machine):
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: vouchers.device_key(), range(32)))) == 1
    assert [path.name for path in (machine / "home/.local/state/edge_backbones").iterdir()] == ["device.key"]


# What a machine and a user ask for


@pytest.mark.parametrize("place", ["etc/trusted", "home/.config/edge_backbones/trusted"])
def test_a_folder_of_keys_asks_for_a_signature_whatever_the_caller_says(made, signed, keys, machine, place):
    folder = machine / place
    folder.mkdir(parents=True)
    assert "none: there is no .pem file" in refusal(signed, None)
    shutil.copy(keys / "alice.pem", folder)
    unsigned = Path(shutil.copytree(made, machine / "unsigned.bundle"))
    whose = "this machine's" if "etc" in place else "your"
    for trusted in (None, keys / "bob.pem"):
        assert f"a signature is asked for by {whose} trusted keys ({folder})" in refusal(unsigned, trusted)
    with pytest.raises(TrustError, match="is not signed"):
        verify_bundle(unsigned, in_process=True)
    EdgeBackbone.from_pretrained(signed).close()
    EdgeBackbone.from_pretrained(signed, trusted=keys / "alice.pem").close()
    sign_bundle(signed, key=keys / "bob.private.pem")
    assert f"none of {whose}" in refusal(signed, keys / "bob.pem")


@pytest.mark.parametrize("change", ["no home", "a file", "a loop"])
def test_what_the_machine_asks_for_cannot_be_lost(bundle, keys, machine, monkeypatch, change):
    folder = machine / "etc/trusted"
    if change != "a loop":
        folder.parent.mkdir()
    if change == "no home":
        folder.mkdir()
        shutil.copy(keys / "alice.pem", folder)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    elif change == "a file":
        folder.write_text("")
    else:
        folder.parent.symlink_to(folder.parent)
    assert str(folder) in refusal(bundle, None)


# Keys


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("alice.private.pem", "holds a private key"),
        ("hidden.private.pem", "holds a private key"),
        (
            "secp256k1.pem",
            "holds a key of secp256k1, and Model Signing takes P-256, P-384 and P-521: make a pair of keys with: openssl ",
        ),
        ("Ed25519.pem", "holds a key of Ed25519"),
        ("RSA.pem", "holds a key of RSA"),
        ("missing.pem", "cannot be read: it does not exist"),
        (".", "none of the trusted keys"),
    ],
)
def test_keys_that_cannot_be_trusted(signed, keys, tmp_path, name, said):
    path = keys / name
    if name == ".":
        path = tmp_path / "keys"
        path.mkdir()
    found = refusal(signed, path)
    assert said in found
    assert str(path) in found


@pytest.mark.parametrize(
    "content", [b"", b"ssh-ed25519 AAAA", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"]
)
def test_files_that_hold_no_key(signed, tmp_path, content):
    path = tmp_path / "key.pem"
    path.write_bytes(content)
    assert f"{path} is not a public key in PEM" in refusal(signed, path)


@pytest.mark.parametrize("trusted", [[], (), "", [""], 5, b"x"])
def test_no_key_is_no_way_to_ask_for_less(signed, trusted):
    assert "trusted must be the path of a public key or several" in refusal(signed, trusted, InputError)


@pytest.mark.parametrize(
    ("name", "passphrase", "said"),
    [
        ("alice.pem", None, "alice.pem is a public key, and a bundle is signed with the private key of the pair"),
        ("alice.pem", None, "make a pair of keys with: openssl ecparam -name"),
        ("Ed25519.private.pem", None, "holds a key of Ed25519"),
        ("secp256k1.private.pem", None, "holds a key of secp256k1"),
        ("RSA.private.pem", None, "holds a key of RSA"),
        ("missing.pem", None, "cannot be read: it does not exist"),
        ("hidden.private.pem", None, "pass its passphrase, --passphrase-file FILE"),
        ("hidden.private.pem", b"wrong", "cannot be opened (Incorrect password"),
        ("alice.private.pem", b"some", "leave the passphrase out"),
    ],
)
def test_keys_that_cannot_sign(bundle, keys, name, passphrase, said):
    with pytest.raises(TrustError) as caught:
        sign_bundle(bundle, key=keys / name, passphrase=passphrase)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (bundle / "signature").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no private key in PEM: make a pair of keys with: openssl"),
        (b"-----BEGIN CERTIFICATE-----", "is a certificate, and a bundle is signed with the private key that it is of"),
    ],
)
def test_files_that_are_no_private_key(bundle, tmp_path, content, said):
    path = tmp_path / "key.pem"
    path.write_bytes(content)
    with pytest.raises(TrustError, match=re.escape(f"{path} {said}")):
        sign_bundle(bundle, key=path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("alice.pem", "is a public key, not a certificate: pass the certificate"),
        ("alice.private.pem", "is a private key, not a certificate: pass the certificate"),
        ("empty.pem", "holds no certificate in PEM: pass the certificate"),
        ("broken.pem", "holds no certificate in PEM: pass the certificate"),
        ("missing.pem", "cannot be read: it does not exist"),
    ],
)
def test_files_that_are_no_certificate(bundle, keys, tmp_path, name, said):
    (tmp_path / "empty.pem").touch()
    (tmp_path / "broken.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    file = (keys if name.startswith("alice") else tmp_path) / name
    with pytest.raises(TrustError) as caught:
        sign_bundle(bundle, key=keys / "alice.private.pem", certificates=[file])
    assert f"{file} {said}" in str(caught.value)
    assert not (bundle / "signature").exists()


def test_a_bundle_that_is_not_whole_is_not_signed(bundle, keys):
    (bundle / "golden.npz").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"golden\.npz"):
        sign_bundle(bundle, key=keys / "alice.private.pem")


# Certificates and Sigstore


def issue(name: str, key, issuer: str, issuer_key, *, authority: bool) -> x509.Certificate:
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
    named = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)]) for text in (name, issuer)]
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    usage = x509.KeyUsage(digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, **usage)
    return (
        x509.CertificateBuilder(named[1], named[0], key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .sign(issuer_key, hashes.SHA256())
    )


def test_a_certificate_is_trusted_under_its_root(bundle, keys, tmp_path):
    roots = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("root", "other")}
    for name, key in roots.items():
        issued = issue(name, key, name, key, authority=True)
        (tmp_path / f"{name}.pem").write_bytes(issued.public_bytes(serialization.Encoding.PEM))
    between = ec.generate_private_key(ec.SECP256R1())
    leaf = serialization.load_pem_private_key((keys / "alice.private.pem").read_bytes(), None)
    for name, issued in (
        ("between", issue("between", between, "root", roots["root"], authority=True)),
        ("leaf", issue("leaf", leaf, "between", between, authority=False)),
    ):
        (tmp_path / f"{name}.crt").write_bytes(issued.public_bytes(serialization.Encoding.PEM))
    chain = [tmp_path / "leaf.crt", tmp_path / "between.crt"]
    assert "leaf.crt" in sign_bundle(bundle, key=keys / "alice.private.pem", certificates=chain)
    EdgeBackbone.from_pretrained(bundle, trusted=tmp_path / "root.pem").close()
    assert "is not signed under the certificates of the trusted keys" in refusal(bundle, tmp_path / "other.pem")
    assert "signed with a certificate, or through Sigstore, not with a key" in refusal(bundle, keys / "alice.pem")
    with pytest.raises(TrustError, match="Model Signing did not sign"):
        sign_bundle(bundle, key=keys / "bob.private.pem", certificates=chain)
    sign_bundle(bundle, key=keys / "alice.private.pem")
    assert "which is none of the trusted keys" in refusal(bundle, tmp_path / "root.pem")


def test_sigstore_is_asked_for_the_identity_and_the_rest_is_checked_as_with_a_key(signed, keys, monkeypatch):
    """Its own verifier needs the network: a key's stands in for it."""
    asked = []

    def stand_in(config, **who):
        asked.append(who)
        return config.use_elliptic_key_verifier(public_key=keys / "alice.pem")

    monkeypatch.setattr(model_signing.verifying.Config, "use_sigstore_verifier", stand_in)
    identity = trust.SigstoreIdentity("who@example.com", "https://accounts.example.com")
    assert trust.admit(Bundle.open(signed), sigstore=identity)[1] == {}
    assert asked == [
        {"identity": "who@example.com", "oidc_issuer": "https://accounts.example.com", "trust_config": None}
    ]
    (signed / "signature/manifest.json").write_bytes(b"{}")
    with pytest.raises(TrustError, match=r"signed by who@example.com through Sigstore: .*Hash mismatch"):
        trust.admit(Bundle.open(signed), sigstore=identity)


def test_sigstore_out_of_reach_is_told(bundle, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(socket.gaierror("no network")))
    with pytest.raises(TrustError, match="Model Signing did not sign: "):
        sign_bundle(bundle, sigstore=True)


@pytest.mark.parametrize(("module", "extra"), [("cryptography", "trust"), ("model_signing.signing", "sign")])
def test_a_missing_library_is_named_with_its_install_command(bundle, keys, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=re.escape(pip_install(extra))):
        sign_bundle(bundle, key=keys / "alice.private.pem")


# Programs


def test_a_pickled_backbone_asks_for_the_signature_again(signed, keys, monkeypatch, tmp_path):
    monkeypatch.chdir(keys)
    data = pickle.dumps(EdgeBackbone.from_pretrained(signed, trusted="alice.pem"))
    monkeypatch.chdir(tmp_path)
    pickle.loads(data).close()
    (signed / "signature/model.sig").unlink()
    with pytest.raises(TrustError, match="is not signed"):
        pickle.loads(data)


def test_a_new_bundle_in_the_place_of_a_signed_one_is_not_signed(signed, made, keys):
    with new_bundle(signed, overwrite=True) as folder:
        shutil.copytree(made, folder, dirs_exist_ok=True)
    assert "is not signed" in refusal(signed, keys / "alice.pem")


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "edge_backbones.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_the_commands(bundle, keys, tmp_path):
    hidden = tmp_path / "passphrase"
    hidden.write_text("correct horse\n")
    given = ("sign", bundle, "--key", keys / "hidden.private.pem")
    assert "--passphrase-file" in run(*given).stderr
    done = run(*given, "--passphrase-file", hidden, "--json")
    assert json.loads(done.stdout)["signature"] == str(bundle / "signature/model.sig"), done.stderr
    done = run("verify", bundle, "--key", keys / "bob.pem", "--key", keys / "hidden.pem")
    assert done.stdout.endswith(f"{bundle} is whole and right, and signed as asked\n"), done.stderr
    done = run("verify", bundle, "--key", keys / "bob.pem")
    step, refusal = done.stderr.strip().splitlines()
    assert (done.returncode, step) == (1, "checking files")
    assert "is signed with key" in refusal


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sign"], "choose one"),
        (["sign", "--sigstore", "--key", "x.pem"], "choose one"),
        (["sign", "--sigstore", "--certificate", "x.pem"], "belong to a key"),
        (["sign", "--key", "x.pem", "--passphrase-file", "nothing"], "the passphrase in nothing cannot be read"),
        (["verify", "--sigstore-identity", "who@example.com"], "pass --sigstore-identity and --sigstore-issuer"),
    ],
)
def test_commands_that_ask_for_nothing_sensible(bundle, capsys, monkeypatch, arguments, said):
    command, *rest = arguments
    monkeypatch.setattr(sys, "argv", ["edge-backbones", command, str(bundle), *rest])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == (1 if said.startswith("the passphrase in") else 2)
    assert said in capsys.readouterr().err
