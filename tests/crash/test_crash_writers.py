"""tokenize, split, checkpoints and the run log keep their promises through every fault that can be injected.

The fast tests take a sample of the calls, the same one each time; the slow ones take all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crash_enum
import crash_power
import crash_writers
import pytest
from crash_trace import in_child, require_strace, scratch

NAMES = [
    *(
        "tokenize",
        "split",
        "split-hardlink",
        "split-copy",
        "split-materialize",
        "merge",
        "import-link",
        "import-convert",
    ),
    *("checkpoints", "run-log"),
]
FAST = ["tokenize", "split", "checkpoints", "run-log"]
STRIDE = {"tokenize": 17, "split": 23, "checkpoints": 41, "run-log": 11}


@pytest.fixture(scope="module")
def writers() -> Iterator[dict[str, Any]]:
    require_strace()
    with scratch() as base:
        # In a child: its acknowledgements do not belong into the output of the tests.
        assert in_child(lambda: list(crash_writers.real_writers(base)) and None).code == 0
        yield dict(zip(NAMES, crash_writers.real_writers(base), strict=True))


@pytest.mark.parametrize("name", FAST)
def test_kills_and_errors_at_a_sample_of_calls(writers: dict[str, Any], name: str) -> None:
    result = crash_enum.enumerate_crashes(writers[name], ("KILL", "ENOSPC", "EIO"), stride=STRIDE[name])
    assert result.injections >= 15
    assert not result.violations, str(result.violations)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_kills_and_errors_at_every_call(writers: dict[str, Any], name: str) -> None:
    result = crash_enum.enumerate_crashes(writers[name], ("KILL", "ENOSPC", "EIO"))
    assert not result.violations, str(result.violations)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_reads_that_fail(writers: dict[str, Any], name: str) -> None:
    result = crash_enum.enumerate_crashes(writers[name], ("EIO",), traced=crash_enum.READING)
    assert not result.violations, str(result.violations)


@pytest.mark.parametrize("name", FAST)
def test_power_cuts_at_a_sample_of_calls(writers: dict[str, Any], name: str) -> None:
    result = crash_power.cut_power(writers[name], samples=1, stride=4)
    assert result.images >= 20
    assert not result.violations, str(result.violations)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_power_cuts_at_every_call_in_many_mixtures(writers: dict[str, Any], name: str) -> None:
    result = crash_power.cut_power(writers[name], samples=40, seed=1)
    assert not result.violations, str(result.violations)


@pytest.mark.slow
@pytest.mark.timeout(900)  # two minutes alone; forks of a large process cost more
@pytest.mark.parametrize("name", NAMES)
def test_a_kill_and_then_a_power_cut(writers: dict[str, Any], name: str) -> None:
    result = crash_power.kill_then_cut_power(writers[name], stride=3)
    assert not result.violations, str(result.violations)


@pytest.mark.parametrize("name", NAMES)
def test_short_writes_change_nothing(writers: dict[str, Any], name: str) -> None:
    violations = crash_enum.short_write_run(writers[name])
    assert not violations, str(violations)


def test_the_sources_are_what_the_tests_believe(writers: dict[str, Any], tmp_path: Path) -> None:
    """Several shards, a document across a border, views that are not empty: else the tests above prove little."""
    from lmcore.data.manifest import read_manifest

    finished = writers["split"].source
    manifest = read_manifest(finished)
    assert len(manifest.shards) == crash_writers.Tokenize.shards
    assert any(shard.first_doc_offset for shard in manifest.shards)
