"""Write edge_backbones/bundle/manifest.schema.json from the structs of manifest.py; a test says when it is out of date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from edge_backbones.bundle import manifest

PATH = Path(manifest.__file__).with_name("manifest.schema.json")


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of manifest.json, for readers in other languages. The structs explain the fields."""
    schema: dict[str, Any] = msgspec.json.decode(
        msgspec.json.encode(msgspec.json.schema(manifest.Manifest))
    )  # no tuples
    for struct in schema["$defs"].values():
        struct.pop("description", None)
    return schema


if __name__ == "__main__":
    PATH.write_text(json.dumps(json_schema(), separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"wrote {PATH}")
