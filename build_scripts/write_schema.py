"""Write edge_backbones/manifest.schema.json from the structs of manifest.py; a test says when it is out of date."""

from __future__ import annotations

import json
from pathlib import Path

from edge_backbones import manifest

PATH = Path(manifest.__file__).with_name("manifest.schema.json")

if __name__ == "__main__":
    PATH.write_text(json.dumps(manifest.json_schema(), separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"wrote {PATH}")
