"""Random damage to bytes and to JSON documents. The same state of a generator gives the same damage."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import re
from typing import Any

_TEXT = (
    b'"', b"{", b"[", b"\\u0000", b"\\ud800", b"1e999", b"-", b"NaN", b"Infinity", b"\xff\xfe", b"\xef\xbb\xbf",
    b"[" * 1500, b'{"a":' * 1500, b"x=[" * 800, b"9" * 5000, b"null", b"\0", b"[a." + b"b." * 900 + b"c]\n", b"'''", b"\r",
    b"\x1b[31m",
)  # fmt: skip
_NUMBERS = (
    b"0", b"-1", b"1e308", b"1e999", b"nan", b"inf", b"9" * 400, b"9223372036854775807", b"1.5", b"true", b"0.0",
    b"1979-05-27T07:32:00Z",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2, 2**31, 2**63, 2**64, 10**400, 0.0, 1e308, 1e-320, -1e308, "", "a", "/", "..", "../x", "a/../b",
    "\0", "\u202e", "x" * 600, "x" * 100_000, "\U0001f600", "\x1b[31m", [], {}, [[]], {"a": 1}, ["a"] * 3, "5", "openvino",
    "0" * 64, "sm_87", "NHWC", "int8",
)  # fmt: skip
_SIZES = (0, 1, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


def damaged_bytes(data: bytes, draw: random.Random, *, text: bool) -> bytes:
    """Change, remove, double or insert bytes; in texts also numbers and signs that trouble parsers."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        if not changed:
            break
        at = draw.randrange(len(changed))
        match draw.randrange(8):
            case 0:
                changed[at] ^= 1 << draw.randrange(8)
            case 1:
                changed[at] = draw.randrange(256)
            case 2:
                del changed[at:]
            case 3:
                del changed[at : at + draw.randrange(1, 64)]
            case 4:
                changed[at:at] = draw.randbytes(draw.randrange(1, 16))
            case 5:
                other = draw.randrange(len(changed))
                changed[at:at] = changed[other : other + draw.randrange(1, 200)]
            case 6 if text:
                numbers = list(re.finditer(rb"-?\d+\.?\d*", changed))
                if numbers:
                    number = draw.choice(numbers)
                    changed[number.start() : number.end()] = draw.choice(_NUMBERS)
            case 6:
                size = draw.choice((1, 2, 4, 8))
                changed[at : at + size] = (draw.choice(_SIZES) & (256**size - 1)).to_bytes(size, "little")
            case _ if text:
                changed[at:at] = draw.choice(_TEXT)
            case _:
                changed[at : at + 32] = changed[: draw.randrange(32)]
    return bytes(changed)


def damaged_document(document: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Replace values of a JSON document by others, or remove, double, rename or exchange them."""
    changed = copy.deepcopy(document)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        inner: Any = changed
        while True:
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            if not keys:
                break
            key = draw.choice(keys)
            value = inner[key]
            if isinstance(value, (dict, list)) and value and draw.random() < 0.8:
                inner = value
                continue
            match draw.randrange(6):
                case 0:
                    inner[key] = draw.choice(_VALUES)
                case 1:
                    del inner[key]
                case 2 if isinstance(inner, list):
                    inner.insert(key, copy.deepcopy(value))
                case 2:
                    inner[f"{key} "] = value
                case _:
                    inner[key] = _alike(value, draw)
            break
    return changed


def _alike(value: Any, draw: random.Random) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return draw.choice((0, -1, 1, 2, value + 1, -value, value * 1000, 2**31, 2**40, 2**62, 7, 1e-300, 1e300))
    if isinstance(value, str):
        others = ("", value[:-1], value.upper(), f"../{value}", f"/{value}", f"{value}\0", f"{value}\n", value * 50)
        return draw.choice((*others, "fp16", "tensorrt", "NLC", "golden.npz", "manifest.json", "engines", "."))
    if isinstance(value, list):
        return draw.choice(([], value[:-1], value * 2, value[::-1], [*value, 0], value * 100))
    return {}


def sealed(document: dict[str, Any]) -> bytes:
    """Give a manifest.json the right digest, whatever it says."""
    rest = {key: value for key, value in document.items() if key != "digest"}
    body = json.dumps({**rest, "digest": ""}, indent=2).encode("utf-8", "surrogatepass") + b"\n"
    return body[:-4] + hashlib.sha256(body).hexdigest().encode() + body[-4:]
