"""Who made a bundle: signatures of OpenSSF Model Signing, and the keys that a machine, a user or a program trusts.

::

    resnet50.bundle/signature/
      manifest.json     the bundle's manifest.json as it was signed, byte for byte
      model.sig         the signature of that file, as `model_signing verify key signature/manifest.json` takes it
      <hash>.local      one for each engine that a device added since: its word that it made the engine, 64 hex digits

1. model.sig MUST be a valid signature of signature/manifest.json by a key that is trusted. Nothing of that file is parsed
   before. A manifest names every file of its bundle by SHA-256, so this covers the bytes of all of them.
2. The bundle's manifest.json MUST equal the signed one in everything but ``engines`` and ``digest``.
3. An engine is taken when its record is in the signed manifest, or when this machine vouches for it. Others are passed
   over with the reason. ``milliseconds`` are of the machine and part of neither.
4. A machine vouches with an HMAC-SHA256 under its own key of the signed manifest's SHA-256 and the engine's record. So what
   it compiled and measured was made of that manifest's graphs and golden samples, and counts for no other bundle. The key
   is made when it is first needed and never leaves the machine.

What has to be signed by whom is asked for in three places, and each can only ask for more: the machine's folder
(``MACHINE_KEYS``), the user's (``~/.config/edge_backbones/trusted``) and the caller (``trusted=``). A folder that is there
asks, an empty one refuses every bundle; no argument and no variable of the environment takes the machine's back.

Checking a key's signature takes ``cryptography`` alone, signing and certificates take ``model_signing`` with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edge_backbones.bundle import manifest as manifest_module
from edge_backbones.bundle.manifest import MAX_MANIFEST_BYTES, EngineRecord, Manifest
from edge_backbones.bundle.reader import Bundle
from edge_backbones.bundle.storage import MANIFEST, write_beside_and_rename
from edge_backbones.errors import BundleError, InputError, MissingDependencyError, TrustError, first_line
from edge_backbones.reading import opened, read_file

MACHINE_KEYS = Path(
    "C:/ProgramData/edge_backbones/trusted" if sys.platform == "win32" else "/etc/edge_backbones/trusted"
)
MACHINE_STATE = Path("/var/lib/edge_backbones")
SIGNED, SIGNATURE = "signature/manifest.json", "signature/model.sig"

Trusted = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
_MAX_BYTES = 1 << 20  # of a signature, a key or a chain of certificates: a hundred times what they have
_MAKE_KEYS = (
    "openssl ecparam -name prime256v1 -genkey -noout -out private.pem, and openssl ec -in private.pem -pubout -out "
    "public.pem"
)
_HASHES = {
    "secp256r1": "SHA256",
    "secp384r1": "SHA384",
    "secp521r1": "SHA512",
}  # by curve, as the specification has them
_SIGN_AGAIN = "copy the bundle again as it was signed, or sign it again: edge-backbones sign"


@dataclass(frozen=True)
class SigstoreIdentity:
    """Who must have signed through Sigstore: an e-mail address or workflow, and the OpenID issuer that vouched for it.

    ``trust_config``: a ClientTrustConfig of Sigstore as JSON, for another instance than the public one; without it the
    public one's is fetched over the network.
    """

    identity: str
    issuer: str
    trust_config: Path | None = None


@dataclass(frozen=True)
class _Demand:
    """Files of keys or certificates, one of which must have signed; ``whose``: who asks, for messages."""

    whose: str
    files: tuple[Path, ...]


def admit(
    bundle: Bundle, trusted: Trusted | None = None, *, sigstore: SigstoreIdentity | None = None
) -> tuple[Bundle, dict[str, str]]:
    """The bundle with the engines that may be taken, and of each other engine by name why it may not.

    ``trusted``: PEM files of public keys (ECDSA on P-256, P-384 or P-521) or certificates, or folders of ``*.pem``: one of
    them must have signed, beside what the machine and the user ask for. Where nobody asks, the bundle is returned as it is
    and nothing is read.

    Raises TrustError for a bundle that is not signed, not by a trusted key, or is not what was signed; MissingDependencyError
    without the library that checks.
    """
    demands = _demands(trusted)
    if not demands and sigstore is None:
        return bundle, {}
    asking = " and ".join(demand.whose for demand in demands) or "the Sigstore identity"
    signature, manifest = (_read_signed(bundle, name, asking) for name in (SIGNATURE, SIGNED))
    for demand in demands:
        _require_signed(bundle, manifest, signature, demand)
    if sigstore is not None:
        _check_with_library(
            bundle,
            manifest,
            signature,
            lambda config: config.use_sigstore_verifier(
                identity=sigstore.identity, oidc_issuer=sigstore.issuer, trust_config=sigstore.trust_config
            ),
            f"could not be shown to be signed by {sigstore.identity} through Sigstore",
        )
    signed = _decode(bundle, manifest)
    if found := _difference(_comparable(signed), _comparable(bundle.manifest)):
        raise TrustError(f"{bundle.path} is not what was signed: {found}. {_SIGN_AGAIN[0].upper() + _SIGN_AGAIN[1:]}")
    reasons = _reasons_against_engines(bundle, signed, manifest)
    kept = tuple(engine for engine in bundle.manifest.engines if engine.name not in reasons)
    return Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, engines=kept)), reasons


def vouch(bundle: Bundle, engine: EngineRecord, *, instead_of: EngineRecord | None = None) -> str:
    """Note in a signed bundle that this machine made ``engine`` of it, before `add_engine` adds it.

    For who compiled it here from the bundle's graphs; or, with ``instead_of``, measured an engine that was signed or vouched
    for as that record. Returns a sentence for the user where it cannot be noted: programs that ask for a signature will pass
    the engine over. Empty where it was, and where the bundle is not signed.
    """
    if not (bundle.path / SIGNATURE).is_file():
        return ""
    refused = f"{engine.name} will be passed over where a signature is asked for"
    try:
        manifest = _read_signed(bundle, SIGNED, "")
        signed = _decode(bundle, manifest)
        if found := _difference(_comparable(signed), _comparable(bundle.manifest)):
            return f"{refused}: {bundle.path} is not what was signed, {found}"
        if _content(engine) in {_content(other) for other in signed.engines}:
            return ""
        if instead_of is not None and instead_of.name in _reasons_against_engines(bundle, signed, manifest):
            return f"{refused}: it was added after signing, and not by this machine. Compile it here"
        _write_voucher(bundle, manifest, engine)
    except (BundleError, OSError) as error:
        return f"{refused}: this machine cannot vouch for it, {first_line(error)}"
    return ""


def known_engines(bundle: Bundle) -> tuple[EngineRecord, ...]:
    """The engines that were signed or that this machine vouches for, whoever signed; of an unsigned bundle all.

    For who decides what is still to be compiled: others would be passed over where a signature is asked for.
    """
    if not (bundle.path / SIGNATURE).is_file():
        return bundle.manifest.engines
    try:
        manifest = _read_signed(bundle, SIGNED, "")
        reasons = _reasons_against_engines(bundle, _decode(bundle, manifest), manifest)
    except BundleError:  # no signature that anybody takes
        return bundle.manifest.engines
    return tuple(engine for engine in bundle.manifest.engines if engine.name not in reasons)


def sign_bundle(
    path: str | os.PathLike[str],
    *,
    key: str | os.PathLike[str] | None = None,
    passphrase: bytes | None = None,
    certificates: Sequence[str | os.PathLike[str]] = (),
    sigstore: bool = False,
    trust_config: str | os.PathLike[str] | None = None,
) -> str:
    """Check every file of a bundle and sign its manifest; an earlier signature is replaced. Returns who signed, a phrase.

    ``key``: PEM of an ECDSA private key on P-256, P-384 or P-521, with its ``passphrase`` where it has one; ``certificates``:
    that key's certificate, and those that lead from it to the root. ``sigstore`` instead: an OpenID login, in a browser or
    of the machine that builds (GitHub Actions ...); it sends the manifest's hash and the signer's identity to Sigstore's
    public log, or to the instance of ``trust_config``.

    Raises BundleError for a bundle that is not whole, TrustError for a key that cannot sign, MissingDependencyError.
    """
    if sigstore == (key is not None):
        raise InputError(
            "a bundle is signed with a key (--key private.pem) or through Sigstore (--sigstore): choose one"
        )
    if key is None and (passphrase is not None or certificates):
        raise InputError("certificates and a passphrase belong to a key: pass --key private.pem too")
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
        raise TrustError(f"{folder} cannot be written: {error.strerror or error}. The bundle is not signed") from error
    return who


def _demands(trusted: Trusted | None) -> list[_Demand]:
    folders = [("this machine's", MACHINE_KEYS)]
    with contextlib.suppress(RuntimeError):  # no home folder
        folders.append(("your", Path.home() / ".config" / "edge_backbones" / "trusted"))
    demands = [
        _Demand(f"{whose} trusted keys ({folder})", _files_in(folder)) for whose, folder in folders if _is_there(folder)
    ]
    if trusted is not None:
        listed: list[Any] = list(trusted) if isinstance(trusted, (list, tuple)) else [trusted]
        if not listed or not all(isinstance(file, (str, os.PathLike)) and os.fspath(file) for file in listed):
            raise InputError(f"trusted must be the path of a public key or several, got {trusted!r}")
        paths = [Path(file) for file in listed]
        files = [file for path in paths for file in (_files_in(path) if path.is_dir() else (path,))]
        demands.append(_Demand(f"the trusted keys ({', '.join(map(str, paths))})", tuple(files)))
    return demands


def _is_there(folder: Path) -> bool:
    """Only "no such folder" is a no: what cannot be looked at may ask for a signature."""
    try:
        os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise TrustError(
            f"{folder} may hold the keys that are trusted here, and cannot be read: {error.strerror}"
        ) from error
    return True


def _files_in(folder: Path) -> tuple[Path, ...]:
    try:
        return tuple(sorted(path for path in folder.iterdir() if path.suffix == ".pem"))
    except OSError as error:
        raise TrustError(f"{folder} is to hold trusted keys, and cannot be read: {error.strerror}") from error


def _read_signed(bundle: Bundle, name: str, asking: str) -> bytes:
    path = bundle.path / name
    limit = _MAX_BYTES if name == SIGNATURE else MAX_MANIFEST_BYTES
    try:
        if path.parent.is_symlink():
            raise TrustError(f"{path.parent} is a link, which a bundle may not have: copy the bundle again")
        return read_file(path, limit=limit, follow=False)
    except FileNotFoundError as error:
        raise TrustError(
            f"{bundle.path} is not signed ({name} is missing), and a signature is asked for by {asking}: sign it where the "
            f"private key is, edge-backbones sign {bundle.path} --key private.pem"
        ) from error
    except OSError as error:
        raise TrustError(f"{path} cannot be read: {error.strerror}") from error


def _decode(bundle: Bundle, manifest: bytes) -> Manifest:
    try:
        return manifest_module.decode(manifest)
    except BundleError as error:
        raise TrustError(f"{bundle.path / SIGNED} is not a manifest ({error}): {_SIGN_AGAIN}") from error


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
    """What is read of a Sigstore bundle: https://docs.sigstore.dev/about/bundle/."""

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
    """The in-toto statement that Model Signing signs: one resource for a model that is one file."""

    type_: str
    subject: tuple[_Subject]
    predicate_type: str
    predicate: _Predicate


