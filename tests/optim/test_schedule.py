"""Schedules: corner points, golden values, continuity, purity."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcore.errors import LmError
from lmcore.optim.config import OptimConfig
from lmcore.optim.schedule import cosine_with_warmup, momentum_at, multiplier, weight_decay_at, wsd

SCHEDULES = ("wsd", "cosine", "linear", "constant")


def test_cosine_with_warmup_has_the_textbook_values():
    """max 1, min 0.1, warm-up 7, cycle 21: computed by hand from the definition, rounded to 10 digits."""
    got = [cosine_with_warmup(s, max_lr=1.0, min_lr=0.1, warmup_steps=7, total_steps=21) for s in range(25)]
    want = [
        *(s / 7 for s in range(8)),
        0.9887175604,
        0.9554359905,
        0.9018241671,
        0.8305704109,
        0.7452476826,
        0.6501344203,
        0.55,
        0.4498655797,
        0.3547523174,
        0.2694295891,
        0.1981758329,
        0.1445640095,
        0.1112824396,
        *([0.1] * 4),
    ]
    assert got == pytest.approx(want, abs=1e-9)


def test_cosine_without_warmup_starts_at_the_peak():
    assert cosine_with_warmup(0, max_lr=3e-4, min_lr=0.0, warmup_steps=0, total_steps=10) == 3e-4
    assert cosine_with_warmup(10, max_lr=3e-4, min_lr=0.0, warmup_steps=0, total_steps=10) == 0.0


def test_wsd_corner_points():
    def at(step, **more):
        return wsd(step, total_steps=1000, warmup_steps=40, cooldown_fraction=0.65, final_fraction=0.05, **more)

    assert at(0) == 1 / 40
    assert at(39) == at(40) == at(349) == at(350) == 1.0
    assert at(675) == pytest.approx(0.05 + 0.95 * 0.5)
    assert at(1000) == at(5000) == 0.05
    assert at(350 + 650 // 4, shape="1-sqrt") == pytest.approx(0.05 + 0.95 * (1 - math.sqrt(162 / 650)))
    assert wsd(99, total_steps=100, warmup_steps=100) == 1.0  # all warm-up
    assert wsd(0, total_steps=10, warmup_steps=0, cooldown_fraction=1.0, final_fraction=0.0) == 1.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_multiplier_rises_once_and_never_rises_again(schedule):
    config = OptimConfig(schedule=schedule, warmup_steps=20, final_fraction=0.1)
    values = [multiplier(s, config, 200) for s in range(201)]
    assert values[:20] == [(s + 1) / 20 for s in range(20)]
    assert all(a >= b for a, b in pairwise(values[19:]))
    assert values[200] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert all(abs(a - b) < 0.06 for a, b in pairwise(values))  # no jumps


@settings(derandomize=True, deadline=None)
@given(
    schedule=st.sampled_from(SCHEDULES),
    total=st.integers(1, 5000),
    step=st.integers(0, 6000),
    warmup=st.one_of(st.none(), st.integers(0, 6000)),
    final=st.floats(0, 1),
    cooldown=st.floats(0, 1),
    shape=st.sampled_from(("linear", "1-sqrt")),
)
def test_multiplier_stays_in_its_range(schedule, total, step, warmup, final, cooldown, shape):
    config = OptimConfig(
        schedule=schedule, warmup_steps=warmup, final_fraction=final, cooldown_fraction=cooldown, cooldown_shape=shape
    )
    value = multiplier(step, config, total)
    assert 0 <= value <= 1 + 1e-12
    assert value == multiplier(step, config, total)
    if step >= total and schedule != "constant":
        assert value == pytest.approx(final)


def test_momentum_and_decay_are_functions_of_the_step():
    config = OptimConfig(momentum_warmup_steps=100, weight_decay=0.2, weight_decay_schedule="cosine")
    assert momentum_at(0, config, 1000) == 0.85
    assert momentum_at(50, config, 1000) == pytest.approx(0.9)
    assert momentum_at(100, config, 1000) == momentum_at(999, config, 1000) == pytest.approx(0.95)
    assert weight_decay_at(0, config, 1000) == 0.2
    assert weight_decay_at(500, config, 1000) == pytest.approx(0.1)
    assert weight_decay_at(1000, config, 1000) == pytest.approx(0)
    assert weight_decay_at(700, OptimConfig(weight_decay=0.2), 1000) == 0.2


def test_short_runs_warm_up_for_a_twentieth():
    assert OptimConfig().resolved(100).warmup_steps == 5
    assert OptimConfig().resolved(100_000).warmup_steps == 40
    assert OptimConfig(optimizer="adamw").resolved(100_000).warmup_steps == 2000
    assert OptimConfig(warmup_steps=7).resolved(100).warmup_steps == 7
    assert multiplier(0, OptimConfig(), 1) == 1.0


def test_nonsense_is_refused():
    for bad in ({"step": -1}, {"warmup_steps": 20}, {"warmup_steps": -1}):
        with pytest.raises(LmError, match="a schedule needs"):
            cosine_with_warmup(**{"step": 0, "max_lr": 1.0, "min_lr": 0.0, "warmup_steps": 1, "total_steps": 10, **bad})
