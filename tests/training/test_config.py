"""Run configurations: layers, the size dial, presets, and the three classes of settings when a run goes on."""

import math
import re

import pytest
import torch

from lmcore.config import build, merge
from lmcore.errors import LmError
from lmcore.model import kernels
from lmcore.model.plan import plan_model
from lmcore.training.config import (
    DataConfig,
    RunConfig,
    Source,
    complete,
    differences,
    flatten,
    key_class,
    preset_names,
    read_preset,
    read_run_config,
    settled,
)
from lmcore.training.device import flash_attention, numerics

SMALL = {"model": {"d_model": 64, "num_layers": 2, "num_heads": 2, "context_length": 128}}


def made(*layers, vocab_size=1000):
    return complete(merge(SMALL, *layers), vocab_size=vocab_size, train=[Source(path="a")], val=["v"])


def test_a_completed_configuration_has_nothing_left_to_guess_and_survives_yaml(tmp_path):
    config = made({"train": {"tokens": "1M", "batch_tokens": 4096}})
    assert config.model.vocab_size == 1000
    assert config.total_steps == config.train.steps == math.ceil(1e6 / 4096)
    assert config.optim == config.optim.resolved(config.total_steps)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert read_run_config(tmp_path / "c.yaml") == config
    assert settled(config) == config


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"batch_tokens": 1000, "steps": 5}, "the nearest are 896 or 1,024"),
        ({"steps": 5, "tokens": 10_000}, "give one of them"),
        ({"step": 5}, "Did you mean train.steps"),
        ({"lanes": 3}, "power of two"),
        ({"micro_batch": 0}, "at least 1"),
        ({"guard": {"on_spike": "explode"}}, "on_spike"),
    ],
)
def test_wrong_settings_are_named(train, message):
    with pytest.raises(LmError, match=message):
        made({"train": train})


def test_a_vocabulary_smaller_than_the_data_is_refused():
    with pytest.raises(LmError, match="too small for the data"):
        made({"model": {"vocab_size": 999}})
    assert made({"model": {"vocab_size": 1024}, "train": {"steps": 2, "batch_tokens": 128}}).model.vocab_size == 1024


def test_the_dial_fills_what_was_not_given():
    config = made({})
    size = plan_model(config.model).scaling_parameters
    assert config.total_steps * config.batch_tokens == pytest.approx(12 * size, rel=0.05)
    longer = made({"train": {"tokens": "1B"}})
    assert longer.batch_tokens > config.batch_tokens
    assert made({"train": {"tokens": "20B"}}).optim.lr > config.optim.lr  # rates grow beyond the reference batch only
    assert made({"train": {"tokens": "1B"}, "optim": {"lr": 0.5}}).optim.lr == 0.5
    steps = made({"train": {"steps": 100}})
    assert steps.total_steps == 100


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("x", [("x", 1.0)]),
        ({"a": 0.7, "b": 0.3}, [("a", 0.7), ("b", 0.3)]),
        (["a", {"path": "b", "weight": 2}], [("a", 1.0), ("b", 2.0)]),
        ({"path": "c"}, [("c", 1.0)]),
    ],
)
def test_spellings_of_the_training_data(value, expected):
    assert [(s.path, s.weight) for s in DataConfig(train=value).train] == expected


def test_a_set_listed_twice_is_refused():
    with pytest.raises(ValueError, match="listed twice"):
        DataConfig(train=["a", "a"])


@pytest.mark.parametrize(("name", "description"), preset_names())
def test_every_preset_is_a_whole_configuration(name, description):
    _, raw = read_preset(name)
    config = settled(build(RunConfig, merge(raw, {"model": {"vocab_size": 50_257}})))
    assert len(description) > 20
    assert config.total_steps > 0
    assert config.rows >= 1


