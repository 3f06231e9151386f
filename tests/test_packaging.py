"""The wheel holds what the tree holds, the metadata lists every package, `tools` never leaks as a top-level name."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tree() -> set[str]:
    """Every module and preset of the checkout under the name that it has in a wheel."""
    names = {str(p.relative_to(ROOT)) for p in (ROOT / "lmcore").rglob("*.py")}
    names |= {f"lmcore/tools/{p.name}" for p in (ROOT / "tools").glob("*.py")}
    names |= {str(p.relative_to(ROOT)) for p in (ROOT / "lmcore" / "presets").glob("*.yaml")}
    return names | {"lmcore/py.typed"}


def test_the_package_list_is_complete():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    on_disk = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "lmcore").rglob("__init__.py")}
    assert listed == on_disk | {"lmcore.tools"}


def test_no_command_can_be_run_as_a_script():
    """`python tools/tokenize.py` would shadow the standard library's tokenize."""
    for path in (ROOT / "tools").glob("*.py"):
        assert "__main__" not in path.read_text(), path


def test_constraints_pin_every_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    for requirement in wanted:
        name = requirement
        for separator in ">=<;[ ":
            name = name.partition(separator)[0]
        assert name.lower().replace("_", "-") in pinned, requirement
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    subprocess.run(["cp", "-r", *(str(ROOT / n) for n in ("lmcore", "tools", "pyproject.toml", "README.md")), source])
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, source],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_tree_and_nothing_else(wheel):
    inside = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert inside == tree()


def test_an_installed_wheel_works_anywhere(wheel, tmp_path):
    """Unpacked as pip would, run outside the checkout and inside it: the same package answers both times."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    program = "import lmcore, lmcore.tools.cli as c; print(lmcore.__file__, c.__file__)"
    for folder in (tmp_path, site):
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {program}"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [str(site / "lmcore/__init__.py"), str(site / "lmcore/tools/cli.py")]
    assert not (site / "tools").exists()


def test_the_checkout_runs_itself(tmp_path):
    """With the repository on the path, nothing installed: `python -m lmcore` finds ../tools."""
    program = "import sys, lmcore.tools.cli as c; print(c.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {program}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent.name == "tools"
