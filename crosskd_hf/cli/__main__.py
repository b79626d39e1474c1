"""`python -m crosskd_hf.cli`: as `python -m crosskd_hf`."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
