"""A `.pt` file is read by a child that may neither run its code nor take the machine with it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lmcore.data import tensor_file
from lmcore.data.foreign import recognise
from lmcore.data.tensor_file import Refused, TensorIds, find_ids

IDS = np.arange(12_345) % 777


def write_all_forms(folder: Path) -> dict[str, int]:
    """Files that torch writes, and whether their ids can be mapped in place (offset > 0)."""
    ids = torch.from_numpy(IDS)
    torch.save(ids, folder / "plain.pt")
    torch.save({"ids": ids.int(), "n": 3}, folder / "dictionary.pt")
    torch.save(ids.reshape(5, -1), folder / "rows.pt")
    torch.save(torch.cat([ids, ids])[:12_345], folder / "a-view-of-more.pt")
    torch.save(ids.reshape(-1, 5).t(), folder / "columns.pt")
    torch.save(ids, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    return {"plain": 1, "dictionary": 1, "rows": 1, "a-view-of-more": 1, "columns": 0, "legacy": 0}


def test_ids_are_found_in_every_form(tmp_path: Path) -> None:
    in_place = write_all_forms(tmp_path)
    expected = {"columns": IDS.reshape(-1, 5).T.reshape(-1)}
    found = recognise(tmp_path)
    assert not found.faults
    assert {file.path.stem for file in found.files} == set(in_place)
    for file in found.files:
        np.testing.assert_array_equal(file.array(), expected.get(file.path.stem, IDS))
        assert (file.data == file.path and file.offset > 0) == bool(in_place[file.path.stem])


class Payload:
    """What it does when somebody unpickles it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def test_what_is_no_plain_tensor_is_refused_and_the_others_are_read(tmp_path: Path) -> None:
    """A storage of 64 GiB announced in a file of 100 KB, a tensor of one number that claims to be 10^12, and so on."""
    torch.save(torch.arange(12_345), tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    raw = (tmp_path / "a.pt").read_bytes()
    number = b"M" + (12_345).to_bytes(2, "little")
    assert number in raw
    (tmp_path / "a.pt").write_bytes(raw.replace(number, b"\x8a\x05" + (1 << 33).to_bytes(5, "little")))
    torch.save(torch.zeros(1, dtype=torch.int64).expand(10**12), tmp_path / "b.pt")
    torch.save(torch.from_numpy(IDS), tmp_path / "c.pt")
    with zipfile.ZipFile(tmp_path / "d.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02garbage")
    torch.save({"x": Payload(tmp_path / "canary")}, tmp_path / "e.pt")
    torch.save(torch.ones(9), tmp_path / "f.pt")
    torch.save([torch.arange(3), torch.arange(4)], tmp_path / "g.pt")
    (tmp_path / "canary").unlink(missing_ok=True)  # made while pickling, if at all
    found = recognise(tmp_path)
    assert [file.path.name for file in found.files] == ["c.pt"]
    faults = {Path(fault.where).name: (fault.code, fault.message) for fault in found.faults}
    assert [faults[f"{name}.pt"][0] for name in "abdefg"] == ["V206", "V206", "V206", "V206", "V204", "V204"]
    assert faults["b.pt"][1] == "its tensor is many times larger than the file"
    assert faults["e.pt"][1] == "cannot be read without running code that it names (posix.system)"
    assert faults["f.pt"][1] == "holds torch.float32, not integers"
    assert not (tmp_path / "canary").exists()


def test_the_limits_hold() -> None:
    """An allocation beyond the limit fails in the child; a loop is ended by the kernel."""
    program = f"import sys; sys.path.insert(0, {str(Path(tensor_file.__file__).parent)!r}); import tensor_file as t\n"
    run = subprocess.run(
        [sys.executable, "-c", program + "t._limit(0)\ntry: bytearray(2 << 30)\nexcept MemoryError: print('held')"],
        capture_output=True,
        check=True,
    )
    if os.path.exists("/proc/self/statm"):
        assert run.stdout == b"held\n"
    run = subprocess.run(
        [sys.executable, "-c", program + "t._CPU_FREE_S = 0\nt._limit(0)\nwhile True: pass"],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert run.returncode < 0


def test_the_file_under_way_is_blamed_when_the_reader_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [Path(name) for name in ("a", "b", "c", "d")]
    asked: list[list[str]] = []

    def dies_at_b_and_d(left: list[Path]) -> tuple[list[dict[str, object]], str]:
        asked.append([str(path) for path in left])
        answers: list[dict[str, object]] = []
        for path in left:
            if str(path) in ("b", "d"):
                return answers, "killed"
            answers.append({"path": str(path), "dtype": "<i8", "shape": [3], "offset": 64})
        return answers, ""

    monkeypatch.setattr(tensor_file, "_ask", dies_at_b_and_d)
    found = find_ids(paths)
    assert asked == [["a", "b", "c", "d"], ["c", "d"]]
    assert [isinstance(found[path], TensorIds) for path in paths] == [True, False, True, False]
    assert found[Path("b")] == Refused("V206", "reading it was stopped: killed")
