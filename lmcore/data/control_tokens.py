"""Control tokens, and the same tokenizer without them: a document's text can never become one.

A control token steers (end of text, padding, roles of a chat); it is put between texts by a program and stands for no
text. The library keeps special tokens out of a text when it is asked to (`encode_special_tokens`), but only where it
splits the text at added tokens. The model behind may still give the same id, because the piece is in its own
vocabulary: Unigram finds `</s>` on its best path, WordLevel looks the word up, BPE with `ignore_merges` takes a word
that is in the vocabulary as it is. And added tokens without the special mark are always found.

So documents are encoded by a copy of the tokenizer (`without_control`) in which each control token has a name that no
text can hold. Its ids stay where they are, and every other text is encoded as before.
"""

from __future__ import annotations

import copy
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How vocabularies with byte fallback name a byte."""
_MARKUP = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|<\|.+\|>", re.DOTALL)


def control_ids(added: Iterable[tuple[int, str, bool]], named: Iterable[int | None]) -> frozenset[int]:
    """Ids that no text stands for. added: (id, content, special) of the added tokens; named: EOS, BOS, padding.

    An added token without the special mark is one when it is written as a mark (`<|im_start|>`, `</think>`,
    `[TOOL]`); others, such as runs of blanks, are pieces of text.
    """
    marks = {number for number, content, special in added if special or _MARKUP.fullmatch(content)}
    return frozenset(marks | {number for number in named if number is not None})


def without_control(
    definition: dict[str, Any], control: frozenset[int], ids_of: Mapping[str, int]
) -> dict[str, Any] | None:
    """The definition for encoding documents, None when `encode_special_tokens` alone keeps control tokens out.

    definition: a tokenizer.json that the library loads. ids_of: the ids that the library gives to added tokens. The
    result encodes only: it has no decoder.
    """
    model = definition["model"]
    vocabulary = model["vocab"]
    byte_fallback = bool(model.get("byte_fallback"))
    is_list = isinstance(vocabulary, list)  # of [piece, score], as Unigram has it
    names = {piece: number for number, (piece, _) in enumerate(vocabulary)} if is_list else vocabulary
    added = definition.get("added_tokens") or []
    texts = {token["content"] for token in added if ids_of.get(token["content"]) in control}
    pieces = {
        piece
        for piece, number in names.items()
        if number in control and not (byte_fallback and BYTE_TOKEN.fullmatch(piece))
    }
    split_bytes = byte_fallback and (is_list or bool(model.get("ignore_merges")))
    plain = all(token.get("special") for token in added if token["content"] in texts)
    plain &= not any(_reachable(model, piece) for piece in pieces)
    if plain and not split_bytes:
        return None

    # Random, so that nobody can write a text that holds it.
    secret = secrets.token_hex(16)
    new = {text: f"\ufdd0{secret}\ufdd0{number}" for number, text in enumerate(sorted(texts | pieces))}
    result = copy.copy(definition)
    result["model"] = model = copy.copy(model)
    if is_list:
        model["vocab"] = [[new[p] if p in pieces else p, score] for p, score in vocabulary]
    else:
        model["vocab"] = {new[p] if p in pieces else p: number for p, number in vocabulary.items()}
    if model.get("merges"):
        model["merges"] = [merge for merge in model["merges"] if pieces.isdisjoint(_parts_and_product(model, merge))]
    if model.get("unk_token") in pieces:
        model["unk_token"] = new[model["unk_token"]]
    result["added_tokens"] = [
        token | {"content": new[token["content"]]} if token["content"] in texts else token for token in added
    ]
    result["post_processor"] = result["decoder"] = None
    if split_bytes:
        result["pre_tokenizer"] = _then_split_byte_names(definition.get("pre_tokenizer"))
    return result


def _reachable(model: dict[str, Any], piece: str) -> bool:
    """Whether the model may give this piece of its vocabulary for a text that holds it."""
    if isinstance(model["vocab"], list) or "merges" not in model or model.get("ignore_merges") or len(piece) == 1:
        return True
    return any(piece == _parts_and_product(model, merge)[2] for merge in model["merges"])


def _parts_and_product(model: dict[str, Any], merge: str | list[str]) -> tuple[str, str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right, left + right.removeprefix(model.get("continuing_subword_prefix") or "")


def _then_split_byte_names(pre_tokenizer: dict[str, Any] | None) -> dict[str, Any]:
    """The text `<0x0A>` is cut behind its first character, since the model would take it for the byte."""
    split = {
        "type": "Split",
        "pattern": {"Regex": "<(?=0x[0-9A-Fa-f]{2}>)"},
        "behavior": "Isolated",
        "invert": False,
    }
    steps = [] if pre_tokenizer is None else [pre_tokenizer]
    return {"type": "Sequence", "pretokenizers": [*steps, split]}
