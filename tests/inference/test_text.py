"""Streaming text: concatenated pieces are the decoded text, no piece holds half a character, stop texts never show."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.inference.text import TextStream

BYTES = [*(bytes([value]) for value in range(256)), b""].__getitem__  # one token per byte, and a special token


def run(stream: TextStream, data: bytes) -> tuple[list[str], str]:
    pieces = []
    for value in data:
        pieces.append(stream.push(value))
        if stream.stopped:
            break
    return pieces, "".join(pieces) + stream.finish()


@settings(derandomize=True, max_examples=200)
@given(st.text(max_size=40))
def test_pieces_add_up_and_characters_are_whole(text: str) -> None:
    pieces, whole = run(TextStream(BYTES), text.encode())
    assert whole == text == "".join(pieces)


def test_a_character_appears_with_its_last_byte() -> None:
    stream = TextStream(BYTES)
    assert [stream.push(value) for value in "h\u00e9\U0001f600".encode()] == [
        "h",
        "",
        "\u00e9",
        "",
        "",
        "",
        "\U0001f600",
    ]


def test_an_unfinished_character_at_the_end_is_dropped() -> None:
    assert run(TextStream(BYTES), "ab\u20ac".encode()[:-1])[1] == "ab"


def test_bytes_that_are_no_text_become_replacement_characters() -> None:
    assert run(TextStream(BYTES), b"a\xff\xfeb")[1] == "a\ufffd\ufffdb"
    assert run(TextStream(BYTES), b"a\xe2\x82b")[1] == "a\ufffdb"


def test_special_tokens_are_invisible() -> None:
    stream = TextStream(BYTES)
    assert stream.push(256) + stream.push(65) + stream.finish() == "A"


@pytest.mark.parametrize(
    ("text", "stops", "expected", "stopped"),
    [
        ("hello world", ["wor"], "hello ", True),
        ("hello wo", ["wor"], "hello wo", False),  # only the beginning of a stop text came
        ("aab", ["ab"], "a", True),
        ("abcabd", ["abd"], "abc", True),
        ("one\n\ntwo", ["two", "\n\n"], "one", True),
        ("caf\u00e9 x", ["\u00e9"], "caf", True),
        ("nothing", [""], "nothing", False),
    ],
)
def test_stop_texts(text: str, stops: list[str], expected: str, stopped: bool) -> None:
    stream = TextStream(BYTES, stops)
    pieces, whole = run(stream, text.encode())
    assert whole == expected
    assert stream.stopped is stopped
    assert expected.startswith("".join(pieces))
    assert stream.push(65) == "" or not stopped


@settings(derandomize=True, max_examples=300)
@given(st.text(alphabet="ab", max_size=12), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_stop_texts_cut_where_the_first_one_completes(text: str, stops: list[str]) -> None:
    """Reference: read character by character; at the first stop text that is complete, cut at its beginning."""
    expected = text
    for end in range(1, len(text) + 1):
        begins = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if begins:
            expected = text[: min(begins)]
            break
    assert run(TextStream(BYTES, stops), text.encode())[1] == expected
