"""Every command that a message, a help text or a page advises can be pasted: it parses as the program itself parses it.

The source is walked for texts that hold `lm NAME ...`; what stands for a value there (PATH, a formatted field) becomes
a word. Each command must name a command that there is, options that it has with values that they take, and all
arguments that it needs.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from lmcore.tools.cli import app

ROOT = Path(__file__).parents[2]
GROUP = typer.main.get_command(app)

VALUE = "7"  # a formatted field: a number, a path, a name


def texts(path: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, text, whether it is a docstring) of every string of a file; formatted fields become VALUE."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body
        and isinstance(node.body[0], ast.Expr)
    }  # fmt: skip
    inside = {id(v) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for v in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [str(v.value) if isinstance(v, ast.Constant) else VALUE for v in node.values]
            yield node.lineno, "".join(parts), False
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, node.value, id(node) in docstrings


def advised(text: str) -> Iterator[str]:
    """The commands in a message: from `lm` to where the command or the sentence ends."""
    for match in re.finditer(r"(?<![\w./`'-])lm ([a-z][a-z-]*)([^\n;]*)", text):
        yield f"{match[1]}{match[2]}"


def parsed(command: str) -> str | None:
    """What is wrong with a command (without `lm`), None when it parses."""
    words = _words(command)
    if "..." in words:
        return "... is no argument"
    name, *arguments = words
    if name not in GROUP.commands:
        return f"there is no command {name}"
    if arguments[-1:] == [VALUE] and _refusal(name, arguments[:-1]) is None:
        return None  # a field that holds more options
    return _refusal(name, arguments)


def _words(command: str) -> list[str]:
    """Up to where the command ends: at the end of the sentence, a comma, or a word that goes on with the sentence."""
    found: list[str] = []
    lexer = shlex.shlex(command.partition("  ")[0], posix=True, punctuation_chars=False)
    lexer.whitespace_split = True
    lexer.commenters = ""
    try:
        for word in lexer:
            bare = word.rstrip(".,:`)")
            if found and bare in ENDS:
                break
            found.append(bare or word)
            if (bare != word and word != "." and bare) or "(" in word.strip("("):
                if command.count(f"'{word}'") or command.count(f'"{word}"'):
                    continue  # quoted, so the mark is part of it
                break
    except ValueError:
        pass  # the quotation is cut off with the sentence
    return found


ENDS = ("says", "say", "writes", "and", "or", "then", "to", "is", "makes", "was")


def _refusal(name: str, arguments: list[str]) -> str | None:
    try:
        GROUP.commands[name].make_context(name, list(arguments))
    except Exception as error:  # whatever the parser of the command line raises
        return str(error) or type(error).__name__
    return None


# Where a text names a command instead of advising it, the sentence goes on behind the name.
NAMED = re.compile(
    r"^(?:[a-z-]+)(?:$|\.$|[),']|,? (?:and|or|to|does|makes|made|adopts|lists|again|with the|on the|keeps|drops|takes|"
    r"that|was|is|itself|did|say|one|writes|verifies|has|command|would|reads|gives)\b)"
)


def messages() -> list[tuple[str, str]]:
    found = []
    for folder in ("lmcore", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for line, text, is_docstring in texts(path):
                if is_docstring and not (folder == "tools" and "Examples:" in text):
                    continue
                if is_docstring:
                    text = text.partition("Examples:")[2]
                for command in advised(text):
                    if not NAMED.match(command):
                        found.append((f"{path.relative_to(ROOT)}:{line}", command))
    return found


def test_the_walk_finds_the_hints() -> None:
    assert len(messages()) > 60


@pytest.mark.parametrize(("where", "command"), messages())
def test_a_command_that_is_advised_can_be_pasted(where: str, command: str) -> None:
    assert parsed(command) is None, f"{where}: lm {command}: {parsed(command)}"


def pages() -> list[tuple[str, str]]:
    found = []
    for page in sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")]):
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").split("\n"):
                for command in re.findall(r"(?:^|[;|&(]\s*|do |\$ )lm ([a-z][a-z-]* ?[^;|&>]*)", line):
                    found.append((page.name, command))
    return found


@pytest.mark.parametrize(("page", "command"), pages())
def test_a_command_of_the_docs_parses(page: str, command: str) -> None:
    name, *arguments = shlex.split(command, comments=True)
    assert name in GROUP.commands
    assert _refusal(name, arguments) is None, f"{page}: lm {command}"
