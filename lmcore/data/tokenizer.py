"""The tokenizer: text <-> ids, the raw bytes behind every id, and an identity that a run can be bound to.

A `Tokenizer` wraps one `tokenizer.json` of the `tokenizers` library, which is the definition of right ids here; the
fast encoder (encoder.py) is checked against it. Three rules that the library alone does not give:

- The text of a control token inside a document is ordinary text (control_tokens.py). Only the writer puts an EOS
  between documents.
- `token_bytes` are the bytes that an id stands for inside a text (detokenizer.py), never decoded strings: a character
  may be spread over several ids, each of them undecodable by itself. Whether they add up to the text is `lossless`.
- The identity is the sha256 of the canonical JSON (sorted keys, ASCII, truncation and padding removed), so it survives
  another indentation or another version of the library.

Left out: encoding at speed (encoder.py), fetching from the Hub (hub.py).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tokenizers
from pydantic import Field
from tokenizers import decoders, models, pre_tokenizers, trainers

from lmcore import storage
from lmcore.data.control_tokens import control_ids, without_control
from lmcore.data.detokenizer import Detokenizer, Speller, byte_alphabet, is_byte_level
from lmcore.data.manifest import MANIFEST, TokenizerEntry
from lmcore.errors import Exit, LmError
from lmcore.records import Count, Recorded, as_record, read_record

EOS = "<|endoftext|>"
CONFIG = "tokenizer_config.json"

MAX_JSON_BYTES = 256 << 20
_MIN_TRAINED = 257  # 256 bytes and EOS
_MAX_TRAINED = 1 << 20
_MAX_VOCABULARY = 1 << 24
_LARGEST_GAP = 1 << 16
_EOS_NAMES = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "<|eot_id|>", "[SEP]")
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "[BOS]", "<|startoftext|>", "[CLS]")
_PAD_NAMES = ("<|padding|>", "<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>")


class Tokenizer:
    """Text <-> ids. Make one with `load`, `from_file`, `train` or `byte`.

    name: how people call it. vocab_size: ids are below this, added tokens included. eos_id: ends every document.
    bos_id, pad_id: None when the vocabulary has none. sha256: identity of the canonical JSON.
    """

    opening: tuple[int, ...] = ()
    """Ids in front of every document in the training of the model that this was loaded with (surroundings.py)."""

    def __init__(self, definition: dict[str, Any], *, name: str, eos: str | None = None) -> None:
        """definition: the parsed tokenizer.json. eos: text of the token that ends a document; found by name if None."""
        _require_definition(definition, name)
        self.definition = {**definition, "truncation": None, "padding": None}
        self.name = name
        self._json = storage.canonical_json(self.definition)
        self.sha256 = hashlib.sha256(self._json).hexdigest()
        try:
            self.reference = _load(self._json)
        except Exception as error:  # the library raises plain Exception
            raise LmError(
                f"{name}: not a tokenizer.json that `tokenizers` can load ({error!s:.300}).", code=Exit.DATA
            ) from error
        vocabulary = self.reference.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise LmError(f"{name}: the vocabulary is empty.", code=Exit.DATA)
        self.max_id = max(vocabulary.values())
        self.vocab_size = self.max_id + 1
        added = self.reference.get_added_tokens_decoder()
        special_ids = frozenset(number for number, token in added.items() if token.special)
        self.eos_id = self._find_eos(vocabulary, special_ids, eos)
        self.bos_id = next((vocabulary[word] for word in _BOS_NAMES if word in vocabulary), None)
        self.pad_id = next((vocabulary[word] for word in _PAD_NAMES if word in vocabulary), None)
        named = {number for number in (self.eos_id, self.bos_id, self.pad_id) if number is not None}
        self.control_ids = control_ids(
            [(number, str(token.content), bool(token.special)) for number, token in added.items()], named
        )
        self._detokenizer = Detokenizer(self.definition, self.reference, special_ids | named, self.vocab_size)

    # ------------------------------------------------------------------------------------ making one

    @classmethod
    def load(cls, spec: str | Path, *, eos: str | None = None) -> Tokenizer:
        """A tokenizer from what a user types: `byte`, a tokenizer.json, a folder with one, or the name of a Hub model.

        `train:N` needs the corpus, so `tokenize` resolves it. Raises LmError (2) when nothing fits.
        """
        text = str(spec)
        if text == "byte":
            return cls.byte()
        if text.startswith("train:"):
            raise LmError(
                f"{text}: a tokenizer is trained while text is tokenized.",
                hint="Use: lm tokenize --tokenizer train:8192",
            )
        path = Path(text)
        if path.exists():
            return cls.from_file(path, eos=eos)
        if path.suffix == ".json" or text.startswith((".", "/", "~")) or text.count("/") > 1:
            raise LmError(
                f"{text}: no such tokenizer file.", hint="Give a tokenizer.json, a folder with one, or `byte`."
            )
        from lmcore.data import hub

        return cls.from_file(hub.fetch_tokenizer(text), name=text, eos=eos)

    @classmethod
    def from_file(cls, path: str | Path, *, name: str | None = None, eos: str | None = None) -> Tokenizer:
        """Read a tokenizer.json, or the one inside a folder. The EOS comes from the argument, else from the
        tokenizer_config.json or manifest.json beside it, else from the usual names."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise LmError(
                f"{file}: no such tokenizer file.", hint="Give a tokenizer.json, a folder with one, or `byte`."
            )
        definition = storage.read_json(file, limit=MAX_JSON_BYTES)
        _require_definition(definition, str(file))
        return cls(definition, name=name or _name_of(file), eos=eos or _configured_eos(file, definition))

    @classmethod
    @functools.cache
    def byte(cls) -> Tokenizer:
        """256 byte values (id = byte) and EOS (256), as a real tokenizer.json."""
        vocabulary = {character: value for value, character in enumerate(byte_alphabet())}
        vocabulary[EOS] = 256
        bare = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bare.decoder = decoders.ByteLevel()
        bare.add_special_tokens([EOS])
        return cls(json.loads(bare.to_str()), name="byte")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Byte-level BPE with GPT-2's word pattern and EOS as id 0. The same texts give the same tokenizer, bit for
        bit, on any number of cores. A small corpus may give fewer than `vocab_size` ids."""
        if isinstance(texts, str | bytes):
            raise LmError("Tokenizer.train takes many texts, not one.", hint="Put it into a list: [text].")
        if not _MIN_TRAINED <= vocab_size <= _MAX_TRAINED:
            raise LmError(
                f"train:{vocab_size}: the vocabulary must have {_MIN_TRAINED} (bytes and EOS) to {_MAX_TRAINED:,} ids."
            )
        bare = tokenizers.Tokenizer(models.BPE())
        bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bare.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bare.train_from_iterator((repair(text) for text in texts), trainer)
        return cls(json.loads(bare.to_str()), name=f"bpe-{bare.get_vocab_size()}")

    # ------------------------------------------------------------------------------------ text <-> ids

    def encode(self, text: str, *, control: bool = False) -> list[int]:
        """Ids of a text; no EOS is added. The text of a control token is plain text, or with `control` that token."""
        encoder = self._with_control if control else self.plain
        return list(encoder.encode(repair(text), add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str], *, control: bool = False) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        encoder = self._with_control if control else self.plain
        encodings = encoder.encode_batch_fast([repair(text) for text in texts], add_special_tokens=False)
        return [list(encoding.ids) for encoding in encodings]

    def decode(self, ids: Iterable[int], *, specials: bool = False) -> str:
        """Text of ids: exactly the text that was encoded where the tokenizer is `lossless`, else what the library makes
        of them. Bytes that are no UTF-8 (a character cut in two) become U+FFFD. Special tokens are left out unless
        `specials`."""
        numbers = [int(number) for number in ids]
        if self._detokenizer.is_bytes:
            table = self._spelled if specials else self._detokenizer.table
            return b"".join(table[number] for number in numbers if 0 <= number < self.vocab_size).decode(
                "utf-8", errors="replace"
            )
        return str(self.reference.decode(numbers, skip_special_tokens=not specials))

    def token_bytes(self) -> list[bytes]:
        """Bytes that each id adds to a text, b"" for special tokens and unused ids; a fresh list of `vocab_size`
        entries. They add up to the bytes of a text where the tokenizer is `lossless`."""
        return list(self._detokenizer.table)

    def speller(self, context: Sequence[int] = ()) -> Speller:
        """Bytes that ids add one after the other to the text of `context`; see Detokenizer.speller."""
        return self._detokenizer.speller(context)

    @property
    def lossless(self) -> bool:
        """Whether the bytes of a text's ids, joined, are the text, for every text."""
        return self._detokenizer.lossless

    @functools.cached_property
    def plain_definition(self) -> dict[str, Any] | None:
        """The tokenizer.json of `plain` where it is another one than `definition`."""
        added = self.reference.get_added_tokens_decoder()
        ids_of = {str(token.content): number for number, token in added.items()}
        return without_control(self.definition, self.control_ids, ids_of)

    @functools.cached_property
    def plain(self) -> tokenizers.Tokenizer:
        """The library's tokenizer for documents: the same ids, but none of a control token."""
        if self.plain_definition is None:
            return self.reference
        return _load(json.dumps(self.plain_definition).encode())

    @functools.cached_property
    def _with_control(self) -> tokenizers.Tokenizer:
        encoder = _load(self._json)
        encoder.encode_special_tokens = False
        return encoder

    @functools.cached_property
    def _spelled(self) -> tuple[bytes, ...]:
        text_of = {number: str(self.reference.id_to_token(number)).encode() for number in self.control_ids}
        return tuple(raw or text_of.get(number, b"") for number, raw in enumerate(self._detokenizer.table))

    # ------------------------------------------------------------------------------------ keeping it

    @property
    def eos(self) -> str:
        """The text of the EOS token."""
        return str(self.reference.id_to_token(self.eos_id))

    def to_json(self) -> bytes:
        """The canonical tokenizer.json."""
        return self._json

    def save(self, path: str | Path) -> None:
        """Write the canonical tokenizer.json durably. When its EOS could not be found by the usual names, a
        tokenizer_config.json beside it says which token it is."""
        path = Path(path)
        storage.write_file(path, self._json)
        if _usual_eos(self.reference.get_vocab(with_added_tokens=True)) != self.eos_id:
            storage.write_json(path.with_name(CONFIG), {"eos_token": self.eos})

    def entry(self) -> TokenizerEntry:
        """What a manifest says about this tokenizer."""
        return TokenizerEntry(
            name=self.name,
            sha256=self.sha256,
            vocab_size=self.vocab_size,
            eos_id=self.eos_id,
            bos_id=self.bos_id,
            pad_id=self.pad_id,
        )

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}, vocab_size={self.vocab_size}, sha256={self.sha256[:8]})"

    def _find_eos(self, vocabulary: dict[str, int], special_ids: frozenset[int], eos: str | None) -> int:
        if eos is not None:
            if eos not in vocabulary:
                raise LmError(f"{self.name}: the vocabulary has no token {eos[:80]!r} to end a document with.")
            return vocabulary[eos]
        found = _usual_eos(vocabulary)
        if found is None:
            specials = ", ".join(sorted(str(self.reference.id_to_token(n)) for n in special_ids)[:12]) or "none"
            raise LmError(
                f"{self.name}: no token that ends a document is known (special tokens: {specials}).",
                hint=f'Put a {CONFIG} beside it with {{"eos_token": "..."}}.',
            )
        return found


