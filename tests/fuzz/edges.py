"""Damage for files whose headers and footers decide: they are hit more often than what lies between."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

Damage = Callable[[bytearray, random.Random], None]


def _place(data: bytearray, rng: random.Random) -> int:
    """Headers and footers are hit more often than what lies between."""
    edge = min(len(data), 96)
    choice = rng.random()
    if choice < 0.35:
        return rng.randrange(edge)
    return len(data) - 1 - rng.randrange(edge) if choice < 0.6 else rng.randrange(len(data))


def flip(data: bytearray, rng: random.Random) -> None:
    """One bit, or one byte, is another."""
    at = _place(data, rng)
    data[at] = rng.randrange(256) if rng.random() < 0.5 else data[at] ^ (1 << rng.randrange(8))


def cut(data: bytearray, rng: random.Random) -> None:
    """A stretch is missing: at the end, at the beginning, or inside."""
    if rng.random() < 0.4:
        del data[rng.randrange(len(data)) :]
    else:
        at = _place(data, rng)
        del data[at : at + rng.choice((1, 2, 7, 64, 4096))]


def double(data: bytearray, rng: random.Random) -> None:
    """A stretch, or all of it, is there twice."""
    if rng.random() < 0.2:
        data += bytes(data)
        return
    at, size = _place(data, rng), rng.choice((1, 4, 8, 100, 1000))
    data[at:at] = data[at : at + size]


def number(data: bytearray, rng: random.Random) -> None:
    """A length of 4 or 8 bytes is zero, negative, huge, or one off."""
    at = _place(data, rng)
    kind = rng.choice(("<i", "<q", ">i"))
    value = rng.choice((0, -1, 1, 2**31 - 1, -(2**31), 65_536, 10**9))
    raw = struct.pack(kind, value)
    data[at : at + len(raw)] = raw


def fill(data: bytearray, rng: random.Random) -> None:
    """A stretch is one byte over and over, as a disk leaves it."""
    at, size = _place(data, rng), rng.choice((4, 64, 512))
    data[at : at + size] = bytes([rng.choice((0, 255, 32))]) * len(data[at : at + size])


def insert(data: bytearray, rng: random.Random) -> None:
    """Text of a format stands where it does not belong."""
    tokens = (b"{", b"}", b"[" * 2000, b'"', b"\n", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"null", b"-1", b"9" * 5000)
    at = _place(data, rng)
    data[at:at] = rng.choice(tokens)


EVERY: tuple[Damage, ...] = (flip, flip, flip, cut, double, number, number, fill, insert)


def damaged_edges(sound: bytes, rng: random.Random) -> bytes:
    """A file with one to four faults."""
    data = bytearray(sound)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if data:
            rng.choice(EVERY)(data, rng)
    return bytes(data)
