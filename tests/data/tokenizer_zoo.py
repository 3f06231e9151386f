"""Small tokenizers of every class that people bring, each as the programs that made them write it, and hard texts."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from lmcore.data.tokenizer import Tokenizer

WORDS = (
    "the river and the stone were old, the water ran over them and sang. It isn't far; we've been there 12 times. "
    "Gr\u00f6\u00dfe na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \u0440\u0435\u043a\u0430 x = f(y)\n\tif a: return 'b'\n"
)
CORPUS = [WORDS * 3, WORDS.upper(), "stone water river old sang over were there been far time " * 5]

HARD = (
    "",
    " ",
    "the river",
    " the river",
    "  two  blanks ",
    "\n\n lines \n",
    "caf\u00e9 cafe\u0301 \u1e9b\u0323 \u212b \ufb01",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "a\x00b\x00",
    "\u2028\u00a0\u3000\ufeff",
    "q" * 3000,
    "don't \u2581 ##ing \u0120the </w> <0x0A> <0xZZ>",
    "<s></s><unk><pad>[CLS][SEP][UNK][PAD]<|endoftext|><think>x</think>",
)

GPT2_CASED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bytes(
    *,
    normalizer: Any = None,
    pre: Any = None,
    decoder: Any = True,
    alphabet: bool = True,
    added: tuple[AddedToken, ...] = (),
    **model: Any,
) -> dict[str, Any]:
    made = tokenizers.Tokenizer(models.BPE(**model))
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    if decoder:
        made.decoder = decoders.ByteLevel()
    start = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<s>", "</s>", "<unk>"], initial_alphabet=start, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens(list(added))
    return dict(json.loads(made.to_str()))


def _sentencepiece(*, prefix: bool, gemma: bool = False) -> dict[str, Any]:
    """Llama-2 and Gemma: BPE over characters, blanks written as U+2581, unknown characters as bytes."""
    specials = ["<unk>", "<s>", "</s>"]
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    blanks = normalizers.Replace(" ", "\u2581")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), blanks]) if prefix else blanks
    made.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581?[^\u2581]+|\u2581"), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[*specials, *(f"<0x{value:02X}>" for value in range(256))],
        limit_alphabet=60,
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    definition = dict(json.loads(made.to_str()))
    definition["added_tokens"] = definition["added_tokens"][: len(specials)]
    definition["pre_tokenizer"] = (
        {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        if gemma
        else None
    )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(" ", 1, 0)] if prefix else []
    made.decoder = decoders.Sequence(steps)
    definition["decoder"] = json.loads(made.to_str())["decoder"]
    return definition


def _unigram(*, byte_fallback: bool = False) -> dict[str, Any]:
    """T5: pieces with scores, a blank in front of the first word, the end of text in the vocabulary itself."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    made.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    specials = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=150, special_tokens=specials, unk_token="<unk>", show_progress=False)
    )
    definition = dict(json.loads(made.to_str()))
    if byte_fallback:
        model = definition["model"]
        model["vocab"] += [[f"<0x{value:02X}>", -20.0] for value in range(256)]
        model["byte_fallback"] = True
        made.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(replacement="\u2581", prepend_scheme="always")]
        )
        definition["decoder"] = json.loads(made.to_str())["decoder"]
    return definition


def _wordpiece() -> dict[str, Any]:
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=specials, show_progress=False)
    )
    return dict(json.loads(made.to_str()))


def _words(*, declared: bool) -> dict[str, Any]:
    """Whole words; `declared`: the control tokens are added tokens, else they stand in the vocabulary alone."""
    made = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    made.train_from_iterator(
        CORPUS, trainers.WordLevelTrainer(vocab_size=100, special_tokens=specials, show_progress=False)
    )
    definition = dict(json.loads(made.to_str()))
    if not declared:
        definition["added_tokens"] = []
    return definition


def _suffix() -> dict[str, Any]:
    """The oldest form of BPE: words end with a mark."""
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.BPEDecoder(suffix="</w>")
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=150, special_tokens=["<unk>", "</s>"], end_of_word_suffix="</w>", show_progress=False
        ),
    )
    return dict(json.loads(made.to_str()))


def _marked(definition: dict[str, Any]) -> dict[str, Any]:
    """Its end of text is an added token without the special mark, and so is one for thoughts."""
    size = 1 + max(definition["model"]["vocab"].values())
    added = [dict(token, special=False) for token in definition["added_tokens"]]
    rest = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    more = [rest | {"id": size + k, "content": text} for k, text in enumerate(("<think>", "</think>", "    "))]
    return definition | {"added_tokens": added + more}


LOSSLESS: dict[str, Callable[[], dict[str, Any]]] = {
    "byte level": _bytes,
    "byte level, own pattern": lambda: _bytes(
        pre=pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(GPT2_CASED), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    ),
    "byte level, digits": lambda: _bytes(
        pre=pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "byte level without decoder": lambda: _bytes(decoder=False),
    "byte level, words as they are": lambda: _bytes(ignore_merges=True),
    "byte level, merges left to chance": lambda: _bytes(dropout=0.5),
    "byte level, added words": lambda: _bytes(added=(AddedToken("river", normalized=False), AddedToken("    "))),
    "byte level, marks that are not special": lambda: _marked(_bytes()),
}
OTHERS: dict[str, Callable[[], dict[str, Any]]] = {
    "byte level, NFC": lambda: _bytes(normalizer=normalizers.NFC()),
    "byte level, lower case": lambda: _bytes(normalizer=normalizers.Lowercase()),
    "byte level, blank in front": lambda: _bytes(pre=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "byte level, bytes missing": lambda: _bytes(alphabet=False),
    "byte level, blanks dropped": lambda: _bytes(
        pre=pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "byte level, added tokens that strip": lambda: _bytes(
        added=(AddedToken("river", lstrip=True, rstrip=True, normalized=False),)
    ),
    "byte level, an added word spelled like a piece": lambda: _bytes(
        added=(AddedToken("\u0120the", normalized=False),)
    ),
    "SentencePiece BPE": lambda: _sentencepiece(prefix=True),
    "SentencePiece BPE without prefix": lambda: _sentencepiece(prefix=False, gemma=True),
    "Unigram": _unigram,
    "Unigram with bytes": lambda: _unigram(byte_fallback=True),
    "WordPiece": _wordpiece,
    "words": lambda: _words(declared=True),
    "words, control tokens undeclared": lambda: _words(declared=False),
    "BPE with word ends": _suffix,
}
ALL = LOSSLESS | OTHERS


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    """One of the zoo, loaded."""
    return Tokenizer(ALL[name](), name=name)
