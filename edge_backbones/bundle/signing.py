"""Make and check signatures of OpenSSF Model Signing. Whose signature is asked for is decided in trust.py.

Checking a signature by a key takes ``cryptography`` alone. Signing, and checking certificates or Sigstore's signatures, takes
``model_signing`` too.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge_backbones.bundle import manifest as manifest_module
from edge_backbones.bundle.manifest import MAX_MANIFEST_BYTES
from edge_backbones.bundle.reader import Bundle
from edge_backbones.bundle.storage import MANIFEST, write_beside_and_rename
from edge_backbones.errors import BundleError, InputError, MissingDependencyError, TrustError, first_line
from edge_backbones.reading import read_file, why_not

SIGNED, SIGNATURE = "signature/manifest.json", "signature/model.sig"
MAX_SIGNATURE_BYTES = 1 << 20
"""The size limit of a signature, a key or a chain of certificates, which have a hundredth of it."""
SIGN_AGAIN = "copy the bundle again as it was signed, or sign it again: edge-backbones sign"

_MAKE_KEYS = (
    "make a pair of keys with: openssl ecparam -name prime256v1 -genkey -noout -out private.pem, and openssl ec -in "
    "private.pem -pubout -out public.pem"
)
# The hash that Model Signing's specification pairs with each curve.
_HASHES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
# Media type, payload type, type of the statement, type of its predicate, hash.
_KINDS = (
    "application/vnd.dev.sigstore.bundle.v0.3+json",
    "application/vnd.in-toto+json",
    "https://in-toto.io/Statement/v1",
    "https://model_signing/signature/v1.0",
    "sha256",
)


def check_signer(*, key: object, sigstore: bool, of_a_key: bool) -> None:
    """Raise InputError unless there is a key or Sigstore, not both. ``of_a_key``: certificates or a passphrase are given."""
    if sigstore == (key is not None):
        raise InputError(
            "a bundle is signed with a key (--key private.pem) or through Sigstore (--sigstore): choose one"
        )
    if key is None and of_a_key:
        raise InputError("certificates and a passphrase belong to a key: pass --key private.pem too")


def sign_bundle(
    path: str | os.PathLike[str],
    *,
    key: str | os.PathLike[str] | None = None,
    passphrase: bytes | None = None,
    certificates: Sequence[str | os.PathLike[str]] = (),
    sigstore: bool = False,
    trust_config: str | os.PathLike[str] | None = None,
) -> str:
    """Check every file of a bundle and sign its manifest; return who signed, as a phrase. An earlier signature is replaced.

    ``key``: an ECDSA private key on P-256, P-384 or P-521 in PEM, with its ``passphrase`` if it has one. ``certificates``:
    the certificate of the key, then those that lead from it to the root. ``sigstore``, in place of a key: an OpenID login in
    a browser or of the machine that builds (GitHub Actions ...). It sends the hash of the manifest and the signer's identity
    to Sigstore's public log, or to the instance that the file ``trust_config`` describes.

    Raises BundleError for a bundle that is damaged, TrustError for a key that cannot sign, MissingDependencyError.
    """
    check_signer(key=key, sigstore=sigstore, of_a_key=passphrase is not None or bool(certificates))
    bundle = Bundle.open(path)
    bundle.check_files()
    manifest = read_file(bundle.path / MANIFEST, limit=MAX_MANIFEST_BYTES, follow=False)
    if manifest_module.decode(manifest) != bundle.manifest:
        raise BundleError(f"{bundle.path} was changed while it was being signed: sign it again")
    config: Callable[[Any], Any]
    if key is not None:
        who, config = _key_signer(Path(key), passphrase, [Path(file) for file in certificates])
    else:
        who = "Sigstore"
        issued = None if trust_config is None else Path(trust_config)

        def config(signing: Any) -> Any:
            return signing.use_sigstore_signer(use_ambient_credentials=True, trust_config=issued)

    signature = _signed_with_library(manifest, config)
    folder = bundle.path / "signature"
    try:
        if folder.is_symlink():
            raise NotADirectoryError(20, "it is a link")
        write_beside_and_rename(bundle.path / SIGNED, manifest)
        write_beside_and_rename(bundle.path / SIGNATURE, signature)
    except OSError as error:
        raise TrustError(f"{folder} cannot be written: {why_not(error)}. The bundle is not signed") from error
    return who


def check_signature(folder: Path, manifest: bytes, signature: bytes, files: Sequence[Path], whose: str) -> None:
    """Raise TrustError unless a key or a certificate in one of ``files`` signed the bytes ``manifest``.

    ``folder`` (the bundle) and ``whose`` (who trusts the files) are for messages. Raises MissingDependencyError if the
    library that checks is missing.
    """
    place = folder / SIGNATURE
    keys, certificates = _load_keys(files)
    try:
        parsed = msgspec.json.decode(signature, type=_SigstoreBundle)
    except Exception as error:
        raise TrustError(f"{place} is not a signature of Model Signing ({first_line(error)}): {SIGN_AGAIN}") from error
    material = parsed.verification_material
    if material.x509_certificate_chain is not None and certificates:
        check_with_library(
            folder,
            manifest,
            signature,
            lambda config: config.use_certificate_verifier(certificate_chain=certificates),
            f"is not signed under the certificates of {whose}",
        )
        return
    hint = None if material.public_key is None else material.public_key.hint
    if not hint or hint not in keys:
        by = f"key {hint[:12]}..." if hint else "a certificate, or through Sigstore, not with a key"
        names = ", ".join(
            [*(f"{file.name} {known[:12]}..." for known, (file, _) in keys.items()), *map(str, certificates)]
        )
        names = names or "none: there is no .pem file"
        raise TrustError(f"{folder} is signed with {by}, which is none of {whose}: {names}")
    _check_with_key(place, parsed.dsse_envelope, keys[hint][1])
    _check_statement(place, parsed, manifest)


def _check_with_key(place: Path, envelope: _Envelope, key: Any) -> None:
    """Raise TrustError unless ``key`` signed the payload of the envelope."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    kind = envelope.payload_type.encode()
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(envelope.payload), envelope.payload)
    try:
        key.verify(envelope.signatures[0].sig, signed, ec.ECDSA(getattr(hashes, _HASHES[key.curve.name])()))
    except InvalidSignature as error:
        raise TrustError(
            f"{place} was changed: it is no signature by key {key_hint(key)[:12]}.... {SIGN_AGAIN}"
        ) from error


