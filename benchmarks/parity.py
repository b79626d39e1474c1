"""Compare with the authors' figures: `python benchmarks/parity.py tests/golden/*.json` (see tests/parity)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.parity.steps import main

if __name__ == "__main__":
    sys.exit(main())
