"""lm plan: tables for people, one document for programs, sentences for mistakes."""

import json

import pytest

from lmcore.data.registry import parse_dataset
from lmcore.model.plan import known_device

SMALL = (
    "-s",
    "model.d_model=128",
    "-s",
    "model.num_layers=2",
    "-s",
    "model.num_heads=4",
    "-s",
    "model.vocab_size=1000",
)


def test_tables(lm):
    outcome = lm("plan", "nano", *SMALL, "--device", "h100", "--tokens", "10M")
    assert outcome.code == 0, outcome.err
    for word in (
        "attention",
        "PaLM-style",
        "matrices",
        "muon",
        "activations",
        "most rows per pass",
        "throughput",
        "disk",
    ):
        assert word in outcome.out
    assert "compute-optimal" in outcome.out
    assert "--set train.batch_tokens=" in outcome.out


def test_json_is_one_document(lm):
    outcome = lm("plan", "nano", *SMALL, "--device", "h100", "--devices", "8", "--json")
    assert outcome.code == 0, outcome.err
    document = json.loads(outcome.out)
    assert document["parameters"]["total"] == sum(part["parameters"] for part in document["parameters"]["parts"])
    assert document["memory"]["total"] == sum(document["memory"]["parts"].values())
    assert document["target"]["devices"] == 8
    run = document["run"]
    assert run["seconds"] == pytest.approx(run["tokens"] / run["tokens_per_s"])


def test_a_preset_is_named_either_way(lm):
    first = lm("plan", "nano", *SMALL, "--device", "h100", "--json")
    assert first.out == lm("plan", "--preset", "nano", *SMALL, "--device", "h100", "--json").out
    assert lm("plan", "nano", "--preset", "nano").code == 2


def test_device_and_arithmetic_are_those_of_the_configuration(lm):
    run = ("-s", "train.device=cpu", "-s", "train.dtype=fp32")
    plain = lm("plan", "nano", *SMALL, *run, "--json")
    assert plain.code == 0, plain.err
    target = json.loads(plain.out)["target"]
    assert (target["device_type"], target["dtype"]) == ("cpu", "fp32")
    other = json.loads(lm("plan", "nano", *SMALL, *run, "--device", "h100", "--dtype", "bf16", "--json").out)
    assert (other["target"]["device_type"], other["target"]["dtype"]) == ("cuda", "bf16")
    assert json.loads(plain.out)["memory"]["parts"]["activations"] != other["memory"]["parts"]["activations"]


def test_parameters_are_listed(lm):
    outcome = lm("plan", "nano", *SMALL, "--parameters")
    assert outcome.code == 0, outcome.err
    assert "blocks.1.ffn.w13.weight" in outcome.out
    assert "normal, std 0.02" in outcome.out
    rows = json.loads(lm("plan", "nano", *SMALL, "--parameters", "--json").out)
    assert {row["optimizer"] for row in rows} == {"muon", "adamw"}


def test_hours_and_claims(lm):
    outcome = lm("plan", "nano", *SMALL, "--device", "a100", "--hours", "1", "--mfu", "0.5")
    assert outcome.code == 0, outcome.err
    assert "throughput, MFU 0.50" in outcome.out
    refused = lm("plan", "nano", *SMALL, "--device", "a100", "--tokens-per-s", "1e12")
    assert refused.code == 2
    assert "are impossible" in refused.err
    assert "% of the peak" in refused.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nanoo",), "nano"),
        (("nano", "--device", "abacus"), "not a device"),
        (("nano", "--mfu", "1.5", "--device", "h100"), "impossible"),
        (("nano", "--tokens", "many"), "--tokens many"),
        (("nano", "--tokens", "1M", "--hours", "1"), "both give the length"),
        (("nano", "--hours", "0"), "more than nothing"),
        (("nano", "--dtype", "int4"), "choose auto"),
        (("nano", "-s", "model.d_modle=8"), "Did you mean"),
    ],
)
def test_mistakes_are_sentences(lm, arguments, words):
    outcome = lm("plan", *arguments)
    assert outcome.code == 2
    assert words in outcome.err
    assert "Traceback" not in outcome.err


def test_help_shows_examples(lm):
    outcome = lm("plan", "--help")
    assert outcome.code == 0
    assert "lm plan gpt2-124m" in outcome.out


@pytest.mark.parametrize("typed", ["rtx4090", "RTX-4090", "rtx_4090", "NVIDIA GeForce RTX 4090"])
def test_a_device_is_known_by_its_letters_and_digits(typed):
    found = known_device(typed)
    assert found is not None
    assert found.name == "RTX 4090"


def test_names_are_known_by_their_letters_and_the_nearest_is_said(lm):
    far = lm("plan", "nano", "--device", "rtx4080")
    assert far.code == 2
    assert "did you mean RTX 4090?" in far.err
    assert lm("plan", "GPT2_124M", "--parameters").out == lm("plan", "gpt2-124m", "--parameters").out
    assert "did you mean gpt2-124m?" in lm("plan", "gpt2-125m").err
    assert parse_dataset("FineWeb_Edu:100bt") == parse_dataset("fineweb-edu:100BT")
