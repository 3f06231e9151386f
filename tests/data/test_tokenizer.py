"""Laws of the tokenizer: exact round trips, raw bytes of every id, one identity."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import corpora
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.data.tokenizer import EOS, Tokenizer, byte_alphabet, repair
from lmcore.errors import LmError


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train(corpora.texts(50, seed=9), 400)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8"), max_size=200))
def test_round_trip_is_exact(text: str) -> None:
    for tokenizer in (Tokenizer.byte(), _trained()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        table = tokenizer.token_bytes()
        assert b"".join(table[number] for number in ids) == text.encode()


_CACHE: list[Tokenizer] = []


def _trained() -> Tokenizer:
    if not _CACHE:
        _CACHE.append(Tokenizer.train(corpora.texts(50, seed=9), 400))
    return _CACHE[0]


def test_token_bytes_hold_where_a_character_is_cut_in_two(trained: Tokenizer) -> None:
    text = "\u6f22\u5b57 \U0001f680\u00e9"  # not in the training text, so characters fall into bytes
    ids = trained.encode(text)
    table = trained.token_bytes()
    undecodable = [number for number in ids if b"\xef\xbf\xbd" in table[number].decode("utf-8", "replace").encode()]
    assert undecodable, "the sample must contain ids that are no text by themselves"
    assert sum(len(table[number]) for number in ids) == len(text.encode())
    assert trained.decode(ids[:1]) == "\ufffd" or trained.decode(ids[:1]) in text


def test_special_token_text_is_plain_text(trained: Tokenizer) -> None:
    for tokenizer in (trained, Tokenizer.byte()):
        ids = tokenizer.encode(f"a{EOS}b")
        assert tokenizer.eos_id not in ids
        assert tokenizer.decode(ids) == f"a{EOS}b"
        assert tokenizer.token_bytes()[tokenizer.eos_id] == b""
        assert tokenizer.decode([tokenizer.eos_id]) == ""
        assert tokenizer.decode([tokenizer.eos_id], specials=True) == EOS


def test_byte_tokenizer_is_a_real_tokenizer_json(tmp_path: Path) -> None:
    byte = Tokenizer.byte()
    byte.save(tmp_path / "tokenizer.json")
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "na\u00efve \u65e5\x00"
    assert plain.encode(text).ids == list(text.encode()) == byte.encode(text)
    assert plain.decode(list(text.encode())) == text
    assert (byte.vocab_size, byte.eos_id) == (257, 256)


def test_byte_alphabet_is_the_library_s() -> None:
    assert sorted(byte_alphabet()) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for value in range(128):
        assert pieces.pre_tokenize_str(chr(value))[0][0] == byte_alphabet()[value]


def test_training_is_deterministic_across_threads() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests/data'); import corpora; from lmcore.data.tokenizer import Tokenizer; "
        "print(Tokenizer.train(corpora.texts(80), 500).sha256)"
    )
    root = Path(__file__).parents[2]
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=root,
            env={**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONPATH": str(root), "PYTHONHASHSEED": threads},
        ).stdout
        for threads in ("1", "4")
    }
    assert len(outputs) == 1


def test_identity_survives_formatting_and_truncation_settings(tmp_path: Path, trained: Tokenizer) -> None:
    changed = dict(reversed(list(trained.definition.items())))
    changed["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed, indent=3))
    read = Tokenizer.from_file(tmp_path)
    assert read.sha256 == trained.sha256
    assert len(read.encode("a b c d e f g h i j k")) > 5


def test_saved_and_loaded_is_the_same(tmp_path: Path, trained: Tokenizer) -> None:
    trained.save(tmp_path / "tokenizer.json")
    read = Tokenizer.load(tmp_path / "tokenizer.json")
    assert read.entry().model_dump(exclude={"name"}) == trained.entry().model_dump(exclude={"name"})
    assert not (tmp_path / "tokenizer_config.json").exists()


def test_unusual_eos_is_found_in_the_config_beside_it_and_kept(tmp_path: Path, trained: Tokenizer) -> None:
    definition = json.loads(json.dumps(trained.definition).replace(EOS, "<stop-here>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(LmError, match="no token that ends a document"):
        Tokenizer.from_file(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop-here>"}}))
    read = Tokenizer.from_file(tmp_path)
    assert read.eos == "<stop-here>"
    (tmp_path / "other").mkdir()
    read.save(tmp_path / "other" / "tokenizer.json")
    assert Tokenizer.from_file(tmp_path / "other").eos == "<stop-here>"


def test_unpaired_surrogates_are_repaired() -> None:
    assert repair("a\ud800b") == "a\ufffdb"
    assert repair("\ud83d\ude00") == "\U0001f600"
    assert repair("plain") == "plain"
    assert Tokenizer.byte().decode(Tokenizer.byte().encode("\ud800")) == "\ufffd"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("train:8192", "trained while text is tokenized"),
        ("./nowhere.json", "no such tokenizer file"),
        ("/nowhere/at/all", "no such tokenizer file"),
    ],
)
def test_what_cannot_be_loaded_is_said(spec: str, message: str) -> None:
    with pytest.raises(LmError, match=message):
        Tokenizer.load(spec)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"type": "no such model"}}', '{"model": 3}'])
def test_files_that_are_no_tokenizer_are_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(LmError):
        Tokenizer.from_file(tmp_path)


def test_vocabulary_sizes_out_of_range_are_refused() -> None:
    with pytest.raises(LmError, match="257"):
        Tokenizer.train(["a"], 100)
