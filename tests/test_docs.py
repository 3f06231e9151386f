"""The documentation keeps up with the code: the command page is current, links resolve, nothing names this machine."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_the_command_page_is_current():
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'docs')!r}); import make_cli; print(make_cli.render(), end='')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT / "docs")
    assert done.returncode == 0, done.stderr
    assert done.stdout == module.PAGE.read_text(encoding="utf-8"), "docs/cli.md is stale: run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_resolve(page):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_in_the_docs_exist(page):
    from lmcore.tools.cli import app

    known = {command.name for command in app.registered_commands}
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        for name in re.findall(r"(?:^|\s)lm ([a-z][a-z-]*)", block, flags=re.MULTILINE):
            assert name in known, f"{page.name}: lm {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_options_in_the_docs_exist(page):
    """Every `--option` of an `lm` command shown in a shell block is one that the command has."""
    import typer

    from lmcore.tools.cli import app

    group = typer.main.get_command(app)
    for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:^|\s)lm ([a-z][a-z-]*)(.*)", line.partition("  #")[0])
            if not match:
                continue
            options = {o for p in group.commands[match[1]].params for o in [*p.opts, *p.secondary_opts]} | {"--help"}
            for option in re.findall(r"(?<=\s)(--[a-z][a-z-]*)", match[2]):
                assert option in options, f"{page.name}: lm {match[1]} {option}"


def test_the_troubleshooting_page_quotes_real_messages():
    """Each quoted piece of a message stands in the source, so the page cannot fall behind it."""
    source = "\n".join(
        path.read_text(encoding="utf-8") for folder in ("lmcore", "tools") for path in (ROOT / folder).rglob("*.py")
    )
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # sentences that are broken over lines
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    for heading in re.findall(r"^\*\*(`.*?)\*\*", page, flags=re.MULTILINE):
        for quoted in re.findall(r"`([^`]+)`", heading):
            for piece in quoted.split("..."):
                assert piece.strip() in source, f"no message says: {quoted}"


def test_commands_named_in_messages_exist():
    """A hint such as "lm validate --deep" in the source names a command and options that there are."""
    import typer

    from lmcore.tools.cli import app

    group = typer.main.get_command(app)
    for path in [p for folder in ("lmcore", "tools") for p in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(v.value) if isinstance(v, ast.Constant) else "X" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            for name, rest in re.findall(r"\blm ([a-z][a-z-]+)((?:(?!\blm )[^\n;`')])*)", text):
                assert name in group.commands, f"{path.name}:{node.lineno}: lm {name}"
                known = {o for p in group.commands[name].params for o in [*p.opts, *p.secondary_opts]} | {"--help"}
                for option in re.findall(r"(?<=\s)(--[a-z][a-z-]*)", rest):
                    assert option in known, f"{path.name}:{node.lineno}: lm {name} {option}"