def _check_statement(place: Path, parsed: _SigstoreBundle, manifest: bytes) -> None:
    """Raise TrustError unless the signed statement is about these bytes and nothing else."""
    envelope = parsed.dsse_envelope
    try:
        statement = msgspec.json.decode(envelope.payload, type=_Statement)
        [resource], [subject] = statement.predicate.resources, statement.subject
        is_one = subject.digest.get("sha256") == hashlib.sha256(bytes.fromhex(resource.digest)).hexdigest()
    except Exception as error:
        raise TrustError(f"{place} signs something else than one file ({first_line(error)}): {SIGN_AGAIN}") from error
    kinds = parsed.media_type, envelope.payload_type, statement.type_, statement.predicate_type, resource.algorithm
    if kinds != _KINDS or not is_one:
        raise TrustError(f"{place} is of another format ({', '.join(kinds)}): {SIGN_AGAIN}")
    digest = hashlib.sha256(manifest).hexdigest()
    if (resource.name, resource.digest) != (".", digest):
        raise TrustError(
            f"{place} signs another manifest, of SHA-256 {resource.digest[:12]}..., and {SIGNED} has {digest[:12]}...: "
            f"{SIGN_AGAIN}"
        )


def check_with_library(
    folder: Path, manifest: bytes, signature: bytes, configure: Callable[[Any], Any], refusal: str
) -> None:
    """Check a signature with Model Signing, on copies of the bytes: nobody can change them between its reading and ours."""
    library = _library("verifying", "checking certificates and Sigstore's signatures")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            file, copy = Path(temporary, MANIFEST), Path(temporary, "model.sig")
            file.write_bytes(manifest)
            copy.write_bytes(signature)
            configure(library.Config()).verify(file, copy)
    except Exception as error:
        raise TrustError(f"{folder} {refusal}: {first_line(error, typed=True)}") from error


def _signed_with_library(manifest: bytes, configure: Callable[[Any], Any]) -> bytes:
    library = _library("signing", "signing a bundle")
    try:
        with tempfile.TemporaryDirectory() as folder:
            file, signature = Path(folder, MANIFEST), Path(folder, "model.sig")
            file.write_bytes(manifest)
            configure(library.Config()).sign(file, signature)
            return signature.read_bytes()
    except Exception as error:
        raise TrustError(f"Model Signing did not sign: {first_line(error, typed=True)}") from error


def _library(module: str, what: str) -> Any:
    try:
        return importlib.import_module(f"model_signing.{module}")
    except ImportError as error:
        raise MissingDependencyError(f"{what} ({error.name} is missing)", "sign") from error


class _PublicKeyHint(msgspec.Struct):
    hint: str = ""


class _Material(msgspec.Struct, rename="camel"):
    public_key: _PublicKeyHint | None = None
    x509_certificate_chain: dict[str, Any] | None = None


class _DsseSignature(msgspec.Struct):
    sig: bytes


class _Envelope(msgspec.Struct, rename="camel"):
    payload: bytes
    payload_type: str
    signatures: tuple[_DsseSignature]


class _SigstoreBundle(msgspec.Struct, rename="camel"):
    """The fields that are read of a Sigstore bundle: https://docs.sigstore.dev/about/bundle/."""

    media_type: str
    verification_material: _Material
    dsse_envelope: _Envelope


class _Resource(msgspec.Struct):
    name: str
    algorithm: str
    digest: str


class _Predicate(msgspec.Struct):
    resources: tuple[_Resource]


class _Subject(msgspec.Struct):
    digest: dict[str, str]


class _Statement(msgspec.Struct, rename={"type_": "_type", "predicate_type": "predicateType"}):
    """The in-toto statement that Model Signing signs, with one resource: the model is a single file."""

    type_: str
    subject: tuple[_Subject]
    predicate_type: str
    predicate: _Predicate


