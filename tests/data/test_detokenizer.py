"""What ids stand for, for every class of tokenizer, against the library: texts, bytes, streams, control tokens."""

from __future__ import annotations

import json

import pytest
import tokenizer_zoo as zoo
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.data.detokenizer import Detokenizer
from lmcore.data.tokenizer import Tokenizer

TEXTS = st.text(
    st.sampled_from("ab the\u00e9e\u0301\u65e5\n\t12.'<>[]/sS|\u2581\u0120\U0001f600\x00\u00a0"), max_size=30
)


@pytest.mark.parametrize("name", zoo.LOSSLESS)
def test_bytes_of_the_ids_are_the_bytes_of_the_text(name: str) -> None:
    tokenizer = zoo.tokenizer(name)
    assert tokenizer.lossless
    table = tokenizer.token_bytes()

    @settings(max_examples=60, derandomize=True, deadline=None)
    @given(TEXTS)
    def holds(text: str) -> None:
        ids = tokenizer.encode(text)
        assert b"".join(table[number] for number in ids) == text.encode()
        assert tokenizer.decode(ids) == text

    holds()
    for text in zoo.HARD:
        holds.hypothesis.inner_test(text)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", zoo.OTHERS)
def test_a_tokenizer_that_loses_something_says_so(name: str) -> None:
    """Each of them has a text whose ids do not add up to it, so none may be called lossless."""
    tokenizer = zoo.tokenizer(name)
    assert not tokenizer.lossless
    table = tokenizer.token_bytes()
    texts = [*zoo.HARD, "The river", "a \u0120the b", "the  river runs"]
    assert any(b"".join(table[n] for n in tokenizer.encode(text)) != text.encode() for text in texts)


@pytest.mark.parametrize("name", zoo.ALL)
def test_a_continuation_is_spelled_as_the_library_decodes_it(name: str) -> None:
    """Text of context and continuation together, minus the text of the context: by the library, not by our table."""
    tokenizer = zoo.tokenizer(name)
    library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.definition))
    if library.decoder is None and name.startswith("byte level"):
        library.decoder = tokenizers.decoders.ByteLevel()
    texts = [
        "the river and stone",
        "old water, the stone. Is there",
        "Gr\u00f6\u00dfe \u65e5\u672c\u8a9e sang",
        "time 12",
    ]
    for text in texts:
        ids = tokenizer.encode(text)
        for cut in (0, 1, len(ids) // 2):
            speller = tokenizer.speller(ids[:cut])
            raw = b"".join(speller(number) for number in ids[cut:])
            whole, before = library.decode(ids), library.decode(ids[:cut])
            if "\ufffd" in before or not whole.startswith(before):
                continue  # cut inside a character or a word with a mark at its end
            assert raw.decode() == whole[len(before) :], (text, cut)


@pytest.mark.parametrize("name", zoo.ALL)
def test_control_tokens_have_no_bytes_and_other_added_tokens_are_visible(name: str) -> None:
    tokenizer = zoo.tokenizer(name)
    table = tokenizer.token_bytes()
    for number, token in tokenizer.reference.get_added_tokens_decoder().items():
        hidden = token.special or number in (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id)
        assert (table[number] == b"") == hidden
    assert table[tokenizer.eos_id] == b""


def test_the_kind_is_found_by_what_the_library_does() -> None:
    def kind(name: str) -> str:
        made = zoo.tokenizer(name)
        return Detokenizer(made.definition, made.reference, made.control_ids, made.vocab_size).kind

    assert {kind(name) for name in zoo.ALL if name.startswith("byte level")} == {"bytes"}
    others = [name for name in zoo.ALL if not name.startswith("byte level")]
    assert {name for name in others if kind(name) != "pieces"} == {"BPE with word ends"}
    assert kind("BPE with word ends") == "context"


def test_a_long_text_is_spelled_by_decoding_a_window_of_it() -> None:
    tokenizer = zoo.tokenizer("BPE with word ends")
    text = "the river and the stone were old " * 30
    ids = tokenizer.encode(text)
    speller = tokenizer.speller()
    assert b"".join(map(speller, ids)).decode().split() == text.split()


@pytest.mark.parametrize("name", zoo.ALL)
def test_no_text_becomes_a_control_token(name: str) -> None:
    tokenizer = zoo.tokenizer(name)
    marks = [str(tokenizer.reference.id_to_token(number)) for number in sorted(tokenizer.control_ids)]
    unknown = tokenizer.reference.token_to_id(tokenizer.definition["model"].get("unk_token") or "<unk>")
    for mark in marks:
        for text in (mark, f"a {mark} b", f"the{mark}stone", mark * 3, f" {mark}\n", f"<0x0A>{mark}"):
            ids = tokenizer.encode(text)
            assert tokenizer.control_ids.isdisjoint(set(ids) - {unknown}), text
            assert tokenizer.encode_batch([text]) == [ids]
    assert tokenizer.encode("the river") == [
        *tokenizers.Tokenizer.from_str(json.dumps(tokenizer.definition | _without_dropout(tokenizer)))
        .encode("the river", add_special_tokens=False)
        .ids
    ]


def _without_dropout(tokenizer: Tokenizer) -> dict[str, object]:
    return {"model": tokenizer.definition["model"] | {"dropout": None}}


def test_marks_become_control_tokens_where_they_are_asked_for() -> None:
    tokenizer = zoo.tokenizer("byte level, marks that are not special")
    think, eos = (tokenizer.reference.token_to_id(text) for text in ("<think>", "</s>"))
    assert tokenizer.encode("<think>the</s>", control=True)[:: len(tokenizer.encode("the")) + 1] == [think, eos]
    assert not {think, eos} & set(tokenizer.encode("<think>the</s>"))
    assert tokenizer.encode("a    b") == tokenizer.encode("a    b", control=True)  # an added run of blanks is text
    assert tokenizer.decode([think]) == "<think>"
    assert tokenizer.decode([eos]) == ""


@pytest.mark.parametrize("name", ["Unigram with bytes", "SentencePiece BPE"])
def test_the_name_of_a_byte_is_text(name: str) -> None:
    tokenizer = zoo.tokenizer(name)
    byte = tokenizer.reference.token_to_id("<0xF0>")
    assert byte not in tokenizer.encode("x <0xF0> y")
    assert byte in tokenizer.encode("x \U0001f600 y")
    assert tokenizer.decode(tokenizer.encode("x <0xF0> y")) == "x <0xF0> y"
