"""Write edge_backbones/bundle/manifest.schema.json from the structs of manifest.py; a test fails when it is out of date."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from edge_backbones.bundle import manifest

PATH = Path(manifest.__file__).with_name("manifest.schema.json")


def schema_text() -> str:
    """Return the JSON schema of manifest.json for readers in other languages, keys in the order of the structs.

    The docstrings of the structs are the descriptions.
    """
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"manifest.json of edge_backbones bundles, schema_version {manifest.SCHEMA_VERSION}",
        **msgspec.json.schema(manifest.Manifest),
    }
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    PATH.write_text(schema_text(), encoding="utf-8")
    print(f"wrote {PATH}")
