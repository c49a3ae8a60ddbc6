"""How a device vouches for an engine that it added to a signed bundle: with an HMAC under a key that never leaves it.

The format is described in trust.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
import tempfile
from pathlib import Path

import msgspec

from edge_backbones.bundle.manifest import EngineRecord
from edge_backbones.errors import TrustError
from edge_backbones.reading import opened, read_file

MACHINE_STATE = Path("/var/lib/edge_backbones")


def comparable_content(engine: EngineRecord) -> bytes:
    """Return the record of an engine without its times, which differ between machines, as bytes to compare."""
    return msgspec.json.encode(msgspec.structs.replace(engine, milliseconds=None, pipelined_milliseconds=None))


def reason_against(folder: Path, manifest: bytes, engine: EngineRecord) -> str:
    """Return why an engine that was not signed may not be taken; empty if this machine vouches for it.

    ``folder``: the bundle. ``manifest``: the signed manifest.
    """
    compile_it = "compile it here (edge-backbones compile), or have the bundle signed again"
    message = _message(manifest, engine)
    try:
        said = read_file(folder / _voucher(message), limit=64, follow=False)
    except OSError:
        return f"was added after signing, and not by this machine: {compile_it}"
    reasons = []
    for state in _state_folders():
        try:
            key = _read_device_key(state / "device.key")
        except FileNotFoundError:
            continue
        except OSError as error:
            reasons.append(f"{state / 'device.key'} cannot be read: {error.strerror}")
            continue
        except TrustError as error:
            reasons.append(str(error))
            continue
        if hmac.compare_digest(hmac.new(key, message, "sha256").hexdigest().encode(), said):
            return ""
        reasons.append(f"{state / 'device.key'} is not the key that vouched for it")
    why = "; ".join(reasons) or f"no device.key in {' or '.join(map(str, _state_folders()))}"
    return f"was added after signing, and this machine cannot tell that it did it ({why}): {compile_it}"


def _message(manifest: bytes, engine: EngineRecord) -> bytes:
    """Return the bytes that the HMAC of a voucher covers."""
    signed = hashlib.sha256(manifest).digest()
    return b"edge_backbones engine of signed manifest\0" + signed + comparable_content(engine)


def _voucher(message: bytes) -> str:
    """Return the path of a voucher in its bundle."""
    return f"signature/{hashlib.sha256(message).hexdigest()[:32]}.local"


def write_voucher(folder: Path, manifest: bytes, engine: EngineRecord) -> None:
    """Vouch for an engine of the bundle in ``folder`` with this machine's key. Raises OSError and TrustError."""
    message = _message(manifest, engine)
    said = hmac.new(device_key(), message, "sha256").hexdigest().encode()
    path = folder / _voucher(message)
    path.unlink(missing_ok=True)  # the voucher of another machine
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(path, flags, 0o644), "wb") as file:
        file.write(said)
        file.flush()
        os.fsync(file.fileno())


def _state_folders() -> list[Path]:
    """Return the folders that may hold this machine's key.

    The first serves all users of the machine; an administrator or systemd makes it. The second is the user's own.
    """
    folders = [MACHINE_STATE]
    with contextlib.suppress(RuntimeError):  # no home folder
        folders.append(Path.home() / ".local" / "state" / "edge_backbones")
    return folders


def device_key() -> bytes:
    """Return the key that this machine vouches with, and make it if there is none. Raises OSError and TrustError."""
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
    """Read a device's key; raise TrustError if others can read or write it, or if it is not a key."""
    with opened(path, follow=False) as (file, size):
        mode = os.fstat(file.fileno()).st_mode
        if os.name == "posix" and mode & 0o077:
            raise TrustError(f"{path} can be read or written by others ({stat.S_IMODE(mode):04o}): delete it")
        if size != 32:
            raise TrustError(f"{path} has {size} bytes, not 32: delete it")
        return file.read(32)
