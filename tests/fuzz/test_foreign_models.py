"""Damaged models of other programs, and damaged records of origin, give one LmError, in little time and memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lmcore.inference.export import export_model
from lmcore.inference.import_model import read_model
from lmcore.inference.info import describe
from lmcore.training import tensors
from tests.fuzz.harness import SEEDS, Target, check, document
from tests.fuzz.mutators import damaged_safetensors
from tests.inference.tiny import documents, make_run, make_set

MOE = {"num_experts": 4, "top_k": 2, "d_expert": 16, "bias_rate": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"pattern": "AW", "window": 8},
    "qwen3_moe": {"ffn": "de", "moe": MOE},
    "granitemoehybrid": {"pattern": "AM", "qk_norm": False, "mamba": {"d_state": 8, "head_dim": 8}},
    "mamba2": {"pattern": "M", "ffn": "-", "mamba": {"d_state": 8, "head_dim": 8}},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("foreign")
    data = make_set(root / "set", documents(6))
    for family, settings in MODELS.items():
        run = make_run(root / "runs" / family, data, **settings)
        export_model(run, root / family)
        (root / family / "tokenizer.json").unlink()
    export_model(root / "runs" / "qwen3", root / "one.safetensors", kind="safetensors")
    shutil.copytree(root / "qwen3", root / "sharded")
    whole = tensors.read_tensors(root / "sharded" / "model.safetensors")
    (root / "sharded" / "model.safetensors").unlink()
    listing = {}
    for index, names in enumerate((sorted(whole)[::2], sorted(whole)[1::2])):
        listing |= dict.fromkeys(names, f"part-{index}.safetensors")
        chunks, _ = tensors.tensor_chunks({name: whole[name] for name in names})
        (root / "sharded" / f"part-{index}.safetensors").write_bytes(b"".join(bytes(chunk) for chunk in chunks))
    index = root / "sharded" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listing}))
    return root


def target(name: str, root: Path) -> Target:
    if name == "index":
        folder = root / "sharded"
        return Target(folder / "model.safetensors.index.json", document, (lambda: read_model(folder),))
    if name.startswith("config of "):
        folder = root / name.removeprefix("config of ")
        return Target(folder / "config.json", document, (lambda: read_model(folder),))
    if name.startswith("weights of "):
        folder = root / name.removeprefix("weights of ")
        return Target(folder / "model.safetensors", damaged_safetensors, (lambda: read_model(folder),))
    if name == "one file":
        return Target(root / "one.safetensors", damaged_safetensors, (lambda: describe(root / "one.safetensors"),))
    return Target(root / "qwen3" / name, document, (lambda: describe(root / "qwen3", quick=True),))


KINDS = [
    *(f"{kind} of {family}" for family in MODELS for kind in ("config", "weights")),
    *("index", "one file", "lmshards.json"),
]


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_refused_in_a_sentence(name: str, place: Path) -> None:
    check(name, target(name, place), range(SEEDS // 3))


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", KINDS)
def test_much_damage_is_refused_in_a_sentence(name: str, place: Path) -> None:
    check(name, target(name, place), range(SEEDS, 11 * SEEDS))
