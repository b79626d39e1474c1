"""`python -m crosskd_hf`: the command `crosskd-hf`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
