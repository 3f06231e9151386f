"""The tokenizer: text <-> ids, the raw bytes behind every id, and an identity that a run can be bound to.

A `Tokenizer` wraps one `tokenizer.json` of the `tokenizers` library, which is the definition of right ids here; the
fast encoder (encoder.py) is checked against it. Three rules that the library alone does not give:

- The text of a special token inside a document is ordinary text. Only the writer puts an EOS between documents.
- `token_bytes` are the bytes that an id stands for, taken from the vocabulary (byte-level alphabet inverted), never
  from decoded strings: a character may be spread over several ids, each of them undecodable by itself.
- The identity is the sha256 of the canonical JSON (sorted keys, ASCII, truncation and padding removed), so it survives
  another indentation or another version of the library.

Left out: encoding at speed (encoder.py), fetching from the Hub (hub.py).
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lmcore import storage
from lmcore.data.manifest import MANIFEST, TokenizerEntry
from lmcore.errors import LmError

EOS = "<|endoftext|>"
CONFIG = "tokenizer_config.json"

MAX_JSON_BYTES = 256 << 20
_MIN_TRAINED = 257  # 256 bytes and EOS
_MAX_TRAINED = 1 << 20
_EOS_NAMES = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>", "<|eot_id|>", "[SEP]")
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<|bos|>", "[BOS]", "<|startoftext|>", "[CLS]")
_PAD_NAMES = ("<|padding|>", "<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Text <-> ids. Make one with `load`, `from_file`, `train` or `byte`.

    name: how people call it. vocab_size: ids are below this, added tokens included. eos_id: ends every document.
    bos_id, pad_id: None when the vocabulary has none. sha256: identity of the canonical JSON.
    """

    def __init__(self, definition: dict[str, Any], *, name: str, eos: str | None = None) -> None:
        """definition: the parsed tokenizer.json. eos: text of the token that ends a document; found by name if None."""
        self.definition = {**definition, "truncation": None, "padding": None}
        self.name = name
        self._json = storage.canonical_json(self.definition)
        self.sha256 = hashlib.sha256(self._json).hexdigest()
        try:
            self.reference = tokenizers.Tokenizer.from_str(self._json.decode())
        except Exception as error:  # the library raises plain Exception
            raise LmError(f"{name}: not a tokenizer.json that `tokenizers` can load ({error}).") from error
        self.reference.encode_special_tokens = True
        vocabulary = self.reference.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise LmError(f"{name}: the vocabulary is empty.")
        self.max_id = max(vocabulary.values())
        self.vocab_size = self.max_id + 1
        self.special_ids = frozenset(
            number for number, token in self.reference.get_added_tokens_decoder().items() if token.special
        )
        self.eos_id = self._find_eos(vocabulary, eos)
        self.bos_id = next((vocabulary[word] for word in _BOS_NAMES if word in vocabulary), None)
        self.pad_id = next((vocabulary[word] for word in _PAD_NAMES if word in vocabulary), None)

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
        if not isinstance(definition, dict) or not isinstance(definition.get("model"), dict):
            raise LmError(f"{file}: not a tokenizer.json (there is no 'model' in it).")
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

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no EOS is added, and the text of a special token is plain text."""
        return list(self.reference.encode(repair(text), add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        encodings = self.reference.encode_batch_fast([repair(text) for text in texts], add_special_tokens=False)
        return [list(encoding.ids) for encoding in encodings]

    def decode(self, ids: Iterable[int], *, specials: bool = False) -> str:
        """Text of ids. Byte-level vocabularies are exact: decode(encode(text)) == text; bytes that are no UTF-8 (a
        character cut in two) become U+FFFD. Special tokens are left out unless `specials`."""
        numbers = [int(number) for number in ids]
        if self.is_byte_level:
            table = self._spelled if specials else self._bytes
            return b"".join(table[number] for number in numbers if 0 <= number < self.vocab_size).decode(
                "utf-8", errors="replace"
            )
        return str(self.reference.decode(numbers, skip_special_tokens=not specials))

    def token_bytes(self) -> list[bytes]:
        """Raw bytes of every id, b"" for special tokens and unused ids; a fresh list of `vocab_size` entries."""
        return list(self._bytes)

    @functools.cached_property
    def is_byte_level(self) -> bool:
        """Whether every id is a string of bytes (GPT-2's alphabet), so that no text is lost or changed."""
        return (
            _mentions(self.definition.get("pre_tokenizer"), "ByteLevel")
            and self.definition.get("normalizer") is None
            and self.definition["model"].get("type") == "BPE"
        )

    @functools.cached_property
    def _bytes(self) -> tuple[bytes, ...]:
        added = self.reference.get_added_tokens_decoder()
        value_of = {character: value for value, character in enumerate(byte_alphabet())}
        table = [b""] * self.vocab_size
        for token, number in self.reference.get_vocab(with_added_tokens=True).items():
            if number in self.special_ids:
                continue
            if number in added:
                table[number] = token.encode()  # added tokens are matched in the text itself
            elif self.is_byte_level:
                table[number] = bytes(value_of[character] for character in token)
            elif match := _BYTE_TOKEN.fullmatch(token):
                table[number] = bytes([int(match[1], 16)])
            else:
                table[number] = token.replace("\u2581", " ").encode()
        return tuple(table)

    @functools.cached_property
    def _spelled(self) -> tuple[bytes, ...]:
        added = self.reference.get_added_tokens_decoder()
        return tuple(added[n].content.encode() if n in self.special_ids else raw for n, raw in enumerate(self._bytes))

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

    def _find_eos(self, vocabulary: dict[str, int], eos: str | None) -> int:
        if eos is not None:
            if eos not in vocabulary:
                raise LmError(f"{self.name}: the vocabulary has no token {eos!r} to end a document with.")
            return vocabulary[eos]
        found = _usual_eos(vocabulary)
        if found is None:
            specials = ", ".join(sorted(str(self.reference.id_to_token(n)) for n in self.special_ids)[:12]) or "none"
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


@functools.cache
def byte_alphabet() -> str:
    """GPT-2's 256 printable stand-ins for bytes: character number b stands for the byte b."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return "".join(chr(value if value in printable else next(spare)) for value in range(256))


def _usual_eos(vocabulary: dict[str, int]) -> int | None:
    return next((vocabulary[word] for word in _EOS_NAMES if word in vocabulary), None)


def _configured_eos(file: Path, definition: dict[str, Any]) -> str | None:
    """The EOS that the files beside a tokenizer.json name."""
    config = file.with_name(CONFIG)
    if config.is_file():
        said = storage.read_json(config, limit=MAX_JSON_BYTES)
        token = said.get("eos_token") if isinstance(said, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token:
            return token
    manifest = file.with_name(MANIFEST)
    if manifest.is_file():
        said = storage.read_json(manifest)
        entry = said.get("tokenizer") if isinstance(said, dict) else None
        number = entry.get("eos_id") if isinstance(entry, dict) else None
        added = definition.get("added_tokens")
        for token in added if isinstance(added, list) and number is not None else ():
            if isinstance(token, dict) and token.get("id") == number and isinstance(token.get("content"), str):
                return str(token["content"])
        return next((text for text, id_ in _vocabulary(definition).items() if id_ == number), None)
    return None


def _vocabulary(definition: dict[str, Any]) -> dict[str, int]:
    vocabulary = definition["model"].get("vocab")
    return vocabulary if isinstance(vocabulary, dict) else {}


def _mentions(part: Any, kind: str) -> bool:
    """Whether a component of a tokenizer.json is of this type or a sequence that contains one."""
    if not isinstance(part, dict):
        return False
    inner = [item for value in part.values() if isinstance(value, list) for item in value]
    return part.get("type") == kind or any(_mentions(item, kind) for item in inner)


def _name_of(file: Path) -> str:
    if file.name != "tokenizer.json":
        return file.stem
    return file.absolute().parent.name or "tokenizer"


__all__ = ["EOS", "Tokenizer", "byte_alphabet", "repair"]
