"""A text stands where documents stood in training, for prompts, tasks and exported tokenizers; choices are in place."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizer_zoo as zoo
import tokenizers
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from lmcore.data.stream import TokenStream
from lmcore.data.surroundings import opening_of_data, opening_of_tokenizer
from lmcore.data.tokenizer import Tokenizer
from lmcore.inference.export import _hf_documents
from lmcore.inference.generate import _encode
from lmcore.inference.tasks import log_likelihoods
from tests.inference.tiny import small_config, small_loaded, small_model

PAIRS = [
    ("the river and", " stone"),
    ("the river and ", "stone"),
    ("Question: where?\nAnswer:", " over there"),
    ("", "the stone"),
    ("don", "'t"),
    ("Gr\u00f6", "\u00dfe sang"),
]


def bert_like(name: str) -> Tokenizer:
    """A tokenizer of the zoo whose post-processor puts its first and second control token around a text."""
    made = zoo.tokenizer(name)
    loaded = tokenizers.Tokenizer.from_str(json.dumps(made.definition))
    first, last = (number for number in sorted(made.control_ids)[:2])
    mark, end = made.reference.id_to_token(first), made.reference.id_to_token(last)
    loaded.post_processor = processors.TemplateProcessing(
        single=f"{mark} $A {end}", pair=f"{mark} $A {end} $B {end}", special_tokens=[(mark, first), (end, last)]
    )
    return Tokenizer(json.loads(loaded.to_str()), name=name)


def test_documents_that_begin_with_bos_are_seen_in_the_tokens() -> None:
    tokenizer = zoo.tokenizer("byte level")
    assert tokenizer.bos_id is not None
    documents = [tokenizer.encode(text) for text in ("the river", "stone", "water ran")] * 20
    bare = [token for ids in documents for token in [*ids, tokenizer.eos_id]]
    framed = [token for ids in documents for token in [tokenizer.bos_id, *ids, tokenizer.eos_id]]
    stray = [tokenizer.bos_id, *bare, tokenizer.bos_id, *bare]
    for tokens, expected in ((bare, ()), (framed, (tokenizer.bos_id,)), (stray, ())):
        assert opening_of_data(TokenStream.from_array(np.array(tokens)), tokenizer) == expected


@pytest.mark.parametrize("name", ["byte level", "SentencePiece BPE", "Unigram", "WordPiece", "words"])
def test_the_post_processor_tells_what_a_model_of_its_program_saw(name: str) -> None:
    assert opening_of_tokenizer(zoo.tokenizer(name)) == ()
    assert opening_of_tokenizer(bert_like(name)) == (min(zoo.tokenizer(name).control_ids),)


@pytest.mark.parametrize("opening", [(), (0,)])
@pytest.mark.parametrize("name", ["byte level", "SentencePiece BPE", "Unigram", "WordPiece", "words"])
def test_an_exported_tokenizer_gives_the_ids_of_our_prompts(
    name: str, opening: tuple[int, ...], tmp_path: Path
) -> None:
    """By transformers, from the exported files alone, whatever the post-processor of the original adds."""
    for tokenizer in (Tokenizer(zoo.tokenizer(name).definition, name=name), bert_like(name)):
        tokenizer.opening = opening
        loaded = dataclasses.replace(
            small_loaded(), model=small_model(small_config(tokenizer.vocab_size)), tokenizer=tokenizer
        )
        for file, content in _hf_documents(loaded, "llama", "fp32").items():
            (tmp_path / file).write_bytes(content)
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        for text in ("the river and stone", "water", "old \u65e5"):
            assert list(theirs(text).input_ids) == _encode(tokenizer, text, tokenizer.vocab_size), text
        assert theirs.bos_token_id == (opening[0] if opening else tokenizer.eos_id)
        same = opening_of_tokenizer(tokenizer) == opening and name in zoo.ALL
        exact = (tmp_path / "tokenizer.json").read_bytes() == tokenizer.to_json()
        assert exact == (same and tokenizer.definition["post_processor"] is None)


@pytest.mark.parametrize("opening", [(), (0,)])
@pytest.mark.parametrize("name", zoo.ALL)
def test_a_continuation_is_scored_in_place(name: str, opening: tuple[int, ...]) -> None:
    """One forward pass over the ids of the whole text; the continuation is what the context alone does not have."""
    tokenizer = Tokenizer(zoo.tokenizer(name).definition, name=name)
    tokenizer.opening = opening
    model = small_model(small_config(tokenizer.vocab_size, context_length=64))
    loaded: Any = dataclasses.replace(small_loaded(), model=model, tokenizer=tokenizer)
    for (context, continuation), (total, greedy) in zip(PAIRS, log_likelihoods(loaded, PAIRS), strict=True):
        whole, alone = tokenizer.encode(context + continuation), tokenizer.encode(context)
        shared = 0
        while shared < min(len(whole) - 1, len(alone)) and whole[shared] == alone[shared]:
            shared += 1
        tokens = [*opening, *whole] if opening or shared else [tokenizer.eos_id, *whole]
        count = len(whole) - shared
        with torch.no_grad():
            scores = model(torch.tensor([tokens[:-1]]))[0].log_softmax(-1)[-count:]
        targets = torch.tensor(tokens[-count:])
        assert total == pytest.approx(float(scores.gather(-1, targets[:, None]).sum()), abs=1e-6), context
        assert greedy == bool((scores.argmax(-1) == targets).all())