# ---------------------------------------------------------------------------------------- private


def repair(text: str) -> str:
    """Text that UTF-8 can hold: surrogate pairs are joined, unpaired surrogates become U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _load(definition: bytes) -> tokenizers.Tokenizer:
    """The library's object. It leaves special tokens in a text alone, and no merge to chance."""
    try:
        loaded = tokenizers.Tokenizer.from_str(definition.decode())
    except BaseException as error:  # the library panics at some definitions, which is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"it fails with: {error}") from error
    loaded.encode_special_tokens = True
    if isinstance(loaded.model, models.BPE):
        loaded.model.dropout = None
    return loaded


def _usual_eos(vocabulary: dict[str, int]) -> int | None:
    return next((vocabulary[word] for word in _EOS_NAMES if word in vocabulary), None)


def _configured_eos(file: Path, definition: dict[str, Any]) -> str | None:
    """The EOS that the files beside a tokenizer.json name."""
    config = file.with_name(CONFIG)
    if config.is_file():
        token = read_record(_Config, config, limit=MAX_JSON_BYTES).eos_token
        text = token.content if isinstance(token, _Token) else token
        if text:
            return text
    manifest = file.with_name(MANIFEST)
    if manifest.is_file():
        entry = read_record(_Set, manifest).tokenizer
        if entry is None:
            return None
        tokens = ((token["content"], token["id"]) for token in definition.get("added_tokens") or ())
        words = definition["model"]["vocab"]
        vocabulary = words.items() if isinstance(words, dict) else ((text, k) for k, (text, _) in enumerate(words))
        return next((text for text, number in (*tokens, *vocabulary) if number == entry.eos_id), None)
    return None


