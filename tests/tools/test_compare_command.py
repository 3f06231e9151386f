"""lm compare as a user calls it: help, mistakes, and (slow) one whole comparison with its table, JSON and plot."""

from __future__ import annotations

import json

import pytest


def test_help_names_the_budgets(lm):
    outcome = lm("compare", "--help")
    assert outcome.code == 0
    for option in ("--tokens", "--flops", "--minutes", "--data", "--out", "--decode", "--json"):
        assert option in outcome.out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("tiny-attention", "--tokens", "1M", "--minutes", "2"), "one budget"),
        (("tiny-attentive",), "did you mean tiny-attention"),
        (("tiny-attention", "--tokens", "1.5"), "not a whole number"),
        (("tiny-attention", "--decode", "2k"), "whole numbers"),
    ],
)
def test_mistakes_are_sentences(lm, arguments, sentence):
    outcome = lm("compare", *arguments)
    assert outcome.code == 2
    assert sentence in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.slow
def test_a_comparison(lm, tmp_path, make_set):
    from lmcore.data.split import split_set

    made = make_set("data")
    split_set(made.path, fractions={"val": 0.2})
    preset = tmp_path / "small.yaml"
    preset.write_text(
        "model: {d_model: 16, num_layers: 1, num_heads: 2, context_length: 16}\n"
        "train: {steps: 2, batch_tokens: 32, eval: {tokens: 64}}\n"
    )
    common = ("compare", preset, "--data", made.path, "--out", tmp_path / "out", "--decode", "16", "-q")
    table = lm(*common)
    assert table.code == 0, table.err
    assert "small" in table.out
    assert (tmp_path / "out" / "compare.png").is_file()
    document = json.loads(lm(*common, "--json").out)
    assert document[0]["name"] == "small"