@pytest.mark.parametrize(("name", "description"), preset_names())
def test_presets_are_what_their_first_line_says(name, description):
    """Every number of the line, against the planner's counts and the settings."""
    _, raw = read_preset(name)
    config = settled(build(RunConfig, merge(raw, {"model": {"vocab_size": 8_192 if name == "nano" else 50_257}})))
    plan, model = plan_model(config.model), config.model
    tokens = config.total_steps * config.batch_tokens
    facts = {
        r"([\d.]+[MB]) parameters": plan.parameters,
        r"([\d.]+[MB]) active": plan.active,
        r"([\d,]+) tokens of context": model.context_length,
        r"(?<!-)\b(\d+) layers": model.num_layers,
        r"([\d.]+[MB]) tokens\b(?! of context)": tokens,
        r"in ([\d,]+) steps": config.total_steps,
        r"(\d+) experts": model.moe.num_experts,
        r"top-(\d+)": model.moe.top_k,
        r"(\d+) query": model.num_heads,
        r"(\d+) key/value": model.num_kv_heads,
        r"(\d+)-token prediction": model.mtp.depths + 1,
    }
    told = description
    for pattern, value in facts.items():
        for found in re.finditer(pattern, description):
            told = told.replace(found.group(), "", 1)
            number = found.group(1).replace(",", "")
            unit = {"M": 1e6, "B": 1e9}.get(number[-1], 1)
            number = number.rstrip("MB")
            digits = len(number.partition(".")[2])
            assert float(number) == round(value / unit, digits), f"{name}: {found.group()} is {value:,}"
    assert not re.search(r"\d{2,}", re.sub(r"gated-moe-1.7b|resonance-32k", "", told)), "a number that no fact explains"


@pytest.mark.parametrize(("name", "millions"), [("small", 50), ("medium", 200), ("large", 500), ("xl", 1000)])
def test_sizes_of_the_plain_presets(name, millions):
    _, raw = read_preset(name)
    config = build(RunConfig, merge(raw, {"model": {"vocab_size": 50_257}}))
    assert plan_model(config.model).parameters / 1e6 == pytest.approx(millions, rel=0.03)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(LmError, match="did you mean gpt2-124m"):
        read_preset("gpt2-125m")


def test_every_setting_has_a_class():
    classes = {key: key_class(key) for key in flatten(made({"train": {"steps": 1, "batch_tokens": 128}}))}
    assert classes["model.d_model"] == classes["train.seed"] == classes["optim.optimizer"] == "identity"
    assert classes["optim.lr"] == classes["train.steps"] == classes["train.batch_tokens"] == "schedule"
    assert classes["model.dropout"] == classes["train.dtype"] == "schedule"
    assert classes["train.device"] == classes["train.eval.every_steps"] == classes["data.train"] == "free"
    assert {k for k, c in classes.items() if c == "identity"} >= {k for k in classes if k.startswith("model.")} - {
        "model.dropout"
    }


def test_differences_name_key_values_and_class():
    a = made({"train": {"steps": 5, "batch_tokens": 128}})
    b = made({"train": {"steps": 5, "batch_tokens": 128, "log": {"every_steps": 3}}, "optim": {"lr": 0.5}})
    assert differences(a, a) == []
    assert differences(a, b) == [
        ("optim.lr", a.optim.lr, 0.5, "schedule"),
        ("train.log.every_steps", 10, 3, "free"),
    ]


def test_an_operation_without_a_deterministic_form_is_answered_with_the_way_out():
    with pytest.raises(LmError, match=r"put_ does not have a deterministic implementation") as caught:
        with numerics(deterministic=True, tf32=False, threads=None):
            torch.zeros(4).put_(torch.tensor([1]), torch.ones(1))
    assert "--set train.deterministic=false" in caught.value.hint
    assert not torch.are_deterministic_algorithms_enabled()


def test_kernels_that_cannot_be_had_are_answered_and_on_a_cpu_not_asked_for():
    with pytest.raises(LmError, match="flash_attention=fa4 does not work here") as caught:
        with flash_attention("fa4", torch.device("cuda", 99), 64):
            pass
    assert "flash_attention=torch" in caught.value.hint
    with flash_attention("fa4", torch.device("cpu"), 64):
        assert not kernels.FLASH_ATTENTION
    with pytest.raises(LmError, match="incorrect results") as caught:
        with numerics(deterministic=False, tf32=False, threads=None):
            raise RuntimeError("Triton >= 3.4.0 on Hopper GPUs produces incorrect results")
    assert "mamba.kernels=torch" in caught.value.hint