class _Token(Recorded):
    """A token with its settings in tokenizer_config.json."""

    content: str


class _Config(Recorded):
    """What is asked of a tokenizer_config.json."""

    eos_token: str | _Token | None = None


class _Entry(Recorded):
    eos_id: Count


class _Set(Recorded):
    """What is asked of the manifest of a set whose tokenizer is read."""

    tokenizer: _Entry | None = None


class _AddedToken(Recorded):
    id: Annotated[int, Field(ge=0, lt=_MAX_VOCABULARY)]
    content: str
    special: bool = False


class _Step(Recorded):
    """A normalizer, pre-tokenizer or decoder, or a sequence of them."""

    type: str | None = None
    normalizers: list[_Step] | None = None
    pretokenizers: list[_Step] | None = None
    decoders: list[_Step] | None = None


class _Model(Recorded):
    type: str | None = None
    vocab: dict[str, Annotated[int, Field(ge=0, lt=_MAX_VOCABULARY)]] | list[tuple[str, float]]
    merges: list[str] | list[tuple[str, str]] | None = None
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    byte_fallback: bool | None = None
    ignore_merges: bool | None = None


class _Definition(Recorded):
    """What is read of a tokenizer.json here. The library checks the rest; it takes memory for each id up to the
    largest one before it looks at any of them."""

    model: _Model
    added_tokens: list[_AddedToken] | None = None
    normalizer: _Step | None = None
    pre_tokenizer: _Step | None = None
    decoder: _Step | None = None


