"""`python -m lmcore` and `torchrun -m lmcore train ...`: the same program as `lm`."""

from lmcore.tools.cli import main

if __name__ == "__main__":
    main()
