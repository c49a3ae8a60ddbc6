"""Who made a bundle: signatures of OpenSSF Model Signing, and the keys that a machine, a user or a program trusts.

::

    resnet50.bundle/signature/
      manifest.json     the bundle's manifest.json as it was signed, byte for byte
      model.sig         the signature of that file; `model_signing verify key signature/manifest.json` accepts it
      <hash>.local      one for each engine that a device added since: its voucher for the engine, 64 hex digits

1. model.sig MUST be a valid signature of signature/manifest.json by a trusted key. Nothing of that file is parsed before the
   signature is checked. A manifest names every file of its bundle by SHA-256, so the signature covers the bytes of all.
2. The bundle's manifest.json MUST equal the signed one in every field except ``engines`` and ``digest``.
3. An engine is taken if its record is in the signed manifest or if this machine vouches for it. Other engines are passed
   over with the reason. ``milliseconds`` depends on the machine and is not compared.
4. A machine vouches with an HMAC-SHA256, under its own key, of the signed manifest's SHA-256 and the engine's record. So the
   voucher holds for an engine that was compiled from the graphs of that manifest and measured on its golden samples, and
   for no other bundle. The key is made when it is first needed and never leaves the machine.

Three places can ask for a signature, and each can only ask for more: the folder of the machine (``MACHINE_KEYS``), the folder
of the user (``~/.config/edge_backbones/trusted``) and the caller (``trusted=``). A folder that exists asks, and an empty one
refuses every bundle. No argument and no environment variable can switch off what the machine asks for.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edge_backbones.bundle import manifest as manifest_module
from edge_backbones.bundle import signing, vouchers
from edge_backbones.bundle.manifest import MAX_MANIFEST_BYTES, EngineRecord, Manifest
from edge_backbones.bundle.reader import Bundle
from edge_backbones.bundle.signing import MAX_SIGNATURE_BYTES, SIGN_AGAIN, SIGNATURE, SIGNED
from edge_backbones.errors import BundleError, InputError, TrustError, first_line
from edge_backbones.reading import read_file, why_not

MACHINE_KEYS = Path(
    "C:/ProgramData/edge_backbones/trusted" if sys.platform == "win32" else "/etc/edge_backbones/trusted"
)

Trusted = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class SigstoreIdentity:
    """Who must have signed through Sigstore: an e-mail address or a workflow, and the OpenID issuer that confirmed it.

    ``trust_config``: a JSON file with the ClientTrustConfig of a Sigstore instance. None: that of the public instance, which
    is fetched over the network.
    """

    identity: str
    issuer: str
    trust_config: Path | None = None


@dataclass(frozen=True)
class _Demand:
    """Files of keys or certificates, one of which must have signed. ``whose``: who asks for it, for messages."""

    whose: str
    files: tuple[Path, ...]


def admit(
    bundle: Bundle, trusted: Trusted | None = None, *, sigstore: SigstoreIdentity | None = None
) -> tuple[Bundle, dict[str, str]]:
    """Check the signature of a bundle; return it with the engines that may be taken, and by name why others may not.

    ``trusted``: PEM files of public keys (ECDSA on P-256, P-384 or P-521) or certificates, or folders of ``*.pem``. One of
    them must have signed, in addition to what the machine and the user ask for. If nobody asks for a signature, the bundle
    is returned as it is and nothing is read.

    Raises TrustError for a bundle that is not signed, not signed by a trusted key or not what was signed, and
    MissingDependencyError without the library that checks.
    """
    demands = _demands(trusted)
    if not demands and sigstore is None:
        return bundle, {}
    asking = " and ".join(demand.whose for demand in demands) or "the Sigstore identity"
    signature, manifest = (_read_signed(bundle, name, asking) for name in (SIGNATURE, SIGNED))
    for demand in demands:
        signing.check_signature(bundle.path, manifest, signature, demand.files, demand.whose)
    if sigstore is not None:
        signing.check_with_library(
            bundle.path,
            manifest,
            signature,
            lambda config: config.use_sigstore_verifier(
                identity=sigstore.identity, oidc_issuer=sigstore.issuer, trust_config=sigstore.trust_config
            ),
            f"could not be shown to be signed by {sigstore.identity} through Sigstore",
        )
    signed = _decode(bundle, manifest)
    if found := _difference(_comparable(signed), _comparable(bundle.manifest)):
        raise TrustError(f"{bundle.path} is not what was signed: {found}. {SIGN_AGAIN[0].upper() + SIGN_AGAIN[1:]}")
    reasons = _reasons_against_engines(bundle, signed, manifest)
    kept = tuple(engine for engine in bundle.manifest.engines if engine.name not in reasons)
    return Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, engines=kept)), reasons


def vouch(bundle: Bundle, engine: EngineRecord, *, instead_of: EngineRecord | None = None) -> str:
    """Vouch in a signed bundle for an engine that this machine made, before `Bundle.add_engine` adds it.

    Call it for an engine that was compiled here from the graphs of the bundle. Call it with ``instead_of`` for an engine that
    was measured here again: then the record ``instead_of`` has to be signed or vouched for. Returns an empty string, or a
    sentence for the user if vouching is not possible: programs that ask for a signature will pass the engine over.
    """
    if not (bundle.path / SIGNATURE).is_file():
        return ""
    refused = f"{engine.name} will be passed over where a signature is asked for"
    try:
        manifest = _read_signed(bundle, SIGNED, "")
        signed = _decode(bundle, manifest)
        if found := _difference(_comparable(signed), _comparable(bundle.manifest)):
            return f"{refused}: {bundle.path} is not what was signed, {found}"
        if vouchers.comparable_content(engine) in {vouchers.comparable_content(other) for other in signed.engines}:
            return ""
        if instead_of is not None and instead_of.name in _reasons_against_engines(bundle, signed, manifest):
            return f"{refused}: it was added after signing, and not by this machine. Compile it here"
        vouchers.write_voucher(bundle.path, manifest, engine)
    except (BundleError, OSError) as error:
        return f"{refused}: this machine cannot vouch for it, {first_line(error)}"
    return ""


def known_engines(bundle: Bundle) -> tuple[EngineRecord, ...]:
    """Return the engines that were signed or that this machine vouches for, whoever signed; all of an unsigned bundle.

    It tells which engines need not be compiled again: other engines are passed over where a signature is asked for.
    """
    if not (bundle.path / SIGNATURE).is_file():
        return bundle.manifest.engines
    try:
        manifest = _read_signed(bundle, SIGNED, "")
        reasons = _reasons_against_engines(bundle, _decode(bundle, manifest), manifest)
    except BundleError:  # the signature is worthless
        return bundle.manifest.engines
    return tuple(engine for engine in bundle.manifest.engines if engine.name not in reasons)


def absolute(trusted: Trusted | None) -> Trusted | None:
    """Return ``trusted`` with absolute paths, for a process with another current folder."""
    if trusted is None or isinstance(trusted, (str, os.PathLike)):
        return None if trusted is None else os.path.abspath(trusted)
    return tuple(os.path.abspath(file) for file in trusted)


def _demands(trusted: Trusted | None) -> list[_Demand]:
    """Return what the machine, the user and the caller ask for, each if it asks."""
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
    """Return whether a folder exists; raise TrustError if that cannot be told, since it may ask for a signature."""
    try:
        os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise TrustError(
            f"{folder} may hold the keys that are trusted here, and cannot be read: {why_not(error)}"
        ) from error
    return True


def _files_in(folder: Path) -> tuple[Path, ...]:
    try:
        return tuple(sorted(path for path in folder.iterdir() if path.suffix == ".pem"))
    except OSError as error:
        raise TrustError(f"{folder} is to hold trusted keys, and cannot be read: {why_not(error)}") from error


def _read_signed(bundle: Bundle, name: str, asking: str) -> bytes:
    """Read a file of the signature; raise TrustError if it is missing. ``asking``: who asks for it, for the message."""
    path = bundle.path / name
    limit = MAX_SIGNATURE_BYTES if name == SIGNATURE else MAX_MANIFEST_BYTES
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
        raise TrustError(f"{path} cannot be read: {why_not(error)}") from error


def _decode(bundle: Bundle, manifest: bytes) -> Manifest:
    try:
        return manifest_module.decode(manifest)
    except BundleError as error:
        raise TrustError(f"{bundle.path / SIGNED} is not a manifest ({error}): {SIGN_AGAIN}") from error


def _comparable(manifest: Manifest) -> Any:
    """Return the fields of a manifest that a device may not change, as plain values."""
    return msgspec.json.decode(msgspec.json.encode(msgspec.structs.replace(manifest, engines=(), digest="")))


def _difference(signed: Any, current: Any, at: str = "") -> str:
    """Return a phrase with the first field that differs and both values; empty if none does."""
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


def _reasons_against_engines(bundle: Bundle, signed: Manifest, manifest: bytes) -> dict[str, str]:
    """Return by name why engines may not be taken that were neither signed nor vouched for."""
    contents = {vouchers.comparable_content(engine) for engine in signed.engines}
    return {
        engine.name: reason
        for engine in bundle.manifest.engines
        if vouchers.comparable_content(engine) not in contents
        and (reason := vouchers.reason_against(bundle.path, manifest, engine))
    }