def _require_definition(definition: Any, name: str) -> None:
    """LmError (65) for what is no definition of a tokenizer, or has ids far beyond the number of its tokens."""
    if not isinstance(definition, dict) or not isinstance(definition.get("model"), dict):
        raise LmError(f"{name}: not a tokenizer.json (there is no 'model' in it).", code=Exit.DATA)
    model = definition["model"]
    vocabulary, merges = model.get("vocab"), model.get("merges")
    # JSON has lists where the record wants pairs.
    if isinstance(vocabulary, list):
        vocabulary = [tuple(pair) if isinstance(pair, list) else pair for pair in vocabulary]
    if isinstance(merges, list):
        merges = [tuple(pair) if isinstance(pair, list) else pair for pair in merges]
    record = as_record(
        _Definition,
        {**definition, "model": {**model, "vocab": vocabulary, "merges": merges}},
        f"{name}: tokenizer.json",
    )
    words, added = record.model.vocab, record.added_tokens or []
    largest = max([*(words.values() if isinstance(words, dict) else ()), *(token.id for token in added)], default=0)
    count = len(words) + len(added)
    if largest > 2 * count + _LARGEST_GAP:
        raise LmError(f"{name}: an id of {largest:,} among {count:,} tokens.", code=Exit.DATA)
    prefix = record.model.continuing_subword_prefix or ""
    for merge in record.model.merges or ():
        pair = merge.partition(" ")[::2] if isinstance(merge, str) else merge
        if not pair[1].startswith(prefix):
            raise LmError(f"{name}: the merge {pair!r:.80} lacks the prefix {prefix[:40]!r}.", code=Exit.DATA)
    unknown = record.model.unk_token
    if unknown is not None and isinstance(words, dict) and unknown not in words and not is_byte_level(definition):
        raise LmError(f"{name}: unknown words become {unknown[:40]!r}, which is not in the vocabulary.", code=Exit.DATA)


def _name_of(file: Path) -> str:
    if file.name != "tokenizer.json":
        return file.stem
    return file.absolute().parent.name or "tokenizer"


__all__ = ["EOS", "Tokenizer", "byte_alphabet", "repair"]
