"""`lm info` follows the chain from an export to the source files and notices every break of it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcore.inference.export import export_model
from lmcore.inference.import_model import import_model
from tests.inference.tiny import documents, make_run


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source files -> set -> views -> run -> export, by the real commands where data are concerned."""
    from lmcore.tools.cli import main

    root = tmp_path_factory.mktemp("chain")
    (root / "text").mkdir()
    for number, text in enumerate(documents()):
        (root / "text" / f"{number:02}.txt").write_text(text, encoding="utf-8")
    for arguments in (
        ["tokenize", str(root / "text"), "--out", str(root / "set"), "--tokenizer", "byte", "-q"],
        ["split", str(root / "set"), "--val-fraction", "0.3", "-q"],
    ):
        with contextlib.suppress(SystemExit):
            main(arguments)
    make_run(root / "runs" / "tiny", root / "set")
    export_model(root / "runs" / "tiny", root / "export")
    export_model(root / "runs" / "tiny", root / "one.safetensors", kind="safetensors")
    return root


@pytest.fixture
def copy(chain: Path, tmp_path: Path) -> Iterator[Path]:
    """The chain itself (its paths are absolute), put back as it was afterwards."""
    backup = tmp_path / "backup"
    shutil.copytree(chain, backup, symlinks=True)
    yield chain
    shutil.rmtree(chain)
    shutil.copytree(backup, chain, symlinks=True)


def kinds(document: dict[str, Any]) -> list[tuple[str, str]]:
    result = [(document["kind"], document["state"])]
    for parent in document["parents"]:
        result += kinds(parent)
    return result


def told(lm: Callable[..., Any], *arguments: object) -> tuple[int, dict[str, Any]]:
    done = lm("info", *arguments, "--json", "-q")
    return done.code, json.loads(done.out)


def test_the_whole_chain(lm: Callable[..., Any], chain: Path) -> None:
    code, document = told(lm, chain / "export")
    assert code == 0
    assert kinds(document) == [
        ("export", "holds"),
        ("checkpoint", "holds"),
        ("view", "holds"),
        ("set", "holds"),
        ("source files", "holds"),
    ]
    manifest = json.loads((chain / "set" / "train" / "manifest.json").read_text())
    assert document["parents"][0]["parents"][0]["identity"] == manifest["dataset_id"]
    for path, kind in [
        ("one.safetensors", "model file"),
        ("runs/tiny", "run"),
        ("runs/tiny/checkpoints/step-00000003", "checkpoint"),
        ("set/val", "view"),
        ("set/val/manifest.json", "view"),
        ("set", "set"),
    ]:
        code, document = told(lm, chain / path)
        assert (code, document["kind"], document["sound"]) == (0, kind, True)
        assert kinds(document)[-1] == ("source files", "holds")
    shown = lm("info", chain / "export", "-q")
    assert "source files" in shown.out
    assert "files: 24" in shown.out


def test_every_break_is_found(lm: Callable[..., Any], copy: Path) -> None:
    def broken(kind: str) -> None:
        code, document = told(lm, copy / "export")
        assert code == 65
        assert (kind, "broken") in kinds(document)
        assert not document["sound"]

    source = copy / "text" / "03.txt"
    original = source.read_bytes()
    source.write_bytes(original[:-1] + b"!")
    broken("source files")
    assert told(lm, copy / "export", "--quick")[0] == 0  # the size is the same
    source.unlink()
    code, document = told(lm, copy / "export")
    assert (code, ("source files", "away") in kinds(document)) == (0, True)
    source.write_bytes(original)

    shard = copy / "set" / "shard-00000.npy"
    original = shard.read_bytes()
    shard.write_bytes(original[:200] + bytes([original[200] ^ 1]) + original[201:])
    broken("set")
    shard.write_bytes(original)

    weights = copy / "runs" / "tiny" / "checkpoints" / "step-00000003" / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    broken("checkpoint")
    weights.write_bytes(original)

    card = copy / "export" / "README.md"
    card.write_text(card.read_text() + "the best model ever\n")
    broken("export")


def test_another_checkpoint_at_the_same_place_is_no_parent(lm: Callable[..., Any], copy: Path) -> None:
    shutil.rmtree(copy / "runs")
    code, document = told(lm, copy / "export")
    assert (code, ("checkpoint", "away") in kinds(document)) == (0, True)
    make_run(copy / "runs" / "tiny", copy / "set", seed=1)
    code, document = told(lm, copy / "export")
    assert (code, document["parents"][0]["state"]) == (65, "broken")


def test_imports_and_plans(lm: Callable[..., Any], chain: Path, tmp_path: Path) -> None:
    import_model(chain / "export", tmp_path / "run")
    code, document = told(lm, tmp_path / "run")
    assert (code, kinds(document)[-1]) == (0, ("imported model", "holds"))
    (tmp_path / "unfinished").mkdir()
    shutil.copy(chain / "set" / "plan.json", tmp_path / "unfinished")
    code, document = told(lm, tmp_path / "unfinished")
    assert (code, document["kind"], document["facts"]["finished"]) == (0, "plan", False)


def test_errors_are_sentences(lm: Callable[..., Any], tmp_path: Path) -> None:
    assert lm("info", tmp_path / "nothing").code == 2
    done = lm("info", tmp_path)
    assert (done.code, "nothing that this program makes" in done.err) == (2, True)
    (tmp_path / "x.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00[]")
    assert lm("info", tmp_path / "x.safetensors").code == 2
