"""Parts on a local Ray of two workers give what parts made by hand give. Needs the extra `ray`."""

from __future__ import annotations

from pathlib import Path

import corpora
import numpy as np
import pytest

from lmcore.data.plan import TokenizeConfig
from lmcore.data.ray_executor import tokenize_on_ray
from lmcore.data.tokenization import tokenize
from lmcore.errors import LmError


def make(root: Path) -> TokenizeConfig:
    for number in range(4):
        corpora.write_jsonl(root / "in" / f"{number}.jsonl", corpora.texts(30, seed=number))
    corpora.tokenizer(root)
    return TokenizeConfig(paths=(str(root / "in"),), tokenizer=str(root / "small"), shard_tokens=4096)


@pytest.mark.slow
def test_two_workers(tmp_path: Path) -> None:
    ray = pytest.importorskip(
        "ray", reason="the extra `ray` is not installed: lm tokenize --executor ray is NOT tested"
    )
    config = make(tmp_path)
    tokenize(config, tmp_path / "whole")
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        tokenize_on_ray(config, tmp_path / "merged", 3)
    finally:
        ray.shutdown()
    assert np.array_equal(corpora.stream_of(tmp_path / "merged"), corpora.stream_of(tmp_path / "whole"))


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LmError, match="Ray is not installed") as caught:
        tokenize_on_ray(make(tmp_path), tmp_path / "x", 2)
    assert "lmshards[ray]" in caught.value.hint
