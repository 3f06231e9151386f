"""YAML 1.2 scalars, layers, overrides, and errors that name file, line, key and the nearest real key."""

import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.config import (
    SYNONYMS,
    Config,
    Count,
    build,
    dump_yaml,
    leaves,
    merge,
    parse_count,
    parse_overrides,
    parse_yaml,
    read_yaml,
)
from lmcore.errors import Exit, LmError
from lmcore.training.config import RunConfig


class Optim(Config):
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    warmup_steps: int = 100


class Model(Config):
    num_layers: int = 2
    context_length: int = 256
    qk_norm: bool = True
    note: str | None = None


class Run(Config):
    optim: Optim = Optim()
    model: Model = Model()
    tokens: Count = 1000


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("3e-4", 3e-4),
        ("1e9", 10**9),
        ("1e+9", 10**9),
        ("6.02e+23", 6.02e23),
        (".5", 0.5),
        ("3.", 3.0),
        ("10_000", 10_000),
        ("010", 10),
        ("-7", -7),
        ("off", "off"),
        ("no", "no"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("10B", "10B"),
        ("'1e-3'", "1e-3"),
        ("[1, 2e-1]", [1, 0.2]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    found = parse_yaml(f"key: {text}", "here")["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: 1\nb: 2\na: 3\n", "'a' appears twice (lines 1 and 3)"),
        ("a: [1, 2", "conf:1"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("1: 2", "the key 1 is not text"),
    ],
)
def test_bad_yaml_is_one_sentence_with_the_line(text, part):
    with pytest.raises(LmError) as caught:
        parse_yaml(text, "conf")
    assert part in caught.value.message
    assert caught.value.code == Exit.USAGE


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1), st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=5), max_size=4
    )
)
def test_dump_then_parse_is_the_identity(value):
    back = parse_yaml(dump_yaml(value), "dump")
    assert back == value
    assert repr(back) == repr(value)  # 1 and 1.0, True and 1 are equal but not the same


def test_a_foreign_parser_reads_the_dump():
    value = {"a": "1e-3", "b": 1.5, "c": [1, 2], "d": {"e": None, "f": "true"}}
    assert yaml.safe_load(dump_yaml(value)) == value


def test_layers_later_ones_win_and_an_empty_section_changes_nothing():
    merged = merge({"optim": {"lr": 1, "x": 2}, "n": 1}, {"optim": {"lr": 3}}, {"optim": None, "n": None})
    assert merged == {"optim": {"lr": 3, "x": 2}, "n": None}


def test_overrides_are_read_as_yaml():
    assert parse_overrides(["optim.lr=3e-4", "model.note=off", "tokens=10B", "optim.betas=[0.9, 0.99]"]) == {
        "optim": {"lr": 3e-4, "betas": [0.9, 0.99]},
        "model": {"note": "off"},
        "tokens": "10B",
    }
    for bad in ("optim.lr", "=3", "optim..lr=1", ".=1"):
        with pytest.raises(LmError, match="KEY=VALUE"):
            parse_overrides([bad])


def test_build_fills_defaults_and_converts():
    run = build(Run, {"optim": None, "tokens": "1.5M", "model": {"num_layers": 4}})
    assert run.tokens == 1_500_000
    assert run.model.num_layers == 4
    assert run.optim == Optim()


@pytest.mark.parametrize(
    ("text", "value"),
    [("10B", 10**10), ("1.5M", 1_500_000), ("32k", 32_000), ("2e3", 2000), ("9007199254740993", 2**53 + 1)],
)
def test_counts_accept_suffixes(text, value):
    assert parse_count(text) == value


def test_a_count_that_is_not_whole_is_refused():
    with pytest.raises(LmError, match="not a whole number"):
        build(Run, {"tokens": "1.0005k"})


@pytest.mark.parametrize("text", ["1e999", "1e999999999999", "1e" + "9" * 30, "9" * 300, "9" * 5000])
def test_a_count_beyond_all_numbers_is_refused_in_a_short_sentence(text):
    with pytest.raises(LmError, match="too large") as refused:
        build(Run, {"tokens": text})
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("section", ["optim", "model"])
def test_every_key_misspelt_by_one_letter_is_refused_with_the_real_one(section):
    for name in leaves(Run):
        if not name.startswith(section):
            continue
        misspelt = name[:-2] + name[-1] + name[-2] if name[-1] != name[-2] else name + "x"
        with pytest.raises(LmError) as caught:
            build(Run, parse_overrides([f"{misspelt}=1"]))
        assert f"Did you mean {name}?" in caught.value.message, misspelt


def test_names_of_other_trainers_are_answered_with_ours():
    for theirs, ours in SYNONYMS.items():
        full = next((name for name in leaves(Run) if name.split(".")[-1] == ours), None)
        if full is None:
            continue
        for key in (theirs, f"optim.{theirs}"):
            with pytest.raises(LmError) as caught:
                build(Run, parse_overrides([f"{key}=1"]))
            assert f"Did you mean {full}?" in caught.value.message, key


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("train.log_every", "train.log.every_steps"),
        ("train.validate_every", "train.eval.every_steps"),
        ("train.save_interval", "train.checkpoint.every_steps"),
        ("train.evl", "train.eval"),
        ("modle", "model"),
        ("lr", "optim.lr"),
    ],
)
def test_words_and_sections_are_recognised_where_a_name_is_cut_otherwise(theirs, ours):
    with pytest.raises(LmError, match=re.escape(f"Did you mean {ours}?")):
        build(RunConfig, parse_overrides([f"{theirs}=1"]))


def test_a_name_like_none_of_ours_gets_no_suggestion():
    with pytest.raises(LmError) as caught:
        build(RunConfig, parse_overrides(["train.qqq=1"]))
    assert "Did you mean" not in caught.value.message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("optim:\n  lr: true\n", "a boolean is not accepted"),
        ("optim:\n  warmup_steps: 1.5\n", "run.yaml:2: optim.warmup_steps:"),
        ("optim:\n  lr: .nan\n", "run.yaml:2: optim.lr:"),
        ("optim:\n\n  learning_rate: 1\n", "run.yaml:3: optim.learning_rate is not a setting. Did you mean optim.lr?"),
        ("model:\n  note: 5\n", "run.yaml:2: model.note:"),
        ("optim: 3\n", "run.yaml:1: optim:"),
    ],
)
def test_errors_name_file_line_and_key(tmp_path, text, part):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(LmError) as caught:
        build(Run, read_yaml(path), source=str(path))
    assert part in caught.value.message
    assert caught.value.code == Exit.USAGE


def test_all_errors_are_reported_at_once():
    with pytest.raises(LmError) as caught:
        build(Run, {"optim": {"lr": "x", "warmup_steps": "y"}, "typo": 1})
    assert len(caught.value.message.splitlines()) == 3


def test_read_yaml_answers_bad_files(tmp_path):
    with pytest.raises(LmError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(LmError, match="a mapping of settings"):
        read_yaml(tmp_path / "list.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(LmError, match="not UTF-8"):
        read_yaml(tmp_path / "latin.yaml")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "empty.yaml") == {}


def test_frozen_models_cannot_change():
    run = Run()
    with pytest.raises(Exception, match="frozen"):
        run.tokens = 5
    assert hash(run) == hash(Run())
