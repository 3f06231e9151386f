"""The fast encoder gives the library's ids for every form of tokenizer that it is trusted with, made at random."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import numpy as np
import pytest
import tokenizer_zoo as zoo
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from lmcore.data import fast_path
from lmcore.data.documents import join
from lmcore.data.encoder import TORTURE, GigatokenEncoder, Mismatch, ReferenceEncoder, open_encoder
from lmcore.data.tokenizer import Tokenizer

pytest.importorskip("gigatoken", reason="no wheel for this platform")

WORDS = ["a", "b", "the", "river", "RIVER", "\u01c5", "\u02b0", "\u00e9", "e\u0301", "\u65e5", "\U0001e900", "q" * 40]
OTHERS = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "1", "23", "\u2160", "\u00b2", "'s", "'S", "'\u017f", ".", "-", "/"]
MARKS = ["</s>", "<s>", "<think>", "<0x0A>", "\u2581", "\u0120", "\U0001f600", "\u0378", "\u0e33"]
NEWER = ["\u1e9b\u0323", "\u07fd", "\u1df6\u0301", "\U00011935\U00011930"]
PIECES = [*WORDS, *OTHERS, *MARKS, *NEWER]
CONTENTS = ["river", "riv", "  ", "    ", "the", "a b", "\u00e9", "\u65e5\u672c", "ver", "1", "\n\n"]

CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s+"
)
"""As tiktoken writes it: gigatoken loads it and cuts runs of digits in another way than the library."""


def random_tokenizer(rng: random.Random) -> Tokenizer:
    """Of a form that is listed, or next to one: the table decides which."""
    byte_fallback = rng.random() < 0.25
    if byte_fallback:
        definition = zoo.ALL[rng.choice(["SentencePiece BPE", "SentencePiece BPE without prefix"])]()
    else:
        made = tokenizers.Tokenizer(models.BPE(ignore_merges=rng.random() < 0.3, dropout=rng.choice([None, None, 0.3])))
        made.normalizer = rng.choice([None, None, normalizers.NFC(), normalizers.NFKC(), normalizers.Lowercase()])
        pattern = rng.choice([*sorted(fast_path._PATTERNS), CL100K, r"\w+|\W+", r" ?\p{L}+|.", r"\p{N}{1,2}|\D+"])
        split = pre_tokenizers.Split(
            Regex(pattern), rng.choice(["isolated", "isolated", "removed", "merged_with_next"])
        )
        alone = pre_tokenizers.ByteLevel(add_prefix_space=rng.random() < 0.4, use_regex=rng.random() < 0.8)
        behind = pre_tokenizers.ByteLevel(add_prefix_space=rng.random() < 0.1, use_regex=rng.random() < 0.1)
        made.pre_tokenizer = alone if rng.random() < 0.4 else pre_tokenizers.Sequence([split, behind])
        made.decoder = decoders.ByteLevel()
        made.train_from_iterator(
            [*zoo.CORPUS, "".join(rng.choices(PIECES, k=300))],
            trainers.BpeTrainer(
                vocab_size=rng.choice([260, 300, 400]),
                special_tokens=["</s>", "<s>"],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        definition = json.loads(made.to_str())
    loaded = tokenizers.Tokenizer.from_str(json.dumps(definition))
    flags: dict[str, Any] = {"lstrip": False, "rstrip": False, "single_word": False}
    if rng.random() < 0.2:
        flags[rng.choice(list(flags))] = True
    loaded.add_tokens(
        [
            AddedToken(text, normalized=rng.random() < 0.5, **flags)
            for text in rng.sample(CONTENTS, rng.choice([0, 0, 1, 2, 4]))
        ]
    )
    return Tokenizer(json.loads(loaded.to_str()), name="random")


def differing(tokenizer: Tokenizer, fast: GigatokenEncoder, texts: list[str]) -> list[str]:
    data, offsets = join([text.encode() for text in texts])
    expected, found = ReferenceEncoder(tokenizer)(data, offsets), fast(data, offsets)
    cuts = [list(itertools.pairwise(part[1].tolist())) for part in (expected, found)]
    return [
        text
        for text, (a, b), (c, d) in zip(texts, *cuts, strict=True)
        if not np.array_equal(expected[0][a:b], found[0][c:d])
    ]


def random_texts(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices(PIECES, k=rng.randrange(1, 25))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(12))
def test_what_the_table_accepts_gives_the_library_s_ids(seed: int) -> None:
    rng = random.Random(seed)
    proven = 0
    while proven < 5:
        tokenizer = random_tokenizer(rng)
        try:
            fast = GigatokenEncoder(tokenizer)
        except Mismatch:
            continue
        proven += 1
        assert differing(tokenizer, fast, [*TORTURE, *random_texts(rng, 300)]) == [], tokenizer.definition


def test_the_table_is_needed() -> None:
    """Without it gigatoken gives other ids in silence, on texts that a sample need not hold."""
    made = zoo.ALL["byte level"]()
    loaded = tokenizers.Tokenizer.from_str(json.dumps(made))
    loaded.add_tokens([AddedToken("river", single_word=True, normalized=False)])
    tokenizer = Tokenizer(json.loads(loaded.to_str()), name="single word")
    assert fast_path.why_not(tokenizer.definition) == "added tokens that take blanks or stand alone"
    stage = open_encoder(tokenizer, "auto", None)
    assert stage.record.name == "tokenizers"
    assert "MB/s" in stage.record.fallback
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_path, "why_not", lambda definition: "")
        assert differing(tokenizer, GigatokenEncoder(tokenizer), ["rivers", "driver", "a river"]) == [
            "rivers",
            "driver",
        ]


def test_documents_with_unproven_characters_go_to_the_reference_one_by_one() -> None:
    tokenizer = zoo.tokenizer("byte level, NFC")
    fast = GigatokenEncoder(tokenizer)
    newer = "e\u0301\u1df6 \u1df6\u0301"  # the library's tables are older than this mark
    texts = ["the river", newer, "", "caf\u00e9 cafe\u0301", "x" + newer, newer + "y", "\u65e5\u672c", newer]
    assert differing(tokenizer, fast, texts) == []
    data, offsets = join([text.encode() for text in texts])
    assert fast._unproven is not None
    assert fast._unproven.documents(data, offsets).tolist() == [1, 4, 5, 7]
    assert fast._unproven.documents(data, offsets[3:]).tolist() == [1, 2, 4]
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    found = fast._unproven.documents(*join([character.encode() for character in every]))
    assert [ord(every[k]) for k in found] == np.flatnonzero(fast._unproven._codes).tolist()
    fast._unproven = None
    assert set(differing(tokenizer, fast, texts)) == {text for text in texts if newer in text}


FORMS = ["ByteLevel", "NFC", *sorted(fast_path._PATTERNS)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("form", FORMS, ids=["words", "NFC", *(f"pattern {k}" for k in range(len(FORMS) - 2))])
def test_every_character_of_unicode_is_treated_alike(form: str) -> None:
    """Each in the places that tell its class: between letters, digits, cases, blanks, marks, after an apostrophe."""
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC() if form == "NFC" else None
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = [] if form in FORMS[:2] else [pre_tokenizers.Split(Regex(form), "isolated"), bare]
    made.pre_tokenizer = pre_tokenizers.Sequence(split) if split else words
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        zoo.CORPUS,
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = Tokenizer(json.loads(made.to_str()), name=form)
    fast = GigatokenEncoder(tokenizer)
    contexts = ["a{0}a1{0}1 {0} {0}{0}.{0}'s\n{0}A{0}b{0}Ab{0}A '{0} 'l{0} e\u0301{0}\u0301"]
    if form == "NFC":
        contexts += [
            "e{0}\u0301|e{0}\u0323|e{0}\u0327|e{0}\u093c|e{0}\u3099|e\u0301{0}|e\u0315{0}|e\u0345{0}|\u1100{0}\u11a8"
        ]
    codes = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for begin in range(0, len(codes), 50_000):
        texts = ["".join(c.format(chr(code)) for c in contexts) for code in codes[begin : begin + 50_000]]
        assert differing(tokenizer, fast, texts) == []
