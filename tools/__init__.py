"""The `lm` program: one file per command, the Typer app (cli.py) and the console (ui.py). Installed as lmcore.tools."""