def _require_signed(bundle: Bundle, manifest: bytes, signature: bytes, demand: _Demand) -> None:
    """Raise TrustError unless a key or certificate of ``demand`` signed these bytes."""
    place = bundle.path / SIGNATURE
    keys, certificates = _load_keys(demand)
    try:
        parsed = msgspec.json.decode(signature, type=_SigstoreBundle)
    except Exception as error:
        raise TrustError(f"{place} is not a signature of Model Signing ({first_line(error)}): {_SIGN_AGAIN}") from error
    material, envelope = parsed.verification_material, parsed.dsse_envelope
    names = ", ".join([*(f"{file.name} {hint[:12]}..." for hint, (file, _) in keys.items()), *map(str, certificates)])
    names = names or "none: there is no .pem file"
    if material.x509_certificate_chain is not None and certificates:
        _check_with_library(
            bundle,
            manifest,
            signature,
            lambda config: config.use_certificate_verifier(certificate_chain=certificates),
            f"is not signed under the certificates of {demand.whose}",
        )
        return
    hint = None if material.public_key is None else material.public_key.hint
    if not hint or hint not in keys:
        by = f"key {hint[:12]}..." if hint else "a certificate, or through Sigstore, not with a key"
        raise TrustError(f"{bundle.path} is signed with {by}, which is none of {demand.whose}: {names}")
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    _, key = keys[hint]
    kind = envelope.payload_type.encode()
    signed = b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(envelope.payload), envelope.payload)
    try:
        key.verify(envelope.signatures[0].sig, signed, ec.ECDSA(getattr(hashes, _HASHES[key.curve.name])()))
    except InvalidSignature as error:
        raise TrustError(f"{place} was changed: it is no signature by key {hint[:12]}.... {_SIGN_AGAIN}") from error
    try:
        statement = msgspec.json.decode(envelope.payload, type=_Statement)
        [resource], [subject] = statement.predicate.resources, statement.subject
        is_one = subject.digest.get("sha256") == hashlib.sha256(bytes.fromhex(resource.digest)).hexdigest()
    except Exception as error:
        raise TrustError(f"{place} signs something else than one file ({first_line(error)}): {_SIGN_AGAIN}") from error
    kinds = parsed.media_type, envelope.payload_type, statement.type_, statement.predicate_type, resource.algorithm
    if kinds != _KINDS or not is_one:
        raise TrustError(f"{place} is of another format ({', '.join(kinds)}): {_SIGN_AGAIN}")
    digest = hashlib.sha256(manifest).hexdigest()
    if (resource.name, resource.digest) != (".", digest):
        raise TrustError(
            f"{place} signs another manifest, of SHA-256 {resource.digest[:12]}..., and {SIGNED} has {digest[:12]}...: "
            f"{_SIGN_AGAIN}"
        )


