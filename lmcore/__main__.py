"""`lm`, `python -m lmcore` and `torchrun -m lmcore train ...`: one program."""

import os

from lmcore import interrupt


def main() -> None:
    """Answer signals before anything that takes time is imported, then run the command line."""
    _occupy_standard_descriptors()
    interrupt.install()
    from lmcore.tools import cli, ui

    ui.open_streams()
    cli.main()


def _occupy_standard_descriptors() -> None:
    """Where a shell closed one (`>&-`), the next file that is opened would get its number, and what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number


if __name__ == "__main__":
    main()
