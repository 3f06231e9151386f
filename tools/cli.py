"""The Typer app and the outermost boundary: arguments in, exit code out.

`main` is the entry point of `lm`, of `python -m lmcore` and of `torchrun -m lmcore`. Typer prints usage errors itself
(exit 2); here LmError becomes one sentence and its exit code, and everything else is a bug of ours (exit 1, traceback
with --debug).
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated

import typer

from lmcore.errors import Exit, LmError, from_os_error
from lmcore.heap import bound_kernel_cache

from . import ui

app = typer.Typer(
    name="lm",
    help="Pretrain language models from verified token shards.",
    epilog="Start here: lm tokenize --dataset stdlib, then lm split shards/stdlib, then lm train. "
    "Each command explains itself with --help.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version
        from pathlib import Path

        import lmcore

        try:
            number = version("lmshards")
        except PackageNotFoundError:
            number = "(not installed)"
        typer.echo(f"lmshards {number} from {Path(lmcore.__file__).parent}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None: ...


_COMMANDS = {
    "Data": {
        "tokenize": "tokenize",
        "validate": "validate",
        "split": "split",
        "inspect": "inspect",
        "import": "adopt",  # `import` is a keyword: no module can have this name
        "merge": "merge",
    },
    "Model": {
        "plan": "plan",
        "train": "train",
        "eval": "evaluate",
        "generate": "generate",
        "plot": "plot",
        "compare": "compare",
        "export": "export",
        "import-model": "import_model",
        "info": "info",
    },
}
"""Panel of `lm --help` -> command -> module of this package, whose `command` function it is."""

for _panel, _modules in _COMMANDS.items():
    for _name, _module in _modules.items():
        app.command(_name, rich_help_panel=_panel)(importlib.import_module(f".{_module}", __package__).command)


_TEXTS = {
    "generate": ("--prompt", "-p", "--stop"),
    "inspect": ("--text",),
    "tokenize": ("--separator",),
}
"""Options that may be empty; everywhere else nothing is what a variable of the shell holds that was never set."""


def _refuse_empty(arguments: list[str]) -> None:
    """LmError (2) that names the option of an empty argument, which would mean a default or the current directory."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name, equals, value = argument.partition("=")
        if argument == "":
            what = before if before.startswith("-") else "an argument"
        elif argument.startswith("--") and equals and not value:
            what = name
        else:
            continue
        if not {what, before}.intersection(_TEXTS.get(arguments[0], ())):
            raise LmError(f"{what} is empty; is a variable of the shell not set?", hint="Leave it out for the default.")


def main(arguments: list[str] | None = None) -> None:
    """Run `lm` and leave with an exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    # Written anywhere on the line, --debug means the same.
    arguments = [a for a in arguments if a != "--debug"]
    bound_kernel_cache()
    try:
        _refuse_empty(arguments)
        app(arguments, prog_name="lm")
    except LmError as error:
        if debug:
            raise
        if not error.told:
            ui.print_error(error.message, error.hint)
        sys.exit(int(error.code))
    except BrokenPipeError:
        ui.leave_quietly_on_closed_pipe()
    except KeyboardInterrupt:
        sys.exit(int(Exit.SIGINT))
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.errno is not None:  # a disk that fails anywhere is no bug of ours
            told = from_os_error(error, error.filename or "lm", "read or write")
            ui.print_error(told.message, told.hint)
            sys.exit(int(told.code))
        ui.print_error(
            f"{type(error).__name__}: {error}",
            "This is a bug of lmshards: run the command again with --debug and report what it prints.",
        )
        sys.exit(int(Exit.BUG))
