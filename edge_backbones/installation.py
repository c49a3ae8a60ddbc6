"""Say how to install more of this package: from where it was installed itself, so that the command works when typed."""

from __future__ import annotations

import functools
import json
import os
import shlex
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

_NAME = "edge-backbones"


def pip_install(extra: str, pip: str = "pip") -> str:
    """Return the command that installs an extra of this package.

    It names the wheel or the folder that this package was installed from; an index needs only the package's name.

    Args:
        extra: Name in pyproject.toml, such as ``cpu``.
        pip: The pip to call, such as ``ENV/bin/pip``.
    """
    origin, is_editable = _origin()
    at = origin.find(" @ ")  # PEP 508: the extra goes between the name and the address
    asked = f"{origin}[{extra}]" if at < 0 else f"{origin[:at]}[{extra}]{origin[at:]}"
    quoted = shlex.quote(asked)
    return f"{pip} install --editable {quoted}" if is_editable else f"{pip} install {quoted}"


@functools.cache
def _origin() -> tuple[str, bool]:
    """Return what pip was asked to install, and whether it was installed for development.

    pip records it in direct_url.json (PEP 610) unless it was the name of a package on an index.
    """
    import importlib.metadata  # takes 10 ms, and only an error needs it

    try:
        text = importlib.metadata.distribution(_NAME).read_text("direct_url.json")
        record = json.loads(text or "{}")
        url, is_editable = record.get("url", ""), bool(record.get("dir_info", {}).get("editable"))
        vcs = record.get("vcs_info")
    except (importlib.metadata.PackageNotFoundError, ValueError, AttributeError, OSError):
        return _NAME, False
    if not isinstance(url, str) or not url:
        return _NAME, False
    if vcs:
        return f"{_NAME} @ {vcs.get('vcs', 'git')}+{url}@{vcs.get('commit_id', 'HEAD')}", False
    if urlsplit(url).scheme != "file":
        return f"{_NAME} @ {url}", False
    path = url2pathname(unquote(urlsplit(url).path)) if os.name == "nt" else unquote(urlsplit(url).path)
    return path, is_editable