_KINDS = (
    "application/vnd.dev.sigstore.bundle.v0.3+json",
    "application/vnd.in-toto+json",
    "https://in-toto.io/Statement/v1",
    "https://model_signing/signature/v1.0",
    "sha256",
)


def _load_keys(demand: _Demand) -> tuple[dict[str, tuple[Path, Any]], list[Path]]:
    """Public keys by what signatures call them, and the files that hold certificates."""
    _need_cryptography()
    from cryptography.hazmat.primitives import serialization

    keys: dict[str, tuple[Path, Any]] = {}
    certificates = []
    for path in demand.files:
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
        keys[_hint(key)] = (path, key)
    return keys, certificates


def _need_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("checking a signature", "trust") from error


def _read_key(path: Path) -> bytes:
    try:
        return read_file(path, limit=_MAX_BYTES)
    except OSError as error:
        raise TrustError(f"the key {path} cannot be read: {error.strerror}") from error


def _require_curve(path: Path, key: Any) -> None:
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in _HASHES:
        kind = curve or type(key).__name__.removesuffix("PublicKey")
        raise TrustError(f"{path} holds a key of {kind}, and Model Signing takes P-256, P-384 and P-521: {_MAKE_KEYS}")


def _hint(public_key: Any) -> str:
    """What a signature calls the key that made it: SHA-256 of its PEM."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def read_passphrase(path: str | os.PathLike[str]) -> bytes:
    """The first line of a file. Raises TrustError where it cannot be read or is empty."""
    try:
        line = read_file(path, limit=_MAX_BYTES).split(b"\n")[0].rstrip(b"\r")
    except OSError as error:
        raise TrustError(f"the passphrase in {path} cannot be read: {error.strerror}") from error
    if not line:
        raise TrustError(f"{path} is to hold a passphrase, and its first line is empty")
    return line


def has_passphrase(key: str | os.PathLike[str]) -> bool:
    """Is this private key encrypted? Raises TrustError where it cannot be read."""
    return b"ENCRYPTED" in _read_key(Path(key))


def absolute(trusted: Trusted | None) -> Trusted | None:
    """The same for a process with another current folder."""
    if trusted is None or isinstance(trusted, (str, os.PathLike)):
        return None if trusted is None else os.path.abspath(trusted)
    return tuple(os.path.abspath(file) for file in trusted)


def _key_signer(path: Path, passphrase: bytes | None, certificates: list[Path]) -> tuple[str, Callable[[Any], Any]]:
    """Who signs, and what sets Model Signing up for it; every fault of the key is told here."""
    _need_cryptography()
    from cryptography.hazmat.primitives import serialization

    data = _read_key(path)
    if b"PRIVATE KEY-----" not in data:
        raise TrustError(f"{path} holds no private key in PEM: {_MAKE_KEYS}")
    try:
        key = serialization.load_pem_private_key(data, passphrase)
    except TypeError as error:  # encrypted and no passphrase, or the other way
        way = "pass its passphrase, --passphrase-file FILE" if passphrase is None else "leave the passphrase out"
        raise TrustError(f"{path}: {first_line(error).rstrip('.')}: {way}") from error
    except Exception as error:
        raise TrustError(f"{path} cannot be opened ({first_line(error).rstrip('.')})") from error
    _require_curve(path, key.public_key())
    who = f"key {_hint(key.public_key())[:12]}..."
    if not certificates:
        return who, lambda config: config.use_elliptic_key_signer(private_key=path, password=passphrase)
    if passphrase is not None:
        raise TrustError(f"{path} has a passphrase, and with certificates Model Signing takes keys without one only")
    for file in certificates:
        _read_key(file)
    signing, *chain = certificates
    return f"{who} with the certificate {signing.name}", lambda config: config.use_certificate_signer(
        private_key=path, signing_certificate=signing, certificate_chain=chain or [signing]
    )


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


def _check_with_library(
    bundle: Bundle, manifest: bytes, signature: bytes, configure: Callable[[Any], Any], refusal: str
) -> None:
    """Model Signing itself, on copies of the bytes that were read: they do not change between its reading and ours."""
    library = _library("verifying", "checking certificates and Sigstore's signatures")
    try:
        with tempfile.TemporaryDirectory() as folder:
            file, copy = Path(folder, MANIFEST), Path(folder, "model.sig")
            file.write_bytes(manifest)
            copy.write_bytes(signature)
            configure(library.Config()).verify(file, copy)
    except Exception as error:
        raise TrustError(f"{bundle.path} {refusal}: {first_line(error, typed=True)}") from error


def _library(module: str, what: str) -> Any:
    import importlib

    try:
        return importlib.import_module(f"model_signing.{module}")
    except ImportError as error:
        raise MissingDependencyError(f"{what} ({error.name} is missing)", "sign") from error


def _comparable(manifest: Manifest) -> Any:
    """What a device may not change, as plain values."""
    return msgspec.json.decode(msgspec.json.encode(msgspec.structs.replace(manifest, engines=(), digest="")))


def _difference(signed: Any, current: Any, at: str = "") -> str:
    """The first field that differs, and both values; empty where none does."""
    if isinstance(signed, dict) and isinstance(current, dict):
        fields = [
            (f"{at}.{key}".lstrip("."), signed.get(key, msgspec.UNSET), current.get(key, msgspec.UNSET))
            for key in {**signed, **current}
        ]
    elif isinstance(signed, list) and isinstance(current, list) and len(signed) == len(current):
        fields = [(f"{at}[{i}]", a, b) for i, (a, b) in enumerate(zip(signed, current, strict=True))]
    elif type(signed) is type(current) and signed == current:
        return ""
    else:
        return f"{at} was signed as {_short(signed)}, and manifest.json has {_short(current)}"
    return next((found for name, a, b in fields if (found := _difference(a, b, name))), "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _content(engine: EngineRecord) -> bytes:
    return msgspec.json.encode(msgspec.structs.replace(engine, milliseconds=None))


def _reasons_against_engines(bundle: Bundle, signed: Manifest, manifest: bytes) -> dict[str, str]:
    """The engines that were neither signed nor vouched for, and why, a phrase by name."""
    contents = {_content(engine) for engine in signed.engines}
    return {
        engine.name: reason
        for engine in bundle.manifest.engines
        if _content(engine) not in contents and (reason := _reason_against(bundle, manifest, engine))
    }


def _reason_against(bundle: Bundle, manifest: bytes, engine: EngineRecord) -> str:
    compile_it = "compile it here (edge-backbones compile), or have the bundle signed again"
    message = _message(manifest, engine)
    try:
        said = read_file(bundle.path / _voucher(message), limit=64, follow=False)
    except OSError:
        return f"was added after signing, and not by this machine: {compile_it}"
    reasons = []
    for folder in _state_folders():
        try:
            key = _read_device_key(folder / "device.key")
        except FileNotFoundError:
            continue
        except OSError as error:
            reasons.append(f"{folder / 'device.key'} cannot be read: {error.strerror}")
            continue
        except TrustError as error:
            reasons.append(str(error))
            continue
        if hmac.compare_digest(hmac.new(key, message, "sha256").hexdigest().encode(), said):
            return ""
        reasons.append(f"{folder / 'device.key'} is not the key that vouched for it")
    why = "; ".join(reasons) or f"no device.key in {' or '.join(map(str, _state_folders()))}"
    return f"was added after signing, and this machine cannot tell that it did it ({why}): {compile_it}"


def _message(manifest: bytes, engine: EngineRecord) -> bytes:
    return b"edge_backbones engine of signed manifest\0" + hashlib.sha256(manifest).digest() + _content(engine)


def _voucher(message: bytes) -> str:
    return f"signature/{hashlib.sha256(message).hexdigest()[:32]}.local"


def _write_voucher(bundle: Bundle, manifest: bytes, engine: EngineRecord) -> None:
    message = _message(manifest, engine)
    said = hmac.new(_device_key(), message, "sha256").hexdigest().encode()
    path = bundle.path / _voucher(message)
    path.unlink(missing_ok=True)  # what another machine said
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(path, flags, 0o644), "wb") as file:
        file.write(said)
        file.flush()
        os.fsync(file.fileno())


def _state_folders() -> list[Path]:
    """Where this machine's key may lie: for all its users where an administrator (or systemd) made that folder."""
    folders = [MACHINE_STATE]
    with contextlib.suppress(RuntimeError):  # no home folder
        folders.append(Path.home() / ".local" / "state" / "edge_backbones")
    return folders


def _device_key() -> bytes:
    """The key that this machine vouches with; made where there is none. Raises OSError and TrustError."""
    machine, *user = _state_folders()
    folder = machine if os.access(machine, os.W_OK) or not user else user[0]
    path = folder / "device.key"
    with contextlib.suppress(FileNotFoundError):
        return _read_device_key(path)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".device.key-", dir=folder)  # 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):  # another process was first: its key is the machine's
            os.link(temporary, path)
    finally:
        os.unlink(temporary)
    return _read_device_key(path)


def _read_device_key(path: Path) -> bytes:
    with opened(path, follow=False) as (file, size):
        mode = os.fstat(file.fileno()).st_mode
        if os.name == "posix" and mode & 0o077:
            raise TrustError(f"{path} can be read or written by others ({stat.S_IMODE(mode):04o}): delete it")
        if size != 32:
            raise TrustError(f"{path} has {size} bytes, not 32: delete it")
        return file.read(32)