def _load_keys(files: Sequence[Path]) -> tuple[dict[str, tuple[Path, Any]], list[Path]]:
    """Return the public keys by their hints, and the files that hold certificates; raise TrustError for other files."""
    _need_cryptography()
    from cryptography.hazmat.primitives import serialization

    keys: dict[str, tuple[Path, Any]] = {}
    certificates = []
    for path in files:
        data = _read_key(path)
        if b"PRIVATE KEY-----" in data:
            raise TrustError(
                f"{path} holds a private key, which only who signs may have: openssl ec -in {path} -pubout -out public.pem, "
                "and trust that"
            )
        if b"-----BEGIN CERTIFICATE-----" in data:
            certificates.append(path)
            continue
        try:
            key = serialization.load_pem_public_key(data)
        except Exception as error:
            raise TrustError(f"{path} is not a public key in PEM ({first_line(error)}): {_MAKE_KEYS}") from error
        _require_curve(path, key)
        keys[key_hint(key)] = (path, key)
    return keys, certificates


def _need_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("checking a signature", "trust") from error


def _read_key(path: Path) -> bytes:
    try:
        return read_file(path, limit=MAX_SIGNATURE_BYTES)
    except OSError as error:
        raise TrustError(f"the key {path} cannot be read: {why_not(error)}") from error


def _require_curve(path: Path, key: Any) -> None:
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in _HASHES:
        kind = curve or type(key).__name__.removesuffix("PublicKey")
        raise TrustError(f"{path} holds a key of {kind}, and Model Signing takes P-256, P-384 and P-521: {_MAKE_KEYS}")


def key_hint(public_key: Any) -> str:
    """Return the hint by which a signature names its key: the SHA-256 of the PEM of the public key."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _key_signer(path: Path, passphrase: bytes | None, certificates: list[Path]) -> tuple[str, Callable[[Any], Any]]:
    """Return who signs, as a phrase, and the function that configures Model Signing for the key.

    Raises TrustError for every fault of the key that can be found before it signs.
    """
    _need_cryptography()
    from cryptography.hazmat.primitives import serialization

    data = _read_key(path)
    if b"PRIVATE KEY-----" not in data:
        raise TrustError(f"{path} {_instead_of_a_private_key(data)}: {_MAKE_KEYS}")
    try:
        key = serialization.load_pem_private_key(data, passphrase)
    except TypeError as error:  # encrypted and no passphrase, or the other way
        way = "pass its passphrase, --passphrase-file FILE" if passphrase is None else "leave the passphrase out"
        raise TrustError(f"{path}: {first_line(error).rstrip('.')}: {way}") from error
    except Exception as error:
        raise TrustError(f"{path} cannot be opened ({first_line(error).rstrip('.')})") from error
    _require_curve(path, key.public_key())
    who = f"key {key_hint(key.public_key())[:12]}..."
    if not certificates:
        return who, lambda config: config.use_elliptic_key_signer(private_key=path, password=passphrase)
    if passphrase is not None:
        raise TrustError(f"{path} has a passphrase, and with certificates Model Signing takes keys without one only")
    for file in certificates:
        _require_certificate(file)
    signing, *chain = certificates
    return f"{who} with the certificate {signing.name}", lambda config: config.use_certificate_signer(
        private_key=path, signing_certificate=signing, certificate_chain=chain or [signing]
    )


def _instead_of_a_private_key(data: bytes) -> str:
    """Say what a file is that holds no private key."""
    if b"-----BEGIN PUBLIC KEY-----" in data:
        return "is a public key, and a bundle is signed with the private key of the pair. Without that one"
    if b"-----BEGIN CERTIFICATE-----" in data:
        return "is a certificate, and a bundle is signed with the private key that it is of. Without that one"
    return "holds no private key in PEM"


def _require_certificate(path: Path) -> None:
    """Raise TrustError unless a file holds a certificate in PEM."""
    from cryptography import x509

    data = _read_key(path)
    way = "pass the certificate that was issued for the key, or leave --certificate out to sign with the key alone"
    for kind in ("public", "private"):
        if f"{kind.upper()} KEY-----".encode() in data and b"-----BEGIN CERTIFICATE-----" not in data:
            raise TrustError(f"{path} is a {kind} key, not a certificate: {way}")
    try:
        x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise TrustError(f"{path} holds no certificate in PEM: {way}") from error


def read_passphrase(path: str | os.PathLike[str]) -> bytes:
    """Return the first line of a file. Raises TrustError if it cannot be read or is empty."""
    try:
        line = read_file(path, limit=MAX_SIGNATURE_BYTES).split(b"\n")[0].rstrip(b"\r")
    except OSError as error:
        raise TrustError(f"the passphrase in {path} cannot be read: {why_not(error)}") from error
    if not line:
        raise TrustError(f"{path} is to hold a passphrase, and its first line is empty")
    return line


def has_passphrase(key: str | os.PathLike[str]) -> bool:
    """Return whether a private key is encrypted. Raises TrustError if it cannot be read."""
    return b"ENCRYPTED" in _read_key(Path(key))
