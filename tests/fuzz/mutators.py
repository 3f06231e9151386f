"""Damage for files: functions of a value or of bytes and a seeded `random.Random`, the same in every run.

damaged_bytes(raw, rng)          bits and bytes flipped, parts removed, doubled, moved, strewn in; cut short
damaged_json(value, rng)         a JSON value with other types, huge numbers, deep nesting, keys gone or renamed
json_text(value, rng)            its bytes, at times with what only lax writers write (NaN, keys twice)
damaged_safetensors(raw, rng)    a safetensors file whose header says something else, or is damaged itself
"""

from __future__ import annotations

import copy
import json
import random
from typing import Any

DEEP = 3_000
NUMBERS = [0, 1, -1, 2, 255, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e308, 1e-320]
WORDS = ["", "x", "0", "../../etc/passwd", "/", ".", "a\0b", "\ud800", "caf\u00e9", "a" * 300, "a" * 70_000, "NaN"]


def damaged_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Bytes with one to eight damages."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at : at + rng.choice((1, 2, 8, 100, 10_000))]
        elif kind == 3:
            data[at:at] = data[at : at + rng.choice((1, 8, 100, 10_000))]
        elif kind == 4:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 16))))
        else:
            del data[at:]
    return bytes(data)


def other_value(value: Any, rng: random.Random) -> Any:
    """What could stand in a value's place: another type, another size, another depth."""
    kind = rng.randrange(12)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice(WORDS)
    if kind == 6:
        return rng.choice((None, True, False))
    if kind == 7:
        return rng.choice(([], {}, [value], {"a": value}, [value] * 1000, [None], [[]]))
    if kind == 8:
        return nested(rng.choice((10, 100, DEEP)), rng)
    if type(value) in (int, float):
        whole = value if abs(value) < 1 << 60 else 1
        return rng.choice((value + 1, value - 1, -value, value * 1000, str(whole), float(whole)))
    if isinstance(value, str):
        return rng.choice((value[:-1], value + "x", value.upper(), value[::-1], len(value)))
    if isinstance(value, list):
        return rng.choice((value[:-1], value * 2, value[::-1], {str(i): item for i, item in enumerate(value)}))
    return rng.choice((None, list(value) if isinstance(value, dict) else 0))


def nested(depth: int, rng: random.Random) -> Any:
    """Lists or objects inside of each other."""
    value: Any = 0
    wrap = rng.choice((lambda inner: [inner], lambda inner: {"a": inner}))
    for _ in range(depth):
        value = wrap(value)
    return value


def damaged_json(value: Any, rng: random.Random) -> Any:
    """A copy with one to three places changed."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder, key = rng.choice(_places(root))
        luck = rng.random()
        if luck < 0.15 and holder is not root:
            del holder[key]
        elif luck < 0.25 and isinstance(holder, dict):
            holder[rng.choice((str(key) + "x", "", *WORDS[1:3]))] = holder.pop(key)
        else:
            holder[key] = other_value(holder[key], rng)
    return root[0]


def _places(root: list[Any]) -> list[tuple[Any, Any]]:
    """(holder, key) of every value; what lies deep inside of an earlier damage is left alone."""
    found: list[tuple[Any, Any]] = []
    layer: list[Any] = [root]
    for _ in range(12):
        following: list[Any] = []
        for holder in layer:
            for key in list(holder) if isinstance(holder, dict) else range(min(len(holder), 50)):
                found.append((holder, key))
                if isinstance(holder[key], dict | list):
                    following.append(holder[key])
        layer = following
    return found


def json_text(value: Any, rng: random.Random) -> bytes:
    """The bytes of a value, nested as deep as it likes."""
    text = _dumps(value)
    luck = rng.random()
    if luck < 0.05:
        text = text.replace("0", rng.choice(("NaN", "Infinity", "-Infinity", "1e999", "0" * 5000)), 1)
    elif luck < 0.1 and isinstance(value, dict) and value:
        key = rng.choice(list(value))
        text = text[:-1] + f", {json.dumps(key)}: 0}}"
    return text.encode("utf-8", "surrogatepass")


def _dumps(value: Any) -> str:
    """json.dumps without its limits of depth and of digits."""
    parts: list[str] = []
    stack: list[Any] = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, _Raw):
            parts.append(item)
        elif isinstance(item, dict):
            stack.append(_Raw("}"))
            for number, (key, inner) in reversed(list(enumerate(item.items()))):
                stack += [inner, _Raw(f"{', ' if number else ''}{json.dumps(str(key))}: ")]
            stack.append(_Raw("{"))
        elif isinstance(item, list | tuple):
            stack.append(_Raw("]"))
            for number, inner in reversed(list(enumerate(item))):
                stack += [inner, _Raw(", " if number else "")]
            stack.append(_Raw("["))
        else:
            parts.append(json.dumps(item))
    return "".join(parts)


class _Raw(str):
    """Text that is written as it is."""


def damaged_safetensors(raw: bytes, rng: random.Random) -> bytes:
    """A safetensors file with another header, another length of it, or other bytes."""
    length = int.from_bytes(raw[:8], "little")
    header, data = raw[8 : 8 + length], raw[8 + length :]
    luck = rng.random()
    if luck < 0.6:
        header = json_text(damaged_json(json.loads(header), rng), rng)
        header += b" " * (-len(header) % 8)
        length = len(header)
    elif luck < 0.7:
        length = rng.choice((0, 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1, length - 8, length + 8))
    elif luck < 0.8:
        data = rng.choice((data[:-1], data + b"\0", data * 2, b""))
    else:
        return damaged_bytes(raw, rng)
    return max(length, 0).to_bytes(8, "little") + header + data
