"""Damaged models of other programs, and damaged records of origin, give one LmError, in little time and memory."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lmcore.errors import LmError
from lmcore.inference.export import export_model
from lmcore.inference.import_model import read_model
from lmcore.inference.info import describe
from lmcore.training import tensors
from tests.fuzz.limits import OutOfTime, limited
from tests.fuzz.mutators import damaged_bytes, damaged_json, damaged_safetensors, json_text
from tests.inference.tiny import documents, make_run, make_set

SCALE = int(os.environ.get("LMSHARDS_FUZZ", "1"))
MOE = {"num_experts": 4, "top_k": 2, "d_expert": 16, "bias_rate": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"pattern": "AW", "window": 8},
    "qwen3_moe": {"ffn": "de", "moe": MOE},
    "granitemoehybrid": {"pattern": "AM", "qk_norm": False, "mamba": {"d_state": 8, "head_dim": 8}},
    "mamba2": {"pattern": "M", "ffn": "-", "mamba": {"d_state": 8, "head_dim": 8}},
}


@dataclass(frozen=True)
class Target:
    """A file, how it is damaged, and what reads it."""

    file: Path
    damage: Callable[[bytes, random.Random], bytes]
    read: Callable[[], Any]


def damaged_document(raw: bytes, rng: random.Random) -> bytes:
    """A JSON file: its values, or its bytes."""
    if rng.random() < 0.25:
        return damaged_bytes(raw, rng)
    return json_text(damaged_json(json.loads(raw), rng), rng)


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
    checkpoint = root / "runs" / "qwen3" / "checkpoints" / "step-00000003"
    if name == "index":
        folder = root / "sharded"
        return Target(folder / "model.safetensors.index.json", damaged_document, lambda: read_model(folder))
    if name.startswith("config of "):
        folder = root / name.removeprefix("config of ")
        return Target(folder / "config.json", damaged_document, lambda: read_model(folder))
    if name.startswith("weights of "):
        folder = root / name.removeprefix("weights of ")
        return Target(folder / "model.safetensors", damaged_safetensors, lambda: read_model(folder))
    if name == "one file":
        return Target(root / "one.safetensors", damaged_safetensors, lambda: describe(root / "one.safetensors"))
    if name == "lmshards.json":
        return Target(root / "qwen3" / name, damaged_document, lambda: describe(root / "qwen3", quick=True))
    if name == "COMMIT.json":
        return Target(checkpoint / name, damaged_document, lambda: describe(checkpoint, quick=True))

    def read_state() -> Any:  # as a file that belongs to its checkpoint
        commit = json.loads((checkpoint / "COMMIT.json").read_text())
        raw = (checkpoint / "state.json").read_bytes()
        commit["files"]["state.json"] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        (checkpoint / "COMMIT.json").write_text(json.dumps(commit))
        return describe(checkpoint, quick=True)

    return Target(checkpoint / "state.json", damaged_document, read_state)


TARGETS = [
    *(f"{kind} of {family}" for family in MODELS for kind in ("config", "weights")),
    *("index", "one file", "lmshards.json", "COMMIT.json", "state.json"),
]


def survey(name: str, root: Path, seeds: range) -> tuple[list[str], int]:
    """What went wrong, and how many damaged files were refused or found broken."""
    found = target(name, root)
    commit = root / "runs" / "qwen3" / "checkpoints" / "step-00000003" / "COMMIT.json"
    sound, sound_commit = found.file.read_bytes(), commit.read_bytes()
    faults, refused = [], 0
    try:
        for seed in seeds:
            found.file.write_bytes(found.damage(sound, random.Random(f"{name} {seed}")))
            try:
                with limited():
                    result = found.read()
                refused += getattr(result, "state", "holds") == "broken"
            except LmError as error:
                refused += 1
                if len(error.message) > 2000 or "\n" in error.message:
                    faults.append(f"{seed}: a message of {len(error.message)} characters: {error.message[:200]}")
            except (Exception, OutOfTime) as error:
                faults.append(f"{seed}: {type(error).__name__}: {str(error)[:200]}")
    finally:
        found.file.write_bytes(sound)
        commit.write_bytes(sound_commit)
    return faults, refused


@pytest.mark.parametrize("name", TARGETS)
def test_damage_is_refused_in_a_sentence(name: str, place: Path) -> None:
    faults, refused = survey(name, place, range(150 * SCALE))
    assert not faults, "\n".join(faults)
    assert refused > 20 * SCALE


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_much_damage_is_refused_in_a_sentence(name: str, place: Path) -> None:
    faults, _ = survey(name, place, range(150, 3_000 * SCALE))
    assert not faults, "\n".join(faults)
