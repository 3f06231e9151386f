"""`lm`, `python -m lmcore` and `torchrun -m lmcore train ...`: one program."""

from lmcore import interrupt


def main() -> None:
    """Answer signals before anything that takes time is imported, then run the command line."""
    interrupt.install()
    from lmcore.tools.cli import main as run

    run()


if __name__ == "__main__":
    main()
