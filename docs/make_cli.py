"""Write docs/cli.md from the commands' own `--help`: `make docs`. A test refuses a stale page."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("cli.md")
HEADER = """# Command reference

Made from `--help` by `make docs`; do not edit. Exit codes, for all commands: 0 ok, 1 a bug of ours, 2 usage or
configuration, 65 bad data, 70 training diverged, 73 cannot create the output, 74 I/O error or disk full, 75 try again
(locked, or preempted after saving), 130 and 143 interrupted after saving.

Completion of commands and options in your shell: `lm --install-completion`.
"""


def render() -> str:
    """The page as it should be. Width, colour and style are fixed, so that every machine renders the same text."""
    os.environ |= {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1"}
    from typer.testing import CliRunner

    from lmcore.tools.cli import app

    runner = CliRunner()
    parts = [HEADER]
    for name in [None, *(command.name for command in app.registered_commands)]:
        shown = runner.invoke(app, [*([name] if name else []), "--help"], prog_name="lm").stdout
        text = "\n".join(line.rstrip() for line in shown.strip("\n").splitlines())
        text = re.sub(r"\n{3,}", "\n\n", text)
        parts.append(f"## lm{' ' + name if name else ''}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    PAGE.write_text(render(), encoding="utf-8")
